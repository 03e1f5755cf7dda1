"""The training of fine-tuning: steps on labelled images, from a checkpoint if there is one, on any number of processes.

As in pretraining, everything random is a function of the seed and the place, and a step is a global batch: neither
processes, micro-batches, loader processes nor a stop in between change what is learned (but for models with BatchNorm,
which looks at the images held at once).
"""

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn

from .. import optim, rng, schedules, state
from ..augment import augment
from ..data import Source
from ..data.loader import Layout, make_loader
from ..distributed import gather_objects, on_first_process, rank, say
from ..errors import UserError
from ..hardware import default_workers, versions
from ..lock import open_held
from ..metrics import Window
from ..stopping import Stop, Stopped
from ..views import Crop
from . import mixing, scores
from .classifier import Classifier, average_statistics, freeze, layer_ids, parameter_groups, trained_layers
from .protocol import Frozen

BETAS = (0.9, 0.999)  # of AdamW; pretraining has (0.9, 0.95)
KEPT = 2  # checkpoints, of which the older one is there if the newer is damaged


@dataclass
class Recipe:
    """What decides what is learned; the words are explained beside finetune.Config."""

    epochs: int
    global_batch_size: int
    base_lr: float
    min_lr: float
    warmup_epochs: float
    weight_decay: float
    layer_decay: float
    head_lr: float
    standardise: bool
    drop_path: float
    clip: float | None
    crop_scale: tuple[float, float]
    flip_prob: float
    randaugment: str
    erasing: float
    mixup: float
    cutmix: float
    smoothing: float
    head_epochs: float
    unfreeze_epochs: float


@dataclass
class Part:
    """Some images with their targets, [N] int64 classes or [N, K] float32."""

    source: Source
    targets: Tensor


Judge = Callable[[Part], tuple[dict[str, Any], int]]  # scores, and the number of images that cannot be read


def loss_of(task: str, outputs: Tensor, targets: Tensor) -> Tensor:
    """[B, K] outputs, [B, K] float targets (shares of the classes, labels in [0, 1], standardised numbers) -> mean."""
    outputs = outputs.float()
    if task == "single":
        return F.cross_entropy(outputs, targets)
    if task == "multilabel":
        return F.binary_cross_entropy_with_logits(outputs, targets)
    return F.smooth_l1_loss(outputs, targets)


