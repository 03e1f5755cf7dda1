"""How fast this machine runs a recipe: the time of each stage, what to change first, the time of the whole run.

It measures the parts of pretraining.py. It writes nothing but the report that is asked for.
"""

import dataclasses
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from .. import config as configuration
from .. import data, memory, objectives, optim, rng, sharding
from ..checkpoints import textfile
from ..config import Plan, RunConfig
from ..data import BadImage, Source, WrappedSource
from ..data.augment import Normalize, augment
from ..data.cache import MemoryBudget, OnDevice, cached, on_device
from ..data.crops import Views, cut, num_pixels, reduction
from ..data.loader import make_loader
from ..data.sources.source import Reduction
from ..distributed import gather_objects, rank, say
from ..errors import UserError
from ..hardware import (
    bf16_is_fast,
    blocks_of,
    choose_attention,
    cores,
    default_workers,
    first_on_each_machine,
    keep_memory,
    peak_memory,
    start_accelerator,
    versions,
)
from ..metrics import Window
from ..pretraining import compiled
from ..progress import duration
from ..step import train_step, update
from .config import Bench as Config

SAMPLE = 64  # images read and cut to measure one core
FEW = 4  # global batches in memory that stand for the epochs after the first
T = TypeVar("T")
Batch = dict[str, Any]  # of the loader, or augmented
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
CPU_ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
NOT_COUNTED = {  # by torch 2.11: shapes -> operations
    CPU_ATTENTION: lambda query, key, value, *_, **__: sdpa_flop_count(query, key, value),
    CPU_ATTENTION_BACKWARD: lambda out, query, key, value, *_, **__: sdpa_backward_flop_count(out, query, key, value),
}


@dataclass
class Report:
    """What was measured. Times are seconds an image: of one process, or of all together for the loop."""

    device: str
    dtype: torch.dtype
    processes: int
    batch_size: int
    workers: int  # loader processes of one process
    cached: bool  # decoded images stay in memory
    on_device: bool  # in the memory of the training device, which also cuts the crops
    read: float  # on one core
    cut: float  # all crops of an image, on one core or on the device
    colours: float  # the photometric augmentation
    forward: float
    backward: float
    update: float
    loop: float  # all together; after the first epoch if images stay in memory
    first: float | None  # the loop of the first epoch, which decodes images, if the others do not
    waiting: float  # share of the loop spent waiting for the loader
    flop: float  # of the matrix products of an image, forward and backward; grad_checkpointing does some twice
    matmul: float  # FLOP/s that matrix products reach on one process, measured
    memory: int  # bytes at the peak: of the GPU, or of the process on a CPU
    memory_total: int
    images: int  # of the whole run
    epoch: int  # images of an epoch

    @property
    def step(self) -> float:
        """Seconds an image takes one process, apart from loading."""
        return self.colours + self.forward + self.backward + self.update

    @property
    def whole(self) -> float:
        """Seconds of the whole run."""
        early = min(self.images, self.epoch) if self.first else 0
        return early * (self.first or 0) + (self.images - early) * self.loop

    @property
    def utilisation(self) -> float:
        """Share of the measured rate of matrix products that the loop reaches (MFU)."""
        return self.flop / (self.loop * self.processes) / self.matmul


def run(config: RunConfig, settings: Config, arguments: list[str]) -> None:
    """Measure, print, and write the report if one is wanted. Raises UserError."""
    report = bench(config, settings)
    say(*lines(report, config))
    if settings.report and rank() == 0:
        save(report, Path(settings.report))


