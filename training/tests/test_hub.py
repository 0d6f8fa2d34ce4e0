"""The export: that it is the same pairs, for us and for `datasets`, and that it says what it is."""

import json

import numpy as np
import pytest
from PIL import Image
from test_generator import folder  # noqa: F401

from spatialscore_training import data_cli, hub
from spatialscore_training.files import Refusal
from spatialscore_training.manifest import validate, write_pairs
from spatialscore_training.pair_files import read_pairs
from spatialscore_training.pictures import open_picture, picture_bytes
from spatialscore_training.relations import RULES
from spatialscore_training.scenes import World

parquet = pytest.importorskip("pyarrow.parquet", reason="the extra `parquet`")
WORLD = World(kinds=16, things=(2, 3), relations=tuple(RULES), clauses=(1, 3))


@pytest.fixture(scope="module")
def sets(folder, tmp_path_factory):  # noqa: F811
    """Two data sets of ours."""
    sets = tmp_path_factory.mktemp("sets")
    write_pairs(sets / "pairs", WORLD, folder, 0, 56, 7, 1)
    write_pairs(sets / "held", WORLD, folder, 1, 56, 3, 1)
    return sets


@pytest.fixture
def exported(sets, tmp_path, monkeypatch):
    """As small as it may be: two pairs a row group, one row group a file."""
    monkeypatch.setattr(hub, "ROWS", 2)
    monkeypatch.setattr(hub, "SHARD", 1)
    monkeypatch.setattr("sys.argv", ["spatialreward-data", "export", f"train={sets / 'pairs'}", f"test={sets / 'held'}", str(tmp_path / "hub")])
    data_cli.main()
    return tmp_path / "hub"


def told(path):
    """What pairs say, pictures as bytes."""
    return [{name: picture_bytes(value) if name in ("kept", "broken", "source") else value for name, value in pair.items() if name != "where"} for pair in read_pairs(path)]


def test_it_is_the_same_pairs(sets, exported):
    assert told(exported / "data/train") == told(sets / "pairs") and told(exported / "data/test") == told(sets / "held")
    assert sorted(file.name for file in (exported / "data").glob("train*")) == [f"train-{i:05}-of-00004.parquet" for i in range(4)]
    # What an evaluation of a split leaves is none of it.
    (exported / "data/eval.json").write_text("{}")
    assert list(validate(exported)) == []
    # Once more, from Parquet: the row groups are as small as before.
    hub.export({"train": exported / "data/train"}, exported.parent / "again")
    assert told(exported.parent / "again") == told(sets / "pairs")
    assert {parquet.ParquetFile(file).metadata.row_group(0).num_rows for file in (exported.parent / "again/data").iterdir()} == {1, 2}


def test_datasets_takes_it(sets, exported, tmp_path):
    datasets = pytest.importorskip("datasets", reason="`pip install datasets` reads the data set of this test")
    found = datasets.load_dataset(str(exported), cache_dir=str(tmp_path / "cache"))
    assert {split: len(rows) for split, rows in found.items()} == {"train": 7, "test": 3}
    assert isinstance(found["test"].features["chosen"], datasets.Image) and isinstance(found["test"].features["rejected"], datasets.Image)
    for row, pair in zip(found["test"], read_pairs(sets / "held"), strict=True):
        assert (row["prompt"], row["relations"], row["things"]) == (pair["prompt"], pair["relations"], pair["things"])
        assert np.array_equal(np.asarray(row["chosen"].convert("RGB")), np.asarray(open_picture(pair["kept"])))
        assert np.array_equal(np.asarray(row["rejected"].convert("RGB")), np.asarray(open_picture(pair["broken"])))


