"""The server's HTTP port as the trainers' own remote reward clients use it: where a framework is installed, or a
checkout of it stands where an environment variable says, its client itself; else its part is played here, from the
commit that is named."""

from __future__ import annotations

import base64
import hashlib
import io
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_adapters import checkout
from test_connections import certificates
from test_readme import README
from test_server import Server

import spatialscore_client as sc

requests = pytest.importorskip("requests")

__all__ = ["certificates"]

PROMPT = "a red box above a blue box"
TOKEN = "secret-of-more-than-sixteen-letters"


def drawn(number: int, side: int = 128) -> Any:
    pixels = np.full((side, side, 3), 255, np.uint8)
    pixels[number * 8 : number * 8 + 20, 30:60] = (200, 0, 0)
    return Image.fromarray(pixels)


def tensor(image: Any) -> Any:
    import torch

    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 255


def png(image: Any) -> str:
    file = io.BytesIO()
    image.save(file, format="PNG")
    return base64.b64encode(file.getvalue()).decode()


# UniRL: `unirl` 0.2.0 of PyPI; what it does there, Tencent-Hunyuan/UniRL at 1a7b501e8fe8517b432a130220d2ff462f9b5afa
# does too, without versions and names, and with another try after every 4xx.


class PlayedUniRL:
    """What unirl/reward/remote.py does between a request and its response."""

    def __init__(self, base_url: str, required_rewards: tuple[str, ...] = ("spatialscore",), **spec: Any) -> None:
        self.base_url, self.required_rewards, self.spec = base_url, list(required_rewards), spec
        self.session = requests.Session()
        self.session.trust_env = False

    def is_available(self) -> bool:
        try:
            response = self.session.get(f"{self.base_url}/health", timeout=5.0)
        except requests.exceptions.RequestException:
            return False
        if response.status_code != 200:
            return False
        missing = [name for name in self.required_rewards if name not in response.json()["rewards"]]
        if missing:
            raise ValueError(f"required_rewards={missing} not served")
        return True

    def score(self, prompts: list[str], images: list[Any]) -> Any:
        wire = [
            {
                "history": [{"text": prompt, "image_b64": png(image)}],
                "required_rewards": self.required_rewards,
                "metadata": None,
                "request_id": f"request-{index}",
                "sample_id": f"sample-{index}",
                "group_id": None,
                "source_rank": None,
                "policy_version": None,
                "scorer_version": self.spec.get("expected_scorer_version"),
                "idempotency_key": hashlib.sha256(prompt.encode()).hexdigest(),
            }
            for index, (prompt, image) in enumerate(zip(prompts, images, strict=True))
        ]
        raw = self.post({"protocol_version": "1", "requests": wire})
        assert raw.get("protocol_version") in (None, "1")
        for expected, actual in zip(wire, raw["identities"], strict=True):
            for key in ("request_id", "sample_id", "group_id", "source_rank", "policy_version", "idempotency_key"):
                assert actual.get(key) == expected.get(key)
            assert self.spec.get("expected_scorer_version") in (None, actual["scorer_version"])
        rewards, successes, errors = [], [], []
        components: dict[str, list[float]] = {name: [] for name in self.required_rewards}
        for result, error in zip(raw["results"], raw["errors"], strict=True):
            scores, parts = [], []
            for name in self.required_rewards:
                if name in result:
                    values = list(result[name].values())
                    assert all(isinstance(value, float) and np.isfinite(value) for value in values)
                    scores.append((float(values[0]), self.spec.get("reward_weights", {}).get(name, 1.0)))
                    components[name].append(float(values[0]))
                else:
                    components[name].append(0.0)
                    parts.append(f"{name}: {error.get(name, 'missing from server response without error')}")
            total = sum(weight for _, weight in scores)
            rewards.append(sum(score * weight for score, weight in scores) / total if total else 0.0)
            successes.append(bool(scores) and not parts)
            errors.append("; ".join(parts) or None)
        return SimpleNamespace(
            rewards=rewards, component_rewards=components, successes=successes, errors=errors, images=images
        )

    def post(self, payload: dict[str, Any]) -> Any:
        last: BaseException | None = None
        for attempt in range(3):
            try:
                response = self.session.post(f"{self.base_url}/score", json=payload, timeout=300.0)
                response.raise_for_status()
                return response.json()
            except requests.exceptions.RequestException as error:
                code = 500 if error.response is None else error.response.status_code
                if 400 <= code < 500 and code != 429:
                    raise
                last = error
            if attempt < 2:
                time.sleep(1.0)
        raise RuntimeError("failed after 3 retries") from last


