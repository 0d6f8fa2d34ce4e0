"""Pairs on disk: shards of PNGs, each with a manifest of one JSON object a line.

    FOLDER/shard-00000/manifest.jsonl
    FOLDER/shard-00000/0000000-kept.png, 0000000-broken.png, ...

A line says

    id, prompt, perturbed_prompt     the second is true of the broken picture
    kept, broken                     files, beside the manifest
    relations                        of `prompt`: relation, about, and whether it holds in `kept` and in `broken`
    things                           for `kept` and `broken`: kind, style, box; from back to front. A box is left, top,
                                     right, bottom as fractions of the picture's side

A manifest of your own needs `prompt`, `kept` and `broken` alone; the validator checks the rest where it is there.
"""

import json
import os
import random
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Iterator

from PIL import Image
from tqdm import tqdm

from .drawings import Drawings
from .pairs import Pair, new_pair
from .relations import RULES, Clause, Thing, verdict
from .scenes import World, draw

SHARD = 500
"""Pairs in a shard."""
WORDS = range(8, 101)
"""How many words a prompt may have."""


def words(text: str) -> int:
    return len(text.split())


def _pair(world: World, drawings: Drawings, seed: int, number: int) -> Pair:
    """Pair number so-and-so of a data set, with prompts of a fitting length."""
    rng = random.Random(f"{seed}:{number}")
    while True:
        pair = new_pair(rng, world, drawings)
        if words(pair.prompt.text) in WORDS and words(pair.twin_prompt.text) in WORDS:
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


def _write_shard(folder: Path, world: World, drawings: Path, seed: int, side: int, pairs: int, shard: int) -> int:
    """Writes one shard, its manifest last; returns how many pairs are in it."""
    numbers = range(shard * SHARD, min(pairs, (shard + 1) * SHARD))
    target = folder / f"shard-{shard:05}"
    if (target / "manifest.jsonl").exists():
        return len(numbers)
    target.mkdir(parents=True, exist_ok=True)
    source = Drawings(drawings, world.words, world.styles)
    lines = []
    for number in numbers:
        pair = _pair(world, source, seed, number)
        record = _record(number, pair)
        for name, scene in (("kept", pair.kept), ("broken", pair.broken)):
            draw(scene, side, source).save(target / record[name], compress_level=1)
        lines.append(json.dumps(record))
    part = target / "manifest.part"
    part.write_text("\n".join(lines) + "\n")
    part.replace(target / "manifest.jsonl")
    return len(numbers)


def write_pairs(folder: Path, world: World, drawings: Path, seed: int, side: int, pairs: int, jobs: int | None = None) -> None:
    """Writes a data set. The same arguments give the same bytes; shards that are there are left alone."""
    write = partial(_write_shard, folder, world, drawings, seed, side, pairs)
    with ProcessPoolExecutor(jobs or os.cpu_count()) as pool, tqdm(total=pairs, unit="pair") as bar:
        for done in pool.map(write, range((pairs + SHARD - 1) // SHARD)):
            bar.update(done)


def manifests(path: Path) -> list[Path]:
    """The manifests of a data set: the file itself, or all under a folder."""
    found = [path] if path.is_file() else sorted(path.rglob("*.jsonl"))
    if not found:
        raise FileNotFoundError(f"{path}: no manifest here (*.jsonl)")
    return found


def read_pairs(path: Path) -> Iterator[dict]:
    """The records of a data set, the names of their pictures made whole."""
    for manifest in manifests(path):
        for line in manifest.read_text().splitlines():
            record = json.loads(line)
            yield record | {name: str(manifest.parent / record[name]) for name in ("kept", "broken")}


def validate(path: Path) -> Iterator[str]:
    """What is wrong with a data set, one line for each fault."""
    for manifest in manifests(path):
        seen = set()
        for number, line in enumerate(manifest.read_text().splitlines(), 1):
            where = f"{manifest}:{number}"
            try:
                record = json.loads(line)
            except ValueError as error:
                yield f"{where}: not JSON: {error}"
                continue
            if not isinstance(record, dict):
                yield f"{where}: not a JSON object"
                continue
            if record.get("id") in seen - {None}:
                yield f"{where}: id {record['id']} stands twice"
            seen.add(record.get("id"))
            for fault in _faults(record, manifest.parent):
                yield f"{where}: {fault}"


def _faults(record: dict, folder: Path) -> Iterator[str]:
    for name in ("prompt", "kept", "broken"):
        if not isinstance(record.get(name), str) or not record[name].strip():
            yield f"`{name}` is missing or empty"
            return
    for name in ("kept", "broken"):
        try:
            with Image.open(folder / record[name]) as image:
                image.verify()
        except (OSError, SyntaxError) as error:
            yield f"`{name}`: {error}"
    if (folder / record["kept"]).resolve() == (folder / record["broken"]).resolve():
        yield "`kept` and `broken` are the same file"
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
    if clause.relation not in RULES:
        return
    for name in ("kept", "broken"):
        layout = []
        for thing in things[name]:
            left, top, right, bottom = thing["box"]
            layout.append(Thing(thing["kind"], thing.get("style", ""), (left + right) / 2, (top + bottom) / 2, right - left, bottom - top))
        missing = set(clause.about) - {thing.kind for thing in layout}
        if missing:
            yield f"{clause.relation} is about {', '.join(sorted(missing))}, not among the things of `{name}`"
        elif (found := verdict(clause, tuple(layout))) != said[name]:
            yield f"{clause.relation}({', '.join(clause.about)}) is said to be {said[name]} in `{name}`; the boxes say {found}"
