"""Results as files and tables: one JSON file for each evaluation of a run."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..checkpoints import textfile
from ..distributed import rank, say
from ..errors import UserError


def describe_set(spec: str, images: int, unreadable: int | None = None, **more: Any) -> dict[str, Any]:
    """A set of images, for a record. images: those that were read."""
    counted = {} if unreadable is None else {"unreadable": unreadable}
    return {"data": spec, "images": images, **counted, **more}


def write(record: dict[str, Any], path: Path, root: Path | None = None) -> None:
    """Write a record as JSON, on the first process. root: as in `textfile.write`. Raises UserError."""
    if rank() == 0:
        try:
            textfile.write(path, json.dumps(record, indent=1) + "\n", root)
        except OSError as error:
            raise UserError(f"The result cannot be written to {path}: {error.strerror}.") from error
    say(f"written to {path}")


def make_folder(folder: Path, root: Path) -> None:
    """Before the work: make the folder of results below `root`. Raises UserError if nothing can be written there."""
    try:
        textfile.make_folder(folder, root)
        problem = "" if os.access(folder, os.W_OK) else "it is read-only"
    except OSError as error:
        problem = str(error.strerror)
    if problem:
        raise UserError(f"The result cannot be written to {folder} ({problem}): give another place, out=<file>.")


def check_out(path: str) -> None:
    """Before the work: raises UserError if `path` cannot be written, or is a file that sslvit did not write."""
    file = Path(path).expanduser()
    if not path:
        return
    if not file.parent.is_dir() or (file.exists() and not file.is_file()):  # reading a pipe would wait for ever
        raise UserError(f"out={path} must be a file in a folder that exists.")
    if file.exists():
        try:
            ours = {"results", "evaluation"} & set(json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, RecursionError):
            ours = set()
        if not ours:
            raise UserError(f"out={path} exists and holds no result of sslvit: give another name.")


def pack_bits(right: Tensor) -> str:
    """[N] bool, whether each test image was classified correctly -> N, a colon, and hexadecimal digits (8 bits in two).

    With those of two runs on the same images, `sslvit compare` computes the interval of their difference.
    """
    return f"{len(right)}:{np.packbits(right.cpu().numpy()).tobytes().hex()}"


def unpack_bits(text: str) -> np.ndarray:
    """What `pack_bits` was given: [N] bool. Raises ValueError."""
    count, digits = text.split(":")
    if len(digits) != 2 * -(-int(count) // 8):
        raise ValueError(f"{len(digits)} digits do not hold {count} bits")
    return np.unpackbits(np.frombuffer(bytes.fromhex(digits), dtype=np.uint8), count=int(count)).astype(bool)


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a table with right-aligned columns."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in [header, *rows]]
