import os
import stat
import subprocess
import sys
import time

import pytest

from sslvit.checkpoints import textfile


def test_a_file_is_written_and_replaced_as_others_may_read_it(tmp_path):
    path = tmp_path / "a.json"
    for content in ("first\n", "zweite Zeile mit ü\n"):
        textfile.write(path, content)
        assert path.read_text(encoding="utf-8") == content
    textfile.write(tmp_path / "b.png", b"\x89")
    (tmp_path / "plain").touch()
    assert len({file.stat().st_mode for file in tmp_path.iterdir()}) == 1
    assert {file.name for file in tmp_path.iterdir()} == {"a.json", "b.png", "plain"}


def test_a_link_is_replaced_and_its_target_stays(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("mine")
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "a.json").symlink_to(precious)
    (folder / f".a.json.{os.getpid()}").symlink_to(precious)
    textfile.write(folder / "a.json", "new")
    assert not (folder / "a.json").is_symlink()
    assert [path.name for path in folder.iterdir()] == ["a.json"]
    (folder / "lines").symlink_to(precious)
    with pytest.raises(OSError, match="lines is a link, and links are not followed"):
        textfile.open_to_append(folder / "lines")
    assert precious.read_text() == "mine"


def test_folders_are_made_below_the_one_that_the_user_named_and_may_be_no_links(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "named").symlink_to("elsewhere")  # what the user typed may be a link
    textfile.write(tmp_path / "named" / "eval" / "deep" / "a.json", "x", root=tmp_path / "named")
    assert (tmp_path / "elsewhere" / "eval" / "deep" / "a.json").read_text() == "x"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "eval").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="eval is a link") as caught:
        textfile.write(tmp_path / "run" / "eval" / "other" / "a.json", "x", root=tmp_path / "run")
    assert caught.value.strerror.endswith("run/eval is a link, and links are not followed")
    assert not (tmp_path / "elsewhere" / "other").exists()
    with pytest.raises(FileNotFoundError):
        textfile.write(tmp_path / "gone" / "eval" / "a.json", "x", root=tmp_path / "gone")
    assert not (tmp_path / "gone").exists()


def test_what_cannot_be_written_leaves_the_old_file_and_nothing_beside_it(tmp_path, monkeypatch):
    textfile.write(tmp_path / "a.json", "old")
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        textfile.write(tmp_path / "a.json", "new")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.json", "old")]


def test_a_pipe_is_no_file_to_append_to(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match=r"pipe|No such device"):
        textfile.open_to_append(tmp_path / "pipe")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


REWRITE = """
import sys
from pathlib import Path
from sslvit.checkpoints import textfile
while True:
    for letter in "abcdefgh":
        textfile.write(Path(sys.argv[1]), letter * 200_000)
"""


def test_two_processes_that_write_one_file_and_are_killed_leave_it_whole(tmp_path):
    path = tmp_path / "a.json"
    textfile.write(path, "-" * 200_000)
    started = [subprocess.Popen([sys.executable, "-c", REWRITE, str(path)]) for _ in range(2)]
    seen, deadline = [], time.monotonic() + 30
    while len(seen) < 20:
        assert time.monotonic() < deadline
        content = path.read_text()
        assert (len(content), len(set(content))) == (200_000, 1)
        seen += [] if content[:1] in seen[-1:] else [content[0]]
    for process in started:
        process.kill()
        process.wait()
    content = path.read_text()
    assert (len(content), len(set(content))) == (200_000, 1)
