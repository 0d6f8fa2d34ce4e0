"""Against real servers: the one that `make client-test` keeps running, and some of the tests' own."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from test_connections import certificates

import spatialscore_client as sc
from spatialscore_client.cli import main

SAMPLES = [json.loads(line) for line in (ROOT / "samples/manifest.jsonl").read_text().splitlines()]
PROMPTS = [sample["prompt"] for sample in SAMPLES]
FILES = [ROOT / "samples" / sample["image"] for sample in SAMPLES]
SIDE = 128
__all__ = ["certificates"]


class Server:
    """A server of the test's own."""

    def __init__(self, listen: str = "127.0.0.1:0", **settings: object) -> None:
        if "SPATIALSCORE_BINARY" not in os.environ:
            pytest.skip("SPATIALSCORE_BINARY names no binary; `make client-test` does")
        sets = [word for name, value in settings.items() for word in ("--set", f"{name.replace('__', '.')}={value}")]
        addresses = ["--listen", listen, "--metrics-listen", ""]
        command = [
            os.environ["SPATIALSCORE_BINARY"],
            "serve",
            *addresses,
            "--log-format",
            "json",
            "--threads",
            "1",
            *sets,
        ]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        lines = []
        for line in self.process.stderr:
            lines.append(line)
            if found := re.search(r'"address":"([^"]+)"', line):
                self.address = found[1]
            if found := re.search(r'"http":"([^"]+)"', line):
                self.http = found[1]
            if '"message":"serving"' in line:
                break
        else:
            raise RuntimeError("".join(lines))
        # The log must go somewhere, or the server would wait for it.
        self._drain = threading.Thread(target=self.process.stderr.read, daemon=True)
        self._drain.start()

    def stop(self, how: signal.Signals = signal.SIGTERM) -> None:
        self.process.send_signal(how)
        self.process.wait(120)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.stop(signal.SIGKILL)


@pytest.fixture(scope="module")
def table() -> Iterator[list[sc.Score]]:
    """The scores of the samples, each asked for alone."""
    if "SPATIALSCORE_ADDRESS" not in os.environ:
        pytest.skip("no real server")
    with sc.SpatialScoreClient(os.environ["SPATIALSCORE_ADDRESS"]) as client:
        yield [client.score(prompt, [file])[0] for prompt, file in zip(PROMPTS, FILES, strict=True)]


def close(scores: Any, table: list[sc.Score]) -> bool:
    return [score.mean for score in scores] == [pytest.approx(score.mean, abs=1e-4) for score in table]


def test_every_form_of_a_picture_has_the_same_score(connect: Any, address: str, table: list[sc.Score]) -> None:
    client = connect(address, timeout=300)
    prompts, files, table = PROMPTS[:4], FILES[:4], table[:4]
    opened = [Image.open(file).convert("RGB") for file in files]
    arrays = [np.asarray(picture) for picture in opened]
    for form in (files, [file.read_bytes() for file in files], opened, arrays):
        assert close(client.score(prompts, form), table)
    assert close(connect(address, timeout=300, codec="png").score(prompts, arrays), table)
    streamed = client.stream(zip(prompts, arrays, strict=True))
    assert close([result.score for result in sorted(streamed, key=lambda result: result.index)], table)


def test_a_tensor_has_the_same_score(connect: Any, address: str, table: list[sc.Score]) -> None:
    torch = pytest.importorskip("torch")
    arrays = [np.asarray(Image.open(file).convert("RGB")) for file in FILES[:4]]
    tensors = [torch.from_numpy(array.copy()).permute(2, 0, 1).float() / 255 for array in arrays]
    assert close(connect(address, timeout=300).score(PROMPTS[:4], tensors), table[:4])


def test_the_right_picture_is_above_its_twin(table: list[sc.Score]) -> None:
    means = {file.name: score.mean for file, score in zip(FILES, table, strict=True)}
    for name in {file.name.split(".")[0] for file in FILES}:
        assert means[f"{name}.right.png"] > means[f"{name}.twin.png"]


def test_what_the_server_refuses_is_named(connect: Any, address: str) -> None:
    client = connect(address, timeout=300)
    half = FILES[0].read_bytes()[:200]
    with pytest.raises(sc.ItemsFailedError) as caught:
        client.score("a cup", [FILES[0], b"no picture", half, FILES[1]])
    assert [(failure.index, failure.code) for failure in caught.value.failures] == [
        (1, "INVALID_ARGUMENT"),
        (2, "INVALID_ARGUMENT"),
    ]
    assert [score is None for score in caught.value.scores] == [False, True, True, False]


