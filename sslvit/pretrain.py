"""START HERE. `pretrain(config)` is the whole run: images in, a run directory with checkpoints out.

Read next: an objective (objectives/mae.py or dino.py), encoder.py, data/loader.py, state.py, rng.py.
"""

import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from . import config as configuration
from . import data, journal, memory, nonfinite, objectives, optim, rng, state
from .augment import Normalize, augment
from .config import Plan, RunConfig
from .data.loader import Memory, cached, make_loader
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
from .metrics import Window
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
    stopped: str | None = None  # by what, if before its end: SIGTERM, SIGUSR1 or max_hours


def pretrain(config: RunConfig) -> Result:
    """Train to the configured end, from the newest checkpoint of the run directory if it has one. Raises UserError."""
    with (
        memory.explained(config), others_alive(),
        listening(config.max_hours) as stop, Saver(Path(config.out), config.save) as saver,
    ):  # fmt: skip
        return train(config, stop, saver)


def train(config: RunConfig, stop: Stop, saver: Saver) -> Result:
    """The run itself, until its end or until `stop` says so."""
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
    objective = objectives.start(config, plan.steps_per_epoch, plan.steps).to(device)
    choose_attention(objective, device, accelerator.mixed_precision)
    if config.batch_size == "auto":
        size = memory.choose_batch_size(config, accelerator, objective, views, Path(config.out))
        config = replace(config, batch_size=size)
        plan = configuration.make_plan(config, len(source), accelerator.num_processes, accelerator.process_index)
    if config.compile:
        blocks_of(objective)  # refuses a model without, before anything is written
    optimizer = optim.make_optimizer(config.optim, objective)
    schedule = optim.Schedule(config.optim, plan.layout.global_batch_size, plan.warmup_steps, plan.steps)

    run_dir, run, saved = Path(config.out), state.RunState(), {}
    lock = open_run(run_dir, config, str(device))
    if state.steps_saved(run_dir):
        run, saved, complaints = state.restore(run_dir, objective, optimizer)
        check_images(saved, source, config.data.train)
        say(*complaints, f"Resuming {run_dir} at step {run.step} of {plan.steps}.")
    journal.rewind(run_dir, saved.get("lengths") if saved else {}, run.step)
    model, optimizer = accelerator.prepare(objective, optimizer)
    if config.compile:
        say(compiled(config, plan, accelerator, model, optimizer, views))
    source = cached(source, config.data.cache, config.seed, space)
    workers = default_workers(device) if config.data.workers is None else config.data.workers
    say(*header(config, plan, schedule, objective, len(source), accelerator, workers))
    batches = iter(make_loader(source, views, plan.layout, config.seed, (run.step, plan.steps), workers, device))
    keep_memory(device)
    recorder = Recorder(run_dir, config, plan, schedule, run, source, lock, getattr(objective, "alarm", None))
    say(*filter(None, [room_missing(run_dir, config.save, objective, plan.steps - run.step)]))
    if config.log.rank_every_steps:
        directions = OnlineRank(source, objective.exported_encoder(), normalize, config.seed, accelerator)
    bad, images = BadImages(run_dir, config.data, source), images_record(source)

    def micro_batches() -> Iterator[dict[str, Tensor]]:
        for _ in range(plan.layout.accumulate):
            with recorder.watch.waiting():
                batch = next(batches)
            bad.note(batch)
            recorder.skipped.note(batch["index"])
            yield augment(batch, views, normalize, device)

    def evaluate() -> float | None:
        if knn is None:
            return None
        saver.check(wait=True)  # its thread rests while the evaluation forks its loader processes
        with recorder.watch.pausing():
            top1 = knn(objective.exported_encoder())
        if run.step and top1 > (run.best_knn or 0.0):
            run.best_step, run.best_knn = run.step, top1
        say(f"step {run.step}/{plan.steps}  k-NN {top1:.1f}% (k={config.eval.k}) of {config.eval.test}")
        recorder.write({"step": run.step, "images": run.images_seen, "knn/top1": top1})
        return top1

    def save() -> None:
        say(*bad.report(run.images_seen))
        recorder.look(run)
        run.window = recorder.window.state()
        scores = {"knn_before": knn_before, "knn_after": knn_after, "knn_due": knn_due}
        record = {**scores, "images": images, "encoder": where(objective), "versions": versions()}
        saver.save(objective, optimizer.optimizer, run, record)

    evaluate_every = round((config.eval.every_epochs or 0) * plan.steps_per_epoch) or plan.steps
    knn_before, knn_after = (saved["knn_before"], saved["knn_after"]) if saved else (evaluate(), None)
    if saved.get("knn_due"):  # the run was asked to stop when it should have evaluated
        knn_after = evaluate()
    objective.train()
    stopped, clock, last_save = None, time.perf_counter(), time.perf_counter()
    for step in range(run.step, plan.steps):
        optim.set_schedule(optimizer, schedule, step)
        train_step(config, plan, accelerator, model, optimizer, micro_batches(), step, recorder.window)
        run.step, run.images_seen = step + 1, run.images_seen + plan.layout.global_batch_size
        recorder.trace.step()
        run.seconds, clock = run.seconds + time.perf_counter() - clock, time.perf_counter()

        save_now = saver.due(run.step, plan.steps)
        if recorder.due(run.step):
            saver.check()
            say(*bad.report(run.images_seen))
            recorder.line(run)
        if config.log.rank_every_steps and run.step % config.log.rank_every_steps == 0:
            with recorder.watch.pausing():
                recorder.rank(run, directions(objective.exported_encoder()))
        if config.save.every_minutes and (recorder.due(run.step) or world_size() == 1):  # agreeing takes time
            save_now |= any_process((clock - last_save) / 60 > config.save.every_minutes)
        stopped = stop.due(run.step) if run.step < plan.steps else None
        knn_due = run.step % evaluate_every == 0 or run.step == plan.steps
        if knn_due and not stopped:
            knn_after, knn_due = evaluate(), False
            save_now |= saver.is_best(run)
        if save_now or stopped:  # after the evaluation, so that a run that is killed here does not lose its result
            save()
            last_save = time.perf_counter()
        if stopped:
            break
        clock = time.perf_counter()

    saver.check(wait=True)  # a launcher ends all processes with the first one: none may end before the save is written
    recorder.close()
    return Result(run_dir, run.step, run.images_seen, run.seconds, knn_before, knn_after, stopped)


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
    config: RunConfig, plan: Plan, schedule: optim.Schedule, objective: nn.Module, num_images: int,
    accelerator: Accelerator, workers: int,
) -> list[str]:  # fmt: skip
    """What is about to happen, with the derived values."""
    layout, encoder = plan.layout, objective.exported_encoder()
    weights = sum(p.numel() for p in encoder.parameters()) / 1e6
    heads = sum(p.numel() for p in objective.parameters() if p.requires_grad) / 1e6
    size = "x".join(map(str, data.image_size(config.data)))
    return [
        f"{config.method}: {config.model.name} ({weights:.1f}M parameters, {heads:.1f}M trained), {size} pixels, "
        f"{num_images} images of {config.data.train}",
        f"{plan.steps} steps = {plan.steps / plan.steps_per_epoch:g} epochs of {plan.steps_per_epoch} steps, "
        f"global batch {layout.global_batch_size} = {layout.batch_size} x {layout.accumulate} micro-batches x "
        f"{layout.world_size} processes, learning rate {schedule.peak_lr:.3g} after {plan.warmup_steps} steps",
        f"{accelerator.device}, {resolve_precision(config.precision, accelerator.device)}, {workers} loader processes, "
        f"writing to {config.out}",
    ]
