"""Where images come from: `open_source(config)` gives a Source, whatever the user named; labels are for evaluation
only."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from torch import Tensor

from ..errors import UserError
from .decode import BadImage

__all__ = ["BadImage", "Config", "Source", "image_size", "normalization", "open_source"]

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass
class Config:
    train: str = "fractals"  # a folder of images, or fractals, cifar10, cifar100, stl10
    image_size: int | tuple[int, int] = 224  # pixels, one number or [height, width]
    in_chans: int = 3  # channels that the encoder sees; images are converted
    mean: tuple[float, ...] | None = None  # of each channel, in [0, 1]; null: ImageNet's for 3 channels, 0.5 otherwise
    std: tuple[float, ...] | None = None  # likewise; null: ImageNet's for 3 channels, 0.25 otherwise
    download_dir: str = "~/.cache/sslvit"  # where torchvision's data sets are or will be
    workers: int | None = None  # processes that load images, for each training process; null: by the number of cores
    cache: bool | None = None  # keep decoded images in memory; null: if all have one size and fit
    bad_ratio: float = 0.01  # the run stops when more than this share of the images cannot be read


class Source(Protocol):
    """A numbered collection of images."""

    classes: list[str]  # names of the labels; empty without labels
    labels: np.ndarray | None  # [N] int64, -1 where an image has none

    def __len__(self) -> int: ...

    def read(self, index: int) -> Tensor:
        """[C, H, W] uint8, or float32 in [0, 255] for images of more than 8 bits; raises BadImage."""

    def name(self, index: int) -> str:
        """What a person would look for: a path, or the set and the number."""

    def identity(self) -> str:
        """Changes when the number, the names or the order of the images do, not with where they lie."""

    def fingerprint(self) -> str:
        """Changes when the images do: features are cached under it."""


def open_source(name: str, config: Config) -> Source:
    """The images that a user's word stands for: a path, or `set`, `set:split`, `set:split,key=value,...`.

    Raises UserError for a name that is neither, a folder without images, or a set that is not there.
    """
    from . import fractals, torchvision_sets
    from .folder import Folder

    sets: dict[str, Callable[[str, Config], Source]] = {"fractals": fractals.open_fractals, **torchvision_sets.SETS}
    path = Path(name).expanduser()
    head = name.split(":")[0].split(",")[0]
    if head in sets and not path.exists():
        return sets[head](name, config)
    if not path.exists():
        import difflib

        near = difflib.get_close_matches(head, sets, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise UserError(f"data: {name} is neither a folder nor one of {', '.join(sets)}.{hint}")
    return Folder(path, config.in_chans)


def image_size(config: Config) -> tuple[int, int]:
    """(h, w) in pixels."""
    size = config.image_size
    return (size, size) if isinstance(size, int) else tuple(size)


def normalization(config: Config) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std), a number for each channel; raises UserError if their count is not in_chans."""
    photo = config.in_chans == 3
    mean = config.mean or (IMAGENET_MEAN if photo else (0.5,) * config.in_chans)
    std = config.std or (IMAGENET_STD if photo else (0.25,) * config.in_chans)
    for key, values in (("mean", mean), ("std", std)):
        if len(values) != config.in_chans:
            raise UserError(f"data.{key} has {len(values)} numbers for data.in_chans={config.in_chans}: give one each.")
    if min(std) <= 0:
        raise UserError(f"data.std={list(std)} must be above 0.")
    return tuple(mean), tuple(std)
