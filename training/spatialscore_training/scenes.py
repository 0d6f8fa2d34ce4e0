"""Layouts, their twins, and pictures of them.

A twin is the same scene with one thing changed: two things swapped, one moved, or the order in depth of an overlapping
two reversed; in a world with `lost` things, also one left out, another kind in its place, one there twice, or one cut off
by an edge. Which of the two is "the" scene is for the toss of a coin (`pairs`), so that neither is the likelier one to look
at.
"""

import random
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import numpy as np
from PIL import Image

from .drawings import EVERY_STYLE, LOOKS, STYLES, Drawings, kinds
from .files import Refusal, tries
from .relations import PLAIN, Thing, Things, overlap


@dataclass(frozen=True)
class World:
    """What scenes may hold: a small world for a beginner, a large one for the finished model."""

    kinds: int = 112
    """How many of the kinds in `kinds.tsv`, from the top."""
    things: tuple[int, int] = (2, 8)
    """The least and the greatest number of things in a scene."""
    size: tuple[float, float] = (0.16, 0.34)
    """The longer side of a drawing, as a fraction of the picture's."""
    relations: tuple[str, ...] = PLAIN
    stress: tuple[str, ...] = ()
    """Families of relations that make up half of what the reader is asked; one that stands here twice counts twice."""
    clauses: tuple[int, int] = (1, 4)
    """The least and the greatest number of clauses in a prompt."""
    phrasings: tuple[int, int] = (0, 99)
    """Which of the phrasings of a relation, from and up to; see `prompts`."""
    styles: tuple[str, ...] = STYLES
    depth: float = 0.0
    """How often a thing is laid over another."""
    shadow: float = 0.05
    """How far a thing's shadow reaches beyond it, as a fraction of the picture's side."""
    length: tuple[int, int] = (8, 100)
    """The least and the greatest number of words in a pair's prompts."""
    paper: bool = False
    """A pair as the paper has it: the number of relations is drawn from the paper's distribution, a scene's kind frames the
    prompt, no fact stands twice, words are held to what they mean, and both pictures share their background."""
    grammar: float = 0.0
    """How many of the prompts are by the grammar of `language`."""
    adjectives: float = 0.3
    """How often one of them puts an adjective before a noun."""
    held_out: bool = False
    """Whether they are in the grammar's phrasings and adjectives that training never shows."""
    lost: float = 0.0
    """How often a twin lacks a thing, has another kind in its place, has it twice, or cuts it off; and how often a clause is broken
    because the picture lacks what it names."""
    doubled: float = 0.0
    """How often a scene has one thing, or two, twice to four times, in two of three such scenes in a row or a column."""
    looks: tuple[str, ...] = ()
    """The looks in which half of the scenes have their drawings (`drawings.LOOKS`)."""
    shadows: tuple[float, ...] = ()
    """How far shadows reach, one of these for each scene; in place of `shadow`."""

    def __post_init__(self) -> None:
        """Refuses what no scene can be."""
        in_order = lambda name, least, most: least <= getattr(self, name)[0] <= getattr(self, name)[1] <= most
        for kept, must in (
            (2 <= self.kinds <= len(kinds()), f"kinds must be from 2 to {len(kinds())}, not {self.kinds}"),
            (in_order("things", 2, self.kinds), f"things must be two numbers in order from 2 to kinds ({self.kinds}), not {self.things}"),
            (in_order("size", 0.02, 1), f"size must be two fractions in order from 0.02 to 1, not {self.size}"),
            (in_order("length", 1, 1000), f"length must be two numbers of words in order from 1 to 1000, not {self.length}"),
            (in_order("clauses", 1, 64), f"clauses must be two numbers in order from 1 to 64, not {self.clauses}"),
            (0 <= self.depth <= 1, f"depth must be from 0 to 1, not {self.depth}"),
            (0 <= self.shadow <= 0.5, f"shadow must be from 0 to 0.5, not {self.shadow}"),
            (self.styles and set(self.styles) <= set(EVERY_STYLE), f"styles must be some of {', '.join(EVERY_STYLE)}, not {self.styles}"),
            (set(self.looks) <= set(LOOKS), f"looks must be some of {', '.join(LOOKS)}, not {self.looks}"),
            (all(0 <= shadow <= 0.5 for shadow in self.shadows), f"shadows must be from 0 to 0.5, not {self.shadows}"),
            *((0 <= getattr(self, name) <= 1, f"{name} must be from 0 to 1, not {getattr(self, name)}") for name in ("grammar", "adjectives", "lost", "doubled")),
        ):
            if not kept:
                raise Refusal(must)

    @property
    def words(self) -> tuple[str, ...]:
        return tuple(kinds())[: self.kinds]


