"""Calls that name models: a column for each, whole or not at all."""

from __future__ import annotations

import os
import pickle
import re
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, numbered
from fake import Fake

import spatialscore_client as sc

NAMES = ["double", "minus"]


@pytest.fixture
def several() -> Iterator[Fake]:
    with Fake(limits={"max_items_per_request": 2}) as server:
        server.models = {"double": lambda mean: 2 * mean, "minus": lambda mean: -mean, "same": lambda mean: mean}
        yield server


def test_a_call_has_a_column_for_each_model_in_the_order_of_names(connect: Any, several: Fake) -> None:
    client = connect(several.address)
    columns = client.score("", numbered(5), models=NAMES)
    assert list(columns) == NAMES
    assert columns["double"].means == [0, 2, 4, 6, 8]
    assert columns["minus"].means == [0, -1, -2, -3, -4]
    assert columns.sums is None
    assert [receipt.model for receipt in columns.receipts] == NAMES
    assert columns.receipts[0].revision == "r1"
    assert columns.weighted({"double": 0.5, "minus": 2}) == [0, -1, -2, -3, -4]
    # One is named no other way than several.
    alone = client.score("", numbered(3), models=["minus"])
    assert (list(alone), alone["minus"].means) == (["minus"], [0, -1, -2])
    assert list(client.score("", [], models=NAMES)) == NAMES
    # And who names none has scores, as ever.
    assert client.score("", numbered(2)).means == [0, 1]


def test_weights_make_a_sum_of_all_their_parts(connect: Any, several: Fake) -> None:
    client = connect(several.address)
    columns = client.score("", numbered(3), weights={"double": 0.25, "same": 1})
    assert (list(columns), columns.sums) == (["double", "same"], [0, 1.5, 3])
    columns = client.score("", numbered(3), models=[*NAMES, "same"], weights={"minus": 3})
    assert (len(columns), columns.sums) == (3, [0, -3, -6])
    asked = len(several.requests)
    for wrong in ({"double": 1, "other": 1}, {}, {"double": float("nan")}):
        with pytest.raises(ValueError):
            client.score("", numbered(1), models=NAMES, weights=wrong)
        with pytest.raises(ValueError):
            columns.weighted(wrong)
    for models in ([], ["double", "double"]):
        with pytest.raises(ValueError):
            client.score("", numbered(1), models=models)
    for models in ("double", [""], [3]):
        with pytest.raises(TypeError):
            client.score("", numbered(1), models=models)
    assert len(several.requests) == asked


def test_a_missing_part_raises_and_is_never_left_out(connect: Any, several: Fake) -> None:
    client = connect(several.address)
    several.bad_items = {3: "INVALID_ARGUMENT"}
    with pytest.raises(sc.ItemsFailedError) as caught:
        client.score("", numbered(5), weights={"double": 1, "minus": 1})
    error = pickle.loads(pickle.dumps(caught.value))
    assert [(failure.index, failure.model) for failure in error.failures] == [(3, "double"), (3, "minus")]
    assert "item 3 by double: INVALID_ARGUMENT" in str(error) and str(error).startswith("1 of 5 items")
    for model, sign in (("double", 2), ("minus", -1)):
        found = [score and score.mean for score in error.columns[model]]
        assert found == [0, sign, 2 * sign, None, 4 * sign]


def test_a_server_that_answers_for_others_is_never_believed(connect: Any, several: Fake) -> None:
    client = connect(several.address, timeout=2)

    def swapped(response: Any) -> None:
        for result in response.results:
            result.outcomes.reverse()

    def renamed(response: Any) -> None:
        response.receipts[0].model = "other"

    def short(response: Any) -> None:
        del response.results[0].outcomes[1]

    def infinite(response: Any) -> None:
        response.results[0].outcomes[1].score.mean = float("inf")

    def empty(response: Any) -> None:
        response.results[0].outcomes[1].Clear()
        response.results[0].outcomes[1].model = "minus"

    for spoil in (swapped, renamed, short, infinite, empty):
        several.spoil = spoil
        with pytest.raises(sc.ServerFaultError):
            client.score("", numbered(1), models=NAMES)


def test_a_server_that_knows_no_names_is_not_taken_for_the_one_that_was_named(connect: Any, fake: Fake) -> None:
    for models in (NAMES, ["double"]):
        with pytest.raises(sc.ServerFaultError, match="older"):
            connect(fake.address, timeout=2).score("", numbered(1), models=models)


