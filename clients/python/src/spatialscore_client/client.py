"""The client with threads."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

import grpc

from . import answers, calls, plan
from ._proto import spatialscore as pb
from .answers import Failure
from .base import SERVICE, UNARY, BaseClient
from .calls import Attempts, Send, Steps
from .endpoints import Endpoint
from .errors import ItemFailure, SpatialScoreError
from .images import Pictures
from .plan import Batch
from .scores import ModelInfo, Score, Scores, StreamedScore
from .stream import Pending, StreamItem

T = TypeVar("T")


class SpatialScoreClient(BaseClient):
    """Scores pictures on a SpatialScore server.

    Thread-safe, usable in forked and spawned processes. Whatever goes wrong raises a SpatialScoreError: no call ever
    gives a placeholder, or fewer scores than it had pictures.
    """

    def score(
        self,
        prompts: str | Sequence[str],
        images: Pictures,
        *,
        timeout: float | None = None,
        traceparent: str | None = None,
    ) -> Scores:
        """The scores of pictures, in order. One prompt stands for all of them, or there is one for each.

        `timeout` is for the whole call, in seconds, and stands in place of the client's own.

        Raises ItemsFailedError where some pictures can have no score, another SpatialScoreError where the call
        failed, and TypeError or ValueError where prompts and images do not fit each other.
        """
        deadline = self._deadline(timeout)
        items = plan.items(prompts, images)
        if not items:
            return Scores([])
        with _Call(self, traceparent) as call:
            limits = call.run(calls.model(self._endpoints, deadline)).limits
            batches = plan.batches(items, limits, self._settings.codec, self._settings.priority)

            def score(batch: Batch) -> list[Score | ItemFailure]:
                return call.run(calls.score(self._endpoints, deadline, batch))

            results = _overlapped(score, batches, self._settings.max_in_flight, call.cancel)
        return Scores(calls.merge(results, len(items)))

    def score_stream(
        self, items: Iterable[StreamItem], *, timeout: float | None = None, traceparent: str | None = None
    ) -> Iterator[StreamedScore]:
        """Scores (prompt, picture) pairs while they are made, and yields results as they are done, in any order.

        `items` is read in the caller's own thread, between results, so that it may run a generator on a GPU. Not more
        than `stream_window` of its items are under way at once. `timeout` is what each item may take. What breaks is
        sent again where that is safe. Raises what `score` raises.
        """
        deadline = self._deadline(timeout)
        with _Call(self, traceparent) as call:
            limits = call.run(calls.model(self._endpoints, deadline)).limits
            pending = Pending(limits, self._settings.codec, deadline.timeout, self._settings.priority)
            yield from _Pump(self, call, pending, iter(items)).run()

    def model(self, *, timeout: float | None = None) -> ModelInfo:
        """What is served, asked now; its limits hold for all servers of this client that were asked so far."""
        with _Call(self, None) as call:
            return call.run(calls.model(self._endpoints, self._deadline(timeout), ask=True))

    def close(self) -> None:
        """Closes the connections. The client may be used again, and connects anew."""
        with self._lock:
            channels, self._channels = self._channels, {}
        for channel in channels.values():
            channel.close()

    def __enter__(self) -> SpatialScoreClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _channel(self, endpoint: Endpoint) -> grpc.Channel:
        with self._lock:
            channel = self._channels.get(endpoint.address)
            if channel is None:
                options, tls = self._settings.options(), self._settings.tls
                channel = (
                    grpc.secure_channel(endpoint.address, tls.credentials(), options)
                    if tls
                    else grpc.insecure_channel(endpoint.address, options)
                )
                self._channels[endpoint.address] = channel
            return channel


class _Call:
    """One call of the caller's: what it has under way, and its end, which cancels that."""

    def __init__(self, client: SpatialScoreClient, traceparent: str | None) -> None:
        self._client = client
        # Read in the caller's own thread: that is where its trace is current.
        self.metadata = client._settings.metadata(traceparent)
        self._cancelled = threading.Event()
        self._lock = threading.Lock()
        self._under_way: set[grpc.Future[Any]] = set()

    def __enter__(self) -> _Call:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()

    def cancel(self) -> None:
        """Ends whatever is under way."""
        self._cancelled.set()
        with self._lock:
            under_way, self._under_way = self._under_way, set()
        for future in under_way:
            future.cancel()

    def run(self, steps: Steps[T]) -> T:
        """Does what a call's logic asks for, until it is over."""
        answer: Any = None
        while True:
            try:
                step = steps.send(answer)
            except StopIteration as end:
                result: T = end.value
                return result
            if isinstance(step, Send):
                answer = self._send(step)
            else:
                answer = None
                if self._cancelled.wait(step.seconds):
                    raise SpatialScoreError("the call was cancelled")

    def _send(self, step: Send) -> Any:
        request, response = UNARY[step.method]
        method = self._client._channel(step.endpoint).unary_unary(
            f"{SERVICE}/{step.method}", request.SerializeToString, response.FromString
        )
        future = method.future(step.request, timeout=step.timeout, metadata=self.metadata)
        self.watch(future)
        try:
            return future.result()
        except grpc.RpcError as error:
            return failure_of(error)
        except grpc.FutureCancelledError as error:
            raise SpatialScoreError("the call was cancelled") from error
        finally:
            with self._lock:
                self._under_way.discard(future)

    def watch(self, future: Any) -> None:
        """Has something cancelled when the call ends."""
        with self._lock:
            self._under_way.add(future)
        if self._cancelled.is_set():
            future.cancel()


