"""A run on pairs in Parquet or in tar files is the run on files: the same bits, whichever process reads the pictures."""

import io
import json
import tarfile

import pytest

pytest.importorskip("torch", reason="training takes it")
pytest.importorskip("pyarrow", reason="the extra `parquet`")

from torch.utils.data import DataLoader  # noqa: E402

from spatialscore_training import hub  # noqa: E402
from spatialscore_training.pair_files import read_pairs  # noqa: E402
from spatialscore_training.pictures import picture_bytes  # noqa: E402

from test_train_reward import base, folder, new_run, pairs, state_bytes  # noqa: E402, F401


@pytest.fixture
def forms(pairs, tmp_path):  # noqa: F811
    hub.export({"train": pairs}, tmp_path / "hub")
    with tarfile.open(tmp_path / "pairs.tar", "w") as tar:
        for i, pair in enumerate(read_pairs(pairs)):
            told = json.dumps({"prompt": pair["prompt"]}).encode()
            for name, data in (("json", told), ("kept.png", picture_bytes(pair["kept"])), ("broken.png", picture_bytes(pair["broken"]))):
                member = tarfile.TarInfo(f"{i}.{name}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return [tmp_path / "hub", tmp_path / "pairs.tar"]


def test_a_run_ends_with_the_same_bits(base, pairs, forms, tmp_path):  # noqa: F811
    ends = []
    for i, path in enumerate((pairs, *forms)):
        assert new_run(base, path, tmp_path / f"run{i}", validation=path, steps=2).go()
        ends.append(state_bytes(tmp_path / f"run{i}"))
    assert ends[0] == ends[1] == ends[2]


def test_workers_read_what_their_parent_has_open(pairs, forms):  # noqa: F811
    """As the trainer's on a GPU: they are forked, and each goes its own way through the file."""
    whole = [picture_bytes(pair["kept"]) for pair in read_pairs(pairs)]
    for path in forms:
        places = [pair["kept"] for pair in read_pairs(path)]
        assert [picture_bytes(place) for place in places] == whole
        order = list(range(len(places))) * 20
        loader = DataLoader(places, batch_size=None, sampler=order, num_workers=2, collate_fn=picture_bytes, timeout=60)
        assert list(loader) == [whole[i] for i in order]
