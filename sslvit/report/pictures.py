"""The pictures of a report: images, crops, predictions, attention, and a map of the features. Each part stands alone:
one that fails or comes too late leaves a sentence behind."""

import base64
import importlib.util
import io
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .. import data, objectives, pretrained, rng
from ..checkpoints import state
from ..checkpoints.journal import made_here
from ..data import Source, open_source, split_part
from ..data.augment import Normalize
from ..errors import UserError, printable
from ..evaluation import pictures as drawing
from ..evaluation.features import CentreCropped
from ..model.encoder import Encoder
from ..objectives import Objective
from .facts import Facts, command_name
from .samples import columns_of, readable, views_of
from .shell import Grid

GALLERY, ROWS, MAPPED = 24, 8, 512  # images alone, in tables, and on the map
FOR_COLOURS = 32  # images whose patches choose the colours together
SIDE, TILE = 112, 40  # pixels of an image, and of one on the map
MOST_HEADS, MOST_STEPS = 12, 4
NEAREST, CLUSTERS, MEMBERS = 6, 8, 6
BATCH = 64
UMAP_TAKES = 30.0  # seconds, most of them to compile it
LARGEST_SETTING = 2**22  # a million local crops would take all memory
VALUES_READ, VALUES_RUN = 2**28, 2**25  # of the images of a map that are held in memory, and run at once


@dataclass
class Map:
    """Features of some images."""

    sheet: str  # all images, TILE pixels each, `across` in a row
    across: int
    points: list[tuple[float, float]]  # in [0, 1]
    names: list[str]
    labels: list[int]  # -1: none
    classes: list[str]
    clusters: list[int]
    explained: float | None  # share of the variance that two directions have; None: by UMAP
    neighbours: list[tuple[int, list[tuple[int, float]]]]  # of some images: (number, similarity) of the nearest
    agreement: dict[str, float]  # share of images whose nearest neighbour has their label: encoder, pixels, chance
    groups: list[tuple[int, list[int], list[int], str]]  # size, typical images, strangest images, most frequent label
    images: dict[int, str]  # those of neighbours and groups, larger


@dataclass
class Pictures:
    spec: str = ""  # where the images come from
    gallery: list[tuple[str, str]] = field(default_factory=list)  # image, name
    crops: Grid | None = None
    predictions: Grid | None = None
    attention: Grid | None = None
    attention_of: str = ""  # a sentence: of which tokens, in which block
    over_time: Grid | None = None
    map: Map | None = None
    missing: list[str] = field(default_factory=list)


class TooLate(Exception):
    """The time for pictures is used up."""


class Clock:
    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    def check(self) -> None:
        if time.monotonic() > self.end:
            raise TooLate


def make(facts: Facts, seconds: float, spec: str = "", umap: bool = False) -> Pictures:
    """All pictures that can be made within about so many seconds. spec: images, where they are not those that the run
    names. umap: whether the map may be drawn by UMAP, which cannot be stopped when the time is used up."""
    found, clock = Pictures(), Clock(seconds)
    again = f"`sslvit report {command_name(facts)}` makes"

    @contextmanager
    def part(what: str) -> Iterator[None]:
        try:
            clock.check()
            yield
        except TooLate:
            found.missing.append(f"There is no {what}, since the time for pictures was used up: {again} it.")
        except UserError as error:
            found.missing.append(f"There is no {what}: {printable(str(error))}")
        except (
            Exception,
            RecursionError,
        ) as error:  # of damaged files, foreign models, full memory: a report is not a run
            reason = (str(error).strip().splitlines() or [""])[0][:200]
            found.missing.append(f"There is no {what} ({printable(f'{type(error).__name__}: {reason}')}).")

    with part("picture"):
        config = pretrained.settings_of(facts.path)
        if max(filter(lambda one: isinstance(one, int), vars(config.objective).values()), default=0) > LARGEST_SETTING:
            raise UserError("the settings of the objective have a number that is too large.")
        found.spec = spec or local(facts.path, facts.settings)
        source = open_source(found.spec, config.data)
        chosen = readable(source, config.seed, GALLERY)
        if not chosen:
            raise UserError(f"none of the images of {found.spec} that were tried can be read.")
        found.gallery = [(encoded(drawing.thumbnail(image, SIDE)), _name(source, i)) for i, image in chosen]
        indices, images = [i for i, _ in chosen[:ROWS]], [image for _, image in chosen[:ROWS]]
        names = [_name(source, i) for i in indices]
        with part("picture of crops"):
            columns, titles = columns_of(config, images, indices)
            found.crops = Grid(titles, _rows(columns), names)
        steps = _some(facts.checkpoints)
        with part("picture of predictions"):
            if facts.checkpoints and predicts(config.method):
                found.predictions = _predictions(facts, config, views_of(config, images, indices), steps, names, clock)
        if facts.checkpoints:
            with part("picture of attention"):
                _attention(facts, found, source, config.seed, steps, names, clock)
            with part("map of the images"):
                found.map = _map(facts, source, config.seed, clock, umap)
    return found


