"""A folder that `timm.create_model("local-dir:<folder>", pretrained=True)` loads, in a process without sslvit."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoints import timm_format
from ..distributed import say
from ..errors import UserError
from ..model.encoder import Encoder
from ..pretrained import Pretrained


def export(subject: Pretrained, out: str | Path) -> Path:
    """Write config.json and model.safetensors, let timm load them in a new process, compare features. Raises UserError.

    timm's pooling is set to what the method trained: the class token, or the mean of the patches after the final norm.
    By default timm has a norm after the mean, with weights that this encoder does not have.
    """
    out = Path(out)
    timm_format.refuse_foreign(out)
    if subject.detail.get("notes"):
        raise UserError(
            f"The newest checkpoint of {subject.name} is damaged, so nothing is exported: to export the one before it, "
            f"give run={subject.detail['checkpoint']}."
        )
    encoder = subject.encoder.float().cpu().eval()
    assert isinstance(encoder, Encoder)
    timm_format.write(out, timm_config(subject), encoder.model, *example(encoder))
    say(
        f'{out}: timm.create_model("local-dir:{out}", pretrained=True) gives {encoder.feature_dim()} features an image',
        "checked in a new process: no missing or unexpected weight, equal features",
    )
    return out


def timm_config(subject: Pretrained) -> dict[str, Any]:
    """The config.json of a timm model folder."""
    encoder = subject.encoder
    assert isinstance(encoder, Encoder)
    args = dict(encoder.model_args)
    if encoder.is_vit:
        args |= {"global_pool": "token"} if encoder.pool == "cls" else {"global_pool": "avg", "fc_norm": False}
    return timm_format.record(encoder, args, subject.mean, subject.std, encoder.feature_dim()) | subject.origin


@torch.inference_mode()
def example(encoder: Encoder) -> tuple[Tensor, Tensor]:
    """Two noise images and their features."""
    images = torch.randn(2, encoder.in_chans, *encoder.image_size, generator=torch.Generator().manual_seed(0))
    return images, encoder.features(images)
