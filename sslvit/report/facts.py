"""What a run directory says of a run: settings, starts, numbers, results. Nothing of it is trusted: somebody else may
have made it. Files are read only where they are regular, and up to a limit."""

import json
import math
import shlex
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from .. import objectives
from ..arguments import flatten, format_value, read_yaml
from ..checkpoints.journal import BAD_IMAGES, STARTS
from ..checkpoints.state import steps_saved
from ..errors import UserError, printable
from ..evaluation import commands
from ..evaluation.compare import cells_of
from ..evaluation.confusion import NUMBERED
from ..metrics import METRICS, SKIPPED
from . import curves
from .curves import Curves, lines_of, open_regular
from .verdict import Measured, Verdict, judge

RESULT_BYTES = 1 << 24  # of a result; knn.json of a million test images has 300 kB
STARTS_READ, BROKEN_SHOWN = 200, 50  # lines of starts.jsonl, and of bad_images.txt
BROKEN_COUNTED = 100_000
PIXELS = "pixels"  # the subject of <run>/eval/pixels/knn.json, which `sslvit knn run=pixels:<run>` writes
MOST_RUNS = 200  # of a folder
ALARM_LINES = 200  # of the log, among which the first alarm is looked for


@dataclass
class Result:
    """One number of an evaluation."""

    title: str
    subject: str  # "this run", "untrained", "pixels" or a checkpoint
    number: float
    unit: str
    interval: tuple[float, float] | None
    images: int | None  # that it was measured on
    test: str
    by_class: dict[str, float]
    confusion: list[list[int]] = field(default_factory=list)  # images of a class (row) that were said to be another
    train: str = ""  # the labelled images that it learned from


@dataclass
class Facts:
    path: Path
    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    curves: Curves = field(default_factory=Curves)
    starts: list[dict[str, Any]] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)
    broken: list[tuple[str, str]] = field(default_factory=list)  # images that could not be read, and why
    broken_count: int = 0
    checkpoints: list[int] = field(default_factory=list)
    total: int | None = None
    missing: list[str] = field(default_factory=list)  # sentences: what is missing, and which command makes it
    running: bool = False
    memory: int = 0  # bytes at the peak; 0: not known
    verdict: Verdict = field(default_factory=lambda: judge(Measured()))

    @property
    def method(self) -> str:
        return str(self.settings.get("method", "?"))


def gather(path: Path, name: str = "", running: bool | None = None) -> Facts:
    """All that is known of a run without loading its weights. running: None to find out."""
    facts = Facts(path, printable(name or path.name))
    facts.settings = _settings(facts)
    try:
        facts.curves = curves.read(path / METRICS)
    except OSError:
        facts.missing.append(f"There are no curves: {METRICS} is missing. `sslvit pretrain` writes it into its out=.")
    if facts.curves.broken:
        many = f"{facts.curves.broken} lines" if facts.curves.broken > 1 else "One line"
        facts.missing.append(
            f"{many} of {METRICS} cannot be read and {'are' if facts.curves.broken > 1 else 'is'} left out."
        )
    if facts.curves.complaint:
        facts.missing.append(f"The curves are not whole: {facts.curves.complaint}.")
    facts.starts = [one for one in map(_json, _head(path / STARTS, STARTS_READ)) if isinstance(one, dict)]
    _read_broken(facts)
    facts.checkpoints = [] if (path / "checkpoints").is_symlink() else steps_saved(path)
    if not facts.checkpoints:
        facts.missing.append("There is no checkpoint, so there are no pictures of what it has learned.")
    facts.results = [result for folder, subject in _result_folders(path) for result in _results(facts, folder, subject)]
    if not facts.results:
        facts.missing.append(
            f"It has not been evaluated: sslvit knn run={command_name(facts)} data.train=<labelled images> "
            "data.test=<others>."
        )
    facts.running = is_running(path) if running is None else running
    facts.total = total_of(facts)
    facts.verdict = judge(measured_of(facts))
    return facts


def verdict_so_far(run_dir: Path, settings: dict[str, Any], steps: int) -> Verdict:
    """Of a run that goes on, by its lines alone. Raises OSError."""
    found = curves.read(run_dir / METRICS)
    return judge(measured_of(Facts(run_dir, run_dir.name, settings, found, total=steps, running=True)))


def command_name(facts: Facts) -> str:
    return printable(shlex.quote(str(facts.path)))


def runs_in(names: list[str]) -> list[tuple[Path, str]]:
    """(directory, name) of each run that is named, or lies in a folder that is named. Raises UserError."""
    found: dict[Path, str] = {}
    for name in names:
        path = Path(name).expanduser()
        if not path.is_dir():
            raise UserError(f"{name} is no folder: give runs, or a folder of runs.")
        inside = (
            [path]
            if is_run(path)
            else sorted(child for child in path.iterdir() if not child.is_symlink() and is_run(child))
        )
        if not inside:
            raise UserError(f"{name} is no run, and holds none: a run has a config.yaml or a {METRICS}.")
        if len(inside) > MOST_RUNS:
            raise UserError(
                f"{name} holds {len(inside)} runs, and a page shows {MOST_RUNS} at most: name some of them."
            )
        found |= {child.resolve(): child.resolve().name for child in inside}
    twice = {name for name in found.values() if list(found.values()).count(name) > 1}
    return [(path, f"{path.parent.name}/{name}" if name in twice else name) for path, name in found.items()]


