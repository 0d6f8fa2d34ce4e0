"""Pairs on disk: shards of PNGs, each with a manifest of one JSON object a line.

    FOLDER/dataset.json
    FOLDER/shard-00000/manifest.jsonl
    FOLDER/shard-00000/0000000-kept.png, 0000000-broken.png, ...

A line says

    id, prompt, perturbed_prompt     the second is true of the broken picture
    kept, broken                     files, beside the manifest
    relations                        of `prompt`: relation, about, and whether it holds in `kept` and in `broken`
    things                           for `kept` and `broken`: kind, style, box; from back to front. A box is left, top,
                                     right, bottom as fractions of the picture's side

`dataset.json` says what the pairs were made with (`made_with`), how many there are to be, and, once they are all there, the
digest of every file. A folder that was made with something else is refused, a shard that is short is finished.

A manifest of your own needs `prompt`, `kept` and `broken` alone; the validator checks the rest where it is there.
"""

import json
import multiprocessing
import os
import random
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from itertools import takewhile
from multiprocessing.connection import wait
from pathlib import Path
from threading import Thread
from typing import Iterable, Iterator

from tqdm import tqdm

from .data_sets import splits
from .drawings import Drawings, drawings_digest
from .files import Refusal, digest, keep_apart, tries, write_text
from .language import WRITTEN_WITH
from .pair_files import each_pair, picture_faults
from .pairs import Pair, new_pair
from .relations import EVERY, Clause, Thing, verdict
from .scenes import World, draw
from .survey import Survey

GENERATOR = 4
"""Its version: another one where the same arguments give other pairs."""
SHARD = 500
"""Pairs in a shard."""


def words(text: str) -> int:
    return len(text.split())


def _pair(world: World, drawings: Drawings, seed: int, number: int) -> Pair:
    """Pair number so-and-so of a data set, with prompts of a fitting length."""
    rng = random.Random(f"{seed}:{number}")
    least, most = world.length
    for _ in tries(f"a prompt of {least} to {most} words for the pair and its twin"):
        pair = new_pair(rng, world, drawings)
        if least <= words(pair.prompt.text) <= most and least <= words(pair.twin_prompt.text) <= most:
            return pair


def _things(things: tuple[Thing, ...]) -> list[dict]:
    return [{"kind": t.kind, "style": t.style, "box": [round(edge, 7) for edge in t.box]} for t in things]


def _record(number: int, pair: Pair) -> dict:
    told = lambda clause, scene: verdict(clause, scene.things)
    return {
        "id": f"{number:07}",
        "prompt": pair.prompt.text,
        "perturbed_prompt": pair.twin_prompt.text,
        "kept": f"{number:07}-kept.png",
        "broken": f"{number:07}-broken.png",
        "relations": [
            {"relation": c.relation, "about": list(c.about), "kept": told(c, pair.kept), "broken": told(c, pair.broken)}
            for c in pair.prompt.clauses
        ],
        "things": {"kept": _things(pair.kept.things), "broken": _things(pair.broken.things)},
    }


def _shard_digest(files: Iterable[Path]) -> str:
    """Of the names and the bytes of a shard's files."""
    return digest(part for file in sorted(files) for part in (file.name.encode(), file.read_bytes()))


def _write_shard(folder: Path, world: World, drawings: Path, seed: int, side: int, pairs: int, shard: int) -> int:
    """Writes what a shard lacks, its manifest last; returns how many pairs are in it."""
    numbers = range(shard * SHARD, min(pairs, (shard + 1) * SHARD))
    target = folder / f"shard-{shard:05}"
    manifest = target / "manifest.jsonl"
    target.mkdir(parents=True, exist_ok=True)
    lines = manifest.read_text().splitlines() if manifest.exists() else []
    there = lambda line: all((target / json.loads(line)[name]).exists() for name in ("kept", "broken"))
    lines = list(takewhile(there, lines))
    if len(lines) < len(numbers):
        source = Drawings(drawings, world.words, world.styles)
        for number in numbers[len(lines) :]:
            pair = _pair(world, source, seed, number)
            record = _record(number, pair)
            for name, scene in (("kept", pair.kept), ("broken", pair.broken)):
                draw(scene, side, source).save(target / record[name], compress_level=1)
            lines.append(json.dumps(record))
        write_text(manifest, "\n".join(lines) + "\n")
    return len(numbers)


def _die_with_parent() -> None:
    """A worker ends when who started it is gone, however that went."""

    def watch() -> None:
        wait([multiprocessing.parent_process().sentinel])
        os._exit(1)

    Thread(target=watch, daemon=True).start()


def set_digest(folder: Path) -> str:
    """Of the files of a data set, as it was made or as it was exported (`hub`)."""
    made = [shard.iterdir() for shard in sorted(folder.glob("shard-*"))]
    # Beside the Parquet files an evaluation may leave what it found.
    exported = [data.glob("*.parquet") for data in folder.glob("data")]
    return digest(_shard_digest(files).encode() for files in made + exported)


