"""The findings as one page, or as one picture: parts with charts, and a sentence for each that says how to read it."""

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ..evaluation import pictures
from ..report.pictures import Grid, encoded
from ..report.shell import Html, document, el, picture_table, prose, section, table
from . import measures
from .collect import Findings
from .drawing import Chart, Series, cells, chart, hex_of, mosaic

# How to read each part, and what is healthy: MAE, DINO and untrained are those of eval/README.md, on CIFAR-10.
KNN = (
    "Each image is classified by the 20 images whose features are nearest, for each block by itself. In a healthy "
    "encoder later blocks are better than the first. If the last falls back, as in MAE (41.2 % in block 10, 39.8 % in "
    "block 11), its features serve the loss more than you. An untrained encoder is flat (28 to 30 %)."
)
RANK = (
    "How many directions the features use. Near 1, all images have the same feature: a collapse. In a healthy encoder "
    "it rises with the depth: MAE from 41 to 118 of 192, DINO from 80 to 132. Untrained: 26 to 36."
)
SPECTRA = (
    "From the first block (violet) to the last (yellow). The slower a line falls, the more evenly directions are "
    "used. A line that drops to nothing has only so many. In a healthy encoder later blocks lie above earlier ones."
)
DISTANCE = (
    "How far from a patch those lie that it attends to, and over how many it spreads its attention: 6 bits of entropy "
    "are 64 patches. In a healthy encoder heads differ, and some are far below the line of even attention in one of "
    "the two: MAE looks near (0.8 to 4.4 patches), DINO narrowly (1.7 to 5.4 bits). Untrained heads all lie on both "
    "lines."
)
ROLLOUT = (
    "Rollout: how much of each patch reaches the output through all blocks (yellow: much; each map has its own "
    "scale). In a healthy encoder it follows objects and edges. Norms of the tokens after the last block: blue is the "
    "median, yellow three times as much. An even colour is healthy. Single yellow patches in an even background are "
    "artefacts."
)
NORMS = (
    "In a healthy encoder the lines lie close together: the largest norm after the last block is 1.5 times the median "
    "in MAE and in DINO, and 1.2 times untrained. A largest norm that leaves the others behind, mostly in the later "
    "blocks of large and long-trained ViTs, belongs to artefact tokens, which registers take up (arXiv 2309.16588)."
)
CKA = (
    "1 (yellow): the two blocks have the same features, rotated and scaled at most; 0: unrelated ones. In a healthy "
    "encoder similarity falls as blocks lie farther apart: the first and the last have 0.39 in MAE, 0.43 in DINO. "
    "Untrained, all have 0.99: no block changes anything. Two encoders alike in a block have learned similar "
    "features."
)
FILTERS = (
    "The directions in which the filters differ most, the first one at the top left; gray is 0. Long-trained encoders "
    "have smooth ones first: brightness, edges, colours (Dosovitskiy et al., figure 7). Noise in all of them is that "
    "of the random start: MAE after 150,000 images and DINO after 40,000 still need 36 and 37 of 48 directions for 90 "
    "% of the variance, as random filters do."
)
POSITIONS = (
    "A map for each of some patches, in its place: the cosine of its position with all others. A healthy one is "
    "brightest at its own place and fades from there. Speckles without order have not been learned yet."
)
MOST_FILTERS, ACROSS, FILTER_SIDE = 28, 7, 44  # as many as in the ViT paper
MOST_MAPS, MAP_SIDE = 7, 48  # maps of positions along a side of the grid
WRAP = 140  # letters of a line of text in a picture, or half as many beside another one
LEAST_SHARE = 0.005  # of artefacts: above it registers are wanted (DINOv2's ViT-g has 0.024)
COLOURS = ("c0", "c1")


@dataclass
class Part:
    title: str
    help: str  # how to read it, and what a healthy encoder looks like
    charts: list[Chart] = field(default_factory=list)
    images: list[tuple[Image.Image, str]] = field(default_factory=list)  # with what is below
    rows: list[list[Image.Image]] = field(default_factory=list)
    row_names: list[str] = field(default_factory=list)
    titles: list[str] = field(default_factory=list)


@dataclass
class Result:
    """Of one encoder or two, on the same images."""

    found: list[Findings]
    across: Tensor | None  # [L, M] CKA between blocks of the first and of the second
    spec: str  # the images; empty: none
    rows: list[list[Image.Image]]  # of some images: see `titles`
    names: list[str]
    titles: list[str]
    left_out: list[str]

    @property
    def labels(self) -> list[str]:
        """Short names of the encoders; empty where there is one."""
        names = [one.name.rstrip("/").rsplit("/", 1)[-1] for one in self.found]
        begins = [one.name.partition(":")[0] + ":" if one.name.startswith("untrained:") else "" for one in self.found]
        names = [begin + name.removeprefix(begin) for begin, name in zip(begins, names, strict=True)]
        return [""] if len(names) == 1 else names if names[0] != names[1] else ["run", "other"]


