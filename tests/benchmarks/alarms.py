"""How often the alarms of report/verdict.py are right: runs that are sabotaged, and healthy ones.

    python -m tests.benchmarks.alarms run data=<cifar10> photos=<folder> out=<folder> [seeds=0,1] [only=<a name>]
    python -m tests.benchmarks.alarms heal out=<folder> [seed=1] [only=<a name>]   with the first suggestions
    python -m tests.benchmarks.alarms table out=<folder>     error rates, as in eval/README.md
    python -m tests.benchmarks.alarms store out=<folder>     the lines of all runs, for tests/report/test_alarms.py

A run takes half a minute of one core; finished ones (<out>/<name>.<seed>.json) are not made again. Three sets of
images, seen at 24 pixels: 3,000 of CIFAR-10, 3,000 fractals, crops of 256 photos. Whether a run was harmed is decided
by k-NN with labels (CIFAR-10's for the photos), which `judge` does not see.
"""

import contextlib
import io
import itertools
import json
import lzma
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from sslvit.report.curves import Curves
from sslvit.report.facts import Facts, measured_of
from sslvit.report.verdict import ALARMS, Verdict, judge

CONFIGS = Path(__file__).parents[2] / "configs"
STORED = Path(__file__).parents[1] / "report" / "alarms.json.xz"
HARM = 2.0  # points of k-NN
START = "an encoder learns from how images differ"  # of what a run says before its first step
COUNTS = [f"{kind}{more}" for kind in ("healthy", "harmed", "unharmed") for more in ("", ", said", ", within 5 %")]
EXACT = {"image_difference"}
READ = {
    "method", "steps", "global_batch_size", "model.init", "log.every_steps", "optim.base_lr", "optim.warmup_epochs",
    "objective.koleo_weight", "objective.center_momentum", "objective.teacher_temp", "objective.student_temp",
    "objective.mask_ratio", "objective.prototypes",
}  # fmt: skip
UNSEEN = {
    "knn/top1",
    "images",
    "seconds",
    "images_per_second",
    "data_wait",
    "cpu_kwh",
    "gpu_kwh",
    "reconstruction",
    "feature_loss",
    "patch_loss",
    "teacher_temp",
}
STEPS, EVERY = 160, 4
ENCODER = ["model.name=vit_tiny_patch16_224", "model.args={patch_size: 4, embed_dim: 128, depth: 3, num_heads: 4}"]
SHORT = [*ENCODER, f"steps={STEPS}", "global_batch_size=64", "data.image_size=24", "data.workers=0"]
WATCHED = [f"log.every_steps={EVERY}", f"log.rank_every_steps={8 * EVERY}", "log.tensorboard=false", "log.report=false"]
MAE = ["mae_cifar10.yaml", "objective.decoder_width=64", "optim.warmup_epochs=0.4"]
DINO = ["dino_cifar10.yaml", "objective.prototypes=256", "objective.hidden_dim=256", "global_batch_size=32"]
QUICK = ["quickstart.yaml", "objective.prototypes=256", "objective.hidden_dim=256", "global_batch_size=32"]
BARE = [*QUICK, "objective.koleo_weight=0"]  # DINO alone: KoLeo hides what happens to it
# As the paper's, with two local crops.
PAPER = [
    "dino_vits16_in1k_100ep.yaml", "objective.prototypes=256", "objective.hidden_dim=256", "global_batch_size=32",
    "objective.bottleneck_dim=64", "objective.local_crops=2", "objective.local_crop_size=12", "objective.momentum=0.98",
    "objective.drop_path=0", "optim.base_lr=3e-3", "optim.warmup_epochs=0.3", "freeze_last_layer_epochs=0.1",
]  # fmt: skip
PLAIN = [*PAPER, "objective.init=mae", "objective.pool=mean", "objective.koleo_weight=0.1"]
WHOLE = ["objective.flip_prob=0"]  # no augmentation
STILL = [
    *WHOLE, "objective.global_crop_scale=[1,1]", "objective.jitter_prob=0", "objective.gray_prob=0",
    "objective.blur_prob=[0,0,0]", "objective.solarize_prob=0", "objective.student_keep=1", "objective.local_crops=0",
]  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One run. sabotage: what is wrong with it, in words; empty for a healthy one."""

    name: str
    base: list[str]
    images: str  # a set of `make_images`
    words: tuple[str, ...] = ()
    sabotage: str = ""
    patch: str = ""  # a function of PATCHES


def cases() -> list[Case]:
    """Healthy and sabotaged ones, mixed, so that a campaign that is cut short has some of each."""
    pairs = itertools.zip_longest(healthy(), sabotaged())
    return [case for pair in pairs for case in pair if case]


def healthy() -> list[Case]:
    def case(name: str, base: list[str], images: str, *words: str) -> Case:
        return Case(f"healthy_{name}", base, images, words)

    small = ["global_batch_size=64", "optim.warmup_epochs=0.4"]
    return [
        case("mae_cifar10", MAE, "cifar10"),
        case("dino_cifar10", DINO, "cifar10"),
        case("quickstart", QUICK, "fractals"),
        case("dino_photos", PLAIN, "photos"),
        case("mae_fractals", MAE, "fractals"),
        case("mae_photos", MAE, "photos"),
        case("dino_fractals_plain", PLAIN, "fractals"),
        case("auto_mae", [], "cifar10", "minutes=0.4", "method=mae"),
        case("auto_dino", [], "cifar10", "minutes=0.6", "method=dino"),
        case("mae_vitb16", ["mae_vitb16_in1k_800ep.yaml", "objective.decoder_width=64", "objective.decoder_depth=2",
             "objective.decoder_heads=4", "optim.base_lr=2e-3", *small], "cifar10"),
        case("dino_boosted", [*PLAIN[1:], "dino_vits16_in1k_300ep_boosted.yaml",
             "objective.teacher_temp_warmup_epochs=0.5"], "cifar10"),
        case("continue", ["continue.yaml", "save.keep_best=false", "objective.decoder_width=64",
             "eval.every_epochs=null"], "photos", "model.init={healthy_mae_cifar10}"),
        case("distill", ["distill_cifar10.yaml"], "cifar10", "teacher={healthy_mae_cifar10}"),
        case("mae_pixels", MAE, "cifar10", "objective.norm_pix=false"),
        case("mae_microscopy", MAE, "fractals", "preset=microscopy", "objective.koleo_weight=0"),
        case("dino_gray", QUICK, "fractals", "preset=gray"),
        case("dino_satellite", PLAIN, "photos", "preset=satellite", "optim.lr_schedule=hold"),
        case("dino_channels", DINO, "photos", "preset=channels"),
        case("dino_microscopy", DINO, "cifar10", "preset=microscopy", "objective.koleo_weight=0.3"),
        case("mae_slow", MAE, "photos", "optim.base_lr=3e-4", "objective.mask_ratio=0.6"),
        case("dino_xray", QUICK, "cifar10", "preset=xray", "optim.base_lr=1e-3"),
    ]  # fmt: skip


def sabotaged() -> list[Case]:
    def case(name: str, base: list[str], images: str, what: str, *words: str, patch: str = "") -> Case:
        return Case(name, base, images, words, what, patch)

    off = "objective.center_momentum=1"
    return [
        case("mae_rate_100", MAE, "cifar10", "rate x 100", "optim.base_lr=0.2"),
        case("dino_center_off", BARE, "fractals", "center off", off),
        case("mae_same_image", MAE, "same", "one image"),
        case("dino_hot_teacher", BARE, "fractals", "teacher_temp 1", "objective.teacher_temp=1",
             "objective.teacher_temp_start=1"),
        case("mae_rate_low", MAE, "cifar10", "rate / 1000", "optim.base_lr=2e-6"),
        case("dino_frozen_teacher", DINO, "cifar10", "teacher momentum 1", "objective.momentum=1"),
        case("mae_repeat", MAE, "cifar10", "one batch again and again", patch="repeat"),
        case("dino_center_off_photos", PLAIN, "photos", "center off", off),
        case("mae_decay", MAE, "cifar10", "weight decay 100", "optim.weight_decay=100"),
        case("dino_momentum_0", PLAIN, "fractals", "teacher momentum 0", "objective.momentum=0",
             "objective.momentum_end=0"),
        case("mae_overflow", MAE, "photos", "overflow in bf16", "optim.base_lr=1e7", "optim.warmup_epochs=0",
             "precision=bf16"),
        case("dino_rate_100", PLAIN, "photos", "rate x 100", "optim.base_lr=0.3", "optim.clip=null",
             "optim.warmup_epochs=0"),
        case("mae_blank", MAE, "blank", "constant images"),
        case("dino_augment_off", DINO, "cifar10", "augmentation off", *STILL),
        case("mae_mask_97", MAE, "fractals", "mask ratio 0.97", "objective.mask_ratio=0.97"),
        case("dino_cold_student", BARE, "fractals", "student_temp 0.01", "objective.student_temp=0.01"),
        case("mae_mask_05", MAE, "cifar10", "mask ratio 0.05", "objective.mask_ratio=0.05"),
        case("dino_same_image", DINO, "same", "one image"),
        case("mae_no_warmup", MAE, "fractals", "rate x 50, no warm-up", "optim.base_lr=0.1", "optim.warmup_epochs=0"),
        case("dino_repeat", BARE, "fractals", "one batch again and again", patch="repeat"),
        case("mae_16_images", MAE, "few", "16 images", "global_batch_size=16"),
        case("dino_decay_all", PLAIN, "photos", "weight decay 20 of everything", "optim.weight_decay=20",
             "optim.weight_decay_end=20", patch="decay_all"),
        case("dino_rate_low", DINO, "cifar10", "rate / 1000", "optim.base_lr=3e-6"),
        case("mae_nearly_same", MAE, "nearly", "nearly one image"),
        case("dino_cold_teacher", PLAIN, "cifar10", "teacher_temp 0.001", "objective.teacher_temp=0.001",
             "objective.teacher_temp_start=0.001"),
        case("dino_16_images", BARE, "few", "16 images", "global_batch_size=16"),
        case("dino_hot_student", PLAIN, "cifar10", "student_temp 2", "objective.student_temp=2"),
        case("mae_rate_100_photos", MAE, "photos", "rate x 100", "optim.base_lr=0.2"),
        case("dino_nearly_same", PLAIN, "nearly", "nearly one image"),
        case("dino_overflow", BARE, "fractals", "overflow in bf16", "optim.base_lr=1e7", "optim.warmup_epochs=0",
             "optim.clip=null", "precision=bf16"),
        case("dino_bare", BARE, "fractals", "no KoLeo"),
        case("dino_paper_short", PAPER, "photos", "no KoLeo, 160 steps of 256 photos"),
        case("dino_paper_fractals", PAPER, "fractals", "no KoLeo, 160 steps of fractals"),
        case("dino_center_off_koleo", QUICK, "fractals", "center off, with KoLeo", off),
        case("dino_hot_teacher_koleo", QUICK, "fractals", "teacher_temp 1, with KoLeo", "objective.teacher_temp=1",
             "objective.teacher_temp_start=1"),
        case("dino_frozen_teacher_plain", PLAIN, "photos", "teacher momentum 1", "objective.momentum=1"),
    ]  # fmt: skip


# The images: arrays of [N, 32, 32, 3] or [N, 48, 48, 3], with labels for k-NN.


def make_part(spec: str, count: int, path: Path) -> np.ndarray:
    """Write some images of a source, 32 pixels, and their labels."""
    from sslvit.data import Config, open_source

    source = open_source(spec, Config(image_size=32))
    every = np.random.default_rng(0).permutation(len(source))[:count]
    images = np.stack([source.read(int(i)).permute(1, 2, 0).numpy() for i in every])
    np.save(path, images)
    np.save(path.with_suffix(".labels.npy"), source.labels[every])
    return images


def make_fractals(out: Path) -> None:
    for name, split, count in [("", "train", 3000), ("_bank", "train", 2000), ("_test", "test", 1000)]:
        make_part(f"fractals:{split},count={count}", count, out / f"fractals{name}.npy")


def make_images(cifar10: Path, photos: Path, out: Path) -> None:
    """Write <out>/<set>.npy. What is there is not made again."""
    if (out / "few.npy").exists():
        return
    from PIL import Image

    def write(name: str, images: Any) -> None:
        np.save(out / f"{name}.npy", np.asarray(images, dtype=np.uint8))

    train = make_part(str(cifar10 / "train"), 3000, out / "cifar10.npy")
    make_part(str(cifar10 / "train"), 2000, out / "cifar10_bank.npy")
    make_part(str(cifar10 / "test"), 1000, out / "cifar10_test.npy")
    make_fractals(out)
    small = [Image.open(path).convert("RGB").resize((48, 48)) for path in sorted(photos.glob("*.JPEG"))]
    write("photos", [np.asarray(image) for image in small])
    rng = np.random.default_rng(0)
    write("same", np.repeat(train[:1], 3000, axis=0))
    write("nearly", np.clip(train[1] + rng.normal(0, 2, (3000, 32, 32, 3)), 0, 255))
    write("blank", np.broadcast_to(rng.integers(0, 256, (3000, 1, 1, 3)), (3000, 32, 32, 3)))
    write("few", train[:16])


def _repeat() -> Iterator[None]:
    """A loader that gives its first batch for ever."""
    from sslvit import pretraining

    usual = pretraining.make_loader
    pretraining.make_loader = lambda *a, **k: map(dict, itertools.repeat(next(iter(usual(*a, **k)))))
    yield
    pretraining.make_loader = usual


def _decay_all() -> Iterator[None]:
    """Weight decay of biases and gains too."""
    from sslvit import optim

    usual = optim.parameter_groups
    optim.parameter_groups = lambda module: [
        {"params": [p for p in module.parameters() if p.requires_grad], "decayed": True}
    ]
    yield
    optim.parameter_groups = usual


PATCHES: dict[str, Callable[[], Iterator[None]]] = {"repeat": _repeat, "decay_all": _decay_all}


def given_to(case: Case, seed: int, out: Path) -> dict[str, str]:
    """The keys of a run, beside its recipe and its place."""
    labelled = "fractals" if case.images == "fractals" else "cifar10"
    words = [word for word in case.base if not word.endswith(".yaml")]
    given = {}
    usual = SHORT if case.base else ["data.image_size=24", "data.workers=0"]
    evaluated = [f"eval.train={out / labelled}_bank.npy", f"eval.test={out / labelled}_test.npy"]
    for word in [
        *usual,
        *WATCHED,
        *evaluated,
        *words,
        *case.words,
        f"seed={seed}",
        f"data.train={out / case.images}.npy",
    ]:
        key, _, value = word.partition("=")
        given[key] = value.replace("{healthy_mae_cifar10}", str(out / "runs" / f"healthy_mae_cifar10.{seed}"))
    return given


def run(case: Case, seed: int, out: Path) -> dict[str, Any]:
    """Train, and write <out>/<name>.<seed>.json: its words, settings, lines and what it said. The run is deleted, but
    for those from which others begin."""
    record = out / f"{case.name}.{seed}.json"
    if record.exists():
        return json.loads(record.read_text())
    from sslvit.__main__ import main
    from sslvit.arguments import flatten, read_yaml

    folder = out / "runs" / f"{case.name}.{seed}"
    shutil.rmtree(folder, ignore_errors=True)
    recipe = [str(CONFIGS / word) for word in case.base if word.endswith(".yaml")]
    said, began = io.StringIO(), time.monotonic()
    patched = contextlib.contextmanager(PATCHES.get(case.patch, lambda: iter([None])))
    with patched(), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        status = main(
            [
                "pretrain",
                *recipe,
                *(f"{key}={value}" for key, value in given_to(case, seed, out).items()),
                f"out={folder}",
            ]
        )
    metrics = folder / "metrics.jsonl"
    if not metrics.exists():
        sys.exit(f"{case.name} has not begun:\n{said.getvalue()[-2000:]}")
    printed = [line for line in said.getvalue().splitlines() if "Warning" in line or "rror" in line or status]
    result = {
        "name": case.name, "seed": seed, "sabotage": case.sabotage, "images": case.images, "status": status or 0,
        "seconds": round(time.monotonic() - began, 1), "said": printed[-8:],
        "settings": flatten(read_yaml(folder / "config.yaml")),
        "lines": [json.loads(line) for line in metrics.read_text().splitlines()],
    }  # fmt: skip
    record.write_text(json.dumps(result))
    if case.name != "healthy_mae_cifar10":
        shutil.rmtree(folder)
    return result


# What is said of a run, line by line.


def replay(record: dict[str, Any], stride: int = 1) -> Iterator[tuple[int, Verdict]]:
    """The step of each line, and what `judge` says when the run has come so far. It does not see k-NN."""
    whole = {
        key: (np.array(steps, float), np.array(values, float)) for key, (steps, values) in record["columns"].items()
    }
    every = np.unique(np.concatenate([steps for steps, _ in whole.values()]))
    for step in [*every[:-1:stride], every[-1]]:
        cut = {key: int(np.searchsorted(steps, step, side="right")) for key, (steps, _) in whole.items()}
        so_far = {key: (whole[key][0][:place], whole[key][1][:place]) for key, place in cut.items() if place}
        running = bool(step < every[-1]) or record["status"] != 0
        facts = Facts(Path("run"), "run", record["settings"], Curves(so_far), total=record["steps"], running=running)
        yield int(step), judge(measured_of(facts))


def first_alarm(record: dict[str, Any], stride: int = 1) -> tuple[float, Verdict] | None:
    """(share of the run, verdict) of the first line with an alarm; None if there is none."""
    found = ((step / record["steps"], verdict) for step, verdict in replay(record, stride) if verdict.state in ALARMS)
    return next(found, None)


def harmed(record: dict[str, Any], records: list[dict[str, Any]]) -> bool:
    """Whether k-NN at the end is below that of all healthy runs of the same images, method and seed that have gained,
    by more than 2 points; a run that broke off is."""
    test = [
        other["knn"][1]
        for other in records
        if not other["sabotage"] and other["test"] == record["test"] and other["seed"] == record["seed"]
        and other["settings"]["method"] == record["settings"]["method"] and other["knn"][1] > other["knn"][0] + 2
    ]  # fmt: skip
    return record["status"] != 0 or bool(test and record["knn"][1] < min(test) - HARM)


def kind_of(record: dict[str, Any], records: list[dict[str, Any]]) -> str:
    """healthy, harmed or unharmed; healed: a sabotaged run with the first suggestion."""
    if record["name"].startswith("healed_"):
        return "healed"
    return "healthy" if not record["sabotage"] else "harmed" if harmed(record, records) else "unharmed"


def shortened(record: dict[str, Any]) -> dict[str, Any]:
    """What a replay needs of a run."""
    columns: dict[str, tuple[list[int], list[float]]] = {}
    for line in record["lines"]:
        for key, value in line.items():
            if key != "step" and key not in UNSEEN:
                steps, values = columns.setdefault(key, ([], []))
                steps.append(line["step"])
                values.append(value if key in EXACT else float(f"{value:.4g}"))
    knn = [line["knn/top1"] for line in record["lines"] if "knn/top1" in line]
    settings = {key: value for key, value in record["settings"].items() if key in READ}
    steps = record["settings"]["steps"] or max(line["step"] for line in record["lines"])
    said = any(START in sentence for sentence in record["said"])
    return {
        **{key: record[key] for key in ("name", "seed", "sabotage", "status")}, "steps": steps, "said_at_start": said,
        "test": "fractals" if "fractals" in record["settings"]["eval.test"] else "cifar10",
        "knn": [knn[0], knn[-1]], "settings": settings, "columns": columns,
    }  # fmt: skip


def records(out: Path) -> list[dict[str, Any]]:
    return [shortened(json.loads(path.read_text())) for path in sorted(out.glob("*.json"))]


def stored() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(lzma.decompress(STORED.read_bytes()))
    return found


def first_words(verdict: Verdict) -> list[str]:
    """The keys that the first advice with a key says to set; none if other images are advised first."""
    if verdict.advice and "data.train" in verdict.advice[0]:
        return []
    found = (re.findall(r"[\w.]+=[^\s;:]*[^\s;:.,]", sentence) for sentence in verdict.advice)
    return next((words for words in found if words), [])


def heal(out: Path, seed: int, only: str) -> None:
    """Train the sabotaged runs again, with the first suggestion of the first alarm, if that is a key of the method."""
    for case in sabotaged():
        path = out / f"{case.name}.{seed}.json"
        if only not in case.name or not path.exists():
            continue
        alarm = first_alarm(shortened(json.loads(path.read_text())))
        words = first_words(alarm[1]) if alarm else []
        if not words:
            print(f"{case.name}: {'no key' if alarm else 'no alarm'}")
            continue
        knn = shortened(run(replace(case, name=f"healed_{case.name}", words=(*case.words, *words)), seed, out))["knn"]
        print(f"{case.name}: {' '.join(words)}: k-NN {knn}", flush=True)


def table(runs: list[dict[str, Any]]) -> None:
    """What eval/README.md shows, and a summary for each seed."""
    rows: dict[str, list[Any]] = {}
    sums: dict[int, dict[str, int]] = {}
    for record in runs:
        if (kind := kind_of(record, runs)) == "healed":
            continue
        alarm, bad = first_alarm(record), harmed(record, runs)
        share = 0.0 if record["said_at_start"] else alarm[0] if alarm else None
        rows.setdefault(record["name"], []).append((record, bad, share, alarm))
        count = sums.setdefault(record["seed"], dict.fromkeys(COUNTS, 0))
        count[kind] += 1
        count[f"{kind}, said"] += share is not None
        count[f"{kind}, within 5 %"] += share is not None and share <= 0.05
    for name, found in rows.items():
        record = found[0][0]
        cells = [
            name,
            record["sabotage"] or "-",
            " / ".join(f"{r['knn'][0]:.1f} to {r['knn'][1]:.1f}" for r, *_ in found),
            " / ".join("yes" if bad else "no" for _, bad, *_ in found),
            " / ".join("no" if share is None else f"{share:.1%}" for *_, share, _ in found),
            next((" ".join(first_words(alarm[1])) or "data.train" for *_, alarm in found if alarm), ""),
        ]
        print("| " + " | ".join(cells) + " |")
    for seed, count in sums.items():
        print(f"seed {seed}: " + ", ".join(f"{key} {value}" for key, value in count.items()))


def run_all(out: Path, seeds: list[int], only: str) -> None:
    for seed in seeds:
        for case in cases():
            if only in case.name:
                result = run(case, seed, out)
                knn = [line["knn/top1"] for line in result["lines"] if "knn/top1" in line]
                print(
                    f"{case.name}.{seed}: {result['seconds']} s, k-NN {knn}, {len(result['lines'])} lines", flush=True
                )


if __name__ == "__main__":
    given = dict(word.split("=", 1) for word in sys.argv[2:])
    folder = Path(given["out"])
    folder.mkdir(parents=True, exist_ok=True)
    if sys.argv[1] == "run":
        make_images(Path(given["data"]), Path(given["photos"]), folder)
        run_all(folder, [int(seed) for seed in given.get("seeds", "0,1").split(",")], given.get("only", ""))
    elif sys.argv[1] == "heal":
        heal(folder, int(given.get("seed", 1)), given.get("only", ""))
    elif sys.argv[1] == "table":
        table(records(folder))
    elif sys.argv[1] == "store":
        STORED.write_bytes(lzma.compress(json.dumps(records(folder)).encode(), preset=9))
