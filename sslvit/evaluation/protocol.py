"""What all evaluations share: the encoder, the images, and how a result is written down."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from accelerate import Accelerator
from torch import Tensor

from .. import pretrained
from ..data import Source, open_source
from ..data.augment import Normalize
from ..distributed import gather_objects, rank, say
from ..errors import UserError, check_range
from ..hardware import (
    Precision,
    choose_attention,
    first_on_each_machine,
    resolve_precision,
    start_accelerator,
    versions,
)
from ..model.encoder import Encoder, Pool
from ..pretrained import Pixels, Pretrained
from .classes import check_readable, match_classes, remap_labels
from .feature_cache import extract_cached, same_images
from .features import Features, gather_features

# Keys that change how a result is computed, but not what it is.
NOT_SETTINGS = ("run", "data", "out", "cache", "workers", "batch_size", "picture", "download_dir", "seed")
POOL_NAMES = {
    "cls": "class token",
    "mean": "mean of patches",
    "cls+mean": "class token and mean of patches",
    "last4": "class tokens of the last four blocks",
    "mean4": "means of patches of the last four blocks",
    "pooled": "the model's pooled features",
}


@dataclass
class LabelledSets:
    train: str = ""  # labelled images to learn from: a folder with one sub-folder for each class, or a set by name
    test: str = ""  # labelled images on which the result is measured
    download_dir: str = "~/.cache/sslvit"  # where torchvision's data sets are stored


@dataclass
class EncoderConfig:
    """Which encoder is measured, and how it is run."""

    run: str = ""  # a run, its checkpoint, untrained:<run>, an exported folder, timm:<name>, random:<name>, pixels
    pool: Literal["auto", "cls", "mean", "cls+mean", "last4", "mean4", "pooled"] = "auto"  # of tokens; auto: as trained
    image_size: int | tuple[int, int] | None = None  # for timm:, random: and pixels only; null: the model's own
    model_args: dict[str, Any] = field(default_factory=dict)  # for timm: and random: only, for example {patch_size: 4}
    batch_size: int = 256  # images at once
    workers: int | None = None  # processes that load images; null: by the number of cores
    precision: Precision = "auto"  # of the encoder; auto: bf16 where the hardware is fast at it, else float32
    seed: int = 0  # of the held-out part, of the heads, and of the weights of random:
    out: str = ""  # file for the result; empty: <run>/eval/<name>.json, for untrained: <run>/eval/untrained/<name>.json


@dataclass
class Config(EncoderConfig):
    data: LabelledSets = field(default_factory=LabelledSets)
    cache: bool = True  # keep the features in <run>/eval/features, for the next evaluation of the same weights


@dataclass
class Frozen:
    """A frozen encoder on its device."""

    subject: Pretrained
    pool: Pool
    accelerator: Accelerator
    precision: str

    @property
    def encoder(self) -> Encoder | Pixels:
        return self.subject.encoder

    @property
    def normalize(self) -> Normalize:
        return Normalize(self.subject.mean, self.subject.std)

    def cache_folder(self, cache: bool) -> Path | None:
        """Where features are kept for the next evaluation; None: nowhere."""
        return self.subject.results / "features" if cache and self.subject.results else None

    def describe(self) -> str:
        """What its features are, for people."""
        return "pixels minus the mean image" if isinstance(self.encoder, Pixels) else describe_pool(self.pool)

    def open(self, spec: str, download_dir: str = "~/.cache/sslvit") -> Source:
        """The images that the user named, with the channels that the encoder takes. Raises UserError."""
        data_config = replace(self.subject.data_config, download_dir=download_dir)
        try:
            return first_on_each_machine(self.accelerator, partial(open_source, spec, data_config))
        except UserError as error:
            if "data.in_chans" not in str(error):
                raise
            raise UserError(  # a key that evaluations do not have
                f"{spec} has images of other channels than the {data_config.in_chans} that run={self.subject.name} "
                "takes: give images or an encoder that fit."
            ) from error

    def open_both(
        self, config: Config, specs: tuple[str, str], leave_one_out: bool = False
    ) -> tuple[Source, Source, Tensor]:
        """Labelled training and test images, and [classes of the test set] the training set's number of each class.
        Raises UserError.

        leave_one_out: without data.test the training images are both sets.
        """
        train = self.open(specs[0], config.data.download_dir)
        test = self.open(specs[1], config.data.download_dir) if config.data.test else train
        mapping = match_classes(train, test, specs)
        if config.data.test or not leave_one_out:
            refuse_same_images(train, test, specs, ", or leave data.test out" * leave_one_out)
        return train, test, mapping

    def features(self, source: Source, config: EncoderConfig, cache: bool, subtract_mean: bool = True) -> Features:
        """Features of a source, from the file of an earlier evaluation if there is one. Raises UserError.

        subtract_mean: of raw pixels, whose similarity would else be that of their brightness.
        """
        found = extract_cached(
            self.cache_folder(cache), self.encoder, source, self.normalize, self.accelerator, (self.pool,),
            config.batch_size, config.workers,
        )[self.pool]  # fmt: skip
        if subtract_mean and isinstance(self.encoder, Pixels):
            found = replace(found, values=found.values - found.values.mean(dim=0))
        return found


@dataclass
class Task:
    """Frozen features of both sets, of which each process has its share. Labels are numbers of the training set's
    classes."""

    frozen: Frozen
    sets: dict[Pool, tuple[Features, Features]]  # train and test, by each way of pooling
    classes: list[str]
    record: dict[str, Any]  # see make_record; without results

    @property
    def train(self) -> Features:
        """This process's share, by the first way of pooling."""
        return next(iter(self.sets.values()))[0]

    @property
    def test(self) -> Features:
        return next(iter(self.sets.values()))[1]

    def whole(self, pool: Pool) -> tuple[Features, Features] | None:
        """Train and test by one way of pooling, of all processes, on the first; None on the others. All call it."""
        train, test = (gather_features(part, everywhere=False) for part in self.sets[pool])
        return None if train is None or test is None else (train, test)


