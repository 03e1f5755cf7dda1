"""The results of several runs side by side, with intervals of their differences.

Reads the results that the evaluations wrote (<run>/eval/*.json). If two runs were measured on the same test images, the
difference of their accuracies has a paired bootstrap interval of 95 %: images are drawn with replacement, each with the
predictions of both runs (Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 16). An interval that
contains 0 means that other test images could reverse the order. It says nothing about other seeds of the training.

The k-NN result is that of k = 20 and T = 0.07, or of the first k and T that all runs have. Runs without a common k and
T are in separate columns, and their difference is not computed.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..distributed import say
from ..errors import UserError, printable
from ..pretrained import results_folder
from . import Column, commands
from .config import Compare as Config
from .records import check_out, table, unpack_bits, write

DRAWS = 10_000
# Two numbers can be compared if these keys of their records agree, and all settings.
SAME = ("train", "test", "classes", "precision", "image_size", "features", "seed", "data", "departures")
Records = dict[str, dict[str, Any]]  # {file without .json: record} of a run


@dataclass
class Cell:
    """One number of one run."""

    column: Column
    file: str
    kind: str  # which of several columns of one file, for example k=20 T=0.07
    settings: tuple[float, ...]  # of the row, if the file holds several
    number: float
    right: str  # which test images were classified correctly, see records.pack_bits; empty: not recorded
    record: dict[str, Any]

    @property
    def name(self) -> str:
        """Name of its column in the file `out=`."""
        return f"{self.file} {self.kind}".strip()

    @property
    def title(self) -> str:
        """Title of its column in the table."""
        return f"{self.column.title} {self.kind}".strip()


def compare(runs: list[str], config: Config) -> dict[str, Any]:
    """Print a table of runs and results, differences to the first run, and where protocols differ. Raises UserError."""
    if not runs:
        raise UserError("compare needs runs: sslvit compare runs/a runs/b untrained:runs/a.")
    check_out(config.out)
    columns = [(column.file or name, column) for name, command in commands().items() for column in command.columns]
    files = list(dict.fromkeys(file for file, _ in columns))
    records = {run: _read(run, columns) for run in dict.fromkeys(runs)}
    cells: dict[str, dict[str, Cell]] = {run: {} for run in records}
    heads: dict[str, Cell] = {}  # one cell of each column
    for file, column in columns:
        for run, cell in _select(records, file, column).items():
            cells[run][cell.name] = heads[cell.name] = cell
    if not heads:
        raise UserError(f"None of {', '.join(records)} has results of {', '.join(files)}: evaluate them first.")
    header = [f"{cell.title} {cell.column.unit}".strip() for cell in heads.values()]
    rows = [[run, *(f"{own[name].number:.2f}" if name in own else "" for name in heads)] for run, own in cells.items()]
    say(*table(["run", *header], rows))
    first, *others = records
    differences = []
    for other in others:
        for name, head in heads.items():
            a, b = cells[first].get(name), cells[other].get(name)
            if a is None or b is None or not _same_images(a, b):
                continue
            row = {"run": other, "evaluation": name, **difference(a.right, b.right, config.seed)}
            differences.append(row)
            low, high = row["interval"]
            verdict = "" if low * high > 0 else ": other test images could reverse the order"
            say(
                f"{head.title}: {other} {row['difference']:+.2f} against {first} (95 % interval {low:+.2f} to "
                f"{high:+.2f}){verdict}"
            )
    notes = [note for file in files for note in _departures(records, file, dict(columns)[file])]
    notes += [f"{run}, {file}: {note}" for run, own in records.items() for file, record in own.items()
              for note in _notes(record)]  # fmt: skip
    say(*notes)
    numbers = {run: {name: cell.number for name, cell in own.items()} for run, own in cells.items()}
    report = {"results": numbers, "differences": differences, "notes": notes}
    if config.out:
        write(report, Path(config.out).expanduser())
    return report


def _read(name: str, columns: list[tuple[str, Column]]) -> Records:
    """The results of a run. Raises UserError."""
    folder = results_folder(name)
    if not folder.is_dir():
        raise UserError(f"{name} has no results ({folder} is missing): give runs that were evaluated.")
    records = {}
    for file in dict.fromkeys(file for file, _ in columns):
        path = folder / f"{file}.json"
        if path.is_file():
            try:
                records[file] = json.loads(path.read_text(encoding="utf-8"))
                found = [cell for of, column in columns if of == file for cell in cells_of(records[file], file, column)]
                for cell in found:  # what else is read later
                    unpack_bits(cell.right or "0:")
                    _protocol(cell.record, cell.column)
                    _notes(cell.record)
            except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
                found = []
            if not found:
                raise UserError(f"{path} is not a result that this version can read: evaluate again.")
    return records


def _notes(record: dict[str, Any]) -> list[str]:
    """What a reader of the result must know."""
    return [printable(str(note)) for note in (*record.get("notes", ()), record.get("note")) if note]


def cells_of(record: dict[str, Any], file: str, column: Column) -> Iterator[Cell]:
    """The numbers of a column in a record, one for each row. Raises KeyError, TypeError, ValueError or AttributeError
    for a record that is no result of the evaluation."""
    results = record["results"]
    for row in results[column.rows] if column.rows else [results] if column.key in results else []:
        settings = tuple(row[name] for name in column.settings)
        kind = " ".join(f"{symbol}={row[name]:g}" for name, symbol in column.settings.items()) or column.kind
        yield Cell(column, file, kind, settings, float(row[column.key]), row.get("right", ""), record)


def _select(records: dict[str, Records], file: str, column: Column) -> dict[str, Cell]:
    """{run: its cell of the column}. Of the settings that all runs have it takes the usual ones, or else the first."""
    found = {run: {cell.settings: cell for cell in cells_of(own[file], file, column)}
             for run, own in records.items() if file in own}  # fmt: skip
    found = {run: cells for run, cells in found.items() if cells}
    shared = [key for key in next(iter(found.values()), {}) if all(key in cells for cells in found.values())]
    chosen = {}
    for run, cells in found.items():
        settings = shared or list(cells)
        chosen[run] = cells[column.usual if column.usual in settings else settings[0]]
    return chosen


def _same_images(a: Cell, b: Cell) -> bool:
    """Whether both runs were tested on the same images and recorded which of them were right."""
    if not (a.right and b.right) or a.record.get("test") != b.record.get("test"):
        return False
    return a.right.split(":")[0] == b.right.split(":")[0]


def difference(a: str, b: str, seed: int) -> dict[str, Any]:
    """The packed right answers of two runs -> accuracy of b minus that of a in percent, with its paired interval."""
    right_a, right_b = (unpack_bits(packed).astype(int) for packed in (a, b))
    delta = right_b - right_a
    # Drawing images with replacement is the same as drawing how many of them gain, lose and stay.
    shares = [np.mean(delta == value) for value in (1, -1, 0)]
    draws = np.random.default_rng(seed).multinomial(len(delta), shares, DRAWS)
    low, high = np.percentile(100 * (draws[:, 0] - draws[:, 1]) / len(delta), [2.5, 97.5])
    if low == high:  # no image differs from the others: the images drawn say nothing of those that were not
        unseen = 100 * (1 - 0.025 ** (1 / len(delta)))  # a larger share would have shown itself in 97.5 % of all draws
        low, high = max(-100.0, low - unseen), min(100.0, high + unseen)
    interval = [round(float(low), 3), round(float(high), 3)]
    return {"difference": round(100 * float(delta.mean()), 3), "interval": interval}


def _departures(records: dict[str, Records], file: str, column: Column) -> list[str]:
    """A sentence for each setting of one evaluation that differs between runs."""
    protocols = {run: _protocol(own[file], column) for run, own in records.items() if file in own}
    notes = []
    for key in dict.fromkeys(key for each in protocols.values() for key in each):
        values: dict[str, list[str]] = {}
        for run, each in protocols.items():
            if key in each:  # records of earlier versions have fewer settings
                values.setdefault(json.dumps(each[key]), []).append(run)
        if len(values) > 1:
            sides = "; ".join(f"{value[:200]} for {', '.join(runs)}" for value, runs in values.items())
            notes.append(f"Protocols of {file} differ: {key} is {sides}.")
    return notes


def _protocol(record: dict[str, Any], column: Column) -> dict[str, Any]:
    """The keys of a record that must agree. Settings with columns of their own are left out."""
    settings = record.get("settings") or {}
    return {key: record.get(key) for key in SAME} | {
        f"settings.{name}": value for name, value in settings.items() if name not in column.settings
    }
