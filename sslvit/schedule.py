"""The optim.* keys, and the schedules of the published recipes.

Learning rate, weight decay and momentum are pure functions of the step. Nothing remembers anything, so a run resumes
and is extended without replaying a scheduler.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from .errors import ABOVE_0, BELOW_1, Limits

REFERENCE_BATCH = 256  # base_lr is the learning rate at this global batch size
Shape = Literal["warmup_cosine", "linspace_cosine", "hold"]
HOLD = 0.7  # share of a run after which the learning rate of lr_schedule=hold falls


@dataclass
class Config:
    base_lr: float = 1.5e-4  # learning rate at a global batch of 256 images; scaled linearly
    min_lr: float = 0.0  # at the end of the run
    warmup_epochs: float = 40.0  # linear warm-up of the learning rate from 0
    # linspace_cosine (DINO): the warm-up reaches its peak one step earlier. hold: constant until 70 % of the run.
    lr_schedule: Shape = "warmup_cosine"  # or linspace_cosine (DINO), or hold, whose run may change its length
    weight_decay: float = 0.05  # of everything but biases and one-dimensional parameters
    weight_decay_end: float | None = None  # reached on half a cosine; null: constant
    betas: tuple[float, float] = (0.9, 0.95)  # of AdamW
    eps: float = 1e-8  # of AdamW
    clip: float | None = None  # largest gradient norm; null: no clipping
    clip_mode: Literal["tensor", "global"] = "global"  # tensor: each parameter by itself, as DINO's code does
    freeze_epochs: float = 0.0  # until then the encoder does not learn, heads and decoder do; for model.init
    layer_decay: float = 1.0  # learning rate of a block of the encoder divided by that of the next one; for model.init

    LIMITS: ClassVar[Limits] = [
        (ABOVE_0, None, "base_lr", "eps", "clip"),
        (0, None, "min_lr", "warmup_epochs", "weight_decay", "weight_decay_end", "freeze_epochs"),
        (ABOVE_0, 1, "layer_decay"),
        (0, BELOW_1, "betas"),
    ]


def cosine(start: float, end: float, progress: float) -> float:
    """Half a cosine from `start` at progress 0 to `end` at progress 1, constant after."""
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * min(progress, 1.0)))


def warmup_cosine(
    step: int, peak: float, end: float, warmup_steps: int, total_steps: int, linspace: bool = False
) -> float:
    """Linear from 0 at step 0 to `peak` at step `warmup_steps`, then half a cosine that reaches `end` at step
    `total_steps`, one after the last (MAE, appendix A.1). linspace: the peak comes one step earlier (DINO's code)."""
    if step < warmup_steps:
        return peak * step / max(1, warmup_steps - linspace)
    return cosine(peak, end, (step - warmup_steps) / max(1, total_steps - warmup_steps))


def warmup_hold(step: int, peak: float, end: float, warmup_steps: int, total_steps: int) -> float:
    """Linear from 0 to `peak` at step `warmup_steps`, constant until HOLD of the run, then half a cosine to `end`.

    Until it falls, nothing depends on the length of the run.
    """
    held = max(warmup_steps, math.ceil(HOLD * total_steps))
    if step < held:
        return warmup_cosine(step, peak, peak, warmup_steps, total_steps)
    return cosine(peak, end, (step - held) / max(1, total_steps - held))


@dataclass(frozen=True)
class Schedule:
    """Learning rate and weight decay as functions of the step."""

    config: Config
    global_batch_size: int
    warmup_steps: int
    total_steps: int
    freeze_steps: int = 0  # in which the encoder does not learn

    @property
    def peak_lr(self) -> float:
        return self.config.base_lr * self.global_batch_size / REFERENCE_BATCH

    def lr(self, step: int) -> float:
        config, linspace = self.config, self.config.lr_schedule == "linspace_cosine"
        if config.lr_schedule == "hold":
            return warmup_hold(step, self.peak_lr, config.min_lr, self.warmup_steps, self.total_steps)
        return warmup_cosine(step, self.peak_lr, config.min_lr, self.warmup_steps, self.total_steps, linspace)

    def weight_decay(self, step: int) -> float:
        start, end = self.config.weight_decay, self.config.weight_decay_end
        return start if end is None else cosine(start, end, step / self.total_steps)
