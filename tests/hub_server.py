"""A Hugging Face Hub on loopback, in memory, for tests that drive the real clients.

It answers as :class:`hub_api.Hub` does, logs every request and fails on demand::

    with HubServer() as hub:
        hub.add_user("owner", "hf_owner")
        api = HfApi(endpoint=hub.endpoint, token="hf_owner")  # in this process, or in one of its own:
        subprocess.run([sys.executable, "push.py"], env=hub.environment(tmp_path, "hf_owner"), check=True)
        hub.inject(Fault.truncate(0.5), method="GET", path=r"\\.safetensors$", at=1)  # the second such GET

In a process that imported huggingface_hub without HF_HUB_DISABLE_XET=1 (:meth:`HubServer.environment` sets it), LFS
files must be handed over as binary file objects: the client sends all others to a service that this Hub lacks.
"""

import asyncio
import os
import re
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import uvicorn
from hub_api import Hub
from starlette.datastructures import MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

__all__ = ["Fault", "HubServer", "Request"]

_PIECES = 10  # of a body that trickles
_FLIPPED = 16  # bytes at the end of a corrupt body: the header of a safetensors file stays whole, weights do not


@dataclass(frozen=True)
class Request:
    """A request, logged as it arrives; what it became is filled in when it is answered."""

    method: str
    path: str
    """As it came, quoted, without the query."""
    range: str | None
    """The Range header."""
    sent: int = 0
    """Bytes in the body of the answer."""
    status: int = 0
    """Of the answer; 0 while there is none."""


@dataclass(frozen=True)
class Fault:
    """What goes wrong with a request. A request counts as handled when it changed what the Hub keeps."""

    kind: str
    value: Any = None

    @staticmethod
    def status(code: int, retry_after: int | None = None) -> "Fault":
        """An error status (429, 500, 502, 503), with a Retry-After header in seconds; the request is not handled."""
        return Fault("status", (code, retry_after))

    @staticmethod
    def drop() -> "Fault":
        """The connection is closed with no answer; the request is not handled."""
        return Fault("drop")

    @staticmethod
    def truncate(fraction: float) -> "Fault":
        """The headers promise the whole body, but the connection is closed after a fraction of it."""
        return Fault("truncate", fraction)

    @staticmethod
    def slow(seconds: float) -> "Fault":
        """The body comes in ten pieces, in so many seconds in all; the headers come at once."""
        return Fault("slow", seconds)

    @staticmethod
    def etag(value: str) -> "Fault":
        """A wrong ETag and X-Linked-Etag."""
        return Fault("etag", f'"{value}"')

    @staticmethod
    def corrupt() -> "Fault":
        """A body of the right length whose last 16 bytes are inverted."""
        return Fault("corrupt")

    @staticmethod
    def call(function: Callable[[], object], after: bool, drop: bool = True) -> "Fault":
        """Calls a function in a thread of its own, then closes the connection with no answer.

        Args:
            function: May kill the client, or ask this server something else.
            after: Whether the request is handled before the call. If not, it is not handled at all.
            drop: False to carry on after the call as if nothing had happened.
        """
        return Fault("call", (function, after, drop))


@dataclass
class _Injection:
    """A fault and the requests that it is meant for."""

    fault: Fault
    at: int
    method: str
    path: str
    every: bool
    seen: int = 0

    def due(self, method: str, path: str) -> bool:
        if not re.fullmatch(self.method, method) or not re.search(self.path, path):
            return False
        self.seen += 1
        return self.seen > self.at if self.every else self.seen == self.at + 1


@dataclass
class _Answer:
    """An answer before it is sent, so that a fault can spoil it."""

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes


class _Connection(H11Protocol):
    """Tells the application what a request came on, so that it can be closed."""

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self.app_state = {**self.app_state, "transport": transport}


