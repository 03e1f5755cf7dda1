"""A frozen encoder: which one is measured, the images and features that it sees, and the record of its results."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from .. import pretrained
from ..checkpoints import textfile
from ..data import Source, open_source
from ..data.augment import Normalize
from ..data.config import MOST_WORKERS
from ..distributed import gather_objects, say
from ..errors import UserError, check_range, printable
from ..hardware import (
    choose_attention,
    first_on_each_machine,
    resolve_precision,
    start_accelerator,
    versions,
)
from ..model.encoder import Encoder, Pool
from ..pretrained import Pixels, Pretrained
from . import records
from .classes import labels_of
from .config import EncoderConfig
from .feature_cache import extract_cached
from .features import Features

# Keys that change how a result is computed, but not what it is.
NOT_SETTINGS = (
    "run", "data", "out", "cache", "workers", "batch_size", "picture", "per_cluster", "download_dir", "seed",
)  # fmt: skip
POOL_NAMES = {
    "cls": "class token",
    "mean": "mean of patches",
    "cls+mean": "class token and mean of patches",
    "last4": "class tokens of the last four blocks",
    "mean4": "means of patches of the last four blocks",
    "pooled": "the model's pooled features",
}


@dataclass
class Frozen:
    """A frozen encoder on its device, for one evaluation."""

    config: EncoderConfig
    subject: Pretrained
    pool: Pool
    accelerator: Accelerator
    precision: str
    note: str = ""  # what a reader of the result must know, printed and recorded with it
    _said: set[str] = field(default_factory=set)

    @property
    def encoder(self) -> Encoder | Pixels:
        return self.subject.encoder

    @property
    def normalize(self) -> Normalize:
        return Normalize(self.subject.mean, self.subject.std)

    def vit(self) -> Encoder:
        """The encoder, for an evaluation of patch tokens. Raises UserError if it is no plain ViT."""
        if not isinstance(self.encoder, Encoder) or not self.encoder.is_vit:
            raise UserError(f"run={self.subject.name} has no patch tokens: this evaluation is for plain ViTs.")
        return self.encoder

    def cache_folder(self, cache: bool) -> Path | None:
        """Where features are kept for the next evaluation; None: nowhere. All processes call it."""
        encodes = isinstance(self.encoder, Encoder)
        return self._features_folder if cache and encodes and self.subject.results else None

    @cached_property
    def _features_folder(self) -> Path | None:
        """Made if it is missing. None if it cannot be made, which is said."""
        assert self.subject.results
        folder, problem = self.subject.results / "features", None
        try:
            textfile.make_folder(folder, pretrained.root_of(self.subject.results))
        except OSError as error:
            problem = f"No features are kept for the next evaluation in {folder} ({error.strerror})."
        problems = [one for one in gather_objects(problem) if one]
        say(*problems[:1])
        return None if problems else folder

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
            raise UserError(  # evaluations have no key data.in_chans
                f"{spec} has images of other channels than the {data_config.in_chans} that run={self.subject.name} "
                "takes: give images or an encoder that fit."
            ) from error

    def extract(
        self, source: Source, pools: Sequence[Pool], cache: bool = False, whole: bool = True
    ) -> dict[Pool, Features]:
        """Features of a source by each way of pooling, see `features.extract`. Raises UserError.

        cache: read those of an earlier evaluation of the same images, and keep these for the next one.
        """
        found = extract_cached(
            self.cache_folder(cache), self.encoder, source, self.normalize, self.accelerator, pools,
            self.config.batch_size, self.config.workers, whole,
        )  # fmt: skip
        self.say_unreadable(source, found[pools[0]].index, found[pools[0]].unreadable)
        return found

    def say_unreadable(self, source: Source, index: Tensor, unreadable: int) -> None:
        """Say, once, how many images of a source cannot be read, and all images of which classes. All processes call
        it, each with the numbers of the images that it has read."""
        if not unreadable:
            return
        read, labels = torch.zeros(len(source), dtype=torch.bool), labels_of(source)
        read[torch.cat(gather_objects(index))] = True
        lost = sorted(set(labels[~read].tolist()) - set(labels[read].tolist()) - {-1})
        names = ", ".join(source.classes[label] for label in lost[:5]) + " ..." * (len(lost) > 5)
        sentence = (
            f"{unreadable} of {len(source)} images cannot be read and are left out{f', all of {names}' * bool(lost)}: "
            f"the first is {source.name(int(read.int().argmin()))}."
        )
        if sentence not in self._said:
            self._said.add(sentence)
            say(printable(sentence))

    def features(self, source: Source, cache: bool = False, subtract_mean: bool = False) -> Features:
        """Features of a source by the configured pooling. Raises UserError.

        subtract_mean: of raw pixels. Without it their similarity is that of their brightness.
        """
        found = self.extract(source, (self.pool,), cache)[self.pool]
        if subtract_mean and isinstance(self.encoder, Pixels):
            found = replace(found, values=found.values - found.values.mean(dim=0))
        return found

    def save(self, evaluation: str, results: dict[str, Any], **details: Any) -> None:
        """Write down a result and how it was measured: in `out=`, or in <evaluation>.json beside the run's others.

        details: JSON values, added to what every record holds or in the place of it. Raises UserError.
        """
        config, folder = self.config, self.subject.results
        record = {
            "evaluation": evaluation,
            "run": config.run,
            **self.subject.detail,
            "features": self.describe(),
            "image_size": list(self.encoder.image_size),
            "precision": self.precision,
            "seed": config.seed,
            "versions": versions(),
            "settings": {name: value for name, value in asdict(config).items() if name not in NOT_SETTINGS},
            **({"note": self.note} if self.note else {}),
            **details,
            "results": results,
        }
        if self.note:
            say(self.note)
        if config.out:
            records.write(record, Path(config.out).expanduser())
        elif folder:
            records.write(record, folder / f"{evaluation}.json", pretrained.root_of(folder))
        else:
            say("The result is printed only: out=<file> keeps it.")


def load_frozen(config: EncoderConfig) -> Frozen:
    """Load the encoder and put it on its device. Raises UserError."""
    check_range("", config, 1, None, "batch_size", "image_size")
    check_range("", config, 0, MOST_WORKERS, "workers")
    records.check_out(config.out)
    subject = pretrained.load(
        config.run, config.image_size, config.model_args, config.seed, config.allow_method, config.value_range
    )
    if subject.results and not config.out:
        records.make_folder(subject.results, pretrained.root_of(subject.results))
    return place(subject, config)


def place(subject: Pretrained, config: EncoderConfig) -> Frozen:
    """An encoder that is loaded, on its device. Raises UserError."""
    encoder = subject.encoder
    pool = encoder.pool if config.pool == "auto" else check_pool("pool", config.pool, encoder, config.run)
    accelerator = start_accelerator(config.precision, long_waits=True)
    precision = resolve_precision(config.precision, accelerator.device)
    encoder.to(accelerator.device)
    choose_attention(encoder, accelerator.device, precision)
    return Frozen(config, subject, pool, accelerator, precision)


def check_pool(key: str, pool: str, encoder: Encoder | Pixels, run: str) -> Pool:
    """The way of pooling that the user named. Raises UserError if the encoder does not have it."""
    for found in encoder.pools():
        if found == pool:
            return found
    raise UserError(f"{key}={pool} is not something that {run} has: use {', '.join(encoder.pools())}.")


def describe_pool(pool: str) -> str:
    return POOL_NAMES[pool]
