"""What `python -m tests.gpu` measures: a function for each kind of job. A rehearsal runs the same code, tiny."""

import contextlib
import dataclasses
import gc
import io
import shutil
import statistics
import subprocess
import time
import traceback
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from sslvit import data
from sslvit.__main__ import main as sslvit
from sslvit.config import RunConfig
from sslvit.data.augment import Normalize, augment
from sslvit.data.loader import Cropped, Layout, make_loader
from sslvit.data.sources.folder import Folder
from sslvit.data.workers import compute
from sslvit.hardware import cores, default_workers, peak_memory, start_accelerator, versions
from sslvit.tools import bench
from tests import golden_runs, processes, test_parity
from tests.benchmarks import input as pipelines
from tests.benchmarks import steps as benchmark
from tests.conftest import read_official
from tests.test_benchmarks import CASES as TINY  # what a case of the benchmark becomes on a CPU

from .runner import Note, Setting, one_line

ROOT = Path(__file__).parents[2]
VARIANTS = ["plain float32", "plain bf16", "sslvit bf16", "sslvit bf16 compiled"]
OF_PRODUCTS = {"mae-large-gpu": 0.5, "dino-base-gpu": 0.45}  # aims: share of the rate of matrix products
TIMES_PLAIN, OF_SYNTHETIC = 2.5, 0.95  # aims: over plain bf16; share of the speed on synthetic data


def device() -> torch.device:
    return start_accelerator("float32").device


def case_of(name: str, dry: bool) -> benchmark.Case:
    case = benchmark.CASES[name]
    return TINY[case.method] if dry else case


def products(dry: bool) -> tuple[int, ...]:
    """Sizes of the matrix products whose rate is measured; none: those of the benchmark."""
    return (64,) if dry else ()


def finished(on: torch.device) -> None:
    if on.type == "cuda":
        torch.cuda.synchronize(on)


def seconds_of(work: Callable[[], Any], on: torch.device, seconds: float) -> float:
    """The median time of a call, over about so many seconds and three calls at least, after one that does not count."""
    spent: list[float] = []
    while len(spent) < 4 or sum(spent) < seconds:
        began = time.perf_counter()
        work()
        finished(on)
        spent.append(time.perf_counter() - began)
    return statistics.median(spent[1:])


def machine(setting: Setting, note: Note) -> None:
    """Versions, the card, and the rate of matrix products. Raises RuntimeError where there is no GPU to measure."""
    if not setting.dry and not torch.cuda.is_available():
        raise RuntimeError("torch sees no CUDA GPU here; --dry-run rehearses on a CPU")
    for what, value in [*versions().items(), ("cores", cores())]:
        note({"what": what, "value": value})
    on = device()
    if on.type == "cuda":
        driver = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        facts: dict[str, Callable[[], Any]] = {
            "card": lambda: torch.cuda.get_device_name(on),
            "memory, GiB": lambda: torch.cuda.get_device_properties(on).total_memory / 2**30,
            "driver": lambda: subprocess.run(driver, capture_output=True, text=True, timeout=10).stdout.strip(),
            "CUDA": lambda: torch.version.cuda,
            "cuDNN": torch.backends.cudnn.version,
            "NCCL": lambda: ".".join(map(str, torch.cuda.nccl.version())),
            "TF32 in products": lambda: torch.backends.cuda.matmul.allow_tf32,
            "TF32 in convolutions": lambda: torch.backends.cudnn.allow_tf32,
        }
        for what, find in facts.items():
            with contextlib.suppress(Exception):  # one that cannot be found keeps nothing else from being measured
                note({"what": what, "value": find()})
    for dtype in (torch.bfloat16, torch.float32):
        rate = bench.matmul_rate(on, dtype, products(setting.dry))
        note({"what": f"matrix products, {dtype}, TFLOP/s", "value": rate / 1e12})


