"""The linear probe on corrupted and attacked test images: accuracy by corruption, severity and eps.

The classifier is that of `sslvit linear`. It is trained on clean images only, and its learning rate is chosen on a
held-out part of them.

The corruptions are in corruptions.py. Their mean error is the mean of 100 - accuracy over corruptions and severities;
relative to clean, the clean error is subtracted (Hendrycks and Dietterich, ICLR 2019, section 4, without the division
by AlexNet's errors, which exist for ImageNet only).

The attacks are in attacks.py, with eps in 255ths. Their gradients pass through the frozen encoder, the standardisation
and the classifier, in float32. The encoders are not trained against attacks: accuracies near 0 at eps = 8 are normal.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import rng
from ..data import BadImage, Source
from ..data.crops import centre
from ..data.workers import in_batches
from ..distributed import all_reduce_sum, on_first_process, say
from ..errors import UserError, check_range
from . import Command, attacks, corruptions, linear, pictures, probes, protocol, scores
from .classes import check_readable, labels_of
from .config import CORRUPTIONS
from .config import Robustness as Config
from .features import CROP_RATIO, CentreCropped, Features, share
from .frozen import Frozen
from .records import describe_set, table
from .subset import random_subset

COMMAND = Command(
    "run=... data.train=... data.test=...",
    "the linear probe on corrupted and attacked images",
)


class Classifier(NamedTuple):
    """A linear classifier of standardised features."""

    mean: Tensor  # [D]
    std: Tensor  # [D]
    head: Tensor  # [D + 1, C], the last row is the bias

    def __call__(self, features: Tensor) -> Tensor:
        """[N, D] -> [N, C] logits."""
        return F.pad((features - self.mean) / self.std, (0, 1), value=1.0) @ self.head

    def to(self, device: torch.device) -> "Classifier":
        return Classifier(*(tensor.to(device) for tensor in self))


def run(config: Config) -> dict[str, Any]:
    """Probe, corruptions, attacks; prints tables and writes <run>/eval/robustness.json. Raises UserError."""
    check(config)
    frozen, split = protocol.open_split(config, "robustness")
    source = random_subset(split.test, config.images, config.seed, "robustness")
    train = frozen.features(split.train, config.cache)
    clean = frozen.features(source)
    check_readable(train.labels, clean.labels, split.specs)
    classifier, setting = on_first_process(lambda: fit(config, train, len(split.classes)))
    accuracy = partial(accuracy_of, classifier)
    images = int((clean.labels >= 0).sum())
    say(
        f"robustness of {config.run}: {frozen.describe()}, {train.values.shape[1]} wide, {frozen.precision}; "
        f"linear classifier with lr {setting['lr']:g} from {len(train)} training images; {images} test images in "
        f"{len(split.classes)} classes"
    )
    results: dict[str, Any] = {"setting": setting, "images": images, "clean": round(accuracy(clean), 4)}
    results["clean_interval"] = scores.accuracy_interval(round(results["clean"] * images / 100), images)
    say("clean top-1 {:.2f} % (95 % interval {:.1f} - {:.1f})".format(results["clean"], *results["clean_interval"]))
    if config.corruptions:
        results["corruptions"] = corrupted(config, frozen, source, accuracy, results["clean"])
    if config.attacks:
        results["attacks"] = attacked(config, frozen, source, classifier)
    frozen.save(
        "robustness", results, train=describe_set(split.specs[0], len(train), train.unreadable),
        test=describe_set(split.specs[1], len(clean), clean.unreadable, of=len(split.test)),
        classes=len(split.classes), width=train.values.shape[1],
    )  # fmt: skip
    if config.picture:
        on_first_process(lambda: draw(config, frozen, source))
    return results


def check(config: Config) -> None:
    """Before the work: raises UserError for impossible settings."""
    linear.check(config)
    if config.protocol != "sweep" or config.pools or config.seeds:
        raise UserError("robustness has one probe with protocol=sweep and pool=: leave protocol, pools and seeds out.")
    check_range("", config, 1, None, "images", "steps")
    check_range("", config, 0, 255, "eps")
    for key, names in (("corruptions", CORRUPTIONS), ("attacks", tuple(attacks.ATTACKS))):
        unknown = [name for name in getattr(config, key) if name not in names]
        if unknown:
            raise UserError(f"{key} has {unknown[0]}, which is not one of {', '.join(names)}.")
    if config.attacks and not config.eps:
        raise UserError("eps is empty: give how far an attack may move a pixel, such as eps=[1,4], or attacks=[].")
    pictures.check(config.picture)


def fit(config: linear.Config, features: Features, num_classes: int) -> tuple[Classifier, dict[str, float]]:
    """The classifier of `sslvit linear` on one way of pooling, and its settings. Raises UserError."""
    train, settings = linear.trainer(config, num_classes, torch.device("cpu")), linear.grid(config)
    best = probes.best_of(probes.try_settings(config, features, settings, train))
    setting = {name: best[name] for name in settings[0]}
    labelled, *_ = probes.split(config, features.labels)
    heads, mean, std = probes.fit(features, labelled, [setting], train)
    return Classifier(mean, std, heads[0]), setting


def accuracy_of(classifier: Classifier, features: Features) -> float:
    """Top-1 in percent of the labelled images."""
    labelled = features.labels >= 0
    right = classifier(features.values[labelled]).argmax(dim=1) == features.labels[labelled]
    return 100 * right.double().mean().item()


class Corrupted(Source):
    """The images of a source, resized and centred for the encoder, and then corrupted."""

    def __init__(self, source: Source, size: tuple[int, int], name: str, severity: int, seed: int) -> None:
        self.source, self.size, self.corruption, self.severity = source, size, name, severity
        self.key = rng.fold_in(seed, "robustness")
        self.labels, self.classes = source.labels, source.classes

    def __len__(self) -> int:
        return len(self.source)

    def read(self, index: int) -> Tensor:
        image = centred(self.source.read(index), self.size)
        return corruptions.corrupt(image, self.corruption, self.severity, rng.fold_in(self.key, index))

    def name(self, index: int) -> str:
        return self.source.name(index)

    def identity(self) -> str:
        return self.source.identity()

    def fingerprint(self) -> str:
        return f"{self.source.fingerprint()} {self.corruption} {self.severity} {int(self.key)}"


def centred(image: Tensor, size: tuple[int, int]) -> Tensor:
    """As `features.CentreCropped` does it."""
    return image if tuple(image.shape[-2:]) == size else centre(image, size, CROP_RATIO)


def corrupted(
    config: Config, frozen: Frozen, source: Source, accuracy: Callable[[Features], float], clean: float
) -> dict[str, Any]:
    """Accuracy for each corruption and severity, and their mean error. Prints each row of the table as it is ready."""
    size = frozen.encoder.image_size
    wide = max(len(name) for name in config.corruptions)

    def row(name: str, values: Sequence[float]) -> str:
        return name.rjust(wide) + "".join(f"{value:8.2f}" for value in [*values, sum(values) / len(values)])

    say(f"top-1 % of corrupted images, at the severities of {corruptions.scale_of(size)[0]}:")
    say(" " * wide + "".join(str(head).rjust(8) for head in [*corruptions.SEVERITIES, "mean"]))
    top1 = {}
    for name in config.corruptions:
        sources = [Corrupted(source, size, name, severity, config.seed) for severity in corruptions.SEVERITIES]
        top1[name] = [round(accuracy(frozen.features(one)), 4) for one in sources]
        say(row(name, top1[name]))
    values = torch.tensor(list(top1.values()), dtype=torch.float64)
    error, by_severity = 100 - values.mean().item(), values.mean(dim=0).tolist()
    say(row("mean", by_severity))
    say(f"mean corruption error {error:.2f} %, {error - (100 - clean):+.2f} points from the clean error")
    return {
        "severities": corruptions.scale_of(size)[0],
        "top1": top1,
        "by_severity": [round(v, 4) for v in by_severity],
        "mean_error": round(error, 4),
        "relative_error": round(error - (100 - clean), 4),
    }


def attacked(
    config: Config, frozen: Frozen, source: Source, classifier: Classifier
) -> dict[str, list[dict[str, float]]]:
    """Accuracy for each attack and eps; prints a table. Each process takes its share of the images."""
    encoder, device = frozen.encoder, frozen.accelerator.device
    encoder.eval().requires_grad_(False)
    classifier, labels = classifier.to(device), labels_of(source)

    def logits(x: Tensor) -> Tensor:
        with torch.compiler.set_stance("force_eager"):
            return classifier(encoder.features(frozen.normalize(x), frozen.pool).float())

    mine = share(source)
    mine = mine[labels[mine] >= 0]
    cells = [(name, eps) for name in config.attacks for eps in config.eps]
    right, images_seen = (torch.zeros(n, dtype=torch.long, device=device) for n in (len(cells), 1))
    batch_size = max(1, config.batch_size // 8)  # gradients need the memory of every block
    for index, images in in_batches(CentreCropped(source, mine, encoder.image_size), batch_size, _readable, 0):
        if images is None:
            continue
        x, y = images.to(device).float() / 255, labels[index].to(device)
        images_seen += len(index)
        for cell, (name, eps) in enumerate(cells):
            key = rng.fold_in(rng.fold_in(config.seed, "attack"), index)
            moved = attacks.ATTACKS[name](logits, x, y, eps / 255, config.steps, key)
            with torch.no_grad():
                right[cell] += (logits(moved).argmax(dim=1) == y).sum()
    top1 = (100 * all_reduce_sum(right) / all_reduce_sum(images_seen)).tolist()
    found: dict[str, list[dict[str, float]]] = {name: [] for name in config.attacks}
    for (name, eps), value in zip(cells, top1, strict=True):
        found[name].append({"eps": eps, "top1": round(value, 4)})
    rows = [[name, *(f"{cell['top1']:.2f}" for cell in cells_of_row)] for name, cells_of_row in found.items()]
    say("top-1 % of attacked images, in float32, by eps in 255ths:")
    say(*table(["", *(f"{eps:g}" for eps in config.eps)], rows))
    return found


def _readable(items: list[tuple[int, Tensor | None]]) -> tuple[Tensor, Tensor | None]:
    good = [(number, image.float()) for number, image in items if image is not None]
    images = torch.stack([image for _, image in good]) if good else None
    return torch.tensor([number for number, _ in good], dtype=torch.long), images


def draw(config: Config, frozen: Frozen, source: Source) -> None:
    """The first image that can be read: a row for each corruption, a column for each severity."""
    size = frozen.encoder.image_size
    factor = max(1, 96 // max(size))
    cell = (size[0] * factor, size[1] * factor)
    for index in range(len(source)):
        try:
            clean = pictures.image_of(centred(source.read(index), size), cell)
        except BadImage:
            continue
        rows = []
        for name in config.corruptions:
            images = [Corrupted(source, size, name, s, config.seed).read(index) for s in corruptions.SEVERITIES]
            rows.append([clean, *(pictures.image_of(image, cell) for image in images)])
        columns = ["clean", *map(str, corruptions.SEVERITIES)]
        pictures.save(pictures.montage(rows or [[clean]], config.corruptions, columns), config.picture)
        return
