"""Pretraining objectives: one module a method, found by its name. A method of your own is one file in any folder on the
Python path: `method=my_simmim`, or `method=my.simmim` for a module of a package. Only the command line and Python can
choose it: a recipe or the config.yaml of a run cannot.

May import data, model and the pure helpers. Nothing outside of this folder knows a method's name or class.

A module defines
    Config     its dataclass: `objective.*`; the comment beside a field is its help
    DEFAULTS   the paper's values for the sections that methods share: {"epochs": 800, "optim": {"base_lr": 1.5e-4}}
    views      (config, data config) -> the crops of an image: {name: [Crop, ...]}, see data/crops.py
    build      (config, model config, data config, steps_per_epoch, steps) -> an Objective
and may define
    PRESETS    {name: values of its keys} for `objective.preset`, which is then a key of its Config
    SMALL      values of its keys that make it small, for the tests that every method has to pass
    hidden     (config, encoder, keys [B]) -> [B, N] bool, the patches that `sslvit data picture=` shows as hidden
    alarm      (config, values of a line of the log) -> what they say of collapse, for reports of runs that have ended

The smallest one, which pulls two crops of an image together (and would collapse):

    @dataclass
    class Config:
        low: float = 0.4  # smallest share of the image's area

    DEFAULTS = {"epochs": 100}

    def views(config, data_config):
        return {"pair": [Crop(data.image_size(data_config), (config.low, 1.0))] * 2}

    def build(config, model, data_config, steps_per_epoch, steps):
        return Pair(factory.create(model, data.image_size(data_config), data_config.in_chans))

    class Pair(Objective):
        def __init__(self, encoder):
            super().__init__()
            self.encoder = encoder

        def forward(self, views, step):  # {"key": [B] int64, "pair": [2, B, C, H, W] normalised}
            first, second = (self.encoder.features(crop, key=views["key"]) for crop in views["pair"])
            return {"loss": (first - second).square().mean()}

        def exported_encoder(self):
            return self.encoder

`SSLVIT_METHODS=my_pair python -m pytest tests/objectives/test_all.py` runs the tests that every method has to pass. A
whole method in 90 lines: tests/objectives/simmim.py.
"""

import importlib
import pkgutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from .. import rng
from ..distributed import say
from ..errors import UserError, did_you_mean
from ..model.anchor import Anchor
from ..model.encoder import Encoder
from ..model.factory import Bounded


class Objective(nn.Module):
    """Student, teacher, heads and decoder in one module, which is what DDP, FSDP and torch.compile want.

    A method defines `forward` and `exported_encoder`. The other functions are optional.

    With shard=true each process has a part of each parameter (distributed.local_shard). A parameter is whole only while
    its block or head runs; those outside of blocks and heads are whole within `forward`.
    """

    takes_anchor = False  # whether `forward` adds that of model.anchor to its values
    anchor: Anchor | None = None

    def forward(self, views: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """{"key": [B] int64, name: [V, B, C, h, w] float32} -> {"loss": scalar, others to log} of one micro-batch.

        What is random is drawn from the images' keys (rng.py). Writes nothing but sums that `after_step` consumes. So
        neither accumulation nor the number of processes changes a run (except by BatchNorm and by koleo_weight).
        """
        raise NotImplementedError

    def exported_encoder(self) -> Encoder:
        """The part that is evaluated and exported, with its pooling."""
        raise NotImplementedError

    def before_step(self, step: int) -> None:
        """Gradients are final (averaged, unscaled, clipped) and the optimizer has not stepped."""

    def after_step(self, step: int) -> None:
        """The optimizer has stepped, or skipped the step. Called once a step."""

    def set_steps(self, steps: int) -> bool:
        """The run now has so many steps. False: this method cannot change its length."""
        return False

    def scheduled(self, step: int) -> dict[str, float]:
        """Values of the method's own schedules, for the log."""
        return {}

    def alarm(self, values: dict[str, float]) -> str | None:
        """What the means of a logged line say of collapse, as a sentence with what to change; None if all is well."""
        return None

    @torch.no_grad()
    def pictures(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        """What it makes of images, for the report: {title: [B, C, H, W] normalised}. views: as in `forward`."""
        return {}

    def shard_units(self) -> list[nn.Module]:
        """Large modules, beside transformer blocks, that shard=true splits by themselves, such as a head."""
        return []


REQUIRED = ("Config", "DEFAULTS", "views", "build")


def names() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def find(method: str) -> ModuleType:
    """The module of a method of this folder, or of your own. Raises UserError."""
    return importlib.import_module(f"{__name__}.{method}") if method in names() else _find_own(method)


def _find_own(method: str) -> ModuleType:
    """A module of your own: its code runs, and that is said. Raises UserError."""
    new = method not in sys.modules
    try:
        module = importlib.import_module(method)
        if new:
            say(f"method={method} is the code in {module.__file__}.")
    except (ImportError, TypeError, ValueError) as error:  # the last two for names such as `.x` and `x.`
        raise UserError(
            f"method={method} cannot be imported ({error}).{did_you_mean(method, names())} Give one of "
            f"{', '.join(names())}, or the name of a module of your own."
        ) from error
    missing = [name for name in REQUIRED if not hasattr(module, name)]
    if missing:
        raise UserError(f"method={method}: the module defines no {', '.join(missing)}.")
    return module


def check_bundled(method: str, where: Path, key: str) -> None:
    """Raises UserError if the file `where` has a method that is not in this folder: who types `key` chooses code."""
    if method not in names():
        raise UserError(
            f"{where} has method={method}, which is not one of {', '.join(names())}, and a file cannot choose code."
            f"{did_you_mean(method, names())} If it is a module that you trust, type {key}={method} as well."
        )


def start(config: Any, steps_per_epoch: int, steps: int) -> Objective:
    """The objective of a RunConfig before the first step; its weights depend on the seed only. Raises UserError."""
    torch.manual_seed(int(rng.fold_in(config.seed, "weights")))
    with Bounded(f"The model of method={config.method}"):
        return find(config.method).build(config.objective, config.model, config.data, steps_per_epoch, steps)


def location(objective: Objective) -> dict[str, str]:
    """Where in the objective's state dict the exported encoder's model is, and how its tokens become one feature."""
    encoder = objective.exported_encoder()
    prefix = next(name for name, module in objective.named_modules() if module is encoder)
    return {"prefix": f"{prefix}.model.", "pool": encoder.pool}
