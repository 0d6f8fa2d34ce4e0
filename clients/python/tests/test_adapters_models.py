"""Several models through the adapters: a sum where weights ask for one, a column each where the framework has a place
for it, and nothing where a part is missing."""

from __future__ import annotations

import asyncio
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, numbered
from fake import Fake
from test_adapters import (
    PROMPTS,
    flow_factory_processor,
    flow_factory_samples,
    flow_grpo_rewards,
    grpo_trainer,
    logged,
    multi_score,
    played_flow_factory,
    played_unirl,
    served,
    tensors,
    unirl_request,
    unirl_service,
    with_keys,
)
from test_profiles import read

import spatialscore_client as sc
from spatialscore_client.adapters import flow_grpo, plain, trl
from spatialscore_client.adapters.judge import Shared

__all__ = ["played_flow_factory", "played_unirl", "served", "with_keys"]


@pytest.fixture
def several(served: Fake) -> Fake:
    """The server of the environment, with models that the scores tell apart."""
    served.models = {"double": lambda mean: 2 * mean, "minus": lambda mean: -mean}
    served.components = {"minus": ("layout", "look")}
    return served


WEIGHTS = {"double": 1.0, "minus": 0.5}


def near(values: list[float]) -> Any:
    return pytest.approx(values, abs=1e-4)


def scored(factor: float, plus: float = 0.0) -> Any:
    """What a model gives that makes so much of each mean."""
    return near([factor * (number + len(prompt) / 1000) + plus for number, prompt in enumerate(PROMPTS)])


COLUMNS = {"double": scored(2), "minus": scored(-1), "minus/layout": scored(-1, 6), "minus/look": scored(-1, 4)}


def test_plain_of_several_models(several: Fake) -> None:
    assert plain.reward(weights=WEIGHTS)(PROMPTS, numbered(4)) == scored(1.5)
    assert plain.reward(models=["minus"])(PROMPTS, numbered(4)) == scored(-1)
    # More models may be named than have a weight: none of them is in the sum unasked.
    assert plain.reward(models=["double", "minus"], weights={"minus": 2})(PROMPTS, numbered(4)) == scored(-2)
    several.bad_items = {2: "INTERNAL"}
    with pytest.raises(sc.ItemsFailedError, match="item 2 by double"):
        plain.reward(weights=WEIGHTS)(PROMPTS, numbered(4))


def test_models_without_weights_are_never_summed(several: Fake, with_keys: Any) -> None:
    for keys in (
        {"models": ["double", "minus"]},
        {"models": "double"},
        {"models": []},
        {"models": ["double"], "weights": {"minus": 1}},
        {"weights": {"double": float("inf")}},
        {"weights": {"double": None}},
        {"weights": ["double"]},
    ):
        with pytest.raises(sc.ConfigurationError, match="models|weights"):
            with_keys(**keys)
    with pytest.raises(sc.ConfigurationError, match="there are .*models.* weights"):
        with_keys(target="scorer:1", model=["double"])
    assert not several.requests


def test_flow_grpo_of_several_models(several: Fake) -> None:
    images = np.stack(numbered(4))
    functions = flow_grpo.columns(["double", "minus"], ["double", "minus", "minus/look"])
    score = multi_score("cuda", {"double": 1.0, "minus": 0.5, "minus/look": 0.0}, functions)
    for turn in range(3):
        details, _ = score(images, tuple(PROMPTS), {})
        assert details == {"double": scored(2), "minus": scored(-1), "minus/look": scored(-1, 4), "avg": scored(1.5)}
        # Once for all of them, and anew for each batch, even where it is the same.
        assert len(several.requests) == turn + 1
    batches = [np.stack(numbered(4 + number)[-4:]) for number in range(32)]
    with ThreadPoolExecutor(8) as executor:
        for number, (details, _) in enumerate(executor.map(lambda batch: score(batch, PROMPTS, {}), batches)):
            assert details["double"] == near([2 * (number + place + (place + 1) / 1000) for place in range(4)])
            assert details["minus"] == near([-value / 2 for value in details["double"]])
    assert len(several.requests) == 3 + 32
    # A subset is scored all the same, and a batch that is written over is another.
    alone = multi_score("cuda", {"minus": 1.0}, functions)
    for number in range(2):
        images[:] = np.stack(numbered(4 + number)[-4:])
        details, _ = alone(images, PROMPTS, {})
        assert details["minus"] == near([-(number + place + (place + 1) / 1000) for place in range(4)])
    scores, details = flow_grpo.reward(weights=WEIGHTS)("cuda")(numbered(4), PROMPTS, {})
    assert scores == scored(1.5) and details == COLUMNS
    with pytest.raises(
        sc.ConfigurationError, match="no column 'minus/colour'; there are 'double', 'minus', 'minus/l"
    ):
        multi_score("cuda", {"minus/colour": 1.0}, flow_grpo.columns(["double", "minus"], ["minus/colour"]))(
            numbered(4), PROMPTS, {}
        )
    several.bad_items = {1: "INTERNAL"}
    with pytest.raises(sc.ItemsFailedError, match="item 1 by double"):
        score(numbered(4), PROMPTS, {})


