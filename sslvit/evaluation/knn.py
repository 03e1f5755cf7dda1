"""Weighted k-NN classification of frozen features by faiss: all k and temperatures from one exact search.

Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", CVPR 2018, section 3.4, with the
settings of DINO (section 4.1): features have unit length, similarity is the cosine, and a neighbour votes for its class
with the weight exp(similarity / T). Without data.test each training image is classified by all the others
(leave-one-out). With several processes each holds and searches its share of the training images.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import rng
from ..distributed import gather_objects, on_first_process, say, world_size
from ..errors import UserError, check_range
from ..hardware import evaluation_threads
from . import Column, Command, confusion, pictures, protocol, records, scores
from .config import KS, TEMPERATURE
from .config import Knn as Config
from .features import Features
from .strata import first_of_each

if TYPE_CHECKING:
    import faiss

COMMAND = Command(
    "run=... data.train=... data.test=...",
    "k-NN classification with frozen features",
    (Column("k-NN", "top1", rows="neighbours", settings={"k": "k", "temperature": "T"}, usual=(20, 0.07)),),
)

QUERIES = 4096  # searched at once
LONGEST_TIE = 4096  # equal similarities that are put in order; a collapsed encoder gives equal ones only
RECALL_QUERIES = 1000  # for these an approximate search is compared with the exact one


@dataclass
class Labelled:
    """Features of labelled images, or this process's share of them."""

    values: Tensor  # [N, D] float32 of unit length
    labels: Tensor  # [N] int64
    indices: Tensor  # [N] int64, of the images in their source

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, rows: Tensor | slice) -> "Labelled":
        return Labelled(self.values[rows], self.labels[rows], self.indices[rows])


class Prediction(NamedTuple):
    """What the neighbours of Q queries vote for."""

    rank: Tensor  # [Q] int64: how many classes have more votes than the right one; 0: it is right
    label: Tensor  # [Q] int64: the class with most votes; of equal votes the smaller class number


def labelled(features: Features) -> Labelled:
    """Features without those of unlabelled images. All are brought to unit length in place."""
    found, has_label = Labelled(features.normalize().values, features.labels, features.index), features.labels >= 0
    return found if has_label.all() else found[has_label]


def run(config: Config) -> dict[str, Any]:
    """Features, search, votes; prints a table and writes <run>/eval/knn.json. Raises UserError."""
    if not config.k or min(config.k) < 1 or not config.temperature or min(config.temperature) <= 0:
        raise UserError(
            f"k={list(config.k)} and temperature={list(config.temperature)} must be lists of numbers above 0."
        )
    check_range("", config, 1, None, "shots", "repeats", "probes")
    pictures.check(config.picture)
    frozen, split = protocol.open_split(config, "knn", leave_one_out=True)
    leave_one_out, ks = split.leave_one_out, tuple(config.k)
    if ks != KS:  # a first check before the features are computed; some images may have no label or be unreadable
        _check(ks, len(split.train) - leave_one_out)
    task = protocol.extract_split(frozen, split, "knn", config.cache)
    bank = labelled(task.train)
    queries = bank if leave_one_out else labelled(task.test)
    ks = _possible(ks, sum(gather_objects(len(bank))) - leave_one_out)
    index = None if config.index == "exact" else _approximate(config, bank.values)
    votes = classify(bank, queries, len(task.classes), ks, config.temperature, leave_one_out, index)
    rows = [_row(key, prediction.rank) for key, prediction in votes.items()]
    usual, labels = (20, TEMPERATURE) if (20, TEMPERATURE) in votes else next(iter(votes)), _labels_of_all(queries)[1]
    rows[list(votes).index(usual)] |= confusion.summary(votes[usual].label, labels, task.classes)
    results: dict[str, Any] = {"protocol": "leave-one-out" if leave_one_out else "train and test", "neighbours": rows}
    say(*records.table(
        ["k", "T", "top-1 %", "95 % interval", "top-5 %"],
        [[str(r["k"]), f"{r['temperature']:g}", f"{r['top1']:.2f}", "{:.1f} - {:.1f}".format(*r["top1_interval"]),
          f"{r['top5']:.2f}"] for r in rows],
    ))  # fmt: skip
    if config.picture:
        matrix = confusion.confusion(votes[usual].label, labels, len(task.classes))
        on_first_process(lambda: confusion.picture(matrix, task.classes, config.picture))
    if index is not None:
        k = min(max(ks), 20)
        results["recall"] = _recall(bank, queries, k, index, leave_one_out)
        say(
            f"{config.index} with {index.nprobe} of {index.nlist} cells found {results['recall']:.2f} % of the {k} "
            f"nearest images that an exact search finds, for {min(RECALL_QUERIES, len(queries))} images."
        )
    if config.shots:
        results["few_shot"] = _few_shot(config, len(task.classes), bank, queries, leave_one_out)
    task.save(results)
    return results


