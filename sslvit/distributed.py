"""The only file that touches torch.distributed. Every function also works in one process that never started it."""

from typing import Any

import torch.distributed as dist
from torch import Tensor


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


def gather_objects(value: Any) -> list[Any]:
    """The values of all processes, in the order of their ranks, on every process."""
    if not active():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


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
