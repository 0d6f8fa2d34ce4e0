"""One of three replicas dies, hangs or is cut off while groups are scored: no call fails, none waits for long."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from conftest import numbered
from fake import Fake

import spatialscore_client as sc

GROUP = 24
TIMEOUT = 20.0
# A call may take five seconds beyond its usual time where one of the replicas is silent; this machine may be busy.
PATIENCE = 8.0


class Replica:
    """A fake server in a process of its own, which can be stopped as a machine is, behind a wire that can be cut."""

    def __init__(self) -> None:
        script = (
            "import sys; from fake import Fake; server = Fake();"
            "print(server.address, flush=True); sys.stdin.read(); server.stop()"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", script],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent,
        )  # fmt: skip
        assert self.process.stdout is not None
        host, port = self.process.stdout.readline().strip().split(":")
        self.wire = Wire((host, int(port)))

    def die(self) -> None:
        self.process.kill()
        self.process.wait()
        self.wire.close()

    def hang(self) -> None:
        os.kill(self.process.pid, signal.SIGSTOP)

    def cut(self) -> None:
        self.wire.cut.set()

    def heal(self) -> None:
        os.kill(self.process.pid, signal.SIGCONT)
        self.wire.cut.clear()

    def __enter__(self) -> Replica:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()
        self.wire.close()


class Wire:
    """Passes bytes on to a server; once cut, it keeps them to itself, and tells nobody."""

    def __init__(self, server: tuple[str, int]) -> None:
        self.server = server
        self.cut = threading.Event()
        self.bytes = 0
        self._ends: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        for end in [self._listener, *self._ends]:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
                far = socket.create_connection(self.server)
            except OSError:
                return
            self._ends += [near, far]
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._pass, args=(source, sink, self.cut), daemon=True).start()

    def lose_connections(self) -> None:
        """Those that there are lead nowhere from now on; new ones do."""
        self.cut.set()
        self.cut = threading.Event()

    def _pass(self, source: socket.socket, sink: socket.socket, cut: threading.Event) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                while cut.is_set():
                    time.sleep(0.02)
                self.bytes += len(data)
                sink.sendall(data)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def replicas() -> Iterator[list[Replica]]:
    with ExitStack() as stack:
        with ThreadPoolExecutor(3) as pool:
            made = list(pool.map(lambda _: Replica(), range(3)))
        yield [stack.enter_context(replica) for replica in made]


EXPECTED = [pytest.approx(number + 0.006) for number in range(GROUP)]


def unary(client: Any) -> None:
    assert client.score("prompt", numbered(GROUP), timeout=TIMEOUT).means == EXPECTED


def stream(client: Any) -> None:
    results = client.stream([("prompt", picture) for picture in numbered(GROUP)], timeout=TIMEOUT)
    assert [result.score.mean for result in sorted(results, key=lambda result: result.index)] == EXPECTED


def groups(call: Callable[[Any], None], client: Any, seconds: float) -> list[float]:
    """How long each group took that was begun within so many seconds."""
    took: list[float] = []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        start = time.monotonic()
        call(client)
        took.append(time.monotonic() - start)
    return took


@pytest.mark.parametrize("fault", ["die", "hang", "cut"])
def test_one_of_three_is_lost(connect: Any, replicas: list[Replica], fault: str) -> None:
    targets = [replica.wire.address for replica in replicas]
    # A client each, and one after the other's calls: every one of them meets the lost replica.
    clients = [connect(targets), connect(targets)]
    for client in clients:
        for _ in range(3):
            unary(client)
    lost = replicas[1]
    with ThreadPoolExecutor(2) as pool:
        running = [pool.submit(groups, call, each, 6.0) for call, each in zip((unary, stream), clients, strict=True)]
        time.sleep(0.3)
        getattr(lost, fault)()
        for took in running:
            times = took.result()
            assert len(times) > 3 and max(times) < PATIENCE, times
    if fault == "die":
        return
    lost.heal()
    seen, end = lost.wire.bytes, time.monotonic() + 20
    # A replica that is asked what it serves has a few bytes; one that is called has its pictures.
    while lost.wire.bytes < seen + 5_000 and time.monotonic() < end:
        unary(clients[0])
        time.sleep(0.05)
    assert lost.wire.bytes >= seen + 5_000, "it was never called again"


def test_one_that_hangs_from_the_start(connect: Any, replicas: list[Replica]) -> None:
    replicas[0].hang()
    for call in (unary, stream):
        # Long enough for every one of them to have its turn.
        client = connect([replica.wire.address for replica in replicas])
        assert max(groups(call, client, 0.5)) < PATIENCE


def test_one_that_answers_all_but_scores_is_left_at_half_of_the_time(connect: Any) -> None:
    with Fake(delay=30) as stuck, Fake() as well:
        for call in ("score", "stream"):
            client = connect([stuck.address, well.address])
            for server in (stuck, well):
                server.delay = 0.0
            for _ in range(2):
                client.score("prompt", numbered(1))
            stuck.delay = 30.0
            for _ in range(2):
                start = time.monotonic()
                if call == "score":
                    assert client.score("prompt", numbered(3), timeout=4).means == EXPECTED[:3]
                else:
                    assert len(client.stream([("prompt", each) for each in numbered(4)], timeout=4)) == 4
                assert time.monotonic() - start < 4


def test_a_connection_that_leads_nowhere_is_replaced(
    connect: Any, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one address behind which a balancer has several servers, of which one hangs."""
    monkeypatch.setattr("spatialscore_client.endpoints._PATIENCE_WITH_THE_ONLY", 0.5)
    wire = Wire(("127.0.0.1", fake.port))
    client = connect(wire.address)
    unary(client)
    for call in (unary, stream):
        wire.lose_connections()
        assert max(groups(call, client, 0.1)) < PATIENCE
    wire.close()


