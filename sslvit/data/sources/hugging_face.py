"""Datasets of Hugging Face: `hf:<folder of save_to_disk>[:split]` or `hf:<name on the hub>[@config][:split]`."""

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import UserError, require
from ..config import Config
from .files import Encoded, check_channels, fingerprint_of, read_file
from .names import Names, numbered
from .source import BadImage


class HuggingFace(Encoded):
    """The rows of a split, in their order. The library keeps them in Arrow files."""

    def __init__(self, spec: str, rows: Any, config: Config) -> None:
        datasets = require("datasets", "hf", "hf:")
        image = [name for name, kind in rows.features.items() if isinstance(kind, datasets.Image)]
        if not image:
            raise UserError(f"data: {spec} has no column of images; it has {', '.join(rows.features)}.")
        check_channels(config.in_chans, set(), spec)
        self.spec, self.column = spec, image[0]
        self.rows = rows.select_columns(image[:1]).cast_column(image[0], datasets.Image(decode=False))
        named = [name for name, kind in rows.features.items() if isinstance(kind, datasets.ClassLabel)]
        plain = [name for name in ("label", "labels", "class", "target") if name in rows.features]
        column, classes, labels = (*named, *plain, "")[0], list[str](), None
        if named:
            classes = list(rows.features[column].names)
            labels = np.array([-1 if value is None else value for value in rows[column]], dtype=np.int64)
        elif column:
            classes, labels = numbered(["" if value is None else str(value) for value in rows[column]])
        super().__init__(Names([]), config, classes, labels)
        if labels is not None:
            self.texts, self.columns = Names("" if label < 0 else classes[label] for label in labels), [column]

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        return f"{self.spec}[{index}]"

    def identity(self) -> str:
        """The number of rows, the split and the column: the library's own fingerprint depends on the folder."""
        return hashlib.sha256(f"hf-1:{len(self)},{self.rows.split},{self.column}".encode()).hexdigest()

    def fingerprint(self) -> str:
        return fingerprint_of(
            f"{self.identity()},{self.rows._fingerprint}", [one["filename"] for one in self.rows.cache_files]
        )

    def bytes_of(self, index: int) -> bytes:
        try:
            cell = self.rows[index][self.column]
        except Exception as error:  # the library raises many kinds
            raise BadImage(error) from error
        if cell is None:
            raise BadImage("the row has no image")
        return cell["bytes"] if cell["bytes"] is not None else read_file(cell["path"])


def open_hub(spec: str, config: Config) -> HuggingFace:
    datasets = require("datasets", "hf", "hf:")
    place, split = spec.removeprefix("hf:"), ""
    if not os.path.exists(os.path.expanduser(place)):
        place, _, split = place.partition(":")
    folder = Path(place).expanduser()
    try:
        if folder.is_dir() and any((folder / name).exists() for name in ("state.json", "dataset_dict.json")):
            found = datasets.load_from_disk(str(folder))
        else:
            name, _, configuration = place.partition("@")
            found = datasets.load_dataset(name, configuration or None)
    except Exception as error:  # no network, no such name, a damaged folder: each its own exception
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"data: {spec} cannot be opened ({reason}): give a folder of save_to_disk or a name."
        ) from error
    if isinstance(found, dict):
        chosen = split or ("train" if "train" in found else "")
        if chosen not in found:
            raise UserError(
                f"data: {spec} has the splits {', '.join(found)}: say which, hf:{place}:{next(iter(found))}."
            )
        found = found[chosen]
    elif split and split != str(found.split):
        raise UserError(f"data: {place} holds one split, {found.split}, and {split} was asked for.")
    return HuggingFace(spec, found, config)
