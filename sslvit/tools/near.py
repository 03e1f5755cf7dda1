"""Groups of vectors that are nearly the same: near duplicates of images."""

import numpy as np
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from ..progress import counting

TILE = 1024, 2**14  # vectors that are compared with one another at once
MOST_PAIRS = 2**22  # that are kept before they are merged into groups


def near_groups(vectors: Tensor, least: float) -> list[np.ndarray]:
    """[N, D] of unit length -> the groups of two rows and more, in the order of their first rows; rows ascend.

    A similarity of `least` links two rows (a millionth less will do, for rounding). Memory grows with N, not with the
    number of links.
    """
    first, pairs, waiting = np.arange(len(vectors)), list[np.ndarray](), 0
    with counting("comparing", len(vectors) ** 2 / 2, "pairs") as show:
        for start in range(0, len(vectors), TILE[0]):
            for other in range(start, len(vectors), TILE[1]):
                similar = vectors[start : start + TILE[0]] @ vectors[other : other + TILE[1]].T >= least - 1e-6
                pairs.append(similar.nonzero().numpy() + (start, other))
                waiting += len(pairs[-1])
                if waiting > MOST_PAIRS:
                    first, pairs, waiting = _merged(first, pairs), [], 0
            show((len(vectors) ** 2 - max(0, len(vectors) - start - TILE[0]) ** 2) / 2)
    first = _merged(first, pairs)
    order = np.argsort(first, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(first[order])) + 1)
    return [rows for rows in groups if len(rows) > 1]


def _merged(first: np.ndarray, pairs: list[np.ndarray]) -> np.ndarray:
    """[N] int64, the first row of the group of each: groups are joined where a pair of rows links them."""
    rows = np.concatenate([np.stack([np.arange(len(first)), first], axis=1), *pairs])
    links = csr_matrix((np.ones(len(rows), bool), (rows[:, 0], rows[:, 1])), shape=(len(first), len(first)))
    group = connected_components(links, directed=False)[1]
    return np.unique(group, return_index=True)[1][group]
