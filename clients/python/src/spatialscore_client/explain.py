"""Why a picture has the score that it has: `POST /v1/explain` of a server's HTTP port, which gRPC has no twin of.

With the standard library alone. It is asked once and not tried again: an explanation is for people, and costs as many
scores as it has parts.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import http.client
import json
import math
import socket
import ssl
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import SplitResult, unquote, urlsplit

from . import plan
from .endpoints import Deadline
from .errors import (
    ConfigurationError,
    DeadlineExceededError,
    ItemsFailedError,
    ServerFaultError,
    SpatialScoreError,
    UnavailableError,
    call_error,
)
from .images import Encoded, Picture, PictureError, png
from .plan import Questions
from .scores import Component, Receipt, Score
from .settings import Settings, context, host_and_port, is_local

# What gRPC calls the refusals that HTTP has numbers for.
_CODES = {
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    404: "NOT_FOUND",
    413: "INVALID_ARGUMENT",
    429: "RESOURCE_EXHAUSTED",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}
# More than any line of an answer has.
_LINE = 1 << 20


@dataclass(frozen=True)
class Change:
    """What one change of the picture or the prompt makes of the score."""

    score: Score | None
    """The score with the change; None where there is none."""
    cost: float | None
    """How much lower it is; below 0 where it is higher."""
    error: str = ""
    """Why there is no score."""


@dataclass(frozen=True)
class Dropped:
    """A clause of the prompt left out."""

    text: str
    """The clause."""
    without: str
    """The prompt without it."""
    change: Change
    """What that makes of the score."""


@dataclass(frozen=True)
class Turned:
    """A relation of the prompt turned round."""

    before: str
    """The relation, as `left`."""
    after: str
    """What it was turned to, as `right`."""
    prompt: str
    """The prompt with that."""
    change: Change
    """What that makes of the score."""


@dataclass(frozen=True)
class Explanation:
    """Why a picture has the score that it has. Each number is exact: the score of another picture or prompt."""

    whole: Score
    """The score with nothing changed."""
    mirrored: Change
    """Left and right of the picture changed over."""
    dropped: tuple[Dropped, ...]
    """Each clause left out; none where the prompt has but one."""
    turned: tuple[Turned, ...]
    """Each relation turned round."""
    cells: tuple[tuple[Change, ...], ...]
    """Rows of cells, from the top left: each covered with the picture's mean colour, with those around it: together
    about a third of the shorter side."""
    receipt: Receipt
    """What judged."""

    @property
    def map(self) -> list[list[float | None]]:
        """What covering each cell, with those around it, costs, row by row; None where there is no score."""
        return [[cell.cost for cell in row] for row in self.cells]


class Asking:
    """A call for an explanation. `answer` blocks; `stop`, from another thread, ends it."""

    def __init__(
        self,
        settings: Settings,
        url: str,
        prompt: str | None,
        image: Picture,
        *,
        references: Sequence[Picture],
        questions: Questions | None,
        model: str | None,
        cells: int | None,
        deadline: Deadline,
    ) -> None:
        """Raises what `score` raises for what cannot be sent, and ConfigurationError for what is no URL."""
        (item,) = plan.items(prompt, [image], [list(references)], None if questions is None else [questions])
        try:
            encodings = item.encode("raw")
        except PictureError as error:
            raise ItemsFailedError([plan.refusal(0, str(error))], [None]) from None
        body = {
            "prompt": item.prompt or None,
            "image": _file(encodings.judged),
            "references": [_file(each) for each in encodings.references],
            "questions": [{"text": each.text, "answers": list(each.answers)} for each in item.questions],
            "model": model,
            "cells": cells,
        }
        self._body = json.dumps({key: value for key, value in body.items() if value not in (None, [])})
        self._headers = {"Content-Type": "application/json"}
        parts = _url(url)
        self._address = parts.netloc.rpartition("@")[2]
        self._path = f"{parts.path.rstrip('/')}/v1/explain"
        self._authorize(parts, settings)
        host, port = host_and_port(self._address if parts.port else f"{self._address}:{_PORTS[parts.scheme]}")
        self._deadline = deadline
        self._stopped = False
        # That of the connection, which lets go of it once an answer begins that is its last.
        self._socket: socket.socket | None = None
        self._connection = (
            http.client.HTTPSConnection(host, port, context=_tls(settings))
            if parts.scheme == "https"
            else http.client.HTTPConnection(host, port)
        )

    def _authorize(self, parts: SplitResult, settings: Settings) -> None:
        if parts.username is not None:
            pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
            self._headers["Authorization"] = f"Basic {base64.b64encode(pair.encode()).decode()}"
        else:
            self._headers.update({name: str(value) for name, value in settings.metadata(None)})
        secret = "Authorization" in self._headers or "authorization" in self._headers
        if secret and parts.scheme == "http" and not is_local(self._address):
            warnings.warn("the token goes over the network in plain text; take https", stacklevel=5)

    def stop(self) -> None:
        """Ends the call: `answer` raises."""
        self._stopped = True
        if self._socket is not None:
            # It may be over already.
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)

    def answer(self) -> Explanation:
        """The explanation. Raises CallError."""
        try:
            self._connection.timeout = self._left()
            self._connection.connect()
            self._socket = self._connection.sock
            if self._stopped:
                raise UnavailableError("UNAVAILABLE", "the call was stopped", target=self._address)
            self._connection.request("POST", self._path, self._body, self._headers)
            response = self._connection.getresponse()
            if response.status != 200:
                raise call_error(_CODES.get(response.status, "INTERNAL"), _detail(response), self._address, 1)
            lines = []
            while line := self._line(response):
                lines.append(json.loads(line))
            return self._read(lines)
        except SpatialScoreError:
            # Of which some are errors of these kinds too.
            raise
        except TimeoutError:
            text = f"the timeout of {self._deadline.timeout:g} s passed"
            raise DeadlineExceededError("DEADLINE_EXCEEDED", text, target=self._address) from None
        except (OSError, http.client.HTTPException) as error:
            # Also a certificate that is not trusted, which is a ValueError too.
            raise UnavailableError("UNAVAILABLE", f"{error!r}", target=self._address) from error
        except (KeyError, TypeError, ValueError) as error:
            text = f"the answer is no explanation: {error!r}"
            raise ServerFaultError("INTERNAL", text, target=self._address) from error
        finally:
            self._connection.close()

    def _line(self, response: http.client.HTTPResponse) -> bytes:
        if self._socket is not None:
            self._socket.settimeout(self._left())
        return response.readline(_LINE)

    def _left(self) -> float:
        left = self._deadline.left()
        if left <= 0:
            raise TimeoutError
        return left

    def _read(self, lines: list[dict[str, Any]]) -> Explanation:
        last = lines[-1] if lines else {}
        if last.get("kind") == "error":
            raise call_error(last["error"]["code"], last["error"]["message"], self._address, 1)
        if last.get("kind") != "done":
            raise UnavailableError("UNAVAILABLE", "the answer ended early", target=self._address)
        found: dict[str, list[dict[str, Any]]] = {}
        for line in lines:
            found.setdefault(line["kind"], []).append(line)
        ((first,), (whole,), (mirrored,)) = found["plan"], found["whole"], found["mirrored"]
        dropped = (Dropped(line["text"], line["without"], _change(line)) for line in found.get("dropped", []))
        turned = (Turned(line["from"], line["to"], line["prompt"], _change(line)) for line in found.get("turned", []))
        cells = {(line["row"], line["column"]): _change(line) for line in found.get("cell", [])}
        rows, columns = range(first["rows"]), range(first["columns"])
        return Explanation(
            _score(whole),
            _change(mirrored),
            tuple(dropped),
            tuple(turned),
            tuple(tuple(cells[row, column] for column in columns) for row in rows),
            Receipt(**last["receipt"]),
        )


async def in_thread(asking: Asking) -> Explanation:
    """The answer, waited for by a thread; the call ends with its caller."""
    try:
        return await asyncio.to_thread(asking.answer)
    except asyncio.CancelledError:
        asking.stop()
        raise


_PORTS = {"http": 80, "https": 443}


def _url(url: object) -> SplitResult:
    parts = urlsplit(url) if isinstance(url, str) else None
    try:
        if parts is not None and parts.scheme in _PORTS and parts.hostname and parts.port != 0:
            return parts
    except ValueError:
        pass
    raise ConfigurationError("http names no HTTP port of a server; give one as in http://scorer:8080")


def _tls(settings: Settings) -> ssl.SSLContext:
    return context(settings.tls, "http/1.1") if settings.tls else ssl.create_default_context()


def _file(picture: Encoded) -> str:
    """A picture as a file in base64."""
    data = picture.data if picture.size is None else png(picture.data, picture.size)
    return base64.b64encode(data).decode()


def _detail(response: http.client.HTTPResponse) -> str:
    said = response.read(_LINE)
    try:
        return str(json.loads(said)["detail"])
    except (ValueError, KeyError, TypeError):
        return response.reason


def _change(line: dict[str, Any]) -> Change:
    if "error" in line:
        return Change(None, None, f"{line['error']['code']}: {line['error']['message']}")
    return Change(_score(line), _number(line["cost"]), "")


def _score(line: dict[str, Any]) -> Score:
    parts = (_component(part) for part in line.get("components", []))
    return Score(_number(line["mean"]), _optional(line.get("stddev")), tuple(parts))


def _component(part: dict[str, Any]) -> Component:
    return Component(part["name"], _number(part["mean"]), _optional(part.get("stddev")))


def _optional(value: object) -> float | None:
    return None if value is None else _number(value)


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{value!r} is no number")
    return float(value)
