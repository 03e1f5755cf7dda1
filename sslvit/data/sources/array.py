"""A .npy file of images, mapped into memory, or an array of a .npz: [N, H, W] or [N, H, W, C] of uint8, uint16 or
floats."""

import math
import zipfile
from pathlib import Path

import numpy as np
from torch import Tensor

from ...errors import UserError
from ...hardware import free_memory
from ..config import Config
from .files import fingerprint_of, sample_of
from .limits import LABELS, MAX_RATIO, regular, size_text, unpacked_limit
from .names import numbered
from .pixels import from_array, refuse_bomb
from .source import BadImage, Source
from .syntax import split_part


class Array(Source):
    """The images of an array, in its order. A file `x.labels.npy` beside `x.npy` holds their classes, [N] integers or
    texts; of `x.npz:train_images` it is the array `train_labels`, as in MedMNIST."""

    def __init__(self, path: Path, name: str, config: Config) -> None:
        self.path, self.part, self.in_chans, self.value_range = path, name, config.in_chans, config.value_range
        if path.suffix.lower() == ".npz":
            self.pixels, labels, where = _packed(path, name)
        else:
            beside = path.with_suffix(".labels.npy")
            self.pixels, labels, where = _mapped(path), _mapped(beside) if beside.exists() else None, str(beside)
        check_shape(self.pixels.shape, self.pixels.dtype, config.in_chans, str(path))
        self.classes, self.labels = classes_of(labels, len(self), where)

    def __len__(self) -> int:
        return len(self.pixels)

    def name(self, index: int) -> str:
        return f"{self.path}{f':{self.part}' if self.part else ''}[{index}]"

    def identity(self) -> str:
        """Its shape and type, because an array has no names."""
        return f"array-1:{self.pixels.shape},{self.pixels.dtype}"

    def fingerprint(self) -> str:
        return fingerprint_of(f"{self.identity()},{self.part}", [str(self.path)])

    def sample(self) -> list[str]:
        return sample_of(len(self), lambda index: np.ascontiguousarray(self.pixels[index]).tobytes())

    def read(self, index: int) -> Tensor:
        return from_array(self.pixels[index], self.in_chans, self.value_range)


def open_array(spec: str, config: Config) -> Array:
    """`images.npy`, or `file.npz:name`, which is unpacked into memory."""
    path, name = split_part(spec)
    return Array(Path(path).expanduser(), name, config)


def _packed(path: Path, name: str) -> tuple[np.ndarray, np.ndarray | None, str]:
    """Images, their labels, and where the labels are from. Raises UserError."""
    try:
        with np.load(path) as file:
            names = list(file)
            if not name and len(names) == 1:
                name = names[0]
            if name not in names:
                raise UserError(
                    f"data: {path} holds the arrays {', '.join(names)}: say which one has the images, "
                    f"{path.name}:{(names or ['name'])[0]}."
                )
            beside = name.replace("images", "labels")
            beside = beside if beside != name and beside in names else ""
            for member in file.zip.infolist():
                if member.filename.removesuffix(".npy") in (name, beside):
                    _check_packed(f"{path}:{member.filename}", member)
            return file[name], file[beside] if beside else None, f"{path}:{beside}"
    except UserError:
        raise
    except Exception as error:  # zip files and numpy's headers have many; AttributeError: it is no zip
        raise UserError(f"data: {path} cannot be read as arrays: {BadImage(error)}.") from error


def _check_packed(where: str, member: zipfile.ZipInfo) -> None:
    """Raises UserError for an array that would take too much memory when it is unpacked."""
    size, free = member.file_size, free_memory()
    if size > unpacked_limit(member.compress_size, LABELS):
        raise UserError(
            f"data: {where} would become {size_text(size)} from {size_text(member.compress_size)}, more than "
            f"{MAX_RATIO} times as much: save it as a .npy file, which is read in place."
        )
    if size > free:
        raise UserError(
            f"data: {where} takes {size_text(size)} and {size_text(free)} of memory are free: save it as a .npy file, "
            "which is read in place."
        )


def _mapped(path: Path) -> np.ndarray:
    try:
        return np.lib.format.open_memmap(regular(path), mode="r")
    except UserError:
        raise
    except Exception as error:  # too short, or a header that numpy cannot parse: TokenError, TypeError ...
        raise UserError(f"data: {path} cannot be read as an array: {BadImage(error)}.") from error


def check_shape(shape: tuple[int, ...], dtype: np.dtype, in_chans: int, where: str) -> None:
    """Raises UserError for an array that does not hold images of in_chans channels."""
    if len(shape) not in (3, 4) or 0 in shape:
        raise UserError(f"data: {where} has the shape {list(shape)}: images are [N, H, W] or [N, H, W, C].")
    try:
        refuse_bomb(shape[2], shape[1], math.prod(shape[3:]), dtype.itemsize)
    except BadImage as error:
        raise UserError(f"data: {where} has the shape {list(shape)}: an image is too large, {error}.") from error
    try:
        from_array(np.broadcast_to(np.uint8(0), shape[1:]), in_chans)
    except BadImage as error:
        raise UserError(
            f"data: {where} has the shape {list(shape)}: {error}; give data.in_chans the number of channels."
        ) from error


def classes_of(values: np.ndarray | None, count: int, where: str) -> tuple[list[str], np.ndarray | None]:
    """[N] integers or texts -> classes and labels. Negative numbers are no label. Raises UserError."""
    if values is None:
        return [], None
    values = np.asarray(values)
    if values.shape == (count, 1):
        values = values[:, 0]
    if values.shape != (count,) or values.dtype.kind not in "iubSUO":
        raise UserError(f"data: {where} must hold one whole number for each of the {count} images.")
    if values.dtype.kind in "iub":
        numbers, inverse = np.unique(values.astype(np.int64), return_inverse=True)
        first = int(np.searchsorted(numbers, 0))  # the numbers before it are negative
        found = [str(number) for number in numbers[first:].tolist()]
        return found, np.maximum(inverse.astype(np.int64) - first, -1) if found else None
    return numbered([value.decode() if isinstance(value, bytes) else str(value) for value in values])
