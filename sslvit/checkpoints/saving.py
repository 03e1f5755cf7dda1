"""When checkpoints are written and which are kept.

Training waits only for a copy of its state in main memory. A thread writes it.
"""

import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from ..arguments import first_line
from ..distributed import gather_objects, rank
from ..errors import UserError
from ..metrics import format_bytes
from . import journal, state
from .lock import Lock
from .state import RunState


class Saver:
    """Writes one checkpoint at a time in a thread. At the end of its `with`, the last one is on the disk."""

    def __init__(self, run_dir: Path, config: state.Config) -> None:
        self.run_dir, self.config = run_dir, config
        self.lock: Lock | None = None  # of the run directory, on the first process
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._copy: state.Tensors | None = None
        self._pending: Future[None] | None = None

    def due(self, step: int, last_step: int) -> bool:
        """Whether the number of a step asks for a checkpoint."""
        intervals = (self.config.every_steps, self.config.keep_every)
        return step == last_step or any(every and step % every == 0 for every in intervals)

    def is_best(self, run: RunState) -> bool:
        return self.config.keep_best and run.best_step == run.step

    def save(
        self, objective: nn.Module, optimizer: torch.optim.Optimizer, run: RunState, extra: dict[str, Any]
    ) -> None:
        """Copy the state and begin to write it. All processes call this; the first writes.

        Raises UserError if the previous checkpoint could not be written.
        """
        self.check(wait=True)
        self._copy = state.snapshot(objective, optimizer, self._copy)
        if rank() == 0:
            own = {"run": journal.run_id(self.run_dir), "lengths": journal.lengths(self.run_dir)}
            self._pending = self._thread.submit(
                self._write, self._copy, state.record(run, extra | own), run.step, run.best_step
            )

    def check(self, wait: bool = False) -> None:
        """Raises UserError on all processes if a checkpoint could not be written. All processes call this together.

        wait: first wait until the checkpoint that is being written is on the disk.
        """
        problem = None
        if self._pending and (wait or self._pending.done()):
            pending, self._pending = self._pending, None
            error = pending.exception()
            if error and not isinstance(error, UserError):
                raise error
            problem = str(error) if error else None
        for text in gather_objects(problem):
            if text:
                raise UserError(text)

    def _write(self, tensors: state.Tensors, record: dict[str, Any], step: int, best: int | None) -> None:
        config = self.config
        try:
            self._check()
            journal.sync(self.run_dir)
            state.write(self.run_dir, tensors, record, self._check)
            best = best if config.keep_best else None
            state.prune(self.run_dir, config.keep_last, step, config.keep_every, best, self._check)
        except (OSError, SafetensorError) as error:
            self._check()  # it says more
            past = [saved for saved in state.steps_saved(self.run_dir) if saved < step]
            good = f"The checkpoint of step {past[-1]} is whole" if past else "There is no older checkpoint"
            needed, free = sum(map(state.size, tensors)), free_space(self.run_dir)
            raise UserError(
                f"The checkpoint of step {step} cannot be written to {self.run_dir} ({os_error_text(error)}): it takes "
                f"{format_bytes(needed)} and {format_bytes(free)} are free. {good}: make room and start "
                "the same command again."
            ) from error

    def _check(self) -> None:
        if self.lock:
            self.lock.check()

    def __enter__(self) -> "Saver":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown(wait=True)  # a run that fails still finishes the checkpoint that it was writing


def os_error_text(error: Exception) -> str:
    """What the system says of a file that cannot be written."""
    return getattr(error, "strerror", None) or first_line(error)


def free_space(run_dir: Path) -> int:
    """Bytes that can still be written."""
    return shutil.disk_usage(next(folder for folder in (run_dir, *run_dir.parents) if folder.exists())).free


def disk_space_warning(run_dir: Path, config: state.Config, objective: nn.Module, steps: int) -> str | None:
    """A warning if the checkpoints of so many steps do not fit on the disk, else None. On the first process only."""
    if rank() != 0:
        return None
    trained = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    one = state.size(objective.state_dict()) + 2 * sum(parameter.nbytes for parameter in trained)
    kept = (steps // config.keep_every if config.keep_every else 0) + config.keep_best
    missing = config.keep_last + kept + 1 - len(state.steps_saved(run_dir))  # one more while it is being written
    free = free_space(run_dir)
    if missing * one <= free:
        return None
    return (
        f"Warning: {run_dir} has {format_bytes(free)} free, and the checkpoints of this run will take {missing} x "
        f"{format_bytes(one)} more: make room, or keep fewer (save.keep_last={config.keep_last})."
    )
