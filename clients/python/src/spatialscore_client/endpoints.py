"""The servers that a client calls: whose turn it is, who rests after a failure, and that all serve one model."""

from __future__ import annotations

import math
import random
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .answers import Failure, silence
from .errors import ModelMismatchError
from .notices import Notices
from .scores import Limits, ModelInfo
from .settings import address, check_timeout, host_and_port, is_ip

# Seconds that a server rests after it could not be reached: doubling from the first to the second, each with jitter.
_FIRST_REST = 0.1
_LONGEST_REST = 5.0
# Seconds of silence after which a server is asked whether it is there, and again that it has for an answer: where
# others could be called, and where it is the only one.
_PATIENCE = 2.0
_PATIENCE_WITH_THE_ONLY = 10.0
# Seconds after which a name is resolved again, and the fewest after a server failed.
_NAME_LIVES = 10.0
_NAME_LIVES_AT_LEAST = 1.0


class Deadline:
    """When a call must be over."""

    def __init__(self, timeout: float) -> None:
        check_timeout(timeout)
        self.timeout = timeout
        self._end = time.monotonic() + timeout

    def left(self) -> float:
        """Seconds until then; negative once it has passed."""
        return self._end - time.monotonic()


@dataclass(eq=False)
class Endpoint:
    """One server; or one name that is left to gRPC, which finds several behind it."""

    address: str
    """As it is told."""
    target: str = ""
    """As gRPC is told; the same where there is none."""
    authority: str | None = None
    """The name and the port by which an address was found, as the server should see them."""
    fallback: bool = False
    """Whether it is an address of another family than its name's first: most often the same server."""
    failures: int = 0
    resting_until: float = 0.0
    verified: bool = False
    heard: float = -math.inf
    """When it last answered anything."""
    connections: int = 0
    """How many were given up."""
    under_way: int = 0
    """How many calls for scores wait for it."""

    def pause(self) -> float:
        """Seconds until it should be tried again."""
        return max(0.0, self.resting_until - time.monotonic())

    def usable(self) -> bool:
        """Whether nothing speaks against calling it."""
        return self.failures == 0 and self.resting_until <= time.monotonic()


@dataclass(eq=False)
class _Name:
    """A DNS name with its port, and what it stands for."""

    host: str
    port: int
    endpoints: list[Endpoint]
    fault: str = ""

    def look_up(self) -> None:
        """Resolves it again. Where that fails, what was known stays."""
        try:
            found = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            self.fault = f"the name {self.host!r} does not resolve: {error}"
            return
        known = {endpoint.target: endpoint for endpoint in self.endpoints}
        endpoints: dict[str, Endpoint] = {}
        for family, _, _, _, where in found:
            six = family == socket.AF_INET6
            at = f"[{where[0]}]:{self.port}" if six else f"{where[0]}:{self.port}"
            target = f"{'ipv6' if six else 'ipv4'}:{at}"
            endpoints[target] = known.get(target) or Endpoint(
                f"{self.host} ({at})", target, f"{self.host}:{self.port}", family != found[0][0]
            )
        self.fault, self.endpoints = "", list(endpoints.values())


