"""The keys of method=mae, its paper's values and its presets. Sections are those of the paper, see ../mae.py."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from ...errors import ABOVE_0, BELOW_1, Limits

Preset = Literal["photo", "gray", "xray", "microscopy", "satellite", "channels"]


@dataclass
class Config:
    mask_ratio: float = 0.75  # share of patches hidden from the encoder
    norm_pix: bool = True  # predict pixels normalised by the mean and standard deviation of their patch
    decoder_width: int = 512  # channels of a decoder token
    decoder_depth: int = 8  # blocks
    decoder_heads: int = 16  # attention heads of a block
    koleo_weight: float = 0.0  # of DINOv2's term that spreads features; not in the paper; within micro-batches
    crop_scale: tuple[float, float] = (0.2, 1.0)  # share of the image's area
    preset: Preset = "photo"  # kind of images: photo, gray, xray, microscopy, satellite, channels
    flip_prob: float = 0.5  # left-right
    vertical_flip_prob: float = 0.0  # upside down
    rotate_prob: float = 0.0  # by 90, 180 or 270 degrees; 0.75 makes all four orientations equally likely

    LIMITS: ClassVar[Limits] = [
        (ABOVE_0, BELOW_1, "mask_ratio"),
        (0, None, "koleo_weight"),
        (1, None, "decoder_width", "decoder_heads", "decoder_depth"),
        (0, 1, "flip_prob", "vertical_flip_prob", "rotate_prob"),
    ]


# The recipe of appendix A.1, table 8.
DEFAULTS = {
    "epochs": 800,
    "global_batch_size": 4096,
    "optim": {"base_lr": 1.5e-4, "min_lr": 0.0, "warmup_epochs": 40, "weight_decay": 0.05, "betas": (0.9, 0.95)},
}
SMALL = {"decoder_width": 32, "decoder_depth": 1, "decoder_heads": 2}

ANY_ORIENTATION = {"vertical_flip_prob": 0.5, "rotate_prob": 0.75}
# What `preset` sets of the keys above. Keys of a recipe or a command win. MAE changes the colours of no images: that
# made it worse in the paper (table 1e). Images that have no upright orientation are seen in all four.
PRESETS: dict[str, dict[str, Any]] = {
    "photo": {}, "gray": {}, "xray": {}, "microscopy": ANY_ORIENTATION, "satellite": ANY_ORIENTATION, "channels": {},
}  # fmt: skip
# What worked in short runs, for the advice of reports: mae_cifar10.yaml.
WORKS = {"optim.base_lr": 2e-3, "objective.koleo_weight": 0.05}
