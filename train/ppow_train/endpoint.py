"""An OpenAI-compatible server continues the prompts, token ids in and out.

Needs a server that returns token ids (`return_token_ids`: vLLM 0.10 or newer); text alone cannot be turned back into
the ids that were sampled. Left out: starting a server, streaming, chat completions (prompts are ids already).
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import http.client
import json
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from typing import Any

from ppow_train.errors import UserError

_PASSING = (408, 429, 500, 502, 503, 504)  # a busy or restarting server; anything else repeats itself


def clean_key(key: str) -> str:
    """An API key as a header can carry it: without the line end that a file or a secret store leaves behind it.

    A key with another such sign is refused here, since `http.client` would print it in refusing it.

    Raises:
        UserError: without the key.
    """
    key = key.strip()
    if not (key.isascii() and key.isprintable()):
        raise UserError(
            "The API key holds a line break or another sign that no HTTP header can carry: give the key alone."
        )
    return key


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry prompts and key to a host that the user did not name."""

    def redirect_request(self, *args: Any) -> None:
        return None


class _Refusal(UserError):
    """The server is there, and does not answer this request."""


@dataclasses.dataclass(frozen=True)
class EndpointBackend:
    """Continues prompts through `POST {url}/completions` (a `generation.Backend`).

    Attributes:
        url: base of the API, such as http://localhost:8000/v1.
        model: name under which the server serves the target.
        max_new_tokens, temperature, end_token_ids: as in `generation.Sampling`.
        vocab_size: ids at or above it are refused: another model answered.
        api_key: sent as bearer token, as `clean_key` leaves it; None sends none.
        concurrency: requests under way at the same time.
        timeout_s: of one request, seconds.
        attempts: per request, when the server is busy or away.
        first_wait_s: seconds before the second attempt, doubled before each further one.
    """

    url: str
    model: str
    max_new_tokens: int
    temperature: float
    end_token_ids: tuple[int, ...]
    vocab_size: int
    api_key: str | None = dataclasses.field(default=None, repr=False)
    concurrency: int = 64
    timeout_s: float = 600.0
    attempts: int = 6
    first_wait_s: float = 1.0

    def __post_init__(self) -> None:
        parts = urllib.parse.urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise UserError(
                f"--endpoint must be an http(s) URL such as http://localhost:8000/v1, got {self.url!r}."
            )
        if self.api_key is not None:
            object.__setattr__(self, "api_key", clean_key(self.api_key))
            if not self.api_key:
                raise UserError("The API key is empty: set the variable of --api-key-env, or leave that out.")

    def continue_prompts(
        self, prompt_ids: Sequence[Sequence[int]], *, seed: int, report: Callable[[int], None]
    ) -> list[list[int]]:
        """See `generation.Backend`; every request has a seed of its own.

        Raises:
            UserError: the server cannot be reached, refuses, or does not answer with the ids asked for.
        """
        from ppow_train.trajectory_store import derive_seed  # needs numpy, which `ppow swap` does without

        pool, stop = concurrent.futures.ThreadPoolExecutor(self.concurrency), threading.Event()
        try:
            futures = [
                pool.submit(self._continue, list(ids), derive_seed(seed, i), stop)
                for i, ids in enumerate(prompt_ids)
            ]
            for done, future in enumerate(concurrent.futures.as_completed(futures), start=1):
                future.result()
                report(done)
            return [future.result() for future in futures]
        finally:
            stop.set()  # of requests that wait for another attempt, when one has failed for good
            pool.shutdown(wait=False, cancel_futures=True)

    def check_length(self, longest: int) -> None:
        """Refuse before the first request what the server would refuse at some later one, where it tells its limit.

        Args:
            longest: tokens of the longest prompt and its continuation.

        Raises:
            UserError: the server takes fewer, or cannot be reached.
        """
        limit = self._max_model_len()
        if limit is None or longest <= limit:
            return
        room = limit - self.max_new_tokens
        remedy = f"leave longer prompts out with --max-prompt-tokens {room}, " if room > 0 else ""
        raise UserError(
            f"Prompt and continuation need {longest} tokens, {self.url} takes {limit}: {remedy}lower --max-new-tokens, "
            "or serve the target with a larger --max-model-len."
        )

    def _max_model_len(self) -> int | None:
        """What `GET {url}/models` says of the model (vLLM does); None where the server does not tell."""
        try:
            listed = self._ask("/models", None, threading.Event())["data"]
            found = [entry.get("max_model_len") for entry in listed if entry["id"] == self.model]
        except (_Refusal, KeyError, TypeError, AttributeError):
            return None  # an API without it; what is wrong with address, key or name the first request tells
        return found[0] if found and isinstance(found[0], int) else None

    def at_temperature(self, temperature: float) -> EndpointBackend:
        """See `generation.Backend`."""
        return dataclasses.replace(self, temperature=temperature)

    def _continue(self, ids: list[int], seed: int, stop: threading.Event) -> list[int]:
        answer = self._ask(
            "/completions",
            {
                "model": self.model,
                "prompt": ids,
                "max_tokens": self.max_new_tokens,
                "temperature": self.temperature,
                "seed": seed,
                "return_token_ids": True,
                "stop_token_ids": list(self.end_token_ids),
                # The bare distribution: servers fill in what the target ships for every option not given.
                "top_p": 1.0,
                "top_k": 0,
                "min_p": 0.0,
                "repetition_penalty": 1.0,
                "presence_penalty": 0.0,
                "frequency_penalty": 0.0,
            },
            stop,
        )
        return self._checked(answer, ids)

    def _checked(self, answer: Any, ids: list[int]) -> list[int]:
        try:
            choice = answer["choices"][0]
            tokens = choice.get("token_ids")
            echoed = choice.get("prompt_token_ids")
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise UserError(
                f"{self.url} answered without a choice ({json.dumps(answer)[:80]}): give the base URL of an "
                "OpenAI-compatible API."
            ) from error
        if not isinstance(tokens, list) or not all(isinstance(token, int) for token in tokens):
            raise UserError(f"{self.url} returned no token ids: serve the target with vLLM 0.10 or newer.")
        if echoed is not None and echoed != ids:
            raise UserError(
                f"{self.url} changed the prompt's token ids: serve the target that --target names."
            )
        if any(not 0 <= token < self.vocab_size for token in tokens):
            raise UserError(
                f"{self.url} returned token {max(tokens)}, the target has {self.vocab_size}: serve the target that "
                "--target names."
            )
        if not tokens or choice.get("finish_reason") not in ("stop", "length"):
            raise UserError(
                f"{self.url} broke a continuation off after {len(tokens)} tokens (finish_reason "
                f"{choice.get('finish_reason')!r}): see the server's log, then run the same command again."
            )
        return tokens

    def _ask(self, path: str, body: dict[str, Any] | None, stop: threading.Event) -> Any:
        """The answer to a POST of `body`, or to a GET; asked again while the server is busy or away."""
        for attempt in range(1, self.attempts + 1):
            try:
                return self._ask_once(path, body)
            except urllib.error.HTTPError as error:
                if error.code not in _PASSING or attempt == self.attempts or stop.is_set():
                    raise _Refusal(self._refusal(error)) from error
            except (OSError, http.client.HTTPException) as error:  # URLError and timeouts are OSErrors
                if attempt == self.attempts or stop.is_set():
                    raise UserError(
                        f"{self.url} cannot be reached ({error}): start the server, then run the same command again."
                    ) from error
            stop.wait(self.first_wait_s * 2 ** (attempt - 1))
        raise AssertionError("the last attempt returns or raises")

    def _ask_once(self, path: str, body: dict[str, Any] | None) -> Any:
        headers = {} if body is None else {"Content-Type": "application/json"}
        if self.api_key is not None:
            headers["Authorization"] = f"Bearer {self.api_key}"
        content = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url.rstrip("/") + path, content, headers)
        with urllib.request.build_opener(NoRedirect).open(request, timeout=self.timeout_s) as response:
            answer = response.read()
        try:
            return json.loads(answer)
        except ValueError as error:
            raise _Refusal(
                f"{self.url} answered {answer[:60]!r}, not JSON: give the base URL of an OpenAI-compatible API."
            ) from error

    def _refusal(self, error: urllib.error.HTTPError) -> str:
        told = " ".join(error.read(2000).decode("utf-8", "replace").split())[:200]
        remedy = {
            401: "name the variable that holds the key with --api-key-env",
            403: "name the variable that holds the key with --api-key-env",
            404: "check --endpoint (with its /v1) and --model",
        }.get(error.code, "check --model and the server's log, then run the same command again")
        return f"{self.url} refused a request with {error.code} ({told or error.reason}): {remedy}."
