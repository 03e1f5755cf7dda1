"""A timm model as an encoder: tokens of a plain ViT, with or without some of its patches, or pooled features of any
model."""

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import timm
import torch
import torch.nn.functional as F
from timm.layers import DropPath as TimmDropPath
from timm.layers import PatchEmbed, resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from . import blocks
from .blocks import DropPath
from .errors import UserError

Pool = Literal["cls", "mean", "cls+mean", "last4", "mean4", "pooled"]
BLOCKS = {"last4": 4, "mean4": 4}  # how many of the last blocks these features come from; the others from the last


@dataclass
class Config:
    name: str = "vit_small_patch16_224"  # a timm model; the size in its name does not bind, data.image_size does
    args: dict[str, Any] = field(default_factory=dict)  # more for timm.create_model: {patch_size: 4, reg_tokens: 4}
    grad_checkpointing: bool = False  # recompute blocks in the backward pass: less memory, a third more time


class Tokens(NamedTuple):
    """Normalised output tokens of a ViT."""

    prefix: Tensor  # [B, P, D]: class token first, then registers; P may be 0
    patches: Tensor  # [B, N, D], row by row; with keep: [B, K, D] in the order of keep


class Encoder(nn.Module):
    """Wraps a timm model made with `num_classes=0`. `model` stays a plain timm model: its weights are what is
    exported."""

    def __init__(
        self,
        model: nn.Module,
        image_size: tuple[int, int],
        in_chans: int,
        architecture: str,
        model_args: dict[str, Any],
    ) -> None:
        """architecture, model_args: what `timm.create_model` needs to make this model again, but for in_chans."""
        super().__init__()
        self.model = model
        self.image_size = image_size
        self.in_chans = in_chans
        self.architecture, self.model_args = architecture, model_args
        self.is_vit = _is_plain_vit(model)
        self.pool: Pool = "pooled" if not self.is_vit else "cls" if model.has_class_token else "mean"
        self._drop_paths = _take_over_drop_paths(model)

    @property
    def width(self) -> int:
        """Channels of one token, or of the pooled features of a model that is not a ViT."""
        return self.model.num_features if self.is_vit else self.model.head_hidden_size

    def feature_dim(self, pool: Pool | None = None) -> int:
        pool = pool or self.pool
        if pool in BLOCKS:
            return self.width * min(BLOCKS[pool], len(self.model.blocks))
        return self.width * (2 if pool == "cls+mean" else 1)

    def pools(self) -> tuple[Pool, ...]:
        """The ways in which its tokens can become one feature."""
        if not self.is_vit:
            return ("pooled",)
        return ("cls", "mean", "cls+mean", "last4", "mean4") if self.model.has_class_token else ("mean", "mean4")

    @property
    def patch_size(self) -> tuple[int, int]:
        return self.model.patch_embed.patch_size

    def grid(self, image_size: tuple[int, int] | None = None) -> tuple[int, int]:
        """(h, w) in pixels, the encoder's own by default -> (h, w) in patches."""
        h, w = image_size or self.image_size
        return h // self.patch_size[0], w // self.patch_size[1]

    def why_tokens_cannot_be_dropped(self) -> str | None:
        """None for a plain ViT, whose blocks treat patches as a set; else the reason, as part of a sentence."""
        if isinstance(self.model, VisionTransformer) and not self.is_vit:
            return f"{type(self.model).__name__} pools its tokens in a way of its own"
        if not self.is_vit:
            return f"{type(self.model).__name__} works on the whole grid of patches (windows, convolutions or pooling)"
        embed = self.model.patch_embed
        if not isinstance(embed, PatchEmbed) or embed.proj.kernel_size != embed.proj.stride:
            return f"its {type(embed).__name__} stem lets neighbouring patches see each other"
        return None

    def why_sizes_cannot_be_packed(self) -> str | None:
        """None if images of several sizes can pass the blocks together; else the reason, as part of a sentence."""
        if not self.is_vit:
            return f"{type(self.model).__name__} is not a plain ViT, which has one list of tokens"
        if not all(blocks.known(block) for block in self.model.blocks):
            return "its blocks are others than timm's Block with Attention, or drop attention weights"
        return None

    def forward(
        self, images: Tensor, keep: Tensor | None = None, key: Tensor | None = None, prefix_only: bool = False
    ) -> Tokens:
        """[B, C, H, W] float -> Tokens. Plain ViTs only.

        keep: [B, K] int64 patch indices: only these are embedded and encoded. key: [B] int64, needed for drop path.
        prefix_only: leave patches empty, which saves most of the last block. Without these, in float32, this equals
        `timm`'s `forward_features` bit for bit.
        """
        return self._tokens(self.model.norm(self._blocks(self._embed(images, keep), key, prefix_only)))

    def packed_features(self, images: list[Tensor], keys: list[Tensor], keep: list[Tensor | None]) -> Tensor:
        """What `features` gives for images of several sizes, below one another: for each [B, C, H, W], [B] and [B, K]
        or None -> [sum of B, feature_dim], equal but for the order of float additions.

        Each size is embedded by itself, then all tokens pass the blocks as one list (blocks.py): one call of each layer
        where `features` needs one for each size. Only where `why_sizes_cannot_be_packed` has no reason.
        """
        assert self.pool not in BLOCKS, "packed features come from the last block"
        vit, prefix_only = self.model, self._needs_prefix_only(self.pool)
        x, shapes = blocks.pack([self._embed(*each) for each in zip(images, keep, strict=True)])
        x = vit.norm(self._blocks(x, torch.cat(keys), prefix_only, shapes))
        if prefix_only:
            shapes = tuple((b, vit.num_prefix_tokens) for b, _ in shapes)
        return torch.cat([_pooled(self._tokens(part), self.pool) for part in blocks.unpack(x, shapes)])

    def last_blocks(self, images: Tensor, count: int) -> list[Tokens]:
        """[B, C, H, W] float -> Tokens after each of the last `count` blocks (all, if there are fewer), each through
        the final norm as in DINO's linear evaluation (section 4.1 and its code). Plain ViTs only."""
        vit = self.model
        x, found = self._embed(images, None), []
        for place, block in enumerate(vit.blocks):
            x = self._run(block, x, None, None)
            if place >= len(vit.blocks) - count:
                found.append(self._tokens(vit.norm(x)))
        return found

    def pooled(self, images: Tensor, pools: Sequence[Pool]) -> dict[Pool, Tensor]:
        """[B, C, H, W] float -> {pool: [B, feature_dim(pool)]}, all from one pass.

        last4: the class tokens of the last four blocks side by side, mean4: the means of their patches.
        """
        if not self.is_vit:
            return {pool: self.features(images, pool) for pool in pools}
        blocks = self.last_blocks(images, max(BLOCKS.get(pool, 1) for pool in pools))
        make = {
            "cls": lambda: blocks[-1].prefix[:, 0],
            "mean": lambda: blocks[-1].patches.mean(dim=1),
            "cls+mean": lambda: torch.cat([blocks[-1].prefix[:, 0], blocks[-1].patches.mean(dim=1)], dim=1),
            "last4": lambda: torch.cat([tokens.prefix[:, 0] for tokens in blocks], dim=1),
            "mean4": lambda: torch.cat([tokens.patches.mean(dim=1) for tokens in blocks], dim=1),
        }
        return {pool: make[pool]() for pool in pools}

    def features(
        self, images: Tensor, pool: Pool | None = None, key: Tensor | None = None, keep: Tensor | None = None
    ) -> Tensor:
        """[B, C, H, W] float -> [B, feature_dim]: class token, mean of the (kept) patches, or both, after the norm."""
        pool = pool or self.pool
        if not self.is_vit:
            for module in self._drop_paths:
                module.take(key)
            return self.model.forward_head(self.model.forward_features(images), pre_logits=True)
        if pool in BLOCKS:
            return self.pooled(images, (pool,))[pool]
        return _pooled(self(images, keep=keep, key=key, prefix_only=self._needs_prefix_only(pool)), pool)

    def positions(self, image_size: tuple[int, int]) -> tuple[Tensor | None, Tensor | None]:
        """Position embeddings of prefix tokens [1, P, D] and of patches [1, N, D] for images of (h, w) pixels."""
        vit = self.model
        if vit.pos_embed is None:
            return None, None
        num_prefix = 0 if vit.no_embed_class else vit.num_prefix_tokens
        table = resample_abs_pos_embed(
            vit.pos_embed, self.grid(image_size), old_size=vit.patch_embed.grid_size, num_prefix_tokens=num_prefix
        )
        return (table[:, :num_prefix] if num_prefix else None), table[:, num_prefix:]

    def takes_sincos_positions(self) -> bool:
        """Whether it has a position embedding that `sincos` can fill."""
        return self.is_vit and self.model.pos_embed is not None and self.width % 4 == 0

    @torch.no_grad()
    def initialise_as_mae(self) -> None:
        """Xavier uniform weights and sin-cos positions, as MAE starts its encoder (He et al., 2022, appendix A.1)."""
        vit = self.model
        vit.pos_embed.copy_(sincos(self.width, self.grid(), 0 if vit.no_embed_class else vit.num_prefix_tokens))
        xavier(self)
        embed = vit.patch_embed.proj.weight
        nn.init.xavier_uniform_(embed.view(len(embed), -1))  # its bias keeps the convolution's default
        for token in (vit.cls_token, vit.reg_token):
            if token is not None:
                nn.init.normal_(token, std=0.02)

    def _needs_prefix_only(self, pool: Pool) -> bool:
        return pool == "cls" and self.training

    def _embed(self, images: Tensor, keep: Tensor | None) -> Tensor:
        """[B, C, H, W] -> [B, P + N, D], or [B, P + K, D] with keep: what the first block gets."""
        vit = self.model
        x = vit._pos_embed(vit.patch_embed(images)) if keep is None else self._embed_kept(images, keep)
        return vit.norm_pre(vit.patch_drop(x))

    def _blocks(self, x: Tensor, key: Tensor | None, prefix_only: bool, shapes: blocks.Shapes | None = None) -> Tensor:
        """[B, N, D], or packed [T, D] -> the same after all blocks, before the norm."""
        vit = self.model
        for block in vit.blocks:
            rows = slice(0, vit.num_prefix_tokens) if prefix_only and block is vit.blocks[-1] else None
            if vit.grad_checkpointing and self.training:
                x = checkpoint(self._run, block, x, key, rows, shapes, use_reentrant=False)
            else:
                x = self._run(block, x, key, rows, shapes)
        return x

    def _tokens(self, x: Tensor) -> Tokens:
        """[B, P + N, D] -> its prefix and its patches."""
        return Tokens(x[:, : self.model.num_prefix_tokens], x[:, self.model.num_prefix_tokens :])

    def _embed_kept(self, images: Tensor, keep: Tensor) -> Tensor:
        """[B, C, H, W], [B, K] -> [B, P + K, D]: the embedding of `timm`'s ViT for the kept patches only."""
        vit = self.model
        if type(vit)._pos_embed is not VisionTransformer._pos_embed:  # e.g. a distillation token: embed all, then pick
            x = vit._pos_embed(vit.patch_embed(images))
            prefix, patches = x[:, : vit.num_prefix_tokens], x[:, vit.num_prefix_tokens :]
            return torch.cat([prefix, take(patches, keep)], dim=1)
        embed = vit.patch_embed
        patches = take(patchify(images, embed.patch_size), keep)
        x = embed.norm(F.linear(patches, embed.proj.weight.flatten(1), embed.proj.bias))
        prefix_positions, positions = self.positions(tuple(images.shape[-2:]))
        if positions is not None:
            x = x + take(positions.expand(len(x), -1, -1), keep)
        prefix = [token for token in (vit.cls_token, vit.reg_token) if token is not None]
        if prefix:
            tokens = torch.cat(prefix, dim=1)
            if prefix_positions is not None:
                tokens = tokens + prefix_positions
            x = torch.cat([tokens.expand(len(x), -1, -1).to(x.dtype), x], dim=1)
        return vit.pos_drop(x)

    @staticmethod
    def _run(
        block: nn.Module, x: Tensor, key: Tensor | None, rows: slice | None, shapes: blocks.Shapes | None = None
    ) -> Tensor:
        # Here and not once a forward: a recomputed block needs its own crops' keys.
        drop_paths = [module for module in block.modules() if isinstance(module, DropPath)]
        if drop_paths and shapes is not None and key is not None:
            key = blocks.token_keys(key, shapes, rows)
        for module in drop_paths:
            module.take(key)
        return blocks.run(block, x, rows, shapes)


