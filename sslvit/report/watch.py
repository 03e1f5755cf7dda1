"""The report of runs in a browser, while they go on: it loads itself again when there are new lines.

Served to this machine only, at http://127.0.0.1:<port>. From elsewhere: ssh -L 8347:127.0.0.1:8347 <this machine>.
"""

import html
import threading
import time
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from ..checkpoints.journal import STARTS
from ..distributed import say
from ..errors import UserError, check_range
from ..evaluation.config import Watch as Config
from ..metrics import METRICS
from .facts import gather, runs_in
from .page import page

EVERY = 2.0  # seconds between two looks at the files
SHARE = 20  # a page that takes t seconds to make is made every 20 t seconds at most
HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}


class Pages:
    """The page as it is now. Files are looked at every few seconds, whatever the number of requests."""

    def __init__(self, names: list[str]) -> None:
        self.names, self.lock = names, threading.Lock()
        self.looked = self.made = self.took = 0.0
        self.stamp = self.of = ""
        self.text = b""

    def look(self) -> str:
        """A text that changes when a run has written something."""
        with self.lock:
            if time.monotonic() - self.looked > EVERY or not self.stamp:
                try:
                    self.stamp = " ".join(_stamp(path) for path, _ in runs_in(self.names))
                except UserError as error:  # a run was moved away
                    self.stamp = str(error)
                self.looked = time.monotonic()
            return self.stamp

    def current(self) -> bytes:
        stamp = self.look()
        with self.lock:
            if stamp != self.of and time.monotonic() - self.made >= SHARE * self.took:
                began = time.monotonic()
                try:
                    text = page([gather(path, name) for path, name in runs_in(self.names)], {}, live=stamp)
                except UserError as error:
                    text = f"<!doctype html><meta charset=utf-8><title>sslvit</title><p>{html.escape(str(error))}"
                self.text, self.of, self.made = text.encode(), stamp, time.monotonic()
                self.took = self.made - began
            return self.text


def _stamp(path: Path) -> str:
    sizes = []
    for name in (METRICS, STARTS, "eval"):
        try:
            found = (path / name).lstat()
            sizes.append(f"{found.st_size}-{found.st_mtime_ns}")
        except OSError:
            sizes.append("")
    return ",".join(sizes)


class Handler(BaseHTTPRequestHandler):
    """Two addresses, / and /stamp. No path of a request ever names a file."""

    server_version, sys_version, protocol_version = "sslvit", "", "HTTP/1.1"
    timeout = 30  # seconds for a request

    def __init__(self, pages: Pages, hosts: set[str], *arguments: object) -> None:
        self.pages, self.hosts = pages, hosts
        super().__init__(*arguments)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        # Another Host is a page of somebody else whose name was made to lead here (DNS rebinding).
        if self.headers.get_all("Host") is None or not set(self.headers.get_all("Host") or ()) <= self.hosts:
            self._answer(HTTPStatus.FORBIDDEN, b"This server answers to its own address only.\n", "text/plain")
        elif self.path == "/":
            self._answer(HTTPStatus.OK, self.pages.current(), "text/html")
        elif self.path == "/stamp":
            self._answer(HTTPStatus.OK, self.pages.look().encode(), "text/plain")
        else:
            self._answer(HTTPStatus.NOT_FOUND, b"There is only /.\n", "text/plain")

    do_HEAD = do_GET

    def _answer(self, status: HTTPStatus, content: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        for name, value in HEADERS.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *arguments: object) -> None:
        """Nothing on the console for each request."""


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """A browser that goes away is no news."""


def serve(names: list[str], port: int) -> Server:
    """The server, which listens. Raises UserError."""
    runs_in(names)
    hosts: set[str] = set()
    try:
        server = Server(("127.0.0.1", port), partial(Handler, Pages(names), hosts))
    except OSError as error:
        raise UserError(f"port={port} cannot be used ({error.strerror}): give another one, or port=0.") from error
    hosts |= {f"{name}:{server.server_port}" for name in ("127.0.0.1", "localhost")}
    return server


def watch(runs: list[str], config: Config) -> None:
    """Serve the page until Ctrl-C. Raises UserError."""
    if not runs:
        raise UserError("watch needs a run, or a folder of runs: sslvit watch runs.")
    check_range("", config, 0, 65535, "port")
    with serve(runs, config.port) as server:
        say(f"http://127.0.0.1:{server.server_port} shows {', '.join(runs)}; Ctrl-C ends it.")
        server.serve_forever()
