"""DICOM at its full depth, as a viewer displays it: rescaled, windowed, MONOCHROME1 inverted.

The standard is DICOM PS3.3, C.7.6.3.1.2 and C.11.2.
"""

import io
from typing import Any

import numpy as np
from torch import Tensor

from ...errors import require
from .pixels import from_array, refuse_bomb
from .source import BadImage, ValueRange


def decode_dicom(data: bytes, in_chans: int, value_range: ValueRange) -> Tensor:
    """[in_chans, H, W] uint8 for plain 8-bit images, else float32 in [0, 255].

    The values that become 0 and 255 are those of value_range, in rescaled units (Hounsfield for CT). Without one they
    are those of the file's first window, and without a window the whole range of its bits. Several frames are channels
    if there are in_chans of them. Raises BadImage.
    """
    pydicom = require("pydicom", "dicom", "DICOM")
    file = pydicom.dcmread(io.BytesIO(data))
    if "PixelData" not in file:
        raise BadImage("this DICOM file holds no pixels")
    frames, samples = int(file.get("NumberOfFrames") or 1), int(file.get("SamplesPerPixel", 1))
    width, height, bits = int(file.Columns), int(file.Rows), int(file.BitsAllocated)
    refuse_bomb(width, height, samples * frames * max(1, bits // 8))
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
            return (255 / (1 + np.exp(-4 * (values.astype(np.float64) - center) / width))).astype(np.float32)
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
    scaled = (values.astype(np.float64) - low) * (255 / (high - low))
    return scaled.clip(0, 255).astype(np.float32)


def _first(value: Any) -> float:
    """A number, or the first of several: viewers display the first window."""
    return float(value[0]) if hasattr(value, "__len__") and not isinstance(value, str) else float(value)
