"""What the client tells its log: why it waits, once, then at growing intervals."""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

import pytest
from conftest import numbered
from fake import Fake
from test_connections import free_port

import spatialscore_client as sc
from spatialscore_client.notices import Notices


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Any:
    caplog.set_level(logging.INFO, "spatialscore_client")
    return lambda: [record.getMessage() for record in caplog.records if record.name == "spatialscore_client"]


def test_nothing_is_said_where_all_is_well(connect: Any, fake: Fake, said: Any) -> None:
    client = connect(fake.address)
    client.score("prompt", numbered(5))
    client.stream([("prompt", each) for each in numbered(5)])
    assert said() == []


def test_a_stream_that_ends_while_its_last_score_is_looked_at_ends_well(fake: Fake, said: Any) -> None:
    with sc.SpatialScoreClient(fake.address, timeout=10) as client:
        for _ in client.score_stream([("prompt", each) for each in numbered(3)]):
            time.sleep(0.3)
    assert said() == []


def test_a_wait_is_said_once_with_target_reason_and_time(connect: Any, fake: Fake, said: Any) -> None:
    client = connect(fake.address)
    client.model()
    fake.faults = [("RESOURCE_EXHAUSTED", 0.05)] * 5
    client.score("prompt", numbered(2))
    waits, back = said()
    for part in (fake.address, "RESOURCE_EXHAUSTED", "on purpose", "trying again in 0.", "10 s are left"):
        assert part in waits, waits
    assert back.endswith("answers again")


def test_a_server_that_is_gone_is_said(connect: Any, said: Any) -> None:
    with Fake() as alive:
        gone = f"127.0.0.1:{free_port()}"
        client = connect([gone, alive.address])
        for _ in range(10):
            client.score("prompt", numbered(1))
    lines = [line for line in said() if gone in line]
    assert len(lines) == 1 and "UNAVAILABLE" in lines[0] and alive.address in lines[0], lines


def test_a_stream_says_it_too(connect: Any, fake: Fake, said: Any) -> None:
    client = connect(fake.address)
    client.model()
    fake.faults = [("BREAK", None)]
    client.stream([("prompt", each) for each in numbered(5)])
    assert any("the stream broke" in line for line in said())


def test_a_long_wait_is_said_though_nothing_is_wrong(
    connect: Any, said: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spatialscore_client.endpoints._PATIENCE_WITH_THE_ONLY", 0.2)
    with Fake(delay=2.5) as server:
        connect(server.address).score("prompt", numbered(1))
        (line,) = [line for line in said() if "waiting for" in line]
        assert server.address in line and "s are left" in line


def test_intervals_grow(said: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    notices, times = Notices(), []
    for second in range(200):
        now = 1000.0 + second
        before = len(said())
        notices.say("matter", "text")
        if len(said()) > before:
            times.append(second)
    assert times == [0, 5, 15, 35, 75, 155]
    notices.over("matter", "it is over")
    notices.over("matter", "it is over")
    assert said()[-1] == "it is over" and said().count("it is over") == 1
    notices.say("matter", "text")
    assert said()[-1] == "text"


def test_a_group_of_equal_scores_is_a_warning_once(connect: Any, fake: Fake, said: Any) -> None:
    client = connect(fake.address)
    one, other = numbered(2)
    client.score(["a", "b"], [one, one])
    client.score("a", [one])
    client.score("a", [one, other])
    assert said() == []
    for _ in range(3):
        client.score(["a", "b", "a", "b"], [one, one, one, other])
    (line,) = said()
    assert "all 2 pictures of one prompt have the score 0.001" in line


def test_many_calls_of_one_client_say_it_once(fake: Fake, said: Any) -> None:
    with sc.SpatialScoreClient(fake.address, timeout=10) as client:
        client.model()
        fake.faults = [("UNAVAILABLE", None)] * 8
        threads = [threading.Thread(target=client.score, args=("prompt", numbered(1))) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len([line for line in said() if "UNAVAILABLE" in line]) <= 2
