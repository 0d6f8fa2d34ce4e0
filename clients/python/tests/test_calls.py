"""What a call promises: every score or an exception, in time, in order, within the server's limits."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import pytest
from conftest import numbered
from fake import Fake, mean_of

import spatialscore_client as sc
from spatialscore_client import plan


def means(count: int, prompt: str) -> list[float]:
    return [pytest.approx(number + len(prompt) / 1000) for number in range(count)]


def test_scores_come_in_order_with_their_own_prompts(connect: Any, fake: Fake) -> None:
    client = connect(fake.address)
    assert client.score("four", numbered(3)).means == means(3, "four")
    assert [request.prompt for request in fake.requests] == ["four"]
    mixed = client.score(["a", "bb", "ccc"], numbered(3))
    assert mixed.means == [pytest.approx(0.001), pytest.approx(1.002), pytest.approx(2.003)]
    assert mixed.stddevs == [0.5, 0.5, 0.5]
    assert client.score("none", []).means == []


def test_a_large_group_is_split_to_the_limits_in_order_and_bounded_in_flight(connect: Any) -> None:
    with Fake(limits={"max_items_per_request": 8}, delay=0.05) as server:
        client = connect(server.address, max_in_flight=3)
        assert client.score("prompt", numbered(100)).means == means(100, "prompt")
        assert [len(request.items) for request in server.requests].count(8) == 12
        assert len(server.requests) == 13
        assert server.most_at_once == 3


def test_a_large_group_is_not_in_memory_all_at_once(connect: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    original = plan.batches

    def counted(*arguments: Any) -> Any:
        for batch in original(*arguments):
            made.append(batch.start)
            yield batch

    monkeypatch.setattr(plan, "batches", counted)
    with Fake(limits={"max_items_per_request": 2}, delay=10) as server:
        client = connect(server.address, max_in_flight=3)
        client.model()
        with pytest.raises(sc.DeadlineExceededError):
            client.score("prompt", numbered(60), timeout=1)
        assert len(made) == 3


@pytest.mark.parametrize(("priority", "number"), [("training", 1), ("evaluation", 2)])
def test_every_request_tells_its_priority(connect: Any, priority: str, number: int) -> None:
    with Fake(limits={"max_items_per_request": 2}) as server:
        connect(server.address, priority=priority).score("prompt", numbered(5))
        assert [request.priority for request in server.requests] == [number] * 3


def test_a_priority_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="evaluation"):
        sc.SpatialScoreClient("localhost", priority="urgent")


def test_requests_keep_the_limit_of_bytes(connect: Any) -> None:
    with Fake(limits={"max_message_bytes": 4096}) as server:
        client = connect(server.address)
        assert client.score("p" * 1000, numbered(20, side=16)).means == means(20, "p" * 1000)
        assert max(request.ByteSize() for request in server.requests) <= 4096
        with pytest.raises(sc.ItemsFailedError, match="item 0: INVALID_ARGUMENT: takes .* 4096"):
            client.score("p" * 1000, numbered(2, side=40))


def test_what_the_limits_exclude_is_told_before_anything_is_sent(connect: Any) -> None:
    with Fake(limits={"max_prompt_bytes": 10, "max_image_pixels": 100}) as server:
        client = connect(server.address)
        with pytest.raises(sc.ItemsFailedError) as caught:
            client.score(["short", "far too long", "short"], [*numbered(2), numbered(3, side=11)[2]])
        assert [failure.index for failure in caught.value.failures] == [1, 2]
        assert not server.requests


def test_unavailable_is_tried_again(connect: Any, fake: Fake) -> None:
    fake.faults = [("UNAVAILABLE", None)] * 3
    assert connect(fake.address).score("prompt", numbered(2)).means == means(2, "prompt")
    assert len(fake.requests) == 4
    waits = [later - earlier for earlier, later in zip(fake.times, fake.times[1:], strict=False)]
    assert all(low <= wait for low, wait in zip([0.05, 0.1, 0.2], waits, strict=True))


def test_a_full_queue_is_tried_again_when_the_server_said(connect: Any, fake: Fake) -> None:
    fake.faults = [("RESOURCE_EXHAUSTED", 0.3)]
    assert connect(fake.address).score("prompt", numbered(2)).means == means(2, "prompt")
    first, second = fake.times
    assert 0.3 <= second - first < 3


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("INVALID_ARGUMENT", sc.InvalidRequestError),
        ("INTERNAL", sc.ServerFaultError),
        ("UNAUTHENTICATED", sc.AuthenticationError),
        ("CANCELLED", sc.ServerFaultError),
        ("DEADLINE_EXCEEDED", sc.DeadlineExceededError),
        # Without the server's hint it is not about the queue.
        ("RESOURCE_EXHAUSTED", sc.BusyError),
    ],
)
def test_what_is_not_safe_to_repeat_raises_at_once(connect: Any, fake: Fake, code: str, kind: Any) -> None:
    fake.faults = [(code, None)]
    with pytest.raises(kind) as caught:
        connect(fake.address).score("prompt", numbered(2))
    assert caught.value.code == code and "on purpose" in str(caught.value)
    assert len(fake.requests) == 1


def test_one_deadline_holds_for_all_attempts(connect: Any, fake: Fake) -> None:
    fake.faults = [("UNAVAILABLE", None)] * 1000
    start = time.monotonic()
    with pytest.raises(sc.UnavailableError, match="no time for another attempt within 1 s") as caught:
        connect(fake.address).score("prompt", numbered(2), timeout=1)
    assert time.monotonic() - start < 1.5
    assert caught.value.attempts == len(fake.requests) > 1


def test_a_hint_beyond_the_deadline_is_not_waited_for(connect: Any, fake: Fake) -> None:
    fake.faults = [("RESOURCE_EXHAUSTED", 0.9)]
    client = connect(fake.address)
    client.model()
    start = time.monotonic()
    with pytest.raises(sc.BusyError):
        client.score("prompt", numbered(2), timeout=0.8)
    assert time.monotonic() - start < 0.6


def test_a_client_that_is_closed_ends_what_is_under_way() -> None:
    with Fake(delay=20) as server:
        client = sc.SpatialScoreClient(server.address, timeout=30)
        client.model()
        pictures = numbered(2)
        calls = [
            lambda: client.score("prompt", pictures),
            lambda: list(client.score_stream([("prompt", each) for each in pictures])),
        ]
        for call in calls:
            timer = threading.Timer(0.5, client.close)
            timer.start()
            start = time.monotonic()
            with pytest.raises(sc.SpatialScoreError, match="closed"):
                call()
            assert time.monotonic() - start < 10

        async def close_soon(call: Any) -> None:
            async with sc.AsyncSpatialScoreClient(server.address, timeout=30) as client:
                running = asyncio.ensure_future(call(client))
                await asyncio.sleep(0.5)
                await client.close()
                with pytest.raises(sc.SpatialScoreError, match="closed"):
                    await asyncio.wait_for(running, 10)

        async def stream(client: Any) -> None:
            async for _ in client.score_stream([("prompt", each) for each in pictures]):
                pass

        asyncio.run(close_soon(lambda client: client.score("prompt", pictures)))
        asyncio.run(close_soon(stream))


def test_a_task_that_is_cancelled_ends_and_its_calls_with_it() -> None:
    async def cancel(server: Fake) -> None:
        async with sc.AsyncSpatialScoreClient(server.address, timeout=30) as client:
            running = asyncio.ensure_future(client.score("prompt", numbered(2)))
            await asyncio.sleep(0.5)
            running.cancel()
            with pytest.raises(asyncio.CancelledError):
                await running

    with Fake(delay=20) as server:
        asyncio.run(cancel(server))
        assert server.cancelled.wait(5)


def test_a_slow_server_is_left_in_time_and_told(connect: Any) -> None:
    with Fake(delay=3) as server:
        client = connect(server.address)
        client.model()
        start = time.monotonic()
        with pytest.raises(sc.DeadlineExceededError):
            client.score("prompt", numbered(2), timeout=0.5)
        assert time.monotonic() - start < 1.5
        assert server.cancelled.wait(3)


def test_failed_items_are_named_and_the_others_scored(connect: Any) -> None:
    with Fake(limits={"max_items_per_request": 4}) as server:
        server.bad_items = {1: "INVALID_ARGUMENT", 9: "INTERNAL"}
        with pytest.raises(sc.ItemsFailedError) as caught:
            connect(server.address).score("prompt", numbered(10))
        error = caught.value
        assert [(failure.index, failure.code) for failure in error.failures] == [
            (1, "INVALID_ARGUMENT"),
            (9, "INTERNAL"),
        ]
        assert "item 9: INTERNAL: image: internal on purpose" in str(error)
        assert [place for place, score in enumerate(error.scores) if score is None] == [1, 9]
        assert error.scores[8] is not None and error.scores[8].mean == pytest.approx(8.006)
        assert len(server.requests) == 3


def shorter(response: Any) -> None:
    del response.results[-1]


def longer(response: Any) -> None:
    response.results.append(response.results[0])


def not_a_number(response: Any) -> None:
    response.results[1].score.mean = float("nan")


def infinite_stddev(response: Any) -> None:
    response.results[0].score.stddev = float("inf")


def neither(response: Any) -> None:
    response.results[0].ClearField("score")


@pytest.mark.parametrize("spoil", [shorter, longer, not_a_number, infinite_stddev, neither])
def test_an_answer_that_is_none_raises(connect: Any, fake: Fake, spoil: Any) -> None:
    fake.spoil = spoil
    with pytest.raises(sc.ServerFaultError):
        connect(fake.address).score("prompt", numbered(3))


def test_where_one_request_fails_the_others_are_ended(connect: Any) -> None:
    with Fake(limits={"max_items_per_request": 2}, delay=6) as server:
        client = connect(server.address, max_in_flight=3)
        client.model()
        # The first two are under way when the third fails.
        server.faults = [None, None, ("INTERNAL", None)]  # type: ignore[list-item]
        start = time.monotonic()
        with pytest.raises(sc.ServerFaultError):
            client.score("prompt", numbered(60))
        assert time.monotonic() - start < 4
        assert server.cancelled.wait(3)
        assert len(server.requests) < 8


def test_a_caller_who_is_cancelled_ends_the_call() -> None:
    async def leave(address: str) -> None:
        async with sc.AsyncSpatialScoreClient(address, timeout=20) as client:
            await client.model()
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(client.score("prompt", numbered(2)), 0.5)

    with Fake(delay=5) as server:
        asyncio.run(leave(server.address))
        assert server.cancelled.wait(3)


def test_token_and_trace_go_with_every_call(connect: Any) -> None:
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    with Fake(token="secret") as server:
        client = connect(server.address, token="secret")
        client.score("prompt", numbered(2), traceparent=trace)
        assert all(metadata["authorization"] == "Bearer secret" for metadata in server.metadata)
        assert all(metadata["traceparent"] == trace for metadata in server.metadata)
        tokens = iter(["wrong", "secret", "secret"])
        turning = connect(server.address, token=lambda: next(tokens))
        with pytest.raises(sc.AuthenticationError, match="wants a bearer token"):
            turning.score("prompt", numbered(1))
        assert len(turning.score("prompt", numbered(1))) == 1


def test_prompts_and_pictures_must_fit(connect: Any, fake: Fake) -> None:
    client = connect(fake.address)
    with pytest.raises(ValueError, match="2 prompts for 3 images"):
        client.score(["a", "b"], numbered(3))
    with pytest.raises(TypeError, match="single picture"):
        client.score("a", "picture.png")
    with pytest.raises(TypeError, match="prompt 1 is a int"):
        client.score(["a", 1], numbered(2))
    with pytest.raises(sc.ItemsFailedError, match="not valid Unicode"):
        client.score(["a", "\ud800"], numbered(2))
    with pytest.raises(ValueError, match="timeout"):
        client.score("a", numbered(2), timeout=0)
    assert not fake.requests


def test_a_scalar_checkpoint_has_no_deviations(connect: Any) -> None:
    with Fake(stddev=None) as server:
        client = connect(server.address)
        scores = client.score("prompt", numbered(2))
        assert scores.stddevs is None and scores[1] == sc.Score(pytest.approx(1.006), None)
        assert not client.model().gaussian


def test_the_fake_tells_pictures_apart() -> None:
    """What the tests of order rest on."""
    from spatialscore_client._proto import spatialscore as pb
    from spatialscore_client.images import source

    for number, picture in enumerate(numbered(300)):
        image = pb.Image()
        source(picture).encode("raw").write(image)
        assert mean_of("", image) == number
