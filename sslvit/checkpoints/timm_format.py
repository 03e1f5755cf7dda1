"""A folder that `timm.create_model("local-dir:<folder>", pretrained=True)` loads.

transformers (4.57 and 5) loads the very same folder as `AutoModel`, `AutoImageProcessor` and
`AutoModelForImageClassification`, with equal features, because `model_args` has no `num_classes`.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..model.encoder import Encoder
from . import exported, tensorfile


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


LOAD = """
import timm
model = timm.create_model("local-dir:" + folder, pretrained=True).eval()
stored, own = load_file(folder + "/model.safetensors"), model.state_dict()
assert set(stored) == set(own), sorted(set(stored) ^ set(own))
assert all(torch.equal(stored[key], own[key]) for key in own), "weights were changed while loading"
"""


def write(
    out: Path, config: dict[str, Any], model: torch.nn.Module, images: Tensor, expected: Tensor, card: str = ""
) -> float:
    """Write config.json, model.safetensors and the model card if there is one, let timm load them in a new process,
    compare what its model gives for the images with what is expected. Returns the largest difference, relative to the
    largest value. Raises UserError."""

    def fill(folder: Path) -> None:
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        weights = {name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}
        tensorfile.write(weights, folder / "model.safetensors", {"format": "pt"})
        if card:
            (folder / "README.md").write_text(card, encoding="utf-8")

    return exported.write(out, fill, LOAD, f"timm {config['architecture']}", [images], [expected])
