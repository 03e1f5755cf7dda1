"""What a run writes while it goes: metrics.jsonl and TensorBoard."""

import importlib
import importlib.util
import io
import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from operator import methodcaller
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from . import progress
from .arguments import first_line
from .errors import Limits, UserError, did_you_mean, printable

if TYPE_CHECKING:  # importing torch takes seconds, and --help needs no torch
    import torch
    from torch import Tensor

METRICS = "metrics.jsonl"
SKIPPED = "skipped"  # steps of a line
LINE_STEPS = 50  # of a line, if log.every_steps is not given


@dataclass
class Config:
    # Without every_steps the console has a line after the first step, and then by time. On a terminal it is a live one.
    every_steps: int | None = None  # a line in metrics.jsonl and on the console; null: in metrics.jsonl after 50 steps
    tensorboard: bool = True  # the same numbers in <run>/tensorboard
    trackers: tuple[str, ...] = ()  # the same numbers there, by accelerate: wandb, mlflow, trackio, aim, swanlab ...
    max_nonfinite: int = 10  # steps in a row without finite loss and gradients, each skipped, that end the run
    rank_every_steps: int | None = 1000  # log the effective rank of 512 training images' features; null: never
    on_collapse: Literal["warn", "stop"] = "warn"  # when the numbers of a line say that the features have collapsed
    report: bool = True  # write <run>/report.html, every few minutes and at the end
    profile: bool = False  # write <run>/trace.json: what the processor does in three steps, for ui.perfetto.dev

    LIMITS: ClassVar[Limits] = [(1, None, "every_steps", "rank_every_steps", "max_nonfinite")]


