"""The adapters of frameworks that score while they roll out, by coroutines: verl-omni and miles_diffusion. Their own
code drives, from checkouts that environment variables name; else its part is played here."""

from __future__ import annotations

import asyncio
import importlib
import sys
import types
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, numbered
from fake import Fake
from test_adapters import PROMPTS, checkout, expected, served, tensors
from test_adapters_models import COLUMNS, WEIGHTS, reference, scored, several
from test_profiles import read

import spatialscore_client as sc
from spatialscore_client.adapters import miles_diffusion, verl_omni

__all__ = ["served", "several"]


@pytest.fixture(autouse=True)
def in_a_process_of_its_own() -> None:
    """Whose environment says the same from begin to end."""
    verl_omni._judges.clear()
    miles_diffusion._default.cache_clear()


def run(work: Any) -> Any:
    return asyncio.run(work)


# verl-omni: verl-project/verl-omni at a1139bafffb5b9711f0a6b6edff8ecaa60bfff30, over `verl` 0.9.1 of PyPI.


def by_verl_omni(prompt: Any, picture: Any, **keys: Any) -> Any:
    """As its managers call a reward function where there is a reward model of verl's beside it."""
    theirs = {"reward_router_address": "a:1", "reward_model_tokenizer": object(), "model_name": "judge"}
    return verl_omni.compute_score("data", picture, prompt, {"num_turns": None}, **theirs, **keys)


def test_verl_omni(served: Fake) -> None:
    async def step() -> Any:
        pairs = zip(PROMPTS, numbered(4), strict=True)
        return await asyncio.gather(*(by_verl_omni(prompt, picture) for prompt, picture in pairs))

    results = run(step())
    assert [result["score"] for result in results] == expected(4, PROMPTS)
    assert [result["spatialscore"] for result in results] == expected(4, PROMPTS)
    assert {result["spatialscore_stddev"] for result in results} == {0.5}
    # Another loop, a frame of one, and keys on top of the environment.
    again = by_verl_omni("bb", numbered(2)[1][None], priority="evaluation", timeout=5)
    assert run(again)["score"] == expected(4, PROMPTS)[1] and served.requests[-1].priority == 2
    with pytest.raises(sc.ConfigurationError, match="'timeuot': not known .* models, .* weights"):
        run(by_verl_omni("a", numbered(1)[0], timeuot=5))
    with pytest.raises(sc.ConfigurationError, match="weights must say"):
        run(by_verl_omni("a", numbered(1)[0], models=["double", "minus"]))
    for nothing in (None, "", ["a"]):
        with pytest.raises(ValueError, match="the whole prompt"):
            run(by_verl_omni(nothing, numbered(1)[0]))
    with pytest.raises(ValueError, match="2 frames"):
        run(by_verl_omni("a", np.stack(numbered(2))))
    served.bad_items = {1: "INTERNAL"}
    with pytest.raises(sc.ItemsFailedError):
        run(by_verl_omni("a", numbered(2)[1]))


def test_verl_omni_of_several_models(several: Fake) -> None:
    results = [run(by_verl_omni(p, i, weights=WEIGHTS)) for p, i in zip(PROMPTS, numbered(4), strict=True)]
    table = {name: [result[name] for result in results] for name in results[0]}
    assert table == {"score": scored(1.5), **COLUMNS}


