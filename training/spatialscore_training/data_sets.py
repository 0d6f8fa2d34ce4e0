"""Where pairs lie: the files of a data set, its splits, and the entries of each file with the place that an error names.

    pairs.jsonl, pairs.json          an entry a line, or a list of them
    *.parquet, *.arrow               a row an entry (`tables`): what is on the Hugging Face hub, and what `save_to_disk` writes
    *.tar                            WebDataset shards, a sample an entry (`tars`)
    prompts/NAME.txt                 and beside `prompts` a folder for each picture, `chosen/NAME.png`, `rejected/NAME.jpg`

A data set is a file, all files of one form in a folder, or the start of shards' names: `hub/data/train` is
`hub/data/train-00000-of-00003.parquet` and those that follow.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from . import tables, tars
from .files import Refusal

FORMS = (".jsonl", ".parquet", ".tar")
SPLITS = {"train": "train", "training": "train", "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation"}
SPLITS |= {"test": "test", "testing": "test", "eval": "test", "evaluation": "test"}
"""The words that Hugging Face's `datasets` knows a split by."""
_SHARD = re.compile(r"(.+?)-\d+(?:-of-(\d+))?(-[0-9a-f]+)?\.(jsonl|parquet|tar|arrow)")


def _saved(folder: Path) -> Iterator[Path]:
    """The files that `save_to_disk` wrote into a folder; `datasets` leaves others beside them, which are none of it."""
    state = json.loads((folder / "state.json").read_text())
    yield from (folder / file["filename"] for file in state["_data_files"])


def _below(folder: Path) -> Iterator[Path]:
    for at, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        if {"state.json", "dataset_info.json"} <= set(names):
            yield from _saved(Path(at))
        else:
            yield from (Path(at, name) for name in names if name.endswith(FORMS) and not name.startswith("."))


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if path.is_dir():
        found = sorted(_below(path))
    else:
        beside = path.parent.iterdir() if path.parent.is_dir() else ()
        found = sorted(file for file in beside if (shard := _SHARD.fullmatch(file.name)) and shard[1] == path.name)
    if len(forms := sorted({file.suffix for file in found})) > 1:
        raise Refusal(f"{path}: *{' and *'.join(forms)} are there; give one of them, lest a pair be read twice")
    shards = Counter((file.parent / shard[1], int(shard[2])) for file in found if (shard := _SHARD.fullmatch(file.name)) and shard[2])
    for (name, whole), count in shards.items():
        if count != whole:
            raise Refusal(f"{name}-*: {count} of {whole} files are there; the others hold pairs too")
    return found


def _split(file: Path, path: Path) -> str:
    """The split that a file is of, by its name below `path`; empty where it says nothing."""
    if file == path:
        return ""
    *folders, name = file.relative_to(home(path)).parts
    if (file.parent.parent / "dataset_dict.json").exists() and folders:
        return folders[-1]
    shard = _SHARD.fullmatch(name)
    # `save_to_disk` names all of its files `data`.
    if shard and shard[2] and file.suffix != ".arrow":
        return SPLITS.get(shard[1], shard[1])
    words = (word for part in (name, *reversed(folders)) for word in re.split(r"[^a-z]+", part.lower()))
    return next((SPLITS[word] for word in words if word in SPLITS), "")


def splits(path: Path) -> dict[str, list[Path]]:
    """What a data set is made of, by split: files, or the one folder that is itself all of it."""
    files = _files(path)
    if not files and (path / "prompts").is_dir():
        files = [path]
    if not files and not path.exists():
        raise Refusal(f"{path}: no such file or folder. What is on the Hugging Face hub is fetched by `hf download --repo-type dataset OWNER/NAME --local-dir FOLDER`")
    if not files:
        raise Refusal(f"{path}: no pairs here (*.jsonl, *.parquet, *.tar, a data set of `save_to_disk`, or prompts/*.txt beside chosen and rejected)")
    found: dict[str, list[Path]] = {}
    for file in files:
        found.setdefault(_split(file, path), []).append(file)
    return found


def _lines(file: Path) -> Iterator[tuple[str, object]]:
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        if line.strip():
            try:
                yield f"{file}:{number}", json.loads(line)
            except ValueError as error:
                yield f"{file}:{number}", Refusal(f"{file}:{number}: not JSON: {error}")


def _list(file: Path) -> Iterator[tuple[str, object]]:
    try:
        entries = json.loads(file.read_text())
    except ValueError as error:
        raise Refusal(f"{file}: not JSON: {error}") from error
    if not isinstance(entries, list):
        raise Refusal(f"{file}: not a list of pairs")
    yield from ((f"{file}: entry {number}", entry) for number, entry in enumerate(entries, 1))


def _plain(folder: Path, pictures: set[str]) -> Iterator[tuple[str, object]]:
    """Texts and pictures in folders of their own, with one name for what belongs together."""
    found: dict[str, dict] = {}
    for name in ("prompts", *sorted(pictures)):
        for file in sorted((folder / name).glob("[!.]*")):
            entry = found.setdefault(file.stem, {})
            field = "prompt" if name == "prompts" else name
            if field in entry:
                raise Refusal(f"{file}: another file beside it has its name, with another ending")
            try:
                entry[field] = file.read_text().strip() if field == "prompt" else f"{name}/{file.name}"
            except UnicodeDecodeError as error:
                raise Refusal(f"{file}: {error}") from error
    yield from ((f"{folder}: {name}", entry) for name, entry in sorted(found.items()))


def entries(file: Path, pictures: set[str]) -> Iterator[tuple[str, object]]:
    """What stands in one of the files of `splits`: each entry, or what is wrong with it, with its place. `pictures` are the
    fields that are pictures."""
    if file.suffix in (".parquet", ".arrow"):
        return ((f"{file}: row {number}", row) for number, row in enumerate(tables.rows(file, pictures)))
    if file.suffix == ".tar":
        return tars.samples(file, pictures)
    if file.is_dir():
        return _plain(file, pictures)
    return (_list if file.suffix == ".json" else _lines)(file)


def home(path: Path) -> Path:
    """The folder of a data set, where what is found out about it goes if nothing else is said."""
    return path if path.is_dir() else path.parent
