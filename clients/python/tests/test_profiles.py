"""References, questions and components against real servers of profiles that ship, and the reference's numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from test_server import Server

import spatialscore_client as sc

FIXTURES = ROOT / "tests/fixtures/profiles"


def read(name: str) -> Any:
    return json.loads((FIXTURES / name).read_text())


def profile(name: str, folder: Path, **changes: Any) -> str:
    """A profile that ships, with changes."""
    told = json.loads((ROOT / f"src/model/profile/shipped/{name}.json").read_text()) | changes
    file = folder / f"{name}.json"
    file.write_text(json.dumps(told))
    return str(file)


def near(number: float, wanted: float) -> bool:
    return number == pytest.approx(wanted, rel=1e-4, abs=1e-5)


def test_a_model_that_compares_has_references_and_components(connect: Any, tmp_path: Path) -> None:
    file = read("editreward.json")
    items = file["items"]
    told = profile("editreward", tmp_path, base=str(FIXTURES / file["base"]))
    with Server(model__checkpoint=FIXTURES / "editreward", model__reward_config=told) as server:
        client = connect(server.address, timeout=120.0)
        model = client.model()
        assert (model.pictures, model.components, model.takes_questions) == (2, ("following", "quality"), False)
        prompts = [item["prompt"] for item in items]
        paths = [[str(FIXTURES / path) for path in item["pictures"]] for item in items]
        judged, references = [each[-1] for each in paths], [each[:-1] for each in paths]
        scores = client.score(prompts, judged, references=references)
        for score, item in zip(scores, items, strict=True):
            assert near(score.mean, item["fused"]["mean"]["mean"])
            assert near(score.stddev, item["fused"]["mean"]["sigma"])
            for part, wanted in zip(score.components, item["components"], strict=True):
                assert part.name == wanted["name"]
                assert near(part.mean, wanted["mean"])
                assert near(part.stddev, wanted["sigma"])
        assert list(scores.components) == ["following", "quality"]
        streamed = client.stream(zip(prompts, judged, references, strict=True))
        assert {each.index: each.score for each in streamed} == dict(enumerate(scores))
        with pytest.raises(sc.ItemsFailedError, match="reads 2 pictures"):
            client.score(prompts[0], judged[:1])


def test_questions_are_components_and_need_no_prompt(connect: Any, tmp_path: Path) -> None:
    case = read("soft_tifa.json")[0]
    told = profile("soft-tifa-geometric", tmp_path, instruction=case["text"])
    with Server(model__checkpoint=FIXTURES / case["base"], model__reward_config=told) as server:
        client = connect(server.address, timeout=120.0)
        assert client.model().takes_questions
        pictures = [str(FIXTURES / item["pictures"][0]) for item in case["items"]]
        questions = [
            [sc.Question(each["question"], each["answers"]) for each in item["questions"]] for item in case["items"]
        ]
        scores = client.score(None, pictures, questions=questions)
        for score, item in zip(scores, case["items"], strict=True):
            assert near(score.mean, item["geometric"])
            assert score.stddev is None
            for part, wanted in zip(score.components, item["questions"], strict=True):
                assert part.name == wanted["question"]
                assert near(part.mean, wanted["probability"])
        with pytest.raises(sc.ItemsFailedError, match="an answer has 0 bytes"):
            client.score(None, pictures[:1], questions=[sc.Question("Is it?", [""])])


def test_questions_of_a_model_that_takes_none_are_refused(connect: Any, address: str) -> None:
    picture = str(ROOT / "samples/panda.right.png")
    client = connect(address)
    with pytest.raises(sc.ItemsFailedError, match="the model takes none"):
        client.score(None, [picture], questions=["Is it a panda?"])
    with pytest.raises(TypeError, match="only questions need no prompt"):
        client.score(None, [picture])
    with pytest.raises(TypeError, match="give a list of questions"):
        client.score(None, [picture], questions="Is it a panda?")
    with pytest.raises(ValueError, match="2 lists of references for 1 images"):
        client.score("a panda", [picture], references=[[picture], [picture]])
