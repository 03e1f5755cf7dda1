"""The save.* keys: when a checkpoint is written, and which ones are kept."""

from dataclasses import dataclass
from typing import ClassVar

from ..errors import Limits


@dataclass
class Config:
    every_minutes: float | None = 15.0  # minutes between checkpoints; the end of the run always writes one
    every_steps: int | None = None  # steps between checkpoints
    keep_last: int = 2  # so many are kept, older ones are deleted
    keep_every: int | None = None  # also write and keep those at multiples of so many steps
    # With model.init the weights that the run began with count too, the run directory stands for the best ones, and
    # without eval.test a tenth of the images, at most 1,000, is held out, for a score that needs no labels.
    keep_best: bool = False  # also keep the one with the best k-NN on eval.test, which is then used for choosing

    LIMITS: ClassVar[Limits] = [(0, None, "every_minutes"), (1, None, "every_steps", "keep_last", "keep_every")]
