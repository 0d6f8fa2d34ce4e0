"""The forms that a data set may have, each written by what people write it with, and read as the same pairs."""

import io
import json
import pickle
import tarfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
from PIL import Image

from spatialscore_training.data_sets import splits
from spatialscore_training.evaluate import main as evaluate
from spatialscore_training.files import Refusal
from spatialscore_training.manifest import validate
from spatialscore_training.pair_files import check_pictures, each_pair, pairs_digest, read_pairs
from spatialscore_training.pictures import open_picture, picture_bytes, picture_named
from spatialscore_training.report import main as report
from spatialscore_training.scorers import Score

COLOURS = ["red", "blue", "lime", "black", "white"]


def png(colour, side=8):
    file = io.BytesIO()
    Image.new("RGB", (side, side), colour).save(file, "PNG")
    return file.getvalue()


PAIRS = [
    {"prompt": f"a {better} square", "chosen": png(better), "rejected": png(worse), "confidence": 0.5 + i / 10, "tie": i == 3}
    for i, (better, worse) in enumerate(zip(COLOURS, COLOURS[1:]))
]
"""What every form below is to hold."""


def read(path):
    """The pairs of a file under the field's names, pictures as bytes."""
    names = {"chosen": "kept", "rejected": "broken"}
    return [
        {name: picture_bytes(pair[names[name]]) if name in names else pair.get(name) for name in PAIRS[0]} for pair in read_pairs(path)
    ]


def each(path):
    """The pairs of all splits, and what is wrong with the others."""
    return [pair for files in splits(path).values() for pair in each_pair(files)]


def write_tar(file, members):
    with tarfile.open(file, "w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return file


def sample(key, pair):
    said = {name: pair[name] for name in ("prompt", "confidence", "tie")}
    return [(f"{key}.json", json.dumps(said).encode()), (f"{key}.chosen.png", pair["chosen"]), (f"{key}.rejected.PNG", pair["rejected"])]


def samples(pairs):
    return [member for i, pair in enumerate(pairs) for member in sample(f"./set.1/{i:04}", pair)]


@pytest.fixture
def shards(tmp_path):
    for i in range(2):
        write_tar(tmp_path / f"train-{i:06}.tar", samples(PAIRS[2 * i : 2 * i + 2]))
    return tmp_path


def test_webdataset_shards_are_read(shards):
    assert read(shards) == read(shards / "train") == PAIRS
    first = next(read_pairs(shards))
    assert first["where"] == f"{shards / 'train-000000.tar'}: ./set.1/0000"
    assert open_picture(first["kept"]).getpixel((0, 0)) == (255, 0, 0)
    assert list(validate(shards)) == []


def test_a_text_is_a_prompt_and_what_is_no_samples_is_passed_over(tmp_path):
    members = [("README", b"x"), ("._1.json", b"x"), ("1.TXT", b" a red square\n"), ("1.Chosen.png", png("red")), ("1.seed.cls", b"7"), ("1.rejected.jpg", png("blue"))]
    (pair,) = read_pairs(write_tar(tmp_path / "a.tar", members))
    assert pair["prompt"] == "a red square"


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda all: all[:-1], "`rejected` (or `broken`) is missing"),
        (lambda all: [*all, ("1.txt", b"another")], "`prompt` is in its JSON and is a member too"),
        (lambda all: [*all, ("1.chosen.jpg", png("red"))], "two members are its `chosen`"),
        (lambda all: [*all, ("1.kept.png", png("red"))], "`kept` and `chosen` say the same thing"),
        (lambda all: [("1.json", b"{"), *all[1:]], "1.json: "),
        (lambda all: [("1.json", b"[1]"), *all[1:]], "its JSON is not an object"),
        (lambda all: [*all[1:], ("1.txt", b"\xff")], "1.txt: "),
        (lambda all: [*all, *sample("2", PAIRS[1]), all[0]], "`chosen` (or `kept`) is missing"),
    ],
)
def test_an_error_in_a_shard_names_the_sample(tmp_path, change, said):
    file = write_tar(tmp_path / "a.tar", [*sample("0", PAIRS[0]), *change(sample("1", PAIRS[1])), *sample("3", PAIRS[2])])
    with pytest.raises(Refusal) as refused:
        list(read_pairs(file))
    assert str(refused.value).startswith(f"{file}: 1: ") and said in str(refused.value)
    # The others are looked at all the same.
    assert [pair["where"] for pair in each(file) if isinstance(pair, dict)][-1] == f"{file}: 3"


