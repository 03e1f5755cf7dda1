"""Evaluations of an encoder, one module each, and what they share.

A module with a `COMMAND` is an evaluation and a command of `sslvit`. It also defines `run(config)`, and its keys are
the class of its name in config.py, which needs no torch. The other modules are their parts: frozen.py (an encoder and
the record of its results), protocol.py (training and test images and their features), probes.py, scores.py and so on;
`finetuning/` holds those of `finetune`. Evaluations import data, model and pretrained, never objectives or export.
"""

import ast
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path


@dataclass(frozen=True)
class Column:
    """A number that `sslvit compare` shows: `key` of the results in <run>/eval/<file>.json. Results without this key
    are left out."""

    title: str
    key: str
    file: str = ""  # empty: the name of the evaluation
    kind: str = ""  # which number, where a file has several
    rows: str = ""  # the key of a list of results, each with the number and with `settings`; empty: one result
    settings: dict[str, str] = field(default_factory=dict)  # {key of a row: its symbol}; each value has its own column
    usual: tuple[float, ...] = ()  # settings to show if all runs have them; else the first settings that all have
    unit: str = "%"


@dataclass(frozen=True)
class Command:
    """What `sslvit --help` and `sslvit compare` say about an evaluation."""

    usage: str
    help: str
    columns: tuple[Column, ...] = ()


@cache
def commands() -> dict[str, Command]:
    """{name: COMMAND of the module}. Reads the source files and imports none of them: importing torch takes seconds."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("*.py")):
        source = path.read_text(encoding="utf-8")
        if "\nCOMMAND = Command(" in source:
            values = {ast.unparse(node.targets[0]): node.value for node in ast.parse(source).body
                      if isinstance(node, ast.Assign)}  # fmt: skip
            code = compile(ast.Expression(values["COMMAND"]), str(path), "eval")
            found[path.stem] = eval(code, {"__builtins__": {}, "Command": Command, "Column": Column})
    return found
