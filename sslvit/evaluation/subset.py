"""Some images of a source, as a source."""

from hashlib import sha256

from torch import Tensor

from .. import rng
from ..data import Source
from ..data.sources.source import Reduction


class Subset(Source):
    """The images of a source with these numbers, in this order."""

    def __init__(self, source: Source, index: Tensor) -> None:
        self.source, self.index = source, index.tolist()
        self.labels = None if source.labels is None else source.labels[self.index]
        self.classes, self.value_range = source.classes, source.value_range

    def __len__(self) -> int:
        return len(self.index)

    def read(self, index: int) -> Tensor:
        return self.source.read(self.index[index])

    def read_smaller(self, index: int, reduction: Reduction) -> tuple[Tensor, tuple[int, int]]:
        return self.source.read_smaller(self.index[index], reduction)

    def name(self, index: int) -> str:
        return self.source.name(self.index[index])

    def identity(self) -> str:
        return f"{self.source.identity()} {sha256(str(self.index).encode()).hexdigest()[:16]}"

    def sample(self) -> list[str]:
        return self.source.sample()

    def fingerprint(self) -> str:
        return f"{self.source.fingerprint()} {self.index}"


def random_subset(source: Source, count: int | None, seed: int, purpose: str) -> Source:
    """`count` images of a source, chosen by the seed, in the order of the source. None, or more than there are: all."""
    if count is None or count >= len(source):
        return source
    return Subset(source, rng.permutation(rng.fold_in(seed, purpose), len(source))[:count].sort().values)
