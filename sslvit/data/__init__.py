"""Images: sources/ (where they come from), crops.py (boxes, drawn for each image by loader processes), augment.py
(flips and photometric augmentation, for a whole batch on the training device), loader.py (all of it as batches),
cache.py (images that stay in memory), resample.py.

Imports the pure helpers only (rng, distributed, hardware, errors), nothing of models or methods.
"""

from .config import Config, check_value_range, image_size, normalization, pair
from .sources import BadImage, Source, WrappedSource, kind_of, none_readable, open_source, split_part

__all__ = [
    "BadImage", "Config", "Source", "WrappedSource", "check_value_range", "image_size", "kind_of", "none_readable",
    "normalization", "open_source", "pair", "split_part",
]  # fmt: skip
