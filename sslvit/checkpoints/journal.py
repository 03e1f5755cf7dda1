"""Files of a run that grow by lines. A run that resumes cuts them back to what they held at its checkpoint.

A checkpoint records the length of each file. Lines that came after it are written again. So every line is there exactly
once, whenever the run was killed. starts.jsonl is never cut: each start adds a line, with the identity of the run.
"""

import errno
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..distributed import barrier, rank
from ..metrics import METRICS
from . import textfile

STARTS, BAD_IMAGES, NONFINITE = "starts.jsonl", "bad_images.txt", "nonfinite.jsonl"
REPORT = "report.html"  # written anew, see report/
NAMES = (METRICS, BAD_IMAGES, NONFINITE)
LARGEST_STARTS = 2**24  # bytes of starts.jsonl; a start takes a thousand


def append(path: Path, lines: list[str]) -> None:
    """Raises OSError."""
    if lines:
        with path.open("a", encoding="utf-8") as file:
            file.writelines(lines)


def lengths(run_dir: Path) -> dict[str, int]:
    """{name: bytes} of the files."""
    return {path.name: path.stat().st_size for path in (run_dir / name for name in NAMES) if path.exists()}


def sync(run_dir: Path) -> None:
    """Write the files to the disk, before the checkpoint that records their lengths."""
    for path in (run_dir / name for name in NAMES):
        if path.exists():
            textfile.sync(path)
    textfile.sync(run_dir)


def add_start(run_dir: Path, start: dict[str, Any]) -> bytes:
    """Write the line of a start to starts.jsonl, and return it. Raises OSError."""
    # The number of the folder on this disk, which a copy does not have: a report shows images of this machine only for
    # runs that were made here.
    path, line = run_dir / STARTS, json.dumps(start | {"folder": run_dir.stat().st_ino}).encode() + b"\n"
    before = _start_lines(run_dir) if path.exists() else b""
    textfile.write(path, before + (b"" if before.endswith(b"\n") or not before else b"\n") + line)
    return line


def made_here(run_dir: Path) -> bool:
    """Whether a run has made this very folder. A copy has another number, which nobody elsewhere could know."""
    with suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
        number, lines = run_dir.stat().st_ino, _start_lines(run_dir).splitlines()
        return any(json.loads(line)["folder"] == number for line in lines if b'"folder"' in line)
    return False


def run_id(run_dir: Path) -> str | None:
    """The identity of a run, which its checkpoints hold too. None: an older version has started it, or its starts.jsonl
    is lost."""
    found = None
    with suppress(OSError):
        for line in _start_lines(run_dir).splitlines():
            with suppress(ValueError, TypeError, KeyError, RecursionError):
                found = str(json.loads(line)["run"])
    return found


def _start_lines(run_dir: Path) -> bytes:
    path = run_dir / STARTS
    if path.stat().st_size > LARGEST_STARTS:
        raise OSError(errno.EFBIG, f"{path} is larger than {LARGEST_STARTS} bytes, move it away")
    if not path.is_file():  # a pipe would wait for its writer
        raise OSError(errno.EINVAL, f"{path} is no regular file")
    return path.read_bytes()


def rewind(run_dir: Path, kept: dict[str, int] | None, step: int) -> None:
    """Cut the files back. All processes call it, and wait until it is done.

    kept: the `lengths` at the checkpoint of `step`; {} for a new run. None for a checkpoint of an old version, which
    did not record them: then lines of later steps are dropped.
    """
    if rank() == 0:
        for path in (run_dir / name for name in NAMES):
            if path.exists() and not (kept is not None and _cut(path, kept.get(path.name, 0), step)):
                _drop_later_lines(path, step)
    barrier()


def _cut(path: Path, length: int, step: int) -> bool:
    """False if no line ends at that length, or lines of earlier steps follow: then somebody has edited the file."""
    if not 0 <= length <= path.stat().st_size:
        return False
    with path.open("rb+") as file:
        file.seek(max(0, length - 1))
        if length and file.read(1) != b"\n":
            return False
        if any(_step(line, step) < step for line in file):
            return False
        file.truncate(length)
    return True


def _step(line: bytes, default: float) -> float:
    """The step of a line of a .jsonl file; the default if the line cannot be read."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return default


def _drop_later_lines(path: Path, step: int) -> None:
    if path.suffix == ".jsonl":
        *whole, torn = path.read_bytes().split(b"\n")  # torn: a line that was being written when the run was killed
        kept = [line for line in whole if _step(line, step) <= step] + [torn] * (_step(torn, step + 1) <= step)
        textfile.write(path, b"".join(line + b"\n" for line in kept))
