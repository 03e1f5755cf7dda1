"""Neighbours, map and clusters of images by their features, as parts of a page. pictures.py finds them."""

import math
from typing import Any

from .pictures import Map
from .shell import Html, el, figure, section


def sections(m: Map, n: int) -> list[Html]:
    def figure_of(number: int, *more: Any, **attributes: Any) -> Html:
        label = _label(m, number)
        caption = [m.names[number].rsplit("/", 1)[-1], *((el("br"), label) if label else ()), *more]
        return figure(m.images[number], caption, **attributes)

    rows = []
    for q, near in m.neighbours:
        figures = []
        for number, similarity in near:
            known = m.labels[q] >= 0 and m.labels[number] >= 0
            right = m.labels[q] == m.labels[number]
            word = el("span", "✓ same" if right else "✕ other", class_="right" if right else "wrong") if known else None
            figures.append(figure_of(number, el("br"), f"{similarity:.2f} ", word))
        rows.append(el("div", figure_of(q, class_="query"), figures, class_="near"))
    said = ""
    if m.agreement:
        share = min(50.0, max(m.agreement.values()))
        margin = 1.96 * math.sqrt(share * (100 - share) / len(m.names))
        said = (
            f" Of {len(m.names)} images here, the nearest other one has the same label: "
            + ", ".join(f"{name} {value:.0f} %" for name, value in m.agreement.items())
            + f". In so few images that can be {margin:.0f} points too high or too low: `sslvit knn` measures it."
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
            el("div", el("p", "typical"), [figure_of(number) for number in typical], class_="near"),
            el("div", el("p", "strangest"), [figure_of(number) for number in strange], class_="near"),
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
            f"{len(m.names)} images by UMAP: those that lie together have similar features, while distances between "
            "groups say little."
            if m.explained is None
            else f"{len(m.names)} images along the two directions in which their features differ most (PCA); these "
            f"have {m.explained:.0%} of the variance, so images that lie together may still differ. After `pip install "
            "'sslvit[umap]'`, `sslvit report` draws it by UMAP.",
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


def data(m: Map | None) -> dict[str, Any] | None:
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
