"""How a call goes: whom to ask, when to try again, when to give up. Pure: what is to be done is yielded, and done by
the two clients, one with threads and one with asyncio."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

from . import answers
from ._proto import spatialscore as pb
from .answers import Failure
from .endpoints import Deadline, Endpoint, Endpoints
from .errors import DeadlineExceededError, ItemFailure, ItemsFailedError, ModelMismatchError, call_error
from .plan import Batch
from .scores import Columns, ModelInfo, Receipt, Score, Scores

Method = Literal["Score", "GetModel"]
T = TypeVar("T")
# How often a call is sent again after a failure of which nobody knows what it means.
_VAGUE = 3
# What must be left of the timeout for another attempt: so much of it, or so many seconds.
_LEAST_SHARE, _LEAST_SECONDS = 0.1, 1.0


class Flight(Protocol):
    """A request that is under way."""

    endpoint: Endpoint
    answer: Any
    """The response or its Failure, once `Land` has named it."""

    def cancel(self) -> None:
        """Ends it, if it has not ended."""


@dataclass(frozen=True)
class Send:
    """Send a request; the response, or its Failure, comes back."""

    endpoint: Endpoint
    method: Method
    request: Any
    timeout: float


@dataclass(frozen=True)
class Begin:
    """Send a request; its Flight comes back at once. It is given up where its server turns out to be silent."""

    endpoint: Endpoint
    method: Method
    request: Any
    timeout: float


@dataclass(frozen=True)
class Land:
    """Wait for one of several flights: it comes back, or None after so many seconds."""

    flights: list[Any]
    seconds: float | None


@dataclass(frozen=True)
class Ask:
    """Ask an endpoint what it serves, and tell `told` what came of it. Nobody waits for that."""

    endpoint: Endpoint
    timeout: float
    told: Callable[[Failure | None], None]


@dataclass(frozen=True)
class Wait:
    """Do nothing for so many seconds."""

    seconds: float


Steps = Generator[Send | Begin | Land | Ask | Wait, Any, T]


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
        self._vague = 0
        self._last: tuple[str, Failure] | None = None

    def next(self, *, ask: bool = False) -> Steps[Endpoint]:
        """Where to try now, after the rest it needs, and after it was asked what it serves, if it was not before or
        `ask` wants to know it anew. Raises CallError where the deadline leaves no time for it."""
        while True:
            endpoint = yield from self._pick()
            for suspect in self._endpoints.suspects():
                yield Ask(suspect, self._endpoints.patience(), self._told_of(suspect))
            pause = endpoint.pause() if self._last else 0.0
            self._check_time(endpoint.address, pause)
            self._say(endpoint, pause)
            if pause > 0:
                yield Wait(pause)
            if endpoint.verified and not ask:
                return endpoint
            left, patience = self._deadline.left(), self._endpoints.patience(self._made)
            found = yield Send(endpoint, "GetModel", pb.GetModelRequest(), min(left, patience))
            if not isinstance(found, Failure):
                self._endpoints.verify(endpoint, answers.model(found))
                endpoint.heard = time.monotonic()
                return endpoint
            if found.code == "DEADLINE_EXCEEDED" and patience < left:
                found = answers.silence(patience)
            self.failed(endpoint, found)

    def _pick(self) -> Steps[Endpoint]:
        """Whose turn it is; waits until names are resolved."""
        wait = 0.001
        while True:
            self._endpoints.refresh()
            endpoint = self._endpoints.pick()
            if endpoint is not None:
                return endpoint
            unknown = self._endpoints.unknown()
            if unknown is not None and unknown.message:
                self._last, self._made = ("", unknown), self._made + (self._last is None)
                self._endpoints.notices.say("names", f"{unknown.message}; {self._deadline.left():.0f} s are left")
            self._check_time("", wait if self._last else 0.0)
            yield Wait(wait)
            wait = min(2 * wait, 0.1)

    def _told_of(self, suspect: Endpoint) -> Callable[[Failure | None], None]:
        def told(failure: Failure | None) -> None:
            if failure is None:
                # What it serves is asked by the call that takes it, which can raise.
                self._endpoints.answered(suspect)
            else:
                silent = failure.code == "DEADLINE_EXCEEDED"
                self._endpoints.failed(suspect, answers.silence(self._endpoints.patience()) if silent else failure)

        return told

    def _say(self, endpoint: Endpoint, pause: float) -> None:
        if self._last:
            where, failure = self._last
            here = "again" if endpoint.address == where else endpoint.address
            when = f"in {pause:.1f} s" if pause else "now"
            self._endpoints.notices.say(
                where,
                f"{where}: {failure.code}: {failure.message}; trying {here} {when}, "
                f"{self._deadline.left():.0f} s of {self._deadline.timeout:g} s are left",
            )

    def _check_time(self, address: str, pause: float) -> None:
        left, timeout = self._deadline.left(), self._deadline.timeout
        if self._last and pause >= left - min(_LEAST_SHARE * timeout, _LEAST_SECONDS):
            where, failure = self._last
            text = f"{failure.message} (no time for another attempt within {timeout:g} s)"
            raise call_error(failure.code, text, where, self._made)
        if left <= 0:
            text = f"the timeout of {timeout:g} s passed"
            raise DeadlineExceededError("DEADLINE_EXCEEDED", text, target=address)

    def failed(self, endpoint: Endpoint, failure: Failure) -> None:
        """Takes note of a failure. Raises CallError at once for what is not to be tried again."""
        self._made += 1
        self._last = endpoint.address, failure
        self._vague += failure.vague
        if failure.retryable or (failure.vague and self._vague <= _VAGUE):
            self._endpoints.failed(endpoint, failure)
            return
        if failure.code == "DEADLINE_EXCEEDED":
            self._endpoints.failed(endpoint, failure)
        raise call_error(failure.code, failure.message, endpoint.address, self._made)

    def answered(self, endpoint: Endpoint) -> None:
        """Takes note that an endpoint works: what failed before does not count any more."""
        self._endpoints.answered(endpoint)
        self._made, self._vague, self._last = 0, 0, None


def model(endpoints: Endpoints, deadline: Deadline, *, ask: bool = False) -> Steps[ModelInfo]:
    """What is served: as it was told last, or asked anew."""
    while ask or endpoints.model is None:
        yield from Attempts(endpoints, deadline).next(ask=ask)
        ask = False
    return endpoints.model


def score(endpoints: Endpoints, deadline: Deadline, batch: Batch) -> Steps[list[Score | ItemFailure]]:
    """The results of one request."""
    response, target = yield from _respond(endpoints, deadline, batch)
    return answers.results(response, batch.start, len(batch.request.items), target)


@dataclass(frozen=True)
class Named:
    """What the models that a call names made of an item."""

    results: tuple[Score | ItemFailure, ...]
    """One for each model."""
    receipts: tuple[Receipt, ...]
    """What judged it."""


def score_named(endpoints: Endpoints, deadline: Deadline, batch: Batch) -> Steps[list[Named]]:
    """The results of one request that names models: one for each item."""
    response, target = yield from _respond(endpoints, deadline, batch)
    models, count = list(batch.request.models), len(batch.request.items)
    items, receipts = answers.columns(response, batch.start, count, models, target)
    return [Named(results, receipts) for results in items]


def _respond(endpoints: Endpoints, deadline: Deadline, batch: Batch) -> Steps[tuple[pb.ScoreResponse, str]]:
    """What answers one request, and who gave it.

    An attempt that takes half of the time that is left is not given up, for it may stand in a long queue; but the
    same is asked of another server, and whoever answers first is taken. Scoring twice gives the same.
    """
    attempts = Attempts(endpoints, deadline)
    flights: list[Flight] = []

    def begin(endpoint: Endpoint) -> Steps[None]:
        flights.append((yield Begin(endpoint, "Score", batch.request, deadline.left())))
        endpoints.begun(endpoint)

    def landed(flight: Flight) -> None:
        flights.remove(flight)
        endpoints.ended(flight.endpoint)

    try:
        while True:
            if not flights:
                yield from begin((yield from attempts.next()))
            share = max(0.1, deadline.left() / 2) if len(flights) == 1 and endpoints.several else None
            flight = yield Land(flights, share)
            if flight is None:
                other = endpoints.spare(flights[0].endpoint)
                if other is not None:
                    yield from begin(other)
                continue
            answer = flight.answer
            landed(flight)
            if isinstance(answer, Failure):
                attempts.failed(flight.endpoint, answer)
                continue
            attempts.answered(flight.endpoint)
            for late in flights:
                endpoints.failed(late.endpoint, Failure("DEADLINE_EXCEEDED", "another answered first"))
            return answer, flight.endpoint.address
    finally:
        for each in list(flights):
            landed(each)
            each.cancel()


def merge(results: dict[int, Score | ItemFailure], count: int) -> list[Score]:
    """The scores of a call's items, from the results of all its requests. Raises ItemsFailedError."""
    failures = [result for result in results.values() if isinstance(result, ItemFailure)]
    scores = [results[index] for index in range(count)]
    if failures:
        raise ItemsFailedError(failures, [score if isinstance(score, Score) else None for score in scores])
    return [score for score in scores if isinstance(score, Score)]


