"""Settings that older versions of sslvit stored, in the keys and values of today."""

from collections.abc import Iterable
from typing import Any

from .arguments import flatten
from .errors import UserError

REMOVED = {"objective.pack": False}  # keys that are gone, with the only value that can still be honoured
RENAMED = {"optim.lr_schedule": {"mae": "warmup_cosine", "dino": "linspace_cosine"}}  # values with a new name
ADDED = {"objective.position_resampling": "timm"}  # newer keys, with the value that older runs behaved as if they had


def modernise(values: dict[str, Any], where: str) -> dict[str, Any]:
    """{full key: value} of any version -> those of today. Raises UserError that begins with `where`."""
    modern = {}
    for key, value in values.items():
        if key not in REMOVED:
            modern[key] = RENAMED.get(key, {}).get(str(value), value)
        elif value != REMOVED[key]:
            raise UserError(f"{where}: {key}={value} is no longer supported: leave it out.")
    return modern


def before(stored: dict[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    """{key: value} of those of `keys` that are newer than these stored settings: what such a run does."""
    return {key: ADDED[key] for key in keys if key in ADDED and key not in flatten(stored)}
