"""Settings that older versions of sslvit stored, in the keys and values of today."""

from collections.abc import Iterable
from typing import Any

from .arguments import flatten
from .errors import UserError

REMOVED = {"objective.pack": False}  # keys that are gone, with the only value that can still be honoured
RENAMED = {"optim.lr_schedule": {"mae": "warmup_cosine", "dino": "linspace_cosine"}}  # values with a new name
ADDED = {"objective.position_resampling": "timm"}  # newer keys, with the value that older runs behaved as if they had


def modernise(values: dict[str, Any], where: str) -> dict[str, Any]:
    """Nested keys and values of any version -> those of today. Raises UserError that begins with `where`."""
    for key, honoured in REMOVED.items():
        section, name = key.split(".")
        part = values.get(section)
        if isinstance(part, dict) and name in part:
            if part[name] != honoured:
                raise UserError(f"{where}: {key}={part[name]} is no longer supported: leave it out.")
            values = values | {section: {other: value for other, value in part.items() if other != name}}
    for key, names in RENAMED.items():
        section, name = key.split(".")
        part = values.get(section)
        if isinstance(part, dict) and part.get(name) in names:
            values = values | {section: part | {name: names[part[name]]}}
    return values


def before(stored: dict[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    """{key: value} of those of `keys` that are newer than these stored settings: what such a run does."""
    return {key: ADDED[key] for key in keys if key in ADDED and key not in flatten(stored)}
