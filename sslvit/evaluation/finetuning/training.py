"""The training loop of fine-tuning, on any number of processes. It goes on from a checkpoint if there is one.

As in pretraining, a step is a global batch, and every random draw is a function of the seed and its place in the run.
So the number of processes, micro-batches and loader processes does not change what is learned, nor does a stop in
between. The exception is BatchNorm: it sees the images of one micro-batch on one process.
"""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn

from ... import optim
from ...checkpoints import state
from ...checkpoints.lock import Lock, create_and_acquire
from ...data import Source
from ...data.augment import augment
from ...data.crops import Crop
from ...data.loader import Layout, make_loader
from ...distributed import gather_objects, on_first_process, say
from ...errors import UserError
from ...hardware import default_workers, versions
from ...metrics import SKIPPED, Window
from ...step import CutShort, train_step
from ...stopping import Stopped, StopRequest
from .. import scores
from ..frozen import Frozen
from . import mixing
from .classifier import Classifier, freeze, layer_ids, parameter_groups, trained_layers
from .recipe import Recipe

BETAS = (0.9, 0.999)  # of AdamW; pretraining has (0.9, 0.95)
KEEP_CHECKPOINTS = 2  # the older one in case the newer one is damaged


@dataclass
class Examples:
    """Images and their targets: [N] int64 classes, or [N, K] float32."""

    source: Source
    targets: Tensor


Evaluate = Callable[[Examples], tuple[dict[str, Any], int]]  # scores, and the number of images that cannot be read


