"""Folders of images with a mask for each: open, read and check them, and make the targets of patches."""

from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..data import Config as DataConfig
from ..data.sources.folder import Folder
from ..errors import UserError

UNKNOWN = 255
PALETTE_SIZE = 256


class Masked:
    """A folder of images with a mask for each."""

    def __init__(self, spec: str, config: DataConfig) -> None:
        """spec: the folder, as the user named it. config: how its images are read. Raises UserError."""
        root = Path(spec).expanduser()
        for part in ("images", "masks"):
            if not (root / part).is_dir():
                raise UserError(f"{spec} has no folder {part}: segmentation needs {spec}/images and {spec}/masks.")
        self.spec, self.images = spec, Folder(root / "images", config)
        files = [p for p in sorted((root / "masks").rglob("*")) if p.suffix.lower() == ".png" and p.name[0] != "."]
        masks = {p.relative_to(root / "masks").with_suffix(""): p for p in files}
        paths = (Path(self.images.name(i)) for i in range(len(self.images)))
        names = [path.relative_to(root / "images").with_suffix("") for path in paths]
        counts = Counter(names)
        for missing, what in (
            ([n for n in names if n not in masks], "image {} has no mask of its name (.png)"),
            ([n for n in masks if n not in counts], "mask {} has no image of its name"),
        ):
            if missing:
                more = f", and {len(missing) - 1} others" if len(missing) > 1 else ""
                raise UserError(f"{spec}: {what.format(missing[0])}{more}.")
        twice = [name for name, count in counts.items() if count > 1]
        if twice:
            raise UserError(f"{spec}: two images are called {twice[0]}, and its mask could be of either: rename one.")
        self.paths = [masks[name] for name in names]

    def __len__(self) -> int:
        return len(self.images)

    def mask(self, index: int) -> Tensor:
        """[H, W] int64. Raises UserError."""
        return read_mask(self.paths[index])


def read_mask(path: Path) -> Tensor:
    """[H, W] int64 classes of the pixels, the numbers in the file. Raises UserError."""
    try:
        with Image.open(path) as image:
            if len(image.getbands()) != 1:
                raise UserError(
                    f"The mask {path} has colours ({image.mode}): it must have one channel with the class of each "
                    "pixel, with a palette or without."
                )
            return torch.from_numpy(np.array(image).astype(np.int64))
    except UserError:
        raise
    except Exception as error:  # decoders raise exceptions of any kind
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"The mask {path} cannot be read: {reason}.") from error


def count_classes(train: Masked, order: Tensor) -> int:
    """One more than the largest class in the masks of some images. Raises UserError for fewer than two classes."""
    seen: set[int] = set()
    for number in order.tolist():
        seen |= set(train.mask(number).unique().tolist())
    classes = sorted(seen - {UNKNOWN})
    if classes and not 0 <= classes[0] <= classes[-1] < UNKNOWN:
        raise UserError(f"The masks of {train.spec} have the class {classes[-1]}: classes are 0 .. 254.")
    if len(classes) < 2:
        raise UserError(f"The masks of {train.spec} have one class only, {classes}: segment needs two or more.")
    return classes[-1] + 1


def check_classes(mask: Tensor, num_classes: int, path: Path, train: str) -> None:
    """Raises UserError for a class that the training masks do not have."""
    known = mask[mask != UNKNOWN]
    if len(known) and not 0 <= int(known.min()) <= int(known.max()) < num_classes:
        raise UserError(
            f"The mask {path} has the class {int(known.max())}, and those of {train} end at {num_classes - 1}."
        )


def check_shape(masked: Masked, number: int, shape: tuple[int, int]) -> None:
    """Raises UserError for a mask of another shape than its image (of any size): a turned one, or another image's."""
    with Image.open(masked.paths[number]) as mask:
        width, height = mask.size
    if abs(height * shape[1] - width * shape[0]) > sum(shape):  # half a pixel of rounding at each side
        raise UserError(
            f"The mask {masked.paths[number]} has {height} x {width} pixels, and its image {shape[0]} x {shape[1]}: "
            "they must have the same shape."
        )


def patch_targets(mask: Tensor, grid: tuple[int, int], num_classes: int) -> tuple[Tensor, Tensor]:
    """[H, W] -> [P, C] float32 shares of the classes among a patch's known pixels, and [P] share of known pixels.

    The edge of a patch may cut a pixel of the mask, since the image is resized: the part inside counts.
    """
    known = area((mask != UNKNOWN).float(), grid)
    shares = torch.zeros(grid[0] * grid[1], num_classes)
    for c in mask.unique().tolist():
        if c != UNKNOWN:
            shares[:, c] = area((mask == c).float(), grid)
    return shares / known.clamp(min=1e-6).unsqueeze(1), known


def area(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """[H, W] -> [P] means over the cells of a grid, exact where its lines cut pixels.

    Computed by two matrix products with the share of each pixel in each cell.
    """

    def shares(pixels: int, cells: int) -> Tensor:
        edges = torch.arange(cells + 1, dtype=torch.float64) * pixels / cells
        left = torch.arange(pixels, dtype=torch.float64)
        overlap = torch.minimum(edges[1:, None], left + 1) - torch.maximum(edges[:-1, None], left)
        return (overlap.clamp(min=0) * cells / pixels).float()

    return (shares(x.shape[0], grid[0]) @ x @ shares(x.shape[1], grid[1]).t()).flatten()


def colours(classes: Tensor) -> Tensor:
    """[H, W] classes -> [3, H, W] colours: black for 0, white for unknown, and hues far apart for the others."""
    number = torch.arange(PALETTE_SIZE, dtype=torch.float64)
    turn = number * 0.618034  # the golden angle: neighbours are far apart
    light = 1 - 0.35 * (number % 3 == 0) * (number > 0)
    palette = torch.stack([0.55 + 0.45 * torch.cos(2 * torch.pi * (turn - third)) for third in (0, 1 / 3, 2 / 3)], 1)
    palette = 255 * palette * light.unsqueeze(1)
    palette[0], palette[UNKNOWN] = 0, 255
    return palette.float()[classes].permute(2, 0, 1)
