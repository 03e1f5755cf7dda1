"""The whole check of continued pretraining: configs/continue.yaml, from one half of CIFAR-10's classes to the other.

    python -m tests.benchmarks.continued data=<cifar10> out=<folder> [seeds=3] [images=100000]

The public start is played by an encoder (width 192, depth 4, patch 4) that MAE pretrains on 50,000 images of the first
five classes. It is measured, continued on the training images of the other five, whose labels are not used, and
compared with the same run from random weights; k-NN is on the test images of the other five. The rate times
30 must give an encoder that is no worse than the start. Results are in the recipe's header.
"""

import sys
from pathlib import Path

from sslvit.__main__ import main

START = 50000  # images of the start
RATE = 4e-3  # optim.base_lr of the recipe
CONFIGS = Path(__file__).parents[2] / "configs"
SMALL = ["model.name=vit_tiny_patch16_224", "model.args={patch_size: 4, depth: 4}", "data.image_size=32"]


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


def knn(name: str, run: Path, half: Path, start: float = 0.0) -> float:
    """Percent of the test images (k = 20), by the encoder that the run stands for, printed beside the start's."""
    from sslvit.evaluation import knn as evaluation

    config = evaluation.Config(run=str(run), k=(20,))
    config.data.train, config.data.test = str(half / "train"), str(half / "test")
    value = float(evaluation.run(config)["neighbours"][0]["top1"])
    print(f"CHECK {name}: k-NN {value:.2f} %" + (f", {value - start:+.2f} points" if start else ""), flush=True)
    return value


def check(data: Path, out: Path, seeds: int, images: int) -> None:
    first, second = halves(data, out)
    begin, train = out / "start", f"data.train={second / 'train'}"
    pretrain("mae_cifar10.yaml", begin, f"data.train={first / 'train'}", f"images={START}")
    start = knn("frozen start", begin, second)
    gains = []
    for seed in range(seeds):
        run = out / f"continued_{seed}"
        pretrain("continue.yaml", run, f"model.init={begin}", train, f"seed={seed}", f"images={images}")
        gains.append(knn(f"continued, seed {seed}", run, second, start) - start)
    run, wild = out / "times_30", f"optim.base_lr={30 * RATE}"
    pretrain("continue.yaml", run, f"model.init={begin}", train, "images=20000", wild, "eval.every_epochs=0.25")
    guarded = knn("rate x 30, what the run stands for", run, second, start)
    last = run / "checkpoints" / sorted(path.name for path in (run / "checkpoints").iterdir())[-1]
    knn("rate x 30, its last step", last, second, start)
    for seed in range(seeds):
        run = out / f"scratch_{seed}"
        pretrain("continue.yaml", run, "save.keep_best=false", train, f"seed={seed}", f"images={images}")
        knn(f"from scratch, seed {seed}", run, second, start)
    assert guarded >= start
    assert min(gains) >= 3, gains


if __name__ == "__main__":
    given = dict(word.split("=", 1) for word in sys.argv[1:])
    check(Path(given["data"]), Path(given["out"]), int(given.get("seeds", 3)), int(given.get("images", 100000)))
