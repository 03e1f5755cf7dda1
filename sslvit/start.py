"""`model.init=`: a run that begins with weights that exist, in the place of random ones.

Reads a model of timm, a run or a checkpoint of this package, an export, a folder of Hugging Face, and what the released
codes of MAE, DINO, iBOT, DINOv2, DINOv3 and SimMIM save (model/published.py). What the file holds of heads, decoder,
teacher and center is loaded too, so that its pretraining can go on.
"""

import json
import math
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

from .arguments import read_yaml
from .checkpoints import state
from .errors import UserError, printable, require
from .model import factory, weights
from .model.encoder import Encoder, resample_positions
from .model.weights import Weights
from .objectives import Objective

JSON_BYTES = 1 << 24  # of a config.json
SHOWN = 3  # names in a list


@torch.no_grad()
def load(objective: Objective, name: str, normalization: tuple[tuple[float, ...], ...] = ()) -> list[str]:
    """Put the weights that `name` names into a new objective. Returns what was loaded and what was not, as sentences.

    normalization: mean and standard deviation of the run, to be compared with those that the file says.
    Raises UserError, before anything is changed, for a file that has no encoder or another one.
    """
    where = f"model.init={name}"
    found = open_weights(name, where)
    encoders = {f"{path}.model.": one for path, one in objective.named_modules() if isinstance(one, Encoder)}
    own, new, notes = objective.state_dict(), dict[str, Tensor](), dict[str, None]()
    for prefix, encoder in encoders.items():
        source = _source(prefix, found)
        stored = {key.removeprefix(source): value for key, value in found.tensors.items() if key.startswith(source)}
        try:
            fitted, changed = weights.fit(encoder, stored, found)
            _check(encoder, fitted, stored, found)
        except (AttributeError, IndexError, RuntimeError, TypeError) as error:  # tensors of shapes that no model has
            raise UserError(f"{where} is {found.layout}, whose tensors do not fit together ({error}).") from error
        new |= {prefix + key: value for key, value in fitted.items() if _same(own.get(prefix + key), value)}
        found.used |= {source + key for key in stored if _same(own.get(prefix + key), fitted.get(key))}
        found.used |= {source + key for key in stored if key not in fitted}  # was split
        notes |= dict.fromkeys(changed)
    inside = tuple(encoders)
    for key in own:
        if not key.startswith(inside) and (taken := _other(key, own[key], found, objective)) is not None:
            new[key] = taken
    if wrong := next((key for key, value in new.items() if not value.isfinite().all()), None):
        raise UserError(f"{where}: {wrong} has values that are not finite: the file is damaged, or its run diverged.")
    objective.load_state_dict({key: new[key].to(value.dtype) if key in new else value for key, value in own.items()})
    return _report(own, new, found, inside, list(notes)) + _other_normalization(found, normalization)


def _same(own: Tensor | None, value: Tensor | None) -> bool:
    return own is not None and value is not None and own.shape == value.shape


def _source(prefix: str, found: Weights) -> str:
    """Where in the file the encoder with this prefix is: under its own name, or the one that its run would export."""
    there = {key[: key.index("encoder.model.")] + "encoder.model." for key in found.tensors if "encoder.model." in key}
    preferred = [prefix, "teacher.encoder.model.", "encoder.model.", "student.encoder.model.", *sorted(there)]
    for one in preferred:
        if one in there:
            return one
    raise UserError(f"{found.where} is {found.layout} without an encoder: give another file.")


def _check(encoder: Encoder, fitted: dict[str, Tensor], stored: dict[str, Tensor], found: Weights) -> None:
    """Raises UserError unless patches and all blocks are in the file as this encoder has them, and no more blocks."""
    own = encoder.model.state_dict()
    free = ("cls_token", "reg_token", "norm.", "head", "fc_norm.", "mask_token")
    wrong = [k for k in own if not k.startswith(free) and not _same(own[k], fitted.get(k))]
    wrong += [k for k in fitted if k not in own and not k.startswith(free)]
    heads = encoder.model.blocks[0].attn.num_heads if encoder.is_vit else None
    if not wrong and heads in (None, found.heads or heads):
        return
    words, keys = weights.describe(stored, found.heads)
    ours, _ = weights.describe(own)
    reason = f"{found.heads} attention heads, not {heads}" if not wrong else _names(wrong)
    raise UserError(
        f"{found.where} is {found.layout}, {words}. It does not fit this model, {ours} (differs: {reason}). "
        + (f"Give {keys}." if keys else "Give the model.name that the file was made with.")
    )


def _other(key: str, own: Tensor, found: Weights, objective: Objective) -> Tensor | None:
    """A tensor outside of encoders: of its own name, or of the other one of student and teacher."""
    swapped = key.replace("student.", "teacher.") if key.startswith("student.") else key.replace("teacher.", "student.")
    for name in (key, swapped):
        value = found.tensors.get(name)
        if value is None:
            continue
        if value.shape != own.shape and key.endswith("pos_embed") and value.ndim == own.ndim == 3:
            value = _positions(value, own, objective)
        if value is not None and value.shape == own.shape:
            found.used.add(name)
            return value
    return None


