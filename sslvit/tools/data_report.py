"""What a set of images is like, before one trains on it: sizes, formats, depth, broken files, duplicates, the mean and
deviation to use, and a picture of the crops and masks that a recipe makes of it. Nothing is trained or changed.
"""

import dataclasses
import hashlib
import itertools
import json
import math
import os
import re
import shlex
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import faiss
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .. import config as configuration
from .. import data, rng
from ..config import RunConfig
from ..data import BadImage, Source
from ..data.crops import resize
from ..data.sources.decode import decode
from ..data.sources.describe import describe, encoded
from ..distributed import say
from ..errors import UserError, check_range
from ..evaluation import pictures
from . import picture

THUMBNAIL = 16  # pixels a side, gray: what near duplicates are told by
# Correlation of thumbnails from which two images count as nearly the same. Of pairs of CIFAR-10 that were looked at, 24
# of 24 between 0.985 and 0.995 are copies; between 0.97 and 0.98 7 of 24 are not (horizons at sea).
NEAR = 0.985
ALIKE = 50  # images from which their mean thumbnail is subtracted: scans of one organ look alike without being copies
FLAT = 2.0  # deviation of a thumbnail, in levels of 255, below which an image shows nothing
SHOWN = 3  # examples of each finding
SAY_EVERY = 10.0  # seconds
CHUNK = 32  # images that a process looks at before it answers


@dataclass
class Config:
    sample: int = 10_000  # images that are looked at, chosen by the seed; 0: all
    picture: str | None = None  # a PNG file to draw images to, and what the recipe makes of them
    report: str | None = None  # a JSON file to write the findings to


@dataclass
class Look:
    """What is kept of one image."""

    number: int
    error: str | None = None
    shape: tuple[int, int, int] = (0, 0, 0)  # as the encoder gets it: channels, height, width
    kind: tuple[str, str, int] | None = None  # format, channels and depth, pages; None if it is no file
    deep: bool = False
    size: int = 0  # bytes of the file
    digest: bytes = b""  # of the pixels
    mean: np.ndarray | None = None  # [C], in [0, 255]
    square: np.ndarray | None = None  # [C], mean of the squares
    top: float = 0.0  # largest value
    thumbnail: np.ndarray | None = None  # [256] float32, of mean 0 and length 1; None for an image that shows nothing


@dataclass
class Findings:
    """Of the images that were looked at."""

    source: str
    count: int  # images of the source
    looked: int
    classes: dict[str, int] = field(default_factory=dict)  # images of each, in the whole source
    unlabelled: int = 0
    heights: list[int] = field(default_factory=list)  # smallest, median, largest
    widths: list[int] = field(default_factory=list)
    sizes: int = 0  # different ones
    formats: dict[str, int] = field(default_factory=dict)
    depths: dict[str, int] = field(default_factory=dict)
    pages: int = 0  # files of which pages are left out
    file_bytes: int = 0  # median
    broken: list[tuple[str, str]] = field(default_factory=list)  # name, reason
    flat: list[str] = field(default_factory=list)  # names of images of one colour
    same: list[list[str]] = field(default_factory=list)  # names of images with the same pixels
    near: list[list[str]] = field(default_factory=list)  # and with nearly the same
    mean: list[float] = field(default_factory=list)  # of each channel, in [0, 1]
    std: list[float] = field(default_factory=list)
    top: float = 0.0  # largest value of all, of 255
    deep: int = 0  # images of more than 8 bits


class Looking(Dataset):
    """One item is what is kept of some images."""

    def __init__(self, source: Source, config: data.Config, numbers: list[int]) -> None:
        self.source, self.config, self.numbers = source, config, numbers

    def __len__(self) -> int:
        return math.ceil(len(self.numbers) / CHUNK)

    def __getitem__(self, chunk: int) -> list[Look]:
        torch.set_num_threads(1)
        return [self._look(number) for number in self.numbers[chunk * CHUNK : (chunk + 1) * CHUNK]]

    def _look(self, number: int) -> Look:
        try:
            content = encoded(self.source, number)
            if content is None:
                image, kind, size = self.source.read(number), None, 0
            else:
                image = decode(content, self.config.in_chans, self.config.value_range)
                kind, size = describe(content), len(content)
        except BadImage as error:
            return Look(number, str(error))
        pixels = image.float()
        digest = hashlib.sha256(f"{tuple(image.shape)}".encode())
        digest.update(image.contiguous().numpy())
        flat = pixels.flatten(1).double()
        return Look(
            number, None, tuple(image.shape), kind, image.dtype != torch.uint8, size, digest.digest(),
            flat.mean(dim=1).numpy(), flat.square().mean(dim=1).numpy(), float(pixels.max()), thumbnail(pixels),
        )  # fmt: skip


