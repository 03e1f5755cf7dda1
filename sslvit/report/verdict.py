"""Is a run all right? One pure function, `judge`, with its thresholds here and what they were seen at.

What was seen at the last line of runs on two CPU cores:

                                            fall of the loss    k-NN            effective   prototypes
                                            in the last fifth                   rank        of the teacher
    MAE on CIFAR-10, mae_cifar10.yaml       1.8 %               51.6 %          111
    DINO on CIFAR-10, dino_cifar10.yaml     2.7 %               44.0 %          124         106 (lowest: 54)
    MAE on 256 photos, 120 epochs           1.4 %                               60
    DINO on fractals, center off            1.0 %               10.6 to 16.6 %  6.2         1.8

Error rates: eval/README.md, "Alarms", from 88 short runs, whose logs tests/report/test_alarms.py reads again. Evidence
beside a threshold below is of these runs: width 128, depth 3, 24 pixels, 160 steps. One or two of them support each of
HIGH_MASK, ABOVE_CHANCE, ONE_COLOUR and FEW_IMAGES.
"""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from ..evaluation.online import rank_alarm

State = Literal[
    "no metrics", "warming up", "learning", "learned", "undertrained", "collapsed", "diverged", "faulty", "stopped"
]
ALARMS = ("collapsed", "diverged", "faulty")  # states in which a run should be ended

FEW_LINES = 3  # of the log, below which nothing is said of its trend
RISEN = 0.5  # of the fall of the loss, which it has lost again: diverged. DINO's first lines rise by 0.4 and recover
# The same of the distance of student and teacher, which must also be above its start by this factor. It rises in
# healthy runs too: to 1.3 of its start (DINO of X-rays' augmentation, CIFAR-10). Momentum 0: 2.1 and 2.6.
RISEN_TAUGHT, ABOVE_START = 1.2, 1.6
SKIPPED = 0.5  # of the steps of the last line: diverged
STILL_FALLING = 0.10  # of the whole fall of the loss within the last fifth of a run that has ended: undertrained
# k-NN must rise by so many points, or by a tenth of its start if that is less. After model.init half of it is enough.
KNN_GAIN = 2.0
KNN_RISING = 2.0  # points within the last fifth of a run that has ended: undertrained
RANK_LOST = 0.05  # of the highest rank so far, at the last measurement, and ...
RANK_LOW = 4.0  # ... a rank below this: collapsed
# exp of the entropy of the teacher's mean answer, below which DINO has collapsed to few prototypes. Healthy runs: 54
# and more at any line (dino_cifar10.yaml), 16 and more in short ones. Center off: 1.0 to 2.0 of 256, below 8 from 10 %
# of the run on. With KoLeo k-NN rises all the same (28 to 35 %), so nothing is said then.
PROTOTYPES = 8.0
FEW_EPOCHS = 50  # passes over the images, below which a longer run is suggested
FEW_IMAGES = 100  # below: too few, if the rank does not rise. 256 photos suffice
ONE_COLOUR = 0.99999  # share of the variance that is between images. Others: 0.94 to 0.993, less in small batches
HIGH_MASK = 0.95  # of MAE. With 0.97 k-NN fell from 12.6 to 8.3 %; with 0.05 it was as with 0.75
# Cross-entropy of the first two lines by that of a student that knows nothing. student_temp 0.01: 2.1; others: 1.1
ABOVE_CHANCE = 1.3
SAME_RANK, SAME_SPREAD = 1.5, 0.02  # an effective rank below, while crops of images differ: the images are the same
HIGH_LR = (
    0.01  # learning rate of a step. 2.4e-3 is the highest published; with 0.04 and 0.05 k-NN fell by 4 to 7 points
)
LOW_LR, UNMOVED = 5e-6, 0.03  # learning rate after its warm-up, and change of the loss. At 5e-7 k-NN stays as it was
HIGH_DECAY = 0.005  # of a weight in a step: learning rate times weight decay. Published: 1.2e-4; 0.05 harms
# From this share of a run on, an effective rank below, that has not risen by this factor: it does not learn. Runs that
# nothing else tells have 7 to 16, healthy ones with KoLeo 30 and more (22 in one of 24 seconds).
STUCK_FROM, RANK_STUCK, RANK_RISING = 0.25, 18.0, 1.2
LOW_MOMENTUM, MOMENTUM = 0.5, 0.98  # of a teacher: too low below (0: k-NN 14 instead of 21 %); usual in a short run
# Key, lowest and highest value that are known to work, what to set instead.
USUAL = [
    ("objective.teacher_temp", 0.01, 0.2, "objective.teacher_temp=0.04 objective.teacher_temp_start=0.04"),
    ("objective.student_temp", 0.05, 0.5, "objective.student_temp=0.1"),
    ("objective.center_momentum", 0, 0.999, "objective.center_momentum=0.9"),
    ("objective.mask_ratio", 0.2, HIGH_MASK, "objective.mask_ratio=0.75"),
]
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
    pixels: tuple[float, float] | None = None  # k-NN of the encoder and of raw pixels, percent, of the same test images
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
    works: dict[str, float] = field(default_factory=dict)  # keys of the method and values that work in short runs
    settings: dict[str, Any] = field(default_factory=dict)  # flat: {"optim.base_lr": 0.001, ...}
    columns: dict[str, Points] = field(default_factory=dict)  # all that the log holds

    def values(self, name: str) -> np.ndarray:
        """Of a column of the log, where they are finite."""
        found = self.columns.get(name, NONE)[1]
        return found[np.isfinite(found)]

    def setting(self, key: str, default: float) -> float:
        """A number of the settings."""
        found = self.settings.get(key)
        return float(found) if isinstance(found, (int, float)) and math.isfinite(found) else default


