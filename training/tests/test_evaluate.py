"""The evaluation: its arithmetic, its report, and that it reads users' manifests."""

import json

import pytest
from PIL import Image

from spatialscore_training.evaluate import certainty, interval, judge, page, shares
from spatialscore_training.manifest import read_pairs, validate
from spatialscore_training.scorers import Score


class Fake:
    """Holds every kept picture to be the better one, but for one pair."""

    def scores(self, items):
        for number, item in reversed(list(enumerate(items))):
            mean = 1.0 if "kept" in item.picture else 0.0
            yield number, Score(-mean if "second" in item.prompt else mean, 0.5)


@pytest.fixture
def pairs(tmp_path):
    """A user's manifest with nothing but what is required, and relations on one line."""
    for name in ("kept.png", "broken.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    lines = [{"prompt": f"the {which} <b>prompt</b>", "kept": "kept.png", "broken": "broken.png"} for which in ("first", "second")]
    lines[1]["relations"] = [{"relation": "left_edge", "about": ["cat"], "kept": True, "broken": False}]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path


def test_a_users_manifest_is_judged_and_reported(pairs):
    assert list(validate(pairs)) == []
    judged = judge(Fake(), list(read_pairs(pairs)))
    found = shares(judged)
    assert found["all"]["accuracy"] == 0.5 and found["by relation"]["edge"]["accuracy"] == 0.0
    report = page("a model", found, judged, mistakes=5)
    assert "second &lt;b&gt;prompt" in report and "the first" not in report and 'class=broken>left_edge(cat)' in report


def test_interval_is_wilsons():
    share = interval(95, 100)
    assert share["low"] == pytest.approx(0.8882, abs=1e-4) and share["high"] == pytest.approx(0.9785, abs=1e-4)


def test_certainty_falls_with_the_spread():
    apart = lambda spread: certainty(Score(1.0, spread), Score(0.0, spread))
    assert apart(0.1) > apart(1.0) > apart(10.0) > 0.5
    assert certainty(Score(1.0, None), Score(0.0, None)) is None
