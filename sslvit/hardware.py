"""What this machine has and does fast: versions, precision, attention, number of loader processes."""

import ctypes
import importlib.metadata
import math
import os
import platform
import re
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Literal, TypeVar

import psutil
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState, PartialState
from timm.layers import Attention
from timm.models.vision_transformer import Block
from torch import nn

from . import stopping
from .arguments import Precision
from .distributed import SILENT, SILENT_KEY, WAIT, WAIT_KEY, is_sharded, watch_processes
from .errors import UserError

T = TypeVar("T")
LOOK_EVERY = 10.0  # seconds at least from one look at other processes to the next
SAY_EVERY = 3600.0  # seconds at least from one sentence about them to the next
OTHERS, IDLE = 0.2, 0.25  # shares of the CPUs. A run is slowed if others use at least OTHERS and at most IDLE is idle
PLUGINS = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM")  # of accelerate


def start_accelerator(wanted: Precision, long_waits: bool = False) -> Accelerator:
    """The device, the processes and the precision. Raises UserError.

    long_waits: a process may wait a day for another one that lives, as in evaluations whose heads the first process
    trains. Otherwise half an hour.
    """
    if any(name in os.environ for name in PLUGINS):
        _refuse_plugins()
    # accelerate joins CPU processes that torchrun started only if it is told that there is nothing but CPUs.
    asked = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    cpu = asked or not torch.accelerator.is_available()
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    longest = 24 * 3600 if long_waits or alone else stopping.limit(WAIT_KEY, WAIT)
    precision = resolve_precision(wanted, PartialState(cpu=cpu, timeout=timedelta(seconds=longest)).device)
    AcceleratorState._reset_state()  # a second run in one process may have another precision
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False, find_unused_parameters=False)
    accelerator = Accelerator(
        cpu=cpu, mixed_precision={"float32": "no"}.get(precision, precision), kwargs_handlers=[ddp]
    )
    if not alone:
        _join_processes(accelerator)
    return accelerator


def _refuse_plugins() -> None:
    for name in PLUGINS:
        if os.environ.get(name, "").lower() == "true":
            raise UserError(
                f"accelerate is configured to use {name.removeprefix('ACCELERATE_USE_')}: choose plain processes "
                "(accelerate config, or accelerate launch --multi_gpu). sslvit pretrain shard=true splits a model "
                "among them."
            )


def _join_processes(accelerator: Accelerator) -> None:
    if accelerator.num_processes != int(os.environ["WORLD_SIZE"]):
        raise UserError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']} processes were started and accelerate sees "
            f"{accelerator.num_processes}: start them with accelerate launch or torchrun."
        )
    watch_processes(stopping.limit(SILENT_KEY, SILENT))


