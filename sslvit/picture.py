"""A picture of what a recipe makes of images: the image, each of its crops as the encoder gets them, what MAE hides."""

import math
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from . import data, encoder, masks, objectives, rng
from .augment import Normalize, augment
from .config import RunConfig
from .data import BadImage, Source
from .errors import UserError
from .views import Views, cut, resize

ROWS = 8  # images whose crops are shown
GALLERY = 32  # images that are shown alone
MOST_VIEWS = 6  # crops of one name
CELL, GAP, TITLE = 112, 6, 16  # pixels
BACKGROUND, INK = (255, 255, 255), (40, 40, 40)


def draw(config: RunConfig, path: Path) -> None:
    """Write a PNG with images chosen by the seed. Raises UserError."""
    source = data.open_source(config.data.train, config.data)
    images = _readable(source, config.seed, GALLERY)
    if not images:
        raise UserError(f"picture={path}: none of the images tried can be read, for example {source.name(0)}.")
    views = objectives.find(config.method).views(config.objective, config.data)
    columns, titles = _columns(config, views, [image for _, image in images[:ROWS]], [n for n, _ in images[:ROWS]])
    across = max(len(titles), min(len(images), 8))
    down = math.ceil(len(images) / across)
    height = (down + len(columns[0])) * (CELL + GAP) + 3 * (TITLE + GAP)
    sheet = Image.new("RGB", (across * (CELL + GAP) + GAP, height), BACKGROUND)
    pen = ImageDraw.Draw(sheet)
    pen.text((GAP, GAP), f"{len(source):,} images of {config.data.train}", fill=INK)
    top = TITLE + GAP
    for i, (_, image) in enumerate(images):
        sheet.paste(_cell(image), (GAP + i % across * (CELL + GAP), top + i // across * (CELL + GAP)))
    top += down * (CELL + GAP)
    size = "x".join(map(str, data.image_size(config.data)))
    pen.text((GAP, top), f"what {config.method} makes of them, {size} pixels", fill=INK)
    top += TITLE + GAP
    for i, title in enumerate(titles):
        pen.text((GAP + i * (CELL + GAP), top), title, fill=INK)
        for row, image in enumerate(columns[i]):
            place = (GAP + i * (CELL + GAP), top + TITLE + row * (CELL + GAP))
            sheet.paste(_cell(image), place)
    try:
        sheet.save(path.expanduser(), "PNG")
    except OSError as error:
        raise UserError(f"picture={path} cannot be written: {error.strerror}.") from error


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


def _cell(image: Tensor) -> Image.Image:
    """[C, h, w] in [0, 255] -> a square picture: one channel gray, of more than three the first three; small images
    keep sharp pixels."""
    image = image[:3] if image.shape[0] >= 3 else image[:1].expand(3, -1, -1)
    h, w = image.shape[-2:]
    factor = CELL / max(h, w)
    if factor >= 1:
        picture = Image.fromarray(image.round().byte().permute(1, 2, 0).contiguous().numpy())
        picture = picture.resize((max(1, round(w * factor)), max(1, round(h * factor))), Image.Resampling.NEAREST)
    else:
        small = resize(image.float(), (max(1, round(h * factor)), max(1, round(w * factor))))
        picture = Image.fromarray(small.round().byte().permute(1, 2, 0).contiguous().numpy())
    square = Image.new("RGB", (CELL, CELL), (235, 235, 235))
    square.paste(picture, ((CELL - picture.width) // 2, (CELL - picture.height) // 2))
    return square