def thumbnail(image: Tensor) -> np.ndarray | None:
    """[C, H, W] float in [0, 255] -> [256] of mean 0 and length 1, or None for an image that shows nothing."""
    small = resize(image.mean(dim=0, keepdim=True), (THUMBNAIL, THUMBNAIL)).flatten()
    small = small - small.mean()
    length = float(small.norm())
    return (small / length).numpy() if length > FLAT * THUMBNAIL else None


def run(config: RunConfig, settings: Config, arguments: list[str]) -> None:
    """Look at the images and print what was found. Raises UserError.

    arguments: those of the command line without this tool's own, for the command that is suggested.
    """
    found = examine(config, settings)
    say(*lines(found, config, arguments))
    if settings.picture:
        say("")
        picture.draw(config, Path(settings.picture))
    if settings.report:
        save(found, Path(settings.report))


def examine(config: RunConfig, settings: Config) -> Findings:
    """Look at the images of `data.train`, by all cores. Raises UserError."""
    check(config, settings)
    source = data.open_source(config.data.train, config.data)
    numbers = list(range(len(source)))
    if settings.sample and settings.sample < len(source):
        key = rng.fold_in(config.seed, "look")
        numbers = sorted(rng.shuffled(key, len(source), torch.arange(settings.sample)).tolist())
    looks = [look for chunk in _progress(_loader(source, config, numbers), len(numbers)) for look in chunk]
    return summary(config.data.train, source, looks)


def check(config: RunConfig, settings: Config) -> None:
    """Raises UserError for what cannot be, before the work."""
    configuration.check(config)
    data.normalization(config.data)
    check_range("", settings, 0, None, "sample")
    if settings.report and not Path(settings.report).expanduser().parent.is_dir():
        raise UserError(
            f"report={settings.report} cannot be written: there is no folder {Path(settings.report).parent}."
        )
    pictures.check(settings.picture or "")


def _loader(source: Source, config: RunConfig, numbers: list[int]) -> DataLoader:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(cores, math.ceil(len(numbers) / CHUNK)) if config.data.workers is None else config.data.workers
    return DataLoader(
        Looking(source, config.data, numbers),
        batch_size=None,
        num_workers=workers,
        multiprocessing_context="fork" if workers else None,
    )


def _progress(chunks: Iterable[list[Look]], count: int) -> Iterable[list[Look]]:
    """The same, with a line that says how far it is: rewritten on a terminal, now and then elsewhere."""
    done, said, terminal = 0, time.monotonic(), sys.stderr.isatty()
    for chunk in chunks:
        yield chunk
        done += len(chunk)
        if time.monotonic() - said > (0.2 if terminal else SAY_EVERY):
            said = time.monotonic()
            line = f"looked at {done:,} of {count:,} images"
            print(f"\r{line}" if terminal else line, end="" if terminal else "\n", file=sys.stderr, flush=True)
    if terminal:
        print("\r" + " " * 60 + "\r", end="", file=sys.stderr, flush=True)


def summary(word: str, source: Source, looks: list[Look]) -> Findings:
    """What the looks say together."""
    good = [look for look in looks if look.error is None]
    found = Findings(word, len(source), len(looks))
    found.broken = [(source.name(look.number), look.error) for look in looks if look.error is not None]
    if source.labels is not None:
        counts = np.bincount(source.labels[source.labels >= 0], minlength=len(source.classes))
        found.classes = dict(zip(source.classes, counts.tolist(), strict=True))
        found.unlabelled = int((source.labels < 0).sum())
    if not good:
        return found
    found.heights, found.widths = (_three([look.shape[i] for look in good]) for i in (1, 2))
    found.sizes = len({look.shape[1:] for look in good})
    kinds = [look.kind for look in good if look.kind]
    found.formats = dict(Counter(kind[0] for kind in kinds).most_common()) or {type(source).__name__: len(good)}
    found.depths = dict(Counter(kind[1] for kind in kinds).most_common())
    found.pages = sum(kind[0] == "TIFF" and kind[2] > 1 and kind[2] != look.shape[0]
                      for look in good if (kind := look.kind))  # fmt: skip
    found.file_bytes = int(statistics.median(look.size for look in good))
    found.flat = [source.name(look.number) for look in good if look.thumbnail is None]
    # Every image counts alike, whatever its size: crops of it will all have one size.
    mean = np.mean([look.mean for look in good], axis=0)
    square = np.mean([look.square for look in good], axis=0)
    found.mean = [round(float(m) / 255, 4) for m in mean]
    found.std = [round(math.sqrt(max(0.0, s)) / 255, 4) for s in square - mean**2]
    found.top, found.deep = max(look.top for look in good), sum(look.deep for look in good)
    same = _groups_of_same(good)
    found.same = [[source.name(look.number) for look in group] for group in same]
    again = {look.number for group in same for look in group[1:]}  # one of each is enough below
    found.near = [[source.name(number) for number in group] for group in _groups_of_near(good, again)]
    return found


