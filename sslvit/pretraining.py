"""START HERE. `pretrain(config)` is the whole run: images in, a run directory with checkpoints out.

`set_up` makes everything, `train` is the loop. Read next: the method (objectives/mae.py or dino.py), its encoder
(model/encoder.py), and how images reach it (data/loader.py). The rest when you need it.
"""

import math
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from . import config as configuration
from . import data, memory, objectives, optim, sharding, start
from .checkpoints import journal, state
from .checkpoints.saving import Saver, disk_space_warning
from .config import Plan, RunConfig
from .data.augment import Normalize, augment
from .data.cache import MemoryBudget, OnDevice, cached, on_device
from .data.crops import Views, num_pixels, random_batch
from .data.loader import make_loader
from .distributed import any_process, explain_lost_process, gather_objects, say, world_size
from .errors import UserError
from .evaluation import online
from .evaluation.online import RankMonitor, ViewMonitor
from .hardware import (
    blocks_of,
    choose_attention,
    compile_blocks,
    default_workers,
    first_on_each_machine,
    keep_memory,
    start_accelerator,
    versions,
)
from .model.encoder import Encoder
from .objectives import Objective
from .pace import Pace, unchanged
from .progress import LongRun, close_bars, duration
from .run import BadImages, Recorder, check_images, describe, images_record, open_run, resuming
from .step import CutShort, train_step
from .stopping import Stopped, StopRequest, stop_requests

FIRST_SAVE = 5.0  # minutes after which a run that was never saved is saved, whatever save.every_minutes is

# `with eval_encoder() as encoder` gives the exported encoder as evaluations run it; all processes call it together.
EvalEncoder = Callable[[], AbstractContextManager[Encoder]]


@dataclass
class Result:
    """What a run has reached."""

    run_dir: Path
    steps: int
    images_seen: int
    seconds: float  # of training, over all starts
    knn_before: float | None  # k-NN accuracy of the untrained encoder, percent, or what stands for it without labels
    knn_after: float | None  # and of the trained one
    stopped: str | None = None  # why it ended before its last step: a signal's name or max_hours
    best: tuple[int, float | None] | None = None  # with save.keep_best: the step of the best k-NN, and that k-NN
    began_with: str = ""  # model.init
    labels: bool = True  # whether it was measured with labels


def summary(result: Result) -> list[str]:
    """What is printed at the end of a run."""
    lines = [f"Done: {result.images_seen} images in {duration(result.seconds)}, {result.run_dir}"]
    if result.knn_before is not None and result.knn_after is not None:
        gain = result.knn_after - result.knn_before
        lines.append(
            f"{'k-NN accuracy on images' if result.labels else ViewMonitor.WHAT + ', of images'} it never trained on: "
            f"{'the start' if result.began_with else 'untrained encoder'} {result.knn_before:.1f}%, "
            f"trained encoder {result.knn_after:.1f}% ({gain:+.1f} points)."
        )
    if result.best and result.began_with:
        lines += _verdict(result, *result.best)
    if result.best and not result.labels:
        lines.append(f"{ViewMonitor.WHAT} is not accuracy: if you have labels, `sslvit knn` says what was gained.")
    elif result.best:
        lines.append(
            "save.keep_best chose its checkpoint by this k-NN accuracy, so for that checkpoint it is too high: measure "
            "it on other test images."
        )
    run = f"run={shlex.quote(str(result.run_dir))}"
    return [
        *lines,
        "Next, one of:",
        f"  sslvit knn {run} data.train=<labelled images> data.test=<others>   how good its features are",
        f"  sslvit embed {run} data=<images> out=features.parquet   features of images",
        f"  sslvit export {run}   the encoder for timm and others, in {result.run_dir}/export",
    ]


def _verdict(result: Result, best_step: int, best_knn: float | None) -> list[str]:
    """What a run that began with pretrained weights says of its best state, which its directory stands for."""
    best = f"{result.run_dir} stands for step {best_step} when it is measured, exported or fine-tuned"
    measure = "k-NN" if result.labels else ViewMonitor.WHAT
    if best_step:
        return [f"{best}: {measure} {best_knn:.1f}%."]
    return [
        f"Training made these weights worse: no step had a {measure} above the start's {best_knn:.1f}%. So {best}, "
        f"which is model.init={result.began_with} itself. To gain, try optim.base_lr divided by 10, "
        "optim.freeze_epochs, optim.layer_decay=0.75, model.lora_rank=8, model.anchor=1, or more images."
    ]


