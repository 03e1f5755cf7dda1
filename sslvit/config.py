"""The configuration of a run, in layers: defaults, those of the method, a preset, a YAML recipe, key=value.

A later layer wins. Every key is declared in a dataclass beside the code that reads it. No value changes after loading;
`make_plan` computes what follows from the configuration.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from omegaconf import DictConfig, OmegaConf

from . import compatibility, objectives
from .arguments import (
    Precision,
    assignments,
    check_keys,
    flatten,
    full_key,
    help_lines,
    merge,
    read_yaml,
    recipes,
    spaced,
    value_of,
)
from .checkpoints import textfile
from .checkpoints.config import Config as SaveConfig
from .data import Config as DataConfig
from .data import check_value_range, kind_of
from .errors import ABOVE_0, Limits, UserError, check_limits, did_you_mean
from .evaluation.config import Online as EvalConfig
from .metrics import Config as LogConfig
from .metrics import check_trackers
from .model.config import Config as ModelConfig
from .schedule import Config as OptimConfig

if TYPE_CHECKING:
    from .data.loader import Layout

DURATIONS = ("epochs", "steps", "images")


@dataclass
class RunConfig:
    method: str = "mae"  # mae, dino, distill, or the dotted name of a module of your own
    out: str = ""  # the run directory; empty: runs/ and the name of the recipe
    seed: int = 0  # of all random numbers
    epochs: float | None = None  # length of the run in passes over the images; give one of epochs, steps, images
    steps: int | None = None  # length of the run in optimizer steps
    images: int | None = None  # length of the run in images seen
    minutes: float | None = None  # of the whole command; its length follows, in place of epochs, steps or images
    hours: float | None = None  # the same in hours
    # What is not given follows from the images, the machine and the time, if neither a recipe nor a length is given.
    settings: Literal["auto", "paper"] | None = None  # auto: in any case; paper: never, the defaults are the papers'
    max_hours: float | None = None  # save and end after so many hours, with exit status 75; the same command resumes
    global_batch_size: int = 256  # images of one optimizer step, over all processes
    batch_size: int | Literal["auto"] | None = None  # images one process holds at once; null, auto: all that fit
    precision: Precision = "auto"  # auto: bf16 where the hardware is fast at it, else float32; fp16 is experimental
    compile: bool = False  # compile the transformer blocks: for GPUs and long runs; costs about a minute
    shard: bool = False  # experimental: split weights and moments among the processes (FSDP), for very large models
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    objective: Any = None  # the method's Config
    optim: OptimConfig = field(default_factory=OptimConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    save: SaveConfig = field(default_factory=SaveConfig)
    log: LogConfig = field(default_factory=LogConfig)

    LIMITS: ClassVar[Limits] = [
        (0, None, "max_hours"),
        (1, None, "global_batch_size"),
        (ABOVE_0, None, "minutes", "hours"),
    ]


@dataclass(frozen=True)
class Plan:
    """What follows from a configuration, the number of images and the number of processes."""

    layout: "Layout"
    steps_per_epoch: int
    steps: int
    warmup_steps: int
    frozen_steps: int = 0  # at the start, in which the encoder does not learn


def load(arguments: list[str], command: str = "pretrain", own: Iterable[str] = ()) -> RunConfig:
    """The configuration of a command line: a recipe (*.yaml), images, key=value. Raises UserError.
    own: further keys that the command has."""
    recipe, values, given = sort(arguments)
    config = _defaults(*_method_and_preset(recipe, values, given))
    keys = list(flatten(config))
    values = compatibility.modernise(values, str(recipe))
    check_keys(values, keys, str(recipe), "pretrain")
    config = merge(config, _with_one_duration(values), str(recipe))
    chosen = set(values)
    for key, text in given:
        key = full_key(key, [*keys, *compatibility.REMOVED], command, [*keys, *own], _of_another_method)
        layer = compatibility.modernise(flatten({key: value_of(config, key, text)}), f"{key}={text}")
        config = merge(config, _with_one_duration(layer), f"{key}={text}")
        chosen.add(key)
    config.out = config.out or f"runs/{recipe.stem if recipe else config.method}"
    stored = Path(config.out) / "config.yaml"
    if stored.is_file():  # a run of an older version resumes with the defaults of that version
        for key, value in compatibility.before(read_yaml(stored), set(keys) - chosen).items():
            config = merge(config, {key: value}, str(stored))
    loaded = OmegaConf.to_object(config)
    assert isinstance(loaded, RunConfig)
    return loaded


def sort(arguments: list[str]) -> tuple[Path | None, dict[str, Any], list[tuple[str, str]]]:
    """(the recipe, its {full key: value}, the (key, text) pairs of key=value in order). Images count as data.train=."""
    recipes = [Path(word) for word in arguments if word.endswith((".yaml", ".yml")) and "=" not in word]
    images = [word for word in arguments if "=" not in word and Path(word) not in recipes]
    for word in images:
        if kind_of(word) is None:
            return sort(_with_recipe(word, arguments))
    if len(recipes) > 1 or len(images) > 1:
        raise UserError(f"Give one recipe and one folder at most, not {', '.join([*map(str, recipes), *images])}.")
    given = [("data.train", word) for word in images] + assignments([word for word in arguments if "=" in word])
    durations = {key: text for key, text in given if key in DURATIONS and text not in ("", "null")}
    if len(durations) > 1:
        both = " and ".join(f"{key}={text}" for key, text in durations.items())
        raise UserError(f"The length of a run is epochs, steps or images, not {both} at once: give one.")
    return (recipes[0], flatten(read_yaml(recipes[0])), given) if recipes else (None, {}, given)


def _with_recipe(word: str, arguments: list[str]) -> list[str]:
    """The arguments with the file of the recipe that the word names. Raises UserError if it names none."""
    known = recipes()
    if word in known:
        return [str(known[word]) if one == word else one for one in arguments]
    if os.sep in word:
        raise UserError(f"{word} does not exist: give a folder or file of images.")
    otherwise = (
        f"{word} is neither a recipe, nor a folder or file of images, nor key=value.{did_you_mean(word, known)} "
        "`sslvit recipes` lists the recipes; those of your own end in .yaml."
    )
    raise UserError(spaced(word, arguments) or otherwise)


def _of_another_method(key: str) -> str:
    """A sentence on a key that only other methods have; the key itself if none has it."""
    for method in objectives.names():
        if key.removeprefix("objective.") in {item.name for item in fields(objectives.keys_of(method).Config)}:
            return f"{key} belongs to method={method}: leave it out, or give method={method}."
    return key


def _method_and_preset(
    recipe: Path | None, values: dict[str, Any], given: list[tuple[str, str]]
) -> tuple[str, str | None]:
    """The method and the preset: of the recipe, or of the last key=value that names them. Raises UserError."""
    named = values | {"objective.preset" if key == "preset" else key: text for key, text in given}
    method = str(named.get("method") or RunConfig.method)
    if recipe and "method" not in dict(given):
        objectives.check_bundled(method, recipe, "method")
    return method, named.get("objective.preset")


def _defaults(method: str, preset: str | None = None) -> DictConfig:
    """The defaults of the dataclasses, of the method's paper, and of a preset. Raises UserError."""
    module = objectives.keys_of(method)
    config = merge(OmegaConf.structured(RunConfig(method=method, objective=module.Config())), module.DEFAULTS, method)
    return config if preset is None else _with_preset(config, method, preset, getattr(module, "PRESETS", {}))


