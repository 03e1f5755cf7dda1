"""The only file that touches torch.distributed. Every function also works in one process that never started it."""

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .errors import UserError, printable

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

T = TypeVar("T")


def active() -> bool:
    return dist.is_available() and dist.is_initialized()


def world_size() -> int:
    return dist.get_world_size() if active() else 1


def rank() -> int:
    return dist.get_rank() if active() else 0


def all_reduce_sum(x: Tensor) -> Tensor:
    """The sum over all processes, in place."""
    if active():
        dist.all_reduce(x)
    return x


def shard(modules: list[nn.Module], device: torch.device) -> None:
    """Split the parameters of each module among all processes, in place, and move them to the device.

    A parameter that two of the modules share is split with the first one.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (world_size(),))
    for module in modules:
        fully_shard(module, mesh=mesh)


def is_sharded(x: Tensor) -> "TypeGuard[DTensor]":
    """Whether a tensor is sharded."""
    return hasattr(x, "to_local")


def local_shard(x: Tensor) -> Tensor:
    """This process's part of a sharded tensor, in the same memory. Any other tensor as it is. Call it in no_grad."""
    return x.to_local() if is_sharded(x) else x


def full_tensor(x: Tensor) -> Tensor:
    """The whole of a sharded tensor. All processes call it together. Any other tensor as it is."""
    return x.full_tensor().detach() if is_sharded(x) else x


def shard_like(x: Tensor, like: Tensor | None) -> Tensor:
    """Shard a tensor that every process holds whole, in the way of `like`. As it is if `like` is not sharded."""
    if like is None or not is_sharded(like):
        return x
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(x, like.device_mesh, like.placements, src_data_rank=None)


def gather_objects(value: Any) -> list[Any]:
    """The values of all processes, in the order of their ranks, on every process."""
    if not active():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def on_first_process(work: Callable[[], T], all_cores: bool = True) -> T:
    """Call `work` on the first process only. Returns its result on every process; a UserError is raised on all.

    all_cores: it may use the cores of the processes that wait.
    """
    return _share_result(work, all_cores) if active() else work()


def _share_result(work: Callable[[], T], all_cores: bool) -> T:
    result: list[Any] = [None, None]
    if rank() == 0:
        threads = torch.get_num_threads()
        if all_cores:
            torch.set_num_threads(os.cpu_count() or threads)  # launchers give each process one
        try:
            result[0] = work()
        except UserError as error:
            result[1] = str(error)
        torch.set_num_threads(threads)
    dist.broadcast_object_list(result, src=0)
    if result[1] is not None:
        raise UserError(result[1])
    return result[0]


def explain_lost_process(error: Exception) -> str | None:
    """What to tell the user if `error` says that another process has ended (killed, out of memory); None if not.

    gloo raises such an error at once, NCCL when its watchdog looks. The launcher ends processes that still wait.
    """
    if not isinstance(error, dist.DistError) and "gloo" not in str(error).lower():
        return None
    return (
        f"Another of the {world_size()} processes has ended, so process {rank()} ends too. The message of that process "
        "or of the launcher says why. Start the same command again to go on from the last checkpoint."
    )


def barrier() -> None:
    if active():
        dist.barrier()


def any_process(flag: bool) -> bool:
    """Whether it is true on any process; the same answer on all."""
    return any(gather_objects(flag))


def say(*lines: str) -> None:
    """Print on the first process only, at once."""
    if rank() == 0 and lines:
        print(printable("\n".join(lines), keep="\n\t"), flush=True)