@dataclass
class Training:
    """A run that is set up: what its loop works with."""

    config: RunConfig
    plan: Plan
    accelerator: Accelerator
    objective: Objective
    model: nn.Module  # the objective and ...
    optimizer: Any  # ... its optimizer, as accelerate wrapped them
    schedule: optim.Schedule
    batches: Iterator[dict[str, Any]]  # of the loader
    views: Views
    normalize: Normalize
    eval_encoder: EvalEncoder
    monitor: online.Monitor | None
    rank_monitor: RankMonitor | None
    progress: state.RunState
    recorder: Recorder
    bad_images: BadImages
    saver: Saver
    record: dict[str, Any]  # what a checkpoint holds beside tensors and progress
    last_save: float = field(default_factory=time.perf_counter)  # when, by this clock
    saved_step: int | None = None  # the newest checkpoint; None: the run has never been saved
    pace: Pace | None = None  # of a run that has to end in time

    def __post_init__(self) -> None:
        steps = 0 if self.config.minutes else self.plan.steps - self.progress.step  # settings/ has said its days
        self.long_run = LongRun(steps * self.plan.layout.accumulate)

    def micro_batches(self, stop: StopRequest) -> Iterator[dict[str, Tensor]]:
        """The micro-batches of one step, augmented, on the device; fewer if `stop` asks for an end."""
        for micro in range(accumulate := self.plan.layout.accumulate):
            if micro and stop.reason_at(self.progress.step * accumulate + micro):
                return
            say(*self.long_run.note())
            self.recorder.meter.poll()
            with self.recorder.watch.waiting():
                batch = next(self.batches)
            self.bad_images.note(batch)
            self.recorder.skipped.note(batch["index"])
            yield augment(batch, self.views, self.normalize, self.accelerator.device)

    def evaluate(self) -> float:
        """k-NN accuracy of the encoder as it is, or what stands for it without labels, in percent."""
        run = self.progress
        assert self.monitor is not None
        self.saver.check(wait=True)  # the evaluation starts loader processes by fork: no thread may be writing then
        began = time.monotonic()
        with self.recorder.watch.pausing(), self.eval_encoder() as encoder:
            top1 = self.monitor(encoder)
        self.record["knn_seconds"] = time.monotonic() - began
        if (run.step or self.config.model.init) and top1 > (run.best_knn or 0.0):
            run.best_step, run.best_knn = run.step, top1
        say(f"step {run.step}/{self.plan.steps}  {self.monitor.line(top1)}")
        self.recorder.write({"step": run.step, "images": run.images_seen, self.monitor.KEY: top1})
        return top1

    def after_step(self, stop: StopRequest) -> str | None:
        """What is due after a step: a line of the log, the rank, an evaluation, a checkpoint. All processes call it.

        Returns why the run has to stop here, or None.
        """
        if self.pace:
            self.keep(self.pace)
        config, plan, run, recorder = self.config, self.plan, self.progress, self.recorder
        save_now = self.saver.due(run.step, plan.steps)
        if recorder.due(run.step):
            self.saver.check()
            say(*self.bad_images.report(run.images_seen))
            recorder.line(run)
        else:
            recorder.show(run)
        if self.rank_monitor and run.step % (config.log.rank_every_steps or 1) == 0:
            with recorder.watch.pausing(), self.eval_encoder() as encoder:
                recorder.rank(run, self.rank_monitor(encoder))
        minutes = config.save.every_minutes or math.inf
        minutes = min(minutes, FIRST_SAVE) if self.saved_step is None else minutes
        if recorder.due(run.step) or world_size() == 1:  # processes must agree
            save_now |= any_process((time.perf_counter() - self.last_save) / 60 > minutes)
        stopped = stop.reason_at(run.step) if run.step < plan.steps else None
        evaluate_every = round((config.eval.every_epochs or 0) * plan.steps_per_epoch) or plan.steps
        due = run.step % evaluate_every == 0 or run.step == plan.steps
        self.record["knn_due"] = due and self.monitor is not None
        if self.record["knn_due"] and not stopped:
            self.record["knn_after"], self.record["knn_due"] = self.evaluate(), False
            save_now |= self.saver.is_best(run)
        if save_now or stopped:  # after the evaluation: the checkpoint holds its result
            self.save()
        return stopped

    def keep(self, pace: Pace) -> None:
        """Change the length of the run, if it would not end in time and no step so far would have been another one."""
        step = self.progress.step
        if not (steps := pace.steps(step, self.plan.steps, self.record["knn_seconds"] or 0.0)):
            return
        if schedule := unchanged(self.schedule, self.objective, step, steps):
            self.schedule = self.recorder.schedule = schedule
            self.plan = self.recorder.plan = replace(self.plan, steps=steps)
            self.config = replace(self.config, steps=steps, epochs=None, images=None)
            self.recorder.rewrite(self.config)

    def leave_step(self, stop: StopRequest) -> str:
        """Save the last whole step, after a step that `stop` has cut short. Returns why. Raises Stopped if no step is
        whole yet."""
        why = next(reason for reason in gather_objects(stop.reason) if reason)
        if not self.progress.step:
            raise Stopped(f"Stopped by {why} in the first step: there is nothing to save yet.", why)
        if self.saved_step != self.progress.step:
            self.save()
        return why

    def save(self) -> None:
        """Begin to write a checkpoint. All processes call it."""
        say(*self.bad_images.report(self.progress.images_seen))
        self.recorder.flush_skipped(self.progress)
        self.recorder.count_energy(self.progress)
        self.progress.window = self.recorder.window.state()
        self.saver.save(self.objective, self.optimizer.optimizer, self.progress, self.record)
        self.last_save, self.saved_step = time.perf_counter(), self.progress.step


