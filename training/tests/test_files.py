"""Nothing is lost, mixed or left half written in silence, and what cannot be is refused with a line and an exit code."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from spatialscore_training import data_cli, manifest
from spatialscore_training.files import Refusal, beside, keep_apart
from spatialscore_training.manifest import validate, write_pairs
from spatialscore_training.scenes import World

from test_generator import folder  # noqa: F401

SMALL = dict(kinds=16, things=(2, 3))


@pytest.mark.parametrize("out, name", [("in", "is"), (".", "holds"), ("in/deep/er", "lies in"), ("link", "is"), ("in/../in", "is")])
def test_an_output_keeps_away_from_its_inputs(tmp_path, out, name):
    (tmp_path / "in").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "in")
    with pytest.raises(Refusal, match=f"{name} the input"):
        keep_apart(tmp_path / out, base=tmp_path / "in")
    keep_apart(tmp_path / "inside", base=tmp_path / "in", other=None)


def test_what_is_written_is_whole_or_not_there(tmp_path):
    for path, write in ((tmp_path / "file", lambda p, t: p.write_text(t)), (tmp_path / "folder", _folder)):
        with beside(path) as part:
            write(part, "first")
        with pytest.raises(KeyboardInterrupt), beside(path) as part:
            write(part, "half")
            raise KeyboardInterrupt
        read = path / "inside" if path.is_dir() else path
        assert read.read_text() == "first"
        with beside(path) as part:
            write(part, "second")
        assert read.read_text() == "second"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def _folder(path: Path, text: str) -> None:
    path.mkdir()
    (path / "inside").write_text(text)


def test_what_is_written_is_for_whoever_may_read(tmp_path):
    (tmp_path / "base").write_text("theirs")
    (tmp_path / "base").chmod(0o600)
    with beside(tmp_path / "out") as part:
        part.mkdir()
        (part / "model.safetensors").write_text("ours")
        (part / "model.safetensors").chmod(0o600)
        (part / "base").symlink_to(tmp_path / "base")
    mask = os.umask(0)
    os.umask(mask)
    mode = lambda path: path.stat().st_mode & 0o777
    assert (mode(tmp_path / "out/model.safetensors"), mode(tmp_path / "base")) == (0o666 & ~mask, 0o600)


def test_a_data_set_grows_to_the_bytes_of_one_made_at_once(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "SHARD", 4)
    world = World(**SMALL)
    for pairs in (6, 9):
        write_pairs(tmp_path / "grown", world, folder, seed=1, side=112, pairs=pairs, jobs=1)
    # A run that was killed within a shard leaves pictures without lines.
    write_pairs(tmp_path / "killed", world, folder, seed=1, side=112, pairs=9, jobs=1)
    said = json.loads((tmp_path / "killed/dataset.json").read_text())
    (tmp_path / "killed/dataset.json").write_text(json.dumps(said | {"digest": None}))
    last = tmp_path / "killed/shard-00001"
    (last / "manifest.jsonl").write_text("".join((last / "manifest.jsonl").read_text().splitlines(True)[:2]))
    (last / "0000004-kept.png").unlink()
    assert "9 pairs are to be there, 7 are" in "".join(validate(tmp_path / "killed"))
    write_pairs(tmp_path / "killed", world, folder, seed=1, side=112, pairs=9, jobs=1)
    write_pairs(tmp_path / "once", world, folder, seed=1, side=112, pairs=9, jobs=1)
    bytes_of = lambda root: {p.relative_to(root): p.read_bytes() for p in root.rglob("*") if p.is_file()}
    assert bytes_of(tmp_path / "grown") == bytes_of(tmp_path / "once") == bytes_of(tmp_path / "killed")
    assert len(list((tmp_path / "once").rglob("*.png"))) == 18


@pytest.mark.parametrize(
    "change, said",
    [
        (dict(seed=2), "seed was 1, is now 2"),
        (dict(side=56), "side was 112, is now 56"),
        (dict(world=World(**SMALL, clauses=(1, 2))), "clauses was"),
        (dict(pairs=2), "has 3 pairs, more than 2"),
    ],
)
def test_a_used_folder_is_refused(folder, tmp_path, change, said):
    made = dict(world=World(**SMALL), drawings=folder, seed=1, side=112, pairs=3, jobs=1)
    write_pairs(tmp_path / "set", **made)
    before = {path: path.read_bytes() for path in (tmp_path / "set").rglob("*.*")}
    write_pairs(tmp_path / "set", **made)
    with pytest.raises(Refusal, match=said):
        write_pairs(tmp_path / "set", **made | change)
    assert before == {path: path.read_bytes() for path in (tmp_path / "set").rglob("*.*")}


def test_a_folder_of_something_else_is_refused(folder, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(Refusal, match="nobody knows what made it"):
        write_pairs(tmp_path, World(**SMALL), folder, seed=1, side=112, pairs=3, jobs=1)


def test_pictures_that_were_swapped_are_noticed(folder, tmp_path):
    write_pairs(tmp_path / "set", World(**SMALL), folder, seed=1, side=112, pairs=3, jobs=1)
    shard = tmp_path / "set/shard-00000"
    kept, broken = (shard / f"0000001-{name}.png" for name in ("kept", "broken"))
    kept.rename(shard / "other"), broken.rename(kept), (shard / "other").rename(broken)
    assert "one was changed, swapped, lost or added" in "".join(validate(tmp_path / "set"))
    with pytest.raises(Refusal, match="not those that were written"):
        write_pairs(tmp_path / "set", World(**SMALL), folder, seed=1, side=112, pairs=3, jobs=1)


@pytest.mark.parametrize(
    "arguments, said",
    [
        ("--pairs -3", "pairs must be at least 1"),
        ("--pairs 0", "pairs must be at least 1"),
        ("--seed -1", "seed must be at least 0"),
        ("--side 0", "side must be at least 28"),
        ("--jobs 0", "jobs must be at least 1"),
        ("--kinds 999", "kinds must be"),
        ("--kinds 16 --things 30 40", "things must be"),
        ("--things 3 2", "things must be"),
        ("--size -1 2", "size must be"),
        ("--clauses 0 3", "clauses must be"),
        ("--shadow -0.1", "shadow must be"),
        ("--kinds 16 --things 14 16 --size 0.7 0.8", "a scene of 14 to 16 things.*not found"),
        ("--kinds 16 --things 2 2 --relations plain --clauses 40 40", "a pair with 40 to 40 relations.*not found"),
    ],
)
def test_what_cannot_be_made_is_refused(folder, tmp_path, monkeypatch, arguments, said):
    monkeypatch.setattr("sys.argv", ["spatialreward-data", "--drawings", str(folder), "make", str(tmp_path / "set"), "--pairs", "2", *arguments.split()])
    with pytest.raises(SystemExit) as ended:
        data_cli.main()
    assert isinstance(ended.value.code, str) and re.search(said, ended.value.code), ended.value.code


def test_a_worker_ends_with_its_killed_parent(folder, tmp_path):
    script = f"from pathlib import Path; from spatialscore_training.manifest import write_pairs; from spatialscore_training.scenes import World; write_pairs(Path({str(tmp_path / 'set')!r}), World(kinds=16, things=(2, 3)), Path({str(folder)!r}), 0, 224, 100000, 3)"
    started = subprocess.Popen([sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}, stderr=subprocess.DEVNULL)
    children = lambda: Path(f"/proc/{started.pid}/task/{started.pid}/children").read_text().split()
    try:
        _until(lambda: len(children()) == 3)
        workers = children()
    finally:
        started.send_signal(signal.SIGKILL)
        started.wait()
    _until(lambda: not any(_lives(worker) for worker in workers))


def _lives(process: str) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")")[-1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _until(holds, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not come to be"
        time.sleep(0.05)
