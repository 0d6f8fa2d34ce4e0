"""What a call raises when there are no scores. Nothing here is ever turned into a number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .scores import Score


class SpatialScoreError(Exception):
    """The root of everything that this package raises about scoring."""


class ConfigurationError(SpatialScoreError, ValueError):
    """What the client was told makes no sense, or a file that it names cannot be used. No server was asked."""


class Finding(Exception):
    """What `check` finds to be wrong, and what to do about it."""


@dataclass(frozen=True)
class ItemFailure:
    """Why one item has no score."""

    index: int
    """Its place among the items of the call, from 0."""
    code: str
    """The gRPC code: INVALID_ARGUMENT for what the caller sent, INTERNAL for a fault of the server."""
    message: str
    """What is wrong, in words."""
    model: str = ""
    """The model that gives it no score, where the call named models."""

    def __str__(self) -> str:
        by = f" by {self.model}" if self.model else ""
        return f"item {self.index}{by}: {self.code}: {self.message}"


class ItemsFailedError(SpatialScoreError):
    """Some items can have no score, and trying again would not help."""

    def __init__(
        self,
        failures: Sequence[ItemFailure],
        scores: Sequence[Score | None],
        columns: Mapping[str, Sequence[Score | None]] | None = None,
    ) -> None:
        self.failures = tuple(sorted(failures, key=lambda failure: failure.index))
        """The items without a score, in order."""
        self.scores = tuple(scores)
        """What was scored all the same, one entry per item of the call; None where there is no score. Empty for a
        stream, which has yielded what it had, and where the call named models."""
        self.columns = {model: tuple(column) for model, column in (columns or {}).items()}
        """The same by the name of each model, where the call named models."""
        shown = "; ".join(map(str, self.failures[:5]))
        more = f"; and {len(self.failures) - 5} more" if len(self.failures) > 5 else ""
        count = len(self.scores) or max(map(len, self.columns.values()), default=0)
        of_all = f" of {count}" if count else ""
        super().__init__(
            f"{len({failure.index for failure in self.failures})}{of_all} items have no score: {shown}{more}"
        )

    def __reduce__(self) -> tuple[object, ...]:
        # So that it crosses to another process whole: DataLoader workers and Ray actors pickle what they raise.
        return type(self), (self.failures, self.scores, self.columns)


class CallError(SpatialScoreError):
    """A call got no scores at all."""

    def __init__(self, code: str, message: str, *, target: str = "", attempts: int = 1) -> None:
        self.code = code
        """The gRPC code of the last attempt."""
        self.message = message
        """What the server, or gRPC, said."""
        self.target = target
        """Who said it."""
        self.attempts = attempts
        """How often it was tried."""
        times = f" after {attempts} attempts" if attempts > 1 else ""
        super().__init__(f"{target or 'the call'}: {code}{times}: {message}")

    def __reduce__(self) -> tuple[object, ...]:
        return _call_error, (type(self), self.code, self.message, self.target, self.attempts)


def _call_error(kind: type[CallError], code: str, message: str, target: str, attempts: int) -> CallError:
    return kind(code, message, target=target, attempts=attempts)


class InvalidRequestError(CallError, ValueError):
    """INVALID_ARGUMENT: the call breaks one of the server's limits."""


class AuthenticationError(CallError, PermissionError):
    """UNAUTHENTICATED or PERMISSION_DENIED: the token is missing, wrong, or not enough."""


class DeadlineExceededError(CallError, TimeoutError):
    """The call's timeout passed, with whatever retries fitted into it."""


class BusyError(CallError):
    """RESOURCE_EXHAUSTED: the server's queue stayed full for longer than the call's timeout."""


class UnavailableError(CallError, ConnectionError):
    """UNAVAILABLE: nobody answered before the call's timeout."""


class ServerFaultError(CallError):
    """The server failed, or answered what the contract does not allow."""


class ModelMismatchError(SpatialScoreError):
    """Two targets serve different models: their scores must not be mixed."""


_KINDS: dict[str, type[CallError]] = {
    "INVALID_ARGUMENT": InvalidRequestError,
    "UNAUTHENTICATED": AuthenticationError,
    "PERMISSION_DENIED": AuthenticationError,
    "DEADLINE_EXCEEDED": DeadlineExceededError,
    "RESOURCE_EXHAUSTED": BusyError,
    "UNAVAILABLE": UnavailableError,
}


def call_error(code: str, message: str, target: str, attempts: int) -> CallError:
    """The exception for a gRPC code."""
    return _KINDS.get(code, ServerFaultError)(code, message, target=target, attempts=attempts)
