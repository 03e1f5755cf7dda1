"""The run directory: the record of a run, what is written into it, and what may change in it.

config.yaml (resolved), starts.jsonl (command, versions and hardware of every start), metrics.jsonl, tensorboard/,
checkpoints/, bad_images.txt, eval/*.json.
"""

import json
import os
import platform
import shlex
import sys
import time
from pathlib import Path

from . import config as configuration
from . import data
from .config import Plan, RunConfig
from .data import Source
from .distributed import barrier, gather_objects, rank, say
from .errors import UserError
from .hardware import versions
from .metrics import MetricsLog, Stopwatch, Window, console_line
from .optim import Schedule
from .state import RunState, steps_saved

# Keys that may change when a run goes on: they say how long, on what and how it is watched, not what is learned.
FREE = {
    "out", "epochs", "steps", "images", "batch_size", "precision", "model.grad_checkpointing", "data.workers",
    "data.cache", "data.download_dir", "data.bad_ratio",
}  # fmt: skip
FREE_SECTIONS = ("save.", "log.", "eval.")


def open_run(run_dir: Path, config: RunConfig, device: str) -> None:
    """Make the directory, or check that it is this run's. Raises UserError on every process before anything is
    written."""
    stored = run_dir / "config.yaml"
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(f"out={run_dir} is a file: give a directory.")
    if stored.exists() and steps_saved(run_dir):
        _refuse_other_settings(run_dir, configuration.differences(stored, config))
    elif run_dir.exists() and not stored.exists() and any(run_dir.iterdir()):
        raise UserError(f"out={run_dir} is not empty and holds no run: give a new directory.")
    barrier()
    if rank() == 0:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            configuration.save(config, stored)
            start = {
                "time": time.strftime("%F %T%z"),
                "command": shlex.join(sys.argv),
                "device": device,
                "host": f"{platform.machine()}, {os.cpu_count()} cores, {platform.platform()}",
                "versions": versions(),
            }
            with (run_dir / "starts.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(start) + "\n")
        except OSError as error:
            raise UserError(f"out={run_dir} cannot be written: {error.strerror}.") from error
    barrier()


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


class Recorder:
    """Writes a run's lines: to metrics.jsonl and TensorBoard, and on the console of the first process."""

    def __init__(self, run_dir: Path, config: RunConfig, plan: Plan, schedule: Schedule, run: RunState) -> None:
        self.every, self.plan, self.schedule = config.log.every_steps, plan, schedule
        self.log = MetricsLog(run_dir, run.step, config.log.tensorboard) if rank() == 0 else None
        self.window, self.watch = Window(), Stopwatch()
        self.window.load(run.window)
        self.seen = run.images_seen

    def due(self, step: int) -> bool:
        return step % self.every == 0 or step == self.plan.steps

    def line(self, run: RunState) -> None:
        """The line of a step, at which all processes meet."""
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
        say(
            console_line({**record, "seconds_left": left}, self.plan.steps, self.plan.steps / self.plan.steps_per_epoch)
        )

    def write(self, record: dict[str, float | int]) -> None:
        if self.log:
            self.log.write(record)

    def pause(self) -> None:
        """Time that passed for something else than training does not count."""
        self.watch = Stopwatch()

    def close(self) -> None:
        if self.log:
            self.log.close()


class BadImages:
    """Counts images that cannot be read, names each once in the log and in bad_images.txt, and stops a run that has too
    many of them."""

    FIRST_LOOK = 1000  # images read before a share says something

    def __init__(self, run_dir: Path, config: data.Config, source: Source, run: RunState) -> None:
        self.path, self.limit, self.source = run_dir / "bad_images.txt", config.bad_ratio, source
        self.known: set[str] = set()
        if run.step and self.path.exists():
            self.known = {line.split("\t", 1)[0] for line in self.path.read_text(encoding="utf-8").splitlines()}
        self.new: list[tuple[str, str]] = []

    def note(self, batch: dict) -> None:
        """Take the list that a batch from the loader brings along."""
        for index, reason in batch.pop("bad"):
            name = self.source.name(index)
            if name not in self.known:
                self.known.add(name)
                self.new.append((name, reason))
        if batch.pop("failed", False):
            name, reason = self.new[-1] if self.new else (self.source.name(0), "see bad_images.txt")
            raise UserError(f"Too many images in a row cannot be read, the last is {name}: {reason}. Check data.train.")

    def report(self, images_seen: int) -> list[str]:
        """On all processes together: sentences about images found bad since the last report. Raises UserError."""
        new = sorted({entry for entries in gather_objects(self.new) for entry in entries})
        self.new = []
        fresh = [(name, reason) for name, reason in new]
        self.known |= {name for name, _ in fresh}
        if fresh and rank() == 0:
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(f"{name}\t{reason}\n" for name, reason in fresh)
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