def test_a_shared_call_is_of_its_own_batch_and_thread() -> None:
    shared: Shared[str] = Shared(2)
    begun: list[str] = []

    def take(function: int, batch: list[str]) -> str:
        def begin() -> str:
            begun.append(batch[0])
            return batch[0]

        return shared.take(function, (batch, PROMPTS), begin)

    first, second = ["first"], ["second"]
    assert (take(0, first), take(1, second), take(0, second)) == ("first", "second", "second")
    assert begun == ["first", "second"]
    # Other threads' batches are between those of one.
    assert take(0, first) == "first"
    with ThreadPoolExecutor(1) as executor:
        assert executor.submit(take, 0, second).result() == "second"
        assert take(1, first) == "first"
        assert executor.submit(take, 1, second).result() == "second"
    assert begun == ["first", "second"] * 2


def test_flow_factory_of_several_models(several: Fake, played_flow_factory: Any) -> None:
    pytest.importorskip("torch")
    config = types.SimpleNamespace(extra_kwargs={"weights": WEIGHTS})
    output = played_flow_factory.SpatialScoreReward(config=config, accelerator=None)(
        prompt=PROMPTS, image=numbered(4)
    )
    assert output.rewards.tolist() == scored(1.5) and output.extra_info == COLUMNS
    config = types.SimpleNamespace(extra_kwargs={"models": ["minus"]})
    output = played_flow_factory.SpatialScoreReward(config=config, accelerator=None)(
        prompt=PROMPTS, image=numbered(4)
    )
    assert output.rewards.tolist() == scored(-1)


def test_flow_factory_groups_of_a_model(several: Fake, played_flow_factory: Any) -> None:
    config = types.SimpleNamespace(extra_kwargs={"models": ["minus"]})
    model = played_flow_factory.SpatialScoreGroupReward(config=config, accelerator=None)
    # The fake's models have no standard deviations, and without them there is no such probability.
    with pytest.raises(ValueError, match="no win probability"):
        model(prompt=["p"] * 3, image=numbered(3))
    assert list(several.requests[-1].models) == ["minus"]
    for keys in ({"weights": WEIGHTS}, {"models": ["double", "minus"]}):
        with pytest.raises(sc.ConfigurationError, match="no win probability"):
            played_flow_factory.SpatialScoreGroupReward(types.SimpleNamespace(extra_kwargs=keys), None)


CHAT = {"prompts": PROMPTS, "completions": ["c"] * 4, "completion_ids": [[1], [2], [3], [4]]}


def test_trl_of_several_models(several: Fake) -> None:
    client = sc.SpatialScoreClient(several.address, timeout=10)
    assert trl.reward(client, weights=WEIGHTS)(**CHAT, image=numbered(4)) == scored(1.5)
    assert trl.reward(client, models=["minus"])(**CHAT, image=numbered(4)) == scored(-1)
    with pytest.raises(sc.ConfigurationError, match="weights must say"):
        trl.reward(client, models=["double", "minus"])
    drawn: list[str] = []

    def draw(prompt: str, completion: str, row: dict[str, Any]) -> Any:
        drawn.append(prompt)
        return numbered(4)[PROMPTS.index(prompt)]

    functions = trl.rewards(client, ["double", "minus"], columns=["double", "minus/look", "minus"], image=draw)
    assert [function.__name__ for function in functions] == ["double", "minus/look", "minus"]
    asked = len(several.requests)
    for turn in range(2):
        batch = {"prompts": list(PROMPTS), "completions": ["c"] * 4, "log_metric": print}
        assert [function(**batch) for function in functions] == [scored(2), scored(-1, 4), scored(-1)]
        assert (len(several.requests), len(drawn)) == (asked + turn + 1, 4 * (turn + 1))
    with pytest.raises(ValueError, match="twice"):
        trl.rewards(client, ["double", "double"])
    several.bad_items = {2: "INTERNAL"}
    for function in functions:
        with pytest.raises(sc.ItemsFailedError, match="item 2 by double"):
            function(**CHAT)
    client.close()