def sentences(one: Findings) -> list[str]:
    """What the findings say, each with its numbers."""
    said, last = [], len(one.ranks) - 1
    if one.knn:
        share = one.knn[one.best] / 100
        noise = 196 * math.sqrt(share * (1 - share) / one.knn_images)
        said.append(
            f"Best {one.unit} by k-NN: {one.best} with {one.knn[one.best]:.1f} %; the last, {last}, has "
            f"{one.knn[last]:.1f} % (always the largest class: {one.chance:.1f} %). Of {one.knn_images:,} images, each "
            f"is classified by all the others, and other images could change a number by {noise:.1f} points."
        )
    if one.artefacts:
        worst = max(range(last // 2, last + 1), key=lambda block: one.artefacts[block])
        share, times = one.artefacts[worst], max(row[-1] / row[1] for row in one.norms[last // 2 :])
        tokens = f"{share:.2%} of the tokens of {one.unit} {worst} have" if share else "no token has"
        said.append(
            f"Artefact tokens: {tokens} a norm above {measures.OUTLIER:g} times the median of the {one.unit}; the "
            f"largest has {times:.1f} times.{_registers(one, share)}"
        )
    if one.ranks:
        said.append(
            f"Effective rank of the features: {one.ranks[0]:.0f} after the first {one.unit}, {one.ranks[last]:.0f} "
            f"after the last, of {len(one.spectra[last])} at most."
        )
    if one.heads is not None and one.grid:
        by_block = one.heads[:, :, 1]
        said.append(
            f"Attention distance: heads reach {by_block.min():.1f} to {by_block.max():.1f} patches, on average "
            f"{by_block[0].mean():.1f} in the first block and {by_block[-1].mean():.1f} in the last. Even attention "
            f"would reach {measures.even_distance(one.grid):.1f}."
        )
    if one.filters:
        shares, weight = one.filters[1], one.filters[0]
        drawn = torch.randn(one.width, *weight.shape[1:], generator=torch.Generator().manual_seed(0))
        by_chance = measures.count_for(measures.filter_components(drawn)[1], 0.9)
        said.append(
            f"Filters of the patch embedding: 90 % of their variance is in {measures.count_for(shares, 0.9)} of "
            f"{weight[0].numel()} directions; random filters need {by_chance}."
        )
    if one.positions:
        p = one.positions
        fixed = " They are the sines and cosines of the start, which no training has changed." if p.fixed else ""
        said.append(f"Positions: cosine {p.near:.2f} between neighbours, {p.far:.2f} half the image apart.{fixed}")
    return said


def _registers(one: Findings, share: float) -> str:
    """What to do about such a share of artefacts."""
    if one.unit != "block":
        return ""
    have, more = (f" It has {one.registers} registers.", "more ") if one.registers else ("", "")
    if share <= LEAST_SHARE:
        return f"{have} No {more}registers are wanted."
    return f"{have} Train with {more}registers: `model.args={{reg_tokens: {2 * one.registers or 4}}}`."


def parts(result: Result) -> list[Part]:
    """All that can be shown, in the order of the page."""
    found = result.found
    chance = {"largest class": found[0].chance}
    made = [
        _by_block("Which block is best", KNN, result, "k-NN accuracy, %", [one.knn for one in found], chance),
        _by_block("Effective rank of the features", RANK, result, "effective rank", [one.ranks for one in found]),
        _spectra(result),
        _distance(result),
        Part("What reaches the output", ROLLOUT, rows=result.rows, row_names=result.names, titles=result.titles),
        _norms(result),
        _similar(result),
        _filters(result),
        _positions(result),
    ]
    return [part for part in made if part.charts or part.images or part.rows]


def _by_block(
    title: str, help_text: str, result: Result, what: str, values: Sequence[Sequence[float]],
    levels: dict[str, float] | None = None,
) -> Part:  # fmt: skip
    """A chart with a line for each encoder."""
    series = [
        Series(label, list(enumerate(map(float, one))), COLOURS[n], dashed=n > 0)
        for n, (label, one) in enumerate(zip(result.labels, values, strict=True))
        if len(one)
    ]
    unit = result.found[0].unit
    return Part(title, help_text, [chart(f"{what} by {unit}", series, unit, levels)] if series else [])


def _spectra(result: Result) -> Part:
    charts = []
    for one, label in zip(result.found, result.labels, strict=True):
        last, series = len(one.spectra) - 1, []
        for n, values in enumerate(one.spectra):
            shares = (values / values.max().clamp(min=1e-30)).tolist()
            named = f"{one.unit} {n}" if n in {0, last // 2, last} else ""
            colour = hex_of(0.9 * n / max(last, 1))
            points = [(i + 1.0, max(share, 1e-6)) for i, share in enumerate(shares) if share > 1e-6]
            series.append(Series(named, points, colour, dots=False))
        if series:
            about = f"singular values by {one.unit}, as shares of the largest"
            charts.append(chart(about, series, _of(label, "singular value number"), log=True))
    return Part("Singular values of the features", SPECTRA, charts)


def _of(label: str, text: str) -> str:
    return f"{label}: {text}" if label else text


def _distance(result: Result) -> Part:
    charts = []
    for column, about in (
        (1, "mean attention distance of each head, in patches"),
        (0, "entropy of each head, in bits"),
    ):
        series: list[Series] = []
        levels: dict[str, float] = {}
        for n, (one, label) in enumerate(zip(result.found, result.labels, strict=True)):
            if one.heads is None or one.grid is None:
                continue
            even = measures.even_distance(one.grid) if column else math.log2(math.prod(one.grid))
            levels["even attention"] = max(even, levels.get("even attention", 0.0))
            points = [(block + 0.16 * n, float(v)) for block, row in enumerate(one.heads[..., column]) for v in row]
            series.append(Series(label, points, COLOURS[n], dashed=n > 0, joined=False))
        if series:
            charts.append(chart(about, series, "block", levels, low=0.0))
    return Part("How far the heads look, and how narrowly", DISTANCE, charts)


def _norms(result: Result) -> Part:
    charts = []
    for one, label in zip(result.found, result.labels, strict=True):
        if not one.norms:
            continue
        names = ("5 %", "median", "95 %", "largest")
        series = [
            Series(name, [(float(block), row[n]) for block, row in enumerate(one.norms)], colour, dashed, dots=n == 1)
            for n, (name, colour, dashed) in enumerate(
                zip(names, ("soft", "c0", "soft", "c1"), (True, False, False, True), strict=True)
            )
        ]
        charts.append(chart(f"norms of patch tokens by {one.unit}", series, _of(label, one.unit), log=True))
    return Part("Norms of the patch tokens", NORMS, charts)


def _similar(result: Result) -> Part:
    charts = []
    for one, label in zip(result.found, result.labels, strict=True):
        if one.cka is not None:
            name = _of(label, one.unit)
            charts.append(cells("CKA between blocks", one.cka, name, name))
    if result.across is not None:
        down, across = (_of(label, one.unit) for label, one in zip(result.labels, result.found, strict=True))
        charts.append(cells("CKA between the blocks of two encoders", result.across, across, down))
    return Part("Which blocks are similar", CKA, charts)


def _filters(result: Result) -> Part:
    images = []
    for one, label in zip(result.found, result.labels, strict=True):
        if one.filters:
            components = one.filters[0][:MOST_FILTERS]
            largest = components.flatten(1).abs().amax(dim=1).view(-1, 1, 1, 1)
            sheet = mosaic(list(127.5 + 127.5 * components / largest.clamp(min=1e-12)), ACROSS, FILTER_SIDE)
            share = float(one.filters[1][: len(components)].sum())
            images.append((sheet, _of(label, f"{len(components)} directions with {share:.0%} of the variance")))
    return Part("Filters of the patch embedding", FILTERS, images=images)


def _positions(result: Result) -> Part:
    images = []
    for one, label in zip(result.found, result.labels, strict=True):
        if p := one.positions:
            rows, columns = ([*range(0, n, -(-n // MOST_MAPS))] for n in p.grid)
            shares = (p.similarity - p.similarity.min()) / (1 - p.similarity.min()).clamp(min=1e-12)
            maps = [pictures.viridis(shares[r * p.grid[1] + c].unflatten(0, p.grid)) for r in rows for c in columns]
            lowest = f"violet is a cosine of {p.similarity.min():.2f}, yellow of 1"
            images.append((mosaic(maps, len(columns), MAP_SIDE), _of(label, lowest)))
    return Part("Similarity of the position embeddings", POSITIONS, images=images)


def html(result: Result) -> str:
    """The page."""
    found = result.found
    names = " and ".join(one.name for one in found)
    data = f" {found[0].images:,} images of {result.spec}." if found[0].images else ""
    body = [
        el("header", el("h1", f"Inspection of {names}"), el("p", f"{_features(found)}.{data}", class_="made")),
        [_short(one, label) for one, label in zip(found, result.labels, strict=True)],
        el("div", [_part(part) for part in parts(result)], class_="parts"),
        [_table(one, label) for one, label in zip(found, result.labels, strict=True) if one.images],
        _left_out(result.left_out),
    ]
    return document(f"inspection of {names}", [part for part in body if part is not None])


def _features(found: Sequence[Findings]) -> str:
    return "Features: " + ", ".join(dict.fromkeys(f"{one.what} of each {one.unit}" for one in found))


def _short(one: Findings, label: str) -> Html:
    return el(
        "section",
        el("h2", f"In short: {label}" if label else "In short"),
        el("ul", [el("li", prose(sentence)) for sentence in sentences(one)]),
    )


def _part(part: Part) -> Html:
    figures = [el("figure", one.svg(), el("figcaption", one.about)) for one in part.charts]
    figures += [el("figure", el("img", src=encoded(one, lossless=True), alt=below), el("figcaption", below))
                for one, below in part.images]  # fmt: skip
    rows = [[encoded(image) for image in row] for row in part.rows]
    grid = picture_table(Grid(part.titles, rows, part.row_names)) if rows else None
    inside = section(part.title, part.help, el("div", figures, class_="charts") if figures else None, grid)
    return el("div", inside, class_="wide" if len(figures) > 1 or rows else None)


def header(one: Findings) -> list[str]:
    return [one.unit, "k-NN %", "rank", "distance", "entropy", "norm", "artefacts %", "CKA to last"]


def rows_of(one: Findings) -> list[list[str]]:
    """A row for each block; what is not known is empty."""
    rows = []
    for block, rank in enumerate(one.ranks):
        assert one.cka is not None
        heads = None if one.heads is None else one.heads[block, :, 1]
        rows.append([
            str(block), f"{one.knn[block]:.1f}" if one.knn else "", f"{rank:.1f}",
            "" if heads is None else f"{heads.mean():.1f} ({heads.min():.1f}-{heads.max():.1f})",
            "" if one.heads is None else f"{one.heads[block, :, 0].mean():.1f}",
            f"{one.norms[block][1]:.1f}", f"{100 * one.artefacts[block]:.2f}", f"{one.cka[block, -1]:.2f}",
        ])  # fmt: skip
    return rows


def _table(one: Findings, label: str) -> Html:
    title = f"Each {one.unit} in numbers" + (f": {label}" if label else "")
    help_text = (
        "Distance: mean over the heads, in patches, with the lowest and the highest. Entropy: mean over the heads, in "
        f"bits. Norm: the median. CKA to last: similarity to the last {one.unit}."
    )
    return section(title, help_text, table(header(one), rows_of(one), sortable=True))


def _left_out(left_out: Sequence[str]) -> Html | None:
    return section("What is left out", "", el("ul", [el("li", prose(one)) for one in left_out])) if left_out else None


def png(result: Result) -> Image.Image:
    """The pictures of the page with their help, two in a row where they are narrow."""
    sheets = [_words(f"Inspection of {' and '.join(one.name for one in result.found)}", WRAP, title=True)]
    for one, label in zip(result.found, result.labels, strict=True):
        sheets += [_words(_of(label, sentence), WRAP) for sentence in sentences(one)]
    narrow = False
    for part in parts(result):
        wide = len(part.charts) + len(part.images) > 1 or bool(part.rows)
        letters = WRAP if wide else WRAP // 2
        stack = [_words(part.title, letters, title=True), _words(part.help, letters)]
        shown = [(one.image(), one.about) for one in part.charts] + part.images
        if shown:
            stack.append(_beside([pictures.stacked([one, _words(below, WRAP // 2)]) for one, below in shown]))
        if part.rows:
            stack.append(pictures.montage([list(row) for row in zip(*part.rows, strict=True)], part.titles))
        sheet = pictures.stacked(stack)
        sheets.append(_beside([sheets.pop(), sheet]) if narrow and not wide else sheet)
        narrow = not wide and not narrow
    return pictures.stacked(sheets, gap=12)


def _words(text: str, letters: int, title: bool = False) -> Image.Image:
    """Black on white, in lines of so many letters; a title in half as many larger ones."""
    lines = textwrap.wrap(pictures.drawable(text.replace("`", "")), letters // (1 + title)) or [""]
    size, height = (20, 30) if title else (13, 18)
    width = max(pictures.text_width(line, size) for line in lines)
    sheet = Image.new("RGB", (width + 8, height * len(lines) + 4), pictures.PAPER)
    for n, line in enumerate(lines):
        ImageDraw.Draw(sheet).text((4, n * height), line, pictures.INK, pictures.font_for(line, size))
    return sheet


def _beside(images: Sequence[Image.Image], gap: int = 28) -> Image.Image:
    height, width = (max(one.size[axis] for one in images) for axis in (1, 0))
    whole = Image.new("RGB", (len(images) * (width + gap), height), pictures.PAPER)
    for n, one in enumerate(images):
        whole.paste(one, (n * (width + gap), 0))
    return whole