def _possible(ks: tuple[int, ...], most: int) -> tuple[int, ...]:
    """Those of the default numbers of neighbours that are not above `most`, or all that the user gave. Raises
    UserError."""
    if ks == KS and most < max(KS):
        ks = tuple(k for k in KS if k <= most) or (most,)
        say(f"k = {', '.join(map(str, ks))} only: there are {most} labelled training images to choose from.")
    _check(ks, most)
    return ks


def _check(ks: Sequence[int], most: int) -> None:
    if max(ks) > most:
        raise UserError(f"k={max(ks)} is larger than the {most} labelled training images: use a k of at most that.")


def _row(key: tuple[int, float], ranks: Tensor) -> dict[str, Any]:
    top1, top5 = top_accuracy(ranks, 1), top_accuracy(ranks, min(5, key[0]))
    right = ranks == 0
    return {
        "k": key[0], "temperature": key[1], "top1": round(top1, 4), "top5": round(top5, 4),
        "top1_interval": scores.accuracy_interval(int(right.sum()), len(right)), "right": records.pack_bits(right),
    }  # fmt: skip


def _few_shot(
    config: Config, num_classes: int, bank: Labelled, queries: Labelled, leave_one_out: bool
) -> list[dict[str, Any]]:
    """Accuracy with few training images of each class: mean and deviation over the draws. Raises UserError."""
    indices, labels = _labels_of_all(bank)
    counts = torch.bincount(labels, minlength=num_classes)
    present, smallest = int((counts > 0).sum()), int(counts[counts > 0].min())
    if max(config.shots) > smallest:
        raise UserError(
            f"shots={list(config.shots)}: the smallest class has {smallest} labelled training images, so no more can "
            "be drawn of each."
        )
    results = []
    for shots in config.shots:
        ks = tuple(k for k in config.k if k <= shots * present - leave_one_out) or (1,)
        found: dict[tuple[int, float], list[float]] = {}
        for repeat in range(config.repeats):
            key = rng.fold_in(config.seed, "shots", shots, repeat)
            drawn = first_of_each(labels, torch.full((num_classes,), shots), key)
            few = bank[torch.isin(bank.indices, indices[drawn])]
            votes = classify(few, queries, num_classes, ks, config.temperature, leave_one_out)
            for setting, prediction in votes.items():
                found.setdefault(setting, []).append(top_accuracy(prediction.rank, 1))
        results += [
            {"shots": shots, "k": k, "temperature": t, "top1": round(float(np.mean(values)), 4),
             "std": round(float(np.std(values, ddof=1)), 4) if len(values) > 1 else 0.0, "repeats": config.repeats}
            for (k, t), values in found.items()
        ]  # fmt: skip
    rows = [[str(r["shots"]), str(r["k"]), f"{r['temperature']:g}", f"{r['top1']:.2f}", f"{r['std']:.2f}"]
            for r in results]  # fmt: skip
    say(*records.table(["images a class", "k", "T", "top-1 %", "deviation"], rows))
    return results


def _labels_of_all(part: Labelled) -> tuple[Tensor, Tensor]:
    """Indices and labels of all processes' images, in the order of the indices, on every process."""
    indices, labels = torch.cat(gather_objects(part.indices)), torch.cat(gather_objects(part.labels))
    order = indices.argsort()
    return indices[order], labels[order]


