"""Loader processes: torch's DataLoader, which computes results ahead of the process that takes them, in order.

Three faults of it are mended here. It loses a result without a word when /dev/shm is full (a container has 64 MB): such
a result goes through a pipe instead. It waits for ever for a process that hangs. And what it says of one that has ended
is a traceback, wherever the main process is at that moment.
"""

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.reduction import ForkingPickler
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from .. import stopping
from ..arguments import first_line
from ..errors import UserError

SMALL = 2**14  # bytes of a tensor that is sent as bytes. Tasks are smaller: none is fetched from the main process later
WAIT, WAIT_KEY = 900.0, "SSLVIT_LOADER_SECONDS"  # a run ends if it gets no result for so long
LIBC = ctypes.CDLL(None)  # opened before any fork
PR_SET_PDEATHSIG = 1  # of Linux's prctl: the signal that a process gets when its parent ends

warnings.filterwarnings("ignore", "This DataLoader will create")  # more processes than cores, which may wait for disks

Task = TypeVar("Task")
Result = TypeVar("Result")
Item = TypeVar("Item", covariant=True)


class Items(Protocol[Item]):
    """What has a length and items by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, place: int, /) -> Item: ...


def compute(work: Callable[[Task], Result], tasks: Iterable[Task], workers: int, pin: bool = False) -> Iterator[Result]:
    """work(task) for each task, in order: by so many processes, which start now, or for 0 by this one when asked.

    pin: tensors of the results lie in memory that a GPU copies from while it computes.
    Raises what `work` raises, UserError if a process ends or gives nothing for too long, and Stopped.
    """
    if not workers:
        return map(work, tasks)
    limit, handler = stopping.limit(WAIT_KEY, WAIT), signal.getsignal(signal.SIGCHLD)
    ForkingPickler.register(Tensor, _reduced)
    loader: DataLoader[Result | Failure] = DataLoader(
        Work(work),
        sampler=tasks,  # any iterable will do
        batch_size=None, collate_fn=_as_it_is, num_workers=workers, pin_memory=pin, worker_init_fn=_begin,
        timeout=1,  # second, after which `_take` looks whether to go on
        multiprocessing_context="fork",  # workers share the index of the source and its cache, and never touch CUDA
    )  # fmt: skip
    try:
        running = iter(loader)
    except OSError as error:
        _MultiProcessingDataLoaderIter._shutdown = True  # of all that do not begin: torch's __del__ asks for it
        raise UserError(
            f"{workers} loader processes cannot be started ({error.strerror}): lower workers=, or set workers=0."
        ) from error
    if handler is not None and signal.getsignal(signal.SIGCHLD) != handler:
        signal.signal(signal.SIGCHLD, handler)  # torch's raises RuntimeError wherever this process is
    return _take(running, limit)


def in_batches(
    items: Items[Task], batch_size: int, collate: Callable[[list[Task]], Result], workers: int
) -> Iterator[Result]:
    """collate([items[0], items[1], ...]) of each `batch_size` items in turn, as `compute` does it."""
    batches = (range(start, min(start + batch_size, len(items))) for start in range(0, len(items), batch_size))
    return compute(lambda places: collate([items[place] for place in places]), batches, workers)


def _take(running: Any, limit: float) -> Iterator[Any]:
    """The results of torch's iterator. In the end its processes are killed: they have nothing to save, and one that
    hangs would not hear a request."""
    waited = 0
    try:
        while True:
            try:
                result = next(running)
            except StopIteration:
                return
            except (ConnectionError, EOFError, FileNotFoundError) as error:  # killed while it handed a result over
                for process in running._workers:
                    process.join(0.1)
                raise UserError(_how_it_ended(running, error)) from error
            except RuntimeError as error:
                if "timed out" not in str(error):
                    raise UserError(_how_it_ended(running, error)) from error
                waited += 1
                stopping.leave_wait(waited)
                if waited >= limit:
                    raise UserError(
                        f"The loader processes have given no images for {waited} s: they hang, or the disk or network "
                        f"does. Look at it, and start the same command again. {WAIT_KEY}= waits longer."
                    ) from error
                continue
            if isinstance(result, Failure):
                raise result.error
            waited = 0
            yield result
    finally:
        for process in running._workers:
            process.kill()


def _how_it_ended(running: Any, error: Exception) -> str:
    codes = [process.exitcode for process in running._workers if process.exitcode]
    if not codes:
        return f"The loader processes cannot go on: {first_line(error)}."
    if -signal.SIGKILL in codes:
        return (
            "A loader process was killed (SIGKILL), as the system does when memory runs out: lower workers=, and start "
            "the same command again."
        )
    how = signal.Signals(-codes[0]).name if codes[0] < 0 else f"status {codes[0]}"
    return (
        f"A loader process has crashed ({how}): start the same command again. If it crashes again, an image or its "
        "decoder is the cause."
    )


class Failure:
    """What `work` has raised. torch would wrap its message in a traceback."""

    def __init__(self, error: Exception) -> None:
        self.error = error


class Work(Dataset[Result | Failure], Generic[Task, Result]):
    """work(task) in place of an item."""

    def __init__(self, work: Callable[[Task], Result]) -> None:
        self.work = work

    def __getitem__(self, task: Task) -> Result | Failure:
        try:
            return self.work(task)
        except Exception as error:
            return Failure(error)


def _as_it_is(result: Any) -> Any:
    return result


def _begin(worker: int) -> None:
    """What a loader process does first. On Linux the system kills it when its parent ends, even while it hangs; torch
    has it look every five seconds, between two results."""
    stopping.ignore_in_worker()
    if sys.platform == "linux":
        LIBC.prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))
        parent = multiprocessing.parent_process()
        if parent and parent.pid != os.getppid():  # it has ended already
            os._exit(1)


def _reduced(tensor: Tensor) -> tuple[Callable[..., Tensor], tuple[Any, ...]]:
    """How a tensor of a task or a result is sent: in shared memory, or as bytes if it is small or finds no room."""
    with contextlib.suppress(RuntimeError):
        if tensor.nbytes > SMALL:
            return reduce_tensor(tensor.detach().share_memory_())
    order = sorted(range(tensor.ndim), key=tensor.stride, reverse=True)  # crops lie pixel by pixel, and stay so
    dense = tensor.detach().permute(order).contiguous()
    places = sorted(range(tensor.ndim), key=order.__getitem__)
    return _rebuilt, (dense.flatten().view(torch.uint8).numpy(), dense.dtype, dense.shape, places)


def _rebuilt(raw: NDArray[np.uint8], dtype: torch.dtype, shape: torch.Size, places: list[int]) -> Tensor:
    return torch.from_numpy(raw).view(dtype).view(shape).permute(places)
