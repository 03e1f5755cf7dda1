"""A folder that `timm.create_model("local-dir:<folder>", pretrained=True)` loads, in a process without sslvit."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file, save_file

from ..distributed import say
from ..encoder import Encoder
from ..errors import UserError
from ..pretrained import Pretrained

FILES = ("config.json", "model.safetensors")
TOLERANCE = 1e-5  # of features, relative to their largest value


def export(subject: Pretrained, out: str | Path) -> Path:
    """Write config.json and model.safetensors, let timm load them in a new process, compare features. Raises UserError.

    timm's own pooling is set to what the method trained: the class token, or the mean of the patches after the final
    norm (not timm's usual norm after the mean, which would need weights that were never trained).
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(path.name not in FILES for path in out.iterdir())):
        raise UserError(f"out={out} exists and holds other things than an export: give a new folder.")
    encoder = subject.encoder.float().cpu().eval()
    fresh = out.with_name(f".{out.name}.writing")
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        fresh.mkdir(parents=True)
        config = json.dumps(timm_config(subject), indent=2)
        (fresh / "config.json").write_text(config + "\n", encoding="utf-8")
        weights = {name: tensor.contiguous() for name, tensor in encoder.model.state_dict().items()}
        save_file(weights, fresh / "model.safetensors", metadata={"format": "pt"})
        check(encoder, fresh)
        shutil.rmtree(out, ignore_errors=True)
        os.replace(fresh, out)
    except OSError as error:
        raise UserError(f"out={out} cannot be written: {error.strerror}.") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    say(
        f'{out}: timm.create_model("local-dir:{out}", pretrained=True) gives {encoder.feature_dim()} features an image',
        "checked in a new process: no missing or unexpected weight, equal features",
    )
    return out


def timm_config(subject: Pretrained) -> dict:
    """The config.json of a timm model folder."""
    encoder = subject.encoder
    args = dict(encoder.model_args)
    if encoder.is_vit:
        args |= {"global_pool": "token"} if encoder.pool == "cls" else {"global_pool": "avg", "fc_norm": False}
    default = encoder.model.pretrained_cfg
    return {
        "architecture": encoder.architecture,
        "num_classes": 0,
        "num_features": encoder.feature_dim(),
        "global_pool": args.get("global_pool", getattr(encoder.model, "global_pool", "") or "avg"),
        "model_args": {**args, "in_chans": encoder.in_chans},
        "pretrained_cfg": {
            "tag": "sslvit",
            "custom_load": False,
            "input_size": [encoder.in_chans, *encoder.image_size],
            "fixed_input_size": not args.get("dynamic_img_size", False),
            "interpolation": "bicubic",
            "crop_pct": 0.875,
            "crop_mode": "center",
            "mean": list(subject.mean),
            "std": list(subject.std),
            "num_classes": 0,
            "pool_size": None,
            "first_conv": default.get("first_conv"),
            "classifier": default.get("classifier"),
        },
    }


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


@torch.inference_mode()
def check(encoder: Encoder, folder: Path) -> None:
    """Load the folder with timm in a new process and compare its features with the encoder's. Raises UserError."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, encoder.in_chans, *encoder.image_size, generator=generator)
    inputs, outputs = folder / ".images.safetensors", folder / ".features.safetensors"
    save_file({"images": images}, inputs)
    command = [sys.executable, "-c", LOAD, str(folder.resolve()), str(inputs.resolve()), str(outputs.resolve())]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UserError(
            f"timm {timm.__version__} does not load {encoder.architecture} as it was exported: {reason[:300]}"
        )
    theirs, ours = load_file(outputs)["features"], encoder.features(images)
    inputs.unlink()
    outputs.unlink()
    error = ((theirs - ours).abs().max() / ours.abs().max()).item() if theirs.shape == ours.shape else float("inf")
    if not error < TOLERANCE:
        raise UserError(
            f"timm's features of the exported {encoder.architecture} differ from the encoder's by {error:.2g} of their "
            "size: nothing was written."
        )
