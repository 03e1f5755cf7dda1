"""The shape of the package: imports only go down and never in a circle, every declared key is read, and the way from
the command line to the first backward pass is short."""

import ast
import dataclasses
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

import sslvit
from sslvit import config, objectives
from sslvit.__main__ import main
from sslvit.data.augment import per_channel

ROOT = Path(sslvit.__file__).parent
# Top to bottom. A module may import from its own layer and from those below; families never import one another.
LAYERS = [
    {"__main__", "api"},
    {"settings"},
    {"tools"},
    {"pretraining"},
    {"run", "config", "memory", "sharding", "pace"},
    {"inspection"},
    {"report"},
    {"evaluation", "export"},
    {"pretrained", "start"},
    {"objectives"},
    {"step", "checkpoints", "data"},
    {"model"},
    {
        "metrics",
        "distributed",
        "hardware",
        "energy",
        "arguments",
        "compatibility",
        "rng",
        "optim",
        "errors",
        "progress",
        "schedule",
        "stopping",
        "hub",
    },
]
FAMILIES = {"objectives", "evaluation", "export"}
FOLDERS = sorted(str(path.parent.relative_to(ROOT)) for path in ROOT.rglob("__init__.py") if path.parent != ROOT)


@cache
def modules() -> dict[str, Path]:
    """{"data.loader": its file}; a package stands for its __init__."""
    names = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


@cache
def imports(name: str) -> set[str]:
    """Modules of the package that a module imports, at its top or in a function."""
    found, known = set(), modules()
    package = name.split(".") if known[name].name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(known[name].read_text())):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").split(".")[0] == "sslvit"):
            base = package[: len(package) - node.level + 1] if node.level else []
            target = base + (node.module.removeprefix("sslvit").strip(".").split(".") if node.module else [])
            place = ".".join(part for part in target if part)
            for alias in node.names:
                full = f"{place}.{alias.name}".strip(".")
                found.add(full if full in known else place)
    return {target for target in found if target}


def layer(name: str) -> int:
    return next(i for i, names in enumerate(LAYERS) if name.split(".")[0] in names)


@pytest.mark.parametrize("name", sorted(modules()))
def test_imports_go_down(name):
    if not name:
        return
    top = name.split(".")[0]
    for target in imports(name):
        other = target.split(".")[0]
        assert layer(target) >= layer(name), f"{name} imports {target} from a higher layer"
        assert top == other or not {top, other} <= FAMILIES, f"{name} imports {target}: families stand side by side"


def test_no_imports_go_in_a_circle():
    graph = {name: imports(name) for name in modules()}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for target in graph[name]:
                visit(target, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_few_files_lie_at_the_top():
    assert len(list(ROOT.glob("*.py"))) <= 26


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_says_what_lives_there_and_what_it_may_import(folder):
    text = ast.get_docstring(ast.parse((ROOT / folder / "__init__.py").read_text())) or ""
    assert len(text) > 100, folder
    assert "mport" in text, folder


@cache
def attributes() -> set[str]:
    """Every attribute that the package reads, and every string that it could pass to getattr."""
    names = set()
    for path in modules().values():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                names.add(node.attr)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                names.add(node.value)
    return names


@pytest.mark.parametrize("method", objectives.names())
def test_every_key_is_read(method):
    read = attributes()

    def unread(node) -> list[str]:
        fields = [(item.name, getattr(node, item.name)) for item in dataclasses.fields(node)]
        inner = [name for _, value in fields if dataclasses.is_dataclass(value) for name in unread(value)]
        return [name for name, _ in fields if name not in read] + inner

    assert unread(config.load([f"method={method}"])) == []


def test_torch_distributed_is_touched_in_one_file():
    for name, path in modules().items():
        if name != "distributed":
            assert "torch.distributed" not in path.read_text(), name


def test_nothing_is_unpickled():
    for name, path in modules().items():
        text = path.read_text()
        assert "pickle" not in text.replace("Nothing is pickled", ""), name
        assert "torch.load(" not in text or "weights_only=True" in text, name


class FirstBackward(BaseException):
    """Raised in place of the first backward pass."""


def test_the_way_to_the_first_backward_pass_is_short(tmp_path, monkeypatch):
    """Lines of all functions of the package that the quickstart enters, without loader processes and evaluation."""

    def stop(*args, **kwargs):
        raise FirstBackward

    entered = set()

    def note(frame, event, argument):
        if event == "call" and frame.f_code.co_filename.startswith(str(ROOT)):
            entered.add((frame.f_code.co_filename, frame.f_code.co_firstlineno))

    per_channel.cache_clear()  # or a test before has already entered it
    monkeypatch.setattr(torch.Tensor, "backward", stop)
    quick = ["data.train=fractals:train,count=100", "images=640", "eval.train=", "eval.test=", "rank_every_steps=null"]
    recipe = str(ROOT.parent / "configs" / "quickstart.yaml")
    before = sys.getprofile()
    sys.setprofile(note)
    try:
        with pytest.raises(FirstBackward):
            main(["pretrain", recipe, *quick, "workers=0", "precision=float32", f"out={tmp_path / 'run'}"])
    finally:
        sys.setprofile(before)
    lines: dict[str, set[int]] = {}
    for file in {file for file, _ in entered}:
        for node in ast.walk(ast.parse(Path(file).read_text())):
            if isinstance(node, ast.FunctionDef):
                first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
                if (file, first) in entered:
                    assert node.end_lineno is not None
                    lines.setdefault(str(Path(file).relative_to(ROOT)), set()).update(range(first, node.end_lineno + 1))
    counts = {file: len(numbers) for file, numbers in sorted(lines.items(), key=lambda item: -len(item[1]))}
    # An addition that is worth its lines may raise this by them.
    assert sum(counts.values()) <= 2157, counts  # 13 of them on machines that count energy
    assert len(counts) <= 40, counts
