"""The input pipeline beside the published ones, on one core, in one run: images/s, memory of a worker and of an index.

    python -m tests.benchmarks.input [folder of photos] [folder of 32 x 32 images]

Without folders it makes both from the fractals: JPEG files of the size of ImageNet's photos, and PNG files of 32 x 32.
Published: each image opened by PIL once and then augmented crop by crop in the loader, by torchvision's transforms for
PIL images. v2: decoded as ours, the same steps on uint8 tensors by torchvision.transforms.v2. Ours: what a
worker does (`loader.Cropped`: read, decode, cut), and beside it what the training device does for all images of a batch
at once (`augment`), here on the same core; with `data.cache=ram`, images are decoded once, and with `data.cache=device`
they are cut a batch at a time. DINO's crops are 2 x 224 and 8 x 96 pixels of photos, 2 x 32 and 6 x 16 of the small
images. Large photos are those photos enlarged to 3,000 pixels, with grain, and read whole or, with `data.jpeg_scaling`,
no larger than needed. Rounds alternate; ratios are medians over rounds.
Times are those of the core, so that others who work on the machine count less; files come from the page cache.
"""

import argparse
import io
import itertools
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import v2

from sslvit import data, rng
from sslvit.data.augment import Normalize, augment
from sslvit.data.cache import Cached, SharedBuffer, bytes_needed, on_device
from sslvit.data.crops import Views
from sslvit.data.loader import Cropped, CroppedOnDevice, Layout, make_loader
from sslvit.data.sources.decode import decode
from sslvit.data.sources.folder import Folder
from sslvit.data.sources.fractals import Fractals
from sslvit.data.sources.names import Names
from sslvit.hardware import peak_memory
from sslvit.objectives import dino, mae

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BICUBIC = transforms.InterpolationMode.BICUBIC
CPU = torch.device("cpu")
BATCH = 32
PATHS = 10_000_000


@dataclass(frozen=True)
class Sizes:
    """Of the crops, in pixels."""

    whole: int
    local: int
    locals_: int


PHOTOS, SMALL = Sizes(224, 96, 8), Sizes(32, 16, 6)


class PILBlur:
    """PIL's Gaussian blur with a radius from 0.1 to 2, with a probability (section 3.2, after BYOL)."""

    def __init__(self, probability: float) -> None:
        self.probability = probability

    def __call__(self, image: Image.Image) -> Image.Image:
        if random.random() >= self.probability:
            return image
        return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))


def published_dino(sizes: Sizes) -> Callable[[Image.Image], list[Tensor]]:
    """A PIL image -> crops, normalised."""

    def crop(size: int, scale: tuple[float, float], blur: float, solarize: float) -> transforms.Compose:
        steps = [
            transforms.RandomResizedCrop(size, scale, interpolation=BICUBIC),
            transforms.RandomHorizontalFlip(),
            transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8),
            transforms.RandomGrayscale(0.2),
            PILBlur(blur),
        ]
        steps += [transforms.RandomSolarize(128, solarize)] if solarize else []
        return transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize(MEAN, STD)])

    kinds = [crop(sizes.whole, (0.4, 1.0), 1.0, 0.0), crop(sizes.whole, (0.4, 1.0), 0.1, 0.2)]
    kinds += [crop(sizes.local, (0.05, 0.4), 0.5, 0.0)] * sizes.locals_
    return lambda image: [kind(image) for kind in kinds]


def published_mae(sizes: Sizes) -> Callable[[Image.Image], Tensor]:
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(sizes.whole, (0.2, 1.0), interpolation=BICUBIC),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )


def v2_dino(sizes: Sizes) -> Callable[[Tensor], list[Tensor]]:
    """[3, H, W] uint8 -> crops, normalised. The kernel of 13 pixels reaches three times the largest sigma."""

    def crop(size: int, scale: tuple[float, float], blur: float, solarize: float) -> v2.Compose:
        steps = [
            v2.RandomResizedCrop(size, scale, interpolation=BICUBIC, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8),
            v2.RandomGrayscale(0.2),
            v2.RandomApply([v2.GaussianBlur(13, (0.1, 2.0))], blur),
        ]
        steps += [v2.RandomSolarize(128, solarize)] if solarize else []
        return v2.Compose([*steps, v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])

    kinds = [crop(sizes.whole, (0.4, 1.0), 1.0, 0.0), crop(sizes.whole, (0.4, 1.0), 0.1, 0.2)]
    kinds += [crop(sizes.local, (0.05, 0.4), 0.5, 0.0)] * sizes.locals_
    return lambda image: [kind(image) for kind in kinds]


