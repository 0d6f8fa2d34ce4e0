"""How a call goes: whom to ask, when to try again, when to give up. Pure: what is to be done is yielded, and done by
the two clients, one with threads and one with asyncio."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

from . import answers
from ._proto import spatialscore as pb
from .answers import Failure
from .endpoints import Deadline, Endpoint, Endpoints
from .errors import DeadlineExceededError, ItemFailure, ItemsFailedError, call_error
from .plan import Batch
from .scores import ModelInfo, Score

Method = Literal["Score", "GetModel"]
T = TypeVar("T")


@dataclass(frozen=True)
class Send:
    """Send a request; the response, or its Failure, comes back."""

    endpoint: Endpoint
    method: Method
    request: Any
    timeout: float


@dataclass(frozen=True)
class Wait:
    """Do nothing for so many seconds."""

    seconds: float


Steps = Generator[Send | Wait, Any, T]


class TimeLeft(Protocol):
    """A timeout that runs."""

    timeout: float

    def left(self) -> float:
        """Seconds until it is over."""


class Attempts:
    """The attempts of one call: where the next one goes, and when there is none left."""

    def __init__(self, endpoints: Endpoints, deadline: TimeLeft) -> None:
        self._endpoints = endpoints
        self._deadline = deadline
        self._made = 0
        self._last: tuple[Endpoint, Failure] | None = None

    def next(self, *, ask: bool = False) -> Steps[Endpoint]:
        """Where to try now, after the rest it needs, and after it was asked what it serves, if it was not before or
        `ask` wants to know it anew. Raises CallError where the deadline leaves no time for it."""
        while True:
            endpoint = self._endpoints.pick()
            pause = endpoint.pause() if self._last else 0.0
            self._check_time(endpoint, pause)
            if pause > 0:
                yield Wait(pause)
            if endpoint.verified and not ask:
                return endpoint
            found = yield Send(endpoint, "GetModel", pb.GetModelRequest(), self._deadline.left())
            if not isinstance(found, Failure):
                self._endpoints.verify(endpoint, answers.model(found))
                return endpoint
            self.failed(endpoint, found)

    def _check_time(self, endpoint: Endpoint, pause: float) -> None:
        left, timeout = self._deadline.left(), self._deadline.timeout
        if self._last and pause >= left:
            where, failure = self._last
            text = f"{failure.message} (no time for another attempt within {timeout:g} s)"
            raise call_error(failure.code, text, where.address, self._made)
        if left <= 0:
            text = f"the timeout of {timeout:g} s passed"
            raise DeadlineExceededError("DEADLINE_EXCEEDED", text, target=endpoint.address)

    def failed(self, endpoint: Endpoint, failure: Failure) -> None:
        """Takes note of a failure. Raises CallError at once for what is not to be tried again."""
        self._made += 1
        self._last = endpoint, failure
        if not failure.retryable:
            raise call_error(failure.code, failure.message, endpoint.address, self._made)
        self._endpoints.failed(endpoint, failure)

    def answered(self, endpoint: Endpoint) -> None:
        """Takes note that an endpoint works: what failed before does not count any more."""
        self._endpoints.answered(endpoint)
        self._made, self._last = 0, None


def model(endpoints: Endpoints, deadline: Deadline, *, ask: bool = False) -> Steps[ModelInfo]:
    """What is served: as it was told last, or asked anew."""
    while ask or endpoints.model is None:
        yield from Attempts(endpoints, deadline).next(ask=ask)
        ask = False
    return endpoints.model


def score(endpoints: Endpoints, deadline: Deadline, batch: Batch) -> Steps[list[Score | ItemFailure]]:
    """The results of one request."""
    attempts = Attempts(endpoints, deadline)
    while True:
        endpoint = yield from attempts.next()
        answer = yield Send(endpoint, "Score", batch.request, deadline.left())
        if not isinstance(answer, Failure):
            attempts.answered(endpoint)
            return answers.results(answer, batch.start, len(batch.request.items), endpoint.address)
        attempts.failed(endpoint, answer)


def merge(results: dict[int, Score | ItemFailure], count: int) -> list[Score]:
    """The scores of a call's items, from the results of all its requests. Raises ItemsFailedError."""
    failures = [result for result in results.values() if isinstance(result, ItemFailure)]
    scores = [results[index] for index in range(count)]
    if failures:
        raise ItemsFailedError(failures, [score if isinstance(score, Score) else None for score in scores])
    return [score for score in scores if isinstance(score, Score)]
