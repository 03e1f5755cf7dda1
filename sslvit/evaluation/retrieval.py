"""Image retrieval with frozen features: mean average precision, recall@k and precision@k by cosine similarity.

Every image of data.test (a query) ranks all images of data.train (the gallery); those of its class are the right
answers. Without data.test, every image of data.train ranks all the others: itself is taken out by its number and not
by its similarity, so a copy of it stays in.

mAP           Mean over the queries of the average precision, the mean of the precision at the rank of each right
              answer, over the complete ranking (Manning, Raghavan and Schuetze, Introduction to Information
              Retrieval, 2008, section 8.4).
recall@k      Share of the queries with a right answer among the first k (Song et al., CVPR 2016, arXiv 1511.06452),
              as is usual for retrieval by class. Not the share of the right answers that were found.
precision@k   Mean share of right answers among the first k.

The rankings are exact, by faiss. Equal similarities come in a random order that is a function of the seed: in the order
of the files, which is that of the classes, an encoder that gives the same features to all would be well above chance.
Queries without a right answer in the gallery count in nothing but their number, which is told.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import faiss
import numpy as np
import torch
from torch import Tensor

from .. import rng
from ..distributed import on_first_process, say
from ..errors import UserError, check_range
from . import Column, Command, protocol, scores
from .records import describe_set, table

COMMAND = Command(
    "run=... data.train=... [data.test=...]",
    "retrieval with frozen features: mAP, recall, precision",
    (Column("retrieval mAP", "map"),),
)

RANKED_AT_ONCE = 2**24  # similarities in memory: 200 MB with their places
RESAMPLES = 2000  # of the bootstrap


@dataclass
class Sets(protocol.LabelledSets):
    train: str = ""  # the gallery: labelled images to be found
    test: str = ""  # the queries; empty: each image of the gallery asks for the others


@dataclass
class Config(protocol.Config):
    data: Sets = field(default_factory=Sets)
    k: tuple[int, ...] = (1, 5, 10)  # ranks of recall and precision


def run(config: Config) -> dict[str, Any]:
    """Features, rankings, measures; prints a table and writes <run>/eval/retrieval.json. Raises UserError."""
    check_range("", config, 1, None, "k")
    if not config.k:
        raise UserError("k is empty: give the ranks to report, such as k=[1,5,10].")
    frozen, split = protocol.open_split(config, "retrieval", leave_one_out=True)
    leave_one_out, classes = split.leave_one_out, split.classes
    gallery = frozen.features(split.train, config.cache, subtract_mean=True)
    queries = gallery if leave_one_out else frozen.features(split.test, config.cache, subtract_mean=True)
    labels, query_labels = gallery.labels, queries.labels
    known, wanted = labels >= 0, query_labels >= 0
    size = int(known.sum()) - leave_one_out
    if max(config.k) > size:
        raise UserError(f"k={max(config.k)} is larger than the {size} images that a query can find: use a smaller k.")
    place = torch.arange(int(known.sum())) if leave_one_out else None
    found = on_first_process(
        lambda: rank_all(
            gallery.normalized()[known], labels[known], queries.normalized()[wanted], query_labels[wanted],
            config.k, place, config.seed,
        )
    )  # fmt: skip
    results = summarise(found, config.k, config.seed)
    say(
        f"retrieval of {config.run}: {frozen.describe()}, {gallery.values.shape[1]} wide, {frozen.precision}; "
        f"{len(found.precision)} queries, each with {size} images to find in {len(classes)} classes"
    )
    if results["without_answer"]:
        say(f"{results['without_answer']} queries have no image of their class to find, and count in nothing below.")
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
    """What the rankings of Q queries are worth; rows of queries without a right answer are nan."""

    precision: Tensor  # [Q] float64, average precision in 0 .. 1
    hits: Tensor  # [Q, len(ks)] float64, right answers among the first k

    @property
    def answered(self) -> Tensor:
        return ~self.precision.isnan()


def rank_all(
    bank: Tensor, labels: Tensor, queries: Tensor, query_labels: Tensor, ks: Sequence[int], place: Tensor | None,
    seed: int,
) -> Ranked:  # fmt: skip
    """[N, D], [N], [Q, D], [Q], features of unit length -> average precision and hits of every query.

    place: [Q] rows of the bank that are the queries themselves, to be taken out; or None. Memory grows with N, not
    with Q times N.
    """
    order = rng.permutation(rng.fold_in(seed, "ties"), len(bank))
    shuffled = labels[order]
    own = None if place is None else order.argsort()[place]
    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatIP(bank.shape[1])
    index.add(np.ascontiguousarray(bank[order].numpy()))
    parts = []
    for chunk in torch.arange(len(queries)).split(max(1, RANKED_AT_ONCE // len(bank))):
        rows = torch.from_numpy(index.search(np.ascontiguousarray(queries[chunk].numpy()), len(bank))[1])
        if own is not None:
            others = rows != own[chunk].unsqueeze(1)
            rows = rows[others].view(len(chunk), len(bank) - 1)
        parts.append(judge(shuffled[rows] == query_labels[chunk].unsqueeze(1), ks))
    return Ranked(*(torch.cat(column) for column in zip(*parts, strict=True)))


def judge(right: Tensor, ks: Sequence[int]) -> tuple[Tensor, Tensor]:
    """[Q, N] bool, right answers in the order of the ranking -> [Q] average precision, nan without any, and
    [Q, len(ks)] hits."""
    hits = right.cumsum(dim=1)
    rank = torch.arange(1, right.shape[1] + 1)
    precision = (hits.double() / rank * right).sum(dim=1) / hits[:, -1]  # 0 / 0 is nan
    return precision, hits[:, [k - 1 for k in ks]].double()


def summarise(found: Ranked, ks: Sequence[int], seed: int) -> dict[str, Any]:
    """Means over the queries in percent. Raises UserError if none has a right answer."""
    answered = found.answered
    if not answered.any():
        raise UserError("No query has an image of its class to find: retrieval needs two images of a class at least.")
    precision, hits = found.precision[answered], found.hits[answered]
    low, high = interval(precision, seed)
    return {
        "map": round(100 * precision.mean().item(), 4),
        "map_interval": (low, high),
        "at": [
            {
                "k": k,
                "recall": round(100 * (hits[:, i] > 0).double().mean().item(), 4),
                "precision": round(100 * hits[:, i].mean().item() / k, 4),
            }
            for i, k in enumerate(ks)
        ],
        "queries": int(answered.sum()),
        "without_answer": int((~answered).sum()),
    }


def interval(values: Tensor, seed: int) -> tuple[float, float]:
    """The bootstrap's 95 % interval, in percent, of a mean over queries that are drawn anew, [Q] in 0 .. 1.

    If all are 1 every draw is, and the interval is that of so many right answers.
    """
    if (values == 1).all():
        return scores.accuracy_interval(len(values), len(values))
    generator, values = np.random.default_rng(seed), values.numpy()
    means = [values[generator.integers(0, len(values), len(values))].mean() for _ in range(RESAMPLES)]
    low, high = np.percentile(means, [2.5, 97.5])
    return round(100 * float(low), 2), round(100 * float(high), 2)