def _with_preset(config: DictConfig, method: str, preset: str, presets: dict[str, dict[str, Any]]) -> DictConfig:
    if not presets:
        raise UserError(f"objective.preset={preset}: method={method} has no presets, leave it out.")
    if preset not in presets:
        hint = did_you_mean(str(preset), presets)
        raise UserError(f"objective.preset={preset} is not one of {', '.join(presets)}.{hint}")
    return merge(config, {"objective": {"preset": preset, **presets[preset]}}, f"objective.preset={preset}")


def _with_one_duration(values: dict[str, Any]) -> dict[str, Any]:
    """A new length of the run replaces the old one, whatever its unit was."""
    given = any(values.get(key) is not None for key in DURATIONS)
    return dict.fromkeys(DURATIONS) | values if given else values


def save(config: RunConfig, path: Path) -> None:
    """Write what `load` reads back."""
    textfile.write(path, OmegaConf.to_yaml(OmegaConf.structured(config)))


def differences(old: Path, new: RunConfig) -> dict[str, tuple[Any, Any]]:
    """{key: (stored value, new value)} of the keys that differ."""
    values, now = compatibility.modernise(flatten(read_yaml(old)), str(old)), flatten(OmegaConf.structured(new))
    # A key that the file does not have had its default then, or the value that `compatibility` gives.
    before = flatten(_defaults(new.method)) | compatibility.before(values, now) | values
    return {key: (before.get(key), now.get(key)) for key in {**before, **now} if before.get(key) != now.get(key)}


