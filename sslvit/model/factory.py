"""From a configuration to an encoder. Families of timm's models are told the image size in different ways."""

import difflib
import inspect
import math
import os
import re
import sys
from typing import Any

import timm
import torch
from timm.layers import DropPath as TimmDropPath
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..arguments import scalars
from ..errors import UserError, did_you_mean
from .config import Config
from .encoder import Encoder, pools_by_itself

# Arguments of timm.create_model that are keys here.
ELSEWHERE = {
    "img_size": "data.image_size", "in_chans": "data.in_chans", "drop_path_rate": "objective.drop_path",
}  # fmt: skip
# Limits of a model: a file of somebody else cannot take all memory, nor run for ever. RAISE multiplies them.
RAISE = "SSLVIT_MODEL_LIMITS"
MAX_PARAMETERS = 4 * 10**9
MAX_TENSORS = 10_000  # a ViT of 256 blocks has 3,000
MAX_PIXELS = 4096 * 4096  # of one image
MAX_ARGUMENTS = {"depth": 256, "window": 64, "": 65536}  # the largest number in an argument with such a name


def create(
    config: Config, image_size: tuple[int, int], in_chans: int = 3, drop_path: float = 0.0, pretrained: bool = False,
    stored: int | None = None,
) -> Encoder:  # fmt: skip
    """The encoder of a configuration, initialised as timm does, or with the weights that timm fetches. Raises
    UserError. stored: how many numbers the weights have that will be loaded, which limits its size."""
    if wrong := [key for key, value in config.args.items() if key in ELSEWHERE or value is None]:
        raise UserError(_why_refused(wrong[0], config.args[wrong[0]]))
    check_name(config.name)
    check_arguments(config.name, config.args, "model.args")
    check_size("An image size", image_size)
    extra = {"in_chans": in_chans, "pretrained": pretrained} | ({"drop_path_rate": drop_path} if drop_path else {})
    model, args = _create_model(config.name, dict(config.args), image_size, extra, stored)
    if isinstance(model, VisionTransformer):
        check_patches(model.patch_embed.patch_size, image_size)
        if pools_by_itself(model):
            pooling = {"global_pool": "token"} if model.has_class_token else {"global_pool": "avg", "fc_norm": False}
            model, args = _create_model(config.name, config.args | pooling, image_size, extra, stored)
    if config.grad_checkpointing:
        _recompute_blocks(model, config.name, drop_path)
    if not drop_path:  # some families have it by default, as Swin 0.1
        for module in model.modules():
            if isinstance(module, TimmDropPath):
                module.drop_prob = 0.0
    return Encoder(model, image_size, in_chans, config.name.split(".")[0], args)


def recreate(
    architecture: str, args: dict[str, Any], image_size: tuple[int, int], in_chans: int, fixed_size: bool,
    stored: int, where: str,
) -> Encoder:  # fmt: skip
    """The encoder that an exported folder describes, with random weights. Nothing but these values reaches timm.

    fixed_size: timm makes it for this image size, though args has no img_size. stored: how many numbers its weights
    have. Raises UserError that begins with `where`, and whatever timm raises.
    """
    check_name(architecture)
    check_arguments(architecture, args, f"{where}: model_args")
    check_size(f"{where}: an input_size", image_size)
    cfg = {"input_size": (in_chans, *image_size), "fixed_input_size": fixed_size}
    with Bounded(f"{where}: the model", stored):
        model = timm.create_model(architecture, num_classes=0, in_chans=in_chans, pretrained_cfg_overlay=cfg, **args)
    return Encoder(model, image_size, in_chans, architecture, args)


def check_arguments(name: str, args: dict[str, Any], where: str) -> None:
    """Raises UserError for what is no argument of timm's model classes, or no plain value of a size that is possible.

    Some arguments of `timm.create_model` itself name files and addresses (checkpoint_path, pretrained_cfg, cache_dir).
    """
    known = _model_arguments(name) if args else set()
    for key, value in args.items():
        here = f"{where} has {key}={str(value)[:200]}"
        if key not in known:
            raise UserError(f"{here}: {name} has no such argument that may be given here.{did_you_mean(key, known)}")
        largest = _limit(next(most for part, most in MAX_ARGUMENTS.items() if part in key))
        for item in scalars(value):
            if isinstance(value, dict) or (isinstance(item, str) and not re.fullmatch(r"[\w-]*", item)):
                raise UserError(f"{here}: give a number, true, false, a plain word, or a list of these.")
            if isinstance(item, (int, float)) and not abs(item) <= largest:
                raise UserError(f"{here}, above the limit of {largest:,.0f}: {_how_to_raise()}.")


def _model_arguments(name: str) -> set[str]:
    """The arguments of the model classes in the file of timm that has this model, without those for other uses."""
    classes = vars(sys.modules[timm.models.model_entrypoint(name.split(".")[0]).__module__]).values()
    modules = [one for one in classes if isinstance(one, type) and issubclass(one, nn.Module)]
    others = {"args", "kwargs", "device", "dtype", "num_classes", *inspect.signature(timm.create_model).parameters}
    return {argument for one in modules for argument in inspect.signature(one).parameters} - others


