"""Pictures of a model while it trains, for TensorBoard and trackers: what it makes of the same eight images."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from PIL import Image

from .. import data, pretrained
from ..data import Source
from ..data.augment import Normalize
from ..distributed import is_sharded
from ..errors import UserError
from ..evaluation import pictures as drawing
from ..model.encoder import Encoder
from ..objectives import Objective
from .pictures import ROWS, SIDE, can_attend, cropped, on_image, predicts
from .samples import readable, views_of


def pictures_of(run_dir: Path, objective: Objective, source: Source) -> dict[str, Image.Image]:
    """{name: a picture}, empty where a model is in pieces or shows nothing. The model and all random numbers stay as
    they were. Raises UserError."""
    if any(map(is_sharded, objective.parameters())):  # one process alone cannot run it
        return {}
    config, device = pretrained.settings_of(run_dir), next(objective.parameters()).device
    chosen = readable(source, config.seed, ROWS)
    indices, images = [index for index, _ in chosen], [image for _, image in chosen]
    if not images:
        return {}
    normalize = Normalize(*data.normalization(config.data))
    with _as_in_evaluation(objective):
        if predicts(config.method):
            views = {name: x.to(device) for name, x in views_of(config, images, indices).items()}
            first = next(name for name in views if name != "key")
            columns = {"the crop": views[first][0], **objective.pictures(views)}
            pixels = {name: (normalize.undo(x.float().cpu()) * 255).clamp(0, 255) for name, x in columns.items()}
            rows = [[drawing.thumbnail(x[n], SIDE) for x in pixels.values()] for n in range(len(images))]
            return {"reconstructions": drawing.montage(rows, column_names=list(pixels))}
        encoder = objective.exported_encoder()
        if not can_attend(encoder):
            return {}
        return {"attention": _attention(encoder, source, indices, normalize, device)}


@torch.inference_mode()
def _attention(
    encoder: Encoder, source: Source, indices: list[int], normalize: Normalize, device: torch.device
) -> Image.Image:
    from ..evaluation.attention import attend, from_query

    query = "cls" if encoder.pool != "mean" and encoder.model.has_class_token else "mean"
    rows = []
    for image in cropped(source, encoder, indices)[1]:
        found = attend(encoder, normalize, image.unsqueeze(0).float().to(device) / 255)
        weights = from_query(found.weights, query, encoder.model.num_prefix_tokens)[0].mean(dim=0)
        picture = drawing.image_of(image.float(), drawing.cell_size(encoder.image_size, SIDE), smooth=True)
        rows.append([picture, on_image(picture, weights.unflatten(0, encoder.grid()))])
    if not rows:
        raise UserError("none of the images can be read.")
    return drawing.montage(rows, column_names=["the image", "all heads"])


@contextmanager
def _as_in_evaluation(objective: Objective) -> Iterator[None]:
    """Without dropout, gradients and compilation."""
    modes = [(module, module.training) for module in objective.modules()]
    objective.eval()
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"), torch.random.fork_rng():
            yield
    finally:
        for module, training in modes:
            module.training = training
