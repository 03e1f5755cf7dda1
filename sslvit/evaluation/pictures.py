"""Pictures of a result, drawn with PIL only: grids of images with captions, as PNG files."""

import io
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
from torch import Tensor

from ..checkpoints import textfile
from ..distributed import rank, say
from ..errors import UserError

INK, PAPER = (20, 20, 20), (255, 255, 255)
MARK = "sslvit"  # written into the file: only pictures with this mark are replaced
LONGEST = 24  # letters of a caption
TEXT = 13  # pixels of a letter
# Tried where PIL's own font lacks a letter, wherever the system keeps them: of Linux, macOS and Windows.
FONTS = (
    "DejaVuSans.ttf", "NotoSans-Regular.ttf", "NotoSansCJK-Regular.ttc", "wqy-microhei.ttc", "Arial Unicode.ttf",
    "PingFang.ttc", "msyh.ttc", "arial.ttf",
)  # fmt: skip


def check(path: str) -> None:
    """Before the work: raises UserError if `path` cannot be written, or is a file that sslvit did not draw."""
    file = Path(path).expanduser()
    if not path:
        return
    if file.suffix.lower() != ".png":
        raise UserError(f"picture={path} must end in .png.")
    if not file.parent.is_dir():
        raise UserError(f"picture={path}: there is no folder {file.parent}, make it first.")
    if file.exists() and not (file.is_file() and _ours(file)):  # reading a pipe would wait for ever
        raise UserError(f"picture={path} exists and was not drawn by sslvit: give another name.")


def save(image: Image.Image, path: str) -> None:
    """Write a PNG on the first process; replaces the one of an earlier evaluation. Raises UserError."""
    if rank() == 0:
        mark = PngImagePlugin.PngInfo()
        mark.add_text("Software", MARK)
        png = io.BytesIO()
        image.save(png, "PNG", pnginfo=mark)
        try:
            textfile.write(Path(path).expanduser(), png.getvalue())
        except OSError as error:
            raise UserError(f"The picture cannot be written to {path}: {error.strerror or error}.") from error
    say(f"picture in {path}")


def _ours(file: Path) -> bool:
    try:
        with Image.open(file) as image:
            return image.info.get("Software") == MARK
    except OSError:
        return False


@cache
def fonts(size: int) -> list[Any]:
    """PIL's own, which has Latin letters, and those of this machine that have more."""
    found: list[Any] = [ImageFont.load_default(size)]
    for name in FONTS:
        with suppress(OSError):
            found.append(ImageFont.truetype(name, size))
    return found


def font(size: int) -> Any:
    """PIL's own, for numbers."""
    return fonts(size)[0]


def font_for(text: str, size: int) -> Any:
    """The first font that has all letters of a text, or else most."""
    return max(fonts(size), key=lambda one: sum(_has(one, letter) for letter in text))  # max takes the first of equals


def drawable(text: str) -> str:
    """The text, with letters that its font lacks as their codes: boxes would all look alike."""
    one = font_for(text, TEXT)
    return "".join(letter if _has(one, letter) else letter.encode("unicode_escape").decode() for letter in text)


@cache
def _has(one: Any, letter: str) -> bool:
    missing = "\U0010ffff"  # no font has it
    return letter.isascii() or bytes(one.getmask(letter)) != bytes(one.getmask(missing))


def text_width(text: str, size: int) -> int:
    return round(font_for(text, size).getlength(text))


def shorten(text: str, longest: int = LONGEST) -> str:
    return text if len(text) <= longest else text[: longest - 2] + ".."


def image_of(pixels: Tensor, size: tuple[int, int] | None = None, smooth: bool = False) -> Image.Image:
    """[C, H, W], uint8 or float in [0, 255], of any number of channels -> RGB, enlarged or reduced to (h, w).

    One or two channels: the first in gray. Four and more: the first three.
    """
    pixels = pixels.detach().cpu().float().round().clamp(0, 255).to(torch.uint8)
    pixels = pixels[:1].expand(3, -1, -1) if len(pixels) < 3 else pixels[:3]
    image = Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy()))
    if size is None or (image.height, image.width) == tuple(size):
        return image
    return image.resize((size[1], size[0]), Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST)


def cell_size(size: tuple[int, int], side: int) -> tuple[int, int]:
    """(h, w) of a drawn image: enlarged by a whole factor to at most `side` pixels, or reduced to twice that."""
    factor = side // max(size) if max(size) <= side else min(1.0, 2 * side / max(size))
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


