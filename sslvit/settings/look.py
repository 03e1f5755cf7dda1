"""A quick look at the images: the data report's own code on a sample."""

from dataclasses import replace

import torch

from .. import data, rng
from ..config import RunConfig
from ..data import BadImage, Source
from ..errors import UserError
from ..tools import data_report
from ..tools.findings import ALIKE, SIDED
from .choose import Facts

SAMPLE = 400  # images, which take some seconds at most
MOST_CHANNELS = 64
TRIED = 8  # images, to find the number of channels


def look(config: RunConfig, channels: int | None = None) -> Facts:
    """The facts of the images of data.train. channels: data.in_chans, if it is given. Raises UserError."""
    given, channels = channels, channels or _channels(config)
    config = replace(config, data=replace(config.data, in_chans=channels, mean=None, std=None))
    found = data_report.examine(config, data_report.Config(sample=SAMPLE))
    if not found.mean:
        name, reason = found.broken[0]
        where = f"{found.examined} images of {config.data.train}"
        raise UserError(f"None of {where} can be read, for example {name}: {reason}.")
    mean, std = found.mean, found.std
    if channels == 3 and not given and len(set(mean)) == 1 and len(set(std)) == 1:  # gray ones, as three equal channels
        channels = 1
    gain = 1.0
    if found.value_range:
        top = found.value_range[1]
        gain = (65535.0 if top > 1 else 1.0) / top
    return Facts(
        found.count, found.heights[1], found.widths[1], found.sizes, channels, found.deep > 0, found.value_range,
        mean=tuple(round(value * gain, 4) for value in mean[:channels]),
        std=tuple(max(round(value * gain, 4), 0.0039) for value in std[:channels]),
        broken=len(found.broken) / found.examined,
        sided=found.sided > SIDED, alike=found.alike > ALIKE,
        copies=sum(len(group) - 1 for group in (*found.same, *found.near)) / found.examined,
    )  # fmt: skip


def _channels(config: RunConfig) -> int:
    """The number of channels with which images can be read: 3, or what arrays and deep images have."""
    reason: Exception | None = None
    for channels in (3, *(n for n in range(1, MOST_CHANNELS) if n != 3)):
        try:
            source = data.open_source(config.data.train, replace(config.data, in_chans=channels))
            _read_one(source, config.seed)
            return channels
        except BadImage as error:
            reason = reason or error
        except UserError as error:
            if "channels" not in str(error):
                raise
            reason = reason or error
    raise UserError(f"No image of {config.data.train} can be read: {reason}.")


def _read_one(source: Source, seed: int) -> None:
    """Read one of a few images. Raises BadImage if none can be read."""
    some = torch.arange(min(TRIED, len(source)))
    places = rng.shuffled(rng.fold_in(seed, "channels"), len(source), some).tolist()
    for place in places[:-1]:
        try:
            source.read(place)
            return
        except BadImage:
            continue
    source.read(places[-1])
