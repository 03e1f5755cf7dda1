"""The only file that touches torch.distributed. Every function also works in one process that never started it."""

import os
import socket
import threading
import time
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import progress
from .errors import UserError, printable

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

T = TypeVar("T")
BEAT = 2.0  # seconds between two signs of life
# A process that gives no sign of life for so long is taken for stopped. It gives them while it works, however long.
SILENT, SILENT_KEY = 600.0, "SSLVIT_SILENT_SECONDS"
# A process waits so long for another one that lives. Evaluations may wait longer, see `hardware.start_accelerator`.
WAIT, WAIT_KEY = 1800.0, "SSLVIT_WAIT_SECONDS"


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
    """What to tell the user if `error` says that another process has ended (killed, out of memory) or does not come;
    None if not.

    gloo raises such an error at once, NCCL when its watchdog looks. The launcher ends processes that still wait.
    """
    if not isinstance(error, dist.DistError) and "gloo" not in str(error).lower():
        return None
    if "timed out" in str(error).lower():
        return (
            f"Process {rank()} of {world_size()} has waited too long for another one, which lives but does not come. "
            f"Start the same command again. In training, {WAIT_KEY}= waits longer than {WAIT:.0f}."
        )
    return (
        f"Another of the {world_size()} processes has ended, so process {rank()} ends too. The message of that process "
        "or of the launcher says why. Start the same command again to go on from the last checkpoint."
    )


@cache
def watch_processes(limit: float) -> None:
    """Begin to watch the other processes: the first one watches all, and the others watch the first one.

    A process that is stopped (SIGSTOP, a machine that hangs) keeps its connections. All others would wait for it until
    torch's limit, and would not know for whom. All processes call this together. limit: seconds without a sign of life.
    """
    peers: dict[int, socket.socket] = {}
    listener = socket.create_server(("", 0), backlog=world_size()) if rank() == 0 else None
    port, token = gather_objects((listener.getsockname()[1], os.urandom(16)) if listener else None)[0]
    if rank() > 0:
        try:
            peers[0] = socket.create_connection((os.environ.get("MASTER_ADDR", "127.0.0.1"), port), timeout=10)
            peers[0].sendall(token + rank().to_bytes(4, "big"))
        except OSError as error:
            print(f"Process {rank()} cannot watch process 0 ({error}): a stopped one is noticed late.", flush=True)
            peers = {}
    expected = sum(gather_objects(len(peers)))
    if listener:
        with listener:
            while len(peers) < expected:
                peer, _ = listener.accept()
                peer.settimeout(10)
                head = peer.recv(20, socket.MSG_WAITALL)
                if head[:16] == token:  # else it is nobody of ours
                    peers[int.from_bytes(head[16:], "big")] = peer
    threading.Thread(target=_watch, args=(peers, limit, rank(), world_size()), daemon=True).start()


def _watch(peers: dict[int, socket.socket], limit: float, own: int, processes: int) -> None:
    silent = dict.fromkeys(peers, 0.0)  # seconds that this process has run: it may itself have been stopped
    for peer in peers.values():
        peer.setblocking(False)
    while silent:
        time.sleep(BEAT)
        for other in list(silent):
            heard: bytes | None = None
            try:
                peers[other].send(b".")
                heard = peers[other].recv(4096)
            except BlockingIOError:  # nothing has come, or it does not read
                pass
            except OSError:
                heard = b""
            if heard == b"" and own == 0:  # it has ended: if it should not have, its connections for tensors tell
                del silent[other]
                continue
            silent[other] = 0 if heard else silent[other] + BEAT
            if silent[other] >= limit:
                message = (
                    f"Process {other} of {processes} has not answered for {limit:.0f} s: it is stopped, or its machine "
                    f"hangs. Process {own} ends. Start the same command again to go on from the last checkpoint. "
                    f"{SILENT_KEY}= waits longer.\n"
                )
                os.write(2, message.encode())
                os._exit(2)


def barrier() -> None:
    if active():
        dist.barrier()


def any_process(flag: bool) -> bool:
    """Whether it is true on any process; the same answer on all."""
    return any(gather_objects(flag))


def say(*lines: str) -> None:
    """Print on the first process only, at once."""
    if rank() == 0 and lines:
        progress.write(printable("\n".join(lines), keep="\n\t"))