def test_trl_of_several_models_beside_each_other(several: Fake) -> None:
    async def draw(prompt: str, completion: str, row: dict[str, Any]) -> Any:
        await asyncio.sleep(0.01)
        return numbered(4)[PROMPTS.index(prompt)]

    async def step() -> Any:
        async with sc.AsyncSpatialScoreClient(several.address, timeout=10) as client:
            assert await trl.async_reward(client, weights=WEIGHTS, image=draw)(**CHAT) == scored(1.5)
            functions = trl.async_rewards(client, ["double", "minus"], image=draw)
            asked = len(several.requests)
            assert await asyncio.gather(*(function(**CHAT) for function in functions)) == [scored(2), scored(-1)]
            assert len(several.requests) == asked + 1
            several.bad_items = {0: "INTERNAL"}
            # Whoever shares the call hears of it.
            failed = await asyncio.gather(*(function(**CHAT) for function in functions), return_exceptions=True)
            assert [type(failure) for failure in failed] == [sc.ItemsFailedError] * 2

    asyncio.run(step())


# Their own code.


def test_unirl_itself_of_several_models(several: Fake) -> None:
    service = unirl_service(target=several.address, weights=WEIGHTS)
    request = unirl_request(PROMPTS, tensors(4))
    response = service.compute_rewards(request)
    assert response.rewards == scored(1.5) and response.component_rewards == COLUMNS
    assert unirl_service(models=["minus"]).compute_rewards(request).rewards == scored(-1)
    several.bad_items = {1: "INTERNAL"}
    with pytest.raises(sc.ItemsFailedError, match="item 1 by double"):
        service.compute_rewards(request)


