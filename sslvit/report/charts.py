"""The curves of a page: which there are, in what order, and how to read them. page.js draws them."""

from collections.abc import Sequence
from typing import Any

from ..energy import ENERGY_COLUMNS
from ..metrics import SKIPPED
from . import curves
from .facts import Facts
from .shell import Html, el

CURVE_BYTES = 110_000  # of all curves on a page
MOST_POINTS, FEWEST_POINTS = 600, 24  # of a curve
# What the log holds, in the order of the page: title, and how to read it.
CURVES = {
    "loss": (
        "Loss",
        "Falls fast at first, then slowly. A low loss alone does not show good features, and losses of two methods "
        "cannot be compared.",
    ),
    "knn/top1": (
        "k-NN accuracy, %",
        "Of labelled images that it never trained on. It should rise above its first value.",
    ),
    "score/unlabelled": (
        "Score without labels, %",
        "Whether an image is found by another view of it, times the rank. It tells ruin; differences of a point are "
        "noise.",
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
    "teacher_agreement": (
        "Teacher's agreement",
        "Share of images whose two crops get the same first answer. 1 from the first line on: the crops are equal.",
    ),
    "feature_spread": (
        "Spread of the features",
        "0: all images have the same feature. Near 1: features point in all directions.",
    ),
    "image_difference": (
        "Difference of the images",
        "About 1 for photos, near 0 if images are nearly the same. The same in all lines: one batch again and again.",
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
NO_CURVES = ("epoch", "images", "seconds", *ENERGY_COLUMNS)


def charts(facts: Sequence[Facts]) -> Html | None:
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


def data(facts: Sequence[Facts]) -> dict[str, Any]:
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
