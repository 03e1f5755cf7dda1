"""SimMIM: put a token in the place of large squares of an image, predict their pixels by one linear layer.

Xie et al., "SimMIM: A Simple Framework for Masked Image Modeling", CVPR 2022 (arXiv 2111.09886), for plain ViTs. No
part of sslvit: an example of a method in one file, which the tests use from a folder outside the package.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sslvit import data
from sslvit.data.crops import Crop, Views
from sslvit.errors import UserError, check_share
from sslvit.model import factory, masks
from sslvit.model.encoder import Encoder, patchify
from sslvit.objectives import Objective


@dataclass
class Config:
    mask_ratio: float = 0.6  # share of the squares that is hidden
    mask_size: int = 32  # pixels, the side of a square
    crop_scale: tuple[float, float] = (0.67, 1.0)  # share of the image's area


# Of the released code: a learning rate of 1e-4 for 512 images.
DEFAULTS = {
    "epochs": 800,
    "global_batch_size": 2048,
    "optim": {"base_lr": 5e-5, "warmup_epochs": 10, "weight_decay": 0.05, "betas": (0.9, 0.999), "clip": 5.0},
}
SMALL = {"mask_size": 8}


def views(config: Config, data_config: data.Config) -> Views:
    """One crop and a flip (section 4.1)."""
    return {"image": [Crop(data.image_size(data_config), config.crop_scale, interpolation="bilinear")]}


def build(
    config: Config, model: factory.Config, data_config: data.Config, steps_per_epoch: int, steps: int
) -> "SimMIM":
    check_share("objective.", config, "crop_scale")
    encoder = factory.create(model, data.image_size(data_config), data_config.in_chans)
    if not encoder.is_vit:
        raise UserError(f"method=my_simmim needs a plain ViT (vit_*, deit_*), not {model.name}.")
    if any(config.mask_size % side for side in encoder.patch_size) or any(
        side % config.mask_size for side in encoder.image_size
    ):
        raise UserError(f"objective.mask_size={config.mask_size} must be whole patches, and the image whole squares.")
    return SimMIM(config, encoder)


def hidden(config: Config, encoder: Encoder, key: Tensor) -> Tensor:
    """[B] -> [B, N] bool: the hidden patches: random squares of the paper, given in patches (section 3.2)."""
    (h, w), (p, q) = encoder.image_size, encoder.patch_size
    squares = h // config.mask_size, w // config.mask_size
    number = math.ceil(math.prod(squares) * config.mask_ratio)
    mask = masks.from_indices(masks.random_order(key, math.prod(squares))[:, :number], math.prod(squares))
    return masks.enlarge(mask, squares, (config.mask_size // p, config.mask_size // q))


class SimMIM(Objective):
    def __init__(self, config: Config, encoder: Encoder) -> None:
        super().__init__()
        self.config, self.encoder = config, encoder
        encoder.pool = "mean"
        self.mask_token = nn.Parameter(torch.zeros(1, 1, encoder.width))
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        self.head = nn.Linear(encoder.width, encoder.in_chans * math.prod(encoder.patch_size))

    def forward(self, views: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """{"key": [B], "image": [1, B, C, H, W] normalised} -> the mean absolute error of hidden pixels (section
        3.4)."""
        images, mask = views["image"][0], hidden(self.config, self.encoder, views["key"])
        tokens = self.encoder(images, replace=(mask, self.mask_token))
        error = (self.head(tokens.patches).float() - patchify(images, self.encoder.patch_size)).abs().mean(dim=-1)
        return {"loss": (error * mask).sum() / mask.sum()}

    def exported_encoder(self) -> Encoder:
        return self.encoder
