"""The page: everything that facts.py and pictures.py have found, as one HTML file that needs nothing else.

Text is escaped where it enters an element, so a file name cannot become code. The Content-Security-Policy of the page
allows one script, by its hash, and no connection.
"""

import base64
import hashlib
import html
import json
import time
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from .. import __version__
from ..errors import printable
from ..metrics import SKIPPED, format_bytes
from ..progress import duration
from . import curves
from .facts import Facts, differing, usual_result
from .pictures import Grid, Map, Pictures

FOLDER = Path(__file__).parent / "page"
MARK = "<!-- made by sslvit report -->"  # only files with this mark are replaced
CURVE_BYTES = 110_000  # of all curves on a page
MOST_POINTS, FEWEST_POINTS = 600, 24  # of a curve
MARKS = {
    "learned": "✓",
    "learning": "→",
    "warming up": "…",
    "undertrained": "▲",
    "collapsed": "✕",
    "diverged": "✕",
    "stopped": "■",
    "no metrics": "?",
}
# What the log holds, in the order of the page: title, and how to read it.
CURVES = {
    "loss": ("Loss", "Falls fast at first, then slowly. A low loss alone does not show good features."),
    "knn/top1": (
        "k-NN accuracy, %",
        "Of labelled images that it never trained on. It should rise above its first value.",
    ),
    "rankme": (
        "Effective rank of the features",
        "Higher is richer. Near 1, all images have the same feature: a collapse.",
    ),
    "reconstruction": ("Reconstruction error", "Of the hidden patches: the loss without its other term."),
    "koleo": ("KoLeo", "Lower: features are farther apart."),
    "teacher_entropy": (
        "Teacher's entropy, an image",
        "Low: the teacher is sure. It should not reach its highest value, ln(prototypes).",
    ),
    "teacher_mean_entropy": (
        "Teacher's entropy, the mean answer",
        "High: many prototypes are used. Near 0: one for all images, a collapse.",
    ),
    "grad_norm": ("Gradient norm", "Should settle. Peaks that grow announce a divergence."),
    "lr": ("Learning rate", "As planned: a warm-up, then a cosine."),
    "weight_decay": ("Weight decay", "As planned."),
    "momentum": ("Teacher's momentum", "As planned: the teacher follows more slowly towards the end."),
    "teacher_temp": ("Teacher's temperature", "As planned."),
    "images_per_second": ("Images a second", "A fall means another program, a hot machine, or a slow disk."),
    "data_wait": ("Share of time waiting for images", "Above 0.1, more data.workers or data.cache help."),
    SKIPPED: ("Steps skipped in a line", "Of loss or gradient that is not finite. None is best."),
}
NO_CURVES = ("epoch", "images", "seconds")


VOID = ("br", "img", "input", "link", "meta")  # elements without an end


class Html(str):
    """Text that is HTML already."""


def el(tag: str, *children: Any, **attributes: Any) -> Html:
    """An element. Whatever is not Html is escaped; None is left out."""
    names = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{_escaped(value)}"'
        for name, value in attributes.items()
        if value is not None
    )
    return Html(f"<{tag}{names}>{_inside(children)}" + ("" if tag in VOID else f"</{tag}>"))


def _escaped(value: Any) -> str:
    return html.escape(printable(str(value), keep="\n"))


def _inside(children: Iterable[Any]) -> str:
    parts = []
    for child in children:
        if isinstance(child, Html):
            parts.append(str(child))
        elif isinstance(child, (list, tuple)):
            parts.append(_inside(child))
        elif child is not None:
            parts.append(_escaped(child))
    return "".join(parts)


def prose(text: str) -> list[Any]:
    """`Code` between backticks as such."""
    return [el("code", part) if n % 2 else part for n, part in enumerate(text.split("`"))]


def page(all_facts: Sequence[Facts], pictures: dict[Path, Pictures], live: str = "") -> str:
    """The HTML. pictures: of some of the runs. live: it is served, and loads itself again when /stamp is another."""
    facts = list(all_facts)
    title = f"{facts[0].name}: {facts[0].verdict.state}" if len(facts) == 1 else f"{len(facts)} runs"
    maps = {str(n): _map_data(pictures[one.path].map) for n, one in enumerate(facts) if one.path in pictures}
    data = {"curves": _curve_data(facts), "maps": {n: one for n, one in maps.items() if one}, "live": live}
    body = [
        el("header", el("h1", title if len(facts) > 1 else facts[0].name), el("p", _made(facts), class_="made")),
        _overview(facts) if len(facts) > 1 else _verdict(facts[0]),
        _curves(facts),
        [_run(one, n, pictures.get(one.path), alone=len(facts) == 1) for n, one in enumerate(facts)],
    ]
    return document(title, body, data)


