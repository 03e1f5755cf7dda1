"""Export: write a pretrained encoder in forms that other programs load. One file for each form.

Each form ends by checking its own output: a new process, without sslvit, loads the files and must give the encoder's
features. Each folder has a model card, README.md, from the run's own records (card.py). Forms import pretrained.py and
what lies below it, never objectives or evaluations.
"""

from pathlib import Path

from ..errors import UserError, did_you_mean, require
from .config import Export as Config

# What each form needs beside sslvit's own packages. The extra of the same name brings it.
NEEDS = {"timm": (), "hf": ("transformers",), "onnx": ("onnxscript", "onnxruntime"), "torch": ()}


def run(config: Config) -> None:
    """Write and check the exports. Raises UserError."""
    from .. import pretrained  # imports torch, which takes seconds; --help needs no torch
    from ..checkpoints import exported
    from . import hf_folder, hub, onnx_file, timm_folder, torch_program

    forms = list(dict.fromkeys(form.strip() for form in config.to.strip("[]").split(",")))
    for form in forms:
        if form not in NEEDS:
            raise UserError(f"to={config.to}: {form} is no form.{did_you_mean(form, NEEDS)} Forms: {', '.join(NEEDS)}.")
        for module in NEEDS[form]:
            require(module, form, f"to={form}")
    if config.push:
        hub.check(config.push)
    subject = pretrained.load(config.run, allow_method=config.allow_method)
    if isinstance(subject.encoder, pretrained.Pixels):
        raise UserError("run=pixels has nothing to export: give a run directory.")
    root = Path(config.out) if config.out else subject.folder and subject.folder / "export"
    if not root:
        raise UserError("out= is missing: give the folder to write.")
    if (not config.out or len(forms) > 1) and root.is_symlink():
        raise UserError(f"{root} is a link, and links are not followed: give another place, out=<folder>.")
    folders = {form: root if config.out and len(forms) == 1 else root / form for form in forms}
    for out in folders.values():
        exported.refuse_foreign(out)
    if subject.detail.get("notes"):
        raise UserError(
            f"The newest checkpoint of {subject.name} is damaged, so nothing is exported: to export the one before it, "
            f"give run={subject.detail['checkpoint']}."
        )
    for form, out in folders.items():
        if form == "timm":
            timm_folder.export(subject, out, config.license)
        elif form == "hf":
            hf_folder.export(subject, out, config.license, config.hf_class)
        elif form == "onnx":
            onnx_file.export(subject, out, config.license, config.preprocess)
        else:
            torch_program.export(subject, out, config.license, config.preprocess)
    if config.push:
        hub.push(folders, config.push)
