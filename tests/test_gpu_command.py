"""`python -m tests.gpu`: it keeps its time whatever its jobs do, and its rehearsal on a CPU goes through them."""

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch

from . import gpu, processes
from .gpu import __main__ as command
from .gpu import parts, runner
from .gpu.runner import Job

TOYS = "tests.gpu.toys"
TOY = [
    Job("hangs", f"{TOYS}:hang", 1),
    Job("raises", f"{TOYS}:after_a_row", 1, ("raise",)),
    Job("is killed", f"{TOYS}:after_a_row", 1, ("kill",)),
    Job("is not there", f"{TOYS}:nothing_of_this_name", 1),
    Job("works", f"{TOYS}:work", 2),
]


@pytest.fixture(scope="module", autouse=True)
def server(tmp_path_factory):
    """The server of processes runs: its start takes seconds, which the tests below would count."""
    output = tmp_path_factory.mktemp("server") / "output"
    processes.finish(processes.begin(int, output=output), output)


def run(folder: Path, seconds: float, jobs: list[Job]) -> dict:
    report = runner.Report(folder, ["python"], seconds / 60, dry=True)
    runner.run(jobs, report, seconds, {}, dry=True)
    found = json.loads((folder / "report.json").read_text())
    return {job["name"]: job for job in found["jobs"]}


def ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


def test_jobs_that_fail_hurt_no_other_and_the_time_is_kept(tmp_path, capsys):
    began = time.monotonic()
    jobs = run(tmp_path, 12, TOY)
    assert time.monotonic() - began < 12
    assert jobs["hangs"]["state"] == "took too long: ended after 2 s"
    assert ended(jobs["hangs"]["rows"][0]["child"])
    assert jobs["raises"]["state"] == "failed: RuntimeError: an artificial failure"
    assert jobs["is killed"]["state"] == "killed by SIGKILL"
    assert jobs["raises"]["rows"] == jobs["is killed"]["rows"] == [{"found": 1}]
    assert "nothing_of_this_name" in jobs["is not there"]["state"]
    assert jobs["works"]["state"] == "done"
    assert jobs["works"]["rows"] == [{"found": 2.5}, {"found": "in the report"}]
    assert jobs["works"]["allowed"] > 6, "what the others left"
    log = (tmp_path / "log.txt").read_text()
    assert "in fail_artificially" in log.split("=== raises")[0], "where it hung"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.txt", "report.json", "report.md"]


def test_when_all_hang_each_has_its_share_and_the_sum_is_the_time(tmp_path, capsys):
    began = time.monotonic()
    jobs = run(tmp_path, 4, [Job("first", f"{TOYS}:hang", 3), Job("second", f"{TOYS}:hang", 1)])
    assert time.monotonic() - began < 4.5
    assert jobs["first"]["allowed"] == pytest.approx(2.94, abs=0.05)
    assert jobs["second"]["allowed"] == pytest.approx(0.98, abs=0.2)


