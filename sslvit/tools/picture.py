"""A picture of what a recipe does to images: each image, its crops as the encoder gets them, and hidden patches."""

from pathlib import Path

from .. import data
from ..config import RunConfig
from ..data.depth import dark_sentence, range_that_fits
from ..errors import UserError
from ..evaluation import pictures
from ..report.samples import columns_of, readable

ROWS = 8  # images whose crops are shown
GALLERY = 32  # images that are shown without crops
CELL, GAP = 112, 6  # pixels


def draw(config: RunConfig, path: Path) -> None:
    """Write a PNG with images chosen by the seed. Raises UserError."""
    source = data.open_source(config.data.train, config.data)
    images = readable(source, config.seed, GALLERY)
    if not images:
        raise UserError(f"picture={path}: none of the images tried can be read, for example {source.name(0)}.")
    columns, titles = columns_of(config, [image for _, image in images[:ROWS]], [index for index, _ in images[:ROWS]])
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
