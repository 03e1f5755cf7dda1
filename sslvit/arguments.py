"""From the arguments of a command line and a YAML file to a typed dataclass, through OmegaConf.

Every key is declared in a dataclass. An undeclared key is an error that names the nearest one. The last
part of a key is enough (`mask_ratio=0.6` for `objective.mask_ratio=0.6`) if no other key ends in it.
"""

import dataclasses
import inspect
import json
import re
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from omegaconf import DictConfig, OmegaConf

from .errors import UserError, did_you_mean

OPEN = ("model.args", "model_args")  # keys whose value is a dictionary that model/factory.py checks
NEVER_SHORT = ("model.init",)  # keys that are always written in full: `init=` was DINO's before there was this one
YAML_BYTES = 1 << 18  # of one file of settings, which has some kB
Precision = Literal["auto", "float32", "bf16", "fp16"]  # of the keys `precision`
LARGEST = 2.0**63  # every number must be smaller; a seed need not


def parse(schema: Any, arguments: list[str], command: str) -> Any:
    """key=value arguments into a copy of the dataclass instance `schema`. Raises UserError."""
    config = OmegaConf.structured(schema)
    for key, text in assignments(arguments):
        key = full_key(key, list(flatten(config)), command)
        config = merge(config, {key: value_of(config, key, text)}, f"{key}={text}")
    return OmegaConf.to_object(config)


def assignments(arguments: list[str]) -> list[tuple[str, str]]:
    """["optim.base_lr=1e-3", "--seed=1"] -> [("optim.base_lr", "1e-3"), ("seed", "1")]. Raises UserError."""
    pairs = []
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if not equals or not key.strip("-") or key != key.strip():
            raise UserError(spaced(argument, arguments) or f"{argument} is not of the form key=value.")
        pairs.append((key.lstrip("-"), text))
    return pairs


def spaced(word: str, arguments: list[str]) -> str | None:
    """The sentence for a user who wrote `--epochs 3`, `epochs 3` or `epochs = 3`. None for any other word."""
    rest = " ".join(arguments[arguments.index(word) :])
    found = re.match(r"-*([a-z_][\w.]*)[\s=]+([^\s=]+)", rest) if "/" not in word else None
    return f"{found[0]}: write {found[1]}={found[2]}, without dashes or spaces." if found else None


def split_own(arguments: list[str], schema: Any, section: str) -> tuple[list[str], list[str]]:
    """(key=value with the keys of the dataclass instance `schema`, without `section.` before them; all others)."""
    names = {item.name for item in dataclasses.fields(schema)}

    def key(argument: str) -> str:
        return argument.lstrip("-").partition("=")[0]

    # data.workers of `sslvit data` is a key of the run.
    own = [one for one in arguments if "=" in one and key(one).removeprefix(f"{section}.") in names]
    rest = [one for one in arguments if one not in own]
    return [one.lstrip("-").removeprefix(f"{section}.") for one in own], rest


def value_of(config: DictConfig, key: str, text: str) -> Any:
    """The text itself for a key that holds text (a path may look like a number), else what YAML reads in it."""
    current = OmegaConf.select(config, key)
    if isinstance(current, str) and text != "null":
        return text
    try:
        value = OmegaConf.from_dotlist([f"value={text}"]).value
    except Exception as error:  # whatever YAML's parser raises
        raise UserError(f"{key}={text} cannot be read: {first_line(error)}.") from error
    return [value] if isinstance(current, Sequence) and isinstance(value, (int, float, str)) else value  # k=20: [20]


def read_yaml(path: Path) -> dict[str, Any]:
    """The plain values of a YAML file: no tag makes an object, no `${...}` is resolved. Raises UserError."""
    if not path.is_file():
        beside = path.parent.glob("*.yaml") if path.parent.is_dir() else []
        own = f" `{path.stem}` alone is the recipe that comes with sslvit." if path.stem in recipes() else ""
        raise UserError(f"There is no file {path}.{own or did_you_mean(str(path), map(str, beside))}")
    try:
        if path.stat().st_size > YAML_BYTES:
            raise ValueError(f"it is larger than {YAML_BYTES:,} bytes, the limit of a file of settings")
        values: Any = OmegaConf.to_container(OmegaConf.load(path))
    except Exception as error:  # whatever YAML's parser raises
        raise UserError(_yaml_problem(path, error)) from error
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold keys and values, not a {type(values).__name__}.")
    for value in scalars(values):
        if isinstance(value, str) and "${" in value:  # OmegaConf would read the environment or another key
            raise UserError(
                f"{path} has the text {value[:200]!r}, and a file cannot refer to other values or to the environment: "
                "write the value itself, or give its key on the command line."
            )
    return values


