"""What objectives put behind an encoder: projection heads and terms of a loss."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn

from .encoder import take

ENOUGH_IMAGES = 8  # in a micro-batch, for what is logged of how they differ


class Prototypes(nn.Module):
    """K prototype vectors, weight-normalised: row k of the layer is g_k * v_k / |v_k| (DINO, section 3.2 and its code).

    Inputs of unit length and gains of 1 give cosine similarities. The parameters keep the names of the old
    `nn.utils.weight_norm`, so released checkpoints load.
    """

    def __init__(self, dim: int, count: int, train_gain: bool) -> None:
        super().__init__()
        self.weight_v = nn.Parameter(torch.empty(count, dim))
        self.weight_g = nn.Parameter(torch.ones(count, 1), requires_grad=train_gain)
        nn.init.uniform_(self.weight_v, -(dim**-0.5), dim**-0.5)  # nn.Linear's default, which DINO keeps

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] -> [..., K]."""
        # The gains are applied to the products: this saves a copy of the prototypes in each pass.
        gain = self.weight_g / torch.linalg.vector_norm(self.weight_v, dim=1, keepdim=True)
        return F.linear(x, self.weight_v) * gain.t()


class PrototypeHead(nn.Module):
    """Multi-layer perceptron, a narrow bottleneck of unit length, prototypes (DINO, section 3.2; appendix C)."""

    def __init__(
        self, in_dim: int, prototypes: int, hidden_dim: int, bottleneck_dim: int, layers: int, train_gain: bool
    ) -> None:
        super().__init__()
        widths = [in_dim, *[hidden_dim] * (layers - 1), bottleneck_dim]
        parts: list[nn.Module] = []
        for inner, outer in pairwise(widths):
            linear = nn.Linear(inner, outer)
            trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
            parts += [linear, nn.GELU()]
        self.mlp = nn.Sequential(*parts[:-1])
        self.last_layer = Prototypes(bottleneck_dim, prototypes, train_gain)

    def forward(self, x: Tensor) -> Tensor:
        """[R, in_dim] -> [R, K] float32 logits.

        The prototypes stay in float32. In bf16 a cosine near 1, divided by a temperature of 0.04, is off by 0.1.
        """
        x = self.mlp(x)
        with torch.autocast(x.device.type, enabled=False):
            return self.last_layer(F.normalize(x.float(), dim=-1))


def koleo(features: Tensor) -> Tensor:
    """[V, B, D], the B images of a micro-batch in V crops -> a scalar that falls as features spread; 0 for one image.

    The Kozachenko-Leonenko term of DINOv2 (Oquab et al., 2023, section 4): for each crop minus the mean logarithm of
    the distance from each feature, of unit length, to the nearest one of another image. Summed over the crops as in its
    code. It depends on batch_size, as other micro-batches have other neighbours.
    """
    if features.shape[1] < 2:
        return features.sum() * 0.0
    with torch.autocast(features.device.type, enabled=False):  # bf16 finds wrong neighbours of nearly equal features
        x = F.normalize(features.float(), dim=-1)
        with torch.no_grad():
            similarity = x @ x.transpose(1, 2)
            similarity.diagonal(dim1=1, dim2=2).fill_(-2)
            nearest = similarity.argmax(dim=2)
        distance = ((x - take(x, nearest)).square().sum(dim=-1) + 1e-12).sqrt()
        return -(distance + 1e-8).log().mean(dim=1).sum()


@torch.no_grad()
def differences(images: Tensor, features: Tensor) -> dict[str, Tensor]:
    """[B, C, H, W], [N, D] -> how they differ, 0 to 1, for the log: the variance between images at a place as a share
    of all, and 1 minus the squared length of the mean of the features of unit length. {} for few images."""
    if len(images) < ENOUGH_IMAGES:
        return {}
    x, unit = images[:, :, ::4, ::4].float(), F.normalize(features.detach().float(), dim=-1)
    between, total = x.var(dim=0, correction=0).mean(), x.var(dim=(0, 2, 3), correction=0).mean()
    spread = 1 - unit.mean(dim=0).square().sum()
    return {"image_difference": between / total.clamp(min=1e-12), "feature_spread": spread}
