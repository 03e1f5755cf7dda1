"""MAE's loss in float64, one image and one patch at a time, from He et al. (2022), section 3 and appendix A.1."""

import math

import torch
from torch import Tensor

from .vit import blocks, embed, layer_norm, part, patch_pixels


def position(width: int, row: int, column: int) -> Tensor:
    """The sine-cosine code of one patch: column first, sines before cosines."""
    code = []
    for coordinate in (column, row):
        frequencies = [1 / 10000 ** (k / (width / 4)) for k in range(width // 4)]
        code += [math.sin(coordinate * f) for f in frequencies] + [math.cos(coordinate * f) for f in frequencies]
    return torch.tensor(code, dtype=torch.float64)


def loss(
    state: dict[str, Tensor],
    images: Tensor,
    order: Tensor,
    kept: int,
    size: int,
    heads: tuple[int, int],
    norm_pix: bool,
) -> float:
    """Mean over hidden patches of the mean squared error of their pixels."""
    weights = {name: value.double() for name, value in state.items()}
    encoder = part(weights, "encoder.model.")
    width, decoder_width = encoder["cls_token"].shape[-1], weights["mask_token"].shape[-1]
    errors = []
    for image, permutation in zip(images.double(), order.tolist(), strict=True):
        columns = image.shape[2] // size
        places = [(i // columns, i % columns) for i in range(len(permutation))]
        tokens = embed(image, encoder, size)
        visible = [tokens[i] + position(width, *places[i]) for i in permutation[:kept]]
        x = torch.stack([encoder["cls_token"][0, 0], *visible])
        x = layer_norm(blocks(x, encoder, "blocks", heads[0]), encoder["norm.weight"], encoder["norm.bias"])
        x = x @ weights["decoder_embed.weight"].T + weights["decoder_embed.bias"]
        decoded = {i: x[1 + place] for place, i in enumerate(permutation[:kept])}
        sequence = [x[0]]
        for i in range(len(permutation)):  # in the order of the image, with mask tokens in the gaps
            token = decoded.get(i, weights["mask_token"][0, 0])
            sequence.append(token + position(decoder_width, *places[i]))
        x = blocks(torch.stack(sequence), weights, "decoder_blocks", heads[1])
        x = layer_norm(x, weights["decoder_norm.weight"], weights["decoder_norm.bias"])
        for i in permutation[kept:]:
            prediction = weights["decoder_pred.weight"] @ x[1 + i] + weights["decoder_pred.bias"]
            pixels = patch_pixels(image, size, *places[i])
            values = [pixels[c, y, z] for y in range(size) for z in range(size) for c in range(len(pixels))]
            target = torch.stack(values)
            if norm_pix:
                mean = target.sum() / len(target)
                variance = ((target - mean) ** 2).sum() / (len(target) - 1)
                target = (target - mean) / torch.sqrt(variance + 1e-6)
            errors.append(((prediction - target) ** 2).mean())
    return float(sum(errors) / len(errors))
