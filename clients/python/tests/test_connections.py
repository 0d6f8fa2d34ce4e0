"""Where calls go: several servers, names, TLS, proxies, threads, forks."""

from __future__ import annotations

import datetime
import ipaddress
import multiprocessing
import os
import pickle
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from conftest import Sync, numbered
from fake import Fake

import spatialscore_client as sc
from spatialscore_client.settings import TokenFile, address, from_environment


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port


def test_servers_take_turns(connect: Any) -> None:
    with Fake() as one, Fake() as other:
        client = connect([one.address, other.address])
        for _ in range(10):
            client.score("prompt", numbered(1))
        assert len(one.requests) == len(other.requests) == 5


def test_a_call_goes_where_the_fewest_wait() -> None:
    with (
        Fake() as one,
        Fake() as two,
        Fake(delay=5) as slow,
        ThreadPoolExecutor(1) as pool,
        sc.SpatialScoreClient([server.address for server in (one, two, slow)]) as client,
    ):
        until = time.monotonic() + 30
        while not slow.requests:
            call = pool.submit(client.score, "prompt", numbered(2))
            while not (call.done() or slow.requests):
                assert time.monotonic() < until
                time.sleep(0.01)
        before = len(one.requests), len(two.requests)
        for _ in range(10):
            client.score("prompt", numbered(2))
        assert len(slow.requests) == 1, "one waits for it already"
        after = len(one.requests) - before[0], len(two.requests) - before[1]
        assert sum(after) == 10 and min(after) >= 3, "the others take turns"
        assert len(call.result()) == 2


def test_a_dead_server_is_skipped_and_one_that_comes_back_is_used(connect: Any) -> None:
    port = free_port()
    with Fake() as alive:
        client = connect([f"127.0.0.1:{port}", alive.address])
        for _ in range(6):
            assert len(client.score("prompt", numbered(1), timeout=2)) == 1
        assert len(alive.requests) == 6
        with Fake(f"127.0.0.1:{port}") as back:
            end = time.monotonic() + 10
            while not back.requests and time.monotonic() < end:
                client.score("prompt", numbered(1))
                time.sleep(0.05)
            assert back.requests


def test_a_server_that_drains_is_left_alone_for_a_while(connect: Any) -> None:
    with Fake() as draining, Fake() as alive:
        client = connect([draining.address, alive.address])
        draining.faults = [("UNAVAILABLE", None)] * 1000
        for _ in range(20):
            client.score("prompt", numbered(1))
        assert len(alive.requests) == 20
        assert 1 <= len(draining.requests) <= 10


def test_a_server_that_dies_in_a_call_is_replaced(connect: Any) -> None:
    with Fake(delay=0.5) as dying, Fake() as alive:
        client = connect([dying.address, alive.address])
        client.score("prompt", numbered(1))
        client.score("prompt", numbered(1))
        stopping = threading.Timer(0.2, dying.stop)
        stopping.start()
        for _ in range(4):
            assert client.score("prompt", numbered(3)).means == [pytest.approx(n + 0.006) for n in range(3)]
        stopping.join()


def test_the_addresses_behind_a_name_take_turns_and_dead_ones_are_left_out(connect: Any) -> None:
    """What gRPC does with a DNS name, on a list of addresses, which it resolves in the same way."""
    with Fake() as one, Fake() as other:
        dead = free_port()
        client = connect(f"ipv4:127.0.0.1:{dead},{one.address},{other.address}")
        for _ in range(20):
            client.score("prompt", numbered(1))
        assert min(len(one.requests), len(other.requests)) >= 5
        assert len(one.requests) + len(other.requests) == 20


def test_two_models_are_not_mixed(connect: Any) -> None:
    with Fake(revision="r1") as one, Fake(revision="r2") as other:
        client = connect([one.address, other.address])
        with pytest.raises(sc.ModelMismatchError, match="must not be mixed"):
            for _ in range(2):
                client.score("prompt", numbered(1))


