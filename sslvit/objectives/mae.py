"""MAE: hide most patches, encode the rest, decode all, predict the pixels of what was hidden.

He et al., "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022 (arXiv 2111.06377). Sections below are of that
paper. Losses and gradients are those of the released code, with less work: only kept patches are embedded, only hidden
ones predicted, and the decoder gets tokens in the order [kept, hidden], which does not matter to attention.
"""

import math
from functools import partial
from typing import Any

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from .. import data
from ..data.crops import Crop, Views
from ..errors import UserError, check_limits, check_share
from ..model import blocks, factory, masks
from ..model.encoder import Encoder, patchify, sincos, take, unpatchify, xavier
from ..model.heads import differences, koleo
from ..model.objective import Objective
from .keys.mae import DEFAULTS as DEFAULTS
from .keys.mae import PRESETS as PRESETS
from .keys.mae import SMALL as SMALL
from .keys.mae import WORKS as WORKS
from .keys.mae import Config as Config


def views(config: Config, data_config: data.Config) -> Views:
    """One crop and a flip, no photometric augmentation (section 4.1, "Data augmentation")."""
    crop = Crop(
        data.image_size(data_config), config.crop_scale, flip_prob=config.flip_prob,
        vertical_flip_prob=config.vertical_flip_prob, rotate_prob=config.rotate_prob,
    )  # fmt: skip
    return {"image": [crop]}


def build(config: Config, model: factory.Config, data_config: data.Config, steps_per_epoch: int, steps: int) -> "MAE":
    """Raises UserError for settings and models that cannot work."""
    check_limits("objective.", config)
    check_share("objective.", config, "crop_scale")
    if config.decoder_width % config.decoder_heads or config.decoder_width % 4:
        raise UserError(
            f"objective.decoder_width={config.decoder_width} must be divisible by decoder_heads="
            f"{config.decoder_heads}, and by 4 for the position embedding."
        )
    encoder = factory.create(model, data.image_size(data_config), data_config.in_chans)
    if reason := encoder.why_tokens_cannot_be_dropped():
        raise UserError(
            f"method=mae drops hidden patches before the encoder, and {model.name} cannot do without them: {reason}. "
            "Use a plain ViT (vit_*, deit_*) or method=dino."
        )
    return MAE(config, encoder)


