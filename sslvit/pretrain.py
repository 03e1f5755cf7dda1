"""START HERE. `pretrain(config)` is the whole run: images in, a run directory with checkpoints out.

Read next: an objective (objectives/mae.py or dino.py), encoder.py, data/loader.py, state.py, rng.py.
"""

import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from . import config as configuration
from . import data, journal, memory, nonfinite, objectives, optim, rng, sharding, state
from .augment import Normalize, augment
from .config import Plan, RunConfig
from .data import Source
from .data.cache import Cached, Memory, OnDevice, cached, on_device
from .data.loader import make_loader
from .distributed import any_process, others_alive, rank, say, world_size
from .evaluation.online import OnlineKNN, OnlineRank
from .hardware import (
    blocks_of,
    choose_attention,
    compile_blocks,
    default_workers,
    first_on_each_machine,
    keep_memory,
    resolve_precision,
    start_accelerator,
    versions,
)
from .metrics import Window, amount, duration
from .objectives import Objective
from .run import BadImages, Recorder, check_images, images_record, open_run
from .saving import Saver, room_missing
from .stopping import Stop, listening
from .views import Views, random_batch


@dataclass
class Result:
    """What a finished run has to tell."""

    run_dir: Path
    steps: int
    images_seen: int
    seconds: float  # of training, over all starts
    knn_before: float | None  # top-1 in percent, of the untrained and of the trained encoder
    knn_after: float | None
    stopped: str | None = None  # by what, if before its end: a signal's name or max_hours


def summary(result: Result) -> list[str]:
    """What is printed of a run that has reached its end."""
    lines = [f"Done: {result.images_seen} images in {duration(result.seconds)}, {result.run_dir}"]
    if result.knn_before is not None and result.knn_after is not None:
        gain = result.knn_after - result.knn_before
        lines.append(
            f"k-NN accuracy on images it never trained on: untrained encoder {result.knn_before:.1f}%, "
            f"trained encoder {result.knn_after:.1f}% ({gain:+.1f} points)."
        )
    return lines


@dataclass
class Training:
    """A run that is set up: what its loop works with."""

    config: RunConfig
    plan: Plan
    accelerator: Accelerator
    objective: Objective
    model: nn.Module  # the objective and ...
    optimizer: torch.optim.Optimizer  # ... its optimizer, as accelerate wrapped them
    schedule: optim.Schedule
    batches: Iterator[dict]  # of the loader
    views: Views
    normalize: Normalize
    shown: sharding.Shown  # the encoder as it is evaluated, by
    knn: OnlineKNN | None
    directions: OnlineRank | None
    progress: state.RunState
    recorder: Recorder
    bad: BadImages
    saver: Saver
    record: dict[str, Any]  # what a checkpoint has beside tensors and progress

    def micro_batches(self) -> Iterator[dict[str, Tensor]]:
        """Those of one step, augmented, on the device."""
        for _ in range(self.plan.layout.accumulate):
            with self.recorder.watch.waiting():
                batch = next(self.batches)
            self.bad.note(batch)
            self.recorder.skipped.note(batch["index"])
            yield augment(batch, self.views, self.normalize, self.accelerator.device)

    def evaluate(self) -> float | None:
        """Top-1 of k-NN in percent, if the run was given labelled images."""
        run, steps = self.progress, self.plan.steps
        if self.knn is None:
            return None
        self.saver.check(wait=True)  # its thread rests while the evaluation forks its loader processes
        with self.recorder.watch.pausing(), self.shown() as encoder:
            top1 = self.knn(encoder)
        if run.step and top1 > (run.best_knn or 0.0):
            run.best_step, run.best_knn = run.step, top1
        say(f"step {run.step}/{steps}  k-NN {top1:.1f}% (k={self.config.eval.k}) of {self.config.eval.test}")
        self.recorder.write({"step": run.step, "images": run.images_seen, "knn/top1": top1})
        return top1

    def save(self) -> None:
        say(*self.bad.report(self.progress.images_seen))
        self.recorder.look(self.progress)
        self.progress.window = self.recorder.window.state()
        self.saver.save(self.objective, self.optimizer.optimizer, self.progress, self.record)


def pretrain(config: RunConfig) -> Result:
    """Train to the configured end, from the newest checkpoint of the run directory if it has one. Raises UserError."""
    with (
        memory.explained(config), others_alive(),
        listening(config.max_hours) as stop, Saver(Path(config.out), config.save) as saver,
    ):  # fmt: skip
        return train(set_up(config, saver), stop)


