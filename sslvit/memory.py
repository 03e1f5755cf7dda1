"""Whether a step fits into memory, before it is taken: as it is, in parts, in smaller micro-batches, or not at all.

The arithmetic is the same on all devices: what one and two images leave for the backward pass is counted, and the
gradients, the moments and what else a step takes are added. On a GPU batch_size=auto tries sizes instead.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from .arguments import read_yaml
from .checkpoints.state import steps_saved
from .config import Plan, RunConfig
from .data.cache import CACHE_SHARE
from .data.crops import Views, num_pixels, random_batch
from .distributed import gather_objects, is_sharded, say, world_size
from .errors import UserError
from .hardware import local_processes, memory_left, peak_memory
from .metrics import format_bytes
from .model.objective import Objective
from .step import BufferSnapshot

LARGE = 2**20  # pixels of a micro-batch, below which nothing is counted: a gigabyte, or less
TRIED = (2, 4)  # images of the two counts; one alone would fail in BatchNorm
# Measured peaks of whole runs on a CPU are up to so many times what is counted: gradients of activations, gaps.
BESIDE = 1.3
A_VALUE = 20  # bytes for each value of a crop: the batch, its augmentation and what the loader has ready
RESERVE = 0.05  # of a GPU's memory, left for what a trial does not see: fragments, evaluation, libraries


def is_out_of_memory(error: BaseException) -> bool:
    """CUDA's, the CPU allocator's (a plain RuntimeError), or Python's."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def explain(error: Exception, config: RunConfig) -> str | None:
    """What to tell the user if `error` says that memory ran out; None if it does not."""
    return advice(config) if is_out_of_memory(error) else None


