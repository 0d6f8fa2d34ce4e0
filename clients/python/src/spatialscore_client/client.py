"""The client with threads."""

from __future__ import annotations

import functools
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar, cast, overload

import grpc

from . import answers, calls, plan
from ._proto import spatialscore as pb
from .answers import Failure
from .base import SERVICE, UNARY, BaseClient
from .calls import Ask, Attempts, Begin, Land, Send, Steps
from .endpoints import Endpoint, Watch, tell
from .errors import ConfigurationError, ItemFailure, SpatialScoreError
from .explain import Asking, Explanation
from .images import Picture, Pictures
from .plan import Batch, Questions
from .scores import Columns, ModelInfo, Score, Scores, StreamedScore, StreamedScores
from .stream import Pending, Streamed, StreamItem

T = TypeVar("T")
# What an iterator that is at its end gives; a caller's own None is an item, and refused.
_END: Any = object()


class SpatialScoreClient(BaseClient):
    """Scores pictures on a SpatialScore server.

    Thread-safe, usable in forked and spawned processes. Whatever goes wrong raises a SpatialScoreError: no call ever
    gives a placeholder, or fewer scores than it had pictures.
    """

    @overload
    def score(
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
    def score(
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
    def score(
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
    def score(
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
        """The scores of pictures, in order. One prompt stands for all of them, or there is one for each.

        `references` are for models that compare: for each picture those that the model reads before it, such as the
        picture before the edit. `questions` are for models that read the probability of answers: the same for all
        pictures, or a list for each; `prompts` may be None then, and each question is a component of the score.

        `models` names models of a server that has several: their scores come in Columns, by name, the pictures sent
        and decoded once. With `weights` by name their weighted sums come beside them, in `Columns.sums`; without
        `models` the models are those that have weights.

        `timeout` is for the whole call, in seconds, and stands in place of the client's own.

        Raises ItemsFailedError where some pictures can have no score, another SpatialScoreError where the call
        failed, and TypeError or ValueError where prompts and images do not fit each other.
        """
        deadline = self._deadline(timeout)
        named = plan.names(models, weights)
        items = plan.items(prompts, images, references, questions)
        if not items:
            return Scores([]) if named is None else calls.merge_named({}, 0, named, weights)
        with _Call(self, traceparent) as call:
            limits = call.run(calls.model(self._endpoints, deadline)).limits
            batches = plan.batches(items, limits, self._settings.codec, self._settings.priority, named)
            most = self._settings.max_in_flight

            if named is not None:

                def score_named(batch: Batch) -> list[calls.Named]:
                    return call.run(calls.score_named(self._endpoints, deadline, batch))

                columns = calls.merge_named(
                    _overlapped(score_named, batches, most, call.cancel), len(items), named, weights
                )
                for column in columns.values():
                    self._look_at_groups(items, column)
                return columns

            def score(batch: Batch) -> list[Score | ItemFailure]:
                return call.run(calls.score(self._endpoints, deadline, batch))

            results = _overlapped(score, batches, most, call.cancel)
        scores = calls.merge(results, len(items))
        self._look_at_groups(items, scores)
        return Scores(scores)

    @overload
    def score_stream(
        self,
        items: Iterable[StreamItem],
        *,
        models: None = None,
        weights: None = None,
        timeout: float | None = None,
        traceparent: str | None = None,
    ) -> Iterator[StreamedScore]: ...
    @overload
    def score_stream(
        self,
        items: Iterable[StreamItem],
        *,
        models: Sequence[str],
        weights: Mapping[str, float] | None = None,
        timeout: float | None = None,
        traceparent: str | None = None,
    ) -> Iterator[StreamedScores]: ...
    @overload
    def score_stream(
        self,
        items: Iterable[StreamItem],
        *,
        models: None = None,
        weights: Mapping[str, float],
        timeout: float | None = None,
        traceparent: str | None = None,
    ) -> Iterator[StreamedScores]: ...
    def score_stream(
        self,
        items: Iterable[StreamItem],
        *,
        models: Sequence[str] | None = None,
        weights: Mapping[str, float] | None = None,
        timeout: float | None = None,
        traceparent: str | None = None,
    ) -> Iterator[Any]:
        """Scores (prompt, picture) pairs while they are made, and yields results as they are done, in any order.

        With `models` or `weights`, as of `score`, each result is a StreamedScores: all models' scores of an item.

        `items` is read in the caller's own thread, between results, so that it may run a generator on a GPU. Not more
        than `stream_window` of its items are under way at once. `timeout` is what each item may take. What breaks is
        sent again where that is safe. Raises what `score` raises.
        """
        deadline = self._deadline(timeout)
        named = plan.names(models, weights)
        with _Call(self, traceparent) as call:
            limits = call.run(calls.model(self._endpoints, deadline)).limits
            settings = self._settings
            pending = Pending(limits, settings.codec, deadline.timeout, settings.priority, named, weights)
            yield from _Pump(self, call, pending, iter(items)).run()

    def explain(
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
        """Why a picture has the score that it has under a prompt: what left-out clauses, turned relations and covered
        cells cost.

        Over HTTP, where alone a server explains: `http` is the URL of its HTTP port, as in `http://scorer:8080`
        (`serve --http`). Token and TLS are those of this client, unless the URL has a subject and its token. The map
        has at most `cells` cells; None leaves that to the server, 0 is for none.

        Every part is a score, behind training. It is asked once: what fails is not tried again. Raises what `score`
        raises.
        """
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
        return asking.answer()

    def model(self, *, timeout: float | None = None) -> ModelInfo:
        """What is served, asked now; its limits hold for all servers of this client that were asked so far."""
        with _Call(self, None) as call:
            return call.run(calls.model(self._endpoints, self._deadline(timeout), ask=True))

    def close(self) -> None:
        """Closes the connections, which ends what is under way. The client may be used again, and connects anew."""
        with self._lock:
            self._closings += 1
            channels, self._channels = self._channels, {}
        for _, channel in channels.values():
            channel.close()

    def __enter__(self) -> SpatialScoreClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _channel(self, endpoint: Endpoint) -> grpc.Channel:
        channel: grpc.Channel | None
        with self._lock:
            number, channel = self._channels.get(endpoint.target, (None, None))
            stale = None if number == endpoint.connections else channel
            if channel is None or stale is not None:
                target, options, tls = self._connection(endpoint)
                channel = grpc.secure_channel(target, tls, options) if tls else grpc.insecure_channel(target, options)
                self._channels[endpoint.target] = endpoint.connections, channel
        if stale is not None:
            stale.close()
        return channel

    def _ask(self, endpoint: Endpoint, timeout: float, told: Callable[[Failure | None], None]) -> None:
        """Asks an endpoint what it serves; `told` hears what came of it, in a thread of gRPC's."""
        request, response = UNARY["GetModel"]

        def done(future: Any) -> None:
            if future.cancelled():
                told(Failure("CANCELLED", "its connection was closed"))
            else:
                error = future.exception()
                told(None if error is None else failure_of(error))

        try:
            metadata = self._settings.metadata(None)
        except ConfigurationError as error:
            told(Failure("UNAUTHENTICATED", str(error)))
            return

        def begin(channel: grpc.Channel) -> Any:
            method = channel.unary_unary(f"{SERVICE}/GetModel", request.SerializeToString, response.FromString)
            return method.future(request(), timeout=timeout, metadata=metadata)

        self._on_channel(endpoint, begin).add_done_callback(done)

    def _on_channel(self, endpoint: Endpoint, begin: Callable[[grpc.Channel], T]) -> T:
        """Begins a call on an endpoint's channel; on the next one where another thread closes that at this moment."""
        for _ in range(3):
            try:
                return begin(self._channel(endpoint))
            except ValueError as error:
                if "closed channel" not in str(error):
                    raise
        return begin(self._channel(endpoint))

    def _keep_watch(self) -> None:
        """Looks for silent servers while anything waits for one."""
        with self._lock:
            if self._watching:
                return
            self._watching = True
        threading.Thread(target=_watch, args=(self, self._watch), name="spatialscore-watch", daemon=True).start()


def _watch(client: SpatialScoreClient, watch: Watch) -> None:
    while True:
        time.sleep(watch.interval)
        with client._lock:
            if not watch:
                client._watching = False
                return
        patience = client._endpoints.patience()
        for endpoint in watch.look():
            client._ask(endpoint, patience, functools.partial(tell, watch, endpoint, patience))


class _Flight:
    """A request that is under way, for `calls`."""

    def __init__(self, endpoint: Endpoint, future: Any) -> None:
        self.endpoint = endpoint
        self.answer: Any = None
        self.future = future

    def cancel(self) -> None:
        self.future.cancel()


class _Call:
    """One call of the caller's: what it has under way, and its end, which cancels that."""

    def __init__(self, client: SpatialScoreClient, traceparent: str | None) -> None:
        self._client = client
        self._closings = client._closings
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

    def check_open(self) -> None:
        """Raises SpatialScoreError where the client was closed meanwhile."""
        self._client._check_open(self._closings)

    def run(self, steps: Steps[T]) -> T:
        """Does what a call's logic asks for, until it is over."""
        landed: queue.SimpleQueue[tuple[_Flight, Any]] = queue.SimpleQueue()
        answer: Any = None
        try:
            while True:
                try:
                    step = steps.send(answer)
                except StopIteration as end:
                    result: T = end.value
                    return result
                answer = None
                self.check_open()
                if isinstance(step, Send):
                    flight = self._begin(step, landed, watched=False)
                    answer = (self._land([flight], None, landed) or flight).answer
                elif isinstance(step, Begin):
                    answer = self._begin(step, landed, watched=True)
                elif isinstance(step, Land):
                    answer = self._land(step.flights, step.seconds, landed)
                elif isinstance(step, Ask):
                    self._client._ask(step.endpoint, step.timeout, step.told)
                elif self._cancelled.wait(step.seconds):
                    raise SpatialScoreError("the call was cancelled")
        finally:
            steps.close()

    def _begin(self, step: Send | Begin, landed: queue.SimpleQueue[Any], *, watched: bool) -> _Flight:
        request, response = UNARY[step.method]

        def begin(channel: grpc.Channel) -> Any:
            method = channel.unary_unary(f"{SERVICE}/{step.method}", request.SerializeToString, response.FromString)
            return method.future(step.request, timeout=step.timeout, metadata=self.metadata)

        future = self._client._on_channel(step.endpoint, begin)
        flight = _Flight(step.endpoint, future)
        self.watch(future)
        watch = self._client._watch
        place = (
            watch.add(step.endpoint, lambda: True, lambda failure: landed.put((flight, failure)), step.timeout)
            if watched
            else None
        )

        def done(_: Any) -> None:
            if place is not None:
                watch.remove(place)
            with self._lock:
                self._under_way.discard(future)
            landed.put((flight, None))

        future.add_done_callback(done)
        if watched:
            self._client._keep_watch()
        return flight

    def _land(self, flights: list[_Flight], seconds: float | None, landed: queue.SimpleQueue[Any]) -> _Flight | None:
        end = None if seconds is None else time.monotonic() + seconds
        while True:
            try:
                flight, failure = landed.get(timeout=None if end is None else max(0.0, end - time.monotonic()))
            except queue.Empty:
                return None
            # Others have been answered for already.
            if flight in flights:
                flight.answer = failure or self._answer(flight.future)
                flight.cancel()
                return cast(_Flight, flight)

    def _answer(self, future: Any) -> Any:
        try:
            return future.result()
        except grpc.RpcError as error:
            return failure_of(error)
        except grpc.FutureCancelledError as error:
            if self._cancelled.is_set():
                raise SpatialScoreError("the call was cancelled") from error
            return Failure("UNAVAILABLE", "its connection was given up")

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
    score: Callable[[Batch], list[T]],
    batches: Iterator[Batch],
    most: int,
    cancel: Callable[[], None],
) -> dict[int, T]:
    """The results of all batches by the items' places, with at most so many of them under way at once."""
    results: dict[int, T] = {}
    first = next(batches)
    second = next(batches, None)
    if second is None:
        return dict(enumerate(score(first)))
    running: dict[Future[list[T]], int] = {}
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
        self._silent_since = 0.0

    def run(self) -> Iterator[Streamed]:
        """The results. Opens a stream again after a failure that allows it."""
        attempts = Attempts(self._client._endpoints, self._pending)
        while True:
            endpoint = self._call.run(attempts.next())
            failure = yield from self._connection(endpoint, attempts)
            if failure is None:
                return
            self._call.check_open()
            attempts.failed(endpoint, failure)

    def _connection(self, endpoint: Endpoint, attempts: Attempts) -> Generator[Streamed, None, Failure | None]:
        """The results of one connection, and at its end why it broke, if it did."""
        outbox: queue.SimpleQueue[pb.ScoreStreamRequest | None] = queue.SimpleQueue()
        inbox: queue.SimpleQueue[pb.ScoreStreamResponse | Failure] = queue.SimpleQueue()

        def begin(channel: grpc.Channel) -> Any:
            method = channel.stream_stream(
                f"{SERVICE}/ScoreStream", pb.ScoreStreamRequest.SerializeToString, pb.ScoreStreamResponse.FromString
            )
            return method(iter(outbox.get, None), metadata=self._call.metadata)

        stream = self._client._on_channel(endpoint, begin)
        self._call.watch(stream)
        reader = threading.Thread(target=_read, args=(stream, inbox), name="spatialscore", daemon=True)
        reader.start()
        place = self._client._watch.add(endpoint, self._pending.waits, inbox.put, self._pending.timeout)
        self._client._keep_watch()
        self._silent_since = self._pending.now()
        for message in self._pending.messages():
            outbox.put(message)
        if self._exhausted:
            outbox.put(None)
        try:
            while self._feed(outbox) or self._pending:
                for response in self._answers(inbox, endpoint):
                    if isinstance(response, Failure):
                        # How the stream ends behind its last answer is nobody's fault.
                        return None if self._exhausted and not self._pending else response
                    outcome = self._pending.accept(response, endpoint.address)
                    if isinstance(outcome, Failure):
                        return outcome
                    attempts.answered(endpoint)
                    self._silent_since = self._pending.now()
                    place.since = time.monotonic()
                    yield outcome
        finally:
            self._client._watch.remove(place)
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
            item = next(self._items, _END)
        if item is _END:
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
                yield inbox.get(timeout=max(0.0, min(self._pending.left(), self._share())))
            except queue.Empty:
                if self._pending.left() > 0 and self._share() <= 0:
                    if self._client._endpoints.spare(endpoint):
                        yield self._pending.mute()
                        return
                    self._silent_since = self._pending.now()
                elif self._pending.left() <= 0:
                    raise self._pending.overdue(endpoint.address) from None
        while not inbox.empty():
            yield inbox.get()

    def _share(self) -> float:
        """Seconds that this connection still has to answer anything."""
        return self._silent_since + self._pending.share - self._pending.now()


def _read(stream: Any, inbox: queue.SimpleQueue[Any]) -> None:
    """Moves a stream's answers to where they can be waited for with a timeout."""
    try:
        for response in stream:
            inbox.put(response)
        inbox.put(Failure("UNAVAILABLE", "the server ended the stream"))
    except grpc.RpcError as error:
        inbox.put(failure_of(error))