def set_up(config: RunConfig, saver: Saver) -> Training:
    """Everything before the first step. Raises UserError for what cannot work, before anything is written."""
    configuration.check(config)
    accelerator = start_accelerator(config.precision)
    device = accelerator.device
    space = Memory()
    source = first_on_each_machine(accelerator, lambda: data.open_source(config.data.train, config.data))
    plan = configuration.make_plan(config, len(source), accelerator.num_processes, accelerator.process_index)
    views = objectives.find(config.method).views(config.objective, config.data)
    normalize = Normalize(*data.normalization(config.data))
    wanted = bool(config.eval.train or config.eval.test)
    knn = OnlineKNN(config.eval, config.data, config.seed, space, accelerator) if wanted else None
    objective = objectives.start(config, plan.steps_per_epoch, plan.steps)
    choose_attention(objective, device, accelerator.mixed_precision)
    shown = sharding.place(objective, device, config.shard)
    if config.batch_size == "auto":
        size = memory.choose_batch_size(config, accelerator, objective, views, Path(config.out))
        config = replace(config, batch_size=size)
        plan = configuration.make_plan(config, len(source), accelerator.num_processes, accelerator.process_index)
    if config.compile:
        blocks_of(objective)  # refuses a model without
    optimizer = optim.make_optimizer(config.optim, objective)
    schedule = optim.Schedule(config.optim, plan.layout.global_batch_size, plan.warmup_steps, plan.steps)

    run_dir, run, saved = Path(config.out), state.RunState(), {}
    lock = open_run(run_dir, config, str(device))
    if state.steps_saved(run_dir):
        run, saved, complaints = state.restore(run_dir, objective, optimizer)
        check_images(saved, source, config.data.train)
        say(*complaints, f"Resuming {run_dir} at step {run.step} of {plan.steps}.")
    journal.rewind(run_dir, saved.get("lengths") if saved else {}, run.step)
    model, optimizer = sharding.prepare(accelerator, objective, optimizer)
    if config.compile:
        say(compiled(config, plan, accelerator, model, optimizer, views))
    workers = default_workers(device) if config.data.workers is None else config.data.workers
    source = cached(source, config.data.cache, config.seed, space)
    images = on_device(source, config.data.cache, device, workers)
    workers = 0 if isinstance(images, OnDevice) else workers
    say(*header(config, plan, schedule, objective, images, accelerator, workers))
    scaling, steps = config.data.jpeg_scaling, (run.step, plan.steps)
    batches = iter(make_loader(images, views, plan.layout, config.seed, steps, workers, device, scaling=scaling))
    keep_memory(device)
    recorder = Recorder(run_dir, config, plan, schedule, run, source, lock, getattr(objective, "alarm", None))
    say(*filter(None, [room_missing(run_dir, config.save, objective, plan.steps - run.step)]))
    directions = None
    if config.log.rank_every_steps:
        directions = OnlineRank(source, objective.exported_encoder(), normalize, config.seed, accelerator)
    record = {name: saved.get(name) for name in ("knn_before", "knn_after", "knn_due")}
    record |= {"images": images_record(source), "encoder": where(objective), "versions": versions()}
    return Training(
        config, plan, accelerator, objective, model, optimizer, schedule, batches, views, normalize, shown, knn,
        directions, run, recorder, BadImages(run_dir, config.data, source), saver, record,
    )  # fmt: skip


def train(training: Training, stop: Stop) -> Result:
    """The loop, until the run's end or until `stop` says so."""
    config, plan, run, record = training.config, training.plan, training.progress, training.record
    recorder, saver, optimizer = training.recorder, training.saver, training.optimizer
    evaluate_every = round((config.eval.every_epochs or 0) * plan.steps_per_epoch) or plan.steps
    if run.step == 0:
        record["knn_before"] = training.evaluate()
    if record["knn_due"]:  # the run was asked to stop when it should have evaluated
        record["knn_after"] = training.evaluate()
    training.objective.train()
    stopped, clock, last_save = None, time.perf_counter(), time.perf_counter()
    for step in range(run.step, plan.steps):
        optim.set_schedule(optimizer, training.schedule, step)
        batches = training.micro_batches()
        train_step(config, plan, training.accelerator, training.model, optimizer, batches, step, recorder.window)
        run.step, run.images_seen = step + 1, run.images_seen + plan.layout.global_batch_size
        recorder.trace.step()
        run.seconds, clock = run.seconds + time.perf_counter() - clock, time.perf_counter()

        save_now = saver.due(run.step, plan.steps)
        if recorder.due(run.step):
            saver.check()
            say(*training.bad.report(run.images_seen))
            recorder.line(run)
        if training.directions and run.step % config.log.rank_every_steps == 0:
            with recorder.watch.pausing(), training.shown() as encoder:
                recorder.rank(run, training.directions(encoder))
        if config.save.every_minutes and (recorder.due(run.step) or world_size() == 1):  # agreeing takes time
            save_now |= any_process((clock - last_save) / 60 > config.save.every_minutes)
        stopped = stop.due(run.step) if run.step < plan.steps else None
        record["knn_due"] = run.step % evaluate_every == 0 or run.step == plan.steps
        if record["knn_due"] and not stopped:
            record["knn_after"], record["knn_due"] = training.evaluate(), False
            save_now |= saver.is_best(run)
        if save_now or stopped:  # after the evaluation, so that a run that is killed here does not lose its result
            training.save()
            last_save = time.perf_counter()
        if stopped:
            break
        clock = time.perf_counter()

    saver.check(wait=True)  # a launcher ends all processes with the first one: none may end before the save is written
    recorder.close()
    knn = record["knn_before"], record["knn_after"]
    return Result(Path(config.out), run.step, run.images_seen, run.seconds, *knn, stopped)


