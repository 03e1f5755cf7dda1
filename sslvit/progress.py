"""What is shown while a command works: on a terminal one live line with a bar, elsewhere a plain line now and then.

Lines that are printed meanwhile, and warnings, appear above the live line. Only the first process shows anything.
"""

import io
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

SAY_EVERY = 20.0  # seconds between two plain lines of a long work
OFTEN, RARELY, SHARE = 30.0, 300.0, 0.05  # seconds between plain lines of a run: half its age, 30, 5 % of its age
LONG, TRIAL = 24 * 3600.0, 10.0  # seconds: a run that takes longer than LONG says so, after TRIAL at its first speed
REDRAW = 0.5  # seconds between two states of a live line; each waits for the device once
_bars: list[Any] = []  # on the screen
_stderr: list[Any] = []  # the real one, while there are bars


def write(text: str) -> None:
    """Print, above the live line if there is one."""
    if _bars:
        _bars[-1].write(text, file=sys.stdout)
    else:
        print(text, flush=True)


def on_terminal() -> bool:
    """Whether a live line can be shown."""
    return sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb" and os.environ.get("RANK", "0") == "0"


class Above(io.TextIOBase):
    """In place of standard error: its lines appear above the live line."""

    rest = ""

    def write(self, text: str) -> int:
        *lines, self.rest = (self.rest + text).split("\n")
        for line in lines:
            write(line)
        return len(text)


def open_bar(total: float, layout: str, done: float = 0, leave: bool = False) -> Any:
    """A bar of tqdm on the screen."""
    from tqdm import tqdm

    if not _bars:
        tqdm.monitor_interval = 0  # no thread: loader processes are forked
        tqdm.set_lock(threading.RLock())
        if sys.stderr.isatty():
            _stderr.append(sys.stderr)
            sys.stderr = Above()
    _bars.append(tqdm(total=total, initial=done, bar_format=layout, leave=leave, dynamic_ncols=True, file=sys.stdout))
    return _bars[-1]


def close_bars(keep: int = 0) -> None:
    """Close all bars but the first `keep`."""
    while len(_bars) > keep:
        _bars.pop().close()
    if not _bars and _stderr:
        sys.stderr = _stderr.pop()


@contextmanager
def counting(what: str, total: float, unit: str = "images") -> Iterator[Callable[[float], None]]:
    """Gives a function to call with how much is done. It shows that, and how long the rest will take."""
    began = last = time.monotonic()
    others = len(_bars)
    bar = open_bar(total, what + " {percentage:3.0f}% {bar:30} {desc}") if on_terminal() else None

    def show(done: float) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < (REDRAW if bar else SAY_EVERY):
            return
        last, rate = now, max(1e-9, done / (now - began))
        text = f"{done:,.0f} of {total:,.0f} {unit}, {rate:,.0f} a second, {duration((total - done) / rate)} left"
        if bar:
            bar.n, bar.desc = done, text
            bar.refresh()
        elif os.environ.get("RANK", "0") == "0":
            write(f"{what}: {text}")

    try:
        yield show
    finally:
        close_bars(others)


class RunProgress:
    """What is shown of a pretraining run while it goes."""

    def __init__(self, step: int, steps: int) -> None:
        """step: where this start begins."""
        self.first, self.began, self.shown = step + 1, time.monotonic(), time.monotonic()
        self.fast = self.slow = 0.0  # running means of the loss
        layout = "{n}/{total} {percentage:3.0f}% {bar:12} {desc}"
        self.bar = open_bar(steps, layout, done=step, leave=True) if on_terminal() else None

    def due(self, step: int) -> bool:
        """Whether it is time for a line: after the first step, then more and more seldom."""
        age, pause = time.monotonic() - self.began, time.monotonic() - self.shown
        return step == self.first or pause >= (
            REDRAW if self.bar else min(RARELY, max(min(age / 2, OFTEN), SHARE * age))
        )

    def show(self, record: dict[str, float], steps: int, epochs: float, more: list[str]) -> None:
        """record: with step, epoch, images_per_second, data_wait, seconds_left, perhaps loss. more: for a live line."""
        self.shown = time.monotonic()
        if not self.bar:
            write(line(record, steps, epochs))
            return
        loss, trend = record.get("loss"), ""
        if loss is not None:
            first = not self.slow
            self.fast = loss if first else self.fast + 0.2 * (loss - self.fast)
            self.slow = loss if first else self.slow + 0.04 * (loss - self.slow)
            change = (self.fast - self.slow) / max(abs(self.slow), 1e-9)
            trend = " falls" if change < -0.002 else " rises" if change > 0.002 else " steady"
        _, *parts, left = fields(record, steps, epochs, trend)
        self.bar.total, self.bar.n = steps, int(record["step"])
        self.bar.desc = "  ".join([left, *parts, *more])
        self.bar.refresh()


class LongRun:
    """Says that a run will take more than a day. It needs some seconds of micro-batches to know, not a whole step."""

    def __init__(self, micro_batches: int) -> None:
        """micro_batches: of the run from here on, on one process."""
        self.total, self.begun, self.since = micro_batches, 0, 0.0

    def note(self) -> list[str]:
        """To be called when a micro-batch begins. Gives the sentence once, if there is one."""
        self.begun, now = self.begun + 1, time.monotonic()
        if self.begun <= 2:  # the first micro-batch is slower than others
            self.since = now
        if self.begun <= 2 or now - self.since < TRIAL or not self.total:
            return []
        seconds, self.total = (now - self.since) / (self.begun - 2) * self.total, 0
        days = f"{seconds / LONG:.1f} days"
        return [f"Warning: at its speed so far this run will take {days} from here."] if seconds > LONG else []


def fields(record: dict[str, float], steps: int, epochs: float, trend: str = "") -> list[str]:
    """The parts of a line."""
    rate = record["images_per_second"]
    return [
        f"step {record['step']}/{steps}",
        f"epoch {record['epoch']:.2f}/{epochs:g}",
        f"loss {record['loss']:.4f}{trend}" if "loss" in record else "skipped",
        f"{rate:.0f} images/s" if rate >= 10 else f"{rate:.2g} images/s",
        f"wait {record['data_wait']:.0%}",
        f"{duration(record['seconds_left'])} left",
    ]


def line(record: dict[str, float], steps: int, epochs: float) -> str:
    """step 1200/3900  epoch 3.08/10  loss 0.4321  412 images/s  wait 2%  6m31s left"""
    return "  ".join(fields(record, steps, epochs))


def duration(seconds: float) -> str:
    """3725 -> 1h02m, 65 -> 1m05s."""
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"