def _claim(folder: Path, made_with: dict, pairs: int) -> bool:
    """Makes a folder the place of this data set, or refuses one that holds another, or something else; tells whether
    there is anything left to write."""
    said_in = folder / "dataset.json"
    if not said_in.exists():
        if folder.exists() and any(folder.iterdir()):
            raise Refusal(f"{folder} is not empty and has no dataset.json, so nobody knows what made it; name a new folder")
    else:
        said = json.loads(said_in.read_text())
        if "exported" in said["made_with"]:
            raise Refusal(f"{folder} holds an exported data set; name a new folder")
        # What a world did not have when the set was begun is in it what it is by default.
        then = said["made_with"] | {"world": None} | json.loads(json.dumps(asdict(World()))) | said["made_with"]["world"]
        now = made_with | {"world": None} | made_with["world"]
        # As JSON has them, which knows no tuples.
        now = json.loads(json.dumps(now))
        if differing := sorted(key for key in then.keys() | now.keys() if then.get(key) != now.get(key)):
            told = "; ".join(f"{key} was {then.get(key)}, is now {now.get(key)}" for key in differing)
            raise Refusal(f"{folder} was made with other arguments: {told}. Name a new folder")
        if pairs < said["pairs"]:
            raise Refusal(f"{folder} has {said['pairs']} pairs, more than {pairs}; name a new folder")
        if said["digest"] and said["digest"] != set_digest(folder):
            raise Refusal(f"{folder}: its files are not those that were written; name a new folder")
        if said["digest"] and pairs == said["pairs"]:
            return False
    write_text(said_in, json.dumps({"made_with": made_with, "pairs": pairs, "digest": None}, indent=1) + "\n")
    return True


def write_pairs(folder: Path, world: World, drawings: Path, seed: int, side: int, pairs: int, jobs: int | None = None) -> None:
    """Writes a data set, or what one that was begun with the same arguments lacks. The same arguments give the same bytes."""
    for name, value, least in (("pairs", pairs, 1), ("seed", seed, 0), ("side", side, 28), ("jobs", 1 if jobs is None else jobs, 1)):
        if value < least:
            raise Refusal(f"{name} must be at least {least}, not {value}")
    keep_apart(folder, drawings=drawings)
    made_with = {"generator": GENERATOR, "seed": seed, "side": side, "world": asdict(world)}
    made_with["drawings"] = drawings_digest(drawings, world.words, world.styles)
    if world.grammar:
        made_with["written_with"] = WRITTEN_WITH
    if not _claim(folder, made_with, pairs):
        return
    shards = range((pairs + SHARD - 1) // SHARD)
    write = partial(_write_shard, folder, world, drawings, seed, side, pairs)
    with ProcessPoolExecutor(jobs or os.cpu_count(), initializer=_die_with_parent) as pool, tqdm(total=pairs, unit="pair") as bar:
        for done in pool.map(write, shards):
            bar.update(done)
    whole = {"made_with": made_with, "pairs": pairs, "digest": set_digest(folder)}
    write_text(folder / "dataset.json", json.dumps(whole, indent=1) + "\n")


def _set_faults(folder: Path) -> Iterator[str]:
    """Whether a data set of ours is what its `dataset.json` says."""
    said_in = folder / "dataset.json"
    if not said_in.is_file():
        return
    said = json.loads(said_in.read_text())
    found = sum(len(manifest.read_text().splitlines()) for manifest in folder.glob("shard-*/manifest.jsonl"))
    if "exported" not in said["made_with"] and found != said["pairs"]:
        yield f"{said_in}: {said['pairs']} pairs are to be there, {found} are; `make` with the same arguments finishes it"
    elif set_digest(folder) != said["digest"]:
        yield f"{said_in}: the files are not those that were written: one was changed, swapped, lost or added"


def validate(path: Path, survey: Survey | None = None) -> Iterator[str]:
    """What is wrong with a data set, one line for each fault. The survey is told of pictures that can be read."""
    yield from _set_faults(path)
    seen, sound = {}, []
    for split, files in splits(path).items():
        for pair in each_pair(files):
            if isinstance(pair, Refusal):
                yield str(pair)
                continue
            sound.append(pair)
            if (other := seen.setdefault((split, pair.get("id", pair["where"])), pair["where"])) != pair["where"]:
                yield f"{pair['where']}: id {pair['id']} stands twice, first in {other}"
            for fault in _faults(pair):
                yield f"{pair['where']}: {fault}"
    yield from picture_faults(sound, survey or Survey())


def _faults(record: dict) -> Iterator[str]:
    relations = record.get("relations", [])
    if relations and all(said["broken"] for said in relations):
        yield "no relation is broken in the broken picture"
    if not all(said["kept"] for said in relations):
        yield "a relation does not hold in the kept picture"
    if "things" in record:
        for said in relations:
            yield from _geometry_faults(said, record["things"])


def _geometry_faults(said: dict, things: dict[str, list[dict]]) -> Iterator[str]:
    """Whether the boxes agree with what a relation is said to be."""
    clause = Clause(said["relation"], tuple(said["about"]))
    if clause.relation not in EVERY:
        return
    for name in ("kept", "broken"):
        layout = []
        for thing in things[name]:
            left, top, right, bottom = thing["box"]
            layout.append(Thing(thing["kind"], thing.get("style", ""), (left + right) / 2, (top + bottom) / 2, right - left, bottom - top))
        missing = set(clause.about) - {thing.kind for thing in layout}
        if missing and said[name] and clause.relation != "without":
            yield f"{clause.relation} is about {', '.join(sorted(missing))}, not among the things of `{name}`"
        elif (found := verdict(clause, tuple(layout))) != said[name]:
            yield f"{clause.relation}({', '.join(clause.about)}) is said to be {said[name]} in `{name}`; the boxes say {found}"