def _positions(value: Tensor, own: Tensor, objective: Objective) -> Tensor | None:
    """[1, P + N, D] of a decoder, for another grid of patches."""
    new = objective.exported_encoder().grid()
    prefix = own.shape[1] - math.prod(new)
    side = math.isqrt(max(0, value.shape[1] - prefix))
    if prefix < 0 or side < 1 or side * side + prefix != value.shape[1] or value.shape[2] != own.shape[2]:
        return None
    patches = resample_positions(value[:, prefix:].float(), (side, side), new, "timm")
    return torch.cat([value[:, :prefix].float(), patches], dim=1)


def _report(
    own: dict[str, Tensor], new: dict[str, Tensor], found: Weights, inside: tuple[str, ...], notes: list[str]
) -> list[str]:
    of_encoder = [key for key in own if key.startswith(inside)]
    others = [key for key in own if not key.startswith(inside)]
    counts = f"{sum(key in new for key in of_encoder)} of {len(of_encoder)} tensors of the encoder"
    if others:
        counts += f", {sum(key in new for key in others)} of {len(others)} others"
    lines = [f"Starting from {found.where.removeprefix('model.init=')}, {found.layout}: {counts}."]
    if notes:
        lines.append(f"  changed to fit: {'; '.join(notes[:SHOWN])}{' ...' * (len(notes) > SHOWN)}")
    missing, unused = [key for key in own if key not in new], [key for key in found.tensors if key not in found.used]
    if missing:
        lines.append(f"  not in it, begin as in a new run ({len(missing)}): {_names(missing)}")
    if unused:
        lines.append(f"  in it, not used ({len(unused)}): {_names(unused)}")
    return lines


def _other_normalization(found: Weights, ours: tuple[tuple[float, ...], ...]) -> list[str]:
    """A sentence if its images were normalised in another way than those of the run."""
    if not ours or not found.normalization:
        return []
    pairs = [*zip(found.normalization[0], ours[0], strict=False), *zip(found.normalization[1], ours[1], strict=False)]
    if all(abs(theirs - own) < 1e-2 for theirs, own in pairs):
        return []
    mean, std = (str(values).replace(" ", "") for values in found.normalization)
    return [f"  its images were normalised in another way: data.mean={mean} data.std={std} does the same"]


def _names(names: list[str]) -> str:
    return printable(", ".join(names[:SHOWN]))[:300] + " ..." * (len(names) > SHOWN)


# What the name stands for.


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
            run_dir, (_, (tensors,)) = path.parent.parent, state.read(path, state.MODEL)
        else:
            run_dir, (_, _, (tensors,), _) = path, state.latest(path, state.MODEL)
    except state.Damaged as error:
        raise UserError(f"{where} is damaged ({error}): give another checkpoint.") from error
    found = weights.translate(tensors, where)
    stored = read_yaml(run_dir / "config.yaml").get("data")
    stored = stored if isinstance(stored, dict) else {}
    size = stored.get("image_size")
    found.grid, found.normalization = _grid_of(size, found), _pair(stored.get("mean"), stored.get("std"))
    return found


def _of_timm(name: str, where: str) -> Weights:
    factory.check_name(name)
    try:
        cfg: Any = timm.get_pretrained_cfg(name)
        size = cfg.input_size
        encoder = factory.create(factory.Config(name), (size[1], size[2]), size[0], pretrained=True)
    except UserError:
        raise
    except Exception as error:  # no network, no such weights, no room on the disk ...
        said = f"{type(error).__name__}: {printable(str(error).strip().splitlines()[0][:200]) if str(error) else ''}"
        raise UserError(f"{where}: timm cannot fetch these weights ({said}).") from error
    tensors = {f"encoder.model.{key}": value for key, value in encoder.model.state_dict().items()}
    normalization = _pair(list(cfg.mean), list(cfg.std))
    return Weights(where, f"the weights of timm {timm.__version__}", tensors, normalization=normalization)


def _download(name: str, where: str) -> Path:
    """The folder of a model of the Hugging Face hub: its configuration and safetensors, nothing else."""
    hub = require("huggingface_hub", "hf", where)
    try:
        return Path(hub.snapshot_download(name, allow_patterns=["config.json", "*.safetensors"]))
    except Exception as error:  # no network, no such name, not allowed ...
        raise UserError(f"{where} cannot be fetched ({type(error).__name__}).") from error


def _read_config(folder: Path, found: Weights) -> None:
    """Note what the JSON files of Hugging Face or timm say of heads, image size and normalisation."""
    stored = _json(folder / "config.json") | _json(folder / "preprocessor_config.json")
    of_timm: Any = stored.get("pretrained_cfg")
    of_timm = of_timm if isinstance(of_timm, dict) else {}
    heads, size = stored.get("num_attention_heads"), stored.get("image_size") or of_timm.get("input_size")
    found.heads = heads if isinstance(heads, int) else None
    found.grid = _grid_of(size[-2:] if isinstance(size, list) else size, found)
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


def _grid_of(size: Any, found: Weights) -> tuple[int, int] | None:
    """The grid of patches of an image of `size`, a number or [h, w]."""
    sides = [size, size] if isinstance(size, int) else size
    embed = next((t for k, t in found.tensors.items() if k.endswith("encoder.model.patch_embed.proj.weight")), None)
    if embed is None or embed.ndim != 4 or not isinstance(sides, list) or len(sides) != 2:
        return None
    if not all(isinstance(side, int) and side > 0 for side in sides) or not min(embed.shape[2:]):
        return None
    return sides[0] // embed.shape[2], sides[1] // embed.shape[3]
