"""Fine-tuning: the whole pretrained encoder and a linear head are trained on labelled images, by a published recipe.

recipe=mae    He et al., 2022, appendix A.2 and the released FINETUNE.md, with the values for ViT-B: AdamW, layer-wise
              decay of the learning rate, RandAugment, mixup, CutMix, label smoothing, random erasing, stochastic
              depth, normalised mean of the patches. For ViT-L epochs=50 base_lr=1e-3 layer_decay=0.75 drop_path=0.2,
              for ViT-H the same with drop_path=0.3.
recipe=small  for some hundreds or thousands of images: crops and flips only, the head first, then one block after
              the other from the top. For any model of timm that has one linear head.

Every key that is null has the recipe's value. Nothing is chosen by the test images, nor by anything else: the weights
after the last epoch see them once, at the end. holdout= shows how a part of the training images fares meanwhile.
"""

import hashlib
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from .. import optim, pretrained, rng, timm_folder
from ..data import BadImage, Source
from ..data.cache import Memory, cached
from ..data.loader import make_layout
from ..distributed import on_first_process, rank, say, world_size
from ..errors import UserError, check_range, check_share
from ..hardware import choose_attention, versions
from ..stopping import Stop, listening
from . import classifier as building
from . import protocol, scores
from .classifier import Classifier, average_statistics
from .features import extract
from .kept import digest
from .sets import Chosen
from .supervised import Part, Recipe, Training
from .targets import Targets, read_targets, split, standard_scores

NOUN = {"single": "classes", "multilabel": "labels", "regression": "numbers"}
SAMPLE = 2048  # training images that say what the mean and deviation of the features are
SHOWN = 100  # classes up to which each has a line on the console; the file has all of them

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


@dataclass
class Config(protocol.Subject):
    data: protocol.Sets = field(default_factory=protocol.Sets)
    recipe: Literal["mae", "small"] = "mae"  # see above; small: for little data
    task: Literal["auto", "single", "multilabel", "regression"] = "auto"  # auto: single, one class for each image
    image_size: int | tuple[int, int] | None = None  # pixels; null: the encoder's own. Positions are resampled
    labels_share: float = 1.0  # of the labelled training images, of each class the same, at least one; by the seed
    seeds: tuple[int, ...] | None = None  # a training for each, with mean and deviation; null: seed
    holdout: float = 0.0  # share of each class (or of all images without one) left out to show its score by epoch
    save: str = ""  # a folder for checkpoints: the same command goes on where it stopped; empty: none
    out_model: str = ""  # a folder for the trained model with its head, for timm; empty: none
    global_batch_size: int | None = None  # images for one optimizer step, over all processes
    batch_size: int | None = None  # images at once, on each process; null: its share of the global batch
    epochs: int | None = None  # passes over the training images
    base_lr: float | None = None  # learning rate of the last layer at a global batch of 256 images; scaled linearly
    min_lr: float | None = None  # at the end, times the layer's share
    warmup_epochs: float | None = None  # linear from 0
    weight_decay: float | None = None  # of all but biases, norms, positions and tokens
    layer_decay: float | None = None  # a layer's learning rate is this share of that of the layer above it
    head_lr: float | None = None  # the head's learning rate is so many times base_lr
    standardise: bool | None = None  # the head sees features shifted and scaled by their first mean and deviation
    drop_path: float | None = None  # stochastic depth, up to this in the last block
    clip: float | None = None  # largest gradient norm
    crop_scale: tuple[float, float] | None = None  # share of the image's area
    flip_prob: float | None = None  # left-right
    randaugment: str | None = None  # timm's words for it, such as rand-m9-mstd0.5-inc1, or none
    erasing: float | None = None  # share of the images that get noise in a box
    mixup: float | None = None  # parameter of its beta distribution; 0: none. Never for regression
    cutmix: float | None = None  # likewise
    smoothing: float | None = None  # of labels; for one class an image only
    head_epochs: float | None = None  # the head alone learns so long
    unfreeze_epochs: float | None = None  # then one block more after each so many; 0: all at once


