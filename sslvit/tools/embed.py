"""Features of all images of a source in one file: for `sslvit search`, or for other programs.

.parquet  columns path, label (if the source has labels) and vector. It needs the extra `parquet`.
.npy      the vectors, [N, D]. <out>.csv beside it has path and label of each.
.faiss    an exact index for faiss, with <out>.csv. Its vectors have unit length: their inner product is the cosine.

Rows are in the order of the source. Paths are relative to it. <out>.json says how the vectors were computed, and lists
the images that cannot be read and have no row.

The work is done in parts of 16 batches, in the folder <out>.parts. They are joined at the end. So the memory does not
grow with the vectors, and a command that was stopped goes on after its whole parts when it is started again. The result
is the same for any number of processes, and after any stop. Processes on several machines need out= on a disk that
all of them see.
"""

import csv
import hashlib
import io
import json
import struct
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import faiss
import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..checkpoints import textfile
from ..data import Source, none_readable, split_part
from ..distributed import gather_objects, on_first_process, rank, say, world_size
from ..errors import UserError, printable, require
from ..evaluation.feature_cache import digest, place_of
from ..evaluation.features import pooled_batches
from ..evaluation.frozen import Frozen, load_frozen
from ..model.encoder import Encoder
from .config import Embed as Config

FORMS = (".parquet", ".npy", ".faiss")
PART = 16  # batches
DTYPES = {"float32": torch.float32, "float16": torch.float16}


def run(config: Config) -> None:
    """Compute, join and record the vectors. Raises UserError."""
    out = Path(config.out).expanduser()
    form = check_form("out", config.out, out)
    if not config.data:
        raise UserError("data= is missing: give the images.")
    # Its check of `out` is that of the record: the files beside it are replaced only if sslvit has written them.
    frozen = load_frozen(replace(config, out=f"{config.out}.json"))
    _check_ours(out, config.out)
    source = frozen.open(data := _absolute(config.data), config.download_dir)
    weights = digest(frozen.encoder) if isinstance(frozen.encoder, Encoder) else config.run
    about: dict[str, Any] = {
        "data": data, "weights": weights,
        "protocol": place_of(frozen.encoder, source, frozen.normalize, frozen.accelerator),
        "pool": frozen.pool, "dtype": config.dtype, "unit_length": form == ".faiss", "batch_size": config.batch_size,
    }  # fmt: skip
    identity = hashlib.sha256(json.dumps(about).encode()).hexdigest()
    parts = Parts(out.with_name(f"{out.name}.parts"), identity, len(source), PART * config.batch_size)
    if on_first_process(lambda: _finished(out, identity)):
        say(f"{config.out} is there already, of these images and weights.")
    else:
        on_first_process(parts.make_folder)
        _compute(frozen, source, parts, DTYPES[config.dtype], form == ".faiss")
        _join(frozen, source, parts, out, about | {"identity": identity})
    if rank() == 0:
        parts.remove()


def check_form(key: str, text: str, path: Path) -> str:
    """The ending of a file of vectors. Raises UserError."""
    if path.suffix.lower() not in FORMS:
        raise UserError(f"{key}={text} must end in one of {', '.join(FORMS)}.")
    if path.suffix.lower() == ".parquet":
        require("pyarrow.parquet", "parquet", "parquet")
    return path.suffix.lower()


def _absolute(spec: str) -> str:
    """The same source from any working folder."""
    path = Path(spec).expanduser()
    return str(path.absolute()) if Path(split_part(str(path))[0]).exists() else spec


def _check_ours(out: Path, text: str) -> None:
    """Raises UserError for a file that is there without the record that `sslvit embed` writes."""
    record = out.with_name(f"{out.name}.json")
    for path in (out, out.with_name(f"{out.name}.csv"), out.with_name(f"{out.name}.parts")):
        if path.is_symlink() or (path.exists() and not (record.is_file() or path.suffix == ".parts")):
            raise UserError(f"out={text}: {path} exists and was not written by sslvit embed: give another name.")


