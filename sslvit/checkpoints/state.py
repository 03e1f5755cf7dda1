"""Checkpoints of a run: written under another name, synced, renamed, with checksums. A run resumes from the newest.

A checkpoint is a folder `checkpoints/step_<n>` with model.safetensors (the whole objective: student, teacher, center),
optimizer.safetensors (AdamW's moments by parameter name), state.json (counters, and the identity of the run) and
sha256.txt. No random state is needed: every random draw is a function of its address (rng.py). Nothing is pickled, so a
checkpoint from elsewhere cannot run code.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..distributed import full_tensor, rank, shard_like
from ..errors import UserError
from . import journal, tensorfile, textfile
from .config import Config as Config

FORMAT = 1
MODEL, OPTIMIZER, STATE, SUMS = "model.safetensors", "optimizer.safetensors", "state.json", "sha256.txt"
NONE_YET = ".none_yet"  # is in `checkpoints` from the start of a run until its first checkpoint is on the disk
LARGEST_NUMBER = 1e39  # in state.json; float32 ends before it
LARGEST_TEXT = 2**24  # bytes of state.json or sha256.txt; those of a run have a few thousand
KINDS: dict[str, Any] = {  # of what is in every state.json; older versions wrote less
    **dict.fromkeys(("step", "images_seen", "skipped", "skipped_in_a_row"), int), "seconds": int | float,
    **dict.fromkeys(("best_step", "best_knn", "knn_before", "knn_after", "knn_due"), int | float | None),
    "window": dict, "energy": dict, "lengths": dict | None, "images": dict | None, "run": str | None,
}  # fmt: skip


@dataclass
class RunState:
    """All that a run knows beside its weights. Everything else is a function of `step` and the configuration."""

    step: int = 0  # optimizer steps done
    images_seen: int = 0
    seconds: float = 0.0  # of training, over all starts
    window: dict[str, Any] = field(default_factory=dict)  # sums of the unfinished line of metrics.jsonl
    skipped: int = 0  # steps whose loss or gradients were not finite ...
    skipped_in_a_row: int = 0  # ... and those of them that came last
    best_step: int | None = None  # of the best k-NN accuracy; that of an encoder with random weights does not count
    best_knn: float | None = None  # percent
    energy: dict[str, float] = field(default_factory=dict)  # kWh by column, see energy.py


Tensors = tuple[dict[str, Tensor], dict[str, Tensor]]  # of the objective and of its optimizer, by name


class Damaged(Exception):
    """A checkpoint that is not what this run has written."""


def begin(run_dir: Path) -> None:
    """Make the folder of the checkpoints, and say in it that there is none yet. Raises OSError, and UserError.

    So a run that was killed before its first checkpoint can be told from one that has lost its checkpoints.
    """
    if not steps_saved(run_dir):
        textfile.write(run_dir / "checkpoints" / NONE_YET, "There is no checkpoint yet.\n", root=run_dir)


def snapshot(objective: nn.Module, optimizer: torch.optim.Optimizer, into: Tensors | None = None) -> Tensors:
    """A copy of the state in main memory, while training goes on. All processes call this; the first gets the copy.

    into: an older copy, whose memory is used again where it fits. Fresh memory takes longer to get than to fill.
    """
    old = into or ({}, {})
    return _copy(objective.state_dict(), old[0]), _copy(optimizer_tensors(objective, optimizer), old[1])


def record(run_state: RunState, extra: dict[str, Any]) -> dict[str, Any]:
    """What state.json will hold."""
    return {"format": FORMAT, **asdict(run_state), **extra, "written": time.strftime("%F %T%z")}


def _unchecked() -> None:
    """Nobody else can have come to this place."""


def write(run_dir: Path, tensors: Tensors, record: dict[str, Any], check: Callable[[], None] = _unchecked) -> Path:
    """Write `checkpoints/step_<n>` so that it is there whole or not at all. Raises OSError or SafetensorError.

    check: called before a deletion; raises UserError if `run_dir` is now the place of another run (see lock.Lock).
    """
    folder = run_dir / "checkpoints"
    textfile.make_folder(folder, run_dir)
    final = folder_of(run_dir, record["step"])
    fresh = folder / f".writing_{record['step']:09d}"
    _erase(fresh)
    fresh.mkdir()
    try:
        for name, values in zip((MODEL, OPTIMIZER), tensors, strict=True):
            tensorfile.write(values, fresh / name)
        (fresh / STATE).write_text(json.dumps(record, indent=1), encoding="utf-8")
        names = (MODEL, OPTIMIZER, STATE)
        sums = "".join(f"{_checksum(fresh / name)}  {name}\n" for name in names)  # what `sha256sum -c` reads
        (fresh / SUMS).write_text(sums, encoding="utf-8")
        for name in (*names, SUMS):
            textfile.sync(fresh / name)
        textfile.sync(fresh)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)  # on a full disk, half a checkpoint takes room that is needed
        raise
    if final.exists():  # a damaged checkpoint of the same step: otherwise the run would have resumed from it
        check()
        _remove(final)
    os.rename(fresh, final)
    textfile.sync(folder)
    (folder / NONE_YET).unlink(missing_ok=True)
    return final


def save(
    run_dir: Path, objective: nn.Module, optimizer: torch.optim.Optimizer, run_state: RunState, extra: dict[str, Any]
) -> Path:
    """Write a checkpoint and wait for it. `extra` goes into state.json."""
    return write(run_dir, snapshot(objective, optimizer), record(run_state, extra))


def steps_saved(run_dir: Path) -> list[int]:
    """The steps of which there are checkpoints, oldest first. Raises UserError if their folder cannot be read."""
    folder = run_dir / "checkpoints"
    try:
        numbers = [name[5:] for name in os.listdir(folder) if name.startswith("step_")]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise UserError(
            f"The checkpoints in {folder} cannot be read ({error.strerror}): let this user read and write the folder."
        ) from error
    steps = [int(number) for number in numbers if number.isascii() and number.isdigit()]
    return sorted(step for step in steps if folder_of(run_dir, step).name[5:] in numbers)


def folder_of(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step_{step:09d}"


def prune(
    run_dir: Path,
    keep_last: int,
    step: int,
    every: int | None = None,
    best: int | None = None,
    check: Callable[[], None] = _unchecked,
) -> None:
    """Delete old checkpoints. Kept are the last `keep_last`, multiples of `every`, that of step `best`, and that of
    step 0, which has the weights that a run with model.init began with.

    Checkpoints of later steps are damaged, since the run did not resume from them. They do not count, and stay until
    the run has passed them. check: as in `write`.
    """
    for old in [saved for saved in steps_saved(run_dir) if saved <= step][: -max(1, keep_last)]:
        if old not in (0, best) and not (every and old % every == 0):
            check()
            _remove(folder_of(run_dir, old))


def sweep(run_dir: Path) -> None:
    """Delete what a killed run was writing or deleting. Call it only with the lock of the run."""
    texts = [f".{name}.[0-9]*" for name in ("config.yaml", journal.STARTS, *journal.NAMES)]  # see textfile.write
    for pattern in ("checkpoints/.writing_*", "checkpoints/.deleting_*", f"checkpoints/.{NONE_YET}.*", *texts):
        for path in run_dir.glob(pattern):
            _erase(path)


def _erase(path: Path) -> None:
    """Delete a file, a link or a folder, as far as that is possible."""
    with suppress(OSError):
        path.unlink()
    shutil.rmtree(path, ignore_errors=True)


def _remove(folder: Path) -> None:
    """Rename, then delete: a kill in between leaves no half of a checkpoint under its name."""
    going = folder.with_name(folder.name.replace("step_", ".deleting_"))
    _erase(going)
    os.rename(folder, going)
    _erase(going)


def read(folder: Path, *names: str) -> tuple[dict[str, Any], list[dict[str, Tensor]]]:
    """state.json and the tensors of the named files, checked. Raises Damaged."""
    try:
        for name in (SUMS, STATE, *names):
            if not (folder / name).is_file():
                raise Damaged(f"{name} is missing")
        listed = {name: checksum for checksum, name in (line.split("  ") for line in _text(folder / SUMS).splitlines())}
        for name in (STATE, *names):
            if listed[name] != _checksum(folder / name):
                raise Damaged(f"{name} is not what was written")
        record = json.loads(_text(folder / STATE))
        if record["format"] != FORMAT:
            raise Damaged(f"its format is {record['format']}, and this version reads {FORMAT}")
        _check_record(record, folder)
        return record, [load_file(folder / name) for name in names]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
        raise Damaged(f"{type(error).__name__}: {error}") from error


def _text(path: Path) -> str:
    if path.stat().st_size > LARGEST_TEXT:
        raise Damaged(f"{path.name} is larger than {LARGEST_TEXT} bytes")
    return path.read_text(encoding="utf-8")


def _check_record(record: dict[str, Any], folder: Path) -> None:
    """Raises Damaged for a state.json of another step or run, or with values that no run writes."""
    values = {name: record[name] for name in KINDS if name in record}
    values |= {f"window.{name}": value for name, value in record.get("window", {}).get("sums", {}).items()}
    values |= {f"energy.{name}": value for name, value in record.get("energy", {}).items()}
    values |= {f"lengths.{name}": value for name, value in (record.get("lengths") or {}).items()}
    for name, value in values.items():
        kind = KINDS.get(name) or (int if name.startswith("lengths.") else int | float)
        if not isinstance(value, kind) or not all(abs(number) < LARGEST_NUMBER for number in _numbers(value)):
            raise Damaged(f"{name} in {STATE} is {str(value)[:40]}")
    if folder.name.startswith("step_") and folder.name != folder_of(folder, record["step"]).name:
        raise Damaged(f"it is the checkpoint of step {record['step']} under another name")
    owner = journal.run_id(folder.parent.parent)
    if owner and (record.get("run") or owner) != owner:
        raise Damaged("it belongs to another run")


def _numbers(value: Any) -> Iterator[float]:
    """All numbers in a value of JSON."""
    if isinstance(value, (list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _numbers(item)
    elif isinstance(value, (int, float)):
        yield value


def latest(
    run_dir: Path, *names: str, check: Callable[..., None] | None = None
) -> tuple[Path, dict[str, Any], list[dict[str, Tensor]], list[str]]:
    """The newest whole checkpoint: (folder, state.json, tensors of the named files, a sentence for each damaged one).

    check: called with the tensors of each file; may raise Damaged. Raises UserError if there is no whole checkpoint.
    """
    complaints: list[str] = []
    for step in reversed(steps_saved(run_dir)):
        folder = folder_of(run_dir, step)
        try:
            record, tensors = read(folder, *names)
            if check:
                check(*tensors)
            return folder, record, tensors, complaints
        except Damaged as error:
            complaints.append(f"The checkpoint {folder} is damaged ({error}). The one before it is taken.")
    if complaints:
        raise UserError(
            f"None of the {len(complaints)} checkpoints in {run_dir} can be read. {' '.join(complaints)[:600]} "
            "Restore one of them from a copy, or start a new run with another out=."
        )
    raise UserError(f"{run_dir} has no checkpoint: give the directory of a run that has saved one.")


def restore(
    run_dir: Path, objective: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[RunState, dict[str, Any], list[str]]:
    """Load the newest whole checkpoint into objective and optimizer: (run state, state.json, complaints)."""
    check = partial(_check_tensors, objective, optimizer)
    _, record, (weights, moments), complaints = latest(run_dir, MODEL, OPTIMIZER, check=check)
    own = objective.state_dict()
    objective.load_state_dict({name: shard_like(value, own.get(name)) for name, value in weights.items()})
    load_optimizer_tensors(objective, optimizer, moments)
    return RunState(**{name: record[name] for name in RunState.__annotations__ if name in record}), record, complaints


def _check_tensors(
    objective: nn.Module, optimizer: torch.optim.Optimizer, weights: dict[str, Tensor], moments: dict[str, Tensor]
) -> None:
    """Raises Damaged for a tensor of another name, shape or type than this objective and its AdamW have.

    A trained parameter that has had no gradient yet has no moments.
    """
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    own = {name: _form(p) for name, p in objective.named_parameters() if id(p) in trained}
    begun = {path.rpartition("/")[0] for path in moments} & own.keys()
    forms = {"exp_avg": own, "exp_avg_sq": own, "step": dict.fromkeys(own, "[] float32")}
    expected = {f"{name}/{key}": form[name] for name in begun for key, form in forms.items()}
    state = {name: _form(value) for name, value in objective.state_dict().items()}
    for tensors, wanted in ((weights, state), (moments, expected)):
        found = {name: _form(tensor) for name, tensor in tensors.items()}
        for name in sorted(found.keys() | wanted.keys()):
            if found.get(name) != wanted.get(name):
                raise Damaged(f"{name} is {found.get(name, 'missing')} and must be {wanted.get(name, 'missing')}")
    if not all(0 <= tensor.item() < LARGEST_NUMBER for name, tensor in moments.items() if name.endswith("/step")):
        raise Damaged("a parameter's number of steps is negative or no number")


def _form(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def optimizer_tensors(objective: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """{"<parameter>/exp_avg": ...}: by name, so their order and their groups do not matter."""
    return {
        f"{name}/{key}": value
        for name, parameter in objective.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(objective: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    states: dict[str, dict[str, Tensor]] = {}
    own = dict(objective.named_parameters())
    for path, value in tensors.items():
        name, key = path.rsplit("/", 1)
        # The count of steps is a scalar, which is never sharded.
        states.setdefault(name, {})[key] = shard_like(value, own.get(name)) if value.ndim else value
    names = {parameter: name for name, parameter in objective.named_parameters()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    current = optimizer.state_dict()
    current["state"] = {i: states[names[p]] for i, p in enumerate(parameters) if names[p] in states}
    optimizer.load_state_dict(current)  # it moves each tensor to the device and type of the parameter


def size(tensors: dict[str, Tensor]) -> int:
    """Bytes."""
    return sum(tensor.nbytes for tensor in tensors.values())


def _copy(tensors: dict[str, Tensor], into: dict[str, Tensor]) -> dict[str, Tensor]:
    copies = {}
    for name, tensor in tensors.items():
        tensor = full_tensor(tensor)
        if rank() != 0:
            continue
        copy = into.get(name)
        if copy is None or copy.shape != tensor.shape or copy.dtype != tensor.dtype:
            copy = torch.empty(tensor.shape, dtype=tensor.dtype)
        copies[name] = copy.copy_(tensor.detach())
    return copies


def _checksum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