def run(config: Config) -> dict[str, Any]:
    """Train and test for each seed; prints and writes <run>/eval/finetune.json. Raises UserError, and Stopped."""
    recipe, seeds = resolve(config), config.seeds or (config.seed,)
    check(config, recipe, seeds)
    with listening(None) if config.save else nullcontext() as stop:
        frozen, sources, targets = prepare(replace(config, seed=seeds[0]))
        recipe, results = resolve(config, targets.task), []
        for seed in seeds:
            if results:  # weights that a seed decides, random:'s, are another's
                frozen = load(replace(config, seed=seed))
            found, record = train_and_test(config, recipe, seed, frozen, sources, targets, stop)
            results.append(found)
    results_by_seed = [{"seed": seed, **found} for seed, found in zip(seeds, results, strict=True)]
    whole = {**scores.summary(results), "seeds": results_by_seed} if len(seeds) > 1 else results_by_seed[0]
    if len(seeds) > 1:
        record["seed"] = list(seeds)
        name = scores.FIRST[targets.task]
        if name in whole:
            say(f"test {name} {whole[name]:.2f} +- {whole[f'{name}_deviation']:.2f} over the seeds {list(seeds)}")
    protocol.file(config, frozen.subject, "finetune", {**record, "results": whole})
    return whole


def resolve(config: Config, task: str = "single") -> Recipe:
    """The recipe with what the user gave in its place, and without what the task cannot have. Raises UserError."""
    given = {f.name: getattr(config, f.name) for f in fields(Recipe) if getattr(config, f.name) is not None}
    recipe = replace(RECIPES[config.recipe], **given)
    without = {"single": (), "multilabel": ("smoothing",), "regression": ("smoothing", "mixup", "cutmix")}[task]
    for name in without:  # two pictures pasted together have no number
        if given.get(name):
            raise UserError(f"{name}={given[name]:g} has no meaning for task={task}: leave it out.")
    return replace(recipe, **dict.fromkeys(without, 0.0))


def check(config: Config, recipe: Recipe, seeds: tuple[int, ...]) -> None:
    """Raises UserError for values without a meaning."""
    protocol.both_sets(config, "finetune")
    check_range("", recipe, 1, None, "epochs", "global_batch_size")
    check_range("", config, 1, None, "image_size", "batch_size")
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
    if not 0 < config.labels_share <= 1 or not 0 <= config.holdout < 1:
        raise UserError(
            f"labels_share={config.labels_share:g} must be above 0 and at most 1, holdout={config.holdout:g} at least "
            "0 and below 1."
        )
    if len(set(seeds)) < len(seeds):
        raise UserError(f"seeds={list(seeds)} must differ.")
    if config.out_model and len(seeds) > 1:
        raise UserError(f"out_model= is for one training, and seeds={list(seeds)} are {len(seeds)}: give one seed.")
    if config.out_model:
        timm_folder.refuse_foreign(Path(config.out_model))
    for key in ("out", "out_model"):
        try:  # now, and not after hours
            Path(getattr(config, key)).parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{key}={getattr(config, key)} cannot be written: {error.strerror}.") from error


def load(config: Config) -> protocol.Frozen:
    """The pretrained encoder on the CPU, to be copied from. Raises UserError."""
    own_size = config.run.startswith(("timm:", "random:"))  # which timm makes for any size; others are resampled here
    frozen = protocol.load(replace(config, image_size=config.image_size if own_size else None))
    encoder = frozen.subject.encoder
    if isinstance(encoder, pretrained.Pixels):
        raise UserError("run=pixels is no encoder that could be trained: give a run directory.")
    if config.recipe == "mae" and not encoder.is_vit:
        raise UserError(
            f"recipe=mae is for plain ViTs, and {config.run} is a {type(encoder.model).__name__}: use recipe=small."
        )
    if config.recipe == "mae" and config.pool == "auto":
        frozen.pool = "mean"
    if encoder.is_vit and frozen.pool not in building.POOLING:
        raise UserError(
            f"pool={frozen.pool} is something that timm's models do not have: use {' or '.join(building.POOLING)}."
        )
    encoder.to("cpu")
    size = config.image_size or encoder.image_size
    encoder.image_size = (size, size) if isinstance(size, int) else tuple(size)  # what images are opened for
    return frozen


def prepare(config: Config) -> tuple[protocol.Frozen, list[Source], Targets]:
    """The encoder, both sets and their targets. Raises UserError."""
    frozen = load(config)
    words = (config.data.train, config.data.test)
    sources = [frozen.open(word, config.data.download_dir) for word in words]
    targets = read_targets(config.task, sources, words)
    protocol.refuse_same(*sources, words)
    for source, known, word in zip(sources, targets.known, words, strict=True):
        if not len(known):
            raise UserError(f"{word} has no image with a label: fine-tuning needs them in both sets.")
        _check_sample(config, frozen, source, word)
    return frozen, sources, targets


