"""Measurements of the encoder during training: k-NN by the protocol of `sslvit knn`. Without labels the effective rank
of its features, and for a run that continues from pretrained weights whether two views of an image are neighbours."""

import itertools
import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor

from .. import data, rng
from ..data import Source, open_source
from ..data.augment import Normalize, augment
from ..data.cache import MemoryBudget, cached
from ..data.crops import Crop
from ..data.depth import DARK, dark_sentence, range_that_fits
from ..data.loader import Cropped
from ..distributed import gather_objects, say
from ..errors import UserError
from ..hardware import first_on_each_machine
from ..model.encoder import Encoder
from .classes import align_classes
from .config import Online as Config
from .features import CentreCropped, extract
from .knn import TEMPERATURE, classify, labelled, top_accuracy
from .quality import effective_rank
from .subset import Subset


class KnnMonitor:
    """Classifies `test` by its neighbours in `train`. Opens the sources at once, so mistakes show at the start of the
    run."""

    KEY = "knn/top1"  # in metrics.jsonl

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

    def line(self, value: float) -> str:
        return f"k-NN {value:.1f}% (k={self.config.k}) of {self.config.test}"

    def __call__(self, encoder: Encoder) -> float:
        """Top-1 accuracy in percent, the same on every process."""
        pool, k = encoder.pool, self.config.k
        bank, queries = (
            labelled(extract(encoder, source, self.normalize, self.accelerator, (pool,), whole=False)[pool])
            for source in self.sources
        )
        found = classify(bank, queries, len(self.sources[0].classes), (k,), (TEMPERATURE,))
        return top_accuracy(found[k, TEMPERATURE].rank, 1)


class ViewMonitor:
    """What stands for k-NN where there are no labels: whether an image is found by another view of itself, and rank.

    Images that are never trained on are cut, flipped and changed in colour four times, always in the same way. The
    nearest to a view, among another view of all images, should be that of the same image. The score is the geometric
    mean of the share of images for which it is, and of the effective rank as a share of the width.

    It tells ruin, and does not rank good states. On CIFAR-10 (configs/continue.yaml; 1,000 images) the start had 34.5;
    two states with k-NN within 0.6 points of its own had 35.4 and 36.8; after a rate times 30, k-NN fell from 67 to 40
    % and the score to 2.8. Differences of a point are noise. Neighbours cannot decide: those that two views share, and
    those that the start had, became fewer while k-NN rose (8.3 to 7.9 %, 100 to 46 %; k-NN 71.2 to 73.6 %).
    """

    KEY, WHAT = "score/unlabelled", "score without labels"  # in metrics.jsonl, and in words
    FEWEST, MOST = 32, 1000  # images that are held out, else a tenth of all
    BATCH = 64

    def __init__(self, held_out: Source, data_config: data.Config, seed: int, accelerator: Accelerator) -> None:
        crop = partial(Crop, jitter=(0.4, 0.4, 0.2, 0.1), jitter_prob=0.8, gray_prob=0.2)  # as in quality.py
        self.views = {"view": [crop(data.image_size(data_config), (0.4, 1.0))] * 4}
        self.normalize, self.accelerator = Normalize(*data.normalization(data_config)), accelerator
        mine = torch.arange(accelerator.process_index, len(held_out), accelerator.num_processes)
        crops = Cropped(held_out, self.views, seed)
        self.batches = [batch for part in mine.split(self.BATCH) if not (batch := crops[0, part]).pop("failed", False)]

    def line(self, value: float) -> str:
        return f"{self.WHAT} {value:.1f}%"

    @torch.inference_mode()
    def __call__(self, encoder: Encoder) -> float:
        """Percent, the same on every process; 0 if a feature is not finite."""
        was_training, parts = encoder.training, []
        encoder.eval()
        for batch in self.batches:
            x = augment(batch, self.views, self.normalize, self.accelerator.device)["view"]
            with self.accelerator.autocast(), torch.compiler.set_stance("force_eager"):
                parts.append(encoder.features(x.flatten(0, 1)).float().cpu().unflatten(0, x.shape[:2]))
        encoder.train(was_training)
        views = torch.cat([part for parts in gather_objects(parts) for part in parts], dim=1)
        return unlabelled_score(views) if torch.isfinite(views).all() else 0.0


