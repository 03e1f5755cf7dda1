"""The keys of method=dino, its paper's values and its presets. Sections are those of the paper, see ../dino.py."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from ...errors import ABOVE_0, BELOW_1, Limits

Preset = Literal["photo", "gray", "xray", "microscopy", "satellite", "channels", "dinov2_released"]
Resampling = Literal["timm", "published"]


@dataclass
class Config:
    pool: Literal["auto", "cls", "mean"] = "auto"  # what the head sees; auto: class token, if there is one
    prototypes: int = 65536  # K, the size of the output distribution
    hidden_dim: int = 2048  # width of the head
    bottleneck_dim: int = 256  # width before the prototypes
    head_layers: int = 3  # linear layers of the head before the prototypes
    norm_last_layer: bool = True  # prototypes of unit length; false lets their gains learn, safe for ViT-S only
    student_temp: float = 0.1  # of the student's softmax
    teacher_temp: float = 0.04  # of the teacher's softmax, after its warm-up
    teacher_temp_start: float = 0.04  # at the start of its warm-up
    teacher_temp_warmup_epochs: float = 0.0  # whole epochs: changes once an epoch, as published; else smoothly
    center_momentum: float = 0.9  # of the running mean that is subtracted from the teacher's output
    momentum: float = 0.996  # of the teacher at the start; 0.9995 for a global batch of 256
    momentum_end: float = 1.0  # reached on half a cosine
    freeze_last_layer_epochs: float = 1.0  # until then the prototypes do not learn
    student_keep: float = 1.0  # share of a global crop's patches that the student sees; below 1 is not in the paper
    init: Literal["vit", "mae"] = "vit"  # of the encoder; mae, not in the paper: Xavier weights, sin-cos positions
    position_resampling: Resampling = "published"  # of position embeddings for small crops; timm: with antialiasing
    koleo_weight: float = 0.0  # of DINOv2's term that spreads features (0.1 there, 0 in DINO); within micro-batches
    drop_path: float = 0.1  # stochastic depth of the student, rising linearly over its blocks
    crop_wise_backward: bool | None = None  # a few of its crops at a time: less memory, same numbers; null: if needed
    global_crop_size: int | tuple[int, int] | None = None  # pixels; null: data.image_size
    global_crop_scale: tuple[float, float] = (0.4, 1.0)  # share of the image's area
    local_crops: int = 8  # how many; 0 for none
    local_crop_size: int | tuple[int, int] = 96  # pixels
    local_crop_scale: tuple[float, float] = (0.05, 0.4)  # share of the image's area
    preset: Preset = "photo"  # images: photo, gray, xray, microscopy, satellite, channels; or dinov2_released
    flip_prob: float = 0.5  # left-right, of every crop
    vertical_flip_prob: float = 0.0  # upside down, of every crop
    rotate_prob: float = 0.0  # by 90, 180 or 270 degrees, of every crop; 0.75 makes all four orientations equal
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)  # brightness, contrast, saturation, hue
    channel_jitter: tuple[float, float] = (0.0, 0.0)  # brightness, contrast of each channel by itself
    jitter_prob: float = 0.8  # of both kinds of jitter
    gray_prob: float = 0.2  # of becoming gray
    blur_prob: tuple[float, float, float] = (1.0, 0.1, 0.5)  # first global, second global, local crops
    blur_sigma: tuple[float, float] = (0.1, 2.0)  # pixels
    solarize_prob: float = 0.2  # probability to solarize the second global crop

    LIMITS: ClassVar[Limits] = [
        (1, None, "prototypes", "hidden_dim", "bottleneck_dim", "head_layers", "global_crop_size", "local_crop_size"),
        (ABOVE_0, None, "student_temp", "teacher_temp", "teacher_temp_start"),
        (0, None, "local_crops", "koleo_weight", "teacher_temp_warmup_epochs", "freeze_last_layer_epochs"),
        (0, None, "jitter", "channel_jitter"),
        (0, 1, "center_momentum", "momentum", "momentum_end", "flip_prob", "blur_prob", "vertical_flip_prob"),
        (0, 1, "rotate_prob", "jitter_prob", "gray_prob", "solarize_prob"),
        (ABOVE_0, 1, "student_keep"),
        (0, BELOW_1, "drop_path"),
    ]


# The released code's defaults, with which ViT-S/16 reaches 69.3 % k-NN in 100 epochs (its README, "vanilla").
DEFAULTS = {
    "epochs": 100,
    "global_batch_size": 512,
    "optim": {
        "base_lr": 5e-4,
        "min_lr": 1e-6,
        "warmup_epochs": 10,
        "lr_schedule": "linspace_cosine",
        "weight_decay": 0.04,
        "weight_decay_end": 0.4,
        "betas": (0.9, 0.999),
        "clip": 3.0,
        "clip_mode": "tensor",
    },
}

SMALL = {"prototypes": 64, "hidden_dim": 32, "bottleneck_dim": 16, "local_crops": 2, "local_crop_size": 16}

ANY_ORIENTATION = {"vertical_flip_prob": 0.5, "rotate_prob": 0.75}
NO_COLOURS = {"gray_prob": 0.0, "solarize_prob": 0.0}
# What `preset` sets of the keys above. Keys of a recipe or a command win. All but the paper's (photo) follow from what
# must not change in such images, and none is tuned. DINOv2's released code, and so its models, gave its blur to the
# crops with one minus the probabilities that it states (dinov3 issue 286).
PRESETS: dict[str, dict[str, Any]] = {
    "photo": {},
    # There are no colours to change. A solarised image shows another substance or organ. They have an upright
    # orientation.
    "gray": NO_COLOURS | {"jitter": (0.2, 0.2, 0.0, 0.0)},
    "xray": NO_COLOURS | {"jitter": (0.1, 0.2, 0.0, 0.0), "blur_prob": (0.5, 0.1, 0.1), "blur_sigma": (0.1, 1.0)},
    # No upright orientation. The hue is that of a stain, or of what grows there.
    "microscopy": NO_COLOURS | ANY_ORIENTATION | {"jitter": (0.4, 0.4, 0.2, 0.0)},
    "satellite": NO_COLOURS | ANY_ORIENTATION | {"jitter": (0.4, 0.4, 0.2, 0.0)},
    # Any number of channels, each with a gain of its own.
    "channels": NO_COLOURS | {"jitter": (0.0, 0.0, 0.0, 0.0), "channel_jitter": (0.4, 0.4)},
    "dinov2_released": {"blur_prob": (0.0, 0.9, 0.5)},
}
# What worked in short runs, for the advice of reports: dino_cifar10.yaml and quickstart.yaml.
WORKS = {"optim.base_lr": 3e-3, "objective.koleo_weight": 0.3}
