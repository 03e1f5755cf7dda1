"""How a run is told to stop before its end: by a signal of a scheduler, or by its own clock. And how long it waits."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from .errors import UserError

SIGNALS = ("SIGTERM", "SIGUSR1", "SIGUSR2")  # schedulers send one of these
NAMES = {"SIGINT": "Ctrl-C"}  # for people
EXIT_REQUEUE = 75  # exit status, EX_TEMPFAIL of sysexits.h: nothing is wrong, start the same command again
AGREE_EVERY = 10  # steps; several processes then agree, so that all stop at the same step
INTERRUPTED = 1.0  # seconds after which a second Ctrl-C is another one: launchers send the first one twice
FORWARDED = 5.0  # seconds in which a second signal is the same request: a scheduler and a launcher both send one
MOST_SECONDS = 10**6  # that a wait may be allowed
PATIENCE = 10.0  # seconds that a run which was asked to stop waits for the images of its step; schedulers give it 30


class Stopped(Exception):
    """A command was asked to stop and has saved its work, if there was any. The text says where."""

    def __init__(self, text: str, reason: str | None = None) -> None:
        """reason: a signal's name or max_hours."""
        super().__init__(text)
        self.reason = reason


class StopRequest:
    """The loop asks it after each step, and between micro-batches."""

    def __init__(self, max_hours: float | None) -> None:
        self.reason: str | None = None
        self.begun = False  # the first step is done: there is something to save
        self.asked: float | None = None  # when a signal came
        self.end = None if max_hours is None else time.monotonic() + 3600 * max_hours

    def reason_at(self, step: int) -> str | None:
        """Why the run has to stop after this step, the same on all processes; None to go on. step: or a number of
        micro-batches."""
        from .distributed import gather_objects, world_size  # imports torch, which takes seconds; --help needs no torch

        self.begun = True
        if self.reason is None and self.end is not None and time.monotonic() > self.end:
            self.reason = "max_hours"
        if world_size() == 1:
            return self.reason
        if step % AGREE_EVERY:
            return None
        return next((reason for reason in gather_objects(self.reason) if reason), None)


@contextmanager
def stop_requests(max_hours: float | None) -> Iterator[StopRequest]:
    """Within it SIGTERM, SIGUSR1, SIGUSR2 and Ctrl-C (SIGINT) ask the run to stop after the current micro-batch.

    A Ctrl-C before the first step is done is KeyboardInterrupt. A second one, after a second, ends the run at once,
    whatever it waits for; so does SIGTERM at least five seconds after a first signal.
    """
    global _current
    stop = StopRequest(max_hours)
    if threading.current_thread() is not threading.main_thread():  # Python takes handlers nowhere else
        yield stop
        return

    def note(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and not stop.begun:
            raise KeyboardInterrupt
        name = signal.Signals(number).name
        stop.reason, stop.asked = NAMES.get(name, name), stop.asked or time.monotonic()

    wanted = [getattr(signal, name) for name in (*SIGNALS, "SIGINT") if hasattr(signal, name)]
    before, outer = {number: signal.signal(number, note) for number in wanted}, _current
    numbers, signalled = os.pipe()
    os.set_blocking(signalled, False)
    woken = signal.set_wakeup_fd(signalled, warn_on_full_buffer=False)
    threading.Thread(target=_end_at_second, args=(numbers, set(wanted), stop), daemon=True).start()
    _current = stop
    try:
        yield stop
    finally:
        _current = outer
        signal.set_wakeup_fd(woken)
        os.write(signalled, b"\0")
        os.close(signalled)
        for number, handler in before.items():
            signal.signal(number, handler)


_current: StopRequest | None = None  # of the run that this process is in


def _end_at_second(numbers: int, wanted: set[int], stop: StopRequest) -> None:
    """A thread that gets the number of each signal. `note` above is not called while the main thread waits in C++, as
    it does for another process that never answers."""
    first = None
    waits: dict[int, float] = {signal.SIGTERM: FORWARDED, signal.SIGINT: min(INTERRUPTED, FORWARDED)}
    while number := os.read(numbers, 1)[0]:
        wait = waits.get(number)
        if first is not None and wait is not None and time.monotonic() - first > wait:
            name = signal.Signals(number).name
            os.write(2, f"Ended at once by a second signal, {name}. The last checkpoint is whole.\n".encode())
            os._exit(128 + number)
        if first is None and number in wanted:
            first = time.monotonic()
            if number == signal.SIGINT and stop.begun:
                os.write(2, b"Ctrl-C: saving as soon as this micro-batch is done. Ctrl-C again leaves at once.\n")
    os.close(numbers)


def leave_wait(seconds: float) -> None:
    """For who has waited so long for images. Raises Stopped if the run was asked to stop and they still do not come."""
    if _current and _current.asked and min(seconds, time.monotonic() - _current.asked) > PATIENCE:
        text = f"while no images came for {seconds:.0f} s: nothing was saved since the last checkpoint."
        raise Stopped(f"Stopped by {_current.reason} {text}", _current.reason)


def limit(key: str, default: float) -> float:
    """Seconds that a wait may last: the environment variable of this name, or the default. Raises UserError."""
    given = os.environ.get(key, "")
    try:
        seconds = float(given or default)
    except ValueError:
        seconds = -1.0
    if not 1 <= seconds <= MOST_SECONDS:
        raise UserError(f"{key}={given} must lie between 1 and {MOST_SECONDS} seconds: leave it out for {default:g}.")
    return seconds


def ignore_in_worker() -> None:
    """For loader processes: a scheduler signals every process, but the current step still needs its images.

    They end with the process that started them, which a terminal interrupts too.
    """
    signal.set_wakeup_fd(-1)
    for name in (*SIGNALS, "SIGINT"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
