"""`explain`, against a real server; and what it makes of one that is none, or breaks off."""

from __future__ import annotations

import asyncio
import http.server
import io
import json
import os
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_connections import certificates, free_port

import spatialscore_client as sc
from spatialscore_client.images import png

__all__ = ["certificates"]

ROOT = Path(__file__).resolve().parents[3]
SAMPLE = ROOT / "samples/banana.right.png"
PROMPT = "Above a tree there is a banana. The tree stands along the bottom edge."
TOKEN = "looker-0123456789abcdef"


@contextmanager
def serving(*options: str) -> Iterator[tuple[str, str]]:
    """A real server of a small model: its gRPC address, and the URL of its HTTP port."""
    if "SPATIALSCORE_BINARY" not in os.environ:
        pytest.skip("SPATIALSCORE_BINARY names no binary; `make client-test` does")
    rest = ["--listen=127.0.0.1:0", "--http=127.0.0.1:0", "--metrics-listen=", "--log-format=json", "--device=cpu"]
    command = [os.environ["SPATIALSCORE_BINARY"], "serve", *rest, *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        log = ""
        while '"message":"serving"' not in log:
            line = process.stderr.readline()
            assert line, log
            log += line
        threading.Thread(target=process.stderr.read, daemon=True).start()
        (address,), (url,) = (re.findall(rf'"{name}":"([^"]+)"', log)[:1] for name in ("address", "http"))
        try:
            yield address, url
        finally:
            process.terminate()


@pytest.fixture(scope="module")
def real() -> Iterator[tuple[str, str]]:
    models = [
        f"--model={name}={ROOT}/tests/fixtures/{case}/checkpoint" for name, case in (("a", "flat"), ("b", "mlp"))
    ]
    with serving(*models) as addresses:
        yield addresses


def test_an_explanation_is_made_of_scores(connect: Any, real: tuple[str, str]) -> None:
    client = connect(real[0], timeout=60)
    why = client.explain(PROMPT, SAMPLE, http=real[1], cells=6)
    assert (len(why.cells), {len(row) for row in why.cells}) == (2, {2})
    # The same by hand, over gRPC.
    pixels = np.asarray(Image.open(SAMPLE).convert("RGB"))
    height, width, _ = pixels.shape
    corner = pixels.copy()
    corner[: height // 2, width // 2 :] = np.rint(pixels.reshape(-1, 3).mean(0))
    pictures = [pixels, pixels[:, ::-1].copy(), corner]
    whole, mirrored, covered = client.score(PROMPT, pictures, models=["a"])["a"]
    assert why.whole.mean == pytest.approx(whole.mean, abs=1e-4)
    assert why.mirrored.cost == pytest.approx(whole.mean - mirrored.mean, abs=2e-4)
    assert why.map[0][1] == pytest.approx(whole.mean - covered.mean, abs=2e-4)
    assert [each.text for each in why.dropped] == [
        "Above a tree there is a banana",
        "The tree stands along the bottom edge",
    ]
    alone = client.score(why.dropped[1].without, [pixels], models=["a"])["a"][0].mean
    assert why.dropped[1].change.cost == pytest.approx(whole.mean - alone, abs=2e-4)
    assert [(each.before, each.after) for each in why.turned] == [("Above", "Below"), ("bottom", "top")]
    turned = client.score(why.turned[0].prompt, [pixels], models=["a"])["a"][0].mean
    assert why.turned[0].change.score is not None
    assert why.turned[0].change.score.mean == pytest.approx(turned, abs=1e-4)
    assert why.receipt.model == "a" and not any(cell.error for row in why.cells for cell in row)


def test_pixels_are_sent_as_they_are_and_the_map_is_optional(connect: Any, real: tuple[str, str]) -> None:
    client = connect(real[0], timeout=60)
    pixels = np.asarray(Image.open(SAMPLE).convert("RGB"))
    of_file = client.explain(PROMPT, SAMPLE, http=real[1], cells=0, model="b")
    of_pixels = client.explain(PROMPT, pixels, http=real[1] + "/", cells=0, model="b")
    assert of_file == of_pixels and of_file.cells == () and of_file.receipt.model == "b"
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(png(pixels.tobytes(), pixels.shape[1::-1])))), pixels)