def test_a_server_that_comes_back_with_another_model_is_noticed(connect: Any) -> None:
    port = free_port()
    client = connect(f"127.0.0.1:{port}")
    with Fake(f"127.0.0.1:{port}"):
        client.score("prompt", numbered(1))
    with pytest.raises(sc.UnavailableError):
        client.score("prompt", numbered(1), timeout=0.5)
    with Fake(f"127.0.0.1:{port}", revision="r2"), pytest.raises(sc.ModelMismatchError):
        client.score("prompt", numbered(1))


def test_nobody_there_is_said_in_time(connect: Any) -> None:
    start = time.monotonic()
    with pytest.raises(sc.UnavailableError, match="refused"):
        connect(f"127.0.0.1:{free_port()}").score("prompt", numbered(1), timeout=1)
    assert time.monotonic() - start < 2


def test_a_server_that_starts_late_is_waited_for(connect: Any) -> None:
    port = free_port()
    servers: list[Fake] = []
    timer = threading.Timer(0.7, lambda: servers.append(Fake(f"127.0.0.1:{port}")))
    timer.start()
    assert len(connect(f"127.0.0.1:{port}").score("prompt", numbered(2), timeout=10)) == 2
    timer.join()
    servers[0].stop()


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An authority, a server's certificate for localhost and 127.0.0.1, and a client's, as PEM files."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    directory = tmp_path_factory.mktemp("certificates")
    now = datetime.datetime.now(datetime.timezone.utc)
    authority: tuple[Any, Any] | None = None

    def name(common: str) -> Any:
        return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, common)])

    for common in ("authority", "server", "client", "stranger"):
        key = ec.generate_private_key(ec.SECP256R1())
        issuer, signer = authority if authority and common != "stranger" else (name(common), key)
        names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name(common))
            .issuer_name(issuer)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=common in ("authority", "stranger"), path_length=None), True)
            .add_extension(x509.SubjectAlternativeName(names), False)
            .sign(signer, hashes.SHA256())
        )
        authority = authority or (name(common), key)
        form = serialization.Encoding.PEM
        (directory / f"{common}.pem").write_bytes(certificate.public_bytes(form))
        plain = serialization.NoEncryption()
        (directory / f"{common}.key").write_bytes(key.private_bytes(form, serialization.PrivateFormat.PKCS8, plain))
    return directory


def server_credentials(certificates: Path, *, mutual: bool = False) -> grpc.ServerCredentials:
    pair = ((certificates / "server.key").read_bytes(), (certificates / "server.pem").read_bytes())
    authority = (certificates / "authority.pem").read_bytes() if mutual else None
    return grpc.ssl_server_credentials([pair], authority, mutual)


def test_tls_with_an_authority_of_ones_own(connect: Any, certificates: Path) -> None:
    ca = certificates / "authority.pem"
    with Fake(credentials=server_credentials(certificates), token="secret") as server:
        assert len(connect(server.address, tls=sc.TLS(ca=ca), token="secret").score("prompt", numbered(2))) == 2
        target = f"https://localhost:{server.port}"
        assert len(connect(target, tls=sc.TLS(ca=ca.read_bytes()), token="secret").score("p", numbered(2))) == 2
        for wrong in (sc.TLS(ca=certificates / "stranger.pem"), True, None):
            with pytest.raises(sc.UnavailableError):
                connect(server.address, tls=wrong).score("prompt", numbered(2), timeout=1)
        assert all(metadata["authorization"] == "Bearer secret" for metadata in server.metadata)


def test_tls_where_the_server_asks_for_a_certificate(connect: Any, certificates: Path) -> None:
    ca, cert, key = (certificates / name for name in ("authority.pem", "client.pem", "client.key"))
    with Fake(credentials=server_credentials(certificates, mutual=True)) as server:
        tls = sc.TLS(ca=ca, cert=cert, key=key)
        assert len(connect(server.address, tls=tls).score("prompt", numbered(2))) == 2
        with pytest.raises(sc.UnavailableError):
            connect(server.address, tls=sc.TLS(ca=ca)).score("prompt", numbered(2), timeout=1)