def _three(values: list[int]) -> list[int]:
    return [min(values), int(statistics.median(values)), max(values)]


def _groups_of_same(looks: list[Look]) -> list[list[Look]]:
    groups: dict[bytes, list[Look]] = {}
    for look in looks:
        groups.setdefault(look.digest, []).append(look)
    return [group for group in groups.values() if len(group) > 1]


def _groups_of_near(looks: list[Look], left_out: set[int]) -> list[list[int]]:
    """Numbers of images that hang together by thumbnails of a correlation of NEAR."""
    chosen = [look for look in looks if look.thumbnail is not None and look.number not in left_out]
    if len(chosen) < 2:
        return []
    vectors = np.stack([look.thumbnail for look in chosen]).astype(np.float32)
    if len(vectors) >= ALIKE:
        vectors = vectors - vectors.mean(axis=0)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True).clip(1e-6)
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    parent = list(range(len(chosen)))

    def top(i: int) -> int:
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    for start in range(0, len(chosen), 4096):
        limits, _, others = index.range_search(vectors[start : start + 4096], NEAR)
        for row, (first, last) in enumerate(itertools.pairwise(limits.tolist())):
            for other in others[first:last].tolist():
                parent[top(other)] = top(start + row)
    groups: dict[int, list[int]] = {}
    for i, look in enumerate(chosen):
        groups.setdefault(top(i), []).append(look.number)
    return sorted(group for group in groups.values() if len(group) > 1)


def lines(found: Findings, config: RunConfig, given: list[str]) -> list[str]:
    """The findings as they are printed. given: the words of the user, which the suggestion repeats."""
    some = found.looked < found.count
    classes = f" in {len(found.classes)} classes" if found.classes else ", without labels"
    out = [f"{found.source}: {found.count:,} images{classes}"]
    if some:
        out.append(
            f"  looked at {found.looked:,} of them, chosen at random; what follows is about these (sample=0: all)"
        )
    if found.classes:
        sizes = sorted(found.classes.values())
        most = ", ".join(f"{name} {count:,}" for name, count in itertools.islice(found.classes.items(), 5))
        out.append(_row("classes", f"{sizes[0]:,} to {sizes[-1]:,} images each: {most}{' ...' * (len(sizes) > 5)}"))
    if found.unlabelled:
        out.append(_row("no label", f"{found.unlabelled:,}"))
    if found.heights:
        same = f"{found.widths[0]}x{found.heights[0]} pixels, all of them"
        many = (
            f"width {_between(found.widths)}, height {_between(found.heights)} pixels (smallest, median, largest); "
            f"{found.sizes:,} different"
        )
        out.append(_row("sizes", same if found.sizes == 1 else many))
        out.append(_row("formats", _counts(found.formats)))
        if found.depths:
            out.append(_row("stored as", _counts(found.depths)))
            out.append(_row("file", f"{found.file_bytes / 1000:,.1f} kB (median)"))
        if found.pages:
            out.append(_row("pages", f"{found.pages:,} TIFF files have several, and only the first is read: "
                                     "pages:<source> makes every page an image"))  # fmt: skip
    out.append(_row("broken", _share(len(found.broken), found.looked)))
    out += [f"    {name}: {reason}" for name, reason in found.broken[:SHOWN]]
    if found.flat:
        out.append(_row("one colour", f"{_share(len(found.flat), found.looked)}, for example {found.flat[0]}"))
    for title, groups in (("same pixels", found.same), ("nearly same", found.near)):
        copies = sum(len(group) - 1 for group in groups)
        out.append(_row(title, _share(copies, found.looked) + (" are copies of others" if copies else "")))
        out += [f"    {'  =  '.join(group[:SHOWN])}{' ...' * (len(group) > SHOWN)}" for group in groups[:SHOWN]]
    if some and (found.same or found.near):
        out.append("    (copies of images that were not looked at are not known)")
    if found.mean:
        out += ["", f"  {words_of(found)}", *_advice(found, config), "", *_suggestion(found, config, given)]
    return out


