"""The weights that a name stands for: a model of timm, a run or one of its checkpoints, an export, a folder or model of
Hugging Face, or a file of weights of other codes (model/published.py). They are data: nothing of them is run."""

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

from .. import hub
from ..arguments import read_yaml
from ..errors import UserError, printable, require
from ..model import factory, lora, weights
from ..model.encoder import Encoder
from ..model.weights import Weights
from . import state

JSON_BYTES = 1 << 24  # of a config.json
FILES_OF_THE_HUB = ["config.json", "preprocessor_config.json", "*.safetensors"]  # no code
# Arguments of an exported model that belong to its image size, channels and head.
OF_THE_IMAGES = {"img_size", "dynamic_img_size", "strict_img_size", "in_chans", "num_classes"}


@dataclass
class Named:
    """An encoder with the weights that a name stands for, and what its images look like, as far as that is known."""

    encoder: Encoder
    normalization: tuple[list[float], list[float]] | None  # mean and standard deviation of each channel
    trained_size: tuple[int, int] | None  # (h, w) in pixels
    sha256: str  # of the weights as they are stored
    changed: list[str]  # what was changed to fit, as sentences


@torch.no_grad()
def open_encoder(name: str, where: str, image_size: tuple[int, int], in_chans: int) -> Named:
    """The encoder that a name stands for, in evaluation mode, for images of about this size: whole patches, rounded up.

    name: as model.init takes it, or random:<model of timm>, with random weights. The model is the one that the weights
    were saved from; a file that does not say it has a ViT whose shape is read from its weights. For gray images it
    keeps the channels that it has. Raises UserError that begins with `where`.
    """
    kind, colon, rest = name.partition(":")
    found = _of_timm(rest, where, pretrained=False) if colon and kind == "random" else open_weights(name, where)
    _, stored = found.encoder()
    words, config = weights.recognise(stored, found.heads)
    config = found.model or config
    embed = stored.get("patch_embed.proj.weight")
    patch = embed.shape[2:] if embed is not None and embed.ndim == 4 and min(embed.shape) > 0 else (1, 1)
    own_chans = found.image[0] if found.image else embed.shape[1] if embed is not None and embed.ndim == 4 else in_chans
    if config is None:
        raise UserError(
            f"{where} is {found.layout}, {words}: which model it is cannot be seen. Give a run or an export."
        )
    if found.model is None and found.heads is None and embed is not None and len(embed) not in weights.FAMILIES:
        raise UserError(
            f"{where} is {found.layout}, {words}. It does not say how many attention heads it has: give a run, an "
            "export, or a folder of Hugging Face with its config.json."
        )
    h, w = (math.ceil(side / step) * step for side, step in zip(image_size, patch, strict=True))
    numbers = sum(tensor.numel() for tensor in stored.values())
    try:
        encoder = factory.create(config, (h, w), own_chans if in_chans == 1 else in_chans, stored=numbers)
        fitted, changed = weights.fit(encoder, stored, found)
        own = encoder.model.state_dict()
        wrong = [key for key, value in own.items() if key not in fitted or fitted[key].shape != value.shape]
        if wrong:
            raise UserError(
                f"{where} is {found.layout}, {words}. It is not the whole of {config.name} (differs: "
                f"{printable(', '.join(wrong[:3]))}): give a run, an export or a model of timm."
            )
        encoder.model.load_state_dict({key: fitted[key].to(value.dtype) for key, value in own.items()})
    except (AttributeError, IndexError, RuntimeError, TypeError) as error:  # tensors of shapes that no model has
        raise UserError(f"{where} is {found.layout}, whose tensors do not fit together ({error}).") from error
    if not all(value.isfinite().all() for value in encoder.model.state_dict().values()):
        raise UserError(f"{where} has values that are not finite: the file is damaged, or its run diverged.")
    if found.pool in encoder.pools():
        encoder.pool = found.pool
    elif encoder.is_vit and ("decoder_embed.weight" in found.tensors or encoder.model.global_pool == "avg"):
        encoder.pool = "mean"
    trained = found.image[1:] if found.image and kind != "random" else None
    return Named(encoder.eval(), found.normalization, trained, _checksum(stored), changed)