def load(config: EncoderConfig) -> Frozen:
    """Load the encoder and put it on its device. Raises UserError."""
    check_range("", config, 1, None, "batch_size", "image_size")
    check_range("", config, 0, None, "workers")
    check_out(config.out)
    subject = pretrained.load(config.run, config.image_size, config.model_args, config.seed)
    encoder = subject.encoder
    pool = cast(Pool, encoder.pool if config.pool == "auto" else config.pool)
    _check_pool("pool", pool, encoder, config)
    accelerator = start_accelerator(config.precision, long_waits=True)
    precision = resolve_precision(config.precision, accelerator.device)
    encoder.to(accelerator.device)
    choose_attention(encoder, accelerator.device, precision)
    return Frozen(subject, pool, accelerator, precision)


def _check_pool(key: str, pool: str, encoder: Encoder | Pixels, config: EncoderConfig) -> None:
    if pool not in encoder.pools():
        raise UserError(f"{key}={pool} is not something that {config.run} has: use {', '.join(encoder.pools())}.")


def prepare(
    config: Config, name: str, pools: Sequence[Pool] | None = None, leave_one_out: bool = False,
    check: Callable[[int], None] | None = None,
) -> Task:  # fmt: skip
    """Load the encoder, open the images, compute the features. Raises UserError, before the features where it can.

    pools: ways of pooling; None: the configured one, (): all that the encoder has. leave_one_out: without data.test the
    training images are both sets. check: is called with the number of training images, before the features.
    """
    began = time.perf_counter()
    specs = set_specs(config, name, leave_one_out)
    frozen = load(config)
    encoder = frozen.encoder
    for pool in pools or ():
        _check_pool("pools", pool, encoder, config)
    pools = tuple((frozen.pool,) if pools is None else pools or encoder.pools())
    train_source, test_source, mapping = frozen.open_both(config, specs, leave_one_out)
    if check:
        check(len(train_source))

    def compute(source: Source) -> dict[Pool, Features]:
        return extract_cached(
            frozen.cache_folder(config.cache), encoder, source, frozen.normalize, frozen.accelerator, pools,
            config.batch_size, config.workers, whole=False,
        )  # fmt: skip

    train = compute(train_source)
    test = train if test_source is train_source else compute(test_source)
    description = "; ".join(describe_pool(pool) for pool in pools)
    if isinstance(encoder, Pixels):  # else the brightness that all images share decides
        train, test = without_mean_image(train["pooled"], test["pooled"])
        description = "pixels minus the mean training image"
    if test_source is not train_source:
        labels = remap_labels(test[pools[0]].labels, mapping)
        test = {pool: replace(part, labels=labels, classes=train_source.classes) for pool, part in test.items()}
    sets = {pool: (train[pool], test[pool]) for pool in pools}
    first, second = sets[pools[0]]
    check_readable(first.labels, second.labels, specs)
    images = [sum(gather_objects(len(part))) for part in (first, second)]
    record = make_record(
        config, frozen, name, settings=settings_of(config), features=description, width=first.values.shape[1],
        train=describe_set(specs[0], images[0], first.unreadable),
        test=describe_set(specs[1], images[1], second.unreadable),
        classes=len(train_source.classes), feature_seconds=round(time.perf_counter() - began, 1),
    )  # fmt: skip
    say(
        f"{name} of {config.run}: {description}, {frozen.precision}; {images[0]} training and {images[1]} test images "
        f"in {record['classes']} classes"
    )
    return Task(frozen, sets, train_source.classes, record)


