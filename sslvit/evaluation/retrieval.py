"""Image retrieval with frozen features: mean average precision, recall@k and precision@k by cosine similarity.

Every image of data.test (a query) ranks all images of data.train (the gallery). The images of its class are relevant.
Without data.test, every image of data.train ranks all the others. It is left out by its number, not by its similarity,
so a copy of it stays in.

mAP           Mean over the queries of the average precision, the mean of the precision at the rank of each relevant
              image, over the complete ranking (Manning, Raghavan and Schuetze, Introduction to Information
              Retrieval, 2008, section 8.4).
recall@k      Share of the queries with a relevant image among the first k (Song et al., CVPR 2016, arXiv 1511.06452),
              as is usual for retrieval by class. It is not the share of the relevant images that are found.
precision@k   Mean share of relevant images among the first k.

The rankings are exact, by faiss. Equal similarities come in a random order, which depends on the seed. The files lie in
the order of the classes: in their order, an encoder with the same features for all images would be far above chance.
Queries without a relevant image in the gallery are counted and left out of all means. scikit-learn's average precision
takes one query at a time and sorts again; here it is computed from the rankings, many queries at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
import torch
from torch import Tensor

from .. import rng
from ..distributed import on_first_process, say
from ..errors import UserError, check_range
from . import Column, Command, protocol, scores
from .config import Retrieval as Config
from .records import describe_set, table

COMMAND = Command(
    "run=... data.train=... [data.test=...]",
    "retrieval with frozen features: mAP, recall, precision",
    (Column("retrieval mAP", "map"),),
)

RANKED_AT_ONCE = 2**24  # similarities in memory: 200 MB with their indices
RESAMPLES = 2000  # of the bootstrap


def run(config: Config) -> dict[str, Any]:
    """Features, rankings, measures; prints a table and writes <run>/eval/retrieval.json. Raises UserError."""
    check_range("", config, 1, None, "k")
    if not config.k:
        raise UserError("k is empty: give the ranks to report, such as k=[1,5,10].")
    frozen, split = protocol.open_split(config, "retrieval", leave_one_out=True)
    leave_one_out, classes = split.leave_one_out, split.classes
    gallery = frozen.features(split.train, config.cache, subtract_mean=True)
    queries = gallery if leave_one_out else frozen.features(split.test, config.cache, subtract_mean=True)
    labelled, labelled_queries = gallery.labels >= 0, queries.labels >= 0
    size = int(labelled.sum()) - leave_one_out
    if max(config.k) > size:
        raise UserError(f"k={max(config.k)} is larger than the {size} images that a query can find: use a smaller k.")
    found = on_first_process(
        lambda: rank_all(
            gallery.normalized()[labelled], gallery.labels[labelled], queries.normalized()[labelled_queries],
            queries.labels[labelled_queries], config.k, leave_one_out, config.seed,
        )
    )  # fmt: skip
    results = summarise(found, config.k, config.seed)
    say(
        f"retrieval of {config.run}: {frozen.describe()}, {gallery.values.shape[1]} wide, {frozen.precision}; "
        f"{len(found.precision)} queries, each ranks {size} images of {len(classes)} classes"
    )
    if results["without_answer"]:
        say(f"{results['without_answer']} queries have no image of their class to find and are left out.")
    say("mAP {:.2f} % (95 % interval {:.1f} - {:.1f})".format(results["map"], *results["map_interval"]))
    rows = [[str(r["k"]), f"{r['recall']:.2f}", f"{r['precision']:.2f}"] for r in results["at"]]
    say(*table(["k", "recall@k %", "precision@k %"], rows))
    frozen.save(
        "retrieval", results, gallery=describe_set(split.specs[0], len(gallery), gallery.unreadable),
        queries=describe_set(split.specs[1], len(queries), queries.unreadable), leave_one_out=leave_one_out,
        classes=len(classes), width=gallery.values.shape[1],
    )  # fmt: skip
    return results


@dataclass
class Ranked:
    """What the rankings of Q queries are worth."""

    precision: Tensor  # [Q] float64, average precision in 0 .. 1; nan for a query without a relevant image
    hits: Tensor  # [Q, len(ks)] float64, relevant images among the first k


def rank_all(
    gallery: Tensor, labels: Tensor, queries: Tensor, query_labels: Tensor, ks: Sequence[int], leave_one_out: bool,
    seed: int,
) -> Ranked:  # fmt: skip
    """[N, D], [N], [Q, D], [Q], features of unit length -> average precision and hits of every query.

    leave_one_out: the queries are the gallery, and none finds itself. Memory grows with N, not with Q times N.
    """
    order = rng.permutation(rng.fold_in(seed, "ties"), len(gallery))
    shuffled, row_of = labels[order], order.argsort()
    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatIP(gallery.shape[1])
    index.add(np.ascontiguousarray(gallery[order].numpy()))
    parts = []
    for chunk in torch.arange(len(queries)).split(max(1, RANKED_AT_ONCE // len(gallery))):
        rows = torch.from_numpy(index.search(np.ascontiguousarray(queries[chunk].numpy()), len(gallery))[1])
        if leave_one_out:
            others = rows != row_of[chunk].unsqueeze(1)
            rows = rows[others].view(len(chunk), len(gallery) - 1)
        parts.append(score_rankings(shuffled[rows] == query_labels[chunk].unsqueeze(1), ks))
    return Ranked(*(torch.cat(column) for column in zip(*parts, strict=True)))


def score_rankings(relevant: Tensor, ks: Sequence[int]) -> tuple[Tensor, Tensor]:
    """[Q, N] bool, in the order of the ranking -> [Q] average precision, nan without a relevant image, and
    [Q, len(ks)] hits."""
    hits = relevant.cumsum(dim=1)
    rank = torch.arange(1, relevant.shape[1] + 1)
    precision = (hits.double() / rank * relevant).sum(dim=1) / hits[:, -1]  # 0 / 0 is nan
    return precision, hits[:, [k - 1 for k in ks]].double()


def summarise(found: Ranked, ks: Sequence[int], seed: int) -> dict[str, Any]:
    """Means over the queries in percent. Raises UserError if no query has a relevant image."""
    answered = ~found.precision.isnan()
    if not answered.any():
        raise UserError("No query has an image of its class to find: retrieval needs a class with two or more images.")
    precision, hits = found.precision[answered], found.hits[answered]
    return {
        "map": round(100 * precision.mean().item(), 4),
        "map_interval": interval(precision, seed),
        "at": [
            {
                "k": k,
                "recall": round(100 * (hits[:, i] > 0).double().mean().item(), 4),
                "precision": round(100 * hits[:, i].mean().item() / k, 4),
            }
            for i, k in enumerate(ks)
        ],
        "queries": len(precision),
        "without_answer": int((~answered).sum()),
    }


def interval(values: Tensor, seed: int) -> tuple[float, float]:
    """[Q] in 0 .. 1 -> the bootstrap's 95 % interval of their mean, in percent.

    If all are 1, every draw is too: then the interval is that of Q correct answers.
    """
    if (values == 1).all():
        return scores.accuracy_interval(len(values), len(values))
    generator = np.random.default_rng(seed)
    means = [values.numpy()[generator.integers(0, len(values), len(values))].mean() for _ in range(RESAMPLES)]
    low, high = np.percentile(means, [2.5, 97.5])
    return round(100 * float(low), 2), round(100 * float(high), 2)
