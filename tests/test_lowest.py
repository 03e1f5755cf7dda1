"""The `lowest` job: the suite with the lowest versions of all dependencies that pyproject.toml allows.

`python -m pytest -m slow -n0 tests/test_lowest.py` needs the network, 6 GB of disk and half an hour.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_the_suite_passes_with_the_lowest_versions(tmp_path):
    uv = shutil.which("uv", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert uv, "pip install uv"
    source, python = tmp_path / "source", tmp_path / "environment" / "bin" / "python"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "runs", "*.egg-info", "__pycache__"))
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST_", "PYTHONPATH"))}

    def call(*command: object) -> None:
        subprocess.run(list(map(str, command)), cwd=source, env=clean, check=True)

    try:
        call(uv, "venv", "-q", "--python", sys.executable, python.parent.parent)
        call(uv, "pip", "install", "-q", "--python", python, "--resolution", "lowest-direct", "-e", ".[test]")
        call(python, "-m", "pytest", "-q")
    finally:
        shutil.rmtree(python.parent.parent, ignore_errors=True)
