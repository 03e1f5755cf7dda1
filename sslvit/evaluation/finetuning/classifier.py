"""The classifier: a pretrained encoder and a linear head as one timm model, with a learning rate for each layer."""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import timm
import torch
from timm.layers import resample_abs_pos_embed
from timm.models import group_parameters
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ... import rng
from ...errors import UserError
from ...model.encoder import Encoder, Pool
from ...model.factory import check_patches
from ...pretrained import Pretrained
from ..probes import mean_and_std

HEAD_STD = 2e-5  # of the head's first weights, as in MAE's released fine-tuning: all classes begin nearly equal
POOLING = {"cls": {"global_pool": "token", "fc_norm": False}, "mean": {"global_pool": "avg", "fc_norm": False}}


class Classifier(nn.Module):
    """Encoder, pooling and head. `encoder.model` is a plain timm model with `num_classes`. After `fold` it computes the
    same as this."""

    shift: Tensor  # [D], of the features that the head sees: (x - shift) * scale
    scale: Tensor

    def __init__(self, encoder: Encoder, model_args: dict[str, Any]) -> None:
        """model_args: all arguments of `timm.create_model` except in_chans and num_classes."""
        super().__init__()
        self.encoder, self.model_args = encoder, model_args
        width = self.head.in_features
        self.register_buffer("shift", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))

    @property
    def model(self) -> Any:  # of any timm family
        return self.encoder.model

    @property
    def head(self) -> nn.Linear:
        return self.model.get_classifier()

    @property
    def image_size(self) -> tuple[int, int]:
        return self.encoder.image_size

    def feature_dim(self, pool: Pool | None = None) -> int:
        return self.head.out_features

    def pooled(self, images: Tensor, pools: Sequence[Pool]) -> dict[Pool, Tensor]:
        """The outputs in the place of an encoder's features, for `features.extract`."""
        return {pool: self._outputs(images) for pool in pools}

    def forward(self, images: Tensor, key: Tensor | None = None) -> Tensor:
        """[B, C, H, W] normalised -> [B, outputs]. key: [B] int64 of the images, for drop path in training."""
        return self._outputs(images, key)

    def _outputs(self, images: Tensor, key: Tensor | None = None) -> Tensor:  # accelerate puts another forward in place
        x = self.encoder.features(images, key=key)
        x = self.model.fc_norm(x) if self.encoder.is_vit else x
        return self.head((x - self.shift) * self.scale)

    @torch.no_grad()
    def standardise(self, features: Tensor) -> None:
        """Give these features, [N, D] of the encoder before any fc_norm, mean 0 and standard deviation 1 for the head.

        The linear probe does the same. MAE's features are nearly alike for all images: a head learns from them slowly,
        and bf16 rounds most of the difference away. Shift and scale are not trained.
        """
        if self.encoder.is_vit:
            features = self.model.fc_norm(features.to(self.shift.device))
        mean, std = mean_and_std(features)
        self.shift.copy_(mean)
        self.scale.copy_(1 / std)

    @torch.no_grad()
    def fold(self) -> None:
        """Put shift and scale into the weights of the head. The outputs stay the same."""
        self.head.weight.mul_(self.scale)
        self.head.bias.sub_(self.head.weight @ self.shift)
        self.shift.zero_()
        self.scale.fill_(1.0)


def build_classifier(
    subject: Pretrained, pool: Pool, num_outputs: int, image_size: tuple[int, int] | None, drop_path: float,
    fresh_norm: bool, seed: int,
) -> Classifier:  # fmt: skip
    """The pretrained weights in a new timm model with a head, stochastic depth and an image size. Raises UserError.

    fresh_norm: normalise after the mean instead of before it, by a new layer. The pretrained final norm is left out
    (He et al., appendix A.2, and its code).

    timm's bicubic antialiased resampling fits position embeddings to the new grid, fixed sine-cosine tables too. A
    table computed for a larger grid would have positions that the blocks have never seen. MAE's code resamples too,
    without antialiasing and with a slightly different cubic kernel.
    """
    old, size = subject.encoder, image_size or subject.encoder.image_size
    assert isinstance(old, Encoder)
    args = dict(old.model_args)
    if old.is_vit:
        check_patches(old.patch_size, size)
        args |= {"img_size": list(size), **POOLING[pool]}
    torch.manual_seed(int(rng.fold_in(seed, "head")))
    model = _create(old, args, num_outputs, drop_path)
    weights = dict(old.model.state_dict())
    if old.is_vit and old.model.pos_embed is not None:
        num_prefix = 0 if model.no_embed_class else model.num_prefix_tokens
        weights["pos_embed"] = resample_abs_pos_embed(
            weights["pos_embed"], model.patch_embed.grid_size, old.model.patch_embed.grid_size, num_prefix
        )
    head = model.get_classifier()
    if not isinstance(head, nn.Linear):
        raise UserError(f"{old.architecture} has no single linear head, which fine-tuning needs: use another model.")
    missing, unexpected = model.load_state_dict(weights, strict=False)
    own = {name for name, p in model.named_parameters() if any(p is q for q in head.parameters())}
    if unexpected or not set(missing) <= own:
        raise UserError(f"The weights of {subject.name} do not fit {old.architecture} with a head: {missing[:3]}.")
    encoder = Encoder(model, size, old.in_chans, old.architecture, dict(old.model_args))
    encoder.pool = pool
    classifier = Classifier(encoder, args).eval()
    if fresh_norm:
        model.fc_norm, model.norm = deepcopy(model.norm), nn.Identity()
        model.fc_norm.reset_parameters()
        args["fc_norm"] = True
    _try(classifier)
    nn.init.trunc_normal_(head.weight, std=HEAD_STD)
    nn.init.zeros_(head.bias)
    return classifier