def _finished(out: Path, identity: str) -> bool:
    try:
        record = json.loads(out.with_name(f"{out.name}.json").read_text(encoding="utf-8"))
        return record["identity"] == identity and bool(record["results"]) and out.stat().st_size == record["bytes"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


class Parts:
    """Vectors in files, each of `size` images of a source one after another."""

    def __init__(self, folder: Path, identity: str, images: int, size: int) -> None:
        """identity: of weights, images and settings. A part of another identity is not taken."""
        self.folder, self.identity, self.images, self.size = folder, identity, images, size

    def __len__(self) -> int:
        return -(-self.images // self.size)

    def numbers(self, part: int) -> Tensor:
        """[n] of its images in the source."""
        return torch.arange(part * self.size, min((part + 1) * self.size, self.images))

    def path(self, part: int) -> Path:
        return self.folder / f"{part:08d}.safetensors"

    def make_folder(self) -> None:
        """Raises UserError."""
        try:
            textfile.make_folder(self.folder, self.folder.parent)
        except OSError as error:
            raise UserError(f"The parts cannot be written to {self.folder}: {error.strerror}.") from error

    def write(self, part: int, values: Tensor, numbers: Tensor) -> None:
        """Raises UserError."""
        about = {"identity": self.identity, "checksum": _checksum(values, numbers)}
        try:
            textfile.write(self.path(part), save({"values": values, "numbers": numbers}, about))
        except OSError as error:
            raise UserError(
                f"A part cannot be written to {self.path(part)}: {error.strerror or error}. Start the same command "
                "again to go on."
            ) from error

    def read(self, part: int) -> tuple[Tensor, Tensor] | None:
        """([n, D] values, [n] numbers of the readable images). None if it is missing, damaged or of another
        identity."""
        try:
            with safe_open(self.path(part), "pt") as file:
                about, values, numbers = file.metadata(), file.get_tensor("values"), file.get_tensor("numbers")
        except (OSError, SafetensorError):
            return None
        same = about == {"identity": self.identity, "checksum": _checksum(values, numbers)}
        return (values, numbers) if same else None

    def readable(self, part: int) -> Tensor:
        """[n] numbers of the images that have a row. Raises UserError."""
        try:
            with safe_open(self.path(part), "pt") as file:
                numbers: Tensor = file.get_tensor("numbers")
                return numbers
        except (OSError, SafetensorError) as error:
            raise self._missing(part) from error

    def whole(self) -> Iterator[tuple[Tensor, Tensor]]:
        """All of them in their order. Raises UserError if one is missing."""
        for part in range(len(self)):
            found = self.read(part)
            if found is None:
                raise self._missing(part)
            yield found

    def _missing(self, part: int) -> UserError:
        return UserError(
            f"{self.path(part)} is missing or damaged: start the same command again. All processes must see the folder "
            "of out=."
        )

    def remove(self) -> None:
        """Remove all parts, and the folder if nothing else is in it."""
        with suppress(OSError):
            for path in self.folder.glob("*.safetensors"):
                path.unlink()
            self.folder.rmdir()


def _checksum(values: Tensor, numbers: Tensor) -> str:
    return f"{zlib.crc32(numbers.numpy().data, zlib.crc32(values.numpy().data)):08x}"


def _compute(frozen: Frozen, source: Source, parts: Parts, dtype: torch.dtype, unit_length: bool) -> None:
    """Write the parts that are missing. Each is the work of one process. Raises UserError."""
    here = range(rank(), len(parts), world_size())
    missing = sorted(part for share in gather_objects([p for p in here if parts.read(p) is None]) for part in share)
    if len(missing) < len(parts):
        say(f"{len(parts) - len(missing)} of {len(parts)} parts are there already and are taken.")
    mine = missing[rank() :: world_size()]
    if mine:
        _compute_parts(frozen, source, parts, mine, dtype, unit_length)
    gather_objects(None)  # all parts are there


def _compute_parts(
    frozen: Frozen, source: Source, parts: Parts, mine: list[int], dtype: torch.dtype, unit_length: bool
) -> None:
    encoder, pool = frozen.encoder, frozen.pool
    waiting, rows = iter(mine), list[tuple[Tensor, Tensor]]()
    part = next(waiting)

    def write(part: int) -> None:
        values = torch.cat([torch.empty(0, encoder.feature_dim(pool)), *(value.cpu().float() for value, _ in rows)])
        values = (F.normalize(values, dim=1) if unit_length else values).to(dtype)
        broken = int((~torch.isfinite(values).all(dim=1)).sum())
        if broken:
            raise UserError(
                f"{broken} of the images from {source.name(int(rows[0][1][0]))} on have features that are no finite "
                f"numbers in {str(dtype).removeprefix('torch.')}: try precision=float32 and dtype=float32, or other "
                "weights."
            )
        parts.write(part, values, torch.cat([torch.empty(0, dtype=torch.long), *(numbers for _, numbers in rows)]))
        rows.clear()

    batches = pooled_batches(
        encoder, source, frozen.normalize, frozen.accelerator, (pool,), frozen.config.batch_size,
        frozen.config.workers, torch.cat([parts.numbers(part) for part in mine]),
    )  # fmt: skip
    for numbers, pooled in batches:
        while int(numbers[0]) // parts.size > part:
            write(part)
            part = next(waiting)
        rows.append((pooled[pool], numbers))
    for last in (part, *waiting):  # without a readable image, except for the first
        write(last)


def _join(frozen: Frozen, source: Source, parts: Parts, out: Path, about: dict[str, Any]) -> None:
    """Write the file, its names and its record, on the first process. Raises UserError."""
    names, unreadable = Rows(source, about["data"]), list[int]()

    def write() -> int:
        record = out.with_name(f"{out.name}.json")
        for part in range(len(parts)):
            unreadable.extend(sorted({*parts.numbers(part).tolist()} - {*parts.readable(part).tolist()}))
        count, width = len(source) - len(unreadable), frozen.encoder.feature_dim(frozen.pool)
        if not count:
            raise none_readable(source)
        dtype = np.dtype(about["dtype"])
        try:
            textfile.write(record, json.dumps({"evaluation": "embed", "results": None}))  # they are ours from now on
            if out.suffix.lower() == ".parquet":
                textfile.write(out, lambda file: _write_parquet(file, parts, names, width, dtype))
            else:
                header = (npy_header if out.suffix.lower() == ".npy" else faiss_header)(count, width, dtype)
                textfile.write(out, lambda file: file.writelines(_after(header, parts)))
                textfile.write(out.with_name(f"{out.name}.csv"), lambda file: file.writelines(names.csv(parts)))
        except OSError as error:
            raise UserError(
                f"{out} cannot be written: {error.strerror or error}. All parts are there: start the same command "
                "again to go on."
            ) from error
        return out.stat().st_size

    size = on_first_process(write)
    if unreadable:
        first = source.name(unreadable[0])
        say(f"{len(unreadable)} of {len(source)} images cannot be read and have no row: the first is {first}.")
    say(f"{out}: {len(source) - len(unreadable)} vectors of {frozen.describe()}, {about['dtype']}")
    lost = [{"number": number, "path": names.path(number)} for number in unreadable]
    frozen.save("embed", {"images": len(source) - len(unreadable), "unreadable": lost}, bytes=size, **about)


class Rows:
    """Paths and labels of the images of a source, as a file of vectors has them."""

    def __init__(self, source: Source, spec: str) -> None:
        path = Path(split_part(spec)[0]).expanduser()
        self.source, self.roots = source, [f"{path}/", f"{path.parent}/"] if path.exists() else []
        self.labelled = source.labels is not None or source.texts is not None

    def path(self, number: int) -> str:
        """Relative to the folder or archive that the user named, or to the folder of the file."""
        name = self.source.name(number)
        return next((name[len(root) :] for root in self.roots if name.startswith(root)), name)

    def label(self, number: int) -> str:
        """The class, or the label as it was written; "" where an image has none."""
        if self.source.labels is None:
            return self.source.texts[number] if self.source.texts is not None else ""
        label = int(self.source.labels[number])
        return self.source.classes[label] if label >= 0 else ""

    def csv(self, parts: Parts) -> Iterator[bytes]:
        """The lines of all images that have a row. Names of any bytes are kept as they are."""
        yield b"path,label\n" if self.labelled else b"path\n"
        for part in range(len(parts)):
            lines = io.StringIO()
            numbers = parts.readable(part).tolist()
            csv.writer(lines, lineterminator="\n").writerows(
                (self.path(n), self.label(n)) if self.labelled else (self.path(n),) for n in numbers
            )
            yield lines.getvalue().encode(errors="surrogateescape")


def _after(header: bytes, parts: Parts) -> Iterator[bytes]:
    yield header
    for values, _ in parts.whole():
        yield values.numpy().tobytes()


def npy_header(count: int, width: int, dtype: np.dtype[Any]) -> bytes:
    """What numpy.save writes before the values."""
    header, about = io.BytesIO(), {"descr": dtype.str, "fortran_order": False, "shape": (count, width)}
    np.lib.format.write_array_header_1_0(header, about)
    return header.getvalue()


def faiss_header(count: int, width: int, dtype: np.dtype[Any]) -> bytes:
    """What faiss.write_index writes before the values of an exact index: that of an empty one, with the numbers put in.
    faiss itself would need all vectors in memory."""
    half = faiss.IndexScalarQuantizer(width, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
    index = half if dtype == np.float16 else faiss.IndexFlatIP(width)
    header = faiss.serialize_index(index).tobytes()
    sizes = count, count * width * (2 if dtype == np.float16 else 1)  # bytes, or for float32 numbers
    return header[:8] + struct.pack("<q", sizes[0]) + header[16:-8] + struct.pack("<Q", sizes[1])


def _write_parquet(file: IO[bytes], parts: Parts, rows: Rows, width: int, dtype: np.dtype[Any]) -> None:
    """A group of rows for each part."""
    pyarrow, parquet = (require(name, "parquet", "parquet") for name in ("pyarrow", "pyarrow.parquet"))
    columns = {"path": rows.path} | ({"label": rows.label} if rows.labelled else {})
    vector = pyarrow.list_(pyarrow.from_numpy_dtype(dtype), width)
    schema = pyarrow.schema([*((name, pyarrow.string()) for name in columns), ("vector", vector)])
    # Vectors have nothing to compress, and no two of their numbers are equal.
    with parquet.ParquetWriter(
        file, schema, compression=dict.fromkeys(columns, "zstd"), use_dictionary=list(columns)[1:]
    ) as writer:
        for values, numbers in parts.whole():
            texts = [[printable(text(n)) or None for n in numbers.tolist()] for text in columns.values()]
            vectors = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(values.numpy().ravel()), width)
            writer.write_table(pyarrow.Table.from_arrays([*map(pyarrow.array, texts), vectors], schema=schema))