def neighbours(bank: Tensor, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """[N, D], [Q, D] float32 of unit length -> [Q, k] similarities, best first, and [Q, k] int64 rows of the bank.

    Exact. Of equal similarities the smaller rows come first, also where the k-th place is shared (by up to
    LONGEST_TIE).
    """
    import faiss  # when it is needed: pretraining without labels never does

    faiss.omp_set_num_threads(evaluation_threads())
    # Without an index: it would be a second copy of the bank.
    values, count = np.ascontiguousarray(bank.numpy()), min(k + 1, len(bank))

    def nearest(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
        found = faiss.knn(np.ascontiguousarray(x.numpy()), values, count, metric=faiss.METRIC_INNER_PRODUCT)
        return _in_order(*map(torch.from_numpy, found))

    similarity, rows = nearest(queries, count)
    shared = (similarity[:, -1] == similarity[:, k - 1]) if count > k else torch.zeros(len(queries), dtype=torch.bool)
    similarity, rows = similarity[:, :k].contiguous(), rows[:, :k].contiguous()
    most = min(max(k + 1, LONGEST_TIE), len(bank))
    while count < most and shared.any():  # faiss keeps any of equal ones: search further, until the tie has an end
        count = min(4 * count, most)
        tied = shared.nonzero().squeeze(1)
        further, found = nearest(queries[tied], count)
        similarity[tied], rows[tied] = further[:, :k], found[:, :k]
        shared[tied] = further[:, -1] == further[:, k - 1]
    return similarity, rows


def _in_order(similarity: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """[Q, K] twice, sorted by similarity -> the same with equal similarities in the order of the rows."""
    tied = (similarity[:, 1:] == similarity[:, :-1]).any(dim=1).nonzero().squeeze(1)
    if len(tied):  # rare: sort these queries only, by row and then stably by similarity
        by_row = rows[tied].argsort(dim=1)
        order = by_row.gather(1, similarity[tied].gather(1, by_row).argsort(dim=1, descending=True, stable=True))
        similarity[tied], rows[tied] = similarity[tied].gather(1, order), rows[tied].gather(1, order)
    return similarity, rows


def search(
    bank: Labelled, x: Tensor, indices: Tensor, k: int, leave_one_out: bool, index: "faiss.Index | None"
) -> tuple[Tensor, Tensor]:
    """[Q, D] queries of unit length, the same on every process -> [Q, k] similarities, best first, and [Q, k] labels of
    the nearest images of all processes' banks, on every process.

    indices: [Q], of the queries. With `leave_one_out` a query does not find itself. index: an approximate one over
    bank.values; None: exact.
    """
    count = min(k + leave_one_out, len(bank))
    if not count:
        similarity, rows = torch.empty(len(x), 0), torch.empty(len(x), 0, dtype=torch.long)
    elif index is None:
        similarity, rows = neighbours(bank.values, x, count)
    else:
        similarity, rows = map(torch.from_numpy, index.search(np.ascontiguousarray(x.numpy()), count))
    missing = rows < 0  # an approximate search may find fewer
    labels, found = bank.labels[rows.clamp(min=0)], bank.indices[rows.clamp(min=0)]
    if leave_one_out:
        missing |= found == indices.unsqueeze(1)
    elif world_size() == 1 and index is None:
        return similarity, labels
    similarity = similarity.masked_fill(missing, -torch.inf)
    parts = gather_objects((similarity, found, labels))
    similarity, found, labels = (torch.cat([part[i] for part in parts], dim=1) for i in range(3))
    order = found.argsort(dim=1)
    order = order.gather(1, similarity.gather(1, order).argsort(dim=1, descending=True, stable=True))[:, :k]
    return similarity.gather(1, order), labels.gather(1, order)


def vote(similarity: Tensor, labels: Tensor, num_classes: int, k: int, temperature: float) -> Tensor:
    """[Q, >=k] similarities and neighbours' labels -> [Q, num_classes] float64 sums of exp(similarity / T) over k."""
    weights = ((similarity[:, :k].double() - similarity[:, :1].double()) / temperature).exp()  # 1 for the nearest
    weights = weights.nan_to_num(0.0)  # NaN where an approximate search found nothing
    return torch.zeros(len(similarity), num_classes, dtype=torch.float64).scatter_add_(1, labels[:, :k], weights)


def rank_of_label(votes: Tensor, labels: Tensor) -> Tensor:
    """[Q, C] votes, [Q] labels -> [Q] int64: how many classes come before the right one. Among classes with equal votes
    the smaller number comes first."""
    right = votes.gather(1, labels.unsqueeze(1))
    before = torch.arange(votes.shape[1]) < labels.unsqueeze(1)
    return (votes > right).sum(dim=1) + ((votes == right) & before).sum(dim=1)


def top_accuracy(ranks: Tensor, count: int) -> float:
    """Share of ranks below `count`, in percent."""
    return 100 * (ranks < count).double().mean().item()


def classify(
    bank: Labelled, queries: Labelled, num_classes: int, ks: Sequence[int] = KS,
    temperatures: Sequence[float] = (TEMPERATURE,), leave_one_out: bool = False, index: "faiss.Index | None" = None,
) -> dict[tuple[int, float], Prediction]:  # fmt: skip
    """{(k, T): predictions} for the queries of all processes, in the order of their indices, on every process.

    bank, queries: of this process. leave_one_out: the queries are the bank, and none finds itself. Classes without a
    vote rank by their numbers, as in the published code. Raises UserError for a k above the size of the bank.
    """
    _check(ks, sum(gather_objects(len(bank))) - leave_one_out)
    found: dict[tuple[int, float], list[Prediction]] = {(k, t): [] for k in ks for t in temperatures}
    order, block = [], max(1, QUERIES // world_size())
    for start in range(0, max(gather_objects(len(queries))), block):
        batch = queries[slice(start, start + block)]
        # clone: a view of a tensor would be sent with the whole tensor.
        parts = gather_objects([part.clone() for part in (batch.values, batch.labels, batch.indices)])
        x, labels, indices = (torch.cat([part[i] for part in parts]) for i in range(3))
        similarity, voters = search(bank, x, indices, max(ks), leave_one_out, index)
        for (k, temperature), predictions in found.items():
            votes = vote(similarity, voters, num_classes, k, temperature)
            predictions.append(Prediction(rank_of_label(votes, labels), votes.argmax(dim=1)))
        order.append(indices)
    in_order = torch.cat(order).argsort()
    return {
        key: Prediction(*(torch.cat(parts)[in_order] for parts in zip(*predictions, strict=True)))
        for key, predictions in found.items()
    }


def _approximate(config: Config, bank: Tensor) -> "faiss.IndexIVF":
    """An inverted file over this process's share, for `ivfpq` with product quantisation (faiss). Raises UserError."""
    import faiss

    cells, least, width = int(4 * len(bank) ** 0.5), min(gather_objects(len(bank))), bank.shape[1]
    if least < 40 * int(4 * least**0.5):
        raise UserError(
            f"index={config.index} needs more than the {least} images of a process: use index=exact, which is fast "
            "enough for them."
        )
    if config.index == "ivfpq" and width % 4:
        raise UserError(f"index=ivfpq needs features whose width is a multiple of 4, and these have {width}: use ivf.")
    quantiser = f"PQ{width // 4}" if config.index == "ivfpq" else "Flat"  # a byte for four numbers
    index = faiss.index_factory(width, f"IVF{cells},{quantiser}", faiss.METRIC_INNER_PRODUCT)
    sample = rng.permutation(rng.fold_in(config.seed, "cells"), len(bank))[: 64 * cells]
    assert isinstance(index, faiss.IndexIVF)
    index.train(np.ascontiguousarray(bank[sample].numpy()))
    for part in bank.split(65536):
        index.add(np.ascontiguousarray(part.numpy()))
    index.nprobe = min(config.probes, cells)
    return index


def _recall(bank: Labelled, queries: Labelled, k: int, index: "faiss.Index", leave_one_out: bool = False) -> float:
    """Share in percent of the exact k nearest images that an approximate search finds, on the first process's share.
    With `leave_one_out` a query is an image of the bank, and does not count."""

    def measure() -> float:
        x = queries.values[:RECALL_QUERIES]
        exact = neighbours(bank.values, x, min(k + leave_one_out, len(bank)))[1]
        found = torch.from_numpy(index.search(np.ascontiguousarray(x.numpy()), k + leave_one_out)[1])
        hits = (exact.unsqueeze(2) == found.unsqueeze(1)).any(dim=2)
        own = bank.indices[exact] == queries.indices[: len(x)].unsqueeze(1) if leave_one_out else torch.zeros_like(hits)
        return 100 * hits[~own].double().mean().item()

    return round(on_first_process(measure), 2)