def test_flow_factory_itself_of_several_models(several: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    """An entry for each model, which its own GDPO normalises one by one; and a sum in one entry."""
    kind = {"reward_model": "SpatialScoreReward", "target": several.address}
    entries = [{"name": name, "models": [name], **kind} for name in WEIGHTS]
    processor = flow_factory_processor(monkeypatch, [*entries, {"name": "sum", "weights": WEIGHTS, **kind}])
    samples = flow_factory_samples(PROMPTS, tensors(4))
    rewards = processor.compute_rewards(samples)
    assert {name: values.tolist() for name, values in rewards.items()} == {
        "double": scored(2), "minus": scored(-1), "sum": scored(1.5)
    }  # fmt: skip
    several.bad_items = {1: "INTERNAL"}
    with pytest.raises(sc.ItemsFailedError):
        processor.compute_rewards(samples)


def test_flow_grpo_itself_of_several_models(several: Fake) -> None:
    module = flow_grpo_rewards('**columns(["double", "minus"], ["double", "minus", "minus/look"])')
    import torch

    score = module.multi_score(torch.device("cpu"), {"double": 1.0, "minus": 0.5, "minus/look": 0.0})
    details, _ = score(tensors(4), tuple(PROMPTS), [{}] * 4, only_strict=True)
    assert details == {"double": scored(2), "minus": scored(-1), "minus/look": scored(-1, 4), "avg": scored(1.5)}
    assert len(several.requests) == 1


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("how", ["sum_then_normalize", "normalize_then_sum"])
def test_trl_itself_of_several_models(several: Fake, tmp_path: Path, asynchronous: bool, how: str) -> None:
    drawn: list[int] = []

    def draw(prompt: str, completion: str, row: dict[str, Any]) -> Any:
        drawn.append(len(drawn))
        return numbered(100)[drawn[-1] + row["offset"]]

    kind, make = (
        (sc.AsyncSpatialScoreClient, trl.async_rewards) if asynchronous else (sc.SpatialScoreClient, trl.rewards)
    )
    functions = make(kind(several.address, timeout=20), list(WEIGHTS), image=draw)
    arguments = {"reward_weights": [1.0, 0.5], "multi_objective_aggregation": how}
    trainer = grpo_trainer(tmp_path, functions, **arguments)
    trainer.train()
    mean = np.mean([10, 11, 12, 13]) + len("a cup left of a book") / 1000
    means = {name: logged(trainer)[f"rewards/{name}/mean"] for name in WEIGHTS}
    assert means == {"double": pytest.approx(2 * mean, abs=1e-3), "minus": pytest.approx(-mean, abs=1e-3)}
    # Drawn once and scored once for both.
    assert len(drawn) == 4 and sum(len(request.items) for request in several.requests) == 4
    several.bad_items = {14: "INTERNAL"}
    with pytest.raises(sc.ItemsFailedError):
        trainer.train()


# A real server.


@pytest.fixture
def judged(two_models: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[list[str], list[Path], list[float]]]:
    """For each model prompts and pictures, and what the reference gave for them."""
    monkeypatch.setenv("SPATIALSCORE_TARGET", two_models)
    fixtures = ROOT / "tests/fixtures/profiles"
    items = {"hpsv3": read("hpsv3.json")["items"][:3], "vqascore": read("probabilities.json")[0]["items"][:3]}
    wanted = {"hpsv3": "mean", "vqascore": "probability"}
    return {
        model: (
            [item["prompt"] for item in found],
            [fixtures / item["pictures"][0] for item in found],
            [item[wanted[model]] for item in found],
        )
        for model, found in items.items()
    }


def reference(values: list[float]) -> Any:
    return pytest.approx(values, rel=1e-4, abs=1e-5)


BOTH = ["hpsv3", "vqascore"]


def test_each_column_is_the_references(judged: Any) -> None:
    """Whatever is asked beside it, through each door that can hold a column."""
    for model, (prompts, pictures, wanted) in judged.items():
        chat = {"prompts": prompts, "completions": [""] * len(prompts), "image": pictures}
        with sc.SpatialScoreClient.from_environment() as client:
            by_trl = dict(zip(BOTH, (fn(**chat) for fn in trl.rewards(client, BOTH)), strict=True))
        functions = flow_grpo.columns(BOTH)
        by_flow_grpo, _ = multi_score("cpu", dict.fromkeys(BOTH, 0.5), functions)(pictures, prompts, {})
        _, by_sum = flow_grpo.reward(weights={"hpsv3": 2, "vqascore": -1})("cpu")(pictures, prompts, {})
        for columns in (by_trl, by_flow_grpo, by_sum):
            assert columns[model] == reference(wanted)
        assert list(by_sum) == ["hpsv3", "hpsv3_stddev", "vqascore"]
        assert plain.reward(models=[model])(prompts, pictures) == reference(wanted)
        summed = plain.reward(weights={"hpsv3": 2, "vqascore": -1})(prompts, pictures)
        parts = zip(by_sum["hpsv3"], by_sum["vqascore"], strict=True)
        assert summed == reference([2 * first - second for first, second in parts])


def test_each_column_of_a_trainers_own_code_is_the_references(judged: Any) -> None:
    torch = pytest.importorskip("torch")
    from PIL import Image

    for model, (prompts, pictures, wanted) in judged.items():
        opened = [np.asarray(Image.open(picture).convert("RGB")).copy() for picture in pictures]
        images = [torch.from_numpy(each).permute(2, 0, 1).float() / 255 for each in opened]
        weights = {"hpsv3": 1.0, "vqascore": 10.0}
        response = unirl_service(weights=weights).compute_rewards(unirl_request(prompts, images))
        assert response.component_rewards[model] == reference(wanted)
        parts = zip(response.component_rewards["hpsv3"], response.component_rewards["vqascore"], strict=True)
        assert response.rewards == reference([first + 10 * second for first, second in parts])


def test_a_part_that_a_real_server_cannot_give_raises(judged: Any, tmp_path: Path) -> None:
    """A picture that no model takes, and a model that is not there."""
    prompts, pictures, _ = judged["hpsv3"]
    (tmp_path / "half.png").write_bytes(pictures[0].read_bytes()[:100])
    score = multi_score("cpu", dict.fromkeys(BOTH, 0.5), flow_grpo.columns(BOTH))
    with pytest.raises(sc.ItemsFailedError, match="item 1 by hpsv3: INVALID_ARGUMENT") as caught:
        score([pictures[0], tmp_path / "half.png", pictures[2]], prompts, {})
    assert [column is None for column in caught.value.columns["vqascore"]] == [False, True, False]
    with pytest.raises(sc.InvalidRequestError, match="there are hpsv3, vqascore"):
        plain.reward(weights={"hpsv3": 1, "layout": 1})(prompts, pictures)
