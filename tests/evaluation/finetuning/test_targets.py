"""What the images of fine-tuning are, of both sets by the names of the training set."""

from types import SimpleNamespace

import pytest

from sslvit.errors import UserError
from sslvit.evaluation.finetuning import targets


def table(texts: list[str], columns: list[str]) -> SimpleNamespace:
    """What a table says of its images, of which nothing is read."""
    return SimpleNamespace(texts=texts, columns=columns, name=str)


def test_labels_of_both_sets_are_matched_by_name(capsys):
    """Test images may lack a label of the training images, and may have none of their own."""
    train, test = table(["a|c", "b|c"], ["label"]), table(["c|a", "c"], ["label"])
    found = targets.read_targets("multilabel", (train, test), ("train", "test"))
    assert found.names == ["a", "b", "c"]
    assert found.train.tolist() == [[1, 0, 1], [0, 1, 1]]
    assert found.test.tolist() == [[1, 0, 1], [0, 0, 1]]
    assert "No image of test has b." in capsys.readouterr().out
    with pytest.raises(UserError, match="b is only in train"):
        targets.read_targets("multilabel", (test, train), ("test", "train"))


def test_numbers_of_both_sets_must_be_the_same():
    train, test = table(["1\t2", "3\t4"], ["a", "b"]), table(["5", "6"], ["a"])
    with pytest.raises(UserError, match="b is only in train"):
        targets.read_targets("regression", (train, test), ("train", "test"))
    turned = targets.read_targets("regression", (train, table(["6\t5"], ["b", "a"])), ("train", "test"))
    assert turned.test.tolist() == [[5, 6]]
