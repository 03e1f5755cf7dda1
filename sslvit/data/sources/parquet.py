"""Parquet files with encoded images in a column, as Hugging Face and others write them.

Parquet compresses groups of rows: to read one image, hundreds of megabytes may have to be unpacked. So all images are
unpacked once, into a file in data.download_dir, and then each is read from its place in that file.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import UserError, require
from ...progress import counting
from ..config import Config
from .archive import Ranges
from .files import Encoded, check_channels, fingerprint_of, stamp, unfinished
from .limits import HOW, MAX_BYTES, size_text, unpacked_limit
from .names import Names, numbered
from .source import BadImage

IMAGES = ("image", "img", "jpg", "png", "bytes", "image_bytes", "content")  # names of columns, the first that is there
LABELS = ("label", "labels", "cls", "class", "target", "fine_label", "category")
ROWS, AT_ONCE = 64, 2**31  # rows and bytes that are unpacked at once, at most


class Parquet(Encoded):
    """The rows of all files, in their order."""

    def __init__(self, paths: list[str], config: Config) -> None:
        self.paths = paths
        parts = [_unpacked(path, Path(config.download_dir).expanduser()) for path in paths]
        names = [name for part in parts for name in part["names"]]
        check_channels(config.in_chans, set(), paths[0])
        self.ends = np.cumsum([len(part["names"]) for part in parts])
        self.places = np.concatenate([part["places"] for part in parts])
        self.ranges = Ranges([part["file"] for part in parts])
        texts = [text for part in parts for text in part["texts"]]
        classes, labels = numbered(texts)
        given = parts[0]["classes"]  # names of the classes, in the file's own order
        if labels is not None and given and all(part["classes"] == given for part in parts):
            number = {name: i for i, name in enumerate(given)} | {"": -1}
            classes, labels = given, np.array([number[text] for text in texts], dtype=np.int64)
        super().__init__(Names(names), config, classes, labels)
        if labels is not None:
            self.texts, self.columns = Names(texts), [parts[0]["column"]]

    def _file(self, index: int) -> int:
        return int(np.searchsorted(self.ends, index, side="right"))

    def name(self, index: int) -> str:
        return f"{self.paths[self._file(index)]}/{self.names[index]}"

    def bytes_of(self, index: int) -> bytes:
        place, size = self.places[index].tolist()
        if size > MAX_BYTES:
            raise BadImage(f"it has {size_text(size)}, which is no image: {HOW}")
        try:
            return self.ranges.read(self._file(index), place, size)
        except OSError as error:
            raise BadImage(f"{error.strerror or error}: was data.download_dir emptied?") from error

    def fingerprint(self) -> str:
        return fingerprint_of(self.identity(), self.paths)


def open_parquet(spec: str, config: Config) -> Parquet:
    return Parquet([str(Path(spec).expanduser())], config)


def _unpacked(path: str, cache_dir: Path) -> dict[str, Any]:
    """{"names", "texts", "classes", "column", "places": [N, 2] int64, "file"}: unpacked now, if it was not before."""
    place = f"{os.path.abspath(path)},{stamp(path)}"
    folder = cache_dir / "parquet" / hashlib.sha256(os.fsencode(place)).hexdigest()[:32]
    if not folder.exists():
        _unpack(path, folder)
    try:
        record = json.loads((folder / "rows.json").read_text(encoding="utf-8"))
        return {**record, "places": np.load(folder / "places.npy"), "file": str(folder / "images")}
    except (OSError, ValueError) as error:
        raise UserError(f"data: {folder} is damaged: remove it, and {path} is unpacked anew.") from error


def _unpack(path: str, folder: Path) -> None:
    """Make the folder, whole or not at all. Raises UserError."""
    parquet = require("pyarrow.parquet", "parquet", "parquet")
    part = unfinished(folder)
    try:
        part.mkdir(parents=True)
        with parquet.ParquetFile(path) as file:
            _write(file, path, part)
        if not folder.exists():  # another machine may have been faster
            os.replace(part, folder)
    except UserError:
        raise
    except OSError as error:  # pyarrow raises it for a damaged file too
        raise UserError(f"data: {path} cannot be unpacked into {folder.parent}: {_first(error)}.") from error
    except Exception as error:  # pyarrow has many of its own
        raise UserError(f"data: {path} cannot be read as parquet: {_first(error)}.") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _write(file: Any, path: str, folder: Path) -> None:
    schema, count = file.schema_arrow, file.metadata.num_rows
    image, label = _image_column(schema, path), next((name for name in LABELS if name in schema.names), None)
    classes = _class_names(schema, label)
    names: list[str] = []
    texts, places, at = [], [], 0
    groups = [file.metadata.row_group(number).total_byte_size for number in range(file.metadata.num_row_groups)]
    rows = max(1, min(ROWS, AT_ONCE // max([1, *groups])))  # a cell may be as large as all that is in its group
    limit = unpacked_limit(os.path.getsize(path), AT_ONCE)
    with (folder / "images").open("wb") as out, counting(f"unpacking {path}", count) as show:
        for batch in file.iter_batches(rows, columns=[name for name in (image, label) if name]):
            cells = batch.column(image).to_pylist()
            values = batch.column(label).to_pylist() if label else [None] * len(cells)
            for cell, value in zip(cells, values, strict=True):
                data = (cell.get("bytes") if isinstance(cell, dict) else cell) or b""
                given = cell.get("path") if isinstance(cell, dict) else None
                names.append(given or str(len(names)))
                texts.append(_text(value, classes))
                places.append((at, len(data)))
                out.write(data)
                at += len(data)
            if at > limit:
                raise UserError(
                    f"data: {path} has {size_text(os.path.getsize(path))} and would become more than "
                    f"{size_text(limit)}: its images are the same ones many times. Write each once."
                )
            show(len(names))
    np.save(folder / "places.npy", np.array(places, dtype=np.int64).reshape(-1, 2))
    record = {"names": names, "texts": texts, "classes": classes, "column": label}
    (folder / "rows.json").write_text(json.dumps(record), encoding="utf-8")


def _image_column(schema: Any, path: str) -> str:
    def holds_bytes(name: str) -> bool:
        kind = str(schema.field(name).type)
        return kind in ("binary", "large_binary") or (kind.startswith("struct<") and "bytes: binary" in kind)

    names = [name for name in (*IMAGES, *schema.names) if name in schema.names and holds_bytes(name)]
    if not names:
        raise UserError(f"data: {path} has no column of encoded images; it has {', '.join(schema.names)}.")
    return names[0]


def _class_names(schema: Any, label: str | None) -> list[str]:
    """Names of the classes, which Hugging Face writes beside a column of their numbers."""
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        return list(features[label]["names"])
    except (KeyError, TypeError, ValueError):
        return []


def _text(value: Any, classes: list[str]) -> str:
    """A cell of the label column as text; "" for no label."""
    if isinstance(value, list):  # several classes
        return "|".join(_text(item, classes) for item in value)
    if value is None or (classes and isinstance(value, int) and value < 0):
        return ""
    return classes[value] if isinstance(value, int) and value < len(classes) else str(value)


def _first(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