def test_what_two_revisions_judged_is_not_mixed(connect: Any, several: Fake) -> None:
    client = connect(several.address)
    turns = iter(["r1", "r2", "r2"])

    def replaced(response: Any) -> None:
        revision = next(turns)
        for receipt in response.receipts:
            receipt.revision = revision

    several.spoil = replaced
    with pytest.raises(sc.ModelMismatchError, match="replaced while the call ran"):
        client.score("", numbered(5), models=NAMES)


def streamed(client: Any, *arguments: Any, **options: Any) -> list[sc.StreamedScores]:
    """A stream's results in the order of its items, each there once."""
    results = sorted(client.stream(*arguments, **options), key=lambda result: result.index)
    assert [result.index for result in results] == list(range(len(results)))
    return results


def pairs(count: int) -> list[Any]:
    return [("", picture) for picture in numbered(count)]


def test_a_stream_has_a_result_by_name_for_each_item(connect: Any, several: Fake) -> None:
    client = connect(several.address)
    results = streamed(client, pairs(5), models=NAMES)
    assert [list(result.scores) for result in results] == [NAMES] * 5
    assert [result.scores["double"].mean for result in results] == [0, 2, 4, 6, 8]
    assert [result.scores["minus"].mean for result in results] == [0, -1, -2, -3, -4]
    assert {(result.sum, *(receipt.model for receipt in result.receipts)) for result in results} == {(None, *NAMES)}
    weighted = streamed(client, pairs(3), models=[*NAMES, "same"], weights={"double": 0.25, "same": 1})
    assert [(len(result.scores), result.sum) for result in weighted] == [(3, 0), (3, 1.5), (3, 3)]
    # One is named no other way than several, and who names none has single scores, as ever.
    alone = streamed(client, pairs(2), models=["minus"])
    assert [(list(result.scores), result.scores["minus"].mean) for result in alone] == [
        (["minus"], 0),
        (["minus"], -1),
    ]
    assert sorted(client.stream(pairs(2)), key=lambda result: result.index)[1] == sc.StreamedScore(
        1, sc.Score(1, 0.5)
    )
    for wrong in ({"models": "double"}, {"models": []}, {"models": NAMES, "weights": {"same": 1}}, {"weights": {}}):
        with pytest.raises((TypeError, ValueError)):
            client.stream(pairs(1), **wrong)


def test_a_missing_part_ends_a_stream(connect: Any, several: Fake) -> None:
    several.bad_items = {3: "INVALID_ARGUMENT"}
    client = connect(several.address)
    with pytest.raises(sc.ItemsFailedError, match="item 3 by double: INVALID_ARGUMENT") as caught:
        client.stream(pairs(5), models=NAMES)
    assert [(failure.index, failure.model) for failure in caught.value.failures] == [(3, "double"), (3, "minus")]
    several.bad_items = {}

    def one_of_two(response: Any) -> None:
        response.result.outcomes[1].error.code = 13

    several.spoil = one_of_two
    with pytest.raises(sc.ItemsFailedError, match="item 1 by minus: INTERNAL") as caught:
        client.stream(pairs(2), models=NAMES)
    assert caught.value.columns == {"double": (sc.Score(2, None),), "minus": (None,)}


def test_a_stream_that_names_models_is_sent_again_where_that_is_safe(connect: Any, several: Fake) -> None:
    client = connect(several.address)
    client.model()
    several.faults = [None, ("BREAK", None), None, ("UNAVAILABLE", None), None, ("RESOURCE_EXHAUSTED", 0.05)]
    results = streamed(client, pairs(9), models=NAMES)
    assert [result.scores["minus"].mean for result in results] == [-number for number in range(9)]

    def asleep(response: Any) -> None:
        response.result.outcomes[1].error.code = 14
        several.spoil = lambda response: None

    several.spoil = asleep
    assert [result.sum for result in streamed(client, pairs(3), weights={"double": 1, "minus": 1})] == [0, 1, 2]


def test_a_stream_believes_no_answer_for_others(connect: Any, several: Fake) -> None:
    client = connect(several.address, timeout=2)

    def swapped(response: Any) -> None:
        response.result.outcomes.reverse()

    def renamed(response: Any) -> None:
        response.receipts[0].model = "other"

    def silent(response: Any) -> None:
        del response.receipts[:]

    def short(response: Any) -> None:
        del response.result.outcomes[1]

    def empty(response: Any) -> None:
        response.result.outcomes[1].ClearField("score")

    for spoil in (swapped, renamed, silent, short, empty):
        several.spoil = spoil
        with pytest.raises(sc.ServerFaultError):
            client.stream(pairs(1), models=NAMES)
    revisions = iter(["r1", "r2", "r2"])

    def replaced(response: Any) -> None:
        response.receipts[0].revision = next(revisions)

    several.spoil = replaced
    with pytest.raises(sc.ModelMismatchError, match="double was replaced while the call ran"):
        client.stream(pairs(3), models=NAMES)


