"""The client for asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Iterable, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

import grpc.aio

from . import answers, calls, plan
from ._proto import spatialscore as pb
from .answers import Failure
from .base import SERVICE, UNARY, BaseClient
from .calls import Attempts, Send, Steps
from .endpoints import Endpoint
from .errors import ItemFailure
from .images import Pictures
from .scores import ModelInfo, Score, Scores, StreamedScore
from .settings import Metadata
from .stream import Pending, StreamItem

T = TypeVar("T")
# gRPC's own words where a message could not be written because its stream is over: it then says INTERNAL before it
# knows why, and the server's status is lost. The stream is opened again, after a call that would bring it to light.
_BROKEN_WRITE = "Internal error from Core"


class AsyncSpatialScoreClient(BaseClient):
    """The asyncio twin of SpatialScoreClient: the same settings, promises and exceptions.

    It may be used from several event loops; each has its own connections.
    """

    async def score(
        self,
        prompts: str | Sequence[str],
        images: Pictures,
        *,
        timeout: float | None = None,
        traceparent: str | None = None,
    ) -> Scores:
        """As SpatialScoreClient.score."""
        deadline = self._deadline(timeout)
        items = plan.items(prompts, images)
        if not items:
            return Scores([])
        metadata = self._settings.metadata(traceparent)
        limits = (await self._run(calls.model(self._endpoints, deadline), metadata)).limits
        batches = plan.batches(items, limits, self._settings.codec, self._settings.priority)
        results: dict[int, Score | ItemFailure] = {}

        async def work() -> None:
            # Each worker takes the next batch when it is done with its last: so many are under way, and no more.
            for batch in batches:
                scores = await self._run(calls.score(self._endpoints, deadline, batch), metadata)
                results.update(enumerate(scores, batch.start))

        await _together([work() for _ in range(self._settings.max_in_flight)])
        return Scores(calls.merge(results, len(items)))

    async def score_stream(
        self,
        items: Iterable[StreamItem] | AsyncIterable[StreamItem],
        *,
        timeout: float | None = None,
        traceparent: str | None = None,
    ) -> AsyncGenerator[StreamedScore, None]:
        """As SpatialScoreClient.score_stream; `items` may be an asynchronous iterable, and is read in the loop."""
        deadline = self._deadline(timeout)
        metadata = self._settings.metadata(traceparent)
        limits = (await self._run(calls.model(self._endpoints, deadline), metadata)).limits
        pending = Pending(limits, self._settings.codec, deadline.timeout, self._settings.priority)
        pump = _Pump(self, metadata, pending, _asynchronous(items, pending))
        async with aclosing(pump.run()) as results:
            async for result in results:
                yield result

    async def model(self, *, timeout: float | None = None) -> ModelInfo:
        """As SpatialScoreClient.model."""
        steps = calls.model(self._endpoints, self._deadline(timeout), ask=True)
        return await self._run(steps, self._settings.metadata(None))

    async def close(self) -> None:
        """Closes this loop's connections."""
        loop = asyncio.get_running_loop()
        with self._lock:
            closing = [self._channels.pop(key) for key in list(self._channels) if key[0] is loop]
        for channel in closing:
            await channel.close()

    async def __aenter__(self) -> AsyncSpatialScoreClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def _channel(self, endpoint: Endpoint) -> grpc.aio.Channel:
        loop = asyncio.get_running_loop()
        with self._lock:
            # A channel belongs to its loop: those of loops that are over go with them.
            for key in [key for key in self._channels if key[0].is_closed()]:
                del self._channels[key]
            channel = self._channels.get((loop, endpoint.address))
            if channel is None:
                options, tls = self._settings.options(), self._settings.tls
                channel = (
                    grpc.aio.secure_channel(endpoint.address, tls.credentials(), options)
                    if tls
                    else grpc.aio.insecure_channel(endpoint.address, options)
                )
                self._channels[loop, endpoint.address] = channel
            return channel

    async def _run(self, steps: Steps[T], metadata: Metadata) -> T:
        """Does what a call's logic asks for, until it is over."""
        answer: Any = None
        while True:
            try:
                step = steps.send(answer)
            except StopIteration as end:
                result: T = end.value
                return result
            answer = None
            if isinstance(step, Send):
                answer = await self._send(step, metadata)
            else:
                await asyncio.sleep(step.seconds)

    async def _send(self, step: Send, metadata: Metadata) -> Any:
        request, response = UNARY[step.method]
        method = self._channel(step.endpoint).unary_unary(
            f"{SERVICE}/{step.method}", request.SerializeToString, response.FromString
        )
        try:
            return await method(step.request, timeout=step.timeout, metadata=metadata)
        except grpc.aio.AioRpcError as error:
            return failure_of(error)


def failure_of(error: grpc.aio.AioRpcError) -> Failure:
    """A failure as gRPC raises it."""
    if error.details() == _BROKEN_WRITE:
        return Failure("UNAVAILABLE", "the stream broke while an item was sent")
    return answers.failure(error.code().name, error.details(), error.trailing_metadata())


