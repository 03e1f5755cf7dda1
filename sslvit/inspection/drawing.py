"""Charts: lines, dots and cells, as SVG for a page or as pixels for a picture."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ..evaluation import pictures
from ..report.shell import Html, el

# On paper. A page has these names too, with other colours in the dark.
COLOURS = {"c0": "#0072b2", "c1": "#d55e00", "ink": "#1d2530", "soft": "#5b6676", "line": "#d8dde4"}
SCALE = 3  # drawn so much larger for a picture, and reduced: smooth lines
WIDTH, HEIGHT = 440, 250
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 28, 38
TEXT = 12


@dataclass
class Chart:
    """Shapes in pixels. A colour is a name of COLOURS or #rrggbb; `title` is shown under the mouse."""

    about: str  # for those who cannot see it
    width: int = WIDTH
    height: int = HEIGHT
    shapes: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    def line(
        self, points: Sequence[tuple[float, float]], colour: str, dashed: bool = False, width: float = 1.6
    ) -> None:
        self.shapes.append(("line", {"points": list(points), "colour": colour, "dashed": dashed, "width": width}))

    def dot(self, x: float, y: float, colour: str, hollow: bool = False, title: str = "") -> None:
        self.shapes.append(("dot", {"x": x, "y": y, "colour": colour, "hollow": hollow, "title": title}))

    def cell(self, x: float, y: float, w: float, h: float, colour: str, title: str = "") -> None:
        self.shapes.append(("cell", {"x": x, "y": y, "w": w, "h": h, "colour": colour, "title": title}))

    def text(self, x: float, y: float, text: str, anchor: str = "start", colour: str = "soft") -> None:
        self.shapes.append(("text", {"x": x, "y": y, "text": text, "anchor": anchor, "colour": colour}))

    def svg(self) -> Html:
        inside = [_svg(kind, **shape) for kind, shape in self.shapes]
        return el("svg", inside, viewBox=f"0 0 {self.width} {self.height}", role="img", aria_label=self.about,
                  font_size=TEXT, style=f"width:{self.width}px")  # fmt: skip

    def image(self) -> Image.Image:
        sheet = Image.new("RGB", (SCALE * self.width, SCALE * self.height), pictures.PAPER)
        draw = ImageDraw.Draw(sheet)
        for kind, shape in self.shapes:
            _paint(draw, kind, **shape)
        return sheet.resize((self.width, self.height), Image.Resampling.LANCZOS)


def _svg(kind: str, colour: str, title: str = "", **s: Any) -> Html:
    said, paint = (el("title", title) if title else None), f"var(--{colour})" if colour in COLOURS else colour
    if kind == "line":
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in s["points"])
        dashes = "6 4" if s["dashed"] else None
        return el("polyline", points=path, fill="none", stroke=paint, stroke_width=s["width"], stroke_dasharray=dashes)
    if kind == "dot":
        fill, x, y = ("none" if s["hollow"] else paint), f"{s['x']:.1f}", f"{s['y']:.1f}"
        return el("circle", said, cx=x, cy=y, r=3.5, fill=fill, stroke=paint, stroke_width=1.4, pointer_events="all")
    if kind == "cell":
        place = {name: f"{s[short]:.1f}" for name, short in zip(("x", "y", "width", "height"), "xywh", strict=True)}
        return el("rect", said, fill=paint, shape_rendering="crispEdges", **place)
    return el("text", s["text"], x=f"{s['x']:.1f}", y=f"{s['y']:.1f}", text_anchor=s["anchor"], fill=paint)


