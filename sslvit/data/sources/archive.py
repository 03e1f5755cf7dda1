"""zip and tar files read in place: nothing is unpacked.

At the start the table of contents of a zip is read, or every header of a tar. Then each image is read from its place in
the file. So many tar files (WebDataset shards) are shuffled and resumed like a folder.
"""

import array
import hashlib
import json
import os
import struct
import tarfile
import time
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np

from ...distributed import say
from ...errors import UserError
from ..config import Config
from .files import (
    EXTENSIONS,
    SCIENTIFIC,
    SOME_EXTENSIONS,
    Encoded,
    check_channels,
    endings_of,
    fingerprint_of,
    stamp,
    unfinished,
)
from .limits import HOW, MAX_BYTES, size_text, unpacked_limit
from .names import Names, numbered, top_folders
from .source import BadImage

COMPRESSED = {
    b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"7z\xbc\xaf": "7z",
    b"Rar!": "rar",
}  # fmt: skip
STORED, DEFLATED = 0, 8  # methods of a zip
COLUMNS = 6  # of an index: archive, offset, bytes there, bytes unpacked, checksum (-1: none), method
OPEN_FILES = 64  # in one process at a time
LABELS = (".cls", ".json")  # of WebDataset, beside the image of the same name
LABEL_KEYS = ("label", "cls", "class", "target", "category")  # in a .json
MAX_LABEL = 2**20  # bytes of one of these files
SLOW = 2.0  # seconds; an index that takes longer to make is kept for the next time


class Archive(Encoded):
    """Image files in archives, one archive after another, each in the order of the names. Labels are those of .cls or
    .json files beside the images, or else class folders, as in a folder."""

    def __init__(self, paths: list[str], config: Config) -> None:
        names, tables = [], []
        for number, path in enumerate(paths):
            found, rows = _index(path, config.download_dir)
            names += found
            tables.append(np.insert(rows, 0, number, axis=1))
        table = np.concatenate(tables)
        endings = [os.path.splitext(name)[1].lower() for name in names]
        where = paths[0] if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} others"
        wanted = EXTENSIONS if any(ending in EXTENSIONS for ending in endings) else SCIENTIFIC
        images = [i for i, ending in enumerate(endings) if ending in wanted and not _hidden(names[i])]
        if not images:
            held = f"{len(names)} other files, for example {names[0]}" if names else "nothing"
            raise UserError(f"data: no images in {where}: it holds {held}. Images end in {SOME_EXTENSIONS}.")
        images.sort(key=lambda i: (table[i, 0], names[i]))
        self.paths, self.ranges, self.rows = paths, Ranges(paths), table[images]
        self.top = _common_top([names[i] for i in images])
        chosen = [names[i].removeprefix(self.top) for i in images]
        check_channels(config.in_chans, endings_of(chosen), where)
        super().__init__(Names(chosen), config, *top_folders(chosen, "/"))
        for ending in LABELS:
            files = [i for i in range(len(names)) if endings[i] == ending]
            if files and any(texts := self._label_texts(ending, files, names, table)):
                self.classes, self.labels = numbered(texts)
                break

    def _label_texts(self, ending: str, files: list[int], names: list[str], table: np.ndarray) -> list[str]:
        """What the label file beside each image says, "" without one. [] if these files are about something else."""
        of_sample = {(table[i, 0], _sample(names[i])): i for i in files}
        texts: list[str] = []
        for row, name in zip(self.rows, self.names, strict=True):
            i = of_sample.get((row[0], _sample(self.top + name)))
            if i is None:
                texts.append("")
                continue
            try:
                text = _label(ending, self._bytes(table[i], MAX_LABEL))
            except BadImage as error:
                raise UserError(f"data: {names[i]} in {self.paths[row[0]]} cannot be read: {error}.") from error
            if text is None:
                return []
            texts.append(text)
        return texts

    def name(self, index: int) -> str:
        return f"{self.paths[self.rows[index, 0]]}/{self.top}{self.names[index]}"

    def identity(self) -> str:
        """Of one archive: the same as of the folder that it was made of."""
        if len(self.paths) == 1:
            return super().identity()
        counts = np.bincount(self.rows[:, 0], minlength=len(self.paths)).tolist()
        shards = [f"{os.path.basename(path)},{count}" for path, count in zip(self.paths, counts, strict=True)]
        return hashlib.sha256(";".join([super().identity(), *shards]).encode()).hexdigest()

    def fingerprint(self) -> str:
        return fingerprint_of(self.identity(), self.paths)

    def bytes_of(self, index: int) -> bytes:
        return self._bytes(self.rows[index], MAX_BYTES)

    def _bytes(self, row: np.ndarray, limit: int) -> bytes:
        number, place, packed, size, checksum, method = row.tolist()
        if max(packed, size) > limit:
            raise BadImage(f"it has {size_text(max(packed, size))}, which is no image: {HOW}")
        if size > unpacked_limit(packed):
            raise BadImage(f"its {size_text(packed)} would become {size_text(size)}: make the zip without compression")
        try:
            if checksum < 0:  # in a tar nothing is packed
                return self.ranges.read(number, place, packed)
            header = self.ranges.read(number, place, 30)
            signature, flags, name_length, extra_length = struct.unpack("<4s2xH18xHH", header)
            if signature != b"PK\x03\x04":
                raise BadImage("the zip is damaged where the image should begin")
            if flags & 1:
                raise BadImage("it is encrypted")
            data = self.ranges.read(number, place + 30 + name_length + extra_length, packed)
            if method == DEFLATED:
                data = zlib.decompressobj(-15).decompress(data, size + 1)
            elif method != STORED:
                raise BadImage(f"it is packed by method {method}: make the zip with deflate, or without compression")
        except (OSError, zlib.error) as error:
            raise BadImage(error) from error
        if len(data) != size or zlib.crc32(data) != checksum:
            raise BadImage("its checksum in the zip differs: the file is damaged")
        return data


