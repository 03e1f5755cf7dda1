"""Jobs one after another, each in a process of its own with a deadline. This file imports nothing heavy."""

import contextlib
import datetime
import faulthandler
import importlib
import json
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sslvit.checkpoints import textfile

CONTEXT = multiprocessing.get_context("forkserver")
POLL = 0.2  # seconds between two looks at a job
RESERVE = 0.02  # of the time, kept for the end
Note = Callable[[dict[str, Any]], None]  # takes a row of a job's table; it is in the report from then on


@dataclass(frozen=True)
class Job:
    name: str
    work: str  # "module:function", called with a Setting and a Note
    share: float  # of the time, relative to the others
    arguments: tuple[Any, ...] = ()  # further ones
    needed: bool = False  # where it fails, the others are not begun


@dataclass(frozen=True)
class Setting:
    """What a job has to know."""

    dry: bool
    seconds: float  # until it is ended
    out: Path  # for files that stay
    scratch: Path  # an empty folder, deleted when the job has ended
    cifar10: Path | None = None


@dataclass
class Result:
    """A row of the report's first table, and the job's own table."""

    name: str
    state: str = "not reached"
    seconds: float = 0.0
    allowed: float = 0.0
    rows: list[dict[str, Any]] = field(default_factory=list)


class Report:
    """report.json and report.md in a folder, as far as things have come; each is whole or not there."""

    def __init__(self, out: Path, command: list[str], minutes: float, dry: bool) -> None:
        self.out, self.results = out, list[Result]()
        self.head = {"command": command, "date": datetime.datetime.now(datetime.UTC).isoformat("T", "seconds")}
        self.head |= {"minutes": minutes, "rehearsal": dry}

    def write(self) -> None:
        record = self.head | {"jobs": [asdict(result) for result in self.results]}
        textfile.write(self.out / "report.json", json.dumps(record, indent=1) + "\n")
        textfile.write(self.out / "report.md", self.markdown())

    def markdown(self) -> str:
        cards = [row["value"] for result in self.results for row in result.rows if row.get("what") == "card"]
        card = "a rehearsal at tiny sizes: its figures mean nothing" if self.head["rehearsal"] else "no GPU found"
        lines = [f"# {self.head['date'][:10]}, {cards[0] if cards else card}", ""]
        lines += [f"`{' '.join(self.head['command'])}`", ""]
        jobs = [
            {"job": r.name, "state": r.state, "seconds": round(r.seconds, 1), "of": round(r.allowed, 1)}
            for r in self.results
        ]
        lines += table(jobs)
        for result in self.results:
            lines += ["", f"## {result.name}", "", *(table(result.rows) or ["Nothing was found."])]
        return "\n".join(lines) + "\n"


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Lines of Markdown; a column for each key."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    body = [[cell(row.get(key)) for key in keys] for row in rows]
    return ["| " + " | ".join(line) + " |" for line in [keys, ["---"] * len(keys), *body]] if rows else []


def cell(value: Any) -> str:
    if isinstance(value, float):
        value = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return "" if value is None else str(value).replace("|", "/").replace("\n", " ")


def run(jobs: list[Job], report: Report, seconds: float, fail: dict[str, str], **setting: Any) -> bool:
    """Run the jobs in no more than so many seconds. Returns whether all ended well. A job's share is of the time that
    is left, so what one leaves the others have. fail: {name: "raise", "kill" or "hang"}, artificial failures."""
    end = time.monotonic() + seconds * (1 - RESERVE)
    report.results = [Result(job.name) for job in jobs]
    scratch = report.out / "scratch"
    for number, (job, result) in enumerate(zip(jobs, report.results, strict=True)):
        left = max(0.0, end - time.monotonic())
        result.allowed = left * job.share / sum(other.share for other in jobs[number:])
        result.state = "running"
        report.write()
        remove(scratch)
        scratch.mkdir()
        chosen = Setting(seconds=result.allowed, out=report.out, scratch=scratch, **setting)
        try:
            run_one(job, chosen, result, report, fail.get(job.name))
        finally:  # also when this process is asked to end
            if result.state == "running":
                result.state = "interrupted"
            report.write()
            remove(scratch)
        print(f"{job.name}: {result.state}, {result.seconds:.1f} of {result.allowed:.1f} s", flush=True)
        if job.needed and result.state.startswith("failed"):
            break
    return all(result.state == "done" for result in report.results)