class MAE(Objective):
    takes_anchor = True

    def __init__(self, config: Config, encoder: Encoder) -> None:
        super().__init__()
        self.config, self.encoder = config, encoder
        encoder.pool = "mean"
        self.patch_size, grid = encoder.patch_size, encoder.grid()
        self.num_patches = math.prod(grid)
        self.num_kept = masks.num_kept(self.num_patches, config.mask_ratio)
        if not 0 < self.num_kept < self.num_patches:
            raise UserError(
                f"objective.mask_ratio={config.mask_ratio} leaves {self.num_kept} of {self.num_patches} patches "
                "visible: at least one must be visible and one hidden."
            )
        num_prefix, width = encoder.model.num_prefix_tokens, config.decoder_width

        self.decoder_embed = nn.Linear(encoder.width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.decoder_pos_embed = nn.Parameter(sincos(width, grid, num_prefix), requires_grad=False)
        norm: Any = partial(nn.LayerNorm, eps=1e-6)
        self.decoder_blocks = nn.ModuleList(
            Block(width, config.decoder_heads, mlp_ratio=4, qkv_bias=True, norm_layer=norm)
            for _ in range(config.decoder_depth)
        )
        self.decoder_norm = norm(width)
        self.decoder_pred = nn.Linear(width, math.prod(self.patch_size) * encoder.in_chans)
        xavier(self)
        encoder.init_xavier_sincos("method=mae")
        encoder.model.pos_embed.requires_grad_(False)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, views: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """{"key": [B], random keys of the images, "image": [1, B, C, H, W] normalised} -> {"loss": scalar, ...}."""
        return self.loss(views["image"][0], masks.random_order(views["key"], self.num_patches))

    def loss(self, images: Tensor, order: Tensor) -> dict[str, Tensor]:
        """[B, C, H, W], [B, N] -> mean squared error over the pixels of hidden patches (section 3), a scalar.

        koleo_weight spreads the exported feature, the mean of the (kept) patches, over the sphere. Without it the means
        lie in a few directions (Zhang et al., 2022, arXiv 2210.08344, who add a uniformity term).
        """
        keep, hide = masks.split(order, self.num_kept)
        latent = self.encode(images, keep)
        prediction = self.predict(self.decode(latent, keep, hide, hidden_only=True))
        loss = (prediction.float() - take(self.target(images), hide)).square().mean()
        features = latent[:, -keep.shape[1] :].float().mean(dim=1)
        values = {"loss": loss, **differences(images, features)}
        if not (self.config.koleo_weight or self.anchor):
            return values
        values["reconstruction"] = loss
        if self.config.koleo_weight:
            values["koleo"] = koleo(features.unsqueeze(0))
            values["loss"] = loss + self.config.koleo_weight * values["koleo"]
        if self.anchor:
            self.anchor.add(values, features, lambda start: start.features(images, keep=keep))
        return values

    def encode(self, images: Tensor, keep: Tensor) -> Tensor:
        """[B, C, H, W], [B, K] -> [B, P + K, D]: prefix tokens and kept patches, normalised ("MAE encoder")."""
        return torch.cat(self.encoder(images, keep=keep), dim=1)

    def decode(self, latent: Tensor, keep: Tensor, hide: Tensor, hidden_only: bool = False) -> Tensor:
        """[B, P + K, D] -> [B, P + N, width] in the order prefix, kept, hidden, or the hidden ones alone ("MAE
        decoder")."""
        x = self.decoder_embed(latent)
        x = torch.cat([x, self.mask_token.to(x.dtype).expand(len(x), hide.shape[1], -1)], dim=1)
        num_prefix = latent.shape[1] - keep.shape[1]
        prefix, patches = self.decoder_pos_embed[:, :num_prefix], self.decoder_pos_embed[0, num_prefix:]
        positions = patches[torch.cat([keep, hide], dim=1)]
        x = x + torch.cat([prefix.expand(len(x), -1, -1), positions], dim=1)
        for block in self.decoder_blocks:
            rows = slice(-hide.shape[1], None) if hidden_only and block is self.decoder_blocks[-1] else None
            x = blocks.run(block, x, rows)
        return x

    def predict(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., p*q*C] pixels."""
        return self.decoder_pred(self.decoder_norm(x))

    def target(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, N, p*q*C], pixels of a patch in row, column, channel order ("Reconstruction target").

        norm_pix: normalised by the mean and the unbiased variance over all values of the patch, 1e-6 inside the root.
        """
        patches = patchify(images, self.patch_size, channels_last=True)
        if self.config.norm_pix:
            variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
            patches = (patches - mean) / (variance + 1e-6).sqrt()
        return patches

    def exported_encoder(self) -> Encoder:
        return self.encoder

    def set_steps(self, steps: int) -> bool:
        return True  # nothing here depends on it

    @torch.no_grad()
    def pictures(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        """The visible patches, and the hidden ones as predicted. With norm_pix the mean and the deviation of each
        hidden patch are those of the image: the model does not predict them."""
        images = views["image"][0]
        order = masks.random_order(views["key"], self.num_patches)
        keep, hide = masks.split(order, self.num_kept)
        patches = patchify(images, self.patch_size, True)
        predicted = self.predict(self.decode(self.encode(images, keep), keep, hide, hidden_only=True)).float()
        if self.config.norm_pix:
            variance, mean = torch.var_mean(take(patches, hide), dim=-1, keepdim=True)
            predicted = predicted * variance.add(1e-6).sqrt() + mean
        index = hide.unsqueeze(-1).expand_as(predicted)
        filled, grid = patches.scatter(1, index, predicted), self.encoder.grid()
        visible = patches.scatter(1, index, 0.0)
        restored = (unpatchify(part, self.patch_size, grid) for part in (visible, filled))
        return dict(zip(("what it sees", "what it predicts"), restored, strict=True))


def hidden(config: Config, encoder: Encoder, key: Tensor) -> Tensor:
    """[B] -> [B, N] bool, the patches that `forward` hides of the images with these keys."""
    num_patches = math.prod(encoder.grid())
    _, hide = masks.split(masks.random_order(key, num_patches), masks.num_kept(num_patches, config.mask_ratio))
    return masks.from_indices(hide, num_patches)
