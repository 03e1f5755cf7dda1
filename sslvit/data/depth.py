"""Images of more than 8 bits that come out nearly black, because nobody said which value is white."""

import copy
import math

import torch
from torch import Tensor

from .sources import Source, WrappedSource
from .sources.several import Several

DARK = 127.0  # of 255; images whose brightest pixel is below use less than half of the range


def range_that_fits(source: Source, index: int, image: Tensor, largest: float) -> tuple[float, float] | None:
    """The value_range that deep images need whose brightest pixel comes out as `largest`, of 255. None for 8 bits, for
    images that are bright enough, for a range that was given, and where no guess is confirmed.

    index, image: one of the images, [C, H, W] as the source gives it. It is read again with each guess.
    """
    if not image.is_floating_point() or source.value_range or not 0 < largest < DARK:
        return None
    while isinstance(source, (WrappedSource, Several)):
        source, index = source.place(index) if isinstance(source, Several) else (source.source, index)
    again = copy.copy(source)
    bits = math.ceil(math.log2(round(largest * 257) + 1))
    for top, white in ((2.0**bits - 1, 65535.0), (float(f"{largest / 255 * 1.005:.2g}"), 1.0)):  # integers; floats
        again.value_range = (0.0, top)
        if torch.allclose(again.read(index), (image * (white / top)).clamp(0, 255), rtol=1e-3, atol=1e-2):
            return 0.0, top
    return None


def dark_sentence(value_range: tuple[float, float], largest: float) -> str:
    """The sentence for a user whose images need this range."""
    top = value_range[1]
    kind = f"{math.ceil(math.log2(top + 1))}-bit values in deeper files" if top > 1 else "floats far below 1"
    return (
        f"{kind}: the brightest pixel is {largest:.1f} of 255, nearly black. data.value_range=[0,{top:g}] mends that."
    )
