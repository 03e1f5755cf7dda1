"""DICOM at its full depth, as a viewer displays it: rescaled, windowed, MONOCHROME1 inverted.

The standard is DICOM PS3.3, C.7.6.3.1.2 and C.11.2.
"""

import io
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor

from ...errors import require
from .limits import size_text, unpacked_limit
from .pixels import by_rows, from_array, refuse_bomb
from .source import BadImage, ValueRange

DEFLATED = b"1.2.840.10008.1.2.1.99"  # the transfer syntax


def decode_dicom(data: bytes, in_chans: int, value_range: ValueRange) -> Tensor:
    """[in_chans, H, W] uint8 for plain 8-bit images, else float32 in [0, 255].

    The values that become 0 and 255 are those of value_range, in rescaled units (Hounsfield for CT). Without one they
    are those of the file's first window, and without a window the whole range of its bits. Several frames are channels
    if there are in_chans of them. Raises BadImage.
    """
    pydicom = require("pydicom", "dicom", "DICOM")
    _refuse_packed_bomb(data)
    file = pydicom.dcmread(io.BytesIO(data))
    if "PixelData" not in file:
        raise BadImage("this DICOM file holds no pixels")
    frames, samples = int(file.get("NumberOfFrames") or 1), int(file.get("SamplesPerPixel", 1))
    width, height, bits = int(file.Columns), int(file.Rows), int(file.BitsAllocated)
    refuse_bomb(width, height, samples * frames, 1 if bits <= 8 else 8)  # it is rescaled in float64
    values = file.pixel_array  # colour comes as RGB
    kind = str(file.get("PhotometricInterpretation", "MONOCHROME2"))
    if kind == "PALETTE COLOR":
        values, samples = pydicom.pixels.apply_color_lut(values, file), 3
    if frames > 1:
        if frames != in_chans or samples > 1:
            raise BadImage(f"it has {frames} frames, and data.in_chans={in_chans}")
        values = np.moveaxis(values, 0, -1)
    if samples > 1:
        return from_array(values, in_chans, value_range if values.dtype != np.uint8 else None)
    scaled = _windowed(file, pydicom.pixels.apply_modality_lut(values, file), values.dtype, value_range)
    if kind == "MONOCHROME1":
        scaled = 255 - scaled
    if scaled.dtype == np.uint8:
        return from_array(scaled, in_chans)
    return from_array(scaled, in_chans, (0.0, 255.0))


def _refuse_packed_bomb(data: bytes) -> None:
    """Raises BadImage for a file that is deflated as a whole and would become far larger."""
    start = 144 + int.from_bytes(data[140:144], "little")  # where the header ends that says how the rest is written
    if DEFLATED in data[:start]:
        limit = unpacked_limit(len(data))
        if len(zlib.decompressobj(-zlib.MAX_WBITS).decompress(data[start:], limit + 1)) > limit:
            raise BadImage(f"its {size_text(len(data))} become more than {size_text(limit)}")


def _windowed(file: Any, values: np.ndarray, stored: np.dtype, value_range: ValueRange) -> np.ndarray:
    """Rescaled values -> uint8, or float32 in [0, 255]."""
    bits, signed = int(file.get("BitsStored", 8)), int(file.get("PixelRepresentation", 0))
    rescaled = values.dtype != stored or any(key in file for key in ("RescaleSlope", "ModalityLUTSequence"))
    if value_range is not None and (bits > 8 or rescaled):
        low, high = value_range
    elif file.get("WindowCenter") is not None and file.get("WindowWidth") is not None:
        center, width = (_first(file[key].value) for key in ("WindowCenter", "WindowWidth"))
        function = str(file.get("VOILUTFunction", "LINEAR"))
        if function == "SIGMOID":
            return _by_rows(lambda part: 255 / (1 + np.exp(-4 * (part.astype(np.float64) - center) / width)), values)
        low, high = center - width / 2, center + width / 2
        if function == "LINEAR":
            low, high = center - 0.5 - (width - 1) / 2, center - 0.5 + (width - 1) / 2
    elif bits == 8 and not rescaled and not signed:
        return values.astype(np.uint8)
    else:
        slope, intercept = float(file.get("RescaleSlope", 1)), float(file.get("RescaleIntercept", 0))
        smallest = -(2 ** (bits - 1)) if signed else 0
        ends = [slope * end + intercept for end in (smallest, smallest + 2**bits - 1)]
        low, high = min(ends), max(ends)
    if high <= low:  # a window of no width: black below, white from there on
        return np.where(values >= high, 255, 0).astype(np.float32)
    return _by_rows(lambda part: ((part.astype(np.float64) - low) * (255 / (high - low))).clip(0, 255), values)


def _by_rows(function: Callable[[np.ndarray], np.ndarray], values: np.ndarray) -> np.ndarray:
    """As `by_rows`, of one channel or of frames that are channels."""
    return by_rows(function, np.atleast_3d(values)).reshape(values.shape)


def _first(value: Any) -> float:
    """A number, or the first of several: viewers display the first window."""
    return float(value[0]) if hasattr(value, "__len__") and not isinstance(value, str) else float(value)
