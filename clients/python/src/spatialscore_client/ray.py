"""A fleet of servers on a Ray cluster: one for each bundle of a placement group, for as long as the job lasts.

    from spatialscore_client.ray import Fleet

    fleet = Fleet(replicas=4, gpus_per_replica=1, checkpoint="/models/reward")
    client = fleet.client()                      # goes along into tasks and actors
    scores = client.score("a cup to the left of a book", images)

Needs `ray`, and on every node the command `spatialscore`, which `pip install spatialscore` brings.
"""

from __future__ import annotations

import collections
import ctypes
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError
from ray.util import get_node_ip_address
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from .client import SpatialScoreClient
from .errors import ConfigurationError, SpatialScoreError, UnavailableError

__all__ = ["Fleet", "FleetClient", "Replica"]

# Seconds between two looks: of a client at where the replicas are, of a replica at its server's metrics.
_INTERVAL = 1.0
# Seconds that an actor has to answer; one that is slow is not gone.
_ANSWER = 5.0
# Seconds before a server that ended is started again: doubling from the first to the second.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0
# Seconds over which a rate is taken.
_RATE_OVER = 10.0
# Lines of a server's log that are kept to say why it ended.
_LOG = 20
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Replica:
    """One server of a fleet, as it was a moment ago."""

    index: int
    """Its bundle of the placement group."""
    node: str
    """The address of its node; empty while it has none."""
    target: str
    """Where it serves, host:port; empty while it does not."""
    model: str
    """What it serves: the checkpoint's name and revision."""
    queue_items: int
    """Items that hold a place in its queue."""
    pictures_per_second: float
    """What it has scored in the last ten seconds."""
    restarts: int
    """How often its server was started again where it stands; a new node begins at none."""
    fault: str
    """Why it does not serve; empty where it does."""


class _Server:
    """The actor: keeps one server running on its node."""

    def __init__(self, index: int, command: Sequence[str], environment: Mapping[str, str], token: str) -> None:
        self._index = index
        self._token = token
        self._node = get_node_ip_address()
        self._environment = {**os.environ, **environment}
        self._folder = Path(tempfile.mkdtemp(prefix="spatialscore-"))
        tokens = self._folder / "tokens"
        tokens.touch(0o600)
        tokens.write_text(f"fleet:{token}\n")
        host = f"[{self._node}]" if ":" in self._node else self._node
        self._command = [
            _binary(command[0]), "serve", "--listen", f"{host}:0", "--metrics-listen", "127.0.0.1:0",
            "--log-format", "json", "--tokens-file", str(tokens), *command[1:],
        ]  # fmt: skip
        self._process: subprocess.Popen[str] | None = None
        self._stopping = threading.Event()
        self._target = self._model = self._metrics = ""
        self._fault = "it has not started yet"
        self._restarts = 0
        self._queue = 0
        self._scored: collections.deque[tuple[float, float]] = collections.deque()
        threading.Thread(target=self._keep, name="spatialscore-keep", daemon=True).start()
        threading.Thread(target=self._look, name="spatialscore-look", daemon=True).start()

    def where(self) -> str:
        """Where it serves; empty while it does not."""
        return self._target

    def status(self) -> Replica:
        rate = 0.0
        samples = list(self._scored)
        if len(samples) > 1 and samples[-1][0] > samples[0][0]:
            rate = (samples[-1][1] - samples[0][1]) / (samples[-1][0] - samples[0][0])
        return Replica(
            self._index, self._node, self._target, self._model, self._queue, rate, self._restarts, self._fault
        )

    def stop(self, seconds: float) -> None:
        """Has the server drain, and ends it after so long."""
        self._stopping.set()
        process = self._process
        if process is not None:
            process.terminate()
            try:
                process.wait(seconds)
            except subprocess.TimeoutExpired:
                process.kill()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _keep(self) -> None:
        """Starts the server, and again whenever it ends. The thread that starts it must last: it dies with that."""
        pause = _FIRST_PAUSE
        while not self._stopping.is_set():
            lines: collections.deque[str] = collections.deque(maxlen=_LOG)
            served = False
            try:
                self._process = subprocess.Popen(
                    self._command, env=self._environment, stderr=subprocess.PIPE, text=True, preexec_fn=_die_together
                )
                served = self._follow(self._process, lines)
                fault = f"it ended with {self._process.wait()}"
            except OSError as error:
                fault = str(error)
            self._target, self._fault = "", " ".join([fault, *lines])
            self._scored.clear()
            if self._stopping.is_set():
                return
            print(f"spatialscore replica {self._index} on {self._node}: {self._fault}", file=sys.stderr, flush=True)
            pause = _FIRST_PAUSE if served else min(2 * pause, _LONGEST_PAUSE)
            self._stopping.wait(pause)
            self._restarts += 1

    def _follow(self, process: subprocess.Popen[str], lines: collections.deque[str]) -> bool:
        """Reads the log until it ends; whether the server ever served."""
        assert process.stderr is not None
        address, served = "", False
        for text in process.stderr:
            lines.append(text.strip())
            try:
                line = json.loads(text)
            except ValueError:
                line = {}
            if line.get("level") in ("WARN", "ERROR"):
                print(f"spatialscore replica {self._index}: {text.strip()}", file=sys.stderr, flush=True)
            address = line.get("address") or address
            self._metrics = line.get("url") or self._metrics
            if line.get("message") == "serving":
                self._target, self._fault, served = address, "", True
                lines.clear()
        return served

    def _look(self) -> None:
        """Asks the server what it serves, and reads its metrics now and then."""
        asked = ""
        while not self._stopping.wait(_INTERVAL):
            target = self._target
            if not target:
                continue
            try:
                if target != asked:
                    with SpatialScoreClient(target, token=self._token, timeout=_ANSWER) as client:
                        model = client.model()
                    self._model, asked = f"{model.name} {model.revision}", target
                with urllib.request.urlopen(self._metrics, timeout=_INTERVAL) as page:
                    text = page.read().decode()
            except (OSError, ValueError, SpatialScoreError):
                continue
            now = time.monotonic()
            self._queue = round(_sum(text, r"spatialscore_queue_items"))
            self._scored.append((now, _sum(text, r'spatialscore_items_total\{[^}]*outcome="OK"[^}]*\}')))
            while now - self._scored[0][0] > _RATE_OVER:
                self._scored.popleft()


