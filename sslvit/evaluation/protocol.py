"""What all evaluations share: which encoder, which images, and how a result is written down."""

import json
import time
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from accelerate import Accelerator
from torch import Tensor

from .. import pretrained
from ..augment import Normalize
from ..data import Source, open_source
from ..distributed import rank, say
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
from .features import Features, align_labels, extract_cached


@dataclass
class Sets:
    train: str = ""  # labelled images to learn from: a folder with a sub-folder for each class, or a set by name
    test: str = ""  # labelled images to be judged on
    download_dir: str = "~/.cache/sslvit"  # where torchvision's data sets are or will be


@dataclass
class Subject:
    """Which encoder is measured, and how it is run."""

    run: str = ""  # a run directory, untrained:<run directory>, an exported folder, timm:<name>, random:<name>, pixels
    pool: Literal["auto", "cls", "mean", "cls+mean", "pooled"] = "auto"  # of the tokens; auto: the method's
    image_size: int | tuple[int, int] | None = None  # for timm:, random: and pixels only; null: the model's own
    model_args: dict[str, Any] = field(default_factory=dict)  # for timm: and random: only, such as {patch_size: 4}
    batch_size: int = 256  # images at once
    workers: int | None = None  # processes that load images; null: by the number of cores
    precision: Precision = "auto"  # of the encoder; auto: bf16 where the hardware is fast at it, else float32
    seed: int = 0  # of the held-out part, of the heads, and of the weights of random:
    out: str = ""  # file for the result; empty: <run>/eval/<name>.json


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

    def open(self, word: str, download_dir: str = "~/.cache/sslvit") -> Source:
        """The images that a word stands for, in the channels that the encoder takes. Raises UserError."""
        wanted = replace(self.subject.data_config, download_dir=download_dir)
        return first_on_each_machine(self.accelerator, partial(open_source, word, wanted))


@dataclass
class Task:
    """Frozen features of both sets, with labels by the training set's class names."""

    subject: Pretrained
    train: Features
    test: Features
    train_labels: Tensor
    test_labels: Tensor
    classes: list[str]
    record: dict[str, Any]  # the protocol, for the result


def load(config: Subject) -> Frozen:
    """Load the encoder and put it on its device. Raises UserError."""
    check_range("", config, 1, None, "batch_size", "image_size")
    check_range("", config, 0, None, "workers")
    subject = pretrained.load(config.run, config.image_size, config.model_args, config.seed)
    encoder = subject.encoder
    pool = encoder.pool if config.pool == "auto" else config.pool
    if (pool == "pooled") == encoder.is_vit or ("cls" in pool and not getattr(encoder.model, "has_class_token", False)):
        raise UserError(f"pool={pool} is not something that {config.run} has: use pool={encoder.pool}.")
    accelerator = start_accelerator(config.precision)
    precision = resolve_precision(config.precision, accelerator.device)
    encoder.to(accelerator.device)
    choose_attention(encoder, accelerator.device, precision)
    return Frozen(subject, pool, accelerator, precision)


def prepare(config: Config, name: str) -> Task:
    """Load the encoder, open the images, compute the features. Raises UserError before the features where it can."""
    began = time.perf_counter()
    for key in ("train", "test"):
        if not getattr(config.data, key):
            raise UserError(
                f"data.{key} is missing: {name} needs labelled images, data.train=<folder> data.test=<folder>."
            )
    frozen = load(config)
    subject, pool, accelerator, precision = frozen.subject, frozen.pool, frozen.accelerator, frozen.precision
    encoder = subject.encoder
    sources = []
    for word in (config.data.train, config.data.test):
        source = frozen.open(word, config.data.download_dir)
        if source.labels is None:
            raise UserError(
                f"{word} has no labels: evaluation needs <folder>/<class>/<image>, or a labelled set by name."
            )
        sources.append(source)
    normalize = frozen.normalize
    folder = subject.run_dir / "eval" / "features" if config.cache and subject.run_dir else None
    train, test = (
        extract_cached(folder, encoder, source, normalize, accelerator, pool, config.batch_size, config.workers)
        for source in sources
    )
    if isinstance(encoder, Pixels):  # else the brightness that all images share decides
        mean_image = train.values.mean(dim=0)
        train, test = (replace(features, values=features.values - mean_image) for features in (train, test))
    train_labels, test_labels, classes = align_labels(train, test, (config.data.train, config.data.test))
    record = {
        "evaluation": name,
        "run": config.run,
        **subject.detail,
        "train": {"data": config.data.train, "images": len(train), "unreadable": train.unreadable},
        "test": {"data": config.data.test, "images": len(test), "unreadable": test.unreadable},
        "classes": len(classes),
        "features": "pixels minus the mean training image" if isinstance(encoder, Pixels) else describe_pool(pool),
        "width": train.values.shape[1],
        "image_size": list(encoder.image_size),
        "precision": precision,
        "seed": config.seed,
        "versions": versions(),
        "feature_seconds": round(time.perf_counter() - began, 1),
    }
    say(
        f"{name} of {config.run}: {record['features']}, {record['width']} wide, {precision}; "
        f"{len(train)} training and {len(test)} test images in {len(classes)} classes"
    )
    return Task(subject, train, test, train_labels, test_labels, classes, record)


def interval(top1: float, num_images: int, seed: int) -> tuple[float, float]:
    """The bootstrap's 95 % interval of an accuracy in percent, over the test images that it was measured on.

    Drawing n images with replacement from n of which a share p is right gives a binomial number of right ones, so that
    is what is drawn, 10,000 times. It says nothing about other seeds of the training.
    """
    draws = np.random.default_rng(seed).binomial(num_images, min(1.0, top1 / 100), 10_000) / num_images
    low, high = np.percentile(100 * draws, [2.5, 97.5])
    return round(float(low), 2), round(float(high), 2)


def describe_pool(pool: str) -> str:
    return {
        "cls": "class token",
        "mean": "mean of patches",
        "cls+mean": "class token and mean of patches",
        "pooled": "the model's pooled features",
    }[pool]


def write(config: Subject, task: Task, name: str, results: Any) -> Path | None:
    """Write the result as JSON, on the first process: (protocol, results)."""
    return file(config, task.subject, name, {**task.record, "results": results})


def file(config: Subject, subject: Pretrained, name: str, record: dict[str, Any]) -> Path | None:
    """Write a record as JSON where the configuration or the run says, on the first process."""
    folder = subject.run_dir
    if not config.out and folder is None:
        return None
    path = Path(config.out) if config.out else folder / "eval" / f"{name}.json"
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
