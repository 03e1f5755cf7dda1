"""The whole check of continued pretraining: configs/continue.yaml, from one half of CIFAR-10's classes to the other.

    python -m tests.benchmarks.continued data=<cifar10> out=<folder> [seeds=3] [images=100000]

The public start is played by an encoder (width 192, depth 4, patch 4) that MAE pretrains on 100,000 images of the first
five classes. It is measured, continued on the training images of the other five, whose labels are not used, and
compared with the same run from random weights; k-NN is on the test images of the other five. At last the rate times 30
must give an encoder that is no worse than the start. Two quiet cores need about 4 minutes for 100,000 images.
"""

import statistics
import sys
from pathlib import Path

from sslvit.__main__ import main

CONFIGS = Path(__file__).parents[2] / "configs"
SMALL = ["model.name=vit_tiny_patch16_224", "model.args={patch_size: 4, depth: 4}"]


def halves(data: Path, out: Path) -> tuple[Path, Path]:
    """Two folders of links: the first five classes and the other ones."""
    classes = sorted(path.name for path in (data / "train").iterdir() if path.is_dir())
    for half, names in (("first", classes[:5]), ("second", classes[5:])):
        for part in ("train", "test"):
            (out / half / part).mkdir(parents=True, exist_ok=True)
            for name in names:
                link = out / half / part / name
                if not link.exists():
                    link.symlink_to((data / part / name).resolve())
    return out / "first", out / "second"


def pretrain(recipe: str, out: Path, *words: str) -> None:
    """A run; one that is there is not made again."""
    if main(["pretrain", str(CONFIGS / recipe), *SMALL, f"out={out}", *words]):
        sys.exit(f"{out} has failed")


def knn(run: Path, half: Path) -> float:
    """Percent of the test images (k = 20), by the encoder that the run stands for."""
    from sslvit.evaluation import knn as evaluation

    words = evaluation.Config(run=str(run), k=(20,))
    words.data.train, words.data.test = str(half / "train"), str(half / "test")
    return float(evaluation.run(words)["neighbours"][0]["top1"])


def check(data: Path, out: Path, seeds: int, images: int) -> None:
    first, second = halves(data, out)
    start, train = out / "start", f"data.train={second / 'train'}"
    pretrain("mae_cifar10.yaml", start, f"data.train={first / 'train'}", "images=100000")
    found: dict[str, list[float]] = {"start": [knn(start, second)], "continued": [], "from scratch": []}
    for seed in range(seeds):
        length = [train, f"seed={seed}", f"images={images}"]
        pretrain("continue.yaml", out / f"continued_{seed}", f"model.init={start}", *length)
        pretrain("continue.yaml", out / f"scratch_{seed}", "save.keep_best=false", *length)
        for name, run in (("continued", "continued"), ("from scratch", "scratch")):
            found[name].append(knn(out / f"{run}_{seed}", second))
    pretrain("continue.yaml", out / "times_30", f"model.init={start}", train, "optim.base_lr=RATE", "images=20000")
    found["rate x 30"] = [knn(out / "times_30", second)]
    for name, values in found.items():
        gain = statistics.mean(values) - found["start"][0]
        print(f"{name:13s} {' '.join(f'{value:.2f}' for value in values)} %  mean {gain:+.2f} points")
    assert found["rate x 30"][0] >= found["start"][0]
    assert min(found["continued"]) >= found["start"][0] + 3, "the check of the issue: 3 points with each seed"


if __name__ == "__main__":
    given = dict(word.split("=", 1) for word in sys.argv[1:])
    check(Path(given["data"]), Path(given["out"]), int(given.get("seeds", 3)), int(given.get("images", 100000)))
