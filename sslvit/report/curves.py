"""The numbers of metrics.jsonl, as columns. The file may be from anybody, half written, or of half a million lines."""

import json
import math
import os
import stat
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np

from ..checkpoints.textfile import NOT_FOLLOWED

LARGEST = 1 << 30  # bytes of metrics.jsonl that are read: four million lines
LONGEST_LINE, LONGEST_NAME, MOST_NAMES = 1 << 16, 60, 64  # bytes of a line, letters of a name, names


@dataclass
class Curves:
    """{name: (steps [n], values [n])}, float64, steps ascending. A value may be nan or infinite."""

    columns: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    lines: int = 0
    broken: int = 0  # lines that cannot be read: the last one may be half written
    complaint: str = ""  # why not all was read

    def __contains__(self, name: str) -> bool:
        return name in self.columns

    def get(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """(steps, values), both empty if there is no such column."""
        return self.columns.get(name, (np.empty(0), np.empty(0)))

    def last(self, name: str) -> float | None:
        values = self.get(name)[1]
        return float(values[-1]) if len(values) else None

    def at(self, step: float) -> dict[str, float]:
        """The values of the line of a step."""
        found = {}
        for name, (steps, values) in self.columns.items():
            place = int(np.searchsorted(steps, step))
            if place < len(steps) and steps[place] == step:
                found[name] = float(values[place])
        return found


def open_regular(path: Path) -> IO[bytes]:
    """A file of a run, to be read. Raises OSError, also for a link: it could lead to any file of this user."""
    file = os.fdopen(os.open(path, os.O_RDONLY | NOT_FOLLOWED), "rb")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(f"{path} is no regular file")
    return file


def lines_of(file: IO[bytes], longest: int = LONGEST_LINE) -> Iterator[bytes]:
    """The lines, without the rest of those that are too long."""
    while line := file.readline(longest):
        yield line
        while line and not line.endswith(b"\n"):
            line = file.readline(longest)


def read(path: Path) -> Curves:
    """Raises OSError."""
    curves = Curves()
    columns: dict[str, tuple[array[float], array[float]]] = {}
    size = 0
    with open_regular(path) as file:
        for line in lines_of(file):
            size += len(line)
            if size > LARGEST:
                curves.complaint = f"only the first {LARGEST >> 20} MiB of {path.name} were read"
                break
            try:
                record = json.loads(line)
                step = float(record["step"])
                if not 0 <= step < math.inf:
                    raise ValueError("a step that cannot be")
            except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
                curves.broken += 1
                continue
            curves.lines += 1
            for name, value in record.items():
                kind = type(value)
                if (kind is not float and kind is not int) or name == "step":
                    continue
                column = columns.get(name)
                if column is None:
                    if len(name) > LONGEST_NAME or len(columns) == MOST_NAMES:
                        continue
                    column = columns[name] = (array("d"), array("d"))
                try:
                    column[1].append(value)
                except OverflowError:  # an integer of many digits
                    column[1].append(math.inf)
                column[0].append(step)
    curves.columns = {name: _ascending(*map(np.array, pair)) for name, pair in columns.items()}
    return curves


def _ascending(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Without this, a file that somebody has edited could not be drawn."""
    if len(steps) > 1 and (np.diff(steps) < 0).any():
        order = np.argsort(steps, kind="stable")
        return steps[order], values[order]
    return steps, values


def thin(steps: np.ndarray, values: np.ndarray, points: int) -> tuple[list[float], list[float | None]]:
    """At most about `points` of a curve, for a page: the lowest and the highest value of each part, so that peaks stay.
    None stands for a value that is not finite."""
    count = len(steps)
    if count > points:
        chosen = {0, count - 1}
        edges = np.linspace(0, count, max(2, points // 2) + 1).astype(int)
        for low, high in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
            part = values[low:high]
            finite = np.isfinite(part)
            if not finite.all():
                chosen.add(low + int(np.argmin(finite)))
            if finite.any():
                chosen.add(low + int(np.argmin(np.where(finite, part, np.inf))))
                chosen.add(low + int(np.argmax(np.where(finite, part, -np.inf))))
        rows = sorted(chosen)
        steps, values = steps[rows], values[rows]
    return steps.tolist(), [float(f"{v:.5g}") if math.isfinite(v) else None for v in values.tolist()]
