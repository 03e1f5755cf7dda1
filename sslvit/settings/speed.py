"""How fast this machine is: seconds of the code of `sslvit bench`."""

import contextlib
import io
import math
import time

import torch

from .. import data
from ..config import RunConfig
from ..distributed import gather_objects
from ..hardware import cores, free_memory, start_accelerator
from ..tools import bench
from .choose import Machine

QUICK = {"cpu": (768,), "cuda": (4096,)}  # sizes of the matrices


def machine(config: RunConfig) -> Machine:
    """What the rules need to know of it. Starts accelerate, as the run will."""
    accelerator = start_accelerator(config.precision)
    device, processes = accelerator.device, accelerator.num_processes
    dtype = bench.DTYPES[accelerator.mixed_precision]
    rate = sum(gather_objects(bench.matmul_rate(device, dtype, QUICK.get(device.type, ()))))
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device) + (f", {processes} of them" if processes > 1 else "")
        return Machine(name, rate, torch.cuda.mem_get_info(device)[0], gpu=True, processes=processes)
    threads = torch.get_num_threads() * processes
    name = f"{threads} of {cores()} CPU cores" if threads < cores() else f"{cores()} CPU cores"
    return Machine(name, rate, free_memory() // processes, processes=processes)


def steps_in(config: RunConfig, end: float, seconds: float) -> int:
    """How many steps of this configuration end by `end`, of time.monotonic(), measured for some seconds."""
    with contextlib.redirect_stdout(io.StringIO()):
        report = bench.bench(config, bench.Config(seconds=seconds), sizes=(256,))
    labelled = [data.open_source(spec, config.data) for spec in (config.eval.train, config.eval.test) if spec]
    left = end - time.monotonic() - 2 * sum(map(len, labelled)) * report.forward  # k-NN at both ends, roughly
    first = min(report.epoch, left / report.first) if report.first else 0.0  # images that are also decoded
    images = first + max(0.0, left - first * (report.first or 0.0)) / report.loop
    return max(1, math.floor(images / config.global_batch_size))
