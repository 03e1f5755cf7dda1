"""The results of several runs side by side, and how far their differences can be believed.

Reads what the evaluations wrote (<run>/eval/*.json). Where two runs were judged on the same test images, the difference
of their accuracies has a paired bootstrap interval of 95 %: images are drawn with replacement, each with what both runs
made of it (Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 16). An interval that holds 0 means
that other test images could have turned the order round. It says nothing about other seeds of the training.

k-NN is that of k = 20 and T = 0.07, or of the first k and T that all runs have. Runs that have none in common are in
columns of their own, and no difference is taken between them.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..distributed import say
from ..errors import UserError
from . import protocol, scores

DRAWS = 10_000


@dataclass
class Config:
    seed: int = 0  # of the bootstrap
    out: str = ""  # file for the table, as JSON; empty: it is only printed


# {evaluation: (name of the column, the number's key)}
COLUMNS = {
    "knn": ("k-NN", "top1"),
    "linear": ("linear", "top1"),
    "linear_mae": ("linear (mae)", "top1"),
    "linear_dino": ("linear (dino)", "top1"),
    "logistic": ("logistic", "top1"),
    "attentive": ("attentive", "top1"),
    "finetune": ("fine-tuned", "top1"),
    "retrieval": ("retrieval mAP", "map"),
    "cluster": ("clusters", "accuracy"),
    "quality": ("RankMe", "rankme"),
}
USUAL = (20, 0.07)  # k and T of k-NN
# What has to agree for two numbers to be compared, and every setting.
SAME = ("train", "test", "classes", "precision", "image_size", "features", "seed", "data", "departures")


@dataclass
class Cell:
    """One number of one run."""

    evaluation: str
    kind: str  # what beside the evaluation has to be the same in a column, such as k=20 T=0.07
    number: float
    right: str  # which test images were right, packed; empty if that is not known
    record: dict[str, Any]  # that it is from

    @property
    def name(self) -> str:
        """Of its column in the file."""
        return f"{self.evaluation} {self.kind}".strip()

    @property
    def title(self) -> str:
        """Of its column in the table."""
        return f"{COLUMNS[self.evaluation][0]} {self.kind}".strip()


def compare(runs: list[str], config: Config) -> dict[str, Any]:
    """Print a table of runs and results, differences to the first run, and where protocols differ. Raises UserError."""
    if not runs:
        raise UserError("compare needs runs: sslvit compare runs/a runs/b untrained:runs/a.")
    records = {name: _results(name) for name in dict.fromkeys(runs)}
    found = _cells(records)
    columns = {cell.name: cell for evaluation in COLUMNS for cells in found.values() for cell in cells.values()
               if cell.evaluation == evaluation}  # fmt: skip
    if not columns:
        raise UserError(f"None of {', '.join(found)} has results of {', '.join(COLUMNS)}: evaluate them first.")
    header = [
        cell.title + " %" * (cell.evaluation != "quality" and "mae" not in cell.kind) for cell in columns.values()
    ]
    rows = [[run, *(f"{cells[c].number:.2f}" if c in cells else "" for c in columns)] for run, cells in found.items()]
    say(*protocol.table(["run", *header], rows))
    first, *others = found
    differences = []
    for other in others:
        for name, column in columns.items():
            a, b = found[first].get(name), found[other].get(name)
            if not _comparable(a, b):
                continue
            row = {"run": other, "evaluation": name, **difference(a.right, b.right, config.seed)}
            differences.append(row)
            low, high = row["interval"]
            verdict = "" if low * high > 0 or low == high else ": other test images could turn it round"
            say(
                f"{column.title}: {other} {row['difference']:+.2f} against {first} (95 % interval {low:+.2f} to "
                f"{high:+.2f}){verdict}"
            )
    notes = [note for evaluation in COLUMNS for note in _departures(records, evaluation)]
    say(*notes)
    table = {run: {name: cell.number for name, cell in cells.items()} for run, cells in found.items()}
    report = {"results": table, "differences": differences, "notes": notes}
    if config.out:
        protocol.check_out(config.out)
        try:
            Path(config.out).expanduser().write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"out={config.out} cannot be written: {error.strerror}.") from error
    return report


def _results(name: str) -> dict[str, dict[str, Any]]:
    """{evaluation: what it wrote} of a run. Raises UserError."""
    kind, colon, rest = name.partition(":")
    path = Path(rest if colon and kind == "untrained" else name).expanduser()
    if colon and kind == "untrained":
        folder = path / "eval" / "untrained"
    elif path.parent.name == "checkpoints":
        folder = path.parent.parent / "eval" / path.name
    else:
        folder = path / "eval"
    if not folder.is_dir():
        raise UserError(f"{name} has no results ({folder} is missing): give runs that were evaluated.")
    records = {}
    for column in COLUMNS:
        path = folder / f"{column}.json"
        if path.is_file():
            try:
                record = json.loads(path.read_text(encoding="utf-8"))
                _cell(column, record)
            except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
                raise UserError(f"{path} is no result of this version: evaluate again.") from error
            records[column] = record
    return records


def _all_votes(record: dict[str, Any]) -> list[tuple[int, float]]:
    return [(row["k"], row["temperature"]) for row in record["results"]["neighbours"]]


def _cell(evaluation: str, record: dict[str, Any], votes: tuple[int, float] | None = None) -> Cell:
    """votes: k and T of k-NN; null: the first. Raises KeyError, TypeError, ValueError or IndexError for what is no
    result of the evaluation."""
    row, kind, key = record["results"], "", COLUMNS[evaluation][1]
    if evaluation == "knn":
        votes = votes or _all_votes(record)[0]
        row, kind = row["neighbours"][_all_votes(record).index(votes)], f"k={votes[0]} T={votes[1]:g}"
    elif evaluation == "finetune" and record.get("task", "single") != "single":
        key = scores.FIRST[record["task"]]
        kind = f"{record['task']} {key}"
    return Cell(evaluation, kind, float(row[key]), row.get("right", ""), record)


def _cells(records: dict[str, dict[str, Any]]) -> dict[str, dict[str, Cell]]:
    """{run: {name of a column: what stands there}}."""
    votes = {run: _all_votes(of_run["knn"]) for run, of_run in records.items() if "knn" in of_run}
    shared = [key for key in next(iter(votes.values()), []) if all(key in keys for keys in votes.values())]
    found = {}
    for run, of_run in records.items():
        asked = shared or votes.get(run, [])
        usual = USUAL if USUAL in asked else next(iter(asked), None)
        cells = [_cell(name, record, usual if name == "knn" else None) for name, record in of_run.items()]
        found[run] = {cell.name: cell for cell in cells}
    return found


def _comparable(a: Cell | None, b: Cell | None) -> bool:
    """Whether both say of each test image whether they were right, and the images are the same."""
    if a is None or b is None or a.record.get("test") != b.record.get("test"):
        return False
    return bool(a.right) and bool(b.right) and a.right.split(":")[0] == b.right.split(":")[0]


def difference(a: str, b: str, seed: int) -> dict[str, Any]:
    """Which test images two runs had right, packed -> accuracy of b minus that of a in percent, with its paired
    interval."""
    right = [protocol.unpacked(packed).astype(int) for packed in (a, b)]
    delta = right[1] - right[0]
    count = len(delta)
    # Drawing images with replacement is drawing how many of them gain, lose and stay.
    shares = [np.mean(delta == value) for value in (1, -1, 0)]
    draws = np.random.default_rng(seed).multinomial(count, shares, DRAWS)
    low, high = np.percentile(100 * (draws[:, 0] - draws[:, 1]) / count, [2.5, 97.5])
    interval = [round(float(low), 3), round(float(high), 3)]
    return {"difference": round(100 * float(delta.mean()), 3), "interval": interval}


def _departures(found: dict[str, dict[str, Any]], evaluation: str) -> list[str]:
    """A sentence for each way in which the protocols of one evaluation differ between runs."""
    rulers = {run: _ruler(of_run[evaluation], evaluation) for run, of_run in found.items() if evaluation in of_run}
    notes = []
    for key in dict.fromkeys(key for ruler in rulers.values() for key in ruler):
        values: dict[str, list[str]] = {}
        for run, ruler in rulers.items():
            values.setdefault(json.dumps(ruler.get(key)), []).append(run)
        if len(values) > 1:
            sides = "; ".join(f"{value[:200]} for {', '.join(names)}" for value, names in values.items())
            notes.append(f"Not by one ruler, {evaluation}: {key} is {sides}.")
    return notes


def _ruler(record: dict[str, Any], evaluation: str) -> dict[str, Any]:
    """What of a record has to agree, setting by setting."""
    in_column = ("k", "temperature") if evaluation == "knn" else ()
    settings = {f"settings.{name}": value for name, value in (record.get("settings") or {}).items()
                if name not in in_column}  # fmt: skip
    return {key: record.get(key) for key in SAME} | settings
