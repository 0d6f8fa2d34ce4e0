"""What people type and what policies paint, against the goals: every sort of pair in one table.

    spatialscore-goals --server 127.0.0.1:50051                    2,000 pairs of each sort, and the table
    spatialscore-goals --server 127.0.0.1:50051 --sorts typed      those whose name begins so
    spatialscore-goals --server … --pairs 200 --out goals.json     fewer; the figures as JSON too

A row says how often the right picture is above the wrong one, with its 95 % interval, the expected calibration error, and
the goal. Prompts and pictures are made from seeds of their own, in words that no table of the generator holds: the forms
below are written out, so that a fault of the grammar is not asked for by the same fault.
"""

import argparse
import io
import json
import random
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from math import log
from pathlib import Path
from statistics import median
from typing import NamedTuple

from .calibration import interval, judge
from .drawings import DEFAULT_FOLDER, Drawings
from .evaluate import percent
from .files import command, write_text
from .pairs import Pair, new_pair
from .relations import RULES
from .scenes import Scene, World, draw
from .scorers import Item, Score, ServerScorer

TWO = World(kinds=64, things=(2, 2), clauses=(1, 1))
MIXED = World(kinds=64, things=(2, 6), relations=tuple(RULES), depth=0.15)
LONG = replace(MIXED, things=(3, 8), clauses=(5, 12))

Say = Callable[[random.Random, Pair], str]
"""What a pair's prompt is in a sort."""

SAID = {"left_of": "to the left of", "right_of": "to the right of", "above": "above", "below": "below"}
OPPOSITE = {"left_of": "right_of", "right_of": "left_of", "above": "below", "below": "above"}


def as_written(rng: random.Random, pair: Pair) -> str:
    return pair.prompt.text


def typed(change: Callable[[str], str]) -> Say:
    """The prompt, typed otherwise."""
    return lambda rng, pair: change(pair.prompt.text)


def form(text: str, **words: tuple[str, ...]) -> Say:
    """A form of one plain clause: `{a}` and `{b}` are the names, `{rel}` the relation in words, `{short}` without "to the",
    `{opposite}` the opposite in words; other names stand for one of these words. " a apple" becomes " an apple"."""

    def say(rng: random.Random, pair: Pair) -> str:
        clause = pair.prompt.clauses[0]
        rel = SAID[clause.relation]
        names = dict(zip("ab", clause.about), rel=rel, short=rel.removeprefix("to the "), opposite=SAID[OPPOSITE[clause.relation]])
        return _articles(text.format(**names, **{name: rng.choice(every) for name, every in words.items()}))

    return say


def _articles(text: str) -> str:
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)


Cheat = Callable[[random.Random, Scene, str, str], Scene]
"""What stands in for a right picture of a clause about two things, given their names."""


class Sort(NamedTuple):
    """One row of the table."""

    name: str
    goal: float
    world: World
    say: Say = as_written
    seed: int = 1
    """Sorts with one world and one seed look at the same pictures."""
    broken: Cheat | None = None
    """The wrong picture, where it is not the right one's twin."""
    look: str = ""
    """The look in which the drawings are (`drawings.LOOKS`)."""
    mode: str = "RGB"
    """That of the pictures before they become RGB: `L` has no colours."""


TYPED = {
    "Title Case": str.title,
    "UPPER CASE": str.upper,
    "lower case": str.lower,
    "double spaces": lambda text: text.replace(" ", "  "),
    "tabs": lambda text: text.replace(" ", "\t"),
    "no-break spaces": lambda text: text.replace(" ", "\u00a0"),
    "trailing space": lambda text: text + " ",
    "CRLF": lambda text: text + "\r\n",
    "leading spaces": lambda text: "  " + text,
}
NEARNESS = ("next to", "near", "on side of")
NEVER_SEEN = ("openmoji",)
ADJECTIVES = ("blue", "cute", "white", "yellow", "green", "wooden", "old", "black", "small", "shiny", "red", "beautiful", "ancient", "plastic")
FORMS = {
    "A left of B": "{a} {short} {b}",
    "a A left of a B": "a {a} {short} a {b}",
    "GenEval": "a photo of a {a} {short} a {b}",
    "there is": "There is a {a} {rel} the {b}",
    "sentence": "The {a} is {rel} the {b}.",
    "located": "a {a} located {rel} a {b}",
    "picture of": "A picture of a {a} {rel} a {b}.",
    "in quotes": '"a {a} is {rel} a {b}"',
    "an image with": "an image with a {a} {rel} a {b}",
    "verbless, first the place": "{rel} a {b}, a {a}",
}


