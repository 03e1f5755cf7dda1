"""What the machine is told."""

import os
import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource
import sys

import torch

from sslvit.hardware import keep_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(size << 18) for size in (4, 12, 40)]  # 4, 12 and 40 MiB
    del tensors
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

for _ in range(3):
    first = faults()
keep_memory(torch.device(sys.argv[1]))
faults()
print(first, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
@pytest.mark.parametrize(
    ("device", "environment", "kept"),
    [("cpu", {}, True), ("cuda", {}, False), ("cpu", {"MALLOC_TRIM_THRESHOLD_": "100000"}, False)],
)
def test_memory_that_a_step_frees_is_kept_for_the_next_on_cpus_unless_the_user_said_otherwise(
    device, environment, kept
):
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", FAULTS, device], env=clean | environment, capture_output=True, text=True, check=True
    )
    before, after = map(int, done.stdout.split())
    assert before > 5_000  # pages of 4 KiB: the 40 MiB alone have 10,000
    assert (after < 100) == kept
