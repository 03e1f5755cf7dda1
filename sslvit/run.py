"""The run directory: what is written into it, and which settings may change when a run resumes.

config.yaml (resolved), starts.jsonl (command, versions and hardware of every start), metrics.jsonl, tensorboard/,
checkpoints/, bad_images.txt, nonfinite.jsonl, report.html, eval/*.json.
"""

import math
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

from accelerate import Accelerator
from omegaconf import OmegaConf

from . import config as configuration
from . import data
from .arguments import flatten, read_yaml
from .checkpoints import journal, state
from .checkpoints.journal import BAD_IMAGES, NONFINITE, REPORT, STARTS, append
from .checkpoints.lock import Lock, create_and_acquire
from .checkpoints.saving import free_space, os_error_text
from .checkpoints.state import RunState, steps_saved
from .config import Plan, RunConfig
from .data import Source
from .data.cache import Cached, CachedMixed, OnDevice
from .distributed import barrier, gather_objects, on_first_process, rank, say
from .energy import ENERGY_COLUMNS, Meter
from .errors import UserError, printable
from .evaluation.online import rank_alarm
from .hardware import OtherProcesses, peak_memory, versions
from .metrics import LINE_STEPS, MetricsLog, Stopwatch, Window, format_bytes, open_trackers, start_trace
from .objectives import Objective
from .optim import Schedule
from .progress import RunProgress
from .step import SkippedSteps

# Keys that may change when a run resumes: how long, on what machine and how it is watched. data.train and a teacher may
# be at another place, but the images (check_images) and the teacher's weights must be the same.
MUTABLE_ON_RESUME = {
    "out", "max_hours", "epochs", "steps", "images", "minutes", "hours", "settings", "batch_size", "precision",
    "compile", "shard",
    "model.grad_checkpointing", "data.train", "data.workers", "data.cache", "data.download_dir",
    "data.bad_ratio", "objective.teacher", "objective.crop_wise_backward",
}  # fmt: skip
MUTABLE_SECTIONS = ("save.", "log.", "eval.")
# What a run directory may hold before its first checkpoint: of a run killed at its start, or one in a queue (submit).
BEFORE_FIRST_CHECKPOINT = {".lock", STARTS, "config.yaml.tmp", "submit", "checkpoints"}
FILES = {"config.yaml", ".lock", "trace.json", REPORT, STARTS, *journal.NAMES}  # that a run writes ...
FOLDERS = {"checkpoints", "tensorboard"}  # ... in its directory
CHECKS, LEAST_STEPS = 20, 40  # how often a run is judged while it goes on; shorter ones are not
REPORT_EVERY = 300.0  # seconds between two reports of a run that goes on
REPORT_SHARE, REPORT_SECONDS = 0.005, 60.0  # of the time of training, and at most, for the pictures at its end


def open_run(run_dir: Path, config: RunConfig, device: str) -> Lock | None:
    """Make the run directory, or check that it belongs to this run. Raises UserError before anything is written.

    Returns the lock of the directory on the first process, None on the others.
    """
    check_directory(run_dir, config)
    barrier()  # all have checked before the first one writes

    def prepare(lock: Lock) -> None:
        state.sweep(run_dir)
        state.begin(run_dir)
        lock.start = _write_start(run_dir, device)
        configuration.save(config, run_dir / "config.yaml")

    return create_and_acquire(run_dir, "out", prepare=prepare)


def check_directory(run_dir: Path, config: RunConfig) -> None:
    """Raises UserError unless the directory is free or holds a run with these settings. Writes nothing."""
    if run_dir.exists():
        _check_old(run_dir, config)


def _check_old(run_dir: Path, config: RunConfig) -> None:
    if not run_dir.is_dir():
        raise UserError(f"out={run_dir} is a file: give a directory.")
    names, saved = {path.name for path in run_dir.iterdir()}, steps_saved(run_dir)
    others = {name for name in names - BEFORE_FIRST_CHECKPOINT if not name.startswith((".config.", ".starts."))}
    if others and not saved and not {"config.yaml", STARTS} <= names:
        raise UserError(f"out={run_dir} holds files that are not of a run: give a new directory.")
    _refuse_links(run_dir)
    if saved:
        _refuse_other_settings(run_dir, config)
    else:
        _refuse_lost_checkpoints(run_dir)


def _write_start(run_dir: Path, device: str) -> bytes:
    """Add the line of this start to starts.jsonl, and return it."""
    run = uuid4().hex
    if steps_saved(run_dir):
        run = journal.run_id(run_dir) or state.latest(run_dir)[1].get("run") or run
    start = {
        "run": run,
        "time": time.strftime("%F %T%z"),
        "process": os.getpid(),
        "command": shlex.join(sys.argv),
        "device": device,
        "host": f"{platform.machine()}, {os.cpu_count()} cores, {platform.platform()}",
        "versions": versions(),
    }
    return journal.add_start(run_dir, start)


