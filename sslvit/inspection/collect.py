"""What is measured of one encoder, from its weights and from batches of images."""

from dataclasses import dataclass, field
from typing import Any

import torch
from timm.layers import Attention
from torch import Tensor, nn

from ..errors import UserError
from ..evaluation.attention import attention_inputs, attention_of, describe, from_query, rollout
from ..evaluation.frozen import Frozen
from ..model.encoder import NUM_BLOCKS, Encoder, sincos
from . import measures

FOR_ATTENTION, FOR_KNN, SHOWN = 256, 5000, 8  # images
VALUES_AT_ONCE = 2**24  # of the attention of one block
QUANTILES = (0.05, 0.5, 0.95)


@dataclass
class Positions:
    similarity: Tensor  # [N, N] cosines
    grid: tuple[int, int]
    near: float
    far: float
    fixed: bool  # sines and cosines, not trained


@dataclass
class Findings:
    """Of one encoder. Lists have an entry for each block, or for each stage of a model without blocks."""

    name: str  # as the user gave it
    unit: str  # "block" or "stage"
    width: int  # of a token, or of the last stage
    what: str  # the features, in words
    images: int = 0
    filters: tuple[Tensor, Tensor] | None = None  # components [K, C, p, q] and their shares [K]
    positions: Positions | None = None
    grid: tuple[int, int] | None = None  # of the attention
    heads: Tensor | None = None  # [L, H, 3]: see `attention.describe`
    samples: list[tuple[int, Tensor, Tensor]] = field(default_factory=list)  # image, rollout [h, w], norms [h, w]
    query: str = ""  # of the rollout: the class token, or the mean over all patches
    norms: list[tuple[float, ...]] = field(default_factory=list)  # QUANTILES and the largest
    artefacts: list[float] = field(default_factory=list)  # shares
    registers: int = 0
    spectra: list[Tensor] = field(default_factory=list)
    ranks: list[float] = field(default_factory=list)
    cka: Tensor | None = None  # [L, L]
    knn: list[float] = field(default_factory=list)  # percent
    knn_images: int = 0
    chance: float = 0.0  # percent: all images are said to be of the largest class
    left_out: list[str] = field(default_factory=list)

    @property
    def best(self) -> int:
        return max(range(len(self.knn)), key=lambda block: self.knn[block])


