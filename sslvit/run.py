"""The run directory: the record of a run, what is written into it, and what may change in it.

config.yaml (resolved), starts.jsonl (command, versions and hardware of every start), metrics.jsonl, tensorboard/,
checkpoints/, bad_images.txt, nonfinite.jsonl, eval/*.json.
"""

import json
import math
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import IO, Any

from . import config as configuration
from . import data
from .config import Plan, RunConfig
from .data import Source
from .distributed import barrier, gather_objects, on_first_process, rank, say
from .errors import UserError
from .evaluation.online import rank_alarm
from .hardware import versions
from .journal import BAD_IMAGES, NONFINITE, append
from .lock import open_held
from .metrics import MetricsLog, Stopwatch, Trace, Window, amount, console_line
from .nonfinite import Skipped
from .optim import Schedule
from .saving import free_space, why
from .state import RunState, steps_saved, sweep

# Keys that may change when a run goes on: they say how long, on what and how it is watched, not what is learned.
FREE = {
    "out", "max_hours", "epochs", "steps", "images", "batch_size", "precision", "compile", "shard",
    "model.grad_checkpointing", "objective.pack", "data.train", "data.workers", "data.cache", "data.download_dir",
    "data.bad_ratio",
}  # fmt: skip
# All that a run killed in its first moment has left, or one that waits in a queue (submit.py).
BEGUN = {".lock", "starts.jsonl", "config.yaml.tmp", "submit"}
FREE_SECTIONS = ("save.", "log.", "eval.")


def open_run(run_dir: Path, config: RunConfig, device: str) -> IO[str] | None:
    """Make the directory, or check that it is this run's and that no other process trains in it. Raises UserError on
    every process before anything is written.

    Returns what holds the directory's lock until it is closed or the process ends; None on other processes.
    """
    check_directory(run_dir, config)
    barrier()  # no process looks at what the first one writes from here on

    def prepare() -> None:
        sweep(run_dir)
        _write_start(run_dir, device)
        fresh = run_dir / "config.yaml.tmp"
        configuration.save(config, fresh)
        os.replace(fresh, run_dir / "config.yaml")

    return open_held(run_dir, "out", prepare=prepare)


def check_directory(run_dir: Path, config: RunConfig) -> None:
    """Raises UserError for what is no run of these settings, nor a place for a new one. Writes nothing."""
    stored = run_dir / "config.yaml"
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(f"out={run_dir} is a file: give a directory.")
    others = {path.name for path in run_dir.iterdir()} - BEGUN if run_dir.exists() else set()
    if others and not (stored.exists() and (run_dir / "starts.jsonl").exists()):
        raise UserError(f"out={run_dir} is not empty and holds no run: give a new directory.")
    if steps_saved(run_dir):
        _refuse_other_settings(run_dir, configuration.differences(stored, config))


