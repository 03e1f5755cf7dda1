"""Several sources one after another: a list, `[a,b]`, or a pattern, `scans/**/*.png`, `shards/{000..012}.tar`."""

import hashlib
import os
import re
from pathlib import Path

import numpy as np
from torch import Tensor

from ...errors import UserError
from ..config import Config
from . import ENDINGS, kind_of, open_source
from .archive import Archive
from .files import EXTENSIONS, SOME_EXTENSIONS, Files, check_channels, endings_of
from .limits import regular
from .names import Names, top_folders
from .source import Reduction, Source
from .syntax import items, matching


class Several(Source):
    """The images of the first source, then those of the second ... Labels go by the names of the classes."""

    def __init__(self, parts: list[Source]) -> None:
        self.parts = parts
        self.ends = np.cumsum([len(part) for part in parts])
        self.classes, self.labels = _joined_labels(parts)
        self.value_range = next((part.value_range for part in parts if part.value_range), None)
        if any(part.texts is not None for part in parts):
            self.texts = Names(text for part in parts for text in (part.texts or [""] * len(part)))
        if all(part.columns == parts[0].columns for part in parts):
            self.columns = parts[0].columns

    def __len__(self) -> int:
        return int(self.ends[-1])

    def place(self, index: int) -> tuple[Source, int]:
        """The source of an image, and its index there."""
        part = int(np.searchsorted(self.ends, index, side="right"))
        return self.parts[part], index - int(self.ends[part - 1] if part else 0)

    def read(self, index: int) -> Tensor:
        part, place = self.place(index)
        return part.read(place)

    def read_smaller(self, index: int, reduction: Reduction) -> tuple[Tensor, tuple[int, int]]:
        part, place = self.place(index)
        return part.read_smaller(place, reduction)

    def name(self, index: int) -> str:
        part, place = self.place(index)
        return part.name(place)

    def identity(self) -> str:
        return hashlib.sha256(",".join(part.identity() for part in self.parts).encode()).hexdigest()

    def sample(self) -> list[str]:
        return [one for part in self.parts for one in part.sample()]

    def fingerprint(self) -> str:
        return hashlib.sha256(",".join(part.fingerprint() for part in self.parts).encode()).hexdigest()


def _joined_labels(parts: list[Source]) -> tuple[list[str], np.ndarray | None]:
    """Classes of all sources, in the order of their names (or the first one's order if all agree), and the labels."""
    lists = [part.classes for part in parts if part.labels is not None]
    if not lists:
        return [], None
    classes = lists[0] if all(names == lists[0] for names in lists) else sorted({name for n in lists for name in n})
    number = {name: i for i, name in enumerate(classes)}
    labels = []
    for part in parts:
        numbers = np.array([*(number[name] for name in part.classes), -1], dtype=np.int64)  # label -1 finds the last
        labels.append(np.full(len(part), -1, dtype=np.int64) if part.labels is None else numbers[part.labels])
    return classes, np.concatenate(labels)


def joined(parts: list[Source]) -> Source:
    return parts[0] if len(parts) == 1 else Several(parts)


def open_list(spec: str, config: Config) -> Source:
    """`[a,b]`: any sources."""
    return joined([open_source(item, config) for item in items(spec)])


def open_paths(paths: list[str], config: Config) -> Source:
    """Paths one after another. Archives are one source, however many they are, and so are parquet files."""
    kinds = {kind_of(str(regular(path))) for path in paths}
    if kinds == {"archive"}:
        return Archive(paths, config)
    if kinds == {"parquet"}:
        from .parquet import Parquet

        return Parquet(paths, config)
    return joined([open_source(path, config) for path in paths])


def open_pattern(spec: str, config: Config) -> Source:
    """The image files that match, in the order of their paths. If archives, tables ... or folders match: all of them,
    one after another."""
    paths = list(dict.fromkeys(matching(spec)))
    missing = [path for path in paths if not os.path.lexists(path)]
    if missing:
        raise UserError(f"data: {spec} names {len(missing)} files that are not there, the first is {missing[0]}.")
    if not paths:
        raise UserError(f"data: nothing matches {spec}.")
    files = [path for path in paths if not os.path.isdir(path)]
    kinds = {ENDINGS.get(os.path.splitext(path)[1].lower()) for path in files}
    if len(kinds) != 1 or kinds & {None, "stack", "array"}:  # a file of these kinds is one image here
        return _open_images(spec, files, config) if files else open_paths(paths, config)
    return open_paths(files, config)


def _open_images(spec: str, paths: list[str], config: Config) -> Files:
    if not os.path.splitext(spec)[1]:  # `*` takes what a folder would take, `*.xyz` all files of this ending
        paths = [path for path in paths if os.path.splitext(path)[1].lower() in EXTENSIONS]
    if not paths:
        raise UserError(f"data: no images match {spec}. Image files end in {SOME_EXTENSIONS}.")
    root = Path(os.path.dirname(re.split(r"[*?{\[]", os.path.expanduser(spec))[0]))
    names = sorted(os.path.relpath(path, root) for path in paths)
    check_channels(config.in_chans, endings_of(names), spec)
    return Files(root, Names(names), config, *top_folders(names))
