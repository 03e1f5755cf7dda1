"""Images: where they come from (sources), their crops, photometric augmentation, and the loader that ties these.

Crops are drawn for each image by loader processes. The rest of the augmentation is applied to whole batches on the
training device. Imports the pure helpers only (rng, distributed, hardware, errors), nothing of models or methods.
"""

from .config import Config, image_size, normalization, pair
from .sources import BadImage, Source, WrappedSource, kind_of, open_source, split_part

__all__ = [
    "BadImage", "Config", "Source", "WrappedSource", "image_size", "kind_of", "normalization", "open_source", "pair",
    "split_part",
]  # fmt: skip
