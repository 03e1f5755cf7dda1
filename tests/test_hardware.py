"""What the C library is told about memory."""

import os
import platform
import subprocess
import sys

import pytest

FAULTS = """
import ctypes
import resource
import sys

import torch

from sslvit.hardware import keep_memory

device, largest = sys.argv[1], int(sys.argv[2])
last = 28 if largest == 2**25 else 40  # MiB of the largest tensor
real = ctypes.CDLL(None)

class Library:
    '''A C library that refuses thresholds above `largest`, as some versions of glibc do.'''

    def __init__(self, name):
        pass

    def mallopt(self, parameter, value):
        return 0 if parameter == -3 and value > largest else real.mallopt(parameter, value)

def faults(last):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(size << 18) for size in (4, 12, last)]  # MiB
    del tensors
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

for _ in range(3):
    first = faults(40)
ctypes.CDLL = Library
keep_memory(torch.device(device))
faults(last)
print(first, faults(last))
"""
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
    device, largest, environment, kept
):
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", FAULTS, device, str(largest)]
    done = subprocess.run(command, env=clean | environment, capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert before > 5_000  # pages of 4 KiB: 40 MiB have 10,240
    assert (after < 100) == kept