def test_what_cannot_be_explained_raises(connect: Any, real: tuple[str, str], tmp_path: Path) -> None:
    client = connect(real[0])

    def explain(prompt: Any = PROMPT, image: Any = SAMPLE, http: Any = real[1], **options: Any) -> Any:
        return client.explain(prompt, image, http=http, **options)

    with pytest.raises(sc.InvalidRequestError, match="more than the 256"):
        explain(cells=257)
    with pytest.raises(sc.InvalidRequestError, match="prompt: is absent"):
        explain("")
    with pytest.raises(sc.InvalidRequestError, match=r"image\.encoded"):
        explain(image=b"no picture")
    with pytest.raises(sc.InvalidRequestError, match="models"):
        explain(model="c")
    with pytest.raises(sc.ItemsFailedError, match="give a path"):
        explain(image=7)
    with pytest.raises(sc.DeadlineExceededError):
        explain(timeout=0.05, cells=256)
    with pytest.raises(sc.UnavailableError):
        explain(http=f"http://127.0.0.1:{free_port()}")
    # The gRPC port is another.
    with pytest.raises(sc.CallError):
        explain(http=f"http://{real[0]}", timeout=5)
    for url in ("127.0.0.1:80", "ftp://a", "http://", "http://a:x", "", None, 7):
        with pytest.raises(sc.ConfigurationError, match="as in http://scorer:8080"):
            explain(http=url)


