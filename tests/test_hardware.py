"""What the libraries for memory and threads are told, and whether other processes take the CPUs."""

import ctypes
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sslvit import SPIN_COUNT, hardware
from sslvit.hardware import OtherProcesses, keep_memory

from . import processes


def library(largest: int) -> Callable[[None], object]:
    """A C library that refuses thresholds above `largest`, as some versions of glibc do."""
    real = ctypes.CDLL(None)

    class Library:
        def __init__(self, name):
            pass

        def mallopt(self, parameter, value):
            return 0 if parameter == -3 and value > largest else real.mallopt(parameter, value)

    return Library


def faults(last: int) -> int:
    """Page faults while three tensors are made, the last of so many MiB."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(size << 18) for size in (4, 12, last)]
    del tensors
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def print_faults(device: str, largest: int, environment: dict[str, str]) -> int:
    """Before and after `keep_memory`."""
    for name in [name for name in os.environ if name.startswith(("MALLOC_", "GLIBC_"))]:
        del os.environ[name]
    os.environ.update(environment)
    last = 28 if largest == 2**25 else 40
    for _ in range(3):
        first = faults(40)
    ctypes.CDLL = library(largest)
    keep_memory(torch.device(device))
    faults(last)
    print(first, faults(last), flush=True)
    return 0


ANY = 2**31 - 1


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
@pytest.mark.parametrize(
    ("device", "largest", "environment", "kept"),
    [
        ("cpu", ANY, {}, True),
        ("cpu", 2**25, {}, True),
        ("cuda", ANY, {}, False),
        ("cpu", ANY, {"MALLOC_TRIM_THRESHOLD_": "100000"}, False),
    ],
    ids=["cpu", "largest threshold is 32 MiB", "cuda", "set by the user"],
)
def test_memory_that_a_step_frees_is_kept_for_the_next_on_cpus_unless_the_user_said_otherwise(
    tmp_path, device, largest, environment, kept
):
    log = tmp_path / "log"
    process = processes.begin(print_faults, device, largest, environment, output=log)
    before, after = map(int, processes.finish(process, log).split())
    assert before > 5_000  # pages of 4 KiB: 40 MiB have 10,240
    assert (after < 100) == kept


LIBGOMP = Path(torch.__file__).parent / "lib" / "libgomp.so.1"


@pytest.mark.skipif(not LIBGOMP.exists(), reason="torch has another library for threads")
@pytest.mark.parametrize(
    ("environment", "before", "spins"),
    [
        ({}, "", str(SPIN_COUNT)),
        ({"GOMP_SPINCOUNT": "7"}, "", "7"),
        ({"OMP_WAIT_POLICY": "passive"}, "", "0"),
        ({}, "sys.modules['torch'] = sys", "300000"),
    ],
    ids=["by default", "the user's", "the user's policy", "too late"],
)
def test_the_library_that_torch_brings_spins_shortly_unless_the_user_said_otherwise(environment, before, spins):
    code = f"import ctypes, sys; {before}\nimport sslvit; ctypes.CDLL({str(LIBGOMP)!r})"
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    asked = clean | {"OMP_DISPLAY_ENV": "verbose"} | environment
    done = subprocess.run([sys.executable, "-c", code], env=asked, capture_output=True, text=True)
    assert f"GOMP_SPINCOUNT = '{spins}'" in done.stderr


def loop(seconds: float) -> int:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass
    return 0


def start_a_loop_of_others(*_: object) -> int:
    """A process whose parent has ended is nobody's child."""
    if os.fork() == 0:
        os.setsid()
        loop(2.0)
    os._exit(0)


@pytest.fixture
def others(monkeypatch):
    """Looks at the other processes whenever it is asked, for a run with as many threads as CPUs."""
    monkeypatch.setattr(hardware, "LOOK_EVERY", 0.0)
    monkeypatch.setattr(torch, "get_num_threads", hardware.cores)
    return lambda device="cpu": OtherProcesses(torch.device(device))


def test_a_run_beside_busy_processes_says_once_that_it_is_slower_for_them(others, tmp_path):
    for _ in range(hardware.cores()):
        processes.begin(start_a_loop_of_others, output=tmp_path / "log").join()
    run = others()
    assert run.sentence() is None  # it has nothing to compare with
    loop(0.7)
    found = run.sentence()
    if not run.watches:
        pytest.skip("this container has some CPUs of its machine only")
    assert found.startswith("Other processes use ")
    assert 20 <= int(found.split()[3].rstrip("%")) <= 100
    loop(0.1)
    assert run.sentence() is None


def test_children_count_as_the_run_itself_also_when_they_have_ended(tmp_path):
    before = hardware._cpu_seconds()
    child = processes.begin(loop, 0.3, output=tmp_path / "log")
    child.join()
    after = hardware._cpu_seconds()
    assert after[2] - before[2] > 0.1
    assert after[0] > before[0]


@pytest.mark.parametrize(
    ("idle", "own", "threads", "said"),
    [
        (20, 170, 2, None),  # a quiet machine
        (0, 100, 2, "50%"),
        (0, 100, 1, None),  # its one thread has a CPU
        (0, 170, 2, None),  # others use 15 %
        (60, 50, 2, None),  # others use 45 %, and it waits for images: it does not use what is free
    ],
)
def test_only_others_that_take_what_a_run_needs_are_named(others, monkeypatch, idle, own, threads, said):
    """Seconds of 200, on two CPUs."""
    monkeypatch.setattr(hardware, "cores", lambda: 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    run = others()
    run.watches, run.before = True, (1000.0, 500.0, 10.0)
    monkeypatch.setattr(hardware, "_cpu_seconds", lambda: (1200.0, 500.0 + idle, 10.0 + own))
    found = run.sentence()
    assert (found is None) if said is None else (said in found)


def test_what_cannot_be_known_is_not_said(monkeypatch):
    monkeypatch.setattr(hardware, "_has_cpu_quota", lambda: False)
    monkeypatch.setattr(hardware, "cores", hardware.psutil.cpu_count)
    assert OtherProcesses(torch.device("cpu")).watches == (sys.platform == "linux")
    assert not OtherProcesses(torch.device("cuda")).watches
    for name, value in (("_has_cpu_quota", lambda: True), ("cores", lambda: 1000)):
        with monkeypatch.context() as patch:
            patch.setattr(hardware, name, value)
            assert not OtherProcesses(torch.device("cpu")).watches
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert not OtherProcesses(torch.device("cpu")).watches
