"""`ppow swap`: what it asks of a server, and how a server's refusals reach the user."""

from __future__ import annotations

import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from ppow_train import cli

RUNNING = {"adapter": "a", "fingerprint": "f", "previous": None, "comparing": False, "last": None}


@pytest.fixture
def server():
    """A server that gives the answers in `server.answers`, one after another, and notes what it was asked."""

    class Handler(BaseHTTPRequestHandler):
        def answer(self):
            size = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(size)) if size else None
            httpd.asked.append((self.command, self.path, self.headers.get("Authorization"), body))
            status, value = httpd.answers.pop(0)
            self.send_response(status)
            if status == 302:
                self.send_header("Location", f"http://127.0.0.1:{httpd.server_address[1]}/elsewhere")
            self.end_headers()
            self.wfile.write(value if isinstance(value, bytes) else json.dumps(value).encode())

        do_GET = do_POST = answer

        def log_message(self, *_):
            pass

    httpd = HTTPServer(("127.0.0.1", 0), Handler)
    httpd.asked, httpd.answers = [], []
    thread = threading.Thread(target=httpd.serve_forever)
    thread.start()
    yield httpd
    httpd.shutdown()
    thread.join()
    httpd.server_close()


def swap(server, *argv):
    return cli.run(["swap", "--url", f"http://127.0.0.1:{server.server_address[1]}/", *argv])


