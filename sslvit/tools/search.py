"""Search among the vectors that `sslvit embed` has written: nearest images, near duplicates, or a diverse subset.

Similarity is the cosine, and the search is exact.

image=       The k nearest images of each, by the same encoder. Those of the first ten are printed and drawn.
duplicates=  Groups of images: each is linked to another of its group by this similarity or more. A chain of small steps
             may join images that differ, so out= has the similarity of each to the first of its group. Keep that one.
             Which value means "the same" depends on the encoder: begin near 0.99, and look at the picture.
subset=      k centres: begins with the most typical image, and takes again and again the one that is least similar to
             all that are taken (Gonzalez, Theoretical Computer Science 38, 1985: no set of this size has a radius below
             half of its radius). The first n of a longer list are the list of n. out= can be data.train of pretrain.

Vectors of .faiss in float32 are read from the disk when they are used. Others are copied into memory.
"""

import csv
import io
import json
import os
import struct
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from PIL import Image, ImageDraw
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from .. import data
from ..arguments import merge
from ..checkpoints import textfile
from ..data import BadImage, Source, kind_of, open_source, split_part
from ..data.sources.files import EXTENSIONS, Files
from ..data.sources.names import Names
from ..data.sources.syntax import items
from ..distributed import say
from ..errors import UserError, check_range, printable, require
from ..evaluation import pictures
from ..evaluation.feature_cache import digest
from ..evaluation.features import SAY_EVERY
from ..evaluation.frozen import EncoderConfig, load_frozen
from ..evaluation.knn import neighbours
from ..model.encoder import Encoder
from .embed import check_form, faiss_header

RECORD_BYTES = 1 << 28  # of the JSON file beside the vectors, which lists all unreadable images
BLOCK = 2**16  # vectors that are converted at once
TILE = 1024, 2**14  # vectors that are compared with one another at once
MOST_PAIRS = 2**22  # that are kept before they are merged into groups
PRINTED, DRAWN = 10, 10  # images or groups that are printed; rows and columns of the picture
CELL, CAPTION = 96, 16  # pixels
Row = tuple[str, str]  # path, label


@dataclass
class Config:
    index: str = ""  # what sslvit embed has written: .faiss, .npy or .parquet
    image: str = ""  # images to look for: a file, [a.jpg,b.jpg], or images of any kind as in data.train of pretrain
    k: int = 10  # nearest images of each
    duplicates: float | None = None  # in place of image: groups of images with this similarity, such as 0.99
    subset: int | None = None  # in place of image: so many images that are as different as can be
    out: str = ""  # .csv file for all that was found; empty: none
    picture: str | None = ""  # contact sheet; empty: <index>.png; null: none
    run: str = ""  # the encoder, if it is not where it was
    data: str = ""  # the images of the index, if they are not where they were


