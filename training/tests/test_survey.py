"""What a set of pairs is like as a whole: each slip is told with how often and where first, and nothing else is."""

import json
import random

import pytest
from PIL import Image

from spatialscore_training import data_cli
from spatialscore_training.files import Refusal
from spatialscore_training.pair_files import check_pictures, read_pairs

COUNT = 12


@pytest.fixture
def mine(tmp_path):
    """A sound set: pictures of noise, all different, all of one size."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(COUNT):
            noise(f"{name}{i}").save(tmp_path / name / f"{i}.png")
    return tmp_path


def noise(seed, size=(40, 32)):
    return Image.frombytes("RGB", size, random.Random(seed).randbytes(3 * size[0] * size[1]))


def pairs(**change):
    return [{"prompt": f"prompt {i}", "chosen": f"a/{i}.png", "rejected": f"b/{i}.png"} | {name: value(i) for name, value in change.items()} for i in range(COUNT)]


def told(folder, entries, capsys):
    """What is told on the way into training, without `warning: ` and the folder."""
    (folder / "mine.jsonl").write_text("\n".join(map(json.dumps, entries)))
    capsys.readouterr()
    check_pictures(list(read_pairs(folder / "mine.jsonl")))
    lines = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if line.startswith("warning: ")]
    return [line.removeprefix("warning: ").replace(f"{folder}/", "") for line in lines]


def test_of_a_sound_set_nothing_is_told(mine, capsys):
    assert told(mine, pairs(), capsys) == []


def test_one_picture_for_every_pair(mine, capsys):
    assert told(mine, pairs(rejected=lambda i: "b/0.png" if i < 7 else f"b/{i}.png"), capsys) == ["7 of 12 pairs have one and the same picture as `broken`"]
    assert told(mine, pairs(rejected=lambda i: "b/0.png" if i < 6 else f"b/{i}.png"), capsys) == []


def test_pairs_that_stand_twice(mine, capsys):
    """Also where the second's picture was saved anew."""
    noise("a3").save(mine / "again.png", compress_level=0)
    assert (mine / "again.png").read_bytes() != (mine / "a/3.png").read_bytes()
    again = pairs()[3] | {"chosen": "again.png"}
    assert told(mine, [*pairs(), again], capsys) == ["pairs that stand there already, with the same prompt and pictures: 1, the first in mine.jsonl:13"]


def test_pictures_of_nothing(mine, capsys):
    Image.new("RGB", (40, 32), "black").save(mine / "a/2.png")
    noise("tiny", (1, 1)).save(mine / "b/5.png")
    # The one pixel is of one colour too.
    assert told(mine, pairs(), capsys) == [
        "pictures of one colour: 2, the first in mine.jsonl:3: `kept`",
        "pictures with a side of less than 28 pixels: 1, the first in mine.jsonl:6: `broken`",
    ]


def test_sizes_that_tell(mine, capsys):
    for i in range(COUNT):
        noise(i, (32, 32)).save(mine / f"b/{i}.png")
    assert told(mine, pairs(), capsys) == ["no picture that is `kept` has the size of one that is `broken`: a model may learn sizes, and nothing else"]


def test_columns_that_were_swapped(mine, capsys):
    (mine / "a").rename(mine / "rejected")
    (mine / "b").rename(mine / "chosen")
    entries = pairs(chosen=lambda i: f"rejected/{i}.png", rejected=lambda i: f"chosen/{i}.png")
    (line,) = told(mine, entries, capsys)
    assert line.startswith("pairs that may be swapped, ") and line.endswith(": 12, the first in mine.jsonl:1")
    assert told(mine, pairs(chosen=lambda i: f"chosen/{i}.png", rejected=lambda i: f"rejected/{i}.png"), capsys) == []


def test_what_no_model_takes_is_refused(mine):
    noise("line", (1, 201)).save(mine / "b/5.png")
    (mine / "mine.jsonl").write_text("\n".join(map(json.dumps, pairs())))
    with pytest.raises(Refusal, match="mine.jsonl:6: `broken`: 1 x 201 pixels; no Qwen-VL"):
        check_pictures(list(read_pairs(mine)))


def test_a_copy_that_was_saved_anew_is_the_same_picture(mine):
    noise("a5").save(mine / "b/5.png", compress_level=0)
    noise("a7").save(mine / "again.png", compress_level=0)
    noise("b7").save(mine / "better.png", compress_level=0)
    entries = [*pairs(), {"prompt": "prompt 7", "chosen": "better.png", "rejected": "again.png"}]
    (mine / "mine.jsonl").write_text("\n".join(map(json.dumps, entries)))
    with pytest.raises(Refusal) as refused:
        check_pictures(list(read_pairs(mine)))
    same, reverse = str(refused.value).splitlines()[1:]
    assert "mine.jsonl:6: both pictures are the same" in same and "mine.jsonl:13: says the reverse of" in reverse and reverse.split(": the same")[0].endswith("mine.jsonl:8")


def test_validate_tells_it_and_ends_well(mine, capsys, monkeypatch):
    Image.new("RGB", (40, 32), "black").save(mine / "a/2.png")
    (mine / "mine.jsonl").write_text("\n".join(map(json.dumps, pairs())))
    monkeypatch.setattr("sys.argv", ["spatialreward-data", "validate", str(mine)])
    with pytest.raises(SystemExit) as ended:
        data_cli.main()
    assert not ended.value.code
    assert capsys.readouterr().out.splitlines() == [f"{mine}: no faults", f"warning: pictures of one colour: 1, the first in {mine}/mine.jsonl:3: `kept`"]
