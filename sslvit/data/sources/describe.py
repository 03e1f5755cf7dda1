"""What an image file is, apart from its pixels: for the report that `sslvit data` gives."""

import io
import warnings

from PIL import Image

from .decode import DICOM, NPY, PNG
from .files import Encoded
from .several import Several
from .source import Source

MODES = {
    "1": "1-bit gray", "L": "gray", "LA": "gray with alpha", "P": "palette", "PA": "palette with alpha",
    "RGB": "colour", "RGBA": "colour with alpha", "RGBX": "colour", "CMYK": "CMYK", "YCbCr": "colour", "LAB": "Lab",
    "I": "32-bit gray", "F": "float gray", "HSV": "colour",
}  # fmt: skip
DEEP_PNG = {2: "16-bit colour", 4: "16-bit gray with alpha", 6: "16-bit colour with alpha"}


def encoded(source: Source, index: int) -> bytes | None:
    """The bytes of an image file; None for images that are not stored as files. Raises BadImage."""
    if isinstance(source, Several):
        return encoded(*source.place(index))
    return source.bytes_of(index) if isinstance(source, Encoded) else None


def describe(data: bytes) -> tuple[str, str, int]:
    """(format, channels and depth, pages), as far as the header of a readable file says so."""
    if data.startswith(NPY):
        return "npy", "array", 1
    if data[128:132] == DICOM:
        return "DICOM", "DICOM", 1
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data)) as image:
                kind, mode, pages = str(image.format), image.mode, int(getattr(image, "n_frames", 1))
                bits = max(image.tag_v2.get(258, (8,))) if kind == "TIFF" else 8
    except Exception:  # PIL cannot open what tifffile can
        return "TIFF", "many channels", 1
    if data.startswith(PNG) and data[24] == 16 and data[25] in DEEP_PNG:
        return kind, DEEP_PNG[data[25]], pages
    text = "16-bit gray" if mode.startswith("I;16") else MODES.get(mode, mode)
    return kind, f"{bits}-bit {text}" if bits > 8 and mode in ("RGB", "RGBA", "LA") else text, pages