async def _together(work: list[Any]) -> None:
    """Runs all to their end; where one fails, the others are cancelled and gone before its exception is raised."""
    tasks = [asyncio.ensure_future(each) for each in work]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _asynchronous(
    items: Iterable[StreamItem] | AsyncIterable[StreamItem], pending: Pending
) -> AsyncIterator[StreamItem]:
    if isinstance(items, AsyncIterable):
        async for item in items:
            yield item
        return
    iterator = iter(items)
    while True:
        # It blocks the loop, and with it the answers.
        with pending.paused():
            following = next(iterator, None)
        if following is None:
            return
        yield following
        await asyncio.sleep(0)


class _Pump:
    """A stream from the caller's iterable to the server and back, over as many connections as it takes."""

    def __init__(
        self,
        client: AsyncSpatialScoreClient,
        metadata: Metadata,
        pending: Pending,
        items: AsyncIterator[StreamItem],
    ) -> None:
        self._client = client
        self._metadata = metadata
        self._pending = pending
        self._items = items
        self._exhausted = False
        # The caller's next item, which may be long in coming: it outlives a connection.
        self._next: asyncio.Task[StreamItem | None] | None = None

    async def run(self) -> AsyncGenerator[StreamedScore, None]:
        """The results. Opens a stream again after a failure that allows it."""
        attempts = Attempts(self._client._endpoints, self._pending)
        try:
            while True:
                endpoint = await self._client._run(attempts.next(), self._metadata)
                failure = None
                async with aclosing(self._connection(endpoint)) as results:
                    async for result in results:
                        if isinstance(result, Failure):
                            failure = result
                        else:
                            attempts.answered(endpoint)
                            yield result
                if failure is None and self._exhausted and not self._pending:
                    return
                failure = failure or Failure("UNAVAILABLE", "the stream ended early")
                attempts.failed(endpoint, failure)
        finally:
            if self._next is not None:
                self._next.cancel()

    async def _connection(self, endpoint: Endpoint) -> AsyncGenerator[StreamedScore | Failure, None]:
        """The results of one connection; last, why it broke, if it did."""
        method = self._client._channel(endpoint).stream_stream(
            f"{SERVICE}/ScoreStream", pb.ScoreStreamRequest.SerializeToString, pb.ScoreStreamResponse.FromString
        )
        stream = method(metadata=self._metadata)
        reading: asyncio.Task[Any] | None = None
        try:
            for message in self._pending.messages():
                await self._write(stream, message, endpoint)
            if self._exhausted:
                await stream.done_writing()
            while not self._exhausted or self._pending:
                reading = reading or asyncio.ensure_future(stream.read())
                await self._wait(reading, endpoint)
                await self._feed(stream, endpoint)
                if reading.done():
                    response, reading = reading.result(), None
                    if response is grpc.aio.EOF:
                        yield Failure("UNAVAILABLE", "the server ended the stream")
                        return
                    outcome = self._pending.accept(response, endpoint.address)
                    yield outcome
                    if isinstance(outcome, Failure):
                        return
            # Lets the server see an end, and not a caller who left; whatever it says now changes no score.
            reading = asyncio.ensure_future(stream.read())
            await asyncio.wait([reading], timeout=1.0)
        except grpc.aio.AioRpcError as error:
            yield failure_of(error)
        finally:
            stream.cancel()
            if reading is not None:
                reading.cancel()
                # However it ends, it is looked at: else asyncio complains of an exception that nobody saw.
                reading.add_done_callback(lambda task: task.cancelled() or task.exception())

    async def _wait(self, reading: asyncio.Task[Any], endpoint: Endpoint) -> None:
        """Waits for an answer or for the caller's next item, where there is room for one."""
        room = len(self._pending) < self._client._settings.stream_window
        if self._next is None and room and not self._exhausted:
            self._next = asyncio.ensure_future(anext(self._items, None))
        awaited = {reading} if self._next is None or not room else {reading, self._next}
        timeout = max(0.0, self._pending.left()) if self._pending else None
        done, _ = await asyncio.wait(awaited, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        if not done:
            raise self._pending.overdue(endpoint.address)

    async def _feed(self, stream: Any, endpoint: Endpoint) -> None:
        """Sends the caller's next item, where it is there."""
        if self._next is None or not self._next.done():
            return
        item, self._next = self._next.result(), None
        if item is None:
            self._exhausted = True
            await stream.done_writing()
        else:
            await self._write(stream, self._pending.add(item), endpoint)

    async def _write(self, stream: Any, message: pb.ScoreStreamRequest, endpoint: Endpoint) -> None:
        """Sends a message, once the server takes it."""
        try:
            await asyncio.wait_for(stream.write(message), max(0.0, self._pending.left()))
        except asyncio.TimeoutError:
            raise self._pending.overdue(endpoint.address) from None
        except asyncio.InvalidStateError:
            # The stream is over: reading tells why.
            return
