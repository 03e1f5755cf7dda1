"""What a set of images is like, before one trains on it: sizes, formats, depth, broken files, duplicates, the mean and
standard deviation to use, and a picture of the crops and masks of a recipe. Nothing is trained or changed.
"""

import dataclasses
import hashlib
import io
import itertools
import json
import math
import os
import re
import shlex
import statistics
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile
from torch import Tensor

from .. import config as configuration
from .. import data, rng
from ..arguments import recipes
from ..checkpoints import textfile
from ..config import RunConfig
from ..data import BadImage, Source
from ..data.crops import resize
from ..data.depth import DARK, dark_sentence, range_that_fits
from ..data.sources.decode import DICOM, NPY, PNG, decode
from ..data.sources.files import Encoded
from ..data.sources.several import Several
from ..data.workers import compute
from ..distributed import say
from ..errors import UserError, check_range
from ..evaluation import pictures
from ..progress import counting
from . import picture
from .config import Data as Config
from .near import near_groups

THUMBNAIL = 16  # pixels a side, gray; near duplicates have similar thumbnails
# Correlation of thumbnails from which two images count as nearly the same. Of pairs of CIFAR-10 that were checked by
# eye, 24 of 24 between 0.985 and 0.995 are copies; between 0.97 and 0.98, 7 of 24 are not (horizons at sea).
NEAR = 0.985
MIN_CENTERED = 50  # images; their mean thumbnail is subtracted: scans of one organ are alike without being copies
FLAT = 2.0  # standard deviation of a thumbnail, in levels of 255; below it an image shows nothing
EXAMPLES = 3  # of each finding that are printed
BLOCK = 2**20  # pixels of a large image that are measured at a time
CHUNK = 32  # images that a process examines before it answers
MODES = {
    "1": "1-bit gray", "L": "gray", "LA": "gray with alpha", "P": "palette", "PA": "palette with alpha",
    "RGB": "colour", "RGBA": "colour with alpha", "RGBX": "colour", "CMYK": "CMYK", "YCbCr": "colour", "LAB": "Lab",
    "I": "32-bit gray", "F": "float gray", "HSV": "colour",
}  # fmt: skip
DEEP_PNG = {2: "16-bit colour", 4: "16-bit gray with alpha", 6: "16-bit colour with alpha"}


@dataclass
class FileKind:
    """What the header of an image file says."""

    format: str  # PNG, JPEG ...
    depth: str  # channels and depth
    pages: int
    size: int  # bytes of the file


@dataclass
class ImageStats:
    """What is kept of one image."""

    index: int
    shape: tuple[int, ...]  # as the encoder gets it: channels, height, width
    file: FileKind | None  # None if the source has no image files
    deep: bool  # more than 8 bits
    digest: bytes  # of the pixels
    mean: np.ndarray  # [C] in [0, 255]
    mean_square: np.ndarray  # [C]
    largest: float  # value
    thumbnail: np.ndarray | None  # [256] float32, of mean 0 and length 1; None for an image that shows nothing


Examined = tuple[list[ImageStats], list[tuple[int, str]]]  # and (index, reason) of the images that cannot be read


@dataclass
class Findings:
    """Of the images that were examined."""

    source: str
    count: int  # images of the source
    examined: int
    classes: dict[str, int] = field(default_factory=dict)  # images of each, in the whole source
    unlabelled: int = 0
    heights: list[int] = field(default_factory=list)  # smallest, median, largest
    widths: list[int] = field(default_factory=list)
    sizes: int = 0  # different ones
    formats: dict[str, int] = field(default_factory=dict)
    depths: dict[str, int] = field(default_factory=dict)
    pages: int = 0  # files of which only the first page is read
    file_bytes: int = 0  # median
    broken: list[tuple[str, str]] = field(default_factory=list)  # name, reason
    flat: list[str] = field(default_factory=list)  # names of images of one colour
    same: list[list[str]] = field(default_factory=list)  # names of images with the same pixels
    near: list[list[str]] = field(default_factory=list)  # and with nearly the same
    mean: list[float] = field(default_factory=list)  # of each channel, in [0, 1]
    std: list[float] = field(default_factory=list)
    largest: float = 0.0  # value of all images, of 255
    deep: int = 0  # images of more than 8 bits
    value_range: tuple[float, float] | None = None  # that deep images need, which come out nearly black

    @property
    def all_gray(self) -> bool:
        return bool(self.depths) and all("gray" in kind and "alpha" not in kind for kind in self.depths)


