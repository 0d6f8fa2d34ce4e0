"""What `check` does at the HTTP port, where trainers' own reward clients call."""

from __future__ import annotations

import base64
import http.client
import json
import ssl
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import SplitResult, unquote

from .errors import Finding
from .images import png
from .settings import host_and_port

_SIDE = 112


class Door:
    """The HTTP port of a server, by its URL."""

    def __init__(self, url: SplitResult, token: str | None, context: ssl.SSLContext | None, timeout: float) -> None:
        self._host, self._port = host_and_port(url.netloc.rpartition("@")[2])
        self._context = context if url.scheme == "https" else None
        self._timeout = timeout
        self._headers = {"Content-Type": "application/json"}
        if url.username is not None:
            pair = f"{unquote(url.username)}:{unquote(url.password or '')}"
            self._headers["Authorization"] = f"Basic {base64.b64encode(pair.encode()).decode()}"
        elif token is not None:
            self._headers["Authorization"] = f"Bearer {token}"

    def is_there(self) -> bool:
        """Whether it is one: a gRPC port, and most else, gives no such answer."""
        try:
            self._rewards = self._ask("GET", "/health")[1]["rewards"]
        except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError):
            return False
        return True

    def steps(self) -> Iterator[str]:
        """What it says. Raises Finding."""
        if not self._rewards:
            raise Finding("HTTP: the server is there, and is loading its model or stopping")
        yield f"HTTP: a SpatialScore server answers with {', '.join(sorted(self._rewards))}"
        body = {"prompt": ["a grey wall"], "image": [base64.b64encode(_grey()).decode()]}
        start = time.perf_counter()
        try:
            status, answer = self._ask("POST", "/compute", json.dumps(body))
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise Finding(f"HTTP: the round trip broke: {error}") from None
        took = (time.perf_counter() - start) * 1e3
        if status == 401:
            where = "trainers' clients show it in the URL: http://SUBJECT:TOKEN@HOST:PORT"
            raise Finding(f"token: {answer.get('detail')}; {where}")
        if status == 429:
            raise Finding(f"HTTP: the server is there, and its queue is full: {answer.get('detail')}")
        rewards = answer.get("rewards")
        if status != 200 or not isinstance(rewards, list) or len(rewards) != 1:
            raise Finding(f"round trip: a grey picture was not scored: {answer.get('error') or answer.get('detail')}")
        yield f"round trip: a grey picture scored in {took:.1f} ms over HTTP"

    def _ask(self, method: str, path: str, body: str | None = None) -> tuple[int, dict[str, Any]]:
        connection = (
            http.client.HTTPSConnection(self._host, self._port, timeout=self._timeout, context=self._context)
            if self._context
            else http.client.HTTPConnection(self._host, self._port, timeout=self._timeout)
        )
        try:
            connection.request(method, path, body, self._headers)
            response = connection.getresponse()
            answer = json.loads(response.read(1 << 20))
            if not isinstance(answer, dict):
                raise ValueError("the answer is no JSON object")
            return response.status, answer
        finally:
            connection.close()


def _grey() -> bytes:
    """A grey picture as PNG."""
    return png(bytes([128]) * (3 * _SIDE * _SIDE), (_SIDE, _SIDE))
