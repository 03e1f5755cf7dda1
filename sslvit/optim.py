"""AdamW with the parameter groups and clipping of the published recipes. Its keys and schedules are in schedule.py."""

from collections.abc import Iterable
from typing import Any

import torch
from timm.models import group_parameters
from torch import nn

from .distributed import all_reduce_sum, is_sharded, local_shard
from .schedule import REFERENCE_BATCH as REFERENCE_BATCH
from .schedule import Config as Config
from .schedule import Schedule as Schedule
from .schedule import cosine as cosine
from .schedule import warmup_cosine as warmup_cosine

FUSED = {"cuda", "cpu"}  # devices with AdamW as one kernel, which can also leave out a step by itself


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
