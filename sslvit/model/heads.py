"""Projection heads that objectives share."""

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn


class Prototypes(nn.Module):
    """K prototype vectors, weight-normalised: row k of the layer is g_k * v_k / |v_k| (DINO, section 3.2 and its code).

    Inputs of unit length and gains of 1 give cosine similarities. The parameters keep the names of the old
    `nn.utils.weight_norm`, so released checkpoints load.
    """

    def __init__(self, dim: int, count: int, train_gain: bool) -> None:
        super().__init__()
        self.weight_v = nn.Parameter(torch.empty(count, dim))
        self.weight_g = nn.Parameter(torch.ones(count, 1), requires_grad=train_gain)
        nn.init.uniform_(self.weight_v, -(dim**-0.5), dim**-0.5)  # what nn.Linear starts from: DINO does not change it

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] -> [..., K]."""
        # The gains are applied to the products: normalised prototypes would be written down for each pass.
        gain = self.weight_g / torch.linalg.vector_norm(self.weight_v, dim=1, keepdim=True)
        return F.linear(x, self.weight_v) * gain.t()


class DINOHead(nn.Module):
    """Multi-layer perceptron, a narrow bottleneck of unit length, prototypes (DINO, section 3.2; appendix C)."""

    shard_unit = True  # see sharding.units

    def __init__(
        self, in_dim: int, prototypes: int, hidden_dim: int, bottleneck_dim: int, layers: int, train_gain: bool
    ) -> None:
        super().__init__()
        widths = [in_dim, *[hidden_dim] * (layers - 1), bottleneck_dim]
        parts: list[nn.Module] = []
        for i in range(layers):
            linear = nn.Linear(widths[i], widths[i + 1])
            trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
            parts += [linear, nn.GELU()]
        self.mlp = nn.Sequential(*parts[:-1])
        self.last_layer = Prototypes(bottleneck_dim, prototypes, train_gain)

    def forward(self, x: Tensor) -> Tensor:
        """[R, in_dim] -> [R, K] float32 logits.

        The prototypes stay in float32: divided by a temperature of 0.04, bf16's rounding of a cosine near 1 is a tenth.
        """
        x = self.mlp(x)
        with torch.autocast(x.device.type, enabled=False):
            return self.last_layer(F.normalize(x.float(), dim=-1))