def words_of(found: Findings) -> str:
    """`data.mean=[...] data.std=[...]` to paste. A channel that never changes gets a deviation of 1 / 255."""
    mean = ",".join(f"{value:.4f}" for value in found.mean)
    std = ",".join(f"{max(value, 1 / 255):.4f}" for value in found.std)
    return f"data.mean=[{mean}] data.std=[{std}]"


def _advice(found: Findings, config: RunConfig) -> list[str]:
    out = []
    gray = sum(count for kind, count in found.depths.items() if "gray" in kind)
    if config.data.in_chans == 3 and found.depths and gray == sum(found.depths.values()):
        out.append("  all images are gray: data.in_chans=1 reads a third of the values.")
    if found.deep and config.data.value_range is None and found.top < 127:
        integers = any("16-bit" in kind for kind in found.depths)
        top = math.ceil(found.top * 257) if integers else found.top / 255
        out.append(
            f"  the brightest pixel is {found.top:.1f} of 255: data.value_range=[0,{top:g}] would use the whole range."
        )
    if len(found.broken) > config.data.bad_ratio * found.looked:
        out.append(
            f"  more images are broken than data.bad_ratio={config.data.bad_ratio:g} allows, so that a run would stop: "
            "mend or remove them, or raise it."
        )
    small = min(found.heights[1], found.widths[1])
    if small < min(data.image_size(config.data)) / 2:
        out.append(f"  images of {small} pixels are enlarged to data.image_size={config.data.image_size}.")
    return out


def _suggestion(found: Findings, config: RunConfig, given: list[str]) -> list[str]:
    """A command to start from: the user's own words with the numbers found, or a recipe by size and number."""
    keys = {word.partition("=")[0].rsplit(".", 1)[-1] for word in given if "=" in word}
    own = [word for word in given if not re.match(r"(data\.)?(mean|std)=", word)]
    words = [*own] if any("=" in word or word.endswith((".yaml", ".yml")) for word in own) else [*own, *_recipe(found)]
    if "in_chans" not in keys and len(found.mean) != 3:
        words.append(f"data.in_chans={len(found.mean)}")
    words += words_of(found).split(" ")
    return ["  a start (then `sslvit bench` with the same words says how long it takes):",
            f"    sslvit pretrain {shlex.join(words)}"]  # fmt: skip


def _recipe(found: Findings) -> list[str]:
    side = min(found.heights[1], found.widths[1])
    size, patch = next(((s, p) for s, p in ((32, 4), (64, 8), (96, 8), (128, 16)) if side <= s * 1.25), (224, 16))
    epochs = next((e for limit, e in ((10_000, 800), (100_000, 400), (1_000_000, 200)) if found.count <= limit), 100)
    batch = 256
    while batch > 8 and batch * 8 > found.count:
        batch //= 2
    model = "vit_tiny_patch16_224" if size <= 64 else "vit_small_patch16_224"
    words = [f"data.image_size={size}", f"model.name={model}"]
    words += [f"model.args={{patch_size: {patch}}}"] if patch != 16 else []
    return ["method=mae", *words, f"global_batch_size={batch}", f"epochs={epochs}", f"warmup_epochs={epochs // 20}"]


def _row(title: str, text: str) -> str:
    return f"  {title:<12} {text}"


def _between(three: list[int]) -> str:
    return " / ".join(f"{value:,}" for value in three)


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())


def _share(count: int, whole: int) -> str:
    return f"{count:,} of {whole:,} ({count / whole:.2%})" if count else "none"


def save(found: Findings, path: Path) -> None:
    """Write the findings as JSON. Raises UserError."""
    try:
        path.expanduser().write_text(json.dumps(dataclasses.asdict(found), indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"report={path} cannot be written: {error.strerror}.") from error
    say(f"written to {path}")
