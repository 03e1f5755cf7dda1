"""Fine-tuning: the whole pretrained encoder and a linear head are trained on labelled images, by a published recipe.

recipe=mae    He et al., 2022, appendix A.2 and the released FINETUNE.md, with the values for ViT-B: AdamW, layer-wise
              decay of the learning rate, RandAugment, mixup, CutMix, label smoothing, random erasing, stochastic
              depth, normalised mean of the patches. For ViT-L epochs=50 base_lr=1e-3 layer_decay=0.75 drop_path=0.2,
              for ViT-H the same with drop_path=0.3.
recipe=small  For some hundreds or thousands of images: crops and flips only. The head is trained first, then one block
              after the other from the top. For any timm model with one linear head.

A key that is null takes the recipe's value. Nothing is chosen on the test images: they are scored once, with the
weights after the last epoch. holdout= keeps a part of the training images out and logs their score after each epoch.
"""

import hashlib
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import pretrained, rng
from ..checkpoints import exported, timm_format
from ..data import BadImage, Source
from ..data.cache import MemoryBudget, cached
from ..data.loader import make_layout
from ..distributed import on_first_process, rank, say, world_size
from ..errors import UserError, check_range
from ..hardware import choose_attention
from ..model.encoder import Encoder
from ..stopping import StopRequest, stop_requests
from . import Column, Command, protocol, records, scores
from .config import Finetune as Config
from .feature_cache import digest
from .features import Features, extract
from .finetuning.classifier import POOLING, Classifier, build_classifier
from .finetuning.recipe import Recipe, fit_batch, resolve
from .finetuning.targets import Targets, read_targets, split, standardise_targets
from .finetuning.training import Examples, Training
from .frozen import Frozen, describe_pool, load_frozen
from .subset import Subset

COMMAND = Command(
    "run=... data.train=... data.test=...",
    "train the whole encoder with labels, by a published recipe",
    (
        Column("fine-tuned", "top1"),
        Column("fine-tuned", "map", kind="multilabel map"),
        Column("fine-tuned", "mae", kind="regression mae", unit=""),
    ),
)

OUTPUTS = {"single": "classes", "multilabel": "labels", "regression": "numbers"}
STANDARDISE_IMAGES = 2048  # training images from which standardise=true takes mean and standard deviation
MAX_ROWS = 100  # with more classes, the table of classes is in the file only


def run(config: Config) -> dict[str, Any]:
    """Train and test for each seed; prints and writes <run>/eval/finetune.json. Raises UserError, and Stopped."""
    seeds = config.seeds or (config.seed,)
    check(config, seeds)
    results: list[dict[str, Any]] = []
    with stop_requests(None) if config.save else nullcontext() as stop:
        frozen, sources, targets = prepare(replace(config, seed=seeds[0]))
        recipe = resolve(config, targets.task)
        for seed in seeds:
            if results:  # run=random:... has other weights for each seed
                frozen = load(replace(config, seed=seed))
            scored, details = train_and_test(config, recipe, seed, frozen, sources, targets, stop)
            results.append({"seed": seed, **scored})
    found: dict[str, Any] = results[0]
    if len(seeds) > 1:
        summary, name = scores.summary(results), scores.MAIN_SCORE[targets.task]
        if name in summary:
            say(f"test {name} {summary[name]:.2f} +- {summary[f'{name}_deviation']:.2f} over the seeds {list(seeds)}")
        details["seed"], found = list(seeds), {**summary, "seeds": results}
    frozen.save("finetune", found, **details)
    return found


def check(config: Config, seeds: tuple[int, ...]) -> None:
    """Raises UserError for impossible values and for places that cannot be written."""
    protocol.named_sets(config.data, "finetune")
    resolve(config)
    check_range("", config, 1, None, "image_size", "batch_size")
    if not 0 < config.labels_share <= 1 or not 0 <= config.holdout < 1:
        raise UserError(
            f"labels_share={config.labels_share:g} must be above 0 and at most 1, holdout={config.holdout:g} at least "
            "0 and below 1."
        )
    if len(set(seeds)) < len(seeds):
        raise UserError(f"seeds={list(seeds)} must differ.")
    if config.out_model:
        if len(seeds) > 1:
            raise UserError(f"out_model= is for one training, and seeds={list(seeds)} are {len(seeds)}: give one seed.")
        exported.refuse_foreign(Path(config.out_model))
    for key in ("out", "out_model"):
        try:  # now, not after hours of training
            Path(getattr(config, key)).parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{key}={getattr(config, key)} cannot be written: {error.strerror}.") from error


