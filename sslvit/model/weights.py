"""Weights in the files of other programs: read without running code, renamed by the tables of published.py, and fitted
to an encoder of another patch size, image size, number of channels or window."""

import math
import re
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed, resample_patch_embed, resize_rel_pos_bias_table
from torch import Tensor

from ..errors import UserError, printable
from . import factory, published
from .encoder import Encoder

FILES = ("model.safetensors", "pytorch_model.bin")  # in a folder
PROGRAM_BYTES = 1 << 26  # of the part of a .pth that says what its tensors are called
DEPTH = 8  # of dictionaries in dictionaries
MAX_TENSORS = 100_000  # a ViT of 256 blocks has 3,000
# timm's names of widths, with their depth and attention heads.
FAMILIES = {192: ("tiny", 12, 3), 384: ("small", 12, 6), 768: ("base", 12, 12), 1024: ("large", 24, 16)}


class Ignored:
    """Stands for a value that is not needed. It takes anything and does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "Ignored":
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...


@dataclass
class Weights:
    """The tensors of a file by the names of published.py."""

    where: str  # as the user named it
    layout: str  # what kind of file it is
    tensors: dict[str, Tensor]
    heads: int | None = None  # attention heads, if the file says it
    grid: tuple[int, int] | None = None  # (h, w) of its patches, if it is known
    normalization: tuple[list[float], list[float]] | None = None  # mean and deviation of its images, if it is known
    image: tuple[int, int, int] | None = None  # (channels, h, w) of its images, if it is known
    used: set[str] = field(default_factory=set)
    model: factory.Config | None = None  # the model that it was saved from, if it is known
    pool: str = ""  # of its encoder, if it is known

    def encoder(self, prefix: str = "") -> tuple[str, dict[str, Tensor]]:
        """(where its encoder is, {timm's name: tensor}): under this prefix, or under the one that its run would export.
        Raises UserError if it has no encoder."""
        inner = "encoder.model."
        there = {key[: key.index(inner)] + inner for key in self.tensors if inner in key}
        for one in (prefix, f"teacher.{inner}", inner, f"student.{inner}", *sorted(there)):
            if one in there:
                return one, {key.removeprefix(one): value for key, value in self.tensors.items() if key.startswith(one)}
        raise UserError(f"{self.where} is {self.layout} without an encoder: give another file.")


# Reading.


def read(path: Path, where: str) -> dict[str, Tensor]:
    """The tensors of a file or folder by their names in it. Runs no code. Raises UserError that begins with `where`."""
    try:
        found: dict[str, Tensor] = {}
        for file in _files(path, where):
            stored = load_file(file) if file.suffix == ".safetensors" else _read_zip(file, where)
            found |= _tensors(stored, where)
    except (OSError, MemoryError) as error:
        raise UserError(f"{where} cannot be read: {getattr(error, 'strerror', None) or error}.") from error
    except UserError:
        raise
    except Exception as error:  # safetensors and torch raise exceptions of many kinds for a damaged file
        raise UserError(
            f"{where} is damaged or no file of weights ({type(error).__name__}: {_line(error)})."
        ) from error
    if not 1 <= len(found) <= MAX_TENSORS:
        raise UserError(f"{where} holds {len(found)} weights, not 1 to {MAX_TENSORS:,}: give a model's weights.")
    return found


def _files(path: Path, where: str) -> list[Path]:
    if not path.is_dir():
        return [path]
    parts = sorted(path.glob("model-*-of-*.safetensors"))  # a large model of Hugging Face
    files = [path / name for name in FILES if (path / name).is_file()]
    if not files and not parts:
        raise UserError(f"{where} is a folder without {' or '.join(FILES)}: name the file with the weights itself.")
    return files[:1] or parts


def _read_zip(path: Path, where: str) -> Any:
    """What torch.save has written, without the values that need a class of others."""
    if not zipfile.is_zipfile(path):
        raise UserError(
            f"{where} is neither safetensors nor what torch.save has written since torch 1.6: load it where you trust "
            "it, and save its tensors with safetensors."
        )
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            program = entry.filename.endswith(".pkl")
            if entry.compress_type != zipfile.ZIP_STORED or (program and entry.file_size > PROGRAM_BYTES):
                raise UserError(f"{where} is compressed or has too many names: torch.save writes no such file.")
    allowed: list[Any] = [(Ignored, name) for name in published.PASSED_OVER]
    allowed += [(OrderedDict, name) for name in published.DICTIONARIES]
    wanted = set(torch.serialization.get_unsafe_globals_in_checkpoint(path)) - {name for _, name in allowed}
    if wanted:
        names = printable(", ".join(sorted(wanted)[:3]))[:200]
        raise UserError(
            f"{where} needs code to be read ({names}), and a file runs no code here: nothing of it was run. Load it "
            "where you trust it, and save its tensors with safetensors."
        )
    with torch.serialization.safe_globals(allowed):
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)


def _tensors(stored: Any, where: str, depth: int = 0) -> dict[str, Tensor]:
    """{"student.module.head.weight": ...} of dictionaries in dictionaries."""
    found: dict[str, Tensor] = {}
    if isinstance(stored, Mapping) and depth < DEPTH:
        for name, value in stored.items():
            if isinstance(name, str) and name not in published.NOT_WEIGHTS:
                if isinstance(value, Tensor):
                    if _is_plain(value):
                        found[name] = value.detach()
                else:
                    inner = _tensors(value, where, depth + 1)
                    found |= {f"{name}.{rest}": tensor for rest, tensor in inner.items()}
    return found


def _is_plain(value: Tensor) -> bool:
    """Whether it has numbers, and not more of them than the file holds."""
    return (
        value.layout == torch.strided
        and value.device.type == "cpu"
        and value.is_floating_point()
        and value.nbytes <= value.untyped_storage().nbytes()
    )


def _line(error: Exception) -> str:
    return printable((str(error).strip().splitlines() or [""])[0][:200]).rstrip(".")


# Renaming.


def translate(found: dict[str, Tensor], where: str) -> Weights:
    """The same tensors by the names of published.py. Raises UserError for a file of a kind that is not known."""
    names = {_rename(name, published.WRAPPERS): tensor for name, tensor in found.items()}
    layout = next((one for one in published.LAYOUTS if all(_any(sign, names) for sign in one.signs)), None)
    if layout is None or not (layout.rules or _any(r"encoder\.model\.", names)):
        raise UserError(f"{where} holds {_looks_like(names) if layout is None else layout.name}: {_ACCEPTED}.")
    rules = layout.rules + tuple(rule for sign, more in published.MORE if _any(sign, names) for rule in more)
    parts: dict[str, dict[int, Tensor]] = {}
    for name, tensor in names.items():
        if not re.search(published.COMPUTED, name):
            new = _rename(name, rules)
            part = re.search(r"#([0-2])$", new)
            parts.setdefault(new[: part.start()] if part else new, {}).setdefault(int(part[1]) if part else 0, tensor)
    try:
        return Weights(where, layout.name, {name: _join(name, those) for name, those in parts.items()})
    except RuntimeError as error:
        raise UserError(f"{where} is {layout.name} whose parts do not fit together ({_line(error)}).") from error


_ACCEPTED = (
    "give a model of timm, a run or export of this package, a folder of Hugging Face (ViT, ViTMAE, DINOv2, "
    "Swin), and checkpoints of MAE, DINO, iBOT, DINOv2, DINOv3 and SimMIM"
)


def _rename(name: str, rules: published.Rules) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def _any(pattern: str, names: Mapping[str, Tensor]) -> bool:
    return any(re.search(pattern, name) for name in names)


def _join(name: str, parts: dict[int, Tensor]) -> Tensor:
    """Query, key and value become one tensor. A key without a bias has a bias of 0."""
    if name.endswith(".attn.qkv.bias") and parts.keys() == {0, 2}:
        parts[1] = torch.zeros_like(parts[0])
    return torch.cat([parts[i] for i in sorted(parts)]) if len(parts) > 1 else next(iter(parts.values()))


def _looks_like(names: Mapping[str, Tensor]) -> str:
    shown = ", ".join(f"{printable(name)[:60]} {list(tensor.shape)}" for name, tensor in list(names.items())[:3])
    return f"{len(names)} tensors of no kind that is known here ({shown}{' ...' * (len(names) > 3)})"


# Fitting.


def fit(encoder: Encoder, stored: dict[str, Tensor], weights: Weights) -> tuple[dict[str, Tensor], list[str]]:
    """{timm's name: tensor} of a file -> the same for this encoder, and a sentence for each that was changed.

    The encoder gives the same features as before, as far as its image size, patches and channels allow. Those that do
    not fit are left as they are.
    """
    own, changed = encoder.model.state_dict(), []
    fitted = dict(stored)
    if "pos_embed" in own and "pos_embed" in stored and encoder.is_vit:
        changed += _fit_positions(encoder, fitted, weights)
    for name, tensor in stored.items():
        wanted = own[name].shape if name in own else None
        if name.endswith("patch_embed.proj.weight") and wanted and tensor.ndim == 4 and len(tensor) == wanted[0]:
            if tensor.shape[1] != wanted[1]:
                fitted[name] = fit_channels(fitted[name].float(), wanted[1])
                changed.append(f"{tensor.shape[1]} channels became {wanted[1]}")
            if tensor.shape[2:] != wanted[2:]:
                fitted[name] = resample_patch_embed(fitted[name].float(), list(wanted[2:]))
                changed.append(f"patches of {_by(tensor.shape[2:])} pixels became {_by(wanted[2:])}")
        elif name.endswith("relative_position_bias_table") and wanted and tensor.shape != wanted:
            window = encoder.model.get_submodule(name.rpartition(".")[0]).window_size
            if tensor.ndim == 2 and tensor.shape[1] == wanted[1] and math.isqrt(len(tensor)) ** 2 == len(tensor):
                fitted[name] = resize_rel_pos_bias_table(tensor.float(), window, wanted)
                changed.append(f"{name} was resampled")
        elif name.endswith(".attn.qkv.bias") and name not in own and not tensor.any():
            del fitted[name]  # DINOv3's of the smaller models are 0, and timm's have none
        elif name.endswith(".attn.qkv.bias") and name not in own and name.replace("qkv.bias", "q_bias") in own:
            q, k, v = fitted.pop(name).chunk(3)
            fitted |= {name.replace("qkv.bias", "q_bias"): q, name.replace("qkv.bias", "v_bias"): v}
            if k.any():
                changed.append(f"{name} lost the bias of its keys, which this model has none for")
    return fitted, changed


def _fit_positions(encoder: Encoder, fitted: dict[str, Tensor], weights: Weights) -> list[str]:
    """Positions of patches are resampled. Those of prefix tokens stay where they are, or are added to their tokens."""
    vit, table, new = encoder.model, fitted["pos_embed"].float(), encoder.grid()
    if table.ndim != 3 or table.shape[2] != encoder.width:
        return []
    num_cls, num_reg = (fitted[name].shape[1] if name in fitted else 0 for name in ("cls_token", "reg_token"))
    for prefix in (num_cls + num_reg, num_cls, 0):
        if old := _grid(table.shape[1] - prefix, weights.grid, new):
            break
    else:
        return []
    patches = table[:, prefix:]
    if old != new:
        patches = resample_abs_pos_embed(patches, list(new), list(old), num_prefix_tokens=0)
    # Positions of the class token and of registers, 0 where the file has none.
    slots = torch.cat([table[:, :prefix], table.new_zeros(1, num_cls + num_reg - prefix, table.shape[2])], dim=1)
    if vit.no_embed_class:
        for name, slot in (("cls_token", slots[:, :num_cls]), ("reg_token", slots[:, num_cls:])):
            if slot.any():
                fitted[name] = fitted[name].float() + slot
        fitted["pos_embed"] = patches
    else:
        of_cls = slots[:, :num_cls] if vit.has_class_token else slots[:, :0]
        of_reg = (
            slots[:, num_cls:]
            if vit.num_reg_tokens == num_reg
            else table.new_zeros(1, vit.num_reg_tokens, table.shape[2])
        )
        if vit.has_class_token and not num_cls:
            of_cls = table.new_zeros(1, 1, table.shape[2])
        fitted["pos_embed"] = torch.cat([of_cls, of_reg, patches], dim=1)
    return [f"positions of {_by(old)} patches became {_by(new)}"] if old != new else []


def _grid(count: int, *known: tuple[int, int] | None) -> tuple[int, int] | None:
    """The grid of so many patches: one that is known, or a square; None if there is none."""
    for grid in known:
        if grid and math.prod(grid) == count:
            return grid
    side = math.isqrt(max(0, count))
    return (side, side) if count > 0 and side * side == count else None


def fit_channels(weight: Tensor, in_chans: int) -> Tensor:
    """[D, C, p, q] -> [D, in_chans, p, q], as timm does: the sum of channels for one, else they are repeated and
    weighted so that an image of equal channels gives the same."""
    channels = weight.shape[1]
    if in_chans == 1:
        return weight.sum(dim=1, keepdim=True)
    return weight.repeat(1, math.ceil(in_chans / channels), 1, 1)[:, :in_chans] * (channels / in_chans)


def _by(pair: Any) -> str:
    return "x".join(map(str, pair))


# What an encoder looks like, for messages.


def describe(stored: Mapping[str, Tensor], heads: int | None = None) -> tuple[str, str]:
    """{timm's name: tensor} -> what it is in words, and keys of `model` that make such an encoder ("" if unknown)."""
    words, model = recognise(stored, heads)
    if model is None:
        return words, ""
    written = ", ".join(f"{key}: {str(value).lower()}" for key, value in model.args.items())
    return words, f"model.name={model.name}" + (f" 'model.args={{{written}}}'" if written else "")


def recognise(stored: Mapping[str, Tensor], heads: int | None = None) -> tuple[str, factory.Config | None]:
    """{timm's name: tensor} -> what it is in words, and the model that has these tensors; None if it is no ViT.

    heads: its attention heads; None: as many as models of this width have.
    """
    embed = stored.get("patch_embed.proj.weight")
    if embed is None or embed.ndim != 4 or "blocks.0.attn.qkv.weight" not in stored:
        shown = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in list(stored.items())[:2])
        return f"an encoder with {len(stored)} tensors ({printable(shown)[:200]} ...)", None
    width, depth = len(embed), 1 + max(int(m[1]) for name in stored if (m := re.match(r"blocks\.(\d{1,9})\.", name)))
    dinov3, registers = "blocks.0.gamma_1" in stored, stored["reg_token"].shape[1] if "reg_token" in stored else 0
    family, own_depth, own_heads = FAMILIES.get(width, ("", 0, 0))
    heads = heads or own_heads or max(1, width // 64)
    bias = stored.get("blocks.0.attn.qkv.bias")
    kind = f"dinov3{'_qkvb' if bias is not None and bias.any() else ''}" if dinov3 else "224"
    args: dict[str, Any] = {"patch_size": embed.shape[2]} if dinov3 * 16 != embed.shape[2] else {}
    args |= {} if family else {"embed_dim": width}
    args |= {} if depth == own_depth else {"depth": depth}
    args |= {} if heads == own_heads else {"num_heads": heads}
    words = [f"a ViT of width {width}, {depth} blocks, patches of {_by(embed.shape[2:])} pixels"]
    words.append("a class token" if "cls_token" in stored else "no class token")
    if registers:
        words.append(f"{registers} registers")
    if dinov3:
        words.append("rotary positions")
    elif "blocks.0.ls1.gamma" in stored:
        words.append("LayerScale")
        args |= {"init_values": 1e-5}
    if not dinov3:
        args |= {"reg_tokens": registers, "no_embed_class": True} if registers else {}
        args |= {} if "cls_token" in stored else {"class_token": False}
    if "blocks.0.mlp.fc2.weight" in stored and stored["blocks.0.mlp.fc2.weight"].shape[-1] * 2 == len(
        stored.get("blocks.0.mlp.fc1.weight", [])
    ):
        words.append("SwiGLU")
    return ", ".join(words), factory.Config(f"vit_{family or 'base'}_patch16_{kind}", args)