def pretrain(config: RunConfig, began: float | None = None) -> Result:
    """Train to the configured end, from the newest checkpoint of the run directory if it has one. Raises UserError.
    began: by time.monotonic(), from where the minutes of a run count that has to end in time; None: from here."""
    began = time.monotonic() if began is None else began
    try:
        with stop_requests(config.max_hours) as stop, Saver(Path(config.out), config.save) as saver:
            training = set_up(config, saver)
            if config.minutes:
                training.pace = Pace(began + 60 * config.minutes, training.progress, training.plan)
            return train(training, stop)
    except (RuntimeError, MemoryError) as error:
        explanation = memory.explain(error, config) or explain_lost_process(error)
        if explanation is None:
            raise
        raise UserError(explanation) from error
    finally:
        close_bars()


def set_up(config: RunConfig, saver: Saver) -> Training:
    """Everything before the first step. What cannot work raises UserError before anything is written."""
    # Images, processes, number of steps.
    configuration.check(config)
    accelerator = start_accelerator(config.precision)
    device, budget = accelerator.device, MemoryBudget()
    source = first_on_each_machine(accelerator, lambda: data.open_source(config.data.train, config.data))
    source, held_out = online.hold_out(source, config)
    plan = configuration.make_plan(config, len(source), accelerator.num_processes, accelerator.process_index)
    views = objectives.find(config.method).views(config.objective, config.data)
    normalize = Normalize(*data.normalization(config.data))
    monitor = online.monitor(config, held_out, budget, accelerator)

    # The model and its optimizer, as the seed makes them.
    objective = objectives.start(config, plan.steps_per_epoch, plan.steps)
    if accelerator.mixed_precision == "bf16":
        choose_attention(objective, device, "bf16")
    if config.model.init:
        say(*start.begin(objective, config))
    eval_encoder: EvalEncoder = lambda: nullcontext(objective.exported_encoder())  # noqa: E731
    if config.shard:
        eval_encoder = sharding.place(objective, device, config.shard)
    else:
        objective.to(device)
    if config.batch_size == "auto" or plan.layout.batch_size * num_pixels(views) > memory.LARGE:
        config, plan = memory.fit(config, plan, accelerator, objective, views)
    if config.compile:
        blocks_of(objective)  # refuses a model that has none
    optimizer: torch.optim.Optimizer = optim.make_optimizer(config.optim, objective)
    lengths = plan.warmup_steps, plan.steps, plan.frozen_steps
    schedule = optim.Schedule(config.optim, plan.layout.global_batch_size, *lengths)

    # The run directory: a new run, or one that goes on.
    run_dir, run = Path(config.out), state.RunState()
    saved: dict[str, Any] = {}
    lock = saver.lock = open_run(run_dir, config, str(device))
    if state.steps_saved(run_dir):
        run, saved, complaints = state.restore(run_dir, objective, optimizer)
        check_images(saved, source, config.data.train)
        say(*complaints, resuming(run_dir, run.step, plan.steps))
    journal.rewind(run_dir, saved.get("lengths") if saved else {}, run.step)
    prepare = partial(sharding.prepare, accelerator) if config.shard else accelerator.prepare
    model, optimizer = prepare(objective, optimizer)
    if config.compile:
        say(compiled(config, plan, accelerator, model, optimizer, views))

    # Where the images come from, and what watches the run.
    workers = default_workers(device) if config.data.workers is None else config.data.workers
    source = cached(source, config.data.cache, config.seed, budget)
    images = on_device(source, config.data.cache, device, workers)
    workers = 0 if isinstance(images, OnDevice) else workers
    say(*describe(config, plan, schedule, objective, images, accelerator, workers))
    scaling, steps = config.data.jpeg_scaling, (run.step, sys.maxsize // 2**20 if config.minutes else plan.steps)
    batches = iter(make_loader(images, views, plan.layout, config.seed, steps, workers, device, scaling=scaling))
    keep_memory(device)
    recorder = Recorder(run_dir, config, plan, schedule, run, source, lock, objective)
    say(*filter(None, [disk_space_warning(run_dir, config.save, objective, plan.steps - run.step)]))
    rank_monitor = None
    if config.log.rank_every_steps:
        rank_monitor = RankMonitor(source, objective.exported_encoder(), normalize, config.seed, accelerator)
    record = {name: saved.get(name) for name in ("knn_before", "knn_after", "knn_due", "knn_seconds")}
    record |= {"images": images_record(source), "encoder": objectives.location(objective), "versions": versions()}
    return Training(
        config, plan, accelerator, objective, model, optimizer, schedule, batches, views, normalize, eval_encoder,
        monitor, rank_monitor, run, recorder, BadImages(run_dir, config.data, source, lock), saver, record,
        saved_step=run.step or None,
    )  # fmt: skip


def train(training: Training, stop: StopRequest) -> Result:
    """The loop: to the last step, or until `stop` asks for an earlier end."""
    config, plan, run, record = training.config, training.plan, training.progress, training.record
    recorder, optimizer = training.recorder, training.optimizer
    if run.step == 0 and record["knn_before"] is None and training.monitor:
        record["knn_before"] = training.evaluate()
    if config.model.init and not state.steps_saved(Path(config.out)):
        training.save()  # the weights that it begins with: their file may go, and they may be the best
    if record["knn_due"] and training.monitor:  # the run was asked to stop when it should have evaluated
        record["knn_after"] = training.evaluate()
    training.objective.train()
    stopped = None
    while run.step < training.plan.steps:
        step, began = run.step, time.perf_counter()
        optim.set_schedule(optimizer, training.schedule, step)
        try:
            train_step(
                training.accelerator, training.model, optimizer, training.micro_batches(stop), step, recorder.window,
                accumulate=plan.layout.accumulate, seed=config.seed, config=config.optim,
            )  # fmt: skip
        except CutShort:
            stopped = training.leave_step(stop)
            break
        run.step, run.images_seen = step + 1, run.images_seen + plan.layout.global_batch_size
        if recorder.trace:
            recorder.trace.step()
        run.seconds += time.perf_counter() - began
        if stopped := training.after_step(stop):
            break
    training.saver.check(wait=True)  # when one process ends, a launcher ends all: first the checkpoint must be written
    recorder.close(0.0 if stopped else run.seconds)
    knn = record["knn_before"], record["knn_after"]
    best = (run.best_step, run.best_knn) if config.save.keep_best and run.best_step is not None else None
    totals = run.step, run.images_seen, run.seconds
    return Result(Path(config.out), *totals, *knn, stopped, best, config.model.init, bool(config.eval.test))


def compiled(
    config: RunConfig, plan: Plan, accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer,
    views: Views,
) -> str:  # fmt: skip
    """Compile the blocks of the objective. Returns a sentence: what that cost. The state of the run stays as it is."""
    objective = accelerator.unwrap_model(model)
    batch = random_batch(views, plan.layout.batch_size, config.data.in_chans, accelerator.device)
    buffers = {name: value.clone() for name, value in objective.named_buffers()}

    def work() -> None:
        for part in objective.split(batch):
            accelerator.backward(model(part, 0)["loss"])
        optimizer.zero_grad()

    objective.train()
    sentence = compile_blocks(objective, work, accelerator.device)
    for name, value in objective.named_buffers():
        value.copy_(buffers[name])
    return sentence