@dataclass
class Training:
    """One training of one classifier."""

    recipe: Recipe
    seed: int
    frozen: Frozen
    classifier: Classifier
    part: Part
    layout: Layout
    task: str
    workers: int | None
    settings: dict[str, Any]  # what a checkpoint must agree with

    def __post_init__(self) -> None:
        recipe = self.recipe
        encoder = self.classifier.encoder
        self.num_outputs = self.classifier.feature_dim()
        self.views = {"image": [Crop(encoder.image_size, recipe.crop_scale, flip_prob=recipe.flip_prob)]}
        self.steps_per_epoch = len(self.part.targets) // self.layout.global_batch_size
        self.steps = recipe.epochs * self.steps_per_epoch
        self.num_layers = 1 + max(layer_ids(self.classifier.model).values())
        self.settings = json.loads(json.dumps(self.settings))
        self.run_state, self.history = state.RunState(), []
        self.unreadable: set[str] = set()
        self.num_unreadable = 0  # over all processes, since this start

    def lr(self, step: int) -> float:
        """Of a layer whose share is 1."""
        peak = self.recipe.base_lr * self.layout.global_batch_size / optim.REFERENCE_BATCH
        warmup_steps = round(self.recipe.warmup_epochs * self.steps_per_epoch)
        return schedules.warmup_cosine(step, peak, self.recipe.min_lr, warmup_steps, self.steps)

    def run(self, folder: Path | None, stop: Stop | None, held_out: Part | None, judge: Judge) -> None:
        """Train to the end, from the newest checkpoint of the folder. Raises UserError, and Stopped."""
        recipe, accelerator = self.recipe, self.frozen.accelerator
        groups = parameter_groups(self.classifier.model, recipe.layer_decay, recipe.weight_decay, recipe.head_lr)
        fused = accelerator.device.type in ("cuda", "cpu") or None
        optimizer = torch.optim.AdamW(groups, lr=0.0, betas=BETAS, fused=fused)
        lock = open_folder(folder) if folder else None  # held until this returns
        if folder and state.steps_saved(folder):
            self._restore(folder, optimizer)
        run, window = self.run_state, Window()
        window.load(run.window)
        optimizer, model, trained = accelerator.prepare_optimizer(optimizer), None, None
        batches = self._batches(run.step)
        seen, before, began = run.images_seen, run.seconds, time.perf_counter()
        for step in range(run.step, self.steps):
            epoch = step / self.steps_per_epoch
            due = trained_layers(epoch, self.num_layers, recipe.head_epochs, recipe.unfreeze_epochs)
            if due != trained:
                # DDP keeps to the parameters that learn when it is made: it is made again, once the old one is gone.
                model, trained = None, due
                accelerator.free_memory()
                freeze(self.classifier, trained)
                model = accelerator.prepare_model(self.classifier)
            for group in optimizer.param_groups:
                group["lr"] = self.lr(step) * group["lr_scale"]
            self._step(model, optimizer, batches, step, window)
            run.step, run.images_seen = step + 1, run.images_seen + self.layout.global_batch_size
            run.seconds = before + time.perf_counter() - began
            epoch_ends = run.step % self.steps_per_epoch == 0
            if epoch_ends:
                rate = (run.images_seen - seen) / (run.seconds - before)
                self._close_epoch(window, held_out, judge, rate)
                freeze(self.classifier, trained)  # the evaluation has left its own mode
            stopped = stop.due(run.step) if stop and run.step < self.steps else None
            if folder and (epoch_ends or stopped):
                self._save(folder, optimizer, window)
            if stopped:
                raise Stopped(
                    f"Stopped by {stopped} after step {run.step} of {self.steps}, which is saved in {folder}."
                )
        if lock:
            lock.close()

    def _batches(self, first_step: int) -> Iterator[dict]:
        """Micro-batches from a step to the end."""
        device, recipe = self.frozen.accelerator.device, self.recipe
        augmenting = None
        if recipe.randaugment != "none":
            augmenting = mixing.RandAugment(recipe.randaugment, self.frozen.normalize.mean)
        workers = default_workers(device) if self.workers is None else self.workers
        steps = (first_step, self.steps)
        loader = make_loader(self.part.source, self.views, self.layout, self.seed, steps, workers, device, augmenting)
        for batch in loader:
            names = {self.part.source.name(index) for index, _ in batch.pop("bad")}
            self.unreadable |= names
            if batch.pop("failed", False):
                raise UserError(f"{len(names)} images in a row cannot be read, for example {sorted(names)[0]}.")
            yield batch

    def _step(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterator[dict], step: int, window: Window
    ) -> None:
        """Forward and backward over the step's micro-batches, then one update. Nothing waits for the device."""
        accelerator, accumulate = self.frozen.accelerator, self.layout.accumulate
        for micro in range(accumulate):
            images, targets, key = self._inputs(next(batches))
            # What is drawn without an image's key (dropout, in a model that has it) has an address too.
            torch.manual_seed(int(rng.fold_in(self.seed, "model", step, micro, rank())))
            with nullcontext() if micro == accumulate - 1 else accelerator.no_sync(model):
                loss = loss_of(self.task, model(images, key), targets)
                accelerator.backward(loss / accumulate)
            window.add({"loss": loss}, 1 / accumulate)
        accelerator.unscale_gradients(optimizer)
        learning = [p for p in self.classifier.parameters() if p.requires_grad]
        window.add({"grad_norm": optim.clip_gradients(learning, optim.Config(clip=self.recipe.clip))})
        optimizer.step()
        optimizer.zero_grad()
        window.end_step(torch.zeros((), device=loss.device))  # no step is skipped here: a diverged epoch ends the run

    def _inputs(self, batch: dict) -> tuple[Tensor, Tensor, Tensor]:
        """A micro-batch of the loader -> augmented images, targets as the loss wants them, keys; on the device."""
        device, recipe, key = self.frozen.accelerator.device, self.recipe, batch["key"]
        found = augment(batch, self.views, self.frozen.normalize, device)
        images, targets = found["image"][0], self.part.targets[batch["index"]].to(device)
        if self.task == "single":
            targets = mixing.smoothed(targets, self.num_outputs, recipe.smoothing)
        images = mixing.erase(images, key, recipe.erasing)
        images, targets = mixing.mix(images, targets, key, recipe.mixup, recipe.cutmix)
        return images, targets, found["key"]

    def _close_epoch(self, window: Window, held_out: Part | None, judge: Judge, rate: float) -> None:
        """The line of an epoch, at which all processes meet. Raises UserError if the training has diverged."""
        average_statistics(self.classifier)
        epoch, line = self.run_state.step // self.steps_per_epoch, window.close()
        window.recent.clear()
        if not all(math.isfinite(value) for value in line.values()):
            raise UserError(
                f"The training has diverged in epoch {epoch}: lower base_lr, lengthen warmup_epochs, set clip=1, or "
                "try precision=float32."
            )
        line = {"epoch": epoch, **{name: round(value, 6) for name, value in line.items()}}
        text = f"epoch {epoch}/{self.recipe.epochs}  loss {line['loss']:.4f}"
        if held_out is not None:
            name = scores.FIRST[self.task]
            line[f"held_out_{name}"] = value = judge(held_out)[0][name]
            text += f"  held-out {name} {value}"
        self.history.append(line)
        say(f"{text}  {rate:.0f} images/s")
        bad = sorted(set().union(*gather_objects(self.unreadable)))
        if len(bad) > self.num_unreadable:
            say(f"{len(bad)} training images cannot be read and are replaced by others, for example {bad[0]}.")
        self.num_unreadable = len(bad)

    def _save(self, folder: Path, optimizer: torch.optim.Optimizer, window: Window) -> None:
        """A checkpoint, for which all processes wait. Raises UserError on all of them if it cannot be written."""
        self.run_state.window = window.state()
        extra = {"finetune": self.settings, "history": self.history, "versions": versions()}

        def write() -> None:
            try:
                state.save(folder, self.classifier, optimizer.optimizer, self.run_state, extra)
                state.prune(folder, KEPT, self.run_state.step)
            except (OSError, SafetensorError) as error:
                raise UserError(f"save={folder} cannot be written: {error}.") from error

        on_first_process(write)

    def _restore(self, folder: Path, optimizer: torch.optim.Optimizer) -> None:
        """Take up the newest checkpoint. Raises UserError if it belongs to another training."""
        self.run_state, record, complaints = state.restore(folder, self.classifier, optimizer)
        stored = record.get("finetune", {})
        differing = [name for name in self.settings if stored.get(name) != self.settings[name]]
        if differing:
            changes = "; ".join(f"{name} was {stored.get(name)} and is {self.settings[name]}" for name in differing)
            raise UserError(
                f"{folder} holds a training with other settings: {changes[:600]}. Give those to go on with it, or "
                "another save= for a new one."
            )
        self.history = record["history"]
        say(*complaints, f"Resuming {folder} at step {self.run_state.step} of {self.steps}.")


def open_folder(folder: Path) -> IO[str] | None:
    """Make the folder of checkpoints and hold its lock, on the first process. Raises UserError on all of them."""

    def refuse() -> None:
        if {path.name for path in folder.iterdir()} - {"checkpoints", ".lock"}:
            raise UserError(f"{folder} holds other things than checkpoints: give a new save=.")

    return open_held(folder, "save", refuse)
