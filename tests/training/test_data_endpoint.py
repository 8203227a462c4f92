"""An OpenAI-compatible server continues the prompts: what is sent, what is believed, what is tried again.

The server stands in for vLLM on 127.0.0.1. Left out: vLLM's own (tests/e2e/test_data_engines.py).
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from test_bad_input import refused

from ppow_train import cli
from ppow_train.endpoint import EndpointBackend
from ppow_train.errors import UserError


class Server:
    """Continues [.., x] by [seed mod 50, x + 1] and remembers the requests; `script` holds answers to give before."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.script: list[tuple[int, Any]] = []
        self.change: dict[str, Any] = {}
        self.models: tuple[int, Any] = (404, {"error": "no such path"})
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.headers.append(dict(self.headers) | {"path": self.path})
                self.reply(*outer.models)

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append(body)
                outer.headers.append(dict(self.headers) | {"path": self.path})
                self.reply(*(outer.script.pop(0) if outer.script else (200, outer.answer(body))))

            def reply(self, code: int, answer: Any) -> None:
                content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                self.send_response(code)
                if code == 307:
                    self.send_header("Location", "/elsewhere")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        tokens = [body["seed"] % 50, body["prompt"][-1] + 1]
        choice = {"token_ids": tokens, "prompt_token_ids": body["prompt"], "finish_reason": "length"}
        return {"choices": [choice | self.change]}


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


def backend(server: Server, **options: Any) -> EndpointBackend:
    fixed = {"max_new_tokens": 2, "temperature": 0.7, "end_token_ids": (0, 9), "vocab_size": 100}
    return EndpointBackend(server.url, "mine", **{**fixed, "concurrency": 3, "first_wait_s": 0.01, **options})


def run(endpoint: EndpointBackend, prompts: Any = ((1, 2), (3,)), seed: int = 5) -> list[list[int]]:
    return endpoint.continue_prompts(prompts, seed=seed, report=lambda done: None)


def test_what_is_asked_for(server):
    done: list[int] = []
    backend(server, api_key="secret").continue_prompts([[1, 2]], seed=5, report=done.append)
    (request,) = server.requests
    assert request["model"] == "mine"
    assert request["prompt"] == [1, 2]
    assert (request["max_tokens"], request["temperature"], request["return_token_ids"]) == (2, 0.7, True)
    assert request["stop_token_ids"] == [0, 9]
    assert (request["top_p"], request["top_k"], request["min_p"], request["repetition_penalty"]) == (
        1,
        0,
        0,
        1,
    )
    assert server.headers[0]["Authorization"] == "Bearer secret"
    assert server.headers[0]["path"] == "/v1/completions"
    assert done == [1]


def test_answers_stand_in_the_order_of_the_prompts(server):
    prompts = [[n] for n in range(40)]
    first = run(backend(server), prompts)
    assert [row[1] for row in first] == [n + 1 for n in range(40)]
    assert len({request["seed"] for request in server.requests}) == 40
    assert run(backend(server, concurrency=1), prompts) == first, "seeds belong to places, not to threads"
    assert run(backend(server), prompts, seed=6) != first
    assert "Authorization" not in server.headers[0]


@pytest.mark.parametrize("code", [429, 500, 503])
def test_a_busy_server_is_asked_again(code, server):
    server.script = [(code, {"error": "busy"})] * 3
    assert [row[1] for row in run(backend(server, concurrency=1))] == [3, 4]
    assert len(server.requests) == 5


def test_a_server_that_stays_busy(server):
    server.script = [(503, {"error": "still loading"})] * 20
    with refused("503", "still loading", "same command again"):
        run(backend(server, attempts=2, concurrency=1))


@pytest.mark.parametrize(
    ("code", "parts"),
    [
        (400, ["400", "too long", "--model"]),
        (401, ["401", "--api-key-env"]),
        (404, ["404", "--endpoint", "/v1", "--model"]),
        (307, ["307"]),
    ],
)
def test_refusals_are_not_tried_again(code, parts, server):
    server.script = [(code, {"error": "too long"})]
    with refused(*parts):
        run(backend(server), [[1]])
    assert len(server.requests) == 1, "neither again nor to where a redirect leads"


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"token_ids": None}, ["no token ids", r"vLLM 0\.10"]),
        ({"token_ids": ["a"]}, ["no token ids"]),
        ({"token_ids": [100]}, ["token 100", "has 100", "--target"]),
        ({"token_ids": []}, ["broke", "0 tokens"]),
        ({"prompt_token_ids": [7, 7]}, ["changed the prompt", "--target"]),
        ({"finish_reason": "abort"}, ["'abort'", "log"]),
    ],
)
def test_answers_that_are_not_believed(change, parts, server):
    server.change = change
    with refused(*parts):
        run(backend(server))