class Endpoints:
    """The servers of a client. Thread-safe."""

    def __init__(self, addresses: Sequence[str], *, resolve: bool = True) -> None:
        """`resolve`: whether names are resolved here, or by gRPC, which has to where there is a proxy."""
        self._resolve = resolve
        self._groups = [self._group(address, resolve) for address in addresses]
        self._names = [group for group in self._groups if isinstance(group, _Name)]
        self._looked = -math.inf
        self._look_again = -math.inf
        self._looking = False
        # Not every worker of a job begins with the same server.
        self._turn = random.randrange(1 << 16)
        self._lock = threading.Lock()
        self._model: ModelInfo | None = None
        self._model_of = ""
        self.notices = Notices()

    @staticmethod
    def _group(named: str, resolve: bool) -> _Name | list[Endpoint]:
        if named.startswith("dns:///") and resolve:
            host, port = host_and_port(named.removeprefix("dns:///"))
            if not is_ip(host):
                return _Name(host, port, [])
        return [Endpoint(named, named)]

    def retarget(self, targets: Sequence[str]) -> None:
        """Has other servers called from now on; those that stay keep what is known of them."""
        addresses = [address(target)[0] for target in targets]
        with self._lock:
            known = {group[0].address: group for group in self._groups if not isinstance(group, _Name)}
            self._groups = [known.get(each) or self._group(each, self._resolve) for each in addresses]
            self._names = [group for group in self._groups if isinstance(group, _Name)]

    def _all(self) -> list[Endpoint]:
        return [each for group in self._groups for each in (group.endpoints if isinstance(group, _Name) else group)]

    def refresh(self) -> None:
        """Has names resolved again beside the caller, where it is time for it."""
        if not self._names:
            return
        now = time.monotonic()
        with self._lock:
            if self._looking or now < self._look_again:
                return
            self._looking, self._looked = True, now
        threading.Thread(target=self._look_up, name="spatialscore-names", daemon=True).start()

    def _look_up(self) -> None:
        try:
            for name in self._names:
                name.look_up()
        finally:
            with self._lock:
                known = all(name.endpoints for name in self._names)
                self._look_again = time.monotonic() + (_NAME_LIVES if known else _NAME_LIVES_AT_LEAST)
                self._looking = False

    def unknown(self) -> Failure | None:
        """Why there is nobody to call yet, where a name was looked for in vain; empty while it is looked for."""
        if self._all():
            return None
        with self._lock:
            faults = "; ".join(name.fault for name in self._names if name.fault)
        return Failure("UNAVAILABLE", faults)

    @property
    def several(self) -> bool:
        """Whether there is more than one to call."""
        return len(self._all()) > 1

    def patience(self, rounds: int = 0) -> float:
        """Seconds of silence that are borne; more with each round of attempts that were made in vain."""
        return (_PATIENCE if self.several else _PATIENCE_WITH_THE_ONLY) * 2.0 ** min(rounds, 8)

    def begun(self, endpoint: Endpoint) -> None:
        """Takes note of a call for scores."""
        with self._lock:
            endpoint.under_way += 1

    def ended(self, endpoint: Endpoint) -> None:
        """Takes note of its end."""
        with self._lock:
            endpoint.under_way -= 1

    def pick(self) -> Endpoint | None:
        """The next one in turn that nothing speaks against, of those for which the fewest of our calls wait; else the
        one that is back first; None of none."""
        with self._lock:
            found = self._all()
            if not found:
                return None
            # No call is risked on one that failed while there is another: see `suspects`.
            usable = [each for each in found if each.usable()]
            if not usable:
                return min(self._in_turn(found), key=Endpoint.pause)
            least = min((each.fallback, each.under_way) for each in usable)
            return self._in_turn([each for each in usable if (each.fallback, each.under_way) == least])[0]

    def _in_turn(self, among: list[Endpoint]) -> list[Endpoint]:
        """The same, beginning with the next: who is passed over leaves its turn to all."""
        self._turn += 1
        first = self._turn % len(among)
        return among[first:] + among[:first]

    def spare(self, *others: Endpoint) -> Endpoint | None:
        """Another one that nothing speaks against and whose model is known."""
        with self._lock:
            self._turn += 1
            found = [each for each in self._all() if each not in others and each.usable() and each.verified]
            return found[self._turn % len(found)] if found else None

    def suspects(self) -> list[Endpoint]:
        """Those that failed and should be asked whether they are back, while others do the work; each once."""
        with self._lock:
            found = self._all()
            if not any(each.usable() for each in found):
                return []
            due = [each for each in found if each.failures and not each.pause()]
            for each in due:
                each.resting_until = time.monotonic() + self.patience() + _LONGEST_REST
            return due

    def failed(self, endpoint: Endpoint, failure: Failure) -> None:
        """Lets an endpoint rest after a failure that may be tried again."""
        with self._lock:
            now = time.monotonic()
            if failure.retry_after is not None:
                # The server's hint is the least; what comes on top keeps callers from coming back all at once.
                rest = failure.retry_after * random.uniform(1.0, 1.25)
            else:
                endpoint.failures += 1
                # It may come back as another process, with another model; its name may stand for another by now.
                endpoint.verified = False
                self._look_again = min(self._look_again, max(now, self._looked + _NAME_LIVES_AT_LEAST))
                rest = min(_LONGEST_REST, _FIRST_REST * 2 ** min(endpoint.failures - 1, 16)) * random.uniform(
                    0.5, 1.0
                )
            if failure.silent:
                # A connection may lead nowhere though its server is well.
                endpoint.connections += 1
            endpoint.resting_until = now + rest

    def answered(self, endpoint: Endpoint) -> None:
        """Forgets an endpoint's failures."""
        endpoint.heard = time.monotonic()
        if endpoint.failures:
            endpoint.failures = 0
            endpoint.resting_until = 0.0
        self.notices.over(endpoint.address, f"{endpoint.address} answers again")

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


