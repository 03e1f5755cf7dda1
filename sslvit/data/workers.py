"""Loader processes: they compute results ahead of the process that takes them, which gets them in order.

torch's DataLoader has three faults that this has not. It sends tensors through /dev/shm, which has 64 MB in a
container, and loses without a word what finds no room there. It waits for a result without a limit. And its processes
outlive a trainer that is killed while they hang. Here tensors lie in memory without a name, for which /dev/shm does not
count; each wait has a limit; and the system kills the processes when their parent ends.
"""

import contextlib
import ctypes
import io
import math
import mmap
import os
import signal
import socket
import struct
import sys
import threading
import time
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.reduction import ForkingPickler
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from .. import stopping
from ..errors import UserError

AHEAD = 2  # tasks that a process has at once
WAIT, WAIT_KEY = 900.0, "SSLVIT_LOADER_SECONDS"  # a run ends if it gets no result for so long
INLINE = 2**14  # bytes up to which a tensor is sent in the message itself
HEAD = struct.Struct("<Q?")  # of a message: its length, and whether shared memory belongs to it
LIBC = ctypes.CDLL(None)  # opened before any fork
PR_SET_PDEATHSIG = 1  # of Linux's prctl: the signal that a process gets when its parent ends

Task = TypeVar("Task")
Result = TypeVar("Result")
Item = TypeVar("Item", covariant=True)


def compute(work: Callable[[Task], Result], tasks: Iterable[Task], workers: int) -> Iterator[Result]:
    """work(task) for each task, in order: by so many processes, which start now, or for 0 by this one when asked.

    Raises what `work` raises, UserError if a process ends or gives nothing for too long, and Stopped.
    """
    return Results(work, tasks, workers) if workers else map(work, tasks)


def in_batches(
    items: "Items[Task]", batch_size: int, collate: Callable[[list[Task]], Result], workers: int
) -> Iterator[Result]:
    """collate([items[0], items[1], ...]) of each `batch_size` items in turn, as `compute` does it."""
    batches = (range(start, min(start + batch_size, len(items))) for start in range(0, len(items), batch_size))
    return compute(lambda places: collate([items[place] for place in places]), batches, workers)


class Items(Protocol[Item]):
    """What has a length and items by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, place: int, /) -> Item: ...


@dataclass
class Process:
    """A loader process and this process's end of the socket to it."""

    pid: int
    socket: socket.socket


class Results(Iterator[Result], Generic[Task, Result]):
    """The results of loader processes, which end with this object."""

    def __init__(self, work: Callable[[Task], Result], tasks: Iterable[Task], count: int) -> None:
        self._tasks, self._limit = iter(tasks), stopping.limit(WAIT_KEY, WAIT)
        self._processes: list[Process] = []
        self.close = weakref.finalize(self, _end, self._processes, os.getpid())
        try:
            for _ in range(count):
                self._processes.append(_start(work, self._processes, self._limit))
        except OSError as error:
            self.close()
            problem = f"{count} loader processes cannot be started ({error.strerror}): lower workers=."
            raise UserError(problem) from error
        self._busy: deque[Process] = deque()  # one entry for each task that is not done, in order
        for process in self._processes * AHEAD:
            self._feed(process)

    def __next__(self) -> Result:
        if not self._busy:
            self.close()
            raise StopIteration
        process = self._busy.popleft()
        result = self._take(process)
        self._feed(process)
        return result

    def _feed(self, process: Process) -> None:
        for task in self._tasks:
            self._busy.append(process)
            with contextlib.suppress(ConnectionError):  # it has ended, which is said where its result is missing
                _send(process.socket, *_pack(task))
            return

    def _take(self, process: Process) -> Result:
        waited = 0  # in seconds that this process has run: it may itself have been stopped meanwhile
        while not wait([process.socket], 1.0):
            waited += 1
            stopping.leave_wait(waited)
            if waited >= self._limit:
                raise _silent(waited)
        try:
            result = _receive(process.socket)
        except BlockingIOError as error:
            raise _silent(self._limit) from error
        except (EOFError, ConnectionError) as error:
            self._processes.remove(process)
            raise UserError(_how_it_ended(process.pid)) from error
        if isinstance(result, Failure):
            raise result.error
        return result


@dataclass
class Failure:
    """What `work` has raised."""

    error: Exception


def _silent(seconds: float) -> UserError:
    return UserError(
        f"A loader process has given no images for {seconds:.0f} s: it hangs, or its disk or network does. Look at "
        f"them, and start the same command again. {WAIT_KEY}= waits longer."
    )


def _how_it_ended(pid: int) -> str:
    try:
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])  # no wait: it has ended, for its socket is closed
    except ChildProcessError:  # somebody else has asked before
        status = 1
    if status == -signal.SIGKILL:
        return (
            "A loader process was killed (SIGKILL), as the system does when memory runs out: lower workers=, and start "
            "the same command again."
        )
    how = signal.Signals(-status).name if status < 0 else f"status {status}"
    return (
        f"A loader process has crashed ({how}): start the same command again. If it crashes again, an image or its "
        "decoder is the cause."
    )