def _pooled(tokens: Tokens, pool: Pool) -> Tensor:
    """cls, mean or cls+mean of the tokens of the last block."""
    if pool == "cls":
        return tokens.prefix[:, 0]
    if pool == "mean":
        return tokens.patches.mean(dim=1)
    return torch.cat([tokens.prefix[:, 0], tokens.patches.mean(dim=1)], dim=1)


def sincos(width: int, grid: tuple[int, int], num_prefix: int) -> Tensor:
    """[1, num_prefix + h*w, width] fixed 2-D sine-cosine embedding; prefix tokens have zeros (section 3).

    Half of the channels encode the column, then half the row, each as all sines followed by all cosines of
    position / 10000^(k / (width / 4)). That the column comes first is the released code's order: transposing it would
    turn released checkpoints by a quarter.
    """
    frequencies = 10000 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    h, w = grid

    def code(position: Tensor) -> Tensor:
        angle = position.double().unsqueeze(1) * frequencies
        return torch.cat([angle.sin(), angle.cos()], dim=1)

    column, row = torch.arange(w).repeat(h), torch.arange(h).repeat_interleave(w)
    table = torch.cat([code(column), code(row)], dim=1)
    return torch.cat([torch.zeros(num_prefix, width), table]).float().unsqueeze(0)


