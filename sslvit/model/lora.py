"""LoRA: beside each linear layer of the transformer blocks a matrix of low rank learns; the encoder itself is frozen.

Hu et al., ICLR 2022 (arXiv 2106.09685), section 4.1, without its factor alpha / r. For continued pretraining: ExPLoRA,
Khanna et al., ICML 2025 (arXiv 2406.10973). A layer uses the sum of its weight and the product `up @ down`, so the sum
alone is the same layer, and evaluations, exports and other runs get it under the layer's plain name.
"""

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .. import rng
from ..errors import UserError
from .encoder import Encoder

FROZEN, UP, DOWN = (f".parametrizations.weight.{name}" for name in ("original", "0.up", "0.down"))  # in a state dict


class LowRank(nn.Module):
    """Adds `up @ down` to a frozen weight. Both start so that nothing changes, and `up` can learn."""

    def __init__(self, weight: Tensor, rank: int, key: Tensor) -> None:
        super().__init__()
        rows, columns = weight.shape
        generator = torch.Generator().manual_seed(int(key))
        down = torch.randn(rank, columns, generator=generator) / columns**0.5
        self.up = nn.Parameter(torch.zeros(rows, rank))
        self.down = nn.Parameter(down)

    def forward(self, weight: Tensor) -> Tensor:
        with torch.autocast(weight.device.type, enabled=False):  # the sum is rounded once, as that of an export is
            return torch.addmm(weight, self.up, self.down)


def add(encoder: Encoder, rank: int, seed: int) -> None:
    """Freeze the encoder, and let matrices of this rank learn if it learned. Raises UserError without blocks.

    Student and teacher begin with the same ones.
    """
    learns = any(parameter.requires_grad for parameter in encoder.parameters())
    named = encoder.model.named_modules()
    layers = {name: one for name, one in named if "blocks." in name and isinstance(one, nn.Linear)}
    if not layers:
        raise UserError(f"model.lora_rank={rank} needs transformer blocks, and {encoder.architecture} has none.")
    encoder.requires_grad_(False)
    for name, layer in layers.items():
        low_rank = LowRank(layer.weight, rank, rng.fold_in(seed, "lora", name)).requires_grad_(learns)
        parametrize.register_parametrization(layer, "weight", low_rank)


def merge(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a checkpoint, with plain names and sums in the place of weights and products."""
    merged = dict(tensors)
    for name in [name for name in tensors if name.endswith(FROZEN)]:
        layer = name.removesuffix(FROZEN)
        weight, up, down = (tensors.get(layer + part) for part in (FROZEN, UP, DOWN))
        if weight is None or up is None or down is None or not up.ndim == down.ndim == 2:
            continue  # of a damaged file: whoever reads it says what is missing
        if weight.shape == (len(up), down.shape[1]) and up.shape[1] == len(down):
            for part in (FROZEN, UP, DOWN):
                del merged[layer + part]
            merged[f"{layer}.weight"] = torch.addmm(weight.float(), up.float(), down.float()).to(weight.dtype)
    return merged
