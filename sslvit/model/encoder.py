"""A timm model as an encoder. A plain ViT gives tokens, of all patches or of some; any model gives pooled features."""

import itertools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import DropPath as TimmDropPath
from timm.layers import PatchEmbed, resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import UserError
from . import blocks
from .blocks import DropPath

Pool = Literal["cls", "mean", "cls+mean", "last4", "mean4", "pooled"]
NUM_BLOCKS = {"last4": 4, "mean4": 4}  # features of several of the last blocks; all others are of the last one
Resampling = Literal["timm", "published"]  # of position embeddings, see `resample_positions`


class Tokens(NamedTuple):
    """Normalised output tokens of a ViT."""

    prefix: Tensor  # [B, P, D]: class token first, then registers; P may be 0
    patches: Tensor  # [B, N, D], row by row; with keep: [B, K, D] in the order of keep


class Encoder(nn.Module):
    """Wraps a timm model made with `num_classes=0`. `model` stays a plain timm model: its weights are exported."""

    model: Any  # each family has attributes of its own

    def __init__(
        self, model: nn.Module, image_size: tuple[int, int], in_chans: int, architecture: str,
        model_args: dict[str, Any],
    ) -> None:  # fmt: skip
        """architecture, model_args: with in_chans, what `timm.create_model` needs to make this model again."""
        super().__init__()
        self.model, self.image_size, self.in_chans = model, image_size, in_chans
        self.architecture, self.model_args = architecture, model_args
        self.is_vit = _is_plain_vit(model)
        # Channels of one token, or of the pooled features of a model that is not a ViT.
        self.width: int = self.model.num_features if self.is_vit else self.model.head_hidden_size
        self.pool: Pool = self.pools()[0]
        replace_drop_paths(model)

    def feature_dim(self, pool: Pool | None = None) -> int:
        pool = pool or self.pool
        if pool in NUM_BLOCKS:
            return self.width * min(NUM_BLOCKS[pool], len(self.model.blocks))
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
        name = type(self.model).__name__
        if not isinstance(self.model, VisionTransformer):
            return f"{name} works on the whole grid of patches (windows, convolutions or pooling)"
        if not self.is_vit:
            return f"{name} pools its tokens in a way of its own"
        embed: Any = self.model.patch_embed
        if not isinstance(embed, PatchEmbed) or embed.proj.kernel_size != embed.proj.stride:
            return f"its {type(embed).__name__} stem lets neighbouring patches see each other"
        return None

    def forward(
        self, images: Tensor, keep: Tensor | None = None, replace: tuple[Tensor, Tensor] | None = None,
        key: Tensor | None = None, prefix_only: bool = False, resampling: Resampling = "timm",
    ) -> Tokens:  # fmt: skip
        """[B, C, H, W] float -> Tokens. Plain ViTs only.

        keep: [B, K] int64, the only patches that are embedded and encoded (MAE).
        replace: a mask [B, N] bool and a token [1, 1, D], which replaces the embeddings of patches where the mask is
        True, before positions are added (SimMIM, iBOT).
        key: [B] int64, needed for drop path.
        prefix_only: leave patches empty, which saves most of the last block.
        resampling: of position embeddings for images of another size than the encoder's own, see `resample_positions`.

        Without these, in float32, this equals timm's `forward_features` bit for bit.
        """
        vit: VisionTransformer = self.model
        x = self._embed(images, keep, replace, resampling)
        for block in vit.blocks:
            rows = slice(0, vit.num_prefix_tokens) if prefix_only and block is vit.blocks[-1] else None
            if vit.grad_checkpointing and self.training:
                x = checkpoint(_run, block, x, key, rows, use_reentrant=False)
            else:
                x = _run(block, x, key, rows)
        return self._tokens(vit.norm(x))

    def features(
        self, images: Tensor, pool: Pool | None = None, key: Tensor | None = None, keep: Tensor | None = None,
        resampling: Resampling = "timm",
    ) -> Tensor:  # fmt: skip
        """[B, C, H, W] float -> [B, feature_dim]: class token, mean of the (kept) patches, or both, after the norm."""
        pool = pool or self.pool
        if not self.is_vit:
            _set_keys(self.model, key)
            return self.model.forward_head(self.model.forward_features(images), pre_logits=True)
        if pool in NUM_BLOCKS:
            return self.pooled(images, (pool,))[pool]
        prefix_only = pool == "cls" and self.training
        return _pooled([self(images, keep, key=key, prefix_only=prefix_only, resampling=resampling)], pool)

    def pooled(self, images: Tensor, pools: Sequence[Pool]) -> dict[Pool, Tensor]:
        """[B, C, H, W] float -> {pool: [B, feature_dim(pool)]}, all from one pass.

        last4: the class tokens of the last four blocks side by side, mean4: the means of their patches.
        """
        if not self.is_vit:
            return {pool: self.features(images, pool) for pool in pools}
        last = self.last_blocks(images, max(NUM_BLOCKS.get(pool, 1) for pool in pools))
        return {pool: _pooled(last, pool) for pool in pools}

    def last_blocks(self, images: Tensor, count: int) -> list[Tokens]:
        """[B, C, H, W] float -> Tokens after each of the last `count` blocks (all, if there are fewer), each through
        the final norm as in DINO's linear evaluation (section 4.1 and its code). Plain ViTs only."""
        vit: VisionTransformer = self.model
        x, found = self._embed(images), []
        for i, block in enumerate(vit.blocks):
            x = _run(block, x)
            if i >= len(vit.blocks) - count:
                found.append(self._tokens(vit.norm(x)))
        return found

    def feature_and_map(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """[B, C, H, W] float -> [B, feature_dim] and [B, h, w, D], its tokens as a map, from one pass. Any model.
        Raises UserError for one that gives no map."""
        h, w = images.shape[2:]
        if self.is_vit:
            tokens = self(images)
            return _pooled([tokens], self.pool), tokens.patches.unflatten(1, self.grid((h, w)))
        x = self.model.forward_features(images)
        pooled = self.model.forward_head(x, pre_logits=True)
        if x.ndim == 3 and hasattr(self.model, "patch_embed"):  # other ViTs: prefix tokens first
            x, grid = x[:, getattr(self.model, "num_prefix_tokens", 0) :], self.grid((h, w))
            if x.shape[1] == grid[0] * grid[1]:
                return pooled, x.unflatten(1, grid)
        elif x.ndim == 4:
            return pooled, x if getattr(self.model, "output_fmt", "NCHW") == "NHWC" else x.permute(0, 2, 3, 1)
        raise UserError(
            f"{self.architecture} gives no map of tokens, only one feature for an image: give another model."
        )

    @torch.no_grad()
    def init_xavier_sincos(self, wanted_by: str) -> None:
        """Xavier uniform weights and sin-cos positions (MAE, appendix A.1). wanted_by: a setting, named by errors."""
        vit = self.model
        if not self.is_vit or vit.pos_embed is None or self.width % 4:
            needed = "a ViT with a position embedding whose width is divisible by 4"
            raise UserError(f"{wanted_by} needs {needed}, not {self.architecture}.")
        vit.pos_embed.copy_(sincos(self.width, self.grid(), 0 if vit.no_embed_class else vit.num_prefix_tokens))
        xavier(self)
        embed = vit.patch_embed.proj.weight
        nn.init.xavier_uniform_(embed.view(len(embed), -1))  # its bias keeps the convolution's default
        for token in (vit.cls_token, vit.reg_token):
            if token is not None:
                nn.init.normal_(token, std=0.02)

    def _embed(
        self, images: Tensor, keep: Tensor | None = None, replace: tuple[Tensor, Tensor] | None = None,
        resampling: Resampling = "timm",
    ) -> Tensor:  # fmt: skip
        """[B, C, H, W] -> [B, P + N, D], or [B, P + K, D] with keep: what the first block gets, as timm computes it."""
        vit: VisionTransformer = self.model
        embed: Any = vit.patch_embed
        if keep is None:
            x = embed(images)  # [B, h, w, D], or [B, N, D] of a model of fixed size
            grid = tuple(x.shape[1:-1]) if x.ndim == 4 else embed.grid_size
            x = x.flatten(1, -2)
        else:
            grid = self.grid((images.shape[-2], images.shape[-1]))
            patches = take(patchify(images, embed.patch_size), keep)
            x = embed.norm(F.linear(patches, embed.proj.weight.flatten(1), embed.proj.bias))
        if replace is not None:
            assert keep is None, "patches are dropped or replaced, not both"
            mask, token = replace
            x = torch.where(mask.unsqueeze(-1), token.to(x.dtype), x)
        prefix: list[Tensor] = [token for token in (vit.cls_token, vit.reg_token) if token is not None]
        tokens = torch.cat(prefix, dim=1) if prefix else None
        if vit.pos_embed is not None:
            of_prefix, positions = vit.pos_embed[:, : -embed.num_patches], vit.pos_embed[:, -embed.num_patches :]
            if grid != embed.grid_size:
                positions = resample_positions(positions, embed.grid_size, grid, resampling)
            x = x + (positions if keep is None else take(positions.expand(len(x), -1, -1), keep))
            tokens = tokens if tokens is None or not of_prefix.shape[1] else tokens + of_prefix
        x = x if tokens is None else torch.cat([tokens.expand(x.shape[0], -1, -1), x], dim=1)
        return vit.norm_pre(vit.patch_drop(vit.pos_drop(x)))

    def _tokens(self, x: Tensor) -> Tokens:
        """[B, P + N, D] -> its prefix and its patches."""
        return Tokens(x[:, : self.model.num_prefix_tokens], x[:, self.model.num_prefix_tokens :])


def resample_positions(table: Tensor, old: tuple[int, int], new: tuple[int, int], resampling: Resampling) -> Tensor:
    """[1, N, D] position embeddings of a grid of (h, w) patches -> those of another grid, by bicubic interpolation.

    timm: with antialiasing. published: without, by a factor for a grid that is larger by 0.1 (DINO's released code).
    """
    if resampling == "timm":
        return resample_abs_pos_embed(table, list(new), list(old), num_prefix_tokens=0)
    factors = [(n + 0.1) / o for n, o in zip(new, old, strict=True)]
    square = table.unflatten(1, old).permute(0, 3, 1, 2)
    return F.interpolate(square, scale_factor=factors, mode="bicubic").flatten(2).transpose(1, 2)


def _run(block: nn.Module, x: Tensor, key: Tensor | None = None, rows: slice | None = None) -> Tensor:
    """[B, N, D] through one block. Keys are set here, as a block that is recomputed needs those of its own crops."""
    _set_keys(block, key)
    return blocks.run(block, x, rows)


def _set_keys(module: nn.Module, key: Tensor | None) -> None:
    for child in module.modules():
        if isinstance(child, DropPath):
            child.set_key(key)


def _pooled(last: list[Tokens], pool: Pool) -> Tensor:
    """Tokens of the last blocks -> [B, feature_dim(pool)]."""
    if pool in NUM_BLOCKS:
        each: Pool = "cls" if pool == "last4" else "mean"
        return torch.cat([_pooled([tokens], each) for tokens in last[-NUM_BLOCKS[pool] :]], dim=1)
    prefix, patches = last[-1]
    return torch.cat([prefix[:, 0] if part == "cls" else patches.mean(dim=1) for part in pool.split("+")], dim=1)


def sincos(width: int, grid: tuple[int, int], num_prefix: int) -> Tensor:
    """[1, num_prefix + h*w, width] fixed 2-D sine-cosine embedding; prefix tokens have zeros (MAE, section 3).

    The first half of the channels encodes the column, the second half the row, as in the released code. Each half has
    all sines, then all cosines, of position / 10000^(k / (width / 4)).
    """
    frequencies = 10000 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    h, w = grid
    column, row = torch.arange(w).repeat(h).outer(frequencies), torch.arange(h).repeat_interleave(w).outer(frequencies)
    table = torch.cat([column.sin(), column.cos(), row.sin(), row.cos()], dim=1)
    return torch.cat([torch.zeros(num_prefix, width), table]).float().unsqueeze(0)


def xavier(module: nn.Module) -> None:
    """Xavier uniform for all linear layers, biases of 0. As in MAE's released code the qkv matrix counts as one (3D, D)
    matrix: its weights are 0.707 times those of three (D, D) matrices."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def patchify(images: Tensor, patch_size: tuple[int, int], channels_last: bool = False) -> Tensor:
    """[B, C, H, W] -> [B, N, C*p*q], pixels of a patch in channel, row, column order (that of a convolution's weight),
    or with channels_last in row, column, channel order (that of MAE's targets)."""
    grid = images.unflatten(3, (-1, patch_size[1])).unflatten(2, (-1, patch_size[0]))  # [B, C, h, p, w, q]
    order = (0, 2, 4, 3, 5, 1) if channels_last else (0, 2, 4, 1, 3, 5)
    return grid.permute(order).flatten(3).flatten(1, 2)


def unpatchify(patches: Tensor, patch_size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """[B, N, p*q*C], pixels of a patch in row, column, channel order -> [B, C, H, W]."""
    pixels = patches.unflatten(2, (*patch_size, -1)).unflatten(1, grid)  # [B, h, w, p, q, C]
    return pixels.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def take(tokens: Tensor, index: Tensor) -> Tensor:
    """[B, N, D], [B, K] int64 -> [B, K, D]."""
    return tokens.gather(1, index.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def _is_plain_vit(model: nn.Module) -> bool:
    """Whether its tokens are pooled as here: by no head of its own, attention or norm after the mean."""
    kind: Any = type(model)
    standard = isinstance(model, VisionTransformer) and kind.forward_head is VisionTransformer.forward_head
    return standard and kind._pos_embed is VisionTransformer._pos_embed and not pools_by_itself(model)


def pools_by_itself(vit: Any) -> bool:
    """Whether a ViT pools by an attention or with a norm of its own, which leaves tokens without their final norm."""
    return vit.attn_pool is not None or not isinstance(vit.fc_norm, nn.Identity)


def replace_drop_paths(model: nn.Module) -> None:
    """Put our DropPath in the place of each of timm's."""
    place = itertools.count()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, TimmDropPath):
                setattr(parent, name, DropPath(child.drop_prob, next(place)))
