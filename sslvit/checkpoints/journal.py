"""Files of a run that grow by lines. A run that resumes cuts them back to what they held at its checkpoint.

A checkpoint records the length of each file. Lines that came after it are written again. So every line is there exactly
once, whenever the run was killed.
"""

import json
import os
from pathlib import Path

from ..distributed import barrier, rank
from ..metrics import METRICS

BAD_IMAGES, NONFINITE = "bad_images.txt", "nonfinite.jsonl"
NAMES = (METRICS, BAD_IMAGES, NONFINITE)


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
            with path.open("rb") as file:
                os.fsync(file.fileno())


def rewind(run_dir: Path, kept: dict[str, int] | None, step: int) -> None:
    """Cut the files back. All processes call it, and wait until it is done.

    kept: the `lengths` at the checkpoint of `step`; {} for a new run. None for a checkpoint of an old version, which
    did not record them: then lines of later steps are dropped.
    """
    if rank() == 0:
        for path in (run_dir / name for name in NAMES):
            if path.exists() and not (kept is not None and _cut(path, kept.get(path.name, 0))):
                _drop_later_lines(path, step)
    barrier()


def _cut(path: Path, length: int) -> bool:
    """False if no line ends at that length, because somebody has edited the file."""
    with path.open("rb+") as file:
        file.seek(max(0, length - 1))
        if length and file.read(1) != b"\n":
            return False
        file.truncate(length)
    return True


def _drop_later_lines(path: Path, step: int) -> None:
    if path.suffix != ".jsonl":
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue  # a line that was being written when the run was killed
    fresh = path.with_suffix(".tmp")
    fresh.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    os.replace(fresh, path)
