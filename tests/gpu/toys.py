"""Jobs that go wrong, for tests/test_gpu_command.py."""

import subprocess
import time

from .runner import fail_artificially


def hang(setting, note):
    """With a child, which is to end too."""
    child = subprocess.Popen(["sleep", "1000"])
    note({"child": child.pid})
    fail_artificially("hang")


def after_a_row(setting, note, how):
    note({"found": 1})
    fail_artificially(how)


def work(setting, note):
    """Looks into the report that it is writing."""
    assert list(setting.scratch.iterdir()) == []
    (setting.scratch / "file").touch()
    note({"found": 2.5})
    end = time.monotonic() + 5
    while "2.5" not in (setting.out / "report.json").read_text():
        assert time.monotonic() < end
        time.sleep(0.02)
    note({"found": "in the report"})
