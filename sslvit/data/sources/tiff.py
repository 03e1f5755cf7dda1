"""TIFF files that PIL does not read whole: colour of more than 8 bits, more than 4 channels, channels as pages."""

import io
import logging
import lzma
import zlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile
from torch import Tensor

from ...errors import require
from .limits import SMALL, size_text
from .pixels import from_array, refuse_bomb
from .source import BadImage, ValueRange

MOST = 10_000  # times larger than packed, at most; deflate reaches 1030 and LZMA 7000
# {compression: a decompressor of Python}
UNPACKED: dict[int, Callable[[], Any]] = {
    **dict.fromkeys((8, 32946, 50013), zlib.decompressobj), 34925: lzma.LZMADecompressor
}  # fmt: skip


def tifffile() -> ModuleType:
    module = require("tifffile", "tiff", "TIFF of more than 8 bits in colour, more than 4 channels, or several pages")
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # it logs whatever is unusual in a file
    return module


def is_deep(data: bytes, in_chans: int) -> bool:
    """Whether PIL would refuse it, or lose depth or channels."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            assert isinstance(image, TiffImageFile)
            bits, samples = image.tag_v2.get(258, (1,)), image.tag_v2.get(277, 1)
            pages = getattr(image, "n_frames", 1)
            deep_colour = samples > 1 and max(bits) > 8
            return deep_colour or samples > 4 or in_chans > 4 or (samples == 1 and pages == in_chans > 1)
    except Image.DecompressionBombError:
        raise
    except Exception:  # PIL raises many kinds; tifffile may read it, and says why if not
        return True


def decode_tiff(data: bytes, in_chans: int, value_range: ValueRange) -> Tensor:
    """[in_chans, H, W]: channels are the samples of the first page, or the pages, if there are in_chans of them."""
    with tifffile().TiffFile(io.BytesIO(data)) as file:
        first = check_page(file.pages[0])
        if first.samplesperpixel == 1 and len(file.pages) == in_chans > 1:
            pages = [check_page(page) for page in file.pages]
            if all(page.shape == first.shape for page in pages):  # else they are smaller copies of the first
                return from_array(np.stack([page_array(page) for page in pages], axis=-1), in_chans, value_range)
        return from_array(page_array(first), in_chans, value_range)


def page_array(page: Any) -> np.ndarray:
    """[H, W] or [H, W, C] pixels of a page. Raises BadImage."""
    _refuse_packed_bomb(check_page(page))
    values = page.asarray()
    if page.axes == "SYX":  # each channel in a plane of its own
        values = values.transpose(1, 2, 0)
    if values.ndim not in (2, 3) or page.axes not in ("YX", "YXS", "SYX"):
        raise BadImage(f"its page has the axes {page.axes}: an image has rows, columns and channels")
    if page.photometric == 0:  # MINISWHITE
        values = np.invert(values) if values.dtype.kind == "u" else -values
    return values


def _refuse_packed_bomb(page: Any) -> None:
    """Raises BadImage for a strip or tile that becomes far larger than it should: tifffile without imagecodecs unpacks
    whatever there is."""
    unpacked = UNPACKED.get(int(page.compression))
    rows, columns = (page.tilelength, page.tilewidth) if page.is_tiled else (page.rowsperstrip, page.imagewidth)
    limit = 2 * int(rows) * int(columns) * page.samplesperpixel * page.dtype.itemsize + SMALL
    for place, size in zip(page.dataoffsets, page.databytecounts, strict=False):
        if unpacked and MOST * size > limit:
            page.parent.filehandle.seek(place)
            if len(unpacked().decompress(page.parent.filehandle.read(size), limit + 1)) > limit:
                raise BadImage(f"a part of {size_text(size)} becomes more than {size_text(limit)}")


def check_page(page: Any) -> Any:
    """The page; raises BadImage if its header asks for more memory than an image needs."""
    if page.is_tiled:  # a tile is unpacked whole
        refuse_bomb(int(page.tilewidth), int(page.tilelength), page.samplesperpixel, page.dtype.itemsize)
    width, height = int(page.imagewidth), int(page.imagelength)
    refuse_bomb(width, height, max(1, page.size // max(1, width * height)), page.dtype.itemsize)
    return page
