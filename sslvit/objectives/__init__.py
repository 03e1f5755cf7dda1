"""Pretraining objectives: one module a method, found by its name. A method of your own is one file in any folder on the
Python path: `method=my_simmim`, or `method=my.simmim` for a module of a package. Only the command line and Python can
choose it: a recipe or the config.yaml of a run cannot.

May import data, model and the pure helpers. Nothing outside of this folder knows a method's name or class.

A module defines (or imports from keys/, which needs no torch: then `sslvit pretrain --help` is quick)
    Config     its dataclass: `objective.*`; the comment beside a field is its help
    DEFAULTS   the paper's values for the sections that methods share: {"epochs": 800, "optim": {"base_lr": 1.5e-4}}
    views      (config, data config) -> the crops of an image: {name: [Crop, ...]}, see data/crops.py
    build      (config, model config, data config, steps_per_epoch, steps) -> an Objective
and may define
    PRESETS    {name: values of its keys} for `objective.preset`, which is then a key of its Config
    SMALL      values of its keys that make it small, for the tests that every method has to pass
    hidden     (config, encoder, keys [B]) -> [B, N] bool, the patches that `sslvit data picture=` shows as hidden
    WORKS      {key: value that has worked in short runs}: optim.base_lr and others, for the advice of reports
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
from typing import TYPE_CHECKING, Any

from ..errors import UserError, did_you_mean

if TYPE_CHECKING:
    from ..model.objective import Objective as Objective

REQUIRED = ("Config", "DEFAULTS", "views", "build")


def names() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.ispkg)


def __getattr__(name: str) -> Any:
    """`from sslvit.objectives import Objective`. Importing torch takes seconds, and --help needs no torch."""
    if name != "Objective":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ..model.objective import Objective

    return Objective


def keys_of(method: str) -> ModuleType:
    """The module with Config, DEFAULTS and PRESETS of a method: its file in keys/, without torch, or its own."""
    light = method in names() and (Path(__file__).parent / "keys" / f"{method}.py").is_file()
    return importlib.import_module(f"{__name__}.keys.{method}") if light else find(method)


def find(method: str) -> ModuleType:
    """The module of a method of this folder, or of your own. Raises UserError."""
    return importlib.import_module(f"{__name__}.{method}") if method in names() else _find_own(method)


def _find_own(method: str) -> ModuleType:
    """A module of your own: its code runs, and that is said. Raises UserError."""
    from ..distributed import say

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


def start(config: Any, steps_per_epoch: int, steps: int) -> "Objective":
    """The objective of a RunConfig before the first step; its weights depend on the seed only. Raises UserError."""
    import torch

    from .. import rng
    from ..model.factory import Bounded

    torch.manual_seed(int(rng.fold_in(config.seed, "weights")))
    with Bounded(f"The model of method={config.method}"):
        return find(config.method).build(config.objective, config.model, config.data, steps_per_epoch, steps)


def location(objective: "Objective") -> dict[str, str]:
    """Where in the objective's state dict the exported encoder's model is, and how its tokens become one feature."""
    encoder = objective.exported_encoder()
    prefix = next(name for name, module in objective.named_modules() if module is encoder)
    return {"prefix": f"{prefix}.model.", "pool": encoder.pool}