@dataclass
class Verdict:
    state: State
    headline: str
    evidence: list[str] = field(default_factory=list)
    advice: list[str] = field(default_factory=list)


def judge(m: Measured) -> Verdict:
    """The state of a run in words. The first rule that fits decides."""
    sentences = (_loss(m), _knn(m), _rank(m), _answers(m), _gradient(m), _length(m), _quiet(m))
    evidence = [sentence for sentence in sentences if sentence]
    if m.step is None:
        return Verdict("no metrics", "There is nothing to judge: the run has not written a line yet.")
    end = f"step {m.step:,}"
    if reason := _diverged(m):
        advice = [
            *_causes(m, spread=False),
            "Warm it up for longer (optim.warmup_epochs).",
            "Limit the gradient: optim.clip=1. If the loss overflows in bf16 or fp16, try precision=float32.",
        ]
        return Verdict("diverged", f"It has diverged at {end}: {reason}.", evidence, advice)
    if fault := next((found for rule in FAULTS if (found := rule(m))), None):
        reason, advice = fault
        return Verdict("faulty", f"It cannot learn like this: {reason}.", evidence, advice)
    if fault := _collapsed(m):
        reason, advice = fault
        first = f" The first line that shows it is of step {m.first_alarm:,}." if m.first_alarm is not None else ""
        return Verdict(
            "collapsed",
            "It has collapsed: it hardly tells images apart.",
            [f"{reason[:1].upper()}{reason[1:]}.{first}", *evidence],
            [*advice, "Then start anew, with another out=: a collapsed run seldom recovers."],
        )
    if fault := _stuck(m):
        return Verdict("faulty", f"It does not learn: {fault[0]}.", evidence, fault[1])
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
                f"It is training, and has no gain yet: {worse}.",
                evidence,
                ["Wait: DINO often falls below its start at first.", *measure],
            )
        compare = [] if m.pixels else ["Compare with `sslvit knn run=pixels:<run>`: an encoder should beat raw pixels."]
        advice = [_longer(m), *compare]
        return Verdict("undertrained", f"It has ended with little or no gain: {worse}.", evidence, advice)
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


# What makes learning impossible, or shows that nothing is learned. The first advice heals most such runs.
Fault = tuple[str, list[str]] | None


def _same_images(m: Measured) -> Fault:
    ranks, spread = m.values("rankme"), m.values("feature_spread")
    if not (len(ranks) and len(spread) and ranks[-1] < SAME_RANK and spread[-1] > SAME_SPREAD):
        return None
    return (
        f"the images are nearly the same, for the effective rank of their features is {ranks[-1]:.2f}, and those of "
        f"different crops differ (spread {spread[-1]:.2f})",
        [
            "Look at the images that it reads, and give others as data.train: sslvit data <images>.",
            "If they are not the same, is their range of values right (data.value_range)?",
        ],
    )


def _mask(m: Measured) -> Fault:
    ratio = m.setting("objective.mask_ratio", 0)
    if ratio <= HIGH_MASK:
        return None
    return f"{ratio:.0%} of each image is hidden, and the rest tells too little of it", _causes(m)


def _blank(m: Measured) -> Fault:
    values = m.values("image_difference")
    if not len(values) or values.min() < ONE_COLOUR:
        return None
    return "each image has one colour only", ["Look at the images that it reads: sslvit data <images>."]


def _repeated_batch(m: Measured) -> Fault:
    values = m.values("image_difference")
    if len(values) < 2 or not (values == values[0]).all() or values[0] == 0:
        return None
    return (
        f"every line has the same batch of images, for they differ by exactly {values[0]:.7g} each time",
        [
            "The loader gives one batch again and again, or there are few images: look at data.train by "
            "sslvit data <images>."
        ],
    )


