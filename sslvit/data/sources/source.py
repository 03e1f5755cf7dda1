"""What every source of images offers, and the error for an image that cannot be read."""

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from ...errors import UserError, printable
from .names import Names

if TYPE_CHECKING:  # importing torch takes seconds, and --help needs no torch
    from torch import Tensor

ValueRange = tuple[float, float] | None  # of pixels of more than 8 bits: the values that become 0 and 255
ADDRESS = re.compile(r" ?<[^<>]* at 0x[0-9a-f]+>| at 0x[0-9a-f]+", re.IGNORECASE)  # of an object in memory
Reduction = Callable[[int, int], int]  # (height, width) of a whole image -> how many times smaller will do: 1, 2, 4, 8


class BadImage(Exception):
    """A file that cannot be read as an image. The text says why: one line, the same in every process."""

    def __init__(self, reason: object) -> None:
        """reason: a text, or the error of a decoder."""
        text = "there is not enough memory for it" if isinstance(reason, MemoryError) else str(reason).strip()
        text = ADDRESS.sub("", (text.splitlines() or [type(reason).__name__])[0])
        super().__init__(printable(text[:200]))


def none_readable(source: "Source") -> UserError:
    """To raise where no image of a source can be read. Says why the first one cannot."""
    why = ""
    try:
        source.read(0)
    except BadImage as error:
        why = f" ({error})"
    return UserError(f"None of the {len(source)} images can be read, the first is {source.name(0)}{why}.")


class Source(Protocol):
    """A numbered collection of images. Every kind of source is a subclass."""

    classes: list[str]  # names of the labels; empty without labels
    labels: np.ndarray | None  # [N] int64, -1 where an image has none
    value_range: ValueRange = None
    texts: Names | None = None  # labels as they were written, with tabs between columns, where there are such
    columns: Sequence[str] = ()  # names of the columns of `texts`

    def __len__(self) -> int: ...

    def read(self, index: int) -> "Tensor":
        """[C, H, W] uint8, or float32 in [0, 255] for images of more than 8 bits; raises BadImage."""

    def read_smaller(self, index: int, reduction: Reduction) -> "tuple[Tensor, tuple[int, int]]":
        """(image, its whole height and width). Sources that can make it `reduction(height, width)` times smaller."""
        image = self.read(index)
        return image, (image.shape[-2], image.shape[-1])

    def name(self, index: int) -> str:
        """What a person would look for: a path, or the set and the number."""

    def identity(self) -> str:
        """Changes when the number, the names or the order of the images do, not with where they lie."""

    def fingerprint(self) -> str:
        """Changes when the images do: features are cached under it."""

    def sample(self) -> list[str]:
        """A short hash for each of some images: that of its bytes. Empty where nobody can change them unnoticed."""
        return []


class WrappedSource(Source):
    """A source around another one, which differs in what a subclass says."""

    def __init__(self, source: Source) -> None:
        self.source, self.classes, self.labels = source, source.classes, source.labels
        self.value_range = source.value_range

    def __len__(self) -> int:
        return len(self.source)

    def read(self, index: int) -> "Tensor":
        return self.source.read(index)

    def name(self, index: int) -> str:
        return self.source.name(index)

    def identity(self) -> str:
        return self.source.identity()

    def fingerprint(self) -> str:
        return self.source.fingerprint()

    def sample(self) -> list[str]:
        return self.source.sample()
