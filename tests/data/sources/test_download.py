"""Against a real HTTP server in a thread of this process."""

import contextlib
import http.server
import os
import shutil
import threading
import time
from functools import partial

import pytest
import torch

from sslvit.data import Config, open_source
from sslvit.data.sources import download
from sslvit.errors import UserError
from tests.conftest import write_images
from tests.data.sources.test_archive import png, write_tar


class Server(http.server.SimpleHTTPRequestHandler):
    asked: list[str] = []  # noqa: RUF012

    def do_GET(self) -> None:
        self.asked.append(self.path)
        if "broken" in self.path:  # says more than it sends
            self.send_response(200)
            self.send_header("Content-Length", "5000000")
            self.end_headers()
            self.wfile.write(b"x" * 1000)
            self.close_connection = True
        elif "endless" in self.path:  # more than any disk has
            self.send_response(200)
            self.send_header("Content-Length", str(2**60))
            self.end_headers()
        elif "unknown" in self.path:  # does not say how much it sends, and never stops
            self.send_response(200)
            self.end_headers()
            with contextlib.suppress(OSError):
                while True:
                    self.wfile.write(bytes(2**20))
        elif "slow" in self.path:  # a byte now and then
            self.send_response(200)
            self.send_header("Content-Length", "5000000")
            self.end_headers()
            with contextlib.suppress(OSError):
                while True:
                    self.wfile.write(b"x")
                    time.sleep(0.05)
        elif "headers" in self.path:  # headers that come byte by byte
            with contextlib.suppress(OSError):
                self.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
                while True:
                    self.wfile.write(b"x")
                    time.sleep(0.05)
        elif "stalled" in self.path:
            self.send_response(200)
            self.send_header("Content-Length", "5000000")
            self.end_headers()
            time.sleep(3)
            self.close_connection = True
        elif "circle" in self.path or "elsewhere" in self.path:
            self.send_response(302)
            self.send_header("Location", self.path if "circle" in self.path else "ftp://127.0.0.1/x.tar")
            self.end_headers()
        elif "%00" in self.path:
            self.send_error(404)
        elif "nonsense" in self.path:
            self.send_response(200)
            self.send_header("Content-Length", "many")
            self.end_headers()
        else:
            super().do_GET()

    def log_message(self, *arguments) -> None:
        pass


@pytest.fixture
def server(tmp_path):
    """(address, folder that it serves)."""
    folder = tmp_path / "served"
    folder.mkdir()
    Server.asked.clear()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Server, directory=folder)) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_address[1]}", folder
        running.shutdown()


def test_shards_are_fetched_once(server, tmp_path, capsys):
    address, folder = server
    for i in range(3):
        write_tar(folder / f"part-{i}.tar", {"0.png": png(i), "1.png": png(10 + i)})
    config = Config(download_dir=str(tmp_path / "cache"))
    source = open_source(f"{address}/part-{{0..2}}.tar", config)
    assert [int(source.read(i)[0, 0, 0]) for i in range(6)] == [0, 10, 1, 11, 2, 12]
    assert "fetching" in (said := capsys.readouterr().out)
    assert "3 of 3" in said
    again = open_source(f"{address}/part-{{0..2}}.tar", config)
    assert again.identity() == source.identity()
    assert torch.equal(again.read(3), source.read(3))
    assert Server.asked == ["/part-0.tar", "/part-1.tar", "/part-2.tar"]


