"""The confusion matrix, the accuracy of each class, and a picture."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from . import pictures

NUMBERED = 20  # classes up to which the cells hold numbers
NAMED = 100  # classes up to which the sides hold names
SIDE = 1000  # pixels of a heat map of more classes
FRAME = (110, 120, 140)


def confusion(predictions: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """[N], [N] int64 -> [C, C] int64: how many images of a class (row) were predicted as a class (column). Images whose
    label is below 0 are not counted."""
    counted = labels >= 0
    pairs = labels[counted] * num_classes + predictions[counted]
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)


def summary(predictions: Tensor, labels: Tensor, names: Sequence[str]) -> dict[str, Any]:
    """[N], [N] int64 -> what a record holds: the accuracy in percent of each class that has images, and up to 20
    classes the matrix. Images whose label is below 0 are not counted."""
    images = torch.bincount(labels[labels >= 0], minlength=len(names)).tolist()
    right = torch.bincount(labels[(labels >= 0) & (predictions == labels)], minlength=len(names)).tolist()
    by_class = {name: round(100 * right[c] / images[c], 2) for c, name in enumerate(names) if images[c]}
    few = {"confusion": confusion(predictions, labels, len(names)).tolist()} if len(names) <= NUMBERED else {}
    return {"by_class": by_class, **few}


def picture(matrix: Tensor, names: Sequence[str], path: str) -> None:
    """Draw the matrix: colour is the share of a row, from white to blue. Raises UserError.

    Up to 20 classes: counts in the cells, each class's accuracy on the right. Up to 100: names at the sides. More: a
    heat map of at least one pixel for each class, with class numbers at the sides.
    """
    pictures.save(draw(matrix, names), path)


def draw(matrix: Tensor, names: Sequence[str]) -> Image.Image:
    num_classes = len(names)
    cell = 52 if num_classes <= NUMBERED else 15 if num_classes <= NAMED else max(1, SIDE // num_classes)
    text = 14 if num_classes <= NUMBERED else 11
    if num_classes <= NAMED:
        marks = {c: pictures.shorten(name) for c, name in enumerate(names)}
    else:
        step = next((step for step in (10, 20, 50, 100, 200, 500) if num_classes <= 20 * step), 1000)
        marks = {c: str(c) for c in range(0, num_classes, step)}
    marks = {c: pictures.drawable(mark) for c, mark in marks.items()}
    share = matrix.double() / matrix.sum(dim=1, keepdim=True).clamp(min=1)
    margin = max(pictures.text_width(mark, text) for mark in marks.values()) + 12
    edge, head = cell * num_classes, 24
    title = "true class: row; predicted class: column; colour: share of the row"
    right = 70 if num_classes <= NUMBERED else 12
    wide = max(margin + edge + right, pictures.text_width(title, text) + 16)
    sheet = Image.new("RGB", (wide, head + margin + edge + 12), pictures.PAPER)
    sheet.paste(_colours(share).resize((edge, edge), Image.Resampling.NEAREST), (margin, head + margin))
    pen, font = ImageDraw.Draw(sheet), pictures.font(text)
    pen.text((8, 4), title, pictures.INK, font)
    top = head + margin
    for c, mark in marks.items():
        middle = c * cell + cell // 2
        pen.text((margin - 6, top + middle), mark, pictures.INK, pictures.font_for(mark, text), anchor="rm")
        pictures.write_upright(sheet, mark, (margin + middle, top - 6), text)
    pen.rectangle((margin - 1, top - 1, margin + edge, top + edge), outline=FRAME)
    if num_classes <= NUMBERED:
        _numbers(pen, matrix, share, cell, (margin, top))
    return sheet


def _colours(share: Tensor) -> Image.Image:
    """[C, C] in [0, 1] -> one pixel for each cell. The square root makes rare mistakes visible."""
    x = share.sqrt().clamp(0, 1).unsqueeze(-1).numpy()
    white, blue = np.array([255, 255, 255]), np.array([8, 48, 107])
    return Image.fromarray((white + (blue - white) * x).round().astype(np.uint8))


def _numbers(pen: ImageDraw.ImageDraw, matrix: Tensor, share: Tensor, cell: int, corner: tuple[int, int]) -> None:
    """Counts in the cells, nothing for zero, and the accuracy of each class at the right."""
    for r, row in enumerate(matrix.tolist()):
        y = corner[1] + r * cell + cell // 2
        for c, count in enumerate(row):
            if count:
                ink = pictures.PAPER if share[r, c] > 0.25 else pictures.INK
                size = 14 if count < 100_000 else 10
                pen.text((corner[0] + c * cell + cell // 2, y), str(count), ink, pictures.font(size), anchor="mm")
        if sum(row):
            accuracy = f"{100 * share[r, r]:.1f} %"
            pen.text((corner[0] + len(matrix) * cell + 8, y), accuracy, pictures.INK, pictures.font(14), anchor="lm")
