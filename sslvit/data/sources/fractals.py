"""Images from a formula: fractals of iterated function systems, one class for each set of parameters.

FractalDB (Kataoka et al., "Pre-training without Natural Images", ACCV 2020, section 3): a class is a random set of 2
to 8 affine maps. A map is applied with a probability proportional to the absolute value of its determinant. The class
is accepted if its attractor fills enough of the picture. The images of a class vary one parameter by up to 20 % and
flip the picture. Here an image has one of the 8 symmetries of the square instead of the 4 flips, and a foreground and a
background colour of its own, so colours do not say which class it is. But k-NN on raw pixels does: 99.3 % of 2,000
images by 10,000. These images show whether training works, not how good a method is. Every image is a function of
(seed, split, index): nothing is downloaded.
"""

import numpy as np
import torch
from torch import Tensor

from ... import rng
from ...errors import UserError
from ..config import Config
from .source import Source

PARTICLES, BURN_IN = 256, 16
MIN_FILL = 0.2  # share of pixels that the attractor of a class must reach; FractalDB's filling rate
OPTIONS = {"classes": 20, "count": 0, "size": 0, "seed": 0}
COUNTS = {"train": 10_000, "test": 2_000}


def open_fractals(spec: str, config: Config) -> "Fractals":
    """`fractals`, `fractals:test`, `fractals:train,classes=50,count=20000,size=64,seed=1`."""
    split, options = "train", dict(OPTIONS)
    for option in spec.removeprefix("fractals").lstrip(":").split(","):
        key, equals, value = option.partition("=")
        if not equals and key in COUNTS:
            split = key
        elif key in options and value.isdigit():
            options[key] = int(value)
        elif option:
            raise UserError(
                f"data: {spec} has the option {option}: after the colon come {' or '.join(COUNTS)} and numbers for "
                f"{', '.join(OPTIONS)}, as in fractals:train,classes=20,count=10000,size=32."
            )
    if options["classes"] < 1:
        raise UserError(f"data: {spec} must have at least one class.")
    count, size = options["count"] or COUNTS[split], options["size"] or int(np.max(config.image_size))
    return Fractals(split, options["classes"], count, size, options["seed"], config.in_chans)


class Fractals(Source):
    """`count` images of `size` x `size` pixels in `classes` classes; image i has label i % classes."""

    def __init__(
        self, split: str = "train", classes: int = 20, count: int = 10_000, size: int = 32, seed: int = 0,
        in_chans: int = 3,
    ) -> None:  # fmt: skip
        self.split, self.count, self.size, self.seed, self.in_chans = split, count, size, seed, in_chans
        self.key = rng.fold_in(seed, "fractals")
        self.systems = [_system(rng.fold_in(self.key, "class", c)) for c in range(classes)]
        self.classes = [f"fractal{c:04d}" for c in range(classes)]
        self.labels = np.arange(count, dtype=np.int64) % classes

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        return f"fractals:{self.split}[{index}]"

    def identity(self) -> str:
        return self.fingerprint()

    def fingerprint(self) -> str:
        return f"fractals-1:{self.split},{len(self.classes)},{self.count},{self.size},{self.seed},{self.in_chans}"

    def read(self, index: int) -> Tensor:
        key = rng.fold_in(self.key, self.split, index)
        u = rng.uniform(rng.fold_in(key, "look"), 9).numpy()
        maps = self.systems[int(self.labels[index])].copy()
        maps[:, int(u[0] * 6)] *= 0.8 + 0.4 * u[1]
        density = _render(maps, key, self.size)
        if u[2] < 0.5:
            density = density[::-1]
        if int(u[2] * 4) % 2:
            density = density[:, ::-1]
        if u[3] < 0.5:
            density = density.T
        # One is darker than the other by 0.3 to 0.6 in every channel, and neither leaves [0, 1].
        background = 0.25 * u[4] + 0.15 * rng.uniform(rng.fold_in(key, "background"), self.in_chans).numpy()
        foreground = background + 0.3 + 0.3 * rng.uniform(rng.fold_in(key, "foreground"), self.in_chans).numpy()
        if u[5] < 0.5:
            background, foreground = foreground, background
        image = background[:, None, None] + (foreground - background)[:, None, None] * density
        return torch.from_numpy(np.rint(image * 255).astype(np.uint8))


def _system(key: Tensor) -> np.ndarray:
    """The first random system from this key whose attractor fills the picture: [n, 6] float64, rows (a, b, c, d, e, f)
    of the map (x, y) -> (a x + b y + e, c x + d y + f).

    Every map contracts, also when a parameter grows by 20 %: then the attractor is bounded. FractalDB draws from the
    same distribution and rejects what runs away when it is rendered.
    """
    attempt = 0
    while True:
        candidate = rng.fold_in(key, attempt)
        n = 2 + int(rng.uniform(rng.fold_in(candidate, "maps"), 1) * 7)
        maps = rng.uniform(rng.fold_in(candidate, "parameters"), 6 * 64).double().numpy().reshape(64, 6) * 2 - 1
        maps = maps[np.linalg.norm(maps[:, :4].reshape(-1, 2, 2), ord=2, axis=(1, 2)) * 1.2 < 1.0][:n]
        if len(maps) == n and (_render(maps, rng.fold_in(candidate, "test"), 32) > 0).mean() > MIN_FILL:
            return maps
        attempt += 1


def _render(maps: np.ndarray, key: Tensor, size: int) -> np.ndarray:
    """Play the chaos game with many particles: [size, size] float64 in [0, 1], how often a pixel was hit (4 = full)."""
    steps = BURN_IN + -(-4 * size * size // PARTICLES)  # about four points for each pixel
    determinant = np.abs(maps[:, 0] * maps[:, 3] - maps[:, 1] * maps[:, 2])
    limits = np.cumsum(np.maximum(determinant, 0.01 * determinant.max()))
    draws = rng.uniform(rng.fold_in(key, "game"), steps * PARTICLES).double().numpy().reshape(steps, PARTICLES)
    choices = np.minimum(np.searchsorted(limits, draws * limits[-1], side="right"), len(maps) - 1)
    a, b, c, d, e, f = maps.T
    x = np.zeros(PARTICLES)
    y = np.zeros(PARTICLES)
    points = np.empty((steps - BURN_IN, 2, PARTICLES))
    for step, m in enumerate(choices):
        x, y = a[m] * x + b[m] * y + e[m], c[m] * x + d[m] * y + f[m]
        if step >= BURN_IN:
            points[step - BURN_IN] = x, y
    x, y = points[:, 0].ravel(), points[:, 1].ravel()
    margin = 0.5 + size / 64
    spread = max(np.ptp(x), np.ptp(y), 1e-9)
    column = ((x - (x.min() + x.max() - spread) / 2) / spread * (size - 2 * margin) + margin).astype(np.int64)
    row = ((y - (y.min() + y.max() - spread) / 2) / spread * (size - 2 * margin) + margin).astype(np.int64)
    hits = np.bincount(row * size + column, minlength=size * size).reshape(size, size)
    return np.minimum(hits, 4) / 4
