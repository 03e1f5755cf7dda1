"""A picture of what a recipe does to images: each image, its crops as the encoder gets them, and hidden patches."""

from pathlib import Path

import torch
from torch import Tensor

from .. import data, objectives, rng
from ..config import RunConfig
from ..data import BadImage, Source
from ..data.augment import Normalize, augment
from ..data.crops import cut
from ..data.depth import dark_sentence, range_that_fits
from ..errors import UserError
from ..evaluation import pictures
from ..model import factory, masks

ROWS = 8  # images whose crops are shown
GALLERY = 32  # images that are shown without crops
MAX_VIEWS = 6  # crops of one name
CELL, GAP = 112, 6  # pixels


def draw(config: RunConfig, path: Path) -> None:
    """Write a PNG with images chosen by the seed. Raises UserError."""
    source = data.open_source(config.data.train, config.data)
    images = _readable(source, config.seed, GALLERY)
    if not images:
        raise UserError(f"picture={path}: none of the images tried can be read, for example {source.name(0)}.")
    columns, titles = _columns(config, [image for _, image in images[:ROWS]], [index for index, _ in images[:ROWS]])
    cells = [pictures.thumbnail(image, CELL) for _, image in images]
    across = max(len(titles), min(len(images), 8))
    gallery = [cells[i : i + across] for i in range(0, len(cells), across)]
    rows = [[pictures.thumbnail(image, CELL) for image in row] for row in zip(*columns, strict=True)]
    size = "x".join(map(str, data.image_size(config.data)))
    index, brightest = max(images, key=lambda pair: float(pair[1].max()))
    largest = float(brightest.max())
    fits = range_that_fits(source, index, brightest, largest)
    advice = [f"; {dark_sentence(fits, largest)}"] if fits else []
    parts = [
        pictures.montage(gallery, title="".join([f"{len(source):,} images of {config.data.train}", *advice]), gap=GAP),
        pictures.montage(rows, column_names=titles, title=f"crops of {config.method}, {size} pixels", gap=GAP),
    ]
    pictures.save(pictures.stacked(parts), str(path))


def _readable(source: Source, seed: int, count: int) -> list[tuple[int, Tensor]]:
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


def _columns(config: RunConfig, images: list[Tensor], indices: list[int]) -> tuple[list[list[Tensor]], list[str]]:
    """Columns of images [C, h, w] in [0, 255], and their titles: those of the first epoch of a run."""
    method, normalize = objectives.find(config.method), Normalize(*data.normalization(config.data))
    views = method.views(config.objective, config.data)
    key = rng.fold_in(rng.fold_in(config.seed, "image", 0), torch.tensor(indices))
    batch = augment({"key": key, **cut(images, key, views)}, views, normalize, torch.device("cpu"))
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