def run_one(job: Job, setting: Setting, result: Result, report: Report, failure: str | None) -> None:
    began, rows = time.monotonic(), setting.out / ".rows"
    rows.unlink(missing_ok=True)
    end = began + setting.seconds
    process = CONTEXT.Process(target=_child, args=(job, setting, end, rows, setting.out / "log.txt", failure))
    try:
        with time_limit(setting.seconds):  # the first one waits until the server of processes has imported everything
            process.start()
    except TimeoutError:
        result.state, result.seconds = "could not be started in its time", time.monotonic() - began
        return
    assert process.pid is not None
    try:
        while process.is_alive() and time.monotonic() < end:
            process.join(min(POLL, max(0.0, end - time.monotonic())))
            read_rows(rows, result, report)
        late = process.is_alive()
    finally:
        for kill in (os.kill, os.killpg):  # the job, and all that it started: loader processes, tests
            with contextlib.suppress(ProcessLookupError):
                kill(process.pid, signal.SIGKILL)
        process.join(2)
        result.seconds = time.monotonic() - began
        error = read_rows(rows, result, report)
        rows.unlink(missing_ok=True)
    if late:
        result.state = f"took too long: ended after {setting.seconds:.0f} s"
    elif process.exitcode and process.exitcode < 0:
        result.state = f"killed by {signal.Signals(-process.exitcode).name}"
    else:
        result.state = f"failed: {error or f'exit status {process.exitcode}'}" if process.exitcode else "done"


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises TimeoutError in the main thread when the time is over."""

    def stop(*_: Any) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(0.01, seconds))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def read_rows(path: Path, result: Result, report: Report) -> str | None:
    """Take over what a job has written so far, into the report too. Returns its error, if it has told one."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    found = [json.loads(line) for line in lines if line.endswith("\n")]  # the last one may be half written
    rows = [line["row"] for line in found if "row" in line]
    if len(rows) > len(result.rows):
        result.rows = rows
        report.write()
    return next((line["error"] for line in found if "error" in line), None)


def _child(job: Job, setting: Setting, end: float, rows: Path, log: Path, failure: str | None) -> None:
    left = end - time.monotonic()
    if left <= 0:  # the server of processes was late, and the job has been given up
        os._exit(1)
    os.setsid()
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666), 1)
    os.dup2(1, 2)
    print(f"\n=== {job.name}, {setting.seconds:.0f} s", flush=True)
    faulthandler.dump_traceback_later(max(0.1, left - 0.5))  # shows where a job hung
    failed = 0
    with rows.open("a", encoding="utf-8") as file:

        def write(line: dict[str, Any]) -> None:
            file.write(json.dumps(line) + "\n")
            file.flush()

        def note(row: dict[str, Any]) -> None:
            print(row, flush=True)
            write({"row": row})

        try:
            if failure:
                fail_artificially(failure)
            module, name = job.work.split(":")
            getattr(importlib.import_module(module), name)(setting, note, *job.arguments)
        except BaseException as error:
            traceback.print_exc()
            write({"error": one_line(error)})
            failed = 1
    print(f"{sum(os.times()[:4]):.1f} s of CPU time", flush=True)
    os._exit(failed)  # threads and processes that a job has left do not keep it


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"[:200]


def fail_artificially(how: str) -> None:
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "hang":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(10**6)
    raise RuntimeError("an artificial failure")


def remove(folder: Path) -> None:
    """Delete a folder of this command, as far as that is possible."""
    import shutil

    shutil.rmtree(folder, ignore_errors=True)
