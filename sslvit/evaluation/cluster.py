"""K-means clusters of frozen features against the classes, which the encoder never saw: NMI, ARI, matched accuracy.

k-means is faiss's, exact, on all images. With spherical=true (as in DeepCluster and its successors) features and
centroids have unit length and the nearest centroid is the one with the largest cosine. With false, features are taken
as they are and distances are Euclidean. Each repeat takes the best of `restarts` starts by the objective of k-means,
which uses no label. The results are the mean and the standard deviation over the repeats.

NMI         Mutual information of clusters and classes, divided by the mean of their entropies, 0 to 100. Vinh et al.,
            JMLR 11 (2010), table 2, NMI_sum. It grows with the number of clusters even for chance.
ARI         Share of pairs of images on which both agree, above what chance gives: 0 is chance, 100 is equality. Hubert
            and Arabie, Journal of Classification 2 (1985).
accuracy    Share of images that lie in the cluster matched to their class. Each cluster is matched to at most one
            class, so that the accuracy is largest (Kuhn, 1955; Xie et al., ICML 2016, arXiv 1511.06335). Chance is
            above 100 / k.
"""

from typing import Any

import faiss
import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from torch import Tensor

from .. import rng
from ..data import Source
from ..distributed import on_first_process, say
from ..errors import UserError, check_range
from . import Column, Command, pictures, records
from .classes import check_labelled, labels_of
from .config import Cluster as Config
from .features import Features
from .frozen import Frozen, load_frozen

COMMAND = Command(
    "run=... data=...",
    "k-means clusters against the classes: NMI, ARI, accuracy",
    (Column("clusters", "accuracy"),),
)

MAX_ROWS = 40  # clusters in the picture
MEASURES = ("nmi", "ari", "accuracy")


def run(config: Config) -> dict[str, Any]:
    """Features, clusters, measures; prints a table and writes <run>/eval/cluster.json. Raises UserError."""
    check_range("", config, 2, None, "k")
    check_range("", config, 1, None, "repeats", "restarts", "iterations", "per_cluster")
    pictures.check(config.picture)
    if not config.data:
        raise UserError("data is missing: cluster needs labelled images, data=<folder>.")
    frozen = load_frozen(config)
    source = frozen.open(config.data, config.download_dir)
    check_labelled(source, config.data, least=2)
    _check_k(config, len(source.classes), int((labels_of(source) >= 0).sum()))
    features = frozen.features(source, config.cache, subtract_mean=True)
    labelled = (features.labels >= 0).nonzero()[:, 0]
    x, labels, k = features.values[labelled], features.labels[labelled], config.k or len(features.classes)
    _check_k(config, len(features.classes), len(labelled))

    def work() -> tuple[list[dict[str, float]], Tensor]:
        repeats = [kmeans(x, k, config, repeat) for repeat in range(config.repeats)]
        return [measure(clusters, labels) for clusters in repeats], repeats[0]

    repeats, first = on_first_process(work)
    results: dict[str, Any] = {"k": k, **summarise(repeats), "repeats": repeats}
    say(
        f"clusters of {config.run}: {frozen.describe()}, {x.shape[1]} wide, {frozen.precision}; {len(x)} images of "
        f"{len(features.classes)} classes in {k} clusters, {'spherical' if config.spherical else 'Euclidean'} k-means"
    )
    rows = [[str(i), *(f"{one[name]:.2f}" for name in MEASURES)] for i, one in enumerate(repeats)]
    rows.append(["mean", *(f"{results[name]:.2f}" for name in MEASURES)])
    if len(repeats) > 1:
        rows.append(["deviation", *(f"{results[f'{name}_deviation']:.2f}" for name in MEASURES)])
    say(*records.table(["repeat", "NMI", "ARI", "accuracy %"], rows))
    frozen.save(
        "cluster", results, data=config.data, images=len(x), unreadable=features.unreadable,
        classes=len(features.classes), width=x.shape[1],
    )  # fmt: skip
    if config.picture:
        on_first_process(lambda: draw(config, frozen, source, features, labelled, first))
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


def measure(clusters: Tensor, labels: Tensor) -> dict[str, float]:
    """[N], [N] int64 -> NMI, ARI and matched accuracy, times 100."""
    counts = table(clusters, labels)
    matched = counts[linear_sum_assignment(counts, maximize=True)].sum() / len(labels)
    found = normalized_mutual_info_score(labels, clusters), adjusted_rand_score(labels, clusters), matched.item()
    return {name: round(100 * float(value), 4) for name, value in zip(MEASURES, found, strict=True)}


def summarise(repeats: list[dict[str, float]]) -> dict[str, float]:
    """Mean and standard deviation (of the sample, n - 1) of the measures of the repeats."""
    out = {}
    for name in MEASURES:
        values = np.array([one[name] for one in repeats])
        out[name] = round(float(values.mean()), 4)
        if len(values) > 1:
            out[f"{name}_deviation"] = round(float(values.std(ddof=1)), 4)
    return out


def draw(
    config: Config, frozen: Frozen, source: Source, features: Features, labelled: Tensor, clusters: Tensor
) -> None:
    """A row for each cluster, the largest first, with images of it that the seed chooses."""
    counts = table(clusters, features.labels[labelled])
    sizes, side = counts.sum(dim=1), max(48, min(96, max(frozen.encoder.image_size)))
    rows, names = [], []
    for cluster in sizes.argsort(descending=True, stable=True)[:MAX_ROWS].tolist():
        members = (clusters == cluster).nonzero()[:, 0]
        if not len(members):
            continue
        key = rng.fold_in(config.seed, "cluster", "picture", cluster)
        chosen = members[rng.permutation(key, len(members))[: config.per_cluster]]
        images = [source.read(number) for number in features.index[labelled[chosen]].tolist()]
        rows.append([pictures.thumbnail(image, side) for image in images])
        most = int(counts[cluster].argmax())
        share = 100 * int(counts[cluster, most]) / len(members)
        names.append(f"{len(members)} images, {share:.0f} % {pictures.shorten(features.classes[most], 16)}")
    total = int((sizes > 0).sum())
    title = f"the {len(rows)} largest of {total} clusters" if total > len(rows) else ""
    pictures.save(pictures.montage(rows, names, title=title), config.picture)
