"""Prompts, the layouts that a policy proposes for them, their pictures, and what geometry says of them.

Drawings, renderer, phrasings and geometry are those of `training/`. Held-out prompts are about kinds that no training
prompt of this example names, and where they state two relations, no training prompt states such two.
"""

import random
from dataclasses import dataclass, replace
from itertools import combinations, permutations, product

import numpy as np
from PIL import Image
from spatialscore_training.drawings import STYLES, Drawings
from spatialscore_training.prompts import write
from spatialscore_training.relations import Clause, Thing, verdict
from spatialscore_training.scenes import Scene, World, draw

from policy import RELATIONS, THINGS, features

SIDE = 224
"""Of the pictures, in pixels: what the built-in checkpoint looks at, so that nothing is resized."""
SIZES = (0.22, 0.34)
"""The longer side of a drawing, as a fraction of the picture's."""
WORLD = World(kinds=64)

Layout = tuple[Thing, ...]


@dataclass(frozen=True)
class Task:
    """A prompt, and all about its picture but where things are."""

    text: str
    clauses: tuple[Clause, ...]
    things: tuple[Thing, ...]
    """With their sizes; their places are the policy's to choose."""
    features: np.ndarray

    def used(self) -> np.ndarray:
        """[2 * THINGS]: 1 for the actions of things that are there."""
        return np.repeat(np.arange(THINGS) < len(self.things), 2).astype(float)

    def layout(self, actions: np.ndarray) -> Layout:
        """The things at the places that actions [2 * THINGS] choose, all of each inside the picture."""
        share = 1 / (1 + np.exp(-actions.reshape(THINGS, 2)))
        return tuple(
            replace(thing, x=thing.width / 2 + x * (1 - thing.width), y=thing.height / 2 + y * (1 - thing.height))
            for thing, (x, y) in zip(self.things, share)
        )

    def kept(self, layout: Layout) -> float:
        """What share of the relations the layout keeps, by geometry; too close to call is not kept."""
        return sum(verdict(clause, layout) is True for clause in self.clauses) / len(self.clauses)


class Tasks:
    """A stream of tasks, the same for the same seed."""

    def __init__(self, drawings: Drawings, seed: int, *, held_out: bool, one_relation: bool = False):
        self.drawings, self.rng, self.one_relation = drawings, random.Random(seed), one_relation
        self.words = [word for i, word in enumerate(WORLD.words) if (i % 4 == 3) == held_out]
        self.twos = [two for two in _two_relations() if two[1] == held_out]

    def some(self, count: int) -> list[Task]:
        """The next so many."""
        return [self._new() for _ in range(count)]

    def _new(self) -> Task:
        """Two things and one relation, or three things and two relations between different pairs of them."""
        one = self.one_relation or self.rng.random() < 0.4
        count = 2 if one else 3
        if one:
            stated = ((self.rng.choice(RELATIONS), *self.rng.sample(range(count), 2)),)
        else:
            stated = self.rng.choice(self.twos)[0]
            stated = tuple(self.rng.sample(stated, len(stated)))
        style, words = self.rng.choice(STYLES), self.rng.sample(self.words, count)
        things = []
        for word in words:
            (width, height), size = self.drawings.shape(word, style), self.rng.uniform(*SIZES)
            things.append(Thing(word, style, 0.5, 0.5, width * size, height * size))
        clauses = tuple(Clause(relation, (words[a], words[b])) for relation, a, b in stated)
        return Task(write(self.rng, clauses).text, clauses, tuple(things), features(stated))


def _two_relations() -> list[tuple[tuple, bool]]:
    """Every two relations between different pairs of three things, and whether it is held out: a fifth is, and with one
    all that differ from it only in the numbers of the things."""
    ordered = list(permutations(range(THINGS), 2))
    every = [
        ((first, *one), (second, *other))
        for one, other in combinations(ordered, 2)
        if set(one) != set(other)
        for first, second in product(RELATIONS, RELATIONS)
    ]
    sorts = sorted({_sort(two) for two in every})
    held_out = set(random.Random(0).sample(sorts, len(sorts) // 5))
    return [(two, _sort(two) in held_out) for two in every]


def _sort(two: tuple) -> tuple:
    """Two relations under the numbering of things that comes first."""
    return min(tuple(sorted((r, order[a], order[b]) for r, a, b in two)) for order in permutations(range(THINGS)))


def picture(layout: Layout, ground: int, shadow: float, drawings: Drawings) -> Image.Image:
    """The picture of a layout on the background of this seed."""
    return draw(Scene(layout, ground, shadow), SIDE, drawings)