def check_images(saved: dict[str, Any], source: Source, where: str) -> None:
    """Raises UserError if a run that resumes gets other images than it began with.

    Their number, order and names must be the same: the order of training and the schedules depend on them. So must the
    bytes of most of a sample: a few images may have been repaired. Runs of older versions have no sample.
    """
    stored, now = saved.get("images"), images_record(source)
    if stored is None:
        return
    before, sample = stored.get("sample") or [], now["sample"]
    changed = sum(a != b for a, b in zip(before, sample, strict=False)) if isinstance(before, list) else 0
    names_differ = any(stored.get(key) != now[key] for key in ("count", "names"))
    if names_differ or 2 * changed > len(sample):
        what = "number, names or order differ" if names_differ else "their names are the same, their contents are not"
        raise UserError(
            f"data.train={where} holds {now['count']} images, which are not the {stored.get('count')} images that "
            f"this run began with ({what}): give the same images, or another out= for a new run."
        )


def images_record(source: Source) -> dict[str, Any]:
    return {"count": len(source), "names": source.identity(), "sample": source.sample()}


def resuming(run_dir: Path, step: int, steps: int) -> str:
    """What a run says that goes on, or has nothing left to do."""
    if step > steps:
        return (
            f"{run_dir} has {step} steps already, and these settings ask for {steps}: nothing is trained. Give a "
            "longer run (epochs=, steps= or images=) to go on, or another out= for a new run."
        )
    return f"Resuming {run_dir} at step {step} of {steps}."


def _refuse_links(run_dir: Path) -> None:
    """Raises UserError for a link, a pipe or a device where a run writes: it could lead to any file of this user."""
    for name in FILES | FOLDERS:
        path, kind = run_dir / name, "folder" if name in FOLDERS else "file"
        if path.is_symlink() or (path.exists() and not (path.is_dir() if name in FOLDERS else path.is_file())):
            what = "a link" if path.is_symlink() else f"no {kind}"
            raise UserError(
                f"{path} is {what}. A run writes only into its directory and follows no links there: put the {kind} "
                "itself there, or give another out=."
            )


def _refuse_lost_checkpoints(run_dir: Path) -> None:
    """Raises UserError for a run that has lines, no checkpoint, and no word that it has never had one."""
    lines = [name for name in journal.NAMES if (run_dir / name).exists() and (run_dir / name).stat().st_size]
    if lines and not (run_dir / "checkpoints" / state.NONE_YET).exists():
        raise UserError(
            f"{run_dir} holds the {lines[0]} of a run, but its checkpoints are missing, and a start from step 0 would "
            f"erase these lines. Restore {run_dir / 'checkpoints'} from a copy to continue the run. Or give another "
            f"out= for a new run, or move {' and '.join(lines)} away to begin again here."
        )


def _refuse_other_settings(run_dir: Path, config: RunConfig) -> None:
    stored = run_dir / "config.yaml"
    if not (stored.exists() and stored.stat().st_size):
        raise UserError(
            f"{stored} is {'empty' if stored.exists() else 'missing'}, so the settings of the checkpoints beside it "
            "are not known: restore it from a copy. If there is none, start the same command with another out=, stop "
            "it, and copy the config.yaml that it has written there."
        )
    differences = configuration.differences(stored, config)
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
    place = "images stay in memory, " if isinstance(images, Cached | CachedMixed) else ""
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


def write_or_explain(run_dir: Path, work: Callable[[], None], lock: Lock | None) -> None:
    """Call `work`, which writes into the run directory. Raises UserError if the directory cannot be written to."""
    try:
        if lock:
            lock.check()
        work()
    except OSError as error:
        if lock:
            lock.check()  # it says more
        saved = steps_saved(run_dir)
        begin = f"step {saved[-1]}" if saved else "the beginning"
        raise UserError(
            f"{run_dir} cannot be written to ({os_error_text(error)}; {format_bytes(free_space(run_dir))} are free): "
            f"make room and start the same command again. It continues from {begin}."
        ) from error