def train_step(
    config: RunConfig, plan: Plan, accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer,
    micro_batches: Iterator[dict[str, Tensor]], step: int, window: Window,
) -> None:  # fmt: skip
    """Step number `step`: forward and backward over its augmented micro-batches, then one update.

    model, optimizer: as accelerate wrapped them. Values to log go into window; nothing waits for the device.
    """
    objective, accumulate = accelerator.unwrap_model(model), plan.layout.accumulate
    buffers = nonfinite.Buffers(objective)
    for micro, batch in enumerate(micro_batches):
        # What is drawn without an image's key (dropout, in a model that has it) has an address too.
        torch.manual_seed(int(rng.fold_in(config.seed, "model", step, micro, rank())))
        last = micro == accumulate - 1
        with nullcontext() if last else accelerator.no_sync(model):
            values = model(batch, step)
            accelerator.backward(values["loss"] / accumulate)
        window.add(values, 1 / accumulate)
    skip = update(config, accelerator, objective, optimizer, step, window)
    buffers.take_back_if(skip)


def update(
    config: RunConfig, accelerator: Accelerator, objective: Objective, optimizer: torch.optim.Optimizer, step: int,
    window: Window,
) -> Tensor:  # fmt: skip
    """What follows the last backward pass of a step. Returns 1.0 if a loss or a gradient is not finite on any process,
    and nothing was done, else 0.0; on the device."""
    trained = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    skip = nonfinite.broken(window.current.values(), accelerator.device)
    optim.spoil(optimizer, trained, skip)
    accelerator.unscale_gradients(optimizer)
    norm = optim.clip_gradients(trained, config.optim)
    skip = torch.maximum(skip, (~torch.isfinite(norm)).float())  # the same everywhere: gradients are averaged
    window.add({"grad_norm": norm})
    objective.before_step(step)
    optim.step_unless(optimizer, skip)
    optimizer.zero_grad()
    objective.after_step(step)
    window.end_step(skip)
    return skip


def compiled(
    config: RunConfig, plan: Plan, accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer,
    views: Views,
) -> str:  # fmt: skip
    """Compile the blocks of the objective; returns what that cost. Nothing of the training state changes."""
    objective = accelerator.unwrap_model(model)
    batch = random_batch(views, plan.layout.batch_size, config.data.in_chans, accelerator.device)
    buffers = {name: value.clone() for name, value in objective.named_buffers()}

    def work() -> None:
        accelerator.backward(model(batch, 0)["loss"])
        optimizer.zero_grad()

    objective.train()
    sentence = compile_blocks(objective, work, accelerator.device)
    for name, value in objective.named_buffers():
        value.copy_(buffers[name])
    return sentence


def where(objective: nn.Module) -> dict[str, str]:
    """Where in the objective's state dict the exported encoder's model is, and how its tokens become one feature."""
    encoder = objective.exported_encoder()
    prefix = next(name for name, module in objective.named_modules() if module is encoder)
    return {"prefix": f"{prefix}.model.", "pool": encoder.pool}


def header(
    config: RunConfig, plan: Plan, schedule: optim.Schedule, objective: nn.Module, images: Source,
    accelerator: Accelerator, workers: int,
) -> list[str]:  # fmt: skip
    """What is about to happen, with the derived values."""
    layout, encoder = plan.layout, objective.exported_encoder()
    weights = sum(p.numel() for p in encoder.parameters()) / 1e6
    heads = sum(p.numel() for p in objective.parameters() if p.requires_grad) / 1e6
    size = "x".join(map(str, data.image_size(config.data)))
    kept = "images stay in memory, " if isinstance(images, Cached) else ""
    kept = f"images on the device ({amount(images.pixels.numel())}), " if isinstance(images, OnDevice) else kept
    sharded = f"sharded among {layout.world_size} processes, " if config.shard and layout.world_size > 1 else ""
    return [
        f"{config.method}: {config.model.name} ({weights:.1f}M parameters, {heads:.1f}M trained), {size} pixels, "
        f"{len(images)} images of {config.data.train}",
        f"{plan.steps} steps = {plan.steps / plan.steps_per_epoch:g} epochs of {plan.steps_per_epoch} steps, "
        f"global batch {layout.global_batch_size} = {layout.batch_size} x {layout.accumulate} micro-batches x "
        f"{layout.world_size} processes, learning rate {schedule.peak_lr:.3g} after {plan.warmup_steps} steps",
        f"{accelerator.device}, {resolve_precision(config.precision, accelerator.device)}, {sharded}{workers} loader "
        f"processes, {kept}writing to {config.out}",
    ]
