"""Several sources one after another: `[a,b]`."""

import hashlib

import numpy as np
from torch import Tensor

from ..config import Config
from . import open_source
from .names import Names
from .source import Reduction, Source, read_smaller
from .syntax import items


class Several:
    """The images of the first source, then those of the second ... Labels go by the names of the classes."""

    def __init__(self, parts: list[Source]) -> None:
        self.parts = parts
        self.ends = np.cumsum([len(part) for part in parts])
        self.classes, self.labels = _joined(parts)
        texts = [getattr(part, "texts", None) for part in parts]
        self.texts: Names | None = None
        if any(text is not None for text in texts):
            self.texts = Names(
                word for part, text in zip(parts, texts, strict=True) for word in (text or [""] * len(part))
            )
        columns = [getattr(part, "columns", []) for part in parts]
        self.columns: list[str] = columns[0] if all(names == columns[0] for names in columns) else []

    def __len__(self) -> int:
        return int(self.ends[-1])

    def place(self, index: int) -> tuple[Source, int]:
        part = int(np.searchsorted(self.ends, index, side="right"))
        return self.parts[part], index - int(self.ends[part - 1] if part else 0)

    def read(self, index: int) -> Tensor:
        part, place = self.place(index)
        return part.read(place)

    def read_smaller(self, index: int, reduction: Reduction) -> tuple[Tensor, tuple[int, int]]:
        part, place = self.place(index)
        return read_smaller(part, place, reduction)

    def name(self, index: int) -> str:
        part, place = self.place(index)
        return part.name(place)

    def identity(self) -> str:
        return hashlib.sha256(",".join(part.identity() for part in self.parts).encode()).hexdigest()

    def fingerprint(self) -> str:
        return hashlib.sha256(",".join(part.fingerprint() for part in self.parts).encode()).hexdigest()


def joined(parts: list[Source]) -> Source:
    return parts[0] if len(parts) == 1 else Several(parts)


def open_list(word: str, config: Config) -> Source:
    return joined([open_source(item, config) for item in items(word)])


def _joined(parts: list[Source]) -> tuple[list[str], np.ndarray | None]:
    """Classes of all of them, in the order of their names (the first one's if all agree), and the labels."""
    if all(part.labels is None for part in parts):
        return [], None
    lists = [part.classes for part in parts if part.labels is not None]
    classes = lists[0] if all(names == lists[0] for names in lists) else sorted({name for n in lists for name in n})
    number = {name: i for i, name in enumerate(classes)}
    labels = []
    for part in parts:
        if part.labels is None:
            labels.append(np.full(len(part), -1, dtype=np.int64))
        else:
            mapping = np.array([*(number[name] for name in part.classes), -1], dtype=np.int64)  # -1 finds the last
            labels.append(mapping[part.labels])
    return classes, np.concatenate(labels)
