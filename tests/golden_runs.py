"""Golden runs: what whole runs of the command give, number by number, stored in tests/golden/runs/.

    python -m tests.golden_runs            run all again and print what differs from the stored numbers
    python -m tests.golden_runs --write    and store the new numbers

Names of runs choose some: `python -m tests.golden_runs dino mae`. A change that moves these numbers says why in its
commit, and which of them it moves.
"""

import contextlib
import io
import json
import math
import sys
import tempfile
from pathlib import Path

import torch

from sslvit.__main__ import main as sslvit

from . import processes

FOLDER = Path(__file__).parent / "golden" / "runs"
# Relative to the number: ten times the largest noise seen between torch 2.11 and 2.15, AVX-512 and SSE4, one process
# and two, which is 1.3e-5.
TOLERANCE = 2e-4
SMALL = 1e-6  # of smaller numbers, the difference relative to this counts

COMMON = [
    "pretrain", "data.train=fractals:train,classes=6,count=53,size=48", "seed=3", "epochs=4", "global_batch_size=16",
    "batch_size=8", "precision=float32", "data.workers=0", "image_size=32",
    "model.name=vit_tiny_patch16_224", "model.args={patch_size: 8, embed_dim: 48, depth: 2, num_heads: 2}",
    "eval.train=fractals:train,classes=6,count=60,size=48", "eval.test=fractals:test,classes=6,count=61,size=48",
    "eval.k=5", "eval.every_epochs=2",
    "log.every_steps=1", "log.rank_every_steps=5", "log.tensorboard=false",
]  # fmt: skip
DINO = [
    *COMMON, "method=dino", "prototypes=64", "hidden_dim=32", "bottleneck_dim=16", "local_crops=3",
    "local_crop_size=16", "base_lr=0.02", "momentum=0.9",
]  # fmt: skip
MAE = [*COMMON, "method=mae", "decoder_width=32", "decoder_depth=2", "decoder_heads=2", "base_lr=0.02"]
RUNS = {
    # Everything switched on: crops of two sizes, photometric augmentation, drop path, prototypes that are frozen for
    # the first epoch, schedules of everything, KoLeo, clipping, two micro-batches.
    "dino": [
        *DINO, "drop_path=0.3", "koleo_weight=0.1", "freeze_last_layer_epochs=1", "warmup_epochs=1", "min_lr=1e-4",
        "teacher_temp=0.07", "teacher_temp_warmup_epochs=3", "clip=0.1",
    ],
    # The other value of each switch.
    "dino_other": [
        *DINO, "batch_size=16", "preset=satellite", "norm_last_layer=false", "init=mae", "pool=mean",
        "student_keep=0.5", "teacher_temp=0.07", "teacher_temp_warmup_epochs=2.5", "freeze_last_layer_epochs=0.7",
        "position_resampling=timm",
        "lr_schedule=warmup_cosine", "warmup_epochs=1.3", "weight_decay_end=null", "clip=0.5", "clip_mode=global",
    ],
    "mae": [
        *MAE, "koleo_weight=0.05", "warmup_epochs=1", "min_lr=1e-4", "weight_decay_end=0.4", "clip=0.5",
    ],
    "mae_other": [
        *MAE, "norm_pix=false", "mask_ratio=0.6", "preset=satellite", "warmup_epochs=1", "lr_schedule=linspace_cosine",
        "clip=0.1", "clip_mode=tensor",
    ],
}  # fmt: skip


def numbers(run_dir: Path) -> dict:
    """All that a finished run wrote down, but for what a clock decides, and sums of its final weights and moments."""
    found: dict[str, list[torch.Tensor]] = {}
    for name, tensor in processes.final_weights(run_dir).items():
        found.setdefault(".".join(name.split(".")[:2]), []).append(tensor.double().flatten())
    for name, tensor in processes.moments(run_dir).items():
        found.setdefault(f"moments {name.rsplit('/', 1)[1]}", []).append(tensor.double().flatten())
    groups = {group: torch.cat(tensors) for group, tensors in found.items()}
    final = {
        group: {"norm": values.norm().item()} | ({} if "moments" in group else {"sum": values.sum().item()})
        for group, values in groups.items()
    }
    return {"lines": processes.learned(run_dir), "final": final}


def run(name: str, folder: Path, *more: str) -> dict:
    """The numbers of a run in this process, with one thread. more: further key=value."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert sslvit([*RUNS[name], *more, f"out={folder / name}"]) == 0
    finally:
        torch.set_num_threads(threads)
    return numbers(folder / name)


def run_on_two(name: str, folder: Path) -> dict:
    """The same micro-batches dealt to two processes."""
    assert "batch_size=8" in RUNS[name]
    processes.launch([*RUNS[name], f"out={folder / name}"], folder / "log", world_size=2)
    return numbers(folder / name)


def stored(name: str) -> dict:
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def write(name: str, values: dict) -> None:
    """One line a step, so that a difference of two files can be read."""
    lines = ",\n".join("  " + json.dumps(line) for line in values["lines"])
    final = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in values["final"].items())
    arguments = json.dumps(RUNS[name])
    text = f'{{\n "arguments": {arguments},\n "lines": [\n{lines}\n ],\n "final": {{\n{final}\n }}\n}}\n'
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / f"{name}.json").write_text(text, encoding="utf-8")


def flat(values: dict) -> dict[str, float]:
    """{"step 3 loss": ..., "final student.head norm": ...}"""
    found = {}
    for line in values["lines"]:
        found |= {f"step {line['step']} {key}": value for key, value in line.items() if key != "step"}
    for group, sums in values["final"].items():
        found |= {f"final {group} {key}": value for key, value in sums.items()}
    return found


def compare(old: dict, new: dict) -> list[tuple[str, float | None, float | None, float]]:
    """(what, old, new, difference relative to the number; infinite if one is missing) of all numbers."""
    before, now, found = flat(old), flat(new), []
    for key in {**before, **now}:
        a, b = before.get(key), now.get(key)
        missing = a is None or b is None
        found.append((key, a, b, math.inf if missing else abs(a - b) / max(abs(a), abs(b), SMALL)))
    return found


def changed(old: dict, new: dict) -> list[str]:
    """A line for each number that differs by more than float noise."""
    return [
        f"{key:34} {before!s:>22} -> {now!s:>22}  {relative:.1e}"
        for key, before, now, relative in compare(old, new)
        if not relative <= TOLERANCE  # a nan is a difference
    ]


def main(argv: list[str]) -> int:
    names, moved = [word for word in argv if not word.startswith("-")] or list(RUNS), 0
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            with contextlib.redirect_stdout(io.StringIO()):
                new = run(name, Path(folder))
            old = stored(name) if (FOLDER / f"{name}.json").exists() else {"lines": [], "final": {}}
            lines, largest = changed(old, new), max(compare(old, new), key=lambda found: found[3])
            moved += len(lines)
            print(
                f"{name}: {len(lines)} of {len(flat(new))} numbers differ; by {largest[3]:.1e} at most ({largest[0]})"
            )
            for line in lines:
                print(f"  {line}")
            if "--write" in argv:
                write(name, new)
    return 1 if moved and "--write" not in argv else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
