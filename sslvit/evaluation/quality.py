"""The quality of a representation without labels: rank, spectrum, uniformity, alignment.

Each image passes the frozen encoder once unchanged, and in several augmented views (crops, flips and colours of DINO).

rankme      Effective rank of the features: the exponential of the entropy of their singular values, between 1 and the
            width. RankMe, Garrido et al., ICML 2023 (arXiv 2210.02885), section 3.
alpha       Decay of the spectrum of their covariance, eigenvalue i ~ i^-alpha. Near 1 is best; far above it there are
            only a few directions. alpha-ReQ, Agrawal et al., NeurIPS 2022 (arXiv 2202.05808), section 3.
lidar       Effective rank of the differences between images, relative to those between views of one image; between 1
            and the width. LiDAR, Thilak et al., ICLR 2024 (arXiv 2312.04000), section 4.
alignment   Mean squared distance of two views of an image at unit length, 0 to 4; low if the views agree.
uniformity  log of the mean of exp(-2 squared distance) over pairs of images at unit length, about -4 (spread over the
            sphere) to 0. Both: Wang and Isola, ICML 2020 (arXiv 2005.10242), section 4.
std         Standard deviation of a coordinate at unit length, times the root of the width: 1 if spread over the sphere,
            0 if collapsed. SimSiam, Chen and He, CVPR 2021 (arXiv 2011.10566), section 4.1.
agreement   Share of an image's 10 nearest neighbours that two views of it have in common, in percent.

None of them is accuracy: features can be spread and still not separate the classes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import rng
from ..data import Source
from ..data.augment import augment
from ..data.crops import Crop
from ..data.loader import Cropped
from ..distributed import on_first_process, say
from ..errors import UserError, check_range, check_share
from ..pretrained import Pixels
from . import Column, Command, records
from .config import Quality as Config
from .frozen import Frozen, describe_pool, load_frozen
from .knn import neighbours
from .subset import Subset

COMMAND = Command(
    "run=... data=...",
    "rank, uniformity and alignment of features, without labels",
    (Column("RankMe", "rankme", unit=""),),
)

NEIGHBOURS = 10
DELTA = 1e-4  # of LiDAR: added to the diagonal of the covariance within images before it is inverted


def run(config: Config) -> dict[str, float]:
    """Features, views, measures; prints a table and writes <run>/eval/quality.json. Raises UserError."""
    check_range("", config, 2, None, "views")
    check_range("", config, NEIGHBOURS + 2, None, "images")
    check_share("", config, "crop_scale")
    if not config.data:
        raise UserError("data is missing: quality needs images, labelled or not, data=<folder>.")
    frozen = load_frozen(config)
    source = frozen.open(config.data)
    if len(source) < NEIGHBOURS + 2:
        raise UserError(f"{config.data} has {len(source)} images: quality needs at least {NEIGHBOURS + 2}.")
    index = rng.permutation(rng.fold_in(config.seed, "quality"), len(source))[: config.images]
    chosen = Subset(source, index)
    encoder = frozen.encoder
    whole = frozen.features(chosen)
    results = on_first_process(lambda: measure(whole.values, augmented(config, frozen, chosen)))
    features = "pixels" if isinstance(encoder, Pixels) else describe_pool(frozen.pool)
    say(f"quality of {config.run}: {features}, {whole.values.shape[1]} wide, "
        f"{frozen.precision}; {len(whole)} images in {config.views} views")  # fmt: skip
    say(*records.table(list(results), [[f"{value:.2f}" for value in results.values()]]))
    frozen.save("quality", results, data=config.data, images=len(whole), width=whole.values.shape[1], features=features)
    return results


@torch.inference_mode()
def augmented(config: Config, frozen: Frozen, source: Source) -> Tensor:
    """[views, N, D] float32 on the CPU: features of augmented views, on the first process."""
    encoder, device = frozen.encoder.eval(), frozen.accelerator.device
    crop = Crop(encoder.image_size, config.crop_scale, jitter=(0.4, 0.4, 0.2, 0.1), jitter_prob=0.8, gray_prob=0.2)
    views = {"view": [crop] * config.views}
    cropped, parts = Cropped(source, views, config.seed), []
    for index in torch.arange(len(source)).split(max(1, config.batch_size // config.views)):
        batch = cropped[0, index]
        if batch.pop("failed", False):
            raise UserError(f"Many images in a row cannot be read, for example {source.name(int(index[0]))}.")
        x = augment(batch, views, frozen.normalize, device)["view"]
        with frozen.accelerator.autocast():
            parts.append(encoder.features(x.flatten(0, 1), frozen.pool).float().cpu().unflatten(0, x.shape[:2]))
    return torch.cat(parts, dim=1)


def measure(whole: Tensor, views: Tensor) -> dict[str, float]:
    """[N, D] features of images and [V, N', D] of their views -> the measures, rounded."""
    first, second = (F.normalize(view, dim=-1) for view in views[:2])
    found = {
        "rankme": effective_rank(torch.linalg.svdvals(whole.double())),
        "alpha": spectrum_decay(whole),
        "lidar": lidar(views),
        "alignment": (first - second).square().sum(dim=-1).mean().item(),
        "uniformity": uniformity(whole),
        "std": (F.normalize(whole, dim=-1).std(dim=0).mean() * whole.shape[1] ** 0.5).item(),
        "agreement": 100 * shared_neighbours(first, second, NEIGHBOURS),
    }
    return {name: round(value, 4) for name, value in found.items()}


def effective_rank(values: Tensor) -> float:
    """[R] singular values or eigenvalues, not negative -> exp of the entropy of their shares."""
    shares = values.clamp(min=0) / values.clamp(min=0).sum().clamp(min=1e-30)
    return torch.exp(-(shares * (shares + 1e-30).log()).sum()).item()


def spectrum_decay(x: Tensor) -> float:
    """[N, D] -> alpha of eigenvalue i of the covariance ~ i^-alpha: least squares on logarithms."""
    x = x.double() - x.double().mean(dim=0)
    eigenvalues = torch.linalg.svdvals(x).square()
    eigenvalues = eigenvalues[eigenvalues > 1e-9 * eigenvalues[0]]
    if len(eigenvalues) < 2:
        return float("inf")
    log_rank = torch.arange(1, len(eigenvalues) + 1, dtype=torch.float64).log()
    log_rank, log = log_rank - log_rank.mean(), eigenvalues.log()
    return -((log_rank * (log - log.mean())).sum() / log_rank.square().sum()).item()


def lidar(views: Tensor) -> float:
    """[V, N, D] -> effective rank of the covariance between images, whitened by the covariance within images."""
    views = views.double()
    means = views.mean(dim=0)
    within = (views - means).flatten(0, 1)
    between = means - means.mean(dim=0)
    scatter = within.T @ within / len(within) + DELTA * torch.eye(views.shape[-1], dtype=torch.float64)
    eigenvalues, vectors = torch.linalg.eigh(scatter)
    whitened = between @ (vectors * eigenvalues.rsqrt())
    return effective_rank(torch.linalg.svdvals(whitened).square())


def uniformity(x: Tensor) -> float:
    """[N, D] -> log of the mean of exp(-2 |a - b|^2) over pairs at unit length."""
    distances = torch.pdist(F.normalize(x.double(), dim=-1))
    return (distances.square().mul(-2).exp().mean()).log().item()


def shared_neighbours(first: Tensor, second: Tensor, k: int) -> float:
    """[N, D] and [N, D], of unit length -> mean share of the k nearest other images that an image has in both."""

    def nearest(x: Tensor) -> Tensor:
        rows = neighbours(x, x, k + 1)[1]
        own = torch.arange(len(x)).unsqueeze(1)
        # The image itself is usually first. Among equals it may be later or missing: then the last one is dropped.
        rest = (rows == own).int().argsort(dim=1, stable=True)[:, :k]
        return rows.gather(1, rest)

    return (nearest(first).unsqueeze(2) == nearest(second).unsqueeze(1)).any(dim=2).double().mean().item()
