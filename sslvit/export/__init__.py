"""Writing a pretrained encoder in the form that other programs load; each form ends by checking its own output.

Imports pretrained.py, model/ and the helpers below them, never objectives or evaluations.
"""

from dataclasses import dataclass
from typing import Literal

from .. import pretrained
from ..errors import UserError


@dataclass
class Config:
    run: str = ""  # a run directory, an exported folder, or timm:<name>
    to: Literal["timm"] = "timm"  # the form
    out: str = ""  # the folder to write; empty: <run>/export/<form>


def run(config: Config) -> None:
    """Write and check the export. Raises UserError."""
    from . import timm_folder

    subject = pretrained.load(config.run)
    if isinstance(subject.encoder, pretrained.Pixels):
        raise UserError("run=pixels is no encoder that could be exported: give a run directory.")
    if not config.out and subject.folder is None:
        raise UserError("out= is missing: give the folder to write.")
    timm_folder.export(subject, config.out or subject.folder / "export" / config.to)
