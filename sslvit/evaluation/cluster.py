"""Clusters of frozen features beside the classes that nobody told the encoder: k-means, NMI, ARI, matched accuracy.

k-means is faiss's, exact, on all images. With spherical=true (as DeepCluster and its successors cluster) features and
centroids have unit length and the nearest centroid is that of the largest cosine; with false, features are taken as
they are and distances are Euclidean. Each repeat takes the best of `restarts` starts by its own objective, without
looking at a label; what is told is the mean and the deviation over the repeats.

NMI         Mutual information of clusters and classes, divided by the mean of their entropies, 0 to 100. Vinh et al.,
            JMLR 11 (2010), table 2, NMI_sum. It grows with the number of clusters even for chance.
ARI         Share of pairs of images on which both agree, above what chance gives: 0 is chance, 100 equality. Hubert
            and Arabie, Journal of Classification 2 (1985).
accuracy    Share of images that lie in the cluster matched to their class, each cluster to one class at most, by the
            matching that makes it largest (Kuhn, 1955; Xie et al., ICML 2016, arXiv 1511.06335). Chance is
            above 100 / k.

The measures are computed here from the table of clusters by classes, a line or two each; the matching is SciPy's.
"""

from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .. import rng
from ..data import Source
from ..distributed import on_first_process, say
from ..errors import UserError, check_range, require
from . import Column, Command, pictures, records
from .classes import check_labelled
from .features import Features
from .frozen import EncoderConfig, Frozen, load_frozen

COMMAND = Command(
    "run=... data=...",
    "k-means clusters against the classes: NMI, ARI, accuracy",
    (Column("clusters", "accuracy"),),
)

SHOWN = 40  # clusters in a picture at most
MEASURES = ("nmi", "ari", "accuracy")


@dataclass
class Config(EncoderConfig):
    data: str = ""  # labelled images: a folder with a sub-folder for each class, or a set by name
    k: int | None = None  # clusters; null: as many as classes
    spherical: bool = True  # features and centroids of unit length; false: as they are
    repeats: int = 5  # with seeds of their own
    restarts: int = 5  # of each repeat, of which the best by k-means' own objective is taken
    iterations: int = 50  # of k-means
    picture: str = ""  # PNG with images of each cluster of the first repeat; empty: none
    per_cluster: int = 12  # images of each cluster in the picture
    cache: bool = True  # keep the features in <run>/eval/features, for the next evaluation of the same weights
    download_dir: str = "~/.cache/sslvit"  # where torchvision's data sets are or will be


def run(config: Config) -> dict[str, Any]:
    """Features, clusters, measures; prints a table and writes <run>/eval/cluster.json. Raises UserError."""
    check_range("", config, 2, None, "k")
    check_range("", config, 1, None, "repeats", "restarts", "iterations", "per_cluster")
    pictures.check(config.picture)
    require("scipy.optimize", "cluster", "matching clusters to classes")
    if not config.data:
        raise UserError("data is missing: cluster needs labelled images, data=<folder>.")
    frozen = load_frozen(config)
    source = frozen.open(config.data, config.download_dir)
    check_labelled(source, config.data, least=2)
    _check_k(config, len(source.classes), int((source.labels >= 0).sum()))
    features = frozen.features(source, config.cache, subtract_mean=True)
    known = (features.labels >= 0).nonzero().squeeze(1)
    labels, k = features.labels[known], config.k or len(features.classes)
    _check_k(config, len(features.classes), len(known))
    x = features.values[known]

    def work() -> tuple[list[dict[str, float]], Tensor]:
        repeats = [kmeans(x, k, config, repeat) for repeat in range(config.repeats)]
        return [measure(table(clusters, labels)) for clusters in repeats], repeats[0]

    found, first = on_first_process(work)
    results = {"k": k, **summarise(found), "repeats": found}
    say(
        f"clusters of {config.run}: {frozen.describe()}, {x.shape[1]} wide, {frozen.precision}; {len(x)} images of "
        f"{len(features.classes)} classes in {k} clusters, {'spherical' if config.spherical else 'Euclidean'} k-means"
    )
    rows = [[str(i), *(f"{one[name]:.2f}" for name in MEASURES)] for i, one in enumerate(found)]
    rows.append(["mean", *(f"{results[name]:.2f}" for name in MEASURES)])
    if len(found) > 1:
        rows.append(["deviation", *(f"{results[f'{name}_deviation']:.2f}" for name in MEASURES)])
    say(*records.table(["repeat", "NMI", "ARI", "accuracy %"], rows))
    frozen.save(
        "cluster", results, data=config.data, images=len(x), unreadable=features.unreadable,
        classes=len(features.classes), width=x.shape[1],
    )  # fmt: skip
    if config.picture:
        # Drawn by the first process alone: it reads a few images.
        on_first_process(lambda: draw(config, frozen, source, features, known, first))
    return results