def golden(setting: Setting, note: Note) -> None:
    """The largest differences from the published numbers, and from those that are stored of whole runs on CPUs."""
    on = device()
    for bf16 in (False, True):
        precision = "bf16" if bf16 else "float32"
        note({"golden": "mae", "precision": precision, **test_parity.mae_differences(read_official, on, bf16)})
        for name in ("dino", "dino_multicrop"):
            found = test_parity.dino_differences(read_official, name, on, bf16)
            note({"golden": name, "precision": precision, **found})
        for name in list(golden_runs.RUNS)[2 if setting.dry else 0 : 3 if setting.dry else None]:
            folder = setting.scratch / precision
            with contextlib.redirect_stdout(io.StringIO()):
                new = golden_runs.run(name, folder, f"precision={precision}")
            compared = golden_runs.compare(golden_runs.stored(name), new)
            losses = [difference for key, *_, difference in compared if key.endswith(" loss")]
            beyond = sum(not difference <= golden_runs.TOLERANCE for *_, difference in compared)
            row = {"golden": f"run {name}", "precision": precision, "loss, relative": test_parity.largest(losses)}
            note({**row, "of all numbers differ": f"{beyond} of {len(compared)}"})


def gpu_tests(setting: Setting, note: Note) -> None:
    """tests/test_gpu.py, test by test; one that is skipped says why. Raises RuntimeError if one fails."""
    counts = {"passed": 0, "failed": 0, "skipped": 0}

    class Plugin:
        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            if report.when != "call" and report.passed:
                return
            counts[report.outcome] += 1
            reason = report.longrepr[2] if report.skipped and isinstance(report.longrepr, tuple) else None
            if report.failed:
                reason = str(getattr(getattr(report.longrepr, "reprcrash", None), "message", report.longrepr))[:300]
            name = report.nodeid.split("::", 1)[-1]
            note({"test": name, "outcome": report.outcome, "seconds": round(report.duration, 1), "why": reason})

    chosen = ["-o", "addopts=", "-m", "gpu", "-ra", "-W", "default", "-p", "no:cacheprovider", "-p", "no:xdist"]
    where = [f"--rootdir={ROOT}", f"--basetemp={setting.scratch / 'pytest'}", str(ROOT / "tests" / "test_gpu.py")]
    status = pytest.main([*chosen, *where], plugins=[Plugin()])
    if status:
        raise RuntimeError(", ".join(f"{count} {outcome}" for outcome, count in counts.items() if count) or str(status))


def steps(setting: Setting, note: Note, name: str) -> None:
    """The step beside the plain implementation's. A variant that fails has a row that says so; the others go on."""
    case, on = case_of(name, setting.dry), device()
    rate = bench.matmul_rate(on, torch.bfloat16, products(setting.dry))
    batches = [benchmark.batch(case, i, on) for i in range(2)]
    seconds = 0.0 if setting.dry else min(3.0, setting.seconds / 20)
    found: dict[str, dict[str, Any]] = {}  # what was measured of the variants so far
    for variant in VARIANTS:
        row = {"case": name, "variant": variant}
        try:
            values = found[variant] = measure_step(case, variant, batches, on, seconds)
        except Exception as error:  # out of memory, first of all
            traceback.print_exc()
            note({**row, "failed": one_line(error)})
            continue
        if variant == "sslvit bf16 compiled" and "sslvit bf16" in found:  # the counter does not see into its blocks
            values["GFLOP an image"] = found["sslvit bf16"]["GFLOP an image"]
        if values["GFLOP an image"] and variant != "plain float32":  # the rate is that of bf16
            values["of the product rate"] = values["images/s"] * values["GFLOP an image"] * 1e9 / rate
        for plain in VARIANTS[:2]:
            if plain in found and variant != plain:
                values[f"times {plain}"] = values["images/s"] / found[plain]["images/s"]
        if variant.startswith("sslvit"):
            values["aims"] = aims(name, values)
        note(row | values)
    if not any("cuda_graph" in field.name for field in dataclasses.fields(RunConfig)):
        note({"case": name, "variant": "CUDA graphs", "failed": "not built"})


def aims(name: str, values: dict[str, Any]) -> str:
    """Whether a variant of ours is as fast as it should be."""
    wanted = {f"{TIMES_PLAIN} times plain bf16": (values.get("times plain bf16"), TIMES_PLAIN)}
    if name in OF_PRODUCTS:
        wanted[f"{OF_PRODUCTS[name]:.0%} of the product rate"] = values.get("of the product rate"), OF_PRODUCTS[name]
    words = {None: "not measured", True: "reached", False: "missed"}
    return "; ".join(f"{text}: {words[None if got is None else got >= aim]}" for text, (got, aim) in wanted.items())