def _start(work: Callable[[Task], Result], others: list[Process], limit: float) -> Process:
    """Fork a process, which shares what `work` holds (a source, its cache) and never touches CUDA. Raises OSError."""
    ours, theirs = socket.socketpair()
    # For a process that is stopped in the middle of a message. It has no other way to make a read wait.
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", math.ceil(limit), 0))
    sys.stdout.flush()  # or both processes would write what is buffered
    parent, pid = os.getpid(), os.fork()
    if pid:
        theirs.close()
        return Process(pid, ours)
    try:
        stopping.ignore_in_worker()
        _end_with(parent)
        ours.close()
        for process in others:  # they notice the end of the parent by their socket
            process.socket.close()
        torch.set_num_threads(1)
        _serve(theirs, work)
    except Exception:
        traceback.print_exc()
    finally:
        os._exit(1)


def _end_with(parent: int) -> None:
    """Have the system kill this process when its parent ends, even while it hangs. Elsewhere than on Linux it ends when
    it next uses its socket."""
    if sys.platform == "linux":
        LIBC.prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))
    if os.getppid() != parent:  # it has ended already
        os._exit(1)


def _serve(connection: socket.socket, work: Callable[[Task], Result]) -> None:
    """What a loader process does, until its parent ends or kills it."""
    while True:
        try:
            task = _receive(connection)
        except (EOFError, ConnectionError):
            os._exit(0)
        try:
            message = _pack(work(task))
        except Exception as error:
            error.add_note(f"In a loader process:\n{traceback.format_exc()}")
            message = _pack(Failure(error))
        try:
            _send(connection, *message)
        except ConnectionError:
            os._exit(0)


def _end(processes: list[Process], owner: int) -> None:
    """Kill the processes. They have nothing to save, and one that hangs would not hear a request."""
    if os.getpid() != owner:  # a loader process that has inherited them
        return
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
        process.socket.close()
    deadline = time.monotonic() + 5
    for process in processes:
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(process.pid, os.WNOHANG) == (0, 0) and time.monotonic() < deadline:
                time.sleep(0.001)


def _pack(value: Any) -> tuple[memoryview, int | None]:
    """The message of a value, and the descriptor of its shared memory."""
    file = io.BytesIO()
    packer = _Packer(file)
    packer.dump(value)
    return file.getbuffer(), packer.memory


def _send(connection: socket.socket, message: memoryview, memory: int | None) -> None:
    descriptors = [] if memory is None else [memory]
    try:
        socket.send_fds(connection, [HEAD.pack(len(message), bool(descriptors))], descriptors)
        connection.sendall(message)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _receive(connection: socket.socket) -> Any:
    """Raises EOFError at the end of the other process, and BlockingIOError if it stops in the middle."""
    head, descriptors, _, _ = socket.recv_fds(connection, HEAD.size, 1)
    if len(head) < HEAD.size:
        raise EOFError
    length, shared = HEAD.unpack(head)
    message = connection.recv(length, socket.MSG_WAITALL)
    if len(message) < length:
        raise EOFError
    if shared:
        _incoming.memory = mmap.mmap(descriptors[0], 0)
        os.close(descriptors[0])
    try:
        return ForkingPickler.loads(message)
    finally:
        _incoming.memory = None


_incoming = threading.local()  # .memory: of the message that this thread reads


class _Packer(ForkingPickler):
    """Writes a message. Its large tensors go into shared memory, one after another."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.memory: int | None = None
        self.size = 0

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return NotImplemented
        order = sorted(range(value.ndim), key=value.stride, reverse=True)  # crops lie pixel by pixel, and stay so
        dense = value.detach().permute(order).contiguous()
        raw = dense.flatten().view(torch.uint8).numpy().data
        place = self._share(raw) if raw.nbytes > INLINE else None
        return _tensor, (bytearray(raw) if place is None else place, dense.dtype, dense.shape, order)

    def _share(self, raw: memoryview) -> int | None:
        """The offset of a copy in shared memory; None where the system gives no such memory."""
        try:
            if self.memory is None:
                self.memory = os.memfd_create("sslvit")
        except (AttributeError, OSError):
            return None
        place, self.size = self.size, self.size + -(-raw.nbytes // 64) * 64  # aligned for every dtype
        done = 0
        while done < raw.nbytes:  # 2 GB at once
            done += os.pwrite(self.memory, raw[done:], place + done)
        return place


def _tensor(place: int | bytearray, dtype: torch.dtype, shape: torch.Size, order: list[int]) -> Tensor:
    count = shape.numel()
    if not count:
        dense = torch.empty(shape, dtype=dtype)
    elif isinstance(place, int):
        dense = torch.frombuffer(_incoming.memory, dtype=dtype, count=count, offset=place).view(shape)
    else:
        dense = torch.frombuffer(place, dtype=dtype).view(shape)
    return dense.permute(sorted(range(len(order)), key=order.__getitem__))
