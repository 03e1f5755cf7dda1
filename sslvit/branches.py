"""A block of timm's ViT on CPUs in bf16: its two branches, forward and backward, written out by hand.

What torch does by itself for this is right and slow there, for small reasons that add up: it fills the output of a
linear layer with the bias before it multiplies, copies queries, keys and values one by one, stacks their gradients, and
follows each call by itself. Measured with all blocks so, of width 192: 4 to 7 % less time for a training step.

The numbers are torch's under autocast: products in bf16, norms and the residual sum in float32, each result rounded
where autocast rounds it. Backward passes round as torch's do. Without gradients GELU is computed before its input is
rounded, not after.

The products with a bias are oneDNN's, by a call that torch's compiler makes and does not document: where it is missing,
or gives other numbers than torch's own, nothing of this file is used.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm, Mlp
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.utils.flop_counter import flop_registry, register_flop_formula

BF16 = torch.bfloat16
TALL = 8192  # rows from which a product of two tall matrices gains by transposing the narrower one

_LINEAR = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
if _LINEAR is not None and _LINEAR not in flop_registry:  # at once: a counter takes the list as it is when it begins
    register_flop_formula(_LINEAR)(lambda x, weight, *_, **__: 2 * x[0] * x[1] * weight[0])

Product = Callable[[Tensor, Tensor, Tensor | None, bool], Tensor]


class Weights(NamedTuple):
    """Of one branch, in float32: its norm, the linear layer that it begins with, and the one that it ends with."""

    norm_weight: Tensor
    norm_bias: Tensor
    first_weight: Tensor
    first_bias: Tensor | None
    last_weight: Tensor
    last_bias: Tensor | None


class Shape(NamedTuple):
    """eps of the norm; of attention the heads and the factor on its scores."""

    eps: float
    heads: int = 0
    scale: float = 1.0


def serve(x: Tensor) -> bool:
    """Whether the functions of this file are meant for these tokens, here and now."""
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and torch.is_autocast_enabled("cpu")
        and torch.get_autocast_dtype("cpu") == BF16
        and not torch.compiler.is_compiling()
        and _product() is not None
    )


def is_plain_linear(layer: nn.Module) -> bool:
    return type(layer) is nn.Linear


def is_plain_norm(norm: nn.Module) -> bool:
    return type(norm) in (nn.LayerNorm, LayerNorm) and norm.weight is not None and norm.bias is not None


def is_plain_mlp(mlp: nn.Module) -> bool:
    """Whether it is two linear layers and GELU, and nothing else that acts now."""
    return (
        type(mlp) is Mlp
        and is_plain_linear(mlp.fc1)
        and is_plain_linear(mlp.fc2)
        and type(mlp.act) is nn.GELU
        and mlp.act.approximate == "none"
        and type(mlp.norm) is nn.Identity
        and not (mlp.training and (mlp.drop1.p > 0 or mlp.drop2.p > 0))
    )


def attend(x: Tensor, weights: Weights, shape: Shape, scale: Tensor | None) -> Tensor:
    """[B, N, D] float32 -> x + scale * attention(norm(x)), the same. scale: [B, 1, 1] bf16 of stochastic depth, 0 for
    images whose branch is dropped; None: 1 for all."""
    return _apply(Branch(_attention, _attention_backward), x, weights, shape, scale)


def transform(x: Tensor, weights: Weights, shape: Shape, scale: Tensor | None) -> Tensor:
    """[B, N, D] float32 -> x + scale * MLP(norm(x)), the same."""
    return _apply(Branch(_mlp, _mlp_backward), x, weights, shape, scale)


class Branch(NamedTuple):
    """What lies between the norm and the residual sum.

    forward: [B, N, D] normalised bf16, weights, shape, whether gradients are wanted -> [B, N, D] bf16, and what
    backward needs. backward: the gradient for that output, the normalised tokens, what forward left, weights, shape,
    which gradients are wanted (for the tokens, then for the weights but the norm's) -> those.
    """

    forward: Callable[[Tensor, Weights, Shape, bool], tuple[Tensor, list[Tensor]]]
    backward: Callable[[Tensor, Tensor, list[Tensor], Weights, Shape, list[bool]], list[Tensor | None]]


def _apply(branch: Branch, x: Tensor, weights: Weights, shape: Shape, scale: Tensor | None) -> Tensor:
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *weights)):
        return _Residual.apply(branch, shape, x, scale, *weights)
    return _residual(branch, shape, x, scale, weights, training=False)[0]


def _residual(
    branch: Branch, shape: Shape, x: Tensor, scale: Tensor | None, weights: Weights, training: bool
) -> tuple[Tensor, list[Tensor]]:
    """x + scale * branch(norm(x)), and what the backward pass needs.

    Not here: leaving out the images that stochastic depth drops. At DINO's rate of 0.1, picking the others costs what
    it saves (measured).
    """
    y, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], weights.norm_weight, weights.norm_bias, shape.eps)
    y = y.to(BF16)
    with torch.autocast("cpu", enabled=False):  # which would compute the softmax from a copy in float32, and keep it
        out, between = branch.forward(y, weights, shape, training)
    if scale is not None:
        out = out.mul_(scale)
    return out.float().add_(x), [mean, rstd, y, *between]


class _Residual(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, branch: Branch, shape: Shape, x: Tensor, scale: Tensor | None, *weights: Tensor | None
    ) -> Tensor:
        out, between = _residual(branch, shape, x, scale, Weights(*weights), training=True)
        ctx.save_for_backward(x, scale, *weights, *between)
        ctx.branch, ctx.shape = branch, shape
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, *rest = ctx.saved_tensors
        weights, (mean, rstd, y, *between) = Weights(*rest[:6]), rest[6:]
        of_x, of_norm, of_layers = (ctx.needs_input_grad[i] for i in (slice(2, 3), slice(4, 6), slice(6, 10)))
        before = [*of_x, *of_norm]  # what lies before the branch
        dy = grad.to(BF16)
        if scale is not None:
            dy = dy.mul_(scale)
        dy, *dlayers = ctx.branch.backward(dy, y, between, weights, ctx.shape, [any(before), *of_layers])
        dx = dnorm_weight = dnorm_bias = None
        if any(before):
            dx, dnorm_weight, dnorm_bias = torch.ops.aten.native_layer_norm_backward(
                dy.float(), x, x.shape[-1:], mean, rstd, weights.norm_weight, weights.norm_bias, before
            )
            dx = dx.add_(grad) if before[0] else None
        return None, None, dx, None, dnorm_weight, dnorm_bias, *dlayers


def _attention(y: Tensor, weights: Weights, shape: Shape, training: bool) -> tuple[Tensor, list[Tensor]]:
    (b, n, _), heads, product = y.shape, shape.heads, _product()
    qkv = product(y.flatten(0, 1), weights.first_weight, weights.first_bias, False)
    # [3, H * B, N, d]: all images of the first head, then of the second. One copy serves queries, keys and values.
    qkv = qkv.view(b * n, 3 * heads, -1).transpose(0, 1).reshape(3, heads * b, n, -1)
    q, k, v = qkv
    scores = torch.baddbmm(q.new_empty(1, 1, 1), q, k.transpose(1, 2), beta=0, alpha=shape.scale)
    attention = scores.softmax(dim=-1)  # in float32, rounded once
    mixed = (attention @ v).view(heads, b * n, -1).transpose(0, 1).reshape(b * n, -1)
    out = product(mixed, weights.last_weight, weights.last_bias, False)
    return out.view(y.shape), [qkv, attention, mixed]


def _attention_backward(
    grad: Tensor, y: Tensor, between: list[Tensor], weights: Weights, shape: Shape, needs: list[bool]
) -> list[Tensor | None]:
    qkv, attention, mixed = between
    (b, n, _), heads = y.shape, shape.heads
    dmixed, *last = _linear_backward(grad.flatten(0, 1), mixed, weights.last_weight, [True, *needs[3:]])
    dmixed = dmixed.view(b * n, heads, -1).transpose(0, 1).reshape(heads * b, n, -1)
    q, k, v = qkv
    dqkv = torch.empty_like(qkv)
    dscores = torch.ops.aten._softmax_backward_data(dmixed @ v.transpose(1, 2), attention, -1, BF16)
    torch.baddbmm(dqkv[0], dscores, k, beta=0, alpha=shape.scale, out=dqkv[0])
    torch.baddbmm(dqkv[1], dscores.transpose(1, 2), q, beta=0, alpha=shape.scale, out=dqkv[1])
    torch.bmm(attention.transpose(1, 2), dmixed, out=dqkv[2])
    dqkv = dqkv.view(3 * heads, b * n, -1).transpose(0, 1).reshape(b * n, -1)
    dy, *first = _linear_backward(dqkv, y.flatten(0, 1), weights.first_weight, needs[:3])
    return [None if dy is None else dy.view(y.shape), *first, *last]


def _mlp(y: Tensor, weights: Weights, shape: Shape, training: bool) -> tuple[Tensor, list[Tensor]]:
    rows, product = y.flatten(0, 1), _product()
    hidden = product(rows, weights.first_weight, weights.first_bias, not training)
    active = F.gelu(hidden) if training else hidden
    return product(active, weights.last_weight, weights.last_bias, False).view(y.shape), [hidden, active]


def _mlp_backward(
    grad: Tensor, y: Tensor, between: list[Tensor], weights: Weights, shape: Shape, needs: list[bool]
) -> list[Tensor | None]:
    hidden, active = between
    dactive, *last = _linear_backward(grad.flatten(0, 1), active, weights.last_weight, [True, *needs[3:]])
    dhidden = torch.ops.aten.gelu_backward.grad_input(dactive, hidden, grad_input=dactive)
    dy, *first = _linear_backward(dhidden, y.flatten(0, 1), weights.first_weight, needs[:3])
    return [None if dy is None else dy.view(y.shape), *first, *last]


def _linear_backward(grad: Tensor, x: Tensor, weight: Tensor, needs: list[bool]) -> list[Tensor | None]:
    """[M, N] and [M, K] bf16, [N, K] float32 -> the wanted gradients of x (bf16), of weight and bias (float32)."""
    dx = dweight = dbias = None
    if needs[0]:
        dx = grad @ weight.to(BF16)
    if needs[1]:
        narrow = len(x) >= TALL and x.shape[1] < grad.shape[1]
        dweight = ((x.t() @ grad).t() if narrow else grad.t() @ x).float()
    if needs[2]:
        dbias = grad.sum(dim=0).float()
    return [dx, dweight, dbias]


@functools.cache
def _product() -> Product | None:
    """(bf16 [M, K], [N, K], [N] or None, whether through GELU) -> bf16 [M, N] in one pass; None where this torch or
    this processor has no such call."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return None
    call = torch.ops.mkldnn._linear_pointwise

    def product(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
        bias = None if bias is None else bias.to(BF16)
        return call(x, weight.to(BF16), bias, "gelu" if gelu else "none", [], "none" if gelu else "")

    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(size, generator=generator).to(BF16) for size in ((32, 64), (48, 64), (48,)))
    expected = F.linear(x, weight, bias)
    try:
        same = torch.equal(product(x, weight, bias, False), expected) and torch.allclose(
            product(x, weight, bias, True), F.gelu(expected), rtol=0.02, atol=0.02
        )
    except RuntimeError:  # e.g. a processor for which oneDNN has no bf16
        return None
    if not same:
        return None
    return product
