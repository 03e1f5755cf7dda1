"""The anchor of continued pretraining: a term of the loss that keeps features near those of the encoder at the start.

As in feature distillation (Romero et al., ICLR 2015, arXiv 1412.6550), with the start as the teacher. L2-SP (Li et al.,
ICML 2018, arXiv 1802.01483) does it with weights.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .encoder import Encoder


class Anchor:
    """A frozen encoder and the weight of the distance from it. It is no module, so no checkpoint holds it."""

    def __init__(self, encoder: Encoder, weight: float) -> None:
        self.encoder, self.weight = encoder.eval().requires_grad_(False), weight

    def add(self, values: dict[str, Tensor], features: Tensor, again: Callable[[Encoder], Tensor]) -> None:
        """Put the mean of 1 - cosine into the values of `Objective.forward`, as "anchor" and in the loss.

        features: [N, D]. again: computes those of the frozen encoder for the same input.
        """
        with torch.no_grad():
            frozen = again(self.encoder.to(features.device))
        values["anchor"] = (1 - F.cosine_similarity(features.float(), frozen.float(), dim=-1)).mean()
        values["loss"] = values["loss"] + self.weight * values["anchor"]
