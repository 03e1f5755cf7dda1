"""What evaluations with labelled images share: the training and test images, and the features of both.

frozen, split = open_split(config, "knn")                    # an encoder, and images with the same class numbers
task = extract_split(frozen, split, "knn", config.cache)     # the features of all images
task.save(results)                                           # <run>/eval/knn.json
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..data import Source
from ..distributed import gather_objects, say
from ..errors import UserError
from ..model.encoder import Pool
from ..pretrained import Pixels
from .classes import align_classes, check_readable
from .config import LabelledConfig as Config
from .config import LabelledSets
from .feature_cache import same_images
from .features import Features, gather_features
from .frozen import Frozen, describe_pool, load_frozen
from .records import describe_set


@dataclass
class Split:
    """Labelled training and test images. The labels of both are class numbers of the training set."""

    train: Source
    test: Source  # the training images themselves for leave-one-out: each is tested by all the others
    specs: tuple[str, str]  # as the user named them

    @property
    def leave_one_out(self) -> bool:
        return self.test is self.train

    @property
    def classes(self) -> list[str]:
        return self.train.classes


def open_split(config: Config, evaluation: str, leave_one_out: bool = False) -> tuple[Frozen, Split]:
    """Load the encoder and open both sets of images. Raises UserError.

    leave_one_out: whether data.test may be missing; the training images are then both sets.
    """
    specs = named_sets(config.data, evaluation, leave_one_out)
    frozen = load_frozen(config)
    train = frozen.open(specs[0], config.data.download_dir)
    test = frozen.open(specs[1], config.data.download_dir) if config.data.test else train
    split = Split(train, align_classes(train, test, specs), specs)
    if not split.leave_one_out:
        refuse_same_images(train, test, specs, ", or leave data.test out" * leave_one_out)
    chosen_on = frozen.subject.chosen_on
    if chosen_on and Path(chosen_on).expanduser().resolve() == Path(specs[1]).expanduser().resolve():
        frozen.note = (
            f"This checkpoint was chosen by its k-NN accuracy on {specs[1]} (save.keep_best), so a result on the same "
            "images is too high: measure it on other test images."
        )
    return frozen, split


def named_sets(data: LabelledSets, evaluation: str, leave_one_out: bool = False) -> tuple[str, str]:
    """The training and test images that the user named; with `leave_one_out` one set may be both. Raises UserError."""
    test = data.test or (data.train if leave_one_out else "")
    for key, spec in (("train", data.train), ("test", test)):
        if not spec:
            raise UserError(
                f"data.{key} is missing: {evaluation} needs labelled images, data.train=<folder> data.test=<folder>."
            )
    return data.train, test


def refuse_same_images(train: Source, test: Source, specs: tuple[str, str], otherwise: str = "") -> None:
    """Raises UserError for test images that are the training images. otherwise: what else could be done."""
    if same_images(train, test):
        raise UserError(f"data.test={specs[1]} are the training images: give other images{otherwise}.")


@dataclass
class Task:
    """Frozen features of a split. Each process has its share of them."""

    frozen: Frozen
    evaluation: str
    classes: list[str]
    sets: dict[Pool, tuple[Features, Features]]  # train and test, by each way of pooling
    details: dict[str, Any]  # of the images, for the record

    @property
    def train(self) -> Features:
        """This process's share, by the first way of pooling."""
        return next(iter(self.sets.values()))[0]

    @property
    def test(self) -> Features:
        return next(iter(self.sets.values()))[1]

    def whole(self, pool: Pool) -> tuple[Features, Features]:
        """Train and test by one way of pooling: all of it on the first process, empty on the others. All call it."""
        train, test = self.sets[pool]
        return gather_features(train, everywhere=False), gather_features(test, everywhere=False)

    def save(self, results: dict[str, Any]) -> None:
        self.frozen.save(self.evaluation, results, **self.details)


def extract_split(frozen: Frozen, split: Split, evaluation: str, cache: bool, pools: Sequence[Pool] = ()) -> Task:
    """The features of both sets by each way of pooling, by default the configured one. Raises UserError."""
    began, pools = time.perf_counter(), pools or (frozen.pool,)
    train = frozen.extract(split.train, pools, cache, whole=False)
    test = train if split.leave_one_out else frozen.extract(split.test, pools, cache, whole=False)
    description = "; ".join(describe_pool(pool) for pool in pools)
    if isinstance(frozen.encoder, Pixels):  # without it, the brightness that all images share decides
        train, test = without_mean_image(train["pooled"], test["pooled"])
        description = "pixels minus the mean training image"
    first, second = train[pools[0]], test[pools[0]]
    check_readable(first.labels, second.labels, split.specs)
    images = [sum(gather_objects(len(part))) for part in (first, second)]
    say(
        f"{evaluation} of {frozen.config.run}: {description}, {frozen.precision}; {images[0]} training and {images[1]} "
        f"test images in {len(split.classes)} classes"
    )
    details = {
        "features": description, "width": first.values.shape[1], "classes": len(split.classes),
        "train": describe_set(split.specs[0], images[0], first.unreadable),
        "test": describe_set(split.specs[1], images[1], second.unreadable),
        "feature_seconds": round(time.perf_counter() - began, 1),
    }  # fmt: skip
    return Task(frozen, evaluation, split.classes, {pool: (train[pool], test[pool]) for pool in pools}, details)


def without_mean_image(train: Features, test: Features) -> tuple[dict[Pool, Features], dict[Pool, Features]]:
    """Pixels minus the mean of the training images of all processes."""
    sums = gather_objects((train.values.double().sum(dim=0), len(train)))
    mean = (sum(total for total, _ in sums) / sum(count for _, count in sums)).float()
    train, test = (replace(features, values=features.values - mean) for features in (train, test))
    return {"pooled": train}, {"pooled": test}
