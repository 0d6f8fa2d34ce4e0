"""Streams: overlap, order by index, what breaks is sent again, what cannot be scored raises."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import Async, Sync, numbered
from fake import Fake

import spatialscore_client as sc


def pairs(count: int) -> list[Any]:
    return [("prompt", picture) for picture in numbered(count)]


def by_index(results: list[sc.StreamedScore]) -> list[float]:
    assert sorted(result.index for result in results) == list(range(len(results)))
    return [result.score.mean for result in sorted(results, key=lambda result: result.index)]


EXPECTED = [pytest.approx(number + 0.006) for number in range(50)]


def test_every_item_is_answered_once_by_its_index(connect: Any, fake: Fake) -> None:
    results = connect(fake.address).stream(pairs(50))
    assert by_index(results) == EXPECTED
    assert [result.index for result in results][:2] == [1, 0]


def test_an_empty_stream_ends(connect: Any, fake: Fake) -> None:
    assert connect(fake.address).stream([]) == []


@pytest.mark.parametrize(
    "fault",
    [
        ("BREAK", None),
        ("UNAVAILABLE", None),
        ("RESOURCE_EXHAUSTED", 0.05),
        # What proxies make of a server that drains, or is gone.
        ("BREAK CANCELLED", None),
        ("BREAK INTERNAL", None),
    ],
)
def test_what_breaks_is_sent_again(connect: Any, fake: Fake, fault: Any) -> None:
    client = connect(fake.address, stream_window=8)
    client.model()
    fake.faults = [*[None] * 7, fault, *[None] * 9, fault]  # type: ignore[list-item]
    assert by_index(client.stream(pairs(50))) == EXPECTED


def test_a_stream_that_stays_broken_raises_in_time(connect: Any, fake: Fake) -> None:
    client = connect(fake.address)
    client.model()
    fake.faults = [("BREAK", None)] * 10_000
    start = time.monotonic()
    # On a busy machine the last attempt may still be under way when the time is over.
    with pytest.raises((sc.UnavailableError, sc.DeadlineExceededError), match="the stream broke|not answered"):
        client.stream(pairs(5), timeout=1.0)
    assert time.monotonic() - start < 2.0


def test_an_item_without_a_score_raises_and_is_named(connect: Any, fake: Fake) -> None:
    fake.bad_items = {3: "INVALID_ARGUMENT"}
    with pytest.raises(sc.ItemsFailedError) as caught:
        connect(fake.address).stream(pairs(5))
    assert [failure.index for failure in caught.value.failures] == [3]
    with pytest.raises(sc.ItemsFailedError, match="item 1: INVALID_ARGUMENT: is a int"):
        connect(fake.address).stream([pairs(1)[0], ("prompt", 7)])


@pytest.mark.parametrize(
    ("item", "words"),
    [
        (None, "item 2 is a NoneType; give a pair"),
        (7, "item 2 is a int"),
        ("ab", "item 2 is a str"),
        (b"ab", "item 2 is a bytes"),
        ({"prompt": 1, "image": 2}, "item 2 is a dict"),
        ({1, 2}, "item 2 is a set"),
        (("prompt",), "item 2 has 1 parts"),
        (("prompt", b"", None), "item 2 has a NoneType as its references"),
        (("prompt", b"", b"file"), "item 2 has a bytes as its references"),
        (("prompt", b"", [], None), "item 2 has 4 parts"),
        ((None, b"1"), "item 2 has a NoneType as its prompt"),
        (StopIteration(), "item 2 is a StopIteration"),
    ],
)
def test_what_is_no_item_raises_with_its_place(connect: Any, fake: Fake, item: Any, words: str) -> None:
    with pytest.raises(TypeError, match=words):
        connect(fake.address).stream([*pairs(2), item, *pairs(1)])
    with pytest.raises(TypeError, match=words.replace("item 2", "item 0")):
        connect(fake.address).stream(iter([item]))


def test_what_an_asynchronous_generator_yields_is_looked_at_too(fake: Fake) -> None:
    client = Async(fake.address, timeout=10)

    async def draw() -> Any:
        yield pairs(1)[0]
        yield None
        yield pairs(1)[0]

    with pytest.raises(TypeError, match="item 1 is a NoneType"):
        client.stream(draw())
    client.close()


def test_an_item_that_is_not_answered_in_time_raises(connect: Any) -> None:
    with Fake(delay=30) as server:
        start = time.monotonic()
        with pytest.raises(sc.DeadlineExceededError, match="item 0 was not answered within 0.5 s"):
            connect(server.address).stream(pairs(2), timeout=0.5)
        assert time.monotonic() - start < 2


def test_the_window_bounds_what_is_under_way(connect: Any) -> None:
    with Fake(delay=0.05) as server:
        client = connect(server.address, stream_window=4)
        client.model()
        drawn: list[float] = []

        def draw() -> Iterator[Any]:
            for pair in pairs(12):
                drawn.append(time.monotonic())
                yield pair

        results = client.stream(draw())
        assert by_index(results) == EXPECTED[:12]
        # The fifth is drawn once one of the first four is answered.
        assert drawn[3] - drawn[0] < 0.05 < drawn[4] - drawn[0]


def test_pictures_are_drawn_in_the_callers_thread_while_others_are_scored(fake: Fake) -> None:
    threads: list[int] = []

    def draw() -> Iterator[Any]:
        for pair in pairs(6):
            threads.append(threading.get_ident())
            time.sleep(0.1)
            yield pair

    client = Sync(fake.address)
    start = time.monotonic()
    came = [(result.index, time.monotonic() - start) for result in client.client.score_stream(draw())]
    assert set(threads) == {threading.get_ident()}
    # Results come while the rest is still drawn.
    assert min(moment for _, moment in came) < 0.5 < time.monotonic() - start
    client.close()


def test_time_for_drawing_is_not_the_servers(connect: Any, fake: Fake) -> None:
    def draw() -> Iterator[Any]:
        for number, pair in enumerate(pairs(4)):
            if number == 1:
                time.sleep(1.0)
            yield pair

    assert by_index(connect(fake.address).stream(draw(), timeout=0.6)) == EXPECTED[:4]


def test_an_error_of_the_callers_own_comes_through(connect: Any, fake: Fake) -> None:
    def draw() -> Iterator[Any]:
        yield pairs(1)[0]
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        connect(fake.address).stream(draw())


def test_a_caller_who_leaves_ends_the_stream(fake: Fake) -> None:
    client = Sync(fake.address)
    stream = client.client.score_stream(pairs(50))
    next(stream)
    stream.close()
    client.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "spatialscore"]


def test_an_asynchronous_iterable_overlaps(fake: Fake) -> None:
    import asyncio

    client = Async(fake.address)

    async def draw() -> Any:
        for pair in pairs(6):
            await asyncio.sleep(0.05)
            yield pair

    assert by_index(client.stream(draw())) == EXPECTED[:6]
    client.close()


def test_an_answer_to_nothing_raises(connect: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Fake._score_stream

    def twice(self: Fake, requests: Any, context: Any) -> Any:
        for response in original(self, requests, context):
            yield response
            yield response

    monkeypatch.setattr(Fake, "_score_stream", twice)
    with Fake() as server, pytest.raises(sc.ServerFaultError, match="not under way"):
        connect(server.address).stream(pairs(4))
