"""The findings of `sslvit data` as one HTML file, with the images that they are about."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .. import report
from ..config import RunConfig
from ..data import BadImage, Source
from ..distributed import say
from ..errors import UserError, printable
from ..report.pictures import drawn
from ..report.samples import columns_of, readable
from ..report.shell import Grid, Html, document, el, figure, picture_table, prose, section, share_bar, table
from .findings import Findings, ImageStats, facts, share

GALLERY, CROPPED = 48, 8  # images alone, and with their crops
GROUPS, MEMBERS = 16, 4  # groups of copies that are shown, and images of each
ODD, ALIKE = 24, 6  # outliers that are shown, and those for one reason
FAR = 4.0  # deviations from the median, from which an image is an outlier; of ten thousand normal values, 0.6 are
BROKEN, CLASSES = 200, 1000  # that are listed
COLOURS = ("red", "green", "blue")


def check(out: str) -> None:
    """Before the work. Raises UserError."""
    report.check_out(Path(out).expanduser(), out)


def write(
    out: str,
    found: Findings,
    config: RunConfig,
    source: Source,
    stats: Sequence[ImageStats],
    advice: list[str],
    command: str,
) -> None:
    """Raises UserError. stats: of the images that could be read. advice, command: what to mend, and how to begin."""
    text = page(found, config, source, stats, advice, command)
    report.write(Path(out).expanduser(), text)
    say(f"written to {out} ({len(text.encode()) / 1e6:.1f} MB)")


def page(
    found: Findings,
    config: RunConfig,
    source: Source,
    stats: Sequence[ImageStats],
    advice: list[str],
    command: str,
) -> str:
    def show(index: int, *more: Any) -> Html | None:
        try:
            image = source.read(index)
        except BadImage:  # it has changed since
            return None
        name, size = _name(source, index), f"{image.shape[2]}x{image.shape[1]}"
        return figure(drawn(image.float()), [name, el("br"), size, *more], alt=name)

    body = [
        el("header", el("h1", found.source), el("p", _counted(found), class_="made")),
        _summary(found, advice, command),
        _kinds(found, config),
        *_images(found, config, source, show),
        *_copies(found, show),
        _outliers(stats, show),
        _flat(found, stats, show),
        _broken(found),
        _classes(found),
    ]
    return document(f"Images of {found.source}", body)


def _name(source: Source, index: int) -> str:
    return printable(source.name(index)[-200:]).rsplit("/", 1)[-1]


def _counted(found: Findings) -> str:
    classes = f" in {len(found.classes)} classes" if found.classes else ", without labels"
    some = "" if found.examined == found.count else f" {found.examined:,} of them were examined, chosen by the seed."
    return f"{found.count:,} images{classes}.{some}"


def _summary(found: Findings, advice: list[str], command: str) -> Html:
    copies = {name: sum(len(group) - 1 for group in groups) for name, groups in found.where.items()}
    seen = [
        f"Cannot be read: {share(len(found.broken), found.examined)}." if found.broken else "All can be read.",
        f"Same pixels as another image: {share(copies['same'], found.examined)}." if copies.get("same") else None,
        f"Nearly the same as another image: {share(copies['near'], found.examined)}." if copies.get("near") else None,
        "No image is a copy of another." if found.mean and not any(copies.values()) else None,
        f"One colour only: {share(len(found.flat), found.examined)}." if found.flat else None,
    ]
    if any(copies.values()):
        advice = [*advice, "Remove copies, above all those in both the training and the test images."]
    state = ("look", "▲", "look at this first") if advice or not found.mean else ("ready", "✓", "ready for training")
    start = el("div", el("h3", "A command to start from"), el("pre", command)) if found.mean else None
    return el(
        "section",
        el("p", el("span", state[1], class_="mark", aria_hidden="true"), " ", el("b", state[2]), class_="state"),
        el("ul", [el("li", one) for one in seen if one]),
        el("div", el("h3", "What to do"), el("ul", [el("li", prose(_sentence(one))) for one in advice]))
        if advice
        else None,
        start,
        class_="verdict",
        data_state=state[0],
    )


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:].rstrip('.')}."


def _kinds(found: Findings, config: RunConfig) -> Html:
    rows = [list(pair) for pair in facts(found) if pair[0] != "classes"]
    if found.mean:
        values = [
            ", ".join(f"{value:.4f}" for value in numbers) + " (black 0, white 1)"
            for numbers in (found.mean, found.std)
        ]
        rows += [
            ["channels", f"{len(found.mean)}, as the encoder gets them (data.in_chans)"],
            ["values", _range(found, config)],
            ["mean", values[0]],
            ["deviation", values[1]],
        ]
    return el("section", el("h2", "What they are"), table(["", ""], rows))


def _range(found: Findings, config: RunConfig) -> str:
    if not found.deep:
        return f"8 bits: 0 to 255 are possible, and the largest is {found.largest:.0f}"
    deep = f"{found.deep:,} images have more than 8 bits; "
    if config.data.value_range:
        low, high = config.data.value_range
        return f"{deep}data.value_range makes {low:g} black and {high:g} white"
    if found.value_range:
        return f"{deep}they use 0 to {found.value_range[1]:g} only, and come out nearly black"
    return f"{deep}the brightest value is {found.largest / 255:.0%} of white"


def _images(found: Findings, config: RunConfig, source: Source, show: Callable[..., Html | None]) -> Iterator[Html]:
    some = readable(source, config.seed, GALLERY)
    if not some:
        return
    figures = [show(index) for index, _ in some]
    said = [
        "Chosen by the seed." if len(some) == GALLERY < len(source) else "All that can be read.",
        f"The first three of their {config.data.in_chans} channels, as red, green and blue."
        if config.data.in_chans > 3
        else "",
        "They are nearly black here, as an encoder would get them." if found.value_range else "",
    ]
    yield section("Some images", " ".join(filter(None, said)), el("div", figures, class_="gallery"))
    chosen = some[:CROPPED]
    title, text = (
        "What an encoder gets of them",
        (
            f"The crops of {config.method} with these settings. Objects should still be recognised, and colours be "
            "plausible."
        ),
    )
    try:
        columns, titles = columns_of(config, [image for _, image in chosen], [index for index, _ in chosen])
    except UserError as error:
        yield section(title, f"There is no picture of crops: {printable(str(error))}")
        return
    rows = [[drawn(image) for image in row] for row in zip(*columns, strict=True)]
    yield section(title, text, picture_table(Grid(titles, rows, [_name(source, index) for index, _ in chosen])))


def _copies(found: Findings, show: Callable[..., Html | None]) -> Iterator[Html]:
    texts = {
        "same": ("The same pixels", "Each row is one image, under several names or in several formats."),
        "near": (
            "Nearly the same",
            "Each row has images that differ little: other sizes, compression, brightness. Judge by eye: images of one "
            "scene may be alike without being copies.",
        ),
    }
    for kind, groups in found.where.items():
        if not groups:
            continue
        rows = []
        for group in groups[:GROUPS]:
            more = el("p", f"and {len(group) - MEMBERS:,} more") if len(group) > MEMBERS else None
            rows.append(el("div", [show(index) for index in group[:MEMBERS]], more, class_="near"))
        title, text = texts[kind]
        count = f" {len(groups):,} such groups, of which {GROUPS} are shown." if len(groups) > GROUPS else ""
        yield section(title, text + count, rows)


def _outliers(stats: Sequence[ImageStats], show: Callable[..., Html | None]) -> Html | None:
    found = outliers(stats)
    if not found:
        return None
    figures = [show(index, el("br"), reason) for index, reason in found]
    text = (
        "These differ most from the others in brightness, contrast, colour, size or shape. Some are merely rare; look "
        "for foreign and damaged ones."
    )
    return section("Outliers", text, el("div", figures, class_="gallery odd"))


def outliers(stats: Sequence[ImageStats]) -> list[tuple[int, str]]:
    """(index, why) of images that differ from the others in what can be measured, those that differ most first."""
    several = [one for one in stats if one.thumbnail is not None]
    if len(several) < 8:
        return []
    means = np.stack([one.mean for one in several])
    bright = means.mean(axis=1)
    contrast = np.sqrt(np.clip(np.stack([one.mean_square for one in several]) - means**2, 0, None).mean(axis=1))
    height, width = (np.array([one.shape[axis] for one in several], float) for axis in (1, 2))
    # What is measured, the words below and above the usual, the least deviation that counts as one, its name, its text.
    measures: list[tuple[np.ndarray, str, str, float, str, Callable[[float], str]]] = [
        (bright, "dark", "bright", 4.0, "mean", lambda v: f"{v:.0f} of 255"),
        (contrast, "low contrast", "high contrast", 4.0, "deviation", lambda v: f"{v:.0f} of 255"),
        (np.log2(height * width), "small", "large", 0.25, "pixels", lambda v: f"{2**v:,.0f}"),
        (np.log2(width / height), "narrow", "wide", 0.1, "width to height", lambda v: f"{2**v:.2f}"),
    ]
    for c in range(means.shape[1] if means.shape[1] > 1 else 0):
        name = COLOURS[c] if means.shape[1] == 3 else f"channel {c + 1}"
        measures.append(
            (means[:, c] - bright, f"little {name}", f"much {name}", 4.0, "beyond the mean", lambda v: f"{round(v):+d}")
        )
    best: dict[int, tuple[float, str, str]] = {}  # place: how far, word, sentence
    for values, below, above, least, measure, said in measures:
        usual = float(np.median(values))
        far = (values - usual) / max(1.4826 * float(np.median(np.abs(values - usual))), least)
        for place in np.flatnonzero(np.abs(far) > FAR).tolist():
            word = above if far[place] > 0 else below
            one = (
                abs(float(far[place])),
                word,
                f"{word}: {measure} {said(float(values[place]))}, usually {said(usual)}",
            )
            best[place] = max(best.get(place, one), one)
    kept: list[tuple[int, str]] = []
    words: dict[str, int] = {}
    for place, (_, word, sentence) in sorted(best.items(), key=lambda pair: -pair[1][0]):
        words[word] = words.get(word, 0) + 1
        if words[word] <= ALIKE and len(kept) < ODD:
            kept.append((several[place].index, sentence))
    return kept


def _flat(found: Findings, stats: Sequence[ImageStats], show: Callable[..., Html | None]) -> Html | None:
    flat = [one.index for one in stats if one.thumbnail is None]
    if not flat:
        return None
    text = "They show nothing." + (f" The first {ODD} are shown." if len(flat) > ODD else "")
    return section("One colour", text, el("div", [show(index) for index in flat[:ODD]], class_="gallery"))


def _broken(found: Findings) -> Html | None:
    if not found.broken:
        return None
    rows = [[printable(name[-300:]), printable(reason[:300])] for name, reason in found.broken[:BROKEN]]
    more = f" The first {BROKEN} are listed; report=found.json has all." if len(found.broken) > BROKEN else ""
    return section(
        "Images that cannot be read",
        f"A run leaves them out, up to data.bad_ratio of all.{more}",
        table(["file", "reason"], rows, sortable=True),
    )


def _classes(found: Findings) -> Html | None:
    if not found.classes:
        return None
    most = max(1, *found.classes.values())
    rows = [
        [printable(str(name)[:80]), f"{count:,}", share_bar(100 * count / most)]
        for name, count in list(found.classes.items())[:CLASSES]
    ]
    return section("Classes", "By the labels of the source.", table(["class", "images", ""], rows, sortable=True))
