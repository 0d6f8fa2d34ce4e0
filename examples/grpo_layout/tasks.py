"""Prompts, the layouts that a policy proposes for them, their pictures, and what geometry says of them.

Drawings, renderer, phrasings and geometry are those of `training/`. Held-out prompts are about kinds that no training
prompt of this example names, and where they state two relations, no training prompt states such two. Of the hard
prompts' combinations hardly any ever comes twice.
"""

import random
from dataclasses import dataclass, replace
from itertools import combinations, permutations, product
from typing import Literal

import numpy as np
from PIL import Image
from spatialscore_training.drawings import STYLES, Drawings
from spatialscore_training.pairs import RELATIONS as PAPER
from spatialscore_training.prompts import write
from spatialscore_training.relations import PLAIN, RULES, Clause, Thing, clauses_about, fact, overlap
from spatialscore_training.scenes import Scene, World, draw

from policy import RELATIONS, features

THINGS, MANY = 3, (5, 8)
"""How many an easy prompt has at most, and a hard one at least and at most."""
SIDE = 224
"""Of the pictures, in pixels: what the built-in checkpoint looks at, so that nothing is resized."""
SIZES, SMALL = (0.22, 0.34), (0.12, 0.2)
"""The longer side of a drawing, as a fraction of the picture's, of few things and of many."""
WORLD = World(kinds=64)

Layout = tuple[Thing, ...]
Form = Literal["one", "easy", "hard"]
"""`one`: two things and one relation. `easy`: so, or three things and two relations. `hard`: five to eight things, and
as many relations as a prompt of the paper has, in a frame of its sort."""


@dataclass(frozen=True)
class Task:
    """A prompt, and all about its picture but where things are."""

    text: str
    stated: tuple[tuple, ...]
    """Relations, each with the numbers of the things that it is about."""
    things: Layout
    """With their sizes; their places are the policy's to choose."""
    features: np.ndarray

    def used(self) -> np.ndarray:
        """[2 * things]: 1 for the actions of things that are there."""
        return np.repeat(np.arange(len(self.features)) < len(self.things), 2).astype(float)

    def layout(self, actions: np.ndarray) -> Layout:
        """The things at the places that actions [2 * things] choose, all of each inside the picture."""
        share = 1 / (1 + np.exp(-actions.reshape(-1, 2)))
        return tuple(
            replace(thing, x=thing.width / 2 + x * (1 - thing.width), y=thing.height / 2 + y * (1 - thing.height))
            for thing, (x, y) in zip(self.things, share)
        )

    def kept(self, layout: Layout) -> float:
        """What share of the relations the layout keeps, by geometry; too close to call is not kept. That is what
        `verdict` says of a layout that has each thing once and whole."""
        return sum(RULES[relation](layout, *about) is True for relation, *about in self.stated) / len(self.stated)


class Tasks:
    """A stream of tasks, the same for the same seed."""

    def __init__(self, drawings: Drawings, seed: int, *, held_out: bool, form: Form = "easy"):
        self.drawings, self.rng, self.form = drawings, random.Random(seed), form
        self.words = [word for i, word in enumerate(WORLD.words) if (i % 4 == 3) == held_out]
        self.twos = [two for two in _two_relations() if two[1] == held_out]

    def some(self, count: int) -> list[Task]:
        """The next so many."""
        return [self._hard() if self.form == "hard" else self._easy() for _ in range(count)]

    def _easy(self) -> Task:
        """Two things and one relation, or three things and two relations between different pairs of them."""
        one = self.form == "one" or self.rng.random() < 0.4
        count = 2 if one else 3
        if one:
            stated = ((self.rng.choice(PLAIN), *self.rng.sample(range(count), 2)),)
        else:
            stated = self.rng.choice(self.twos)[0]
            stated = tuple(self.rng.sample(stated, len(stated)))
        things = self._things(count, SIZES)
        clauses = tuple(Clause(relation, (things[a].kind, things[b].kind)) for relation, a, b in stated)
        return Task(write(self.rng, clauses).text, stated, things, features(stated, THINGS))

    def _hard(self) -> Task:
        """Facts of a scene that the policy never sees: so there is a layout that keeps them all."""
        many, (count,) = self.rng.randint(*MANY), self.rng.choices(list(PAPER), list(PAPER.values()))
        found: dict[Clause, list[Clause]] = {}
        while len(found) < count:
            things, found = self._scattered(self._things(many, SMALL)), {}
            for clause in (clause for relation in RELATIONS for clause in clauses_about(range(many), relation)):
                if RULES[clause.relation](things, *clause.about):
                    found.setdefault(fact(clause), []).append(clause)
        chosen = [self.rng.choice(found[each]) for each in self.rng.sample(list(found), count)]
        clauses = tuple(Clause(relation, tuple(things[i].kind for i in about)) for relation, about in chosen)
        stated = tuple((relation, *about) for relation, about in chosen)
        return Task(write(self.rng, clauses, things=things).text, stated, things, features(stated, MANY[1]))

    def _scattered(self, things: Layout) -> Layout:
        """The things in places where none covers another."""
        placed: list[Thing] = []
        for thing in things:
            while not placed or placed[-1].kind != thing.kind:
                there = replace(thing, x=self.rng.uniform(0.1, 0.9), y=self.rng.uniform(0.1, 0.9))
                if not any(overlap(there, other) for other in placed):
                    placed.append(there)
        return tuple(placed)

    def _things(self, count: int, sizes: tuple[float, float]) -> Layout:
        """So many, of different kinds and one style, in the middle."""
        style, things = self.rng.choice(STYLES), []
        for word in self.rng.sample(self.words, count):
            (width, height), size = self.drawings.shape(word, style), self.rng.uniform(*sizes)
            things.append(Thing(word, style, 0.5, 0.5, width * size, height * size))
        return tuple(things)


def _two_relations() -> list[tuple[tuple, bool]]:
    """Every two relations between different pairs of three things, and whether it is held out: a fifth is, and with one
    all that differ from it only in the numbers of the things."""
    ordered = list(permutations(range(THINGS), 2))
    every = [
        ((first, *one), (second, *other))
        for one, other in combinations(ordered, 2)
        if set(one) != set(other)
        for first, second in product(PLAIN, PLAIN)
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
