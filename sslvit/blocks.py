"""timm's transformer blocks without the work that nobody reads.

The output of a ViT's last block is often wanted for some tokens only: for the class token, or for the patches that a
decoder has to predict. Keys and values need all tokens; queries, the projection and the MLP, which are ten twelfths of
a block, need those alone.

On CPUs in bf16 plain blocks are not called at all but written out by hand, in branches.py.

Images with other numbers of tokens can pass a block together, packed: all tokens below one another, [T, D]. Only
attention has to know where an image ends, and is done for each length by itself, which is exact on every device.
"""

import functools
from collections.abc import Callable
from types import MethodType

import torch
import torch.nn.functional as F
from timm.layers import Attention
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from . import branches, rng

Shapes = tuple[tuple[int, int], ...]  # of packed images: (how many, tokens of each), one length after another


class DropPath(nn.Module):
    """Stochastic depth (Huang et al., 2016) whose draws come from each image's key instead of from a global
    generator."""

    def __init__(self, rate: float, place: int) -> None:
        super().__init__()
        self.rate, self.place, self.active = rate, place, rate > 0
        # What differs between blocks is a tensor in forward: a number would make torch.compile build a graph for each.
        self.register_buffer("threshold", torch.tensor(rate, dtype=torch.float32), persistent=False)
        self.key: Tensor | None = None  # [B], of this place

    def take(self, key: Tensor | None) -> None:
        """[B] keys of the images of the next forward pass; None in evaluation."""
        self.key = None if key is None or not self.active else rng.fold_in(key, "drop_path", self.place)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.scale(x.shape[0], x.dtype)
        return x if scale is None else x * scale.view(-1, *[1] * (x.ndim - 1))

    def scale(self, rows: int, dtype: torch.dtype) -> Tensor | None:
        """[rows] factors: 0 for what is dropped, 1 / (1 - rate) for the rest; None for 1 everywhere."""
        if not self.training or not self.active:
            return None
        assert self.key is not None, "an encoder with drop path was called without keys"
        # MobileViT folds patches into the batch: then several rows an image.
        draws = rng.uniform(self.key, rows // self.key.shape[0]).reshape(-1)
        return (draws >= self.threshold).to(dtype) / (1 - self.threshold).to(dtype)

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3f}"


def pack(parts: list[Tensor]) -> tuple[Tensor, Shapes]:
    """Tokens of images of several lengths, [B, N, D] each -> packed [T, D], and what `unpack` needs."""
    return torch.cat([part.flatten(0, 1) for part in parts]), tuple((part.shape[0], part.shape[1]) for part in parts)


def unpack(x: Tensor, shapes: Shapes) -> list[Tensor]:
    """[T, D] -> [B, N, D] for each length."""
    return [part.unflatten(0, shape) for part, shape in zip(x.split([b * n for b, n in shapes]), shapes, strict=True)]


def token_keys(key: Tensor, shapes: Shapes, rows: slice | None = None) -> Tensor:
    """Keys of packed images -> of their tokens, or of these rows of each: all tokens of an image have its key, so that
    drop path draws the same for them."""
    numbers = [len(range(n)[rows or slice(None)]) for _, n in shapes]
    parts = key.split([b for b, _ in shapes])
    return torch.cat([part.repeat_interleave(n) for part, n in zip(parts, numbers, strict=True)])


def run(block: nn.Module, x: Tensor, rows: slice | None = None, shapes: Shapes | None = None) -> Tensor:
    """[B, N, D] -> block(x)[:, rows], all rows by default; equal but for the order of float additions.

    With shapes x is packed, [T, D], and so is what is returned; the block has to be one that `known` knows.

    Not here: leaving out the images whose branch stochastic depth drops. At DINO's rate of 0.1, picking the others
    costs what it saves (measured on a CPU; on a GPU it would also have to wait for the draws).
    """
    if getattr(block, "takes_rows", False):
        return block(x, rows, shapes)
    compiled = getattr(block, "_compiled_call_impl", None) is not None
    if shapes is not None:
        return (_compiled_known() if compiled and rows is None else _run_known)(block, x, rows, shapes)
    if not known(block) or (rows is None and (compiled or block.attn.fused_attn)):
        x = block(x)
        return x if rows is None else x[:, rows]
    return _run_known(block, x, rows, None)


def let_take_rows(block: nn.Module) -> None:
    """Make `block(x, rows, shapes)` what `run` gives, for a block that `run` would take to pieces: one that is to be
    sharded, which has its weights within its call only."""
    if known(block):
        block.forward, block.takes_rows = MethodType(_call, block), True


def _call(block: Block, x: Tensor, rows: slice | None = None, shapes: Shapes | None = None) -> Tensor:
    whole = rows is None and shapes is None and block.attn.fused_attn
    return Block.forward(block, x) if whole else _run_known(block, x, rows, shapes)


def _run_known(block: nn.Module, x: Tensor, rows: slice | None, shapes: Shapes | None) -> Tensor:
    by_hand = shapes is None and branches.serve(x) and _plain(block)
    if by_hand and rows is None:
        x = branches.attend(x, *_attention_parts(block), _factors(block.drop_path1, x))
    else:
        base = x if rows is None else _cut(x, rows, shapes)[0]
        x = base + block.drop_path1(block.ls1(_attention(block.attn, block.norm1(x), rows, shapes)))
    if by_hand:
        return branches.transform(x, *_mlp_parts(block), _factors(block.drop_path2, x))
    return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))


