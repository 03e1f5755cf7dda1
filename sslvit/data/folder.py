"""A folder of images, flat or nested, with or without class folders."""

import hashlib
import os
from collections import Counter
from pathlib import Path

import numpy as np
from torch import Tensor

from ..errors import UserError
from .decode import MODES, BadImage, decode

EXTENSIONS = frozenset(
    [
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".png",
        ".bmp",
        ".gif",
        ".webp",
        ".tif",
        ".tiff",
        ".ppm",
        ".pgm",
        ".pbm",
        ".pnm",
        ".jp2",
        ".j2k",
        ".ico",
        ".tga",
        ".avif",
    ]
)


class Names:
    """Many strings in two arrays, so that worker processes share them instead of copying each on first touch."""

    def __init__(self, names: list[str]) -> None:
        encoded = [os.fsencode(name) for name in names]
        self.ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)
        self.blob = np.frombuffer(b"".join(encoded), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        start = self.ends[index - 1] if index else 0
        return os.fsdecode(self.blob[start : self.ends[index]].tobytes())


class Folder:
    """Every image file below `root`, in the order of the paths. If all of them lie in sub-folders, the first folder of
    the path is the label."""

    def __init__(self, root: Path, in_chans: int = 3) -> None:
        if in_chans not in MODES:
            raise UserError(f"data.in_chans={in_chans}, but the images of a folder have 1 to 4 channels: use 1 or 3.")
        self.root, self.in_chans = root, in_chans
        if not root.is_dir():
            raise UserError(f"data: {root} is a file: give the folder that holds the images.")
        found, others = _walk(root)
        if not found:
            raise UserError(f"data: no images in {root}: {_describe(others)}. Image files end in {_some_extensions()}.")
        self.names = Names(found)
        tops = [name.split(os.sep, 1)[0] if os.sep in name else None for name in found]
        self.classes: list[str] = sorted({top for top in tops if top is not None}) if None not in tops else []
        number = {name: i for i, name in enumerate(self.classes)}
        self.labels = np.array([number[top] for top in tops], dtype=np.int64) if self.classes else None

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        return str(self.root / self.names[index])

    def read(self, index: int) -> Tensor:
        try:
            with open(self.name(index), "rb") as file:
                data = file.read()
        except OSError as error:
            raise BadImage(error.strerror or type(error).__name__) from error
        return decode(data, self.in_chans)

    def identity(self) -> str:
        return hashlib.sha256(self.names.ends.tobytes() + self.names.blob.tobytes()).hexdigest()

    def fingerprint(self) -> str:
        digest = hashlib.sha256(self.identity().encode())
        for index in range(len(self)):
            try:
                stat = os.stat(self.name(index))
                digest.update(f"{stat.st_size},{stat.st_mtime_ns};".encode())
            except OSError:  # a link to nowhere, a file removed meanwhile: reading it is a BadImage
                digest.update(b"missing;")
        return digest.hexdigest()


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
    return sorted(images), sorted(others)


def _describe(others: list[str]) -> str:
    if not others:
        return "the folder is empty"
    kinds = Counter(os.path.splitext(name)[1].lower() or "no extension" for name in others)
    counts = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(4))
    return f"it holds {len(others)} other files ({counts}), for example {others[0]}"


def _some_extensions() -> str:
    return ".jpg, .png, .webp, .tif, .bmp and the like"