@dataclass(frozen=True)
class Scene:
    things: Things
    ground: int
    """The seed of the background."""
    shadow: float
    """As in `World`."""


def _place(rng: random.Random, width: float, height: float, others: list[Thing], world: World) -> tuple[float, float]:
    """A place for the middle of a box: anywhere, or one that some relation calls for."""
    x = rng.uniform(width / 2, 1 - width / 2)
    y = rng.uniform(height / 2, 1 - height / 2)
    if set(world.relations) <= set(PLAIN):
        return x, y
    wish = rng.random()
    near = lambda size: rng.choice((size / 2 + rng.uniform(0, 0.05), 1 - size / 2 - rng.uniform(0, 0.05)))
    if wish < 0.12:
        return near(width), near(height)
    if wish < 0.24:
        return (near(width), y) if rng.random() < 0.5 else (x, near(height))
    if wish < 0.34:
        return 0.5 + rng.uniform(-0.05, 0.05), 0.5 + rng.uniform(-0.05, 0.05)
    if others and wish < 0.5:
        other = rng.choice(others)
        return (x, other.y + rng.uniform(-0.03, 0.03)) if rng.random() < 0.5 else (other.x + rng.uniform(-0.03, 0.03), y)
    if len(others) > 1 and wish < 0.65:
        a, b = rng.sample(others, 2)
        share = rng.uniform(0.35, 0.65)
        return a.x + share * (b.x - a.x) + rng.uniform(-0.03, 0.03), a.y + share * (b.y - a.y) + rng.uniform(-0.03, 0.03)
    return x, y


def _over(rng: random.Random, width: float, height: float, other: Thing) -> tuple[float, float]:
    """A place that lies partly over another thing."""
    reach_x, reach_y = (width + other.width) / 2, (height + other.height) / 2
    far, near = rng.uniform(0.45, 0.65), rng.uniform(-0.4, 0.4)
    along, across = (far, near) if rng.random() < 0.5 else (near, far)
    return other.x + rng.choice((-1, 1)) * along * reach_x, other.y + rng.choice((-1, 1)) * across * reach_y


def _inside(thing: Thing) -> bool:
    left, top, right, bottom = thing.box
    return left >= 0 and top >= 0 and right <= 1 and bottom <= 1


class Layers(NamedTuple):
    """Of each point of a picture, [side, side]: the index of the thing that is seen there and of the one right behind it
    (-1: none)."""

    front: np.ndarray
    behind: np.ndarray


def _within(side: int, top: int, left: int, bottom: int, right: int) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """Of a box, what lies in a picture of this side: where there, and which part of the box it is."""
    spans = [(first, max(first, 0), min(last, side)) for first, last in ((top, bottom), (left, right))]
    return tuple(slice(a, b) for _, a, b in spans), tuple(slice(a - first, b - first) for first, a, b in spans)


def _fitted(thing: Thing, side: int) -> tuple[tuple[int, int, int, int], tuple[str, str, int, int]]:
    """A thing's box in a picture of this side, left to bottom, and its drawing by kind, style, width and height."""
    left, top, right, bottom = (round(edge * side) for edge in thing.box)
    return (left, top, right, bottom), (thing.kind, thing.style, max(1, right - left), max(1, bottom - top))


def layers(things: Things, side: int, drawings: Drawings) -> Layers:
    """What lies where, at any fineness."""
    front, behind = np.full((2, side, side), -1, np.int8)
    for i, thing in enumerate(things):
        (left, top, right, bottom), shape = _fitted(thing, side)
        here, part = _within(side, top, left, bottom, right)
        mask = drawings.mask(*shape)[part]
        behind[here][mask] = front[here][mask]
        front[here][mask] = i
    return Layers(front, behind)


