"""A real ``transformers serve``, and a real server that misbehaves."""

import json
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from serve import free_port, serving
from tiny_text import GREEDY, PROMPTS, written
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from cbd_hub.errors import RecipeError
from cbd_hub.text.generators import LocalGenerator
from cbd_hub.text.served_model import ServerGenerator
from cbd_hub.text.settings import Sampling

# -- behind `transformers serve` --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[str]:
    """The base_url of a real `transformers serve` process."""
    pytest.importorskip("fastapi")
    with serving(folder, folder / "serve.log") as base_url:
        yield base_url


@pytest.mark.parametrize("chat", [False, True])
def test_a_server_gives_the_same_greedy_text(
    served: str, folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, chat: bool
) -> None:
    server = ServerGenerator(served, str(folder), chat=chat, start="<|endoftext|>")
    local = LocalGenerator(model, tokenizer, chat=chat)
    assert list(server.generate(PROMPTS, GREEDY)) == list(local.generate(PROMPTS, GREEDY))


def test_a_server_refuses_another_model_and_unknown_fields(served: str, folder: Path) -> None:
    with pytest.raises(RecipeError, match=r"refuses the request \(400: .*requested 'other'"):
        written(ServerGenerator(served, "other"), GREEDY, ["a"])
    with pytest.raises(RecipeError, match=r"refuses the request \(422: .*top_k.*check model, sampling and extra"):
        written(ServerGenerator(served, str(folder)), Sampling(top_k=3), ["a"])
    with pytest.raises(RecipeError, match=r"knows no model .* or no such path \(404"):
        written(ServerGenerator(served.removesuffix("/v1"), str(folder)), GREEDY, ["a"])


# -- behind a server that misbehaves ----------------------------------------------------------------------------------

Answer = tuple[int, dict[str, str], bytes]
JSON = {"content-type": "application/json"}


def completion(text: str | None, **more: object) -> Answer:
    return 200, JSON, json.dumps({"choices": [{"index": 0, "text": text, "finish_reason": "stop"}], **more}).encode()


class Scripted(ThreadingHTTPServer):
    """Gives its answers in turn, and the last one for ever; notes when and what it was asked."""

    def __init__(self, *answers: Answer, delay: float = 0) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers = list(answers)
        self.delay = delay
        self.asked: list[tuple[float, dict[str, str], dict]] = []
        self.lock = threading.Lock()
        self.busy = self.busiest = 0

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def __enter__(self) -> "Scripted":
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    server: Scripted

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with self.server.lock:
            self.server.asked.append((time.monotonic(), {k.lower(): v for k, v in self.headers.items()}, body))
            answers = self.server.answers
            status, headers, data = answers.pop(0) if len(answers) > 1 else answers[0]
            self.server.busy += 1
            self.server.busiest = max(self.server.busiest, self.server.busy)
        time.sleep(self.server.delay)
        with self.server.lock:
            self.server.busy -= 1
        if data == b"echo":
            time.sleep(0.02 * (int(body["prompt"]) % 3))  # the first asked is not the first answered
            data = completion(body["prompt"])[2]
        try:
            self.send_response(status)
            for name, value in {**headers, "content-length": str(len(data))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)
        except OSError:
            pass  # the client gave up

    def log_message(self, *_: object) -> None:
        pass


def test_order_is_kept_with_requests_in_parallel() -> None:
    prompts = [str(number) for number in range(20)]
    with Scripted((200, JSON, b"echo"), delay=0.02) as server:
        assert written(ServerGenerator(server.base_url, "m", parallel=4), GREEDY, prompts) == prompts
        assert 2 <= server.busiest <= 4
        assert len(server.asked) == 20


def test_what_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-someone-elses")
    sampling = Sampling(max_new_tokens=7, temperature=0.5, top_p=0.9, top_k=3)
    with Scripted(completion("x y", usage={"completion_tokens": 5})) as server:
        plain = ServerGenerator(server.base_url, "m", extra={"min_p": 0.1})
        assert next(plain.generate(["a"], sampling, first=4)).tokens == 5
        _, headers, body = server.asked[-1]
        assert "sk-someone" not in str(headers)
        assert body == {
            "model": "m",
            "prompt": "a",
            "max_tokens": 7,
            "temperature": 0.5,
            "top_p": 0.9,
            "top_k": 3,
            "min_p": 0.1,
            "seed": sampling.row_seed(4),
        }
        written(ServerGenerator(server.base_url, "m", "sk-mine"), GREEDY, ["a"])
        _, headers, body = server.asked[-1]
        assert headers["authorization"] == "Bearer sk-mine"
        assert body == {"model": "m", "prompt": "a", "max_tokens": 12, "temperature": 0}


