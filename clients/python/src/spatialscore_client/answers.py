"""What a server answered: messages to scores, statuses to failures. Nothing that is not a score passes as one."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import grpc

from ._proto import error_details, status
from ._proto import spatialscore as pb
from .errors import ItemFailure, ServerFaultError
from .scores import Component, Limits, ModelInfo, Receipt, Score

# The states of a model by number.
STATES = {
    pb.MODEL_STATE_SERVING: "serving",
    pb.MODEL_STATE_ASLEEP: "asleep",
    pb.MODEL_STATE_WAKING: "waking",
    pb.MODEL_STATE_FAILED: "failed",
}
# The gRPC codes by number.
CODES = {code.value[0]: code.name for code in grpc.StatusCode}


@dataclass(frozen=True)
class Failure:
    """A status that is not OK."""

    code: str
    """The gRPC code."""
    message: str
    """What was said."""
    retry_after: float | None = None
    """Seconds to wait, where the server said so."""
    silent: bool = False
    """Whether the server said nothing at all."""
    explained: bool = True
    """Whether it has the details that the server gives each of its own."""

    @property
    def retryable(self) -> bool:
        """Whether the same call may be sent again: nobody took it, or the server said when to come back."""
        return self.code == "UNAVAILABLE" or (self.code == "RESOURCE_EXHAUSTED" and self.retry_after is not None)

    @property
    def vague(self) -> bool:
        """Whether it is what a proxy, or gRPC itself, made of a connection that broke. Scoring twice does no harm, so
        the call may be sent again; a few times, for it may be a proxy's refusal too."""
        return self.code in ("CANCELLED", "INTERNAL", "UNKNOWN") and not self.explained


def silence(seconds: float) -> Failure:
    """The failure of a server that said nothing for so long."""
    return Failure("UNAVAILABLE", f"no answer within {seconds:g} s, not even to what it serves", silent=True)


def failure(code: str, message: str | None, metadata: Iterable[tuple[str, str | bytes]] | None) -> Failure:
    """The failure of a call, from its code, its message and its trailing metadata."""
    details = next((value for key, value in metadata or () if key == "grpc-status-details-bin"), b"")
    parsed = status.Status()
    try:
        parsed.MergeFromString(details if isinstance(details, bytes) else b"")
    except Exception:  # DecodeError; whatever a proxy wrote there, the code and the message still hold.
        parsed.Clear()
    return Failure(code, message or "", _retry_after(parsed), explained=bool(details))


def item_failure(index: int, error: status.Status) -> ItemFailure:
    """The failure of one item."""
    # The server counts within its request; here it is the call's item that is named.
    return ItemFailure(index, _code(error), re.sub(r"^items?(\[\d+\])?\.", "", error.message))


def of_item(error: status.Status) -> Failure:
    """The failure that an item of a stream reports on behalf of its call."""
    return Failure(_code(error), error.message, _retry_after(error))


def _code(error: status.Status) -> str:
    return CODES.get(error.code, "UNKNOWN")


def _retry_after(error: status.Status) -> float | None:
    for detail in error.details:
        if detail.type_url.endswith("/google.rpc.RetryInfo"):
            delay = error_details.RetryInfo.FromString(detail.value).retry_delay
            return max(0.0, delay.seconds + delay.nanos / 1e9)
    return None


def results(response: pb.ScoreResponse, start: int, count: int, target: str) -> list[Score | ItemFailure]:
    """The results of a request of `count` items, the first of which is the call's item `start`.

    Raises ServerFaultError where there are not as many as items, or one is not what the contract allows.
    """
    _check_count(response, count, target)
    return [result(answer, start + place, target) for place, answer in enumerate(response.results)]


def _check_count(response: pb.ScoreResponse, count: int, target: str) -> None:
    if len(response.results) != count:
        text = f"the server answered {count} items with {len(response.results)} results"
        raise ServerFaultError("INTERNAL", text, target=target)


