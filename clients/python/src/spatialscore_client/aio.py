"""The client for asyncio."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Callable,
    Coroutine,
    Iterable,
    Mapping,
    Sequence,
)
from contextlib import aclosing
from typing import Any, TypeVar, overload

import grpc.aio

from . import answers, calls, plan
from ._proto import spatialscore as pb
from .answers import Failure
from .base import SERVICE, UNARY, BaseClient
from .calls import Ask, Attempts, Begin, Land, Send, Steps
from .endpoints import Endpoint, Watch, tell
from .errors import ConfigurationError, ItemFailure
from .explain import Asking, Explanation, in_thread
from .images import Picture, Pictures
from .plan import Batch, Questions
from .scores import Columns, ModelInfo, Score, Scores, StreamedScore, StreamedScores
from .settings import Metadata
from .stream import Pending, Streamed, StreamItem

T = TypeVar("T")
# What an iterator that is at its end gives; a caller's own None is an item, and refused.
_END: Any = object()
_GIVEN_UP = "its connection was given up"
# gRPC's own words where a message could not be written because its stream is over: it then says INTERNAL before it
# knows why, and the server's status is lost. The stream is opened again, after a call that would bring it to light.
_BROKEN_WRITE = "Internal error from Core"


class AsyncSpatialScoreClient(BaseClient):
    """The asyncio twin of SpatialScoreClient: the same settings, promises and exceptions.

    It may be used from several event loops; each has its own connections.
    """

    @overload
    async def score(
        self,
        prompts: str | Sequence[str] | None,
        images: Pictures,
        *,
        references: Sequence[Sequence[Picture]] | None = None,
        questions: Questions | Sequence[Questions] | None = None,
        models: None = None,
        weights: None = None,
        timeout: float | None = None,
        traceparent: str | None = None,
    ) -> Scores: ...
    @overload
    async def score(
        self,
        prompts: str | Sequence[str] | None,
        images: Pictures,
        *,
        references: Sequence[Sequence[Picture]] | None = None,
        questions: Questions | Sequence[Questions] | None = None,
        models: Sequence[str],
        weights: Mapping[str, float] | None = None,
        timeout: float | None = None,
        traceparent: str | None = None,
    ) -> Columns: ...
    @overload
    async def score(
        self,
        prompts: str | Sequence[str] | None,
        images: Pictures,
        *,
        references: Sequence[Sequence[Picture]] | None = None,
        questions: Questions | Sequence[Questions] | None = None,
        models: None = None,
        weights: Mapping[str, float],
        timeout: float | None = None,
        traceparent: str | None = None,
    ) -> Columns: ...
    async def score(
        self,
        prompts: str | Sequence[str] | None,
        images: Pictures,
        *,
        references: Sequence[Sequence[Picture]] | None = None,
        questions: Questions | Sequence[Questions] | None = None,
        models: Sequence[str] | None = None,
        weights: Mapping[str, float] | None = None,
        timeout: float | None = None,
        traceparent: str | None = None,
    ) -> Scores | Columns:
        """As SpatialScoreClient.score."""
        deadline = self._deadline(timeout)
        named = plan.names(models, weights)
        items = plan.items(prompts, images, references, questions)
        if not items:
            return Scores([]) if named is None else calls.merge_named({}, 0, named, weights)
        metadata = self._settings.metadata(traceparent)
        limits = (await self._run(calls.model(self._endpoints, deadline), metadata)).limits
        batches = plan.batches(items, limits, self._settings.codec, self._settings.priority, named)

        async def each(results: dict[int, T], steps: Callable[[Batch], Steps[list[T]]]) -> dict[int, T]:
            async def work() -> None:
                # Each worker takes the next batch when it is done with its last: so many are under way, and no more.
                for batch in batches:
                    scores = await self._run(steps(batch), metadata)
                    results.update(enumerate(scores, batch.start))

            await _together([work() for _ in range(self._settings.max_in_flight)])
            return results

        if named is not None:
            by_item: dict[int, calls.Named] = {}
            await each(by_item, lambda batch: calls.score_named(self._endpoints, deadline, batch))
            columns = calls.merge_named(by_item, len(items), named, weights)
            for column in columns.values():
                self._look_at_groups(items, column)
            return columns
        results: dict[int, Score | ItemFailure] = {}
        await each(results, lambda batch: calls.score(self._endpoints, deadline, batch))
        scores = calls.merge(results, len(items))
        self._look_at_groups(items, scores)
        return Scores(scores)

    @overload
    def score_stream(
        self,
        items: Iterable[StreamItem] | AsyncIterable[StreamItem],
        *,
        models: None = None,
        weights: None = None,
        timeout: float | None = None,
        traceparent: str | None = None,
    ) -> AsyncGenerator[StreamedScore, None]: ...
    @overload
    def score_stream(
        self,
        items: Iterable[StreamItem] | AsyncIterable[StreamItem],
        *,
        models: Sequence[str],
        weights: Mapping[str, float] | None = None,
        timeout: float | None = None,
        traceparent: str | None = None,
    ) -> AsyncGenerator[StreamedScores, None]: ...
    @overload
    def score_stream(
        self,
        items: Iterable[StreamItem] | AsyncIterable[StreamItem],
        *,
        models: None = None,
        weights: Mapping[str, float],
        timeout: float | None = None,
        traceparent: str | None = None,
    ) -> AsyncGenerator[StreamedScores, None]: ...
    async def score_stream(
        self,
        items: Iterable[StreamItem] | AsyncIterable[StreamItem],
        *,
        models: Sequence[str] | None = None,
        weights: Mapping[str, float] | None = None,
        timeout: float | None = None,
        traceparent: str | None = None,
    ) -> AsyncGenerator[Any, None]:
        """As SpatialScoreClient.score_stream; `items` may be an asynchronous iterable, and is read in the loop."""
        deadline = self._deadline(timeout)
        named = plan.names(models, weights)
        metadata = self._settings.metadata(traceparent)
        limits = (await self._run(calls.model(self._endpoints, deadline), metadata)).limits
        settings = self._settings
        pending = Pending(limits, settings.codec, deadline.timeout, settings.priority, named, weights)
        pump = _Pump(self, metadata, pending, _asynchronous(items, pending))
        async with aclosing(pump.run()) as results:
            async for result in results:
                yield result

    async def explain(
        self,
        prompt: str | None,
        image: Picture,
        *,
        http: str,
        references: Sequence[Picture] = (),
        questions: Questions | None = None,
        model: str | None = None,
        cells: int | None = None,
        timeout: float | None = None,
    ) -> Explanation:
        """As SpatialScoreClient.explain."""
        asking = Asking(
            self._settings,
            http,
            prompt,
            image,
            references=references,
            questions=questions,
            model=model,
            cells=cells,
            deadline=self._deadline(timeout),
        )
        return await in_thread(asking)

    async def model(self, *, timeout: float | None = None) -> ModelInfo:
        """As SpatialScoreClient.model."""
        steps = calls.model(self._endpoints, self._deadline(timeout), ask=True)
        return await self._run(steps, self._settings.metadata(None))

    async def close(self) -> None:
        """Closes this loop's connections, which ends what is under way on them."""
        loop = asyncio.get_running_loop()
        asking = [task for task in self._beside if task.get_loop() is loop]
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)
        with self._lock:
            self._closings += 1
            closing = [self._channels.pop(key) for key in list(self._channels) if key[0] is loop]
        for _, channel in closing:
            await channel.close()

    async def __aenter__(self) -> AsyncSpatialScoreClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def _channel(self, endpoint: Endpoint) -> grpc.aio.Channel:
        channel: grpc.aio.Channel | None
        loop = asyncio.get_running_loop()
        with self._lock:
            # A channel belongs to its loop: those of loops that are over go with them.
            for key in [key for key in self._channels if key[0].is_closed()]:
                del self._channels[key]
            number, channel = self._channels.get((loop, endpoint.target), (None, None))
            stale = None if number == endpoint.connections else channel
            if channel is None or stale is not None:
                target, options, tls = self._connection(endpoint)
                channel = (
                    grpc.aio.secure_channel(target, tls, options)
                    if tls
                    else grpc.aio.insecure_channel(target, options)
                )
                self._channels[loop, endpoint.target] = endpoint.connections, channel
        if stale is not None:
            self._start(stale.close())
        return channel

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        """Runs something that nobody waits for."""
        task = asyncio.ensure_future(work)
        # asyncio itself keeps no more than a weak reference.
        self._beside.add(task)
        task.add_done_callback(self._beside.discard)

    def _watch_of_loop(self) -> Watch:
        """The watch of this loop, which looks for silent servers while anything waits for one."""
        loop = asyncio.get_running_loop()
        with self._lock:
            for key in [key for key in self._watches if key.is_closed()]:
                del self._watches[key]
            watch = self._watches.get(loop)
            if watch is None:
                watch = self._watches[loop] = Watch(self._endpoints)
                loop.call_later(watch.interval, self._look, watch, loop)
        return watch

    def _look(self, watch: Watch, loop: asyncio.AbstractEventLoop) -> None:
        if not watch:
            with self._lock:
                self._watches.pop(loop, None)
            return
        patience = self._endpoints.patience()
        for endpoint in watch.look():
            self._start(self._ask(endpoint, patience, functools.partial(tell, watch, endpoint, patience)))
        loop.call_later(watch.interval, self._look, watch, loop)

    async def _ask(self, endpoint: Endpoint, timeout: float, told: Callable[[Failure | None], None]) -> None:
        """Asks an endpoint what it serves; `told` hears what came of it."""
        try:
            step = Send(endpoint, "GetModel", pb.GetModelRequest(), timeout)
            answer = await self._send(step, self._settings.metadata(None))
        except (ConfigurationError, asyncio.CancelledError) as error:
            told(Failure("CANCELLED", str(error)))
            raise
        told(answer if isinstance(answer, Failure) else None)

    async def _run(self, steps: Steps[T], metadata: Metadata) -> T:
        """Does what a call's logic asks for, until it is over."""
        answer: Any = None
        closings = self._closings
        try:
            while True:
                try:
                    step = steps.send(answer)
                except StopIteration as end:
                    result: T = end.value
                    return result
                answer = None
                self._check_open(closings)
                if isinstance(step, Send):
                    answer = await self._send(step, metadata)
                elif isinstance(step, Begin):
                    answer = _Flight(self, step, metadata)
                elif isinstance(step, Land):
                    answer = await _land(step.flights, step.seconds)
                elif isinstance(step, Ask):
                    self._start(self._ask(step.endpoint, step.timeout, step.told))
                else:
                    await asyncio.sleep(step.seconds)
        finally:
            steps.close()

    async def _send(self, step: Send | Begin, metadata: Metadata) -> Any:
        request, response = UNARY[step.method]
        method = self._channel(step.endpoint).unary_unary(
            f"{SERVICE}/{step.method}", request.SerializeToString, response.FromString
        )
        call = method(step.request, timeout=step.timeout, metadata=metadata)
        try:
            return await call
        except grpc.aio.AioRpcError as error:
            return failure_of(error)
        except grpc.aio.UsageError:
            # Its channel was closed for another call's sake.
            return Failure("UNAVAILABLE", _GIVEN_UP)
        except asyncio.CancelledError:
            # So it is told, too, if its channel was closed; else whoever waits here was cancelled.
            if call.cancelled() and not _is_cancelled():
                return Failure("UNAVAILABLE", _GIVEN_UP)
            raise


