"""Measurements of the encoder during training: k-NN by the protocol of `sslvit knn`, and the effective rank of its
features, which needs no labels."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from accelerate import Accelerator
from torch import Tensor

from .. import data, rng
from ..data import Source, open_source
from ..data.augment import Normalize
from ..data.cache import MemoryBudget, cached
from ..data.depth import DARK, dark_sentence, range_that_fits
from ..distributed import gather_objects, say
from ..errors import Limits, UserError
from ..hardware import first_on_each_machine
from ..model.encoder import Encoder
from .classes import align_classes
from .features import CentreCropped, extract
from .knn import TEMPERATURE, classify, labelled, top_accuracy
from .quality import effective_rank


@dataclass
class Config:
    train: str = ""  # labelled images, a folder or a set by name: the neighbours; empty: no evaluation during the run
    test: str = ""  # labelled images to classify, never trained on
    every_epochs: float | None = None  # null: before the first step and after the last only
    k: int = 20  # neighbours that vote

    LIMITS: ClassVar[Limits] = [(0, None, "every_epochs"), (1, None, "k")]


class KnnMonitor:
    """Classifies `test` by its neighbours in `train`. Opens the sources at once, so mistakes show at the start of the
    run."""

    def __init__(
        self, config: Config, data_config: data.Config, seed: int, budget: MemoryBudget, accelerator: Accelerator
    ) -> None:
        self.config, self.data_config, self.accelerator = config, data_config, accelerator
        if not (config.train and config.test):
            missing = "eval.test" if config.train else "eval.train"
            raise UserError(f"{missing} is empty: k-NN during the run needs eval.train and eval.test, or neither.")
        self.normalize = Normalize(*data.normalization(data_config))
        specs = config.train, config.test
        train, test = (first_on_each_machine(accelerator, partial(open_source, spec, data_config)) for spec in specs)
        test = align_classes(train, test, specs)
        self.sources = [cached(source, data_config.cache, seed, budget) for source in (train, test)]
        if config.k > len(train):
            raise UserError(f"eval.k={config.k} is larger than the {len(train)} images of {config.train}.")

    def __call__(self, encoder: Encoder) -> float:
        """Top-1 accuracy in percent, the same on every process."""
        pool, k = encoder.pool, self.config.k
        bank, queries = (
            labelled(extract(encoder, source, self.normalize, self.accelerator, (pool,), whole=False)[pool])
            for source in self.sources
        )
        found = classify(bank, queries, len(self.sources[0].classes), (k,), (TEMPERATURE,))
        return top_accuracy(found[k, TEMPERATURE].rank, 1)


class RankMonitor:
    """RankMe (see quality.py) of a fixed random set of training images. They stay in memory, resized and cropped, so
    measuring often is cheap."""

    IMAGES = 512
    BATCH = 64

    def __init__(
        self, source: Source, encoder: Encoder, normalize: Normalize, seed: int, accelerator: Accelerator
    ) -> None:
        self.accelerator, self.normalize = accelerator, normalize
        places = torch.arange(min(len(source), self.IMAGES))[accelerator.process_index :: accelerator.num_processes]
        chosen = CentreCropped(source, rng.shuffled(rng.fold_in(seed, "rank"), len(source), places), encoder.image_size)
        pairs = [(n, image) for n, image in (chosen[place] for place in range(len(chosen))) if image is not None]
        self.images = torch.stack([image for _, image in pairs]) if pairs else torch.zeros(0)
        if pairs:
            say(*warnings_of(source, pairs[0][0], self.images))

    @torch.inference_mode()
    def __call__(self, encoder: Encoder) -> float:
        """Between 1 and the width, the same on every process; nan if a feature is not finite."""
        was_training = encoder.training
        encoder.eval()
        parts = []
        for images in self.images.split(self.BATCH) if len(self.images) else ():
            x = self.normalize(images.to(self.accelerator.device).float() / 255)
            with self.accelerator.autocast(), torch.compiler.set_stance("force_eager"):
                parts.append(encoder.features(x).float().cpu())
        encoder.train(was_training)
        values = torch.cat([part for parts in gather_objects(parts) for part in parts]).double()
        return effective_rank(torch.linalg.svdvals(values)) if torch.isfinite(values).all() else math.nan


def warnings_of(source: Source, index: int, images: Tensor) -> Iterator[str]:
    """Warnings about images that are all the same, or nearly black. images: [N, C, h, w]; index: of one
    that can be read."""
    if len(source) == 1 or (len(images) > 1 and (images == images[:1]).all()):
        what = f"all {len(images)} that were looked at are the same" if len(images) > 1 else "there is only one"
        yield f"Warning: an encoder learns from how images differ, and {what}."
    largest = float(images.max())
    if images.is_floating_point() and largest < DARK:
        fits = range_that_fits(source, index, source.read(index), largest)
        if fits:
            yield f"Warning: {dark_sentence(fits, largest)}"


def rank_alarm(rankme: float) -> str | None:
    """A warning with advice if the effective rank shows a collapse of the features, else None. On CIFAR-10 (width 192)
    untrained encoders have 17 to 20, and the first steps of the recipes 5.8 or more (MAE, step 10)."""
    if rankme >= 1.5:
        return None
    return (
        f"The features have collapsed to one direction: their effective rank (RankMe) is {rankme:.2f}. Lower optim."
        "base_lr, warm it up longer, or spread the features with objective.koleo_weight=0.05."
    )
