"""Images of one set: some of them, their frozen features, and how a result names them."""

from dataclasses import replace
from typing import Any

from torch import Tensor

from .. import rng
from ..data import Source
from ..hardware import versions
from ..pretrained import Pixels
from . import protocol
from .features import Features
from .kept import extract_cached


class Chosen:
    """Some images of a source, as a source."""

    def __init__(self, source: Source, index: Tensor) -> None:
        self.source, self.index = source, index.tolist()
        self.labels = None if source.labels is None else source.labels[self.index]
        self.classes = source.classes

    def __len__(self) -> int:
        return len(self.index)

    def read(self, index: int) -> Tensor:
        return self.source.read(self.index[index])

    def name(self, index: int) -> str:
        return self.source.name(self.index[index])

    def identity(self) -> str:
        return f"{self.source.identity()} {self.index}"

    def fingerprint(self) -> str:
        return f"{self.source.fingerprint()} {self.index}"


def choose(source: Source, count: int | None, seed: int, purpose: str) -> Source:
    """`count` images of a source, by the seed, in the order of the source; all of them for null or if there are no
    more."""
    if count is None or count >= len(source):
        return source
    return Chosen(source, rng.permutation(rng.fold_in(seed, purpose), len(source))[:count].sort().values)


def features(
    frozen: protocol.Frozen, source: Source, config: protocol.Subject, cache: bool, centred: bool = True
) -> Features:
    """Frozen features of a source, from the file of an earlier evaluation if there is one. Raises UserError.

    centred: take the mean image off raw pixels, or the brightness that all images share decides.
    """
    encoder, pools = frozen.subject.encoder, (frozen.pool,)
    found = extract_cached(
        frozen.kept(cache), encoder, source, frozen.normalize, frozen.accelerator, pools, config.batch_size,
        config.workers,
    )[frozen.pool]  # fmt: skip
    if centred and isinstance(encoder, Pixels):
        found = replace(found, values=found.values - found.values.mean(dim=0))
    return found


def describe(frozen: protocol.Frozen) -> str:
    pixels = isinstance(frozen.subject.encoder, Pixels)
    return "pixels minus the mean image" if pixels else protocol.describe_pool(frozen.pool)


def record(frozen: protocol.Frozen, config: protocol.Subject, name: str, **more: Any) -> dict[str, Any]:
    """The protocol of an evaluation, for its result."""
    return {
        "evaluation": name,
        "run": config.run,
        **frozen.subject.detail,
        **more,
        "features": describe(frozen),
        "image_size": list(frozen.subject.encoder.image_size),
        "precision": frozen.precision,
        "seed": config.seed,
        "versions": versions(),
    }
