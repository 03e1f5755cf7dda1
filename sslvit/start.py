"""`model.init=`: a run that begins with weights that exist, in the place of random ones.

Reads a model of timm, a run or a checkpoint of this package, an export, a folder of Hugging Face, and what the released
codes of MAE, DINO, iBOT, DINOv2, DINOv3 and SimMIM save (model/published.py). What the file holds of heads, decoder,
teacher and center is loaded too, so that its pretraining can go on.
"""

import copy
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import data
from .checkpoints import state
from .checkpoints.named import open_weights
from .errors import UserError, printable
from .model import lora, weights
from .model.anchor import Anchor
from .model.encoder import Encoder, resample_positions
from .model.weights import Weights
from .objectives import Objective

SHOWN = 3  # names in a list


def begin(objective: Objective, config: Any) -> list[str]:
    """Put what `model.init` of a RunConfig names into a new objective, and prepare it for model.lora_rank and
    model.anchor. Returns what was loaded, as sentences. Raises UserError."""
    said, model, run_dir = list[str](), config.model, Path(config.out)
    if not (saved := state.steps_saved(run_dir)):  # a run that goes on has weights of its own
        said = load(objective, model.init, data.normalization(config.data))
    if model.anchor:
        if not objective.takes_anchor:
            raise UserError(f"model.anchor={model.anchor:g}: method={config.method} has no anchor, leave it out.")
        frozen = copy.deepcopy(objective.exported_encoder())
        if saved:
            frozen.model.load_state_dict(_began_with(run_dir, objective))
        objective.anchor = Anchor(frozen, model.anchor)
    if model.lora_rank:
        for encoder in [one for one in objective.modules() if isinstance(one, Encoder)]:
            lora.add(encoder, model.lora_rank, config.seed)
    return said


def _began_with(run_dir: Path, objective: Objective) -> dict[str, Tensor]:
    """The exported encoder in the checkpoint of step 0, which a run with model.init keeps. Raises UserError."""
    folder, encoder = state.folder_of(run_dir, 0), objective.exported_encoder()
    prefix = f"{next(path for path, one in objective.named_modules() if one is encoder)}.model."
    try:
        _, (tensors,) = state.read(folder, state.MODEL)
        tensors = lora.merge(tensors)
        return {key: tensors[prefix + key] for key in encoder.model.state_dict()}
    except (state.Damaged, KeyError) as error:
        raise UserError(
            f"model.anchor needs the weights that the run began with, and {folder} cannot be read ({error}): restore "
            "it from a copy, or begin a new run from the newest checkpoint, model.init=<this run> and another out=."
        ) from error


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
        source, stored = found.encoder(prefix)
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
        if key.startswith(inside) or not own[key].is_floating_point():  # integers say what a run is
            continue
        if (taken := _other(key, own[key], found, objective)) is not None:
            new[key] = taken
    if wrong := next((key for key, value in new.items() if not value.isfinite().all()), None):
        raise UserError(f"{where}: {wrong} has values that are not finite: the file is damaged, or its run diverged.")
    objective.load_state_dict({key: new[key].to(value.dtype) if key in new else value for key, value in own.items()})
    return _report(own, new, found, inside, list(notes)) + _other_normalization(found, normalization)


def _same(own: Tensor | None, value: Tensor | None) -> bool:
    return own is not None and value is not None and own.shape == value.shape


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