def load(config: Config) -> Frozen:
    """The pretrained encoder, on the CPU: each training copies it. Raises UserError."""
    made_for_size = config.run.startswith(("timm:", "random:"))  # build_classifier resamples the others
    frozen = load_frozen(replace(config, image_size=config.image_size if made_for_size else None))
    encoder = frozen.encoder
    if isinstance(encoder, pretrained.Pixels):
        raise UserError("run=pixels has nothing to train: give a run directory.")
    if config.recipe == "mae" and not encoder.is_vit:
        raise UserError(
            f"recipe=mae is for plain ViTs, and {config.run} is a {type(encoder.model).__name__}: use recipe=small."
        )
    if config.recipe == "mae" and config.pool == "auto":
        frozen.pool = "mean"
    if encoder.is_vit and frozen.pool not in POOLING:
        raise UserError(f"pool={frozen.pool} is no pooling of timm's models: use {' or '.join(POOLING)}.")
    encoder.to("cpu")
    size = config.image_size or encoder.image_size
    h, w = (size, size) if isinstance(size, int) else size
    encoder.image_size = (h, w)  # Frozen.open reads the images for this size
    return frozen


def prepare(config: Config) -> tuple[Frozen, tuple[Source, Source], Targets]:
    """The encoder, both sets of images and their targets. Raises UserError."""
    frozen = load(config)
    specs = config.data.train, config.data.test
    train, test = (frozen.open(spec, config.data.download_dir) for spec in specs)
    targets = read_targets(config.task, (train, test), specs)
    protocol.refuse_same_images(train, test, specs)
    for source, labelled, spec in zip((train, test), targets.labelled, specs, strict=True):
        if not len(labelled):
            raise UserError(f"{spec} has no labelled image: fine-tuning needs labels in both sets.")
        _check_first_image(config, frozen, source, spec)
    return frozen, (train, test), targets


def _check_first_image(config: Config, frozen: Frozen, source: Source, spec: str) -> None:
    """Raises UserError if the first image that can be read does not fit the encoder or the recipe."""
    for index in range(min(50, len(source))):
        try:
            image = source.read(index)
        except BadImage:
            continue
        in_chans = frozen.encoder.in_chans
        if len(image) != in_chans:
            raise UserError(f"{spec} has images of {len(image)} channels, and {config.run} takes {in_chans}.")
        if image.is_floating_point() and resolve(config).randaugment != "none":
            raise UserError(f"{spec} has images of more than 8 bits, and RandAugment takes 8: use randaugment=none.")
        return
    raise UserError(f"Many images of {spec} in a row cannot be read, the first is {source.name(0)}.")


def train_and_test(
    config: Config, recipe: Recipe, seed: int, frozen: Frozen, sources: tuple[Source, Source],
    targets: Targets, stop: StopRequest | None,
) -> tuple[dict[str, Any], dict[str, Any]]:  # fmt: skip
    """One training and its test: (scores, details for the record). Raises UserError, and Stopped."""
    accelerator, subject, pool, task = frozen.accelerator, frozen.subject, frozen.pool, targets.task
    assert isinstance(frozen.encoder, Encoder)
    learned, held_out = split(targets, config.labels_share, config.holdout, seed)
    train_targets, (mean, std) = standardise_targets(task, targets.train[learned])
    if config.global_batch_size is None and recipe.global_batch_size > len(learned):
        recipe = fit_batch(recipe, len(learned), world_size() * (config.batch_size or 2))  # mixup needs an even one
    layout = make_layout(
        recipe.global_batch_size, config.batch_size, len(learned), world_size(), rank(), config.data.train
    )
    if (recipe.mixup or recipe.cutmix) and layout.batch_size % 2:
        raise UserError(f"mixup and cutmix mix pairs of images, and batch_size={layout.batch_size} is odd.")
    fresh_norm = config.recipe == "mae" and pool == "mean"
    classifier = build_classifier(
        subject, pool, len(targets.names), frozen.encoder.image_size, recipe.drop_path, fresh_norm, seed
    ).to(accelerator.device)
    choose_attention(classifier, accelerator.device, frozen.precision)
    memory = MemoryBudget()

    def training_images(index: Tensor, values: Tensor) -> Examples:
        return Examples(cached(Subset(sources[0], index), None, seed, memory), values)

    def forward_all(model: Any, source: Source) -> Features:
        batch_size = config.batch_size or min(256, layout.batch_size)
        return extract(model, source, frozen.normalize, accelerator, (pool,), batch_size, config.workers)[pool]

    def evaluate(examples: Examples) -> tuple[dict[str, Any], int]:
        outputs = forward_all(classifier, examples.source)
        frozen.say_unreadable(examples.source, outputs.index, outputs.unreadable)
        predictions, truth = outputs.values * std + mean, examples.targets[outputs.index]
        scored = on_first_process(lambda: scores.measure(task, predictions, truth, targets.names, seed))
        return scored, outputs.unreadable

    train = training_images(learned, train_targets)
    valid = training_images(held_out, targets.train[held_out]) if len(held_out) else None
    if recipe.standardise:
        some = rng.permutation(rng.fold_in(seed, "standardise"), len(learned))[:STANDARDISE_IMAGES]
        classifier.standardise(forward_all(classifier.encoder, Subset(train.source, some)).values)
    settings = {
        "run": config.run, "weights": digest(frozen.encoder), "recipe": config.recipe, **asdict(recipe),
        "pool": pool, "image_size": list(classifier.image_size), "task": task,
        "labels_share": config.labels_share, "holdout": config.holdout, "seed": seed, "classes": targets.names,
        "images": sources[0].identity(), "targets": hashlib.sha256(train_targets.numpy().tobytes()).hexdigest(),
    }  # fmt: skip
    training = Training(recipe, seed, frozen, classifier, train, layout, task, config.workers, settings)
    test_index = targets.labelled[1]
    say(
        f"finetune of {config.run}, recipe {config.recipe}, seed {seed}: {'x'.join(map(str, classifier.image_size))} "
        f"pixels, {len(learned)} training and {len(test_index)} test images, {len(targets.names)} {OUTPUTS[task]}",
        f"{recipe.epochs} epochs of {training.steps_per_epoch} steps, global batch "
        f"{layout.global_batch_size} = {layout.batch_size} x {layout.accumulate} micro-batches x {layout.world_size} "
        f"processes, learning rate {training.peak_lr:.3g}, {accelerator.device}, {frozen.precision}",
    )
    training.run(Path(config.save) / f"seed_{seed}" if config.save else None, stop, valid, evaluate)

    scored, unreadable = evaluate(Examples(Subset(sources[1], test_index), targets.test[test_index]))
    say(*result_lines(task, scored))
    if config.out_model:
        accelerator.unwrap_model(classifier, keep_fp32_wrapper=False)  # takes autocast away
        on_first_process(lambda: write_model(Path(config.out_model), subject, classifier, targets.names, mean, std))
    details = {
        "recipe": config.recipe, "settings": asdict(recipe), "task": task,
        "train": records.describe_set(config.data.train, len(learned), training.num_unreadable, held_out=len(held_out)),
        "test": records.describe_set(config.data.test, len(test_index) - unreadable, unreadable),
        "labels_share": config.labels_share, "classes": len(targets.names),
        "features": describe_pool(pool) + " before a norm of its own" * fresh_norm,
        "image_size": list(classifier.image_size), "seed": seed, "processes": world_size(),
    }  # fmt: skip
    return {**scored, "seconds": round(training.progress.seconds), "history": training.history}, details