# What people change first, as examples; the comment beside the field says the unit.
FIRST = (
    "data.train=scans/", "minutes=30", "method=dino", "out=runs/scans", "model.name=vit_small_patch16_224",
    "data.image_size=96", "epochs=100", "global_batch_size=256", "optim.base_lr=1e-3", "eval.test=labelled/test",
)  # fmt: skip
SECTIONS = {
    "": "The run", "model": "The encoder", "data": "The images", "objective": "The method", "optim": "The optimizer",
    "eval": "k-NN during the run", "save": "Checkpoints", "log": "What is written and shown",
}  # fmt: skip


def all_keys() -> list[str]:
    """Of every method."""
    return list(dict.fromkeys(key for method in objectives.names() for key in flatten(_defaults(method))))


def help_text(arguments: list[str]) -> str:
    """What is changed first, then all keys with their defaults and meaning, of the method and preset that the command
    line or its recipe names."""
    method, preset = _method_and_preset(*sort(arguments))
    lines = help_lines(OmegaConf.to_object(_defaults(method, preset)))
    chosen = f"method={method}" + (f" preset={preset}" if preset else "")
    meanings = {line.split("=")[0].strip(): line.strip().partition("   ")[2].strip() for line in lines}
    text = ["What is changed first, with examples; a key may be given by its last name alone:", ""]
    text += [f"  {example:<42}   {meanings[example.split('=')[0]]}" for example in FIRST]
    text += ["", f"All keys with their defaults for {chosen}:"]
    for section, title in SECTIONS.items():
        own = [line for line in lines if line.split("=")[0].strip().rpartition(".")[0] == section]
        text += ["", f"{title}:", *own]
    return "\n".join(text)


def check(config: RunConfig) -> None:
    """Raises UserError for values that cannot be, before anything is opened."""
    if not config.data.train:
        raise UserError("data.train is missing: name the images to train on, as in `sslvit pretrain path/to/images`.")
    check_limits("", config)
    for name in ("model", "data", "log", "save", "eval", "optim"):
        check_limits(f"{name}.", getattr(config, name))
    check_trackers(config.log.trackers)
    if (config.model.lora_rank or config.model.anchor) and (config.shard or not config.model.init):
        raise UserError("model.lora_rank and model.anchor need model.init=<weights that stay>, and cannot be sharded.")
    if config.data.value_range is not None:
        check_value_range("data.value_range", config.data.value_range)
    if config.save.keep_best and not (config.eval.test or config.model.init):
        raise UserError("save.keep_best=true chooses by k-NN accuracy: give eval.train and eval.test, or model.init.")
    if config.shard and config.precision == "fp16":
        raise UserError("shard=true does not work with precision=fp16: use bf16 or float32.")
    if config.shard and config.batch_size == "auto":
        raise UserError("batch_size=auto does not work with shard=true: give a number.")


def make_plan(config: RunConfig, num_images: int, world_size: int, rank: int) -> Plan:
    """Batches, steps and warm-up of a run. Raises UserError."""
    from .data.loader import make_layout  # imports torch, which takes seconds; --help needs no torch

    total = config.global_batch_size
    batch_size = config.batch_size if isinstance(config.batch_size, int) else None
    layout = make_layout(total, batch_size, num_images, world_size, rank, config.data.train)
    given = {key: value for key in DURATIONS if (value := getattr(config, key)) is not None}
    if len(given) != 1 or not min(given.values()) > 0:
        values = ", ".join(f"{key}={getattr(config, key)}" for key in DURATIONS)
        raise UserError(f"The length of the run must be one number above 0, as epochs, steps or images, not {values}.")
    ((unit, length),) = given.items()
    per_epoch = num_images // total
    steps = round(length * per_epoch) if unit == "epochs" else int(length if unit == "steps" else length // total)
    if steps < 1:
        raise UserError(f"{unit}={length} is less than one step of {total} images: make it longer.")
    warmup_steps = round(config.optim.warmup_epochs * per_epoch)
    if warmup_steps >= steps:
        raise UserError(_too_long_a_warmup(config.optim.warmup_epochs, f"{unit}={length:g}", steps, per_epoch))
    every = config.eval.every_epochs
    if every and round(every * per_epoch) < 1:
        raise UserError(f"eval.every_epochs={every:g} is less than one step: give at least {1 / per_epoch:.2g}.")
    return Plan(layout, per_epoch, steps, warmup_steps, round(config.optim.freeze_epochs * per_epoch))


def _too_long_a_warmup(warmup_epochs: float, given: str, steps: int, per_epoch: int) -> str:
    return (
        f"optim.warmup_epochs={warmup_epochs:g} is not shorter than the run of {steps / per_epoch:g} epochs ({given}, "
        f"{per_epoch} steps an epoch): give a tenth of the run, optim.warmup_epochs={steps / per_epoch / 10:.2g}."
    )