def measure_step(
    case: benchmark.Case, variant: str, batches: list[dict[str, torch.Tensor]], on: torch.device, seconds: float
) -> dict[str, Any]:
    gc.collect()
    if on.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(on)
    step = benchmark.variants(case, 0.1, [variant])[variant]
    benchmark.timed(step, batches, 0, 2)
    with FlopCounterMode(display=False) if "compiled" not in variant else contextlib.nullcontext() as counter:
        one = benchmark.timed(step, batches, 2, 1)
    count = max(1, round(seconds / one / 3))
    a_step = statistics.median(benchmark.timed(step, batches, 3 + i * count, count) for i in range(3))
    return {
        "batch": case.batch_size,
        "images/s": case.batch_size / a_step,
        "ms a step": 1000 * a_step,
        "memory at the peak, GiB": peak_memory(on) / 2**30,
        "GFLOP an image": counter.get_total_flops() / case.batch_size / 1e9 if counter else None,
    }


def images(setting: Setting, note: Note) -> None:
    """What feeds a step: the device's half of the augmentation, the loader, nvJPEG, and all together."""
    on, dry = device(), setting.dry
    photos = pipelines.make_photos(setting.scratch / "photos", count=4 if dry else 48)
    source, workers = Folder(photos, data.Config()), 1 if dry else default_workers(on)
    seconds, batch_size = (0.05, 4) if dry else (1.0, 48)
    normalize = Normalize(pipelines.MEAN, pipelines.STD)
    for method in ("mae", "dino"):
        views = pipelines.our_views(method, pipelines.PHOTOS)
        raw = Cropped(source, views, 0)[0, torch.arange(batch_size)]
        spent = seconds_of(lambda raw=raw, views=views: augment(raw, views, normalize, on), on, seconds)
        note({"what": f"{method}: to the device and its half of the augmentation", "images/s": batch_size / spent})
        loader = make_loader(source, views, Layout(batch_size), 0, (0, 7 * workers + 1), workers, on)
        rate = batch_size * steady_rate(loader, workers)
        note({"what": f"{method}: the loader, {workers} processes on {cores()} cores", "images/s": rate})
    decoding(photos, workers, on, seconds, note)
    for name in ("mae-base-gpu", "dino-small-gpu"):
        end_to_end(setting, note, name, photos, on)


def decoding(photos: Path, workers: int, on: torch.device, seconds: float, note: Note) -> None:
    paths = [str(path) for path in sorted(photos.iterdir())]
    rate = len(paths) * steady_rate(compute(decode_all, [paths] * (7 * workers + 1), workers), workers)
    note({"what": f"JPEG decoding alone, {workers} processes", "images/s": rate})
    encoded = [torchvision.io.read_file(path) for path in paths]
    try:
        spent = seconds_of(lambda: torchvision.io.decode_jpeg(encoded, device=on), on, seconds)
        note({"what": f"torchvision.io.decode_jpeg, {on.type}", "images/s": len(paths) / spent})
    except RuntimeError as error:  # a torchvision without nvJPEG
        note({"what": "nvJPEG", "failed": one_line(error)})


def steady_rate(items: Iterator[Any], workers: int) -> float:
    """Items a second, without the first of each process: they were begun before the clock."""
    for _ in range(workers + 1):
        next(items)
    began = time.perf_counter()
    count = sum(1 for _ in items)
    return count / (time.perf_counter() - began)


def decode_all(paths: list[str]) -> int:
    return sum(int(pipelines.tensor_image(path).numel() > 0) for path in paths)


def end_to_end(setting: Setting, note: Note, name: str, photos: Path, on: torch.device) -> None:
    """The loop with its loader, and the same step on a batch that is there."""
    case, seconds = case_of(name, setting.dry), 0.1 if setting.dry else 2.0
    config = benchmark.settings(case, "bf16", 0.1)
    folders = 1 + 2 * case.batch_size // len(list(photos.iterdir()))
    config.data = dataclasses.replace(config.data, train=f"[{','.join([str(photos)] * folders)}]", cache=False)
    config.data.workers = 0 if setting.dry else None
    with contextlib.redirect_stdout(io.StringIO()):
        loop = bench.bench(config, bench.Config(seconds=seconds), products(setting.dry))
    step, batch = benchmark.variants(case, 0.1, ["sslvit bf16"])["sslvit bf16"], benchmark.batch(case, 0, on)
    synthetic = seconds_of(lambda: step(batch, 0), on, seconds) / case.batch_size
    share = synthetic / loop.loop
    row = {"what": f"{name}: all together", "images/s": 1 / loop.loop, "synthetic data": 1 / synthetic}
    reached = "reached" if share >= OF_SYNTHETIC else "missed"
    note({**row, "of it": share, "waiting": loop.waiting, "aims": f"{OF_SYNTHETIC:.0%} of it: {reached}"})


