"""From a command line to a whole configuration: what an earlier start chose, what is chosen now, or only a length."""

import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from .. import config as configuration
from .. import data
from ..arguments import flatten, format_value, full_key, read_yaml
from ..checkpoints.state import steps_saved
from ..config import DURATIONS, RunConfig
from ..distributed import gather_objects, say, world_size
from ..errors import UserError, check_limits
from ..hardware import start_accelerator
from ..pace import CLOSING
from . import choose, look, speed

Pairs = list[tuple[str, str]]  # (key, text) of key=value
TIMES = ("minutes", "hours")
DAY = 24 * 60.0  # minutes
MEASURED = 0.005  # share of the time in which the speed of a recipe is measured, between these seconds
LEAST, MOST = 0.3, 4.0
START = 3.0  # seconds from there to the first step
EPOCHS = {"optim": ("warmup_epochs", "freeze_epochs"),
          "objective": ("teacher_temp_warmup_epochs", "freeze_last_layer_epochs")}  # fmt: skip


def automatic(words: list[str], pairs: Pairs, began: float) -> RunConfig:
    """What is not given is chosen. words: of the command line, of which pairs are the keys. began: by time.monotonic().
    Raises UserError."""
    recipe, of_recipe, _ = configuration.sort(words)  # with settings=auto, its keys count as given
    given = {**of_recipe, **dict(pairs)}
    base = configuration.load([word for word in words if word.partition("=")[0].lstrip("-") not in TIMES])
    configuration.check(base)
    if hasattr(base.objective, "LIMITS"):  # the choices follow from these values
        check_limits("objective.", base.objective)
    out = base.out if "out" in given else f"runs/{_name(base.data.train)}"
    minutes, by = _minutes(dict(pairs))
    if config := going_on(out, pairs, None if by else minutes):
        return config
    machine, values = speed.machine(base), given_values(base, list(given))
    facts = look.look(base, values.get("data.in_chans"))
    made = gather_objects(choose.choose(facts, machine, minutes, values))[0]
    timed = given.keys().isdisjoint(DURATIONS)
    time = f"{minutes:g} minute{'s' * (minutes != 1)}"
    time = f"{time}{by}" if timed else f"settings as for {time}, and the length that you give"
    long = _long(minutes) if timed else []
    say(*long, *heading(base, facts, machine, time), *[choice.line() for choice in made], "")
    chosen = [f"{key}={format_value(value)}" for choice in made for key, value in choice.keys.items()]
    extra = [f"out={out}", "settings=auto", *([f"minutes={minutes:g}"] if timed else [])]
    files = [str(recipe)] if recipe else []
    config = configuration.load([*files, *chosen, *[f"{k}={v}" for k, v in pairs if k not in TIMES], *extra])
    if timed and config.method not in choose.STEPS:  # of your own: its length may not be corrected
        config = replace(config, steps=speed.steps_in(config, _end(began, minutes), _seconds(minutes)))
    return config


def timed(words: list[str], pairs: Pairs, began: float) -> RunConfig:
    """A recipe, or the paper's settings, with a length that ends in time. Raises UserError."""
    given = dict(pairs)
    config = configuration.load([word for word in words if word.partition("=")[0].lstrip("-") not in TIMES])
    configuration.check(config)
    minutes, _ = _minutes(given)
    if stored := going_on(config.out, pairs, minutes):
        return stored
    if any(key in given for key in DURATIONS):
        raise UserError("Give a time (minutes, hours) or a length (epochs, steps, images), not both.")
    start_accelerator(config.precision)  # from here on one process speaks
    say(*_long(minutes), f"Measuring the speed of this recipe, to end after {minutes:g} minutes.")
    count = len(data.open_source(config.data.train, config.data))
    plan = configuration.make_plan(config, count, world_size(), 0)
    steps = gather_objects(speed.steps_in(config, _end(began, minutes), _seconds(minutes)))[0]
    config = replace(config, minutes=minutes, hours=None, epochs=None, images=None, steps=steps)
    named = {key.rpartition(".")[2] for key in given}
    for section, keys in EPOCHS.items():  # the same share of the run as in the recipe
        part = getattr(config, section)
        has = {item.name for item in fields(part)}
        scaled = {key: getattr(part, key) * steps / plan.steps for key in keys if key in has and key not in named}
        setattr(config, section, replace(part, **scaled))
    epochs = steps / plan.steps_per_epoch
    say(f"About {steps:,} steps ({epochs:.3g} epochs) in place of {plan.steps:,}; the warm-up keeps its share.")
    return config