class Examination:
    """One item is what was found in CHUNK images."""

    def __init__(self, source: Source, config: data.Config, indices: list[int]) -> None:
        self.source, self.config, self.indices = source, config, indices

    def __len__(self) -> int:
        return math.ceil(len(self.indices) / CHUNK)

    def __getitem__(self, chunk: int) -> Examined:
        torch.set_num_threads(1)
        stats, broken = [], []
        for index in self.indices[chunk * CHUNK : (chunk + 1) * CHUNK]:
            try:
                stats.append(self._examine(index))
            except BadImage as error:
                broken.append((index, str(error)))
        return stats, broken

    def _examine(self, index: int) -> ImageStats:
        source, place = self.source, index
        while isinstance(source, Several):
            source, place = source.place(place)
        if isinstance(source, Encoded):
            content = source.bytes_of(place)
            image, file = decode(content, self.config.in_chans, self.config.value_range), file_kind(content)
        else:
            image, file = source.read(place), None
        digest = hashlib.sha256(f"{tuple(image.shape)}".encode())
        digest.update(image.contiguous().numpy().data)
        parts = image.split(max(1, BLOCK // image.shape[2]), dim=1)  # of a few rows: float64 takes eight times as much
        mean, mean_square = (
            sum((part.double() ** power).sum(dim=(1, 2)) for part in parts) / image[0].numel() for power in (1, 2)
        )
        gray = torch.cat([part.float().mean(dim=0, keepdim=True) for part in parts], dim=1)
        return ImageStats(
            index, tuple(image.shape), file, image.dtype != torch.uint8, digest.digest(), mean.numpy(),
            mean_square.numpy(), float(image.max()), thumbnail(gray),
        )  # fmt: skip


def file_kind(content: bytes) -> FileKind:
    """The kind of a readable image file, as far as its header tells."""
    if content.startswith(NPY):
        return FileKind("npy", "array", 1, len(content))
    if content[128:132] == DICOM:
        return FileKind("DICOM", "DICOM", 1, len(content))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(content)) as image:
                kind, mode, pages = str(image.format), image.mode, int(getattr(image, "n_frames", 1))
                bits = max(image.tag_v2.get(258, (8,))) if isinstance(image, TiffImageFile) else 8
    except Exception:  # PIL cannot open every TIFF file that tifffile can
        return FileKind("TIFF", "many channels", 1, len(content))
    depth = "16-bit gray" if mode.startswith("I;16") else MODES.get(mode, mode)
    if content.startswith(PNG) and content[24] == 16:
        depth = DEEP_PNG.get(content[25], depth)
    elif bits > 8 and mode in ("RGB", "RGBA", "LA"):
        depth = f"{bits}-bit {depth}"
    return FileKind(kind, depth, pages, len(content))


def thumbnail(image: Tensor) -> np.ndarray | None:
    """[C, H, W] float in [0, 255] -> [256] of mean 0 and length 1, or None for an image that shows nothing."""
    small = resize(image.mean(dim=0, keepdim=True), (THUMBNAIL, THUMBNAIL)).flatten()
    small = small - small.mean()
    length = float(small.norm())
    return (small / length).numpy() if length > FLAT * THUMBNAIL else None


def run(config: RunConfig, settings: Config, arguments: list[str]) -> None:
    """Examine the images and print what was found. Raises UserError.

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
    """Examine the images of `data.train`, with all cores. Raises UserError."""
    check(config, settings)
    source = data.open_source(config.data.train, config.data)
    indices = list(range(len(source)))
    if settings.sample and settings.sample < len(source):
        key = rng.fold_in(config.seed, "look")
        indices = sorted(rng.shuffled(key, len(source), torch.arange(settings.sample)).tolist())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(cores, math.ceil(len(indices) / CHUNK)) if config.data.workers is None else config.data.workers
    examination = Examination(source, config.data, indices)
    chunks = compute(examination.__getitem__, range(len(examination)), workers)
    stats, broken = [], []
    for some, unreadable in _progress(chunks, len(indices)):
        stats += some
        broken += unreadable
    return summary(config.data.train, source, stats, broken)


def check(config: RunConfig, settings: Config) -> None:
    """Raises UserError for mistakes, before the work."""
    configuration.check(config)
    data.normalization(config.data)
    check_range("", settings, 0, None, "sample")
    if settings.report and not Path(settings.report).expanduser().parent.is_dir():
        folder = Path(settings.report).parent
        raise UserError(f"report={settings.report} cannot be written: there is no folder {folder}, make it first.")
    pictures.check(settings.picture or "")


def _progress(chunks: Iterable[Examined], count: int) -> Iterable[Examined]:
    """The same chunks, while it is shown how many images are done."""
    done = 0
    with counting("examining", count) as show:
        for chunk in chunks:
            yield chunk
            done += len(chunk[0]) + len(chunk[1])
            show(done)


def summary(spec: str, source: Source, stats: list[ImageStats], broken: list[tuple[int, str]]) -> Findings:
    """What is known of each image, together."""
    found = Findings(spec, len(source), len(stats) + len(broken))
    found.broken = [(source.name(index), reason) for index, reason in broken]
    if source.labels is not None:
        counts = np.bincount(source.labels[source.labels >= 0], minlength=len(source.classes))
        found.classes = dict(zip(source.classes, counts.tolist(), strict=True))
        found.unlabelled = int((source.labels < 0).sum())
    if not stats:
        return found
    found.heights, found.widths = (_three([s.shape[axis] for s in stats]) for axis in (1, 2))
    found.sizes = len({s.shape[1:] for s in stats})
    files = [(s.file, s.shape[0]) for s in stats if s.file]
    found.formats = dict(Counter(f.format for f, _ in files).most_common()) or {type(source).__name__: len(stats)}
    found.depths = dict(Counter(f.depth for f, _ in files).most_common())
    found.pages = sum(f.format == "TIFF" and f.pages > 1 and f.pages != channels for f, channels in files)
    found.file_bytes = int(statistics.median([f.size for f, _ in files] or [0]))
    found.flat = [source.name(s.index) for s in stats if s.thumbnail is None]
    # Every image counts alike, whatever its size: crops of it will all have one size.
    mean = np.mean([s.mean for s in stats], axis=0)
    variance = np.mean([s.mean_square for s in stats], axis=0) - mean**2
    found.mean = [round(float(m) / 255, 4) for m in mean]
    found.std = [round(math.sqrt(max(0.0, v)) / 255, 4) for v in variance]
    brightest = max(stats, key=lambda s: s.largest)
    found.largest, found.deep = brightest.largest, sum(s.deep for s in stats)
    if brightest.deep and found.largest < DARK:
        found.value_range = range_that_fits(source, brightest.index, source.read(brightest.index), found.largest)
    by_digest: dict[bytes, list[ImageStats]] = {}
    for s in stats:
        by_digest.setdefault(s.digest, []).append(s)
    found.same = [[source.name(s.index) for s in group] for group in by_digest.values() if len(group) > 1]
    found.near = [[source.name(i) for i in group] for group in _near([group[0] for group in by_digest.values()])]
    return found


def _three(values: list[int]) -> list[int]:
    return [min(values), int(statistics.median(values)), max(values)]


def _near(stats: list[ImageStats]) -> list[list[int]]:
    """Groups of images, by index, that are linked by a correlation of NEAR between thumbnails."""
    found = [(s.index, s.thumbnail) for s in stats if s.thumbnail is not None]
    if len(found) < 2:
        return []
    vectors = np.stack([small for _, small in found]).astype(np.float32)
    if len(vectors) >= MIN_CENTERED:
        vectors = vectors - vectors.mean(axis=0)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True).clip(1e-6)
    groups = near_groups(torch.from_numpy(vectors), NEAR)
    return sorted([found[row][0] for row in rows.tolist()] for rows in groups)


def lines(found: Findings, config: RunConfig, given: list[str]) -> list[str]:
    """The findings as they are printed. given: arguments of the command line, which the suggested command repeats."""
    some = found.examined < found.count
    classes = f" in {len(found.classes)} classes" if found.classes else ", without labels"
    out = [f"{found.source}: {found.count:,} images{classes}"]
    if some:
        out.append(
            f"  examined {found.examined:,} of them, chosen at random; what follows is about these (sample=0: all)"
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
    out.append(_row("broken", _share(len(found.broken), found.examined)))
    out += [f"    {name}: {reason}" for name, reason in found.broken[:EXAMPLES]]
    if found.flat:
        out.append(_row("one colour", f"{_share(len(found.flat), found.examined)}, for example {found.flat[0]}"))
    for title, groups in (("same pixels", found.same), ("nearly same", found.near)):
        copies = sum(len(group) - 1 for group in groups)
        out.append(_row(title, _share(copies, found.examined) + (" are copies of others" if copies else "")))
        out += [
            f"    {'  =  '.join(group[:EXAMPLES])}{' ...' * (len(group) > EXAMPLES)}" for group in groups[:EXAMPLES]
        ]
    if some and (found.same or found.near):
        out.append("    (other images may have more copies)")
    if found.mean:
        out += ["", f"  {normalization_keys(found)}", *_advice(found, config), "", *_suggestion(found, config, given)]
    return out


def normalization_keys(found: Findings, channels: int | None = None, gain: float = 1.0) -> str:
    """`data.mean=[...] data.std=[...]` to paste. A channel that never changes gets a std of 1 / 255.

    channels: only so many of them. gain: how many times brighter images will be.
    """
    mean = ",".join(f"{value * gain:.4f}" for value in found.mean[:channels])
    std = ",".join(f"{max(value * gain, 1 / 255):.4f}" for value in found.std[:channels])
    return f"data.mean=[{mean}] data.std=[{std}]"


def _advice(found: Findings, config: RunConfig) -> list[str]:
    out = []
    if config.data.in_chans == 3 and found.all_gray:
        out.append("  all images are gray: data.in_chans=1 reads a third of the values.")
    if found.value_range:
        out.append(f"  {dark_sentence(found.value_range, found.largest)}")
    if len(found.broken) > config.data.bad_ratio * found.examined:
        out.append(
            f"  more images are broken than data.bad_ratio={config.data.bad_ratio:g} allows, so a run would stop: mend "
            "or remove them, or raise it."
        )
    small = min(found.heights[1], found.widths[1])
    if small < min(data.image_size(config.data)) / 2:
        out.append(f"  images of {small} pixels are enlarged to data.image_size={config.data.image_size}.")
    return out


def _suggestion(found: Findings, config: RunConfig, given: list[str]) -> list[str]:
    """A command to start from: the given arguments, the numbers found, and what else follows from the images."""
    arguments = [word for word in given if not re.match(r"-*(data\.)?(mean|std)=", word)]
    named = {word.lstrip("-").partition("=")[0].rpartition(".")[2] for word in arguments if "=" in word}
    recipe = any(word.endswith((".yaml", ".yml")) or word in recipes() for word in arguments if "=" not in word)
    keys = {} if recipe else _recipe(found, config, named)
    if recipe and config.global_batch_size > found.count:
        keys["global_batch_size"] = _batch_size(found.count)
    channels, gain = len(found.mean), 1.0
    if channels == 3 and found.all_gray:  # the three are the same
        channels = keys["in_chans"] = 1
        keys["preset"] = "gray"
    elif channels != 3:
        keys |= {"in_chans": channels} | ({"preset": "channels"} if channels > 4 else {})
    if found.value_range:
        top = found.value_range[1]
        keys["value_range"], gain = f"[0,{top:g}]", (65535 if top > 1 else 1) / top
    arguments += [f"{key}={value}" for key, value in keys.items() if key.rpartition(".")[2] not in named]
    arguments += normalization_keys(found, channels, gain).split(" ")
    return ["  a command to start from (`sslvit bench` with the same arguments says how long it takes):",
            f"    sslvit pretrain {shlex.join(arguments)}"]  # fmt: skip


def _recipe(found: Findings, config: RunConfig, named: set[str]) -> dict[str, Any]:
    """{key: value} by size and number of the images, around the keys that are `named`."""
    side = min(found.heights[1], found.widths[1])
    size, patch = next(((s, p) for s, p in ((32, 4), (64, 8), (96, 8), (128, 16)) if side <= s * 1.25), (224, 16))
    keys: dict[str, Any] = {"method": config.method}
    batch = config.global_batch_size
    if "global_batch_size" not in named or batch > found.count:
        batch = keys["global_batch_size"] = _batch_size(found.count)
    per_epoch = found.count // batch
    epochs: float = next(
        (e for limit, e in ((10_000, 800), (100_000, 400), (1_000_000, 200)) if found.count <= limit), 100
    )
    if named & set(configuration.DURATIONS):
        images = config.images or (config.steps or (config.epochs or 1) * per_epoch) * batch
        epochs = images / batch / per_epoch
    else:
        keys["epochs"] = f"{epochs:g}"
    keys["warmup_epochs"] = f"{epochs / 20:.2g}"
    if not named & {"image_size", "name", "args"}:
        keys |= {"image_size": size, "model.name": f"vit_{'tiny' if size <= 64 else 'small'}_patch16_224"}
        keys |= {"model.args": f"{{patch_size: {patch}}}"} if patch != 16 else {}
        if hasattr(config.objective, "local_crop_size") and "local_crop_size" not in named:
            keys["local_crop_size"] = max(1, round(size * 96 / 224 / patch)) * patch
    return keys


def _batch_size(count: int) -> int:
    """256, or what gives eight steps an epoch, but 8 if there are so many."""
    batch = 256
    while batch > 8 and batch * 8 > count:
        batch //= 2
    return min(batch, count)


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
        textfile.write(path.expanduser(), json.dumps(dataclasses.asdict(found), indent=1) + "\n")
    except OSError as error:
        raise UserError(f"report={path} cannot be written: {error.strerror}.") from error
    say(f"written to {path}")
