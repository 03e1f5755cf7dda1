"""The shell of a page: an HTML file that needs nothing else, and the parts that any page is made of.

Text is escaped where it enters an element, so a file name cannot become code. The Content-Security-Policy of a page
allows one script, by its hash, and no connection.
"""

import base64
import hashlib
import html
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from .. import __version__
from ..errors import printable

FOLDER = Path(__file__).parent / "page"
MARK = "<!-- made by sslvit report -->"  # only files with this mark are replaced
VOID = ("br", "img", "input", "link", "meta")  # elements without an end


class Html(str):
    """Text that is HTML already."""


@dataclass
class Grid:
    """A table of images."""

    titles: list[str]
    rows: list[list[str]]  # addresses that hold the images themselves
    names: list[str]  # of the rows


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


def section(title: str, help_text: str, *content: Any) -> Html:
    return el("section", el("h2", title), el("p", prose(help_text), class_="help"), content)


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
            **{"class_": "sortable" if sortable else None} | attributes,
        ),
        class_="scroll",
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


def share_bar(percent: float) -> Html:
    """A cell of a table."""
    return el("td", el("span", style=f"width:{max(0.0, min(100.0, percent)):.1f}%", class_="bar"))


def figure(image: str, caption: Any, alt: str = "", **attributes: Any) -> Html:
    return el(
        "figure",
        el("img", src=image, alt=alt or (caption if isinstance(caption, str) else "")),
        el("figcaption", caption),
        **attributes,
    )