def open_archive(spec: str, config: Config) -> Archive:
    return Archive([str(Path(spec).expanduser())], config)


class Ranges:
    """Bytes at places of files, of which at most OPEN_FILES are open. Forked processes share an open file safely,
    because `pread` does not move its position."""

    def __init__(self, paths: list[str]) -> None:
        self.paths = paths
        self.open: dict[int, tuple[int, int]] = {}  # number of the file: (descriptor, bytes)

    def read(self, number: int, place: int, size: int) -> bytes:
        """Raises OSError if the file cannot be read or ends before."""
        if number not in self.open:
            if len(self.open) >= OPEN_FILES:
                os.close(self.open.pop(next(iter(self.open)))[0])
            descriptor = os.open(self.paths[number], os.O_RDONLY)
            self.open[number] = descriptor, os.fstat(descriptor).st_size
        descriptor, length = self.open[number]
        if place < 0 or size < 0 or place + size > length:
            raise OSError("the archive ends before it")
        parts = []
        while size:
            part = os.pread(descriptor, size, place)
            if not part:
                raise OSError("the archive ends before it")
            parts.append(part)
            place, size = place + len(part), size - len(part)
        return b"".join(parts)

    def __del__(self) -> None:
        for descriptor, _ in self.open.values():
            os.close(descriptor)


