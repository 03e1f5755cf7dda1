import ctypes
import os
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from sslvit import stopping
from sslvit.data.workers import Work, compute, in_batches
from sslvit.errors import UserError
from sslvit.stopping import Stopped, stop_requests

from .. import processes
from ..conftest import words


def square(x: int) -> int:
    return x * x


def tensors(seed: int) -> dict:
    """Of all sizes, types and layouts."""
    noise = torch.rand(4, 3, 50, 40, generator=torch.Generator().manual_seed(seed))
    return {
        "pixel by pixel": noise.contiguous(memory_format=torch.channels_last), "half": noise.bfloat16(),
        "part": noise[:, 1:, ::2], "mask": noise > 0.5, "small": torch.tensor([seed]), "number": torch.tensor(seed),
        "none": noise[:0], "long": torch.arange(seed, seed + 5000), "list": [(seed, noise[0]), "text"],
    }  # fmt: skip


def same(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.parametrize("count", [0, 1, 3])
def test_results_come_in_order(count):
    assert list(compute(square, range(20), count)) == [x * x for x in range(20)]
    assert list(compute(square, [], count)) == []
    assert list(in_batches(range(10, 17), 3, list, count)) == [[10, 11, 12], [13, 14, 15], [16]]


def no_room(tensor: torch.Tensor) -> None:
    raise RuntimeError("unable to allocate shared memory (shm): No space left on device (28)")


@pytest.mark.parametrize("room", [True, False], ids=["shared memory", "pipes"])
def test_tensors_arrive_as_they_were(room, monkeypatch):
    if not room:
        monkeypatch.setattr(torch.Tensor, "share_memory_", no_room)
    for seed, found in enumerate(compute(tensors, range(6), 2)):
        expected = tensors(seed)
        assert found.keys() == expected.keys()
        assert all(same(found[name], value) for name, value in expected.items())
    assert found["pixel by pixel"].stride() == expected["pixel by pixel"].stride()
    found["pixel by pixel"].mul_(2)  # it belongs to who has got it


def die(x: int) -> int:
    if x == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return x


def crash(x: int) -> int:
    os._exit(7)


def test_a_loader_process_that_dies_is_a_sentence():
    results = compute(die, range(20), 2)
    with pytest.raises(UserError, match=r"A loader process was killed \(SIGKILL\), as .* lower workers="):
        list(results)
    with pytest.raises(UserError, match=r"A loader process has crashed \(status 7\)"):
        list(compute(crash, range(20), 2))


def children() -> list[int]:
    """Loader processes of this process."""
    return [child.pid for child in psutil.Process().children()]


def test_one_that_is_killed_between_two_results_is_a_sentence_too():
    before = children()
    results = compute(square, range(40), 2)
    next(results)
    for pid in set(children()) - set(before):
        os.kill(pid, signal.SIGKILL)
    with pytest.raises(UserError, match=r"A loader process was killed"):
        list(results)


def stop(x: int) -> int:
    os.kill(os.getpid(), signal.SIGSTOP)
    return x


def gone(pids: list[int]) -> bool:
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        alive = [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie"]
        if not alive:
            return True
        time.sleep(0.01)
    return False


def test_one_that_hangs_is_a_sentence_and_ends(monkeypatch):
    monkeypatch.setenv("SSLVIT_LOADER_SECONDS", "1")
    before = children()
    results = compute(stop, range(4), 2)
    pids = [pid for pid in children() if pid not in before]
    assert len(pids) == 2
    with pytest.raises(UserError, match=r"given no images for 1 s: .* SSLVIT_LOADER_SECONDS= waits longer"):
        next(results)
    assert gone(pids)


def test_a_run_that_is_asked_to_stop_does_not_wait_for_one_that_hangs(monkeypatch):
    monkeypatch.setattr(stopping, "PATIENCE", 0.5)
    results = compute(stop, range(4), 1)
    with stop_requests(None):
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Stopped, match="Stopped by SIGTERM while no images came for 1 s"):
            next(results)


def test_what_the_work_raises_is_raised():
    with pytest.raises(ZeroDivisionError, match=r"^integer division or modulo by zero$|^division by zero$"):
        list(compute((1).__floordiv__, range(3), 2))


def test_processes_that_cannot_be_started_are_a_sentence(monkeypatch):
    def refuse() -> int:
        raise OSError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", refuse)
    with pytest.raises(UserError, match=r"2 loader processes cannot be started \(Resource .* lower workers="):
        compute(square, range(3), 2)


def test_a_limit_that_is_no_number_is_a_sentence(monkeypatch):
    monkeypatch.setenv("SSLVIT_LOADER_SECONDS", "ten")
    with pytest.raises(UserError, match="SSLVIT_LOADER_SECONDS=ten must lie between 1 and"):
        compute(square, range(3), 2)


def hang_with(output: str) -> int:
    """A process whose loader processes hang."""
    results = compute(stop, range(4), 2)
    Path(output).write_text(" ".join(map(str, children())))
    signal.pause()
    next(results)
    return 0


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux kills processes with their parent")
def test_loader_processes_end_with_a_trainer_that_is_killed_even_if_they_hang(tmp_path):
    process = processes.begin(hang_with, str(tmp_path / "pids"), output=tmp_path / "log")
    deadline = time.monotonic() + 60
    while not (tmp_path / "pids").exists() or len((tmp_path / "pids").read_text().split()) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    pids = [int(word) for word in (tmp_path / "pids").read_text().split()]
    while any(psutil.Process(pid).status() != psutil.STATUS_STOPPED for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.join(10)
    assert gone(pids)


def in_full_shm(arguments: list[str]) -> int:
    """`sslvit` where /dev/shm has room for semaphores only. Status 99 where the system does not allow it."""
    from sslvit.__main__ import main

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(0x20000) or libc.mount(b"none", b"/", None, 0x4000 | 0x40000, None):  # a file system of its own
        return 99
    if libc.mount(b"tmpfs", b"/dev/shm", b"tmpfs", 0, b"size=100k"):
        return 99
    return main(arguments)


def test_a_run_needs_little_room_in_dev_shm(tmp_path, images):
    arguments = ["pretrain", str(images), *words("mae", f"out={tmp_path / 'run'}", "workers=2", "cache=ram")]
    process = processes.begin(in_full_shm, arguments, output=tmp_path / "log")
    process.join(60)
    if process.exitcode == 99:
        pytest.skip("this machine does not let a process mount a /dev/shm of its own")
    assert process.exitcode == 0, (tmp_path / "log").read_text()
    assert processes.lines(tmp_path / "run")[-1]["step"] == 8


def test_an_evaluation_whose_loader_process_is_killed_ends_with_a_sentence(fails, colour_run, labelled, monkeypatch):
    monkeypatch.setattr(Work, "__getitem__", lambda self, task: os.kill(os.getpid(), signal.SIGKILL))
    sets = [f"data.train={labelled / 'train'}", f"data.test={labelled / 'test'}", "cache=false", "workers=1"]
    assert "A loader process was killed (SIGKILL)" in fails("knn", f"run={colour_run}", *sets)
