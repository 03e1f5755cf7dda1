"""The server of `sslvit watch`, by real requests."""

import http.client
import json
import socket
import threading
import time

import pytest

from sslvit.report import watch

from .test_report import lines, write_run


@pytest.fixture
def server(tmp_path):
    run = write_run(tmp_path / "runs" / "run", lines(5))
    with watch.serve([str(tmp_path / "runs")], 0) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        server.run = run
        yield server
        server.shutdown()


def ask(server, path="/", host=None, method="GET"):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    connection.request(method, path, headers={"Host": host or f"127.0.0.1:{server.server_port}"})
    answer = connection.getresponse()
    return answer.status, answer.read(), answer.headers


def test_it_listens_on_this_machine_only(server):
    assert server.server_address[0] == "127.0.0.1"


def test_the_page_may_talk_to_its_server_only(server):
    status, content, headers = ask(server)
    assert status == 200
    assert b"connect-src &#x27;self&#x27;" in content
    assert b'"live":"' in content
    assert headers["X-Frame-Options"] == "DENY"


@pytest.mark.parametrize(
    "path",
    [
        "/../secret",
        "/..%2fsecret",
        "/run/metrics.jsonl",
        "/run/../../secret",
        "//etc/passwd",
        "/link",
        "/?x=1",
        "/stamp/",
        "/%2e%2e/",
        "http://127.0.0.1/",
    ],
)
def test_no_other_path_is_served(server, path):
    (server.run.parent.parent / "secret").write_text("xyzzy")
    (server.run.parent / "link").symlink_to(server.run.parent.parent / "secret")
    status, content, _ = ask(server, path)
    assert status == 404
    assert b"xyzzy" not in content


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "127.0.0.1", "127.0.0.1.evil.example:8347", "[::1]:8347"]
)
def test_another_host_is_refused(server, host):
    status, content, _ = ask(server, host=host)
    assert status == 403
    assert b"data" not in content


def test_a_request_without_a_host_is_refused(server):
    with socket.create_connection(server.server_address) as connection:
        connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
        assert b" 403 " in connection.recv(4096)


def test_other_methods_are_refused(server):
    assert {ask(server, method=method)[0] for method in ("POST", "PUT", "DELETE", "OPTIONS")} == {501}


@pytest.mark.parametrize("count", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_many_requests_while_a_run_writes(server, monkeypatch, count):
    monkeypatch.setattr(watch, "EVERY", 0.05)
    writing = threading.Event()

    def write():
        step = 5
        with (server.run / "metrics.jsonl").open("a") as file:
            while not writing.is_set():
                step += 1
                line = json.dumps({"step": step, "epoch": step / 10, "loss": 1 / step}) + "\n"
                file.write(line[:9])
                file.flush()
                time.sleep(0.002)
                file.write(line[9:])
                file.flush()

    writer = threading.Thread(target=write)
    writer.start()
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    stamps, whole = set(), 0
    for n in range(count):
        connection.request("GET", "/stamp" if n % 2 else "/")
        answer = connection.getresponse()
        content = answer.read()
        assert answer.status == 200
        if n % 2:
            stamps.add(content)
        else:
            whole += content.endswith(b"</html>\n")
    writing.set()
    writer.join()
    assert whole == count // 2
    assert len(stamps) > 1


def test_a_port_in_use_is_one_sentence(server, fails):
    assert "cannot be used" in fails("watch", server.run, f"port={server.server_port}")