def _paint(draw: ImageDraw.ImageDraw, kind: str, colour: str, title: str = "", **s: Any) -> None:
    paint = COLOURS.get(colour, colour)
    if kind == "line":
        for start, end in _dashes(s["points"]) if s["dashed"] else pairwise(s["points"]):
            draw.line([tuple(SCALE * v for v in start), tuple(SCALE * v for v in end)], paint,
                      max(1, round(SCALE * s["width"])))  # fmt: skip
    elif kind == "dot":
        box = [SCALE * (v + d) for d in (-3.5, 3.5) for v in (s["x"], s["y"])]
        draw.ellipse(box, None if s["hollow"] else paint, paint, 4)
    elif kind == "cell":
        box = [SCALE * v for v in (s["x"], s["y"], s["x"] + s["w"], s["y"] + s["h"])]
        draw.rectangle([round(v) for v in box], paint)
    else:
        place, anchor = (SCALE * s["x"], SCALE * s["y"]), {"start": "ls", "middle": "ms", "end": "rs"}[s["anchor"]]
        text = pictures.drawable(s["text"])
        draw.text(place, text, paint, pictures.font_for(text, SCALE * TEXT), anchor=anchor)


def _dashes(points: Sequence[tuple[float, float]]) -> list[tuple[tuple[float, float], tuple[float, float]]]:
    """Parts of a line, of 6 pixels with gaps of 4."""
    found, along = [], 0.0
    for (x, y), (u, v) in pairwise(points):
        length = math.hypot(u - x, v - y)
        at = 0.0
        while at < length:
            end = min(length, at + (10 - along % 10 if along % 10 >= 6 else 6 - along % 10))
            if along % 10 < 6:
                found.append(((x + (u - x) * at / length, y + (v - y) * at / length),
                              (x + (u - x) * end / length, y + (v - y) * end / length)))  # fmt: skip
            along, at = along + end - at, end
    return found


@dataclass
class Series:
    """Dots, joined by a line or not. The second encoder has dashed lines and hollow dots."""

    name: str  # in the legend; empty: none
    points: list[tuple[float, float]]  # x, y
    colour: str = "c0"
    dashed: bool = False
    joined: bool = True
    dots: bool = True


def chart(
    about: str, series: Sequence[Series], x_name: str, levels: dict[str, float] | None = None, log: bool = False,
    low: float | None = None,
) -> Chart:  # fmt: skip
    """levels: {name: y} of gray lines to compare with. log: y on a logarithmic scale. low: where y begins."""
    found, levels = Chart(about), levels or {}
    scale: Callable[[float], float] = math.log10 if log else float
    ys = [scale(y) for one in series for _, y in one.points if math.isfinite(y)] + [scale(y) for y in levels.values()]
    xs = [x for one in series for x, _ in one.points]
    bottom, top = (min(ys) if low is None else scale(low)), max(ys)
    if top - bottom < 1e-9:
        bottom, top = bottom - 0.5, top + 0.5
    top += 0.06 * (top - bottom)
    if low is None:
        bottom -= 0.06 * (top - bottom)
    left, right = min(xs) - 0.3 * (max(xs) <= 64), max(xs) + 0.3 * (max(xs) <= 64)

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - left) / max(right - left, 1e-9) * (WIDTH - LEFT - RIGHT)
        return LEFT + across, HEIGHT - BOTTOM - (scale(y) - bottom) / (top - bottom) * (HEIGHT - TOP - BOTTOM)

    for y in _powers(bottom, top) if log else _ticks(bottom, top):
        place = at(left, y)[1]
        found.line([(LEFT, place), (WIDTH - RIGHT, place)], "line", width=1)
        found.text(LEFT - 6, place + 4, f"{y:g}", "end")
    whole = sorted({round(x) for x in xs})
    for x in whole[:: max(1, math.ceil(len(whole) / 13))] if len(whole) <= 64 else _ticks(left, right):
        found.text(at(x, 10**bottom if log else bottom)[0], HEIGHT - BOTTOM + 16, f"{x:g}", "middle")
    found.text(WIDTH - RIGHT, HEIGHT - 5, x_name, "end")
    for y in levels.values():
        place = at(left, y)[1]
        found.line([(LEFT, place), (WIDTH - RIGHT, place)], "ink", dashed=True, width=1)
    at_legend = float(LEFT)
    for one in series:
        points = [(x, y) for x, y in one.points if math.isfinite(y)]
        if one.joined:
            found.line([at(*point) for point in points], one.colour, one.dashed)
        for x, y in points if one.dots else ():
            named = f"{one.name}, " if one.name else ""
            found.dot(*at(x, y), one.colour, one.dashed, f"{named}{x_name} {x:g}: {y:.4g}")
        if one.name:
            at_legend = _legend(found, at_legend, one.name, one.colour, one.dashed)
    for name in levels:
        _legend(found, at_legend, name, "ink", True, 1)
    return found


