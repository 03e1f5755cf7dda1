"""What every source of images offers, and the error for an image that cannot be read."""

from collections.abc import Callable
from typing import Protocol

import numpy as np
from torch import Tensor

ValueRange = tuple[float, float] | None  # of pixels of more than 8 bits: the values that become 0 and 255
Reduction = Callable[[int, int], int]  # (height, width) of a whole image -> 1, 2, 4 or 8 times smaller will do


class BadImage(Exception):
    """A file that cannot be read as an image; the text says why."""


class Source(Protocol):
    """A numbered collection of images."""

    classes: list[str]  # names of the labels; empty without labels
    labels: np.ndarray | None  # [N] int64, -1 where an image has none
    # May also have `texts: Names`, the labels as they were written, which `labels.py` reads in other ways, and
    # `read_smaller(index, reduction)`, see below.

    def __len__(self) -> int: ...

    def read(self, index: int) -> Tensor:
        """[C, H, W] uint8, or float32 in [0, 255] for images of more than 8 bits; raises BadImage."""

    def name(self, index: int) -> str:
        """What a person would look for: a path, or the set and the number."""

    def identity(self) -> str:
        """Changes when the number, the names or the order of the images do, not with where they lie."""

    def fingerprint(self) -> str:
        """Changes when the images do: features are cached under it."""


def read_smaller(source: Source, index: int, reduction: Reduction) -> tuple[Tensor, tuple[int, int]]:
    """(image, its whole height and width): as `read`, where sources that can may give it `reduction(height, width)`
    times smaller."""
    if hasattr(source, "read_smaller"):
        return source.read_smaller(index, reduction)
    image = source.read(index)
    return image, (image.shape[-2], image.shape[-1])