class UniRLItself:
    """Its own client."""

    def __init__(self, base_url: str, required_rewards: tuple[str, ...] = ("spatialscore",), **spec: Any) -> None:
        pytest.importorskip("unirl", reason="unirl is not installed")
        from unirl.reward.remote import RemoteRewardBackend, RemoteRewardSpec

        known = RemoteRewardSpec.__dataclass_fields__
        spec = {"require_identity_echo": True, "image_format": "PNG", **spec}
        config = RemoteRewardSpec(
            base_url=base_url,
            required_rewards=required_rewards,
            **{name: value for name, value in spec.items() if name in known},
        )
        self.backend = RemoteRewardBackend(config=config, base_device="cpu")

    def is_available(self) -> bool:
        return bool(self.backend.is_available())

    def score(self, prompts: list[str], images: list[Any]) -> Any:
        from unirl.types.primitives import Image as Frame
        from unirl.types.primitives import Images, Texts
        from unirl.types.reward import RewardRequest

        tensors = [tensor(image) for image in images]
        known = RewardRequest.__dataclass_fields__
        texts = Texts(texts=list(prompts))
        words = {"generation_prompt": texts} if "generation_prompt" in known else {"primitives": {"text": texts}}
        request = RewardRequest(
            generated={"image": Images.from_list([Frame(pixels=each) for each in tensors])}, **words
        )
        response = self.backend.compute_rewards(request)
        # What it has made of the tensors.
        response.images = request.images
        return response


@pytest.fixture(params=[PlayedUniRL, UniRLItself])
def unirl(request: Any) -> Any:
    return request.param


# Flow-Factory: X-GenGroup/Flow-Factory at a0b2bc5a2b4fbf9125429b3fb70c0c5d7631047c.


class PlayedFlowFactory:
    """The RemoteRewardClient of src/flow_factory/rewards/my_reward_remote.py."""

    def __init__(self, server_url: str, timeout: float = 60.0, retries: int = 3) -> None:
        self.url, self.timeout, self.retries = server_url, timeout, retries
        self.session = requests.Session()

    def health_check(self) -> bool:
        try:
            return bool(self.session.get(f"{self.url}/health", timeout=5.0).ok)
        except Exception:
            return False

    def compute(self, prompt: list[str], image: list[Any] | None = None) -> list[float]:
        payload = {
            "prompt": prompt,
            "image": [png(each) for each in image] if image else None,
            "video": None,
            "condition_images": None,
            "condition_videos": None,
        }
        for attempt in range(self.retries):
            try:
                response = self.session.post(f"{self.url}/compute", json=payload, timeout=self.timeout)
                response.raise_for_status()
                data = response.json()
                if data.get("error"):
                    raise RuntimeError(f"Server error: {data['error']}")
                return list(data["rewards"])
            except requests.RequestException as error:
                if attempt == self.retries - 1:
                    raise RuntimeError(f"Failed to connect to {self.url}: {error}") from error
        raise RuntimeError("Unreachable")


