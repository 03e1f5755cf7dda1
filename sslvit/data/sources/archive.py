"""zip and tar files read in place: nothing is unpacked, and a name with `..` in it is only a name.

Of a zip the table of contents is read, of a tar every header; then an image is a read at a known place, so that many
tar files (WebDataset shards) are shuffled and resumed like a folder.
"""

import array
import hashlib
import itertools
import json
import os
import struct
import tarfile
import time
import zipfile
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ...distributed import say
from ...errors import UserError
from ..config import Config
from .files import (
    EXTENSIONS,
    MAX_BYTES,
    SCIENTIFIC,
    SOME_EXTENSIONS,
    Encoded,
    check_channels,
    endings_of,
    stamp,
    unfinished,
)
from .names import Names, numbered, top_folders
from .source import BadImage

COMPRESSED = {
    b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"7z\xbc\xaf": "7z",
    b"Rar!": "rar",
}  # fmt: skip
STORED, DEFLATED = 0, 8  # methods of a zip
COLUMNS = 6  # of an index: archive, place, bytes there, bytes unpacked, checksum (-1: none), method
OPEN_FILES = 64  # of one process at a time
LABELS = (".cls", ".json")  # of WebDataset, beside the image of the same name
LABEL_KEYS = ("label", "cls", "class", "target", "category")  # in a .json
MAX_LABEL = 2**20  # bytes of one of these files
SLOW = 2.0  # seconds above which an index is kept for the next time


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
        wanted = EXTENSIONS if any(ending in EXTENSIONS for ending in endings) else SCIENTIFIC
        images = [i for i, ending in enumerate(endings) if ending in wanted and not _hidden(names[i])]
        if not images:
            held = f"{len(names)} other files, for example {names[0]}" if names else "nothing"
            raise UserError(f"data: no images in {_together(paths)}: it holds {held}. Images end in {SOME_EXTENSIONS}.")
        images.sort(key=lambda i: (table[i, 0], names[i]))
        chosen = [names[i] for i in images]
        self.paths, self.ranges, self.rows = paths, Ranges(paths), table[images]
        self.top = _common_top(chosen)
        chosen = [name[len(self.top) :] for name in chosen]
        check_channels(config.in_chans, endings_of(chosen), _together(paths))
        classes, labels = self._labels(names, table, chosen, endings) or top_folders(chosen, "/")
        super().__init__(Names(chosen), config.in_chans, config.value_range, classes, labels)

    def _labels(
        self, names: list[str], table: np.ndarray, images: list[str], endings: list[str]
    ) -> tuple[list[str], np.ndarray] | None:
        """Labels from .cls or .json files; None if the images have none."""
        for wanted in LABELS:
            files = {
                (int(table[i, 0]), _key(name[len(self.top) :])): i
                for i, name in enumerate(names)
                if endings[i] == wanted and name.startswith(self.top)
            }
            if not files:
                continue
            texts = []
            for row, name in zip(self.rows, images, strict=True):
                i = files.get((int(row[0]), _key(name)))
                try:
                    text = "" if i is None else _label(wanted, self._bytes(table[i], MAX_LABEL))
                except BadImage as error:
                    raise UserError(f"data: {names[i]} in {self.paths[row[0]]} cannot be read: {error}.") from error
                if text is None:  # a .json about something else
                    break
                texts.append(text)
            if len(texts) == len(images) and any(texts):
                return numbered(texts)
        return None

    def name(self, index: int) -> str:
        return f"{self.paths[self.rows[index, 0]]}/{self.top}{self.names[index]}"

    def identity(self) -> str:
        """That of the unpacked folder, for one archive."""
        if len(self.paths) == 1:
            return super().identity()
        counts = np.bincount(self.rows[:, 0], minlength=len(self.paths)).tolist()
        shards = [f"{os.path.basename(path)},{count}" for path, count in zip(self.paths, counts, strict=True)]
        return hashlib.sha256(";".join([super().identity(), *shards]).encode()).hexdigest()

    def fingerprint(self) -> str:
        stamps = [stamp(path) for path in self.paths]
        return hashlib.sha256(";".join([self.identity(), *stamps]).encode()).hexdigest()

    def bytes_of(self, index: int) -> bytes:
        return self._bytes(self.rows[index], MAX_BYTES)

    def _bytes(self, row: np.ndarray, most: int) -> bytes:
        number, place, packed, size, checksum, method = row.tolist()
        if max(packed, size) > most:
            raise BadImage(f"it has {max(packed, size) / 2**20:,.0f} MiB, which is no image")
        try:
            if checksum < 0:  # of a tar: nothing is packed
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
            raise BadImage(str(error)[:100]) from error
        if len(data) != size or zlib.crc32(data) != checksum:
            raise BadImage("its checksum in the zip differs: the file is damaged")
        return data


