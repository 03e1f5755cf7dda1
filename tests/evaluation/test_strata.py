"""A part of the images holds its share of each class, and hangs on the seed only."""

import pytest
import torch

from sslvit import rng
from sslvit.errors import UserError
from sslvit.evaluation.strata import hold_out, stratified


def shuffled(counts: list[int]) -> torch.Tensor:
    """Labels with so many images of each class, in no order."""
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    return labels[rng.permutation(rng.fold_in(9), len(labels))]


def test_a_share_of_the_labels_is_the_same_of_each_class_and_part_of_a_larger_one():
    labels = shuffled([100, 50, 3])
    rows = {share: stratified(labels, share, rng.fold_in(0, "x")) for share in (0.01, 0.1, 1.0)}
    assert torch.equal(rows[0.1], stratified(labels, 0.1, rng.fold_in(0, "x")))
    assert labels[rows[0.1]].bincount().tolist() == [10, 5, 1]
    assert labels[rows[0.01]].bincount().tolist() == [1, 1, 1]
    assert set(rows[0.01].tolist()) <= set(rows[0.1].tolist())
    assert rows[1.0].tolist() == list(range(153))
    assert rows[0.1].tolist() != stratified(labels, 0.1, rng.fold_in(1, "x")).tolist()


def test_the_rows_of_a_class_are_the_first_of_it_in_one_random_order():
    labels, key = shuffled([40, 0, 7, 1]), rng.fold_in(3, "y")
    order = rng.permutation(key, len(labels))
    first = [order[labels[order] == c][:count] for c, count in ((0, 12), (2, 2), (3, 1))]
    assert torch.equal(stratified(labels, 0.3, key), torch.cat(first).sort().values)


@pytest.mark.parametrize(
    ("share", "counts", "expected"),
    [
        (0.1, [100, 50, 20], [10, 5, 2]),
        (0.1, [100, 4, 2, 1], [10, 1, 1, 0]),  # one of few, and none of a class of one image
        (0.001, [12, 12], [1, 1]),
        (0.99, [12, 2, 1], [11, 1, 0]),  # and never all of them
    ],
)
def test_of_each_class_its_share_is_held_out_and_something_left_to_learn(share, counts, expected):
    labels = shuffled(counts)
    chosen = hold_out(labels, share, seed=0)
    assert labels[chosen].bincount(minlength=len(counts)).tolist() == expected
    assert torch.equal(chosen, hold_out(labels, share, seed=0))


def test_another_seed_holds_out_others_and_every_image_has_its_turn():
    labels = shuffled([100, 100])
    assert not torch.equal(hold_out(labels, 0.3, seed=0), hold_out(labels, 0.3, seed=1))
    drawn = sum(hold_out(labels, 0.3, seed).double() for seed in range(300)) / 300
    assert drawn.mean().item() == pytest.approx(0.3)
    assert (drawn - 0.3).abs().max() < 0.15  # every image now and then: five deviations of 300 draws


def test_without_classes_a_part_of_all_is_held_out():
    targets = torch.rand(50, 3)
    assert hold_out(targets, 0.2, seed=0).sum() == 10


def test_where_no_class_has_two_images_a_sentence_says_so():
    with pytest.raises(UserError, match="no class has two of the 5 training images"):
        hold_out(torch.arange(5), 0.1, seed=0)
