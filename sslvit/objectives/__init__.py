"""Pretraining objectives: one module a method, found by its name.

A module defines `Config` (its dataclass), `DEFAULTS` (the paper's values for the sections that methods share),
`views(config, data)`, and `build(config, ...)`, which returns an Objective. It may define `PRESETS`: {name: values of
its keys} for `objective.preset`, which is then a key of its Config. A dotted name may live outside the package.
"""

import difflib
import importlib
import pkgutil
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor

from .. import rng
from ..encoder import Encoder
from ..errors import UserError


class Objective(Protocol):
    """Student, teacher, heads and decoder in one nn.Module, which is what DDP, FSDP and torch.compile want.

    With shard=true every parameter is this process's part of it (distributed.local), but for those of a block or a head
    while that is called, and those outside of them within __call__.
    """

    def __call__(self, views: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """{"loss": scalar, others to log} of one micro-batch. Writes nothing but sums that `after_step` consumes, so
        that accumulation and the number of processes do not change a run (but for koleo_weight, off by default).
        """

    def before_step(self, step: int) -> None:
        """Gradients are final (averaged, unscaled, clipped) and the optimizer has not stepped."""

    def after_step(self, step: int) -> None:
        """The optimizer has stepped; called once a step."""

    # May also have `alarm(values) -> str | None`: what the means of a logged line say of collapse, the same everywhere.

    def exported_encoder(self) -> Encoder:
        """The part that is evaluated and exported, with its pooling."""


REQUIRED = ("Config", "DEFAULTS", "views", "build")


def names() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def find(method: str) -> ModuleType:
    """The module of a method: `mae`, `dino`, or a dotted name of one's own. Raises UserError."""
    if "." not in method and method not in names():
        near = difflib.get_close_matches(method, names(), n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise UserError(f"method={method} is not one of {', '.join(names())}.{hint}")
    try:
        module = importlib.import_module(method if "." in method else f"{__name__}.{method}")
    except (ImportError, TypeError, ValueError) as error:  # the last two for names such as `.x` and `x.`
        raise UserError(f"method={method} cannot be imported ({error}): give an importable module.") from error
    missing = [name for name in REQUIRED if not hasattr(module, name)]
    if missing:
        raise UserError(f"method={method}: the module defines no {', '.join(missing)}.")
    return module


def start(config: Any, steps_per_epoch: int, steps: int) -> Objective:
    """The objective of a RunConfig as it is before the first step: its weights hang on the seed only. Raises
    UserError."""
    torch.manual_seed(int(rng.fold_in(config.seed, "weights")))
    return find(config.method).build(config.objective, config.model, config.data, steps_per_epoch, steps)