@dataclass(eq=False)
class _Watched:
    endpoint: Endpoint
    waits: Callable[[], bool]
    give_up: Callable[[Failure], None]
    since: float
    deadline: float


class Watch:
    """Finds out which servers hang while something waits for them.

    A machine that hangs ends no connection, and a long queue is silent too: so one that says nothing is asked what it
    serves, and hangs if it does not say even that.

    Pure: whoever drives it asks and tells. Thread-safe.
    """

    def __init__(self, endpoints: Endpoints) -> None:
        self._endpoints = endpoints
        self._lock = threading.Lock()
        self._watched: set[_Watched] = set()
        self._asked: set[Endpoint] = set()

    def add(
        self,
        endpoint: Endpoint,
        waits: Callable[[], bool],
        give_up: Callable[[Failure], None],
        left: float,
    ) -> _Watched:
        """Watches an endpoint while `waits` says so, and tells `give_up` if it hangs. `left` is for the log."""
        now = time.monotonic()
        watched = _Watched(endpoint, waits, give_up, now, now + left)
        with self._lock:
            self._watched.add(watched)
        return watched

    def remove(self, watched: _Watched) -> None:
        """Ends that."""
        with self._lock:
            self._watched.discard(watched)

    def __bool__(self) -> bool:
        return bool(self._watched)

    @property
    def interval(self) -> float:
        """Seconds between two looks."""
        return self._endpoints.patience() / 8

    def look(self) -> list[Endpoint]:
        """Whom to ask now what it serves, within `patience`."""
        now, patience = time.monotonic(), self._endpoints.patience()
        ask: list[Endpoint] = []
        with self._lock:
            for watched in self._watched:
                endpoint = watched.endpoint
                if not watched.waits():
                    watched.since = now
                if now - max(watched.since, endpoint.heard) > patience and endpoint not in self._asked:
                    self._asked.add(endpoint)
                    ask.append(endpoint)
            slow = [each for each in self._watched if now - each.since > 5 * patience]
        for each in slow:
            self._endpoints.notices.say(
                f"slow {each.endpoint.address}",
                f"waiting for {each.endpoint.address} for {now - each.since:.0f} s, whose queue may be long; "
                f"{max(0.0, each.deadline - now):.0f} s are left",
            )
        return ask

    def told(self, endpoint: Endpoint, failure: Failure | None) -> None:
        """What came of asking: that, or nothing in time, which `failure.silent` says."""
        with self._lock:
            self._asked.discard(endpoint)
            if failure is None or not failure.silent:
                endpoint.heard = time.monotonic()
                return
            # Whoever began since has its own time.
            before = time.monotonic() - self._endpoints.patience()
            hung = [each for each in self._watched if each.endpoint is endpoint and each.since < before]
        for each in hung:
            each.give_up(failure)


def tell(watch: Watch, endpoint: Endpoint, patience: float, failure: Failure | None) -> None:
    """Tells a watch what came of asking an endpoint that it named."""
    silent = failure is not None and failure.code == "DEADLINE_EXCEEDED"
    watch.told(endpoint, silence(2 * patience) if silent else failure)
