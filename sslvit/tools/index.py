"""What `sslvit embed` has written, read again: vectors, paths, labels, and the record of how they were made."""

import csv
import json
import struct
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf

from .. import data
from ..arguments import merge
from ..data import Source, open_source, split_part
from ..errors import UserError, require
from .embed import check_form, faiss_header

RECORD_BYTES = 1 << 28  # of the JSON file beside the vectors, which lists all unreadable images
BLOCK = 2**16  # vectors that are converted at once
Row = tuple[str, str]  # path, label


class Index:
    """Vectors, and what their record says. Nothing of it is trusted: it may be from somebody else."""

    def __init__(self, name: str, run: str = "", data: str = "") -> None:
        """name: the file. run, data: the encoder and the images, where they are not what the record names. Raises
        UserError."""
        path = Path(name).expanduser()
        self.path, self.given, form = path, {"run": run, "data": data}, check_form("index", name, path)
        try:
            self.record = _read_record(path.with_name(f"{path.name}.json"))
            self.lost = [int(one["number"]) for one in self.record["results"]["unreadable"]]
            self.count = int(self.record["results"]["images"])
            values = {".npy": _read_npy, ".faiss": _read_faiss, ".parquet": _read_parquet}[form](path)
            if values.ndim != 2 or values.dtype not in (np.float16, np.float32) or not 0 < len(values) == self.count:
                raise ValueError(f"it has not the {self.count} vectors that {path.name}.json names")
            if not all(0 <= number < self.count + len(self.lost) for number in self.lost):
                raise ValueError(f"{path.name}.json names unreadable images that cannot be")
        except UserError:  # a ValueError too
            raise
        except (ValueError, KeyError, TypeError, EOFError, RecursionError, MemoryError, struct.error) as error:
            raise UserError(f"index={name} is damaged or not what sslvit embed writes: {error}.") from error
        mapped = form == ".faiss" and values.dtype == np.float32  # these have unit length
        self.vectors = torch.from_numpy(values) if mapped else torch.empty(values.shape)
        for start in range(0, len(values), BLOCK):
            block = torch.from_numpy(np.array(values[start : start + BLOCK], dtype=np.float32))
            if not torch.isfinite(block).all():
                raise UserError(f"index={name} has vectors that are no finite numbers: embed the images again.")
            if not mapped:
                F.normalize(block, dim=1, out=self.vectors[start : start + BLOCK])

    def all_rows(self) -> Iterator[Row]:
        """(path, label) of each row. Raises UserError."""
        path = self.path.with_name(f"{self.path.name}.csv")
        try:
            if self.path.suffix.lower() == ".parquet":
                yield from _parquet_rows(self.path)
            else:
                with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
                    yield from ((row[0], row[1] if len(row) > 1 else "") for row in islice(csv.reader(file), 1, None))
        except (csv.Error, IndexError) as error:
            raise UserError(f"{path} is damaged ({error}): embed the images again.") from error

    def rows(self, wanted: Iterable[int]) -> dict[int, Row]:
        """(path, label) of some rows. Raises UserError."""
        some, count = set(wanted), 0
        found = {}
        for number, row in enumerate(self.all_rows()):
            count += 1
            if number in some:
                found[number] = row
        if count != self.count:
            raise UserError(f"{self.path.name} has {self.count} vectors and {count} paths: embed the images again.")
        return found

    def place(self, path: str) -> str:
        """The path from the working folder, where there is such a file."""
        root = Path(split_part(self.named("data"))[0])
        return next((str(file) for file in (root / path, root.parent / path) if file.is_file()), path)

    def named(self, key: str) -> str:
        return self.given[key] or str(self.record.get(key, ""))

    def local(self, key: str) -> str:
        """The run or the images that were embedded. Raises UserError for what would be fetched from a network, if only
        the record names it."""
        named = self.named(key)
        kinds = "random:" if key == "run" else "fractals"
        name = split_part(named.removeprefix("untrained:").removeprefix("pixels:"))[0]
        if self.given[key] or named == "pixels" or named.startswith(kinds) or Path(name).expanduser().exists():
            return named
        raise UserError(f"The index was made with {key}={named}, which is no file or folder here: give {key}=.")

    def source(self) -> Source:
        """The images that were embedded. Raises UserError."""
        spec, protocol = self.local("data"), self.record["protocol"]
        settings = merge(
            OmegaConf.structured(data.Config()),
            {"in_chans": protocol["architecture"][2], "value_range": protocol["value_range"]},
            f"{self.path.name}.json",
        )
        source = open_source(spec, OmegaConf.to_object(settings))  # type: ignore[arg-type]
        if len(source) != self.count + len(self.lost) or source.fingerprint() != protocol["images"]:
            raise UserError(f"{spec} has changed since its images were embedded: embed them again.")
        return source


def _read_record(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"There is no {path}, which sslvit embed writes beside the vectors.")
    if path.stat().st_size > RECORD_BYTES:
        raise ValueError(f"{path.name} is larger than {RECORD_BYTES:,} bytes")
    record = json.loads(path.read_text(encoding="utf-8"))
    if record["evaluation"] != "embed" or record["results"] is None:
        raise UserError(f"{path} is of an embedding that is not finished: start its command again.")
    return dict(record)


def _read_npy(path: Path) -> np.ndarray:
    return np.asarray(np.load(path, mmap_mode="c"))


def _read_faiss(path: Path) -> np.ndarray:
    """Of the one layout that `sslvit embed` writes. faiss does not read the file: its reader trusts what is in it."""
    with path.open("rb") as file:
        start = file.read(16)
    kinds = {b"IxFI": np.float32, b"IxSQ": np.float16}
    dtype, (width, count) = np.dtype(kinds[start[:4]]), struct.unpack("<iq", start[4:])
    if not (0 < width < 2**20 and 0 < count < 2**40):
        raise ValueError(f"{count} vectors of {width} numbers")
    header = faiss_header(count, width, dtype)
    with path.open("rb") as file:
        if file.read(len(header)) != header or path.stat().st_size != len(header) + count * width * dtype.itemsize:
            raise ValueError("it is not an exact index of this size")
    return np.asarray(np.memmap(path, dtype, "c", len(header), (count, width)))


def _parquet(path: Path) -> Any:
    parquet = require("pyarrow.parquet", "parquet", "parquet")
    try:
        return parquet.ParquetFile(path)
    except Exception as error:  # pyarrow has many of its own
        raise ValueError(str(error).splitlines()[0]) from error


def _read_parquet(path: Path) -> np.ndarray:
    with _parquet(path) as file:
        width = file.schema_arrow.field("vector").type.list_size
        if file.metadata.num_rows * width * 2 > path.stat().st_size:  # they are not compressed
            raise ValueError("it is shorter than its vectors")
        parts = [batch.column(0).flatten().to_numpy() for batch in file.iter_batches(columns=["vector"])]
    return np.concatenate(parts).reshape(-1, width)


def _parquet_rows(path: Path) -> Iterator[Row]:
    with _parquet(path) as file:
        names = [name for name in ("path", "label") if name in file.schema_arrow.names]
        for batch in file.iter_batches(columns=names):
            columns = [batch.column(name).to_pylist() for name in names]
            yield from ((row[0] or "", (row[1] or "") if len(row) > 1 else "") for row in zip(*columns, strict=True))
