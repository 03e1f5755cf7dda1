"""A teacher that is the exponential moving average of its student."""

from dataclasses import dataclass

import torch
from torch import nn

from .. import optim
from ..distributed import local_shard


@dataclass(frozen=True)
class EMA:
    """The momentum of a teacher, on half a cosine from `start` at step 0 to `end` at step `steps` (BYOL, DINO)."""

    start: float
    end: float
    steps: int

    def momentum(self, step: int) -> float:
        return optim.cosine(self.start, self.end, step / self.steps)

    @torch.no_grad()
    def update(self, teacher: nn.Module, student: nn.Module, step: int) -> None:
        """Move the teacher's parameters: momentum * teacher + (1 - momentum) * student. Buffers are left alone."""
        # Sharded, both have the same parts on each process.
        theirs, ours = ([local_shard(p) for p in network.parameters()] for network in (teacher, student))
        torch._foreach_lerp_(theirs, ours, 1 - self.momentum(step))