def two_sided(rng: random.Random, pair: Pair) -> str:
    """Both sides named: "a A on the left and a B on the right", "a A at the top and a B at the bottom"."""
    clause = pair.prompt.clauses[0]
    first = {"left_of": "on the left", "right_of": "on the right", "above": "at the top", "below": "at the bottom"}
    a, b = clause.about
    return _articles(f"a {a} {first[clause.relation]} and a {b} {first[OPPOSITE[clause.relation]]}")


# Pictures that are wrong on the face of them

def _alone(scene: Scene, kinds: tuple[str, ...]) -> Scene:
    return replace(scene, things=tuple(thing for thing in scene.things if thing.kind in kinds))


def _instead(scene: Scene, kind: str, other: str) -> Scene:
    return replace(scene, things=tuple(replace(thing, kind=other) if thing.kind == kind else thing for thing in scene.things))


def _row(scene: Scene, kinds: tuple[str, ...], y: float = 0.5) -> Scene:
    """These kinds in one line from the left, as small as need be."""
    by_kind = {thing.kind: thing for thing in scene.things}
    size = 0.8 / len(kinds)
    things = []
    for i, kind in enumerate(kinds):
        thing = by_kind[kind]
        scale = size / max(thing.width, thing.height)
        things.append(replace(thing, x=(i + 0.5) / len(kinds), y=y, width=thing.width * scale, height=thing.height * scale))
    return replace(scene, things=tuple(things))


def _rows(scene: Scene, a: str, b: str) -> Scene:
    one, other = (_row(scene, (kind,) * 4, y) for kind, y in ((a, 0.25), (b, 0.75)))
    return replace(scene, things=one.things + other.things)


CHEATS: dict[str, Cheat] = {
    "A alone": lambda rng, scene, a, b: _alone(scene, (a,)),
    "B alone": lambda rng, scene, a, b: _alone(scene, (b,)),
    "neither": lambda rng, scene, a, b: _alone(scene, ()),
    "a third kind in A's place": lambda rng, scene, a, b: _instead(scene, a, _third(rng, a, b)),
    "a third kind in B's place": lambda rng, scene, a, b: _instead(scene, b, _third(rng, a, b)),
    "A B A B in a line": lambda rng, scene, a, b: _row(scene, (a, b, a, b)),
    "rows of both": lambda rng, scene, a, b: _rows(scene, a, b),
}


def _third(rng: random.Random, a: str, b: str) -> str:
    return rng.choice([word for word in TWO.words if word not in (a, b)])


def nearness(near: str) -> Say:
    """What is near in these words, and what is far in the only ones for it."""

    def say(rng: random.Random, pair: Pair) -> str:
        clause = pair.prompt.clauses[0]
        return _articles("a {} {} a {}".format(clause.about[0], near if clause.relation == "near" else "far from", clause.about[1]))

    return say