def _is_cancelled() -> bool:
    """Whether the task that runs was cancelled, and not something that it awaits. Nobody knows before Python 3.11."""
    cancelling = getattr(asyncio.current_task(), "cancelling", None)
    return cancelling is None or cancelling() > 0


class _Flight:
    """A request that is under way, for `calls`."""

    def __init__(self, client: AsyncSpatialScoreClient, step: Begin, metadata: Metadata) -> None:
        self.endpoint = step.endpoint
        self.answer: Any = None
        self.done: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._sent = asyncio.ensure_future(client._send(step, metadata))
        watch = client._watch_of_loop()
        place = watch.add(step.endpoint, lambda: True, self._land, step.timeout)

        def sent(task: asyncio.Task[Any]) -> None:
            watch.remove(place)
            if task.cancelled():
                self.done.cancel()
            elif error := task.exception():
                if not self.done.done():
                    self.done.set_exception(error)
            else:
                self._land(task.result())

        self._sent.add_done_callback(sent)

    def _land(self, answer: Any) -> None:
        if not self.done.done():
            self.done.set_result(answer)

    def cancel(self) -> None:
        self._sent.cancel()
        self.done.cancel()


async def _land(flights: list[_Flight], seconds: float | None) -> _Flight | None:
    await asyncio.wait([flight.done for flight in flights], timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    for flight in flights:
        if flight.done.done():
            flight.answer = flight.done.result()
            flight.cancel()
            return flight
    return None


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
            following = next(iterator, _END)
        if following is _END:
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
        self._silent_since = 0.0
        # The caller's next item, which may be long in coming: it outlives a connection.
        self._next: asyncio.Task[Any] | None = None

    async def run(self) -> AsyncGenerator[Streamed, None]:
        """The results. Opens a stream again after a failure that allows it."""
        attempts = Attempts(self._client._endpoints, self._pending)
        closings = self._client._closings
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
                self._client._check_open(closings)
                failure = failure or Failure("UNAVAILABLE", "the stream ended early")
                attempts.failed(endpoint, failure)
        finally:
            if self._next is not None:
                self._next.cancel()

    async def _connection(self, endpoint: Endpoint) -> AsyncGenerator[Streamed | Failure, None]:
        """The results of one connection; last, why it broke, if it did."""
        method = self._client._channel(endpoint).stream_stream(
            f"{SERVICE}/ScoreStream", pb.ScoreStreamRequest.SerializeToString, pb.ScoreStreamResponse.FromString
        )
        stream = method(metadata=self._metadata)
        reading: asyncio.Task[Any] | None = None
        silent: asyncio.Future[Failure] = asyncio.get_running_loop().create_future()
        watch = self._client._watch_of_loop()
        place = watch.add(
            endpoint,
            self._pending.waits,
            lambda failure: None if silent.done() else silent.set_result(failure),
            self._pending.timeout,
        )
        self._silent_since = self._pending.now()
        try:
            for message in self._pending.messages():
                await self._write(stream, message, endpoint, silent)
            if self._exhausted and not silent.done():
                await stream.done_writing()
            while not self._exhausted or self._pending:
                reading = reading or asyncio.ensure_future(stream.read())
                mute = await self._wait(reading, endpoint, silent)
                if mute is None:
                    await self._feed(stream, endpoint, silent)
                if silent.done():
                    mute = silent.result()
                if mute is not None:
                    yield mute
                    return
                if reading.done():
                    response, reading = reading.result(), None
                    if response is grpc.aio.EOF:
                        yield Failure("UNAVAILABLE", "the server ended the stream")
                        return
                    outcome = self._pending.accept(response, endpoint.address)
                    self._silent_since = self._pending.now()
                    place.since = time.monotonic()
                    yield outcome
                    if isinstance(outcome, Failure):
                        return
            # Lets the server see an end, and not a caller who left; whatever it says now changes no score.
            reading = asyncio.ensure_future(stream.read())
            await asyncio.wait([reading], timeout=1.0)
        except grpc.aio.AioRpcError as error:
            yield failure_of(error)
        except grpc.aio.UsageError:
            yield Failure("UNAVAILABLE", _GIVEN_UP)
        except asyncio.CancelledError:
            if not stream.cancelled() or _is_cancelled():
                raise
            yield Failure("UNAVAILABLE", _GIVEN_UP)
        finally:
            watch.remove(place)
            stream.cancel()
            if reading is not None:
                reading.cancel()
                # However it ends, it is looked at: else asyncio complains of an exception that nobody saw.
                reading.add_done_callback(lambda task: task.cancelled() or task.exception())

    async def _wait(
        self, reading: asyncio.Task[Any], endpoint: Endpoint, silent: asyncio.Future[Failure]
    ) -> Failure | None:
        """Waits for an answer, or for the caller's next item where there is room; or gives why to wait no more."""
        room = len(self._pending) < self._client._settings.stream_window
        if self._next is None and room and not self._exhausted:
            self._next = asyncio.ensure_future(anext(self._items, _END))
        awaited: set[asyncio.Future[Any]] = {reading, silent}
        if self._next is not None and room:
            awaited.add(self._next)
        timeout = max(0.0, min(self._pending.left(), self._share())) if self._pending else None
        done, _ = await asyncio.wait(awaited, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        if done:
            return None
        if self._pending.left() <= 0:
            raise self._pending.overdue(endpoint.address)
        if self._share() <= 0:
            if self._client._endpoints.spare(endpoint):
                return self._pending.mute()
            self._silent_since = self._pending.now()
        return None

    def _share(self) -> float:
        """Seconds that this connection still has to answer anything."""
        return self._silent_since + self._pending.share - self._pending.now()

    async def _feed(self, stream: Any, endpoint: Endpoint, silent: asyncio.Future[Failure]) -> None:
        """Sends the caller's next item, where it is there."""
        if self._next is None or not self._next.done():
            return
        item, self._next = self._next.result(), None
        if item is _END:
            self._exhausted = True
            await stream.done_writing()
        else:
            await self._write(stream, self._pending.add(item), endpoint, silent)

    async def _write(
        self, stream: Any, message: pb.ScoreStreamRequest, endpoint: Endpoint, silent: asyncio.Future[Failure]
    ) -> None:
        """Sends a message, once the server takes it; not where it turns out to be silent."""
        if silent.done():
            return
        writing = asyncio.ensure_future(stream.write(message))
        try:
            timeout = max(0.0, self._pending.left())
            await asyncio.wait({writing, silent}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            if writing.done():
                writing.result()
            elif not silent.done():
                raise self._pending.overdue(endpoint.address)
        except asyncio.InvalidStateError:
            # The stream is over: reading tells why.
            return
        finally:
            if not writing.done():
                writing.cancel()
