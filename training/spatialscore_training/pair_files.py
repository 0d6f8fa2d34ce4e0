"""Pairs as files have them: ours, and a lab's own as JSON lines, JSON or Parquet, in the names that the field uses.

    prompt                          what both pictures are judged by
    chosen, rejected                the better and the worse picture; also kept, broken (ours) or path1, path2 (HPSv3's)
    confidence                      optional, 0 to 1: how sure people were; a recipe may ask for a least one
    tie                             optional: people held neither for the better one
    source                          optional: a picture that both were made from (edits)

A picture is a file's name, from the manifest's folder on, or in Parquet its bytes, or Hugging Face's `{bytes, path}`. Bytes
are held in memory.
"""

import hashlib
import io
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image, ImageOps
from tqdm import tqdm

from .files import Refusal, digest

NAMES = {"kept": ("kept", "chosen", "path1"), "broken": ("broken", "rejected", "path2"), "source": ("source",)}
Picture = str | bytes


def manifests(path: Path) -> list[Path]:
    """The files of a data set: the file itself, or all under a folder."""
    found = [path] if path.is_file() else sorted(file for ending in ("jsonl", "parquet") for file in path.rglob(f"*.{ending}"))
    if not found:
        raise Refusal(f"{path}: no pairs here (*.jsonl, *.parquet)")
    return found


def _lines(file: Path) -> Iterator[tuple[str, object]]:
    """The entries of a file, each with the place that an error names."""
    if file.suffix == ".parquet":
        yield from _rows(file)
    elif file.suffix == ".json":
        try:
            entries = json.loads(file.read_text())
        except ValueError as error:
            raise Refusal(f"{file}: not JSON: {error}") from error
        if not isinstance(entries, list):
            raise Refusal(f"{file}: not a list of pairs")
        yield from ((f"{file}: entry {number}", entry) for number, entry in enumerate(entries, 1))
    else:
        for number, line in enumerate(file.read_bytes().splitlines(), 1):
            if not line.strip():
                continue
            try:
                yield f"{file}:{number}", json.loads(line)
            except ValueError as error:
                yield f"{file}:{number}", Refusal(f"{file}:{number}: not JSON: {error}")


def _rows(file: Path) -> Iterator[tuple[str, object]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise Refusal(f"{file}: reading Parquet takes the extra `parquet`: pip install spatialscore-training[parquet]") from error
    try:
        number = 0
        for batch in parquet.ParquetFile(file).iter_batches(256):
            for row in batch.to_pylist():
                yield f"{file}: row {number}", row
                number += 1
    except ArrowException as error:
        raise Refusal(f"{file}: {error}") from error


def _picture(value: object, folder: Path, where: str) -> Picture:
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes) and value:
        return value
    if isinstance(value, str) and value.strip():
        return str(folder / value)
    raise Refusal(f"{where} is missing or empty; it must be a picture's file name or, in Parquet, its bytes")


def record(entry: object, folder: Path, where: str) -> dict:
    """A pair under our names, its pictures' files made whole, and `where` it stands."""
    if isinstance(entry, Refusal):
        raise entry
    if not isinstance(entry, dict):
        raise Refusal(f"{where}: not a JSON object")
    if not isinstance(entry.get("prompt"), str) or not entry["prompt"].strip():
        raise Refusal(f"{where}: `prompt` is missing or empty")
    found = {}
    for ours, names in NAMES.items():
        said = [name for name in names if entry.get(name) is not None]
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
    rest = {name: value for name, value in entry.items() if not any(name in names for names in NAMES.values())}
    return rest | found | {"where": where}


def each_pair(path: Path) -> Iterator[dict | Refusal]:
    """The pairs of a data set, or in a pair's place what is wrong with it."""
    for file in manifests(path):
        for where, entry in _lines(file):
            try:
                yield record(entry, file.parent, where)
            except Refusal as refusal:
                yield refusal


def read_pairs(path: Path) -> Iterator[dict]:
    """The pairs of a data set. There is at least one, and nothing is wrong with any."""
    none = True
    for pair in each_pair(path):
        if isinstance(pair, Refusal):
            raise pair
        none = False
        yield pair
    if none:
        raise Refusal(f"{path}: there are no pairs in it")


def picture_bytes(picture: Picture) -> bytes:
    """A picture's file."""
    return picture if isinstance(picture, bytes) else Path(picture).read_bytes()


def open_picture(picture: Picture) -> Image.Image:
    """A picture as the server reads it: turned as its EXIF says, in RGB."""
    with Image.open(io.BytesIO(picture) if isinstance(picture, bytes) else picture) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


def pairs_digest(records: list[dict]) -> str:
    """Of what pairs say, and of their pictures' names and sizes: enough to tell other pairs, quickly."""

    def told(value: object) -> bytes:
        if isinstance(value, bytes):
            return hashlib.sha256(value).digest()
        return json.dumps(value, sort_keys=True, default=str).encode()

    size = lambda picture: len(picture) if isinstance(picture, bytes) else Path(picture).stat().st_size
    name = lambda picture: picture if isinstance(picture, bytes) else Path(picture).name
    pictures = lambda record: [record[key] for key in NAMES if key in record]
    return digest(
        told(part)
        for record in records
        for part in (record["prompt"], record.get("confidence"), record.get("tie"), *map(name, pictures(record)), *map(size, pictures(record)))
    )


def picture_faults(records: list[dict]) -> Iterator[str]:
    """Pictures that cannot be read, pairs of one picture, and pairs that contradict each other."""

    def look(record: dict) -> tuple[list[str], dict[str, str]]:
        faults, seen = [], {}
        for name in NAMES:
            if name in record:
                try:
                    seen[name] = hashlib.sha256(picture_bytes(record[name])).hexdigest()
                    open_picture(record[name])
                except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
                    faults.append(f"{record['where']}: `{name}`: {error}")
        return faults, seen

    order: dict[tuple, str] = {}
    with ThreadPoolExecutor() as pool:
        looked = tqdm(pool.map(look, records), total=len(records), desc="pictures", unit="pair", mininterval=5)
        for record, (found, seen) in zip(records, looked):
            yield from found
            if found:
                continue
            pair = record["prompt"], seen.get("source"), seen["kept"], seen["broken"]
            order.setdefault(pair, record["where"])
            if seen["kept"] == seen["broken"]:
                yield f"{record['where']}: both pictures are the same"
            elif (other := order.get((*pair[:2], pair[3], pair[2]))) and not record.get("tie"):
                yield f"{record['where']}: says the reverse of {other}: the same two pictures, the other one better"


def check_pictures(records: list[dict], limit: int = 20) -> None:
    """Refuses what is wrong with pictures before hours are spent on them."""
    if faults := list(picture_faults(records)):
        more = f"\n… and {len(faults) - limit} more" if len(faults) > limit else ""
        raise Refusal("pairs that cannot be trained on:\n" + "\n".join(faults[:limit]) + more)
