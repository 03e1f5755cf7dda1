"""From an array or a PIL image of any depth and number of channels to the tensor that the encoder takes."""

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .limits import HOW, MAX_BYTES, MAX_PIXELS, size_text
from .source import BadImage, ValueRange

MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}  # PIL's, by number of channels
BLOCK = 2**20  # values that are scaled at a time
GRAY = (0.299, 0.587, 0.114)  # ITU-R 601, as PIL
if Image.MAX_IMAGE_PIXELS and 2 * Image.MAX_IMAGE_PIXELS < MAX_PIXELS:
    Image.MAX_IMAGE_PIXELS = -(-MAX_PIXELS // 2)  # PIL refuses images of twice as many


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
    refuse_bomb(values.shape[1], values.shape[0], values.shape[2], values.dtype.itemsize)
    if values.dtype == bool:
        values = values.astype(np.uint8) * 255
    if values.dtype != np.uint8:
        return torch.from_numpy(
            np.ascontiguousarray(_channels(_scaled(values, value_range), in_chans).transpose(2, 0, 1))
        )
    if values.shape[2] != in_chans and values.shape[2] in MODES and in_chans in MODES:
        image = Image.fromarray(values[:, :, 0] if values.shape[2] == 1 else np.ascontiguousarray(values))
        return from_pil(image, in_chans, value_range)
    return torch.from_numpy(np.array(_channels(values, in_chans).transpose(2, 0, 1), order="C"))


def _scaled(values: np.ndarray, value_range: ValueRange) -> np.ndarray:
    """[H, W, C] numbers of more than 8 bits -> float32 in [0, 255], channel after channel in memory."""
    if values.dtype.kind not in "iuf":
        raise BadImage(f"pixels of type {values.dtype} are no numbers")
    real = values.dtype.kind == "f"
    if value_range is None:
        low, high = values.min(), values.max()
        if real and not np.isfinite([low, high]).all():
            raise BadImage("it has NaN or infinite pixels: with data.value_range=[low,high] they become black or white")
        if not (low >= 0 and high <= (1 if real else 65535)):
            limit = "0 .. 1, as those of floats must" if real else "0 .. 65535"
            raise BadImage(f"its pixels lie in {low:g} .. {high:g}, not in {limit}: set data.value_range=[low,high]")

    def scale(part: np.ndarray) -> np.ndarray:
        if value_range is None:
            return part * 255 if real else part / 257  # 65535 / 257 = 255
        scaled = (part - np.float32(value_range[0])) * np.float32(255 / (value_range[1] - value_range[0]))
        return np.nan_to_num(scaled, nan=0.0, posinf=255.0, neginf=0.0).clip(0, 255)

    return by_rows(lambda part: scale(part.astype(np.float32)), values)


def by_rows(function: Callable[[np.ndarray], np.ndarray], values: np.ndarray) -> np.ndarray:
    """function(values) as float32 for [H, W, C] values, of a few rows at a time: large temporary arrays would take more
    memory than the image. The channels of the result lie one after another in memory."""
    h, w, c = values.shape
    out = np.empty((c, h, w), np.float32).transpose(1, 2, 0)
    rows = max(1, BLOCK // (w * c))
    for top in range(0, h, rows):
        out[top : top + rows] = function(values[top : top + rows])
    return out


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
    wanted = MODES[in_chans]
    pixels = torch.from_numpy(np.array(image if image.mode == wanted else image.convert(wanted)))
    return pixels.unsqueeze(0) if pixels.ndim == 2 else pixels.permute(2, 0, 1)


def refuse_bomb(width: int, height: int, values: int = 1, value_bytes: int = 1) -> None:
    """Raises BadImage for a size, as a header says it, that would take too much memory. All decoders ask here first.

    values: of each pixel, all channels. value_bytes: of each; those of more than 8 bits become float32.
    """
    if width * height > MAX_PIXELS:
        raise BadImage(f"it has {width}x{height} pixels, more than {MAX_PIXELS / 1e6:.0f} million: {HOW}")
    needed = width * height * values * (1 if value_bytes == 1 else max(4, value_bytes))
    if needed > MAX_BYTES:
        raise BadImage(
            f"its {width}x{height} pixels of {values} numbers take {size_text(needed)}, more than "
            f"{size_text(MAX_BYTES)}: {HOW}"
        )