def test_a_query_and_an_escaped_name_are_understood(server, tmp_path):
    address, folder = server
    write_tar(folder / "my images.tar", {"0.png": png(3)})
    config = Config(download_dir=str(tmp_path / "cache"))
    assert len(open_source(f"{address}/my%20images.tar?download=1", config)) == 1
    write_tar(folder / "x.tar", {"0.png": png(3)})
    assert len(open_source(f"{address}/..%2f..%2fx.tar", config)) == 1  # what it is called here stays inside the cache
    assert not (tmp_path / "x.tar").exists()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("nowhere.tar", "the server answers 404"),
        ("broken.tar", "broke off after 0.0 MiB of 4.8 MiB"),
        ("endless.tar", "GiB left"),
        ("page.html", "must end in .tar"),
        ("all.tar.gz", "must end in .tar"),
    ],
)
def test_a_failure_is_one_sentence_and_leaves_nothing(server, tmp_path, name, expected):
    with pytest.raises(UserError, match=expected) as error:
        open_source(f"{server[0]}/{name}", Config(download_dir=str(tmp_path / "cache")))
    assert "\n" not in str(error.value)
    assert str(error.value).count("data: ") == 1
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("unknown.tar", r"has more than 0\.01 GiB: raise SSLVIT_MAX_DOWNLOAD_GIB"),
        ("slow.tar", r"comes too slowly, \d+ bytes in \d seconds\. Fetch it with another program"),
        ("headers.tar", "cannot be fetched: nothing has come in 1 seconds"),
        ("stalled.tar", "cannot be fetched: .*(timed out|nothing has come)"),
        ("circle.tar", "the server answers 302 The HTTP server returned a redirect error"),
        ("elsewhere.tar", "cannot be fetched: .*ftp"),
        ("nonsense.tar", "cannot be fetched: invalid literal"),
    ],
)
def test_a_hostile_server_reaches_a_limit_and_leaves_nothing(server, tmp_path, monkeypatch, name, expected):
    for limit, value in (("TIMEOUT", 0.5), ("SLOW_SECONDS", 0.3), ("MAX_GIB", 0.01)):
        monkeypatch.setattr(download, limit, value)
    began = time.monotonic()
    with pytest.raises(UserError, match=expected) as error:
        open_source(f"{server[0]}/{name}", Config(download_dir=str(tmp_path / "cache")))
    assert "\n" not in str(error.value)
    assert time.monotonic() - began < 20
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []


def test_a_download_stops_before_the_disk_is_full_or_the_time_is_over(server, tmp_path, monkeypatch):
    config = Config(download_dir=str(tmp_path / "cache"))
    monkeypatch.setattr(download, "RESERVE", shutil.disk_usage(tmp_path).free)
    with pytest.raises(UserError, match=r"GiB left, of which .* stay free: make room or set data\.download_dir"):
        open_source(f"{server[0]}/unknown.tar", config)
    monkeypatch.setattr(download, "RESERVE", 0)
    monkeypatch.setattr(download, "MAX_HOURS", 0)
    with pytest.raises(UserError, match=r"has not come in 0 hours, only .*: raise SSLVIT_MAX_DOWNLOAD_HOURS"):
        open_source(f"{server[0]}/unknown.tar", config)


def test_addresses_of_any_form(server, tmp_path):
    """Names with a zero byte, of 300 characters, and no address at all: formerly tracebacks."""
    address, folder = server
    config = Config(download_dir=str(tmp_path / "cache"))
    for name in ("a%00b.tar", "n" * 300 + ".tar", "%1b%0a.tar"):
        with pytest.raises(UserError, match="the server answers 40"):
            open_source(f"{address}/{name}", config)
    write_tar(folder / f"{'n' * 200}.tar", {"0.png": png(3)})
    assert len(open_source(f"{address}/{'n' * 200}.tar", config)) == 1
    for spec in ("http://[::1/a.zip", "http://a b/x.tar", "http://:x/a.tar", "http:///a.tar"):
        with pytest.raises(UserError, match=r"is no address|cannot be fetched"):
            open_source(spec, config)


def test_a_server_that_is_not_there_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="cannot be fetched"):
        open_source("http://127.0.0.1:9/x.tar", Config(download_dir=str(tmp_path / "cache")))


def test_a_fetched_folder_of_images_is_used_in_training(server, tmp_path, cli):
    address, folder = server
    write_images(tmp_path / "images", 9, size=(32, 32))
    members = {path.name: path.read_bytes() for path in (tmp_path / "images").iterdir()}
    write_tar(folder / "nine.tar", members)
    from tests.conftest import words

    status, said, error = cli(
        "pretrain",
        f"{address}/nine.tar",
        *words("mae", f"out={tmp_path / 'run'}", f"download_dir={tmp_path / 'cache'}"),
    )
    assert (status, error) == (0, "")
    assert "9 images of http://" in said
    assert os.path.exists(tmp_path / "run" / "checkpoints")