def _binary(name: str) -> str:
    """Where the command is: in the path, else beside this Python."""
    found = shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))
    return found or name


def _die_together() -> None:
    """In the server, before it is one: it drains when the actor's process ends, however that ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _sum(text: str, metric: str) -> float:
    """The sum of a metric over its labels."""
    return sum(float(value) for value in re.findall(rf"^{metric}(?:\{{[^}}]*\}})? (\S+)$", text, flags=re.M))


class FleetClient(SpatialScoreClient):
    """A client whose servers are those of a fleet, wherever they are by now.

    Goes along into tasks and actors of the job. In a forked process Ray is not to be used: there it keeps to the
    servers that it knew.
    """

    def __init__(self, actors: Sequence[Any], *, wait: float = 600.0, **options: Any) -> None:
        """`actors` are a fleet's; `Fleet.client` gives them. Waits so long for the first that serves."""
        self._actors = list(actors)
        self._known: dict[int, str] = {}
        self._options = options
        self._following: threading.Thread | None = None
        until = time.monotonic() + wait
        while not self._find():
            if time.monotonic() > until:
                raise UnavailableError(
                    "UNAVAILABLE", f"no replica of the fleet serves after {wait:g} s; Fleet.replicas() says why"
                )
            time.sleep(_INTERVAL / 4)
        super().__init__(list(self._known.values()), **options)
        self._follow()

    def _find(self) -> bool:
        """Asks where each replica is, all at once; whether any is known. One that does not say so is where it was."""
        asked = [actor.where.remote() for actor in self._actors]
        until = time.monotonic() + _ANSWER
        for index, answer in enumerate(asked):
            try:
                target = ray.get(answer, timeout=max(0.0, until - time.monotonic()))
            except GetTimeoutError:
                continue
            except RayActorError:
                target = ""
            if target:
                self._known[index] = target
            elif len(self._known) > 1:
                # The last that was known stays: the client has to have one to wait for.
                self._known.pop(index, None)
        return bool(self._known)

    def _follow(self) -> None:
        self._following = threading.Thread(target=self._keep_up, name="spatialscore-fleet", daemon=True)
        self._following.start()

    def _keep_up(self) -> None:
        while self._following is threading.current_thread():
            time.sleep(_INTERVAL)
            try:
                self._find()
            except Exception:
                # The job ends, or Ray was shut down: what is known stays.
                return
            self._endpoints.retarget(list(self._known.values()))

    def close(self) -> None:
        """Closes the connections, and follows the fleet no longer."""
        self._following = None
        super().close()

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self._actors, self._options)

    def __repr__(self) -> str:
        return f"FleetClient({len(self._actors)} replicas: {', '.join(self._known.values())})"


