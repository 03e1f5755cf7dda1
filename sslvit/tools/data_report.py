"""What a set of images is like, before one trains on it: sizes, formats, depth, broken files, duplicates, the mean and
standard deviation to use, and a picture of the crops and masks of a recipe. Nothing is trained or changed.
"""

import dataclasses
import hashlib
import io
import json
import math
import os
import re
import shlex
import warnings
from collections.abc import Iterable
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
from ..data.depth import dark_sentence
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
from .findings import SIDED, THUMBNAIL, FileKind, Findings, ImageStats, facts, share, summary

FLAT = 2.0  # deviation of a thumbnail, in levels of 255 or of a deep image's largest; below it, it shows nothing
EXAMPLES = 3  # of each finding that are printed
BLOCK = 2**20  # pixels of a large image that are measured at a time
CHUNK = 32  # images that a process examines before it answers
MODES = {
    "1": "1-bit gray", "L": "gray", "LA": "gray with alpha", "P": "palette", "PA": "palette with alpha",
    "RGB": "colour", "RGBA": "colour with alpha", "RGBX": "colour", "CMYK": "CMYK", "YCbCr": "colour", "LAB": "Lab",
    "I": "32-bit gray", "F": "float gray", "HSV": "colour",
}  # fmt: skip
DEEP_PNG = {2: "16-bit colour", 4: "16-bit gray with alpha", 6: "16-bit colour with alpha"}


Examined = tuple[list[ImageStats], list[tuple[int, str]]]  # and (index, reason) of the images that cannot be read


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
        deep, largest = image.dtype != torch.uint8, float(image.max())
        flat = FLAT * min(1.0, max(0.0, largest / 255)) if deep else FLAT
        return ImageStats(
            index, tuple(image.shape), file, deep, digest.digest(), mean.numpy(), mean_square.numpy(), largest,
            thumbnail(gray, flat),
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


def thumbnail(image: Tensor, flat: float) -> np.ndarray | None:
    """[C, H, W] float in [0, 255] -> [256] of mean 0 and length 1, or None for an image that shows nothing."""
    small = resize(image.mean(dim=0, keepdim=True), (THUMBNAIL, THUMBNAIL)).flatten()
    small = small - small.mean()
    length = float(small.norm())
    return (small / length).numpy() if length > flat * THUMBNAIL else None


def run(config: RunConfig, settings: Config, arguments: list[str]) -> None:
    """Examine the images and print what was found. Raises UserError.

    arguments: those of the command line without this tool's own, for the command that is suggested.
    """
    page = settings.out if (settings.out or "").lower().endswith(".html") else None
    if settings.out and not page:
        arguments = [*arguments, f"out={settings.out}"]  # of the run
    if page:
        from . import data_page  # draws, which needs more than a look does

        data_page.check(page)
    source, stats, broken = look(config, settings)
    found = summary(config.data.train, source, stats, broken)
    say(*lines(found, config, arguments))
    if settings.picture:
        say("")
        picture.draw(config, Path(settings.picture))
    if settings.report:
        save(found, Path(settings.report))
    if page:
        data_page.write(page, found, config, source, stats, advice(found, config), suggestion(found, config, arguments))


def examine(config: RunConfig, settings: Config) -> Findings:
    """What is known of the images of `data.train`. Raises UserError."""
    return summary(config.data.train, *look(config, settings))


def look(config: RunConfig, settings: Config) -> tuple[Source, list[ImageStats], list[tuple[int, str]]]:
    """The images of `data.train`, what was measured of those that were examined, with all cores, and (index, reason) of
    those that cannot be read. Raises UserError."""
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
    return source, stats, broken


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


def lines(found: Findings, config: RunConfig, given: list[str]) -> list[str]:
    """The findings as they are printed. given: arguments of the command line, which the suggested command repeats."""
    some = found.examined < found.count
    classes = f" in {len(found.classes)} classes" if found.classes else ", without labels"
    out = [f"{found.source}: {found.count:,} images{classes}"]
    if some:
        out.append(
            f"  examined {found.examined:,} of them, chosen at random; what follows is about these (sample=0: all)"
        )
    out += [_row(*pair) for pair in facts(found)]
    out.append(_row("broken", share(len(found.broken), found.examined)))
    out += [f"    {name}: {reason}" for name, reason in found.broken[:EXAMPLES]]
    if found.flat:
        out.append(_row("one colour", f"{share(len(found.flat), found.examined)}, for example {found.flat[0]}"))
    for title, groups in (("same pixels", found.same), ("nearly same", found.near)):
        copies = sum(len(group) - 1 for group in groups)
        out.append(_row(title, share(copies, found.examined) + (" are copies of others" if copies else "")))
        out += [
            f"    {'  =  '.join(group[:EXAMPLES])}{' ...' * (len(group) > EXAMPLES)}" for group in groups[:EXAMPLES]
        ]
    if some and (found.same or found.near):
        out.append("    (other images may have more copies)")
    if found.mean:
        out += ["", f"  {normalization_keys(found)}", *(f"  {one}" for one in advice(found, config)), ""]
        out.append("  a command to start from (`sslvit bench` with the same arguments says how long it takes):")
        out.append(f"    {suggestion(found, config, given)}")
    return out


def normalization_keys(found: Findings, channels: int | None = None, gain: float = 1.0) -> str:
    """`data.mean=[...] data.std=[...]` to paste. A channel that never changes gets a std of 1 / 255.

    channels: only so many of them. gain: how many times brighter images will be.
    """
    mean = ",".join(f"{value * gain:.4f}" for value in found.mean[:channels])
    std = ",".join(f"{max(value * gain, 1 / 255):.4f}" for value in found.std[:channels])
    return f"data.mean=[{mean}] data.std=[{std}]"


def advice(found: Findings, config: RunConfig) -> list[str]:
    """Sentences: what to mend first."""
    out = []
    if config.data.in_chans == 3 and found.all_gray:
        out.append("all images are gray: data.in_chans=1 reads a third of the values.")
    if found.value_range:
        out.append(dark_sentence(found.value_range, found.largest))
    if len(found.broken) > config.data.bad_ratio * found.examined:
        out.append(
            f"more images are broken than data.bad_ratio={config.data.bad_ratio:g} allows, so a run would stop: mend "
            "or remove them, or raise it."
        )
    if found.sided > SIDED and getattr(config.objective, "flip_prob", False):
        out.append("the images have a left and a right side: their mirror images are others, so flip_prob=0.")
    small = min(found.heights[1], found.widths[1])
    if small < min(data.image_size(config.data)) / 2:
        out.append(f"images of {small} pixels are enlarged to data.image_size={config.data.image_size}.")
    return out


def suggestion(found: Findings, config: RunConfig, given: list[str]) -> str:
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
    if found.sided > SIDED and getattr(config.objective, "flip_prob", False):
        keys["flip_prob"] = 0
    if found.value_range:
        top = found.value_range[1]
        keys["value_range"], gain = f"[0,{top:g}]", (65535 if top > 1 else 1) / top
    arguments += [f"{key}={value}" for key, value in keys.items() if key.rpartition(".")[2] not in named]
    arguments += normalization_keys(found, channels, gain).split(" ")
    return f"sslvit pretrain {shlex.join(arguments)}"


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


def save(found: Findings, path: Path) -> None:
    """Write the findings as JSON. Raises UserError."""
    try:
        values = dataclasses.asdict(found)
        del values["where"]
        textfile.write(path.expanduser(), json.dumps(values, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"report={path} cannot be written: {error.strerror}.") from error
    say(f"written to {path}")
