"""One optimizer step, as pretraining and fine-tuning take it; skipped if its loss or its gradients are not finite.

Whether a step is skipped is decided by a number that stays on the device, so no step waits for the device.
"""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from . import optim, rng
from .distributed import all_reduce_sum, rank
from .metrics import Window


def train_step(
    accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer, micro_batches: Iterable[Any],
    step: int, window: Window, *, accumulate: int, seed: int, config: optim.Config,
    forward: Callable[[nn.Module, Any, int], dict[str, Tensor]] = nn.Module.__call__,
) -> Tensor:  # fmt: skip
    """Step number `step`: forward and backward over `accumulate` micro-batches, then one update.

    model, optimizer: as accelerate wrapped them. forward(model, micro_batch, step) gives {"loss": scalar, others to
    log}. All values, and the gradient norm, go into window. Returns 1.0 if the step was skipped, else 0.0, on the
    device. A skipped step changes no parameter, no moment of the optimizer and no buffer, on all processes.
    """
    buffers = BufferSnapshot(accelerator.unwrap_model(model))
    for micro, batch in enumerate(micro_batches):
        # What is drawn without an image's key (dropout, in a model that has it) has an address too.
        torch.manual_seed(int(rng.fold_in(seed, "model", step, micro, rank())))
        with nullcontext() if micro == accumulate - 1 else accelerator.no_sync(model):
            values = forward(model, batch, step)
            accelerator.backward(values["loss"] / accumulate)
        window.add(values, 1 / accumulate)
    skip = update(accelerator, model, optimizer, step, window, config)
    buffers.restore_if(skip)
    return skip


def update(
    accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer, step: int, window: Window,
    config: optim.Config,
) -> Tensor:  # fmt: skip
    """What follows the last backward pass of a step: check, clip, update. Returns as `train_step`.

    The module may define before_step(step), called when the gradients are final, and after_step(step), called when
    the optimizer has stepped. Both are called for a skipped step too: a teacher follows the student, who stayed.
    """
    module = accelerator.unwrap_model(model)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    skip = any_nonfinite(window.current.values(), accelerator.device)
    optim.poison_gradients(optimizer, trained, skip)
    accelerator.unscale_gradients(optimizer)
    norm = optim.clip_gradients(trained, config)
    skip = torch.maximum(skip, (~torch.isfinite(norm)).float())  # the same everywhere: gradients are averaged
    window.add({"grad_norm": norm})
    before_step, after_step = getattr(module, "before_step", None), getattr(module, "after_step", None)
    if before_step:
        before_step(step)
    optim.step_unless(optimizer, skip)
    optimizer.zero_grad()
    if after_step:
        after_step(step)
    window.end_step(skip)
    return skip


def any_nonfinite(values: Iterable[Tensor], device: torch.device) -> Tensor:
    """Scalars of this process -> 1.0 if one of them is not finite on any process, else 0.0; on the device."""
    flag = (~torch.isfinite(torch.stack([torch.zeros((), device=device), *values]))).any().float()
    return all_reduce_sum(flag).clamp_(max=1)


class BufferSnapshot:
    """A copy of what a module holds beside its parameters (DINO's center, running statistics), to be restored."""

    def __init__(self, module: nn.Module) -> None:
        self.values = [(buffer, buffer.clone()) for buffer in module.buffers()]

    def restore_if(self, skip: Tensor) -> None:
        for buffer, before in self.values:
            buffer.copy_(torch.where(skip > 0, before, buffer))