def shade(scene: Scene, side: int, drawings: Drawings) -> np.ndarray:
    """How much of the light a shadow takes from what is seen, [side, side]."""
    reach = max(1, round(scene.shadow * side))
    light = np.ones((side + 2 * reach, side + 2 * reach), np.float32)
    for thing in scene.things:
        (left, top, right, bottom), shape = _fitted(thing, side)
        here, part = _within(len(light), top, left, bottom + 2 * reach, right + 2 * reach)
        light[here] *= 1 - np.asarray(drawings.shadow(*shape, reach))[part] / 255
        here, part = _within(side, top, left, bottom, right)
        light[reach:-reach, reach:-reach][here][drawings.mask(*shape)[part]] = 1
    return 1 - light[reach:-reach, reach:-reach]


def _hides(thing: Thing, other: Thing, drawings: Drawings) -> bool:
    """Whether so much of one drawing, not only of its box, lies over the other that a person sees it."""
    front, behind = layers((other, thing), 64, drawings)
    both = np.count_nonzero(behind == 0)
    return both >= 0.1 * min(np.count_nonzero(front == 1), np.count_nonzero(front == 0) + both)


def allowed(things: Things, drawings: Drawings) -> bool:
    """Everything inside the picture, and things either well apart or well over each other, each over one at most."""
    if not all(map(_inside, things)):
        return False
    covers = [0] * len(things)
    for i, a in enumerate(things):
        for j in range(i):
            covered = overlap(a, things[j])
            if covered and not (0.15 <= covered <= 0.55 and _hides(a, things[j], drawings)):
                return False
            if covered:
                covers[i] += 1
                covers[j] += 1
    return max(covers) <= 1


def _one(rng: random.Random, word: str, style: str, others: list[Thing], world: World, drawings: Drawings) -> Thing:
    """A thing of this kind in a place of its own."""
    size = rng.uniform(*world.size)
    width, height = (edge * size for edge in drawings.shape(word, style))
    if others and rng.random() < world.depth:
        x, y = _over(rng, width, height, rng.choice(others))
    else:
        x, y = _place(rng, width, height, others, world)
    return Thing(word, style, x, y, width, height)


def _again(rng: random.Random, thing: Thing, line: str) -> Thing:
    """The same thing elsewhere in its row or its column."""
    if line == "row":
        return replace(thing, x=rng.uniform(thing.width / 2, 1 - thing.width / 2))
    return replace(thing, y=rng.uniform(thing.height / 2, 1 - thing.height / 2))


def new_scene(rng: random.Random, world: World, drawings: Drawings) -> Scene:
    """A scene of this world."""
    for _ in tries(f"a scene of {world.things[0]} to {world.things[1]} things of {world.size[0]} to {world.size[1]} of the side", 1000):
        words = rng.sample(world.words, rng.randint(*world.things))
        style = rng.choice(world.styles)
        if world.looks and rng.random() < 0.5:
            style += f"~{rng.choice(world.looks)}"
        line = ""
        if world.doubled and rng.random() < world.doubled:
            words += [word for word in rng.sample(words, rng.choice((1, 1, 2))) for _ in range(rng.choice((1, 1, 2, 3)))]
            line = rng.choice(("", "row", "column"))
        things: list[Thing] = []
        for word in words:
            first = next((thing for thing in things if thing.kind == word), None) if line else None
            for _ in range(12):
                thing = _again(rng, first, line) if first else _one(rng, word, style, things, world, drawings)
                if allowed((*things, thing), drawings):
                    things.append(thing)
                    break
            else:
                break
        if len(things) == len(words):
            rng.shuffle(things)
            return Scene(tuple(things), rng.getrandbits(32), rng.choice(world.shadows) if world.shadows else world.shadow)


def _swapped(rng: random.Random, things: Things, world: World) -> Things:
    i, j = rng.sample(range(len(things)), 2)
    changed = list(things)
    changed[i] = replace(things[i], x=things[j].x, y=things[j].y)
    changed[j] = replace(things[j], x=things[i].x, y=things[i].y)
    return tuple(changed)


def _moved(rng: random.Random, things: Things, world: World) -> Things:
    i = rng.randrange(len(things))
    thing = things[i]
    x, y = _place(rng, thing.width, thing.height, [*things[:i], *things[i + 1 :]], world)
    return *things[:i], replace(thing, x=x, y=y), *things[i + 1 :]


def _reordered(rng: random.Random, things: Things, world: World) -> Things:
    touching = [(j, i) for i in range(len(things)) for j in range(i) if overlap(things[i], things[j])]
    changed = list(things)
    if touching:
        j, i = rng.choice(touching)
        changed[i], changed[j] = things[j], things[i]
    return tuple(changed)


