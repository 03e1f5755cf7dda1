"""Search among the vectors that `sslvit embed` has written: nearest images, near duplicates, or a diverse subset.

Similarity is the cosine, and the search is exact.

image=       The k nearest images of each, by the same encoder. Those of the first ten are printed and drawn.
duplicates=  Groups of images: each is linked to another of its group by this similarity or more. A chain of small steps
             may join images that differ, so out= has the similarity of each to the first of its group, the one to keep.
             The right value depends on the encoder: begin with 0.99, and look at the picture.
subset=      k centres: begins with the most typical image, and takes again and again the one that is least similar to
             all that are taken (Gonzalez, Theoretical Computer Science 38, 1985: the largest distance to the nearest
             chosen image is at most twice the smallest that is possible). The first n of a longer list are the list of
             n. out= can be data.train of pretrain.

Vectors of .faiss in float32 are read from the disk when they are used. Others are copied into memory.
"""

import csv
import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from PIL import Image, ImageDraw
from torch import Tensor

from .. import data
from ..arguments import merge
from ..checkpoints import textfile
from ..data import BadImage, Source, kind_of
from ..data.sources.files import EXTENSIONS, Files
from ..data.sources.names import Names
from ..data.sources.syntax import items
from ..distributed import say
from ..errors import UserError, check_range, printable
from ..evaluation import pictures
from ..evaluation.feature_cache import digest
from ..evaluation.frozen import EncoderConfig, load_frozen
from ..evaluation.knn import neighbours
from ..model.encoder import Encoder
from .config import Search as Config
from .index import Index, Row
from .near import near_groups

PRINTED, DRAWN = 10, 10  # images or groups that are printed; rows and columns of the picture
CELL, CAPTION = 96, 16  # pixels


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
    index = Index(config.index, config.run, config.data)
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
    groups = sorted(near_groups(index.vectors, least), key=lambda rows: -len(rows))  # else by their first images
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


def _subset(index: Index, config: Config) -> Found:
    assert config.subset
    if config.subset > index.count:
        raise UserError(f"subset={config.subset} is more than the {index.count} images of the index.")
    chosen, nearest = k_centres(index.vectors, config.subset)
    names = index.rows(chosen)
    say(
        f"{len(chosen)} of {index.count} images, each as different as possible from those before it. Every image is "
        f"similar to one of them: by {float(nearest.min()):.3f} or more, {float(nearest.mean()):.3f} in the mean. The "
        "first:"
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