def _create(old: Encoder, args: dict[str, Any], num_outputs: int, drop_path: float) -> Any:
    args = {**args, "num_classes": num_outputs, "in_chans": old.in_chans}
    try:
        return timm.create_model(old.architecture, **{**args, "drop_path_rate": drop_path})
    except TypeError as error:  # some families do not have this argument
        if drop_path:
            raise UserError(f"timm cannot make {old.architecture} with drop_path={drop_path:g}: {error}.") from error
    return timm.create_model(old.architecture, **args)


@torch.no_grad()
def _try(classifier: Classifier) -> None:
    """Raises UserError unless the model takes images of this size, and timm's own forward pass gives the same."""
    h, w = classifier.image_size
    images = torch.randn(2, classifier.encoder.in_chans, h, w, generator=torch.Generator().manual_seed(0))
    name = classifier.encoder.architecture
    try:
        ours, theirs = classifier(images), classifier.model(images)
    except (RuntimeError, ValueError, AssertionError, TypeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f"{name} cannot take images of {h}x{w}: {reason}. Use its own image_size.") from error
    if not torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item()):
        raise UserError(
            f"{name} has layers between its pooled features and its head, which fine-tuning does not support: use "
            "another model."
        )


def layer_ids(model: Any) -> dict[str, int]:
    """{parameter: its layer}: 0 for the stem, then the blocks, and the head with its norm last.

    These are timm's groups, with one exception: a ViT's final `norm` belongs to the head, as in MAE's released code.
    timm gives it to the last block.
    """
    if not hasattr(model, "group_matcher"):
        raise UserError(f"timm does not say what the layers of {type(model).__name__} are: use another model.")
    ids = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
    last = max(ids.values())
    if isinstance(model, VisionTransformer):
        ids |= {name: last for name in ids if name.startswith("norm.")}
    return ids


def parameter_groups(model: Any, layer_decay: float, weight_decay: float, head_lr: float = 1.0) -> list[dict[str, Any]]:
    """Groups for AdamW with "lr_scale": layer_decay^(last layer - layer), for the head times head_lr.

    No weight decay for one-dimensional parameters and what the model lists (a ViT's positions and tokens), as in MAE's
    released fine-tuning, which follows BEiT.
    """
    ids = layer_ids(model)
    last, undecayed = max(ids.values()), set(getattr(model, "no_weight_decay", set)())
    head = list(model.get_classifier().parameters())
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        scale = layer_decay ** (last - ids[name])
        if any(parameter is p for p in head):
            scale *= head_lr
        decay = 0.0 if parameter.ndim <= 1 or name in undecayed else weight_decay
        empty = {"params": [], "lr_scale": scale, "weight_decay": decay}
        groups.setdefault((scale, decay), empty)["params"].append(parameter)
    return list(groups.values())


def trained_layers(epoch: float, num_layers: int, head_epochs: float, unfreeze_epochs: float) -> int:
    """How many layers are trained at this epoch, counted from the head down.

    Only the head for head_epochs, then one more block every unfreeze_epochs until all are trained (gradual unfreezing:
    Howard and Ruder, ACL 2018, section 3.3; the head first: Kumar et al., ICLR 2022).
    """
    if epoch < head_epochs:
        return 1
    if unfreeze_epochs <= 0:
        return num_layers
    return min(num_layers, 2 + int((epoch - head_epochs) / unfreeze_epochs))


def freeze(classifier: Classifier, trained: int) -> None:
    """Train the last `trained` layers. The others are frozen, and their modules (BatchNorm) in evaluation mode."""
    ids = layer_ids(classifier.model)
    first = max(ids.values()) + 1 - trained
    classifier.train()
    for name, parameter in classifier.model.named_parameters():
        parameter.requires_grad_(ids[name] >= first)
    for module in classifier.modules():
        parameters = list(module.parameters())
        if parameters and not any(p.requires_grad for p in parameters):
            module.eval()