def _legend(found: Chart, left: float, name: str, colour: str, dashed: bool, width: float = 1.6) -> float:
    """Returns where the next name begins."""
    found.line([(left, 12), (left + 24, 12)], colour, dashed, width)
    name = pictures.shorten(name, 22)
    found.text(left + 30, 16, name, colour="ink")
    return left + 44 + pictures.text_width(name, TEXT)


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers between two, four to nine."""
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step *= next(factor for factor in (5, 2, 1) if (high - low) / (factor * step) >= 3.5 or factor == 1)
    return [round(n * step, 10) for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _powers(low: float, high: float) -> list[float]:
    """Powers of ten between two logarithms, and their halves where there are few."""
    whole = [10.0**n for n in range(math.ceil(low), math.floor(high) + 1)]
    return whole if len(whole) > 2 else [m * 10.0**n for n in range(math.floor(low), math.ceil(high)) for m in (1, 2, 5)
                                         if low <= math.log10(m * 10.0**n) <= high]  # fmt: skip


def cells(about: str, values: Tensor, across: str, down: str) -> Chart:
    """[R, S] between 0 and 1 as colours, the first row at the bottom. NaN is gray."""
    rows, columns = values.shape
    side = min(20.0, 300 / max(rows, columns))
    found = Chart(about, round(LEFT + max(columns * side, 180) + 70), round(TOP / 2 + rows * side + BOTTOM))
    floor = TOP / 2 + rows * side
    for r in range(rows):
        for c in range(columns):
            value = values[r, c].item()
            colour = "#b8bec6" if math.isnan(value) else hex_of(value)
            title = f"{down} {r}, {across} {c}: {value:.2f}"
            found.cell(LEFT + c * side, floor - (r + 1) * side, side, side, colour, title)
    every = max(1, math.ceil(20 / side))
    for r in range(0, rows, every):
        found.text(LEFT - 5, floor - (r + 0.5) * side + 4, str(r), "end")
    for c in range(0, columns, every):
        found.text(LEFT + (c + 0.5) * side, floor + 14, str(c), "middle")
    found.text(LEFT, floor + 31, f"across: {across}" + (f", up: {down}" if across != down else ", up: the same"))
    bar, height = found.width - 44, min(rows * side, 160.0)
    for n in range(20):
        found.cell(bar, floor - (n + 1) * height / 20, 10, height / 20 + 0.5, hex_of(n / 19))
    for share in (0.0, 0.5, 1.0):
        found.text(bar + 15, floor - share * height + 8 * share, f"{share:g}")
    return found


def hex_of(share: float) -> str:
    """A colour between violet at 0 and yellow at 1."""
    r, g, b = pictures.viridis(torch.tensor([[share]])).flatten().round().int().tolist()
    return f"#{r:02x}{g:02x}{b:02x}"


def mosaic(maps: Sequence[Tensor], across: int, side: int, gap: int = 2) -> Image.Image:
    """[3, h, w] each, in [0, 255] -> a grid of them, enlarged to about `side` pixels each."""
    h, w = maps[0].shape[-2:]
    factor = max(1, side // max(h, w))
    h, w = h * factor, w * factor
    down = math.ceil(len(maps) / across)
    sheet = Image.new("RGB", (across * (w + gap) - gap, down * (h + gap) - gap), pictures.PAPER)
    for n, one in enumerate(maps):
        sheet.paste(pictures.image_of(one, (h, w)), (n % across * (w + gap), n // across * (h + gap)))
    return sheet