def bench(config: RunConfig, settings: Config, sizes: tuple[int, ...] = ()) -> Report:
    """Measure a configuration on this machine, on as many processes as were started. sizes: see `matmul_rate`. Raises
    UserError."""
    _check(config, settings)
    # As pretrain.set_up does, without a run directory.
    accelerator = start_accelerator(config.precision)
    device = accelerator.device
    source = first_on_each_machine(accelerator, lambda: data.open_source(config.data.train, config.data))
    plan = configuration.make_plan(config, len(source), accelerator.num_processes, accelerator.process_index)
    views = objectives.find(config.method).views(config.objective, config.data)
    objective = objectives.start(config, plan.steps_per_epoch, plan.steps)
    choose_attention(objective, device, accelerator.mixed_precision)
    sharding.place(objective, device, config.shard)
    if config.batch_size == "auto" or plan.layout.batch_size * num_pixels(views) > memory.LARGE:
        config, plan = memory.fit(config, plan, accelerator, objective, views)
    if config.compile:
        blocks_of(objective)
    model, optimizer = sharding.prepare(accelerator, objective, optim.make_optimizer(config.optim, objective))
    objective.train()
    if config.compile:
        say(compiled(config, plan, accelerator, model, optimizer, views))
    read, crops = _one_core(source, views, config.seed, config.data.jpeg_scaling)
    workers = default_workers(device) if config.data.workers is None else config.data.workers
    in_memory = cached(source, config.data.cache, config.seed, MemoryBudget())
    in_memory = on_device(in_memory, config.data.cache, device, workers)
    resident = isinstance(in_memory, OnDevice)
    workers = 0 if resident else workers
    load = partial(_batches, config, plan, views, workers, device)
    batches = load(in_memory)
    raw, window = next(batches), Window()
    keep_memory(device)

    # The parts of a step, one after another.
    prepare = partial(augment, views=views, normalize=Normalize(*data.normalization(config.data)), device=device)
    batch = prepare(raw)
    spent: dict[str, list[float]] = {"colours": [], "forward": [], "backward": [], "update": []}

    def parts() -> None:
        _timed(spent["colours"], device, lambda: prepare(raw))
        forward: list[float] = []
        backward: list[float] = []
        for part in objective.split(batch):
            values = _timed(forward, device, partial(model, part, 0))
            _timed(backward, device, partial(accelerator.backward, values["loss"]))
        spent["forward"].append(sum(forward))
        spent["backward"].append(sum(backward))
        _timed(spent["update"], device, lambda: update(accelerator, model, optimizer, 0, window, config.optim))

    with FlopCounterMode(display=False, custom_mapping=NOT_COUNTED) as counter:
        parts()
    spent = {name: [] for name in spent}  # the first call also allocated memory
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    _repeat(parts, settings.seconds, device)
    batch_size, accumulate = plan.layout.batch_size, plan.layout.accumulate
    if resident:
        cuts: list[float] = []
        _repeat(lambda: _timed(cuts, device, lambda: next(batches)), settings.seconds / 4, device)
        crops = statistics.median(cuts) / batch_size
    an_image = {name: statistics.median(values) / batch_size for name, values in spent.items()}
    an_image["update"] /= accumulate

    # The whole loop, with loading.
    step = partial(
        train_step, accelerator, model, optimizer, accumulate=accumulate, seed=config.seed, config=config.optim
    )
    loop = partial(_loop, step, prepare, accumulate, 2 * workers, 2 * settings.seconds, device)
    (a_step, waiting), first = loop(batches), None
    if in_memory is not source and not resident and plan.steps > plan.steps_per_epoch:
        first = a_step / plan.layout.global_batch_size
        few = min(plan.steps_per_epoch, FEW)
        batches.close()
        batches = load(First(in_memory, few * plan.layout.global_batch_size))
        for _ in range(few * accumulate):  # their first epoch
            next(batches)
        a_step, waiting = loop(batches)
    peak = peak_memory(device)  # before the matrix products below add to it
    gpu, dtype = device.type == "cuda", DTYPES[accelerator.mixed_precision]
    return Report(
        device=_name(device),
        dtype=dtype,
        processes=accelerator.num_processes,
        batch_size=batch_size,
        workers=workers,
        cached=in_memory is not source,
        on_device=resident,
        read=read,
        cut=crops,
        **an_image,
        loop=a_step / plan.layout.global_batch_size,
        first=first,
        waiting=waiting,
        flop=counter.get_total_flops() / batch_size,
        matmul=matmul_rate(device, dtype, sizes),
        memory=peak,
        memory_total=torch.cuda.get_device_properties(device).total_memory if gpu else psutil.virtual_memory().total,
        images=plan.steps * plan.layout.global_batch_size,
        epoch=plan.steps_per_epoch * plan.layout.global_batch_size,
    )


