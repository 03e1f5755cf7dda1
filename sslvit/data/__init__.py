"""Where images come from: `open_source(word, config)` gives a Source, whatever the user named; labels are for
evaluation only. KINDS is the table of what a word can stand for, with one file a kind beside this one."""

import difflib
import os
import re
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from torch import Tensor

from ..errors import UserError
from .decode import BadImage, Reduction
from .patterns import is_list, is_pattern

__all__ = [
    "BadImage", "Config", "Source", "image_size", "kind_of", "normalization", "open_source", "read_smaller",
    "split_part",
]  # fmt: skip

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Cache = bool | Literal["ram", "device"] | None


@dataclass
class Config:
    train: str = "fractals"  # a folder, list, archive, table ... of images (see README), fractals, cifar10, stl10
    image_size: int | tuple[int, int] = 224  # pixels, one number or [height, width]
    in_chans: int = 3  # channels that the encoder sees; images are converted
    mean: tuple[float, ...] | None = None  # of each channel, in [0, 1]; null: ImageNet's for 3 channels, 0.5 otherwise
    std: tuple[float, ...] | None = None  # likewise; null: ImageNet's for 3 channels, 0.25 otherwise
    download_dir: str = "~/.cache/sslvit"  # where what is downloaded or unpacked is or will be
    value_range: tuple[float, float] | None = None  # deeper than 8 bits: what is black, white; null: [0,65535] or [0,1]
    workers: int | None = None  # processes that load images, for each training process; null: by the number of cores
    cache: Cache = None  # decoded images stay in memory: ram (or true), device, false; null: if of one size and fit
    jpeg_scaling: bool = True  # JPEGs of 2 million pixels and more are decoded at 1/2 .. 1/8 if all crops are smaller
    bad_ratio: float = 0.01  # the run stops when more than this share of the images cannot be read


class Source(Protocol):
    """A numbered collection of images."""

    classes: list[str]  # names of the labels; empty without labels
    labels: np.ndarray | None  # [N] int64, -1 where an image has none
    # May also have `texts: Names`, the labels as they were written, which `labels.py` reads in other ways, and
    # `read_smaller(index, reduction)`, see below.

    def __len__(self) -> int: ...

    def read(self, index: int) -> Tensor:
        """[C, H, W] uint8, or float32 in [0, 255] for images of more than 8 bits; raises BadImage."""

    def name(self, index: int) -> str:
        """What a person would look for: a path, or the set and the number."""

    def identity(self) -> str:
        """Changes when the number, the names or the order of the images do, not with where they lie."""

    def fingerprint(self) -> str:
        """Changes when the images do: features are cached under it."""


def open_source(word: str, config: Config) -> Source:
    """The images that a user's word stands for. Raises UserError for a word that stands for none, a source without
    images, and one that is not there.

    A path that exists is what it is, whatever else it looks like.
    """
    kind = kind_of(word)
    if kind is None:
        raise UserError(_unknown(word))
    module, function = KINDS[kind].split(":")
    return getattr(import_module(f".{module}", __package__), function)(word, config)


def read_smaller(source: Source, index: int, reduction: Reduction) -> tuple[Tensor, tuple[int, int]]:
    """(image, its whole height and width): as `read`, where sources that can may give it `reduction(height, width)`
    times smaller."""
    if hasattr(source, "read_smaller"):
        return source.read_smaller(index, reduction)
    image = source.read(index)
    return image, (image.shape[-2], image.shape[-1])


# What a word can stand for, and which function(word, config) -> Source opens it. A new kind of source is a line here,
# one in `kind_of`, and a file.
KINDS = {
    "list": "several:open_list",  # [a,b,...]: any sources, one after another
    "url": "download:open_url",  # http://, https://: fetched once, then as a local file
    "hub": "hugging_face:open_hub",  # hf:<folder or name on the hub>[:split]
    "pages": "pages:open_pages",  # pages:<folder, file or pattern>: every page of TIFF files
    "fractals": "fractals:open_fractals",
    "set": "torchvision_sets:open_set",  # cifar10, cifar100, stl10
    "folder": "folder:open_folder",
    "pattern": "pattern:open_pattern",  # *, ?, [0-9], ** and {000..012}: images, archives, tables, folders
    "table": "table:open_table",  # .txt, .csv, .tsv [:label columns]: paths, and labels
    "archive": "archive:open_archive",  # .zip, .tar: read in place; WebDataset shards are tar files
    "parquet": "parquet:open_parquet",
    "array": "array:open_array",  # .npy, or .npz [:name]: [N, H, W] or [N, H, W, C]
    "hdf5": "hdf5:open_hdf5",  # .h5, .hdf5 [:data set]
    "stack": "pages:open_pages",  # one .tif: its pages are the images
}
PACKED = (".tgz", ".gz", ".bz2", ".xz", ".zst", ".tbz2", ".txz", ".7z", ".rar")  # that archive.py refuses
ENDINGS = {
    ".txt": "table", ".csv": "table", ".tsv": "table",
    ".zip": "archive", ".tar": "archive", **dict.fromkeys(PACKED, "archive"),
    ".parquet": "parquet", ".npy": "array", ".npz": "array", ".tif": "stack", ".tiff": "stack",
    ".h5": "hdf5", ".hdf5": "hdf5", ".hdf": "hdf5", ".he5": "hdf5",
}  # fmt: skip
# file.csv:column, file.h5:group/name
WITH_PART = re.compile(r"(.*\.(?:csv|tsv|npz|h5|hdf5|hdf|he5)):([^/\\]*(?:/[^\\]*)?)$", re.IGNORECASE)
SETS = ("cifar10", "cifar100", "stl10")


def kind_of(word: str) -> str | None:
    """The key in KINDS; None for a word that stands for no source."""
    path = Path(word).expanduser()
    if not os.path.lexists(path):
        if is_list(word):
            return "list"
        if word.startswith(("http://", "https://")):
            return "url"
        if word.startswith("hf:"):
            return "hub"
        if word.startswith("pages:"):
            return "pages"
        head = word.split(":")[0].split(",")[0]
        if head == "fractals":
            return "fractals"
        if head in SETS:
            return "set"
        path = Path(split_part(word)[0]).expanduser()
        if not os.path.lexists(path):
            return "pattern" if is_pattern(word) else None
    if path.is_dir():
        return "folder"
    return ENDINGS.get(path.suffix.lower(), "folder")  # which refuses a file


def split_part(word: str) -> tuple[str, str]:
    """`file.csv:column`, `file.h5:group/images` -> (file, part); the part is empty where none is given."""
    match = None if os.path.lexists(os.path.expanduser(word)) else WITH_PART.match(word)
    return (match[1], match[2]) if match else (word, "")


def _unknown(word: str) -> str:
    head = word.split(":")[0].split(",")[0]
    near = difflib.get_close_matches(head, ("fractals", *SETS), n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    if os.path.splitext(split_part(word)[0])[1].lower() in ENDINGS:
        return f"data: there is no file {split_part(word)[0]}.{hint}"
    return f"data: {word} is neither a folder nor one of fractals, {', '.join(SETS)}.{hint}"


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