class Meter:
    """Measures one encoder: batches go in, findings come out."""

    def __init__(self, frozen: Frozen) -> None:
        if not isinstance(frozen.encoder, Encoder):
            raise UserError("pixels have no blocks to look into: give an encoder.")
        if frozen.pool in NUM_BLOCKS:
            raise UserError(f"pool={frozen.pool} reads several blocks at once: give cls, mean or cls+mean.")
        self.frozen, self.encoder, self.cka = frozen, frozen.encoder, measures.Cka()
        vit = self.encoder.is_vit
        unit, what = ("block", frozen.describe()) if vit else ("stage", "mean of the map")
        self.found = Findings(frozen.subject.name, unit, self.encoder.width, what)
        self.norms: list[measures.Norms] = []
        self.spectra: list[measures.Spectrum] = []
        self.bank: list[list[Tensor]] = []
        self.numbers: list[Tensor] = []
        self.attended, self.sums = 0, torch.zeros(())
        self.attends = vit and all(type(getattr(b, "attn", None)) is Attention for b in self.encoder.model.blocks)
        self._look_at_weights()

    def _look_at_weights(self) -> None:
        found, model = self.found, self.encoder.model
        projection = getattr(getattr(model, "patch_embed", None), "proj", None)
        if isinstance(projection, nn.Conv2d):
            found.filters = measures.filter_components(projection.weight)
        if not self.encoder.is_vit:
            found.left_out.append(
                f"{found.name} is a {type(model).__name__}, not a plain ViT: its stages are shown, without positions, "
                "attention and rollout" + ("." if found.filters else ", and without the filters of a patch embedding.")
            )
            return
        found.registers = 0 if model.reg_token is None else model.reg_token.shape[1]
        found.query = "mean" if self.encoder.pool == "mean" or not model.has_class_token else "cls"
        found.grid = self.encoder.grid()
        if not self.attends:
            found.left_out.append(f"{found.name} has an attention that is not timm's plain one: it is left out.")
        if model.pos_embed is None:
            found.left_out.append(f"{found.name} has no table of position embeddings.")
            return
        grid, width = model.patch_embed.grid_size, self.encoder.width
        table = model.pos_embed[0, -grid[0] * grid[1] :].detach().float().cpu()
        similarity = measures.cosines(table)
        fixed = width % 4 == 0 and torch.allclose(table, sincos(width, grid, 0)[0], atol=1e-4)
        found.positions = Positions(similarity, grid, *measures.near_and_far(similarity, grid), fixed)

    @torch.inference_mode()
    def add(self, numbers: Tensor, x: Tensor) -> list[Tensor]:
        """[B] numbers of images, [B, C, H, W] normalised -> the features [B, D] of each block, on the CPU."""
        found, features, maps = self.found, [], []
        for tokens, feature in self._blocks(x):
            maps.append(tokens)
            features.append(feature)
        if not all(bool(torch.isfinite(feature).all()) for feature in features):
            raise UserError(f"run={found.name} gives features that are not finite numbers: try precision=float32.")
        if not self.norms:
            self.norms = [measures.Norms() for _ in features]
            self.spectra = [measures.Spectrum() for _ in features]
        for norms, values in zip(self.norms, maps, strict=True):
            norms.add(values)
        for spectrum, feature in zip(self.spectra, features, strict=True):
            spectrum.add(feature)
        self.cka.add(features, features)
        if sum(map(len, self.numbers)) < FOR_KNN:
            self.numbers.append(numbers)
            self.bank.append(features)
        if self.attends and self.attended < FOR_ATTENTION:
            self._attend(numbers, x[: FOR_ATTENTION - self.attended], maps[-1])
        found.images += len(numbers)
        return features

    def _blocks(self, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        """For each block: norms of the patch tokens [B, N], and the features [B, D] after the final norm."""
        made: list[tuple[Tensor, Tensor]] = []
        model, pool, prefix = self.encoder.model, self.frozen.pool, getattr(self.encoder.model, "num_prefix_tokens", 0)

        def reduce(module: nn.Module, args: Any, output: Tensor) -> None:  # at once: all blocks' tokens are much
            tokens = model.norm(output)
            parts = [tokens[:, 0] if part == "cls" else tokens[:, prefix:].mean(dim=1) for part in pool.split("+")]
            made.append((output[:, prefix:].float().norm(dim=-1).cpu(), torch.cat(parts, dim=1).float().cpu()))

        hooks = [block.register_forward_hook(reduce) for block in model.blocks] if self.encoder.is_vit else []
        try:
            with self.frozen.accelerator.autocast(), torch.compiler.set_stance("force_eager"):
                if self.encoder.is_vit:
                    self.encoder(x)
                else:
                    for stage in self._stages(x):  # [B, D, h, w]
                        stage = stage.float().cpu()
                        made.append((stage.norm(dim=1).flatten(1), stage.mean(dim=(2, 3))))
        finally:
            for hook in hooks:
                hook.remove()
        return made

    def _stages(self, x: Tensor) -> list[Tensor]:
        try:
            return self.encoder.model.forward_intermediates(x, intermediates_only=True)
        except (AttributeError, NotImplementedError, TypeError) as error:
            raise UserError(f"{self.encoder.architecture} has no stages that timm can show.") from error

    def _attend(self, numbers: Tensor, x: Tensor, norms: Tensor) -> None:
        """Attention of some images in float32, a few at once."""
        encoder, found = self.encoder, self.found
        model, grid, prefix = encoder.model, encoder.grid(), encoder.model.num_prefix_tokens
        tokens = prefix + grid[0] * grid[1]
        few = max(1, VALUES_AT_ONCE // (model.blocks[0].attn.num_heads * tokens**2))
        for part in x.split(few):
            inputs, _ = attention_inputs(encoder, part)
            means, described = [], []
            for block, one in zip(model.blocks, inputs, strict=True):
                weights = attention_of(block.attn, one).cpu()
                described.append(describe(weights, "mean", prefix, grid))
                means.append(weights[: SHOWN - len(found.samples)].mean(dim=1))
            self.sums = self.sums + len(part) * torch.stack(described).double()
            if len(found.samples) < SHOWN:
                maps = from_query(rollout(means).unsqueeze(1), found.query, prefix)[:, 0]
                places = range(self.attended, self.attended + len(maps))
                for n, one in zip(places, maps, strict=True):
                    at = n - found.images
                    found.samples.append((int(numbers[at]), one.unflatten(0, grid), norms[at].unflatten(0, grid)))
            self.attended += len(part)

    def finish(self, labels: Tensor, classes: int) -> None:
        """All batches are in. labels: [images of the source], -1 where there is none."""
        found = self.found
        if not found.images:
            return
        if self.attended:
            found.heads = self.sums / self.attended
        found.norms = [(*map(one.quantile, QUANTILES), one.largest) for one in self.norms]
        found.artefacts = [one.artefacts() for one in self.norms]
        found.spectra, found.ranks = [one.values() for one in self.spectra], [one.rank() for one in self.spectra]
        found.cka = self.cka.value()
        here = labels[torch.cat(self.numbers)]
        known = here >= 0
        here = here[known]
        if len(here) > 2 * measures.K and len(here.unique()) > 1:
            found.knn_images, found.chance = len(here), 100 * here.bincount().max().item() / len(here)
            blocks = zip(*self.bank, strict=True)
            found.knn = [measures.knn(torch.cat(features)[known], here, classes) for features in blocks]
        else:
            found.left_out.append(f"k-NN by block needs more than {2 * measures.K} labelled images of several classes.")