def _check_sample(config: Config, frozen: protocol.Frozen, source: Source, word: str) -> None:
    """Raises UserError if the first image that can be read is not what the encoder or the recipe takes."""
    for index in range(min(50, len(source))):
        try:
            image = source.read(index)
        except BadImage:
            continue
        in_chans = frozen.subject.encoder.in_chans
        if len(image) != in_chans:
            raise UserError(f"{word} has images of {len(image)} channels, and {config.run} takes {in_chans}.")
        if image.is_floating_point() and resolve(config).randaugment != "none":
            raise UserError(f"{word} has images of more than 8 bits, which RandAugment has not: use randaugment=none.")
        return
    raise UserError(f"Many images in a row cannot be read in {word}, the first is {source.name(0)}.")


def train_and_test(
    config: Config, recipe: Recipe, seed: int, frozen: protocol.Frozen, sources: list[Source], targets: Targets,
    stop: Stop | None,
) -> tuple[dict[str, Any], dict[str, Any]]:  # fmt: skip
    """One training and its test: (scores, record of the protocol). Raises UserError, and Stopped."""
    accelerator, subject, task = frozen.accelerator, frozen.subject, targets.task
    learned, held_out = split(targets, config.labels_share, config.holdout, seed)
    values, unit = (
        standard_scores(targets.train[learned]) if task == "regression" else (targets.train[learned], (0.0, 1.0))
    )
    layout = make_layout(
        recipe.global_batch_size, config.batch_size, len(learned), world_size(), rank(), config.data.train
    )
    if (recipe.mixup or recipe.cutmix) and layout.batch_size % 2:
        raise UserError(f"mixup and cutmix need pairs of images, and batch_size={layout.batch_size} is odd.")
    fresh_norm = config.recipe == "mae" and frozen.pool == "mean"
    classifier = building.build(
        subject, frozen.pool, len(targets.names), subject.encoder.image_size, recipe.drop_path, fresh_norm, seed
    ).to(accelerator.device)
    choose_attention(classifier, accelerator.device, frozen.precision)
    memory = Memory()

    def part(index: Tensor, of_part: Tensor) -> Part:
        return Part(cached(Chosen(sources[0], index), None, seed, memory), of_part)

    def judge(judged: Part) -> tuple[dict[str, Any], int]:
        """Scores, and the number of images that cannot be read."""
        average_statistics(classifier)
        size = config.batch_size or min(256, layout.batch_size)
        found = extract(classifier, judged.source, frozen.normalize, accelerator, (frozen.pool,), size, config.workers)[
            frozen.pool
        ]
        outputs, truth = found.values * unit[1] + unit[0], judged.targets[found.index]
        return on_first_process(lambda: scores.measure(task, outputs, truth, targets.names, seed)), found.unreadable

    train_part = part(learned, values)
    if recipe.standardise:
        some = rng.permutation(rng.fold_in(seed, "standardise"), len(learned))[:SAMPLE]
        found = extract(
            classifier.encoder, Chosen(train_part.source, some), frozen.normalize, accelerator, (frozen.pool,),
            config.batch_size or min(256, layout.batch_size), config.workers,
        )[frozen.pool]  # fmt: skip
        classifier.standardise(found.values)
    held_part = part(held_out, targets.train[held_out]) if len(held_out) else None
    settings = {  # what a checkpoint has to agree with
        "run": config.run, "weights": digest(subject.encoder), "recipe": config.recipe, **asdict(recipe),
        "pool": frozen.pool, "image_size": list(classifier.image_size), "task": task,
        "labels_share": config.labels_share, "holdout": config.holdout, "seed": seed, "classes": targets.names,
        "images": sources[0].identity(), "targets": hashlib.sha256(values.numpy().tobytes()).hexdigest(),
    }  # fmt: skip
    size = "x".join(map(str, classifier.image_size))
    say(
        f"finetune of {config.run}, recipe {config.recipe}, seed {seed}: {size} pixels, {len(learned)} training and "
        f"{len(targets.known[1])} test images, {len(targets.names)} {NOUN[task]}",
        f"{recipe.epochs} epochs of {len(learned) // layout.global_batch_size} steps, global batch "
        f"{layout.global_batch_size} = {layout.batch_size} x {layout.accumulate} micro-batches x {layout.world_size} "
        f"processes, learning rate {recipe.base_lr * layout.global_batch_size / optim.REFERENCE_BATCH:.3g}, "
        f"{accelerator.device}, {frozen.precision}",
    )
    training = Training(recipe, seed, frozen, classifier, train_part, layout, task, config.workers, settings)
    training.run(Path(config.save) / f"seed_{seed}" if config.save else None, stop, held_part, judge)
    test_index = targets.known[1]
    found, unreadable = judge(Part(Chosen(sources[1], test_index), targets.test[test_index]))
    say(*shown(task, found))
    if config.out_model:
        on_first_process(lambda: write_model(Path(config.out_model), subject, classifier, targets.names, unit))
    record = {
        "evaluation": "finetune", "run": config.run, **subject.detail, "recipe": config.recipe,
        "settings": asdict(recipe), "task": task,
        "train": {
            "data": config.data.train, "images": len(learned), "held_out": len(held_out),
            "unreadable": training.num_unreadable,
        },
        "test": {"data": config.data.test, "images": len(test_index) - unreadable, "unreadable": unreadable},
        "labels_share": config.labels_share, "classes": len(targets.names),
        "features": protocol.describe_pool(frozen.pool) + " before a norm of its own" * fresh_norm,
        "image_size": list(classifier.image_size), "precision": frozen.precision, "seed": seed,
        "processes": world_size(), "versions": versions(),
    }  # fmt: skip
    return {**found, "seconds": round(training.run_state.seconds), "history": training.history}, record


