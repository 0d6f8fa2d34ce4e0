"""The evaluation: its arithmetic, its report, and that it reads users' manifests."""

import json

import pytest
from PIL import Image

from spatialscore_training import report
from spatialscore_training.calibration import interval
from spatialscore_training.evaluate import bag_of_words, blank, certainty, judge, page, shares, shuffled, told
from spatialscore_training.manifest import validate
from spatialscore_training.pair_files import read_pairs
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
        Image.new("RGB", (8, 8), "red" if name == "kept.png" else "blue").save(tmp_path / name)
    lines = [{"prompt": f"the {which} <b>prompt</b>", "kept": "kept.png", "broken": "broken.png"} for which in ("first", "second")]
    lines[1]["relations"] = [{"relation": "left_edge", "about": ["cat"], "kept": True, "broken": False}]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path


def test_a_users_manifest_is_judged_and_reported(pairs):
    assert list(validate(pairs)) == []
    judged = judge(Fake(), list(read_pairs(pairs)))
    found = shares(judged)
    assert found["all"]["accuracy"] == 0.5 and found["by relation"]["edge"]["accuracy"] == 0.0
    text = page("a model", found, judged, mistakes=5)
    assert "second &lt;b&gt;prompt" in text and "the first" not in text and 'class=broken>left_edge(cat)' in text


def test_a_report_is_made_of_what_was_measured(pairs, monkeypatch):
    judged = judge(Fake(), list(read_pairs(pairs)))
    sets = pairs / "measured"
    for name in ("mine", "mine/blank"):
        (sets / name).mkdir(parents=True)
        (sets / name / "eval.json").write_text(json.dumps({"model": "a model"} | shares(judged)))
        (sets / name / "scores.json").write_text(json.dumps([told(pair) for pair in judged]))
    monkeypatch.setattr("sys.argv", ["report", str(sets), "--out", str(pairs / "report")])
    report.main()
    text = (pairs / "report" / "README.md").read_text()
    assert "| mine | 50.0% (" in text and "| mine/blank | 50.0% (" in text
    assert {path.name for path in (pairs / "report").iterdir()} == {"README.md", "accuracies.png", "mine.png"}


def test_baselines_lose_what_tells_pairs_apart(pairs, tmp_path):
    records = list(read_pairs(pairs))
    greys = blank(records, tmp_path)
    assert all(record["kept"] == record["broken"] for record in greys)
    assert [record["prompt"] for record in shuffled(records, tmp_path)] == [record["prompt"] for record in records[::-1]]
    assert bag_of_words(records, tmp_path)[0]["prompt"] == "<b>prompt</b> first the"
    tie = type("Tie", (), {"scores": lambda self, items: ((i, Score(1.0, 0.5)) for i, _ in enumerate(items))})()
    assert shares(judge(tie, greys))["all"]["accuracy"] == 0.5


def test_interval_is_wilsons():
    share = interval(95, 100)
    assert share["low"] == pytest.approx(0.8882, abs=1e-4) and share["high"] == pytest.approx(0.9785, abs=1e-4)


def test_certainty_falls_with_the_spread():
    apart = lambda spread: certainty(Score(1.0, spread), Score(0.0, spread))
    assert apart(0.1) > apart(1.0) > apart(10.0) > 0.5
    assert certainty(Score(1.0, None), Score(0.0, None)) is None
