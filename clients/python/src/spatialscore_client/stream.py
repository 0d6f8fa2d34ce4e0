"""The items of a stream that are sent and not answered: what both clients keep of it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Union

from . import answers, calls, plan
from ._proto import spatialscore as pb
from .answers import Failure
from .errors import DeadlineExceededError, ItemFailure, ItemsFailedError, ServerFaultError
from .images import Codec, Picture, PictureError, source
from .scores import Limits, Receipt, Score, StreamedScore, StreamedScores, weighted_sum
from .settings import Priority

StreamItem = Union["tuple[str, Picture]", "tuple[str, Picture, Sequence[Picture]]", "Sequence[Any]"]
"""What a stream takes: a prompt and a picture, and behind them the references, where the model reads any."""
Streamed = StreamedScore | StreamedScores
"""What a stream gives: the second where it names models."""


class Pending:
    """What is under way, by id. An item stays until its score is there, and is sent again if its stream breaks."""

    def __init__(
        self,
        limits: Limits,
        codec: Codec,
        timeout: float,
        priority: Priority,
        models: Sequence[str] | None = None,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        self._limits = limits
        self._codec = codec
        self.timeout = timeout
        self._priority = plan.wire(priority)
        self._models = list(models or ())
        self._weights = weights
        self._receipts: tuple[Receipt, ...] | None = None
        self._count = 0
        self._away = 0.0
        self._paused = False
        self._items: dict[str, tuple[pb.ScoreStreamRequest, float]] = {}

    def __len__(self) -> int:
        return len(self._items)

    def waits(self) -> bool:
        """Whether a server owes an answer that somebody waits for."""
        return bool(self._items) and not self._paused

    def add(self, item: StreamItem) -> pb.ScoreStreamRequest:
        """The next item of the caller's iterable. Raises ItemsFailedError, TypeError."""
        index = self._count
        if not isinstance(item, Sequence) or isinstance(item, (str, bytes, bytearray, memoryview)):
            raise TypeError(f"item {index} is a {type(item).__name__}; give a pair: (prompt, picture)")
        if len(item) not in (2, 3):
            raise TypeError(f"item {index} has {len(item)} parts; give a pair: (prompt, picture)")
        prompt, picture, *more = item
        references = more[0] if more else ()
        if not isinstance(references, Sequence) or isinstance(references, (str, bytes, bytearray, memoryview)):
            raise TypeError(
                f"item {index} has a {type(references).__name__} as its references, not a list of pictures"
            )
        if not isinstance(prompt, str):
            raise TypeError(f"item {index} has a {type(prompt).__name__} as its prompt, not a str")
        try:
            checked = plan.Item(prompt, source(picture), tuple(source(reference) for reference in references))
            if refused := plan.check(index, checked, self._limits):
                raise ItemsFailedError([refused], [])
            pictures = checked.encode(self._codec)
        except (PictureError, UnicodeEncodeError) as error:
            raise ItemsFailedError([plan.refusal(index, str(error))], []) from error
        message = pb.ScoreStreamRequest(
            id=str(index), priority=self._priority, models=self._models, wants_receipts=bool(self._models)
        )
        message.item.prompt = prompt
        plan.write(message.item, checked, pictures)
        if message.ByteSize() > self._limits.max_message_bytes:
            text = f"takes {message.ByteSize()} bytes; the server takes messages of {self._limits.max_message_bytes}"
            raise ItemsFailedError([plan.refusal(index, text)], [])
        self._count += 1
        self._items[message.id] = message, self.now() + self.timeout
        return message

    def messages(self) -> list[pb.ScoreStreamRequest]:
        """What has to be sent again on a new stream, in order."""
        return [message for message, _ in self._items.values()]

    def left(self) -> float:
        """Seconds until the item that was added first is overdue; all of the timeout where there is none."""
        _, end = next(iter(self._items.values()), (None, self.now() + self.timeout))
        return end - self.now()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """While the caller makes the next item, nobody waits: that time is not the server's."""
        start = time.monotonic()
        self._paused = True
        try:
            yield
        finally:
            self._away += time.monotonic() - start
            self._paused = False

    @property
    def share(self) -> float:
        """Seconds without any answer after which a stream is tried elsewhere, where there is another server."""
        return self.timeout / 2

    def mute(self) -> Failure:
        """Why it is."""
        return Failure("UNAVAILABLE", f"the stream answered nothing for {self.share:g} s")

    def overdue(self, target: str) -> DeadlineExceededError:
        """What to raise once an item is."""
        text = f"item {next(iter(self._items), '')} was not answered within {self.timeout:g} s"
        return DeadlineExceededError("DEADLINE_EXCEEDED", text, target=target)

    def now(self) -> float:
        """The time that servers have had."""
        return time.monotonic() - self._away

    def accept(self, response: pb.ScoreStreamResponse, target: str) -> Streamed | Failure:
        """An answer: a score of each model, or the reason to send everything again on a new stream.

        Raises ItemsFailedError where the item can have no score, ServerFaultError for what the contract excludes, and
        ModelMismatchError where a model was replaced while the stream ran.
        """
        if response.id not in self._items:
            text = f"the server answered an item that is not under way: {response.id!r}"
            raise ServerFaultError("INTERNAL", text, target=target)
        index = int(response.id)
        answer = response.result
        outcomes: list[pb.ScoreResult | pb.ModelOutcome] = [answer, *answer.outcomes]
        for failure in (answers.of_item(outcome.error) for outcome in outcomes if outcome.HasField("error")):
            if failure.retryable:
                return failure
        receipts: tuple[Receipt, ...] = ()
        if self._models and not answer.HasField("error"):
            receipts = answers.judges(response.receipts, self._models, target)
        # An item that no model could take, or that names a model that is not there, has no outcome of each.
        whole = not self._models or (len(self._models) > 1 and answer.HasField("error"))
        named = answers.named(answer, index, self._models, target) if not whole else ()
        results = named or (answers.result(answer, index, target),)
        scores = [result for result in results if isinstance(result, Score)]
        if len(scores) != len(results):
            found = [[result if isinstance(result, Score) else None] for result in named]
            columns = dict(zip(self._models if named else (), found, strict=True))
            raise ItemsFailedError([result for result in results if isinstance(result, ItemFailure)], [], columns)
        del self._items[response.id]
        if not self._models:
            return StreamedScore(index, scores[0])
        self._receipts = self._receipts or receipts
        calls.check_same(self._receipts, receipts)
        by_name = dict(zip(self._models, scores, strict=True))
        weights = self._weights
        total = None if weights is None else weighted_sum(weights, [by_name[model].mean for model in weights])
        return StreamedScores(index, by_name, receipts, total)
