"""model.pt2: a program of `torch.export`, with a batch of any size, which torch runs without timm and sslvit."""

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoints import exported
from ..data.augment import Normalize
from ..distributed import say
from ..errors import UserError
from ..model.encoder import Encoder
from ..pretrained import Pretrained
from . import card, hf_folder
from .timm_folder import example, ready

LOAD = 'model = torch.export.load(folder + "/model.pt2").module()'
HOW = """import torch
model = torch.export.load("model.pt2").module()
features = model(images)  # {images}"""


class FeaturesOf(nn.Module):
    """[B, C, H, W] -> [B, feature_dim]. normalize: for images of 8 bits, else None for normalised ones."""

    mean: Tensor
    std: Tensor

    def __init__(self, encoder: Encoder, normalize: Normalize | None) -> None:
        super().__init__()
        self.encoder, self.preprocess = encoder, normalize is not None
        if normalize:
            self.register_buffer("mean", torch.tensor(normalize.mean).view(-1, 1, 1))
            self.register_buffer("std", torch.tensor(normalize.std).view(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        if self.preprocess:
            images = (images / 255 - self.mean) / self.std
        return self.encoder.features(images)


def export(subject: Pretrained, out: Path, license: str = "", preprocess: bool = False) -> Path:
    """Write model.pt2, preprocessor_config.json and a model card, let torch load them in a new process, compare
    features. Raises UserError."""
    model, images, features = traceable(subject, preprocess)

    def fill(folder: Path) -> None:
        with explained("torch.export", ready(subject)):
            program = torch.export.export(model, (images,), dynamic_shapes={"images": {0: torch.export.Dim("batch")}})
            torch.export.save(program, folder / "model.pt2")
        beside(folder, subject, preprocess, "torch", HOW, license)

    what = f"torch {ready(subject).architecture}"
    difference = exported.write(out, fill, LOAD, what, [images, images[:1].clone()], [features, features[:1]])
    say(
        f'{out}: torch.export.load("{out / "model.pt2"}").module() gives {features.shape[1]} features an image',
        f"checked in a new process: {card.equal(difference)}",
    )
    return out


def traceable(subject: Pretrained, preprocess: bool, larger: tuple[int, int] = (0, 0)) -> tuple[nn.Module, Any, Any]:
    """A module to trace, images that it takes, and their features. Raises UserError.

    preprocess, larger: as in `FeaturesOf` and `timm_folder.example`.
    """
    encoder = ready(subject)
    if preprocess and subject.value_range:
        raise UserError(
            f"preprocess=true takes images of 8 bits, and {subject.name} was trained on values of "
            f"{list(subject.value_range)}: leave it out."
        )
    images, features = example(encoder, larger)
    model = FeaturesOf(encoder, Normalize(subject.mean, subject.std) if preprocess else None).eval()
    if preprocess:
        images = (images * 64 + 128).clamp(0, 255).to(torch.uint8)
        with torch.inference_mode():
            features = encoder.features(Normalize(subject.mean, subject.std)(images / 255))
    return model.requires_grad_(False), images.clone(), features


@contextmanager
def explained(tool: str, encoder: Encoder) -> Iterator[None]:
    """Turn an error of a tracing tool into a UserError, and drop its warnings."""
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    except OSError:
        raise
    except Exception as error:  # of any kind: the tools run the whole of torch
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise UserError(f"{tool} cannot trace {encoder.architecture} ({reason}): take to=timm.") from error


def beside(folder: Path, subject: Pretrained, preprocess: bool, library: str, how: str, license: str) -> None:
    """Write preprocessor_config.json, which transformers' AutoImageProcessor reads, and the model card."""
    processor = hf_folder.processor(subject, preprocess)
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n", encoding="utf-8")
    h, w = subject.encoder.image_size
    of = f"[batch, {subject.encoder.in_chans}, {h}, {w}]"
    how = how.format(images=f"uint8 {of}" if preprocess else f"float32 {of}, normalised")
    (folder / "README.md").write_text(card.text(subject, library, how, license), encoding="utf-8")