def shown(task: str, found: dict[str, Any]) -> list[str]:
    """The result, for the console."""
    if task == "single":
        rows = [[name, "-" if value is None else f"{value:.2f}"] for name, value in found["per_class"].items()]
        low, high = found["top1_interval"]
        top5 = f", top-5 {found['top5']:.2f}%" if "top5" in found else ""
        head = ["class", "accuracy %"]
        last = f"test top-1 {found['top1']:.2f}% (95 % interval {low:.1f} - {high:.1f}){top5}, loss {found['loss']:.4f}"
    elif task == "multilabel":
        rows = [[name, f"{v['ap']:.2f}", f"{v['auroc']:.2f}"] for name, v in found["per_class"].items()]
        head = ["label", "AP %", "AUROC %"]
        last = (
            f"test mAP {found['map']}% (95 % interval {found['map_interval'][0]} - {found['map_interval'][1]}), "
            f"AUROC {found['auroc']}% ({found['auroc_interval'][0]} - {found['auroc_interval'][1]})"
        )
    else:
        rows = [[name, f"{v['mae']:g}", f"{v['r2']}"] for name, v in found["per_target"].items()]
        head = ["target", "mean absolute error", "R2"]
        last = (
            f"test mean absolute error {found['mae']:g} (95 % interval {found['mae_interval'][0]:g} - "
            f"{found['mae_interval'][1]:g}), R2 {found['r2']} ({found['r2_interval'][0]} - {found['r2_interval'][1]})"
        )
    return [*(protocol.table(head, rows) if len(rows) <= SHOWN else []), last]


@torch.no_grad()
def write_model(
    out: Path, subject: pretrained.Pretrained, classifier: Classifier, names: list[str], unit: tuple
) -> None:
    """A folder from which timm makes the trained model with its head, whose outputs are in the targets' units."""
    model, head = classifier.float().cpu().eval(), classifier.head
    model.fold()
    mean, std = (torch.as_tensor(value, dtype=torch.float32) for value in unit)
    head.weight.mul_(std.view(-1, 1) if std.ndim else std)
    head.bias.mul_(std).add_(mean)
    encoder = classifier.encoder
    images = torch.randn(2, encoder.in_chans, *encoder.image_size, generator=torch.Generator().manual_seed(0))
    config = timm_folder.record(encoder, classifier.model_args, subject.mean, subject.std, encoder.width, classes=names)
    timm_folder.write(out, config, model.model, images, model(images))
    say(f'{out}: timm.create_model("local-dir:{out}", pretrained=True) gives the {len(names)} outputs, checked')
