"""Distillation: a student learns what a larger, frozen teacher says of an image and of each of its patches.

The frame is that of Wei et al., "Contrastive Learning Rivals Masked Image Modeling in Fine-tuning via Feature
Distillation" (FD, 2022, arXiv 2205.14141): both see the same crop, a linear layer brings the student's tokens to the
teacher's width, and their distance is the loss. Zhang et al. ("Accessing Vision Foundation Models via ImageNet-1K",
2024, arXiv 2407.10366) and lightly-train compare the feature of the whole image as well, as here. DINOv2's small models
(Oquab et al., 2023, section 5) repeat its pretraining with a frozen teacher, which needs the teacher's heads. As there,
the student has no drop path.

Unlike FD, the teacher's features are centred and divided by one number (Ranzinger et al., "PHI-S", 2024, arXiv
2410.01680; their rotation changes no squared error). FD normalises each token by itself, which keeps the large part
that all tokens share. One number for all channels keeps the ratios of distances, on which k-NN depends. The loss is
then the share of the teacher's variance that the student does not explain: about 1 at first, 0 for a copy.
"""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn

from .. import data
from ..arguments import first_line
from ..checkpoints import named
from ..data.crops import Crop, Views
from ..distributed import all_reduce_sum, say
from ..errors import UserError, check_limits, check_share
from ..model import factory
from ..model.encoder import Encoder
from ..model.heads import differences
from ..model.objective import Objective
from .keys.distill import DEFAULTS as DEFAULTS
from .keys.distill import PRESETS as PRESETS
from .keys.distill import SMALL as SMALL
from .keys.distill import WORKS as WORKS
from .keys.distill import Config as Config

SLOWEST = 0.01  # share of a step's statistics in the running ones, after the first hundred steps


def views(config: Config, data_config: data.Config) -> Views:
    """One crop and a flip, the same for student and teacher."""
    crop = Crop(
        data.image_size(data_config), config.crop_scale, flip_prob=config.flip_prob,
        vertical_flip_prob=config.vertical_flip_prob, rotate_prob=config.rotate_prob,
    )  # fmt: skip
    return {"image": [crop]}


def build(
    config: Config, model: factory.Config, data_config: data.Config, steps_per_epoch: int, steps: int
) -> "Distill":
    """Raises UserError for settings and models that cannot work."""
    check_limits("objective.", config)
    check_share("objective.", config, "crop_scale")
    if not config.teacher:
        raise UserError(
            "objective.teacher is missing: give the encoder to learn from, as in teacher=runs/mae, teacher=<exported "
            "folder>, teacher=dino_vitbase16_pretrain.pth or teacher=timm:vit_base_patch14_dinov2."
        )
    size = data.image_size(data_config)
    encoder = factory.create(model, size, data_config.in_chans)  # first: its weights depend on the seed alone
    teacher = Teacher(config, data_config)
    say(*teacher.describe())
    return Distill(config, encoder, teacher)


class Teacher:
    """The frozen encoder. It is no part of the objective's module: nothing trains it, saves it, splits it or puts it
    into training mode. Each process has it whole, in float32, and keeps none of its activations."""

    def __init__(self, config: Config, data_config: data.Config) -> None:
        """Raises UserError if there is no such encoder."""
        where = f"objective.teacher={config.teacher}"
        wanted = data.pair(config.teacher_size or data_config.image_size)
        self.where, self.named = where, named.open_encoder(config.teacher, where, wanted, data_config.in_chans)
        self.encoder = self.named.encoder.requires_grad_(False)
        # Its images from the student's: x * gain + offset. Unknown means and deviations are those of ImageNet.
        theirs = self.named.normalization or data.normalization(data.Config(in_chans=self.encoder.in_chans))
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in data.normalization(data_config))
        own_mean, own_std = (torch.tensor(values).view(-1, 1, 1) for values in theirs)
        if len(own_mean) not in (1, self.encoder.in_chans):  # channels were added or taken away to fit
            own_mean, own_std = mean, std
        self.gain, self.offset = std / own_std, (mean - own_mean) / own_std

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """[B, C, H, W], normalised for the student -> its feature [B, D] and its map [B, h, w, D'], float32."""
        if self.gain.device != images.device:
            self.gain, self.offset = self.gain.to(images.device), self.offset.to(images.device)
            self.encoder.to(images.device)
        images = images * self.gain + self.offset  # a gray image gets the channels of the teacher
        images = images.expand(-1, self.encoder.in_chans, -1, -1)
        if images.shape[2:] != self.encoder.image_size:
            images = F.interpolate(images, self.encoder.image_size, mode="bicubic", antialias=True)
        feature, tokens = self.encoder.feature_and_map(images)
        return feature.float(), tokens.float()

    def describe(self) -> list[str]:
        """What a run says of it."""
        (h, w), encoder, trained = self.encoder.image_size, self.encoder, self.named.trained_size
        weights = sum(p.numel() for p in encoder.parameters()) / 1e6
        name = self.where.partition("=")[2]
        lines = [f"Teacher {name}: {encoder.architecture}, {weights:.1f}M parameters, {h}x{w} pixels."]
        lines += [f"  changed to fit: {'; '.join(self.named.changed)}"] if self.named.changed else []
        if trained and 2 * h < trained[0]:
            lines.append(
                f"Warning: it was trained on {trained[0]}x{trained[1]} pixels and sees {h}x{w}. Its features may be "
                f"poor: objective.teacher_size={trained[0]} enlarges its images, which takes more time."
            )
        return lines