def open_archive(word: str, config: Config) -> Archive:
    return Archive([str(Path(word).expanduser())], config)


class Ranges:
    """Bytes at places of files. `pread` does not move a position, so that processes that were forked share an open file
    safely; at most OPEN_FILES are open."""

    def __init__(self, paths: list[str]) -> None:
        self.paths = paths
        self.open: dict[int, tuple[int, int]] = {}  # number of the file: (descriptor, bytes)

    def read(self, number: int, place: int, size: int) -> bytes:
        """Raises OSError, also for a place beyond the end."""
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

    That of a tar, whose headers lie between the images, is kept on disk if making it took long, under the file's path,
    size and time, so that a file that has changed is read anew.
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
            f"data: {path} is packed with {packer} as a whole, so that no image in it can be read alone: unpack it, "
            "or make a plain .tar or a .zip of what it holds."
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
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):  # not there, or not whole: made again
        pass
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
    except OSError as error:  # then it takes as long the next time
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
    names, rows, links, num_symbolic = [], array.array("q"), [], 0
    damaged = f"data: {path} is damaged"
    try:
        with open(path, "rb") as file, tarfile.open(fileobj=_Careful(file), mode="r:") as tar:
            while (info := tar.next()) is not None:
                tar.members = []  # it would keep a kilobyte for each
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
    with open(path, "rb") as file:  # a header that makes no sense looks to tarfile like the end
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
    """A file of which no header can ask for gigabytes: tarfile reads as many bytes for a long name as one claims."""

    MOST = 2**22

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.seek, self.tell = file, file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        return self.file.read(self.MOST if size < 0 else min(size, self.MOST))


def _table(rows: list | array.array) -> np.ndarray:
    return np.array(rows, dtype=np.int64).reshape(-1, COLUMNS - 1)


def _hidden(name: str) -> bool:
    return any(part.startswith(".") and part != ".." for part in name.split("/")) or name.startswith("__MACOSX/")


def _common_top(names: list[str]) -> str:
    """The folders that all images lie in and that are no class: `train/` of `train/<class>/...`."""
    folders = [name.split("/")[:-1] for name in names]
    pairs = zip(min(folders), max(folders), strict=False)  # what these two share, all share
    common = [part for part, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)]
    if any(len(parts) == len(common) for parts in folders):  # images of a single folder, which may be their class
        common = common[:-1]
    return "".join(f"{part}/" for part in common)


def _key(name: str) -> str:
    """What the files of one sample share: all before the first dot of the last part."""
    folder, _, last = name.rpartition("/")
    return f"{folder}/{last.partition('.')[0]}"


def _label(ending: str, data: bytes) -> str | None:
    """The label that a file holds; None if it is about something else."""
    text = data.decode("utf-8", errors="replace").strip()
    if ending == ".cls":
        return text
    try:
        record = json.loads(text)
    except ValueError:
        return None
    value = next((record[key] for key in LABEL_KEYS if key in record), None) if isinstance(record, dict) else None
    return str(value) if isinstance(value, (int, str)) else None


def _together(paths: list[str]) -> str:
    return paths[0] if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} others"