def test_proxies_are_ignored_unless_asked_for(fake: Fake) -> None:
    script = (
        "import sys, spatialscore_client as sc\n"
        "client = sc.SpatialScoreClient(sys.argv[1], timeout=2, use_proxy=sys.argv[2] == 'yes')\n"
        "print(client.model().name)\n"
    )
    # No proxy is there: whoever heeds the variable gets no answer.
    proxy = f"http://127.0.0.1:{free_port()}"
    environment = {**os.environ, "http_proxy": proxy, "https_proxy": proxy, "grpc_proxy": proxy, "no_proxy": ""}
    for use_proxy, status in (("no", 0), ("yes", 1)):
        command = [sys.executable, "-c", script, fake.address, use_proxy]
        ended = subprocess.run(command, env=environment, capture_output=True, timeout=60)
        assert ended.returncode == status, ended.stderr.decode()


def test_many_threads_share_a_client(fake: Fake) -> None:
    client = Sync(fake.address)

    def score(number: int) -> bool:
        prompt = "p" * number
        expected = [pytest.approx(place + number / 1000) for place in range(3)]
        return client.score(prompt, numbered(3)).means == expected

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(score, range(1, 200)))
    client.close()


def in_child(client: Any, results: Any) -> None:
    try:
        results.put(client.score("prompt", numbered(3), timeout=20).means)
    except BaseException as error:
        results.put(repr(error))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_client_works_in_child_processes(fake_process: str, method: str) -> None:
    """As in DataLoader workers and Ray actors; where they are spawned, while the parent has calls under way, too.

    A fork in the middle of a call is gRPC's to survive, and it does not always (see the README).
    """
    context: Any = multiprocessing.get_context(method)
    client = sc.SpatialScoreClient(fake_process, timeout=20)
    expected = [pytest.approx(number + 0.006) for number in range(3)]
    assert client.score("prompt", numbered(3)).means == expected
    done = threading.Event()
    mistakes: list[Any] = []

    def keep_busy() -> None:
        while not done.is_set():
            means = client.score("prompt", numbered(3)).means
            if means != expected:
                mistakes.append(means)

    busy = threading.Thread(target=keep_busy)
    if method == "spawn":
        busy.start()
    results = context.Queue()
    children = [context.Process(target=in_child, args=(client, results)) for _ in range(3)]
    try:
        for child in children:
            child.start()
        for _ in children:
            assert results.get(timeout=40) == expected
        for child in children:
            child.join(20)
            assert child.exitcode == 0
        assert client.score("prompt", numbered(3)).means == expected
    finally:
        done.set()
        if method == "spawn":
            busy.join()
        client.close()
    assert not mistakes


@pytest.fixture
def fake_process() -> Any:
    """A fake server in another process: a server does not outlive a fork of its own."""
    script = "import sys; from fake import Fake; server = Fake(); print(server.address, flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", script]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent
    ) as process:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
        process.kill()


def test_clients_and_errors_cross_processes_whole(fake: Fake) -> None:
    client = pickle.loads(pickle.dumps(sc.SpatialScoreClient([fake.address], timeout=7, codec="png")))
    assert client._settings.timeout == 7 and client._settings.codec == "png"
    assert len(client.score("prompt", [numbered(1)[0]])) == 1
    client.close()
    failed = sc.ItemsFailedError([sc.ItemFailure(1, "INTERNAL", "why")], [sc.Score(1.0, None), None])
    again = pickle.loads(pickle.dumps(failed))
    assert (again.failures, again.scores, str(again)) == (failed.failures, failed.scores, str(failed))
    busy = sc.BusyError("RESOURCE_EXHAUSTED", "full", target="there", attempts=3)
    assert str(pickle.loads(pickle.dumps(busy))) == str(busy) == "there: RESOURCE_EXHAUSTED after 3 attempts: full"