class Bounded(TorchFunctionMode):
    """`with Bounded(what): ...` makes modules. It raises UserError in place of a tensor with which they would have more
    numbers than the limit, or more tensors. So no memory is taken for it.

    stored: how many numbers the weights have that will be loaded, which is a limit too.
    """

    MAKERS = (torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn)

    def __init__(self, what: str, stored: int | None = None) -> None:
        super().__init__()
        self.what, self.stored, self.numbers, self.tensors = what, stored, 0, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in self.MAKERS:
            self._count(math.prod(side for side in scalars([args, kwargs.get("size", ())]) if isinstance(side, int)))
        elif func is torch.Tensor.sub and len(args) == 2 and all(isinstance(side, Tensor) for side in args):
            pairs = math.prod(torch.broadcast_shapes(*(side.shape for side in args)))  # of relative positions
            self._count(8 * pairs)  # of 8 bytes, and copied
        return func(*args, **kwargs)

    def _count(self, numbers: int) -> None:
        self.numbers, self.tensors = self.numbers + numbers, self.tensors + 1
        if self.stored is not None and self.numbers > 2 * self.stored + 2**24:  # with room for tables
            raise UserError(f"{self.what} is larger than its weights, which have {self.stored:,} numbers.")
        most, tensors = _limit(MAX_PARAMETERS), _limit(MAX_TENSORS)
        if self.numbers > most or self.tensors > tensors:
            raise UserError(
                f"{self.what} has more than {most:,.0f} parameters or {tensors:,.0f} tensors: {_how_to_raise()}."
            )


def _limit(number: int) -> float:
    try:
        return number * float(os.environ.get(RAISE, "1"))
    except ValueError as error:
        raise UserError(f"{RAISE}={os.environ[RAISE]} is not a number.") from error


def _how_to_raise() -> str:
    return f"make it smaller, or set the environment variable {RAISE}=2 for twice the limits"


def check_size(what: str, image_size: tuple[int, int]) -> None:
    h, w = image_size
    if not (h >= 1 and w >= 1 and h * w <= _limit(MAX_PIXELS)):
        raise UserError(f"{what} of {h}x{w} does not have 1 to {_limit(MAX_PIXELS):,.0f} pixels: {_how_to_raise()}.")


def _why_refused(key: str, value: Any) -> str:
    """Of an argument that is a key elsewhere, or has no value: timm would pass over it in silence."""
    if key in ELSEWHERE:
        return f"model.args has {key}={value}: set {ELSEWHERE[key]} instead."
    hint = f"; write {{{key.replace(':', ': ', 1)}}} with a space after the colon" if ":" in key else ""
    return f"model.args has {key} without a value{hint}."


def _recompute_blocks(model: Any, name: str, drop_path: float) -> None:
    if drop_path and not isinstance(model, VisionTransformer):
        raise UserError(
            f"model.grad_checkpointing with drop path {drop_path} works for plain ViTs only, not {name}: set "
            "objective.drop_path=0 or model.grad_checkpointing=false."
        )
    model.set_grad_checkpointing(True)


def _create_model(
    name: str, args: dict[str, Any], image_size: tuple[int, int], extra: dict[str, Any], stored: int | None
) -> tuple[nn.Module, dict[str, Any]]:
    """timm's model, told the image size by the first way that its family takes; and args with that way."""
    base = name.split(".")[0]
    size: dict[str, Any] = {"img_size": list(image_size)}
    shown = str(args)[:200]
    for sizing in (size | {"dynamic_img_size": True}, size | {"strict_img_size": False}, size, {}):
        try:
            with Bounded(f"The model {name} with {shown}", stored):
                full = name if extra["pretrained"] else base
                model = timm.create_model(full, num_classes=0, **extra, **args, **sizing)
            return model, {**args, **sizing}
        except TypeError as error:
            if not any(key in str(error) for key in sizing):
                raise UserError(f"timm cannot make {name} with {shown}: {error}.") from error
        except UserError:
            raise
        except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, ValueError) as error:
            raise UserError(f"timm cannot make {name} for images of {image_size} with {shown}: {error}.") from error
    raise AssertionError("the last attempt has no sizing argument to blame")


def check_name(name: str) -> None:
    """Raises UserError unless it is one of timm's own models: never an address (hf-hub:) or a folder (local-dir:)."""
    base = name.split(".")[0]
    if not timm.is_model(base):
        near = difflib.get_close_matches(base, timm.list_models(), n=3)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise UserError(f"{name} is not a model of timm {timm.__version__}.{hint}")


def check_patches(patch_size: tuple[int, int], image_size: tuple[int, int]) -> None:
    for side, patch in zip(image_size, patch_size, strict=True):
        if side % patch or side < patch:
            near = sorted({max(patch, side // patch * patch), math.ceil(side / patch) * patch})
            raise UserError(
                f"An image size of {image_size[0]}x{image_size[1]} is not divisible by the patch size {patch}: "
                f"use {' or '.join(map(str, near))}, or another patch_size."
            )
