"""Each adapter, driven as its framework drives it. Where the framework is installed, or a checkout of it stands where
an environment variable says, its own code drives; else its part is played here, from the commit that is named."""

from __future__ import annotations

import asyncio
import importlib
import os
import re
import sys
import types
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, numbered
from fake import Fake, picture
from test_connections import certificates, server_credentials

import spatialscore_client as sc
from spatialscore_client import adapters
from spatialscore_client.adapters import flow_grpo, judge, plain, trl

__all__ = ["certificates"]
TRAINERS = ROOT / "docs/trainers.md"


@pytest.fixture
def served(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> Fake:
    """A server that the environment names."""
    monkeypatch.setenv("SPATIALSCORE_TARGET", fake.address)
    monkeypatch.setenv("SPATIALSCORE_TIMEOUT", "10")
    return fake


def checkout(variable: str) -> Path:
    if variable not in os.environ:
        pytest.skip(f"{variable} names no checkout")
    return Path(os.environ[variable])


def tensors(count: int) -> Any:
    torch = pytest.importorskip("torch")
    arrays = np.stack([np.frombuffer(picture(number), np.uint8).reshape(4, 4, 3) for number in range(count)])
    return torch.from_numpy(arrays).permute(0, 3, 1, 2).float() / 255


def expected(count: int, prompts: list[str]) -> list[Any]:
    return [
        pytest.approx(number + len(prompt) / 1000, abs=1e-4)
        for number, prompt in zip(range(count), prompts, strict=True)
    ]


PROMPTS = ["a", "bb", "ccc", "dddd"]


def test_plain(served: Fake) -> None:
    assert plain.reward()(PROMPTS, numbered(4)) == expected(4, PROMPTS)
    assert plain.reward(served.address, timeout=5)("same", numbered(2)) == expected(2, ["same"] * 2)
    served.bad_items = {2: "INTERNAL"}
    with pytest.raises(sc.ItemsFailedError):
        plain.reward()(PROMPTS, numbered(4))


# One reading of environment and keys.


@contextmanager
def played(name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An adapter on what stands in its framework's place, and nowhere afterwards."""
    monkeypatch.delitem(sys.modules, f"{adapters.__name__}.{name}", raising=False)
    yield importlib.import_module(f"{adapters.__name__}.{name}")
    sys.modules.pop(f"{adapters.__name__}.{name}")
    delattr(adapters, name)


@pytest.fixture
def played_unirl(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The adapter on the base class as UniRL 0.2.0 has it, as far as a constructor goes."""

    class RewardBackend:
        def __init__(self, model_name: str, timeout: float, batch_size: int = 8, prompt_source: str = "") -> None:
            self.timeout, self.batch_size = timeout, batch_size

    made = {"unirl": {}, "unirl.reward": {}, "unirl.types": {}}
    made["unirl.reward.base"] = {"RewardBackend": RewardBackend}
    made["unirl.types.reward"] = {"RewardRequest": object, "RewardResponse": object}
    for name, members in made.items():
        module = types.ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    with played("unirl", monkeypatch) as adapter:
        yield adapter


@pytest.fixture(params=["plain", "flow_factory", "unirl"])
def with_keys(request: Any) -> Any:
    """A client as an adapter's recipe makes it from its keys."""

    def make(**keys: Any) -> sc.SpatialScoreClient:
        if request.param == "plain":
            return judge.Judge.of(**keys).client  # type: ignore[no-any-return]
        adapter = request.getfixturevalue(f"played_{request.param}")
        if request.param == "unirl":
            return adapter.SpatialScoreBackend(batch_size=4, **keys).client  # type: ignore[no-any-return]
        config = types.SimpleNamespace(extra_kwargs=keys)
        return adapter.SpatialScoreReward(config=config, accelerator=None).client  # type: ignore[no-any-return]

    return make


def test_keys_stand_on_top_of_the_environment(
    with_keys: Any, certificates: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "token").write_text("trainer:secret\n")
    ca = str(certificates / "authority.pem")
    with Fake(credentials=server_credentials(certificates), token="secret") as secured:
        monkeypatch.setenv("SPATIALSCORE_TARGET", "elsewhere:1")
        monkeypatch.setenv("SPATIALSCORE_TOKEN_FILE", str(tmp_path / "token"))
        monkeypatch.setenv("SPATIALSCORE_CA", ca)
        monkeypatch.setenv("SPATIALSCORE_TIMEOUT", "7")
        with with_keys(target=secured.address, priority="evaluation") as client:
            assert client.score("a", numbered(1)).means == expected(1, ["a"]) and client.timeout == 7
            assert secured.requests[-1].priority == 2
        for name in ("TARGET", "TOKEN_FILE", "CA", "TIMEOUT"):
            monkeypatch.delenv(f"SPATIALSCORE_{name}")
        keys = {"target": secured.address, "token_file": str(tmp_path / "token"), "ca": ca, "timeout": 9}
        with with_keys(**keys) as client:
            assert client.score("a", numbered(1)).means == expected(1, ["a"]) and client.timeout == 9
            assert secured.requests[-1].priority == 1


def test_a_key_that_is_not_known_is_an_error_naming_those_that_are(with_keys: Any) -> None:
    with pytest.raises(sc.ConfigurationError, match="'timeuot': not known .* priority, .*timeout") as caught:
        with_keys(target="scorer:1", timeuot=5)
    for known in ("target", "token", "token_file", "tls", "ca", "codec", "max_in_flight"):
        assert known in str(caught.value)
    with pytest.raises(sc.ConfigurationError, match="priority is 'evaluate'"):
        with_keys(target="scorer:1", priority="evaluate")
    with pytest.raises(sc.ConfigurationError, match="SPATIALSCORE_TARGET"):
        with_keys()


# flow_grpo: yifan123/flow_grpo at ac4c86e8cae021841f1fde853d340e0db67690dd.


def multi_score(device: Any, score_dict: dict[str, float], score_functions: dict[str, Any]) -> Any:
    """What flow_grpo/rewards.py does with a factory and with its function, in its words."""
    score_fns = {
        name: score_functions[name](device)
        if "device" in score_functions[name].__code__.co_varnames
        else score_functions[name]()
        for name in score_dict
    }

    def _fn(images: Any, prompts: Any, metadata: Any, only_strict: bool = True) -> Any:
        total_scores: list[Any] = []
        score_details = {}
        for name, weight in score_dict.items():
            scores, rewards = score_fns[name](images, prompts, metadata)
            score_details[name] = scores
            weighted = [weight * score for score in scores]
            total_scores = (
                weighted if not total_scores else [a + b for a, b in zip(total_scores, weighted, strict=True)]
            )
        score_details["avg"] = total_scores
        return score_details, {}

    return _fn


def test_flow_grpo(served: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    score = multi_score("cuda", {"spatialscore": 2.0}, {"spatialscore": flow_grpo.spatialscore})
    batch = np.stack(numbered(4))
    with ThreadPoolExecutor(8) as executor:
        futures = [executor.submit(score, batch, PROMPTS, [{}] * 4, only_strict=True) for _ in range(32)]
        for future in futures:
            details, _ = future.result()
            assert details["spatialscore"] == expected(4, PROMPTS)
            assert details["avg"] == [2 * value for value in details["spatialscore"]]
    monkeypatch.setenv("SPATIALSCORE_PRIORITY", "evaluation")
    multi_score("cuda", {"spatialscore": 1.0}, {"spatialscore": flow_grpo.spatialscore})(batch, PROMPTS, {})
    assert [request.priority for request in served.requests[-2:]] == [1, 2]
    served.bad_items = {3: "INTERNAL"}
    with pytest.raises(sc.ItemsFailedError):
        score(batch, PROMPTS, {})


def test_flow_grpo_takes_what_its_sampler_makes(served: Fake) -> None:
    torch = pytest.importorskip("torch")
    scores, details = flow_grpo.spatialscore(torch.device("cpu"))(tensors(4), tuple(PROMPTS), {})
    assert scores == expected(4, PROMPTS) and details["spatialscore_stddev"] == [0.5] * 4
    assert torch.as_tensor(scores).float().shape == (4,)


def flow_grpo_rewards(entries: str) -> Any:
    """Its own rewards.py from a checkout in SPATIALSCORE_FLOW_GRPO, with the entries that a user adds."""
    pytest.importorskip("torch")
    source = (checkout("SPATIALSCORE_FLOW_GRPO") / "flow_grpo/rewards.py").read_text()
    patched = source.replace('"geneval": geneval_score,', f'"geneval": geneval_score, {entries},')
    assert patched != source
    module = types.ModuleType("rewards")
    ours = "from spatialscore_client.adapters.flow_grpo import columns, spatialscore\n"
    exec(compile(ours + patched, "rewards", "exec"), module.__dict__)
    return module


def test_flow_grpo_itself(served: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own multi_score and its statistics."""
    module = flow_grpo_rewards('"spatialscore": spatialscore')
    import torch

    score = module.multi_score(torch.device("cpu"), {"spatialscore": 1.0, "jpeg_compressibility": 0.1})
    with ThreadPoolExecutor(8) as executor:
        details, _ = executor.submit(score, tensors(4), tuple(PROMPTS), [{}] * 4, only_strict=True).result()
    assert details["spatialscore"] == expected(4, PROMPTS) and len(details["avg"]) == 4
    monkeypatch.syspath_prepend(str(checkout("SPATIALSCORE_FLOW_GRPO")))
    tracker = importlib.import_module("flow_grpo.stat_tracking").PerPromptStatTracker(global_std=True)
    advantages = tracker.update(["a"] * 4, np.array(details["spatialscore"]))
    assert np.isfinite(advantages).all() and (np.diff(advantages) > 0).all()


# Flow-Factory: X-GenGroup/Flow-Factory at a0b2bc5a2b4fbf9125429b3fb70c0c5d7631047c.


class BaseRewardModel:
    """What src/flow_factory/rewards/abc.py gives a reward model."""

    def __init__(self, config: Any, accelerator: Any) -> None:
        self.accelerator, self.config = accelerator, config


class PointwiseRewardModel(BaseRewardModel):
    """Its marker for rewards of single samples."""


class GroupwiseRewardModel(BaseRewardModel):
    """Its marker for rewards of groups."""


class RewardModelOutput:
    """Its output."""

    def __init__(self, rewards: Any, extra_info: Any = None) -> None:
        self.rewards, self.extra_info = rewards, extra_info


@pytest.fixture
def played_flow_factory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    rewards = types.ModuleType("flow_factory.rewards")
    for kind in (PointwiseRewardModel, GroupwiseRewardModel, RewardModelOutput):
        setattr(rewards, kind.__name__, kind)
    monkeypatch.setitem(sys.modules, "flow_factory", types.ModuleType("flow_factory"))
    monkeypatch.setitem(sys.modules, "flow_factory.rewards", rewards)
    with played("flow_factory", monkeypatch) as adapter:
        yield adapter


def test_flow_factory_groups(fake: Fake, played_flow_factory: Any) -> None:
    config = types.SimpleNamespace(extra_kwargs={"target": fake.address, "timeout": 10})
    model = played_flow_factory.SpatialScoreGroupReward(config=config, accelerator=None)
    output = model(prompt=["p"] * 3, image=numbered(3))
    # With a standard deviation of a half, neighbours lie 1.41 deviations of their difference apart.
    assert output.rewards == [pytest.approx(x, abs=1e-3) for x in (0.04, 0.5, 0.96)]
    assert output.extra_info["mean"] == expected(3, ["p"] * 3)


def test_flow_factory_points(fake: Fake, played_flow_factory: Any) -> None:
    pytest.importorskip("torch")
    config = types.SimpleNamespace(extra_kwargs={"target": fake.address, "timeout": 10})
    output = played_flow_factory.SpatialScoreReward(config=config, accelerator=None)(prompt=PROMPTS, image=tensors(4))
    assert output.rewards.tolist() == expected(4, PROMPTS)


def flow_factory_processor(monkeypatch: pytest.MonkeyPatch, entries: list[dict[str, Any]]) -> Any:
    """Its own YAML's classes, loader and processor, from a checkout in SPATIALSCORE_FLOW_FACTORY."""
    pytest.importorskip("torch")
    monkeypatch.syspath_prepend(str(checkout("SPATIALSCORE_FLOW_FACTORY") / "src"))
    from accelerate import Accelerator
    from flow_factory.hparams import MultiRewardArguments
    from flow_factory.rewards import MultiRewardLoader, RewardProcessor

    here = "spatialscore_client.adapters.flow_factory"
    common = {"timeout": 10, "device": "cpu", "batch_size": 3}
    arguments = MultiRewardArguments.from_dict(
        [{**common, **entry, "reward_model": f"{here}.{entry['reward_model']}"} for entry in entries]
    )
    accelerator = Accelerator(cpu=True)
    loader = MultiRewardLoader(reward_args=arguments, accelerator=accelerator).load()
    return RewardProcessor(
        accelerator, loader.get_training_reward_models(), loader.get_reward_configs("train"),
        group_on_same_rank=True, verbose=False,
    )  # fmt: skip


def flow_factory_samples(prompts: list[str], images: Any) -> Any:
    from flow_factory.samples import T2ISample

    pairs = zip(prompts, images, strict=True)
    return [T2ISample(image=image, prompt=prompt, _unique_id=7) for prompt, image in pairs]


def test_flow_factory_itself(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own loader, base classes, samples and processor."""
    kinds = {"point": "SpatialScoreReward", "group": "SpatialScoreGroupReward"}
    entries = [{"name": name, "reward_model": kind, "target": fake.address} for name, kind in kinds.items()]
    processor = flow_factory_processor(monkeypatch, entries)
    samples = flow_factory_samples(["same"] * 4, tensors(4))
    rewards = processor.compute_rewards(samples)
    assert rewards["point"].tolist() == expected(4, ["same"] * 4)
    assert rewards["group"].argsort().tolist() == [0, 1, 2, 3] and np.isfinite(rewards["group"].numpy()).all()
    fake.bad_items = {3: "INTERNAL"}
    with pytest.raises(sc.ItemsFailedError):
        processor.compute_rewards(samples)


def test_flow_factory_itself_keeps_the_best_and_the_worst(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe of the paper's filter, as docs/trainers.md has it, on its own trainer, rewards and samples."""
    entry = {"name": "spatialscore", "reward_model": "SpatialScoreReward", "target": fake.address}
    processor = flow_factory_processor(monkeypatch, [entry])
    pytest.importorskip("imageio", reason="its trainers want imageio")
    from flow_factory.samples import BaseSample, T2ISample

    (block,) = [
        each for each in re.findall(r"```python\n(.*?)```", TRAINERS.read_text(), re.S) if "BestAndWorst" in each
    ]
    names: dict[str, Any] = {}
    exec(block, names)
    trainer = object.__new__(names["BestAndWorst"])
    # Two groups of 24, one beside the other, the better pictures last.
    images = [*tensors(48)]
    samples = [T2ISample(image=image, prompt="same", _unique_id=number % 2) for number, image in enumerate(images)]
    scored = processor.compute_rewards(samples)
    trainer.reward_buffer = types.SimpleNamespace(finalize=lambda **_: scored)
    trainer.advantage_processor = types.SimpleNamespace(group_on_same_rank=True)
    whole = list(samples)
    trainer.prepare_feedback(samples)
    ends = [[*range(group, 12 + group, 2), *range(36 + group, 48 + group, 2)] for group in (0, 1)]
    place_of = {id(sample): place for place, sample in enumerate(whole)}
    assert [place_of[id(sample)] for sample in samples] == [*ends[0], *ends[1]]
    advantages = BaseSample.stack(samples)["advantage"].reshape(2, 12)
    for group, places in zip(advantages, ends, strict=True):
        rewards = np.array(places, np.float64)
        assert group.tolist() == pytest.approx(list((rewards - rewards.mean()) / rewards.std()), abs=1e-3)
    trainer.advantage_processor.group_on_same_rank = False
    with pytest.raises(ValueError, match="group_contiguous"):
        trainer.prepare_feedback(whole)


# UniRL: `unirl` 0.2.0 of PyPI, and Tencent-Hunyuan/UniRL at 1a7b501e8fe8517b432a130220d2ff462f9b5afa by a checkout.


def unirl_service(**keys: Any) -> Any:
    """Its own service around our backend, by the `_target_` of a recipe."""
    pytest.importorskip("unirl", reason="unirl is not installed")
    hydra = pytest.importorskip("hydra.utils")
    backend = {"_target_": "spatialscore_client.adapters.unirl.SpatialScoreBackend", "timeout": 10.0, **keys}
    return hydra.instantiate({"_target_": "unirl.reward.service.RewardService", "backend": backend})


def unirl_request(prompts: list[str], images: Any) -> Any:
    from unirl.types.primitives import Image, Images, Texts
    from unirl.types.reward import RewardRequest

    texts = Texts(texts=list(prompts))
    known = RewardRequest.__dataclass_fields__
    said = {"generation_prompt": texts} if "generation_prompt" in known else {"primitives": {"text": texts}}
    return RewardRequest(generated={"image": Images.from_list([Image(pixels=each) for each in images])}, **said)


def test_unirl_itself(fake: Fake) -> None:
    """Its own types, base class and service."""
    service = unirl_service(target=[fake.address])
    from unirl.reward.base import RewardBackend

    assert isinstance(service.backend, RewardBackend)
    assert service.preferred_input_kind == "image" and service.is_available()
    request = unirl_request(PROMPTS, tensors(4))
    response = service.compute_rewards(request)
    assert response.rewards == expected(4, PROMPTS)
    assert response.component_rewards == {"spatialscore": response.rewards, "spatialscore_stddev": [0.5] * 4}
    assert response.successes == [True] * 4 and response.errors == [None] * 4 and response.batch_size == 4
    fake.bad_items = {1: "INTERNAL"}
    with pytest.raises(sc.ItemsFailedError, match="item 1"):
        service.compute_rewards(request)
    service.dispose()
    fake.stop()
    assert not service.is_available()


# TRL 1.16.


def test_trl(fake: Fake) -> None:
    """As GRPOTrainer._calculate_rewards calls it."""
    client = sc.SpatialScoreClient(fake.address, timeout=10)
    columns = {"image": numbered(4), "caption": ["x" * 9] * 4, "trainer_state": object(), "log_metric": print}
    calls = {"prompts": PROMPTS, "completions": ["c"] * 4, "completion_ids": [[1], [2], [3], [4]]}
    assert trl.reward(client)(**calls, **columns) == expected(4, PROMPTS)
    assert trl.reward(client, prompt="caption")(**calls, **columns) == expected(4, ["x" * 9] * 4)

    def draw(prompt: str, completion: str, row: dict[str, Any]) -> Any:
        return numbered(10)[int(completion)]

    chat = {
        "prompts": [[{"role": "system", "content": "no"}, {"role": "user", "content": prompt}] for prompt in PROMPTS],
        "completions": [[{"role": "assistant", "content": str(number)}] for number in range(4)],
    }
    assert trl.reward(client, image=draw)(**chat) == expected(4, PROMPTS)
    parts = [{"type": "image"}, {"type": "text", "text": "bb"}]
    assert trl.reward(client, image=draw)([[{"role": "user", "content": parts}]], ["1"]) == [pytest.approx(1.002)]

    async def draw_slowly(prompt: str, completion: str, row: dict[str, Any]) -> Any:
        return draw(prompt, completion, row)

    async def both() -> Any:
        async with sc.AsyncSpatialScoreClient(fake.address, timeout=10) as client:
            first = trl.async_reward(client, image=draw_slowly)(**chat)
            return await asyncio.gather(first, trl.async_reward(client, image=draw)(**chat))

    assert asyncio.run(both()) == [expected(4, PROMPTS)] * 2
    # TRL logs a reward that is a partial by the name of its function.
    names = {trl.reward(client).func.__name__, trl.async_reward(client).func.__name__}  # type: ignore[arg-type]
    assert names == {"spatialscore"}
    fake.bad_items = {0: "INTERNAL"}
    with pytest.raises(sc.ItemsFailedError):
        trl.reward(client)(**calls, **columns)
    client.close()


def grpo_trainer(folder: Path, reward_funcs: Any, **arguments: Any) -> Any:
    """GRPOTrainer with a tiny model of random weights, for one step of four completions."""
    pytest.importorskip("trl", reason="trl is not installed")
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
    from trl import GRPOConfig, GRPOTrainer

    words = {word: number for number, word in enumerate(["<pad>", "<eos>", "a", "cup", "left", "of", "book"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokens = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    config = Qwen2Config(
        vocab_size=len(words), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64,
        pad_token_id=0, eos_token_id=1, bos_token_id=1,
    )  # fmt: skip
    return GRPOTrainer(
        model=Qwen2ForCausalLM(config),
        reward_funcs=reward_funcs,
        args=GRPOConfig(
            output_dir=str(folder), per_device_train_batch_size=4, num_generations=4, max_completion_length=4,
            max_steps=1, logging_steps=1, report_to=[], use_cpu=True, save_strategy="no", **arguments,
        ),
        train_dataset=Dataset.from_dict({"prompt": ["a cup left of a book"] * 4, "offset": [10] * 4}),
        processing_class=tokens,
    )  # fmt: skip


def logged(trainer: Any) -> dict[str, float]:
    return {key: value for entry in trainer.state.log_history for key, value in entry.items()}


@pytest.mark.parametrize("asynchronous", [False, True])
def test_trl_itself(fake: Fake, tmp_path: Path, asynchronous: bool) -> None:
    """A step of GRPOTrainer: its reward path gives the policy our scores."""
    drawn: list[int] = []

    def draw(prompt: str, completion: str, row: dict[str, Any]) -> Any:
        drawn.append(len(drawn))
        return numbered(100)[drawn[-1] + row["offset"]]

    client = (sc.AsyncSpatialScoreClient if asynchronous else sc.SpatialScoreClient)(fake.address, timeout=20)
    trainer = grpo_trainer(tmp_path, (trl.async_reward if asynchronous else trl.reward)(client, image=draw))
    trainer.train()
    mean = np.mean([10, 11, 12, 13]) + len("a cup left of a book") / 1000
    assert len(drawn) == 4 and logged(trainer)["reward"] == pytest.approx(mean, abs=1e-3)
    assert logged(trainer)["rewards/spatialscore/mean"] == pytest.approx(mean, abs=1e-3)
    fake.bad_items = {14: "INTERNAL"}
    with pytest.raises(sc.ItemsFailedError):
        trainer.train()