def test_the_trace_that_is_current_goes_along(fake: Fake) -> None:
    trace = pytest.importorskip("opentelemetry.trace")
    context = trace.SpanContext(int("ab" * 16, 16), int("cd" * 8, 16), False, trace.TraceFlags(1))
    import opentelemetry.propagate  # noqa: F401

    client = Sync(fake.address)
    with trace.use_span(trace.NonRecordingSpan(context)):
        client.score("prompt", numbered(1))
    client.close()
    assert fake.metadata[-1]["traceparent"] == f"00-{'ab' * 16}-{'cd' * 8}-01"


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("scorer", ("dns:///scorer:50051", None)),
        ("scorer:1234", ("dns:///scorer:1234", None)),
        ("[::1]:1234", ("dns:///[::1]:1234", None)),
        ("::1", ("dns:///[::1]:50051", None)),
        ("http://scorer:1234/", ("dns:///scorer:1234", False)),
        ("https://scorer:1234", ("dns:///scorer:1234", True)),
        ("unix:/run/scorer", ("unix:/run/scorer", None)),
    ],
)
def test_targets(target: str, expected: Any) -> None:
    assert address(target) == expected


@pytest.mark.parametrize("target", ["", ":1", "a:b", "a:0", "a:99999", "a/b:1", "[::1", "ftp://a"])
def test_what_is_no_target(target: str) -> None:
    with pytest.raises(ValueError, match="target|port"):
        sc.SpatialScoreClient(target)


def test_settings_that_make_no_sense(certificates: Path) -> None:
    for wrong in (
        {"timeout": 0},
        {"timeout": float("nan")},
        {"timeout": float("inf")},
        {"codec": "gif"},
        {"max_in_flight": 0},
    ):
        with pytest.raises(ValueError):
            sc.SpatialScoreClient("scorer", **wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="contradict"):
        sc.SpatialScoreClient("http://scorer", tls=True)
    with pytest.warns(UserWarning, match="plain text"):
        sc.SpatialScoreClient("scorer:1", token="secret")


def test_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("first\n")
    found = from_environment(
        {"SPATIALSCORE_TARGET": "a:1, b:2", "SPATIALSCORE_TOKEN_FILE": str(file), "SPATIALSCORE_TIMEOUT": "9"}
    )
    assert found["target"] == ["a:1", "b:2"] and found["timeout"] == 9
    assert found["token"]() == "first"
    file.write_text("second")
    assert found["token"]() == "second"
    with pytest.raises(ValueError, match="SPATIALSCORE_TARGET"):
        from_environment({})