def set_specs(config: Config, name: str, leave_one_out: bool = False) -> tuple[str, str]:
    """What the user gave as training and test images; with `leave_one_out` the first may be both. Raises UserError."""
    train, test = config.data.train, config.data.test
    for key, spec in (("train", train), ("test", test or (train if leave_one_out else ""))):
        if not spec:
            raise UserError(
                f"data.{key} is missing: {name} needs labelled images, data.train=<folder> data.test=<folder>."
            )
    return train, test or train


def refuse_same_images(train: Source, test: Source, specs: tuple[str, str], otherwise: str = "") -> None:
    """Raises UserError for test images that are the training images. otherwise: what else could be done."""
    if same_images(train, test):
        raise UserError(f"data.test={specs[1]} are the training images: give other images{otherwise}.")


def without_mean_image(train: Features, test: Features) -> tuple[dict[Pool, Features], dict[Pool, Features]]:
    """Pixels minus the mean of the training images of all processes."""
    sums = gather_objects((train.values.double().sum(dim=0), len(train)))
    mean = (sum(total for total, _ in sums) / sum(count for _, count in sums)).float()
    train, test = (replace(features, values=features.values - mean) for features in (train, test))
    return {"pooled": train}, {"pooled": test}


def describe_pool(pool: str) -> str:
    return POOL_NAMES[pool]


def settings_of(config: EncoderConfig) -> dict[str, Any]:
    """The keys of a configuration that a result depends on, for its record."""
    return {name: value for name, value in asdict(config).items() if name not in NOT_SETTINGS}


def describe_set(spec: str, images: int, unreadable: int | None = None, **more: Any) -> dict[str, Any]:
    """A set of images, for a record. images: those that were read."""
    counted = {} if unreadable is None else {"unreadable": unreadable}
    return {"data": spec, "images": images, **counted, **more}


def make_record(config: EncoderConfig, frozen: Frozen, evaluation: str, **more: Any) -> dict[str, Any]:
    """How a result was measured, as JSON values. `more` adds to it or replaces parts of it, and holds the results."""
    return {
        "evaluation": evaluation,
        "run": config.run,
        **frozen.subject.detail,
        "features": frozen.describe(),
        "image_size": list(frozen.encoder.image_size),
        "precision": frozen.precision,
        "seed": config.seed,
        "versions": versions(),
        **more,
    }


def save_record(config: EncoderConfig, frozen: Frozen, record: dict[str, Any]) -> Path | None:
    """Write a record as JSON, on the first process: to `out=`, or to <evaluation>.json beside the run's other results.
    Raises UserError."""
    folder = frozen.subject.results
    if config.out:
        path = Path(config.out).expanduser()
    elif folder:
        path = folder / f"{record['evaluation']}.json"
    else:
        say("The result is printed only: out=<file> keeps it.")
        return None
    if rank() == 0:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"The result cannot be written to {path}: {error.strerror}.") from error
    say(f"written to {path}")
    return path


def check_out(path: str) -> None:
    """Refuse a file for results that could not be written, or that is somebody else's, before the work. Raises
    UserError."""
    file = Path(path).expanduser()
    if not path:
        return
    if file.is_dir() or not file.parent.is_dir():
        raise UserError(f"out={path} must be a file in a folder that exists.")
    if file.exists():
        try:
            ours = {"results", "evaluation"} & set(json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            ours = set()
        if not ours:
            raise UserError(f"out={path} exists and holds no result of sslvit: give another name.")


def pack_bits(right: Tensor) -> str:
    """[N] bool, whether each test image was classified rightly -> their number, and hexadecimal, eight to two digits.

    With these of two runs on the same images, `sslvit compare` gives the interval of their difference.
    """
    return f"{len(right)}:{np.packbits(right.cpu().numpy()).tobytes().hex()}"


def unpack_bits(text: str) -> np.ndarray:
    """What `pack_bits` was given: [N] bool."""
    count, digits = text.split(":")
    return np.unpackbits(np.frombuffer(bytes.fromhex(digits), dtype=np.uint8), count=int(count)).astype(bool)


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    """Right-aligned columns."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in [header, *rows]]