def test_what_it_asks(server, capsys, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    server.answers = [(200, RUNNING)] * 4
    assert swap(server) == 0
    assert json.loads(capsys.readouterr().out) == RUNNING
    assert swap(server, "--adapter", "b", "--revision", "v1", "--drafts", "5", "--max-drop", "0.5") == 0
    assert swap(server, "--adapter", "b", "--no-watch") == 0
    assert swap(server, "--undo") == 0
    path = "/v1/ppow/adapter"
    body = {"adapter": "b", "revision": "v1", "drafts": 5, "max_drop": 0.5}
    assert server.asked == [
        ("GET", path, "Bearer secret", None),
        ("POST", path, "Bearer secret", body),
        ("POST", path, "Bearer secret", {"adapter": "b", "watch": False}),
        ("POST", path, "Bearer secret", {"undo": True}),
    ]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_key_is_sent_without_the_line_end_of_its_file(server, capsys, monkeypatch, end):
    monkeypatch.setenv("VLLM_API_KEY", f"secret{end}")
    server.answers = [(200, RUNNING)]
    assert swap(server) == 0
    assert server.asked == [("GET", "/v1/ppow/adapter", "Bearer secret", None)]
    assert "secret" not in "".join(capsys.readouterr())


@pytest.mark.parametrize("key", ["s3cret\ns3cret", "s3cret\rs3cret", "s3cret\0s3cret", "s3crét…"])
def test_a_key_that_no_header_can_carry_is_refused_and_not_told(server, capsys, key):
    assert swap(server, "--api-key", key) == 1
    told = "".join(capsys.readouterr())
    assert "Error: The API key holds a line break or another sign" in told
    assert "s3cr" not in told
    assert not server.asked


@pytest.mark.parametrize(("event", "code"), [("kept", 0), ("swapped back", 1)])
def test_waiting_for_the_comparison(server, capsys, event, code):
    comparing = {**RUNNING, "comparing": True, "last": {"event": "swapped", "why": "to b", "at": ""}}
    done = {**RUNNING, "last": {"event": event, "why": "figures", "at": ""}}
    server.answers = [(200, comparing), (200, comparing), (200, done)]
    assert swap(server, "--adapter", "b", "--wait") == code
    shown = capsys.readouterr()
    assert json.loads(shown.out) == done
    assert ("Error: swapped back: figures." in shown.err) is (code == 1)
    assert [asked[0] for asked in server.asked] == ["POST", "GET", "GET"]


@pytest.mark.parametrize(
    ("status", "value", "message"),
    [
        (409, {"error": "It is another drafter."}, "Error: It is another drafter.\n"),
        (401, {"error": "Unauthorized"}, "Error: the server wants its API key: give --api-key.\n"),
        (404, {"detail": "Not Found"}, "start it with ppow serve --hot-swap"),
        (400, {"error": {"message": "No such model.", "code": 400}}, "Error: No such model.\n"),
        (500, b"<html>\nbroken", "answered with status 500 (<html> broken): see the server's log.\n"),
        (502, b"", "answered with status 502 (Bad Gateway): see the server's log.\n"),
        (200, b"not JSON", "answered b'not JSON', which says of no adapter: give the base URL"),
        (200, b"\xff", "which says of no adapter"),
        (200, [], "which says of no adapter"),
        (200, {}, "which says of no adapter"),
        (200, {"comparing": True, "last": "x"}, "which says of no adapter"),
    ],
)
def test_refusals(server, capsys, status, value, message):
    server.answers = [(status, value)]
    assert swap(server, "--adapter", "b", "--wait") == 1
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1


@pytest.mark.parametrize(
    ("sent", "told"),
    [
        (
            b"",
            "does not answer (Remote end closed connection without response): is the server running there?",
        ),
        (b"SSH-2.0-x\r\n", "gave no whole HTTP answer (BadStatusLine: SSH-2.0-x"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{}", "gave no whole HTTP answer (IncompleteRead"),
        (
            b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 200,
            "gave no whole HTTP answer (HTTPException: got more than 100",
        ),
        (b"HTTP/1.1 409 No\r\nContent-Length: 9\r\n\r\n{}", "answered with status 409 (No): see"),
    ],
)
def test_a_connection_that_breaks_off_or_speaks_no_http(sent, told, capsys):
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer():
            connection, _ = listening.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(sent)

        thread = threading.Thread(target=answer)
        thread.start()
        assert cli.run(["swap", "--url", f"http://127.0.0.1:{listening.getsockname()[1]}"]) == 1
        thread.join()
    shown = capsys.readouterr().err
    assert told in shown
    assert shown.count("\n") == 1


@pytest.mark.parametrize(
    "url",
    ["", "localhost:8000", "ftp://x", "http://", "http://[::1", "http://a b", "http://x:abc", "http://x:99999",
     "http://x\n", "http://.x", "http://u:p@x", "http://x/ü"],
)  # fmt: skip
def test_what_is_no_url_is_wrong_usage(url, capsys):
    assert cli.run(["swap", "--url", url]) == 2
    assert "must be an http(s) URL such as http://localhost:8000" in capsys.readouterr().err


def test_a_redirect_carries_no_key_elsewhere(server, capsys):
    server.answers = [(302, {}), (200, RUNNING)]
    assert swap(server, "--api-key", "secret") == 1
    assert "answered with status 302" in capsys.readouterr().err
    assert len(server.asked) == 1


def test_no_server(capsys):
    assert cli.run(["swap", "--url", "http://127.0.0.1:9"]) == 1
    assert "is the server running there?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--adapter", "b", "--undo"], "exclude each other"),
        (["--adapter", ""], "--adapter is empty"),
        (["--max-drop", "1"], "not in the range"),
        (["--drafts", "5"], "--drafts goes with --adapter"),
        (["--max-drop", "0.5"], "--max-drop goes with --adapter"),
        (["--revision", "v"], "--adapter-revision goes with --adapter"),
        (["--wait"], "--wait goes with --adapter"),
        (["--no-watch"], "--no-watch goes with --adapter"),
        (["--undo", "--wait"], "--wait goes with --adapter"),
        (["--undo", "--drafts", "5"], "--drafts goes with --adapter"),
        (["--adapter", "b", "--no-watch", "--wait"], "--wait has no effect with --no-watch"),
        (["--adapter", "b", "--no-watch", "--drafts", "5"], "--drafts has no effect with --no-watch"),
        (["--adapter", "b", "--no-watch", "--max-drop", "0.5"], "--max-drop has no effect with --no-watch"),
    ],
)
def test_wrong_usage(server, capsys, argv, message):
    assert swap(server, *argv) == 2
    assert message in capsys.readouterr().err
    assert not server.asked
