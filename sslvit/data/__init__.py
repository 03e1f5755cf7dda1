"""Images: sources (what a path or a name stands for), crops drawn per image, colours applied per batch, the loader.

Imports the pure helpers only (rng, distributed, hardware, errors), nothing of models or methods.
"""

from .config import Config, image_size, normalization, pair
from .sources import BadImage, Source, kind_of, open_source, read_smaller, split_part

__all__ = [
    "BadImage", "Config", "Source", "image_size", "kind_of", "normalization", "open_source", "pair",
    "read_smaller", "split_part",
]  # fmt: skip
