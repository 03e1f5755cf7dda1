"""How a run is told to stop before its end: by a signal of a scheduler, or by its own clock."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = ("SIGTERM", "SIGUSR1", "SIGUSR2")  # schedulers send one of these
EXIT_REQUEUE = 75  # exit status, EX_TEMPFAIL of sysexits.h: nothing is wrong, start the same command again
AGREE_EVERY = 10  # steps; several processes then agree, so that all stop at the same step


class Stopped(Exception):
    """A command was asked to stop and has saved its work. The text says where."""


class StopRequest:
    """The loop asks it after each step."""

    def __init__(self, max_hours: float | None) -> None:
        self.reason: str | None = None
        self.end = None if max_hours is None else time.monotonic() + 3600 * max_hours

    def reason_at(self, step: int) -> str | None:
        """Why the run has to stop after this step, the same on all processes; None to go on."""
        from .distributed import gather_objects, world_size  # imports torch, which takes seconds; --help needs no torch

        if self.reason is None and self.end is not None and time.monotonic() > self.end:
            self.reason = "max_hours"
        if world_size() == 1:
            return self.reason
        if step % AGREE_EVERY:
            return None
        return next((reason for reason in gather_objects(self.reason) if reason), None)


@contextmanager
def stop_requests(max_hours: float | None) -> Iterator[StopRequest]:
    """Within it SIGTERM, SIGUSR1 and SIGUSR2 ask the run to stop after the current step.

    A second signal changes nothing: a launcher sends one of its own, perhaps while the checkpoint is being written.
    SIGINT and SIGKILL end a run at once.
    """
    stop, before = StopRequest(max_hours), {}

    def note(number: int, frame: FrameType | None) -> None:
        stop.reason = signal.Signals(number).name

    wanted = [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]
    if threading.current_thread() is threading.main_thread():  # Python takes handlers nowhere else
        before = {number: signal.signal(number, note) for number in wanted}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ignore_in_worker(worker: int) -> None:
    """For loader processes: a scheduler signals every process, but the current step still needs its images.

    They end with the process that started them.
    """
    for name in SIGNALS:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
