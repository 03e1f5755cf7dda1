"""The measures: functions of weights and features, and sums over batches whose memory does not grow with the images."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..evaluation.knn import TEMPERATURE, neighbours, rank_of_label, top_accuracy, vote
from ..evaluation.quality import effective_rank

OUTLIER = 3.0  # a token is an artefact if its norm is above so many times the median norm of its block
K = 20  # neighbours that vote
LOWEST, HIGHEST, BINS = -4.0, 8.0, 3000  # of norms: powers of ten; a bin is 0.9 % wide


def filter_components(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[D, C, p, q], a patch embedding -> the directions [K, C, p, q] in which its filters differ most, of unit length
    with the largest entry positive, and their shares [K] of the variance, largest first."""
    x = weight.detach().cpu().double().flatten(1)
    x = x - x.mean(dim=0)
    _, values, directions = torch.linalg.svd(x, full_matrices=False)
    largest = directions.gather(1, directions.abs().argmax(dim=1, keepdim=True))
    shares = values.square() / values.square().sum().clamp(min=1e-30)
    return (directions * largest.sign()).unflatten(1, weight.shape[1:]).float(), shares


def count_for(shares: Tensor, wanted: float) -> int:
    """[K] shares, largest first -> how many of them have `wanted` together."""
    return int((shares.cumsum(dim=0) < wanted - 1e-9).sum()) + 1


def cosines(positions: Tensor) -> Tensor:
    """[N, D] -> [N, N]."""
    unit = F.normalize(positions.detach().cpu().double(), dim=1)
    return unit @ unit.t()


def distances(grid: tuple[int, int]) -> Tensor:
    """[N, N], between the centres of patches, in patches."""
    place = torch.cartesian_prod(torch.arange(grid[0]), torch.arange(grid[1])).double().view(-1, 2)
    return (place.unsqueeze(0) - place.unsqueeze(1)).square().sum(dim=-1).sqrt()


def near_and_far(similarity: Tensor, grid: tuple[int, int]) -> tuple[float, float]:
    """[N, N] -> its mean over neighbours in a row or column, and over patches at least half the longer side apart."""
    apart = distances(grid)
    return similarity[apart == 1].mean().item(), similarity[apart >= max(grid) / 2].mean().item()


def even_distance(grid: tuple[int, int]) -> float:
    """Mean attention distance if all patches get the same attention."""
    return distances(grid).mean().item()


class Cka:
    """Linear centered kernel alignment between each of R and each of S features of the same images: 0 for unrelated
    ones, 1 if one is the other rotated and scaled.

    Kornblith et al., ICML 2019 (arXiv 1905.00414), from sums over batches of an unbiased estimate of HSIC: Nguyen et
    al., ICLR 2021 (arXiv 2010.15327), appendix A. The usual estimate would rise with the width: to 0.75 for unrelated
    features of 768 numbers and 256 images.
    """

    def __init__(self) -> None:
        self.across = self.first = self.second = torch.zeros(())

    def add(self, first: list[Tensor], second: list[Tensor]) -> None:
        """[n, D] each, of the same images; less than four images say nothing."""
        if len(first[0]) < 4:
            return
        k, m = _grams(first), _grams(second)
        self.across = self.across + _hsic(k, m)
        self.first = self.first + _hsic(k, k).diagonal()
        self.second = self.second + _hsic(m, m).diagonal()

    def value(self) -> Tensor:
        """[R, S] float64; NaN for features that are the same for all images."""
        return self.across / (self.first.unsqueeze(1) * self.second).clamp(min=0).sqrt()


def _grams(features: list[Tensor]) -> Tensor:
    """[R, n, n] float64, without the diagonals, of features that are centred: or rounding would decide."""
    grams = []
    for x in features:
        x = x.double()
        x = x - x.mean(dim=0)
        grams.append((x @ x.t()).fill_diagonal_(0))
    return torch.stack(grams)


def _hsic(k: Tensor, m: Tensor) -> Tensor:
    """[R, n, n], [S, n, n] -> [R, S], n (n - 3) times the unbiased estimate (Song et al., JMLR 2012, equation 5)."""
    n = k.shape[-1]
    rows, columns = k.sum(dim=2), m.sum(dim=2)
    products = k.flatten(1) @ m.flatten(1).t()
    totals = rows.sum(dim=1).outer(columns.sum(dim=1))
    return products + totals / ((n - 1) * (n - 2)) - 2 / (n - 2) * rows @ columns.t()


class Spectrum:
    """Singular values of features minus their mean, from sums."""

    def __init__(self) -> None:
        self.count, self.total, self.products = 0, torch.zeros(()), torch.zeros(())
        self.origin: Tensor | None = None  # near the mean, or rounding would eat small singular values

    def add(self, x: Tensor) -> None:
        """[n, D]."""
        x = x.double()
        if self.origin is None:
            self.origin = x.mean(dim=0)
        x = x - self.origin
        self.count += len(x)
        self.total, self.products = self.total + x.sum(dim=0), self.products + x.t() @ x

    def values(self) -> Tensor:
        """[min(D, n - 1)] float64, largest first."""
        mean = self.total / self.count
        scatter = self.products - self.count * mean.outer(mean)
        found = torch.linalg.eigvalsh(scatter).flip(0).clamp(min=0)
        return found[: max(1, min(len(found), self.count - 1))].sqrt()

    def rank(self) -> float:
        """Effective rank, as `quality.effective_rank`, but of centred features."""
        return effective_rank(self.values())


class Norms:
    """The distribution of norms of tokens, as a histogram of their logarithms."""

    def __init__(self) -> None:
        self.counts, self.largest = torch.zeros(BINS, dtype=torch.int64), 0.0

    def add(self, norms: Tensor) -> None:
        """Of any shape, not negative."""
        norms = norms.detach().flatten().double().cpu()
        self.largest = max(self.largest, norms.max().item())
        place = (norms.clamp(min=10**LOWEST).log10() - LOWEST) / (HIGHEST - LOWEST) * BINS
        self.counts += place.long().clamp(0, BINS - 1).bincount(minlength=BINS)

    def quantile(self, share: float) -> float:
        """The middle of the bin in which so many of the norms are reached."""
        place = int((self.counts.cumsum(0) < share * self.counts.sum()).sum())
        return 10 ** (LOWEST + (place + 0.5) / BINS * (HIGHEST - LOWEST))

    def above(self, limit: float) -> float:
        """Share of the norms above a limit."""
        first = int((torch.tensor(limit).log10() - LOWEST) / (HIGHEST - LOWEST) * BINS) + 1
        return (self.counts[first:].sum() / self.counts.sum()).item()

    def artefacts(self) -> float:
        """Share of the tokens whose norm is above OUTLIER times the median."""
        return self.above(OUTLIER * self.quantile(0.5))


def knn(features: Tensor, labels: Tensor, classes: int) -> float:
    """[N, D], [N] -> accuracy in percent if each image is classified by all the others, as `sslvit knn` does it."""
    unit = F.normalize(features, dim=1)
    similarity, rows = neighbours(unit, unit, K + 1)
    own = rows == torch.arange(len(rows)).unsqueeze(1)
    rest = own.int().argsort(dim=1, stable=True)[:, :K]  # of many equal ones the image itself may be missing
    votes = vote(similarity.gather(1, rest), labels[rows.gather(1, rest)], classes, K, TEMPERATURE)
    return top_accuracy(rank_of_label(votes, labels), 1)