def _without(rng: random.Random, things: Things, world: World) -> Things:
    i = rng.randrange(len(things))
    return things[:i] + things[i + 1 :]


def _replaced(rng: random.Random, things: Things, world: World, drawings: Drawings) -> Things:
    """One of the things as another kind, no larger than it was."""
    i = rng.randrange(len(things))
    there, old = {thing.kind for thing in things}, things[i]
    other = rng.choice([word for word in world.words if word not in there])
    width, height = drawings.shape(other, old.style)
    size = min(old.width / width, old.height / height)
    return *things[:i], replace(old, kind=other, width=width * size, height=height * size), *things[i + 1 :]


def _twice(rng: random.Random, things: Things, world: World) -> Things:
    """One of the things once more, or in the place of another."""
    thing = rng.choice(things)
    others = things if rng.random() < 0.5 else _without(rng, things, world)
    x, y = _place(rng, thing.width, thing.height, list(others), world)
    return *others, replace(thing, x=x, y=y)


def _cut(rng: random.Random, things: Things) -> Things | None:
    """One of the things so far over an edge that less than half of it is seen, where it covers nothing."""
    i = rng.randrange(len(things))
    thing, share = things[i], rng.uniform(0.2, 0.4)
    over = lambda size: rng.choice((size * (share - 0.5), 1 - size * (share - 0.5)))
    place = {"x": over(thing.width)} if rng.random() < 0.5 else {"y": over(thing.height)}
    cut = replace(thing, **place)
    others = things[:i] + things[i + 1 :]
    return (*others, cut) if not any(overlap(cut, other) for other in others) else None


def new_twin(rng: random.Random, scene: Scene, world: World, drawings: Drawings) -> Scene | None:
    """The scene with one change, on a background of its own unless the world is the paper's; None where no change could be made."""
    for _ in range(12):
        change = rng.choice((_swapped, _moved, _reordered) if world.depth else (_swapped, _moved))
        if world.paper:
            # Two objects swapped, or one elsewhere, far more often than depth alone.
            (change,) = rng.choices((_swapped, _moved, _reordered), (12, 12, 1))
        if world.lost and rng.random() < world.lost:
            if rng.random() < 0.2:
                if things := _cut(rng, scene.things):
                    return Scene(things, rng.getrandbits(32), scene.shadow)
                continue
            change = rng.choice((_without, partial(_replaced, drawings=drawings), _twice))
        things = change(rng, scene.things, world)
        if things != scene.things and allowed(things, drawings):
            return Scene(things, scene.ground if world.paper else rng.getrandbits(32), scene.shadow)
    return None


# Pictures

def background(seed: int, side: int) -> Image.Image:
    """Plain, shaded, or mottled, sometimes with bands or a horizon; the same for the same seed."""
    rng = np.random.default_rng(seed)
    grid = rng.choice((1, 2, 3, 5))
    base = rng.integers(30, 236, 3)
    colours = np.clip(base + rng.normal(0, rng.choice((8, 25, 45)), (grid, grid, 3)), 0, 255).astype(np.uint8)
    image = Image.fromarray(colours).resize((side, side), Image.Resampling.BICUBIC)
    if rng.random() < 0.3:
        shade = np.clip(base + rng.normal(0, 30, 3), 0, 255).astype(np.uint8)
        band = Image.new("RGB", (side, side), tuple(int(c) for c in shade))
        lines = np.zeros((side, side), np.uint8)
        if rng.random() < 0.5:
            lines[int(side * rng.uniform(0.2, 0.8)) :] = 255
        else:
            width = int(rng.integers(max(2, side // 28), side // 6))
            lines[(np.arange(side) // width) % 2 == 0] = 255
            lines = lines if rng.random() < 0.5 else lines.T
        image.paste(band, (0, 0), Image.fromarray(np.ascontiguousarray(lines)))
    return image


def draw(scene: Scene, side: int, drawings: Drawings) -> Image.Image:
    """The picture of a scene, `side` pixels wide and high."""
    image = background(scene.ground, side)
    reach = round(scene.shadow * side)
    for thing in scene.things:
        (left, top, *_), shape = _fitted(thing, side)
        # A soft shadow on what lies behind, as cut paper casts it: it tells who is in front.
        image.paste((0, 0, 0), (left - reach, top - reach), drawings.shadow(*shape, reach))
        drawing = drawings.scaled(*shape)
        image.paste(drawing, (left, top), drawing)
    return image