@pytest.mark.parametrize("answer", [b"<html>", {"object": "list"}, {"choices": []}, ["x"]])
def test_answers_of_something_else(answer, server):
    server.script = [(200, answer)] * 2
    with refused("OpenAI-compatible"):
        run(backend(server))


def test_a_server_that_is_away(server):
    server.http.shutdown()
    server.http.server_close()
    with refused("cannot be reached", "start the server"):
        run(backend(server, attempts=2))


@pytest.mark.parametrize(
    "url", ["http://[abc/v1", "http://host/ä", "http://host:port/v1", "http://a host/v1"]
)
def test_urls_that_the_command_refuses(url, tmp_path, capsys):
    given = ["data", "--target", "T", "--prompts", "p", "--model", "m", "--output", str(tmp_path / "out")]
    assert cli.run([*given, "--endpoint", url]) == 2
    assert "must be an http(s) URL such as http://localhost:8000" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("url", ["localhost:8000/v1", "ftp://host/v1", "http://", "/v1"])
def test_urls_that_are_none(url, server):
    server.url = url
    with refused("--endpoint", "http"):
        backend(server)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r", " "])
def test_a_key_is_sent_without_the_line_end_of_its_file(end, server):
    run(backend(server, api_key=f"secret{end}"))
    assert {headers["Authorization"] for headers in server.headers} == {"Bearer secret"}


@pytest.mark.parametrize("key", ["s3cret\ns3cret", "s3cret\rs3cret", "s3cret\0s3cret", "s3crét", "s3cret…"])
def test_a_key_that_no_header_can_carry_is_refused_and_not_told(key, server):
    with pytest.raises(UserError) as caught:
        run(backend(server, api_key=key))
    assert "API key holds a line break or another sign" in str(caught.value)
    assert "s3cr" not in str(caught.value)
    assert not server.requests
    assert "s3cr" not in repr(backend(server, api_key="s3cret"))


def test_a_key_of_blanks_is_none(server):
    with refused("API key is empty", "--api-key-env"):
        backend(server, api_key=" \n")


# ---------------------------------------------------------------- what the server takes


def listing(*entries: dict[str, Any]) -> tuple[int, Any]:
    return 200, {"object": "list", "data": list(entries)}


def test_a_prompt_longer_than_the_server_takes_is_refused_before_any_request(server):
    server.models = listing({"id": "other", "max_model_len": 5}, {"id": "mine", "max_model_len": 10})
    backend(server, api_key="secret").check_length(10)
    assert server.headers[-1]["path"] == "/v1/models"
    assert server.headers[-1]["Authorization"] == "Bearer secret"
    with refused(
        "need 11 tokens", "takes 10", "--max-prompt-tokens 8", "--max-new-tokens", "--max-model-len"
    ):
        backend(server).check_length(11)
    with pytest.raises(UserError) as caught:
        backend(server, max_new_tokens=10).check_length(11)
    assert "--max-prompt-tokens" not in str(caught.value), "no prompt would be short enough"
    assert not server.requests


@pytest.mark.parametrize(
    "models",
    [
        (404, {}),
        (401, {}),
        (200, b"<html>"),
        (200, ["x"]),
        (200, {"data": None}),
        listing(),
        listing({"id": "mine"}),
        listing({"id": "mine", "max_model_len": None}),
        listing({"id": "other", "max_model_len": 5}),
    ],
)
def test_a_server_that_does_not_tell_what_it_takes(models, server):
    server.models = models
    backend(server).check_length(1000)
    assert [row[1] for row in run(backend(server, concurrency=1))] == [3, 4]


def test_a_server_that_is_away_is_told_before_the_first_request(server):
    server.http.shutdown()
    server.http.server_close()
    with refused("cannot be reached", "start the server"):
        backend(server, attempts=2).check_length(10)