def _checksum(stored: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(stored.items()):
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def open_weights(name: str, where: str) -> Weights:
    """The weights that `model.init=<name>` names. Raises UserError that begins with `where`."""
    kind, colon, rest = name.partition(":")
    path = Path(name).expanduser()
    if colon and kind == "hf":
        path = _download(rest, where)
    elif (colon and kind == "timm") or (not path.exists() and timm.is_model(name.split(".")[0])):
        return _of_timm(rest if colon else name, where)
    if not path.exists():
        raise UserError(f"{where} does not exist: give a file, a folder, a run, hf:<name>, or a model of timm.")
    if (path / "checkpoints").is_dir() or (path / state.STATE).is_file():
        return _of_run(path, where)
    found = weights.translate(weights.read(path, where), where)
    _read_config(path, found)
    return found


def _of_run(path: Path, where: str) -> Weights:
    """A run directory, whose newest whole checkpoint is taken, or one of its checkpoints."""
    try:
        if (path / state.STATE).is_file():
            run_dir, (record, (tensors,)) = path.parent.parent, state.read(path, state.MODEL)
        else:
            run_dir, (_, record, (tensors,), _) = path, state.latest(path, state.MODEL)
    except state.Damaged as error:
        raise UserError(f"{where} is damaged ({error}): give another checkpoint.") from error
    found = weights.translate(lora.merge(tensors), where)
    config, encoder = read_yaml(run_dir / "config.yaml"), record.get("encoder")
    stored, model = (part if isinstance(part := config.get(key), dict) else {} for key in ("data", "model"))
    size, chans = stored.get("image_size"), stored.get("in_chans")
    found.grid, found.normalization = _grid_of(size, found), _pair(stored.get("mean"), stored.get("std"))
    found.image, found.model = _image(chans, size), _model(model.get("name"), model.get("args"))
    found.pool = str(encoder.get("pool")) if isinstance(encoder, dict) else ""
    return found


def _of_timm(name: str, where: str, pretrained: bool = True) -> Weights:
    factory.check_name(name)
    with hub.without_retries() as lost:
        try:
            cfg: Any = timm.get_pretrained_cfg(name)
            size = cfg.input_size
            encoder = factory.create(factory.Config(name), (size[1], size[2]), size[0], pretrained=pretrained)
        except Exception as error:  # no network, no such weights, no room on the disk ...
            if isinstance(error, UserError) and not lost:
                raise
            raise UserError(f"{where}: timm cannot fetch these weights ({hub.why(error, lost)}).") from error
    tensors = {f"encoder.model.{key}": value for key, value in encoder.model.state_dict().items()}
    found = Weights(
        where,
        f"{'the' if pretrained else 'random'} weights of timm {timm.__version__}",
        tensors,
        model=factory.Config(name),
    )
    found.normalization, found.image = _pair(list(cfg.mean), list(cfg.std)), size
    return found


def _download(name: str, where: str) -> Path:
    """The folder of a model of the Hugging Face hub: its configuration and safetensors, nothing else."""
    huggingface_hub = require("huggingface_hub", "hf", where)
    with hub.without_retries() as lost:
        try:
            return Path(huggingface_hub.snapshot_download(name, allow_patterns=FILES_OF_THE_HUB))
        except Exception as error:  # no network, no such name, not allowed ...
            raise UserError(f"{where} cannot be fetched ({hub.why(error, lost)}).") from error


def _read_config(folder: Path, found: Weights) -> None:
    """Note what the JSON files of Hugging Face or timm say of heads, image size and normalisation."""
    stored = _json(folder / "config.json") | _json(folder / "preprocessor_config.json")
    of_timm: Any = stored.get("pretrained_cfg")
    of_timm = of_timm if isinstance(of_timm, dict) else {}
    heads, size = stored.get("num_attention_heads"), stored.get("image_size") or of_timm.get("input_size")
    found.heads = heads if isinstance(heads, int) else None
    size = size[-2:] if isinstance(size, list) else size
    whole, args = of_timm.get("input_size"), stored.get("model_args") or {}
    chans = whole[0] if isinstance(whole, list) and whole else stored.get("num_channels", 3)
    found.grid, found.image = _grid_of(size, found), _image(chans, size)
    if isinstance(args, dict):
        found.model = _model(stored.get("architecture"), {k: v for k, v in args.items() if k not in OF_THE_IMAGES})
    for source, mean, std in ((of_timm, "mean", "std"), (stored, "image_mean", "image_std")):
        found.normalization = found.normalization or _pair(source.get(mean), source.get(std))


def _json(path: Path) -> dict[str, Any]:
    """The dictionary in a file; empty if there is none. The weights alone are enough."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8")) if path.stat().st_size <= JSON_BYTES else {}
        return stored if isinstance(stored, dict) else {}
    except (OSError, ValueError, RecursionError):
        return {}


def _pair(mean: Any, std: Any) -> tuple[list[float], list[float]] | None:
    """A mean and a standard deviation, if they are lists of a few numbers."""
    for values in (mean, std):
        if not isinstance(values, list) or len(values) > 64 or not all(isinstance(v, (int, float)) for v in values):
            return None
    return mean, std


def _image(chans: Any, size: Any) -> tuple[int, int, int] | None:
    """(channels, h, w) of an image of `size`, a number or [h, w]."""
    sides = size if isinstance(size, list) else [size, size]
    if len(sides) != 2 or not all(isinstance(value, int) and value > 0 for value in (chans, *sides)):
        return None
    return chans, sides[0], sides[1]


def _model(name: Any, args: Any) -> factory.Config | None:
    """The model of timm with this name, if it is one."""
    known = isinstance(name, str) and timm.is_model(name.split(".")[0]) and isinstance(args, dict)
    return factory.Config(name, args) if known else None


def _grid_of(size: Any, found: Weights) -> tuple[int, int] | None:
    """The grid of patches of an image of `size`, a number or [h, w]."""
    sides = [size, size] if isinstance(size, int) else size
    embed = next((t for k, t in found.tensors.items() if k.endswith("encoder.model.patch_embed.proj.weight")), None)
    if embed is None or embed.ndim != 4 or not isinstance(sides, list) or len(sides) != 2:
        return None
    if not all(isinstance(side, int) and side > 0 for side in sides) or not min(embed.shape[2:]):
        return None
    return sides[0] // embed.shape[2], sides[1] // embed.shape[3]