SORTS = (
    Sort("plain", 0.995, TWO),
    Sort("mixed", 0.975, MIXED, seed=2),
    Sort("long", 0.95, LONG, seed=3),
    Sort("phrasings held out, plain", 0.95, World(kinds=64, things=(2, 4), clauses=(1, 2), phrasings=(-2, 99)), seed=4),
    Sort("phrasings held out, all relations", 0.95, replace(MIXED, phrasings=(-2, 99)), seed=5),
    *(Sort(f"typed: {name}, plain", 0.98, TWO, typed(change)) for name, change in TYPED.items()),
    *(Sort(f"typed: {name}, mixed", 0.98, MIXED, typed(change), seed=2) for name, change in TYPED.items()),
    *(Sort(f"form: {name}", 0.95, TWO, form(text)) for name, text in FORMS.items()),
    Sort("form: two-sided", 0.95, TWO, two_sided),
    Sort("adjective: first noun", 0.97, TWO, form("a {adjective} {a} is {rel} a {b}", adjective=ADJECTIVES)),
    *(Sort(f"adjective: {word} second noun", 0.97, TWO, form(f"a {{a}} is {{rel}} a {word} {{b}}")) for word in ADJECTIVES),
    Sort("adjective: both nouns", 0.97, TWO, form("a {one} {a} is {rel} a {two} {b}", one=ADJECTIVES, two=ADJECTIVES)),
    Sort("negation: is not", 0.9, TWO, form("the {a} is not {opposite} the {b}")),
    Sort("negation: isn't", 0.9, TWO, form("a {a} isn't {opposite} a {b}.")),
    Sort("form: on top of", 0.95, replace(TWO, relations=("above",)), form("a {a} on top of a {b}")),
    *(Sort(f"form: {near}, far from", 0.95, replace(TWO, relations=("near", "far_from")), nearness(near)) for near in NEARNESS),
    *(Sort(f"absent: {name}", 0.98, TWO, broken=CHEATS[name]) for name in CHEATS if name.endswith(("alone", "place", "neither"))),
    Sort("absent: a photo of a A", 0.98, TWO, form("a photo of a {a}"), broken=CHEATS["B alone"]),
    Sort("absent: the picture shows a A", 0.98, TWO, form("The picture shows a {a}."), broken=CHEATS["a third kind in A's place"]),
    Sort("drawn: without shadows, mixed", 0.95, replace(MIXED, shadow=0.0), seed=2),
    *(Sort(f"drawn: {look}, plain", 0.93, TWO, look=look) for look in ("grey", "hue90", "hue180", "pale", "dark", "line")),
    Sort("drawn: grayscale, plain", 0.93, TWO, mode="L"),
    Sort("drawn: small things, plain", 0.93, replace(TWO, size=(0.07, 0.11))),
    Sort("drawn: a set never seen, plain", 0.93, replace(TWO, styles=NEVER_SEEN)),
    Sort("drawn: a set never seen, mixed", 0.88, replace(MIXED, styles=NEVER_SEEN), seed=2),
)
PARAPHRASES = (
    "a {a} is {rel} a {b}", "The {a} is {rel} the {b}.", "a {a} {rel} a {b}", "there is a {a} {rel} a {b}", "{rel} the {b} there is a {a}",
    "a photo of a {a} {rel} a {b}", "a {a} placed {rel} a {b}", "A picture of one {a} {rel} one {b}.", "the {b} has the {a} {rel} it", "we see a {a} {rel} the {b}",
)


# Measuring

def _png(scene: Scene, drawings: Drawings, look: str = "", mode: str = "RGB", side: int = 224) -> bytes:
    file = io.BytesIO()
    things = tuple(replace(thing, style=f"{thing.style}~{look}") for thing in scene.things) if look else scene.things
    draw(replace(scene, things=things), side, drawings).convert(mode).convert("RGB").save(file, "PNG", compress_level=1)
    return file.getvalue()


def pairs(world: World, seed: int, count: int, drawings: Drawings) -> Iterator[tuple[random.Random, Pair]]:
    for number in range(count):
        rng = random.Random(f"goals:{seed}:{number}")
        yield rng, new_pair(rng, world, drawings)


def _scores(scorer: ServerScorer, items: Iterable[Item]) -> list[Score]:
    found = dict(scorer.scores(items))
    return [found[i] for i in range(len(found))]


def measure(scorer: ServerScorer, sort: Sort, folder: Path, count: int) -> dict:
    """The row of a sort of pairs."""
    drawings = Drawings(folder, sort.world.words, sort.world.styles)

    def items() -> Iterator[Item]:
        for rng, pair in pairs(sort.world, sort.seed, count, drawings):
            text = sort.say(rng, pair)
            broken = sort.broken(rng, pair.kept, *pair.prompt.clauses[0].about) if sort.broken else pair.broken
            yield from (Item(text, _png(scene, drawings, sort.look, sort.mode)) for scene in (pair.kept, broken))

    scores = _scores(scorer, items())
    rewards = [(score.mean, log(score.stddev or 1.0)) for score in scores]
    found = judge(list(zip(rewards[0::2], rewards[1::2])))
    return found | {"goal": sort.goal, "met": found["accuracy"] >= sort.goal}


