"""Where images come from: `open_source(spec, config)` gives a Source for whatever the user named.

KINDS is the table of what a spec (a path, a name, a list, a pattern) can stand for. Each kind has its function in a
file of this folder, which is imported when it is needed. These files may import data/config.py and the pure helpers.
"""

import difflib
import os
from importlib import import_module
from pathlib import Path

from ...errors import UserError
from ..config import Config
from .limits import regular
from .source import BadImage, Source, WrappedSource, none_readable
from .syntax import is_pattern, split_part

__all__ = ["BadImage", "Source", "WrappedSource", "kind_of", "none_readable", "open_source", "split_part"]


def open_source(spec: str, config: Config) -> Source:
    """The images that a spec stands for. Raises UserError if it stands for nothing, is not there, or has no images."""
    kind = kind_of(spec)
    if kind is None:
        raise UserError(_unknown(spec))
    regular(Path(split_part(spec)[0]).expanduser())
    module, function = KINDS[kind].split(":")
    source: Source = getattr(import_module(f".{module}", __package__), function)(spec, config)
    return source


# {kind: which function(spec, config) -> Source opens it}. A new kind of source is a line here, one in `kind_of`, and a
# file.
KINDS = {
    "list": "several:open_list",  # [a,b,...]: any sources, one after another
    "url": "download:open_url",  # http://, https://: fetched once, then as a local file
    "hub": "hugging_face:open_hub",  # hf:<folder or name on the hub>[:split]
    "pages": "pages:open_pages",  # pages:<folder, file or pattern>: every page of TIFF files
    "fractals": "fractals:open_fractals",
    "set": "torchvision_sets:open_set",  # cifar10, cifar100, stl10
    "folder": "folder:open_folder",
    "pattern": "several:open_pattern",  # *, ?, [0-9], ** and {000..012}: images, archives, tables, folders
    "table": "table:open_table",  # .txt, .csv, .tsv [:label columns]: paths, and labels
    "archive": "archive:open_archive",  # .zip, .tar: read in place; WebDataset shards are tar files
    "parquet": "parquet:open_parquet",
    "array": "array:open_array",  # .npy, or .npz [:name]: [N, H, W] or [N, H, W, C]
    "hdf5": "hdf5:open_hdf5",  # .h5, .hdf5 [:dataset]
    "stack": "pages:open_pages",  # one .tif: its pages are the images
}
PACKED = (".tgz", ".gz", ".bz2", ".xz", ".zst", ".tbz2", ".txz", ".7z", ".rar")  # archive.py says why it refuses them
ENDINGS = {
    ".txt": "table", ".csv": "table", ".tsv": "table",
    ".zip": "archive", ".tar": "archive", **dict.fromkeys(PACKED, "archive"),
    ".parquet": "parquet", ".npy": "array", ".npz": "array", ".tif": "stack", ".tiff": "stack",
    ".h5": "hdf5", ".hdf5": "hdf5", ".hdf": "hdf5", ".he5": "hdf5",
}  # fmt: skip
SETS = ("cifar10", "cifar100", "stl10")


def kind_of(spec: str) -> str | None:
    """The key in KINDS; None for a spec that stands for no source. A path that exists is that path in any case."""
    path = Path(spec).expanduser()
    if not os.path.lexists(path):
        if spec.startswith("[") and spec.endswith("]"):
            return "list"
        if spec.startswith(("http://", "https://")):
            return "url"
        if spec.startswith(("hf:", "pages:")):
            return "hub" if spec.startswith("hf:") else "pages"
        name = spec.split(":")[0].split(",")[0]
        if name == "fractals" or name in SETS:
            return "fractals" if name == "fractals" else "set"
        path = Path(split_part(spec)[0]).expanduser()
        if not os.path.lexists(path):
            return "pattern" if is_pattern(spec) else None
    return "folder" if path.is_dir() else ENDINGS.get(path.suffix.lower(), "folder")  # open_folder refuses a file


def _unknown(spec: str) -> str:
    near = difflib.get_close_matches(spec.split(":")[0].split(",")[0], ("fractals", *SETS), n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    path = split_part(spec)[0]
    if os.path.splitext(path)[1].lower() in ENDINGS:
        return f"data: there is no file {path}.{hint}"
    if os.sep in path and not hint:
        return f"data: {path} does not exist: give a folder or file of images."
    return f"data: {spec} is neither a folder nor one of fractals, {', '.join(SETS)}.{hint}"