@pytest.fixture(params=["played", "itself"])
def flow_factory(request: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    if request.param == "played":
        return PlayedFlowFactory
    pytest.importorskip("torch")
    monkeypatch.syspath_prepend(str(checkout("SPATIALSCORE_FLOW_FACTORY") / "src"))
    from flow_factory.rewards.my_reward_remote import RemoteRewardClient

    return RemoteRewardClient


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server(http__listen="127.0.0.1:0", limits__max_image_pixels=20000, queue__max_items=512) as server:
        yield server


@pytest.fixture(scope="module")
def grpc(server: Server) -> Iterator[Callable[[list[Any]], list[sc.Score]]]:
    """The scores of pictures over gRPC."""
    with sc.SpatialScoreClient(server.address, timeout=300) as client:
        yield lambda images: list(client.score(PROMPT, images))


def test_unirl_has_the_scores_of_grpc(server: Server, grpc: Any, unirl: Any) -> None:
    backend = unirl(server.http)
    assert backend.is_available()
    response = backend.score([PROMPT] * 12, [drawn(number) for number in range(12)])
    scores = grpc(response.images)
    assert response.rewards == [score.mean for score in scores] and len(set(response.rewards)) > 6
    assert response.component_rewards == {"spatialscore": response.rewards}
    assert response.successes == [True] * 12 and response.errors == [None] * 12


def test_unirl_has_sigma_beside_the_reward_if_it_asks(server: Server, grpc: Any, unirl: Any) -> None:
    names = ("spatialscore", "spatialscore_stddev")
    backend = unirl(server.http, names, reward_weights={"spatialscore": 1.0, "spatialscore_stddev": 0.0})
    assert backend.is_available()
    response = backend.score([PROMPT] * 4, [drawn(number) for number in range(4)])
    scores = grpc(response.images)
    assert response.rewards == [score.mean for score in scores]
    assert response.component_rewards["spatialscore_stddev"] == [score.stddev for score in scores]


def test_unirl_takes_an_item_without_a_score_for_failed(server: Server, grpc: Any, unirl: Any) -> None:
    response = unirl(server.http).score([PROMPT] * 3, [drawn(0), drawn(1, side=200), drawn(2)])
    assert response.successes == [True, False, True]
    assert "200 x 200, 40000 pixels; it may have 20000" in response.errors[1]
    assert [response.rewards[0], response.rewards[2]] == [score.mean for score in grpc([drawn(0), drawn(2)])]


def test_unirl_can_pin_the_checkpoint(server: Server, unirl: Any) -> None:
    with sc.SpatialScoreClient(server.address, timeout=300) as client:
        revision = client.model().revision
    images = [drawn(0)]
    assert unirl(server.http, expected_scorer_version=revision).score([PROMPT], images).successes == [True]
    with pytest.raises(requests.HTTPError, match="400 Client Error: requests.0..scorer_version: is pinned to"):
        unirl(server.http, expected_scorer_version="another").score([PROMPT], images)


def test_unirl_sees_what_is_not_served(server: Server, unirl: Any) -> None:
    with pytest.raises(ValueError, match="clip"):
        unirl(server.http, ("spatialscore", "clip")).is_available()
    with pytest.raises(requests.HTTPError, match=r"400 Client Error: requests\[0\]\.required_rewards\[0\]: unknown"):
        unirl(server.http, ("clip",)).score([PROMPT], [drawn(0)])


def test_flow_factory_has_the_scores_of_grpc(server: Server, grpc: Any, flow_factory: Any) -> None:
    client = flow_factory(server.http)
    assert client.health_check()
    images = [drawn(number) for number in range(12)]
    assert client.compute(prompt=[PROMPT] * 12, image=images) == [score.mean for score in grpc(images)]


def test_flow_factory_raises_what_is_wrong_and_gets_no_number(server: Server, flow_factory: Any) -> None:
    client = flow_factory(server.http)
    words = r"Server error: 1 of 3 pictures have no score: items\[1\].image.encoded: the picture is 200 x 200"
    with pytest.raises(RuntimeError, match=words):
        client.compute(prompt=[PROMPT] * 3, image=[drawn(0), drawn(1, side=200), drawn(2)])
    with pytest.raises(RuntimeError, match="Server error: image: has 0 pictures for 1 prompts"):
        client.compute(prompt=[PROMPT], image=None)


def test_a_full_queue_costs_time_and_no_answer(flow_factory: Any) -> None:
    settings = {"queue__max_items": 4, "batch__max_items": 2, "limits__max_items_per_request": 4}
    with Server(http__listen="127.0.0.1:0", cache__max_items=0, **settings) as server:
        images = [drawn(number) for number in range(8)]
        client = flow_factory(server.http, retries=40)
        alone = [client.compute(prompt=[PROMPT], image=[image])[0] for image in images]

        def group(number: int) -> list[float]:
            own = flow_factory(server.http, retries=40)
            return list(own.compute(prompt=[PROMPT] * 4, image=[images[(number + k) % 8] for k in range(4)]))

        with ThreadPoolExecutor(4) as pool:
            for number, rewards in enumerate(pool.map(group, range(12))):
                assert rewards == [pytest.approx(alone[(number + k) % 8], abs=1e-4) for k in range(4)]


def test_a_body_that_is_too_large_is_said_to_be(unirl: Any, flow_factory: Any) -> None:
    with Server(http__listen="127.0.0.1:0", limits__max_message_bytes=10_000) as server:
        noise = np.random.default_rng(0).integers(0, 256, (512, 512, 3), np.uint8)
        # 6 MB: most of it is not on its way yet when the server says no.
        images = [Image.fromarray(noise)] * 6
        with pytest.raises(requests.HTTPError, match="413 Client Error: body: has more than 10000 bytes"):
            unirl(server.http).score([PROMPT] * 6, images)
        with pytest.raises(RuntimeError, match="413 Client Error: body: has more than 10000 bytes"):
            flow_factory(server.http).compute(prompt=[PROMPT] * 6, image=images)


def test_tokens_stand_in_the_url_and_tls_is_that_of_grpc(
    unirl: Any, flow_factory: Any, certificates: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tokens").write_text(f"trainer:{TOKEN}\n")
    files = {"tls__certificate": certificates / "server.pem", "tls__key": certificates / "server.key"}
    tokens = {"auth__tokens_file": tmp_path / "tokens"}
    with Server(http__listen="127.0.0.1:0", **tokens) as server:
        assert unirl(server.http).is_available() and flow_factory(server.http).health_check()
        with pytest.raises(requests.HTTPError, match="401 Client Error: this server asks for a token"):
            unirl(server.http).score([PROMPT], [drawn(0)])
        with pytest.raises(RuntimeError, match="401 Client Error: this server asks for a token"):
            flow_factory(server.http).compute(prompt=[PROMPT], image=[drawn(0)])
        url = server.http.replace("http://", f"http://trainer:{TOKEN}@")
        reward = flow_factory(url).compute(prompt=[PROMPT], image=[drawn(0)])
        assert unirl(url).score([PROMPT], [drawn(0)]).rewards == reward
        server.stop()
        assert not unirl(url).is_available() and not flow_factory(url).health_check()
    with Server(http__listen="127.0.0.1:0", **tokens, **files) as server:
        url = server.http.replace("https://", f"https://trainer:{TOKEN}@")
        assert not flow_factory(url).health_check()
        # The client of UniRL knows public authorities alone.
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificates / "authority.pem"))
        assert flow_factory(url).compute(prompt=[PROMPT], image=[drawn(0)]) == reward