# Viridis (of matplotlib, CC0), which rises evenly in brightness and is readable without red and green.
VIRIDIS = "440154 482878 3e4989 31688e 26828e 1f9e89 35b779 6ece58 b5de2b fde725"


def heat(values: Tensor) -> Tensor:
    """[H, W] float -> [3, H, W] float in [0, 255]: from violet over green to yellow, between the 2nd and the 98th
    percentile of these values. So a map that is nearly even shows its differences too."""
    low, high = values.float().quantile(torch.tensor([0.02, 0.98]))
    return viridis((values.float() - low) / (high - low).clamp(min=1e-12))


def viridis(shares: Tensor) -> Tensor:
    """[H, W] float -> [3, H, W] float in [0, 255]: violet at 0 and below, yellow at 1 and above."""
    stops = torch.tensor([list(bytes.fromhex(colour)) for colour in VIRIDIS.split()], dtype=torch.float32)
    x = shares.float().clamp(0, 1) * (len(stops) - 1)
    below = x.floor().clamp(max=len(stops) - 2).long()
    share = (x - below).unsqueeze(-1)
    return (stops[below] * (1 - share) + stops[below + 1] * share).permute(2, 0, 1)


def montage(
    rows: Sequence[Sequence[Image.Image | None]],
    row_names: Sequence[str] = (),
    column_names: Sequence[str] = (),
    title: str = "",
    gap: int = 4,
) -> Image.Image:
    """A grid of images of one size, with a caption beside each row and above each column. None is an empty cell."""
    cell = next(image for row in rows for image in row if image is not None)
    columns, text = max(len(row) for row in rows), TEXT
    row_names, column_names, title = [*map(drawable, row_names)], [*map(drawable, column_names)], drawable(title)
    left = max([0, *(text_width(shorten(name, 40), text) for name in row_names)]) + (2 * gap if row_names else 0)
    upright = any(text_width(name, text) > cell.width for name in column_names)
    names = [shorten(name) for name in column_names]
    above = (max([0, *(text_width(name, text) for name in names)]) if upright else text + 2) if names else 0
    top = above + gap + (text + 8 if title else 0)
    width = left + gap + columns * (cell.width + gap)
    if title:
        width = max(width, text_width(title, text) + 2 * gap)
    sheet = Image.new("RGB", (width, top + len(rows) * (cell.height + gap)), PAPER)
    draw = ImageDraw.Draw(sheet)
    if title:
        draw.text((gap, 2), title, INK, font_for(title, text))
    for c, name in enumerate(names):
        x = left + gap + c * (cell.width + gap)
        if upright:
            write_upright(sheet, name, (x + cell.width // 2, top - gap), text)
        else:
            draw.text((x + cell.width // 2, top - gap - 3), name, INK, font_for(name, text), anchor="ms")  # on one line
    for r, row in enumerate(rows):
        y = top + r * (cell.height + gap)
        if row_names:
            draw.text(
                (left, y + cell.height // 2), shorten(row_names[r], 40), INK, font_for(row_names[r], text), anchor="rm"
            )
        for c, image in enumerate(row):
            if image is not None:
                sheet.paste(image, (left + gap + c * (cell.width + gap), y))
    return sheet


def stacked(sheets: Sequence[Image.Image], gap: int = 4) -> Image.Image:
    """One below the other, on white."""
    height = sum(sheet.height for sheet in sheets) + gap * (len(sheets) - 1)
    whole, top = Image.new("RGB", (max(sheet.width for sheet in sheets), height), PAPER), 0
    for sheet in sheets:
        whole.paste(sheet, (0, top))
        top += sheet.height + gap
    return whole


def write_upright(sheet: Image.Image, text: str, foot: tuple[int, int], size: int) -> None:
    """Write text that is read from bottom to top, centred on the column of `foot` (x, y), its beginning above it."""
    box = Image.new("RGB", (text_width(text, size) + 2, size + 4), PAPER)
    ImageDraw.Draw(box).text((1, (size + 4) // 2), text, INK, font_for(text, size), anchor="lm")
    box = box.rotate(90, expand=True)
    sheet.paste(box, (foot[0] - box.width // 2, foot[1] - box.height))


def thumbnail(pixels: Tensor, side: int) -> Image.Image:
    """[C, H, W] of any size -> the whole image inside a square of `side` pixels, on white."""
    h, w = pixels.shape[-2:]
    factor = side / max(h, w)
    square = Image.new("RGB", (side, side), PAPER)
    image = image_of(pixels, (max(1, round(h * factor)), max(1, round(w * factor))), smooth=factor < 1)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square
