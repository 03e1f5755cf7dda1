"""The results of several runs side by side, and how far their differences can be believed.

Reads what the evaluations wrote (<run>/eval/*.json). Where two runs were judged on the same test images, the difference
of their accuracies has a paired bootstrap interval of 95 %: images are drawn with replacement, each with what both runs
made of it (Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 16). An interval that holds 0 means
that other test images could have turned the order round. It says nothing about other seeds of the training.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..distributed import say
from ..errors import UserError
from . import protocol

DRAWS = 10_000


@dataclass
class Config:
    seed: int = 0  # of the bootstrap
    out: str = ""  # file for the table, as JSON; empty: it is only printed


def _knn(results: dict[str, Any]) -> dict[str, Any]:
    """k = 20 and T = 0.07 if they were asked for, else the first."""
    rows = results["neighbours"]
    usual = [row for row in rows if (row["k"], row["temperature"]) == (20, 0.07)]
    return (usual or rows)[0]


# {evaluation: (name of the column, where its number is, the number's key)}
COLUMNS: dict[str, tuple[str, Callable[[dict[str, Any]], dict[str, Any]], str]] = {
    "knn": ("k-NN %", _knn, "top1"),
    "linear": ("linear %", lambda results: results, "top1"),
    "linear_mae": ("linear (mae) %", lambda results: results, "top1"),
    "linear_dino": ("linear (dino) %", lambda results: results, "top1"),
    "logistic": ("logistic %", lambda results: results, "top1"),
    "attentive": ("attentive %", lambda results: results, "top1"),
    "finetune": ("fine-tuned %", lambda results: results, "top1"),
    "retrieval": ("retrieval mAP %", lambda results: results, "map"),
    "cluster": ("clusters %", lambda results: results, "accuracy"),
    "quality": ("RankMe", lambda results: results, "rankme"),
}
# What has to agree for two numbers to be compared.
SAME = ("train", "test", "classes", "precision", "image_size", "features", "seed", "data", "settings", "departures")


def compare(runs: list[str], config: Config) -> dict[str, Any]:
    """Print a table of runs and results, differences to the first run, and where protocols differ. Raises UserError."""
    if not runs:
        raise UserError("compare needs runs: sslvit compare runs/a runs/b untrained:runs/a.")
    found = {name: _results(name) for name in dict.fromkeys(runs)}
    present = [name for name in COLUMNS if any(name in records for records in found.values())]
    if not present:
        raise UserError(f"None of {', '.join(found)} has results of {', '.join(COLUMNS)}: evaluate them first.")
    rows = [[name, *(_cell(records.get(column), column) for column in present)] for name, records in found.items()]
    say(*protocol.table(["run", *(COLUMNS[name][0] for name in present)], rows))
    first, *others = found
    differences = []
    for other in others:
        for column in present:
            a, b = found[first].get(column), found[other].get(column)
            if not _comparable(a, b, column):
                continue
            row = {"run": other, "evaluation": column, **difference(a, b, column, config.seed)}
            differences.append(row)
            low, high = row["interval"]
            verdict = "" if low * high > 0 or low == high else ": other test images could turn it round"
            title = COLUMNS[column][0].removesuffix(" %")
            say(
                f"{title}: {other} {row['difference']:+.2f} against {first} (95 % interval {low:+.2f} to {high:+.2f})"
                f"{verdict}"
            )
    notes = [note for column in present for note in _departures(found, column)]
    say(*notes)
    table = {
        name: {column: _number(records[column], column) for column in present if column in records}
        for name, records in found.items()
    }
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
                records[column] = json.loads(path.read_text(encoding="utf-8"))
                _number(records[column], column)
            except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
                raise UserError(f"{path} is no result of this version: evaluate again.") from error
    return records


def _number(record: dict[str, Any], column: str) -> float:
    _, find, key = COLUMNS[column]
    return float(find(record["results"])[key])


def _cell(record: dict[str, Any] | None, column: str) -> str:
    return "" if record is None else f"{_number(record, column):.2f}"


def _comparable(a: dict[str, Any] | None, b: dict[str, Any] | None, column: str) -> bool:
    """Whether both say of each test image whether they were right, and the images are the same."""
    if a is None or b is None or a.get("test") != b.get("test"):
        return False
    texts = [COLUMNS[column][1](record["results"]).get("right", "") for record in (a, b)]
    return all(texts) and texts[0].split(":")[0] == texts[1].split(":")[0]


def difference(a: dict[str, Any], b: dict[str, Any], column: str, seed: int) -> dict[str, Any]:
    """Accuracy of b minus that of a in percent, with its paired interval."""
    find = COLUMNS[column][1]
    right = [protocol.unpacked(find(record["results"])["right"]).astype(int) for record in (a, b)]
    delta = right[1] - right[0]
    count = len(delta)
    # Drawing images with replacement is drawing how many of them gain, lose and stay.
    shares = [np.mean(delta == value) for value in (1, -1, 0)]
    draws = np.random.default_rng(seed).multinomial(count, shares, DRAWS)
    low, high = np.percentile(100 * (draws[:, 0] - draws[:, 1]) / count, [2.5, 97.5])
    interval = [round(float(low), 3), round(float(high), 3)]
    return {"difference": round(100 * float(delta.mean()), 3), "interval": interval}


def _departures(found: dict[str, dict[str, Any]], column: str) -> list[str]:
    """A sentence for each way in which the protocols of one column differ between runs."""
    records = {name: of_run[column] for name, of_run in found.items() if column in of_run}
    notes = []
    for key in SAME:
        values: dict[str, list[str]] = {}
        for name, record in records.items():
            values.setdefault(json.dumps(record.get(key)), []).append(name)
        if len(values) > 1:
            sides = "; ".join(f"{value[:200]} for {', '.join(names)}" for value, names in values.items())
            notes.append(f"Not by one ruler, {column}: {key} is {sides}.")
    return notes
