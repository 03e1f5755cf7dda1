"""Where an encoder looks: a picture of attention and patch tokens, and numbers that describe the heads.

A row for each image, in this order:

image     as the encoder sees it, at `size`
patches   the three main directions of the patch tokens (after the final norm), over all shown images together, as red,
          green and blue: patches of one colour have like features (Oquab et al., arXiv 2304.07193, section 7.5).
          The same smooth colours in all images say that the tokens mostly tell where they are.
mean      attention of the last block (or of `block`) from the class token to the patches, mean over the heads
rollout   (rollout=true) the product over the blocks of half their mean attention and half the identity, which stands
          for the skip connection: Abnar and Zuidema, ACL 2020 (arXiv 2005.00928), section 3
0, 1, ... attention of each head (Caron et al., DINO, figure 3)

Attention is softmax(q k^T / sqrt(d)) of a block, in float32. Each map is drawn from black (0) to white (its largest
hundredth). Without a class token, or with query=mean, the map is the mean over all patches as queries: how much each
patch is looked at. With MAE, whose loss no class token takes part in, query=mean may say more.

The numbers are means over the shown images, for each head: entropy of the attention in bits, mean distance from a patch
to what it looks at in patches (Dosovitskiy et al., ICLR 2021, figure 7), and the share of the attention that goes to
prefix tokens (class token and registers) in percent.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

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
from .frozen import EncoderConfig, Frozen, load_frozen
from .segment import image_size
from .subset import random_subset

COMMAND = Command(
    "run=... data=... picture=...",
    "a picture of attention and patch tokens",
)

SIDE = 128  # pixels of a cell in the picture, or a little less
MEASURES = ("entropy", "distance", "on_prefix")
FAINT = 0.02  # share of patches at each end of a direction whose colour is cut off


@dataclass
class Config(EncoderConfig):
    data: str = ""  # images, labelled or not: a folder, or a set by name
    images: int = 8  # of them, chosen by the seed
    size: int | tuple[int, int] | None = None  # pixels at which the encoder sees the images; null: its own size
    block: int = -1  # whose attention, counted from 0, or from the last with -1
    query: Literal["auto", "cls", "mean"] = "auto"  # who looks: the class token or all patches; auto: cls if there is
    rollout: bool = False  # one more column: attention through all blocks
    picture: str = ""  # the PNG to draw


def run(config: Config) -> dict[str, Any]:
    """Attention and tokens of some images; draws the picture and writes <run>/eval/attention.json. Raises UserError."""
    check_range("", config, 1, None, "images", "size")
    if not config.data:
        raise UserError("data is missing: attention needs images, labelled or not, data=<folder>.")
    if not config.picture:
        raise UserError("picture is missing: name the PNG to draw, picture=attention.png.")
    pictures.check(config.picture)
    frozen = load_frozen(config)
    size = image_size(frozen, config.size)
    encoder = frozen.subject.encoder
    blocks = len(encoder.model.blocks)
    if not -blocks <= config.block < blocks:
        raise UserError(
            f"block={config.block} is not one of the {blocks} blocks: give -1 for the last, or 0 and above."
        )
    for block in encoder.model.blocks:
        if type(getattr(block, "attn", None)) is not Attention:
            raise UserError(f"run={config.run} has an attention of its own kind, which is not known here.")
    if config.query == "cls" and not encoder.model.has_class_token:
        raise UserError(f"run={config.run} has no class token: use query=mean.")
    source = frozen.open(config.data)
    results = on_first_process(lambda: show(config, frozen, source, size))
    frozen.save(
        "attention", results, data=config.data, size=list(size), patches=list(encoder.grid(size)),
        features="patch tokens", precision="float32",
    )  # fmt: skip
    return results


def show(config: Config, frozen: Frozen, source: Source, size: tuple[int, int]) -> dict[str, Any]:
    """Draw, and describe the heads; prints a table."""
    encoder, device = frozen.subject.encoder.eval(), frozen.accelerator.device
    chosen = random_subset(source, config.images, config.seed, "attention")
    images = readable(chosen, size)
    if not images:
        raise UserError(f"None of the {len(chosen)} chosen images of {config.data} can be read.")
    grid, prefix = encoder.grid(size), encoder.model.num_prefix_tokens
    query = "mean" if config.query == "mean" or not encoder.model.has_class_token else "cls"
    patches, maps, rolled, described = [], [], [], []
    for image in images:  # one by one: attention is large
        x = image.unsqueeze(0).to(device) / 255
        looked = attend(encoder, frozen.normalize, x, config.block, with_means=config.rollout)
        patches.append(looked.patches)
        maps.append(from_query(looked.weights, query, prefix))
        described.append(describe(looked.weights, query, prefix, grid))
        if config.rollout:
            rolled.append(from_query(rollout(looked.means).unsqueeze(1), query, prefix))
    maps, described = torch.cat(maps), torch.stack(described).mean(dim=0)
    drawn = {"mean": maps.mean(dim=1, keepdim=True)}
    if rolled:
        drawn["rollout"] = torch.cat(rolled)
    drawn |= {str(head): maps[:, head : head + 1] for head in range(maps.shape[1])}
    colours = principal_colours(torch.cat(patches)).unflatten(1, grid)
    cell = cell_size(size)
    rows = [
        [
            pictures.image_of(image, cell, smooth=True),
            pictures.image_of(255 * colours[i].permute(2, 0, 1), cell),
            *(pictures.image_of(pictures.heat(map_[i, 0].unflatten(0, grid)), cell) for map_ in drawn.values()),
        ]
        for i, image in enumerate(images)
    ]
    place = config.block % len(encoder.model.blocks)
    who = "the class token" if query == "cls" else "all patches"
    title = f"attention of {who} in block {place}, by head"
    pictures.save(pictures.montage(rows, column_names=["image", "patches", *drawn], title=title), config.picture)
    heads = [dict(zip(MEASURES, (round(v, 4) for v in row), strict=True)) for row in described.tolist()]
    say(
        f"{title}, of {config.run}: {len(images)} images at {size[0]} x {size[1]} pixels, {grid[0]} x {grid[1]} patches"
    )
    header = ["head", "entropy, bits", "distance, patches", "on prefix %"]
    rows = [[str(h), *(f"{one[name]:.2f}" for name in MEASURES)] for h, one in enumerate(heads)]
    say(*records.table(header, rows))
    return {"block": place, "query": query, "images": len(images), "heads": heads}


def readable(source: Source, size: tuple[int, int]) -> list[Tensor]:
    """[C, h, w] float in [0, 255] for each image that can be read: as large as fits, then its centre."""
    images = []
    for index in range(len(source)):
        try:
            images.append(centre(source.read(index), size).float())
        except BadImage as error:
            say(f"{source.name(index)} cannot be read and is left out: {error}.")
    return images


class Looked(NamedTuple):
    """What some images gave; on the CPU."""

    weights: Tensor  # [B, H, N, N] float32, attention of the block: of token n (row), to token m
    means: list[Tensor]  # [B, N, N] for each block, the mean over its heads, if asked for
    patches: Tensor  # [B, P, D] float32


@torch.inference_mode()
def attend(encoder: Encoder, normalize: Normalize, images: Tensor, block: int = -1, with_means: bool = False) -> Looked:
    """[B, C, H, W] in [0, 1] -> attention of a block, and the patch tokens, in float32.

    Memory grows with B times the square of the patches.
    """
    blocks, inputs = encoder.model.blocks, []
    hooks = [
        hook
        for one in blocks
        for hook in (
            one.register_forward_pre_hook(lambda module, args: None),  # a block with hooks is run as timm runs it
            one.attn.register_forward_pre_hook(lambda module, args: inputs.append(args[0])),
        )
    ]
    try:
        with torch.compiler.set_stance("force_eager"):
            patches = encoder(normalize(images)).patches.float().cpu()
    finally:
        for hook in hooks:
            hook.remove()
    weights = attention_of(blocks[block].attn, inputs[block]).cpu()
    pairs = zip(blocks, inputs, strict=True) if with_means else ()
    return Looked(weights, [attention_of(one.attn, given).mean(dim=1).cpu() for one, given in pairs], patches)


def attention_of(module: Attention, x: Tensor) -> Tensor:
    """[B, N, D], what the module is given -> [B, H, N, N], rows that sum to 1."""
    q, k, _ = module.qkv(x).unflatten(2, (3, module.num_heads, module.head_dim)).permute(2, 0, 3, 1, 4)
    q, k = module.q_norm(q), module.k_norm(k)
    return (q.float() @ k.float().transpose(-2, -1) * module.scale).softmax(dim=-1)


def rollout(means: list[Tensor]) -> Tensor:
    """[B, N, N] for each block, the first first -> [B, N, N]: how much of each input token is in each output."""
    identity = torch.eye(means[0].shape[-1])
    through = identity.expand(len(means[0]), -1, -1)
    for mean in means:
        through = (0.5 * mean + 0.5 * identity) @ through
    return through


def from_query(weights: Tensor, query: str, prefix: int) -> Tensor:
    """[B, H, N, N] -> [B, H, P], to the patches, from the class token (the first) or as the mean over all patches."""
    rows = weights[:, :, 0] if query == "cls" else weights[:, :, prefix:].mean(dim=2)
    return rows[:, :, prefix:]


def describe(weights: Tensor, query: str, prefix: int, grid: tuple[int, int]) -> Tensor:
    """[B, H, N, N] -> [H, 3]: entropy of the query's attention in bits, distance from patches to what they look at in
    patches, and share of the query's attention on prefix tokens in percent."""
    rows = weights[:, :, :1] if query == "cls" else weights[:, :, prefix:]
    entropy = torch.special.entr(rows).sum(dim=-1).mean(dim=(0, 2)) / math.log(2)
    on_prefix = rows[..., :prefix].sum(dim=-1).mean(dim=(0, 2))
    place = torch.cartesian_prod(torch.arange(grid[0]), torch.arange(grid[1])).float().view(-1, 2)
    among = weights[:, :, prefix:, prefix:]
    towards = (among * torch.cdist(place, place)).sum(dim=-1) / among.sum(dim=-1)
    return torch.stack([entropy, towards.mean(dim=(0, 2)), 100 * on_prefix], dim=1)


def principal_colours(patches: Tensor) -> Tensor:
    """[B, P, D] -> [B, P, 3] in [0, 1]: coordinates along the three directions in which the tokens differ most.

    A direction points where its largest coordinate is positive, so that the colours do not depend on the machine.
    """
    x = patches.flatten(0, 1).double()
    x = x - x.mean(dim=0)
    directions = torch.linalg.eigh(x.t() @ x).eigenvectors.flip(1)[:, :3]
    largest = directions.gather(0, directions.abs().argmax(dim=0, keepdim=True))
    found = x @ (directions * largest.sign())
    low, high = found.quantile(torch.tensor([FAINT, 1 - FAINT], dtype=torch.float64), dim=0)
    colours = ((found - low) / (high - low).clamp(min=1e-12)).clamp(0, 1).float()
    return colours.unflatten(0, patches.shape[:2])


def cell_size(size: tuple[int, int]) -> tuple[int, int]:
    """Pixels of a cell: a whole multiple of a small image, or less than a large one."""
    factor = SIDE // max(size) if max(size) <= SIDE else 2 * SIDE / max(size) if max(size) > 2 * SIDE else 1
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))
