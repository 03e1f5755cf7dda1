"""A folder of images, flat or nested, with or without class folders."""

import os
from collections import Counter
from pathlib import Path

from ..errors import UserError
from . import Config
from .files import EXTENSIONS, SCIENTIFIC, SOME_EXTENSIONS, Files, check_channels
from .names import Names, top_folders


class Folder(Files):
    """Every image file below `root`, in the order of the paths. If all of them lie in sub-folders, the first folder of
    the path is the label."""

    def __init__(self, root: Path, in_chans: int = 3, value_range: tuple[float, float] | None = None) -> None:
        if not root.is_dir():
            raise UserError(f"data: {root} is a file: give the folder that holds the images.")
        found, others = _walk(root)
        if not found:
            raise UserError(f"data: no images in {root}: {_describe(others)}. Image files end in {SOME_EXTENSIONS}.")
        check_channels(in_chans, found, "a folder")
        super().__init__(root, Names(found), in_chans, value_range, *top_folders(found))


def open_folder(word: str, config: Config) -> Folder:
    return Folder(Path(word).expanduser(), config.in_chans, config.value_range)


def _walk(root: Path) -> tuple[list[str], list[str]]:
    """(image files, other files), relative to root and sorted. Hidden ones are passed over, links to folders followed
    unless they lead back to a folder already seen."""
    images, others, seen = [], [], set()
    pending = [""]
    while pending:
        folder = pending.pop()
        where = root / folder
        real = os.path.realpath(where)
        if real in seen:
            continue
        seen.add(real)
        try:
            entries = list(os.scandir(where))
        except OSError as error:
            raise UserError(f"data: cannot list {where}: {error.strerror}.") from error
        for entry in entries:
            if entry.name.startswith("."):
                continue
            path = os.path.join(folder, entry.name)
            if entry.is_dir():
                pending.append(path)
            else:
                (images if os.path.splitext(entry.name)[1].lower() in EXTENSIONS else others).append(path)
    if not images:
        images = [path for path in others if os.path.splitext(path)[1].lower() in SCIENTIFIC]
    return sorted(images), sorted(others)


def _describe(others: list[str]) -> str:
    if not others:
        return "the folder is empty"
    kinds = Counter(os.path.splitext(name)[1].lower() or "no extension" for name in others)
    counts = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(4))
    openable = next(
        (name for name in others if os.path.splitext(name)[1].lower() in (".zip", ".tar", ".parquet")), None
    )
    if openable:
        ending = os.path.splitext(openable)[1]
        counts += f"; write <folder>/*{ending} for what is in the {ending} files"
    return f"it holds {len(others)} other files ({counts}), for example {others[0]}"
