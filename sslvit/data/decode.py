"""From the bytes of a file to a tensor of as many channels as the encoder wants, or BadImage with the reason."""

import io
import warnings
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import UserError

try:  # twice as fast as PIL; deprecated since torchvision 0.29
    from torchvision.io import ImageReadMode, decode_jpeg

    TORCHVISION_MODES = {1: ImageReadMode.GRAY, 3: ImageReadMode.RGB}
except ImportError:
    TORCHVISION_MODES = {}

JPEG, PNG, NPY, DICOM = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"\x93NUMPY", b"DICM"
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
MAX_PIXELS = 178_956_970  # beyond it PIL takes a file for a decompression bomb, and so do we
SMALLER_FROM = 2_000_000  # pixels of a JPEG from which reading it at a smaller scale, by PIL, is faster than all of it
MAX_UNPACKED = 2**30  # bytes of an image of more than 8 bits or 4 channels, before it becomes float32
GRAY = (0.299, 0.587, 0.114)  # ITU-R 601, as PIL
ValueRange = tuple[float, float] | None
Reduction = Callable[[int, int], int]  # (height, width) of a whole image -> 1, 2, 4 or 8 times smaller will do


class BadImage(Exception):
    """A file that cannot be read as an image; the text says why."""


def decode(data: bytes, in_chans: int, value_range: ValueRange = None) -> Tensor:
    """Bytes of an image file -> [in_chans, H, W] uint8, or float32 in [0, 255] where the file has more than 8 bits.

    Colour becomes gray by ITU-R 601 weights and gray becomes colour by repetition; an alpha channel is dropped unless
    in_chans asks for it (2: gray and alpha, 4: colour and alpha). JPEG goes through torchvision, everything else
    through PIL; both give the same pixels and both refuse truncated files. TIFF that is deep in colour or has many
    channels goes through tifffile, DICOM through pydicom.

    value_range: of pixels of more than 8 bits, the values that become 0 and 255; None: see `from_array`.
    """
    if not data:
        raise BadImage("the file is empty")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of read-only buffers, of a deprecation, of all that is odd in a file
        return _decode(data, in_chans, value_range)