def measure_paraphrases(scorer: ServerScorer, folder: Path, count: int) -> dict[str, float]:
    """How often all of the paraphrases put a pair in the right order, and how far the scores of its right picture are apart."""
    drawings = Drawings(folder, TWO.words, TWO.styles)

    def items() -> Iterator[Item]:
        for rng, pair in pairs(TWO, 1, count, drawings):
            pictures = [_png(scene, drawings) for scene in (pair.kept, pair.broken)]
            yield from (Item(form(text)(rng, pair), picture) for text in PARAPHRASES for picture in pictures)

    means = [score.mean for score in _scores(scorer, items())]
    each = [means[i : i + 2 * len(PARAPHRASES)] for i in range(0, len(means), 2 * len(PARAPHRASES))]
    right = sum(all(kept > broken for kept, broken in zip(pair[0::2], pair[1::2])) for pair in each)
    return interval(right, count) | {"spread": sum(max(pair[0::2]) - min(pair[0::2]) for pair in each) / count}


def measure_cheats(scorer: ServerScorer, folder: Path, count: int) -> dict[str, dict]:
    """For each class of cheat, how often it scores above the median of right pictures; and how often below its right one."""
    drawings = Drawings(folder, TWO.words, TWO.styles)

    def items() -> Iterator[Item]:
        for rng, pair in pairs(TWO, 1, count, drawings):
            a, b = pair.prompt.clauses[0].about
            scenes = [pair.kept, *(cheat(rng, pair.kept, a, b) for cheat in CHEATS.values())]
            yield from (Item(pair.prompt.text, _png(scene, drawings)) for scene in scenes)

    means = [score.mean for score in _scores(scorer, items())]
    step = len(CHEATS) + 1
    right, found = means[0::step], {}
    middle = median(right)
    for i, name in enumerate(CHEATS, 1):
        wrong = means[i::step]
        found[name] = {"above the median": sum(mean > middle for mean in wrong) / len(wrong)}
        found[name]["below its right one"] = sum(mean < other for mean, other in zip(wrong, right)) / len(wrong)
    return found


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", metavar="HOST:PORT", required=True, help="a running SpatialScore")
    parser.add_argument("--protos", type=Path, default=Path("proto"), help="where the contract lies (default: %(default)s)")
    parser.add_argument("--drawings", type=Path, default=DEFAULT_FOLDER, help="folder STYLE/WORD.png (default: %(default)s)")
    parser.add_argument("--sorts", nargs="+", default=[""], help="what the names of the rows begin with (default: all)")
    parser.add_argument("--pairs", type=int, default=2000, help="of each sort (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="the figures as JSON")
    options = parser.parse_args()
    scorer = ServerScorer(options.server, options.protos)
    print(scorer.describe(), flush=True)
    found, wanted = {}, lambda name: name.startswith(tuple(options.sorts))
    for sort in SORTS:
        if wanted(sort.name) and not all((options.drawings / style).is_dir() for style in sort.world.styles):
            print(f"| {sort.name} | not measured: spatialreward-data fetch --styles {' '.join(sort.world.styles)} | | |", flush=True)
        elif wanted(sort.name):
            row = found[sort.name] = measure(scorer, sort, options.drawings, options.pairs)
            missed = "" if row["met"] else ", missed"
            print(f"| {sort.name} | {percent(row)} | {row['calibration_error']:.3f} | {sort.goal:.1%}{missed} |", flush=True)
    if wanted("ten of ten paraphrases"):
        row = found["ten of ten paraphrases"] = measure_paraphrases(scorer, options.drawings, options.pairs // 4)
        print(f"| ten of ten paraphrases | {percent(row)} | spread {row['spread']:.2f} | 75.0% |", flush=True)
    if wanted("cheat"):
        for name, row in measure_cheats(scorer, options.drawings, options.pairs).items():
            found[f"cheat: {name}"] = row
            print(f"| cheat: {name} | above the median of right ones {row['above the median']:.1%} | below its right one {row['below its right one']:.1%} | 2.0% at most |", flush=True)
    if options.out:
        write_text(options.out, json.dumps({"model": scorer.describe(), "pairs": options.pairs, "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
