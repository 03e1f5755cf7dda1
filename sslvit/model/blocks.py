"""timm's transformer blocks without the work whose result nobody reads.

The output of a ViT's last block is often read at some tokens only: the class token, or the patches that a decoder
predicts. Keys and values need all tokens. Queries, the projection and the MLP (ten twelfths of a block) need only
those.

Tried without gain: leaving out the images whose branch stochastic depth drops. At DINO's rate of 0.1, picking the
others costs what it saves (on a CPU).
"""

from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Attention
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from .. import rng


class DropPath(nn.Module):
    """Stochastic depth (Huang et al., 2016) that draws from each image's key, not from a global generator."""

    threshold: Tensor

    def __init__(self, rate: float, place: int) -> None:
        super().__init__()
        self.rate, self.place = rate, place
        # A tensor, because torch.compile would build a graph for each block if it were a number.
        self.register_buffer("threshold", torch.tensor(rate, dtype=torch.float32), persistent=False)
        self.key: Tensor | None = None  # [B], of this place

    def set_key(self, key: Tensor | None) -> None:
        """[B] keys of the images of the next forward pass; None in evaluation."""
        self.key = None if key is None or not self.rate else rng.fold_in(key, "drop_path", self.place)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.rate:
            return x
        assert self.key is not None, "an encoder with drop path was called without keys"
        # MobileViT folds patches into the batch: then an image has several rows.
        draws = rng.uniform(self.key, x.shape[0] // self.key.shape[0]).reshape(-1)
        scale = (draws >= self.threshold).to(x.dtype) / (1 - self.threshold).to(x.dtype)
        return x * scale.view(-1, *[1] * (x.ndim - 1))

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3f}"


def run(block: Any, x: Tensor, rows: slice | None = None) -> Tensor:
    """[B, N, D] -> block(x)[:, rows], all rows by default. Float additions may come in another order."""
    if getattr(block, "takes_rows", False):
        return block(x, rows)
    compiled = getattr(block, "_compiled_call_impl", None) is not None
    if rows is None and (compiled or getattr(getattr(block, "attn", None), "fused_attn", True)):
        return block(x)
    return _run_rows(block, x, rows) if is_plain(block) else block(x)[:, rows or slice(None)]


def let_take_rows(block: Any) -> None:
    """Make `block(x, rows)` what `run` gives. A sharded block needs this: it has its weights only while it is called,
    and `run` would read them outside of the call."""
    if is_plain(block):
        block.forward = MethodType(_forward_rows, block)
        block.takes_rows = True


def is_plain(block: nn.Module) -> bool:
    """Whether a call of this block does no more than `run` does."""
    attention = getattr(block, "attn", None)
    return (
        type(block) is Block
        and type(attention) is Attention
        and getattr(attention, "gate", None) is None
        and not (attention.training and attention.attn_drop.p > 0)
        and not block._forward_hooks
        and not block._forward_pre_hooks
    )


def _forward_rows(block: Any, x: Tensor, rows: slice | None = None) -> Tensor:
    return Block.forward(block, x) if rows is None and block.attn.fused_attn else _run_rows(block, x, rows)


def _run_rows(block: Any, x: Tensor, rows: slice | None) -> Tensor:
    rows = rows or slice(None)
    x = x[:, rows] + block.drop_path1(block.ls1(_attend(block.attn, block.norm1(x), rows)))
    return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))


def _attend(attention: Attention, x: Tensor, rows: slice) -> Tensor:
    """[B, N, D] -> [B, rows, D]: what timm's Attention gives for these rows."""
    if rows == slice(None):
        q, k, v = _project(attention, x, 0, 3)
    else:
        (q,), (k, v) = _project(attention, x[:, rows], 0, 1), _project(attention, x, 1, 3)
    q, k = attention.q_norm(q), attention.k_norm(k)
    if attention.fused_attn:
        y = F.scaled_dot_product_attention(q, k, v, scale=attention.scale)
    else:
        y = _plain_attention(q, k, v, attention.scale)
    return attention.proj_drop(attention.proj(attention.norm(y.transpose(1, 2).flatten(2))))


def _project(attention: Attention, x: Tensor, first: int, last: int) -> Tensor:
    """[B, N, D] -> [last - first, B, heads, N, dim]; q, k and v are 0, 1 and 2."""
    heads, dim = attention.num_heads, attention.head_dim
    part = slice(first * heads * dim, last * heads * dim)
    bias: Any = attention.qkv.bias
    y = F.linear(x, attention.qkv.weight[part], None if bias is None else bias[part])
    return y.unflatten(2, (last - first, heads, dim)).permute(2, 0, 3, 1, 4)


def _plain_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """[B, H, Q, d], [B, H, N, d] twice -> [B, H, Q, d].

    The scale is part of the product. The softmax is computed in float32 and rounded once. Autocast would do the same
    with two more copies of the weights, so it is off.
    """
    shape = q.shape
    q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    scores = torch.baddbmm(q.new_empty(1, 1, 1), q, k.transpose(1, 2), beta=0, alpha=scale)
    with torch.autocast(scores.device.type, enabled=False):
        weights = scores.softmax(dim=-1)
    return (weights @ v).view(shape)