def decode_smaller(
    data: bytes, in_chans: int, value_range: ValueRange, reduction: Reduction
) -> tuple[Tensor, tuple[int, int]]:
    """(image, its whole height and width): as `decode`, but a large JPEG may come at half, a quarter or an eighth of
    its scale, as libjpeg can leave out the frequencies that would be lost: 12 million pixels take a core 27, 20 or 16
    ms instead of 44. (The rest is unpacking, which cannot be left out.)

    reduction: told the whole height and width, how many times smaller the image may be: 1, 2, 4 or 8.
    """
    scale = 1
    if data.startswith(JPEG) and in_chans in TORCHVISION_MODES:
        try:
            width, height = _jpeg_size(data)
        except (BadImage, IndexError):
            width = height = 0  # `decode` says what is wrong
        if SMALLER_FROM <= width * height <= MAX_PIXELS:
            scale = reduction(height, width)
    if scale == 1:
        image = decode(data, in_chans, value_range)
        return image, (image.shape[-2], image.shape[-1])
    try:
        with warnings.catch_warnings(), Image.open(io.BytesIO(data)) as image:
            warnings.simplefilter("ignore")
            image.draft("L" if in_chans == 1 else image.mode, (width // scale, height // scale))
            return _convert(image, in_chans, value_range), (height, width)
    except Exception as error:
        raise BadImage(_first_line(error)) from error


def _decode(data: bytes, in_chans: int, value_range: ValueRange) -> Tensor:
    try:
        if data.startswith(JPEG) and in_chans in TORCHVISION_MODES:
            refuse_bomb(*_jpeg_size(data))
            return decode_jpeg(torch.frombuffer(data, dtype=torch.uint8), TORCHVISION_MODES[in_chans])
        if data.startswith(PNG) and data[24:25] == b"\x10" and data[25:26] in (b"\2", b"\4", b"\6"):
            return _deep_png(data, in_chans, value_range)
        if data.startswith(NPY):
            return from_array(_npy(data), in_chans, value_range)
        if data[128:132] == DICOM:
            from . import dicom

            return dicom.decode_dicom(data, in_chans, value_range)
        if data.startswith(TIFF):
            from . import tiff

            if tiff.is_deep(data, in_chans):
                return tiff.decode_tiff(data, in_chans, value_range)
        with Image.open(io.BytesIO(data)) as image:
            refuse_bomb(*image.size)
            return _convert(image, in_chans, value_range)
    except BadImage:
        raise
    except UserError as error:  # a package that is missing
        raise BadImage(str(error)) from error
    except Image.DecompressionBombError as error:
        raise BadImage(f"it has more than {MAX_PIXELS / 1e6:.0f} million pixels") from error
    except (
        Exception
    ) as error:  # decoders raise whatever they like: OSError, RuntimeError, SyntaxError, struct.error ...
        raise BadImage(_first_line(error)) from error


def from_array(values: np.ndarray, in_chans: int, value_range: ValueRange = None) -> Tensor:
    """[H, W] or [H, W, C] of any numbers -> [in_chans, H, W] uint8 for uint8 and bool, else float32 in [0, 255].

    Without a value_range, integers lie in 0 .. 65535 and floats in 0 .. 1, and others are refused; with one, what lies
    outside is cut off and what is no number becomes 0. An array whose last axis is not in_chans long and whose first
    one is, is taken for [C, H, W]. Raises BadImage.
    """
    if values.ndim == 3 and values.shape[2] != in_chans == values.shape[0] and values.shape[2] > 4:
        values = values.transpose(1, 2, 0)
    if values.ndim not in (2, 3) or 0 in values.shape:
        raise BadImage(f"an array of shape {tuple(values.shape)} is no image: it must be [H, W] or [H, W, C]")
    values = values if values.ndim == 3 else values[:, :, None]
    refuse_bomb(values.shape[1], values.shape[0], values.shape[2] * values.dtype.itemsize)
    if values.dtype == bool:
        values = values.astype(np.uint8) * 255
    if values.dtype == np.uint8:
        if values.shape[2] != in_chans and values.shape[2] in MODES and in_chans in MODES:
            image = Image.fromarray(values[:, :, 0] if values.shape[2] == 1 else np.ascontiguousarray(values))
            return _convert(image, in_chans, value_range)
        return torch.from_numpy(np.array(_channels(values, in_chans).transpose(2, 0, 1), order="C"))
    return torch.from_numpy(np.array(_channels(_scaled(values, value_range), in_chans).transpose(2, 0, 1), order="C"))


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
    if not (low >= 0 and high <= (1 if real else 65535)):  # also what is no number
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
            colour = sum(weight * colour[:, :, i : i + 1] for i, weight in enumerate(GRAY))
        elif in_chans > 2 and have < 3:
            colour = np.concatenate([colour] * 3, 2)
        return np.concatenate([colour, alpha], 2) if in_chans in (2, 4) else colour
    raise BadImage(f"it has {have} channels, and data.in_chans={in_chans}")


def _convert(image: Image.Image, in_chans: int, value_range: ValueRange = None) -> Tensor:
    if in_chans not in MODES:
        raise BadImage(f"an image file of this kind gives 1 to 4 channels, and data.in_chans={in_chans}")
    if image.mode.startswith("I") or image.mode == "F":  # 16 or 32 bits: one channel
        return from_array(np.asarray(image), in_chans, value_range)
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # straight to RGB would warn, and lose what the palette says of transparency
    pixels = torch.from_numpy(np.array(image.convert(MODES[in_chans])))
    return pixels.unsqueeze(0) if pixels.ndim == 2 else pixels.permute(2, 0, 1)


def _deep_png(data: bytes, in_chans: int, value_range: ValueRange) -> Tensor:
    """16 bits in two or more channels, of which PIL would keep the upper 8.

    PIL's unpacker keeps one byte of two: asked for the wrong byte order it gives the lower one. torchvision reads these
    files in one go, but its decode_png ends the process (segmentation fault) on 4 % of files with three damaged bytes.
    """

    channels = {2: 3, 4: 2, 6: 4}[data[25]]

    def unpacked(layout: str) -> np.ndarray:
        with Image.open(io.BytesIO(data)) as image:
            refuse_bomb(*image.size, 2 * channels)
            tile = image.tile[0]
            image.tile = [tile._replace(args=layout) if hasattr(tile, "_replace") else (*tile[:3], layout)]
            return np.array(image)

    if channels == 2:  # four bytes a pixel, as those of colour with alpha
        pairs = unpacked("RGBA")
        return from_array(pairs[:, :, 0::2].astype(np.uint16) << 8 | pairs[:, :, 1::2], in_chans, value_range)
    upper, lower = (unpacked(f"{MODES[channels]};16{order}") for order in "BL")
    return from_array(upper.astype(np.uint16) << 8 | lower, in_chans, value_range)


def _npy(data: bytes) -> np.ndarray:
    """An array file in memory. Its header is believed only as far as there are bytes."""
    stream = io.BytesIO(data)
    version = np.lib.format.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise BadImage(f"it is an array file of version {version[0]}, not 1 or 2")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(stream)
    size = dtype.itemsize
    for length in shape:
        size *= length
    if dtype.hasobject or size != len(data) - stream.tell():
        raise BadImage(f"it holds no array of shape {shape} and type {dtype}, as its header says")
    values = np.frombuffer(data, dtype, offset=stream.tell())
    return values.reshape(shape, order="F" if fortran else "C")


def refuse_bomb(width: int, height: int, pixel_bytes: int = 1) -> None:
    """Raises BadImage for what a header says that no memory should be asked for. pixel_bytes: of all channels."""
    if width * height > MAX_PIXELS:
        raise BadImage(f"it has more than {MAX_PIXELS / 1e6:.0f} million pixels, {width}x{height}")
    if width * height * pixel_bytes > MAX_UNPACKED:
        raise BadImage(f"it has {width}x{height} pixels of {pixel_bytes} bytes, more than {MAX_UNPACKED >> 20} MiB")


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
