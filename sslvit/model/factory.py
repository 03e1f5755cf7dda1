"""From a configuration to an encoder. Families of timm's models are told the image size in different ways."""

import difflib
import math
from dataclasses import dataclass, field
from typing import Any

import timm
from timm.layers import DropPath as TimmDropPath
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from ..errors import UserError
from .encoder import Encoder, pools_by_itself

# Arguments of timm.create_model that are keys here.
ELSEWHERE = {
    "img_size": "data.image_size", "in_chans": "data.in_chans", "drop_path_rate": "objective.drop_path",
}  # fmt: skip


@dataclass
class Config:
    name: str = "vit_small_patch16_224"  # a timm model; the size in its name does not bind, data.image_size does
    args: dict[str, Any] = field(default_factory=dict)  # more for timm.create_model: {patch_size: 4, reg_tokens: 4}
    grad_checkpointing: bool = False  # recompute blocks in the backward pass: less memory, a third more time


def create(
    config: Config, image_size: tuple[int, int], in_chans: int = 3, drop_path: float = 0.0, pretrained: bool = False
) -> Encoder:
    """The encoder of a configuration, initialised as timm does, or with the weights that timm fetches. Raises
    UserError."""
    for key, value in config.args.items():
        _check_argument(key, value)
    extra = {"in_chans": in_chans, "pretrained": pretrained} | ({"drop_path_rate": drop_path} if drop_path else {})
    model, args = _create_model(config.name, dict(config.args), image_size, extra)
    if isinstance(model, VisionTransformer):
        check_patches(model.patch_embed.patch_size, image_size)
        if pools_by_itself(model):
            pooling = {"global_pool": "token"} if model.has_class_token else {"global_pool": "avg", "fc_norm": False}
            model, args = _create_model(config.name, config.args | pooling, image_size, extra)
    if config.grad_checkpointing:
        _recompute_blocks(model, config.name, drop_path)
    if not drop_path:  # some families have it by default, as Swin 0.1
        for module in model.modules():
            if isinstance(module, TimmDropPath):
                module.drop_prob = 0.0
    return Encoder(model, image_size, in_chans, config.name.split(".")[0], args)


def _check_argument(key: str, value: Any) -> None:
    if key in ELSEWHERE:
        raise UserError(f"model.args has {key}={value}: set {ELSEWHERE[key]} instead.")
    if value is None:  # timm would pass over it in silence
        hint = f"; write {{{key.replace(':', ': ', 1)}}} with a space after the colon" if ":" in key else ""
        raise UserError(f"model.args has {key} without a value{hint}.")


def _recompute_blocks(model: Any, name: str, drop_path: float) -> None:
    if drop_path and not isinstance(model, VisionTransformer):
        raise UserError(
            f"model.grad_checkpointing with drop path {drop_path} works for plain ViTs only, not {name}: set "
            "objective.drop_path=0 or model.grad_checkpointing=false."
        )
    model.set_grad_checkpointing(True)


def _create_model(
    name: str, args: dict[str, Any], image_size: tuple[int, int], extra: dict[str, Any]
) -> tuple[nn.Module, dict[str, Any]]:
    """timm's model, told the image size by the first way that its family takes; and args with that way."""
    base = name.split(".")[0]
    if not timm.is_model(base):
        near = difflib.get_close_matches(base, timm.list_models(), n=3)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise UserError(f"{name} is not a model of timm {timm.__version__}.{hint}")
    size: dict[str, Any] = {"img_size": list(image_size)}
    for sizing in (size | {"dynamic_img_size": True}, size | {"strict_img_size": False}, size, {}):
        try:
            model = timm.create_model(name if extra["pretrained"] else base, num_classes=0, **extra, **args, **sizing)
            return model, {**args, **sizing}
        except TypeError as error:
            if not any(key in str(error) for key in sizing):
                raise UserError(f"timm cannot make {name} with {args}: {error}.") from error
        except (AssertionError, ValueError, RuntimeError) as error:
            raise UserError(f"timm cannot make {name} for images of {image_size} with {args}: {error}.") from error
    raise AssertionError("the last attempt has no sizing argument to blame")


def check_patches(patch_size: tuple[int, int], image_size: tuple[int, int]) -> None:
    for side, patch in zip(image_size, patch_size, strict=True):
        if side % patch or side < patch:
            near = sorted({max(patch, side // patch * patch), math.ceil(side / patch) * patch})
            raise UserError(
                f"An image size of {image_size[0]}x{image_size[1]} is not divisible by the patch size {patch}: "
                f"use {' or '.join(map(str, near))}, or another patch_size."
            )
