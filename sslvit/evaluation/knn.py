"""Weighted k-NN classification of frozen features, exact, by faiss: all k and temperatures from one search.

Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", CVPR 2018, section 3.4; the
settings are DINO's (section 4.1): features of unit length, cosine similarity, a neighbour votes with exp(similarity /
T).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import faiss
import numpy as np
import torch
from torch import Tensor

from ..distributed import on_first_process, say
from ..errors import UserError
from . import protocol
from .features import Features

KS = (10, 20, 100, 200)
TEMPERATURE = 0.07


@dataclass
class Config(protocol.Config):
    k: tuple[int, ...] = KS  # numbers of neighbours; of the default ones those that the training set has
    temperature: tuple[float, ...] = (TEMPERATURE,)  # a neighbour votes with exp(similarity / temperature)


def run(config: Config) -> list[dict[str, float]]:
    """Features, search, votes; prints a table and writes <run>/eval/knn.json. Raises UserError."""
    if not config.k or min(config.k) < 1 or not config.temperature or min(config.temperature) <= 0:
        raise UserError(
            f"k={list(config.k)} and temperature={list(config.temperature)} must be lists of numbers above 0."
        )
    task = protocol.prepare(config, "knn")
    ks, labelled = tuple(config.k), int((task.train_labels >= 0).sum())
    if ks == KS and labelled < max(KS):  # nobody asked for these: those that fit will do
        ks = tuple(k for k in KS if k <= labelled) or (labelled,)
        say(f"k = {', '.join(map(str, ks))} only: there are {labelled} labelled training images.")
    accuracies = classify_labelled(
        task.train, task.train_labels, task.test, task.test_labels, len(task.classes), ks, config.temperature
    )
    judged = int((task.test_labels >= 0).sum())
    results = [
        {
            "k": k, "temperature": temperature, "top1": round(top1, 4), "top5": round(top5, 4),
            "top1_interval": protocol.interval(top1, judged, config.seed),
        }
        for (k, temperature), (top1, top5) in accuracies.items()
    ]  # fmt: skip
    rows = [
        [str(r["k"]), f"{r['temperature']:g}", f"{r['top1']:.2f}", "{:.1f} - {:.1f}".format(*r["top1_interval"]),
         f"{r['top5']:.2f}"]
        for r in results
    ]  # fmt: skip
    say(*protocol.table(["k", "T", "top-1 %", "95 % interval", "top-5 %"], rows))
    protocol.write(config, task, "knn", results)
    return results


def classify_labelled(
    train: Features, train_labels: Tensor, test: Features, test_labels: Tensor, num_classes: int,
    ks: Sequence[int], temperatures: Sequence[float],
) -> dict[tuple[int, float], tuple[float, float]]:  # fmt: skip
    """`classify` for the images that have a label, by the first process with all of the machine's cores; the same
    answer on every process. Raises UserError."""
    known, asked = train_labels >= 0, test_labels >= 0
    bank, queries = train.normalized()[known], test.normalized()[asked]
    return on_first_process(
        lambda: classify(bank, train_labels[known], queries, test_labels[asked], num_classes, ks, temperatures)
    )


def neighbours(bank: Tensor, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """[N, D], [Q, D] float32 of unit length -> [Q, k] similarities, best first, and [Q, k] int64 rows of the bank."""
    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatIP(bank.shape[1])
    index.add(np.ascontiguousarray(bank.numpy()))
    similarity, rows = index.search(np.ascontiguousarray(queries.numpy()), k)
    return torch.from_numpy(similarity), torch.from_numpy(rows)


def vote(similarity: Tensor, labels: Tensor, num_classes: int, k: int, temperature: float) -> Tensor:
    """[Q, >=k] similarities and neighbours' labels -> [Q, num_classes] float64 sums of exp(similarity / T) over k."""
    weights = ((similarity[:, :k].double() - similarity[:, :1].double()) / temperature).exp()  # 1 for the nearest
    return torch.zeros(len(similarity), num_classes, dtype=torch.float64).scatter_add_(1, labels[:, :k], weights)


def classify(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    num_classes: int,
    ks: Sequence[int] = KS,
    temperatures: Sequence[float] = (TEMPERATURE,),
) -> dict[tuple[int, float], tuple[float, float]]:
    """Features of unit length and labels -> {(k, T): (top-1, top-5)} in percent.

    As in the published code, top-5 is top-k for k below 5, and classes without a vote count in their order. Raises
    UserError for a k above the size of the bank.
    """
    if max(ks) > len(bank):
        raise UserError(
            f"k={max(ks)} is larger than the {len(bank)} labelled training images: use a k of at most that."
        )
    similarity, rows = neighbours(bank, queries, max(ks))
    labels = bank_labels[rows]
    results = {}
    for k in ks:
        for temperature in temperatures:
            votes = vote(similarity, labels, num_classes, k, temperature)
            ranked = votes.argsort(dim=1, descending=True, stable=True)  # of equal votes, the smaller class number
            correct = (ranked == query_labels.unsqueeze(1)).double()
            results[k, temperature] = (
                100 * correct[:, 0].mean().item(),
                100 * correct[:, : min(5, k)].sum(dim=1).mean().item(),
            )
    return results
