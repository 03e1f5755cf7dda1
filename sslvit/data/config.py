"""The data.* keys: where the images are, their size and channels, and how they are normalised."""

import os
from dataclasses import dataclass
from typing import ClassVar, Literal

from ..errors import Limits, UserError

# Loader processes; more only take memory, and minutes to start.
MOST_WORKERS = max(64, 8 * (os.cpu_count() or 1))
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
    cache: Cache = None  # keep decoded images: ram (or true), device, false; null: in ram if of one size and they fit
    jpeg_scaling: bool = True  # decode JPEGs of 2 million pixels and more at 1/2, 1/4 or 1/8 if all crops are smaller
    bad_ratio: float = 0.01  # the run stops if a larger share of the images cannot be read

    LIMITS: ClassVar[Limits] = [(0, MOST_WORKERS, "workers"), (1, None, "in_chans", "image_size"), (0, 1, "bad_ratio")]


def check_value_range(key: str, value_range: tuple[float, float]) -> None:
    """Raises UserError unless the first number is below the second."""
    low, high = value_range
    if not low < high:
        raise UserError(f"{key}=[{low:g},{high:g}] must be [low,high] with low below high.")
