"""What an encoder attends to: a picture of attention and patch tokens, and numbers that describe the heads.

A row for each image, in this order:

image     as the encoder sees it, at `size`
patches   the three main directions of the patch tokens (after the final norm), over all images of the picture together,
          as red, green and blue: patches of one colour have similar features (Oquab et al., arXiv 2304.07193, section
          7.5). The same smooth colours in all images mean that the tokens mostly encode their position.
mean      attention of the last block (or of `block`) from the class token to the patches, mean over the heads
rollout   (rollout=true) the product over the blocks of half their mean attention and half the identity, which stands
          for the skip connection: Abnar and Zuidema, ACL 2020 (arXiv 2005.00928), section 3
0, 1, ... attention of each head (Caron et al., DINO, figure 3)

Attention is softmax(q k^T / sqrt(d)) of a block, in float32. Each map is drawn from violet (its 2nd percentile) to
yellow (its 98th): a map that is nearly even shows its differences too, so compare colours within a map only. Without a
class token, or with query=mean, the map is the mean over all patches as queries: how much attention each patch gets.
MAE's loss does not use the class token, so query=mean may say more there.

The numbers are means over these images, for each head: entropy of the attention in bits, mean distance in patches from
a patch to what it attends to (Dosovitskiy et al., ICLR 2021, figure 7), and the share of the attention that goes to
prefix tokens (class token and registers) in percent.
"""

import math
from typing import Any, NamedTuple

import torch
from timm.layers import Attention
from torch import Tensor

from ..data import BadImage, Source
from ..data.augment import Normalize
from ..data.crops import centre
from ..distributed import on_first_process, say
from ..errors import UserError, check_range
from ..model.encoder import Encoder
from . import Command, pictures, records
from .config import Attention as Config
from .frozen import Frozen, load_frozen
from .segment import image_size
from .subset import random_subset

COMMAND = Command(
    "run=... data=... picture=...",
    "a picture of attention and patch tokens",
)

CELL_SIDE = 128  # pixels of a cell in the picture, or a little less
MEASURES = ("entropy", "distance", "on_prefix")
CLIPPED = 0.02  # share of patches at each end of a direction that get the extreme colour


def run(config: Config) -> dict[str, Any]:
    """Attention and tokens of some images; draws the picture and writes <run>/eval/attention.json. Raises UserError."""
    check_range("", config, 1, None, "images", "size")
    if not config.data:
        raise UserError("data is missing: attention needs images, labelled or not, data=<folder>.")
    if not config.picture:
        raise UserError("picture is missing: name the PNG to draw, picture=attention.png.")
    pictures.check(config.picture)
    frozen = load_frozen(config)
    encoder, size = frozen.vit(), image_size(frozen, config.size)
    blocks = len(encoder.model.blocks)
    if not -blocks <= config.block < blocks:
        raise UserError(
            f"block={config.block} is not one of the {blocks} blocks: give -1 for the last, or 0 and above."
        )
    if any(type(getattr(block, "attn", None)) is not Attention for block in encoder.model.blocks):
        raise UserError(
            f"run={config.run} has an attention that cannot be drawn: use a ViT with timm's plain Attention."
        )
    if config.query == "cls" and not encoder.model.has_class_token:
        raise UserError(f"run={config.run} has no class token: use query=mean.")
    source = random_subset(frozen.open(config.data), config.images, config.seed, "attention")
    results = on_first_process(lambda: draw_and_describe(config, frozen, source, size))
    frozen.save(
        "attention", results, data=config.data, size=list(size), patches=list(encoder.grid(size)),
        features="patch tokens", precision="float32",
    )  # fmt: skip
    return results


def draw_and_describe(config: Config, frozen: Frozen, source: Source, size: tuple[int, int]) -> dict[str, Any]:
    """Draw the picture, print a table of the heads, and return its numbers."""
    encoder, device = frozen.vit().eval(), frozen.accelerator.device
    images = readable(source, size)
    if not images:
        raise UserError(f"None of the {len(source)} chosen images of {config.data} can be read.")
    grid, prefix = encoder.grid(size), encoder.model.num_prefix_tokens
    query = "mean" if config.query == "mean" or not encoder.model.has_class_token else "cls"
    patches, maps, rolled, described = [], [], [], []
    for image in images:  # one by one: attention needs much memory
        x = image.unsqueeze(0).to(device) / 255
        found = attend(encoder, frozen.normalize, x, config.block, with_means=config.rollout)
        patches.append(found.patches)
        maps.append(from_query(found.weights, query, prefix))
        described.append(describe(found.weights, query, prefix, grid))
        if config.rollout:
            rolled.append(from_query(rollout(found.means).unsqueeze(1), query, prefix))
    by_head = torch.cat(maps)  # [images, heads, patches]
    columns = {"mean": by_head.mean(dim=1)}
    if rolled:
        columns["rollout"] = torch.cat(rolled)[:, 0]
    columns |= {str(head): by_head[:, head] for head in range(by_head.shape[1])}
    colours = principal_colours(torch.cat(patches)).unflatten(1, grid)
    cell = pictures.cell_size(size, CELL_SIDE)
    drawn = [
        [
            pictures.image_of(image, cell, smooth=True),
            pictures.image_of(255 * colours[i].permute(2, 0, 1), cell),
            *(pictures.image_of(pictures.heat(column[i].unflatten(0, grid)), cell) for column in columns.values()),
        ]
        for i, image in enumerate(images)
    ]
    block = config.block % len(encoder.model.blocks)
    title = f"attention of {'the class token' if query == 'cls' else 'all patches'} in block {block}, by head"
    pictures.save(pictures.montage(drawn, column_names=["image", "patches", *columns], title=title), config.picture)
    means = torch.stack(described).mean(dim=0).tolist()
    heads = [dict(zip(MEASURES, (round(value, 4) for value in row), strict=True)) for row in means]
    say(
        f"{title}, of {config.run}: {len(images)} images at {size[0]} x {size[1]} pixels, {grid[0]} x {grid[1]} patches"
    )
    rows = [[str(i), *(f"{value:.2f}" for value in head.values())] for i, head in enumerate(heads)]
    say(*records.table(["head", "entropy, bits", "distance, patches", "on prefix %"], rows))
    return {"block": block, "query": query, "images": len(images), "heads": heads}