def _yaml_problem(path: Path, error: Exception) -> str:
    """A sentence with the line, where the parser names one."""
    mark, problem = getattr(error, "problem_mark", None), str(getattr(error, "problem", None) or first_line(error))
    if mark is None:
        return f"{path} cannot be read: {problem}."
    line = "".join(path.read_text(errors="replace").splitlines()[mark.line : mark.line + 1])
    if "\t" in line[: len(line) - len(line.lstrip())]:
        return f"{path} line {mark.line + 1}: a tab; indent with spaces."
    if problem.startswith("found duplicate key"):
        return f"{path} line {mark.line + 1}: `{problem.split()[-1]}` is given twice."
    return f"{path} line {mark.line + 1} cannot be read: {problem}."


def recipes() -> dict[str, Path]:
    """{name: file} of the recipes that come with sslvit: in a wheel beside this file, in a clone above it."""
    here = Path(__file__).parent
    folder = here / "configs" if (here / "configs").is_dir() else here.parent / "configs"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def flatten(config: DictConfig | dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"optim.base_lr": 1.5e-4, ...}. The value of an open key (model.args) stays one dictionary."""
    values: Any = OmegaConf.to_container(config, resolve=True) if isinstance(config, DictConfig) else config
    leaves: dict[str, Any] = {}
    for key, value in values.items():
        path = f"{prefix}{key}"
        if isinstance(value, dict) and path not in OPEN:
            leaves.update(flatten(value, f"{path}."))
        else:
            leaves[path] = list(value) if isinstance(value, tuple) else value
    return leaves


def check_keys(values: dict[str, Any], keys: list[str], where: str, command: str) -> None:
    """Raises UserError for a full key that is not among the declared ones."""
    for key in values:
        if key not in keys and not _is_open(key):
            raise UserError(f"{where}: {_unknown(key, keys, command)}")


def full_key(key: str, keys: list[str], command: str, named: list[str] | None = None, elsewhere: Any = str) -> str:
    """The declared key that `key` means: itself, one inside an open value, or the only one that ends in it. Raises
    UserError for others. named: the keys that it may name; None: all. elsewhere(key): what is known of it."""
    sections = {full[: m.start()] for full in keys for m in re.finditer(r"\.", full)}
    if key in keys or key in sections or _is_open(key):
        return key
    matches = [full for full in keys if full.endswith(f".{key}") and full not in NEVER_SHORT]
    if len(matches) > 1:
        raise UserError(f"The key {key} could mean {' or '.join(matches)}: write it in full.")
    if not matches:
        known = elsewhere(key)
        raise UserError(_unknown(key, named or keys, command) if known == key else known)
    return matches[0]


def _is_open(key: str) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in OPEN)


def _unknown(key: str, keys: list[str], command: str) -> str:
    by_last_name = {full.rsplit(".", 1)[-1]: full for full in keys}
    last = key.rsplit(".", 1)[-1]
    hint = did_you_mean(key, keys) or did_you_mean(last, by_last_name, by_last_name)
    part = next((full for name, full in by_last_name.items() if last in name.split("_")[1:]), None)  # lr: base_lr
    hint = f" Did you mean {part}?" if part and not hint else hint
    return f"There is no key {key}.{hint} `sslvit {command} --help` lists them all."


def merge(config: DictConfig, values: dict[str, Any], where: str) -> DictConfig:
    """Set values in the configuration, {"optim": {"base_lr": 1e-3}} or {"optim.base_lr": 1e-3}, checked against its
    types, and return it. Raises UserError that begins with `where`; some of the values are set then.

    A list of texts (several folders) for a key that holds one text becomes the text that stands for it: ["a", "b"].
    """
    try:
        for key, value in flatten(values).items():
            several = isinstance(value, list) and value and all(isinstance(item, str) for item in value)
            if several and isinstance(OmegaConf.select(config, key), str):
                value = json.dumps(value, ensure_ascii=False)
            OmegaConf.update(config, key, value)
        OmegaConf.to_object(config)  # checks tuples and interpolations, ...
        for key, value in flatten(config).items():  # ... but not that the items of a tuple are single values
            if isinstance(value, list) and any(isinstance(item, (list, tuple, dict)) for item in value):
                raise ValueError(f"{key}={format_value(value)} holds a list or a dictionary: give single values")
            sizes = [abs(number) for number in scalars(value) if isinstance(number, (int, float)) and key != "seed"]
            if not all(size < LARGEST for size in sizes):  # NaN is not smaller either
                raise ValueError(f"{key}={format_value(value)} must be finite and below {LARGEST:.1e}")
        return config
    except Exception as error:  # OmegaConf's own, and TypeError for a list in place of a dictionary
        raise UserError(_refusal(config, flatten(values), where, error)) from error


def _refusal(config: DictConfig, values: dict[str, Any], where: str, error: Exception) -> str:
    """Why a value cannot be, in the words of who wrote it."""
    key = re.sub(r"\[.*", "", str(getattr(error, "full_key", None) or ""))
    group, _, last = key.rpartition(".")
    parent = _node(config, group) if group else config
    if key not in values or parent is None:
        return f"{where}: {first_line(error)}."
    node: Any = parent._get_node(last)
    before = "" if where.startswith(f"{key}=") else f"{where}: "
    if isinstance(node, DictConfig) and key not in OPEN:
        first = next(iter(flatten(node)), "...")
        also = ", or just the folder" if key == "data" else ""
        return f"{before}{key} is a group of keys: write {key}.{first}={format_value(values[key])}{also}."
    wanted = _in_words(node._metadata.type_hint)
    return (
        f"{before}{key} must be {wanted}, not {format_value(values[key])}."
        if wanted
        else (f"{where}: {first_line(error)}.")
    )


def _node(config: Any, key: str) -> Any:
    """The node of a key as it was written, where `OmegaConf.select` would follow a reference; None if there is none."""
    for part in key.split("."):
        if not isinstance(config, DictConfig) or config._is_interpolation() or config._is_none():
            return None
        config = config._get_node(part)
    return None if not isinstance(config, DictConfig) or config._is_interpolation() or config._is_none() else config


WORDS: dict[Any, str] = {int: "a whole number", float: "a number", bool: "true or false", str: "a word"}


def _in_words(hint: Any) -> str:
    """The type of a key for people; empty for one that has no short name."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return " or ".join(map(str, arguments))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_in_words(one) for one in arguments if one is not type(None))
    if origin in (tuple, list):
        single = _in_words(arguments[0]).removeprefix("a ")
        many = "" if ... in arguments or origin is list else f"{len(arguments)} "
        return f"a list of {many}{single}s"
    return WORDS.get(hint, "")


