"""The only file that touches torch.distributed. Every function also works in one process that never started it."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .errors import UserError

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
    """Split the parameters of each module among all processes, in place, and move them to the device; those of a module
    that comes before are left out."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (world_size(),))
    for module in modules:
        fully_shard(module, mesh=mesh)


def is_sharded(x: Tensor) -> bool:
    """Whether a tensor is sharded."""
    return hasattr(x, "to_local")


def local_shard(x: Tensor) -> Tensor:
    """This process's part of a sharded tensor, in the same memory; any other tensor as it is. Call it in no_grad."""
    return x.to_local() if is_sharded(x) else x


def full_tensor(x: Tensor) -> Tensor:
    """All of a sharded tensor, on all processes, which call this together; any other tensor as it is."""
    return x.detach().full_tensor() if is_sharded(x) else x


def shard_like(x: Tensor, like: Tensor | None) -> Tensor:
    """A whole tensor, which all processes have, sharded like another; as it is if that is not sharded."""
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
    """What `work` returns on the first process, on every process; a UserError there is raised on all.

    all_cores: lend it those of the processes that wait.
    """
    if not active():
        return work()
    result: list[Any] = [None, None]
    if rank() == 0:
        threads = torch.get_num_threads()
        if all_cores:
            torch.set_num_threads(os.cpu_count() or threads)  # launchers leave one to each process, and the others wait
        try:
            result[0] = work()
        except UserError as error:
            result[1] = str(error)
        torch.set_num_threads(threads)
    dist.broadcast_object_list(result, src=0)
    if result[1] is not None:
        raise UserError(result[1])
    return result[0]


@contextmanager
def lost_process_as_user_error() -> Iterator[None]:
    """Within it the loss of another process (killed, out of memory, its machine gone) is a UserError here: what waits
    for it fails, at once by gloo, and by NCCL when its watchdog looks. A launcher ends those that still wait."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error).lower():
            raise
        raise UserError(
            f"Another of the {world_size()} processes has ended, so process {rank()} ends too: its own message or the "
            "launcher's says why. Start the same command again to go on from the last checkpoint."
        ) from error


def barrier() -> None:
    if active():
        dist.barrier()


def any_process(flag: bool) -> bool:
    """Whether it is true on any process; the same answer on all."""
    return any(gather_objects(flag))


def say(*lines: str) -> None:
    """Print on the first process only, at once."""
    if rank() == 0 and lines:
        print("\n".join(lines), flush=True)