def readable(source: Source, size: tuple[int, int]) -> list[Tensor]:
    """[C, h, w] float in [0, 255] for each image that can be read: the largest centred crop of this shape, resized."""
    images = []
    for index in range(len(source)):
        try:
            images.append(centre(source.read(index), size).float())
        except BadImage as error:
            say(f"{source.name(index)} cannot be read and is left out: {error}.")
    return images


class Maps(NamedTuple):
    """Attention and tokens of some images, on the CPU."""

    weights: Tensor  # [B, H, N, N] float32, attention of one block: from token n (row) to token m
    means: list[Tensor]  # [B, N, N] for each block, the mean over its heads; empty if not asked for
    patches: Tensor  # [B, P, D] float32


@torch.inference_mode()
def attend(encoder: Encoder, normalize: Normalize, images: Tensor, block: int = -1, with_means: bool = False) -> Maps:
    """[B, C, H, W] in [0, 1] -> attention of a block, and the patch tokens, in float32.

    Memory grows with B times the square of the patches.
    """
    blocks = list(encoder.model.blocks)
    inputs, patches = attention_inputs(encoder, normalize(images))
    weights = attention_of(blocks[block].attn, inputs[block]).cpu()
    pairs = zip(blocks, inputs, strict=True) if with_means else ()
    return Maps(weights, [attention_of(one.attn, x).mean(dim=1).cpu() for one, x in pairs], patches.float().cpu())


def attention_inputs(encoder: Encoder, x: Tensor) -> tuple[list[Tensor], Tensor]:
    """[B, C, H, W] normalised -> what the attention of each block gets, [B, N, D], and the patch tokens [B, P, D]."""
    inputs: list[Tensor] = []
    hooks = [
        hook
        for one in encoder.model.blocks
        for hook in (
            one.register_forward_pre_hook(lambda module, args: None),  # a block with hooks is run as timm runs it
            one.attn.register_forward_pre_hook(lambda module, args: inputs.append(args[0])),
        )
    ]
    try:
        with torch.compiler.set_stance("force_eager"):
            patches = encoder(x).patches
    finally:
        for hook in hooks:
            hook.remove()
    return inputs, patches


def attention_of(module: Attention, x: Tensor) -> Tensor:
    """[B, N, D], the module's input -> [B, H, N, N], rows that sum to 1."""
    q, k, _ = module.qkv(x).unflatten(2, (3, module.num_heads, module.head_dim)).permute(2, 0, 3, 1, 4)
    q, k = module.q_norm(q), module.k_norm(k)
    return (q.float() @ k.float().transpose(-2, -1) * module.scale).softmax(dim=-1)


def rollout(means: list[Tensor]) -> Tensor:
    """[B, N, N] for each block in their order -> [B, N, N]: how much of each input token is in each output token."""
    identity = torch.eye(means[0].shape[-1])
    through = identity.expand(len(means[0]), -1, -1)
    for mean in means:
        through = (0.5 * mean + 0.5 * identity) @ through
    return through


def from_query(weights: Tensor, query: str, prefix: int) -> Tensor:
    """[B, H, N, N] -> [B, H, P], to the patches: from the class token (the first), or the mean over all patches."""
    rows = weights[:, :, 0] if query == "cls" else weights[:, :, prefix:].mean(dim=2)
    return rows[:, :, prefix:]


def describe(weights: Tensor, query: str, prefix: int, grid: tuple[int, int]) -> Tensor:
    """[B, H, N, N] -> [H, 3]: entropy of the query's attention in bits, mean distance in patches from a patch to what
    it attends to, and share of the query's attention on prefix tokens in percent."""
    rows = weights[:, :, :1] if query == "cls" else weights[:, :, prefix:]
    entropy = torch.special.entr(rows).sum(dim=-1).mean(dim=(0, 2)) / math.log(2)
    on_prefix = rows[..., :prefix].sum(dim=-1).mean(dim=(0, 2))
    position = torch.cartesian_prod(torch.arange(grid[0]), torch.arange(grid[1])).float().view(-1, 2)
    among_patches = weights[:, :, prefix:, prefix:]
    distance = (among_patches * torch.cdist(position, position)).sum(dim=-1) / among_patches.sum(dim=-1)
    return torch.stack([entropy, distance.mean(dim=(0, 2)), 100 * on_prefix], dim=1)


def principal_colours(patches: Tensor) -> Tensor:
    """[B, P, D] -> [B, P, 3] in [0, 1]: coordinates along the three directions in which the tokens differ most.

    The sign of a direction makes its largest entry positive: so the colours do not depend on the machine.
    """
    x = patches.flatten(0, 1).double()
    x = x - x.mean(dim=0)
    directions = torch.linalg.eigh(x.t() @ x).eigenvectors.flip(1)[:, :3]
    largest = directions.gather(0, directions.abs().argmax(dim=0, keepdim=True))
    projected = x @ (directions * largest.sign())
    low, high = projected.quantile(torch.tensor([CLIPPED, 1 - CLIPPED], dtype=torch.float64), dim=0)
    colours = ((projected - low) / (high - low).clamp(min=1e-12)).clamp(0, 1).float()
    return colours.unflatten(0, patches.shape[:2])
