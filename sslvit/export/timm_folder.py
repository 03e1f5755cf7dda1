"""A folder that `timm.create_model("local-dir:<folder>", pretrained=True)` loads, in a process without sslvit.

transformers loads it too, see checkpoints/timm_format.py.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoints import timm_format
from ..distributed import say
from ..model.encoder import Encoder
from ..pretrained import Pretrained
from . import card

HOW = """import timm
model = timm.create_model("local-dir:path/to/this/folder", pretrained=True).eval()
features = model(images)  # num_classes=10 adds a classifier, for fine-tuning"""


def export(subject: Pretrained, out: str | Path, license: str = "") -> Path:
    """Write config.json, model.safetensors and a model card, let timm load them in a new process, compare features.
    Raises UserError.

    timm's pooling is set to what the method trained: the class token, or the mean of the patches after the final norm.
    By default timm has a norm after the mean, with weights that this encoder does not have.
    """
    out, encoder = Path(out), ready(subject)
    text = card.text(subject, "timm", HOW, license)
    difference = timm_format.write(out, timm_config(subject), encoder.model, *example(encoder), card=text)
    say(
        f'{out}: timm.create_model("local-dir:{out}", pretrained=True) gives {encoder.feature_dim()} features an image',
        f"checked in a new process: no missing or unexpected weight, {card.equal(difference)}",
    )
    return out


def ready(subject: Pretrained) -> Encoder:
    """The encoder as all forms are made from it."""
    encoder = subject.encoder.float().cpu().eval()
    assert isinstance(encoder, Encoder)
    return encoder


def timm_config(subject: Pretrained) -> dict[str, Any]:
    """The config.json of a timm model folder."""
    encoder = subject.encoder
    assert isinstance(encoder, Encoder)
    args = dict(encoder.model_args)
    if encoder.is_vit:
        args |= {"global_pool": "token"} if encoder.pool == "cls" else {"global_pool": "avg", "fc_norm": False}
    return timm_format.record(encoder, args, subject.mean, subject.std, encoder.feature_dim()) | subject.origin


@torch.inference_mode()
def example(encoder: Encoder, larger: tuple[int, int] = (0, 0)) -> tuple[Tensor, Tensor]:
    """Two noise images and their features. larger: how many pixels more than the encoder's own size they have."""
    h, w = (side + more for side, more in zip(encoder.image_size, larger, strict=True))
    images = torch.randn(2, encoder.in_chans, h, w, generator=torch.Generator().manual_seed(0))
    return images, encoder.features(images)