def _check(config: RunConfig, settings: Config) -> None:
    if not 0 < settings.seconds < math.inf:
        raise UserError(f"seconds={settings.seconds} must be above 0.")
    if settings.report and not Path(settings.report).expanduser().parent.is_dir():
        folder = Path(settings.report).parent
        raise UserError(f"report={settings.report} cannot be written: there is no folder {folder}.")
    configuration.check(config)


def lines(report: Report, config: RunConfig) -> list[str]:
    """The report as it is printed."""

    def row(name: str, seconds: float, note: str = "") -> str:
        return f"  {name:28s}{1 / max(seconds, 1e-9):10,.0f} {1000 * seconds:10.3f}  {note}".rstrip()

    r = report
    name = {torch.float32: "float32", torch.bfloat16: "bf16", torch.float16: "fp16"}[r.dtype]
    processes = "1 process" if r.processes == 1 else f"{r.processes} processes"
    feeding = (
        f"{r.workers} loader process{'es' if r.workers != 1 else ''} each, {r.waiting:.0%} of it waiting for images"
    )
    return [
        f"{config.method}, {config.model.name}, batch_size {r.batch_size}, {name}, {processes}",
        f"{r.device}, torch {torch.__version__}",
        "",
        f"  {'':28s}{'images/s':>10s} {'ms/image':>10s}",
        row("read and decode, one core", r.read, "once: decoded images stay in memory" if r.cached else ""),
        row("cut the crops, on the device" if r.on_device else "cut the crops, one core", r.cut),
        row("colours, a batch", r.colours),
        row("forward", r.forward),
        row("backward", r.backward),
        row("update", r.update),
        *([row("the loop, first epoch", r.first, "images are decoded")] if r.first else []),
        row("the loop, all together", r.loop, feeding),
        "",
        f"  {r.flop / 1e9:.2f} GFLOP an image; {r.flop / r.loop / 1e9:,.0f} GFLOP/s, {r.utilisation:.0%} of the "
        f"{r.matmul * r.processes / 1e9:,.0f} that matrix products reach here",
        f"  memory at the peak {r.memory / 2**30:.1f} of {r.memory_total / 2**30:.0f} GiB",
        f"  the whole run: {r.images:,} images, {duration(r.whole)}",
        *[f"  first: {text}" for text in advice(report, config)],
    ]


