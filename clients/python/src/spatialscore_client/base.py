"""What the two clients have in common: their settings, their servers, and a channel per process."""

from __future__ import annotations

import inspect
import os
import threading
import weakref
from collections.abc import Sequence
from typing import Any

from ._proto import spatialscore as pb
from .endpoints import Deadline, Endpoint, Endpoints, Watch
from .errors import ConfigurationError, SpatialScoreError
from .images import Codec
from .plan import Item
from .scores import Score
from .settings import DEFAULT_TIMEOUT, TLS, Priority, Settings, Token, from_environment

SERVICE = "/spatialscore.v1.SpatialScoreService"
# Method, request, response.
UNARY: dict[str, tuple[Any, Any]] = {
    "Score": (pb.ScoreRequest, pb.ScoreResponse),
    "GetModel": (pb.GetModelRequest, pb.GetModelResponse),
}

_clients: weakref.WeakSet[BaseClient] = weakref.WeakSet()
# Channels of a parent process. Closing them in its child could wait for threads that only the parent has.
_inherited: list[Any] = []


class BaseClient:
    """Settings and servers. Safe to share between threads, to fork with, and to pickle."""

    def __init__(
        self,
        target: str | Sequence[str],
        *,
        token: Token | None = None,
        tls: TLS | bool | None = None,
        timeout: float = DEFAULT_TIMEOUT,
        codec: Codec = "raw",
        max_in_flight: int = 4,
        stream_window: int = 64,
        use_proxy: bool = False,
        priority: Priority = "training",
    ) -> None:
        """Connects nowhere yet.

        target: `host:port`, a DNS name whose addresses take turns, or several of them, which take turns.
        token: a bearer token, or a function that gives the one of the moment.
        tls: True, or a TLS with the certificates to use. A target of `https://` means True.
        timeout: seconds that a call may take, retries included; for a stream, that an item may take.
        codec: `raw` and `png` are lossless; `jpeg` is not, and changes scores. Files go as they are.
        max_in_flight: requests of one call that are under way at once.
        stream_window: items of one stream that are under way at once.
        use_proxy: whether the environment's proxy variables count.
        priority: `training`, or `evaluation` for what may wait while training scores.

        Raises ConfigurationError, which is a ValueError, where these make no sense or a file cannot be used.
        """
        self._arguments = dict(
            target=target, token=token, tls=tls, timeout=timeout, codec=codec, max_in_flight=max_in_flight,
            stream_window=stream_window, use_proxy=use_proxy, priority=priority,
        )  # fmt: skip
        self._settings = Settings.of(**self._arguments)  # type: ignore[arg-type]
        self._reset()
        _clients.add(self)

    @classmethod
    def from_environment(cls, **arguments: Any) -> Any:
        """A client of SPATIALSCORE_TARGET and its fellows, see `settings.from_environment`; arguments come first."""
        merged = {**from_environment(complete="target" not in arguments), **arguments}
        known = set(inspect.signature(cls).parameters)
        if unknown := sorted(set(merged) - known):
            what = ", ".join(map(repr, unknown))
            raise ConfigurationError(f"{what}: not known; there are {', '.join(sorted(known))}")
        return cls(**merged)

    @property
    def timeout(self) -> float:
        """Seconds that a call may take where it says nothing else."""
        return self._settings.timeout

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._channels: dict[Any, Any] = {}
        # Where there is a proxy, it resolves names.
        self._endpoints = Endpoints(self._settings.addresses, resolve=not self._settings.use_proxy)
        self._watch = Watch(self._endpoints)
        self._watching = False
        self._closings = 0
        self._watches: dict[Any, Watch] = {}
        self._beside: set[Any] = set()

    def _after_fork(self) -> None:
        _inherited.append(self._channels)
        self._reset()

    def _check_open(self, closings: int) -> None:
        """Raises SpatialScoreError where the client was closed since `_closings` was this."""
        if self._closings != closings:
            raise SpatialScoreError("the client was closed")

    def _connection(self, endpoint: Endpoint) -> tuple[str, list[tuple[str, Any]], Any]:
        """What a channel to an endpoint is made of: target, options, and credentials where it is TLS."""
        tls = self._settings.tls
        return endpoint.target, self._settings.options(endpoint.authority), tls.credentials() if tls else None

    def _look_at_groups(self, items: Sequence[Item], scores: Sequence[Score]) -> None:
        """Warns of a group whose scores are all equal: it trains nothing, and most often something is wrong."""
        groups: dict[str, list[float]] = {}
        for item, score in zip(items, scores, strict=True):
            groups.setdefault(item.prompt, []).append(score.mean)
        equal = next((means for means in groups.values() if len(means) > 1 and len(set(means)) == 1), None)
        if equal is not None:
            self._endpoints.notices.once(
                "equal scores",
                f"all {len(equal)} pictures of one prompt have the score {equal[0]:g}: are they one picture, or "
                "black? A group of equal rewards trains nothing. This is said once",
            )

    def _deadline(self, timeout: float | None) -> Deadline:
        return Deadline(self._settings.timeout if timeout is None else timeout)

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self._arguments)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(self._settings.addresses)})"


def _rebuild(kind: type[BaseClient], arguments: dict[str, Any]) -> BaseClient:
    return kind(**arguments)


def _after_fork() -> None:
    for client in list(_clients):
        client._after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