def v2_mae(sizes: Sizes) -> Callable[[Tensor], Tensor]:
    return v2.Compose(
        [
            v2.RandomResizedCrop(sizes.whole, (0.2, 1.0), interpolation=BICUBIC, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )


def pil_image(path: str) -> Image.Image:
    with open(path, "rb") as file:
        return Image.open(io.BytesIO(file.read())).convert("RGB")


def tensor_image(path: str) -> Tensor:
    with open(path, "rb") as file:
        return decode(file.read(), 3)


def our_views(method: str, sizes: Sizes) -> Views:
    config = data.Config(image_size=sizes.whole)
    if method == "mae":
        return mae.views(mae.Config(), config)
    return dino.views(dino.Config(local_crops=sizes.locals_, local_crop_size=sizes.local), config)


def compare(
    title: str, folder: Path, sizes: Sizes, method: str, images: int, rounds: int, cache: bool = False,
    large: bool = False,
) -> None:  # fmt: skip
    """Print a line for each pipeline: images/s, and how many times the published one's."""
    source = Folder(folder, data.Config())
    order = rng.permutation(rng.fold_in(0, "benchmark"), len(source))
    order = order.repeat(-(-images // len(order)))[:images]
    paths = [source.name(index) for index in order.tolist()]
    published, tensors = (
        (published_dino(sizes), v2_dino(sizes)) if method == "dino" else (published_mae(sizes), v2_mae(sizes))
    )
    views, normalize = our_views(method, sizes), Normalize(MEAN, STD)
    cropped = Cropped(source, views, 0)
    cut = [cropped[0, index] for index in order.split(BATCH)]
    variants: dict[str, Callable[[], object]] = {
        "published (PIL, torchvision)": lambda: [published(pil_image(path)) for path in paths],
        "torchvision v2 on tensors": lambda: [tensors(tensor_image(path)) for path in paths],
        "ours, the workers' half": lambda: [cropped[0, index] for index in order.split(BATCH)],
        "ours, the device's half, here": lambda: [augment(batch, views, normalize, CPU) for batch in cut],
    }
    if cache:
        shape = tuple(source.read(0).shape)
        ram = Cached(source, shape, SharedBuffer(bytes_needed(source, shape)))
        kept, resident = Cropped(ram, views, 0), CroppedOnDevice(on_device(ram, "device", CPU, 0), views, 0)
        variants["ours, data.cache=ram"] = lambda: [kept[0, index] for index in order.split(BATCH)]
        variants["ours, data.cache=device, here"] = lambda: [resident[0, index] for index in order.split(BATCH)]
    if large:
        scaled = Cropped(source, views, 0, scaling=True)
        variants["ours, data.jpeg_scaling"] = lambda: [scaled[0, index] for index in order.split(BATCH)]
    spent: dict[str, list[float]] = {name: [] for name in variants}
    for round_ in range(rounds + 1):  # the first, in which files are read and caches filled, does not count
        for name, work in variants.items():
            start = time.process_time()
            work()
            if round_:
                spent[name].append(time.process_time() - start)
    base = spent["published (PIL, torchvision)"]
    for name, seconds in spent.items():
        ratio = statistics.median(b / a for a, b in zip(seconds, base, strict=True))
        rate = images / statistics.median(seconds)
        print(f"{title:16s}{method:6s}{name:32s}{rate:10,.0f} images/s {ratio:7.2f}", flush=True)


def worker_memory(folder: str, whole: str) -> None:
    """Print the peak of a loader process that cuts DINO's crops, and of that what it shares with no other process."""
    sizes = PHOTOS if int(whole) == PHOTOS.whole else SMALL

    def note(batch: dict) -> dict:
        return batch | {"peak": peak_memory(CPU), "own": psutil.Process().memory_full_info().uss}

    source = Folder(Path(folder), data.Config())
    size = min(BATCH, len(source))
    loader = make_loader(source, our_views("dino", sizes), Layout(size), 0, (0, max(8, 256 // size)), 1, CPU, note)
    batches = list(loader)
    peak, own = (max(batch[key] for batch in batches) / 2**20 for key in ("peak", "own"))
    print(f"one worker, DINO, batches of {size}: {peak:,.0f} MiB at its peak, {own:,.0f} of them its own")


def index_memory(kind: str) -> None:
    """Print what the paths of ten million files take, as we keep them or as a list of texts."""
    folders = itertools.count()
    names = (f"class{folder:06d}/image{file:08d}.jpg" for folder in folders for file in range(10_000))
    before, start = psutil.Process().memory_info().rss, time.perf_counter()
    taken = itertools.islice(names, PATHS)
    kept = Names(taken) if kind == "names" else list(taken)
    assert kept[PATHS - 1] == "class000999/image00009999.jpg"
    after, peak = psutil.Process().memory_info().rss, peak_memory(CPU)
    print(
        f"{PATHS:,} paths as {'we keep them' if kind == 'names' else 'a list of texts'}: "
        f"{(after - before) / 2**20:,.0f} MiB, at the peak {(peak - before) / 2**20:,.0f}, "
        f"{time.perf_counter() - start:.1f} s to make"
    )


def make_photos(folder: Path, count: int = 48) -> Path:
    """JPEG files of 500 x 375 pixels, each four fractals beside one another with noise, some 60 kB."""
    folder.mkdir(parents=True)
    drawn, noise = Fractals(size=250, count=4 * count), np.random.default_rng(0)
    for i in range(count):
        a, b, c, d = (drawn.read(4 * i + k).permute(1, 2, 0).numpy().astype(np.float32) for k in range(4))
        pixels = np.concatenate([np.concatenate([a, b], 1), np.concatenate([c, d], 1)], 0)[:375]
        pixels = (pixels + noise.normal(0, 8, pixels.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:04d}.jpg", quality=90)
    return folder


def make_large(photos: Path, folder: Path, count: int = 8) -> Path:
    """JPEG files of 3,000 pixels on the longer side: photos enlarged, with grain, so that decoding them is work."""
    folder.mkdir(parents=True)
    source, noise = Folder(photos, data.Config()), np.random.default_rng(0)
    for i in range(min(count, len(source))):
        with Image.open(source.name(i)) as image:
            factor = 3000 / max(image.size)
            pixels = np.asarray(image.convert("RGB").resize([round(side * factor) for side in image.size]), np.float32)
        pixels = (pixels + noise.normal(0, 4, pixels.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:04d}.jpg", quality=90)
    return folder


def make_small(folder: Path, count: int = 512) -> Path:
    """PNG files of 32 x 32 pixels."""
    folder.mkdir(parents=True)
    drawn = Fractals(size=32, count=count)
    for i in range(count):
        Image.fromarray(drawn.read(i).permute(1, 2, 0).numpy()).save(folder / f"{i:04d}.png")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", nargs="?", type=Path, help="folder of photos; else they are made")
    parser.add_argument("small", nargs="?", type=Path, help="folder of images of 32 x 32 pixels; else they are made")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=64, help="photos a round; eight times as many small images")
    parser.add_argument("--part", nargs="+", help=argparse.SUPPRESS)  # in a process of its own: what uses memory
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    random.seed(0)
    if args.part:
        {"worker": worker_memory, "index": index_memory}[args.part[0]](*args.part[1:])
        return
    with tempfile.TemporaryDirectory() as temporary:
        photos = args.photos or make_photos(Path(temporary) / "photos")
        small = args.small or make_small(Path(temporary) / "small")
        print(f"one core; torch {torch.__version__}; images/s, and times the published pipeline's")
        for method in ("dino", "mae"):
            compare("photos", photos, PHOTOS, method, args.images, args.rounds)
            compare("32 x 32 pixels", small, SMALL, method, 8 * args.images, args.rounds, cache=True)
        large = make_large(photos, Path(temporary) / "large")
        for method in ("dino", "mae"):
            compare("large photos", large, PHOTOS, method, max(1, args.images // 8), args.rounds, large=True)
        here = [sys.executable, "-m", "tests.benchmarks.input", "--part"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        parts = [["worker", str(photos), str(PHOTOS.whole)], ["worker", str(small), str(SMALL.whole)]]
        for part in (*parts, ["index", "names"], ["index", "texts"]):
            subprocess.run([*here, *part], env=environment, check=True)


if __name__ == "__main__":
    main()