def test_a_stream_from_a_server_that_knows_no_names_is_refused(connect: Any, fake: Fake) -> None:
    for models in (NAMES, ["double"]):
        with pytest.raises(sc.ServerFaultError, match="older"):
            connect(fake.address, timeout=2).stream(pairs(1), models=models)


@pytest.fixture(scope="module")
def real() -> Iterator[tuple[str, str]]:
    """A server of two models of the fixtures."""
    if "SPATIALSCORE_BINARY" not in os.environ:
        pytest.skip("SPATIALSCORE_BINARY names no binary; `make client-test` does")
    models = [
        f"--model={name}={ROOT}/tests/fixtures/{case}/checkpoint" for name, case in (("a", "flat"), ("b", "mlp"))
    ]
    listen = [
        "--listen=127.0.0.1:0",
        "--admin=127.0.0.1:0",
        "--metrics-listen=",
        "--log-format=json",
        "--device=cpu",
        "--threads=1",
    ]
    process = subprocess.Popen(
        [os.environ["SPATIALSCORE_BINARY"], "serve", *listen, *models], stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    address = admin = ""
    for line in process.stderr:
        if found := re.search(r'"address":"([^"]+)"', line):
            address = found[1]
        if found := re.search(r'"admin":"([^"]+)"', line):
            admin = found[1]
        if '"message":"serving"' in line:
            break
    threading.Thread(target=process.stderr.read, daemon=True).start()
    yield address, admin
    process.terminate()
    process.wait(60)


def test_a_real_server_scores_with_each_model_what_it_scores_alone(connect: Any, real: tuple[str, str]) -> None:
    client = connect(real[0])
    files = [Path(ROOT) / "samples" / name for name in sorted(os.listdir(ROOT / "samples")) if name.endswith(".png")]
    files = (files or sorted((ROOT / "tests/fixtures/flat/items").glob("*.png")))[:3]
    columns = client.score("a cup to the left of a plate", files, models=["b", "a"])
    for name in ("a", "b"):
        alone = client.score("a cup to the left of a plate", files, models=[name])[name]
        assert columns[name].means == pytest.approx(alone.means, rel=1e-5)
    assert columns["a"].means != columns["b"].means
    assert {receipt.model: receipt.dtype for receipt in columns.receipts} == {"a": "float32", "b": "float32"}
    with pytest.raises(sc.InvalidRequestError, match="there are a, b"):
        client.score("a", files, models=["a", "c"])
    results = streamed(client, [("a cup to the left of a plate", file) for file in files], weights={"b": 2, "a": -1})
    for index, result in enumerate(results):
        for name in ("a", "b"):
            assert result.scores[name].mean == pytest.approx(columns[name].means[index], rel=1e-5)
        assert result.sum == 2 * result.scores["b"].mean - result.scores["a"].mean
    with pytest.raises(sc.ItemsFailedError, match="there are a, b"):
        client.stream([("a", files[0])], models=["a", "c"])


def test_models_come_and_go(connect: Any, real: tuple[str, str]) -> None:
    client = connect(real[0], timeout=5)
    files = sorted((ROOT / "tests/fixtures/flat/items").glob("*.png"))[:2]
    with sc.AdminClient(real[1]) as admin:
        assert [(model.name, model.state) for model in admin.models()] == [("a", "serving"), ("b", "serving")]
        loaded = admin.load("c", f"{ROOT}/tests/fixtures/mlp/checkpoint")
        assert (loaded.name, loaded.state) == ("c", "serving")
        columns = client.score("a cup", files, models=["b", "c"])
        assert columns["b"].means == pytest.approx(columns["c"].means, rel=1e-5)
        replaced = admin.replace("c", f"{ROOT}/tests/fixtures/flat/checkpoint")
        assert replaced.revision != loaded.revision
        columns = client.score("a cup", files, models=["a", "c"])
        assert columns["a"].means == pytest.approx(columns["c"].means, rel=1e-5)
        admin.sleep("c")
        assert admin.models()[2].state == "asleep"
        with pytest.raises(sc.UnavailableError, match="asleep"):
            client.score("a cup", files, models=["c"], timeout=1)
        admin.wake("c")
        assert client.score("a cup", files, models=["c"])["c"].means == columns["c"].means
        admin.unload("c")
        with pytest.raises(sc.InvalidRequestError, match="there are a, b"):
            client.score("a cup", files, models=["c"])
        with pytest.raises(sc.CallError) as caught:
            admin.wake("c")
        assert caught.value.code == "NOT_FOUND"