def test_check_finds_nothing_wrong(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", address]) == 0
    assert "model: spatialscore-mini" in capsys.readouterr().out


def test_load_from_several_processes(address: str) -> None:
    """The short form of benchmarks/load.py: every answer is held against a table of known scores."""
    script = Path(__file__).parent.parent / "benchmarks/load.py"
    command = [sys.executable, str(script), "--target", address, "--processes", "3", "--seconds", "3"]
    command += ["--pictures", "6", "--largest", "8"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    report = json.loads(ended.stdout)
    assert report["items"] >= report["calls"] > 0 and report["indistinguishable"] == 0


def small(number: int) -> Any:
    """A picture whose first byte is its number, as a file."""
    file = io.BytesIO()
    pixels = np.full((SIDE, SIDE, 3), 255, np.uint8)
    pixels[number * 8 : number * 8 + 20, 30:60] = (200, 0, 0)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def secured(certificates: Path, tmp_path: Path) -> Iterator[Server]:
    """A server with TLS that asks for a token."""
    binary = os.environ.get("SPATIALSCORE_BINARY", "")
    known = binary and subprocess.run([binary, "serve", "--print-settings"], capture_output=True, text=True).stdout
    if not known or "[tls]" not in known:
        pytest.skip("this server has no TLS")
    tokens = tmp_path / "tokens"
    tokens.write_text("trainer:secret-of-more-than-sixteen-letters\n")
    tokens.chmod(0o600)
    files = {"tls__certificate": certificates / "server.pem", "tls__key": certificates / "server.key"}
    with Server(auth__tokens_file=tokens, **files) as server:
        yield server


def test_tls_and_tokens(
    connect: Any, secured: Server, certificates: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ca, token = certificates / "authority.pem", "secret-of-more-than-sixteen-letters"
    client = connect(secured.address, tls=sc.TLS(ca=ca), token=token, timeout=300)
    assert len(client.score("a cup", FILES[:2])) == 2
    assert len(client.stream([("a cup", FILES[0])])) == 1
    for wrong in (None, "another"):
        with pytest.raises(sc.AuthenticationError):
            connect(secured.address, tls=sc.TLS(ca=ca), token=wrong).score("a cup", FILES[:2])
    for tls in (sc.TLS(ca=certificates / "stranger.pem"), None):
        with pytest.raises(sc.UnavailableError):
            connect(secured.address, tls=tls, token=token).score("a cup", FILES[:2], timeout=2)
    assert main(["check", "--ca", str(ca), secured.address]) == 1
    assert "token: the server wants one" in capsys.readouterr().out
    assert main(["check", secured.address]) == 1
    assert "the server asks for TLS" in capsys.readouterr().out


def test_a_full_queue_costs_time_and_no_answer() -> None:
    settings = {"queue__max_items": 4, "batch__max_items": 2, "limits__max_items_per_request": 4}
    with Server(**settings) as server, sc.SpatialScoreClient(server.address, timeout=300, max_in_flight=2) as client:
        pictures = [small(number) for number in range(6)]
        alone = [client.score("a red box above a blue box", [picture])[0] for picture in pictures]
        with ThreadPoolExecutor(4) as pool:
            rounds = list(pool.map(lambda _: client.score("a red box above a blue box", pictures), range(4)))
        for scores in rounds:
            assert close(scores, alone)


def test_a_server_that_is_replaced_under_load_costs_no_answer(connect: Any) -> None:
    pictures = [small(number) for number in range(6)]
    with Server() as first:
        client = connect(first.address, timeout=300, stream_window=4)
        table = list(client.score("a red box above a blue box", pictures))
        listen = first.address
        second: list[Server] = []

        def replace() -> None:
            first.stop()
            second.append(Server(listen))

        replacing = threading.Thread(target=replace)
        rounds = 0
        try:
            while rounds < 6 or replacing.is_alive():
                if rounds == 2:
                    replacing.start()
                if rounds % 2:
                    scores = client.score("a red box above a blue box", pictures)
                else:
                    results = client.stream([("a red box above a blue box", picture) for picture in pictures])
                    scores = [result.score for result in sorted(results, key=lambda result: result.index)]
                assert close(scores, table)
                rounds += 1
                time.sleep(0.02)
            replacing.join()
        finally:
            for server in second:
                server.stop()


def test_a_server_that_hangs_among_three_costs_no_answer_and_little_time(connect: Any) -> None:
    pictures = [small(number % 14) for number in range(24)]
    prompts = [f"a red box above a blue box, {number // 14}" for number in range(24)]
    with Server() as one, Server() as other, Server() as third:
        client = connect([one.address, other.address, third.address], timeout=20)
        table = list(client.score(prompts, pictures, timeout=300))
        for _ in range(3):
            assert close(client.score(prompts, pictures, timeout=300), table)
        other.process.send_signal(signal.SIGSTOP)
        try:
            for turn in range(6):
                start = time.monotonic()
                if turn % 2:
                    scores = list(client.score(prompts, pictures))
                else:
                    results = client.stream(zip(prompts, pictures, strict=True))
                    scores = [result.score for result in sorted(results, key=lambda result: result.index)]
                assert close(scores, table) and time.monotonic() - start < 12
        finally:
            other.process.send_signal(signal.SIGCONT)


def test_check_at_the_http_port(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text("trainer:secret-of-more-than-sixteen-letters\n")
    with Server(http__listen="127.0.0.1:0", auth__tokens_file=tokens) as server:
        assert main(["check", server.http]) == 1
        assert "http://SUBJECT:TOKEN@HOST:PORT" in capsys.readouterr().out
        assert main(["check", "--token-file", str(tokens), server.http]) == 0
        url = server.http.replace("http://", "http://trainer:secret-of-more-than-sixteen-letters@")
        assert main(["check", url]) == 0
        text = capsys.readouterr().out
        assert "answers with spatialscore" in text and "over HTTP" in text and "secret" not in text
