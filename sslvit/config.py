"""The configuration of a run: dataclass defaults < the method's defaults < those of its preset < a YAML recipe <
key=value words.

Every key is declared in a dataclass beside the code that reads it. Nothing is changed after loading: what follows
from the configuration is computed by `make_plan`.
"""

import difflib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from omegaconf import DictConfig, OmegaConf

from . import objectives, optim
from .data import Config as DataConfig
from .data import image_size, kind_of
from .data.loader import Layout, make_layout
from .encoder import Config as ModelConfig
from .errors import UserError
from .evaluation.online import Config as EvalConfig
from .hardware import Precision
from .metrics import Config as LogConfig
from .optim import Config as OptimConfig
from .state import Config as SaveConfig
from .words import assignments, check_keys, flatten, full_key, help_lines, merge, nested, read_yaml, value_of

DURATIONS = ("epochs", "steps", "images")


@dataclass
class RunConfig:
    method: str = "mae"  # mae, dino, or the dotted name of a module of your own
    out: str = ""  # the run directory; empty: runs/ and the name of the recipe
    seed: int = 0  # of everything random: another number is another run
    epochs: float | None = None  # how long: passes over the images ...
    steps: int | None = None  # ... or optimizer steps ...
    images: int | None = None  # ... or images seen; exactly one of the three
    max_hours: float | None = None  # of this start: then save and end with status 75; the same command goes on
    global_batch_size: int = 256  # images for one optimizer step, over all processes
    batch_size: int | Literal["auto"] | None = None  # images at once on a process; null: its share; auto: what fits
    precision: Precision = "auto"  # auto: bf16 where the hardware is fast at it, else float32
    compile: bool = False  # torch.compile every transformer block: for GPUs and long runs; a minute at the start
    shard: bool = False  # split weights and moments among the processes (FSDP): for models too large for one GPU
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    objective: Any = None  # the method's Config
    optim: OptimConfig = field(default_factory=OptimConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    save: SaveConfig = field(default_factory=SaveConfig)
    log: LogConfig = field(default_factory=LogConfig)


@dataclass(frozen=True)
class Plan:
    """What follows from a configuration, the number of images and the number of processes."""

    layout: Layout
    steps_per_epoch: int
    steps: int
    warmup_steps: int


def load(words: list[str]) -> RunConfig:
    """The configuration that the words of a command line stand for: a recipe (*.yaml), images, key=value.

    Raises UserError.
    """
    recipes = [Path(word) for word in words if word.endswith((".yaml", ".yml")) and "=" not in word]
    folders = [word for word in words if "=" not in word and Path(word) not in recipes]
    for word in folders:
        if kind_of(word) is None:
            raise UserError(f"{word} is neither a recipe (*.yaml), nor a folder or file of images, nor key=value.")
    if len(recipes) > 1 or len(folders) > 1:
        raise UserError(f"Give one recipe and one folder at most, not {', '.join(map(str, recipes + folders))}.")
    given = [("data.train", folder) for folder in folders] + assignments([word for word in words if "=" in word])
    lengths = {key: value for key, value in given if key in DURATIONS and value not in ("", "null")}
    if len(lengths) > 1:
        shown_lengths = " and ".join(f"{key}={value}" for key, value in lengths.items())
        raise UserError(f"The length of a run is epochs, steps or images, not {shown_lengths} at once: give one.")
    values = read_yaml(recipes[0]) if recipes else {}

    method = str(next((v for k, v in reversed(given) if k == "method"), values.get("method") or RunConfig.method))
    preset = (values.get("objective") or {}).get("preset") if isinstance(values.get("objective"), dict) else None
    preset = next((v for k, v in reversed(given) if k in ("preset", "objective.preset")), preset)
    config = _defaults(method, preset)
    keys = list(flatten(config))
    for layer, where in [(values, str(recipes[0]))] if recipes else []:
        check_keys(layer, keys, where, "pretrain")
        config = merge(config, _with_one_duration(layer), where)
    for key, text in given:
        key = full_key(key, keys, "pretrain")
        layer = nested(key, value_of(config, key, text))
        config = merge(config, _with_one_duration(layer), f"{key}={text}")
    config.out = config.out or f"runs/{recipes[0].stem if recipes else method}"
    return OmegaConf.to_object(config)


def _defaults(method: str, preset: str | None = None) -> DictConfig:
    """The dataclasses' defaults under those of the method's paper, and those under what a preset of it sets. Raises
    UserError."""
    module = objectives.find(method)
    config = OmegaConf.merge(OmegaConf.structured(RunConfig(method=method, objective=module.Config())), module.DEFAULTS)
    if preset is None:
        return config
    presets = getattr(module, "PRESETS", {})
    if not presets:
        raise UserError(f"objective.preset={preset}: method={method} has no presets, leave it out.")
    if preset not in presets:
        near = difflib.get_close_matches(str(preset), presets, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise UserError(f"objective.preset={preset} is not one of {', '.join(presets)}.{hint}")
    return merge(config, {"objective": {"preset": preset, **presets[preset]}}, f"objective.preset={preset}")


def _with_one_duration(values: dict[str, Any]) -> dict[str, Any]:
    """A new length of the run replaces the old one, whatever its unit was."""
    given = any(values.get(key) is not None for key in DURATIONS)
    return dict.fromkeys(DURATIONS) | values if given else values


def save(config: RunConfig, path: Path) -> None:
    """Write what `load` reads back."""
    path.write_text(OmegaConf.to_yaml(OmegaConf.structured(config)), encoding="utf-8")


def differences(old: Path, new: RunConfig) -> dict[str, tuple[Any, Any]]:
    """{key: (value in the file, value now)} where a stored configuration and a new one differ."""
    stored, now = flatten(read_yaml(old)), flatten(OmegaConf.structured(new))
    before = flatten(_defaults(new.method)) | stored  # a key that is newer than the file had its default
    return {key: (before.get(key), now.get(key)) for key in {**before, **now} if before.get(key) != now.get(key)}


def help_text(method: str, preset: str | None = None) -> str:
    """All keys of a method with their defaults and what they mean."""
    return "\n".join(help_lines(OmegaConf.to_object(_defaults(method, preset))))


def check(config: RunConfig) -> None:
    """Refuse numbers that have no meaning, before anything is opened. Raises UserError."""
    least: dict[str, tuple[Any, float]] = {
        "data.workers": (config.data.workers, 0),
        "data.in_chans": (config.data.in_chans, 1),
        "data.image_size": (min(image_size(config.data)), 1),
        "log.every_steps": (config.log.every_steps, 1),
        "log.rank_every_steps": (config.log.rank_every_steps, 1),
        "log.max_nonfinite": (config.log.max_nonfinite, 1),
        "save.every_minutes": (config.save.every_minutes, 0),
        "save.every_steps": (config.save.every_steps, 1),
        "save.keep_last": (config.save.keep_last, 1),
        "save.keep_every": (config.save.keep_every, 1),
        "eval.every_epochs": (config.eval.every_epochs, 0),
        "eval.k": (config.eval.k, 1),
        "max_hours": (config.max_hours, 0),
    }
    for key, (value, minimum) in least.items():
        if value is not None and not value >= minimum:
            raise UserError(f"{key}={value} must be {minimum} or above.")
    if config.save.keep_best and not config.eval.test:
        raise UserError("save.keep_best=true keeps the best by k-NN accuracy: it needs eval.train and eval.test.")
    if not 0 <= config.data.bad_ratio <= 1:
        raise UserError(f"data.bad_ratio={config.data.bad_ratio} must lie between 0 and 1.")
    value_range = config.data.value_range
    if value_range is not None and not value_range[0] < value_range[1]:
        raise UserError(f"data.value_range={list(value_range)} must be [low,high] with low below high.")
    if config.shard and config.precision == "fp16":
        raise UserError("shard=true has no scaler of gradients, which precision=fp16 needs: use bf16 or float32.")
    if config.shard and config.batch_size == "auto":
        raise UserError(
            "batch_size=auto tries sizes on each process by itself, and with shard=true none runs without the others: "
            "give a number."
        )
    optim.check(config.optim)


def make_plan(config: RunConfig, num_images: int, world_size: int, rank: int) -> Plan:
    """Batches, steps and warm-up of a run. Raises UserError for what cannot be."""
    total = config.global_batch_size
    batch_size = config.batch_size if isinstance(config.batch_size, int) else None
    layout = make_layout(total, batch_size, num_images, world_size, rank, config.data.train)
    given = [key for key in DURATIONS if getattr(config, key) is not None]
    if len(given) != 1 or not getattr(config, given[0]) > 0:
        values = ", ".join(f"{key}={getattr(config, key)}" for key in DURATIONS)
        raise UserError(f"The length of the run must be one number above 0, as epochs, steps or images, not {values}.")
    steps_per_epoch = num_images // total
    steps = {
        "epochs": lambda: round(config.epochs * steps_per_epoch),
        "steps": lambda: config.steps,
        "images": lambda: config.images // total,
    }[given[0]]()
    if steps < 1:
        raise UserError(
            f"{given[0]}={getattr(config, given[0])} is less than one step of {total} images: make it longer."
        )
    warmup_steps = round(config.optim.warmup_epochs * steps_per_epoch)
    if warmup_steps >= steps:
        raise UserError(
            f"optim.warmup_epochs={config.optim.warmup_epochs:g} is not shorter than the run of "
            f"{steps / steps_per_epoch:g} epochs: a tenth of the run is usual, "
            f"optim.warmup_epochs={steps / steps_per_epoch / 10:.2g}."
        )
    return Plan(layout, steps_per_epoch, steps, warmup_steps)