def run(config: Config) -> None:
    """Search, print, draw. Raises UserError."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError("search runs in one process: start it without accelerate launch or torchrun.")
    if (config.image != "") + (config.duplicates is not None) + (config.subset is not None) != 1:
        raise UserError("Give one of image=<images>, duplicates=<similarity> and subset=<number of images>.")
    check_range("", config, 1, None, "k", "subset")
    check_range("", config, -1, 1, "duplicates")
    if config.out and (Path(config.out).suffix.lower() != ".csv" or not Path(config.out).expanduser().parent.is_dir()):
        raise UserError(f"out={config.out} must be a .csv file in a folder that exists.")
    picture = f"{config.index}.png" if config.picture == "" else config.picture or ""
    index = Index(Path(config.index).expanduser(), config)
    pictures.check(picture)
    if config.image:
        found = _nearest(index, config)
    else:
        found = _duplicates(index, config.duplicates) if config.duplicates is not None else _subset(index, config)
    if config.out:
        lines = io.StringIO()
        csv.writer(lines, lineterminator="\n").writerows(found.table)
        textfile.write(Path(config.out).expanduser(), lines.getvalue().encode(errors="surrogateescape"))
        say(f"written to {config.out}")
    if picture and found.cells:
        _draw(found, index, picture, config.picture != "")


@dataclass
class Found:
    """What is written and drawn."""

    table: list[tuple[Any, ...]]  # rows of the CSV file, the first with the titles
    cells: list[list[tuple[int | Tensor, str]]]  # rows of the picture: a row of the index or an image, and a caption


class Index:
    """Vectors, and what their record says. Nothing of it is trusted: it may be from somebody else."""

    def __init__(self, path: Path, config: Config) -> None:
        """Raises UserError."""
        self.path, self.config, form = path, config, check_form("index", config.index, path)
        try:
            self.record = _read_record(path.with_name(f"{path.name}.json"))
            self.lost = [int(one["number"]) for one in self.record["results"]["unreadable"]]
            self.count = int(self.record["results"]["images"])
            values = {".npy": _read_npy, ".faiss": _read_faiss, ".parquet": _read_parquet}[form](path)
            if values.ndim != 2 or values.dtype not in (np.float16, np.float32) or not 0 < len(values) == self.count:
                raise ValueError(f"it has not the {self.count} vectors that {path.name}.json names")
            if not all(0 <= number < self.count + len(self.lost) for number in self.lost):
                raise ValueError(f"{path.name}.json names unreadable images that cannot be")
        except (ValueError, KeyError, TypeError, EOFError, RecursionError, MemoryError, struct.error) as error:
            raise UserError(f"index={config.index} is damaged or not what sslvit embed writes: {error}.") from error
        mapped = form == ".faiss" and values.dtype == np.float32  # these have unit length
        self.vectors = torch.from_numpy(values) if mapped else torch.empty(values.shape)
        for start in range(0, len(values), BLOCK):
            block = torch.from_numpy(np.array(values[start : start + BLOCK], dtype=np.float32))
            if not torch.isfinite(block).all():
                raise UserError(f"index={config.index} has vectors that are no finite numbers: embed the images again.")
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
        return str(getattr(self.config, key) or self.record.get(key, ""))

    def local(self, key: str) -> str:
        """The run or the images that were embedded. Raises UserError for what would be fetched from a network, if only
        the record names it."""
        given, named = str(getattr(self.config, key)), self.named(key)
        kinds = "random:" if key == "run" else "fractals"
        name = split_part(named.removeprefix("untrained:"))[0]
        if given or named == "pixels" or named.startswith(kinds) or Path(name).expanduser().exists():
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


def _nearest(index: Index, config: Config) -> Found:
    settings = index.record["settings"]
    encoder_config = merge(
        OmegaConf.structured(EncoderConfig()),
        {key: settings[key] for key in ("image_size", "model_args", "precision", "value_range")}
        | {"pool": index.record["pool"], "seed": index.record["seed"], "run": index.local("run")}
        | {"out": f"{index.path}.json"},  # nothing is written: so a run that is read-only will do
        f"{index.path.name}.json",
    )
    frozen = load_frozen(OmegaConf.to_object(encoder_config))  # type: ignore[arg-type]
    if isinstance(frozen.encoder, Encoder) and digest(frozen.encoder) != index.record["weights"]:
        raise UserError(f"run={index.named('run')} has not the weights that the index was made with: give run=.")
    source = _files(config.image, frozen.subject.data_config) or frozen.open(config.image)
    queries = frozen.features(source)
    if queries.values.shape[1] != index.vectors.shape[1]:
        raise UserError(f"index={config.index} has vectors of another width than run={index.named('run')} gives.")
    similarity, found = neighbours(index.vectors, queries.normalized(), min(config.k, index.count))
    rows = index.rows(found.unique().tolist())
    table: list[tuple[Any, ...]] = [("image", "rank", "similarity", "path", "label")]
    cells: list[list[tuple[int | Tensor, str]]] = []
    for number, values, near in zip(queries.index.tolist(), similarity.tolist(), found.tolist(), strict=True):
        name = source.name(number)
        table += [(name, i + 1, f"{values[i]:.4f}", index.place(rows[r][0]), rows[r][1]) for i, r in enumerate(near)]
        if len(cells) < PRINTED:
            say(f"{name}:", *(_line(value, rows[r]) for value, r in zip(values, near, strict=True)))
            pairs = list(zip(values, near, strict=True))[:DRAWN]
            cells.append([(source.read(number), "image"), *((r, _caption(value, rows[r])) for value, r in pairs)])
    if len(queries) > PRINTED and not config.out:
        say(f"... and those of {len(queries) - PRINTED} more images: out=nearest.csv has all.")
    return Found(table, cells)


def _files(spec: str, config: data.Config) -> Source | None:
    """One image file, or a list of them; None for what is a source as it is."""
    names = items(spec) if spec.startswith("[") and spec.endswith("]") else [spec]
    paths = [Path(name).expanduser() for name in names]
    if all(path.is_file() and path.suffix.lower() in EXTENSIONS for path in paths):
        return Files(Path(), Names(map(str, paths)), config, [], None)
    if len(paths) == 1 and kind_of(spec) is None:
        raise UserError(f"image={spec} is not there: give a file, or images of any kind as in data.train.")
    return None


def _line(value: float, row: Row) -> str:
    return f"  {value:.3f}  {row[1]}{'  ' * bool(row[1])}{row[0]}"


def _caption(value: float, row: Row) -> str:
    return f"{value:.2f} {row[1] or row[0].rsplit('/', 1)[-1]}"


def _duplicates(index: Index, least: float) -> Found:
    first = group_near(index.vectors, least)
    order = np.argsort(first, kind="stable")
    groups = [rows for rows in np.split(order, np.flatnonzero(np.diff(first[order])) + 1) if len(rows) > 1]
    groups.sort(key=lambda rows: -len(rows))  # stable: else in the order of the first images
    titles, many = ("group", "similarity", "path", "label"), sum(map(len, groups))
    if not groups:
        say(f"No two of the {index.count} images have a similarity of {least:g} or more.")
        return Found([titles], [])
    say(
        f"{many} of {index.count} images are in {len(groups)} groups that are linked by a similarity of {least:g} or "
        f"more: without the {many - len(groups)} copies {index.count - many + len(groups)} are left."
    )
    names = index.rows(row for rows in groups for row in rows.tolist())
    mixed = sum(len({names[row][1] for row in rows.tolist()}) > 1 for rows in groups)
    if mixed:
        say(f"{mixed} of the groups have images of several labels.")
    table: list[tuple[Any, ...]] = [titles]
    cells: list[list[tuple[int | Tensor, str]]] = []
    for number, rows in enumerate(groups, 1):
        values = (index.vectors[rows] @ index.vectors[rows[0]]).tolist()
        members = list(zip(values, rows.tolist(), strict=True))
        table += [(number, f"{value:.4f}", index.place(names[row][0]), names[row][1]) for value, row in members]
        if number <= PRINTED:
            say(f"group {number}:", *(_line(value, names[row]) for value, row in members[:PRINTED]))
            say(*[f"  ... {len(rows) - PRINTED} more"] * (len(rows) > PRINTED))
            cells.append([(row, _caption(value, names[row])) for value, row in members[:DRAWN]])
    return Found(table, cells)


def group_near(vectors: Tensor, least: float) -> np.ndarray:
    """[N, D] of unit length -> [N] int64: the first row of the group of each. A similarity of `least` links two rows (a
    millionth less will do, for rounding). Memory grows with N, not with the number of links."""
    first, pairs, waiting = np.arange(len(vectors)), list[np.ndarray](), 0
    began = last = time.monotonic()
    for start in range(0, len(vectors), TILE[0]):
        for other in range(start, len(vectors), TILE[1]):
            similar = vectors[start : start + TILE[0]] @ vectors[other : other + TILE[1]].T >= least - 1e-6
            pairs.append(similar.nonzero().numpy() + (start, other))
            waiting += len(pairs[-1])
            if waiting > MOST_PAIRS:
                first, pairs, waiting = _merged(first, pairs), [], 0
        if time.monotonic() - last > SAY_EVERY:
            last = time.monotonic()
            share = 1 - (1 - min(1, (start + TILE[0]) / len(vectors))) ** 2
            say(f"{share:.0%} of all pairs compared, about {(last - began) * (1 / share - 1):.0f} s left")
    return _merged(first, pairs)


def _merged(first: np.ndarray, pairs: list[np.ndarray]) -> np.ndarray:
    """Groups, joined where a pair of rows links them."""
    rows = np.concatenate([np.stack([np.arange(len(first)), first], axis=1), *pairs])
    links = csr_matrix((np.ones(len(rows), bool), (rows[:, 0], rows[:, 1])), shape=(len(first), len(first)))
    group = connected_components(links, directed=False)[1]
    return np.unique(group, return_index=True)[1][group]


def _subset(index: Index, config: Config) -> Found:
    assert config.subset
    if config.subset > index.count:
        raise UserError(f"subset={config.subset} is more than the {index.count} images of the index.")
    chosen, nearest = k_centres(index.vectors, config.subset)
    names = index.rows(chosen)
    say(
        f"{len(chosen)} of {index.count} images, each as far as can be from those before it. Every image is similar to "
        f"one of them: by {float(nearest.min()):.3f} or more, {float(nearest.mean()):.3f} in the mean. The first:"
    )
    if len(chosen) < config.subset:
        say("All others are the same as one of these.")
    say(*(f"  {names[row][1]}{'  ' * bool(names[row][1])}{names[row][0]}" for row in chosen[:PRINTED]))
    table: list[tuple[Any, ...]] = [("path", "label"), *((index.place(names[row][0]), names[row][1]) for row in chosen)]
    drawn = [(row, names[row][1]) for row in chosen[: DRAWN * DRAWN]]
    return Found(table, [[*drawn[start : start + DRAWN]] for start in range(0, len(drawn), DRAWN)])


def k_centres(vectors: Tensor, count: int) -> tuple[list[int], Tensor]:
    """[N, D] of unit length -> at most `count` rows in the order of the choice, and [N] the similarity of each row to
    the nearest of them. Fewer where all others are copies of those. faiss has k-means but no k-centres."""
    row, chosen = int((vectors @ vectors.mean(dim=0)).argmax()), list[int]()
    nearest = torch.full((len(vectors),), -torch.inf)
    while len(chosen) < count:
        chosen.append(row)
        nearest = torch.maximum(nearest, vectors @ vectors[row])
        row = int(nearest.argmin())
        if nearest[row] > 1 - 1e-6:
            break
    return chosen, nearest


def _draw(found: Found, index: Index, path: str, must: bool) -> None:
    """Draw the contact sheet. Raises UserError if it cannot, and says so if the user did not ask for it."""
    try:
        source = index.source()
    except (UserError, KeyError, TypeError, IndexError) as error:
        if must:
            raise UserError(f"picture={path}: {error}") from error
        say(f"No picture: {error}")
        return
    numbers = np.delete(np.arange(len(source)), index.lost)
    rows = [[_cell(source, numbers, image, caption) for image, caption in row] for row in found.cells]
    pictures.save(pictures.montage(rows), path)


def _cell(source: Source, numbers: np.ndarray, image: int | Tensor, caption: str) -> Image.Image:
    cell = Image.new("RGB", (CELL, CELL + CAPTION), pictures.PAPER)
    try:
        pixels = image if isinstance(image, Tensor) else source.read(int(numbers[image]))
        cell.paste(pictures.thumbnail(pixels, CELL), (0, 0))
    except BadImage as error:
        caption = str(error)
    text = pictures.drawable(pictures.shorten(printable(caption), 14))
    font = pictures.font_for(text, 11)
    ImageDraw.Draw(cell).text((CELL // 2, CELL + CAPTION - 4), text, pictures.INK, font, anchor="ms")
    return cell
