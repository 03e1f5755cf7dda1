"""A vision transformer in float64, one image and one head at a time, from Dosovitskiy et al. (2021), equations 1 to
4."""

import math

import torch
from torch import Tensor


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    mean = x.mean(dim=-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(dim=-1, keepdim=True)
    return (x - mean) / torch.sqrt(variance + 1e-6) * weight + bias


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def block(x: Tensor, w: dict[str, Tensor], heads: int) -> Tensor:
    """[N, D] -> [N, D]; w holds one block's weights by their timm names."""
    n, d = x.shape
    h = layer_norm(x, w["norm1.weight"], w["norm1.bias"])
    qkv = h @ w["attn.qkv.weight"].T + w["attn.qkv.bias"]
    out = torch.zeros(n, d, dtype=x.dtype)
    size = d // heads
    for head in range(heads):
        q, k, v = (qkv[:, part * d + head * size : part * d + (head + 1) * size] for part in range(3))
        scores = torch.zeros(n, n, dtype=x.dtype)
        for i in range(n):
            for j in range(n):
                scores[i, j] = (q[i] * k[j]).sum() / math.sqrt(size)
        exp = torch.exp(scores - scores.max())
        out[:, head * size : (head + 1) * size] = (exp / exp.sum(dim=1, keepdim=True)) @ v
    x = x + out @ w["attn.proj.weight"].T + w["attn.proj.bias"]
    h = layer_norm(x, w["norm2.weight"], w["norm2.bias"])
    h = gelu(h @ w["mlp.fc1.weight"].T + w["mlp.fc1.bias"]) @ w["mlp.fc2.weight"].T + w["mlp.fc2.bias"]
    return x + h


def part(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) :]: value for name, value in weights.items() if name.startswith(prefix)}


def blocks(x: Tensor, weights: dict[str, Tensor], prefix: str, heads: int) -> Tensor:
    i = 0
    while own := part(weights, f"{prefix}.{i}."):
        x = block(x, own, heads)
        i += 1
    return x


def patch_pixels(image: Tensor, size: int, row: int, column: int) -> Tensor:
    """[C, H, W] -> [C, size, size]."""
    return image[:, row * size : (row + 1) * size, column * size : (column + 1) * size]


def embed(image: Tensor, weights: dict[str, Tensor], size: int) -> Tensor:
    """[C, H, W] -> [N, D] without positions: each patch times each filter."""
    filters, bias = weights["patch_embed.proj.weight"], weights["patch_embed.proj.bias"]
    tokens = []
    for row in range(image.shape[1] // size):
        for column in range(image.shape[2] // size):
            pixels = patch_pixels(image, size, row, column)
            tokens.append(torch.stack([(pixels * f).sum() for f in filters]) + bias)
    return torch.stack(tokens)