class HubServer(Hub):
    """A Hub that is served within ``with``. What it keeps and the requests it got may be read at any time."""

    def __init__(self, lfs_threshold: int = 10_000, redirect: bool = False) -> None:
        super().__init__(lfs_threshold, redirect)
        self.faults_hit = 0
        """How many requests went wrong on purpose."""
        self._injections: list[_Injection] = []
        self._log: dict[int, Request] = {}
        self._arrivals = 0

    def __enter__(self) -> "HubServer":
        # Two origins: clients keep their token from the second, as they do from the storage behind the real Hub.
        sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
        self.endpoint, self.storage = (f"http://127.0.0.1:{s.getsockname()[1]}" for s in sockets)
        plain: dict[str, Any] = {"interface": "asgi3", "lifespan": "off", "log_config": None, "access_log": False}
        config = uvicorn.Config(self._serve, http=_Connection, timeout_graceful_shutdown=1, **plain)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=(sockets,), daemon=True)
        self._thread.start()
        while not self._server.started:
            if not self._thread.is_alive():
                raise RuntimeError("the server did not start")
            time.sleep(0.01)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._server.should_exit = True
        self._thread.join(timeout=10)

    def environment(self, home: Path, token: str | None) -> dict[str, str]:
        """The environment of a client process: this one's, with the Hub's variables and proxies replaced."""
        foreign = re.compile(r"(HF|HUGGING_?FACE_HUB|TRANSFORMERS)_.*|.*_proxy", re.IGNORECASE)
        variables = {name: value for name, value in os.environ.items() if not foreign.fullmatch(name)}
        variables |= {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "HF_HUB_DOWNLOAD_TIMEOUT": "3"}
        variables |= {f"HF_HUB_DISABLE_{name}": "1" for name in ("XET", "TELEMETRY", "PROGRESS_BARS")}
        return variables if token is None else {**variables, "HF_TOKEN": token}

    @property
    def requests(self) -> list[Request]:
        """All requests since the last :meth:`clear`, in the order of their arrival."""
        return list(self._log.values())

    def clear(self) -> None:
        """Forgets requests, uploads and faults; users, repositories and collections stay."""
        self._log.clear()
        self.uploads.clear()
        self._injections.clear()
        self.faults_hit = 0

    def reset(self) -> None:
        """Forgets repositories and collections as well; users stay."""
        self.clear()
        self.repos.clear()
        self.collections.clear()

    def inject(self, fault: Fault, at: int = 0, method: str = "", path: str = "", every: bool = False) -> None:
        """Has a request go wrong.

        Args:
            fault: What goes wrong.
            at: Which of the matching requests from now on, counted from 0.
            method: Regular expression that the whole method must match; empty for any.
            path: Regular expression to be found in the quoted path; empty for any.
            every: Whether all matching requests from ``at`` on go wrong.
        """
        self._injections.append(_Injection(fault, at, method or ".*", path, every))

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Logs a request, answers it and spoils the answer if a fault is due."""
        method, path = scope["method"], scope["raw_path"].decode()
        number, self._arrivals = self._arrivals, self._arrivals + 1
        self._log[number] = Request(method, path, dict(scope["headers"]).get(b"range", b"").decode() or None)
        due = [injection.fault for injection in self._injections if injection.due(method, path)]
        fault = due[0] if due else Fault("none")
        self.faults_hit += bool(due)
        if (body := await _read(receive)) is None:
            return
        # Routes are matched on the path as it was sent: a slash within a revision (refs%2Fpr%2F1) separates nothing.
        answer = await self._answer({**scope, "path": path}, body, fault)
        if answer is not None:
            if number in self._log:
                sent = 0 if method == "HEAD" else len(answer.body)
                self._log[number] = replace(self._log[number], status=answer.status, sent=sent)
            await send({"type": "http.response.start", "status": answer.status, "headers": answer.headers})
            for piece in _pieces(answer.body, _PIECES if fault.kind == "slow" else 1):
                if fault.kind == "slow" and await _gone(receive, fault.value / _PIECES):
                    return
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        if answer is None or fault.kind == "truncate":
            scope["state"]["transport"].close()
            await _gone(receive)
        else:
            await send({"type": "http.response.body"})

    async def _answer(self, scope: Scope, body: bytes, fault: Fault) -> _Answer | None:
        """The answer to a request, None if there is to be none."""
        if fault.kind == "drop":
            return None
        if fault.kind == "status":
            code, retry_after = fault.value
            headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
            response = JSONResponse({"error": "injected"}, code, headers)
            return _Answer(code, response.raw_headers, bytes(response.body))
        if fault.kind == "call":
            function, after, drop = fault.value
            answer = await self._handle(scope, body) if after else None
            await asyncio.to_thread(function)
            return None if drop else answer or await self._handle(scope, body)
        answer = await self._handle(scope, body)
        if fault.kind == "truncate":
            answer.body = answer.body[: int(len(answer.body) * fault.value)]  # the headers promise what was there
        if fault.kind == "etag":
            replaced = MutableHeaders(raw=answer.headers)
            replaced["ETag"] = replaced["X-Linked-Etag"] = fault.value
        if fault.kind == "corrupt":
            kept = max(0, len(answer.body) - _FLIPPED)
            answer.body = answer.body[:kept] + bytes(byte ^ 0xFF for byte in answer.body[kept:])
        return answer

    async def _handle(self, scope: Scope, body: bytes) -> _Answer:
        messages: list[Message] = []

        async def receive() -> Message:
            return {"type": "http.request", "body": body}

        async def send(message: Message) -> None:
            messages.append(message)

        await self.app(scope, receive, send)
        return _Answer(messages[0]["status"], messages[0]["headers"], b"".join(m["body"] for m in messages[1:]))


def _pieces(body: bytes, number: int) -> list[bytes]:
    """A body in so many pieces of nearly the same length; fewer if it is too short."""
    size = max(1, -(-len(body) // number))
    return [body[start : start + size] for start in range(0, len(body), size)]


async def _read(receive: Receive) -> bytes | None:
    """The body of a request, None if the client went away."""
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += message["body"]
        if not message["more_body"]:
            return bytes(body)


async def _gone(receive: Receive, seconds: float | None = None) -> bool:
    """Waits until the client is gone, at most so long; returns whether it is."""
    try:
        await asyncio.wait_for(receive(), seconds)
    except asyncio.TimeoutError:
        return False
    return True