def failure_of(error: Any) -> Failure:
    """A failure as gRPC raises it."""
    return answers.failure(error.code().name, error.details(), error.trailing_metadata())


def _overlapped(
    score: Callable[[Batch], list[Score | ItemFailure]],
    batches: Iterator[Batch],
    most: int,
    cancel: Callable[[], None],
) -> dict[int, Score | ItemFailure]:
    """The results of all batches by the items' places, with at most so many of them under way at once."""
    results: dict[int, Score | ItemFailure] = {}
    first = next(batches)
    second = next(batches, None)
    if second is None:
        return dict(enumerate(score(first)))
    running: dict[Future[list[Score | ItemFailure]], int] = {}
    with ThreadPoolExecutor(most, "spatialscore") as pool:
        try:
            ahead: list[Batch] = [first, second]
            while True:
                while len(running) < most and (batch := ahead.pop(0) if ahead else next(batches, None)):
                    running[pool.submit(score, batch)] = batch.start
                if not running:
                    return results
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    results.update(enumerate(future.result(), running.pop(future)))
        except BaseException:
            cancel()
            raise


class _Pump:
    """A stream from the caller's iterable to the server and back, over as many connections as it takes."""

    def __init__(
        self, client: SpatialScoreClient, call: _Call, pending: Pending, items: Iterator[StreamItem]
    ) -> None:
        self._client = client
        self._call = call
        self._pending = pending
        self._items = items
        self._exhausted = False

    def run(self) -> Iterator[StreamedScore]:
        """The results. Opens a stream again after a failure that allows it."""
        attempts = Attempts(self._client._endpoints, self._pending)
        while True:
            endpoint = self._call.run(attempts.next())
            failure = yield from self._connection(endpoint, attempts)
            if failure is None:
                return
            attempts.failed(endpoint, failure)

    def _connection(self, endpoint: Endpoint, attempts: Attempts) -> Generator[StreamedScore, None, Failure | None]:
        """The results of one connection, and at its end why it broke, if it did."""
        outbox: queue.SimpleQueue[pb.ScoreStreamRequest | None] = queue.SimpleQueue()
        inbox: queue.SimpleQueue[pb.ScoreStreamResponse | Failure] = queue.SimpleQueue()
        method = self._client._channel(endpoint).stream_stream(
            f"{SERVICE}/ScoreStream", pb.ScoreStreamRequest.SerializeToString, pb.ScoreStreamResponse.FromString
        )
        stream = method(iter(outbox.get, None), metadata=self._call.metadata)
        self._call.watch(stream)
        reader = threading.Thread(target=_read, args=(stream, inbox), name="spatialscore", daemon=True)
        reader.start()
        for message in self._pending.messages():
            outbox.put(message)
        if self._exhausted:
            outbox.put(None)
        try:
            while self._feed(outbox) or self._pending:
                for response in self._answers(inbox, endpoint):
                    if isinstance(response, Failure):
                        return response
                    outcome = self._pending.accept(response, endpoint.address)
                    if isinstance(outcome, Failure):
                        return outcome
                    attempts.answered(endpoint)
                    yield outcome
        finally:
            outbox.put(None)
            if self._pending:
                stream.cancel()
            reader.join(1.0)
        return None

    def _feed(self, outbox: queue.SimpleQueue[pb.ScoreStreamRequest | None]) -> bool:
        """Sends the caller's next item, where there is one and room for it."""
        if self._exhausted or len(self._pending) >= self._client._settings.stream_window:
            return False
        with self._pending.paused():
            item = next(self._items, None)
        if item is None:
            self._exhausted = True
            outbox.put(None)
            return False
        outbox.put(self._pending.add(item))
        return True

    def _answers(
        self, inbox: queue.SimpleQueue[pb.ScoreStreamResponse | Failure], endpoint: Endpoint
    ) -> Iterator[pb.ScoreStreamResponse | Failure]:
        """The answers that have come. Waits for one where nothing more can be sent before."""
        if self._exhausted or len(self._pending) >= self._client._settings.stream_window:
            try:
                yield inbox.get(timeout=max(0.0, self._pending.left()))
            except queue.Empty:
                raise self._pending.overdue(endpoint.address) from None
        while not inbox.empty():
            yield inbox.get()


def _read(stream: Any, inbox: queue.SimpleQueue[Any]) -> None:
    """Moves a stream's answers to where they can be waited for with a timeout."""
    try:
        for response in stream:
            inbox.put(response)
        inbox.put(Failure("UNAVAILABLE", "the server ended the stream"))
    except grpc.RpcError as error:
        inbox.put(failure_of(error))