class Window:
    """Means of what the objective returned since the last line. They stay on the device until a line is due.

    Skipped steps do not count.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor | float] = {}
        self.steps = 0
        self.current: dict[str, Tensor] = {}  # of the step that is running
        self.losses: list[Tensor] = []  # of its micro-batches
        self.recent: list[tuple[Tensor, list[Tensor]]] = []  # (1 if skipped, losses) of steps since the last `poll`

    def add(self, values: "dict[str, Tensor]", weight: float = 1.0, begins: bool = True) -> None:
        """Values of a micro-batch, or of a part of it: then they add up. begins: it is the first part."""
        for name, value in values.items():
            value = value.detach().float()
            self.current[name] = self.current.get(name, 0.0) + value * weight
            if name == "loss" and begins:
                self.losses.append(value)
            elif name == "loss":
                self.losses[-1] = self.losses[-1] + value

    def end_step(self, skip: "Tensor") -> None:
        """skip: 1 if the step was skipped, else 0, on the device."""
        for name, value in (*self.current.items(), (SKIPPED, None)):
            value = skip if value is None else value.masked_fill(skip > 0, 0.0)
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.recent.append((skip, self.losses))
        self.current, self.losses = {}, []
        self.steps += 1

    def state(self) -> dict[str, Any]:
        """The sums of an unfinished line, averaged over all processes: what a checkpoint holds."""
        import torch

        from .distributed import all_reduce_sum, world_size

        names = sorted(self.sums)
        if not names:
            return {}
        device = next((value.device for value in self.sums.values() if isinstance(value, torch.Tensor)), None)
        sums = torch.stack([torch.as_tensor(self.sums[name], dtype=torch.float32, device=device) for name in names])
        values = all_reduce_sum(sums) / world_size()  # on the training device: NCCL knows no other
        return {"steps": self.steps, "sums": dict(zip(names, values.tolist(), strict=True))}

    def load(self, state: dict[str, Any]) -> None:
        self.steps = state.get("steps", 0)
        self.sums = {name: float(value) for name, value in state.get("sums", {}).items()}

    def loss(self) -> dict[str, float]:
        """{"loss": mean of this process since the last line}; empty if there is none. It waits for the device."""
        taken = self.steps - float(self.sums.get(SKIPPED, 0.0))
        return {"loss": float(self.sums["loss"]) / taken} if taken > 0 and "loss" in self.sums else {}

    def close(self) -> dict[str, float]:
        """The means since the last call, and the number of skipped steps if there are any. Then it starts anew."""
        state = self.state()
        self.sums, self.steps = {}, 0
        if not state:
            return {}
        skipped = round(state["sums"].pop(SKIPPED, 0))
        taken = state["steps"] - skipped
        means = {name: value / taken for name, value in state["sums"].items()} if taken else {}
        return means | ({SKIPPED: skipped} if skipped else {})


class MetricsLog:
    """metrics.jsonl, one object a line, in the order of the steps; and the same for TensorBoard and trackers."""

    def __init__(self, run_dir: Path, step: int, tensorboard: bool, trackers: "dict[str, Any] | None" = None) -> None:
        """step: where the run begins or goes on; TensorBoard drops what a killed run wrote after it."""
        self.path, self.trackers = run_dir / METRICS, trackers or {}
        self._board = Board(run_dir / "tensorboard", step) if tensorboard else None

    def write(self, record: dict[str, float | int]) -> None:
        with self.path.open("a", encoding="utf-8") as file:  # by its name: the directory may have been moved or copied
            file.write(json.dumps({k: _round(v) for k, v in record.items()}) + "\n")
        if self._board is not None:
            self._board.write(record)
        for name in list(self.trackers):
            values = {key: value for key, value in record.items() if key != "step"}
            self._ask(name, methodcaller("log", values, step=record["step"]))

    def write_pictures(self, pictures: "dict[str, Any]", step: int) -> None:
        """{name: an image of PIL} to TensorBoard, and to the trackers that take images."""
        if self._board is not None:
            self._board.write_pictures(pictures, step)
        for name in list(self.trackers):
            self._ask(name, partial(_send_pictures, name, pictures, step))

    def _ask(self, name: str, what: Callable[[Any], object]) -> None:
        """A tracker that fails is left out from then on: a run does not end because a server does."""
        try:
            what(self.trackers[name])
        except Exception as error:
            del self.trackers[name]
            progress.write(f"Warning: {name} takes no more numbers ({printable(first_line(error))}). The run goes on.")

    def close(self) -> None:
        if self._board is not None:
            self._board.close()
        for name in list(self.trackers):
            self._ask(name, methodcaller("finish"))


def _send_pictures(name: str, pictures: dict[str, Any], step: int, tracker: Any) -> None:
    """To a tracker that takes images. mlflow and trackio take them too, but accelerate does not send them."""
    if name == "mlflow":
        for tag, image in pictures.items():
            importlib.import_module(name).log_image(image, key=tag, step=step, synchronous=True)
    elif name == "trackio":
        trackio: Any = importlib.import_module(name)
        tracker.log({tag: trackio.Image(image) for tag, image in pictures.items()}, step=step)
    elif hasattr(tracker, "log_images"):
        import numpy as np

        tracker.log_images({tag: [np.asarray(image)] for tag, image in pictures.items()}, step=step)


def check_trackers(names: Sequence[str]) -> None:
    """Raises UserError for a tracker that is unknown or not installed, before the work begins."""
    if not names:
        return
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    for name in names:
        if name == "tensorboard":
            raise UserError("log.trackers: tensorboard has log.tensorboard, which is true by default: leave it out.")
        if name not in LOGGER_TYPE_TO_CLASS:
            known = sorted(map(str, LOGGER_TYPE_TO_CLASS))
            raise UserError(f"log.trackers: {name} is not one of {', '.join(known)}.{did_you_mean(name, known)}")
        own = LOGGER_TYPE_TO_CLASS[name].__module__ != "accelerate.tracking"  # registered by the user
        if not own and importlib.util.find_spec(name) is None:
            raise UserError(f"log.trackers: {name} is not installed: pip install {name}.")


def open_trackers(names: Sequence[str], run_dir: Path, run: str, settings: dict[str, Any]) -> dict[str, Any]:
    """accelerate's trackers by name. run: its identity; a run that goes on continues its run in wandb, mlflow and
    trackio. What a killed run has sent after its checkpoint stays there. Raises UserError."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    found: dict[str, Any] = {}
    for name in dict.fromkeys(names):
        kind = LOGGER_TYPE_TO_CLASS[name]
        try:
            more = _same_run(name, run_dir, run)
            tracker = kind("sslvit", *([str(run_dir)] if kind.requires_logging_directory else []), **more)
            getattr(tracker, "start", lambda: None)()  # older versions of accelerate have started it
        except Exception as error:
            raise UserError(f"log.trackers: {name} does not start ({first_line(error)}). Or leave it out.") from error
        found[name] = tracker
        try:
            tracker.store_init_configuration(settings)
        except Exception as error:  # a setting has changed, which mlflow does not take
            progress.write(f"Warning: {name} keeps the settings that it had ({printable(first_line(error))}).")
    return found


