"""The keys of method=distill, its papers' values and its presets, see ../distill.py."""

from dataclasses import dataclass
from typing import Any, ClassVar

from ...errors import Limits
from . import mae


@dataclass
class Config:
    teacher: str = ""  # a run, an export, a file, a Hugging Face folder, timm:<name>: all that model.init takes
    teacher_size: int | tuple[int, int] | None = None  # pixels the teacher sees, resampled; null: data.image_size
    patch_weight: float = 1.0  # of the patches' part of the loss; the part of the whole image has 1
    crop_scale: tuple[float, float] = (0.08, 1.0)  # share of the image's area
    preset: mae.Preset = "photo"  # kind of images: photo, gray, xray, microscopy, satellite, channels
    flip_prob: float = 0.5  # left-right
    vertical_flip_prob: float = 0.0  # upside down
    rotate_prob: float = 0.0  # by 90, 180 or 270 degrees; 0.75 makes all four orientations equally likely

    LIMITS: ClassVar[Limits] = [
        (0, None, "patch_weight"),
        (1, None, "teacher_size"),
        (0, 1, "flip_prob", "vertical_flip_prob", "rotate_prob"),
    ]


# FD's code: 300 epochs, AdamW, 1.2e-3 for 2048 images.
DEFAULTS = {
    "epochs": 300,
    "global_batch_size": 2048,
    "optim": {"base_lr": 1.5e-4, "warmup_epochs": 10, "weight_decay": 0.05, "betas": (0.9, 0.999), "clip": 3.0},
}
SMALL = {"teacher": "random:test_vit", "patch_weight": 0.5}
PRESETS: dict[str, dict[str, Any]] = mae.PRESETS  # colours are not changed, as in FD
# What worked in short runs, for the advice of reports: distill_cifar10.yaml.
WORKS = {"optim.base_lr": 1.2e-2}
