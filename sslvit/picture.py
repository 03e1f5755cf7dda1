"""A picture of what a recipe makes of images: the image, each of its crops as the encoder gets them, what MAE hides."""

from pathlib import Path

import torch
from torch import Tensor

from . import data, encoder, masks, objectives, rng
from .augment import Normalize, augment
from .config import RunConfig
from .data import BadImage, Source
from .errors import UserError
from .evaluation import pictures
from .views import Views, cut

ROWS = 8  # images whose crops are shown
GALLERY = 32  # images that are shown alone
MOST_VIEWS = 6  # crops of one name
CELL, GAP = 112, 6  # pixels


def draw(config: RunConfig, path: Path) -> None:
    """Write a PNG with images chosen by the seed. Raises UserError."""
    source = data.open_source(config.data.train, config.data)
    images = _readable(source, config.seed, GALLERY)
    if not images:
        raise UserError(f"picture={path}: none of the images tried can be read, for example {source.name(0)}.")
    views = objectives.find(config.method).views(config.objective, config.data)
    columns, titles = _columns(config, views, [image for _, image in images[:ROWS]], [n for n, _ in images[:ROWS]])
    cells = [pictures.thumbnail(image, CELL) for _, image in images]
    across = max(len(titles), min(len(images), 8))
    gallery = [cells[i : i + across] for i in range(0, len(cells), across)]
    rows = [[pictures.thumbnail(image, CELL) for image in row] for row in zip(*columns, strict=True)]
    size = "x".join(map(str, data.image_size(config.data)))
    parts = [
        pictures.montage(gallery, title=f"{len(source):,} images of {config.data.train}", gap=GAP),
        pictures.montage(
            rows, column_names=titles, title=f"what {config.method} makes of them, {size} pixels", gap=GAP
        ),
    ]
    pictures.save(pictures.stacked(parts), str(path))


def _readable(source: Source, seed: int, count: int) -> list[tuple[int, Tensor]]:
    """Some images with their numbers, in the order of the numbers."""
    found = []
    positions = torch.arange(min(len(source), 4 * count))
    for number in rng.shuffled(rng.fold_in(seed, "picture"), len(source), positions).tolist():
        try:
            found.append((number, source.read(number)))
        except BadImage:
            continue
        if len(found) == count:
            break
    return sorted(found, key=lambda pair: pair[0])


def _columns(
    config: RunConfig, views: Views, images: list[Tensor], numbers: list[int]
) -> tuple[list[list[Tensor]], list[str]]:
    """Columns of images [C, h, w] in [0, 255], and their titles: those of the first epoch of a run."""
    normalize = Normalize(*data.normalization(config.data))
    key = rng.fold_in(rng.fold_in(config.seed, "image", 0), torch.tensor(numbers))
    batch = augment({"key": key, **cut(images, key, views)}, views, normalize, torch.device("cpu"))
    columns, titles = [images], ["the image"]
    for name, crops in views.items():
        shown = (normalize.undo(batch[name].flatten(0, 1)).view(batch[name].shape) * 255).clamp(0, 255)
        for v in range(min(len(crops), MOST_VIEWS)):
            columns.append(list(shown[v]))
            titles.append(f"{name} {v + 1}" if len(crops) > 1 else "crop")
        ratio = getattr(config.objective, "mask_ratio", None)
        if isinstance(ratio, float) and name == next(iter(views)):
            columns.append(_hidden(config, list(shown[0]), key, ratio))
            titles.append(f"{ratio:.0%} hidden")
    return columns, titles


def _hidden(config: RunConfig, crops: list[Tensor], key: Tensor, ratio: float) -> list[Tensor]:
    """The crops with the patches gray that MAE hides from the encoder."""
    grid_of = encoder.create(config.model, data.image_size(config.data), config.data.in_chans)
    (h, w), (p, q) = grid_of.grid(), grid_of.patch_size
    _, hide = masks.split(masks.random_order(key, h * w), masks.num_kept(h * w, ratio))
    out = []
    for crop, hidden in zip(crops, hide, strict=True):
        mask = torch.zeros(h * w, dtype=torch.bool).index_fill_(0, hidden, True).view(h, 1, w, 1)
        whole = mask.expand(h, p, w, q).reshape(h * p, w * q)
        out.append(torch.where(whole, torch.tensor(128.0), crop))
    return out