def _same_run(name: str, run_dir: Path, run: str) -> dict[str, Any]:
    """The arguments by which a tracker finds the run that it had before."""
    if not run.isalnum():  # of an older version, or changed by somebody
        return {}
    if name == "wandb":
        return {"name": run_dir.name, "id": run, "resume": "allow", "dir": str(run_dir)}
    if name == "trackio":
        return {"name": f"{run_dir.name}-{run[:8]}", "resume": "allow"}
    if name != "mlflow":
        return {}
    mlflow: Any = importlib.import_module("mlflow")
    asked = {"experiment_names": ["sslvit"], "filter_string": f"tags.sslvit_run = '{run}'", "output_format": "list"}
    before = [one.info.run_id for one in mlflow.search_runs(**asked)]
    return {"run_name": run_dir.name, "tags": {"sslvit_run": run}, **({"run_id": before[0]} if before else {})}


class Board:
    """Appends to a file of <run>/tensorboard. Raises OSError when it cannot be written.

    Not torch's SummaryWriter: it writes in a thread, whose errors (a full disk) nobody can catch.
    """

    def __init__(self, folder: Path, step: int) -> None:
        """step: where the run begins or goes on; what a killed run wrote after it is hidden."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder.mkdir(exist_ok=True)
        self.event = Event
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self.file = RecordWriter((folder / name).open("wb"))
        self.add(file_version="brain.Event:2")
        self.add(step=step + 1 if step else 0, session_log=SessionLog(status=SessionLog.START))

    def write(self, record: dict[str, float | int]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in record.items() if name != "step"]
        self.add(step=record["step"], summary=Summary(value=values))

    def write_pictures(self, pictures: dict[str, Any], step: int) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = []
        for name, image in pictures.items():
            png = io.BytesIO()
            image.save(png, "PNG")
            whole = Summary.Image(
                height=image.height, width=image.width, colorspace=3, encoded_image_string=png.getvalue()
            )
            values.append(Summary.Value(tag=name, image=whole))
        self.add(step=step, summary=Summary(value=values))

    def add(self, **what: object) -> None:
        self.file.write(self.event(wall_time=time.time(), **what).SerializeToString())
        self.file.flush()

    def close(self) -> None:
        self.file.close()


def _round(value: float | int) -> float | int:
    return value if isinstance(value, int) else float(f"{value:.7g}")


class Stopwatch:
    """Images a second, and the share of the time that was spent waiting for images, since the last `lap`."""

    def __init__(self) -> None:
        self.began, self.waited = time.perf_counter(), 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

    @contextmanager
    def pausing(self) -> Iterator[None]:
        """The time within does not count: it is not training."""
        start = time.perf_counter()
        yield
        self.began += time.perf_counter() - start

    def so_far(self, images: int) -> dict[str, float]:
        elapsed = max(1e-9, time.perf_counter() - self.began)
        return {"images_per_second": images / elapsed, "data_wait": self.waited / elapsed}

    def lap(self, images: int) -> dict[str, float]:
        result = self.so_far(images)
        self.began, self.waited = time.perf_counter(), 0.0
        return result


def start_trace(path: Path) -> "torch.profiler.profile":
    """Writes <run>/trace.json: every operation of the fourth to the sixth step, with its time and shapes.

    A browser shows it, at ui.perfetto.dev or chrome://tracing. Call its step() after each step, and stop() at the end.
    """
    import torch

    profiler = torch.profiler.profile(
        schedule=torch.profiler.schedule(wait=2, warmup=1, active=3, repeat=1),
        on_trace_ready=lambda profiler: profiler.export_chrome_trace(str(path)),
        record_shapes=True,
    )
    profiler.start()
    return profiler


def format_bytes(size: float) -> str:
    """Bytes: 65_000_000 -> 62 MiB."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024:
            break
        size, unit = size / 1024, "TiB"
    return f"{size:.0f} {unit}" if size >= 10 or unit == "bytes" else f"{size:.1f} {unit}"
