"""What the C library is told about memory."""

import ctypes
import os
import platform
import resource
from collections.abc import Callable

import pytest
import torch

from sslvit.hardware import keep_memory

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