@pytest.mark.parametrize("length", (512, 3 * 1024, 3 * 1024 + 100, 3 * 1024 + 700, 5 * 1024, 12 * 1024))
def test_a_shard_that_was_cut_is_no_shorter_one(tmp_path, length):
    """Between two samples, in a header, in a picture, before the end's own mark: never fewer pairs without a word. A member here
    is 1,024 bytes."""
    whole = write_tar(tmp_path / "a.tar", samples(PAIRS)).read_bytes()
    assert whole[12 * 1024 :].strip(b"\0") == b""
    (tmp_path / "a.tar").write_bytes(whole[:length])
    with pytest.raises(Refusal, match="a.tar: "):
        list(read_pairs(tmp_path / "a.tar"))


def test_a_packed_shard_is_refused(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w:gz"):
        pass
    with pytest.raises(Refusal, match="a.tar: "):
        list(read_pairs(tmp_path))


def test_webdatasets_own_writer_is_read(tmp_path):
    webdataset = pytest.importorskip("webdataset", reason="`pip install webdataset` writes the shards of this test")
    with webdataset.ShardWriter(f"{tmp_path}/train-%06d.tar", maxcount=3, verbose=False) as writer:
        for i, pair in enumerate(PAIRS):
            said = {name: pair[name] for name in ("prompt", "confidence", "tie")}
            writer.write({"__key__": f"{i:05}", "json": said, "chosen.png": pair["chosen"], "rejected.png": pair["rejected"]})
    assert len(list(tmp_path.iterdir())) == 2
    assert read(tmp_path) == PAIRS


def plain_folder(folder):
    for i, pair in enumerate(PAIRS):
        for name, file, data in (("prompts", f"{i}.txt", pair["prompt"].encode()), ("chosen", f"{i}.png", pair["chosen"]), ("rejected", f"{i}.jpg", pair["rejected"])):
            (folder / name).mkdir(parents=True, exist_ok=True)
            (folder / name / file).write_bytes(data)
    return folder


def test_plain_folders_are_read(tmp_path):
    folder = plain_folder(tmp_path / "mine")
    (folder / "chosen/.DS_Store").write_bytes(b"")
    assert [pair["prompt"] for pair in read(folder)] == [pair["prompt"] for pair in PAIRS]
    assert [pair["chosen"] for pair in read(folder)] == [pair["chosen"] for pair in PAIRS]
    for lost in ("prompts/2.txt", "rejected/1.jpg"):
        (folder / lost).unlink()
    faults = list(validate(folder))
    assert len(faults) == 2
    assert faults[0].startswith(f"{folder}: 1: `rejected` (or") and faults[1].startswith(f"{folder}: 2: `prompt` is missing")
    (folder / "chosen/3.webp").write_bytes(png("red"))
    with pytest.raises(Refusal, match="3.webp: another file"):
        list(read_pairs(folder))


def test_image_folders_names_are_read(tmp_path):
    """Hugging Face's ImageFolder with several pictures a row: `*_file_name`."""
    plain_folder(tmp_path)
    lines = [{"prompt": PAIRS[i]["prompt"], "chosen_file_name": f"chosen/{i}.png", "rejected_file_name": f"rejected/{i}.jpg"} for i in range(4)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert [pair["rejected"] for pair in read(tmp_path)] == [pair["rejected"] for pair in PAIRS]
    (tmp_path / "metadata.jsonl").write_text(json.dumps(lines[0] | {"chosen": "chosen/1.png"}))
    with pytest.raises(Refusal, match="`chosen` and `chosen_file_name` say the same thing"):
        list(read_pairs(tmp_path))


def test_splits_are_never_mixed(tmp_path):
    for split in ("train", "test"):
        write_tar(tmp_path / f"{split}-000000.tar", samples(PAIRS[:1] if split == "test" else PAIRS[1:]))
    with pytest.raises(Refusal) as refused:
        list(read_pairs(tmp_path))
    assert "several splits are there: test (" in str(refused.value) and "train-000000.tar" in str(refused.value)
    assert read(tmp_path / "test") == PAIRS[:1]
    # What is wrong with a set is asked of all of it.
    assert len(each(tmp_path)) == 4
    (tmp_path / "val").mkdir()
    (tmp_path / "test-000000.tar").rename(tmp_path / "val/0.tar")
    with pytest.raises(Refusal, match="validation"):
        list(read_pairs(tmp_path))
    # Two forms of one set would be read twice.
    (tmp_path / "train.jsonl").write_text("")
    with pytest.raises(Refusal, match=r"\*.jsonl and \*.tar are there"):
        list(read_pairs(tmp_path))


def test_pictures_stay_in_the_file_and_any_process_reads_them(shards):
    pair = next(read_pairs(shards))
    assert len(pickle.dumps(pair["kept"])) < 300
    assert picture_named(json.loads(json.dumps(pair["kept"]))) == pair["kept"]
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        assert pool.submit(picture_bytes, pair["kept"]).result(timeout=60) == PAIRS[0]["chosen"]


def test_other_places_have_another_digest(shards, tmp_path_factory):
    same = pairs_digest(list(read_pairs(shards)))
    other = tmp_path_factory.mktemp("moved")
    for file in shards.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    assert pairs_digest(list(read_pairs(other))) == same
    turned = [pair | {"chosen": pair["rejected"], "rejected": pair["chosen"]} for pair in PAIRS[:2]]
    write_tar(other / "train-000000.tar", samples(turned))
    assert pairs_digest(list(read_pairs(other))) != same


# ---- Parquet and Arrow ----


@pytest.fixture
def hugging_face():
    return pytest.importorskip("datasets", reason="`pip install datasets` writes the data sets of these tests")


def data_set(hugging_face, pairs):
    features = hugging_face.Features(
        prompt=hugging_face.Value("string"), chosen=hugging_face.Image(), rejected=hugging_face.Image(), confidence=hugging_face.Value("float64"), tie=hugging_face.Value("bool")
    )
    rows = [pair | {name: {"bytes": pair[name], "path": f"{name}.png"} for name in ("chosen", "rejected")} for pair in pairs]
    return hugging_face.Dataset.from_list(rows, features=features)


def test_what_datasets_saves_to_disk_is_read(hugging_face, tmp_path):
    whole = data_set(hugging_face, PAIRS)
    whole.save_to_disk(tmp_path / "one", num_shards=2)
    # `map` leaves files beside those of the set.
    (tmp_path / "one/cache-0123.arrow").write_bytes(b"none of it")
    assert read(tmp_path / "one") == PAIRS
    assert read(tmp_path / "one/data-00000-of-00002.arrow") == PAIRS[:2]
    # A selection is written as such.
    hugging_face.DatasetDict(train=whole.select([2, 0]), mine=whole.select([1])).save_to_disk(tmp_path / "two")
    assert read(tmp_path / "two/train") == [PAIRS[2], PAIRS[0]] and read(tmp_path / "two/mine") == [PAIRS[1]]
    with pytest.raises(Refusal, match=r"several splits are there: mine \(.*train \("):
        list(read_pairs(tmp_path / "two"))
    assert list(validate(tmp_path / "one")) == []
    for split in ("train", "test"):
        whole.save_to_disk(tmp_path / f"each/{split}")
    with pytest.raises(Refusal, match=r"several splits are there: test \(.*train \("):
        list(read_pairs(tmp_path / "each"))
    file = tmp_path / "one/data-00001-of-00002.arrow"
    file.write_bytes(file.read_bytes()[:600])
    with pytest.raises(Refusal, match="data-00001-of-00002.arrow: "):
        list(read_pairs(tmp_path / "one"))


def test_the_hubs_layout_is_read(hugging_face, tmp_path):
    whole = data_set(hugging_face, PAIRS)
    (tmp_path / "data").mkdir()
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache/other.parquet").write_bytes(b"of a download")
    for i in range(2):
        whole.shard(2, i, contiguous=True).to_parquet(tmp_path / f"data/train-{i:05}-of-00002.parquet")
    assert read(tmp_path) == read(tmp_path / "data/train") == PAIRS
    second = tmp_path / "data/train-00001-of-00002.parquet"
    second.rename(tmp_path / "later")
    for path in (tmp_path, tmp_path / "data/train"):
        with pytest.raises(Refusal, match=r"data/train-\*: 1 of 2 files are there"):
            list(read_pairs(path))
    assert read(tmp_path / "data/train-00000-of-00002.parquet") == PAIRS[:2]
    (tmp_path / "later").rename(second)
    whole.to_parquet(tmp_path / "data/held-00000-of-00001.parquet")
    with pytest.raises(Refusal, match=r"held \(.*train \("):
        list(read_pairs(tmp_path))


def in_parquet(folder, **columns):
    pa, parquet = pytest.importorskip("pyarrow", reason="the extra `parquet`"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pa.table(columns), folder / "mine.parquet", row_group_size=2)
    return folder / "mine.parquet"


def columns(*names):
    return {name: [pair[name] for pair in PAIRS] for name in names}


def test_pictures_in_parquet_stay_there(tmp_path):
    file = in_parquet(tmp_path, **columns("prompt", "chosen", "rejected", "confidence", "tie"))
    assert read(file) == PAIRS
    pairs = list(read_pairs(file))
    assert len(pickle.dumps(pairs[3]["broken"])) < 300
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        assert list(pool.map(picture_bytes, [pairs[3]["broken"], pairs[0]["kept"]], timeout=60)) == [PAIRS[3]["rejected"], PAIRS[0]["chosen"]]
    check_pictures(pairs)


def test_a_row_of_parquet_has_bytes_a_name_or_nothing(tmp_path):
    """In one column, as `datasets` leaves it where some pictures were embedded and some were not."""
    (tmp_path / "red.png").write_bytes(png("red"))
    chosen = [{"bytes": PAIRS[0]["chosen"], "path": "elsewhere.png"}, {"bytes": None, "path": "red.png"}, {"bytes": png("lime"), "path": None}, None]
    file = in_parquet(tmp_path, **columns("prompt", "rejected") | {"chosen": chosen})
    *first, last = each(file)
    assert [picture_bytes(pair["kept"]) for pair in first] == [png("red"), png("red"), png("lime")]
    assert str(last).startswith(f"{file}: row 3: `chosen` (or `kept`) is missing")
    file = in_parquet(tmp_path, **columns("prompt", "chosen") | {"rejected": [png("blue"), None, png("red"), png("red")]})
    assert [str(pair).split(" (")[0] for pair in each(file) if isinstance(pair, Refusal)] == [f"{file}: row 1: `rejected`"]


def test_what_is_null_is_not_there(tmp_path):
    """A column has all rows; a pair without relations is one without, whatever form it is in."""
    relations = [None, [{"relation": "left_edge", "about": ["cat"], "kept": True, "broken": False}], None, None]
    file = in_parquet(tmp_path, **columns("prompt", "chosen", "rejected") | {"relations": relations})
    assert ["relations" in pair for pair in read_pairs(file)] == [False, True, False, False]
    assert list(validate(file)) == []


def test_a_data_set_in_one_file_is_evaluated(tmp_path, monkeypatch):
    """Its scores name each picture's place, and the page shows the picture."""

    class Scorer:
        describe = lambda self: "a model"
        scores = lambda self, items: ((i, Score(float(i), None)) for i, _ in enumerate(items))

    monkeypatch.setattr("spatialscore_training.evaluate.ServerScorer", lambda *_, **__: Scorer())
    write_tar(tmp_path / "held-000000.tar", samples(PAIRS))
    monkeypatch.setattr("sys.argv", ["spatialscore-eval", str(tmp_path / "held"), "--server", "none"])
    evaluate()
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert picture_bytes(picture_named(scores[1]["broken"]["picture"])) == PAIRS[1]["rejected"]
    assert "data:image;base64," in (tmp_path / "eval.html").read_text()
    assert not (tmp_path / "held").exists()
    monkeypatch.setattr("sys.argv", ["report", str(tmp_path), "--out", str(tmp_path.with_name(f"{tmp_path.name}-report"))])
    report()