def _write_start(run_dir: Path, device: str) -> None:
    start = {
        "time": time.strftime("%F %T%z"),
        "command": shlex.join(sys.argv),
        "device": device,
        "host": f"{platform.machine()}, {os.cpu_count()} cores, {platform.platform()}",
        "versions": versions(),
    }
    with (run_dir / "starts.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(start) + "\n")


def check_images(saved: dict[str, Any], source: Source, where: str) -> None:
    """A run that goes on needs the images that it began with, in number, order and names: every permutation and
    schedule hangs on them. Raises UserError."""
    stored, now = saved.get("images"), images_record(source)
    if stored is not None and stored != now:
        raise UserError(
            f"data.train={where} holds {now['count']} images, and they are not the {stored['count']} that this run was "
            "started with (number, names or order differ): give those, or another out= for a new run."
        )


def images_record(source: Source) -> dict[str, Any]:
    return {"count": len(source), "names": source.identity()}


def _refuse_other_settings(run_dir: Path, differences: dict[str, tuple]) -> None:
    differences = {
        key: values for key, values in differences.items() if key not in FREE and not key.startswith(FREE_SECTIONS)
    }
    if "method" in differences:  # then every other key of the methods differs as well
        differences = {"method": differences["method"]}
    if differences:
        changes = "; ".join(f"{key} was {old} and is {new}" for key, (old, new) in sorted(differences.items()))
        raise UserError(
            f"{run_dir} holds a run with other settings: {changes}. Give the old settings to go on with it, "
            "or another out= for a new run."
        )


def writing(run_dir: Path, work: Callable[[], None]) -> None:
    """Do what writes into the run's directory. Raises UserError if that cannot be written to."""
    try:
        work()
    except OSError as error:
        saved = steps_saved(run_dir)
        raise UserError(
            f"{run_dir} cannot be written to ({why(error)}; {amount(free_space(run_dir))} are free): make room and "
            f"start the same command again, which goes on from {f'step {saved[-1]}' if saved else 'the beginning'}."
        ) from error


class Recorder:
    """Writes a run's lines: to metrics.jsonl and TensorBoard, and on the console of the first process."""

    def __init__(
        self, run_dir: Path, config: RunConfig, plan: Plan, schedule: Schedule, run: RunState, source: Source,
        lock: IO[str] | None, alarm: Callable[[dict[str, float]], str | None] | None = None,
    ) -> None:  # fmt: skip
        """alarm: the objective's, which looks at the means of a line."""
        self.run_dir, self.every, self.plan, self.schedule = run_dir, config.log.every_steps, plan, schedule
        self.lock = lock  # held as long as this is
        self.alarm, self.stop_on_collapse, self.warned = alarm, config.log.on_collapse == "stop", False
        self.log = MetricsLog(run_dir, run.step, config.log.tensorboard) if rank() == 0 else None
        self.window, self.watch = Window(), Stopwatch()
        self.skipped = Skipped(run_dir, source, config.log.max_nonfinite)
        self.trace = Trace(run_dir / "trace.json" if config.log.profile and rank() == 0 else None)
        self.window.load(run.window)
        self.seen = run.images_seen

    def due(self, step: int) -> bool:
        return step % self.every == 0 or step == self.plan.steps

    def line(self, run: RunState) -> None:
        """The line of a step, at which all processes meet."""
        self.look(run)
        timing = self.watch.look(run.images_seen - self.seen)
        self.seen = run.images_seen
        left = (
            (self.plan.steps - run.step) * self.plan.layout.global_batch_size / max(1e-9, timing["images_per_second"])
        )
        record = {
            "step": run.step,
            "epoch": run.step / self.plan.steps_per_epoch,
            "images": run.images_seen,
            "seconds": run.seconds,
            **self.window.close(),
            "lr": self.schedule.lr(run.step - 1),
            "weight_decay": self.schedule.weight_decay(run.step - 1),
            **timing,
        }
        self.write(record)
        self._sound(self.alarm(record) if self.alarm and "loss" in record else None, run.step)
        say(
            console_line({**record, "seconds_left": left}, self.plan.steps, self.plan.steps / self.plan.steps_per_epoch)
        )

    def rank(self, run: RunState, rankme: float) -> None:
        """The line of an effective rank."""
        if not math.isnan(rankme):
            self.write({"step": run.step, "images": run.images_seen, "rankme": rankme})
            self._sound(rank_alarm(rankme), run.step)

    def _sound(self, found: str | None, step: int) -> None:
        """Raises UserError if the features have collapsed and log.on_collapse=stop; warns once otherwise."""
        if found and self.stop_on_collapse:
            raise UserError(f"{found} The run stops at step {step}, as log.on_collapse=stop asks.")
        if found and not self.warned:
            say(f"Warning at step {step}: {found}")
        self.warned |= bool(found)

    def write(self, record: dict[str, float | int]) -> None:
        """A line, at which all processes meet. Raises UserError on all of them if it cannot be written."""
        on_first_process(lambda: writing(self.run_dir, partial(self.log.write, record)), all_cores=False)

    def look(self, run: RunState) -> None:
        """At steps that were skipped since the last look. Raises UserError on all processes if they are too many in a
        row: then nothing is saved."""
        lines, warnings = self.skipped.look(self.window, run)
        if lines:
            on_first_process(
                lambda: writing(self.run_dir, lambda: append(self.run_dir / NONFINITE, lines)), all_cores=False
            )
        say(*warnings)
        self.skipped.stop_if_too_many(run)

    def close(self) -> None:
        self.trace.close()
        if self.log:
            self.log.close()
        if self.lock:
            self.lock.close()


class BadImages:
    """Counts images that cannot be read, names each once in the log and in bad_images.txt, and stops a run that has too
    many of them."""

    FIRST_LOOK = 1000  # images read before a share says something

    def __init__(self, run_dir: Path, config: data.Config, source: Source) -> None:
        self.path, self.limit, self.source = run_dir / BAD_IMAGES, config.bad_ratio, source
        self.known: set[str] = set()
        if self.path.exists():
            self.known = {line.split("\t", 1)[0] for line in self.path.read_text(encoding="utf-8").splitlines()}
        self.new: list[tuple[str, str]] = []

    def note(self, batch: dict) -> None:
        """Take the list that a batch from the loader brings along."""
        bad = batch.pop("bad")
        for index, reason in bad:
            name = self.source.name(index)
            if name not in self.known:
                self.known.add(name)
                self.new.append((name, reason))
        if batch.pop("failed", False):
            writing(self.path.parent, lambda: self._write(self.new))
            index, reason = bad[-1]
            raise UserError(
                f"{len(bad)} images in a row cannot be read, the last is {self.source.name(index)}: {reason}. "
                f"Check data.train; they are listed in {self.path}."
            )

    def _write(self, entries: list[tuple[str, str]]) -> None:
        append(self.path, [f"{name}\t{reason}\n" for name, reason in entries])

    def report(self, images_seen: int) -> list[str]:
        """On all processes together: sentences about images found bad since the last report. Raises UserError."""
        new = sorted({entry for entries in gather_objects(self.new) for entry in entries})
        self.new = []
        fresh = [(name, reason) for name, reason in new]
        self.known |= {name for name, _ in fresh}
        on_first_process(lambda: writing(self.path.parent, lambda: self._write(fresh)), all_cores=False)
        read = min(len(self.source), max(images_seen, self.FIRST_LOOK))
        if len(self.known) > self.limit * read:
            raise UserError(
                f"{len(self.known)} of about {min(images_seen, len(self.source))} images cannot be read, more than "
                f"data.bad_ratio={self.limit:g} allows, for example {sorted(self.known)[0]}; all are in {self.path}. "
                "Mend or remove them, or raise data.bad_ratio."
            )
        shown = [f"Cannot read {name}: {reason}. Skipped." for name, reason in fresh[:5]]
        if len(fresh) > 5:
            shown.append(f"... and {len(fresh) - 5} more, {len(self.known)} in all; see {self.path}.")
        return shown
