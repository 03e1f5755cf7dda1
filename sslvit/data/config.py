"""The data.* keys: where the images are, their size and channels, and how they are normalised."""

import os
from dataclasses import dataclass
from typing import ClassVar, Literal

from ..errors import Limits, UserError

# Loader processes; more only take memory, and minutes to start.
MOST_WORKERS = max(64, 8 * (os.cpu_count() or 1))
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Cache = bool | Literal["ram", "device"] | None


@dataclass
class Config:
    train: str = ""  # a folder, list, archive, table ... of images (see README); or fractals, cifar10, stl10
    image_size: int | tuple[int, int] = 224  # pixels, one number or [height, width]
    in_chans: int = 3  # channels that the encoder sees; images are converted
    mean: tuple[float, ...] | None = None  # of each channel, in [0, 1]; null: ImageNet's for 3 channels, 0.5 otherwise
    std: tuple[float, ...] | None = None  # standard deviation; null: ImageNet's for 3 channels, 0.25 otherwise
    download_dir: str = "~/.cache/sslvit"  # folder for downloads and for what is unpacked
    value_range: tuple[float, float] | None = None  # black and white of 16-bit and float images; null: [0,65535], [0,1]
    workers: int | None = None  # loader processes for each training process; null: by the number of cores
    cache: Cache = None  # keep decoded images: ram (or true), device, false; null: in ram if a quarter of it is enough
    jpeg_scaling: bool = True  # decode JPEGs of 2 million pixels and more at 1/2, 1/4 or 1/8 if all crops are smaller
    bad_ratio: float = 0.01  # the run stops if a larger share of the images cannot be read

    LIMITS: ClassVar[Limits] = [(0, MOST_WORKERS, "workers"), (1, None, "in_chans", "image_size"), (0, 1, "bad_ratio")]


def check_value_range(key: str, value_range: tuple[float, float]) -> None:
    """Raises UserError unless the first number is below the second."""
    low, high = value_range
    if not low < high:
        raise UserError(f"{key}=[{low:g},{high:g}] must be [low,high] with low below high.")


def image_size(config: Config) -> tuple[int, int]:
    """(h, w) in pixels."""
    return pair(config.image_size)


def pair(size: int | tuple[int, int]) -> tuple[int, int]:
    """(h, w) of a size that may be given as one number."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def normalization(config: Config) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, standard deviation), a number for each channel. Raises UserError if there are not in_chans of them."""
    photo = config.in_chans == 3
    mean = config.mean or (IMAGENET_MEAN if photo else (0.5,) * config.in_chans)
    std = config.std or (IMAGENET_STD if photo else (0.25,) * config.in_chans)
    for key, values in (("mean", mean), ("std", std)):
        if len(values) != config.in_chans:
            raise UserError(f"data.{key} has {len(values)} numbers for data.in_chans={config.in_chans}: give one each.")
    if min(std) <= 0:
        raise UserError(f"data.std={list(std)} must be above 0.")
    return tuple(mean), tuple(std)
