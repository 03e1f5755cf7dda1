"""The run directory: what is written into it, and which settings may change when a run resumes.

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

from accelerate import Accelerator

from . import config as configuration
from . import data
from .checkpoints.journal import BAD_IMAGES, NONFINITE, append
from .checkpoints.lock import create_and_acquire
from .checkpoints.saving import free_space, os_error_text
from .checkpoints.state import RunState, steps_saved, sweep
from .config import Plan, RunConfig
from .data import Source
from .data.cache import Cached, OnDevice
from .distributed import barrier, gather_objects, on_first_process, rank, say
from .errors import UserError, printable
from .evaluation.online import rank_alarm
from .hardware import versions
from .metrics import MetricsLog, Stopwatch, Window, console_line, format_bytes, start_trace
from .objectives import Objective
from .optim import Schedule
from .step import SkippedSteps

# Keys that may change when a run resumes: how long, on what machine and how it is watched. data.train may name another
# place, but the images must be the same (check_images).
MUTABLE_ON_RESUME = {
    "out", "max_hours", "epochs", "steps", "images", "batch_size", "precision", "compile", "shard",
    "model.grad_checkpointing", "data.train", "data.workers", "data.cache", "data.download_dir",
    "data.bad_ratio",
}  # fmt: skip
MUTABLE_SECTIONS = ("save.", "log.", "eval.")
# What a run directory may hold before its first checkpoint: of a run killed at its start, or one in a queue (submit).
BEFORE_FIRST_CHECKPOINT = {".lock", "starts.jsonl", "config.yaml.tmp", "submit"}


def open_run(run_dir: Path, config: RunConfig, device: str) -> IO[str] | None:
    """Make the run directory, or check that it belongs to this run. Raises UserError before anything is written.

    Returns the lock of the directory on the first process, None on the others.
    """
    check_directory(run_dir, config)
    barrier()  # all have checked before the first one writes

    def prepare() -> None:
        sweep(run_dir)
        _write_start(run_dir, device)
        fresh = run_dir / "config.yaml.tmp"
        configuration.save(config, fresh)
        os.replace(fresh, run_dir / "config.yaml")

    return create_and_acquire(run_dir, "out", prepare=prepare)


def check_directory(run_dir: Path, config: RunConfig) -> None:
    """Raises UserError unless the directory is free or holds a run with these settings. Writes nothing."""
    stored = run_dir / "config.yaml"
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(f"out={run_dir} is a file: give a directory.")
    others = {path.name for path in run_dir.iterdir()} - BEFORE_FIRST_CHECKPOINT if run_dir.exists() else set()
    if others and not (stored.exists() and (run_dir / "starts.jsonl").exists()):
        raise UserError(f"out={run_dir} holds files that are not of a run: give a new directory.")
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
    """Raises UserError if a run that resumes gets other images than it began with.

    Their number, order and names must be the same: the order of training and the schedules depend on them.
    """
    stored, now = saved.get("images"), images_record(source)
    if stored is not None and stored != now:
        raise UserError(
            f"data.train={where} holds {now['count']} images, which are not the {stored['count']} images that this run "
            "began with (number, names or order differ): give the same images, or another out= for a new run."
        )


def images_record(source: Source) -> dict[str, Any]:
    return {"count": len(source), "names": source.identity()}


def _refuse_other_settings(run_dir: Path, differences: dict[str, tuple[Any, Any]]) -> None:
    differences = {
        key: values
        for key, values in differences.items()
        if key not in MUTABLE_ON_RESUME and not key.startswith(MUTABLE_SECTIONS)
    }
    if "method" in differences:  # then many keys differ: name only the cause
        differences = {"method": differences["method"]}
    if differences:
        changes = "; ".join(f"{key} was {old} and is {new}" for key, (old, new) in sorted(differences.items()))
        raise UserError(
            f"{run_dir} holds a run with other settings: {changes}. Give these keys their old values to continue that "
            "run, or another out= for a new run. Only its length, machine, log, save and eval keys may change."
        )


def describe(
    config: RunConfig, plan: Plan, schedule: Schedule, objective: Objective, images: Source, accelerator: Accelerator,
    workers: int,
) -> list[str]:  # fmt: skip
    """The lines that a run prints before its first step."""
    layout, encoder = plan.layout, objective.exported_encoder()
    weights = sum(p.numel() for p in encoder.parameters()) / 1e6
    trained = sum(p.numel() for p in objective.parameters() if p.requires_grad) / 1e6
    place = "images stay in memory, " if isinstance(images, Cached) else ""
    if isinstance(images, OnDevice):
        place = f"images on the device ({format_bytes(images.pixels.numel())}), "
    sharded = f"sharded among {layout.world_size} processes, " if config.shard and layout.world_size > 1 else ""
    return [
        f"{config.method}: {config.model.name} ({weights:.1f}M parameters, {trained:.1f}M trained), "
        f"{'x'.join(map(str, encoder.image_size))} pixels, {len(images)} images of {config.data.train}",
        f"{plan.steps} steps = {plan.steps / plan.steps_per_epoch:g} epochs of {plan.steps_per_epoch} steps, "
        f"global batch {layout.global_batch_size} = {layout.batch_size} x {layout.accumulate} micro-batches x "
        f"{layout.world_size} processes, learning rate {schedule.peak_lr:.3g} after {plan.warmup_steps} steps",
        f"{accelerator.device}, {accelerator.mixed_precision.replace('no', 'float32')}, {sharded}{workers} loader "
        f"process{'es' * (workers != 1)}, {place}writing to {config.out}",
    ]


def write_or_explain(run_dir: Path, work: Callable[[], None]) -> None:
    """Call `work`, which writes into the run directory. Raises UserError if the directory cannot be written to."""
    try:
        work()
    except OSError as error:
        saved = steps_saved(run_dir)
        begin = f"step {saved[-1]}" if saved else "the beginning"
        raise UserError(
            f"{run_dir} cannot be written to ({os_error_text(error)}; {format_bytes(free_space(run_dir))} are free): "
            f"make room and start the same command again. It continues from {begin}."
        ) from error


class Recorder:
    """Writes the lines of a run to metrics.jsonl, TensorBoard and the console."""

    def __init__(
        self, run_dir: Path, config: RunConfig, plan: Plan, schedule: Schedule, run: RunState, source: Source,
        lock: IO[str] | None, objective: Objective,
    ) -> None:  # fmt: skip
        self.run_dir, self.every, self.plan, self.schedule = run_dir, config.log.every_steps, plan, schedule
        self.lock = lock  # held until close()
        self.objective, self.stop_on_collapse, self.warned = objective, config.log.on_collapse == "stop", False
        self.log = MetricsLog(run_dir, run.step, config.log.tensorboard) if rank() == 0 else None
        self.window, self.watch = Window(), Stopwatch()
        self.skipped = SkippedSteps(run_dir, source, config.log.max_nonfinite)
        self.trace = start_trace(run_dir / "trace.json") if config.log.profile and rank() == 0 else None
        self.window.load(run.window)
        self.seen = run.images_seen

    def due(self, step: int) -> bool:
        return step % self.every == 0 or step == self.plan.steps

    def line(self, run: RunState) -> None:
        """Write the line of a step. All processes call this."""
        self.flush_skipped(run)
        timing = self.watch.lap(run.images_seen - self.seen)
        self.seen = run.images_seen
        images_left = (self.plan.steps - run.step) * self.plan.layout.global_batch_size
        left = images_left / max(1e-9, timing["images_per_second"])
        record = {
            "step": run.step,
            "epoch": run.step / self.plan.steps_per_epoch,
            "images": run.images_seen,
            "seconds": run.seconds,
            **self.window.close(),
            "lr": self.schedule.lr(run.step - 1),
            "weight_decay": self.schedule.weight_decay(run.step - 1),
            **self.objective.scheduled(run.step - 1),
            **timing,
        }
        self.write(record)
        self._warn(self.objective.alarm(record) if "loss" in record else None, run.step)
        epochs = self.plan.steps / self.plan.steps_per_epoch
        say(console_line({**record, "seconds_left": left}, self.plan.steps, epochs))

    def rank(self, run: RunState, rankme: float) -> None:
        """Write a line with the effective rank of the features."""
        if not math.isnan(rankme):
            self.write({"step": run.step, "images": run.images_seen, "rankme": rankme})
            self._warn(rank_alarm(rankme), run.step)

    def _warn(self, alarm: str | None, step: int) -> None:
        """Warn once of collapsed features. Raises UserError instead with log.on_collapse=stop."""
        if alarm and self.stop_on_collapse:
            raise UserError(f"{alarm} The run stops at step {step}, as log.on_collapse=stop asks.")
        if alarm and not self.warned:
            say(f"Warning at step {step}: {alarm}")
        self.warned |= bool(alarm)

    def write(self, record: dict[str, float | int]) -> None:
        """Write one line. All processes call this. Raises UserError on all of them if it cannot be written."""

        def work() -> None:
            assert self.log is not None, "the first process has the log"
            self.log.write(record)

        on_first_process(lambda: write_or_explain(self.run_dir, work), all_cores=False)

    def flush_skipped(self, run: RunState) -> None:
        """Write down the steps that were skipped since the last call. All processes call this.

        Raises UserError on all of them if too many steps in a row were skipped. Then nothing is saved.
        """
        lines, warnings = self.skipped.poll(self.window, run)
        if lines:
            work = partial(append, self.run_dir / NONFINITE, lines)
            on_first_process(lambda: write_or_explain(self.run_dir, work), all_cores=False)
        say(*warnings)
        self.skipped.stop_if_too_many(run)

    def close(self) -> None:
        if self.trace:
            self.trace.stop()
        if self.log:
            self.log.close()
        if self.lock:
            self.lock.close()


class BadImages:
    """Counts images that cannot be read, names each one once, and stops a run that has too many."""

    AT_LEAST = 1000  # the share of bad images is reckoned of at least so many

    def __init__(self, run_dir: Path, config: data.Config, source: Source) -> None:
        self.path, self.limit, self.source = run_dir / BAD_IMAGES, config.bad_ratio, source
        self.known: set[str] = set()
        if self.path.exists():
            listed = self.path.read_text(encoding="utf-8", errors="backslashreplace")  # an editor may have changed it
            self.known = {line.split("\t", 1)[0] for line in listed.splitlines()}
        self.new: list[tuple[str, str]] = []

    def note(self, batch: dict[str, Any]) -> None:
        """Take the list of bad images out of a batch of the loader. Raises UserError if the loader gave up."""
        bad, failed = batch.pop("bad"), batch.pop("failed", False)
        for index, reason in bad:
            self._add(printable(self.source.name(index)), reason)
        if failed:
            self._refuse(bad)

    def _add(self, name: str, reason: str) -> None:
        if name not in self.known:
            self.known.add(name)
            self.new.append((name, reason))

    def _refuse(self, bad: list[tuple[int, str]]) -> None:
        write_or_explain(self.path.parent, lambda: self._write(self.new))
        index, reason = bad[-1]
        raise UserError(
            f"{len(bad)} images in a row cannot be read. The last is {self.source.name(index)}: {reason}. "
            f"Check data.train; they are listed in {self.path}."
        )

    def _write(self, entries: list[tuple[str, str]]) -> None:
        append(self.path, [f"{name}\t{reason}\n" for name, reason in entries])

    def report(self, images_seen: int) -> list[str]:
        """Sentences about bad images since the last report. All processes call this. Raises UserError if too many."""
        fresh = sorted({name: reason for entries in gather_objects(self.new) for name, reason in entries}.items())
        self.new = []
        self.known |= {name for name, _ in fresh}
        on_first_process(lambda: write_or_explain(self.path.parent, lambda: self._write(fresh)), all_cores=False)
        read = min(len(self.source), max(images_seen, self.AT_LEAST))
        if len(self.known) > self.limit * read:
            raise UserError(
                f"{len(self.known)} of about {min(images_seen, len(self.source))} images cannot be read, more than "
                f"data.bad_ratio={self.limit:g} allows, for example {sorted(self.known)[0]}; all are in {self.path}. "
                "Repair or remove them, or raise data.bad_ratio."
            )
        sentences = [f"Cannot read {name}: {reason}. Skipped." for name, reason in fresh[:5]]
        if len(fresh) > 5:
            sentences.append(f"... and {len(fresh) - 5} more, {len(self.known)} in all; see {self.path}.")
        return sentences