def test_the_token_and_the_certificates_are_the_clients(connect: Any, certificates: Path, tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text(f"looker:{TOKEN}\n")
    options = [
        f"--checkpoint={ROOT}/tests/fixtures/flat/checkpoint",
        f"--tokens-file={tmp_path}/tokens",
        f"--tls-cert={certificates}/server.pem",
        f"--tls-key={certificates}/server.key",
    ]
    with serving(*options) as (address, url):
        assert url.startswith("https://")
        tls = sc.TLS(ca=certificates / "authority.pem")
        why = connect(address, token=TOKEN, tls=tls, timeout=60).explain(PROMPT, SAMPLE, http=url, cells=0)
        assert why.dropped
        own = url.replace("https://", f"https://looker:{TOKEN}@")
        assert connect(address, tls=tls, timeout=60).explain(PROMPT, SAMPLE, http=own, cells=0) == why
        with pytest.raises(sc.AuthenticationError):
            connect(address, tls=tls).explain(PROMPT, SAMPLE, http=url, cells=0)
        with pytest.raises(sc.UnavailableError, match="CERTIFICATE"):
            connect(address, token=TOKEN, tls=True).explain(PROMPT, SAMPLE, http=url, cells=0)


@contextmanager
def saying(answer: Callable[[Any], None]) -> Iterator[str]:
    """A server that answers each call in its own way."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            answer(self)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()


PLAN = {"kind": "plan", "model": "a", "scores": 2, "rows": 0, "columns": 0}
WHOLE = {"kind": "whole", "mean": 1.0, "cost": 0.0}
MIRRORED = {"kind": "mirrored", "mean": 1.0, "cost": 0.0}
RECEIPT = dict(model="a", revision="r", profile_digest="", dtype="float32", server_version="1")
DONE = {"kind": "done", "receipt": RECEIPT}
GONE = {"kind": "error", "error": {"code": "UNAVAILABLE", "message": "the server is shutting down"}}


def answering(*lines: dict[str, Any]) -> Callable[[Any], None]:
    """An answer of these lines."""

    def answer(handler: Any) -> None:
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write("".join(json.dumps(line) + "\n" for line in lines).encode())

    return answer


EXPLAINED = [
    {**PLAN, "rows": 1, "columns": 1},
    WHOLE,
    MIRRORED,
    {"kind": "dropped", "text": "a banana", "without": "a tree", "mean": 0.5, "cost": 0.5},
    {"kind": "cell", "row": 0, "column": 0, "error": {"code": "INTERNAL", "message": "out of memory"}},
    DONE,
]


def test_what_has_no_score_says_why(connect: Any) -> None:
    with saying(answering(*EXPLAINED)) as url:
        why = connect("127.0.0.1:1").explain(PROMPT, SAMPLE, http=url)
    assert why.cells == ((sc.Change(None, None, "INTERNAL: out of memory"),),) and why.map == [[None]]
    assert why.dropped == (sc.Dropped("a banana", "a tree", sc.Change(sc.Score(0.5, None), 0.5)),)
    assert why.turned == () and why.receipt == sc.Receipt(**RECEIPT)


@pytest.mark.parametrize(
    ("lines", "error", "words"),
    [
        ([PLAN, WHOLE, MIRRORED], sc.UnavailableError, "ended early"),
        ([], sc.UnavailableError, "ended early"),
        ([PLAN, WHOLE, GONE], sc.UnavailableError, "shutting down"),
        ([PLAN, WHOLE, DONE], sc.ServerFaultError, "no explanation"),
        ([PLAN, {**WHOLE, "mean": None}, MIRRORED, DONE], sc.ServerFaultError, "is no number"),
        ([PLAN, {**WHOLE, "mean": float("nan")}, MIRRORED, DONE], sc.ServerFaultError, "is no number"),
        ([{**PLAN, "rows": 1, "columns": 1}, WHOLE, MIRRORED, DONE], sc.ServerFaultError, "no explanation"),
        ([PLAN, WHOLE, MIRRORED, {"kind": "done", "receipt": {}}], sc.ServerFaultError, "no explanation"),
    ],
)
def test_half_an_answer_is_none(connect: Any, lines: list[Any], error: type[Exception], words: str) -> None:
    with saying(answering(*lines)) as url, pytest.raises(error, match=words):
        connect("127.0.0.1:1").explain(PROMPT, SAMPLE, http=url)


def test_no_line_of_text_is_an_explanation_and_a_slow_one_ends(connect: Any) -> None:
    def words(handler: Any) -> None:
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(b"<html>\n")

    with saying(words) as url, pytest.raises(sc.ServerFaultError, match="no explanation"):
        connect("127.0.0.1:1").explain(PROMPT, SAMPLE, http=url)

    def slow(handler: Any) -> None:
        handler.send_response(200)
        handler.end_headers()
        with suppress(OSError):
            for _ in range(200):
                handler.wfile.write(json.dumps(PLAN).encode() + b"\n")
                handler.wfile.flush()
                time.sleep(0.05)

    start = time.monotonic()
    with saying(slow) as url, pytest.raises(sc.DeadlineExceededError, match="0.3 s passed"):
        connect("127.0.0.1:1").explain(PROMPT, SAMPLE, http=url, timeout=0.3)
    assert time.monotonic() - start < 9


def test_who_is_cancelled_ends_its_call() -> None:
    closed = threading.Event()

    asked = threading.Event()

    def forever(handler: Any) -> None:
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(json.dumps(PLAN).encode() + b"\n")
        handler.wfile.flush()
        asked.set()
        # Until the client hangs up.
        handler.connection.settimeout(30)
        if handler.connection.recv(1) == b"":
            closed.set()

    async def explain(url: str) -> None:
        async with sc.AsyncSpatialScoreClient("127.0.0.1:1", timeout=60) as client:
            asking = asyncio.create_task(client.explain(PROMPT, SAMPLE, http=url))
            await asyncio.to_thread(asked.wait, 30)
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking

    with saying(forever) as url:
        asyncio.run(explain(url))
        assert closed.wait(30)