def _rebuild(actors: Sequence[Any], options: dict[str, Any]) -> FleetClient:
    return FleetClient(actors, **options)


class Fleet:
    """Servers on a Ray cluster. They end with the job, or by `stop`."""

    def __init__(
        self,
        replicas: int = 1,
        *,
        gpus_per_replica: float = 0,
        cpus_per_replica: float = 1,
        checkpoint: str | None = None,
        placement: str | PlacementGroup = "SPREAD",
        settings: Mapping[str, object] | None = None,
        environment: Mapping[str, str] | None = None,
        command: str = "spatialscore",
    ) -> None:
        """Asks for the servers; they start beside the caller. `client` waits for the first.

        checkpoint: a folder that every node has, or a hub id; without it the small one that the server carries.
        placement: how bundles are spread, as Ray names it, or a placement group with a bundle for each replica.
        settings: the server's own, by their names: {"queue.max_items": 512}.
        environment: variables of the servers, beside those of Ray's workers.
        command: the server's, on every node.

        Replicas are asked for a token that only this fleet's clients know; it crosses the network as it is.
        """
        if replicas < 1:
            raise ConfigurationError(f"replicas is {replicas}; there must be one at least")
        resources = {"CPU": cpus_per_replica, **({"GPU": gpus_per_replica} if gpus_per_replica else {})}
        self._own = isinstance(placement, str)
        if isinstance(placement, str):
            self._group = placement_group([dict(resources) for _ in range(replicas)], strategy=placement)
        else:
            self._group = placement
            if placement.bundle_count < replicas:
                raise ConfigurationError(
                    f"the placement group has {placement.bundle_count} bundles for {replicas} replicas"
                )
        words = [command, *(["--checkpoint", checkpoint] if checkpoint else [])]
        words += [word for name, value in (settings or {}).items() for word in ("--set", f"{name}={value}")]
        self._token = secrets.token_hex(32)
        actor = ray.remote(_Server)
        self._actors = [
            actor.options(
                num_cpus=cpus_per_replica,
                num_gpus=gpus_per_replica,
                max_restarts=-1,
                # Nobody waits behind the one who asks.
                max_concurrency=64,
                scheduling_strategy=PlacementGroupSchedulingStrategy(self._group, index),
            ).remote(index, words, dict(environment or {}), self._token)
            for index in range(replicas)
        ]

    def client(self, *, wait: float = 600.0, **options: Any) -> FleetClient:
        """A client of the fleet, as soon as one replica serves. `options` are those of SpatialScoreClient."""
        return FleetClient(self._actors, wait=wait, token=self._token, **options)

    def replicas(self) -> list[Replica]:
        """How each is."""
        asked = [actor.status.remote() for actor in self._actors]
        until = time.monotonic() + _ANSWER
        found = []
        for index, answer in enumerate(asked):
            try:
                found.append(ray.get(answer, timeout=max(0.0, until - time.monotonic())))
            except (GetTimeoutError, RayActorError) as error:
                why = "it waits for a node that has room" if isinstance(error, GetTimeoutError) else str(error)
                found.append(Replica(index, "", "", "", 0, 0.0, 0, why))
        return found

    def wait(self, timeout: float = 600.0) -> None:
        """Until all replicas serve. Raises UnavailableError where they do not in time, and says why."""
        until = time.monotonic() + timeout
        while faults := [f"replica {each.index}: {each.fault}" for each in self.replicas() if each.fault]:
            if time.monotonic() > until:
                raise UnavailableError("UNAVAILABLE", "; ".join(faults))
            time.sleep(_INTERVAL / 2)

    def stop(self, timeout: float = 60.0) -> None:
        """Has all of them answer what they have accepted, and ends them."""
        stopped = [actor.stop.remote(timeout) for actor in self._actors]
        ray.wait(stopped, num_returns=len(stopped), timeout=timeout + _ANSWER)
        for actor in self._actors:
            ray.kill(actor, no_restart=True)
        if self._own:
            remove_placement_group(self._group)

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