def going_on(out: str, pairs: Pairs, minutes: float | None) -> RunConfig | None:
    """The settings that were chosen for the run of this directory, if it has a checkpoint of such a run. minutes: that
    are given now."""
    path = Path(out) / "config.yaml"
    if not (steps_saved(Path(out)) and path.is_file()):
        return None
    stored = read_yaml(path)
    before = stored.get("minutes")
    if not (before or stored.get("settings") == "auto"):
        return None
    words = [f"{key}={value}" for key, value in pairs if key not in TIMES]
    config = configuration.load([str(path), *words, f"out={out}"])
    say(f"{out} goes on with the settings of its first start, which are in {path}; nothing is measured again.")
    if before and minutes and minutes != before and config.steps:
        config = replace(config, minutes=minutes, steps=max(1, round(config.steps * minutes / before)))
        say(f"{minutes:g} minutes in place of {before:g}: about {config.steps:,} steps.")
    return config


def given_values(base: RunConfig, named: list[str]) -> dict[str, Any]:
    """{full key: value} of the keys that are named, those of model.args one by one."""
    values = flatten(OmegaConf.structured(base))
    keys = {full_key(key, list(values), "pretrain") for key in named} - {*TIMES, "settings"}
    found = {key: values[key] for key in keys if key in values}
    args = values["model.args"] if any(key.startswith("model.args") for key in keys) else {}
    found.pop("model.args", None)
    return found | {f"model.args.{name}": value for name, value in args.items()}


def heading(base: RunConfig, facts: choose.Facts, machine: choose.Machine, time: str) -> list[str]:
    copies = f", {facts.copies:.0%} of a sample are copies" if facts.copies > 0.01 else ""
    return [
        f"{facts.count:,} images of {base.data.train}{copies}; {machine.name}, {machine.rate / 1e9:,.0f} GFLOP/s; "
        f"{time}.",
        "Chosen settings (keys that you give win; settings=paper takes the papers'):",
    ]


def _long(minutes: float) -> list[str]:
    return [f"Warning: this run will take {minutes / DAY:.1f} days."] if minutes > DAY else []


def _minutes(given: dict[str, str]) -> tuple[float, str]:
    """(minutes of the run, a remark if nobody gave them)."""
    asked = [key for key in TIMES if key in given]
    if len(asked) > 1:
        raise UserError(f"Give minutes={given['minutes']} or hours={given['hours']}, not both.")
    if not asked:
        return choose.DEFAULT_MINUTES, ", because no time was given (minutes=, hours=)"
    try:
        number = float(given[asked[0]]) * (60 if asked[0] == "hours" else 1)
    except ValueError:
        number = -1.0
    if not 0 < number < 1e6:
        raise UserError(f"{asked[0]} must be a number above 0, not {given[asked[0]]}.")
    return number, ""


def _end(began: float, minutes: float) -> float:
    """By time.monotonic(), of the last step."""
    return began + 60 * minutes - CLOSING - START


def _seconds(minutes: float) -> float:
    return min(MOST, max(LEAST, MEASURED * 60 * minutes))


def _name(spec: str) -> str:
    """data/my scans/ -> my_scans"""
    first = re.split(r"[,:\[\]]", spec.strip("["))[0]
    return re.sub(r"\W+", "_", Path(first).stem).strip("_") or "run"
