"""`spatialscore-client check` says what is wrong, each time something else."""

from __future__ import annotations

import base64
import http.server
import io
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from fake import Fake
from PIL import Image
from test_connections import certificates, free_port, server_credentials

from spatialscore_client.cli import main

__all__ = ["certificates"]


def lines(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    status = main(["check", "--timeout", "5", *arguments])
    return status, capsys.readouterr().out


def test_all_is_well(capsys: pytest.CaptureFixture[str], fake: Fake, tmp_path: Path) -> None:
    status, text = lines(capsys, fake.address)
    assert status == 0, text
    for part in (
        "name:",
        "port:",
        "TLS: not used",
        "model: fake",
        "revision: r1",
        "limits: 256 items",
        "round trip:",
    ):
        assert part in text
    assert "FAIL" not in text and "network and the rest" in text


def test_the_name(capsys: pytest.CaptureFixture[str]) -> None:
    status, text = lines(capsys, "no-such-host.invalid:1")
    assert status == 1 and "FAIL  name: 'no-such-host.invalid' does not resolve" in text


def test_the_port(capsys: pytest.CaptureFixture[str]) -> None:
    status, text = lines(capsys, f"127.0.0.1:{free_port()}")
    assert status == 1 and "nothing listens there" in text


def test_a_port_that_swallows(capsys: pytest.CaptureFixture[str]) -> None:
    """Full of connections that nobody takes: what a firewall that drops looks like."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        where = listener.getsockname()
        waiting = [socket.socket() for _ in range(4)]
        for each in waiting:
            each.setblocking(False)
            each.connect_ex(where)
        status = main(["check", "--timeout", "0.5", f"127.0.0.1:{where[1]}"])
        for each in waiting:
            each.close()
    assert status == 1 and "did not answer within 0.5 s" in capsys.readouterr().out


def test_tls(capsys: pytest.CaptureFixture[str], certificates: Path) -> None:
    ca, stranger = str(certificates / "authority.pem"), str(certificates / "stranger.pem")
    with Fake(credentials=server_credentials(certificates)) as server:
        status, text = lines(capsys, "--ca", ca, server.address)
        assert status == 0 and "certificate for 127.0.0.1 until" in text, text
        status, text = lines(capsys, server.address)
        assert status == 1 and "the server asks for TLS" in text
        status, text = lines(capsys, "--ca", stranger, server.address)
        assert status == 1 and "not trusted for '127.0.0.1'" in text
        status, text = lines(capsys, "--ca", ca, "--server-name", "other.example", server.address)
        assert status == 1 and "not trusted for 'other.example'" in text and "mismatch" in text.lower()
        status, text = lines(capsys, "--ca", str(certificates / "absent.pem"), server.address)
        assert status == 1 and "cannot be used" in text


def test_tls_where_there_is_none(capsys: pytest.CaptureFixture[str], fake: Fake) -> None:
    status, text = lines(capsys, "--tls", fake.address)
    assert status == 1 and "does not speak TLS" in text


def test_the_token(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("secret\n")
    with Fake(token="secret") as server:
        status, text = lines(capsys, server.address)
        assert status == 1 and "FAIL  token: the server wants one" in text
        status, text = lines(capsys, "--token-file", str(file), server.address)
        assert status == 0 and "takes the token" in text
        status, text = lines(capsys, "--token-file", str(tmp_path / "absent"), server.address)
        assert status == 1 and "token: cannot be read" in text


@pytest.fixture
def web_server() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


def test_something_else_listens(capsys: pytest.CaptureFixture[str], web_server: str) -> None:
    status, text = lines(capsys, web_server)
    assert status == 1 and "does not speak gRPC" in text
    other = grpc.server(ThreadPoolExecutor(1))
    port = other.add_insecure_port("127.0.0.1:0")
    other.start()
    status, text = lines(capsys, f"127.0.0.1:{port}")
    other.stop(None)
    assert status == 1 and "something else than SpatialScore" in text


def test_what_the_environment_says(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, certificates: Path
) -> None:
    (tmp_path / "token").write_text("trainer:secret\n")
    with Fake(token="secret", credentials=server_credentials(certificates)) as server:
        monkeypatch.setenv("SPATIALSCORE_TARGET", f"{server.address},127.0.0.1:{free_port()}")
        monkeypatch.setenv("SPATIALSCORE_TOKEN_FILE", str(tmp_path / "token"))
        monkeypatch.setenv("SPATIALSCORE_CA", str(certificates / "authority.pem"))
        status, text = lines(capsys)
        assert status == 1 and "takes the token" in text and "nothing listens there" in text
        status, text = lines(capsys, server.address)
        assert status == 0 and "certificate for 127.0.0.1 until" in text
    monkeypatch.delenv("SPATIALSCORE_TARGET")
    with pytest.raises(SystemExit):
        main(["check"])


class HttpPort(http.server.BaseHTTPRequestHandler):
    """The server's HTTP port, as far as `check` asks it."""

    authorization = ""
    rewards = ("spatialscore",)
    answer: tuple[int, dict[str, Any]] = (200, {"rewards": [0.5]})

    def do_GET(self) -> None:
        self.say(200 if self.rewards else 503, {"rewards": dict.fromkeys(self.rewards, ["ready"])})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        picture = Image.open(io.BytesIO(base64.b64decode(body["image"][0])))
        assert picture.getpixel((111, 111)) == (128, 128, 128) and body["prompt"] == ["a grey wall"]
        known = self.headers["authorization"] == self.authorization or not self.authorization
        self.say(*(self.answer if known else (401, {"detail": "this server asks for a token"})))

    def say(self, status: int, answer: dict[str, Any]) -> None:
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def test_the_http_port(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), HttpPort) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        where = f"127.0.0.1:{server.server_port}"
        status, text = lines(capsys, f"http://{where}")
        assert status == 0 and "answers with spatialscore" in text and "scored in" in text, text
        credentials = base64.b64encode(b"trainer:secret").decode()
        monkeypatch.setattr(HttpPort, "authorization", f"Basic {credentials}")
        status, text = lines(capsys, f"http://{where}")
        assert status == 1 and "http://SUBJECT:TOKEN@HOST:PORT" in text
        status, text = lines(capsys, f"http://trainer:secret@{where}")
        assert status == 0 and "secret" not in text
        monkeypatch.setattr(HttpPort, "answer", (200, {"error": "1 of 1 pictures have no score"}))
        status, text = lines(capsys, f"http://trainer:secret@{where}")
        assert status == 1 and "FAIL  round trip: a grey picture was not scored: 1 of 1" in text
        monkeypatch.setattr(HttpPort, "rewards", ())
        status, text = lines(capsys, f"http://{where}")
        assert status == 1 and "loading its model or stopping" in text
        server.shutdown()


def test_a_grpc_port_by_its_url(capsys: pytest.CaptureFixture[str], fake: Fake) -> None:
    status, text = lines(capsys, f"http://{fake.address}")
    assert status == 0 and "gRPC: a SpatialScore server" in text


def test_the_round_trip(capsys: pytest.CaptureFixture[str], fake: Fake) -> None:
    def nothing(response: Any) -> None:
        response.results[0].ClearField("score")

    fake.spoil = nothing
    status, text = lines(capsys, fake.address)
    assert status == 1 and "FAIL  round trip" in text
    fake.faults = [("RESOURCE_EXHAUSTED", 1.0)]
    status, text = lines(capsys, fake.address)
    assert status == 1 and "its queue is full" in text


def test_the_command_is_installed(fake: Fake) -> None:
    command = Path(sys.executable).with_name("spatialscore-client")
    ended = subprocess.run([command, "check", fake.address], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0 and "round trip" in ended.stdout
    for wrong in (["check"], ["check", "host:port"], ["unknown"]):
        assert subprocess.run([command, *wrong], capture_output=True, timeout=60).returncode == 2