def test_the_card_says_what_it_is(sets, exported):
    yaml = pytest.importorskip("yaml", reason="comes with `datasets`")
    _, head, text = (exported / "README.md").read_text().split("---\n", 2)
    head = yaml.safe_load(head)
    assert head["license"] == ["apache-2.0", "cc-by-4.0"] and head["pretty_name"] == "hub"
    assert head["configs"] == [{"config_name": "default", "data_files": [{"split": split, "path": f"data/{split}-*"} for split in ("train", "test")]}]
    assert {split["name"]: split["num_examples"] for split in head["dataset_info"]["splits"]} == {"train": 7, "test": 3}
    made = json.loads((sets / "held/dataset.json").read_text())["made_with"]
    assert json.dumps(made, indent=1) in text and "10 pairs" in text and "There is no photograph" in text
    for shown in ("stats/train/stats.png", "stats/test/stats.png"):
        assert f"]({shown})" in text and (exported / shown).is_file()


def test_pictures_that_were_swapped_in_it_are_seen(exported):
    file = next((exported / "data").glob("test-00000-*"))
    table = parquet.read_table(file)
    names = ["rejected" if name == "chosen" else "chosen" if name == "rejected" else name for name in table.column_names]
    parquet.write_table(table.rename_columns(names), file)
    assert list(validate(exported)) == [f"{exported / 'dataset.json'}: the files are not those that were written: one was changed, swapped, lost or added"]


def test_a_labs_own_pairs_keep_all_that_they_say(tmp_path):
    for name in ("red", "blue", "lime"):
        Image.new("RGB", (32, 32), name).save(tmp_path / f"{name}.png")
    pair = {"prompt": "a", "chosen": "red.png", "rejected": "blue.png"}
    lines = [pair | {"confidence": 1, "votes": [3, 1]}, pair | {"prompt": "b", "tie": True, "source": "lime.png"}, pair | {"prompt": "c", "confidence": 0.5}]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, lines)))
    hub.export({"train": tmp_path / "mine.jsonl"}, tmp_path / "out")
    assert told(tmp_path / "out") == told(tmp_path / "mine.jsonl")
    card = (tmp_path / "out/README.md").read_text()
    assert "license" not in card and "no photograph" not in card and card.count("to be told by who") == 3


@pytest.mark.parametrize(
    "entries, said",
    [
        ([{"votes": 1}, {"votes": "two"}], "`votes` is not of one type in all pairs"),
        ([{"rejected": "red.png"}], "has faults; `spatialreward-data validate` lists them all:\n"),
        ([{"rejected": "gone.png"}], "gone.png"),
    ],
)
def test_what_cannot_be_told_is_not_exported(tmp_path, entries, said):
    for name in ("red", "blue"):
        Image.new("RGB", (32, 32), name).save(tmp_path / f"{name}.png")
    (tmp_path / "mine.jsonl").write_text("\n".join(json.dumps({"prompt": "a", "chosen": "red.png", "rejected": "blue.png"} | entry) for entry in entries))
    with pytest.raises(Refusal) as refused:
        hub.export({"train": tmp_path / "mine.jsonl"}, tmp_path / "out")
    assert said in str(refused.value) and not (tmp_path / "out").exists()


def test_nothing_is_written_over(sets, exported, folder, tmp_path, monkeypatch):  # noqa: F811
    before = told(exported / "data/test")
    for out, said in ((exported, "is not empty"), (sets / "held/hub", "lies in the input")):
        with pytest.raises(Refusal, match=said):
            hub.export({"train": sets / "held"}, out)
    with pytest.raises(Refusal, match="several splits are there"):
        hub.export({"train": exported}, tmp_path / "other")
    with pytest.raises(Refusal, match="no name that `datasets` knows"):
        hub.export({"a-b": sets / "held"}, tmp_path / "other")
    with pytest.raises(Refusal, match="holds an exported data set"):
        write_pairs(exported, WORLD, folder, 1, 56, 3, 1)
    monkeypatch.setattr("sys.argv", ["spatialreward-data", "export", str(sets / "held"), str(sets / "pairs"), str(tmp_path / "other")])
    with pytest.raises(SystemExit, match="have the same split"):
        data_cli.main()
    assert told(exported / "data/test") == before and not (tmp_path / "other").exists()