def test_a_long_queue_is_no_silence(connect: Any) -> None:
    """One server that takes long and says so: nothing is sent twice, and no connection is given up."""
    with Fake(delay=5) as one, Fake() as other:
        client = connect([one.address, other.address], timeout=60)
        one.delay = 0.0
        for _ in range(2):
            client.score("prompt", numbered(1))
        one.delay = 5.0
        before = len(one.requests) + len(other.requests)
        for _ in range(2):
            client.score("prompt", numbered(2))
        assert len(one.requests) + len(other.requests) == before + 2


@contextmanager
def names(monkeypatch: pytest.MonkeyPatch, known: dict[str, list[str]]) -> Iterator[None]:
    """A DNS of the test's own."""
    original = socket.getaddrinfo

    def look_up(host: Any, port: Any, *arguments: Any, **options: Any) -> Any:
        if host not in known:
            return original(host, port, *arguments, **options)
        if not known[host]:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in known[host]]

    with monkeypatch.context() as patched:
        patched.setattr(socket, "getaddrinfo", look_up)
        yield


def on(*hosts: str) -> list[Fake]:
    """Servers on one port of several addresses."""
    first = Fake(f"{hosts[0]}:0")
    return [first, *(Fake(f"{host}:{first.port}") for host in hosts[1:])]


def test_all_addresses_of_a_name_are_called_and_new_ones_are_found(
    connect: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spatialscore_client.endpoints._NAME_LIVES", 0.3)
    servers = on("127.0.0.1", "127.0.0.2", "127.0.0.3")
    known = {"scorer.test": ["127.0.0.1", "127.0.0.2"]}
    with ExitStack() as stack, names(monkeypatch, known):
        one, other, late = (stack.enter_context(server) for server in servers)
        client = connect(f"scorer.test:{one.port}")
        for _ in range(10):
            client.score("prompt", numbered(1))
        assert len(one.requests) == len(other.requests) == 5 and not late.requests
        known["scorer.test"] = ["127.0.0.2", "127.0.0.3"]
        end = time.monotonic() + 10
        while len(late.requests) < 3 and time.monotonic() < end:
            client.score("prompt", numbered(1))
            time.sleep(0.02)
        assert len(late.requests) >= 3
        seen = len(one.requests)
        # A name that cannot be resolved any more stands for what it stood for.
        known["scorer.test"] = []
        time.sleep(0.5)
        for _ in range(10):
            client.score("prompt", numbered(1))
        assert len(one.requests) == seen


def test_other_servers_are_called_from_now_on(connect: Any) -> None:
    """As a fleet's clients have it, whose replicas come back elsewhere: those that stay keep their places."""
    with Fake() as gone, Fake() as stays, Fake() as new:
        client = connect([gone.address, stays.address])
        endpoints = client.client._endpoints
        for _ in range(4):
            client.score("p", numbered(1))
        assert gone.requests and stays.requests
        kept = next(each for each in endpoints._all() if stays.address in each.address)
        gone.stop()
        endpoints.retarget([stays.address, new.address])
        before = len(stays.requests)
        for _ in range(6):
            client.score("p", numbered(1))
        assert (len(new.requests), len(stays.requests) - before) == (3, 3)
        assert kept in endpoints._all() and len(endpoints._all()) == 2


def test_two_models_behind_one_name_are_not_mixed(connect: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    one = Fake("127.0.0.1:0", revision="r1")
    other = Fake(f"127.0.0.2:{one.port}", revision="r2")
    with one, other, names(monkeypatch, {"scorer.test": ["127.0.0.1", "127.0.0.2"]}):
        client = connect(f"scorer.test:{one.port}")
        with pytest.raises(sc.ModelMismatchError):
            for _ in range(2):
                client.score("prompt", numbered(1))


def test_a_name_that_does_not_resolve_is_said_and_waited_for(connect: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    known: dict[str, list[str]] = {"scorer.test": []}
    with Fake() as server, names(monkeypatch, known):
        client = connect(f"scorer.test:{server.port}")
        with pytest.raises(sc.UnavailableError, match="'scorer.test' does not resolve: .*not known"):
            client.score("prompt", numbered(1), timeout=0.5)
        timer = threading.Timer(0.5, known.update, [{"scorer.test": ["127.0.0.1"]}])
        timer.start()
        assert len(client.score("prompt", numbered(1))) == 1
        timer.join()


def test_a_list_of_grpcs_is_a_target_each(connect: Any) -> None:
    with Fake() as one, Fake() as other:
        client = connect(f"ipv4:{one.address},{other.address}")
        for _ in range(6):
            client.score("prompt", numbered(1))
        assert len(one.requests) == len(other.requests) == 3


@pytest.mark.parametrize("code", ["CANCELLED", "INTERNAL", "UNKNOWN"])
def test_what_a_proxy_makes_of_a_broken_connection_is_tried_again(
    connect: Any, fake: Fake, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    import fake as module

    def bare(context: Any, code: str, _: Any) -> None:
        context.abort(module.CODES[code], "Received RST_STREAM with error code 8")

    monkeypatch.setattr(module, "abort", bare)
    client = connect(fake.address)
    fake.faults = [(code, None)] * 2
    assert client.score("prompt", numbered(2)).means == EXPECTED[:2]
    # It may be its refusal: not for ever.
    fake.faults = [(code, None)] * 100
    with pytest.raises(sc.ServerFaultError, match="RST_STREAM"):
        client.score("prompt", numbered(2))
    assert len(fake.requests) < 10
