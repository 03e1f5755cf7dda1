"""From an array or a PIL image of any depth and number of channels to the tensor that the encoder takes."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .source import BadImage, ValueRange

MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}  # PIL's, by number of channels
MAX_PIXELS = 178_956_970  # PIL takes a larger image for a decompression bomb, and so do we
MAX_UNPACKED = 2**30  # bytes of an image of more than 8 bits or 4 channels, before it becomes float32
GRAY = (0.299, 0.587, 0.114)  # ITU-R 601, as PIL


def from_array(values: np.ndarray, in_chans: int, value_range: ValueRange = None) -> Tensor:
    """[H, W] or [H, W, C] of any numbers -> [in_chans, H, W] uint8 for uint8 and bool, else float32 in [0, 255].

    Without a value_range, integers must lie in 0 .. 65535 and floats in 0 .. 1. With one, values outside are clipped,
    and NaN becomes 0. More than 4 channels may also come first: [C, H, W], if C is in_chans. Raises BadImage.
    """
    if values.ndim == 3 and values.shape[2] != in_chans == values.shape[0] and values.shape[2] > 4:
        values = values.transpose(1, 2, 0)
    if values.ndim not in (2, 3) or 0 in values.shape:
        raise BadImage(f"an array of shape {tuple(values.shape)} is no image: it must be [H, W] or [H, W, C]")
    values = values if values.ndim == 3 else values[:, :, None]
    refuse_bomb(values.shape[1], values.shape[0], values.shape[2] * values.dtype.itemsize)
    if values.dtype == bool:
        values = values.astype(np.uint8) * 255
    if values.dtype != np.uint8:
        values = _scaled(values, value_range)
    elif values.shape[2] != in_chans and values.shape[2] in MODES and in_chans in MODES:
        image = Image.fromarray(values[:, :, 0] if values.shape[2] == 1 else np.ascontiguousarray(values))
        return from_pil(image, in_chans, value_range)
    return torch.from_numpy(np.array(_channels(values, in_chans).transpose(2, 0, 1), order="C"))


def _scaled(values: np.ndarray, value_range: ValueRange) -> np.ndarray:
    """Numbers of more than 8 bits -> float32 in [0, 255]."""
    if values.dtype.kind not in "iuf":
        raise BadImage(f"pixels of type {values.dtype} are no numbers")
    real = values.dtype.kind == "f"
    if value_range is not None:
        low, high = value_range
        scaled = (values.astype(np.float32) - np.float32(low)) * np.float32(255 / (high - low))
        return np.nan_to_num(scaled, nan=0.0, posinf=255.0, neginf=0.0).clip(0, 255)
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= (1 if real else 65535)):  # also with NaN
        limit = "0 .. 1, as those of floats must" if real else "0 .. 65535"
        raise BadImage(f"its pixels lie in {low:g} .. {high:g}, not in {limit}: set data.value_range=[low,high]")
    return (values.astype(np.float32) * 255) if real else values.astype(np.float32) / 257  # 65535 / 257 = 255


def _channels(pixels: np.ndarray, in_chans: int) -> np.ndarray:
    """[H, W, C] -> [H, W, in_chans], by the rules of `decode`."""
    have = pixels.shape[2]
    if have == in_chans:
        return pixels
    if have in MODES and in_chans in MODES:
        colour = pixels[:, :, :3] if have > 2 else pixels[:, :, :1]
        alpha = pixels[:, :, -1:] if have in (2, 4) else np.full_like(pixels[:, :, :1], 255)
        if in_chans < 3 and have > 2:
            colour = colour @ np.array(GRAY, colour.dtype)[:, None]
        elif in_chans > 2 and have < 3:
            colour = np.concatenate([colour] * 3, 2)
        return np.concatenate([colour, alpha], 2) if in_chans in (2, 4) else colour
    raise BadImage(f"it has {have} channels, and data.in_chans={in_chans}")


def from_pil(image: Image.Image, in_chans: int, value_range: ValueRange = None) -> Tensor:
    if in_chans not in MODES:
        raise BadImage(f"an image file of this kind gives 1 to 4 channels, and data.in_chans={in_chans}")
    if image.mode.startswith("I") or image.mode == "F":  # 16 or 32 bits: one channel
        return from_array(np.asarray(image), in_chans, value_range)
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # straight to RGB would warn, and lose what the palette says of transparency
    pixels = torch.from_numpy(np.array(image.convert(MODES[in_chans])))
    return pixels.unsqueeze(0) if pixels.ndim == 2 else pixels.permute(2, 0, 1)


def refuse_bomb(width: int, height: int, pixel_bytes: int = 1) -> None:
    """Raises BadImage for a size, as a header says it, that would take too much memory. pixel_bytes: all channels."""
    if width * height > MAX_PIXELS:
        raise BadImage(f"it has more than {MAX_PIXELS / 1e6:.0f} million pixels, {width}x{height}")
    if width * height * pixel_bytes > MAX_UNPACKED:
        raise BadImage(f"it has {width}x{height} pixels of {pixel_bytes} bytes, more than {MAX_UNPACKED >> 20} MiB")