class Distill(Objective):
    teacher_sha256: Tensor

    def __init__(self, config: Config, encoder: Encoder, teacher: Teacher) -> None:
        super().__init__()
        self.config, self.encoder, self.teacher = config, encoder, teacher
        if teacher.encoder.pool in encoder.pools():
            encoder.pool = teacher.encoder.pool
        widths = output_widths(encoder, "the student"), output_widths(teacher.encoder, teacher.where)
        self.parts = ["feature", "patches"] if config.patch_weight else ["feature"]
        pairs = zip(self.parts, *widths, strict=False)
        layers = {name: nn.Linear(own, theirs) for name, own, theirs in pairs}
        self.projections = nn.ModuleDict(layers)
        for name, layer in layers.items():
            trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
            # Mean and variance of the teacher's features, and what the micro-batches of a step leave for after_step.
            self.register_buffer(f"{name}_mean", torch.zeros(layer.out_features))
            self.register_buffer(f"{name}_variance", torch.ones(()))
            self.register_buffer(f"{name}_sum", torch.zeros(layer.out_features), persistent=False)
            self.register_buffer(f"{name}_squares", torch.zeros(()), persistent=False)
            self.register_buffer(f"{name}_count", torch.zeros(()), persistent=False)
        # A run that goes on must have the teacher that it began with.
        self.register_buffer(
            "teacher_sha256", torch.tensor(list(bytes.fromhex(teacher.named.sha256)), dtype=torch.uint8)
        )

    def forward(self, views: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """{"key": [B], "image": [1, B, C, H, W] normalised} -> {"loss": scalar, and its parts}."""
        images = views["image"][0]
        theirs, own = self.teacher(images), self.encoder.feature_and_map(images)
        # The grids of other patch sizes meet at the student's: a teacher's map is smooth, and there are no more tokens
        # to compare than the student has.
        tokens = resample(theirs[1], own[1].shape[1:3])
        values = {"feature_loss": self.error("feature", own[0], theirs[0])}
        loss = values["feature_loss"]
        if self.config.patch_weight:
            values["patch_loss"] = self.error("patches", own[1].flatten(1, 2), tokens.flatten(1, 2))
            loss = loss + self.config.patch_weight * values["patch_loss"]
        return {"loss": loss, **values, **differences(images, own[0])}

    def error(self, name: str, own: Tensor, theirs: Tensor) -> Tensor:
        """[B, ..., D] of the student, [B, ..., D'] of the teacher -> mean squared error, in the teacher's variances."""
        mean, variance = self.get_buffer(f"{name}_mean"), self.get_buffer(f"{name}_variance")
        centred = theirs - mean
        rows = centred.detach().flatten(0, -2)
        self.get_buffer(f"{name}_sum").add_(rows.sum(dim=0))
        self.get_buffer(f"{name}_squares").add_(rows.square().sum() / rows.shape[1])
        self.get_buffer(f"{name}_count").add_(len(rows))
        predicted = self.projections[name](own).float()
        return (predicted - centred / variance.clamp(min=1e-6).sqrt()).square().mean()

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Move the statistics of the teacher's features: their average over the first hundred steps, then a running
        one. Those of a step are the ones before it, as are DINO's center."""
        rate = max(1 / (step + 1), SLOWEST)
        for name in self.parts:
            parts = [self.get_buffer(f"{name}_{part}") for part in ("sum", "squares", "count")]
            total, squares, count = (all_reduce_sum(part) for part in parts)
            shift = total / count  # of the mean of this step from the running one
            self.get_buffer(f"{name}_mean").add_(shift, alpha=rate)
            self.get_buffer(f"{name}_variance").lerp_(squares / count - shift.square().mean(), rate)
            for part in parts:
                part.zero_()

    def exported_encoder(self) -> Encoder:
        return self.encoder

    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        """Raises UserError if the state is of a run with another teacher."""
        if not torch.equal(state_dict["teacher_sha256"].cpu(), self.teacher_sha256.cpu()):
            raise UserError(
                f"{self.teacher.where} is not the teacher that this run began with: its weights differ. Give that one "
                "(of a run that has gone on, the checkpoint), or another out= for a new run."
            )
        return super().load_state_dict(state_dict, *args, **kwargs)


@torch.no_grad()
def output_widths(encoder: Encoder, what: str) -> list[int]:
    """Channels of its feature and of its map, found by trying: families differ. Leaves it in its mode. Raises
    UserError for a model that does not take images of its size."""
    training, (h, w) = encoder.training, encoder.image_size
    try:
        found = encoder.eval().feature_and_map(torch.zeros(1, encoder.in_chans, h, w))
        return [part.shape[-1] for part in found]
    except UserError:
        raise
    except Exception as error:  # timm's families refuse sizes in many ways
        raise UserError(
            f"{encoder.architecture}, {what}, cannot take images of {h}x{w} pixels ({first_line(error)}): change "
            "data.image_size or objective.teacher_size."
        ) from error
    finally:
        encoder.train(training)


def resample(tokens: Tensor, grid: tuple[int, ...]) -> Tensor:
    """[B, h, w, D] -> [B, *grid, D], bilinear, with antialiasing to a smaller grid."""
    if tokens.shape[1:3] == grid:
        return tokens
    return F.interpolate(tokens.permute(0, 3, 1, 2), grid, mode="bilinear", antialias=True).permute(0, 2, 3, 1)