def save(report: Report, path: Path) -> None:
    """Write the measurements, the versions and what is derived from them. Raises UserError."""
    values = dataclasses.asdict(report) | {"dtype": str(report.dtype), "images_per_second": 1 / report.loop}
    values |= {"utilisation": report.utilisation, "versions": versions()}
    try:
        textfile.write(path.expanduser(), json.dumps(values, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"report={path} cannot be written: {error.strerror}.") from error


def advice(report: Report, config: RunConfig) -> list[str]:
    """What to change first, the largest gain first; at least one sentence."""
    r, found = report, []
    loading = r.cut + (0 if r.cached else r.read)
    if r.waiting > 0.1 and r.on_device:
        found.append(
            f"cutting the crops on the device takes {r.waiting:.0%} of the time: data.cache=ram does it on the cores."
        )
    elif r.waiting > 0.1:
        wanted = math.ceil(loading / r.step)
        if r.workers < wanted and r.workers * r.processes < cores():
            found.append(
                f"training waits for the loader: data.workers={min(wanted, cores() // r.processes)} "
                f"(an image takes {1000 * loading:.1f} ms of a core, and training {1000 * r.step:.1f} ms)."
            )
        else:
            found.append(
                f"training waits for the loader, and the {cores()} cores are busy: smaller image files "
                f"(reading takes {1000 * r.read:.1f} ms of a core, cropping {1000 * r.cut:.1f}), or data.cache=ram."
            )
    if r.dtype == torch.float32 and bf16_is_fast(torch.device("cuda" if "cuda" in r.device else "cpu")):
        found.append("precision=bf16: this hardware multiplies it several times faster than float32.")
    if "cuda" in r.device and r.memory < 0.4 * r.memory_total and r.batch_size * r.processes < config.global_batch_size:
        found.append(f"batch_size={2 * r.batch_size} fits into memory, and keeps the GPU busier.")
    if r.update > 0.25 * r.step:
        found.append(
            f"the update takes {r.update / r.step:.0%} of a step, because the global batch is small for this model: "
            "a larger global_batch_size."
        )
    return found or ["nothing stands out: the time goes into the model itself."]


def matmul_rate(device: torch.device, dtype: torch.dtype, sizes: tuple[int, ...] = ()) -> float:
    """FLOP/s of the fastest of a few square matrix products."""
    best = 0.0
    for n in sizes or ((4096, 8192) if device.type == "cuda" else (768, 1536, 2048)):
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        spent: list[float] = []
        for _ in range(8):
            _timed(spent, device, partial(torch.matmul, a, b))
        best = max(best, 2 * n**3 / statistics.median(spent))
    return best


def _one_core(source: Source, views: Views, seed: int, scaling: bool) -> tuple[float, float]:
    """Seconds to read an image, and to cut all its crops, on one core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    order = rng.permutation(rng.fold_in(seed, "bench"), len(source))
    spent: dict[str, list[float]] = {"read": [], "cut": []}

    def read(index: int) -> tuple[Tensor, tuple[int, int]]:
        return source.read_smaller(index, partial(reduction, views, order[:1]) if scaling else lambda *_: 1)

    for index in order[: SAMPLE + 1].tolist():
        try:
            image, size = _timed(spent["read"], None, partial(read, index))
        except BadImage:
            continue
        _timed(spent["cut"], None, partial(cut, [image] * 4, order[:4], views, [size] * 4))
    torch.set_num_threads(threads)
    if not spent["cut"]:
        raise UserError(f"None of {SAMPLE} images of the source can be read, for example {source.name(int(order[0]))}.")
    return statistics.mean(spent["read"][1:] or spent["read"]), statistics.mean(spent["cut"][1:] or spent["cut"]) / 4


def _loop(
    step: Callable[[Iterator[Batch], int, Window], Tensor], prepare: Callable[[Batch], Batch],
    accumulate: int, ahead: int, seconds: float, device: torch.device, batches: Iterator[Batch],
) -> tuple[float, float]:  # fmt: skip
    """Seconds a step, and the share of them that is spent waiting for batches.

    ahead: batches that the loader had ready while something else was measured.
    """
    waited: list[float] = []

    def micro_batches() -> Iterator[Batch]:
        for _ in range(accumulate):
            yield prepare(_timed(waited, None, lambda: next(batches)))

    for _ in range(ahead):
        next(batches)
    window = Window()
    steps, elapsed = _repeat(lambda: step(micro_batches(), 0, window), seconds, device)
    return elapsed / steps, sum(waited[-steps * accumulate :]) / elapsed


class First(WrappedSource):
    """The first images of a source."""

    def __init__(self, source: Source, count: int) -> None:
        super().__init__(source)
        self.count = count

    def __len__(self) -> int:
        return self.count

    def read_smaller(self, index: int, reduction: Reduction) -> tuple[Tensor, tuple[int, int]]:
        return self.source.read_smaller(index, reduction)


def _batches(
    config: RunConfig, plan: Plan, views: Views, workers: int, device: torch.device, source: Source
) -> Generator[Batch]:
    """Micro-batches without an end."""
    steps, scaling = (0, sys.maxsize // 2**20), config.data.jpeg_scaling
    yield from make_loader(source, views, plan.layout, config.seed, steps, workers, device, scaling=scaling)


def _timed(into: list[float], device: torch.device | None, work: Callable[[], T]) -> T:
    """What `work` returns. Its seconds are appended to `into`; with a device, until the device has finished."""
    start = time.perf_counter()
    result = work()
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
    into.append(time.perf_counter() - start)
    return result


def _repeat(work: Callable[[], object], seconds: float, device: torch.device) -> tuple[int, float]:
    """Call `work` for about so many seconds, at least three times, on all processes alike: (times, seconds)."""
    first: list[float] = []
    _timed(first, device, work)
    times = max(3, round(seconds / max(gather_objects(first[0]))))
    total: list[float] = []
    _timed(total, device, lambda: [work() for _ in range(times)])
    return times, max(gather_objects(total[0]))


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        names = [line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("model name")]
    except OSError:
        names = []
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{device.type} ({name}, {torch.get_num_threads()} threads)"
