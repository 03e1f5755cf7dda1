"""An exported folder: written beside its place, loaded in a new process by somebody else's library, then renamed."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import UserError
from . import textfile

FILES = {
    "README.md", "config.json", "model.onnx", "model.onnx.data", "model.pt2", "model.safetensors",
    "preprocessor_config.json",
}  # fmt: skip
SECONDS = 1800  # that loading may take; it takes some
TOLERANCE = 1e-4  # of what the model gives, relative to its largest value


def refuse_foreign(out: Path) -> None:
    """Raises UserError for a link, and for a folder that holds anything but what an export writes."""
    if out.is_symlink():
        raise UserError(f"out={out} is a link, and links are not followed: give a new folder.")
    if out.exists() and (not out.is_dir() or any(path.name not in FILES for path in out.iterdir())):
        raise UserError(f"out={out} exists and holds other things than an export: give a new folder.")


def write(
    out: Path, fill: Callable[[Path], None], load: str, what: str, images: Sequence[Tensor], expected: Sequence[Tensor]
) -> float:
    """Write a folder with `fill` and check it. Returns the largest difference, relative to the largest value. Raises
    UserError, and then nothing is written.

    load: lines of Python that define `model(images)` from `folder`. what: for messages, as "timm does not load ...".
    images, expected: batches, and what the model must give for each.
    """
    refuse_foreign(out)
    fresh = out.with_name(f".{out.name}.writing")
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if fresh.is_symlink():
            fresh.unlink()
        fresh.mkdir()
        fill(fresh)
        difference = check(fresh, load, what, images, expected)
        for path in (*fresh.iterdir(), fresh):
            textfile.sync(path)
        shutil.rmtree(out, ignore_errors=True)
        os.replace(fresh, out)
        textfile.sync(out.parent)
    except (OSError, SafetensorError) as error:
        raise UserError(f"out={out} cannot be written: {getattr(error, 'strerror', None) or error}.") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return difference


# What somebody else does with the folder. It must not find sslvit, so it runs in another process and another directory.
PROGRAM = """
import sys
import torch
from safetensors.torch import load_file, save_file
folder, inputs, outputs = sys.argv[1:]
{load}
assert "sslvit" not in sys.modules
with torch.no_grad():
    save_file({{name: model(images).contiguous() for name, images in load_file(inputs).items()}}, outputs)
"""


def check(folder: Path, load: str, what: str, images: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Load the folder in a new process and compare what its model gives for the images, as in `write`."""
    inputs, outputs = folder / ".images.safetensors", folder / ".features.safetensors"
    save_file({str(i): batch for i, batch in enumerate(images)}, inputs)
    program = PROGRAM.format(load=load)
    command = [sys.executable, "-c", program, *(str(path.resolve()) for path in (folder, inputs, outputs))]
    library, _, thing = what.partition(" ")
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=SECONDS)
    except subprocess.TimeoutExpired as late:
        raise UserError(f"{library} has not loaded {thing} in {SECONDS} s: nothing was written.") from late
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UserError(f"{library} does not load {thing} as it was exported: {reason[:300]}")
    theirs = load_file(outputs)
    inputs.unlink()
    outputs.unlink()
    differences = [_difference(theirs[str(i)], own) for i, own in enumerate(expected)]
    if not max(differences) < TOLERANCE:
        raise UserError(
            f"{library}'s features of the exported {thing} differ from the encoder's by {max(differences):.2g} of "
            "their size: nothing was written."
        )
    return max(differences)


def _difference(theirs: Tensor, own: Tensor) -> float:
    return ((theirs - own).abs().max() / own.abs().max()).item() if theirs.shape == own.shape else float("inf")
