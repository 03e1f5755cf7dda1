"""How much one image or file may take, so that a file of somebody else cannot fill the memory or the disk.

Each limit is raised by an environment variable. It is not a key, because a recipe of somebody else could raise that.
"""

import os
from pathlib import Path

from ...errors import UserError


def limit(variable: str, default: int) -> int:
    """The value of an environment variable, a whole number. Raises UserError."""
    text = os.environ.get(variable, str(default))
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise UserError(f"{variable}={text} in the environment is not a whole number above 0, such as {default}.")
    return int(text)


MAX_PIXELS = limit("SSLVIT_MAX_PIXELS", 178_956_970)  # of an image; the default is PIL's
MAX_BYTES = 6 * MAX_PIXELS  # of an image, encoded or decoded: 1 GiB, or 3 channels of 16 bits for each pixel
# Of what compressed bytes may become. Deflate gives 1030 for zeros. Images are compressed themselves: the most that was
# seen in a data set is 115 (dSprites, black and white). So much less is needed that a small file needs no ratio.
MAX_RATIO, SMALL = 200, 2**26
LABELS = 2**28  # bytes of labels or of a packed array of images that need no ratio
HOW = "raise SSLVIT_MAX_PIXELS in the environment if you trust it"


def unpacked_limit(packed: int, small: int = SMALL) -> int:
    """How many bytes so many compressed bytes may become. small: what any number of them may become."""
    return max(small, MAX_RATIO * packed)


def regular(path: str | Path) -> Path:
    """The path. Raises UserError for a pipe or device, which may have no end; a path that is not there passes."""
    if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
        raise UserError(f"data: {path} is a pipe or a device: give a file or a folder.")
    return Path(path)


def size_text(count: float) -> str:
    return f"{count / 2**30:.1f} GiB" if count > 0.99 * 2**30 else f"{count / 2**20:.1f} MiB"
