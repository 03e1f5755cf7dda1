"""From the bytes of a file to a tensor of as many channels as the encoder wants, or BadImage with the reason."""

import io
import warnings

import numpy as np
import torch
from PIL import Image
from torch import Tensor

try:  # twice as fast as PIL; deprecated since torchvision 0.29
    from torchvision.io import ImageReadMode, decode_jpeg

    TORCHVISION_MODES = {1: ImageReadMode.GRAY, 3: ImageReadMode.RGB}
except ImportError:
    TORCHVISION_MODES = {}

JPEG = b"\xff\xd8\xff"
MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
MAX_PIXELS = 178_956_970  # beyond it PIL takes a file for a decompression bomb, and so do we


class BadImage(Exception):
    """A file that cannot be read as an image; the text says why."""


def decode(data: bytes, in_chans: int) -> Tensor:
    """Bytes of an image file -> [in_chans, H, W] uint8, or float32 in [0, 255] where the file has more than 8 bits.

    Colour becomes gray by ITU-R 601 weights and gray becomes colour by repetition; an alpha channel is dropped unless
    in_chans asks for it (2: gray and alpha, 4: colour and alpha). JPEG goes through torchvision, everything else
    through PIL; both give the same pixels and both refuse truncated files.
    """
    if not data:
        raise BadImage("the file is empty")
    try:
        if data.startswith(JPEG) and in_chans in TORCHVISION_MODES:
            _refuse_bomb(*_jpeg_size(data))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of a buffer that is not writable, and of the deprecation
                return decode_jpeg(torch.frombuffer(data, dtype=torch.uint8), TORCHVISION_MODES[in_chans])
        with Image.open(io.BytesIO(data)) as image:
            _refuse_bomb(*image.size)
            return _convert(image, in_chans)
    except BadImage:
        raise
    except Image.DecompressionBombError as error:
        raise BadImage(f"it has more than {MAX_PIXELS / 1e6:.0f} million pixels") from error
    except (
        Exception
    ) as error:  # decoders raise whatever they like: OSError, RuntimeError, SyntaxError, struct.error ...
        raise BadImage(_first_line(error)) from error


def _convert(image: Image.Image, in_chans: int) -> Tensor:
    if in_chans not in MODES:
        raise BadImage(f"an image file gives 1 to 4 channels, and data.in_chans={in_chans}")
    if image.mode.startswith("I") or image.mode == "F":  # 16 or 32 bits: one channel
        values = np.asarray(image).astype(np.float32)
        if image.mode == "F":
            raise BadImage("its pixels are 32-bit floats, whose range is unknown")
        if values.min() < 0 or values.max() > 65535:
            raise BadImage(f"its 32-bit pixels lie in {values.min():.0f} .. {values.max():.0f}, not in 0 .. 65535")
        gray = torch.from_numpy(values / 257).unsqueeze(0)  # 65535 / 257 = 255
        alpha = torch.full_like(gray, 255)
        return torch.cat({1: [gray], 2: [gray, alpha], 3: [gray] * 3, 4: [gray] * 3 + [alpha]}[in_chans])
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # straight to RGB would warn, and lose what the palette says of transparency
    pixels = torch.from_numpy(np.array(image.convert(MODES[in_chans])))
    return pixels.unsqueeze(0) if pixels.ndim == 2 else pixels.permute(2, 0, 1)


def _refuse_bomb(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise BadImage(f"it has more than {MAX_PIXELS / 1e6:.0f} million pixels, {width}x{height}")


def _jpeg_size(data: bytes) -> tuple[int, int]:
    """(width, height) from the frame header, so that a small file cannot ask for a huge picture."""
    at = 2
    while at + 9 < len(data):
        if data[at] != 0xFF:
            break
        marker = data[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return int.from_bytes(data[at + 7 : at + 9], "big"), int.from_bytes(data[at + 5 : at + 7], "big")
        else:
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    raise BadImage("it starts like a JPEG but has no frame header")


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    line = text[0] if text else type(error).__name__
    return line.split("decode_jpeg.cpp:")[-1].split(", ", 1)[-1][:200]
