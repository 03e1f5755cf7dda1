"""One file that says whether runs learn, with pictures of what they have learned. It opens from the disk, without a
network, and can be mailed. A run writes it too, as <run>/report.html (log.report=false: not).

verdict.py judges a run, with all thresholds. facts.py reads a run directory, curves.py its log, pictures.py loads the
encoder and draws. page.py puts charts.py, tables.py and map.py in order, in the shell that other pages share
(shell.py). May import evaluation, objectives, data and what is below, but not run or pretraining.
"""

import time
from pathlib import Path

from ..arguments import first_line
from ..checkpoints import textfile
from ..checkpoints.journal import REPORT
from ..checkpoints.lock import Lock
from ..data import Source
from ..distributed import say
from ..errors import UserError, check_range
from ..evaluation.config import Report as Config
from ..metrics import MetricsLog
from ..objectives import Objective
from .facts import Facts, command_name, gather, runs_in
from .page import page
from .pictures import Pictures
from .shell import MARK

LEAST = 1.0  # seconds, below which pictures are not begun at the end of a run
PICTURES_FOR = 4  # runs of a page that have pictures; more would make it too large for a mail
MOST_BYTES = 5_000_000


def report(runs: list[str], config: Config) -> None:
    """Write the page of some runs. Raises UserError."""
    if not runs:
        raise UserError("report needs runs: sslvit report runs/a runs/b, or a folder of runs.")
    check_range("", config, 0, None, "seconds")
    out = Path(config.out).expanduser()
    check_out(out, config.out)
    found = [gather(path, name) for path, name in runs_in(runs)]
    shown = _pictures(found, config) if config.pictures else {}
    text = page(found, shown)
    write(out, text)
    for one in found:
        say(f"{one.name}: {one.verdict.state}. {one.verdict.headline}")
    say(f"written to {config.out} ({len(text.encode()) / 1e6:.1f} MB)")


def _pictures(found: list[Facts], config: Config) -> dict[Path, Pictures]:
    from . import pictures

    for one in found[PICTURES_FOR:]:
        one.missing.append(
            f"A page has pictures of {PICTURES_FOR} runs at most: `sslvit report {one.path}` makes those of this one."
        )
    shown = {}
    for one in found[:PICTURES_FOR]:
        shown[one.path] = pictures.make(one, config.seconds, config.data, umap=True)
    return shown


def check_out(out: Path, given: str) -> None:
    """Before the work: raises UserError if `out` cannot be written, or is a file that this command did not write."""
    if not out.parent.is_dir() or (out.exists() and not out.is_file()):  # reading a pipe would wait for ever
        raise UserError(f"out={given} must be a file in a folder that exists.")
    if out.exists():
        with out.open("rb") as file:
            if MARK.encode() not in file.read(200):
                raise UserError(f"out={given} exists and is no report of sslvit: give another name.")


def write(path: Path, text: str) -> None:
    """Raises UserError."""
    try:
        textfile.write(path, text)
    except OSError as error:
        raise UserError(f"The report cannot be written to {path}: {error.strerror or error}.") from error


def of_run(run_dir: Path, running: bool, lock: Lock | None, seconds: float = 0.0, memory: int = 0) -> float:
    """Write <run>/report.html, within a run. Returns the seconds that it took. Never raises an error.

    lock: of the folder, which must still be that of this run. seconds: for pictures; 0: none. memory: bytes that the
    process had at most.
    """
    began = time.perf_counter()
    try:
        facts = gather(run_dir, running=running)
        facts.memory = memory
        shown = {}
        if seconds >= LEAST:
            from . import pictures

            shown[facts.path] = pictures.make(facts, seconds)
        else:
            facts.missing.append(
                f"Pictures take longer than this page may: `sslvit report {command_name(facts)}` makes them."
            )
        text = page([facts], shown)
        if lock:
            lock.check()
        write(run_dir / REPORT, text)
    except Exception as error:
        say(f"No report: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
    return time.perf_counter() - began


def pictures_while_training(run_dir: Path, objective: Objective, source: Source, log: MetricsLog, step: int) -> float:
    """Write what the model makes of eight images to TensorBoard and trackers. Returns the seconds that it took. Never
    raises an error."""
    began = time.perf_counter()
    try:
        from .live import pictures_of

        if found := pictures_of(run_dir, objective, source):
            log.write_pictures(found, step)
    except Exception as error:
        say(f"No pictures: {type(error).__name__}: {first_line(error)}")
    return time.perf_counter() - began
