"""A folder that `timm.create_model("local-dir:<folder>", pretrained=True)` loads: written beside, tried, renamed."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import UserError
from ..model.encoder import Encoder
from . import tensorfile, textfile

FILES = ("config.json", "model.safetensors")
SECONDS = 1800  # that loading may take; it takes some
TOLERANCE = 1e-5  # of what the model gives, relative to its largest value


def record(
    encoder: Encoder, args: dict[str, Any], mean: tuple[float, ...], std: tuple[float, ...], num_features: int,
    classes: list[str] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The config.json of a timm model folder.

    args: the encoder's model_args with the pooling. classes: names of what its head gives; null: it has no head.
    """
    default = encoder.model.pretrained_cfg
    num_classes = len(classes or [])
    return {
        "architecture": encoder.architecture,
        "num_classes": num_classes,
        "num_features": num_features,
        "global_pool": args.get("global_pool", getattr(encoder.model, "global_pool", "") or "avg"),
        "model_args": {**args, "in_chans": encoder.in_chans},
        **({"label_names": classes} if classes else {}),
        "pretrained_cfg": {
            "tag": "sslvit",
            "custom_load": False,
            "input_size": [encoder.in_chans, *encoder.image_size],
            "fixed_input_size": not args.get("dynamic_img_size", False),
            "interpolation": "bicubic",
            "crop_pct": 0.875,
            "crop_mode": "center",
            "mean": list(mean),
            "std": list(std),
            "num_classes": num_classes,
            "pool_size": None,
            "first_conv": default.get("first_conv"),
            "classifier": default.get("classifier"),
        },
    }


def refuse_foreign(out: Path) -> None:
    """Raises UserError for a link, and for a folder that holds anything but what `write` writes."""
    if out.is_symlink():
        raise UserError(f"out={out} is a link, and links are not followed: give a new folder.")
    if out.exists() and (not out.is_dir() or any(path.name not in FILES for path in out.iterdir())):
        raise UserError(f"out={out} exists and holds other things than an export: give a new folder.")


def write(out: Path, config: dict[str, Any], model: torch.nn.Module, images: Tensor, expected: Tensor) -> None:
    """Write config.json and model.safetensors, let timm load them in a new process, compare what its model gives for
    the images with what is expected. Raises UserError."""
    refuse_foreign(out)
    fresh = out.with_name(f".{out.name}.writing")
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if fresh.is_symlink():
            fresh.unlink()
        fresh.mkdir()
        (fresh / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        weights = {name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}
        tensorfile.write(weights, fresh / "model.safetensors", {"format": "pt"})
        check(fresh, images, expected, config["architecture"])
        for path in (*(fresh / name for name in FILES), fresh):
            textfile.sync(path)
        shutil.rmtree(out, ignore_errors=True)
        os.replace(fresh, out)
        textfile.sync(out.parent)
    except (OSError, SafetensorError) as error:
        raise UserError(f"out={out} cannot be written: {getattr(error, 'strerror', None) or error}.") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


# What somebody else does with the folder. It must not find sslvit, so it runs in another process and another directory.
LOAD = """
import json, sys
import timm, torch
from safetensors.torch import load_file, save_file
folder, images, result = sys.argv[1:]
model = timm.create_model("local-dir:" + folder, pretrained=True).eval()
stored, own = load_file(folder + "/model.safetensors"), model.state_dict()
assert set(stored) == set(own), sorted(set(stored) ^ set(own))
assert all(torch.equal(stored[key], own[key]) for key in own), "weights were changed while loading"
assert "sslvit" not in sys.modules
with torch.inference_mode():
    save_file({"features": model(load_file(images)["images"]).contiguous()}, result)
"""


def check(folder: Path, images: Tensor, expected: Tensor, architecture: str) -> None:
    """Load the folder with timm in a new process and compare what its model gives for the images. Raises UserError."""
    inputs, outputs = folder / ".images.safetensors", folder / ".features.safetensors"
    save_file({"images": images}, inputs)
    command = [sys.executable, "-c", LOAD, str(folder.resolve()), str(inputs.resolve()), str(outputs.resolve())]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=SECONDS)
    except subprocess.TimeoutExpired as late:
        raise UserError(f"timm has not loaded {architecture} in {SECONDS} s: nothing was written.") from late
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UserError(f"timm {timm.__version__} does not load {architecture} as it was exported: {reason[:300]}")
    theirs = load_file(outputs)["features"]
    inputs.unlink()
    outputs.unlink()
    same = theirs.shape == expected.shape
    error = ((theirs - expected).abs().max() / expected.abs().max()).item() if same else float("inf")
    if not error < TOLERANCE:
        raise UserError(
            f"timm's features of the exported {architecture} differ from the encoder's by {error:.2g} of their "
            "size: nothing was written."
        )
