"""Terms of a loss that objectives share."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .encoder import take


def koleo(features: Tensor) -> Tensor:
    """[V, B, D], the B images of a micro-batch seen in V crops -> the Kozachenko-Leonenko term of DINOv2 (Oquab et al.,
    2023, section 4), a scalar: for each crop minus the mean logarithm of the distance from each feature, of unit
    length, to the nearest one of another image; summed over the crops as in its code. 0 for one image.

    In float32 also under autocast: of features that are nearly alike, bfloat16 finds the wrong neighbours. Other
    micro-batches or processes have other neighbours, so this term, unlike the rest, depends on batch_size.
    """
    if features.shape[1] < 2:
        return features.sum() * 0.0
    with torch.autocast(features.device.type, enabled=False):
        x = F.normalize(features.float(), dim=-1)
        with torch.no_grad():
            similarity = x @ x.transpose(1, 2)
            similarity.diagonal(dim1=1, dim2=2).fill_(-2)
            nearest = similarity.argmax(dim=2)
        distance = ((x - take(x, nearest)).square().sum(dim=-1) + 1e-12).sqrt()
        return -(distance + 1e-8).log().mean(dim=1).sum()
