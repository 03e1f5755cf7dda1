"""Images as a run sees them: some of them, their crops, and hidden patches. `sslvit data picture=` draws them too."""

import math
from typing import Any

import torch
from torch import Tensor

from .. import data, objectives, rng
from ..data import BadImage, Source
from ..data.augment import Normalize, augment
from ..data.crops import cut
from ..errors import UserError
from ..model import factory, masks

MAX_VIEWS = 6  # crops of one name
MOST_VALUES = 2**27  # of all crops: half a GiB


def readable(source: Source, seed: int, count: int) -> list[tuple[int, Tensor]]:
    """Some images with their indices, in the order of the indices."""
    found: list[tuple[int, Tensor]] = []
    positions = torch.arange(min(len(source), 4 * count))
    for index in rng.shuffled(rng.fold_in(seed, "picture"), len(source), positions).tolist():
        try:
            found.append((index, source.read(index)))
        except BadImage:
            continue
        if len(found) == count:
            break
    return sorted(found, key=lambda pair: pair[0])


def views_of(config: Any, images: list[Tensor], indices: list[int]) -> dict[str, Tensor]:
    """What the objective gets of some images in the first epoch: {"key": [B], name: [V, B, C, h, w] normalised}."""
    views = objectives.find(config.method).views(config.objective, config.data)
    pixels = len(images) * sum(math.prod(crop.size) for crops in views.values() for crop in crops)
    if pixels * config.data.in_chans > MOST_VALUES:
        raise UserError(f"The crops of {len(images)} images have {pixels:,} pixels, which is too many for a picture.")
    key = rng.fold_in(rng.fold_in(config.seed, "image", 0), torch.tensor(indices))
    normalize = Normalize(*data.normalization(config.data))
    return augment({"key": key, **cut(images, key, views)}, views, normalize, torch.device("cpu"))


def columns_of(config: Any, images: list[Tensor], indices: list[int]) -> tuple[list[list[Tensor]], list[str]]:
    """Columns of images [C, h, w] in [0, 255], and their titles: those of the first epoch of a run."""
    method, normalize = objectives.find(config.method), Normalize(*data.normalization(config.data))
    views = method.views(config.objective, config.data)
    batch = views_of(config, images, indices)
    key = batch["key"]
    columns, titles = [images], ["the image"]
    for name, crops in views.items():
        pixels = (normalize.undo(batch[name].flatten(0, 1)).view(batch[name].shape) * 255).clamp(0, 255)
        for v in range(min(len(crops), MAX_VIEWS)):
            columns.append(list(pixels[v]))
            titles.append(f"{name} {v + 1}" if len(crops) > 1 else "crop")
        if hasattr(method, "hidden") and name == next(iter(views)):
            encoder = factory.create(config.model, data.image_size(config.data), config.data.in_chans)
            mask = method.hidden(config.objective, encoder, key)
            gray = masks.enlarge(mask, encoder.grid(), encoder.patch_size).view(-1, 1, *pixels.shape[-2:])
            columns.append(list(torch.where(gray, torch.tensor(128.0), pixels[0])))
            titles.append(f"{mask.float().mean():.0%} hidden")
    return columns, titles
