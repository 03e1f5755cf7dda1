"""From the bytes of an image file to a tensor with the channels that the encoder takes, or BadImage with the reason."""

import io
import math
import warnings
from typing import Any

import numpy as np
import simplejpeg
import torch
from PIL import Image
from torch import Tensor

from ...errors import UserError
from .dicom import decode_dicom
from .limits import HOW, MAX_PIXELS
from .pixels import MODES, from_array, from_pil, refuse_bomb
from .source import BadImage, Reduction, ValueRange
from .tiff import decode_tiff, is_deep

JPEG, PNG, NPY, DICOM = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"\x93NUMPY", b"DICM"
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
SCAN, MAX_SCANS = b"\xff\xda", 200  # what begins a scan of a JPEG; progressive ones have 10 or so
JPEG_MODES = {1: "GRAY", 3: "RGB"}  # simplejpeg's, by number of channels
MIN_SCALED = 2_000_000  # pixels; smaller JPEGs are always read at their own scale


def decode(data: bytes, in_chans: int, value_range: ValueRange = None) -> Tensor:
    """Bytes of an image file -> [in_chans, H, W] uint8, or float32 in [0, 255] where the file has more than 8 bits.

    Colour becomes gray by ITU-R 601 weights. Gray becomes colour by repetition. An alpha channel is dropped unless
    in_chans asks for it (2: gray and alpha, 4: colour and alpha). The orientation in EXIF is ignored, as PIL does.

    value_range: the values that become 0 and 255 in images of more than 8 bits; None: see `from_array`.
    Raises BadImage.
    """
    return decode_smaller(data, in_chans, value_range, None)[0]


def decode_smaller(
    data: bytes, in_chans: int, value_range: ValueRange, reduction: Reduction | None
) -> tuple[Tensor, tuple[int, int]]:
    """(image, height and width of the whole image): as `decode`, but a large JPEG may come at a smaller scale.

    libjpeg then skips the frequencies that would be lost: 12 million pixels take one core 23, 20 or 18 ms at 1/2, 1/4
    or 1/8 of the scale, and 32 ms at their own.
    """
    try:
        if not data:
            raise BadImage("the file is empty")
        if data.startswith(JPEG) and in_chans in JPEG_MODES:
            try:
                return _jpeg(data, in_chans, reduction)
            except ValueError:
                pass  # PIL reads more kinds of JPEG, and says what is wrong with the others
        with warnings.catch_warnings():
            for category in (UserWarning, RuntimeWarning):  # about the file; deprecations are still shown
                warnings.simplefilter("ignore", category)
            image = _other(data, in_chans, value_range)
        return image, (image.shape[-2], image.shape[-1])
    except BadImage:
        raise
    except UserError as error:  # a missing package
        raise BadImage(error) from error
    except Image.DecompressionBombError as error:
        raise BadImage(f"it has more than {MAX_PIXELS / 1e6:.0f} million pixels: {HOW}") from error
    except Exception as error:  # decoders raise OSError, RuntimeError, SyntaxError, struct.error and others
        raise BadImage(error) from error


def _jpeg(data: bytes, in_chans: int, reduction: Reduction | None) -> tuple[Tensor, tuple[int, int]]:
    """Raises ValueError for damaged files and for kinds of JPEG that PIL must read.

    simplejpeg gives PIL's pixels in less time: 256 ImageNet photos took 1.03 ms each (PIL 1.44, torchvision 1.12,
    TorchCodec 1.10), files of 32 x 32 pixels 0.015 ms (0.090, 0.027, 0.024). TorchCodec also turns images by EXIF, and
    each of its versions works with few versions of torch only.
    """
    height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    refuse_bomb(width, height)
    if width * height >= MIN_SCALED and data.count(SCAN) > MAX_SCANS:
        raise BadImage(f"it has more than {MAX_SCANS} scans, each of which takes the time of an image")
    if colours in ("CMYK", "YCCK"):
        raise ValueError("simplejpeg and PIL round these colours differently")
    scale = reduction(height, width) if reduction and width * height >= MIN_SCALED else 1
    pixels = simplejpeg.decode_jpeg(
        data, JPEG_MODES[in_chans], min_height=-(-height // scale), min_width=-(-width // scale)
    )
    return torch.from_numpy(pixels).permute(2, 0, 1), (height, width)


def _other(data: bytes, in_chans: int, value_range: ValueRange) -> Tensor:
    if data.startswith(PNG) and data[24:25] == b"\x10" and data[25:26] in (b"\2", b"\4", b"\6"):
        return _deep_png(data, in_chans, value_range)
    if data.startswith(NPY):
        return from_array(_npy(data), in_chans, value_range)
    if data[128:132] == DICOM:
        return decode_dicom(data, in_chans, value_range)
    if data.startswith(TIFF) and is_deep(data, in_chans):
        return decode_tiff(data, in_chans, value_range)
    with Image.open(io.BytesIO(data)) as image:
        refuse_bomb(*image.size)
        return from_pil(image, in_chans, value_range)


def _deep_png(data: bytes, in_chans: int, value_range: ValueRange) -> Tensor:
    """16 bits in two or more channels, of which PIL would keep the upper 8 bits.

    PIL unpacks one byte of two. Asked for the other byte order, it gives the lower one. torchvision reads both at once,
    but its decode_png crashed the process (segmentation fault) on 4 % of files with three damaged bytes.
    """
    channels = {2: 3, 4: 2, 6: 4}[data[25]]

    def unpacked(layout: str) -> np.ndarray:
        with Image.open(io.BytesIO(data)) as image:
            refuse_bomb(*image.size, channels, 2)
            tile: Any = image.tile[0]  # a plain tuple in older versions of PIL
            tile = tile._replace(args=layout) if hasattr(tile, "_replace") else (*tile[:3], layout)
            image.tile = [tile]
            return np.array(image)

    if channels == 2:  # four bytes a pixel, as those of colour with alpha
        pairs = unpacked("RGBA")
        return from_array(pairs[:, :, 0::2].astype(np.uint16) << 8 | pairs[:, :, 1::2], in_chans, value_range)
    values = unpacked(f"{MODES[channels]};16B").astype(np.uint16)
    values <<= 8
    values |= unpacked(f"{MODES[channels]};16L")
    return from_array(values, in_chans, value_range)


def _npy(data: bytes) -> np.ndarray:
    """The array of a .npy file. Raises BadImage if its header does not fit the number of bytes."""
    stream = io.BytesIO(data)
    version = np.lib.format.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise BadImage(f"it is an array file of version {version[0]}, not 1 or 2")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(stream)
    if dtype.hasobject or dtype.itemsize * math.prod(shape) != len(data) - stream.tell():
        raise BadImage(f"it holds no array of shape {shape} and type {dtype}, as its header says")
    values = np.frombuffer(data, dtype, offset=stream.tell())
    return values.reshape(shape, order="F" if fortran else "C")
