"""Hot paths of the evaluation beside the textbook's, in one run: k-NN, a sweep of linear heads, memory of a large bank.

    python -m tests.benchmarks.evaluation

k-NN: 50,000 x 10,000 features of width 384, k = 10, 20, 100, 200, three temperatures, against a loop as the published
one: for each k and temperature it multiplies, sorts and votes again. Linear: 50 heads of ten classes at once against
one after another, by our own code and by torch's nn.Linear and SGD. Memory: the peak of a process that searches a bank
of 1,000,000 x 384. Rounds alternate; ratios are medians over rounds.
"""

import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslvit.evaluation import knn, linear

BANK, QUERIES, WIDTH, CLASSES = 50_000, 10_000, 384, 10
KS, TEMPERATURES = (10, 20, 100, 200), (0.04, 0.07, 0.2)
ROUNDS = 3


def clustered(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """[N, 384] features of unit length around ten overlapping centres, and the number of the centre."""
    centres = torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES, (count,), generator=generator)
    return F.normalize(0.1 * centres[labels] + torch.randn(count, WIDTH, generator=generator), dim=1), labels


def textbook_knn(bank: Tensor, labels: Tensor, queries: Tensor, wanted: Tensor, k: int, temperature: float) -> float:
    """Top-1 in percent: chunks of a hundredth of the queries, a search of its own for each k (Caron et al., 4.1)."""
    hits = 0
    for x, right in zip(queries.chunk(100), wanted.chunk(100), strict=True):
        similarity, rows = (x @ bank.t()).topk(k, largest=True, sorted=True)
        votes = F.one_hot(labels[rows], CLASSES) * (similarity / temperature).exp().unsqueeze(2)
        hits += int((votes.sum(dim=1).argmax(dim=1) == right).sum())
    return 100 * hits / len(queries)


def seconds(work: Callable[[], object]) -> tuple[float, object]:
    start = time.perf_counter()
    found = work()
    return time.perf_counter() - start, found


def compare_knn() -> None:
    (bank, labels), (queries, wanted) = clustered(BANK, 1), clustered(QUERIES, 2)
    ours = (knn.Labelled(bank, labels, torch.arange(BANK)), knn.Labelled(queries, wanted, torch.arange(QUERIES)))
    times: dict[str, list[float]] = {"ours": [], "one temperature": [], "three temperatures": []}
    for _ in range(ROUNDS):
        spent, found = seconds(lambda: knn.classify(*ours, CLASSES, KS, TEMPERATURES))
        times["ours"].append(spent)
        total, theirs = 0.0, {}
        for temperature in TEMPERATURES:
            for k in KS:
                spent, theirs[k, temperature] = seconds(
                    lambda k=k, t=temperature: textbook_knn(bank, labels, queries, wanted, k, t)
                )
                total += spent
            if temperature == TEMPERATURES[0]:
                times["one temperature"].append(total)
        times["three temperatures"].append(total)
        off = max(abs(knn.top_accuracy(prediction.rank, 1) - theirs[key]) for key, prediction in found.items())
        if off > 0.05:  # equal similarities and rounding may move a handful of 10,000
            sys.exit(f"the accuracies differ by {off:.2f} points")
    mine = statistics.median(times["ours"])
    print(f"k-NN, {BANK} x {QUERIES} x {WIDTH}, k = {KS}, T = {TEMPERATURES}: {mine:.2f} s")
    for name in ("one temperature", "three temperatures"):
        ratio = statistics.median(b / a for a, b in zip(times["ours"], times[name], strict=True))
        print(f"  textbook, four k, {name}: {statistics.median(times[name]):.2f} s, {ratio:.1f} times ours")


def textbook_head(x: Tensor, labels: Tensor, lr: float, epochs: int) -> nn.Linear:
    """One linear classifier by torch's own optimizer, a batch of 1024 at a time."""
    head = nn.Linear(WIDTH, CLASSES)
    optimizer = torch.optim.SGD(head.parameters(), lr=lr, momentum=0.9)
    steps = epochs * (len(x) // 1024)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        order = torch.randperm(len(x))
        for rows in order.split(1024)[: len(x) // 1024]:
            optimizer.zero_grad()
            F.cross_entropy(head(x[rows]), labels[rows]).backward()
            optimizer.step()
            schedule.step()
    return head


def compare_heads(heads: int = 50, epochs: int = 4) -> None:
    x, labels = clustered(BANK, 1)
    rates = torch.logspace(-4, 0, heads).tolist()
    times: dict[str, list[float]] = {"at once": [], "one at a time": [], "nn.Linear": []}
    for _ in range(ROUNDS):
        times["at once"].append(
            seconds(lambda: linear.train_heads(x, labels, CLASSES, rates, epochs, 0.0, 1024, seed=0))[0]
        )
        times["one at a time"].append(
            seconds(lambda: [linear.train_heads(x, labels, CLASSES, [r], epochs, 0.0, 1024, seed=0) for r in rates])[0]
        )
        times["nn.Linear"].append(seconds(lambda: [textbook_head(x, labels, rate, epochs) for rate in rates])[0])
    print(f"linear, {heads} heads, {epochs} epochs of {BANK} x {WIDTH}: {statistics.median(times['at once']):.2f} s")
    for name in ("one at a time", "nn.Linear"):
        ratio = statistics.median(b / a for a, b in zip(times["at once"], times[name], strict=True))
        print(f"  {name}: {statistics.median(times[name]):.2f} s, {ratio:.1f} times that")


def large_bank() -> None:
    """In a process of its own: a million rows, 2,000 queries."""
    bank = torch.empty(1_000_000, WIDTH)
    for rows in bank.split(65536):
        rows.normal_()
        F.normalize(rows, dim=1, out=rows)
    labels = torch.arange(len(bank)) % CLASSES
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    stored = knn.Labelled(bank, labels, torch.arange(len(bank)))
    queries = knn.Labelled(bank[:2000].clone(), labels[:2000], torch.arange(2000))
    spent, found = seconds(lambda: knn.classify(stored, queries, CLASSES, (1, 20, 200)))
    assert knn.top_accuracy(found[1, knn.TEMPERATURE].rank, 1) == 100  # each finds itself
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(
        f"k-NN, 1,000,000 x 2,000 x {WIDTH}: {spent:.1f} s; peak of the process {peak / 2**20:.2f} GiB, "
        f"{before / 2**20:.2f} GiB before the search"
    )


def main() -> None:
    if sys.argv[1:] == ["--large-bank"]:
        large_bank()
        return
    print(f"{torch.get_num_threads()} threads")
    compare_knn()
    compare_heads()
    subprocess.run([sys.executable, "-m", "tests.benchmarks.evaluation", "--large-bank"], check=True)


if __name__ == "__main__":
    main()
