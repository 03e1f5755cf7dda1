"""Export: write a pretrained encoder in a form that other programs load. One file for each form.

Each form ends by checking its own output. Forms import pretrained.py and what lies below it, never objectives or
evaluations.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .. import pretrained
from ..errors import UserError


@dataclass
class Config:
    run: str = ""  # a run directory, an exported folder, or timm:<name>
    to: Literal["timm"] = "timm"  # the form
    allow_method: str = ""  # for untrained: of a method of your own: its module, whose code then runs
    out: str = ""  # the folder to write; empty: <run>/export/<form>


def run(config: Config) -> None:
    """Write and check the export. Raises UserError."""
    from . import timm_folder

    subject = pretrained.load(config.run, allow_method=config.allow_method)
    if isinstance(subject.encoder, pretrained.Pixels):
        raise UserError("run=pixels has nothing to export: give a run directory.")
    out = Path(config.out) if config.out else subject.folder and subject.folder / "export" / config.to
    if not out:
        raise UserError("out= is missing: give the folder to write.")
    if not config.out and out.parent.is_symlink():
        raise UserError(f"{out.parent} is a link, and links are not followed: give another place, out=<folder>.")
    timm_folder.export(subject, out)
