"""Pairs of a lab's own: the names that the field uses, and errors that say where."""

import io
import json

import pytest
from PIL import Image

from spatialscore_training.files import Refusal
from spatialscore_training.manifest import validate
from spatialscore_training.pair_files import check_pictures, pairs_digest, read_pairs
from spatialscore_training.pictures import open_picture


@pytest.fixture
def pictures(tmp_path):
    for name in ("red", "blue"):
        Image.new("RGB", (8, 8), name).save(tmp_path / f"{name}.png")
    return tmp_path


PAIR = {"prompt": "a red square", "chosen": "red.png", "rejected": "blue.png"}


def write(folder, *entries):
    (folder / "mine.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return folder / "mine.jsonl"


def test_the_fields_names_say_the_same(pictures):
    others = [{"kept": "red.png", "broken": "blue.png"}, {"path1": "red.png", "path2": "blue.png"}]
    one, *rest = read_pairs(write(pictures, PAIR | {"confidence": 0.9, "tie": False}, *({"prompt": "a red square"} | other for other in others)))
    assert one["confidence"] == 0.9 and one["where"].endswith("mine.jsonl:1")
    assert all((pair["kept"], pair["broken"]) == (one["kept"], one["broken"]) == (str(pictures / "red.png"), str(pictures / "blue.png")) for pair in rest)


def test_hpsv3s_own_file_is_read(pictures):
    (pictures / "train.json").write_text(json.dumps([{"prompt": "a", "path1": "red.png", "path2": "blue.png", "confidence": 0.97, "choice_dist": [19, 1]}]))
    (pair,) = read_pairs(pictures / "train.json")
    assert pair["confidence"] == 0.97 and pair["kept"] == str(pictures / "red.png")


@pytest.mark.parametrize(
    "entry, said",
    [
        ({"chosen": "red.png", "rejected": "blue.png"}, "`prompt` is missing"),
        ({"prompt": " "} | {"chosen": "red.png", "rejected": "blue.png"}, "`prompt` is missing"),
        ({"prompt": "a", "chosen": "red.png"}, "`rejected` (or `broken`) is missing"),
        (PAIR | {"chosen": 3}, "`chosen` is missing or empty"),
        (PAIR | {"kept": "red.png"}, "`kept` and `chosen` say the same thing"),
        (PAIR | {"confidence": 95}, "`confidence` must be a number from 0 to 1, not 95"),
        (PAIR | {"confidence": True}, "`confidence` must be"),
        (PAIR | {"tie": 1}, "`tie` must be true or false"),
        ([1], "not a JSON object"),
    ],
)
def test_an_error_names_file_and_line(pictures, entry, said):
    file = write(pictures, PAIR, entry)
    with pytest.raises(Refusal) as refused:
        list(read_pairs(file))
    assert str(refused.value).startswith(f"{file}:2: ") and said in str(refused.value)
    assert any(said in fault for fault in validate(file))


def test_what_holds_no_pairs_is_refused(pictures):
    (pictures / "mine.jsonl").write_text("\n")
    with pytest.raises(Refusal, match="there are no pairs in it"):
        list(read_pairs(pictures))
    with pytest.raises(Refusal, match="nowhere: no such file or folder"):
        list(read_pairs(pictures / "nowhere"))
    (pictures / "empty").mkdir()
    with pytest.raises(Refusal, match="no pairs here"):
        list(read_pairs(pictures / "empty"))
    (pictures / "mine.jsonl").write_text(json.dumps(PAIR) + "\n{\n")
    with pytest.raises(Refusal, match="mine.jsonl:2: not JSON"):
        list(read_pairs(pictures))


def test_pictures_are_looked_at_before_they_are_trained_on(pictures):
    (pictures / "torn.png").write_bytes((pictures / "red.png").read_bytes()[:45])
    (pictures / "copy.png").write_bytes((pictures / "red.png").read_bytes())
    pairs = [PAIR, PAIR | {"chosen": "gone.png"}, PAIR | {"rejected": "torn.png"}, PAIR | {"rejected": "copy.png"}, PAIR | {"chosen": "blue.png", "rejected": "copy.png"}]
    file = write(pictures, *pairs)
    with pytest.raises(Refusal) as refused:
        check_pictures(list(read_pairs(file)))
    lines = str(refused.value).splitlines()[1:]
    assert [line.split(": ")[0] for line in lines] == [f"{file}:{line}" for line in (2, 3, 4, 5)]
    for line, said in zip(lines, ("gone.png", "`broken`", "both pictures are the same", f"says the reverse of {file}:1")):
        assert said in line
    check_pictures(list(read_pairs(write(pictures, PAIR, PAIR))))


def test_other_pairs_have_another_digest(pictures):
    told = lambda *entries: pairs_digest(list(read_pairs(write(pictures, *entries))))
    same = told(PAIR)
    assert same == told(PAIR) != told(PAIR, PAIR)
    others = [PAIR | change for change in ({"prompt": "b"}, {"confidence": 0.5}, {"tie": True}, {"chosen": "blue.png", "rejected": "red.png"})]
    assert len({same, *(told(other) for other in others)}) == 5


def test_parquet_gives_names_or_bytes(pictures):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    read = lambda name: (pictures / f"{name}.png").read_bytes()
    named = {"prompt": ["a", "b"], "chosen": ["red.png"] * 2, "rejected": ["blue.png"] * 2, "confidence": [0.5, None]}
    parquet.write_table(pa.table(named), pictures / "named.parquet")
    # As Hugging Face's `datasets` stores a picture.
    held = {"prompt": ["a", "b"], "chosen": [{"bytes": read("red"), "path": None}] * 2, "rejected": [read("blue")] * 2}
    parquet.write_table(pa.table(held), pictures / "held.parquet")
    for file in ("named", "held"):
        first, second = read_pairs(pictures / f"{file}.parquet")
        assert open_picture(first["kept"]).getpixel((0, 0)) == (255, 0, 0) and open_picture(second["broken"]).getpixel((0, 0)) == (0, 0, 255)
        assert second["where"].endswith(f"{file}.parquet: row 1")
    check_pictures(list(read_pairs(pictures / "held.parquet")))
    parquet.write_table(pa.table(held | {"prompt": ["a", None]}), pictures / "held.parquet")
    with pytest.raises(Refusal, match="held.parquet: row 1: `prompt` is missing"):
        list(read_pairs(pictures / "held.parquet"))
    (pictures / "held.parquet").write_bytes(b"no parquet")
    with pytest.raises(Refusal, match="held.parquet: "):
        list(read_pairs(pictures / "held.parquet"))


def test_a_picture_is_turned_as_it_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    Image.new("RGBA", (4, 2)).save(file, "PNG", exif=exif)
    turned = open_picture(file.getvalue())
    assert (turned.size, turned.mode) == ((2, 4), "RGB")
