"""What every method is: a module with a forward pass that returns a loss, and the encoder in it that is exported."""

from typing import Any

import torch
from torch import Tensor, nn

from .anchor import Anchor
from .encoder import Encoder


class Objective(nn.Module):
    """Student, teacher, heads and decoder in one module, which is what DDP, FSDP and torch.compile want.

    A method defines `forward` and `exported_encoder`. The other functions are optional.

    With shard=true each process has a part of each parameter (distributed.local_shard). A parameter is whole only while
    its block or head runs; those outside of blocks and heads are whole within `forward`.
    """

    takes_anchor = False  # whether `forward` adds that of model.anchor to its values
    anchor: Anchor | None = None

    def forward(self, views: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """{"key": [B] int64, name: [V, B, C, h, w] float32} -> {"loss": scalar, others to log} of one micro-batch.

        What is random is drawn from the images' keys (rng.py). Writes nothing but sums that `after_step` consumes. So
        neither accumulation nor the number of processes changes a run (except by BatchNorm and by koleo_weight).
        """
        raise NotImplementedError

    def exported_encoder(self) -> Encoder:
        """The part that is evaluated and exported, with its pooling."""
        raise NotImplementedError

    def split(self, views: dict[str, Tensor]) -> list[dict[str, Any]]:
        """A micro-batch in parts, to save memory. Each passes `forward` and the backward pass by itself, one after
        another. Their losses, gradients and values to log add up to those of the whole."""
        return [views]

    def save_memory(self) -> Any:
        """From now on cut micro-batches into parts. Returns the method's Config that says so, None if it cannot."""
        return None

    def before_step(self, step: int) -> None:
        """Gradients are final (averaged, unscaled, clipped) and the optimizer has not stepped."""

    def after_step(self, step: int) -> None:
        """The optimizer has stepped, or skipped the step. Called once a step."""

    def set_steps(self, steps: int) -> bool:
        """The run now has so many steps. False: this method cannot change its length."""
        return False

    def scheduled(self, step: int) -> dict[str, float]:
        """Values of the method's own schedules, for the log."""
        return {}

    def alarm(self, values: dict[str, float]) -> str | None:
        """What the means of a logged line say of collapse, as a sentence with what to change; None if all is well."""
        return None

    @torch.no_grad()
    def pictures(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        """What it makes of images, for the report: {title: [B, C, H, W] normalised}. views: as in `forward`."""
        return {}

    def shard_units(self) -> list[nn.Module]:
        """Large modules, beside transformer blocks, that shard=true splits by themselves, such as a head."""
        return []
