"""The confusion matrix, what it says of the classes, and its picture."""

import numpy as np
import pytest
import torch
from PIL import Image

from sslvit.evaluation import confusion, pictures


def test_the_matrix_counts_pairs_and_passes_over_images_without_a_label():
    labels = torch.tensor([0, 0, 1, 2, 2, 2, -1])
    predictions = torch.tensor([0, 1, 1, 0, 2, 2, 0])
    matrix = confusion.confusion(predictions, labels, 4)
    expected = torch.zeros(4, 4, dtype=torch.long)
    for p, t in zip(predictions.tolist(), labels.tolist(), strict=True):
        if t >= 0:
            expected[t, p] += 1
    assert torch.equal(matrix, expected)
    assert confusion.confusion(torch.zeros(0).long(), torch.zeros(0).long(), 3).sum() == 0


@pytest.mark.parametrize("classes", [4, 21])
def test_each_class_has_its_accuracy_and_few_classes_have_a_matrix(classes):
    names = ["ant", "bee", "cat", *map(str, range(3, classes))]
    labels = torch.tensor([0, 0, 0, 1, 1, 2, -1])
    found = confusion.summary(torch.tensor([0, 0, 1, 2, 2, 2, 0]), labels, names)
    assert found["by_class"] == {"ant": 66.67, "bee": 0.0, "cat": 100.0}
    assert found.get("confusion") == ([[2, 1, 0, 0], [0, 0, 2, 0], [0, 0, 1, 0], [0] * 4] if classes == 4 else None)


@pytest.mark.parametrize("num_classes", [2, 10, 20, 21, 100, 101, 1000])
def test_a_picture_of_any_number_of_classes_shows_the_diagonal_and_stays_small(num_classes, tmp_path):
    """All right but for one class, which is taken for the first: its cell is blue, its own is white."""
    matrix = 50 * torch.eye(num_classes, dtype=torch.long)
    matrix[-1, -1], matrix[-1, 0] = 0, 50
    names = [f"a class with a long name {c}" for c in range(num_classes)]
    confusion.picture(matrix, names, str(tmp_path / "matrix.png"))
    image = Image.open(tmp_path / "matrix.png").convert("RGB")
    assert max(image.size) < 2000
    pixels = np.asarray(image).astype(int)
    blue = (np.abs(pixels - (8, 48, 107)).max(axis=2) < 8).sum()
    cell = 52 if num_classes <= 20 else 15 if num_classes <= 100 else max(1, 1000 // num_classes)
    assert 0.7 * num_classes * cell**2 < blue < 1.1 * num_classes * cell**2 + 400
    frame = np.argwhere((pixels == confusion.FRAME).all(axis=2))
    top, left = frame.min(axis=0) + 1
    bottom, right = frame.max(axis=0) - 1
    assert (right - left + 1, bottom - top + 1) == (cell * num_classes, cell * num_classes)
    corner = max(1, cell // 8)
    assert (pixels[bottom - corner + 1, left] == (8, 48, 107)).all()
    assert (pixels[bottom, right] == 255).all()


def test_letters_that_a_font_lacks_are_drawn_by_another_or_as_their_codes(monkeypatch):
    def pixels(text: str) -> bytes:
        return bytes(pictures.font_for(text, 13).getmask(pictures.drawable(text)))

    words = ["Katze", "\u043a\u043e\u0448\u043a\u0430", "\u732b", "\u72d7"]
    assert len({pixels(word) for word in words}) == 4
    monkeypatch.setattr(pictures, "FONTS", ())
    pictures.fonts.cache_clear()
    assert [pictures.drawable(word) for word in words[:3:2]] == ["Katze", "\\u732b"]
    pictures.fonts.cache_clear()
