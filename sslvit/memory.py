"""When a step does not fit into memory: what to change, or the largest batch_size that fits, found by trying."""

from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from .arguments import read_yaml
from .checkpoints.state import steps_saved
from .config import RunConfig
from .data.crops import Views, random_batch
from .distributed import gather_objects, world_size
from .errors import UserError
from .hardware import peak_memory
from .metrics import format_bytes
from .step import BufferSnapshot

RESERVE = 0.05  # of a GPU's memory, left for what a trial does not see: fragments, evaluation, libraries


def is_out_of_memory(error: BaseException) -> bool:
    """CUDA's, the CPU allocator's (a plain RuntimeError), or Python's."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def explain(error: Exception, config: RunConfig) -> str | None:
    """What to tell the user if `error` says that memory ran out; None if it does not."""
    return advice(config) if is_out_of_memory(error) else None


def advice(config: RunConfig) -> str:
    """What to change when a step of this configuration does not fit, with values that keep the global batch."""
    device = torch.device("cuda" if torch.cuda.is_available() and torch.cuda.is_initialized() else "cpu")
    total = config.global_batch_size // world_size()
    size = config.batch_size if isinstance(config.batch_size, int) else total
    smaller = max((d for d in range(1, size // 2 + 1) if total % d == 0), default=None)
    choices = []
    if smaller:
        choices.append(
            f"give batch_size={smaller}, of which {total // smaller} micro-batches on each process make the same "
            f"global_batch_size={config.global_batch_size}"
        )
    if not config.model.grad_checkpointing:
        choices.append("model.grad_checkpointing=true, which takes a third more time")
    if world_size() > 1 and not config.shard:
        choices.append("shard=true, which splits weights and moments among the processes")
    choices = choices or ["take a smaller model or smaller images"]
    return (
        f"The memory of the {'GPU' if device.type == 'cuda' else 'machine'} is not enough for batch_size={size} (the "
        f"peak was {format_bytes(peak_memory(device))}): {', or '.join(choices)}."
    )


def choose_batch_size(
    config: RunConfig, accelerator: Accelerator, objective: nn.Module, views: Views, run_dir: Path
) -> int:
    """What batch_size=auto stands for: that of the run which goes on, else the largest that fits on every process.
    Raises UserError on a CPU, where a process that takes too much is not refused but killed."""
    if steps_saved(run_dir) and (run_dir / "config.yaml").is_file():
        stored = read_yaml(run_dir / "config.yaml").get("batch_size")
        if isinstance(stored, int):
            return stored
    if accelerator.device.type != "cuda":
        raise UserError(
            "batch_size=auto tries sizes until the GPU refuses one, and a CPU's system refuses none but ends the "
            "process: give a number, or leave it out."
        )
    return largest_fitting(config, accelerator, objective, views)


def largest_fitting(config: RunConfig, accelerator: Accelerator, objective: nn.Module, views: Views) -> int:
    """By forward and backward passes on noise, with AdamW's moments and DDP's buckets accounted for; nothing of the
    training state changes."""
    trained = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    moments = (2 + (world_size() > 1)) * sum(parameter.nbytes for parameter in trained)
    cuda = accelerator.device.type == "cuda"
    reserve = RESERVE * torch.cuda.get_device_properties(accelerator.device).total_memory if cuda else 0
    buffers = BufferSnapshot(objective)

    def trial(size: int) -> None:
        ballast = torch.empty(int(moments + reserve), dtype=torch.uint8, device=accelerator.device)
        batch = random_batch(views, size, config.data.in_chans, accelerator.device)
        with accelerator.autocast():
            loss = objective(batch, 0)["loss"]
        loss.backward()
        del ballast

    objective.train()
    total = config.global_batch_size // world_size()
    found = grow(sizes(total), trial, lambda: clean(trained, cuda))
    buffers.restore_if(torch.ones((), device=accelerator.device))
    smallest = min(gather_objects(found))
    if not smallest:
        raise UserError(advice(config))
    return smallest


def sizes(total: int) -> list[int]:
    """Divisors of a number, each at least twice the one before, and the number itself."""
    found = [1]
    while found[-1] < total:
        found.append(min((d for d in range(2 * found[-1], total // 2 + 1) if total % d == 0), default=total))
    return found


def grow(candidates: list[int], trial: Callable[[int], None], clean: Callable[[], None]) -> int:
    """The last of growing candidates whose trial does not run out of memory; 0 if the first one does."""
    found = 0
    for size in candidates:
        try:
            trial(size)
            found = size
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            break
        finally:
            clean()
    clean()  # once more: what a failed trial held is free only when its error is
    return found


def clean(trained: list[nn.Parameter], cuda: bool) -> None:
    for parameter in trained:
        parameter.grad = None
    if cuda:
        torch.cuda.empty_cache()
