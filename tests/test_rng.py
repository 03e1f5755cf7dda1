import pytest
import torch

from sslvit import rng


def test_bits_are_splitmix64s():
    """The first outputs for seed 1234567 that implementations of SplitMix64 are checked against."""
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    ours = rng.bits(torch.tensor(1234567), 5)
    assert [value % 2**64 for value in ours.tolist()] == expected


def test_a_place_has_one_key_and_other_places_have_others():
    keys = {int(rng.fold_in(0, *place)) for place in [(), (0,), (1,), (0, 0), (0, 1), (1, 0), ("a",), ("b",), ("a", 0)]}
    assert len(keys) == 9
    assert rng.fold_in(3, "crops", 5) == rng.fold_in(3, "crops", 5)
    assert rng.fold_in(3, "crops", 5) != rng.fold_in(4, "crops", 5)


def test_keys_of_many_places_equal_those_of_each():
    index = torch.tensor([5, 0, 2**40])
    together = rng.fold_in(rng.fold_in(7, "image", 2), index)
    assert together.tolist() == [int(rng.fold_in(7, "image", 2, i)) for i in index.tolist()]


def test_large_and_negative_seeds_are_seeds():
    assert rng.fold_in(2**64 - 1, "x") == rng.fold_in(-1, "x")
    assert rng.fold_in(-1, "x") != rng.fold_in(1, "x")


def test_uniform_is_uniform_and_uncorrelated_between_neighbours():
    u = rng.uniform(rng.fold_in(0, torch.arange(2000)), 100).double()
    assert 0 <= u.min() < 1e-4
    assert 1 - 1e-4 < u.max() < 1
    counts = torch.histc(u.float(), 100, 0, 1)
    chi_square = ((counts - 2000) ** 2 / 2000).sum()
    assert 50 < chi_square < 160  # 99 degrees of freedom: 0.0001 % and 99.99 %
    z = (u - 0.5) * 12**0.5
    for a, b in [(z[:, :-1], z[:, 1:]), (z[:-1], z[1:])]:  # along a stream, and between streams of neighbouring places
        assert abs((a * b).mean()) < 4 / a.numel() ** 0.5


def test_permutation_is_a_permutation_that_depends_on_the_key():
    one, other = rng.permutation(rng.fold_in(0, 1), 1000), rng.permutation(rng.fold_in(0, 2), 1000)
    assert torch.equal(one.sort().values, torch.arange(1000))
    assert (one == other).sum() < 10
    assert (one == torch.arange(1000)).sum() < 10


@pytest.mark.parametrize("n", [1, 2, 3, 37, 64, 65, 1000, 4097])
def test_an_order_that_is_not_written_down_holds_everything_once(n):
    key = rng.fold_in(0, "order", n)
    order = rng.shuffled(key, n, torch.arange(n))
    assert order.sort().values.tolist() == list(range(n))
    assert torch.equal(rng.shuffled(key, n, torch.arange(n).flip(0)), order.flip(0))  # each place by itself


def test_an_order_that_is_not_written_down_is_random():
    """1,000 orders of 100,000: in which tenth the first eleven numbers lie, and in which the next one then does."""
    n, places = 100_000, torch.arange(11)
    tenths = torch.stack([rng.shuffled(rng.fold_in(5, i), n, places) for i in range(1000)]) * 10 // n
    at = torch.stack([(tenths == value).sum(dim=0) for value in range(10)])
    assert ((at - 100).square() / 100).sum() < 99 + 5 * (2 * 99) ** 0.5  # chi-square, five deviations
    pairs = (tenths[:, :-1] * 10 + tenths[:, 1:]).flatten().bincount(minlength=100)
    assert ((pairs - 100).square() / 100).sum() < 99 + 5 * (2 * 99) ** 0.5


def test_a_billion_images_have_an_order_at_once():
    order = rng.shuffled(rng.fold_in(0, "order"), 10**9, torch.arange(10**9 - 4096, 10**9))
    assert 0 <= order.min() < 10**8
    assert 9 * 10**8 < order.max() < 10**9
    assert len(order.unique()) == 4096
