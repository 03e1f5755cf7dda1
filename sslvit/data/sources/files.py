"""What sources of encoded images share, be these files of a disk, members of an archive or cells of a table."""

import hashlib
import os
import platform
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from ...errors import UserError, require
from ..config import Config
from .decode import decode, decode_smaller
from .limits import HOW, MAX_BYTES, size_text
from .names import Names
from .pixels import MODES
from .source import BadImage, Reduction, Source

EXTENSIONS = frozenset([
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm",
    ".jp2", ".j2k", ".ico", ".tga", ".avif",
])  # fmt: skip
SCIENTIFIC = frozenset([".dcm", ".dicom", ".npy"])  # looked for where there is none of the above
DEEP = frozenset([".tif", ".tiff", *SCIENTIFIC])  # those that can have more than four channels
SOME_EXTENSIONS = ".jpg, .png, .webp, .tif, .bmp and the like"
SAMPLE, BLOCK = 64, 2**16  # blocks that a fingerprint reads, and their bytes
SAMPLED = 16  # images whose bytes a run remembers


class Encoded(Source):
    """Images, each decoded from the bytes of an image file."""

    def __init__(
        self, names: Names, config: Config, classes: list[str] | None = None, labels: np.ndarray | None = None
    ) -> None:
        self.names, self.classes, self.labels = names, classes or [], labels
        self.in_chans, self.value_range = config.in_chans, config.value_range

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        return self.names[index]

    def bytes_of(self, index: int) -> bytes:
        """The encoded image. Raises BadImage."""
        raise NotImplementedError

    def read(self, index: int) -> Tensor:
        return decode(self.bytes_of(index), self.in_chans, self.value_range)

    def read_smaller(self, index: int, reduction: Reduction) -> tuple[Tensor, tuple[int, int]]:
        return decode_smaller(self.bytes_of(index), self.in_chans, self.value_range, reduction)

    def identity(self) -> str:
        return self.names.digest()

    def sample(self) -> list[str]:
        return sample_of(len(self), self.bytes_of)


class Files(Encoded):
    """Files below `root`. An absolute path stands for itself."""

    def __init__(self, root: Path, names: Names, config: Config, classes: list[str], labels: np.ndarray | None) -> None:
        super().__init__(names, config, classes, labels)
        self.root = root

    def name(self, index: int) -> str:
        return str(self.root / self.names[index])

    def bytes_of(self, index: int) -> bytes:
        return read_file(self.name(index))

    def sample(self) -> list[str]:
        return sample_of(len(self), lambda index: b"".join(_blocks(self.name(index), 1)))

    def fingerprint(self) -> str:
        return fingerprint_of(self.identity(), self.names, self.root)


def read_file(path: str) -> bytes:
    """The bytes of a file. Raises BadImage."""
    try:
        about = os.stat(path)
        if not stat.S_ISREG(about.st_mode):  # opening a pipe would wait for ever
            raise BadImage("it is a folder" if stat.S_ISDIR(about.st_mode) else "it is a device, not a file")
        if about.st_size > MAX_BYTES:
            raise BadImage(f"the file has {size_text(about.st_size)}, which is no image: {HOW}")
        with open(path, "rb") as file:
            return file.read(about.st_size)
    except (OSError, ValueError, MemoryError) as error:  # ValueError: a zero byte in a name of a list
        raise BadImage(getattr(error, "strerror", None) or error) from error


def unfinished(path: Path) -> Path:
    """Where a file or folder is made before it is renamed: a name that no other process of any machine uses."""
    return path.with_name(f"{path.name}.{platform.node()}.{os.getpid()}.part")


def stamp(path: str | Path) -> str:
    """Changes when a file does: its size and the time of its last change."""
    try:
        about = os.stat(path)
    except OSError:  # a link to nowhere, a file removed meanwhile: reading it is a BadImage
        return "missing"
    return f"{about.st_size},{about.st_mtime_ns}"


def fingerprint_of(identity: str, names: Names | Sequence[str], root: str | Path = "") -> str:
    """Changes when the identity does, the size or time of a file below `root`, or a byte among a sample of all files:
    at most SAMPLE blocks of BLOCK bytes, spread over the files and within them."""
    digest = hashlib.sha256(identity.encode())
    for name in names:
        digest.update(f"{stamp(os.path.join(root, name))};".encode())
    chosen = np.linspace(0, len(names) - 1, min(SAMPLE, len(names))).astype(int).tolist()
    for index in chosen:
        for block in _blocks(os.path.join(root, names[index]), SAMPLE // len(chosen)):
            digest.update(block)
    return digest.hexdigest()


def _blocks(path: str, most: int) -> Iterator[bytes]:
    """Blocks of bytes spread over a file; all of its bytes if these are few. None of a file that cannot be read."""
    try:
        if os.path.isfile(path):  # opening a pipe would wait for ever
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                count, last = min(most, -(-size // BLOCK)), max(0, size - BLOCK)
                for place in [last // 2] if count == 1 else np.linspace(0, last, count).astype(int).tolist():
                    file.seek(place)
                    yield file.read(BLOCK)
    except OSError:
        pass  # a file that cannot be read has no blocks; who opens it as an image says why


def sample_of(count: int, bytes_of: Callable[[int], bytes]) -> list[str]:
    """A hash for each of at most SAMPLED images, spread over all of them. Empty for one that cannot be read."""
    hashes = []
    for index in np.linspace(0, count - 1, min(SAMPLED, count)).astype(int).tolist():
        try:
            hashes.append(hashlib.sha256(bytes_of(index)).hexdigest()[:16])
        except BadImage:
            hashes.append("")
    return hashes


def endings_of(names: Iterable[str]) -> set[str]:
    return {os.path.splitext(name)[1].lower() for name in names}


def check_channels(in_chans: int, endings: set[str], where: str) -> None:
    """Raises UserError for more channels than files of these endings can have, and for those whose package is
    missing."""
    if in_chans not in MODES and not endings & DEEP:
        raise UserError(
            f"data.in_chans={in_chans}, but the images of {where} have 1 to 4 channels: use 1 or 3 "
            "(TIFF, .npy, HDF5 and DICOM may have more)."
        )
    if endings & {".dcm", ".dicom"}:
        require("pydicom", "dicom", "DICOM")
