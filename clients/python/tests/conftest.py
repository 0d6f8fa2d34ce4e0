"""What the tests share: both clients behind one face, a fake server, and the real one where it runs."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake import Fake, picture

from spatialscore_client import (
    AsyncSpatialScoreClient,
    Explanation,
    ModelInfo,
    Scores,
    SpatialScoreClient,
    StreamedScore,
)

ROOT = Path(__file__).resolve().parents[3]


class Sync:
    """The client with threads."""

    def __init__(self, target: Any, **options: Any) -> None:
        self.client = SpatialScoreClient(target, **options)

    def score(self, *arguments: Any, **options: Any) -> Scores:
        return self.client.score(*arguments, **options)

    def stream(self, items: Iterable[Any], **options: Any) -> list[StreamedScore]:
        return list(self.client.score_stream(items, **options))

    def model(self, **options: Any) -> ModelInfo:
        return self.client.model(**options)

    def explain(self, *arguments: Any, **options: Any) -> Explanation:
        return self.client.explain(*arguments, **options)

    def close(self) -> None:
        self.client.close()


class Async:
    """The asyncio client, in a loop of its own."""

    def __init__(self, target: Any, **options: Any) -> None:
        self.loop = asyncio.new_event_loop()
        self.client = AsyncSpatialScoreClient(target, **options)

    def score(self, *arguments: Any, **options: Any) -> Scores:
        return self.loop.run_until_complete(self.client.score(*arguments, **options))

    def stream(self, items: Iterable[Any], **options: Any) -> list[StreamedScore]:
        async def collect() -> list[StreamedScore]:
            return [result async for result in self.client.score_stream(items, **options)]

        return self.loop.run_until_complete(collect())

    def model(self, **options: Any) -> ModelInfo:
        return self.loop.run_until_complete(self.client.model(**options))

    def explain(self, *arguments: Any, **options: Any) -> Explanation:
        return self.loop.run_until_complete(self.client.explain(*arguments, **options))

    def close(self) -> None:
        self.loop.run_until_complete(self.client.close())
        self.loop.close()


@pytest.fixture(params=[Sync, Async])
def connect(request: Any) -> Iterator[Any]:
    """Makes a client of either kind, and closes it behind the test."""
    made: list[Any] = []

    def make(target: Any, **options: Any) -> Any:
        client = request.param(target, **{"timeout": 10.0, **options})
        made.append(client)
        return client

    yield make
    for client in made:
        client.close()


@pytest.fixture
def fake() -> Iterator[Fake]:
    with Fake() as server:
        yield server


@pytest.fixture
def address() -> str:
    """A real server's address: `make client-test` starts one."""
    if "SPATIALSCORE_ADDRESS" not in os.environ:
        pytest.skip("no real server; run this by scripts/with_server.sh, as `make client-test` does")
    return os.environ["SPATIALSCORE_ADDRESS"]


@pytest.fixture(scope="session")
def two_models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a real server of two rewards that people download, on fixtures that the reference has scored."""
    if "SPATIALSCORE_BINARY" not in os.environ:
        pytest.skip("SPATIALSCORE_BINARY names no binary; `make client-test` does")
    fixtures = ROOT / "tests/fixtures/profiles"
    hpsv3 = json.loads((ROOT / "src/model/profile/shipped/hpsv3.json").read_text())
    hpsv3["base"] = str(fixtures / "bases/qwen2_vl")
    file = tmp_path_factory.mktemp("profile") / "hpsv3.json"
    file.write_text(json.dumps(hpsv3))
    models = [
        f"--model=hpsv3={fixtures}/hpsv3,profile={file}",
        f"--model=vqascore={fixtures}/bases/qwen2_vl,profile=vqascore",
    ]
    rest = ["--listen=127.0.0.1:0", "--metrics-listen=", "--log-format=json", "--device=cpu", "--threads=1"]
    command = [os.environ["SPATIALSCORE_BINARY"], "serve", *rest, *models]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        lines: list[str] = []
        while not lines or '"message":"serving"' not in lines[-1]:
            lines.append(process.stderr.readline())
            assert lines[-1], "".join(lines)
        # The log must go somewhere, or the server would wait for it.
        threading.Thread(target=process.stderr.read, daemon=True).start()
        yield re.findall(r'"address":"([^"]+)"', "".join(lines))[0]
        process.terminate()


def numbered(count: int, side: int = 4) -> list[Any]:
    """Arrays whose scores on the fake server are their places."""
    return [np.frombuffer(picture(number, side), np.uint8).reshape(side, side, 3) for number in range(count)]