def unlabelled_score(views: Tensor) -> float:
    """[V, N, D] -> percent: 100 if all images are found by another view and all of the width is used."""
    rank = effective_rank(torch.linalg.svdvals(views.flatten(0, 1).double()))
    return 100 * (found_again(views) * rank / views.shape[-1]) ** 0.5


def found_again(views: Tensor) -> float:
    """[V, N, D] -> share of the images whose one view is nearer to their other one than to that of any other image."""
    unit, own = F.normalize(views, dim=-1), torch.arange(views.shape[1])
    pairs = itertools.permutations(unit, 2)
    return torch.stack([((one @ other.T).argmax(dim=1) == own).double().mean() for one, other in pairs]).mean().item()


# Shares of the variance of all pixels of a set of images. CIFAR-10, fractals and photos: 0.97 and more between images
# at a place, 0.6 and more within an image.
SAME, FLAT = 0.05, 1e-6
Monitor = KnnMonitor | ViewMonitor


def monitor(config: Any, held_out: Source | None, budget: MemoryBudget, accelerator: Accelerator) -> Monitor | None:
    """What a RunConfig asks for. held_out: see there."""
    if config.eval.train or config.eval.test:
        return KnnMonitor(config.eval, config.data, config.seed, budget, accelerator)
    return ViewMonitor(held_out, config.data, config.seed, accelerator) if held_out else None


def hold_out(source: Source, config: Any) -> tuple[Source, Source | None]:
    """The images to train on and, if a RunConfig keeps its best checkpoint without labels, those of a ViewMonitor."""
    return _parts(source, config) if config.save.keep_best and not config.eval.test else (source, None)


def _parts(source: Source, config: Any) -> tuple[Source, Source]:
    count = min(len(source) // 10, ViewMonitor.MOST)
    if count < ViewMonitor.FEWEST:
        raise UserError(
            f"save.keep_best=true without labels holds a tenth of the images out, and {config.data.train} has only "
            f"{len(source)}: give {10 * ViewMonitor.FEWEST} or more, or eval.train and eval.test, or keep_best=false."
        )
    say(f"{count} of the {len(source)} images are held out, to compare the encoder with its start.")
    order = rng.permutation(rng.fold_in(config.seed, "held_out"), len(source))
    return Subset(source, order[count:].sort().values), Subset(source, order[:count].sort().values)


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
    elif len(images) > 1 and (reason := nearly_the_same(images)):
        yield f"Warning: an encoder learns from how images differ, and {reason}. Look at them: sslvit data <images>."
    largest = float(images.max())
    if images.is_floating_point() and largest < DARK:
        fits = range_that_fits(source, index, source.read(index), largest)
        if fits:
            yield f"Warning: {dark_sentence(fits, largest)}"


def nearly_the_same(images: Tensor) -> str:
    """What is wrong with images [N, C, h, w] that hold too little to learn from; "" if nothing is."""
    x = images[:, :, ::4, ::4].double()
    total, between = x.var(dim=(0, 2, 3), correction=0).mean(), x.var(dim=0, correction=0).mean()
    if x.var(dim=(2, 3), correction=0).mean() < FLAT * total:
        return f"all {len(x)} that were looked at are blank, each of one colour"
    return f"all {len(x)} that were looked at are nearly the same" if between < SAME * total else ""


def rank_alarm(rankme: float) -> str | None:
    """A warning with advice if the effective rank shows a collapse of the features, else None. On CIFAR-10 (width 192)
    untrained encoders have 17 to 20, and the first steps of the recipes 5.8 or more (MAE, step 10)."""
    if rankme >= 1.5:
        return None
    return (
        f"The features have collapsed to one direction: their effective rank (RankMe) is {rankme:.2f}. Lower optim."
        "base_lr, warm it up longer, or spread the features with objective.koleo_weight=0.05."
    )