def test_passing_failures_are_tried_again_as_the_server_says() -> None:
    busy = (429, {"retry-after": "1"}, b"slow down")
    with Scripted(busy, (500, {"retry-after": "0.1"}, b"oops"), completion("fine at last")) as server:
        written = list(ServerGenerator(server.base_url, "m", retries=2).generate(["a"], GREEDY))
        assert written == [("fine at last", 3)]
        first, second, _ = (when for when, *_ in server.asked)
        assert second - first >= 1


def test_a_model_may_end_at_once() -> None:
    with Scripted(completion("", usage={"completion_tokens": 0})) as server:
        assert list(ServerGenerator(server.base_url, "m").generate(["a"], GREEDY)) == [("", 0)]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((429, {"retry-after": "0.01"}, b"slow"), r"still answers 429 after 2 tries \(slow\); lower parallel"),
        ((503, {"retry-after": "0.01"}, b"asleep"), r"still answers 503 after 2 tries \(asleep\)"),
        ((401, JSON, b'{"error": "bad key sk-secret"}'), r"refuses the API key \(status 401\); set the variable"),
        ((403, JSON, b"{}"), r"refuses the API key \(status 403\)"),
        (
            (404, JSON, b'{"error": "no m"}'),
            r"knows no model 'm', or no such path \(404: .*no m.*check model, base_url",
        ),
        ((400, JSON, b'{"error": "too long"}'), r"refuses the request \(400: .*too long"),
        ((200, {"content-type": "text/html"}, b"<html>Log in</html>"), "no JSON but '<html>Log in"),
        ((200, JSON, b"{garbage"), "leads to /v1 of such a server. It sent no JSON"),
        ((200, JSON, b"[1, 2]"), "JSON without choices"),
        ((200, JSON, b'{"choices": []}'), "JSON without choices"),
        ((200, JSON, b'{"error": "model asleep"}'), "JSON without choices: .*model asleep"),
        ((200, JSON, b'{"choices": [{}]}'), "a choice without text"),
        ((200, JSON, b'{"choices": [7]}'), "a choice without text"),
        (completion(None), "a choice without text"),
    ],
)
def test_a_failure_is_one_clear_sentence(answer: Answer, message: str) -> None:
    with Scripted(answer) as server:
        with pytest.raises(RecipeError, match=message) as caught:
            written(ServerGenerator(server.base_url, "m", "sk-secret", retries=1), GREEDY, ["a", "b", "c"])
        assert server.base_url in str(caught.value)
        assert "sk-secret" not in str(caught.value)


def test_a_chat_without_content_is_refused() -> None:
    answer = {"choices": [{"index": 0, "message": {"role": "assistant", "content": None}, "finish_reason": "length"}]}
    with (
        Scripted((200, JSON, json.dumps(answer).encode())) as server,
        pytest.raises(RecipeError, match="without text"),
    ):
        written(ServerGenerator(server.base_url, "m", chat=True), GREEDY, ["a"])


def test_a_slow_server_runs_out_of_time() -> None:
    with (
        Scripted(completion("late"), delay=1) as server,
        pytest.raises(RecipeError, match=r"within 0\.1 s in 1 tries"),
    ):
        written(ServerGenerator(server.base_url, "m", retries=0, timeout=0.1), GREEDY, ["a"])


def test_a_server_that_is_down() -> None:
    url = f"http://127.0.0.1:{free_port()}/v1"
    with pytest.raises(RecipeError, match=r"cannot be reached \(.*refused.*\) in 2 tries; start it"):
        written(ServerGenerator(url, "m", retries=1), GREEDY, ["a"])


def test_a_malformed_server_is_refused() -> None:
    with pytest.raises(RecipeError, match="base_url must begin with http"):
        ServerGenerator("localhost:8000", "m")
    with pytest.raises(RecipeError, match="parallel must be 1 or more, got 0"):
        ServerGenerator("http://localhost:8000/v1", "m", parallel=0)
    with pytest.raises(RecipeError, match="A prompt is empty, and servers refuse that; set start"):
        written(ServerGenerator("http://localhost:8000/v1", "m"), GREEDY, [""])


def test_a_missing_client_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)  # Python's own way to say that it is not installed
    with pytest.raises(RecipeError, match=r'pip install "cbd_hub\[server\]"'):
        ServerGenerator("http://localhost:8000/v1", "m")