def _teacher(m: Measured) -> Fault:
    values = m.values("momentum")
    if not len(values) or LOW_MOMENTUM <= values[0] < 1:
        return None
    what = "never moves" if values[0] >= 1 else "is nearly the student itself"
    return (
        f"the teacher {what}, as its momentum is {values[0]:g}; and it is the teacher that is evaluated and exported",
        [f"Let it follow the student slowly: objective.momentum={MOMENTUM} objective.momentum_end=1."],
    )


def _center(m: Measured) -> Fault:
    if m.setting("objective.center_momentum", 0) < 1 or m.setting("objective.koleo_weight", 0):
        return None
    return "the center never moves, as its momentum is 1, and without it DINO collapses to one prototype", _causes(m)


def _same_crops(m: Measured) -> Fault:
    values, entropy = m.values("teacher_agreement"), m.values("teacher_mean_entropy")
    if min(len(values), len(entropy)) < 2 or values[:2].min() < 1 or entropy[:2].min() < math.log(PROTOTYPES):
        return None
    return (
        "the crops of an image are the same, for the teacher always gives them the same prototype, from the first line",
        ["Turn the augmentation on: objective.global_crop_scale=[0.4,1] objective.jitter_prob=0.8 flip_prob=0.5."],
    )


def _sure_and_wrong(m: Measured) -> Fault:
    """A student whose first answers are worse than if it gave each prototype the same probability."""
    losses, count = m.values("loss")[:2], m.setting("objective.prototypes", 0)
    if len(losses) < 2 or count < 2 or m.setting("objective.koleo_weight", 0) or m.pretrained:
        return None
    if losses.mean() < ABOVE_CHANCE * math.log(count):
        return None
    return (
        f"the student's first answers are sure and wrong: the loss is {losses.mean():.3g}, and by chance it would be "
        f"{math.log(count):.3g}",
        _causes(m),
    )


def _wild_rate(m: Measured) -> Fault:
    rates, decays = m.values("lr"), m.values("weight_decay")
    if len(rates) and rates.max() > HIGH_LR:
        return f"the learning rate is {rates.max():.2g}, and AdamW needs one below {HIGH_LR:g}", [f"Set {_rate(m)}."]
    if len(rates) == len(decays) and len(rates) and (loss := (rates * decays).max()) > HIGH_DECAY:
        reason = f"weight decay takes {loss:.1%} of each weight in a step, and they cannot grow"
        return reason, ["Set optim.weight_decay=0.05 optim.weight_decay_end=null."]
    return None


def _unmoved(m: Measured) -> Fault:
    """Neither the rate nor the loss moves."""
    losses, batch = m.values("loss"), m.setting("global_batch_size", 256)
    if len(losses) < 2 or m.setting("optim.base_lr", 1) * batch / 256 > LOW_LR:
        return None
    if abs(losses[-2:].mean() / losses[0] - 1) > UNMOVED:
        return None
    return (
        f"the learning rate is so low that nothing changes: the loss was {losses[0]:.4g} and is {losses[-1]:.4g}",
        [f"Raise it: {_rate(m)}."],
    )


def _stuck(m: Measured) -> Fault:
    """Features that lie in fewer directions than those of an untrained encoder, and do not leave them."""
    steps, ranks = m.rankme
    if m.step is None or not m.total or len(ranks) < 2 or steps[-1] < STUCK_FROM * m.total or m.pretrained:
        return None
    if "momentum" not in m.columns and not m.setting("objective.koleo_weight", 0):
        return None  # low, and no fault: without KoLeo, mae_cifar10.yaml has the better linear probe
    if not (ranks[-1] < RANK_STUCK and ranks[-1] < RANK_RISING * ranks[-2]):
        return None
    return (
        f"the effective rank of its features (RankMe) is {ranks[-1]:.1f} after {steps[-1]:,.0f} steps and hardly "
        "rises, and that of an untrained encoder is 17 to 30",
        [*_few_images(m), *_causes(m)],
    )


def _few_images(m: Measured) -> list[str]:
    count = (m.step or 0) * m.setting("global_batch_size", 0) / m.epochs if m.epochs else 0
    return [f"It has {count:.0f} images, which are too few: give more as data.train."] if 0 < count < FEW_IMAGES else []


# In this order. A collapse is told from features that never spread.
FAULTS = (
    _same_images, _blank, _repeated_batch, _teacher, _center, _mask, _same_crops, _wild_rate, _sure_and_wrong, _unmoved,
)  # fmt: skip


def _causes(m: Measured, spread: bool = True) -> list[str]:
    """What to set, the likeliest first: settings far from all that is known to work, KoLeo, the learning rate."""
    found = [
        f"Set {words}. The value {value:g} of {key} is far from what works."
        for key, low, high, words in USUAL
        if not low <= (value := m.setting(key, low)) <= high
    ]
    weight = m.works.get("objective.koleo_weight")
    if spread and weight and not m.setting("objective.koleo_weight", 0):
        words = f"objective.koleo_weight={weight:g}"
        found = [one.replace("Set ", f"Set {words} ", 1) for one in found] or [f"Spread the features: {words}."]
    return [*found, f"Lower the learning rate: {_rate(m)}."]


