"""Each measure against a case whose right number is known, on inputs where a mistake moves it."""

import math

import pytest
import torch

from sslvit.evaluation.attention import rollout
from sslvit.evaluation.knn import TEMPERATURE, Labelled, classify, top_accuracy
from sslvit.inspection import measures


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def cka(first, second, size=64):
    found = measures.Cka()
    for a, b in zip(first.split(size), second.split(size), strict=True):
        found.add([a], [b])
    return found.value().item()


def test_cka_of_a_rotated_scaled_and_shifted_copy_is_1():
    x = normal(150, 20) * torch.linspace(1, 5, 20)
    turned = 7 * x @ torch.linalg.qr(normal(20, 20, seed=1))[0] + 300
    assert cka(x, turned) == pytest.approx(1, abs=1e-4)
    assert cka(x, x * torch.linspace(1, 30, 20)) < 0.95, "a stretched copy is another thing"


def test_cka_of_unrelated_features_is_0_for_any_width():
    """The usual estimate is D / (D + n): 0.75 here."""
    assert abs(cka(normal(640, 192), normal(640, 192, seed=1))) < 0.03


def test_cka_has_the_value_of_large_samples():
    """x beside as much noise: D / sqrt(D 2D)."""
    x = normal(1280, 24)
    assert cka(x, torch.cat([x, normal(1280, 24, seed=1)], dim=1)) == pytest.approx(0.5**0.5, abs=0.02)


def test_cka_equals_the_slow_unbiased_estimate():
    x, y = normal(9, 3).double(), normal(9, 4, seed=1).double() + normal(9, 3)[:, :1].double()
    n = range(9)

    def hsic(a, b):
        k, m = ([[0.0 if i == j else float(v[i] @ v[j]) for j in n] for i in n] for v in (a, b))
        trace = sum(k[i][j] * m[j][i] for i in n for j in n)
        totals = sum(map(sum, k)) * sum(map(sum, m))
        through = sum(k[i][j] * m[j][q] for i in n for j in n for q in n)
        return (trace + totals / (8 * 7) - 2 / 7 * through) / (9 * 6)

    expected = hsic(x, y) / math.sqrt(hsic(x, x) * hsic(y, y))
    assert cka(x, y) == pytest.approx(expected, abs=1e-9)


def test_cka_compares_every_block_with_every_block():
    x, y = normal(64, 10), normal(64, 12, seed=1)
    found = measures.Cka()
    found.add([x, y], [y, x, torch.ones(64, 3)])
    value = found.value()
    assert value.shape == (2, 3)
    assert [value[0, 1].item(), value[1, 0].item()] == pytest.approx([1, 1])
    assert abs(value[0, 0]) < 0.3
    assert value[:, 2].isnan().all(), "features that are all the same are similar to nothing"


def test_singular_values_and_rank_are_those_of_all_images_minus_their_mean():
    whole = normal(101, 8) * torch.tensor([9.0, 5, 3, 1, 1, 0.1, 0.01, 0.001]) + 500
    found = measures.Spectrum()
    for part in whole.split(17):
        found.add(part)
    centred = whole.double() - whole.double().mean(dim=0)
    assert torch.allclose(found.values(), torch.linalg.svdvals(centred), rtol=1e-4)


def test_the_rank_of_three_equal_directions_is_3():
    directions = torch.linalg.qr(normal(20, 3))[0].t()
    found = measures.Spectrum()
    for sign in (1, -1):  # the mean is another direction, which does not count
        found.add(sign * 4 * directions + 50)
    assert found.rank() == pytest.approx(3, abs=1e-3)
    assert len(found.values()) == 5, "six images minus their mean"


def test_artefacts_are_tokens_above_three_times_the_median():
    found = measures.Norms()
    found.add(torch.cat([torch.full((480,), 10.0), torch.full((490,), 20.0), torch.full((20,), 58.0)]))
    found.add(torch.full((2, 5), 62.0))
    assert found.quantile(0.05) == pytest.approx(10, rel=0.01)
    assert found.quantile(0.5) == pytest.approx(20, rel=0.01)
    assert found.largest == 62
    assert found.artefacts() == pytest.approx(0.01)
    found.add(torch.tensor([0.0, 1e12]))  # what has no bin is in the first or in the last
    assert found.counts.sum() == 1002


def test_knn_is_that_of_the_evaluation():
    labels = torch.arange(90) % 3
    x = normal(90, 6) + 1.2 * torch.eye(6)[labels]
    x[60:70] = x[60]  # equal ones, among which an image must not find itself
    bank = Labelled(torch.nn.functional.normalize(x, dim=1), labels, torch.arange(90))
    votes = classify(bank, bank, 3, (measures.K,), (TEMPERATURE,), leave_one_out=True)
    expected = top_accuracy(votes[measures.K, TEMPERATURE].rank, 1)
    assert 50 < expected < 95
    assert measures.knn(5 * x, labels, 3) == expected


def test_distances_and_even_attention():
    assert measures.even_distance((1, 2)) == 0.5
    assert measures.even_distance((2, 2)) == pytest.approx((0 + 1 + 1 + 2**0.5) / 4)
    assert measures.distances((2, 3))[0].tolist() == pytest.approx([0, 1, 2, 1, 2**0.5, 5**0.5])


def test_neighbours_are_a_patch_apart_and_far_ones_half_the_image():
    near, far = measures.near_and_far(-measures.distances((2, 4)), (2, 4))
    assert near == -1
    # Ordered pairs of patches that lie two or three columns apart, in the same row and in the other one.
    assert far == pytest.approx(-(8 * 2 + 8 * 5**0.5 + 4 * 3 + 4 * 10**0.5) / 24)


def test_filters_have_the_components_that_they_were_made_of():
    patterns = torch.linalg.qr(normal(12, 2))[0].t()
    x = normal(200, 2)
    x = torch.linalg.qr(x - x.mean(dim=0))[0] * torch.tensor([3.0, 1.0])
    weight = (x @ patterns + 4).view(200, 3, 2, 2)  # all filters have this mean, which is no difference
    components, shares = measures.filter_components(weight)
    assert shares[:2].tolist() == pytest.approx([0.9, 0.1], abs=1e-6)
    assert (components.flatten(1)[:2] * patterns).sum(dim=1).abs().tolist() == pytest.approx([1, 1], abs=1e-5)
    assert (components.flatten(1).amax(dim=1) > -components.flatten(1).amin(dim=1)).all(), "the largest is positive"
    assert [measures.count_for(shares, share) for share in (0.5, 0.89, 0.91, 1.0)] == [1, 1, 2, 2]


def test_cosines_ignore_the_length_of_positions():
    table = torch.tensor([[1.0, 0], [5, 0], [3, 3], [-2, 0]])
    expected = [[1, 1, 0.5**0.5, -1], [1, 1, 0.5**0.5, -1], [0.5**0.5, 0.5**0.5, 1, -(0.5**0.5)]]
    assert torch.allclose(measures.cosines(table)[:3], torch.tensor(expected, dtype=torch.float64), atol=1e-6)


def test_rollout_of_attention_to_itself_leaves_each_patch_where_it_is():
    assert torch.equal(rollout([torch.eye(5).unsqueeze(0)] * 4)[0], torch.eye(5))
    one = torch.zeros(1, 3, 3)
    one[0, :, 2] = 1  # all look at the last token: after two blocks a quarter of each token is its own
    assert rollout([one, one])[0].tolist() == [[0.25, 0, 0.75], [0, 0.25, 0.75], [0, 0, 1]]