def test_a_job_that_could_not_begin_in_its_time_does_not_begin_later(tmp_path, capsys):
    """As where the server of processes takes longer to import everything than the first job has."""
    server = forkserver._forkserver._forkserver_pid
    os.kill(server, signal.SIGSTOP)
    try:
        jobs = run(tmp_path, 0.5, [Job("late", f"{TOYS}:after_a_row", 1, ("raise",))])
    finally:
        os.kill(server, signal.SIGCONT)
    assert jobs["late"]["state"] == "could not be started in its time"
    time.sleep(0.5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json", "report.md"]


def test_a_needed_job_that_fails_is_the_last(tmp_path, capsys):
    jobs = run(tmp_path, 5, [Job("first", f"{TOYS}:after_a_row", 1, ("raise",), needed=True), TOY[-1]])
    assert jobs["works"]["state"] == "not reached"


def long_command(folder: str) -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    runner.CONTEXT.set_forkserver_preload([])  # its own server starts at once
    run(Path(folder), 60, TOY[:1])
    return 0


def test_a_command_that_is_asked_to_end_ends_its_job_and_leaves_its_report(tmp_path):
    process = processes.begin(long_command, str(tmp_path), output=tmp_path.parent / "output")
    report, end = tmp_path / "report.json", time.monotonic() + 30
    while not report.exists() or "child" not in report.read_text():
        assert time.monotonic() < end
        time.sleep(0.05)
    process.terminate()
    process.join(10)
    job = json.loads(report.read_text())["jobs"][0]
    assert job["state"] == "interrupted"
    assert ended(job["rows"][0]["child"])


def test_tables_are_markdown():
    rows = [{"a": 1234.56, "b": "x|y"}, {"a": 0.12345, "c": True}]
    assert runner.table(rows) == [
        "| a | b | c |", "| --- | --- | --- |", "| 1,235 | x/y |  |", "| 0.123 |  | True |",
    ]  # fmt: skip


def test_wheels_are_unpacked_but_for_those_of_another_python(tmp_path, capsys):
    names = {"one-1.0-py3-none-any": "one.py", "two-1.0-cp27-cp27m-linux_x86_64": "two.py"}
    names["three-1.0-cp38-abi3-linux_x86_64"] = "three-1.0.data/purelib/three.py"
    for wheel, file in names.items():
        with zipfile.ZipFile(tmp_path / f"{wheel}.whl", "w") as archive:
            archive.writestr(file, "")
    site = command.unpack(tmp_path, tmp_path / "site")
    assert sorted(path.name for path in site.glob("*.py")) == ["one.py", "three.py"]
    assert "two-1.0-cp27-cp27m-linux_x86_64.whl: for another Python, left out" in capsys.readouterr().out


def test_unknown_words_show_the_usage(capsys):
    for words in ([], ["minutes=1"], ["out=x", "minuets=1"], ["out=x", "--dryrun"]):
        assert command.main(words) == 2
        assert capsys.readouterr().out.strip() == gpu.__doc__.strip()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_measured(tmp_path):
    with pytest.raises(RuntimeError, match="no CUDA GPU"):
        parts.machine(runner.Setting(False, 1.0, tmp_path, tmp_path), print)


ONE_OF_EACH = "only=machine,golden,tests,steps mae-large,steps dino-base,input,pretraining,trace"


def rehearse(out: Path, only: str, *more: str) -> tuple[int, dict[str, dict]]:
    words = [f"out={out}", "--dry-run", only, *more]
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu", *words], cwd=Path(__file__).parents[1], capture_output=True, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr
    found = json.loads((out / "report.json").read_text())
    return done.returncode, {job["name"]: job for job in found["jobs"]}


def test_the_rehearsal_goes_through_every_kind_of_job(tmp_path):
    status, jobs = rehearse(tmp_path, ONE_OF_EACH.replace("steps mae-large,", ""), "minutes=6")  # as dino-base
    assert {name: job["state"] for name, job in jobs.items()} == dict.fromkeys(jobs, "done")
    assert status == 0
    assert len(jobs) == 8
    assert all(row["loss"] < 1e-4 for row in jobs["golden"]["rows"] if row["precision"] == "float32" and "loss" in row)
    outcomes = {row["outcome"] for row in jobs["tests"]["rows"]}
    assert outcomes == {"passed", "skipped"}
    assert all(row["why"] for row in jobs["tests"]["rows"] if row["outcome"] == "skipped")
    rows = {row["variant"]: row for row in jobs["steps dino-base"]["rows"]}
    assert rows["CUDA graphs"]["failed"] == "not built"
    assert all(rows[variant]["images/s"] > 0 for variant in parts.VARIANTS)
    assert all(rows[variant]["times plain bf16"] > 0 for variant in parts.VARIANTS if "sslvit" in variant)
    assert "product rate" in rows["sslvit bf16"]["aims"]
    assert all(row["images/s"] > 0 for row in jobs["input"]["rows"])
    assert {"k-NN before, %", "k-NN after, %"} <= {row["what"] for row in jobs["pretraining"]["rows"]}
    for name in ("mae", "dino"):
        assert jobs[f"trace {name}"]["rows"][0]["cost 3"]
        assert (tmp_path / f"trace_{name}.json.gz").stat().st_size > 1000
    text = (tmp_path / "report.md").read_text()
    assert "its figures mean nothing" in text.splitlines()[0]
    assert text.count("\n## ") == len(jobs)


@pytest.mark.slow  # five minutes each at most: those that hang use their share
@pytest.mark.parametrize("first", ["raise", "kill", "hang"])
def test_an_artificial_failure_in_a_job_of_each_kind_is_named_and_the_others_are_done(tmp_path, first):
    """Each kind of failure in each kind of job, over the three cases."""
    kinds = ["raise", "kill", "hang"]
    failing = ["golden", "tests", "steps mae-large", "steps dino-base", "input", "pretraining", "trace dino"]
    chosen = {name: kinds[(kinds.index(first) + i) % 3] for i, name in enumerate(failing)}
    words = ",".join(f"{name}:{how}" for name, how in chosen.items())
    began = time.monotonic()
    status, jobs = rehearse(tmp_path, ONE_OF_EACH, f"fail={words}", "minutes=5")
    assert time.monotonic() - began < 305
    assert status == 1
    expected = {"raise": "failed: RuntimeError: an artificial failure", "kill": "killed by SIGKILL"}
    for name, job in jobs.items():
        how = chosen.get(name)
        assert job["state"].startswith("took too long") if how == "hang" else job["state"] == expected.get(how, "done")
    assert len(jobs) == 9