def first_on_each_machine(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """Call `work` on every process, first on one of each machine: the others find what it has downloaded.

    A UserError is raised after all have met. Otherwise the others would wait for the process that failed.
    """
    return work() if accelerator.num_processes == 1 else _first_on_each_machine(accelerator, work)


def _first_on_each_machine(accelerator: Accelerator, work: Callable[[], T]) -> T:
    outcome: T | UserError
    with accelerator.local_main_process_first():
        try:
            outcome = work()
        except UserError as error:
            outcome = error
    if isinstance(outcome, UserError):
        raise outcome
    return outcome


def resolve_precision(wanted: Precision, device: torch.device) -> Literal["float32", "bf16", "fp16"]:
    """auto: bf16 where the hardware multiplies it faster than float32 (recent GPUs; CPUs with AVX512-BF16 or AMX)."""
    if wanted == "fp16" and device.type != "cuda":
        raise UserError(f"precision=fp16 needs a CUDA GPU, and this is {device.type}: use precision=auto.")
    if wanted != "auto":
        return wanted
    return "bf16" if bf16_is_fast(device) else "float32"


def bf16_is_fast(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        # Names with an underscore, but the only question torch answers; an older torch without them means no.
        tests = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return any(getattr(torch.cpu, test, bool)() for test in tests)
    return False


def choose_attention(module: nn.Module, device: torch.device, precision: str) -> None:
    """Use torch's fused attention, except on CPUs in bf16, where model/blocks.py computes it.

    There its backward pass is up to five times slower than plain matrix products (measured on 2 cores: 128 x 17 tokens
    15.3 against 2.7 ms, 128 x 65 tokens 52 against 11 ms, 16 x 197 tokens 37 against 16 ms).
    """
    if device.type == "cpu" and precision == "bf16":
        for attention in module.modules():
            if isinstance(attention, Attention):
                setattr(attention, "fused_attn", False)  # noqa: B010 (timm declares it final)


def keep_memory(device: torch.device) -> None:
    """Tell the C library (glibc) to keep the memory that a step frees for the next step, as torch does on GPUs.

    By default glibc gives it back to the system, which clears it page by page. That costs 2 to 9 % of a step (measured,
    14,000 to 49,000 page faults). Call it after the loader processes have started, or they keep more memory too. A
    malloc setting in the environment wins.
    """
    configured = any(name.startswith("MALLOC_") for name in os.environ)
    configured |= "malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if device.type == "cpu" and platform.libc_ver()[0] == "glibc" and not configured:
        mallopt = ctypes.CDLL(None).mallopt  # returns 0 for a value that it refuses
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: bytes free at the end of the heap, above which it shrinks
        # M_MMAP_THRESHOLD: bytes from which a tensor is a mapping of its own. Setting the other threshold has fixed it
        # at 128 KiB. Some versions of glibc take no more than half of the heap of a thread, which is 32 MiB.
        if not mallopt(-3, 2**30):
            mallopt(-3, 2**25)


def blocks_of(objective: nn.Module) -> list[Block]:
    """The transformer blocks that can be compiled. Raises UserError for a model that has none."""
    blocks = [module for module in objective.modules() if isinstance(module, Block)]
    if not blocks:
        raise UserError(
            "compile=true is for models of transformer blocks (timm's Block), and this one has none: leave it out."
        )
    return blocks


def compile_blocks(objective: nn.Module, work: Callable[[], None], device: torch.device) -> str:
    """Compile each transformer block in place. Returns a sentence: what that cost and what it saves.

    Blocks and not the whole model: they are alike, so one graph for each shape is enough for all of them. Patches,
    masks and losses around them stay plain. work: one forward and backward pass, called some eight times.
    """

    def seconds() -> float:
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    blocks = blocks_of(objective)
    seconds()
    before = min(seconds() for _ in range(3))
    for block in blocks:
        if any(map(is_sharded, block.parameters())):  # FSDP's hooks, which fetch the weights, stay outside
            block.forward = torch.compile(block.forward, dynamic=False)  # type: ignore[method-assign]
        else:
            block.compile(dynamic=False)
    try:
        cost = seconds()
    except Exception as error:  # whatever the compiler raises, a missing C compiler first of all
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"compile=true failed ({reason}): install a C++ compiler, or leave it out.") from error
    after = min(seconds() for _ in range(3))
    return (
        f"Compiled {len(blocks)} blocks in {cost:.0f} s: forward and backward of {1000 * after:.0f} ms instead of "
        f"{1000 * before:.0f} ms, which pays after {cost / (before - after):,.0f} micro-batches."
        if after < before
        else f"Compiled {len(blocks)} blocks in {cost:.0f} s, and it does not pay: forward and backward of "
        f"{1000 * after:.0f} ms instead of {1000 * before:.0f} ms. Leave compile=true out."
    )


def cores() -> int:
    """Number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class OtherProcesses:
    """Says of a run on the CPUs that other processes make it slow.

    They use what all processes use, minus what this one and its children use. This is right only for a run of one
    process that may use all CPUs of the machine. For other runs nothing is said.
    """

    def __init__(self, device: torch.device) -> None:
        alone = os.environ.get("LOCAL_WORLD_SIZE", "1") == "1"
        whole = sys.platform == "linux" and cores() == psutil.cpu_count() and not _has_cpu_quota()
        self.watches = device.type == "cpu" and alone and whole
        self.before: tuple[float, float, float] | None = None
        self.next = self.said = -math.inf

    def sentence(self) -> str | None:
        """Once an hour at most; None if there is nothing to say, or if the last look was just now."""
        now = time.monotonic()
        if not self.watches or now < self.next:
            return None
        before, self.before, self.next = self.before, _cpu_seconds(), now + LOOK_EVERY
        total, idle, own = (b - a for a, b in zip(before or self.before, self.before, strict=True))
        others = (total - idle - own) / max(total, 1e-9)
        missing = cores() * (1 - others) < 0.9 * torch.get_num_threads()  # threads have no CPU of their own
        if others < OTHERS or idle > IDLE * total or not missing or now < self.said + SAY_EVERY:
            return None
        self.said = now
        return f"Other processes use {others:.0%} of the CPUs: this run is slower for it."


def _cpu_seconds() -> tuple[float, float, float]:
    """Since the machine started: of all its CPUs; of these idle; and used by this process and its children."""
    times, own = psutil.cpu_times(), 0.0
    for process in [*psutil.Process().children(recursive=True)[::-1], psutil.Process()]:
        with suppress(psutil.Error):  # it has just ended, and its parent counts it
            own += sum(process.cpu_times()[:4])  # of its ended children too
    unused = sum(getattr(times, name, 0.0) for name in ("idle", "iowait", "steal"))
    return times.user + times.nice + times.system + unused, unused, own


def _has_cpu_quota() -> bool:
    """Whether this container may use less than its CPUs."""
    for name in ("cpu.max", "cpu/cpu.cfs_quota_us"):
        with suppress(OSError, IndexError):
            return (Path("/sys/fs/cgroup") / name).read_text().split()[0] not in ("max", "-1")
    return False


def evaluation_threads() -> int:
    """Threads for a search in this process. A launcher gives each process one thread; the other cores would wait."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return torch.get_num_threads() if local == 1 else max(1, cores() // local)


def default_workers(device: torch.device) -> int:
    """Loader processes for one training process: one on a CPU that also trains, else as many as there are cores."""
    if device.type == "cpu":
        return 1 if cores() > 1 else 0
    return max(1, min(16, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def free_memory() -> int:
    """Bytes of main memory that can still be taken: of the machine, or of the container if that is less."""
    free = psutil.virtual_memory().available
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            numbers = [int((Path("/sys/fs/cgroup") / name).read_text()) for name in (limit, used)]
            free = min(free, max(0, numbers[0] - numbers[1]))
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return free


def memory_left(device: torch.device) -> float:
    """Bytes that can still be taken: of the GPU, or of main memory."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free_memory()


def local_processes(device: torch.device) -> int:
    """How many processes share the memory of a device: each has a GPU of its own, or all have the main memory."""
    return 1 if device.type == "cuda" else int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that torch has reserved on the GPU, or on a CPU the most that this process has held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    try:  # not getrusage, which begins with the peak of the process that started this one
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return 1024 * int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0])
    except (OSError, IndexError):
        return int(psutil.Process().memory_info().rss)


@cache
def versions() -> dict[str, str]:
    """{package: its version}, for records."""
    packages = ("sslvit", "torch", "torchvision", "timm", "accelerate", "faiss-cpu", "omegaconf", "numpy")
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed as a package"
    return found
