"""Pairs as files have them: ours, and a lab's own in any form that `data_sets` knows, in the names that the field uses.

    prompt                          what both pictures are judged by
    chosen, rejected                the better and the worse picture; also kept, broken (ours) or path1, path2 (HPSv3's)
    confidence                      optional, 0 to 1: how sure people were; a recipe may ask for a least one
    tie                             optional: people held neither for the better one
    source                          optional: a picture that both were made from (edits)

A picture is a file's name, from the manifest's folder on, also under `chosen_file_name` as Hugging Face's ImageFolder has it;
or its bytes, in Parquet, Arrow or tar files, where they stay until they are needed.
"""

import hashlib
import json
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from .data_sets import entries, splits
from .files import Refusal, digest
from .pictures import Picture, open_picture
from .survey import Seen, Survey, seen

NAMES = {"kept": ("kept", "chosen", "path1"), "broken": ("broken", "rejected", "path2"), "source": ("source",)}
LONGEST = 200
"""No side may be so many times the other: transformers' own limit for a Qwen-VL."""
EVERY_NAME = {name for names in NAMES.values() for name in names}


def _picture(value: object, folder: Path, where: str) -> Picture:
    if isinstance(value, dict):
        value = value.get("path")
    if isinstance(value, tuple):
        return value
    if isinstance(value, str) and value.strip():
        return str(folder / value)
    raise Refusal(f"{where} is missing or empty; it must be a picture's file name or its bytes")


def record(entry: object, folder: Path, where: str) -> dict:
    """A pair under our names, its pictures' files made whole, and `where` it stands."""
    if isinstance(entry, Refusal):
        raise entry
    if not isinstance(entry, dict):
        raise Refusal(f"{where}: not a JSON object")
    if not isinstance(entry.get("prompt"), str) or not entry["prompt"].strip():
        raise Refusal(f"{where}: `prompt` is missing or empty")
    entry = {name: value for name, value in entry.items() if value is not None}
    found = {}
    for ours, names in NAMES.items():
        said = [name for either in names for name in (either, f"{either}_file_name") if name in entry]
        if len(said) > 1:
            raise Refusal(f"{where}: `{said[0]}` and `{said[1]}` say the same thing; give one of them")
        if said or ours != "source":
            name = f"`{said[0]}`" if said else f"`{names[1]}` (or `{names[0]}`)"
            found[ours] = _picture(entry[said[0]] if said else None, folder, f"{where}: {name}")
    confidence, tie = entry.get("confidence"), entry.get("tie")
    if confidence is not None and (isinstance(confidence, bool) or not isinstance(confidence, (int, float)) or not 0 <= confidence <= 1):
        raise Refusal(f"{where}: `confidence` must be a number from 0 to 1, not {confidence!r}")
    if tie is not None and not isinstance(tie, bool):
        raise Refusal(f"{where}: `tie` must be true or false, not {tie!r}")
    return {name: value for name, value in entry.items() if name.removesuffix("_file_name") not in EVERY_NAME} | found | {"where": where}


def each_pair(files: list[Path]) -> Iterator[dict | Refusal]:
    """The pairs of a split's files, or in a pair's place what is wrong with it."""
    for file in files:
        for where, entry in entries(file, EVERY_NAME):
            try:
                yield record(entry, file if file.is_dir() else file.parent, where)
            except Refusal as refusal:
                yield refusal


def read_pairs(path: Path) -> Iterator[dict]:
    """The pairs of a data set. There is at least one, nothing is wrong with any, and all are of one split: who trains on a test
    set does not see it in the numbers."""
    found = splits(path)
    if len(found) > 1:
        told = ", ".join(f"{split or 'none'} ({files[0]})" for split, files in sorted(found.items()))
        raise Refusal(f"{path}: several splits are there: {told}; give one: a file, a folder, or the start of shards' names")
    none = True
    for pair in each_pair(*found.values()):
        if isinstance(pair, Refusal):
            raise pair
        none = False
        yield pair
    if none:
        raise Refusal(f"{path}: there are no pairs in it")


def pairs_digest(records: list[dict]) -> str:
    """Of what pairs say, and of their pictures' names (or places) and sizes: enough to tell other pairs, quickly."""
    size = lru_cache(maxsize=16)(lambda file: Path(file).stat().st_size)

    def told(picture: Picture) -> tuple:
        if isinstance(picture, bytes):
            return hashlib.sha256(picture).hexdigest(), len(picture)
        file, *place = [picture] if isinstance(picture, str) else picture
        return Path(file).name, *place, size(file)

    said = lambda record: [*map(record.get, ("prompt", "confidence", "tie")), *(told(record[name]) for name in NAMES if name in record)]
    return digest(json.dumps(said(record)).encode() for record in records)


def picture_faults(records: list[dict], survey: Survey) -> Iterator[str]:
    """Pictures that cannot be read, pairs of one picture, and pairs that contradict each other. What pictures are like as a
    whole is added to the survey."""

    def look(record: dict) -> tuple[list[str], dict[str, Seen]]:
        faults, found = [], {}
        for name in NAMES:
            if name in record:
                try:
                    found[name] = seen(open_picture(record[name]))
                    if max(found[name].size) > LONGEST * min(found[name].size):
                        raise ValueError(f"{found[name].size[0]} x {found[name].size[1]} pixels; no Qwen-VL takes a side of more than {LONGEST} times the other")
                except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
                    faults.append(f"{record['where']}: `{name}`: {error}")
        return faults, found

    order: dict[tuple, str] = {}
    with ThreadPoolExecutor() as pool:
        looked = tqdm(pool.map(look, records), total=len(records), desc="pictures", unit="pair", mininterval=5)
        for record, (faults, found) in zip(records, looked):
            yield from faults
            if faults:
                continue
            survey.add(record, found)
            source, kept, broken = (found[name].pixels if name in found else None for name in ("source", "kept", "broken"))
            order.setdefault((record["prompt"], source, kept, broken), record["where"])
            if kept == broken:
                yield f"{record['where']}: both pictures are the same"
            elif (other := order.get((record["prompt"], source, broken, kept))) and not record.get("tie"):
                yield f"{record['where']}: says the reverse of {other}: the same two pictures, the other one better"


def check_pictures(records: list[dict], limit: int = 20) -> None:
    """Refuses what is wrong with pictures before hours are spent on them, and tells what looks like a slip."""
    survey = Survey()
    if faults := list(picture_faults(records, survey)):
        more = f"\n… and {len(faults) - limit} more" if len(faults) > limit else ""
        raise Refusal("pairs that cannot be trained on:\n" + "\n".join(faults[:limit]) + more)
    for warning in survey.warnings():
        print(f"warning: {warning}", file=sys.stderr)
