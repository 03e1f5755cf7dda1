"""Five folders as strangers have them, each `sslvit pretrain <folder> minutes=10` and nothing else.

    python -m tests.benchmarks.folders cifar10=<folder> fashion=<folder> photos=<folder> out=<folder> \
        [minutes=10] [seeds=3] [only=scans,drawings,photos,five,fractals]

scans: 300 of Fashion-MNIST, enlarged to 180 to 420 pixels, shaded, noisy, 12 of 16 bits, three of them cut short.
drawings: Fashion-MNIST (fashion: the folder of Debian's package dataset-fashion-mnist). photos: as they are, without
labels. five: 10,000 of CIFAR-10 with two channels more, TIFF. fractals: 10,000 of 48 pixels in 20 classes. Prints the
seconds of the command, and k-NN (k = 20) on test images of the run, of the untrained encoder and of the pixels. Give
OMP_NUM_THREADS=1 to run several side by side. Results are in eval/README.md, "Automatic settings".
"""

import gzip
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage

from sslvit.data.sources.fractals import Fractals

COUNTS = {"train": 10_000, "test": 2_000}


def fashion(folder: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    """[N, 28, 28] uint8 images and [N] labels."""
    name = {"train": "train", "test": "t10k"}[part]
    images, labels = (
        np.frombuffer(gzip.decompress((folder / f"{name}-{kind}-ubyte.gz").read_bytes()), np.uint8, offset=offset)
        for kind, offset in (("images-idx3", 16), ("labels-idx1", 8))
    )
    return images.reshape(-1, 28, 28), labels


def place(out: Path, label: object, number: int, suffix: str = "png") -> Path:
    folder = out / f"class{label}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{number:05d}.{suffix}"


def drawings(source: Path, out: Path) -> None:
    for part in COUNTS:
        for number, (image, label) in enumerate(zip(*fashion(source, part), strict=True)):
            Image.fromarray(image).save(place(out / part, label, number))


def scans(source: Path, out: Path) -> None:
    draw = np.random.default_rng(0)
    for part, count in (("train", 300), ("test", 1000)):
        images, labels = fashion(source, part)
        for number, chosen in enumerate(draw.permutation(len(images))[:count]):
            height, width = draw.integers(180, 420, 2)
            y, x = np.mgrid[0:height, 0:width] / [[[height]], [[width]]]
            shade = 0.15 + 0.1 * np.sin(x * draw.uniform(1, 3) + draw.uniform(0, 6)) * np.cos(y * draw.uniform(1, 3))
            large = np.asarray(Image.fromarray(images[chosen]).resize((width, height), Image.Resampling.BICUBIC)) / 255
            values = (0.75 * large + shade) * draw.uniform(0.7, 1.1) + draw.normal(0, 0.03, (height, width))
            Image.fromarray((values.clip(0, 1) * 4095).astype(np.uint16)).save(
                place(out / part, labels[chosen], number)
            )
    for file in sorted((out / "train").rglob("*.png"))[::100]:
        file.with_name(f"broken_{file.name}").write_bytes(file.read_bytes()[:3000])


def five(source: Path, out: Path) -> None:
    import tifffile

    draw = np.random.default_rng(1)
    for part, count in COUNTS.items():
        for folder in sorted((source / part).iterdir()):
            for number, file in enumerate(sorted(folder.iterdir())[: count // 10]):
                colours = np.asarray(Image.open(file).convert("RGB"), np.float32)
                gray = colours.mean(axis=2)
                edges = np.hypot(ndimage.sobel(gray, 0), ndimage.sobel(gray, 1)) / 4
                heat = 255 - ndimage.gaussian_filter(colours[..., 2], 1) + draw.normal(0, 4, gray.shape)
                bands = np.dstack([colours, heat, edges]).clip(0, 255).astype(np.uint8)
                path = place(out / part, folder.name, number, "tif")
                tifffile.imwrite(path, bands, photometric="minisblack", planarconfig="contig")


def fractals(source: Path, out: Path) -> None:
    for part, count in COUNTS.items():
        drawn = Fractals(part, 20, count, 48)
        for number in range(count):
            image = drawn.read(number).permute(1, 2, 0).numpy()
            Image.fromarray(image).save(place(out / part, drawn.labels[number], number))


def photos(source: Path, out: Path) -> None:
    out.mkdir(parents=True)
    (out / "train").symlink_to(source.resolve())


MAKE = {"scans": scans, "drawings": drawings, "photos": photos, "five": five, "fractals": fractals}
SOURCE = {"scans": "fashion", "drawings": "fashion", "photos": "photos", "five": "cifar10", "fractals": ""}


def sslvit(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "sslvit", *words], check=True, stdout=subprocess.DEVNULL)


def measure(folder: Path, run: Path, minutes: str, seed: int) -> str:
    before = time.monotonic()
    sslvit("pretrain", f"{folder}/train", f"minutes={minutes}", f"seed={seed}", f"out={run}")
    row = [f"{time.monotonic() - before:.0f} s"]
    for name in (f"{run}", f"untrained:{run}", f"pixels:{run}") if (folder / "test").exists() else ():
        result = run.with_suffix(".json")
        sslvit("knn", f"run={name}", f"data.train={folder}/train", f"data.test={folder}/test", f"out={result}")
        rows = json.loads(result.read_text())["results"]["neighbours"]
        row.append(f"{next(one['top1'] for one in rows if one['k'] == 20):.2f} %")
    return "  ".join(row)


def check(given: dict[str, str]) -> None:
    out = Path(given["out"])
    names = [name for name in MAKE if name in given.get("only", ",".join(MAKE)).split(",")]
    for name in names:
        if not (out / name).exists():
            MAKE[name](Path(given.get(SOURCE[name], "")), out / name)
    print("folder, seed: seconds, k-NN of the run, of the untrained encoder, of the pixels", flush=True)
    for seed in range(int(given.get("seeds", 3))):
        for name in names:
            row = measure(out / name, out / f"run_{name}_{seed}", given.get("minutes", "10"), seed)
            print(f"{name}, {seed}: {row}", flush=True)


if __name__ == "__main__":
    check(dict(word.split("=", 1) for word in sys.argv[1:]))
