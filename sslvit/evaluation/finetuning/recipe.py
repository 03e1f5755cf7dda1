"""The recipes of fine-tuning: every number that decides what is learned."""

from dataclasses import dataclass, fields, replace
from typing import Any

from ...distributed import say
from ...errors import UserError, check_range, check_share

NOT_FOR_TASK = {"single": (), "multilabel": ("smoothing",), "regression": ("smoothing", "mixup", "cutmix")}


@dataclass
class Recipe:
    """Every number that decides what is learned; finetune.Config explains each."""

    epochs: int
    global_batch_size: int
    base_lr: float
    min_lr: float
    warmup_epochs: float
    weight_decay: float
    layer_decay: float
    head_lr: float
    standardise: bool
    drop_path: float
    clip: float | None
    crop_scale: tuple[float, float]
    flip_prob: float
    randaugment: str
    erasing: float
    mixup: float
    cutmix: float
    smoothing: float
    head_epochs: float
    unfreeze_epochs: float


RECIPES = {
    "mae": Recipe(
        epochs=100, global_batch_size=1024, base_lr=5e-4, min_lr=1e-6, warmup_epochs=5, weight_decay=0.05,
        layer_decay=0.65, head_lr=1.0, standardise=False, drop_path=0.1, clip=None, crop_scale=(0.08, 1.0),
        flip_prob=0.5, randaugment="rand-m9-mstd0.5-inc1", erasing=0.25, mixup=0.8, cutmix=1.0,
        smoothing=0.1, head_epochs=0, unfreeze_epochs=0,
    ),
    "small": Recipe(
        epochs=30, global_batch_size=64, base_lr=1e-3, min_lr=0.0, warmup_epochs=1, weight_decay=0.05,
        layer_decay=0.75, head_lr=4.0, standardise=True, drop_path=0.0, clip=1.0, crop_scale=(0.5, 1.0), flip_prob=0.5,
        randaugment="none", erasing=0.0, mixup=0.0, cutmix=0.0, smoothing=0.0,
        head_epochs=2, unfreeze_epochs=0.5,
    ),
}  # fmt: skip


def resolve(config: Any, task: str = "single") -> Recipe:
    """The recipe that a finetune.Config names, with the values that it sets. Raises UserError for impossible values.

    What the task cannot have is 0, and is refused if the user set it.
    """
    given = {f.name: getattr(config, f.name) for f in fields(Recipe) if getattr(config, f.name) is not None}
    for name in NOT_FOR_TASK[task]:
        if given.get(name):
            raise UserError(f"{name}={given[name]:g} has no meaning for task={task}: leave it out.")
        given[name] = 0.0
    recipe = replace(RECIPES[config.recipe], **given)
    check(recipe)
    return recipe


def fit_batch(recipe: Recipe, num_images: int, unit: int) -> Recipe:
    """The recipe with the largest global batch that so many images fill: a multiple of `unit`, if there is one."""
    size = num_images // unit * unit or num_images
    say(f"global_batch_size={size} instead of the recipe's {recipe.global_batch_size}: there are {num_images} images.")
    return replace(recipe, global_batch_size=size)


def check(recipe: Recipe) -> None:
    """Raises UserError."""
    check_range("", recipe, 1, None, "epochs", "global_batch_size")
    check_range(
        "", recipe, 0, None, "min_lr", "warmup_epochs", "weight_decay", "head_lr", "mixup", "cutmix", "head_epochs",
        "unfreeze_epochs",
    )  # fmt: skip
    check_range("", recipe, 0, 1, "layer_decay", "drop_path", "erasing", "smoothing", "flip_prob")
    check_share("", recipe, "crop_scale")
    if not recipe.base_lr > 0 or not recipe.layer_decay > 0 or not (recipe.clip is None or recipe.clip > 0):
        raise UserError("base_lr, layer_decay and clip must be above 0.")
    if recipe.drop_path == 1:
        raise UserError("drop_path=1 would leave nothing of the last block: it must be below 1.")
    if recipe.warmup_epochs >= recipe.epochs:
        raise UserError(f"warmup_epochs={recipe.warmup_epochs:g} is not shorter than the run, epochs={recipe.epochs}.")
    if recipe.head_epochs and recipe.head_epochs >= recipe.epochs:
        raise UserError(f"head_epochs={recipe.head_epochs:g} leaves none of epochs={recipe.epochs} for the encoder.")
