"""A dataset of an HDF5 file: `file.h5` or `file.h5:group/name`, [N, H, W] or [N, H, W, C], or [N] encoded images."""

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ...errors import UserError, require
from ..config import Config
from .array import check_shape, classes_of
from .decode import decode
from .files import fingerprint_of, sample_of
from .limits import HOW, MAX_BYTES, size_text, unpacked_limit
from .limits import LABELS as LABEL_BYTES
from .pixels import from_array
from .source import BadImage, Source
from .syntax import split_part

IMAGES = ("images", "image", "x", "data", "pixels")  # names tried where none is given
LABELS = ("labels", "label", "y", "targets", "target")  # of integers, beside the images


class Hdf5(Source):
    """The images of a dataset, in its order. A dataset `labels` in the same group holds their classes."""

    def __init__(self, path: Path, name: str, config: Config) -> None:
        require("h5py", "hdf5", "HDF5")
        self.path, self.in_chans, self.value_range = path, config.in_chans, config.value_range
        self._open: tuple[int, Any] = (0, None)  # the process that opened it, and the dataset
        try:
            self._start(name)
        except UserError:
            raise
        except (OSError, RuntimeError, KeyError, ValueError, TypeError, MemoryError) as error:  # HDF5 raises these
            raise UserError(f"data: {path} cannot be read as HDF5: {BadImage(error)}.") from error

    def _start(self, name: str) -> None:
        with self.path.open("rb") as stream, _h5py().File(stream, "r") as file:
            self.dataset = name or _guess(file, self.path)
            if self.dataset not in file or not isinstance(file[self.dataset], _h5py().Dataset):
                raise UserError(f"data: {self.path} has no dataset {name}; it has {', '.join(_names(file))}.")
            found = _own(file[self.dataset], file, self.path)
            self.shape, self.kind = found.shape, str(found.dtype)
            self.encoded = len(self.shape) == 1 and found.dtype.kind in "OS"  # bytes of image files
            if not self.encoded:
                check_shape(self.shape, found.dtype, self.in_chans, f"{self.path}:{self.dataset}")
            beside = next((key for key in LABELS if isinstance(found.parent.get(key), _h5py().Dataset)), None)
            labels = _labels(_own(found.parent[beside], file, self.path), len(self)) if beside else None
            self.classes, self.labels = classes_of(labels, len(self), f"{self.path}:{beside}")

    def __len__(self) -> int:
        return int(self.shape[0])

    def name(self, index: int) -> str:
        return f"{self.path}:{self.dataset}[{index}]"

    def identity(self) -> str:
        return f"hdf5-1:{self.shape},{self.kind}"

    def fingerprint(self) -> str:
        return fingerprint_of(f"{self.identity()},{self.dataset}", [str(self.path)])

    def sample(self) -> list[str]:
        return sample_of(len(self), lambda index: self.read(index).numpy().tobytes())

    def read(self, index: int) -> Tensor:
        try:
            if self._open[0] != os.getpid():
                # Opened as a file object: by path, HDF5 would find the file that the parent process has open, and share
                # its position.
                self._open = os.getpid(), _h5py().File(self.path.open("rb"), "r")[self.dataset]
            values = self._open[1][index]
        except (OSError, RuntimeError, ValueError, KeyError, TypeError, MemoryError) as error:  # a damaged chunk ...
            raise BadImage(error) from error
        if self.encoded:
            return decode(bytes(values), self.in_chans, self.value_range)
        return from_array(np.asarray(values), self.in_chans, self.value_range)


def open_hdf5(spec: str, config: Config) -> Hdf5:
    path, name = split_part(spec)
    return Hdf5(Path(path).expanduser(), name, config)


def _h5py() -> Any:
    return require("h5py", "hdf5", "HDF5")


def _own(dataset: Any, file: Any, path: Path) -> Any:
    """The dataset. Raises UserError if its values are not in this file, or would fill the memory when one is read."""
    where = f"data: {path}:{dataset.name}"
    if dataset.is_virtual or dataset.external or dataset.file.id != file.id:
        raise UserError(f"{where} lies in other files, which is refused: copy its values into one file.")
    if not dataset.id.get_storage_size():
        raise UserError(f"{where} holds nothing: {list(dataset.shape)} values were announced and never written.")
    needed = dataset.dtype.itemsize * math.prod(dataset.chunks or (1,))  # HDF5 unpacks a whole chunk to read from it
    if needed > MAX_BYTES:
        raise UserError(
            f"{where} has chunks of {size_text(needed)}, more than {size_text(MAX_BYTES)}: write it with one image in "
            f"each chunk, or {HOW}."
        )
    return dataset


def _labels(dataset: Any, count: int) -> np.ndarray:
    """The values, or none of them if they do not fit so many images. Raises UserError."""
    if dataset.shape not in ((count,), (count, 1)):
        return np.empty(0)
    if dataset.nbytes > unpacked_limit(dataset.id.get_storage_size(), LABEL_BYTES):
        raise UserError(f"data: {dataset.name} would become {size_text(dataset.nbytes)} of labels: write them anew.")
    values: np.ndarray = dataset[()]
    return values


def _names(file: Any) -> list[str]:
    found: list[str] = []
    file.visititems(lambda name, item: found.append(name) if isinstance(item, _h5py().Dataset) else None)
    return found


def _guess(file: Any, path: Path) -> str:
    """The dataset that holds the images. Raises UserError if there are several, or none."""
    names = _names(file)
    possible = [name for name in names if len(file[name].shape) in (3, 4)]
    chosen = [name for name in names if name in IMAGES] or possible
    if len(chosen) != 1:
        raise UserError(
            f"data: {path} holds the datasets {', '.join(names) or '(none)'}: say which one has the images, "
            f"{path.name}:{(possible or names or ['name'])[0]}."
        )
    return chosen[0]