def columns(
    response: pb.ScoreResponse, start: int, count: int, models: Sequence[str], target: str
) -> tuple[list[tuple[Score | ItemFailure, ...]], tuple[Receipt, ...]]:
    """The results of a request that named models: for each item one of each model; and what judged it.

    Raises ServerFaultError where they are not those of these models, as from a server that knows nothing of names.
    """
    receipts = judges(response.receipts, models, target)
    _check_count(response, count, target)
    return [named(answer, index, models, target) for index, answer in enumerate(response.results, start)], receipts


def judges(receipts: Iterable[pb.Receipt], models: Sequence[str], target: str) -> tuple[Receipt, ...]:
    """What judged. Raises ServerFaultError where it is not who was asked."""
    found = tuple(
        Receipt(each.model, each.revision, each.profile_digest, each.dtype, each.server_version) for each in receipts
    )
    judged = [receipt.model for receipt in found]
    if judged != list(models):
        by = ", ".join(judged) or "it does not say whom: is it older than this client?"
        text = f"the server was asked for {', '.join(models)}, and answered by {by}"
        raise ServerFaultError("INTERNAL", text, target=target)
    return found


def named(answer: pb.ScoreResult, index: int, models: Sequence[str], target: str) -> tuple[Score | ItemFailure, ...]:
    """What each of the models that a call names made of an item. Raises ServerFaultError."""
    # Where a call names one, its result stands where that of a call without names does.
    outcomes: Sequence[pb.ScoreResult | pb.ModelOutcome] = [answer] if len(models) == 1 else list(answer.outcomes)
    if len(models) > 1 and [outcome.model for outcome in answer.outcomes] != list(models):
        text = f"the server answered item {index} with other models than it was asked for"
        raise ServerFaultError("INTERNAL", text, target=target)
    found = [result(outcome, index, target) for outcome in outcomes]
    return tuple(
        replace(each, model=model) if isinstance(each, ItemFailure) else each
        for model, each in zip(models, found, strict=True)
    )


def result(answer: pb.ScoreResult | pb.ModelOutcome, index: int, target: str) -> Score | ItemFailure:
    """One result. Raises ServerFaultError."""
    outcome = answer.WhichOneof("outcome")
    if outcome == "error":
        return item_failure(index, answer.error)
    score = answer.score
    stddev = score.stddev if score.HasField("stddev") else None
    if outcome is None or not math.isfinite(score.mean) or not (stddev is None or 0 <= stddev < math.inf):
        text = f"the server answered item {index} with neither a finite score nor an error"
        raise ServerFaultError("INTERNAL", text, target=target)
    return Score(score.mean, stddev, _components(score, index, target))


def _components(score: pb.Score, index: int, target: str) -> tuple[Component, ...]:
    parts = []
    for part in score.components:
        stddev = part.stddev if part.HasField("stddev") else None
        if not math.isfinite(part.mean) or not (stddev is None or 0 <= stddev < math.inf):
            text = f"the server answered item {index} with a component that is not finite: {part.name!r}"
            raise ServerFaultError("INTERNAL", text, target=target)
        parts.append(Component(part.name, part.mean, stddev))
    return tuple(parts)


def model(response: pb.GetModelResponse) -> ModelInfo:
    """What a server serves."""
    limits = response.limits
    return ModelInfo(
        name=response.name,
        architecture=response.architecture,
        revision=response.revision,
        dtype=response.dtype,
        devices=tuple(response.devices),
        gaussian=response.output == pb.REWARD_OUTPUT_GAUSSIAN,
        notice=response.notice,
        server_version=response.server_version,
        limits=Limits(
            limits.max_items_per_request,
            limits.max_message_bytes,
            limits.max_prompt_bytes,
            limits.max_image_pixels,
            limits.max_item_tokens,
        ),
        profile=response.profile,
        # A server of before it had the field reads one.
        pictures=response.pictures or 1,
        components=tuple(response.components),
        takes_questions=response.takes_questions,
        checkpoint=response.checkpoint,
        profile_digest=response.profile_digest,
        state=STATES.get(response.state, ""),
    )
