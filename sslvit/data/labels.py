"""Labels that are not one class: several classes for an image, or numbers."""

import math

import numpy as np

from ..errors import UserError
from .sources import Source
from .sources.names import Names

NONE = ("", "no finding", "none")  # texts that say that no class applies


def multilabel(source: Source, separator: str = "|") -> tuple[np.ndarray, list[str]]:
    """Texts such as `Atelectasis|Effusion` -> ([N, C] float32 of 0 and 1, the C names in their order).

    Texts that are empty, `No Finding` or `None` have no class. Several columns of 0 and 1 (or -1 for uncertain, taken
    for 0) are classes by their names. Raises UserError for a source without label texts.
    """
    texts, columns = _texts(source, "multi-label classification")
    if len(columns) > 1:
        values, columns = numbers(source)
        if not np.isin(values, (-1, 0, 1)).all():
            raise UserError(f"The columns {', '.join(columns)} are taken for one class each and must hold 0 and 1.")
        return np.maximum(values, 0), columns
    sets = [[name.strip() for name in text.split(separator) if name.strip().lower() not in NONE] for text in texts]
    classes = sorted({name for names in sets for name in names})
    if not classes:
        raise UserError(f"The column {', '.join(columns)} names no class.")
    number = {name: i for i, name in enumerate(classes)}
    targets = np.zeros((len(sets), len(classes)), dtype=np.float32)
    for row, names in enumerate(sets):
        targets[row, [number[name] for name in names]] = 1
    return targets, classes


def numbers(source: Source) -> tuple[np.ndarray, list[str]]:
    """Label columns of numbers -> ([N, T] float32, the T names). Raises UserError for a source without label texts and
    for a text that is no number."""
    texts, columns = _texts(source, "regression")
    values = np.empty((len(texts), max(1, len(columns))), dtype=np.float32)
    for row, text in enumerate(texts):
        for column, cell in enumerate(text.split("\t")):
            try:
                values[row, column] = float(cell)
            except ValueError:
                values[row, column] = math.nan
            if not math.isfinite(values[row, column]):
                raise UserError(
                    f"{source.name(row)} has {cell or 'nothing'} in the column {(columns or ['label'])[column]}: "
                    "regression needs a number for each image."
                )
    return values, columns or ["label"]


def _texts(source: Source, purpose: str) -> tuple[Names, list[str]]:
    if source.texts is None:
        raise UserError(
            f"{source.name(0)} and the others have no label texts: {purpose} needs a table, list.csv with the columns "
            "path and label, or list.csv:column,column."
        )
    return source.texts, list(source.columns)
