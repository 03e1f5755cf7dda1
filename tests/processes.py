"""Runs in processes of their own, which can be killed: forked from a server that has imported everything already."""

import gc
import importlib
import json
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from sslvit.__main__ import main
from sslvit.checkpoints import state
from sslvit.energy import ENERGY_COLUMNS

CONTEXT = multiprocessing.get_context("forkserver")
METHODS = [f"sslvit.objectives.{name}" for name in ("dino", "distill", "mae")]
CONTEXT.set_forkserver_preload(
    ["sslvit.__main__", "sslvit.settings", "sslvit.pretraining", "sslvit.evaluation.knn", "faiss", *METHODS, __name__]
)


def _child(work: Callable[..., int | None], arguments: tuple, output: str, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
    os.dup2(1, 2)
    torch.set_num_threads(1)
    gc.freeze()  # as in conftest.py
    sys.exit(work(*arguments))


def begin(
    work: Callable[..., int | None], *arguments: Any, output: Path, environment: dict[str, str] | None = None
) -> BaseProcess:
    """Begin a function of a module, which returns the exit status; what it prints is appended to `output`."""
    process = CONTEXT.Process(target=_child, args=(work, arguments, str(output), environment or {}))
    process.start()
    return process


def start(argv: list[str], output: Path, environment: dict[str, str] | None = None) -> BaseProcess:
    """Begin `sslvit <argv>`."""
    return begin(main, [str(word) for word in argv], output=output, environment=environment)


def as_nobody(commands: list[tuple[Path, int, list[str]]]) -> None:
    """`sslvit <argv>` for each (path, mode, argv), while a path of the user `nobody` has that mode. Root may do all."""
    for name in ("event_pb2", "summary_pb2"):  # this user may not be allowed to read Python's files
        importlib.import_module(f"tensorboard.compat.proto.{name}")
    importlib.import_module("tensorboard.summary.writer.record_writer")
    if os.geteuid() == 0:
        os.setegid(65534)
        os.seteuid(65534)
    for path, mode, argv in commands:
        before = path.stat().st_mode
        path.chmod(mode)
        print(f"{path.name} {mode:03o} {argv[0]}: status {main([str(word) for word in argv])}", flush=True)
        path.chmod(before)


def finish(process: BaseProcess, output: Path, seconds: float = 120, status: int = 0) -> str:
    """Wait for a process that must succeed, or end with a status; returns what it printed."""
    process.join(seconds)
    text = output.read_text()
    assert process.exitcode == status, f"exit status {process.exitcode}\n{text}"
    return text


def environments(world_size: int) -> list[dict[str, str]]:
    """What torchrun would give to several processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    return [
        {
            "RANK": str(rank), "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1",
        }
        for rank in range(world_size)
    ]  # fmt: skip


def start_several(argv: list[str], output: Path, world_size: int) -> list[BaseProcess]:
    """Begin `sslvit <argv>` on several processes, as torchrun would start them; one is started without it."""
    return [start(argv, output, environment) for environment in (environments(world_size) if world_size > 1 else [{}])]


def launch(argv: list[str], output: Path, world_size: int, seconds: float = 120, status: int = 0) -> str:
    """`sslvit <argv>` on several processes; all must end with a status by themselves."""
    for process in start_several(argv, output, world_size):
        finish(process, output, seconds, status)
    return output.read_text()


def lines(run_dir: Path) -> list[dict]:
    """The whole lines of metrics.jsonl."""
    path = run_dir / "metrics.jsonl"
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except ValueError:  # being written
            break
    return records


def wait_for_step(process: BaseProcess, run_dir: Path, step: int, seconds: float = 60) -> None:
    """Until metrics.jsonl has the line of a step."""
    deadline = time.monotonic() + seconds
    while not any(record["step"] >= step for record in lines(run_dir)):
        assert process.is_alive(), "the run ended before it was killed"
        assert time.monotonic() < deadline, "the run did not get there"
        time.sleep(0.002)


def kill_at(process: BaseProcess, run_dir: Path, step: int, seconds: float = 60) -> None:
    """SIGKILL as soon as metrics.jsonl has the line of a step."""
    wait_for_step(process, run_dir, step, seconds)
    process.kill()
    process.join()


TIMING = {"seconds", "images_per_second", "data_wait", *ENERGY_COLUMNS}


def final_weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(state.folder_of(run_dir, state.steps_saved(run_dir)[-1]) / state.MODEL)


def moments(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(state.folder_of(run_dir, state.steps_saved(run_dir)[-1]) / state.OPTIMIZER)


def learned(run_dir: Path) -> list[dict]:
    """metrics.jsonl without what a clock decides."""
    return [{k: v for k, v in line.items() if k not in TIMING} for line in lines(run_dir)]


def assert_same_run(a: Path, b: Path) -> None:
    for read in (final_weights, moments):
        ours, theirs = read(a), read(b)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert learned(a) == learned(b)
