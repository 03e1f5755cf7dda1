"""The shape of the package: imports only go down, and every declared key is read."""

import ast
import dataclasses
from pathlib import Path

import pytest

import sslvit
from sslvit import config, objectives

ROOT = Path(sslvit.__file__).parent
# Top to bottom. A module may import from its own layer and from those below; families never import one another.
LAYERS = [
    {"__main__"},
    {"bench", "report", "picture", "submit"},
    {"pretrain"},
    {"run", "config", "saving", "nonfinite", "memory"},
    {"evaluation", "export"},
    {"pretrained"},
    {"objectives"},
    {"timm_folder"},
    {"blocks", "encoder", "heads", "losses", "views", "augment", "data", "optim", "state", "sharding"},
    {
        "branches",
        "resample",
        "rng",
        "schedules",
        "masks",
        "metrics",
        "distributed",
        "hardware",
        "words",
        "errors",
        "stopping",
        "lock",
        "journal",
        "board",
        "tensorfile",
    },
]
FAMILIES = {"objectives", "evaluation", "export"}


def modules() -> dict[str, Path]:
    return {str(path.relative_to(ROOT).with_suffix("")): path for path in ROOT.rglob("*.py")}


def imports(name: str, path: Path) -> set[str]:
    """Top-level names inside sslvit that a module imports."""
    package = Path(name).parent.parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            target = (*base, *(node.module.split(".") if node.module else ()))
            found |= {target[0]} if target else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sslvit"):
            found.add(node.module.split(".")[1] if "." in node.module else node.names[0].name)
    return found - {"__version__"}


def layer(top: str) -> int:
    return next(i for i, names in enumerate(LAYERS) if top in names)


@pytest.mark.parametrize("name", sorted(modules()))
def test_imports_go_down(name):
    if name == "__init__":
        return
    top = Path(name).parts[0]
    for target in imports(name, modules()[name]):
        if target == top:
            continue
        assert layer(target) >= layer(top), f"{name} imports {target} from a higher layer"
        assert not {top, target} <= FAMILIES, f"{name} imports {target}: families stand beside one another"


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
        return [
            item.name
            for item in dataclasses.fields(node)
            if item.name not in read
        ] + [name for item in dataclasses.fields(node) if dataclasses.is_dataclass(value := getattr(node, item.name))
             for name in unread(value)]  # fmt: skip

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
