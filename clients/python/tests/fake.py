"""A server of the contract that does what a test sets: its scores tell which picture and prompt they are for."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc

from spatialscore_client._proto import error_details, status
from spatialscore_client._proto import spatialscore as pb

SERVICE = "spatialscore.v1.SpatialScoreService"
LIMITS = {
    "max_items_per_request": 256,
    "max_message_bytes": 64 << 20,
    "max_prompt_bytes": 8192,
    "max_image_pixels": 50_000_000,
    "max_item_tokens": 16384,
}
CODES = {code.name: code for code in grpc.StatusCode}


def picture(number: int, side: int = 4) -> bytes:
    """The pixels of a picture whose mean is its number, up to 65535."""
    return bytes([number >> 8, number & 255, 0]) * (side * side)


def mean_of(prompt: str, image: pb.Image) -> float:
    """The score of such a picture: its number, plus a thousandth for each letter of the prompt."""
    data = image.raw.rgb8 if image.WhichOneof("source") == "raw" else image.encoded
    return (data[0] << 8) + data[1] + len(prompt) / 1000


class Fake:
    """A server on a free port. `faults` are the answers of the next Score calls and of the next items of streams:
    a code and, where there is one, seconds to come back after; `spoil` changes what is answered otherwise."""

    def __init__(
        self,
        address: str = "127.0.0.1:0",
        *,
        credentials: grpc.ServerCredentials | None = None,
        token: str | None = None,
        revision: str = "r1",
        limits: dict[str, int] | None = None,
        stddev: float | None = 0.5,
        delay: float = 0.0,
    ) -> None:
        self.faults: list[tuple[str, float | None]] = []
        self.spoil: Callable[[Any], None] = lambda response: None
        self.bad_items: dict[int, str] = {}
        self.requests: list[pb.ScoreRequest] = []
        self.metadata: list[dict[str, str]] = []
        self.times: list[float] = []
        self.cancelled = threading.Event()
        self.most_at_once = 0
        self.delay = delay
        self.revision = revision
        # What each model makes of a mean. Without any, names are not known, as to a server of one model of old.
        self.models: dict[str, Callable[[float], float]] = {}
        # The components that a model's scores have; each lies as far above the mean as its name is long.
        self.components: dict[str, tuple[str, ...]] = {}
        self._token = token
        self._limits = {**LIMITS, **(limits or {})}
        self._stddev = stddev
        self._at_once = 0
        self._lock = threading.Lock()
        self._server = grpc.server(ThreadPoolExecutor(32), options=[("grpc.max_receive_message_length", 64 << 20)])
        self._server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(SERVICE, self._handlers())])
        bind = self._server.add_secure_port if credentials else self._server.add_insecure_port
        self.port = bind(address, credentials) if credentials else bind(address)
        self.address = f"127.0.0.1:{self.port}"
        self._server.start()

    def stop(self) -> None:
        self._server.stop(None).wait()

    def __enter__(self) -> Fake:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _handlers(self) -> dict[str, Any]:
        return {
            "GetModel": grpc.unary_unary_rpc_method_handler(
                self._get_model, pb.GetModelRequest.FromString, pb.GetModelResponse.SerializeToString
            ),
            "Score": grpc.unary_unary_rpc_method_handler(
                self._score, pb.ScoreRequest.FromString, pb.ScoreResponse.SerializeToString
            ),
            "ScoreStream": grpc.stream_stream_rpc_method_handler(
                self._score_stream, pb.ScoreStreamRequest.FromString, pb.ScoreStreamResponse.SerializeToString
            ),
        }

    def _work(self, context: Any) -> None:
        """Takes its time, unless the caller leaves."""
        end = time.monotonic() + self.delay
        while time.monotonic() < end:
            if not context.is_active():
                self.cancelled.set()
                return
            time.sleep(0.01)

    def _admit(self, context: Any) -> None:
        metadata = dict(context.invocation_metadata())
        self.metadata.append(metadata)
        if self._token is not None and metadata.get("authorization") != f"Bearer {self._token}":
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "this server wants a bearer token")

    def _get_model(self, request: pb.GetModelRequest, context: Any) -> pb.GetModelResponse:
        self._admit(context)
        output = pb.REWARD_OUTPUT_SCALAR if self._stddev is None else pb.REWARD_OUTPUT_GAUSSIAN
        limits = pb.Limits(**self._limits)
        return pb.GetModelResponse(
            name="fake", revision=self.revision, dtype="none", devices=["cpu"], output=output, limits=limits
        )

    def _result(self, prompt: str, image: pb.Image, error: tuple[str, float | None] | None) -> pb.ScoreResult:
        if error is not None:
            return pb.ScoreResult(error=detailed(*error))
        return pb.ScoreResult(score=pb.Score(mean=mean_of(prompt, image), stddev=self._stddev))

    def _score(self, request: pb.ScoreRequest, context: Any) -> pb.ScoreResponse:
        self._admit(context)
        with self._lock:
            self.requests.append(request)
            self.times.append(time.monotonic())
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
            fault = self.faults.pop(0) if self.faults else None
        try:
            if fault is not None:
                abort(context, *fault)
            self._work(context)
        finally:
            with self._lock:
                self._at_once -= 1
        results = []
        for item in request.items:
            prompt = item.prompt if item.HasField("prompt") else request.prompt
            code = self.bad_items.get(int(mean_of("", item.image)))
            results.append(self._result(prompt, item.image, (code, None) if code else None))
        response = pb.ScoreResponse(results=results)
        if self.models and request.models:
            self._name(request, response.results, response)
        self.spoil(response)
        return response

    def _name(self, request: Any, results: Any, response: Any) -> None:
        """Answers for each of the models that the request names."""
        for result in results:
            base = pb.ScoreResult.FromString(result.SerializeToString())
            made = []
            for name in request.models:
                outcome = pb.ModelOutcome(model=name)
                if base.HasField("error"):
                    outcome.error.CopyFrom(base.error)
                else:
                    outcome.score.mean = self.models[name](base.score.mean)
                    for part in self.components.get(name, ()):
                        outcome.score.components.add(name=part, mean=outcome.score.mean + len(part))
                made.append(outcome)
            result.Clear()
            if len(made) > 1:
                result.outcomes.extend(made)
            elif made[0].HasField("error"):
                result.error.CopyFrom(made[0].error)
            else:
                result.score.CopyFrom(made[0].score)
        if request.wants_receipts:
            for name in request.models:
                response.receipts.add(model=name, revision=self.revision, dtype="none")

    def _score_stream(self, requests: Iterator[pb.ScoreStreamRequest], context: Any) -> Iterator[Any]:
        self._admit(context)
        held: list[pb.ScoreStreamResponse] = []
        for request in requests:
            self.times.append(time.monotonic())
            fault = self.faults.pop(0) if self.faults else None
            if fault is not None and fault[0].startswith("BREAK"):
                context.abort(CODES[fault[0].partition(" ")[2] or "UNAVAILABLE"], "the stream broke")
            self._work(context)
            code = self.bad_items.get(int(mean_of("", request.item.image)))
            error = fault or ((code, None) if code else None)
            response = pb.ScoreStreamResponse(
                id=request.id, result=self._result(request.item.prompt, request.item.image, error)
            )
            # What fails before any model has it fails as a whole.
            if self.models and request.models and fault is None:
                self._name(request, [response.result], response)
            self.spoil(response)
            held.append(response)
            # Answers in pairs, the later first: order is the caller's to restore.
            if len(held) == 2:
                yield from reversed(held)
                held.clear()
        yield from held


def detailed(code: str, retry_after: float | None) -> status.Status:
    """A status as the server writes it."""
    found = status.Status(code=CODES[code].value[0], message=f"items[0].image: {code.lower()} on purpose")
    if retry_after is not None:
        info = error_details.RetryInfo()
        info.retry_delay.nanos = int(retry_after * 1e9)
        found.details.add(type_url="type.googleapis.com/google.rpc.RetryInfo", value=info.SerializeToString())
    return found


def abort(context: Any, code: str, retry_after: float | None) -> None:
    """Ends a call with a status and its details."""
    found = detailed(code, retry_after)
    context.set_trailing_metadata((("grpc-status-details-bin", found.SerializeToString()),))
    context.abort(CODES[code], found.message)
