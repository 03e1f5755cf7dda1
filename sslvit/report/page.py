"""The page of runs: everything that facts.py and pictures.py have found, in the order in which one reads it."""

import time
from collections.abc import Sequence
from pathlib import Path

from . import charts, map, tables
from .facts import Facts
from .pictures import Pictures
from .shell import Html, document, el, figure, picture_table, prose, section
from .tables import MARKS


def page(all_facts: Sequence[Facts], pictures: dict[Path, Pictures], live: str = "") -> str:
    """The HTML. pictures: of some of the runs. live: it is served, and loads itself again when /stamp is another."""
    facts = list(all_facts)
    title = f"{facts[0].name}: {facts[0].verdict.state}" if len(facts) == 1 else f"{len(facts)} runs"
    maps = {str(n): map.data(pictures[one.path].map) for n, one in enumerate(facts) if one.path in pictures}
    data = {"curves": charts.data(facts), "maps": {n: one for n, one in maps.items() if one}, "live": live}
    body = [
        el("header", el("h1", title if len(facts) > 1 else facts[0].name), el("p", _made(facts), class_="made")),
        tables.overview(facts) if len(facts) > 1 else _verdict(facts[0]),
        charts.charts(facts),
        [_run(one, n, pictures.get(one.path), alone=len(facts) == 1) for n, one in enumerate(facts)],
    ]
    return document(title, body, data)


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


def _run(one: Facts, n: int, found: Pictures | None, alone: bool) -> Html:
    parts = [
        None if alone else _verdict(one),
        tables.results(one),
        tables.cost(one),
        *(_pictures(found, n) if found else ()),
        tables.broken(one),
        _missing(one, found),
        tables.settings(one),
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


def _pictures(found: Pictures, n: int) -> list[Html]:
    parts = []
    if found.gallery:
        figures = [figure(image, name.rsplit("/", 1)[-1]) for image, name in found.gallery]
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
        parts += map.sections(found.map, n)
    return parts


def _missing(one: Facts, found: Pictures | None) -> Html | None:
    sentences = [*one.missing, *(found.missing if found else ())]
    return (
        el("section", el("h2", "What is missing"), el("ul", [el("li", prose(sentence)) for sentence in sentences]))
        if sentences
        else None
    )