def is_run(path: Path) -> bool:
    return any((path / name).is_file() for name in ("config.yaml", METRICS, STARTS))


def is_running(path: Path) -> bool:
    """Whether a process holds the lock of the run. False where this cannot be known."""
    try:
        import fcntl

        with open_regular(path / ".lock") as file:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except (BlockingIOError, PermissionError):
        return True
    except (ImportError, OSError):
        return False


def _settings(facts: Facts) -> dict[str, Any]:
    path = facts.path / "config.yaml"
    try:
        if path.is_symlink() or not path.is_file():
            raise UserError(f"{path.name} is missing or a link")
        return flatten(read_yaml(path))
    except UserError as error:
        facts.missing.append(f"The settings are not known: {printable(str(error))}.".replace("..", "."))
        return {}


def _head(path: Path, count: int) -> list[bytes]:
    try:
        with open_regular(path) as file:
            return [line for line, _ in zip(lines_of(file), range(count), strict=False)]
    except OSError:
        return []


def _json(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _read_broken(facts: Facts) -> None:
    lines = _head(facts.path / BAD_IMAGES, BROKEN_COUNTED)
    pairs = [line.decode("utf-8", "backslashreplace").rstrip("\n").partition("\t") for line in lines]
    pairs = [pair for pair in pairs if pair[1]]
    facts.broken_count = len(pairs)
    facts.broken = [(printable(name[:300]), printable(reason[:300])) for name, _, reason in pairs[:BROKEN_SHOWN]]


def _result_folders(path: Path) -> list[tuple[Path, str]]:
    folder = path / "eval"
    if folder.is_symlink() or not folder.is_dir():
        return []
    below = sorted(
        child for child in folder.iterdir() if child.is_dir() and not child.is_symlink() and child.name != "features"
    )
    return [(folder, "this run"), *((child, child.name) for child in below[:20])]


def _results(facts: Facts, folder: Path, subject: str) -> list[Result]:
    """The numbers of all results of a folder that `sslvit compare` would show too."""
    found: list[Result] = []
    if not any(folder.glob("*.json")):  # the names of all results take a tenth of a second to find
        return found
    wanted = [
        (folder / f"{column.file or name}.json", column)
        for name, command in commands().items()
        for column in command.columns
    ]
    for file, column in wanted:
        try:
            with open_regular(file) as stream:
                record = json.loads(stream.read(RESULT_BYTES))
            for cell in cells_of(record, file.stem, column):
                results = record["results"]
                row = (
                    next(
                        (
                            row
                            for row in results[column.rows]
                            if tuple(row[key] for key in column.settings) == cell.settings
                        ),
                        {},
                    )
                    if column.rows
                    else results
                )
                test = record.get("test") if isinstance(record.get("test"), dict) else {}
                classes = row.get("by_class") if isinstance(row.get("by_class"), dict) else {}
                found.append(
                    Result(
                        cell.title,
                        subject,
                        cell.number,
                        column.unit,
                        _interval(row.get(f"{column.key}_interval")),
                        test.get("images") if isinstance(test.get("images"), int) else None,
                        printable(str(test.get("data", record.get("data", "")))[:200]),
                        {printable(str(key)[:80]): float(value) for key, value in list(classes.items())[:1000]},
                        _matrix(row.get("confusion")),
                        str(record.get("train"))[:400],
                    )
                )
        except FileNotFoundError:
            continue
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
            sentence = f"{printable(str(file.relative_to(facts.path)))} is no result that can be read: evaluate again."
            if sentence not in facts.missing:
                facts.missing.append(sentence)
    return found


def _matrix(value: Any) -> list[list[int]]:
    """A square of numbers, or nothing."""
    if not isinstance(value, list) or not 0 < len(value) <= NUMBERED or any(len(row) != len(value) for row in value):
        return []
    return [[int(number) for number in row] for row in value]


def _interval(value: Any) -> tuple[float, float] | None:
    return (float(value[0]), float(value[1])) if isinstance(value, list) and len(value) == 2 else None


def _number(settings: dict[str, Any], key: str) -> float | None:
    value = settings.get(key)
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) and value > 0 else None


def _per_epoch(facts: Facts) -> int | None:
    """Steps of an epoch, from a line of the log."""
    steps, epochs = facts.curves.get("epoch")
    each = float(steps[-1] / epochs[-1]) if len(steps) and epochs[-1] > 0 else 0.0
    return round(each) if 1 <= each < 1e12 else None