def local(run_dir: Path, settings: dict[str, Any]) -> str:
    """data.train of a run. Raises UserError if only a file names it: for what would be fetched from a network, and for
    images of this machine, if the run may be somebody else's. Its report could go back to whom it came from."""
    named = str(settings.get("data.train") or "")
    place = split_part(named)[0]
    if named.startswith("fractals"):
        return named
    if not (place and Path(place).expanduser().exists()):
        raise UserError(f"data.train={named} is no file or folder here: give data=<images>.")
    if not made_here(run_dir):
        raise UserError(
            f"{run_dir} is a copy, or made by an older version, so the run may be somebody else's. Images of this "
            "machine that such a run names are shown only if you name them too: give data=<images>."
        )
    return named


def _name(source: Source, index: int) -> str:
    return printable(source.name(index)[-200:])


def encoded(image: Image.Image, lossless: bool = False) -> str:
    """An image as an address that holds it."""
    file = io.BytesIO()
    image.save(file, "WEBP", lossless=lossless, quality=82, method=4)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"


def drawn(pixels: Tensor, side: int = SIDE) -> str:
    """[C, H, W] in [0, 255] of any size, as an address that holds it: small ones stay as small as they are."""
    return encoded(drawing.image_of(pixels) if max(pixels.shape[-2:]) <= side else drawing.thumbnail(pixels, side))


def _rows(columns: Sequence[Sequence[Tensor]]) -> list[list[str]]:
    return [[drawn(image) for image in row] for row in zip(*columns, strict=True)]


def _some(steps: list[int]) -> list[int]:
    """The last, the first and some between them."""
    if len(steps) <= MOST_STEPS:
        return steps
    return [steps[round(i * (len(steps) - 1) / (MOST_STEPS - 1))] for i in range(MOST_STEPS)]


def predicts(method: str) -> bool:
    """Whether a method can show what it makes of images."""
    classes = [
        one for one in vars(objectives.find(method)).values() if isinstance(one, type) and issubclass(one, Objective)
    ]
    return any(one.pictures is not Objective.pictures for one in classes)


def _predictions(
    facts: Facts, config: SimpleNamespace, views: dict[str, Tensor], steps: list[int], names: list[str], clock: Clock
) -> Grid:
    """A column for each checkpoint."""
    normalize = Normalize(*data.normalization(config.data))

    def pixels(x: Tensor) -> list[Tensor]:
        return list((normalize.undo(x) * 255).clamp(0, 255))

    objective = pretrained.objective_of(config).eval()
    first = next(name for name in views if name != "key")
    columns, titles = [pixels(views[first][0])], ["the crop"]
    for step in steps:
        clock.check()
        weights = state.read(state.folder_of(facts.path, step), state.MODEL)[1][0]
        objective.load_state_dict(weights)
        made = objective.pictures(views)
        *before, (last, result) = made.items()
        if len(columns) == 1:
            for title, x in before:
                columns.append(pixels(x))
                titles.append(title)
        columns.append(pixels(result))
        titles.append(f"{last}, step {step:,}")
    return Grid(titles, _rows(columns), names)


def _load(facts: Facts, step: int | None = None) -> pretrained.Pretrained:
    return pretrained.load(str(facts.path if step is None else state.folder_of(facts.path, step)))


def cropped(
    source: Source, encoder: Any, numbers: Sequence[int], clock: Clock | None = None, least: int = 1
) -> tuple[list[int], list[Tensor]]:
    """The readable ones of some images, as an evaluation sees them; fewer where the time is used up."""
    images = CentreCropped(source, torch.tensor(numbers), encoder.image_size)
    kept: list[int] = []
    pixels: list[Tensor] = []
    for place in range(len(numbers)):
        if clock and len(kept) >= least and time.monotonic() > clock.end:
            break
        number, image = images[place]
        if image is not None:
            kept.append(number)
            pixels.append(image)
    return kept, pixels


def can_attend(encoder: Any) -> bool:
    """Whether attention can be drawn."""
    from timm.layers import Attention

    if not isinstance(encoder, Encoder) or not encoder.is_vit:
        return False
    return all(type(getattr(block, "attn", None)) is Attention for block in encoder.model.blocks)