def document(title: str, body: Sequence[Any], data: dict[str, Any] | None = None) -> str:
    """The whole of a page of sslvit: head, footer, style, and the script with what it draws."""
    data = data or {"curves": {"runs": [], "titles": {}}, "maps": {}, "live": ""}
    script = _script()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    connect = "'self'" if data["live"] else "'none'"
    policy = (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; "
        f"connect-src {connect}; base-uri 'none'; form-action 'none'"
    )
    head = [
        el("meta", charset="utf-8"),
        el("meta", http_equiv="Content-Security-Policy", content=policy),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="color-scheme", content="light dark"),
        el("link", rel="icon", href="data:,"),
        el("title", f"{title} - sslvit"),
        el("style", Html(_text("uPlot.min.css") + _text("page.css"))),
    ]
    end = [
        el("footer", f"Made by sslvit {__version__}. This file needs no network and sends nothing."),
        el("script", Html(_json(data)), type="application/json", id="data"),
        el("script", Html(script)),
    ]
    return f"<!doctype html>\n{MARK}\n" + el("html", el("head", head), "\n", el("body", body, end), lang="en") + "\n"


@cache
def _text(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")


def _script() -> str:
    return f"/* uPlot:\n{_text('uPlot.LICENSE')}\n*/\n{_text('uPlot.iife.min.js')}\n{_text('page.js')}"


def _json(value: Any) -> str:
    """JSON that cannot end its element or begin another."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c").replace(">", "\\u003e")


def _made(facts: Sequence[Facts]) -> str:
    s, running = facts[0].settings, sum(one.running for one in facts)
    parts = [s.get("method"), s.get("model.name"), f"{s.get('data.image_size')} pixels", s.get("data.train")]
    what = ", ".join(str(part)[:200] for part in parts if part) + ". " if len(facts) == 1 and s else ""
    still = "" if not running else " The run goes on." if len(facts) == 1 else f" {running} of the runs go on."
    return f"{what}As of {time.strftime('%F %H:%M')}.{still}"


def _verdict(facts: Facts) -> Html:
    v = facts.verdict
    return el(
        "section",
        el("p", el("span", MARKS[v.state], class_="mark", aria_hidden="true"), " ", el("b", v.state), class_="state"),
        el("p", v.headline, class_="headline"),
        _list("What shows it", v.evidence),
        _list("What to do next", v.advice),
        class_="verdict",
        data_state=v.state,
    )


def _list(title: str, sentences: Sequence[str]) -> Html | None:
    return el("div", el("h3", title), el("ul", [el("li", prose(one)) for one in sentences])) if sentences else None


def table(header: Sequence[str], rows: Sequence[Sequence[Any]], sortable: bool = False, **attributes: Any) -> Html:
    heads = [el("th", el("button", name, type="button") if sortable else name, scope="col") for name in header]
    body = [
        el("tr", [cell if isinstance(cell, Html) and cell.startswith("<td") else el("td", cell) for cell in row])
        for row in rows
    ]
    return el(
        "div",
        el(
            "table",
            el("thead", el("tr", heads)),
            el("tbody", body),
            class_="sortable" if sortable else None,
            **attributes,
        ),
        class_="scroll",
    )


def _number(value: float | None, form: str = ".4g") -> str:
    return "" if value is None else f"{value:{form}}"


def _overview(facts: Sequence[Facts]) -> Html:
    other = differing(list(facts))
    keys = list(other)[:12]
    rows = []
    for n, one in enumerate(facts):
        found, seconds, usual = one.curves, one.curves.last("seconds"), usual_result(one)
        state = el(
            "td",
            el("span", MARKS[one.verdict.state], class_="mark"),
            " ",
            one.verdict.state,
            data_state=one.verdict.state,
        )
        rows.append(
            [
                el("td", el("a", one.name, href=f"#run{n}")),
                state,
                el("td", one.verdict.headline, class_="words"),
                _number(_last_step(one), ",.0f"),
                _number(found.last("loss")),
                _number(found.last("knn/top1"), ".1f"),
                _number(usual.number if usual else None, ".1f"),
                _number(found.last("rankme"), ".1f"),
                _number(seconds and seconds / 3600, ".2f"),
                _number(_rate(one), ",.0f"),
                *(el("td", other[key][n], class_="value", title=other[key][n]) for key in keys),
            ]
        )
    header = ["run", "state", "in words", "step", "loss", "k-NN %", "evaluated %", "rank", "hours", "images/s", *keys]
    more = f"{len(other) - 12} more settings differ." if len(other) > 12 else None
    return el(
        "section",
        el("h2", "The runs"),
        el("p", "Press a heading to sort. The last columns are settings in which the runs differ.", class_="help"),
        table(header, rows, sortable=True, id="runs"),
        el("p", more, class_="help") if more else None,
    )


def _last_step(one: Facts) -> float | None:
    steps = [pair[0][-1] for pair in one.curves.columns.values() if len(pair[0])]
    return float(max(steps)) if steps else None


def _rate(one: Facts) -> float | None:
    values = one.curves.get("images_per_second")[1]
    values = values[np.isfinite(values)]
    return float(np.median(values)) if len(values) else None


def _curves(facts: Sequence[Facts]) -> Html | None:
    if not any(one.curves.columns for one in facts):
        return None
    choices = [
        el("option", text, value=value)
        for value, text in (("step", "steps"), ("images", "images seen"), ("hours", "hours of training"))
    ]
    return el(
        "section",
        el("h2", "Curves"),
        el(
            "p",
            "Drag over a part to enlarge it, in all curves; press twice to see all of it. Press a name to hide its "
            "line.",
            class_="help",
        ),
        el(
            "p",
            el("label", "Along: ", el("select", choices, id="axis")),
            " ",
            el("button", "Show all", type="button", id="whole"),
            class_="controls",
        ),
        el("div", id="charts"),
        el("noscript", "The curves need JavaScript."),
    )


def _curve_data(facts: Sequence[Facts]) -> dict[str, Any]:
    names = dict.fromkeys([*CURVES, *(name for one in facts for name in one.curves.columns)])
    names = {name: None for name in names if name not in NO_CURVES and any(name in one.curves for one in facts)}
    many = sum(name in one.curves for one in facts for name in names)
    points = int(min(MOST_POINTS, max(FEWEST_POINTS, CURVE_BYTES / 16 / max(1, many))))
    runs = []
    for one in facts:
        columns = {name: curves.thin(*one.curves.get(name), points) for name in names if name in one.curves}
        steps, images = one.curves.get("images")
        each = float(images[-1] / steps[-1]) if len(steps) and steps[-1] else 0.0
        runs.append(
            {
                "name": one.name,
                "images": each if 0 < each < 1e12 else None,
                "seconds": curves.thin(*one.curves.get("seconds"), 60),
                "columns": columns,
            }
        )
    titles = {name: CURVES.get(name, (name, "")) for name in names}
    return {"runs": runs, "titles": titles}


def _run(one: Facts, n: int, found: Pictures | None, alone: bool) -> Html:
    parts = [
        None if alone else _verdict(one),
        _results(one),
        _cost(one),
        *(_pictures(found, n) if found else ()),
        _broken(one),
        _missing(one, found),
        _settings(one),
    ]
    inside = [part for part in parts if part is not None]
    if alone:
        return el("div", inside, id=f"run{n}")
    summary = el(
        "summary",
        el(
            "h2",
            el("span", MARKS[one.verdict.state], class_="mark"),
            " ",
            one.name,
            " ",
            el("small", one.verdict.state),
        ),
    )
    return el("details", summary, inside, id=f"run{n}", class_="run")


def _results(one: Facts) -> Html | None:
    if not one.results:
        return None
    rows = []
    for r in one.results:
        interval = "" if r.interval is None else f"{r.interval[0]:.1f} to {r.interval[1]:.1f}"
        bar = (
            el("td", el("span", style=f"width:{max(0.0, min(100.0, r.number)):.1f}%", class_="bar"))
            if r.unit == "%"
            else el("td")
        )
        rows.append(
            [
                r.title,
                r.subject,
                f"{r.number:.2f} {r.unit}".strip(),
                interval,
                bar,
                f"{r.images:,}" if r.images else "",
                r.test,
            ]
        )
    classes = [
        el(
            "details",
            el("summary", f"{r.title}, {r.subject}: by class"),
            table(
                ["class", "accuracy %", ""],
                [
                    [
                        name,
                        f"{value:.1f}",
                        el("td", el("span", style=f"width:{max(0.0, min(100.0, value)):.1f}%", class_="bar")),
                    ]
                    for name, value in sorted(r.by_class.items(), key=lambda pair: -pair[1])
                ],
                sortable=True,
            ),
        )
        for r in one.results
        if r.by_class
    ]
    baseline = (
        None
        if any(r.subject == "untrained" for r in one.results)
        else el(
            "p",
            "To compare with: `sslvit knn run=untrained:<run>` measures the encoder before training, and "
            "`run=pixels` raw pixels.",
            class_="help",
        )
    )
    return el(
        "section",
        el("h2", "Evaluations"),
        el(
            "p",
            "The interval of 95 % says how much other test images could change a number, not what another seed would.",
            class_="help",
        ),
        table(["evaluation", "of", "result", "95 % interval", "", "test images", "from"], rows),
        classes,
        baseline,
    )


def _cost(one: Facts) -> Html | None:
    seconds, images, wait = one.curves.last("seconds"), one.curves.last("images"), one.curves.get("data_wait")[1]
    start = one.starts[-1] if one.starts else {}
    rows = [
        ("time of training", duration(seconds) if seconds is not None and seconds < 1e9 else None),
        ("images seen", f"{images:,.0f}, each {one.curves.last('epoch') or 0:.1f} times" if images else None),
        ("speed", f"{rate:,.0f} images a second (median of the lines)" if (rate := _rate(one)) else None),
        (
            "waiting for images",
            f"{float(np.nanmedian(wait)):.1%} of the time" if len(wait) and np.isfinite(wait).any() else None,
        ),
        ("memory at the peak", format_bytes(one.memory) if one.memory else None),
        ("starts", str(len(one.starts)) if len(one.starts) > 1 else None),
        ("machine", ", ".join(str(start[key])[:200] for key in ("device", "host") if key in start) or None),
        ("checkpoints", ", ".join(f"{step:,}" for step in one.checkpoints[-10:]) or None),
    ]
    known = [row for row in rows if row[1]]
    return el("section", el("h2", "Cost"), table(["", ""], known)) if known else None


def _figure(image: str, caption: Any, **attributes: Any) -> Html:
    return el(
        "figure",
        el("img", src=image, alt=caption if isinstance(caption, str) else ""),
        el("figcaption", caption),
        **attributes,
    )


def picture_table(grid: Grid) -> Html:
    """A column for each image, a row for each thing that is shown of it."""
    rows = [
        el(
            "tr",
            el("th", title, scope="row"),
            [
                el("td", el("img", src=row[n], alt=f"{name}: {title}", title=name))
                for row, name in zip(grid.rows, grid.names, strict=True)
            ],
        )
        for n, title in enumerate(grid.titles)
    ]
    return el("div", el("table", el("tbody", rows), class_="grid"), class_="scroll")


def section(title: str, help_text: str, *content: Any) -> Html:
    return el("section", el("h2", title), el("p", prose(help_text), class_="help"), content)


def _pictures(found: Pictures, n: int) -> list[Html]:
    parts = []
    if found.gallery:
        figures = [_figure(image, name.rsplit("/", 1)[-1]) for image, name in found.gallery]
        parts.append(
            section("Images", f"Some of {found.spec}, chosen by the seed.", el("div", figures, class_="gallery"))
        )
    if found.crops:
        parts.append(
            section(
                "What the encoder gets of them",
                "The crops of the first epoch. Objects should still be recognised, and colours be plausible.",
                picture_table(found.crops),
            )
        )
    if found.predictions:
        parts.append(
            section(
                "What it predicts",
                "Hidden patches are gray in the second row. Predicted ones have blurred shapes at best. Where the "
                "model predicts patches of mean 0 and deviation 1 (norm_pix), those of the image are put back.",
                picture_table(found.predictions),
            )
        )
    if found.attention:
        parts.append(
            section(
                "What it attends to",
                f"{found.attention_of}, laid over the image: yellow is much, violet little. Each map has its own "
                "scale, from its 2nd to its 98th percentile, so even a nearly even one shows something: compare "
                "within a map only. A trained encoder follows objects. In the row `patches`, one colour stands for "
                "similar features, in all images together. If it is the same smooth rainbow in all of them, the "
                "features say where a patch is, and little of what it shows.",
                picture_table(found.attention),
            )
        )
    if found.over_time:
        parts.append(
            section(
                "Attention over time",
                "All heads together, at each checkpoint that was kept.",
                picture_table(found.over_time),
            )
        )
    if found.map:
        parts += _map(found.map, n)
    return parts


def _map(m: Map, n: int) -> list[Html]:
    def figure(number: int, *more: Any, **attributes: Any) -> Html:
        label = _label(m, number)
        caption = [m.names[number].rsplit("/", 1)[-1], *((el("br"), label) if label else ()), *more]
        return _figure(m.images[number], caption, **attributes)

    rows = []
    for q, near in m.neighbours:
        figures = []
        for number, similarity in near:
            known = m.labels[q] >= 0 and m.labels[number] >= 0
            right = m.labels[q] == m.labels[number]
            word = el("span", "✓ same" if right else "✕ other", class_="right" if right else "wrong") if known else None
            figures.append(figure(number, el("br"), f"{similarity:.2f} ", word))
        rows.append(el("div", figure(q, class_="query"), figures, class_="near"))
    said = ""
    if m.agreement:
        said = (
            f" Of {len(m.names)} images here, the nearest other one has the same label: "
            + ", ".join(f"{name} {value:.0f} %" for name, value in m.agreement.items())
            + ". That is a small sample: `sslvit knn` measures it."
        )
    colours = [("label", "label")] * any(label >= 0 for label in m.labels) + [
        ("cluster", "cluster"),
        ("none", "nothing"),
    ]
    controls = el(
        "p",
        el(
            "label",
            "Colour by: ",
            el("select", [el("option", text, value=value) for value, text in colours], class_="by"),
        ),
        " ",
        el("label", "Find: ", el("input", type="search", class_="find", placeholder="part of a file name")),
        " ",
        el("span", class_="hits", role="status"),
        class_="controls",
    )
    clusters = [
        el(
            "div",
            el("h3", f"Cluster {c + 1}: {size} images{f', {most}' if most else ''}"),
            el("div", el("p", "typical"), [figure(number) for number in typical], class_="near"),
            el("div", el("p", "strangest"), [figure(number) for number in strange], class_="near"),
        )
        for c, (size, typical, strange, most) in enumerate(m.groups)
    ]
    return [
        section(
            "Nearest neighbours",
            "The first image of a row, and the images whose features are most similar (cosine). Neighbours should "
            "show the same kind of thing, not only the same colours." + said,
            rows,
        ),
        section(
            "Map of the images",
            f"{len(m.names)} images along the two directions in which their features differ most; these have "
            f"{m.explained:.0%} of the variance, so images that lie together may still differ.",
            controls,
            el("canvas", class_="map", data_run=n, role="img", aria_label="map of the images by their features"),
            el("p", class_="under", role="status"),
            el("ul", class_="legend"),
        ),
        section(
            "Clusters",
            "By k-means. Typical images lie nearest to the middle of their cluster, the strangest farthest from it: "
            "look there for broken or foreign images.",
            clusters,
        ),
    ]


def _label(m: Map, number: int) -> str:
    return m.classes[m.labels[number]] if 0 <= m.labels[number] < len(m.classes) else ""


def _map_data(m: Map | None) -> dict[str, Any] | None:
    if m is None:
        return None
    return {
        "sheet": m.sheet,
        "across": m.across,
        "points": m.points,
        "names": m.names,
        "labels": m.labels,
        "classes": m.classes,
        "clusters": m.clusters,
    }


def _broken(one: Facts) -> Html | None:
    if not one.broken_count:
        return None
    more = (
        f" The first {len(one.broken)} are shown; bad_images.txt has all." if one.broken_count > len(one.broken) else ""
    )
    return section(
        "Images that cannot be read",
        f"{one.broken_count:,} files were skipped.{more}",
        table(["file", "reason"], one.broken),
    )


def _missing(one: Facts, found: Pictures | None) -> Html | None:
    sentences = [*one.missing, *(found.missing if found else ())]
    return (
        el("section", el("h2", "What is missing"), el("ul", [el("li", prose(sentence)) for sentence in sentences]))
        if sentences
        else None
    )


def _settings(one: Facts) -> Html | None:
    command = str(one.starts[-1].get("command", ""))[:2000] if one.starts else ""
    rows = [[key, str(value)[:300]] for key, value in one.settings.items()]
    if not rows and not command:
        return None
    return el(
        "section",
        el(
            "details",
            el("summary", "Command and settings"),
            el("pre", command),
            table(["key", "value"], rows, sortable=True),
        ),
    )
