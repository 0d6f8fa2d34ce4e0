"""The balancers' configurations in deploy/, in the balancers themselves: three replicas, one killed, one drained."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import ROOT
from test_server import FILES, PROMPTS, Server

from spatialscore_client import SpatialScoreClient

REPLICAS = 3
CALLERS = 6
# What the remote clients of UniRL and Flow-Factory take in the client's README, and UniRL's pause between two.
ATTEMPTS, PAUSE = 30, 1.0


def program(name: str) -> tuple[Path, dict[str, str]]:
    """A balancer and its environment; `make client-test` puts both in reach where Debian's packages can be had."""
    folder = Path(os.environ.get("SPATIALSCORE_BALANCERS", "/nowhere"))
    binary = folder / "usr/sbin" / name
    if not binary.exists():
        pytest.skip("SPATIALSCORE_BALANCERS has no balancers; `make client-test` fetches them where Debian has them")
    return binary, {**os.environ, "LD_LIBRARY_PATH": str(next(folder.glob("usr/lib/*-linux-gnu")))}


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


class Balancer:
    """A balancer with the shipped configuration, of which nothing but addresses is changed."""

    def __init__(self, name: str, replicas: list[Server], folder: Path) -> None:
        binary, environment = program(name)
        self.grpc, self.http = (f"127.0.0.1:{free_port()}" for _ in range(2))
        file = next((ROOT / "deploy").glob(f"{name}.c*f*"))
        text = file.read_text()
        for number, replica in enumerate(replicas):
            (host, port), http = replica.address.rsplit(":", 1), replica.http.rpartition(":")[2]
            text = re.sub(rf"gpu-{number}:50051(.*) port 8080", rf"{host}:{port}\1 port {http}", text)
            text = text.replace(f"gpu-{number}:50051", f"{host}:{port}").replace(
                f"gpu-{number}:8080", f"{host}:{http}"
            )
        for word, port, address in (("bind :", 50051, self.grpc), ("bind :", 8080, self.http),
                                    ("listen ", 50051, self.grpc), ("listen ", 8080, self.http)):  # fmt: skip
            text = text.replace(f"{word}{port}", f"{word.rstrip(':')}{address}")
        (folder / file.name).write_text(text)
        if name == "nginx":
            # Its folders of the system, of which it has none here.
            extra = "".join(f"    {kind}_temp_path {folder / kind};\n" for kind in
                            ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))  # fmt: skip
            text = text.replace("http {\n", f"http {{\n    access_log off;\n{extra}", 1)
            (folder / file.name).write_text(f"pid {folder / 'pid'};\nerror_log stderr;\ndaemon off;\n{text}")
            command = [str(binary), "-e", "stderr", "-p", str(folder), "-c", str(folder / file.name)]
        else:
            command = [str(binary), "-db", "-f", str(folder / file.name)]
        self.log = (folder / "log").open("w+")
        self.process = subprocess.Popen(command, env=environment, stderr=self.log, stdout=self.log)
        until = time.monotonic() + 30
        while not self.serves():
            assert time.monotonic() < until and self.process.poll() is None, (folder / "log").read_text()
            time.sleep(0.1)

    def serves(self) -> bool:
        try:
            return urllib.request.urlopen(f"http://{self.http}/health", timeout=5).status == 200
        except OSError:
            return False

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(30)
        self.log.close()


def scored_over_grpc(balancer: Balancer, stop: threading.Event, calls: list[int]) -> list[list[float]]:
    answers = []
    with SpatialScoreClient(balancer.grpc, timeout=120) as client:
        while not stop.is_set():
            answers.append(list(client.score(PROMPTS, FILES).means))
            calls.append(1)
    return answers


def scored_over_http(balancer: Balancer, stop: threading.Event, calls: list[int]) -> list[list[float]]:
    """As UniRL's remote client asks."""
    items = [
        {
            "history": [{"text": prompt, "image_b64": base64.b64encode(file.read_bytes()).decode()}],
            "required_rewards": ["spatialscore"],
        }
        for prompt, file in zip(PROMPTS, FILES, strict=True)
    ]
    body = json.dumps({"requests": items}).encode()
    answers = []
    while not stop.is_set():
        request = urllib.request.Request(f"http://{balancer.http}/score", body, {"content-type": "application/json"})
        for attempt in range(ATTEMPTS):
            try:
                with urllib.request.urlopen(request, timeout=120) as response:
                    results = json.load(response)["results"]
                break
            except (OSError, urllib.error.HTTPError):
                if attempt + 1 == ATTEMPTS:
                    raise
                time.sleep(PAUSE)
        answers.append([result["spatialscore"]["spatialscore"] for result in results])
        calls.append(1)
    return answers


@pytest.fixture
def replicas() -> Iterator[list[Server]]:
    program("nginx")
    settings = {"http__listen": "127.0.0.1:0", "server__drain_grace_seconds": 5, "cache__max_items": 0}
    started: list[Server] = []
    try:
        for _ in range(REPLICAS):
            started.append(Server(**settings))
        yield started
    finally:
        for server in started:
            server.__exit__()


@pytest.mark.parametrize("balancer", ["haproxy", "nginx"])
@pytest.mark.parametrize("score", [scored_over_grpc, scored_over_http])
def test_one_killed_and_one_drained_cost_no_answer(
    balancer: str, score: Callable[..., list[list[float]]], replicas: list[Server], tmp_path: Path
) -> None:
    with SpatialScoreClient(replicas[0].address) as client:
        right = [pytest.approx(mean, abs=1e-4) for mean in client.score(PROMPTS, FILES).means]
    front = Balancer(balancer, replicas, tmp_path)
    stop = threading.Event()
    calls: list[int] = []

    def more(count: int) -> None:
        until, wanted = time.monotonic() + 120, len(calls) + count
        while len(calls) < wanted:
            assert time.monotonic() < until
            time.sleep(0.05)

    try:
        with ThreadPoolExecutor(CALLERS) as pool:
            running = [pool.submit(score, front, stop, calls) for _ in range(CALLERS)]
            try:
                more(2 * CALLERS)
                replicas[0].stop(signal.SIGKILL)
                more(2 * CALLERS)
                replicas[1].stop(signal.SIGTERM)
                more(2 * CALLERS)
            finally:
                stop.set()
            answers = [answer for caller in running for answer in caller.result()]
        # What it had accepted is answered, and then it ends by itself.
        assert replicas[1].process.returncode == 0
        assert len(answers) == len(calls) >= 6 * CALLERS
        assert all(answer == right for answer in answers)
    finally:
        front.stop()
