"""Where images come from: `open_source(word, config)` gives a Source, whatever the user named.

KINDS is the table of what a word can stand for, with one file a kind beside this one. They import data/config.py and
the pure helpers, and nothing else of data/.
"""

import difflib
import os
from importlib import import_module
from pathlib import Path

from ...errors import UserError
from ..config import Config
from .source import BadImage, Source, read_smaller
from .syntax import is_list, is_pattern, split_part

__all__ = ["BadImage", "Source", "kind_of", "open_source", "read_smaller", "split_part"]


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


def _unknown(word: str) -> str:
    head = word.split(":")[0].split(",")[0]
    near = difflib.get_close_matches(head, ("fractals", *SETS), n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    if os.path.splitext(split_part(word)[0])[1].lower() in ENDINGS:
        return f"data: there is no file {split_part(word)[0]}.{hint}"
    return f"data: {word} is neither a folder nor one of fractals, {', '.join(SETS)}.{hint}"