def xavier(module: nn.Module) -> None:
    """Xavier uniform for all linear layers, biases of 0. The qkv matrix is filled as one (3D, D) matrix, which makes q,
    k and v 0.707 times what filling them one by one would, as in MAE's released code."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def patchify(images: Tensor, patch_size: tuple[int, int], channels_last: bool = False) -> Tensor:
    """[B, C, H, W] -> [B, N, C*p*q], pixels of a patch in channel, row, column order (that of a convolution's weight),
    or with channels_last in row, column, channel order (that of MAE's targets)."""
    b, c, h, w = images.shape
    p, q = patch_size
    grid = images.reshape(b, c, h // p, p, w // q, q)
    order = (0, 2, 4, 3, 5, 1) if channels_last else (0, 2, 4, 1, 3, 5)
    return grid.permute(order).reshape(b, (h // p) * (w // q), p * q * c)


def take(tokens: Tensor, index: Tensor) -> Tensor:
    """[B, N, D], [B, K] int64 -> [B, K, D]."""
    return tokens.gather(1, index.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def create(
    config: Config, image_size: tuple[int, int], in_chans: int = 3, drop_path: float = 0.0, pretrained: bool = False
) -> Encoder:
    """Build the encoder of a configuration, initialised as timm does, or with the weights that timm fetches."""
    places = {
        "img_size": "data.image_size",
        "in_chans": "data.in_chans",
        "drop_path_rate": "objective.drop_path (DINO)",
    }
    for name, place in places.items():
        if name in config.args:
            raise UserError(f"model.args has {name}={config.args[name]}: set {place} instead.")
    for key, value in config.args.items():
        if value is None:  # timm would pass over it in silence
            hint = f"; write {{{key.replace(':', ': ', 1)}}} with a space after the colon" if ":" in key else ""
            raise UserError(f"model.args has {key} without a value{hint}.")
    extra = {"in_chans": in_chans, "pretrained": pretrained}
    if drop_path:
        extra["drop_path_rate"] = drop_path
    model, args = _create_model(config.name, dict(config.args), image_size, extra)
    if isinstance(model, VisionTransformer):
        check_patches(model.patch_embed.patch_size, image_size)
        if model.attn_pool is not None or not isinstance(model.fc_norm, nn.Identity):
            # Pooling by a norm or an attention of its own would leave the tokens without their final norm.
            pooling = {"global_pool": "token"} if model.has_class_token else {"global_pool": "avg", "fc_norm": False}
            model, args = _create_model(config.name, config.args | pooling, image_size, extra)
    if config.grad_checkpointing:
        if drop_path and not isinstance(model, VisionTransformer):
            raise UserError(
                f"model.grad_checkpointing with drop path {drop_path} works for plain ViTs only, not {config.name}: "
                "set objective.drop_path=0 or model.grad_checkpointing=false."
            )
        model.set_grad_checkpointing(True)
    if not drop_path:  # some families have it by default, as Swin 0.1
        for module in model.modules():
            if isinstance(module, TimmDropPath):
                module.drop_prob = 0.0
    return Encoder(model, image_size, in_chans, config.name.split(".")[0], args)


def _create_model(
    name: str, args: dict[str, Any], image_size: tuple[int, int], extra: dict[str, Any]
) -> tuple[nn.Module, dict[str, Any]]:
    """timm.create_model with whatever way the family has to be told an image size, or to accept several: the model, and
    args with that way."""
    base = name.split(".")[0]
    if not timm.is_model(base):
        near = difflib.get_close_matches(base, timm.list_models(), n=3)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise UserError(f"{name} is not a model of timm {timm.__version__}.{hint}")
    size = {"img_size": list(image_size)}
    for sizing in ({**size, "dynamic_img_size": True}, {**size, "strict_img_size": False}, size, {}):
        try:
            model = timm.create_model(name if extra["pretrained"] else base, num_classes=0, **extra, **args, **sizing)
            return model, {**args, **sizing}
        except TypeError as error:
            if not any(key in str(error) for key in sizing):
                raise UserError(f"timm cannot make {name} with {args}: {error}.") from error
        except (AssertionError, ValueError, RuntimeError) as error:
            raise UserError(f"timm cannot make {name} for images of {image_size} with {args}: {error}.") from error
    raise AssertionError("the last attempt has no sizing argument to blame")


def _is_plain_vit(model: nn.Module) -> bool:
    """Whether its output is the normalised tokens that our pooling takes: no pooling of its own, as DeiT's distilled
    models, an attention pool, or a norm after the mean have."""
    return (
        isinstance(model, VisionTransformer)
        and type(model).forward_head is VisionTransformer.forward_head
        and model.attn_pool is None
        and isinstance(model.fc_norm, nn.Identity)
    )


def check_patches(patch_size: tuple[int, int], image_size: tuple[int, int]) -> None:
    for side, patch in zip(image_size, patch_size, strict=True):
        if side % patch or side < patch:
            near = sorted({max(patch, side // patch * patch), math.ceil(side / patch) * patch})
            raise UserError(
                f"An image size of {image_size[0]}x{image_size[1]} is not divisible by the patch size {patch}: "
                f"use {' or '.join(map(str, near))}, or another patch_size."
            )


def _take_over_drop_paths(model: nn.Module) -> list[DropPath]:
    found: list[DropPath] = []
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, TimmDropPath):
                found.append(DropPath(child.drop_prob, place=len(found)))
                setattr(parent, name, found[-1])
    return found