class Recorder:
    """Writes the lines of a run to metrics.jsonl, TensorBoard and the console, and its report."""

    next_report: float | None = None  # by time.perf_counter()
    checked = 0  # twentieths of the run
    settings: dict[str, Any] | None = None  # flat, for `_check`

    def __init__(
        self, run_dir: Path, config: RunConfig, plan: Plan, schedule: Schedule, run: RunState, source: Source,
        lock: Lock | None, objective: Objective,
    ) -> None:  # fmt: skip
        self.run_dir, self.plan, self.schedule = run_dir, plan, schedule
        self.every = config.log.every_steps or LINE_STEPS
        self.by_time, self.progress = config.log.every_steps is None, RunProgress(run.step, plan.steps)
        self.others = OtherProcesses(next(objective.parameters()).device)
        self.timing: dict[str, float] = {}  # of the last line
        self.facts: dict[str, str] = {}  # for the live line
        self.lock = lock  # held until close()
        self.objective, self.stop_on_collapse, self.warned = objective, config.log.on_collapse == "stop", False
        self.log = self._open_log(config, run.step) if rank() == 0 else None
        self.window, self.watch, self.reports = Window(), Stopwatch(), config.log.report
        self.skipped = SkippedSteps(run_dir, source, config.log.max_nonfinite)
        self.trace = start_trace(run_dir / "trace.json") if config.log.profile and rank() == 0 else None
        self.window.load(run.window)
        self.seen = run.images_seen
        self.meter = Meter(next(objective.parameters()).device)
        if run.step == 0:
            run.energy = dict.fromkeys(ENERGY_COLUMNS, 0.0)

    def _open_log(self, config: RunConfig, step: int) -> MetricsLog:
        found = None
        if config.log.trackers:
            settings = flatten(OmegaConf.structured(config))
            found = open_trackers(config.log.trackers, self.run_dir, journal.run_id(self.run_dir) or "", settings)
        return MetricsLog(self.run_dir, step, config.log.tensorboard, found)

    def due(self, step: int) -> bool:
        return step % self.every == 0 or step == self.plan.steps

    def line(self, run: RunState) -> None:
        """Write the line of a step. All processes call this."""
        self.flush_skipped(run)
        self.count_energy(run)
        timing = self.watch.lap(run.images_seen - self.seen)
        self.seen = run.images_seen
        record = {
            "step": run.step,
            "epoch": run.step / self.plan.steps_per_epoch,
            "images": run.images_seen,
            "seconds": run.seconds,
            **run.energy,
            **self.window.close(),
            "lr": self.schedule.lr(run.step - 1),
            "weight_decay": self.schedule.weight_decay(run.step - 1),
            **self.objective.scheduled(run.step - 1),
            **timing,
        }
        self.write(record)
        self._warn(self.objective.alarm(record) if "loss" in record else None, run.step)
        self.timing = timing
        self.show(run, record)
        self._check(run.step)
        self._refresh_report(run.step)

    def count_energy(self, run: RunState) -> None:
        """Add what all processes have used since the last call. All processes call this."""
        if run.energy:
            shares = gather_objects(self.meter.lap())
            whole = [name for name in run.energy if all(name in share for share in shares)]
            run.energy = {name: run.energy[name] + sum(share[name] for share in shares) for name in whole}

    def show(self, run: RunState, record: dict[str, float] | None = None) -> None:
        """Show how far the run is, if it is time for that, or if a line of metrics.jsonl has to be shown."""
        forced = record is not None and (not self.by_time or run.step == self.plan.steps)
        if rank() != 0 or not (forced or self.progress.due(run.step)):
            return
        record = record or self.window.loss()
        timing = self.timing or self.watch.so_far(run.images_seen - self.seen)
        left = (self.plan.steps - run.step) * self.plan.layout.global_batch_size
        now = {"step": run.step, "epoch": run.step / self.plan.steps_per_epoch, **timing}
        now["seconds_left"] = left / max(1e-9, timing["images_per_second"])
        memory = format_bytes(self._peak_memory())
        epochs = self.plan.steps / self.plan.steps_per_epoch
        self.progress.show(record | now, self.plan.steps, epochs, [memory, *self.facts.values()])
        say(*filter(None, [self.others.sentence()]))

    def _check(self, step: int) -> None:
        """Warn of what the lines so far say together, each time that a twentieth of the run is over."""
        from .report.facts import verdict_so_far
        from .report.verdict import ALARMS

        checked, self.checked = self.checked, CHECKS * step // self.plan.steps
        if self.log is None or self.warned or self.checked == checked or self.plan.steps < LEAST_STEPS:
            return
        self.settings = self.settings or flatten(read_yaml(self.run_dir / "config.yaml"))
        with self.watch.pausing():
            verdict = verdict_so_far(self.run_dir, self.settings, self.plan.steps)
        if verdict.state in ALARMS:
            self._warn(f"{verdict.headline} {verdict.advice[0]}", step, may_stop=False)

    def _refresh_report(self, step: int) -> None:
        """Write report.html again from time to time, without pictures; these go to TensorBoard and trackers. Both
        together take 0.5 % of the run's time at most. Measured with runs on CIFAR-10 (one core): 0.05 s for the page
        and 0.25 s (MAE) or 0.9 s (DINO) for the pictures, every 300 s, which is 0.1 % and 0.3 %."""
        from .report import of_run, pictures_while_training

        now = time.perf_counter()
        if self.next_report is None:
            self.next_report = now + REPORT_EVERY
        if self.log and self.reports and now >= self.next_report:
            with self.watch.pausing():
                took = of_run(self.run_dir, True, self.lock, memory=self._peak_memory())
                took += pictures_while_training(self.run_dir, self.objective, self.skipped.source, self.log, step)
            self.next_report = now + max(REPORT_EVERY, 200 * took)

    def _peak_memory(self) -> int:
        return peak_memory(next(self.objective.parameters()).device)

    def rank(self, run: RunState, rankme: float) -> None:
        """Write a line with the effective rank of the features."""
        if not math.isnan(rankme):
            self.write({"step": run.step, "images": run.images_seen, "rankme": rankme})
            self._warn(rank_alarm(rankme), run.step)

    def _warn(self, alarm: str | None, step: int, may_stop: bool = True) -> None:
        """Warn once of collapsed features. Raises UserError instead with log.on_collapse=stop."""
        if alarm and may_stop and self.stop_on_collapse:
            raise UserError(f"{alarm} The run stops at step {step}, as log.on_collapse=stop asks.")
        if alarm and not self.warned:
            say(f"Warning at step {step}: {alarm}")
        self.warned |= bool(alarm)

    def write(self, record: dict[str, float | int]) -> None:
        """Write one line. All processes call this. Raises UserError on all of them if it cannot be written."""

        def work() -> None:
            assert self.log is not None, "the first process has the log"
            self.log.write(record)

        for name, text in (("rankme", "rank {:.0f}"), ("knn/top1", "k-NN {:.1f}%")):
            if name in record:
                self.facts[name] = text.format(record[name])
        self._on_first_process(work)

    def _on_first_process(self, work: Callable[[], None]) -> None:
        on_first_process(lambda: write_or_explain(self.run_dir, work, self.lock), all_cores=False)

    def rewrite(self, config: RunConfig) -> None:
        """Write a config.yaml whose number of steps has changed. All processes call this."""
        self._on_first_process(partial(configuration.save, config, self.run_dir / "config.yaml"))

    def flush_skipped(self, run: RunState) -> None:
        """Write down the steps that were skipped since the last call. All processes call this.

        Raises UserError on all of them if too many steps in a row were skipped. Then nothing is saved.
        """
        lines, warnings = self.skipped.poll(self.window, run)
        if lines:
            self._on_first_process(partial(append, self.run_dir / NONFINITE, lines))
        say(*warnings)
        self.skipped.stop_if_too_many(run)

    def close(self, seconds: float) -> None:
        """Close all files, after a last report. All processes call it. seconds: of training, which bound the time that
        its pictures may take; 0: no pictures, for a run that was asked to stop."""
        if self.trace:
            self.trace.stop()
        if self.log:
            self.log.close()
        if self.reports:
            from .report import of_run

            share = min(REPORT_SECONDS, REPORT_SHARE * seconds)
            on_first_process(lambda: of_run(self.run_dir, False, self.lock, share, self._peak_memory()))
        if self.lock:
            self.lock.close()


class BadImages:
    """Counts images that cannot be read, names each one once, and stops a run that has too many."""

    AT_LEAST = 1000  # the share of bad images is reckoned of at least so many

    def __init__(self, run_dir: Path, config: data.Config, source: Source, lock: Lock | None = None) -> None:
        self.path, self.limit, self.source, self.lock = run_dir / BAD_IMAGES, config.bad_ratio, source, lock
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
        self._write(self.new)
        index, reason = bad[-1]
        raise UserError(
            f"{len(bad)} images in a row cannot be read. The last is {self.source.name(index)}: {reason}. "
            f"Check data.train; they are listed in {self.path}."
        )

    def _write(self, entries: list[tuple[str, str]]) -> None:
        work = partial(append, self.path, [f"{name}\t{reason}\n" for name, reason in entries])
        write_or_explain(self.path.parent, work, self.lock)

    def report(self, images_seen: int) -> list[str]:
        """Sentences about bad images since the last report. All processes call this. Raises UserError if too many."""
        fresh = sorted({name: reason for entries in gather_objects(self.new) for name, reason in entries}.items())
        self.new = []
        self.known |= {name for name, _ in fresh}
        on_first_process(lambda: self._write(fresh), all_cores=False)
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