def _attention(
    facts: Facts, found: Pictures, source: Source, seed: int, steps: list[int], names: list[str], clock: Clock
) -> None:
    from ..evaluation.attention import attend, from_query, principal_colours

    subject = _load(facts)
    encoder = subject.encoder
    if not can_attend(encoder):
        raise UserError("the encoder has no patches that attend to one another, in timm's plain way.")
    assert isinstance(encoder, Encoder)
    indices = [i for i, _ in readable(source, seed, GALLERY)][:ROWS]
    others = rng.shuffled(
        rng.fold_in(seed, "report"), len(source), torch.arange(min(FOR_COLOURS, len(source)))
    ).tolist()
    kept, images = cropped(
        source, encoder, [*indices, *(i for i in others if i not in indices)][:FOR_COLOURS], clock, ROWS
    )
    shown = min(ROWS, len(images))
    grid, prefix = encoder.grid(), encoder.model.num_prefix_tokens
    learns_class_token = encoder.pool != "mean" and encoder.model.has_class_token
    query = "cls" if learns_class_token else "mean"

    def maps(subject: pretrained.Pretrained) -> tuple[list[Tensor], list[Tensor]]:
        normalize = Normalize(subject.mean, subject.std)
        weights, patches = [], []
        for n, image in enumerate(images):
            clock.check()
            assert isinstance(subject.encoder, Encoder)
            one = attend(subject.encoder, normalize, image.unsqueeze(0).float() / 255)
            patches.append(one.patches)
            if n < shown:
                weights.append(from_query(one.weights, query, prefix)[0])
        return weights, patches

    weights, patches = maps(subject)
    colours = principal_colours(torch.cat(patches)).unflatten(1, grid)
    heads = min(weights[0].shape[0], MOST_HEADS)
    titles = ["the image", "patches", "all heads", *(f"head {h + 1}" for h in range(heads))]
    rows = []
    for n in range(shown):
        picture = drawing.image_of(images[n].float(), drawing.cell_size(encoder.image_size, SIDE), smooth=True)
        size = (picture.height, picture.width)
        row = [encoded(picture), encoded(drawing.image_of(255 * colours[n].permute(2, 0, 1), size))]
        row += [
            encoded(on_image(picture, one.unflatten(0, grid))) for one in (weights[n].mean(dim=0), *weights[n][:heads])
        ]
        rows.append(row)
    found.attention = Grid(titles, rows, [_name(source, i) for i in kept[:shown]])
    what = "the class token" if query == "cls" else "all patches together"
    found.attention_of = f"Attention of {what} in the last block"
    found.missing += [f"{weights[0].shape[0] - heads} more heads are not shown."] if weights[0].shape[0] > heads else []
    if len(steps) > 1:
        columns, titles = [[row[0] for row in rows]], ["the image"]
        for step in steps:
            clock.check()
            weights, _ = maps(_load(facts, step)) if step != facts.checkpoints[-1] else (weights, patches)
            titles.append(f"step {step:,}")
            pictures = [
                drawing.image_of(images[n].float(), drawing.cell_size(encoder.image_size, SIDE), smooth=True)
                for n in range(shown)
            ]
            columns.append(
                [
                    encoded(on_image(picture, weights[n].mean(dim=0).unflatten(0, grid)))
                    for n, picture in enumerate(pictures)
                ]
            )
        found.over_time = Grid(titles, [list(row) for row in zip(*columns, strict=True)], found.attention.names)


def on_image(picture: Image.Image, values: Tensor) -> Image.Image:
    """A map in colours, laid over its image in gray."""
    colours = drawing.image_of(drawing.heat(values), (picture.height, picture.width), smooth=True)
    return Image.blend(picture.convert("L").convert("RGB"), colours, 0.62)


