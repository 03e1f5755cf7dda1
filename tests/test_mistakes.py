"""Each named mistake in the source makes the ordinary suite fail.

`python -m pytest -m slow -s -n0 tests/test_mistakes.py` tries them all; `-k` and a part of a name chooses some.
"""

import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from .forked_python import Interpreter
from .mistakes import Mistake
from .mistakes.evaluation import EVALUATION
from .mistakes.safety import SAFETY
from .mistakes.training import TRAINING

ROOT = Path(__file__).parent.parent
MISTAKES = TRAINING + EVALUATION + SAFETY
PARTS = ("sslvit", "tests", "eval", "configs", "pyproject.toml", "README.md")
NOT_AN_ANSWER = re.compile(r"^E +(ImportError|ModuleNotFoundError|SyntaxError|NameError|IndentationError)", re.M)


def source(mistake: Mistake) -> str:
    return (ROOT / "sslvit" / mistake.file).read_text(encoding="utf-8")


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_a_mistake_fits_the_source(mistake):
    assert source(mistake).count(mistake.before) == 1
    assert mistake.before != mistake.after
    for target in mistake.tests.split():
        assert (ROOT / target.split("::")[0]).exists()


def test_names_of_mistakes_are_unique():
    names = [mistake.name for mistake in MISTAKES]
    assert len(set(names)) == len(names)


def copy_of_the_package(folder: Path) -> Path:
    """What the tests of a mistake run on."""
    for name in PARTS:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


# What a process does that was forked from one with torch and timm: no import is waited for, and sslvit is the copy's.
PYTEST = """
import os, signal, sys
os.environ.update(PYTHONPATH=os.getcwd(), PYTHONDONTWRITEBYTECODE="1", OMP_NUM_THREADS="1")
sys.dont_write_bytecode = True
signal.alarm(600)
import pytest
status = pytest.main(["-x", "-n0", "-q", "--tb=short", "-p", "no:cacheprovider", *sys.argv[1:]])
assert "sslvit" in sys.modules and sys.modules["sslvit"].__file__.startswith(os.getcwd())
sys.stdout.flush()
os._exit(int(status))
"""


@pytest.fixture(scope="module")
def python():
    interpreter = Interpreter("accelerate", "faiss", "pytest", "sklearn.linear_model", "torchvision.transforms")
    yield interpreter
    interpreter.close()


def run_tests(python: Interpreter, folder: Path, targets: str) -> tuple[int, str]:
    """Exit status and output of pytest in a process of its own."""
    command = [python.executable, "-c", PYTEST, *targets.split()]
    done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.returncode, done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("tests", sorted({mistake.tests for mistake in MISTAKES}))
def test_without_a_mistake_the_tests_pass(tests, python, tmp_path):
    status, output = run_tests(python, copy_of_the_package(tmp_path / "copy"), tests)
    assert status == 0, output


@pytest.mark.slow
@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_a_mistake_makes_a_test_fail(mistake, python, tmp_path, capsys):
    assert mistake.before in source(mistake)
    copy = copy_of_the_package(tmp_path / "copy")
    path = copy / "sslvit" / mistake.file
    path.write_text(source(mistake).replace(mistake.before, mistake.after), encoding="utf-8")
    began = time.monotonic()
    status, output = run_tests(python, copy, mistake.tests)
    failed = re.findall(r"^FAILED (\S+)", output, re.M)
    assert status == 1, f"exit status {status}: the mistake was not found\n{output}"
    assert failed, f"no test failed by itself\n{output}"
    assert not NOT_AN_ANSWER.search(output), f"the mistake breaks the code instead of changing what it does\n{output}"
    with capsys.disabled():
        print(f"\n{mistake.name} | {failed[0].removeprefix('tests/')} | {time.monotonic() - began:.0f} s", flush=True)