def total_of(facts: Facts) -> int | None:
    """Steps that the settings ask for, as config.make_plan reckons them."""
    steps, images, epochs = (_number(facts.settings, key) for key in ("steps", "images", "epochs"))
    batch, per_epoch = _number(facts.settings, "global_batch_size"), _per_epoch(facts)
    if steps:
        return int(steps)
    if images and batch:
        return int(images // batch)
    return round(epochs * per_epoch) if epochs and per_epoch else None


def _alarms(facts: Facts) -> tuple[str | None, int | None]:
    """(what the method says of the last line with a loss, the first step with an alarm)."""
    steps = facts.curves.get("loss")[0]
    alarm = getattr(objectives.find(facts.method), "alarm", None) if facts.method in objectives.names() else None
    if alarm is None or not len(steps):
        return None, None
    own = {key.removeprefix("objective."): value for key, value in facts.settings.items()}
    config = SimpleNamespace(**own)  # not checked, as `said` catches what that leads to; OmegaConf would take 30 ms

    def said(step: float) -> str | None:
        try:
            sentence = alarm(config, facts.curves.at(step))
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError):  # values that no run writes
            return None
        return None if sentence is None else str(sentence)

    last = said(steps[-1])
    some = steps[np.unique(np.linspace(0, len(steps) - 1, ALARM_LINES).astype(int))] if last else ()
    return last, next((int(step) for step in some if said(step)), None)


def _usual(facts: Facts) -> dict[str, Result]:
    """{subject: its k-NN, k = 20}."""
    return {r.subject: r for r in facts.results if r.title.startswith("k-NN") and "k=20 " in r.title}


def _evaluated(facts: Facts) -> str:
    """The usual k-NN of the run, with those of the untrained encoder and of pixels where they are known."""
    usual = _usual(facts)
    own, before, pixels = usual.get("this run"), usual.get("untrained"), _against_pixels(facts)
    if own is None:
        return ""
    interval = f" (95 % interval {own.interval[0]:.1f} to {own.interval[1]:.1f})" if own.interval else ""
    compared = f"; the untrained encoder has {before.number:.1f} %" if before else ""
    compared += f"; raw pixels have {pixels[1]:.1f} %" if pixels else ""
    return f"{own.title} of {own.images or 'the'} test images: {own.number:.1f} %{interval}{compared}."


def _against_pixels(facts: Facts) -> tuple[float, float] | None:
    """(k-NN of this run, that of pixels), if both were measured on the same images."""
    own, pixels = (_usual(facts).get(subject) for subject in ("this run", PIXELS))
    if own is None or pixels is None or (own.train, own.test, own.images) != (pixels.train, pixels.test, pixels.images):
        return None
    return own.number, pixels.number


def usual_result(facts: Facts) -> Result | None:
    """The one for a table of runs: k-NN with k = 20, or else the first."""
    own = [r for r in facts.results if r.subject == "this run" and r.unit == "%"]
    return next((r for r in own if "k=20 " in r.title), next(iter(own), None))


def measured_of(facts: Facts) -> Measured:
    found, settings = facts.curves, facts.settings
    every = [steps[-1] for steps, _ in found.columns.values() if len(steps)]
    per_epoch = _per_epoch(facts)
    alarm, first = _alarms(facts)
    mean_entropy, skipped = found.last("teacher_mean_entropy"), found.get(SKIPPED)
    loss_steps = found.get("loss")[0]
    log_every = _number(settings, "log.every_steps") or 50
    last_line = max(every) if every else None
    recent = skipped[1][-1] / log_every if len(skipped[0]) and skipped[0][-1] == last_line else 0.0
    quiet = None
    if facts.running and every:
        try:
            quiet = time.time() - (facts.path / METRICS).stat().st_mtime
        except OSError:
            quiet = None
    seconds = found.get("seconds")[1]
    return Measured(
        step=int(last_line) if last_line is not None else None,
        total=facts.total,
        running=facts.running,
        warmup=(_number(settings, "optim.warmup_epochs") or 0) * (per_epoch or 0),
        epochs=found.last("epoch"),
        loss=found.get("loss"),
        grad_norm=found.get("grad_norm"),
        knn=found.get("knn/top1"),
        knn_of=printable(str(settings.get("eval.test") or "")[:200]),
        evaluated=_evaluated(facts),
        pixels=_against_pixels(facts),
        rankme=found.get("rankme"),
        skipped=min(1.0, recent),
        prototypes=math.exp(mean_entropy) if mean_entropy is not None and mean_entropy < 50 else None,
        alarm=alarm,
        first_alarm=first,
        seconds_quiet=quiet,
        seconds_a_line=float(seconds[-1]) / len(seconds) if len(seconds) and len(loss_steps) else None,
        pretrained=bool(settings.get("model.init")),
        run=command_name(facts),
        works=getattr(objectives.find(facts.method), "WORKS", {}) if facts.method in objectives.names() else {},
        settings=settings,
        columns=found.columns,
    )


def differing(all_facts: list[Facts]) -> dict[str, list[str]]:
    """{key: its value in each run} of the settings in which runs differ, without the places that they write to."""
    keys = dict.fromkeys(key for facts in all_facts for key in facts.settings)
    rows = {key: [printable(format_value(facts.settings.get(key, ""))[:200]) for facts in all_facts] for key in keys}
    return {printable(key): row for key, row in rows.items() if len(set(row)) > 1 and key != "out"}