@torch.inference_mode()
def _map(facts: Facts, source: Source, seed: int, clock: Clock, umap: bool) -> Map:
    """Features of some images, their nearest neighbours and their clusters."""
    from ..evaluation import cluster
    from ..evaluation.knn import neighbours

    subject = _load(facts)
    encoder, normalize = subject.encoder.eval(), Normalize(subject.mean, subject.std)
    each = encoder.in_chans * math.prod(encoder.image_size)
    many, batch = min(MAPPED, len(source), VALUES_READ // each), max(1, min(BATCH, VALUES_RUN // each))
    order = rng.shuffled(rng.fold_in(seed, "report"), len(source), torch.arange(many)).tolist()
    half = Clock(max(0.0, (clock.end - time.monotonic()) / 2))  # for reading
    kept, images = cropped(source, encoder, order, half, min(many, BATCH))
    parts: list[Tensor] = []
    for start in range(0, len(images), batch):
        if parts:
            try:
                clock.check()
            except TooLate:
                break
        x = torch.stack([image.float() for image in images[start : start + batch]]) / 255
        parts.append(encoder.features(normalize(x)).float())
    values = torch.cat(parts) if parts else torch.zeros(0, 1)
    kept, images = kept[: len(values)], images[: len(values)]
    if len(values) < 8 or not torch.isfinite(values).all():
        raise UserError("there are too few images, or features that are not finite.")
    unit = F.normalize(values, dim=1)
    count = len(unit)
    pixels = torch.stack([F.adaptive_avg_pool2d(image.float(), 16).flatten() for image in images])
    pixels = F.normalize(pixels - pixels.mean(dim=0), dim=1)
    labels = torch.full((count,), -1) if source.labels is None else torch.from_numpy(source.labels[kept]).long()
    similarity, rows = _others(neighbours(unit, unit, min(NEAREST + 1, count)))
    agreement = {}
    known = labels >= 0
    if known.sum() > count // 2:
        shares = labels[known].bincount().double() / known.sum()
        near = {"the encoder": rows[:, 0], "raw pixels": _others(neighbours(pixels, pixels, 2))[1][:, 0]}
        agreement = {name: 100 * (labels[one] == labels)[known].double().mean().item() for name, one in near.items()}
        agreement["chance"] = 100 * shares.square().sum().item()
    k = max(2, min(CLUSTERS, count // 8))
    clusters = cluster.kmeans(unit, k, cluster.Config(seed=seed, iterations=20, restarts=1), 0)
    groups, sizes = [], clusters.bincount(minlength=k)
    for c in sizes.argsort(descending=True, stable=True).tolist():
        members = (clusters == c).nonzero()[:, 0]
        if not len(members):
            continue
        closeness = unit[members] @ F.normalize(unit[members].mean(dim=0), dim=0)
        ranked = members[closeness.argsort(descending=True, stable=True)].tolist()
        half_of = max(1, min(MEMBERS, len(ranked) // 2))
        own = labels[members][labels[members] >= 0]
        most = ""
        if len(own):
            label = int(own.bincount().argmax())
            most = f"{(own == label).double().mean():.0%} {printable(source.classes[label])}"
        groups.append((len(members), ranked[:half_of], ranked[-half_of:][::-1], most))
    queries = list(range(min(ROWS, count)))
    found = [(q, [(int(r), float(s)) for s, r in zip(similarity[q], rows[q], strict=True)]) for q in queries]
    wanted = {n for q, near in found for n in (q, *(r for r, _ in near))} | {
        n for _, a, b, _ in groups for n in (*a, *b)
    }
    across = math.ceil(math.sqrt(count))
    sheet = Image.new("RGB", (across * TILE, math.ceil(count / across) * TILE), drawing.PAPER)
    for n, image in enumerate(images):
        sheet.paste(drawing.thumbnail(image, TILE), (n % across * TILE, n // across * TILE))
    points, explained = _umap(unit) if umap and _has_time_for_umap(clock) else plane(unit)
    return Map(
        encoded(sheet),
        across,
        points,
        [_name(source, i) for i in kept],
        labels.tolist(),
        [printable(str(name)[:80]) for name in source.classes],
        clusters.tolist(),
        explained,
        found,
        agreement,
        groups,
        {n: drawn(images[n].float(), 80) for n in sorted(wanted)},
    )


def _others(found: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """(similarity, rows) [N, k + 1] -> [N, k] without the images themselves."""
    similarity, rows = found
    own = torch.arange(len(rows)).unsqueeze(1)
    rest = (rows == own).int().argsort(dim=1, stable=True)[:, :-1]
    return similarity.gather(1, rest), rows.gather(1, rest)


def _has_time_for_umap(clock: Clock) -> bool:
    """Whether it is installed, too."""
    return importlib.util.find_spec("umap") is not None and clock.end - time.monotonic() >= UMAP_TAKES


def _umap(x: Tensor) -> tuple[list[tuple[float, float]], None]:
    """[N, D] -> coordinates in [0, 1]."""
    umap = importlib.import_module("umap")
    y = torch.from_numpy(umap.UMAP(metric="cosine", random_state=0, n_jobs=1).fit_transform(x.numpy())).double()
    return _in_square(y), None


def _in_square(y: Tensor) -> list[tuple[float, float]]:
    """[N, 2] -> coordinates in [0, 1]."""
    low, high = y.min(dim=0).values, y.max(dim=0).values
    return [(round(a, 4), round(b, 4)) for a, b in ((y - low) / (high - low).clamp(min=1e-12)).tolist()]


def plane(x: Tensor) -> tuple[list[tuple[float, float]], float]:
    """[N, D] -> coordinates in [0, 1] along the two directions in which the rows differ most, and their share of the
    variance."""
    x = x.double() - x.double().mean(dim=0)
    u, s, _ = torch.linalg.svd(x, full_matrices=False)
    y = u[:, :2] * s[:2]
    y = y * y.gather(0, y.abs().argmax(dim=0, keepdim=True)).sign()
    share = float(s[:2].square().sum() / s.square().sum().clamp(min=1e-30))
    return _in_square(y), share