def check_same(receipts: Sequence[Receipt], others: Sequence[Receipt]) -> None:
    """Raises ModelMismatchError where two parts of a call were not judged by the same."""
    for first, other in zip(receipts, others, strict=True):
        if first != other:
            raise ModelMismatchError(
                f"{first.model} was replaced while the call ran: one part was judged by {first.revision}, "
                f"another by {other.revision}; their scores must not be mixed, so score it again"
            )


def merge_named(
    results: dict[int, Named], count: int, models: Sequence[str], weights: Mapping[str, float] | None
) -> Columns:
    """The columns of a call that names models, from the results of all its requests.

    Raises ItemsFailedError, and ModelMismatchError where a model was replaced while the call ran.
    """
    items = [results[index] for index in range(count)]
    receipts = items[0].receipts if items else ()
    for item in items:
        check_same(receipts, item.receipts)
    failures = [result for item in items for result in item.results if isinstance(result, ItemFailure)]
    table = {
        model: [result if isinstance(result, Score) else None for result in (item.results[place] for item in items)]
        for place, model in enumerate(models)
    }
    if failures:
        raise ItemsFailedError(failures, (), table)
    scores = {model: Scores([score for score in column if score is not None]) for model, column in table.items()}
    return Columns(scores, receipts, weights)