def loss_of(task: str, outputs: Tensor, targets: Tensor) -> Tensor:
    """[B, K] outputs, [B, K] float targets (class probabilities, labels in [0, 1], standardised numbers) -> scalar."""
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
    examples: Examples
    layout: Layout
    task: str
    workers: int | None
    settings: dict[str, Any]  # a checkpoint of other settings is refused

    def __post_init__(self) -> None:
        recipe, encoder = self.recipe, self.classifier.encoder
        self.views = {"image": [Crop(encoder.image_size, recipe.crop_scale, flip_prob=recipe.flip_prob)]}
        self.steps_per_epoch = len(self.examples.targets) // self.layout.global_batch_size
        self.steps = recipe.epochs * self.steps_per_epoch
        self.num_layers = 1 + max(layer_ids(self.classifier.model).values())
        self.settings = json.loads(json.dumps(self.settings))  # as they are read from a checkpoint
        self.progress = state.RunState()
        self.history: list[dict[str, Any]] = []  # a line for each epoch
        self.unreadable: set[str] = set()  # names of images, on this process
        self.num_unreadable = 0  # on all processes, since this start

    @property
    def peak_lr(self) -> float:
        return self.recipe.base_lr * self.layout.global_batch_size / optim.REFERENCE_BATCH

    def lr(self, step: int) -> float:
        """The learning rate of the top layer."""
        warmup_steps = round(self.recipe.warmup_epochs * self.steps_per_epoch)
        return optim.warmup_cosine(step, self.peak_lr, self.recipe.min_lr, warmup_steps, self.steps)

    def run(self, folder: Path | None, stop: StopRequest | None, held_out: Examples | None, evaluate: Evaluate) -> None:
        """Train to the end, from the newest checkpoint in the folder. Raises UserError, and Stopped."""
        recipe, accelerator = self.recipe, self.frozen.accelerator
        groups = parameter_groups(self.classifier.model, recipe.layer_decay, recipe.weight_decay, recipe.head_lr)
        fused = accelerator.device.type in optim.FUSED or None
        adamw = torch.optim.AdamW(groups, lr=0.0, betas=BETAS, fused=fused)
        lock = open_folder(folder) if folder else None  # held until this returns
        if folder and state.steps_saved(folder):
            self._restore(folder, adamw)
        progress, window = self.progress, Window()
        window.load(progress.window)
        optimizer, trained = accelerator.prepare_optimizer(adamw), 0
        model: Any = None
        batches = self._batches(progress.step)
        first_image, first_second, clock = progress.images_seen, progress.seconds, time.perf_counter()
        for step in range(progress.step, self.steps):
            epoch = step / self.steps_per_epoch
            layers = trained_layers(epoch, self.num_layers, recipe.head_epochs, recipe.unfreeze_epochs)
            if layers != trained:
                # DDP keeps the list of trained parameters that it is made with. Free the old one, then make a new one.
                model, trained = None, layers
                accelerator.free_memory()
                freeze(self.classifier, trained)
                model = accelerator.prepare_model(self.classifier)
            for group in optimizer.param_groups:
                group["lr"] = self.lr(step) * group["lr_scale"]
            try:
                train_step(
                    accelerator, model, optimizer, self._micro_batches(batches, step, stop), step, window,
                    accumulate=self.layout.accumulate, seed=self.seed, config=optim.Config(clip=recipe.clip),
                    forward=self._loss,
                )  # fmt: skip
            except CutShort:
                self._leave_step(folder, adamw, window, stop)
            progress.step, progress.images_seen = step + 1, progress.images_seen + self.layout.global_batch_size
            progress.seconds = first_second + time.perf_counter() - clock
            epoch_ends = progress.step % self.steps_per_epoch == 0
            reason = stop.reason_at(progress.step) if stop and progress.step < self.steps else None
            if epoch_ends:
                rate = (progress.images_seen - first_image) / (progress.seconds - first_second)
                self._end_epoch(window, held_out, evaluate, rate)
                freeze(self.classifier, trained)  # after an evaluation all parts are in training mode
            if folder and (epoch_ends or reason):
                self._save(folder, adamw, window)
            if reason:
                raise self._stopped(reason, folder)
        if lock:
            lock.close()

    def _micro_batches(self, batches: Iterator[Any], step: int, stop: StopRequest | None) -> Iterator[Any]:
        """The micro-batches of one step; fewer if `stop` asks for an end."""
        for micro in range(accumulate := self.layout.accumulate):
            if micro and stop and stop.reason_at(step * accumulate + micro):
                return
            yield next(batches)

    def _leave_step(
        self, folder: Path | None, optimizer: torch.optim.AdamW, window: Window, stop: StopRequest | None
    ) -> NoReturn:
        """Save the last whole step, after a step that `stop` has cut short. Raises Stopped."""
        reason = next(reason for reason in gather_objects(stop and stop.reason) if reason)
        if not self.progress.step:
            raise Stopped(f"Stopped by {reason} in the first step: there is nothing to save yet.", reason)
        if folder and self.progress.step not in state.steps_saved(folder):
            self._save(folder, optimizer, window)
        raise self._stopped(reason, folder)

    def _stopped(self, reason: str, folder: Path | None) -> Stopped:
        step = self.progress.step
        return Stopped(f"Stopped by {reason} after step {step} of {self.steps}, which is saved in {folder}.", reason)

    def _loss(self, model: nn.Module, batch: tuple[Tensor, Tensor, Tensor], step: int) -> dict[str, Tensor]:
        images, targets, key = batch
        return {"loss": loss_of(self.task, model(images, key), targets)}

    def _batches(self, first_step: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Micro-batches from a step to the end: augmented images, targets, keys; on the device. Raises UserError."""
        device, recipe, source = self.frozen.accelerator.device, self.recipe, self.examples.source
        randaugment = None
        if recipe.randaugment != "none":
            randaugment = mixing.RandAugment(recipe.randaugment, self.frozen.normalize.mean)
        workers = default_workers(device) if self.workers is None else self.workers
        steps = (first_step, self.steps)
        for batch in make_loader(source, self.views, self.layout, self.seed, steps, workers, device, randaugment):
            names = {source.name(index) for index, _ in batch.pop("bad")}
            self.unreadable |= names
            if batch.pop("failed", False):
                raise UserError(f"{len(names)} images in a row cannot be read, for example {sorted(names)[0]}.")
            yield self._inputs(batch)

    def _inputs(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """A micro-batch of the loader -> augmented images, targets for `loss_of`, keys; on the device."""
        device, recipe, key = self.frozen.accelerator.device, self.recipe, batch["key"]
        augmented = augment(batch, self.views, self.frozen.normalize, device)
        images, targets = augmented["image"][0], self.examples.targets[batch["index"]].to(device)
        if self.task == "single":
            targets = mixing.smooth_labels(targets, self.classifier.head.out_features, recipe.smoothing)
        images = mixing.erase(images, key, recipe.erasing)
        images, targets = mixing.mix(images, targets, key, recipe.mixup, recipe.cutmix)
        return images, targets, augmented["key"]

    def _end_epoch(self, window: Window, held_out: Examples | None, evaluate: Evaluate, rate: float) -> None:
        """Print and keep the line of an epoch; all processes call it. Raises UserError if the training has diverged."""
        epoch, means = self.progress.step // self.steps_per_epoch, window.close()
        window.recent.clear()
        if "loss" not in means:
            raise UserError(
                f"The training has diverged: no step of epoch {epoch} has a finite loss and finite gradients. Lower "
                "base_lr, lengthen warmup_epochs, set clip=1, or try precision=float32."
            )
        line: dict[str, Any] = {"epoch": epoch, **{name: round(value, 6) for name, value in means.items()}}
        text = f"epoch {epoch}/{self.recipe.epochs}  loss {line['loss']:.4f}"
        if held_out is not None:
            name = scores.MAIN_SCORE[self.task]
            line[f"held_out_{name}"] = evaluate(held_out)[0][name]
            text += f"  held-out {name} {line[f'held_out_{name}']}"
        self.history.append(line)
        say(f"{text}  {rate:.0f} images/s")
        if SKIPPED in line:
            say(
                f"Warning: {line[SKIPPED]} of {self.steps_per_epoch} steps skipped in epoch {epoch}: loss or gradients "
                "not finite."
            )
        unreadable = sorted(set().union(*gather_objects(self.unreadable)))
        if len(unreadable) > self.num_unreadable:
            say(f"{len(unreadable)} training images cannot be read, others replace them; for example {unreadable[0]}.")
        self.num_unreadable = len(unreadable)

    def _save(self, folder: Path, optimizer: torch.optim.AdamW, window: Window) -> None:
        """Write a checkpoint while all processes wait. Raises UserError on all of them."""
        self.progress.window = window.state()
        extra = {"finetune": self.settings, "history": self.history, "versions": versions()}

        def write() -> None:
            try:
                state.save(folder, self.classifier, optimizer, self.progress, extra)
                state.prune(folder, KEEP_CHECKPOINTS, self.progress.step)
            except (OSError, SafetensorError) as error:
                raise UserError(f"save={folder} cannot be written: {error}.") from error

        on_first_process(write)

    def _restore(self, folder: Path, optimizer: torch.optim.AdamW) -> None:
        """Load the newest checkpoint. Raises UserError if it belongs to another training."""
        self.progress, record, complaints = state.restore(folder, self.classifier, optimizer)
        stored = record.get("finetune", {})
        differing = [name for name in self.settings if stored.get(name) != self.settings[name]]
        if differing:
            changes = "; ".join(f"{name} was {stored.get(name)} and is {self.settings[name]}" for name in differing)
            raise UserError(
                f"{folder} holds a training with other settings: {changes[:600]}. Give its settings to go on with it, "
                "or another save= for a new training."
            )
        self.history = record["history"]
        say(*complaints, f"Resuming {folder} at step {self.progress.step} of {self.steps}.")


def open_folder(folder: Path) -> Lock | None:
    """Make the folder for checkpoints and take its lock, on the first process. Raises UserError on all of them."""

    def refuse() -> None:
        if {path.name for path in folder.iterdir()} - {"checkpoints", ".lock"}:
            raise UserError(f"save={folder} holds other things than checkpoints: give a new folder.")

    return create_and_acquire(folder, "save", refuse)
