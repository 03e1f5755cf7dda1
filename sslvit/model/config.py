"""The model.* keys: which model of timm, and what it begins with."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..errors import Limits


@dataclass
class Config:
    name: str = "vit_small_patch16_224"  # a timm model; the size in its name does not bind, data.image_size does
    args: dict[str, Any] = field(default_factory=dict)  # more for timm.create_model: {patch_size: 4, reg_tokens: 4}
    grad_checkpointing: bool = False  # recompute blocks in the backward pass: less memory, a third more time
    init: str = ""  # weights to begin with: a timm model, a run, an export, a file or folder, hf:<name>; empty: random
    lora_rank: int = 0  # with init: learn only matrices of this rank beside the linear layers of the blocks; 0: all
    anchor: float = 0.0  # with init: weight of the cosine distance of features from those of the start; 0: none

    LIMITS: ClassVar[Limits] = [(0, None, "lora_rank", "anchor")]
