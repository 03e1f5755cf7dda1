"""Evaluations are found by their files, and everything that is said of them comes from there."""

import importlib
import runpy
import sys
from pathlib import Path

import pytest

import sslvit.__main__
from sslvit import evaluation

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", evaluation.commands())
def test_what_is_read_from_the_source_is_what_the_module_says(name):
    module = importlib.import_module(f"sslvit.evaluation.{name}")
    assert evaluation.commands()[name] == module.COMMAND
    assert callable(module.run)
    assert module.Config().run == ""


def test_there_is_a_script_for_each():
    assert {path.stem for path in (ROOT / "eval").glob("*.py")} == set(evaluation.commands())


@pytest.mark.parametrize("name", evaluation.commands())
def test_a_script_is_the_command_of_its_name(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"eval/{name}.py", "--help"])
    with pytest.raises(SystemExit) as done:
        runpy.run_path(str(ROOT / "eval" / f"{name}.py"), run_name="__main__")
    assert done.value.code == 0
    assert capsys.readouterr().out.startswith(f"sslvit {name} {evaluation.commands()[name].usage}")


def test_a_new_evaluation_is_one_file(monkeypatch, tmp_path, cli, request):
    evaluation.commands.cache_clear()
    request.addfinalizer(evaluation.commands.cache_clear)
    source = 'from . import Column, Command\n\nCOMMAND = Command("run=...", "weighs it", (Column("weight", "kg"),))\n'
    (tmp_path / "weigh.py").write_text(source)
    (tmp_path / "part.py").write_text("SIZE = 1\n")
    monkeypatch.setattr(evaluation, "__file__", str(tmp_path / "__init__.py"))
    assert list(evaluation.commands()) == ["weigh"]
    assert "  weigh      run=...  " in sslvit.__main__.usage()
    (tmp_path / "run" / "eval").mkdir(parents=True)
    (tmp_path / "run" / "eval" / "weigh.json").write_text('{"results": {"kg": 3}}')
    assert cli("compare", tmp_path / "run")[1].split()[:4] == ["run", "weight", "%", str(tmp_path / "run")]
