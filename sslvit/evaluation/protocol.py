"""What all evaluations share: which encoder, which images, and how a result is written down."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from accelerate import Accelerator
from torch import Tensor

from .. import pretrained
from ..augment import Normalize
from ..data import Source, open_source
from ..distributed import gather_objects, rank, say
from ..encoder import Pool
from ..errors import UserError, check_range
from ..hardware import (
    Precision,
    choose_attention,
    first_on_each_machine,
    resolve_precision,
    start_accelerator,
    versions,
)
from ..pretrained import Pixels, Pretrained
from .classes import check_read, renumbered, same_classes
from .features import Features, gathered
from .kept import extract_cached, same_images


@dataclass
class Sets:
    train: str = ""  # labelled images to learn from: a folder with a sub-folder for each class, or a set by name
    test: str = ""  # labelled images to be judged on
    download_dir: str = "~/.cache/sslvit"  # where torchvision's data sets are or will be


@dataclass
class Subject:
    """Which encoder is measured, and how it is run."""

    run: str = ""  # a run, its checkpoint, untrained:<run>, an exported folder, timm:<name>, random:<name>, pixels
    pool: Literal["auto", "cls", "mean", "cls+mean", "last4", "mean4", "pooled"] = "auto"  # of tokens; auto: as trained
    image_size: int | tuple[int, int] | None = None  # for timm:, random: and pixels only; null: the model's own
    model_args: dict[str, Any] = field(default_factory=dict)  # for timm: and random: only, such as {patch_size: 4}
    batch_size: int = 256  # images at once
    workers: int | None = None  # processes that load images; null: by the number of cores
    precision: Precision = "auto"  # of the encoder; auto: bf16 where the hardware is fast at it, else float32
    seed: int = 0  # of the held-out part, of the heads, and of the weights of random:
    out: str = ""  # file for the result; empty: <run>/eval/<name>.json, for untrained: <run>/eval/untrained/<name>.json


@dataclass
class Config(Subject):
    data: Sets = field(default_factory=Sets)
    cache: bool = True  # keep the features in <run>/eval/features, for the next evaluation of the same weights


@dataclass
class Frozen:
    """An encoder on its device, with what running it needs."""

    subject: Pretrained
    pool: Pool
    accelerator: Accelerator
    precision: str

    @property
    def normalize(self) -> Normalize:
        return Normalize(self.subject.mean, self.subject.std)

    def kept(self, cache: bool) -> Path | None:
        """Where features are kept for the next evaluation; null for nowhere."""
        return self.subject.results / "features" if cache and self.subject.results else None

    def open(self, word: str, download_dir: str = "~/.cache/sslvit") -> Source:
        """The images that a word stands for, in the channels that the encoder takes. Raises UserError."""
        wanted = replace(self.subject.data_config, download_dir=download_dir)
        try:
            return first_on_each_machine(self.accelerator, partial(open_source, word, wanted))
        except UserError as error:
            if "data.in_chans" not in str(error):
                raise
            raise UserError(  # a key that evaluations do not have
                f"{word} has images of other channels than the {wanted.in_chans} that run={self.subject.name} takes: "
                "give images or an encoder that fit."
            ) from error

    def open_both(self, config: "Config", words: tuple[str, str], alone: bool = False) -> tuple[Source, Source, Tensor]:
        """Labelled training and test images, and the training set's number of each class of the test set. Raises
        UserError.

        alone: without data.test the training images are both.
        """
        train = self.open(words[0], config.data.download_dir)
        test = self.open(words[1], config.data.download_dir) if config.data.test else train
        numbers = same_classes(train, test, words)
        if config.data.test or not alone:
            refuse_same(train, test, words, ", or leave data.test out" * alone)
        return train, test, numbers


@dataclass
class Task:
    """Frozen features of both sets, of which each process has its share, with labels by the training set's classes."""

    frozen: Frozen
    sets: dict[Pool, tuple[Features, Features]]  # train and test, by each way of pooling
    classes: list[str]
    record: dict[str, Any]  # the protocol, for the result

    @property
    def subject(self) -> Pretrained:
        return self.frozen.subject

    @property
    def train(self) -> Features:
        """This process's share, by the first way of pooling."""
        return next(iter(self.sets.values()))[0]

    @property
    def test(self) -> Features:
        return next(iter(self.sets.values()))[1]

    def whole(self, pool: Pool) -> tuple[Features, Features] | None:
        """Train and test by one way of pooling, of all processes, on the first; None on the others. All call it."""
        train, test = (gathered(part, everywhere=False) for part in self.sets[pool])
        return (train, test) if rank() == 0 else None


def load(config: Subject) -> Frozen:
    """Load the encoder and put it on its device. Raises UserError."""
    check_range("", config, 1, None, "batch_size", "image_size")
    check_range("", config, 0, None, "workers")
    check_out(config.out)
    subject = pretrained.load(config.run, config.image_size, config.model_args, config.seed)
    encoder = subject.encoder
    pool = encoder.pool if config.pool == "auto" else config.pool
    if pool not in encoder.pools():
        raise UserError(f"pool={pool} is not something that {config.run} has: use {', '.join(encoder.pools())}.")
    accelerator = start_accelerator(config.precision, patient=True)
    precision = resolve_precision(config.precision, accelerator.device)
    encoder.to(accelerator.device)
    choose_attention(encoder, accelerator.device, precision)
    return Frozen(subject, pool, accelerator, precision)


