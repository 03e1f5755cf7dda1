"""One optimizer step, as pretraining and fine-tuning take it; skipped if its loss or its gradients are not finite.

Whether a step is skipped is decided by a number that stays on the device, so no step waits for the device. The host
reads these numbers when a line of the log or a checkpoint is due. Too many skipped steps in a row end a run.
"""

import json
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from . import optim, rng
from .checkpoints.journal import NONFINITE
from .checkpoints.state import RunState, steps_saved
from .data import Source
from .distributed import all_reduce_sum, gather_objects, rank, world_size
from .errors import UserError
from .metrics import Window


class CutShort(Exception):
    """A step got fewer micro-batches than it has, because the run ends. All that a checkpoint holds is as before."""


def train_step(
    accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer, micro_batches: Iterable[Any],
    step: int, window: Window, *, accumulate: int, seed: int, config: optim.Config,
    forward: Callable[[nn.Module, Any, int], dict[str, Tensor]] = nn.Module.__call__,
) -> Tensor:  # fmt: skip
    """Step number `step`: forward and backward over `accumulate` micro-batches, then one update.

    model, optimizer: as accelerate wrapped them. forward(model, micro_batch, step) gives {"loss": scalar, others to
    log}. All values, and the gradient norm, go into window. Returns 1.0 if the step was skipped, else 0.0, on the
    device. See `update` for what a skipped step changes. Raises CutShort for fewer micro-batches.
    """
    module = accelerator.unwrap_model(model)
    buffers = BufferSnapshot(module)
    split = getattr(module, "split", lambda batch: [batch])
    for micro, batch in enumerate(micro_batches):
        # What is drawn without an image's key (dropout, in a model that has it) has an address too.
        torch.manual_seed(int(rng.fold_in(seed, "model", step, micro, rank())))
        for part in (parts := split(batch)):
            last = micro == accumulate - 1 and part is parts[-1]
            with nullcontext() if last else accelerator.no_sync(model):
                values = forward(model, part, step)
                accelerator.backward(values["loss"] / accumulate)
            window.add(values, 1 / accumulate, begins=part is parts[0])
    if micro + 1 < accumulate:
        buffers.restore()
        raise CutShort
    skip = update(accelerator, module, optimizer, step, window, config)
    average_statistics(module)
    buffers.restore_if(skip)
    return skip


def update(
    accelerator: Accelerator, module: nn.Module, optimizer: torch.optim.Optimizer, step: int, window: Window,
    config: optim.Config,
) -> Tensor:  # fmt: skip
    """What follows the last backward pass of a step: check, clip, update. Returns as `train_step`.

    The module may define before_step(step), called when the gradients are final, and after_step(step), called when
    the optimizer has stepped. Both are called for a skipped step too.

    A skipped step leaves the trained parameters, the optimizer's moments and all buffers (DINO's center, BatchNorm's
    statistics) as they were, on all processes. What after_step does to other parameters stays: DINO's teacher moves
    towards its student as in every step, and the student is where it was.
    """
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

    def restore(self) -> None:
        for buffer, before in self.values:
            buffer.copy_(before)

    def restore_if(self, skip: Tensor) -> None:
        for buffer, before in self.values:
            buffer.copy_(torch.where(skip > 0, before, buffer))


@torch.no_grad()
def average_statistics(module: nn.Module) -> None:
    """BatchNorm's running means and variances, which each process takes from its own images, become their average."""
    statistics = [
        values
        for norm in module.modules()
        if isinstance(norm, _BatchNorm) and norm.training
        for values in (norm.running_mean, norm.running_var)
        if values is not None
    ]
    if statistics and world_size() > 1:
        means = all_reduce_sum(torch.cat(statistics)) / world_size()
        torch._foreach_copy_(statistics, means.split([len(values) for values in statistics]))


class SkippedSteps:
    """Writes the images and losses of skipped steps into nonfinite.jsonl, and ends a run with too many in a row."""

    def __init__(self, run_dir: Path, source: Source, limit: int) -> None:
        """limit: of skipped steps in a row."""
        self.run_dir, self.source, self.limit = run_dir, source, limit
        self.index: list[Tensor] = []  # of the micro-batches since the last poll

    def note(self, index: Tensor) -> None:
        """Image numbers of a micro-batch."""
        self.index.append(index)

    def poll(self, window: Window, run: RunState) -> tuple[list[str], list[str]]:
        """(lines for nonfinite.jsonl, sentences to say) of the steps since the last poll; updates the counts in `run`.
        All processes call this."""
        recent, window.recent = window.recent, []
        index, self.index = self.index, []
        flags = torch.stack([skip for skip, _ in recent]).tolist() if recent else []
        lines, first = [], run.step - len(recent) + 1
        for place, flag in enumerate(flags):
            run.skipped_in_a_row = run.skipped_in_a_row + 1 if flag else 0
            run.skipped += bool(flag)
            if flag:  # the same on all processes
                losses = recent[place][1]
                at = place * len(losses)
                names = [[self.source.name(i) for i in micro.tolist()] for micro in index[at : at + len(losses)]]
                mine = {"losses": [str(loss.item()) for loss in losses], "images": names}  # JSON has no nan
                lines.append(json.dumps({"step": first + place, "processes": gather_objects(mine)}) + "\n")
        if not lines:
            return [], []
        return lines, [
            f"Warning: {len(lines)} of the last {len(recent)} steps skipped: loss or gradients not finite; "
            f"see {self.run_dir / NONFINITE}."
        ]

    def stop_if_too_many(self, run: RunState) -> None:
        """Raises UserError."""
        if run.skipped_in_a_row < self.limit:
            return
        saved = steps_saved(self.run_dir)
        good = f"The last checkpoint, of step {saved[-1]}, is from before" if saved else "There is no checkpoint yet"
        raise UserError(
            f"The run has diverged: the last {run.skipped_in_a_row} steps up to {run.step} were skipped, as their "
            f"loss or gradients are not finite (log.max_nonfinite={self.limit}). {good}; the images are in "
            f"{self.run_dir / NONFINITE}. Lower optim.base_lr, lengthen optim.warmup_epochs, set optim.clip=1, or try "
            "precision=float32, in another out=."
        )
