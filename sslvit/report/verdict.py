"""Is a run all right? One pure function, `judge`, with its thresholds here and what they were seen at.

What was seen at the last line of runs on two CPU cores:

                                            fall of the loss    k-NN            effective   prototypes
                                            in the last fifth                   rank        of the teacher
    MAE on CIFAR-10, mae_cifar10.yaml       1.8 %               51.6 %          111
    DINO on CIFAR-10, dino_cifar10.yaml     2.7 %               44.0 %          124         106 (lowest: 54)
    MAE on 256 photos, 120 epochs           1.4 %                               60
    DINO on fractals, center off            1.0 %               10.6 to 16.6 %  6.2         1.8

How often each rule errs is not measured yet.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from ..evaluation.online import rank_alarm

State = Literal["no metrics", "warming up", "learning", "learned", "undertrained", "collapsed", "diverged", "stopped"]

FEW_LINES = 3  # of the log, below which nothing is said of its trend
RISEN = 0.5  # of the fall of the loss, which it has lost again: diverged. DINO's first lines rise by 0.4 and recover
SKIPPED = 0.5  # of the steps of the last line: diverged
STILL_FALLING = 0.10  # of the whole fall of the loss within the last fifth of a run that has ended: undertrained
KNN_GAIN = 1.0  # points that k-NN must rise by, in all
KNN_RISING = 2.0  # points within the last fifth of a run that has ended: undertrained
RANK_LOST = 0.05  # of the highest rank so far, at the last measurement, and ...
RANK_LOW = 4.0  # ... a rank below this: collapsed
# exp of the entropy of the teacher's mean answer, below which DINO has collapsed to few prototypes. Healthy runs: 54
# and more at any line (dino_cifar10.yaml). Center off on fractals: 1.8 of 512, and k-NN hardly rises.
PROTOTYPES = 4.0
FEW_EPOCHS = 50  # passes over the images, below which a longer run is suggested
QUIET = 10  # times the usual time between two lines: a run that says nothing any more

Points = tuple[np.ndarray, np.ndarray]  # steps [n], values [n]
NONE: Points = (np.empty(0), np.empty(0))


@dataclass
class Measured:
    """What is known of a run, as numbers."""

    step: int | None = None  # of the last line
    total: int | None = None  # steps that it shall have
    running: bool = False
    warmup: float = 0.0  # steps
    epochs: float | None = None  # passes over the images so far
    loss: Points = NONE
    grad_norm: Points = NONE
    knn: Points = NONE  # percent
    knn_of: str = ""  # which images k-NN classifies
    evaluated: str = ""  # a sentence with the result of an evaluation after the run
    rankme: Points = NONE
    width: int | None = None  # the most that rankme can be
    skipped: float = 0.0  # share of the steps of the last line
    prototypes: float | None = None  # that the teacher uses, see PROTOTYPES
    alarm: str | None = None  # of the method, at the last line
    first_alarm: int | None = None  # step of the first line with an alarm
    seconds_quiet: float | None = None  # since the last line
    seconds_a_line: float | None = None
    pretrained: bool = False  # it began with model.init
    run: str = "<run>"  # as a command line names it


@dataclass
class Verdict:
    state: State
    headline: str
    evidence: list[str] = field(default_factory=list)
    advice: list[str] = field(default_factory=list)


def judge(m: Measured) -> Verdict:
    """The state of a run in words. The first rule that fits decides."""
    evidence = [sentence for sentence in (_loss(m), _knn(m), _rank(m), _gradient(m), _length(m), _quiet(m)) if sentence]
    if m.step is None:
        return Verdict("no metrics", "There is nothing to judge: the run has not written a line yet.")
    end = f"step {m.step:,}"
    if reason := _diverged(m):
        advice = [
            "Divide optim.base_lr by 3, and warm it up for longer (optim.warmup_epochs).",
            "Limit the gradient: optim.clip=1. If the loss overflows in bf16 or fp16, try precision=float32.",
        ]
        return Verdict("diverged", f"It has diverged at {end}: {reason}.", evidence, advice)
    if found := _collapsed(m):
        reason, _, remedy = found.partition(". ")  # in all such sentences the advice comes last
        first = f" The first line that shows it is of step {m.first_alarm:,}." if m.first_alarm is not None else ""
        return Verdict(
            "collapsed",
            "It has collapsed: it hardly tells images apart.",
            [f"{reason.rstrip('.')}.{first}", *evidence],
            [remedy or "Lower optim.base_lr.", "Then start anew, with another out=: a collapsed run seldom recovers."],
        )
    if m.running and (m.step <= m.warmup or len(m.loss[0]) < FEW_LINES):
        until = f" until step {m.warmup:,.0f}" if m.step <= m.warmup else ""
        return Verdict("warming up", f"It is still warming up{until}: it is too early to judge.", evidence, ["Wait."])
    measure = _measure(m)
    if not m.running and m.total and m.step < m.total:
        share = f"{m.step / m.total:.0%}"
        headline = f"It stopped at {end} of {m.total:,} ({share}), and what it had learned by then is saved."
        return Verdict(
            "stopped", headline, evidence, ["Start the same command again: it goes on from its checkpoint.", *measure]
        )
    if worse := _no_gain(m):
        if m.running:
            return Verdict(
                "learning",
                f"It is training, and not better than its start yet: {worse}.",
                evidence,
                ["Wait: DINO often falls below its start at first.", *measure],
            )
        advice = [_longer(m), "Compare with `sslvit knn run=pixels`: an encoder should be better than raw pixels."]
        return Verdict("undertrained", f"It has ended without a gain: {worse}.", evidence, advice)
    if m.running:
        return Verdict(
            "learning", f"It is learning, at {end}{f' of {m.total:,}' if m.total else ''}.", evidence, measure
        )
    if reason := _unfinished(m):
        return Verdict(
            "undertrained",
            f"It has learned, and it was still improving when it ended: {reason}.",
            evidence,
            [_longer(m), *measure],
        )
    known = len(m.knn[1]) or m.evaluated
    headline = (
        "It has learned, and it has come to rest."
        if known
        else "Its loss has fallen and come to rest. Whether its features are good is not measured."
    )
    more = [_longer(m)] if m.epochs and m.epochs < FEW_EPOCHS else []
    return Verdict(
        "learned", headline, evidence, [*measure, f"Export it: sslvit export run={m.run} to=timm out=my_encoder", *more]
    )


def ends(points: Points) -> tuple[float, float, float] | None:
    """(first value, value at four fifths, last value), each the median of a few finite lines; None for fewer lines."""
    steps, values = (part[np.isfinite(points[1])] for part in points)
    if len(values) < FEW_LINES:
        return None
    few = max(1, len(values) // 20)
    fifth = int(np.searchsorted(steps, steps[0] + 0.8 * (steps[-1] - steps[0])))
    fifth = min(max(fifth, 1), len(values) - 1)
    around = values[max(0, fifth - few // 2) : fifth + few // 2 + 1]
    return float(values[0]), float(np.median(around)), float(np.median(values[-few:]))


def _diverged(m: Measured) -> str:
    if m.skipped >= SKIPPED:
        return f"{m.skipped:.0%} of the last steps had a loss or gradient that is not finite, and were skipped"
    if len(m.loss[1]) and not math.isfinite(m.loss[1][-1]):
        return "the loss is not finite"
    found = ends(m.loss)
    if found and m.step is not None and m.step > m.warmup and len(m.loss[1]) >= 2 * FEW_LINES:
        first, _, last = found
        few = max(1, len(m.loss[1]) // 20)
        finite = m.loss[1][np.isfinite(m.loss[1])]
        smooth = np.array([np.median(part) for part in np.array_split(finite, max(1, len(finite) // few))])
        lowest = float(smooth.min())
        if last - lowest > RISEN * (first - lowest) and last - lowest > 0.02 * abs(lowest):
            return f"the loss was {lowest:.4g} and has risen to {last:.4g}"
    return ""


def _collapsed(m: Measured) -> str:
    if m.alarm:
        return m.alarm
    if m.prototypes is not None and m.prototypes < PROTOTYPES and m.step is not None and m.step > m.warmup:
        return (
            f"The teacher gives all images the same {m.prototypes:.1f} prototypes (exp of the entropy of its mean "
            "answer). "
            "Set objective.center_momentum=0.9, raise objective.teacher_temp, lower optim.base_lr, or freeze the "
            "prototypes "
            "longer (freeze_last_layer_epochs)."
        )
    ranks = m.rankme[1][np.isfinite(m.rankme[1])]
    if not len(ranks):
        return ""
    if alarm := rank_alarm(float(ranks[-1])):
        return alarm
    if ranks[-1] < RANK_LOW and ranks[-1] < RANK_LOST * ranks.max():
        return (
            f"The effective rank of the features (RankMe) was {ranks.max():.1f} and is {ranks[-1]:.2f}: they lie in "
            "few "
            "directions. Lower optim.base_lr, or spread the features with objective.koleo_weight=0.05."
        )
    return ""


def _no_gain(m: Measured) -> str:
    if len(m.knn[1]) > 1 and m.knn[1][-1] < m.knn[1][0] + KNN_GAIN:
        return f"k-NN was {m.knn[1][0]:.1f} % before the first step and is {m.knn[1][-1]:.1f} %"
    found = ends(m.loss)
    if found and not found[2] < found[0]:
        return f"the loss was {found[0]:.4g} at first and is {found[2]:.4g}"
    return ""


def _unfinished(m: Measured) -> str:
    steps, values = m.knn
    if len(values) > 2:
        before = values[steps <= steps[0] + 0.8 * (steps[-1] - steps[0])][-1]
        if values[-1] - before > KNN_RISING:
            return f"k-NN rose by {values[-1] - before:.1f} points in the last fifth"
        return ""
    found = ends(m.loss)
    if found and found[0] > found[2] and (share := (found[1] - found[2]) / (found[0] - found[2])) > STILL_FALLING:
        return f"{share:.0%} of the fall of the loss was in the last fifth"
    return ""


def _loss(m: Measured) -> str:
    found = ends(m.loss)
    if not found:
        return ""
    first, fifth, last = found
    more = f", {max(0.0, (fifth - last) / (first - last)):.1%} of this fall in the last fifth" if first > last else ""
    broken = int((~np.isfinite(m.loss[1])).sum())
    return (
        f"Loss: {first:.4g} at first, {last:.4g} "
        f"now{more}.{f' {broken} lines have a loss that is not finite.' if broken else ''}"
    )


def _knn(m: Measured) -> str:
    if m.evaluated or m.step is None:
        return m.evaluated
    if not len(m.knn[1]):
        return (
            "k-NN was not measured, and a loss alone does not show whether features are good. It needs some labelled "
            "images: "
            "eval.train= and eval.test= during the run, or the command below."
        )
    start, steps = ("its pretrained start" if m.pretrained else "before the first step"), m.knn[0]
    if len(steps) == 1:
        return f"k-NN at step {steps[0]:,.0f}: {m.knn[1][0]:.1f} %."
    gain = m.knn[1][-1] - m.knn[1][0]
    of = f" ({m.knn_of})" if m.knn_of else ""
    return (
        f"k-NN on images it never trained on{of}: {m.knn[1][0]:.1f} % {start}, {m.knn[1][-1]:.1f} % at step "
        f"{steps[-1]:,.0f} ({gain:+.1f} points)."
    )


def _rank(m: Measured) -> str:
    if not len(m.rankme[1]):
        return ""
    most = f" of at most {m.width}" if m.width else ""
    return (
        f"Effective rank of the features: {m.rankme[1][-1]:.1f}{most} at step {m.rankme[0][-1]:,.0f}; 1 is a collapse."
    )


def _gradient(m: Measured) -> str:
    values = m.grad_norm[1]
    return (
        f"Gradient norm: {values[-1]:.3g}, at most {np.nanmax(values):.3g}."
        if len(values) and np.isfinite(values).any()
        else ""
    )


def _length(m: Measured) -> str:
    return (
        f"Each image was seen {m.epochs:.1f} times; the papers' recipes see them 100 to 800 times." if m.epochs else ""
    )


def _quiet(m: Measured) -> str:
    quiet, usual = m.seconds_quiet, m.seconds_a_line
    if m.running and quiet and usual and quiet > max(60.0, QUIET * usual):
        return (
            f"It has written nothing for {quiet / 60:.0f} minutes, and usually writes a line every {usual:.0f} "
            "seconds: look whether it hangs."
        )
    return ""


def _longer(m: Measured) -> str:
    return (
        "Train for longer, which usually helps: the same command with twice the epochs=, steps= or images= goes on "
        "from here."
    )


def _measure(m: Measured) -> list[str]:
    if len(m.knn[1]) or m.evaluated:
        return []
    return [f"Measure the features: sslvit knn run={m.run} data.train=<labelled images> data.test=<others>"]
