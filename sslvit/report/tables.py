"""The tables of a page: all runs together, and the results, the cost, broken files and settings of one."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..arguments import format_value
from ..energy import ENERGY_COLUMNS
from ..errors import printable
from ..metrics import format_bytes
from ..progress import duration
from .facts import PIXELS, Facts, Result, command_name, differing, usual_result
from .shell import Html, el, prose, section, share_bar, table

UNTRAINED, FROZEN = "untrained", "frozen start (model.init)"
MARKS = {
    "learned": "✓",
    "learning": "→",
    "warming up": "…",
    "undertrained": "▲",
    "collapsed": "✕",
    "diverged": "✕",
    "faulty": "✕",
    "stopped": "■",
    "no metrics": "?",
}


def overview(facts: Sequence[Facts]) -> Html:
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


def _number(value: float | None, form: str = ".4g") -> str:
    return "" if value is None else f"{value:{form}}"


def results(one: Facts) -> Html | None:
    rows = _on_the_way(one)
    if not one.results and not rows:
        return None
    for r in one.results:
        interval = "" if r.interval is None else f"{r.interval[0]:.1f} to {r.interval[1]:.1f}"
        bar = share_bar(r.number) if r.unit == "%" else el("td")
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
                    [name, f"{value:.1f}", share_bar(value)]
                    for name, value in sorted(r.by_class.items(), key=lambda pair: -pair[1])
                ],
                sortable=True,
            ),
        )
        for r in one.results
        if r.by_class
    ]
    matrices = [
        el("details", el("summary", f"{r.title}, {r.subject}: which class is taken for which"), _confusion(r))
        for r in one.results
        if r.confusion
    ]
    of, more = {row[1] for row in rows}, "data.train=<labelled images> data.test=<others>"
    commands = []
    if not of & {UNTRAINED, FROZEN}:
        commands.append(f"`sslvit knn run=untrained:{command_name(one)} {more}` measures the encoder before training.")
    if PIXELS not in of:
        commands.append(f"`sslvit knn run=pixels:{command_name(one)} {more}` measures the pixels themselves.")
    baselines = el("p", prose(" ".join(["To compare with:", *commands])), class_="help") if commands else None
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
        matrices,
        baselines,
    )


def _on_the_way(one: Facts) -> list[list[Any]]:
    """k-NN that the run itself measured: before the first step, and at the end."""
    steps, values = one.curves.get("knn/top1")
    if not len(steps) or not np.isfinite(values[[0, -1]]).all():
        return []
    test = printable(str(one.settings.get("eval.test") or "")[:200])
    start = FROZEN if one.settings.get("model.init") else UNTRAINED
    ends = [(start, values[0])] * bool(steps[0] == 0) + [(f"this run, step {steps[-1]:,.0f}", values[-1])]
    return [["k-NN, by the run", of, f"{value:.2f} %", "", share_bar(float(value)), "", test] for of, value in ends]


def _confusion(result: Result) -> Html:
    """Rows: what the images are. The share of a row is in the depth of its blue, and in numbers."""
    names = list(result.by_class) if len(result.by_class) == len(result.confusion) else []
    names = names or [str(c) for c in range(len(result.confusion))]
    rows = []
    for name, counts in zip(names, result.confusion, strict=True):
        whole = max(1, sum(counts))
        cells = [el("td", f"{n:,}" if n else "·", style=f"--share:{100 * n / whole:.0f}%") for n in counts]
        rows.append([el("td", name), *cells])
    return table(["images of", *(f"as {name}" for name in names)], rows, class_="matrix")


def cost(one: Facts) -> Html | None:
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
        ("energy", _energy(one)),
        ("memory at the peak", format_bytes(one.memory) if one.memory else None),
        ("starts", str(len(one.starts)) if len(one.starts) > 1 else None),
        ("machine", ", ".join(str(start[key])[:200] for key in ("device", "host") if key in start) or None),
        ("checkpoints", ", ".join(f"{step:,}" for step in one.checkpoints[-10:]) or None),
    ]
    known = [row for row in rows if row[1]]
    return el("section", el("h2", "Cost"), table(["", ""], known)) if known else None


def _energy(one: Facts) -> str | None:
    """What the machines have counted, and until when: a counter may vanish, or a run may go on where there is none."""
    parts, lines = [], one.curves.get("seconds")[0]
    for name, of in zip(ENERGY_COLUMNS, ("whole CPU packages, without memory and fans", "GPUs"), strict=True):
        kwh = one.curves.last(name)
        if kwh is not None and 0 < kwh < 1e9:
            number, step = f"{kwh:,.2f} kWh" if kwh >= 1 else f"{1000 * kwh:,.2f} Wh", one.curves.get(name)[0][-1]
            parts.append(f"{number} ({of}{f', until step {step:,.0f}' if len(lines) and step < lines[-1] else ''})")
    return ", ".join(parts) or None


def broken(one: Facts) -> Html | None:
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


def settings(one: Facts) -> Html | None:
    command = str(one.starts[-1].get("command", ""))[:2000] if one.starts else ""
    rows = [[key, format_value(value)[:300]] for key, value in one.settings.items()]
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