def blocks(language: str) -> list[str]:
    return [block.split("```")[0] for block in README.read_text().split(f"```{language}\n")[1:]]


def test_the_snippets_work_as_pasted(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The YAML of the README in UniRL's own loader and in Flow-Factory's."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("unirl", reason="unirl is not installed")
    instantiate = pytest.importorskip("hydra.utils").instantiate
    from omegaconf import OmegaConf

    monkeypatch.syspath_prepend(str(checkout("SPATIALSCORE_FLOW_FACTORY") / "src"))
    snippets = [block for block in blocks("yaml") if ":8080" in block]
    assert len(snippets) == 2
    flow_factory, unirl = (OmegaConf.create(each.replace("http://scorer:8080", server.http)) for each in snippets)

    service = instantiate(unirl.reward)
    assert service.preferred_input_kind == "image" and service.is_available()
    service.dispose()

    from accelerate import Accelerator
    from flow_factory.hparams import MultiRewardArguments
    from flow_factory.rewards import MultiRewardLoader, RewardProcessor
    from flow_factory.samples import T2ISample

    rewards = [{**each, "device": "cpu"} for each in OmegaConf.to_container(flow_factory.rewards)]
    accelerator = Accelerator(cpu=True)
    loader = MultiRewardLoader(reward_args=MultiRewardArguments.from_dict(rewards), accelerator=accelerator).load()
    processor = RewardProcessor(
        accelerator, loader.get_training_reward_models(), loader.get_reward_configs("train"),
        group_on_same_rank=True, verbose=False,
    )  # fmt: skip
    images = [
        torch.from_numpy(np.asarray(drawn(number)).copy()).permute(2, 0, 1).float() / 255 for number in range(4)
    ]
    samples = [T2ISample(image=image, prompt=PROMPT, _unique_id=7) for image in images]
    scored = processor.compute_rewards(samples)["spatialscore"]
    assert torch.isfinite(scored).all() and len(set(scored.tolist())) == 4
