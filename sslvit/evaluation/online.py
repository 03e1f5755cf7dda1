"""k-NN of the encoder while it is being trained, by the protocol of `sslvit knn`."""

from dataclasses import dataclass
from functools import partial

from accelerate import Accelerator

from .. import data
from ..augment import Normalize
from ..data import Source, open_source
from ..data.loader import Memory, cached
from ..encoder import Encoder
from ..errors import UserError
from ..hardware import first_on_each_machine
from .features import extract, renumbered, same_classes
from .knn import TEMPERATURE, classify, labelled, top


@dataclass
class Config:
    train: str = ""  # labelled images to compare with, a folder or a set by name; empty: no evaluation during the run
    test: str = ""  # labelled images to classify, never trained on
    every_epochs: float | None = None  # null: before the first step and after the last only
    k: int = 20  # neighbours that vote


class OnlineKNN:
    """Classifies `test` by `train` whenever asked. The sources are opened at once, so that mistakes show at the
    start."""

    def __init__(
        self, config: Config, data_config: data.Config, seed: int, memory: Memory, accelerator: Accelerator
    ) -> None:
        self.config, self.data_config, self.accelerator = config, data_config, accelerator
        if not (config.train and config.test):
            missing = "eval.test" if config.train else "eval.train"
            raise UserError(f"{missing} is empty: k-NN during the run needs eval.train and eval.test, or neither.")
        self.normalize = Normalize(*data.normalization(data_config))
        self.sources: list[Source] = []
        for name in (config.train, config.test):
            source = first_on_each_machine(accelerator, partial(open_source, name, data_config))
            self.sources.append(cached(source, data_config.cache, seed, memory))
        self.numbers = same_classes(*self.sources, (config.train, config.test))
        if config.k > len(self.sources[0]):
            raise UserError(f"eval.k={config.k} is larger than the {len(self.sources[0])} images of {config.train}.")

    def __call__(self, encoder: Encoder) -> float:
        """Top-1 accuracy in percent, the same on every process."""
        pool, banks = encoder.pool, []
        for source, numbers in zip(self.sources, (None, self.numbers), strict=True):
            features = extract(encoder, source, self.normalize, self.accelerator, (pool,), whole=False)[pool]
            banks.append(
                labelled(features, features.labels if numbers is None else renumbered(features.labels, numbers))
            )
        k, classes = self.config.k, len(self.sources[0].classes)
        return top(classify(*banks, classes, (k,), (TEMPERATURE,))[k, TEMPERATURE].place, 1)
