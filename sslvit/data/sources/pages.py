"""Every page of TIFF files as an image of its own: `stack.tif`, or `pages:<folder or pattern>`."""

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ...errors import UserError
from ..config import Config
from . import open_source
from .files import Files, fingerprint_of, sample_of
from .limits import regular
from .names import Names, top_folders
from .pixels import from_array
from .source import BadImage, Source
from .tiff import page_array, tifffile

OPEN_FILES = 16  # of one process at a time
ENDINGS = (".tif", ".tiff")


class Pages(Source):
    """The pages of the first file, then those of the second ... Smaller copies of a page are left out. Labels are
    class folders, as in a folder."""

    def __init__(self, root: Path, names: list[str], config: Config) -> None:
        self.root, self.names = root, Names(names)
        self.in_chans, self.value_range = config.in_chans, config.value_range
        tifffile()  # raises UserError if the package is missing
        self.open: dict[int, Any] = {}  # of the process self.owner
        self.owner = os.getpid()
        places = [(i, page) for i, name in enumerate(names) for page in _pages(str(root / name))]
        if not places:
            raise UserError(f"data: none of {len(names)} TIFF files in {root} has a page that can be read.")
        self.places = np.array(places, dtype=np.int64)
        self.classes, labels = top_folders(names)
        self.labels = labels[self.places[:, 0]] if labels is not None else None

    def __len__(self) -> int:
        return len(self.places)

    def name(self, index: int) -> str:
        number, page = self.places[index].tolist()
        return f"{self.root / self.names[number]}[{page}]"

    def identity(self) -> str:
        digest = hashlib.sha256(self.names.digest().encode())
        digest.update(self.places.tobytes())
        return digest.hexdigest()

    def fingerprint(self) -> str:
        return fingerprint_of(self.identity(), self.names, self.root)

    def sample(self) -> list[str]:
        return sample_of(len(self), lambda index: self.read(index).numpy().tobytes())

    def read(self, index: int) -> Tensor:
        number, page = self.places[index].tolist()
        if self.owner != os.getpid():  # files opened before the fork share their position with the parent's
            self.open, self.owner = {}, os.getpid()
        try:
            if number not in self.open:
                if len(self.open) >= OPEN_FILES:
                    self.open.pop(next(iter(self.open))).close()
                self.open[number] = tifffile().TiffFile(regular(self.root / self.names[number]))
            values = page_array(self.open[number].pages[page])
            return from_array(values, self.in_chans, self.value_range)
        except BadImage:
            raise
        except Exception as error:  # tifffile raises many kinds
            raise BadImage(error) from error


def open_pages(spec: str, config: Config) -> Pages:
    spec = spec.removeprefix("pages:")
    path = Path(spec).expanduser()
    if path.is_file():
        return Pages(path.parent, [path.name], config)
    files = open_source(spec, config)
    names = [name for name in files.names if name.lower().endswith(ENDINGS)] if isinstance(files, Files) else []
    if not names or not isinstance(files, Files):
        raise UserError(f"data: pages:{spec} needs a folder, file or pattern of TIFF files, and found none there.")
    return Pages(files.root, names, config)


def _pages(path: str) -> list[int]:
    """Numbers of the pages that are images. A file that cannot be opened counts as one page: reading it says why."""
    reader = tifffile()
    try:
        with reader.TiffFile(regular(path)) as file:
            return [number for number, page in enumerate(file.pages) if not page.is_reduced]
    except Exception:  # tifffile raises many kinds
        return [0]