def pretraining(setting: Setting, note: Note) -> None:
    """A real run that fits its time, k-NN before and after."""
    began = time.monotonic()
    run = setting.scratch / "run"
    train, test = find_cifar10(setting)
    sets = [f"data.train={train}", f"eval.train={train}", f"eval.test={test}", "log.tensorboard=false"]
    tiny = [*TINY["mae"].words, "global_batch_size=32", "decoder_width=32", "decoder_heads=2"] if setting.dry else []
    left = setting.seconds - (time.monotonic() - began)
    if not setting.dry:
        settings = "automatic"
        length = [f"minutes={min(4.0, 0.8 * left / 60):.3g}"]
    else:
        settings = "mae_cifar10.yaml"
        tiny = [str(ROOT / "configs" / "mae_cifar10.yaml"), *tiny]
        length = ["images=64"]  # two steps
    note({"what": "images", "value": f"{train}, {test}"})
    note({"what": "settings", "value": settings})
    note({"what": "length", "value": length[0]})
    status = sslvit(["pretrain", *tiny, *sets, *length, f"out={run}"])
    scores = [line["knn/top1"] for line in processes.lines(run) if "knn/top1" in line]
    for what, score in zip(("k-NN before, %", "k-NN after, %"), scores[:: max(1, len(scores) - 1)], strict=False):
        note({"what": what, "value": score})
    last = [line for line in processes.lines(run) if "loss" in line][-1]
    for what in ("images", "loss", "images_per_second", "data_wait"):
        note({"what": what, "value": last.get(what)})
    if status:
        raise RuntimeError(f"sslvit pretrain ended with status {status}")


def find_cifar10(setting: Setting) -> tuple[str, str]:
    """Training and test images; of fractals where CIFAR-10 is not at hand."""
    if setting.dry or setting.cifar10 is None:
        small = ",classes=3,count=64,size=32" if setting.dry else ",size=32"
        return f"fractals:train{small}", f"fractals:test{small}"
    folder = setting.cifar10
    if folder.is_file():
        with zipfile.ZipFile(folder) as archive:
            folder = setting.scratch / "images"
            archive.extractall(folder)
    root = next(path for path in (folder, *sorted(folder.iterdir())) if (path / "train").is_dir())
    return str(root / "train"), str(root / "test")


def trace(setting: Setting, note: Note, name: str) -> None:
    """A trace of some steps, and what takes the most time in them."""
    case, on = case_of(name, setting.dry), device()
    step, batch, count = benchmark.variants(case, 0.1, ["sslvit bf16"])["sslvit bf16"], benchmark.batch(case, 0, on), 2
    benchmark.timed(step, [batch], 0, 2)
    a_step = benchmark.timed(step, [batch], 2, count)  # the profiler would slow it
    cuda = on.type == "cuda"
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=kinds) as profiler:
        benchmark.timed(step, [batch], 2 + count, count)
        finished(on)
    key = "self_device_time_total" if cuda else "self_cpu_time_total"
    spent = {
        event.key: getattr(event, key) / 1e6 / count  # of operators, not again of the kernels that they start
        for event in profiler.key_averages()
        if event.device_type == torch.autograd.DeviceType.CPU
    }
    total = sum(spent.values())
    row = {"case": name, "ms a step": 1000 * a_step, "device busy": min(1.0, total / a_step)}
    largest = sorted(spent.items(), key=lambda pair: -pair[1])[:3]
    note(row | {f"cost {i}": f"{key} {seconds / total:.0%}" for i, (key, seconds) in enumerate(largest, 1)})
    path = setting.out / f"trace_{case.method}.json.gz"
    profiler.export_chrome_trace(str(setting.scratch / path.name))
    shutil.move(setting.scratch / path.name, path)
    note({"case": name, "trace": f"{path.name}, {path.stat().st_size / 2**20:.1f} MiB"})