def scalars(value: Any) -> list[Any]:
    """All single values in lists and dictionaries within one another."""
    if isinstance(value, dict):
        value = list(value.values())
    return [scalar for item in value for scalar in scalars(item)] if isinstance(value, (list, tuple)) else [value]


def format_value(value: Any) -> str:
    """A value as a user would write it: null, true, [1,2]."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return f"[{','.join(map(format_value, value))}]"
    return str(value)


def first_line(error: Exception) -> str:
    """The first line of an error's text, with the key that OmegaConf names below it."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    key = next((line.split(":", 1)[1].strip() for line in lines if line.strip().startswith("full_key:")), "")
    text = re.sub(r"Value '.*' of type '(\$VALUE_TYPE|ListConfig)'", "a value", lines[0].rstrip("."))  # of tuples
    return f"{key}: {text}" if key and key not in text else text


def help_lines(node: Any, prefix: str = "") -> list[str]:
    """A line for each key of a dataclass instance: default, and the comment beside the field in the source."""
    comments = dict(
        match
        for cls in reversed(type(node).__mro__[:-1])
        for match in re.findall(
            r"^    (\w+):[^#\n]*#\s*(?:type: ignore\S*\s+#\s*)?(.+)$", inspect.getsource(cls), flags=re.MULTILINE
        )
    )
    lines = []
    for item in dataclasses.fields(node):
        value = getattr(node, item.name)
        if dataclasses.is_dataclass(value):
            lines += help_lines(value, f"{prefix}{item.name}.")
        else:
            lines.append(
                f"  {f'{prefix}{item.name}={format_value(value)}':<42}   {comments.get(item.name, '')}".rstrip()
            )
    return lines
