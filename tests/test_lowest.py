"""The `lowest` job: the suite with the lowest versions of all dependencies that pyproject.toml allows.

`python -m pytest -m slow -n0 tests/test_lowest.py` needs the network, 6 GB of disk and half an hour.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_the_suite_passes_with_the_lowest_versions():
    uv = shutil.which("uv", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert uv, "pip install uv"
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST_", "PYTHONPATH"))}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)  # some tests read the package as another user
        source, python = Path(folder) / "source", Path(folder) / "environment" / "bin" / "python"
        shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "*.egg-info", "__pycache__"))
        for command in (
            (uv, "venv", "-q", "--python", sys.executable, python.parent.parent),
            (uv, "pip", "install", "-q", "--python", python, "--resolution", "lowest-direct", "-e", ".[test]"),
            (python, "-m", "pytest", "-q"),
        ):
            subprocess.run(list(map(str, command)), cwd=source, env=clean, check=True)