def _index(path: str, cache_dir: str) -> tuple[list[str], np.ndarray]:
    """What an archive holds: names, and [n, 5] int64 rows. Raises UserError.

    The headers of a tar lie between the images. If it takes long to read them, the index is kept on disk, under a name
    made of the file's path, size and time: a file that has changed is read anew.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(512)
            length = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise UserError(f"data: {path} cannot be read: {error.strerror}.") from error
    packer = next((name for magic, name in COMPRESSED.items() if start.startswith(magic)), None)
    if packer:
        raise UserError(
            f"data: {path} is packed with {packer} as a whole, so no image in it can be read alone: unpack it, or make "
            "a plain .tar or a .zip of what it holds."
        )
    if start.startswith((b"PK\x03\x04", b"PK\x05\x06")) or (start[257:262] != b"ustar" and zipfile.is_zipfile(path)):
        return _zip(path)
    place = f"{os.path.abspath(path)},{stamp(path)}"
    kept = Path(cache_dir).expanduser() / "index" / f"{hashlib.sha256(os.fsencode(place)).hexdigest()[:32]}.npz"
    try:
        with np.load(kept) as stored:
            names = Names([])
            names.ends, names.blob = stored["ends"], stored["blob"]
            return list(names), stored["rows"]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        pass  # not there, or not whole: it is made again
    began = time.perf_counter()
    found, rows = _tar(path, length)
    if time.perf_counter() - began > SLOW:
        _keep(kept, Names(found), rows)
    return found, rows


def _keep(path: Path, names: Names, rows: np.ndarray) -> None:
    part = unfinished(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            np.savez(file, ends=names.ends, blob=names.blob, rows=rows)
        os.replace(part, path)
    except OSError as error:
        say(f"The index is not kept for next time: {path}: {error.strerror}.")
        part.unlink(missing_ok=True)


def _zip(path: str) -> tuple[list[str], np.ndarray]:
    try:
        with zipfile.ZipFile(path) as file:
            members = [info for info in file.infolist() if not info.is_dir()]
    except (zipfile.BadZipFile, OSError, ValueError, EOFError, NotImplementedError, struct.error) as error:
        raise UserError(f"data: {path} is damaged: {error}. Copy or make it again.") from error
    rows = [(i.header_offset, i.compress_size, i.file_size, i.CRC, i.compress_type) for i in members]
    # Some programs for Windows write backslashes.
    return [i.filename.replace("\\", "/").removeprefix("./") for i in members], _table(rows)


def _tar(path: str, length: int) -> tuple[list[str], np.ndarray]:
    names: list[str] = []
    rows, links, num_symbolic = array.array("q"), [], 0
    damaged = f"data: {path} is damaged"
    try:
        with open(path, "rb") as file, tarfile.open(fileobj=cast(BinaryIO, _Careful(file)), mode="r:") as tar:
            while (info := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # it would keep a kilobyte for each
                name = info.name.removeprefix("./")
                if info.islnk():
                    links.append((name, info.linkname.removeprefix("./")))
                num_symbolic += info.issym()
                if not info.isreg() or info.issparse():
                    continue
                if info.size < 0 or info.offset_data + info.size > length:
                    raise UserError(f"{damaged}: {name} should have {info.size:,} bytes. Copy or make it again.")
                names.append(name)
                rows.extend((info.offset_data, info.size, info.size, -1, STORED))
            end = tar.offset
    except UserError:
        raise
    except (tarfile.TarError, OSError, ValueError, EOFError) as error:
        raise UserError(f"{damaged}: {error}. Copy or make it again.") from error
    with open(path, "rb") as file:  # tarfile takes a damaged header for the end
        file.seek(end)
        if any(file.read(512)):
            raise UserError(f"{damaged}: at byte {end:,} of {length:,} stands no header. Copy or make it again.")
    if links:  # a file with two names is stored once
        number = {name: i for i, name in enumerate(names)}
        for name, target in links:
            if target in number:
                names.append(name)
                rows.extend(rows[5 * number[target] : 5 * number[target] + 5])
    if not names and num_symbolic:
        raise UserError(
            f"data: {path} holds {num_symbolic:,} links and not the files that they lead to: make it with tar -h."
        )
    return names, _table(rows)


class _Careful:
    """A file that gives 4 MiB at most: for a long name, tarfile reads as many bytes as a header claims."""

    MOST = 2**22

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.seek, self.tell = file, file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        return self.file.read(self.MOST if size < 0 else min(size, self.MOST))


def _table(rows: "Sequence[tuple[int, ...]] | array.array[int]") -> np.ndarray:
    return np.array(rows, dtype=np.int64).reshape(-1, COLUMNS - 1)


def _hidden(name: str) -> bool:
    return any(part.startswith(".") and part != ".." for part in name.split("/")) or name.startswith("__MACOSX/")


def _common_top(names: list[str]) -> str:
    """The folders that all images lie in and that are no class: `train/` of `train/<class>/...`."""
    folders = [name.split("/")[:-1] for name in names]
    common = os.path.commonprefix(folders)  # noqa: RUF071  # of lists, part by part
    if any(len(parts) == len(common) for parts in folders):  # the last one may be the class of its images
        common = common[:-1]
    return "".join(f"{part}/" for part in common)


def _sample(name: str) -> str:
    """What the names of one sample's files share: all before the first dot of the last part."""
    folder, _, last = name.rpartition("/")
    return f"{folder}/{last.partition('.')[0]}"


def _label(ending: str, data: bytes) -> str | None:
    """The label that a file holds; None if it is about something else."""
    text = data.decode("utf-8", errors="replace").strip()
    if ending == ".cls":
        return text
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        return None
    value = next((record[key] for key in LABEL_KEYS if key in record), None) if isinstance(record, dict) else None
    return str(value) if isinstance(value, (int, str)) else None