def result_lines(task: str, scored: dict[str, Any]) -> list[str]:
    """The scores of the test images, for the console."""

    def interval(name: str, form: str = "") -> str:
        low, high = scored[f"{name}_interval"]
        return f"{low:{form}} - {high:{form}}"

    if task == "single":
        header = ["class", "accuracy %"]
        rows = [[name, "-" if value is None else f"{value:.2f}"] for name, value in scored["per_class"].items()]
        top5 = f", top-5 {scored['top5']:.2f}%" if "top5" in scored else ""
        summary = (
            f"top-1 {scored['top1']:.2f}% (95 % interval {interval('top1', '.1f')}){top5}, loss {scored['loss']:.4f}"
        )
    elif task == "multilabel":
        header = ["label", "AP %", "AUROC %"]
        rows = [[name, f"{v['ap']:.2f}", f"{v['auroc']:.2f}"] for name, v in scored["per_class"].items()]
        summary = (
            f"mAP {scored['map']}% (95 % interval {interval('map')}), AUROC {scored['auroc']}% ({interval('auroc')})"
        )
    else:
        header = ["target", "mean absolute error", "R2"]
        rows = [[name, f"{v['mae']:g}", f"{v['r2']}"] for name, v in scored["per_target"].items()]
        summary = (
            f"mean absolute error {scored['mae']:g} (95 % interval {interval('mae', 'g')}), R2 {scored['r2']} "
            f"({interval('r2')})"
        )
    return [*(records.table(header, rows) if len(rows) <= MAX_ROWS else []), f"test {summary}"]


@torch.no_grad()
def write_model(
    out: Path, subject: pretrained.Pretrained, classifier: Classifier, names: list[str], mean: Tensor, std: Tensor
) -> None:
    """Write a folder from which timm makes the trained model with its head. Its outputs are in the targets' units.

    mean, std: of the targets, [] or [T].
    """
    model, head, encoder = classifier.float().cpu().eval(), classifier.head, classifier.encoder
    model.fold()
    head.weight.mul_(std.view(-1, 1) if std.ndim else std)
    head.bias.mul_(std).add_(mean)
    images = torch.randn(2, encoder.in_chans, *encoder.image_size, generator=torch.Generator().manual_seed(0))
    config = timm_format.record(encoder, classifier.model_args, subject.mean, subject.std, encoder.width, classes=names)
    timm_format.write(out, config | subject.origin, model.model, images, model(images))
    say(f'{out}: timm.create_model("local-dir:{out}", pretrained=True) gives the {len(names)} outputs, checked')