def prepare(
    config: Config, name: str, pools: Sequence[Pool] | None = None, alone: bool = False,
    check: Callable[[int], None] | None = None,
) -> Task:  # fmt: skip
    """Load the encoder, open the images, compute the features. Raises UserError before the features where it can.

    pools: ways of pooling; null: the configured one, (): all that the encoder has. alone: without data.test the
    training images are both sets. check: told the number of training images before the features are computed.
    """
    began = time.perf_counter()
    words = both_sets(config, name, alone)
    frozen = load(config)
    settings = settings_of(config)
    subject, accelerator, encoder = frozen.subject, frozen.accelerator, frozen.subject.encoder
    for pool in pools or ():
        if pool not in encoder.pools():
            raise UserError(f"pools: {pool} is not something that {config.run} has: use {', '.join(encoder.pools())}.")
    pools = tuple((frozen.pool,) if pools is None else pools or encoder.pools())
    train_source, test_source, numbers = frozen.open_both(config, words, alone)
    if check:
        check(len(train_source))

    def compute(source: Source) -> dict[Pool, Features]:
        return extract_cached(
            frozen.kept(config.cache),
            encoder,
            source,
            frozen.normalize,
            accelerator,
            pools,
            config.batch_size,
            config.workers,
            whole=False,
        )

    train = compute(train_source)
    test = train if test_source is train_source else compute(test_source)
    if isinstance(encoder, Pixels):  # else the brightness that all images share decides
        train, test = without_mean_image(train["pooled"], test["pooled"])
    if test is not train:
        mapped = {"labels": renumbered(test[pools[0]].labels, numbers), "classes": train_source.classes}
        test = {pool: replace(features, **mapped) for pool, features in test.items()}
    sets = {pool: (train[pool], test[pool]) for pool in pools}
    first, second = sets[pools[0]]
    check_read(first.labels, second.labels, words)
    record = {
        "evaluation": name,
        "run": config.run,
        "settings": settings,
        **subject.detail,
        "train": {"data": words[0], "images": sum(gather_objects(len(first))), "unreadable": first.unreadable},
        "test": {"data": words[1], "images": sum(gather_objects(len(second))), "unreadable": second.unreadable},
        "classes": len(train_source.classes),
        "features": "pixels minus the mean training image"
        if isinstance(encoder, Pixels)
        else "; ".join(describe_pool(pool) for pool in pools),
        "width": first.values.shape[1],
        "image_size": list(encoder.image_size),
        "precision": frozen.precision,
        "seed": config.seed,
        "versions": versions(),
        "feature_seconds": round(time.perf_counter() - began, 1),
    }
    say(
        f"{name} of {config.run}: {record['features']}, {frozen.precision}; {record['train']['images']} training and "
        f"{record['test']['images']} test images in {record['classes']} classes"
    )
    return Task(frozen, sets, train_source.classes, record)


def both_sets(config: Config, name: str, alone: bool = False) -> tuple[str, str]:
    """The words for training and test images; with `alone` the first may stand for both. Raises UserError."""
    words = (config.data.train, config.data.test or config.data.train if alone else config.data.test)
    for key, word in zip(("train", "test"), words, strict=True):
        if not word:
            raise UserError(
                f"data.{key} is missing: {name} needs labelled images, data.train=<folder> data.test=<folder>."
            )
    return words


# What changes how a result is got, but not what it is.
NOT_SETTINGS = ("run", "data", "out", "cache", "workers", "batch_size", "picture", "download_dir", "seed")


def settings_of(config: Subject) -> dict[str, Any]:
    """The keys of a configuration that a result depends on, for its record."""
    return {name: value for name, value in asdict(config).items() if name not in NOT_SETTINGS}


def refuse_same(train: Source, test: Source, words: tuple[str, str], otherwise: str = "") -> None:
    """Raises UserError for test images that are the training images. otherwise: what else could be done."""
    if same_images(train, test):
        raise UserError(f"data.test={words[1]} are the training images: give other images{otherwise}.")


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


def without_mean_image(train: Features, test: Features) -> tuple[dict[Pool, Features], dict[Pool, Features]]:
    """Pixels minus the mean of the training images, those of all processes if each holds a share."""
    sums = gather_objects((train.values.double().sum(dim=0), len(train)))
    mean = (sum(total for total, _ in sums) / sum(count for _, count in sums)).float()
    train, test = (replace(features, values=features.values - mean) for features in (train, test))
    return {"pooled": train}, {"pooled": test}


def packed(right: Tensor) -> str:
    """[N] bool, whether each test image was classified rightly -> their number, and hexadecimal, eight to two digits.

    With these of two runs on the same images, `sslvit compare` says how far their difference can be believed.
    """
    return f"{len(right)}:{np.packbits(right.cpu().numpy()).tobytes().hex()}"


def unpacked(text: str) -> np.ndarray:
    """What `packed` was given: [N] bool."""
    count, digits = text.split(":")
    return np.unpackbits(np.frombuffer(bytes.fromhex(digits), dtype=np.uint8), count=int(count)).astype(bool)


def describe_pool(pool: str) -> str:
    return {
        "cls": "class token",
        "mean": "mean of patches",
        "cls+mean": "class token and mean of patches",
        "last4": "class tokens of the last four blocks",
        "mean4": "means of patches of the last four blocks",
        "pooled": "the model's pooled features",
    }[pool]


def write(config: Subject, task: Task, name: str, results: Any) -> Path | None:
    """Write the result as JSON, on the first process: (protocol, results)."""
    return file(config, task.subject, name, {**task.record, "results": results})


def file(config: Subject, subject: Pretrained, name: str, record: dict[str, Any]) -> Path | None:
    """Write a record as JSON where the configuration or the run says, on the first process."""
    if not config.out and subject.results is None:
        say("The result is printed only: out=<file> keeps it.")
        return None
    path = Path(config.out).expanduser() if config.out else subject.results / f"{name}.json"
    if rank() == 0:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"The result cannot be written to {path}: {error.strerror}.") from error
    say(f"written to {path}")
    return path


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    """Right-aligned columns."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in [header, *rows]]