def _check_k(config: Config, num_classes: int, num_images: int) -> None:
    k = config.k or num_classes
    if k > num_images:
        raise UserError(f"k={k} is larger than the {num_images} labelled images of {config.data}: use a smaller k.")


def kmeans(x: Tensor, k: int, config: Config, repeat: int) -> Tensor:
    """[N, D] float32 -> [N] int64 clusters."""
    if config.spherical:
        x = F.normalize(x, dim=1)
    faiss.omp_set_num_threads(torch.get_num_threads())
    seed = int(rng.fold_in(config.seed, "cluster", repeat)) % 2**30
    means = faiss.Kmeans(
        x.shape[1], k, niter=config.iterations, nredo=config.restarts, spherical=config.spherical, seed=seed,
        min_points_per_centroid=1, max_points_per_centroid=len(x), verbose=False, gpu=False,
    )  # fmt: skip
    points = np.ascontiguousarray(x.numpy())
    means.train(points)
    return torch.from_numpy(means.index.search(points, 1)[1][:, 0])


def table(clusters: Tensor, labels: Tensor) -> Tensor:
    """[N], [N] int64 -> [clusters, classes] int64, images in common."""
    num_classes = int(labels.max()) + 1
    cells = torch.bincount(clusters * num_classes + labels, minlength=(int(clusters.max()) + 1) * num_classes)
    return cells.view(-1, num_classes)


def measure(counts: Tensor) -> dict[str, float]:
    """[clusters, classes] -> NMI, ARI and matched accuracy, times 100."""
    return {
        "nmi": round(100 * mutual_information(counts), 4),
        "ari": round(100 * adjusted_rand(counts), 4),
        "accuracy": round(100 * matched(counts), 4),
    }


def summarise(found: list[dict[str, float]]) -> dict[str, float]:
    """Mean and deviation (of the sample, n - 1) of the measures of the repeats."""
    out = {}
    for name in MEASURES:
        values = np.array([one[name] for one in found])
        out[name] = round(float(values.mean()), 4)
        if len(values) > 1:
            out[f"{name}_deviation"] = round(float(values.std(ddof=1)), 4)
    return out


def mutual_information(counts: Tensor) -> float:
    """NMI = 2 I(A; B) / (H(A) + H(B)), and 1 if both sides are one group."""
    p = counts.double() / counts.sum()
    a, b = p.sum(dim=1), p.sum(dim=0)
    shared = entropy(a) + entropy(b) - entropy(p.flatten())
    total = entropy(a) + entropy(b)
    return 1.0 if total == 0 else max(0.0, 2 * shared / total)


def entropy(p: Tensor) -> float:
    """In nats; shares of 0 add nothing."""
    return torch.special.entr(p).sum().item()


def adjusted_rand(counts: Tensor) -> float:
    """ARI = (pairs - expected) / (largest - expected), and 1 if there is nothing to tell apart."""

    def pairs(n: Tensor) -> float:
        n = n.double()
        return (n * (n - 1) / 2).sum().item()

    together, rows, columns = pairs(counts), pairs(counts.sum(dim=1)), pairs(counts.sum(dim=0))
    everything = pairs(counts.sum())
    expected = rows * columns / everything if everything else 0.0
    largest = (rows + columns) / 2
    return 1.0 if largest == expected else (together - expected) / (largest - expected)


def matched(counts: Tensor) -> float:
    """Share of the images in pairs of the best one-to-one matching of clusters and classes."""
    assign = require("scipy.optimize", "cluster", "matching clusters to classes").linear_sum_assignment
    rows, columns = assign(counts.numpy(), maximize=True)
    return float(counts[rows, columns].sum() / counts.sum())


def draw(config: Config, frozen: Frozen, source: Source, features: Features, known: Tensor, clusters: Tensor) -> None:
    """A row for each cluster, the largest first, with images of it that the seed chose."""
    labels = features.labels[known]
    counts = table(clusters, labels)
    sizes, side = counts.sum(dim=1), max(48, min(96, max(frozen.subject.encoder.image_size)))
    rows, names = [], []
    for cluster in sizes.argsort(descending=True, stable=True)[:SHOWN].tolist():
        members = (clusters == cluster).nonzero().squeeze(1)
        if not len(members):
            continue
        key = rng.fold_in(config.seed, "cluster", "picture", cluster)
        shown = members[rng.permutation(key, len(members))[: config.per_cluster]]
        images = [source.read(number) for number in features.index[known[shown]].tolist()]
        rows.append([pictures.thumbnail(image, side) for image in images])
        most = int(counts[cluster].argmax())
        share = 100 * int(counts[cluster, most]) / int(sizes[cluster])
        names.append(f"{int(sizes[cluster])} images, {share:.0f} % {pictures.shorten(features.classes[most], 16)}")
    left_out = int((sizes > 0).sum()) - len(rows)
    title = f"the {SHOWN} largest of {left_out + SHOWN} clusters" if left_out else ""
    pictures.save(pictures.montage(rows, names, title=title), config.picture)