def _rate(m: Measured) -> str:
    """The learning rate of the recipes, or a third of the run's own if that is not above it."""
    usual, now = m.works.get("optim.base_lr", 1e-3), m.setting("optim.base_lr", 1e-3)
    low = now * m.setting("global_batch_size", 256) / 256 < LOW_LR
    return f"optim.base_lr={usual if now > usual or low else float(f'{now / 3:.2g}'):g}"


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
    taught, points = _excess(m)
    found = ends(points)
    if found and m.step is not None and m.step > m.warmup and len(points[1]) >= 2 * FEW_LINES:
        first, _, last = found
        few = max(1, len(points[1]) // 20)
        finite = points[1][np.isfinite(points[1])]
        smooth = np.array([np.median(part) for part in np.array_split(finite, max(1, len(finite) // few))])
        lowest = float(smooth.min())
        risen = RISEN_TAUGHT if taught else RISEN
        above = last > ABOVE_START * first if taught else last - lowest > 0.02 * abs(lowest)
        if last - lowest > risen * (first - lowest) and above:
            what = "distance of student and teacher" if taught else "loss"
            return f"the {what} was {lowest:.4g} and has risen to {last:.4g}"
    return ""


def _excess(m: Measured) -> tuple[bool, Points]:
    """(whether there is a teacher, the loss). DINO's loss has the entropy of its teacher in it, which rises in healthy
    runs: without it, and without KoLeo's term, the distance of student and teacher is left."""
    (steps, values), (also, entropy) = m.loss, m.columns.get("teacher_entropy", NONE)
    if len(entropy) != len(values) or not (steps == also).all() or not len(values):
        return False, m.loss
    spread = m.columns.get("koleo", NONE)[1]
    koleo = m.setting("objective.koleo_weight", 0) * spread if len(spread) == len(values) else 0.0
    return True, (steps, values - entropy - koleo)


def _collapsed(m: Measured) -> Fault:
    if m.alarm:
        reason, _, remedy = m.alarm.partition(". ")  # in all such sentences the advice comes last
        return reason.rstrip("."), [*(_causes(m) if m.works else ()), *([remedy] if remedy else [])]
    few = m.prototypes is not None and m.prototypes < PROTOTYPES
    if few and not m.setting("objective.koleo_weight", 0):
        return (
            f"the teacher gives all images the same {m.prototypes:.1f} prototypes (exp of its mean answer's entropy)",
            _causes(m),
        )
    ranks = m.rankme[1][np.isfinite(m.rankme[1])]
    if not len(ranks):
        return None
    if rank_alarm(float(ranks[-1])):
        return f"the features lie in one direction: their effective rank (RankMe) is {ranks[-1]:.2f}", _causes(m)
    if ranks[-1] < RANK_LOW and ranks[-1] < RANK_LOST * ranks.max():
        return (
            f"the effective rank of the features (RankMe) was {ranks.max():.1f} and is {ranks[-1]:.2f}: they lie in "
            "few directions",
            _causes(m),
        )
    return None


def _no_gain(m: Measured) -> str:
    if m.pixels and m.pixels[0] <= m.pixels[1]:
        return (
            f"raw pixels are as good as its features: k-NN {m.pixels[1]:.1f} %, and of the encoder {m.pixels[0]:.1f} %"
        )
    if len(m.knn[1]) > 1 and m.knn[0][0] == 0:
        before, now = m.knn[1][[0, -1]]
        if now - before < min(KNN_GAIN, before / 10) / (2 if m.pretrained else 1):
            return f"k-NN was {before:.1f} % before the first step and is {now:.1f} %"
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


def _answers(m: Measured) -> str:
    """Of a teacher that gives one answer, while KoLeo spreads the features: in such runs k-NN was as good."""
    few = m.prototypes is not None and m.prototypes < PROTOTYPES
    if not few or not m.setting("objective.koleo_weight", 0):
        return ""
    return "The teacher's answers are the same for all images, so KoLeo alone (objective.koleo_weight) trains it."


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
    minutes = m.setting("minutes", 0)
    more = f"minutes={2 * minutes:g}" if minutes else "twice the epochs=, steps= or images="
    return f"Train for longer, which usually helps: the same command with {more} goes on from here."


def _measure(m: Measured) -> list[str]:
    if len(m.knn[1]) or m.evaluated:
        return []
    return [f"Measure the features: sslvit knn run={m.run} data.train=<labelled images> data.test=<others>"]