def _plain(block: Block) -> bool:
    """Whether branches.py says all that this block, which is known, and its parts do now."""
    attention = block.attn
    return (
        not attention.fused_attn
        and all(type(part) is nn.Identity for part in (attention.q_norm, attention.k_norm, attention.norm))
        and not (attention.training and attention.proj_drop.p > 0)
        and branches.is_plain_linear(attention.qkv)
        and branches.is_plain_linear(attention.proj)
        and branches.is_plain_mlp(block.mlp)
        and all(branches.is_plain_norm(norm) for norm in (block.norm1, block.norm2))
        and all(type(part) is nn.Identity for part in (block.ls1, block.ls2))
        and all(type(part) in (nn.Identity, DropPath) for part in (block.drop_path1, block.drop_path2))
        and not any(part._forward_hooks or part._forward_pre_hooks for part in block.modules() if part is not block)
    )


def _attention_parts(block: Block) -> tuple[branches.Weights, branches.Shape]:
    norm, attention = block.norm1, block.attn
    weights = [norm.weight, norm.bias]
    weights += [attention.qkv.weight, attention.qkv.bias, attention.proj.weight, attention.proj.bias]
    return branches.Weights(*weights), branches.Shape(norm.eps, attention.num_heads, attention.scale)


def _mlp_parts(block: Block) -> tuple[branches.Weights, branches.Shape]:
    norm, mlp = block.norm2, block.mlp
    weights = [norm.weight, norm.bias, mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias]
    return branches.Weights(*weights), branches.Shape(norm.eps)


def _factors(drop_path: nn.Module, x: Tensor) -> Tensor | None:
    """[B, 1, 1] bf16, as branches.py takes them."""
    scale = drop_path.scale(len(x), torch.bfloat16) if isinstance(drop_path, DropPath) else None
    return None if scale is None else scale.view(-1, 1, 1)


@functools.cache
def _compiled_known() -> Callable[..., Tensor]:
    """Packed blocks are not called, so compiling them in place (hardware.py) does not reach them."""
    return torch.compile(_run_known, dynamic=False)


def _cut(x: Tensor, rows: slice, shapes: Shapes | None) -> tuple[Tensor, Shapes | None]:
    """These rows of each image, and their shapes if they are packed."""
    return (x[:, rows], None) if shapes is None else pack([part[:, rows] for part in unpack(x, shapes)])


def known(block: nn.Module) -> bool:
    """Whether `run` says all that a call of this block does."""
    attention = getattr(block, "attn", None)
    return (
        type(block) is Block
        and type(attention) is Attention
        and getattr(attention, "gate", None) is None
        and not (attention.training and attention.attn_drop.p > 0)
        and not block._forward_hooks
        and not block._forward_pre_hooks
    )


def _attention(attention: Attention, x: Tensor, rows: slice | None, shapes: Shapes | None) -> Tensor:
    """[B, N, D] -> [B, rows, D], or both packed: what timm's Attention gives for these rows."""
    if rows is None:
        lengths = [tuple(qkv) for qkv in _project(attention, x, shapes, 0, 3)]
    else:
        queries = _project(attention, *_cut(x, rows, shapes), 0, 1)
        pairs = _project(attention, x, shapes, 1, 3)
        lengths = [(*q, *kv) for q, kv in zip(queries, pairs, strict=True)]
    done = []
    for q, k, v in lengths:
        q, k = attention.q_norm(q), attention.k_norm(k)
        if attention.fused_attn:
            y = F.scaled_dot_product_attention(q, k, v, scale=attention.scale)
        else:
            y = _plain_attention(q, k, v, attention.scale)
        done.append(y.transpose(1, 2).flatten(2))
    y = done[0] if shapes is None else pack(done)[0]
    return attention.proj_drop(attention.proj(attention.norm(y)))


def _project(attention: Attention, x: Tensor, shapes: Shapes | None, first: int, last: int) -> list[Tensor]:
    """[B, N, D], or packed -> [last - first, B, heads, N, dim] for each length: q, k and v are 0, 1 and 2."""
    heads, dim = attention.num_heads, attention.head_dim
    part = slice(first * heads * dim, last * heads * dim)
    bias = attention.qkv.bias
    y = F.linear(x, attention.qkv.weight[part], None if bias is None else bias[part])
    parts = [y] if shapes is None else unpack(y, shapes)
    return [part.unflatten(2, (last - first, heads, dim)).permute(2, 0, 3, 1, 4) for part in parts]


def _plain_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """[B, H, Q, d], [B, H, N, d] twice -> [B, H, Q, d].

    The scale is part of the product, and the softmax is computed in float32 and rounded once, without autocast, which
    would make two copies of the weights to the same end.
    """
    shape = q.shape
    q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    scores = torch.baddbmm(q.new_empty(1, 1, 1), q, k.transpose(1, 2), beta=0, alpha=scale)
    with torch.autocast(scores.device.type, enabled=False):
        weights = scores.softmax(dim=-1)
    return (weights @ v).view(shape)
