"""Many strings in two arrays, which loader processes share. A list would be copied as each string is touched."""

import hashlib
import os
from collections.abc import Iterable, Iterator
from itertools import islice

import numpy as np

PART = 2**16  # strings encoded at a time: ten million Python strings at once would take gigabytes


class Names:
    """Strings by index. File names of any bytes are kept as they are."""

    def __init__(self, names: Iterable[str]) -> None:
        lengths, blob, rest = [np.empty(0, dtype=np.int64)], bytearray(), iter(names)
        while encoded := [os.fsencode(name) for name in islice(rest, PART)]:
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
        digest = hashlib.sha256(self.ends.data)
        digest.update(self.blob.data)
        return digest.hexdigest()


def numbered(texts: list[str]) -> tuple[list[str], np.ndarray | None]:
    """The label of each image, "" for none -> names of the classes, and [N] int64 labels, -1 for none.

    ([], None) if no image has a label. Classes are sorted by name, or by number if all names are numbers.
    """
    classes = sorted({text for text in texts if text})
    if not classes:
        return [], None
    if all(text.isascii() and text.isdigit() and len(text) < 20 and text == str(int(text)) for text in classes):
        classes.sort(key=int)
    number = {name: i for i, name in enumerate(classes)} | {"": -1}
    return classes, np.array([number[text] for text in texts], dtype=np.int64)


def top_folders(names: list[str], separator: str = os.sep) -> tuple[list[str], np.ndarray | None]:
    """Labels from class folders: the first folder of each path. ([], None) if an image lies in none."""
    return labels_of_runs([(name.partition(separator)[0] if separator in name else "", 1) for name in names])


def labels_of_runs(tops: list[tuple[str, int]]) -> tuple[list[str], np.ndarray | None]:
    """Runs of images of one class folder, (folder, number of images) -> classes and labels; ([], None) if one has no
    folder."""
    classes = sorted({top for top, _ in tops})
    if not classes or "" in classes:
        return [], None
    number = {name: i for i, name in enumerate(classes)}
    return classes, np.repeat([number[top] for top, _ in tops], [count for _, count in tops]).astype(np.int64)
