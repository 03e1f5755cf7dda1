"""Many strings in two arrays, so that worker processes share them instead of copying each on first touch."""

import hashlib
import os
from collections.abc import Iterable, Iterator
from itertools import islice

import numpy as np

PART = 2**16  # strings encoded at a time, so that ten million never lie side by side as objects


class Names:
    """Strings by number. File names of any bytes are kept as they are."""

    def __init__(self, names: Iterable[str] | Iterable[bytes]) -> None:
        lengths, blob, names = [np.empty(0, dtype=np.int64)], bytearray(), iter(names)
        while encoded := [os.fsencode(name) for name in islice(names, PART)]:
            lengths.append(np.fromiter(map(len, encoded), dtype=np.int64, count=len(encoded)))
            blob += b"".join(encoded)
        self.ends, self.blob = np.cumsum(np.concatenate(lengths)), np.frombuffer(blob, dtype=np.uint8)

    @classmethod
    def of_arrays(cls, ends: np.ndarray, blob: np.ndarray) -> "Names":
        """ends: [N] int64, where each string ends in the blob, uint8."""
        names = cls([])
        names.ends, names.blob = ends, blob
        return names

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        start = self.ends[index - 1] if index else 0
        return os.fsdecode(self.blob[start : self.ends[index]].tobytes())

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(len(self)))

    def digest(self) -> str:
        """Changes when the number, the order or one of the strings does."""
        digest = hashlib.sha256(self.ends)
        digest.update(self.blob)
        return digest.hexdigest()


def numbered(texts: list[str]) -> tuple[list[str], np.ndarray | None]:
    """One text for each image, empty where it has none -> the names of the classes, and [N] int64 of their numbers, -1
    where it has none; ([], None) if none has. Classes are in the order of their names, or of their numbers if all are
    numbers."""
    classes = sorted({text for text in texts if text})
    if not classes:
        return [], None
    if all(text.isascii() and text.isdigit() and text == str(int(text)) for text in classes):
        classes.sort(key=int)
    number = {name: i for i, name in enumerate(classes)} | {"": -1}
    return classes, np.array([number[text] for text in texts], dtype=np.int64)


def top_folders(names: list[str], separator: str = os.sep) -> tuple[list[str], np.ndarray | None]:
    """Labels from class folders: the first folder of each path, if all images lie in one; else ([], None)."""
    return labels_of_runs([(name.partition(separator)[0] if separator in name else "", 1) for name in names])


def labels_of_runs(tops: list[tuple[str, int]]) -> tuple[list[str], np.ndarray | None]:
    """(first folder, how many images) one after another -> classes and labels; ([], None) if one has no folder."""
    classes = sorted({top for top, _ in tops})
    if not classes or "" in classes:
        return [], None
    number = {name: i for i, name in enumerate(classes)}
    return classes, np.repeat([number[top] for top, _ in tops], [count for _, count in tops]).astype(np.int64)