def advice(config: RunConfig, smaller: int | None = None) -> str:
    """What to change when a step of this configuration does not fit, with values that keep the global batch.
    smaller: a batch_size that is known to fit."""
    device = torch.device("cuda" if torch.cuda.is_available() and torch.cuda.is_initialized() else "cpu")
    total = config.global_batch_size // world_size()
    size = config.batch_size if isinstance(config.batch_size, int) else total
    smaller = smaller or max((d for d in range(1, size // 2 + 1) if total % d == 0), default=None)
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


def fit(
    config: RunConfig, plan: Plan, accelerator: Accelerator, objective: Objective, views: Views
) -> tuple[RunConfig, Plan]:
    """The configuration and the plan with which a step fits into memory; says what it changes, and why.

    First the objective cuts micro-batches into parts, if it can. Then, unless batch_size is a number, micro-batches
    get smaller. A run that goes on keeps its batch_size. Raises UserError for what does not fit on a CPU, where a
    process that takes too much is not refused but killed. Nothing of the training state changes.
    """
    total, cuda = plan.layout.batch_size * plan.layout.accumulate, accelerator.device.type == "cuda"
    stored = _stored_batch_size(Path(config.out), total)
    if config.batch_size == "auto" and cuda:
        return _with_batch_size(config, plan, stored or largest_fitting(config, accelerator, objective, views))
    if stored and not isinstance(config.batch_size, int):
        config, plan = _with_batch_size(config, plan, stored)
    if any(map(is_sharded, objective.parameters())):  # a part of it on each process: not counted
        return config, plan
    wanted, need = plan.layout.batch_size, count(config, accelerator, objective, views)
    room = min(gather_objects(memory_left(accelerator.device) / local_processes(accelerator.device)))
    if not need.fits(wanted, room) and (changed := objective.save_memory()) is not None:
        whole, need = need, count(config, accelerator, objective, views)
        config = replace(config, objective=changed)
        say(f"Crop-wise backward: {whole.sentence(wanted, room)}; a few crops at a time it is {need.text(wanted)}.")
    if need.fits(wanted, room) or (isinstance(config.batch_size, int) and (cuda or need(wanted) < room)):
        return _with_batch_size(config, plan, wanted) if config.batch_size == "auto" else (config, plan)
    smaller = max((size for size in sizes(total) if need.fits(size, room)), default=None)
    if smaller is None or isinstance(config.batch_size, int):
        raise UserError(f"{need.sentence(wanted, room)}. {advice(config, smaller)}")
    koleo = getattr(config.objective, "koleo_weight", 0)
    say(
        f"batch_size={smaller}, of which {total // smaller} micro-batches make a step: {need.sentence(wanted, room)}."
        + " KoLeo compares the images of a micro-batch, so now fewer of them." * bool(koleo)
    )
    return _with_batch_size(config, plan, smaller)


def _stored_batch_size(run_dir: Path, total: int) -> int | None:
    """Of a run that goes on; None if it does not divide the images of a step."""
    if not steps_saved(run_dir) or not (run_dir / "config.yaml").is_file():
        return None
    stored = read_yaml(run_dir / "config.yaml").get("batch_size")
    return stored if isinstance(stored, int) and stored > 0 and total % stored == 0 else None


def _with_batch_size(config: RunConfig, plan: Plan, size: int) -> tuple[RunConfig, Plan]:
    total = plan.layout.batch_size * plan.layout.accumulate
    layout = replace(plan.layout, batch_size=size, accumulate=total // size)
    return replace(config, batch_size=size), replace(plan, layout=layout)


@dataclass
class Need:
    """Bytes that a run takes beside its weights: for gradients, moments and checkpoints, and for each image."""

    fixed: float
    image: float

    def __call__(self, batch_size: int) -> float:
        return self.fixed + batch_size * self.image

    def fits(self, batch_size: int, room: float) -> bool:
        """With place for a cache of images, and for others."""
        return self(batch_size) < (1 - CACHE_SHARE) * room

    def text(self, batch_size: int) -> str:
        return f"about {format_bytes(self(batch_size))}"

    def sentence(self, batch_size: int, room: float) -> str:
        return (
            f"a step of {batch_size} images needs {self.text(batch_size)} ({format_bytes(self.image)} for each, and "
            f"{format_bytes(self.fixed)} beside them), and {format_bytes(room)} are free"
        )


def count(config: RunConfig, accelerator: Accelerator, objective: Objective, views: Views) -> Need:
    """What a step needs, from what two small batches of noise leave for the backward pass."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in objective.parameters()}
    trained = sum(parameter.nbytes for parameter in objective.parameters() if parameter.requires_grad)
    buffers, before = BufferSnapshot(objective), objective.training
    objective.train()

    def saved(size: int) -> int:
        """Bytes; of the largest part."""
        most, batch = 0, random_batch(views, size, config.data.in_chans, accelerator.device)
        for part in objective.split(batch):
            found: dict[int, int] = {}  # {address: bytes} of what the backward pass would need

            def note(tensor: Tensor, found: dict[int, int] = found) -> Tensor:
                storage = tensor.untyped_storage()
                found[storage.data_ptr()] = storage.nbytes()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), accelerator.autocast():
                values = objective(part, 0)
            most = max(most, sum(size for address, size in found.items() if address not in weights))
            del values
        return most

    few, more = map(saved, TRIED)
    buffers.restore()
    objective.train(before)
    image = max(0.0, (more - few) / (TRIED[1] - TRIED[0]))
    on_cpu = accelerator.device.type == "cpu"  # then a checkpoint is copied there before it is written
    copies = 3 + (world_size() > 1) + 2 * on_cpu  # gradients, two moments, DDP's buckets
    fixed = copies * trained + on_cpu * sum(value.nbytes for value in objective.state_dict().values())
    crops = A_VALUE * config.data.in_chans * num_pixels(views)
    return Need(fixed + max(0.0, few - image * TRIED[0]), BESIDE * image + crops)


def largest_fitting(config: RunConfig, accelerator: Accelerator, objective: Objective, views: Views) -> int:
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
        for part in objective.split(batch):
            with accelerator.autocast():
                loss = objective(part, 0)["loss"]
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
