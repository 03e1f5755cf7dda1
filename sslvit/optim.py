"""AdamW with the parameter groups, schedules and clipping of the published recipes.

Learning rate, weight decay and momentum are pure functions of the step. Nothing remembers anything, so a run resumes
and is extended without replaying a scheduler.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from timm.models import group_parameters
from torch import nn

from .distributed import all_reduce_sum, is_sharded, local_shard
from .errors import ABOVE_0, BELOW_1, Limits

FUSED = {"cuda", "cpu"}  # devices with AdamW as one kernel, which can also leave out a step by itself
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


def parameter_groups(module: nn.Module) -> list[dict[str, Any]]:
    """Two groups: with weight decay, and without (biases and one-dimensional parameters).

    As in both published codes, class, mask and register tokens, and positions that learn, are decayed.
    """
    decayed, others = list[nn.Parameter](), list[nn.Parameter]()
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            (others if parameter.ndim == 1 or name.endswith(".bias") else decayed).append(parameter)
    return [{"params": decayed, "decayed": True}, {"params": others, "decayed": False, "weight_decay": 0.0}]


def layer_groups(module: nn.Module, layer_decay: float) -> list[dict[str, Any]]:
    """The two groups for each layer of an encoder, and for what is no encoder.

    "scale" multiplies the learning rate: 1 for the last block, layer_decay for the one before, its square for the one
    before that ... (as in fine-tuning: Clark et al., 2020). Only a group of an encoder has it.
    """
    scales: dict[nn.Parameter, float] = {}
    encoder: Any
    for encoder in module.modules():
        if hasattr(encoder, "group_matcher"):  # a model of timm
            layers = group_parameters(encoder, encoder.group_matcher(coarse=False), reverse=True)
            last = max(layers.values())
            scales |= {encoder.get_parameter(name): layer_decay ** (last - i) for name, i in layers.items()}
    groups: dict[tuple[bool, float | None], dict[str, Any]] = {}
    for group in parameter_groups(module):
        for parameter in group["params"]:
            scale = scales.get(parameter)
            more = {} if scale is None else {"scale": scale}
            groups.setdefault((group["decayed"], scale), group | more | {"params": []})["params"].append(parameter)
    return list(groups.values())


def make_optimizer(config: Config, module: nn.Module) -> torch.optim.AdamW:
    layered = config.freeze_epochs or config.layer_decay < 1
    groups = layer_groups(module, config.layer_decay) if layered else parameter_groups(module)
    # One kernel for all parameters; on a CPU it is 3.5 times faster than the foreach form (5.6M parameters).
    fused = all(p.device.type in FUSED for group in groups for p in group["params"]) or None
    return torch.optim.AdamW(groups, config.base_lr, config.betas, config.eps, config.weight_decay, fused=fused)


def set_schedule(optimizer: torch.optim.Optimizer, schedule: Schedule, step: int) -> None:
    for group in optimizer.param_groups:
        frozen = step < schedule.freeze_steps and "scale" in group
        group["lr"] = 0.0 if frozen else schedule.lr(step) * group.get("scale", 1.0)
        if group["decayed"]:
            group["weight_decay"] = schedule.weight_decay(step)


@torch.no_grad()
def clip_gradients(parameters: list[nn.Parameter], config: Config) -> torch.Tensor:
    """Clip in place. Returns the norm of all gradients before that, a scalar on the device (nothing waits for it).

    parameters: sharded or not; a norm is that of the whole gradient. "tensor" scales each gradient by
    min(1, clip / (norm + 1e-6)) of its own norm, as DINO's released code does.
    """
    sharded = any(map(is_sharded, parameters))
    gradients = [local_shard(p.grad) for p in parameters if p.grad is not None]
    norms = torch.stack(torch._foreach_norm(gradients))
    if sharded:
        norms = all_reduce_sum(norms.square()).sqrt()
    total = torch.linalg.vector_norm(norms.float())
    if config.clip is not None:
        if config.clip_mode == "tensor":
            scales = (config.clip / (norms + 1e-6)).clamp(max=1.0).unbind()
        else:
            scales = ((config.clip / (total + 1e-6)).clamp(max=1.0),) * len(gradients)
        torch._foreach_mul_(gradients, scales)
    return total


def step_unless(optimizer: torch.optim.Optimizer, skip: torch.Tensor) -> None:
    """One update, or none if `skip` (a float32 scalar) is 1. optimizer: as accelerate wrapped it.

    The fused kernel looks by itself, as it does for GradScaler, so nothing waits for the device; without it we do. With
    fp16 the scaler decides, see `poison_gradients`.
    """
    inner: Any = getattr(optimizer, "optimizer", optimizer)
    if getattr(optimizer, "scaler", None) is not None:
        optimizer.step()
    elif inner.defaults["fused"]:
        inner.found_inf = skip
        optimizer.step()
        del inner.found_inf
    elif not skip.item():
        optimizer.step()


@torch.no_grad()
def poison_gradients(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], skip: torch.Tensor) -> None:
    """With fp16, tell the scaler by the gradients (before they are unscaled) that the step is to be skipped."""
    if getattr(optimizer, "scaler", None) is not None:
        torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], torch.where(skip > 0, torch.nan, 1.0))


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (You et al., 2017), as MAE's linear probe uses it (He et al., appendix A.1).

    For parameters of two or more dimensions d = grad + wd * p is scaled by trust_coefficient * |p| / |d|. Others get
    plain momentum. Then mu = momentum * mu + d and p -= lr * mu.
    """

    def __init__(
        self, params: Iterable[Any], lr: float = 0.0, weight_decay: float = 0.0, momentum: float = 0.9,
        trust_coefficient: float = 0.001,
    ) -> None:  # fmt: skip
        defaults = {"weight_decay": weight_decay, "momentum": momentum, "trust_coefficient": trust_coefficient}
        super().__init__(params, {"lr": lr, **defaults})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no closure
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                d = p.grad
                if p.ndim > 1:
                    d = d + group["weight_decay"] * p
                    p_norm, d_norm = p.norm(), d.norm()
                    trust = group["trust_coefficient"] * p_norm / d_norm
                    d = d * torch.where((p_norm > 0) & (d_norm > 0), trust, 1.0)
                mu = self.state[p].setdefault("mu", torch.zeros_like(p))
                mu.mul_(group["momentum"]).add_(d)
                p.add_(mu, alpha=-group["lr"])
