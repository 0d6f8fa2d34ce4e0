"""The servers that a client calls: whose turn it is, who rests after a failure, and that all serve one model."""

from __future__ import annotations

import math
import random
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from .answers import Failure
from .errors import ModelMismatchError
from .scores import Limits, ModelInfo

# Seconds that a server rests after it could not be reached: doubling from the first to the second, each with jitter.
_FIRST_REST = 0.1
_LONGEST_REST = 5.0


class Deadline:
    """When a call must be over."""

    def __init__(self, timeout: float) -> None:
        if not 0 < timeout < math.inf:
            raise ValueError(f"timeout is {timeout}; it must be a positive number of seconds")
        self.timeout = timeout
        self._end = time.monotonic() + timeout

    def left(self) -> float:
        """Seconds until then; negative once it has passed."""
        return self._end - time.monotonic()


@dataclass(eq=False)
class Endpoint:
    """One server, or one name behind which gRPC finds several."""

    address: str
    failures: int = 0
    resting_until: float = 0.0
    verified: bool = False

    def pause(self) -> float:
        """Seconds until it should be tried again."""
        return max(0.0, self.resting_until - time.monotonic())


class Endpoints:
    """The servers of a client. Thread-safe."""

    def __init__(self, addresses: Sequence[str]) -> None:
        self._all = [Endpoint(address) for address in addresses]
        # Not every worker of a job begins with the same server.
        self._turn = random.randrange(len(self._all))
        self._lock = threading.Lock()
        self._model: ModelInfo | None = None
        self._model_of = ""

    def pick(self) -> Endpoint:
        """The next one in turn that does not rest; where all rest, the one that is back first."""
        with self._lock:
            self._turn += 1
            turns = [self._all[(self._turn + step) % len(self._all)] for step in range(len(self._all))]
            return min(turns, key=Endpoint.pause)

    def failed(self, endpoint: Endpoint, failure: Failure) -> None:
        """Lets an endpoint rest after a failure that may be tried again."""
        with self._lock:
            if failure.retry_after is not None:
                # The server's hint is the least; what comes on top keeps callers from coming back all at once.
                rest = failure.retry_after * random.uniform(1.0, 1.25)
            else:
                endpoint.failures += 1
                # It may come back as another process, with another model.
                endpoint.verified = False
                rest = min(_LONGEST_REST, _FIRST_REST * 2 ** min(endpoint.failures - 1, 16)) * random.uniform(
                    0.5, 1.0
                )
            endpoint.resting_until = time.monotonic() + rest

    def answered(self, endpoint: Endpoint) -> None:
        """Forgets an endpoint's failures."""
        endpoint.failures = 0

    def verify(self, endpoint: Endpoint, model: ModelInfo) -> None:
        """Takes note of what an endpoint serves.

        Raises ModelMismatchError where it is not what was served before: rewards of two models have no common scale.
        """
        with self._lock:
            if self._model is None:
                self._model, self._model_of = model, endpoint.address
            elif (model.name, model.revision) != (self._model.name, self._model.revision):
                raise ModelMismatchError(
                    f"{self._model_of} served {self._model.name} ({self._model.revision}), and {endpoint.address} "
                    f"serves {model.name} ({model.revision}): their scores must not be mixed"
                )
            smaller = map(min, vars(self._model.limits).values(), vars(model.limits).values())
            self._model = ModelInfo(**{**vars(self._model), "limits": Limits(*smaller)})
            endpoint.verified = True

    @property
    def model(self) -> ModelInfo | None:
        """What is served, once one was asked, with limits that hold for all that were asked."""
        return self._model