def managers(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Its managers' module, without what stands before: its packages' own `__init__` want vLLM."""
    pytest.importorskip("verl", reason="verl is not installed")
    root = checkout("SPATIALSCORE_VERL_OMNI") / "verl_omni"
    for name in ("verl_omni", "verl_omni.reward_loop"):
        package = types.ModuleType(name)
        package.__path__ = [str(root.joinpath(*name.split(".")[1:]))]
        monkeypatch.setitem(sys.modules, name, package)
    return importlib.import_module("verl_omni.reward_loop.reward_manager")


def manager(theirs: Any, entries: dict[str, Any]) -> Any:
    from omegaconf import OmegaConf

    path = "pkg://spatialscore_client.adapters.verl_omni"
    functions = {name: {"path": path, "name": "compute_score", **entry} for name, entry in entries.items()}
    pipeline = {"pipeline": {}, "val_kwargs": {"pipeline": {}}}
    config = {"reward": {"reward_functions": functions}, "actor_rollout_ref": {"rollout": pipeline}}
    return theirs.MultiVisualRewardManager(OmegaConf.create(config), None, None)


def data(prompt: str, image: Any) -> Any:
    from verl import DataProto

    source = {"data_source": ["source"], "reward_model": [{"ground_truth": prompt}], "extra_info": [{}]}
    return DataProto.from_dict(tensors={"responses": image[None]}, non_tensors=source)


def pixels(count: int) -> Any:
    return (tensors(count) * 255).round().byte()


def test_verl_omni_itself(several: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its manager of several rewards, as its recipes configure it; one call for each picture."""
    theirs = managers(monkeypatch)
    several.components = {}
    keys = {"target": [several.address], "required": True}
    entries = {
        "sum": {"weights": WEIGHTS, "weight": 1.0, **keys},
        "minus": {"models": ["minus"], "weight": 0.5, **keys},
    }
    judge = manager(theirs, entries)

    async def step() -> Any:
        pairs = zip(PROMPTS, pixels(4), strict=True)
        return await asyncio.gather(*(judge.run_single(data(prompt, image)) for prompt, image in pairs))

    results = run(step())
    assert [result["reward_score"] for result in results] == scored(1.0)
    logged = {
        name: [result["reward_extra_info"][name] for result in results] for name in results[0]["reward_extra_info"]
    }
    assert logged == {
        "reward/sum": scored(1.5), "reward/sum/double": scored(2), "reward/sum/minus": scored(-1),
        "reward/minus": scored(-1), "reward/minus/minus": scored(-1), "reward/combined": scored(1.0),
    }  # fmt: skip
    several.bad_items = {2: "INTERNAL"}
    with pytest.raises(RuntimeError, match="Required sub-reward 'sum' failed: 1 of 1 items have no score"):
        run(judge.run_single(data("ccc", pixels(3)[2])))
    # What the recipe must not leave out: a failure is 0 there without it.
    lenient = manager(theirs, {"sum": {"weights": WEIGHTS, "target": several.address}})
    assert run(lenient.run_single(data("ccc", pixels(3)[2])))["reward_score"] == 0


def test_verl_omni_itself_with_a_single_reward(served: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its manager of one reward, by verl's own loader of custom functions."""
    theirs = managers(monkeypatch)
    from omegaconf import OmegaConf
    from verl.trainer.ppo.reward import get_custom_reward_fn

    path = "pkg://spatialscore_client.adapters.verl_omni"
    custom = {"path": path, "name": "compute_score", "reward_kwargs": {"target": served.address}}
    pipeline = {"pipeline": {}, "val_kwargs": {"pipeline": {}}}
    rollout = {"reward": {"custom_reward_function": custom}, "actor_rollout_ref": {"rollout": pipeline}}
    config = OmegaConf.create(rollout)
    judge = theirs.VisualRewardManager(config, None, get_custom_reward_fn(config))
    result = run(judge.run_single(data("bb", pixels(2)[1])))
    assert result["reward_score"] == expected(4, PROMPTS)[1]
    assert result["reward_extra_info"]["spatialscore_stddev"] == 0.5
    served.bad_items = {1: "INTERNAL"}
    with pytest.raises(sc.ItemsFailedError):
        run(judge.run_single(data("bb", pixels(2)[1])))


# miles_diffusion: radixark/miles_diffusion at 2929e491975c0e2d374f0540c6e652a095887210.


def samples(outputs: Any, prompts: list[str] = PROMPTS) -> list[Any]:
    pairs = zip(prompts, outputs, strict=True)
    return [types.SimpleNamespace(prompt=prompt, generated_output=output) for prompt, output in pairs]


def test_miles_diffusion(several: Fake) -> None:
    torch = pytest.importorskip("torch")
    outputs = tensors(4)[:, :, None]
    assert run(miles_diffusion.spatialscore(None, samples(outputs), anything=1)) == expected(4, PROMPTS)
    # Bytes, and bytes as floats, are the same picture; what is neither is refused.
    for same in ((outputs * 255).round(), (outputs * 255).round().byte()):
        assert run(miles_diffusion.spatialscore(None, samples(same))) == expected(4, PROMPTS)
    with pytest.raises(sc.ItemsFailedError, match="give floats in"):
        run(miles_diffusion.spatialscore(None, samples(outputs * 254.5)))
    black = [torch.zeros(3, 1, 4, 4), torch.ones(3, 1, 4, 4)]
    assert run(miles_diffusion.spatialscore(None, samples(black[:1], ["a"]))) == expected(1, ["a"])
    with pytest.raises(ValueError, match="all values are 0 or 1"):
        run(miles_diffusion.spatialscore(None, samples(black, ["a", "a"])))
    assert run(miles_diffusion.reward(weights=WEIGHTS)(None, samples(outputs))) == scored(1.5)
    assert run(miles_diffusion.reward(models=["minus"])(None, samples(outputs))) == scored(-1)
    for output in (None, tensors(1)[0], torch.zeros(3, 2, 4, 4)):
        with pytest.raises(ValueError, match="sample 0 has a generated_output of shape"):
            run(miles_diffusion.spatialscore(None, samples([output], ["a"])))
    several.bad_items = {1: "INTERNAL"}
    with pytest.raises(sc.ItemsFailedError, match="item 1"):
        run(miles_diffusion.spatialscore(None, samples(outputs)))


def test_miles_diffusion_itself(served: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own samples and dispatch, from a checkout in SPATIALSCORE_MILES_DIFFUSION."""
    pytest.importorskip("torch")
    pytest.importorskip("httpx", reason="miles_diffusion wants httpx")
    monkeypatch.syspath_prepend(str(checkout("SPATIALSCORE_MILES_DIFFUSION")))
    from miles.rollout.rm_hub import batched_async_rm
    from miles.utils.types import Sample

    path = "spatialscore_client.adapters.miles_diffusion.spatialscore"
    args = types.SimpleNamespace(custom_rm_path=path)
    pairs = zip(PROMPTS, tensors(4)[:, :, None], strict=True)
    group = [Sample(prompt=prompt, generated_output=output) for prompt, output in pairs]
    assert run(batched_async_rm(args, group)) == expected(4, PROMPTS)
    served.bad_items = {1: "INTERNAL"}
    with pytest.raises(sc.ItemsFailedError, match="item 1"):
        run(batched_async_rm(args, group))


# A real server, and the reference's numbers.


def test_rollouts_get_the_references_scores(two_models: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    from PIL import Image

    item = read("hpsv3.json")["items"][0]
    opened = np.asarray(Image.open(ROOT / "tests/fixtures/profiles" / item["pictures"][0]).convert("RGB")).copy()
    image = torch.from_numpy(opened).permute(2, 0, 1)
    keys = {"target": two_models, "weights": {"hpsv3": 1.0, "vqascore": 10.0}}
    columns = run(by_verl_omni(item["prompt"], image, **keys))
    assert columns["hpsv3"] == reference(item["mean"]) and columns["hpsv3_stddev"] == reference(item["sigma"])
    assert columns["score"] == reference(columns["hpsv3"] + 10 * columns["vqascore"])
    rewards = run(miles_diffusion.reward(**keys)(None, samples([image[:, None]], [item["prompt"]])))
    assert rewards == reference([columns["score"]])
