"""The README's Python works when it is pasted."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import numbered
from fake import Fake
from test_connections import certificates, server_credentials
from test_explain import EXPLAINED, SAMPLE, answering, saying

__all__ = ["certificates"]

README = Path(__file__).resolve().parent.parent / "README.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", README.read_text(), flags=re.M | re.S)


class GRPOTrainer:
    """Where TRL's would stand, which test_adapters.py runs: calls the reward as it does."""

    def __init__(self, model: str, reward_funcs: Any, train_dataset: Any) -> None:
        self.rewards = reward_funcs(prompts=["a"] * 2, completions=["0", "1"], completion_ids=[[0], [1]])


def test_every_snippet_runs(fake: Fake, certificates: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(BLOCKS) == 9
    (tmp_path / "token").write_text("secret\n")
    monkeypatch.setenv("SPATIALSCORE_TARGET", fake.address)
    images = numbered(24)
    with (
        Fake(credentials=server_credentials(certificates), token="secret") as secured,
        saying(answering(*EXPLAINED)) as http,
    ):
        names: dict[str, Any] = {
            "images": images,
            "prompts": ["a", "b"],
            "prompt": "a cup",
            "rewards": [None, None],
            "pipeline": lambda prompt: SimpleNamespace(images=[images["ab".index(prompt)]]),
            "render": lambda completion: images[int(completion)],
            "dataset": None,
            "GRPOTrainer": GRPOTrainer,
        }
        for block in BLOCKS:
            block = block.replace("scorer:50051", fake.address).replace("http://scorer:8080", http)
            block = block.replace("banana.png", str(SAMPLE))
            for number in (0, 1):
                block = block.replace(f"scorer-{number}:50051", secured.address)
            block = block.replace("/run/secrets/token", str(tmp_path / "token"))
            block = block.replace("/etc/scorer/ca.pem", str(certificates / "authority.pem"))
            exec(block, names)
            if "tls=TLS" in block:
                assert len(names["client"].score("p", images)) == 24
                # The snippets that follow are of other servers.
                names["prompts"] = ["a"] * 24
    assert names["best_first"] == list(range(23, -1, -1))
    assert names["doubt"] < 0.5 and names["kept"].indices == [*range(6), *range(18, 24)]
    assert names["rewards"] == [pytest.approx(number + 0.001) for number in range(24)]
    assert names["trainer"].rewards == [pytest.approx(0.001), pytest.approx(1.001)]
    assert names["score_functions"]["spatialscore"]("cuda")(images[:2], ["a", "b"], {})[0] == [
        pytest.approx(0.001),
        pytest.approx(1.001),
    ]