def test_the_token_of_the_environment_is_read_as_the_servers_command_reads_it(tmp_path: Path) -> None:
    file = tmp_path / "token"
    named = {"SPATIALSCORE_TARGET": "a:1", "SPATIALSCORE_TOKEN_FILE": str(file)}
    for text in ("secret", "trainer:secret\n", "# ours\n\n  trainer:secret  \r\n"):
        file.write_text(text)
        assert from_environment(named)["token"]() == "secret"
        direct = {"SPATIALSCORE_TARGET": "a:1", "SPATIALSCORE_TOKEN": text}
        assert from_environment(direct)["token"] == "secret"
    for text, words in (
        ("", "holds no token"),
        ("a:secret\nb:other", "holds 2 tokens; it must hold one line"),
        ("two words", "visible ASCII"),
        ("trainer:", "the token is empty"),
    ):
        file.write_text(text)
        with pytest.raises(sc.ConfigurationError, match=words) as caught:
            from_environment(named)["token"]()
        assert "secret" not in str(caught.value) and str(file) in str(caught.value)
    found = from_environment(
        {"SPATIALSCORE_TARGET": "ipv4:127.0.0.1:1,127.0.0.2:2", "SPATIALSCORE_PRIORITY": "evaluation"}
    )
    assert found == {"target": ["ipv4:127.0.0.1:1,127.0.0.2:2"], "priority": "evaluation"}
    for wrong in (
        {"SPATIALSCORE_TIMEOUT": "soon"},
        {"SPATIALSCORE_TIMEOUT": "-1"},
        {"SPATIALSCORE_PRIORITY": "high"},
    ):
        with pytest.raises(sc.ConfigurationError, match=next(iter(wrong))):
            from_environment({"SPATIALSCORE_TARGET": "a:1", **wrong})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"target": None}, "target is None; give host:port"),
        ({"target": 7}, "target is 7"),
        ({"target": ["a:1", None]}, "target is None"),
        ({"target": []}, "target is empty"),
        ({"target": "a:1,b:2"}, "'a:1,b:2' is not a target"),
        ({"target": "ipv4:a:1,b:2"}, "'a' is no address; leave ipv4: away"),
        ({"timeout": None}, "timeout is None; it must be a positive number of seconds"),
        ({"timeout": "30"}, "timeout is '30'"),
        ({"timeout": True}, "timeout is True"),
        ({"token": "secret\n"}, "ends in a blank or a newline"),
        ({"token": "two words"}, "visible ASCII"),
        ({"token": ""}, "the token is empty"),
        ({"token": b"secret"}, "token is a bytes"),
        ({"tls": "ca.pem"}, "tls is 'ca.pem'"),
        ({"tls": sc.TLS(ca="/no/such/ca.pem")}, "/no/such/ca.pem cannot be used: No such file"),
        ({"tls": sc.TLS(ca=__file__.replace("connections", "stream"))}, "holds no certificate in PEM form"),
        ({"tls": sc.TLS(ca=b"nonsense")}, "holds no certificate"),
        ({"tls": sc.TLS(cert=b"-----BEGIN CERTIFICATE-----")}, "needs its key"),
        ({"max_in_flight": "4"}, "max_in_flight is '4'"),
        ({"stream_window": 1.5}, "stream_window is 1.5"),
    ],
)
def test_what_makes_no_sense_is_said_and_is_nobodys_fault_but_the_callers(arguments: Any, words: str) -> None:
    for kind in (sc.SpatialScoreClient, sc.AsyncSpatialScoreClient):
        with pytest.raises(sc.ConfigurationError, match=re.escape(words)):
            kind(**{"target": "localhost:1", **arguments})


def test_a_token_that_goes_wrong_later_is_no_servers_fault(connect: Any, fake: Fake, tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("secret")
    client = connect(fake.address, token=TokenFile(str(file)))
    assert len(client.score("prompt", numbered(1))) == 1
    file.unlink()
    with pytest.raises(sc.ConfigurationError, match="token: cannot be read: .*No such file"):
        client.score("prompt", numbered(1))
    with pytest.raises(sc.ConfigurationError, match="a newline"):
        connect(fake.address, token=lambda: "secret\n").score("prompt", numbered(1))
    with pytest.raises(sc.ConfigurationError, match="timeout is 'soon'"):
        client.score("prompt", numbered(1), timeout="soon")


def test_a_certificate_that_is_its_own_authority(connect: Any, tmp_path: Path) -> None:
    """As the README's two lines make it, and as openssl makes it without the second of them."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("there is no openssl")
    for more in (["-addext", "basicConstraints=critical,CA:FALSE"], []):
        command = [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=scorer"]
        command += ["-keyout", "key.pem", "-out", "cert.pem", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
        subprocess.run([*command, *more], cwd=tmp_path, check=True, capture_output=True)
        cert = (tmp_path / "cert.pem").read_bytes()
        pair = ((tmp_path / "key.pem").read_bytes(), cert)
        with Fake(credentials=grpc.ssl_server_credentials([pair])) as server:
            for target in (server.address, f"localhost:{server.port}"):
                assert len(connect(target, tls=sc.TLS(ca=tmp_path / "cert.pem")).score("prompt", numbered(1))) == 1
