"""Clauses about places, and what a layout says of them.

A clause is kept, broken, or too close to call; only clauses that are clearly kept or clearly broken are ever stated, so
that no label is doubtful. Lengths are fractions of the picture's side; y grows downwards. A clause is about things by
their kind's word.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import permutations, product
from typing import Iterable, NamedTuple


@dataclass(frozen=True)
class Thing:
    """A drawing in its place: the middle, the width and the height of its box."""

    kind: str
    style: str
    x: float
    y: float
    width: float
    height: float

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Left, top, right, bottom."""
        half_width, half_height = self.width / 2, self.height / 2
        return self.x - half_width, self.y - half_height, self.x + half_width, self.y + half_height

    @cached_property
    def seen(self) -> float:
        """How much of the box is in the picture, which may cut a thing off."""
        left, top, right, bottom = (min(max(edge, 0.0), 1.0) for edge in self.box)
        return (right - left) * (bottom - top) / (self.width * self.height)

    @property
    def there(self) -> bool:
        """Whether enough of it is seen to count as being in the picture."""
        return self.seen >= 0.5


Things = tuple[Thing, ...]  # From the one farthest behind to the one in front.


class Clause(NamedTuple):
    """That `relation` holds between the things of these kinds."""

    relation: str
    about: tuple[str, ...]


# Where "clearly" begins, and what is no longer so at all.
BESIDE = 0.12
CORNER_GAP, EDGE_GAP, FAR_GAP = 0.06, 0.05, 0.2
CENTRE, OFF_CENTRE = 0.06, 0.18
IN_LINE, OUT_OF_LINE = 0.04, 0.14
COVERED = 0.15


def overlap(a: Thing, b: Thing) -> float:
    """How much of the smaller box lies in the other."""
    (left, top, right, bottom), (left2, top2, right2, bottom2) = a.box, b.box
    width, height = min(right, right2) - max(left, left2), min(bottom, bottom2) - max(top, top2)
    if width <= 0 or height <= 0:
        return 0.0
    return width * height / min(a.width * a.height, b.width * b.height)


def _verdict(kept: bool, broken: bool) -> bool | None:
    return True if kept else False if broken else None


def _beyond(along: float, across: float) -> bool | None:
    """Whether one thing is on this side of another: so far along the axis, so far across it."""
    return _verdict(along >= max(BESIDE, abs(across) / 2), along <= -BESIDE)


def _in_front(things: Things, a: int, b: int) -> bool | None:
    return None if overlap(things[a], things[b]) < COVERED else a > b


def _between(a: Thing, b: Thing, c: Thing) -> bool | None:
    dx, dy = c.x - b.x, c.y - b.y
    length2 = dx * dx + dy * dy
    if length2 < 0.09:
        return None
    along = ((a.x - b.x) * dx + (a.y - b.y) * dy) / length2
    aside = abs((a.x - b.x) * dy - (a.y - b.y) * dx) / length2
    return _verdict(0.25 <= along <= 0.75 and aside <= 0.2, not -0.05 <= along <= 1.05 or aside >= 0.45)


def _corner(horizontal: float, vertical: float) -> bool | None:
    return _verdict(max(horizontal, vertical) <= CORNER_GAP, max(horizontal, vertical) >= FAR_GAP)


def _edge(gap: float) -> bool | None:
    return _verdict(gap <= EDGE_GAP, gap >= FAR_GAP)


def _line(distance: float) -> bool | None:
    return _verdict(abs(distance) <= IN_LINE, abs(distance) >= OUT_OF_LINE)


def _empty(overhangs: Iterable[float]) -> bool | None:
    """Of a half: how far the middle of each thing is inside it, less and plus half its size."""
    near, middle = zip(*overhangs)
    return _verdict(max(near) <= 0, max(middle) >= 0.08)


def _one(rule):
    return lambda things, a: rule(things[a], *things[a].box)


def _two(rule):
    return lambda things, a, b: rule(things[a], things[b])


def _half(rule):
    return lambda things: _empty(rule(thing, *thing.box) for thing in things)


# Each relation's rule, given the layout and the indices of the things that it is about.
RULES = {
    "left_of": _two(lambda a, b: _beyond(b.x - a.x, b.y - a.y)),
    "right_of": _two(lambda a, b: _beyond(a.x - b.x, b.y - a.y)),
    "above": _two(lambda a, b: _beyond(b.y - a.y, b.x - a.x)),
    "below": _two(lambda a, b: _beyond(a.y - b.y, b.x - a.x)),
    "in_front_of": lambda things, a, b: _in_front(things, a, b),
    "behind": lambda things, a, b: _in_front(things, b, a),
    "between": lambda things, a, b, c: _between(things[a], things[b], things[c]),
    "top_left_corner": _one(lambda a, left, top, right, bottom: _corner(left, top)),
    "top_right_corner": _one(lambda a, left, top, right, bottom: _corner(1 - right, top)),
    "bottom_left_corner": _one(lambda a, left, top, right, bottom: _corner(left, 1 - bottom)),
    "bottom_right_corner": _one(lambda a, left, top, right, bottom: _corner(1 - right, 1 - bottom)),
    "left_edge": _one(lambda a, left, top, right, bottom: _edge(left)),
    "right_edge": _one(lambda a, left, top, right, bottom: _edge(1 - right)),
    "top_edge": _one(lambda a, left, top, right, bottom: _edge(top)),
    "bottom_edge": _one(lambda a, left, top, right, bottom: _edge(1 - bottom)),
    "centered": _one(
        lambda a, *_: _verdict(
            max(abs(a.x - 0.5), abs(a.y - 0.5)) <= CENTRE, max(abs(a.x - 0.5), abs(a.y - 0.5)) >= OFF_CENTRE
        )
    ),
    "in_row": _two(lambda a, b: _line(a.y - b.y)),
    "in_column": _two(lambda a, b: _line(a.x - b.x)),
    "left_half_empty": _half(lambda a, left, top, right, bottom: (0.5 - left, 0.5 - a.x)),
    "right_half_empty": _half(lambda a, left, top, right, bottom: (right - 0.5, a.x - 0.5)),
    "upper_half_empty": _half(lambda a, left, top, right, bottom: (0.5 - top, 0.5 - a.y)),
    "lower_half_empty": _half(lambda a, left, top, right, bottom: (bottom - 0.5, a.y - 0.5)),
}

PLAIN = ("left_of", "right_of", "above", "below")

NEXT_TO, NOT_NEXT_TO = 0.08, 0.3
FAR, NOT_FAR = 0.5, 0.15


def _gap_between(a: Thing, b: Thing) -> float:
    """Between two boxes; nought where they touch."""
    along, across = (abs(a.x - b.x) - (a.width + b.width) / 2, abs(a.y - b.y) - (a.height + b.height) / 2)
    return (max(along, 0) ** 2 + max(across, 0) ** 2) ** 0.5


def _near(a: Thing, b: Thing) -> bool | None:
    gap = _gap_between(a, b)
    return None if overlap(a, b) else _verdict(gap <= NEXT_TO, gap >= NOT_NEXT_TO)


def _far(a: Thing, b: Thing) -> bool | None:
    gap = _gap_between(a, b)
    return _verdict(gap >= FAR, gap <= NOT_FAR)


def _not(rule):
    def denied(*about):
        said = rule(*about)
        return None if said is None else not said

    return denied


# What the grammar of `language` says besides. `there` and `without` are told by which things there are (`verdict`).
MORE = {
    "near": _two(_near),
    "far_from": _two(_far),
    "there": lambda things, a: True,
    "without": lambda things, a: False,
}
DENIED = tuple(relation for relation in (*RULES, "near", "far_from") if not relation.endswith("empty"))
EVERY = RULES | MORE | {f"not_{relation}": _not((RULES | MORE)[relation]) for relation in DENIED}
"""Every relation's rule. Those of `RULES` are the paper's kind, and the world's where it does not say otherwise."""


MIRRORED = {"right_of": "left_of", "below": "above", "behind": "in_front_of"}
SYMMETRIC = ("in_row", "in_column")


def fact(clause: Clause) -> Clause:
    """The one of all clauses that state the same."""
    if clause.relation in MIRRORED:
        return Clause(MIRRORED[clause.relation], clause.about[::-1])
    return Clause(clause.relation, tuple(sorted(clause.about))) if clause.relation in SYMMETRIC else clause


def _gap(thing: Thing, edge: str) -> float:
    left, top, right, bottom = thing.box
    return {"left": left, "right": 1 - right, "top": top, "bottom": 1 - bottom}[edge]


def _midway(a: Thing, b: Thing, c: Thing) -> bool:
    return max(abs(a.x - (b.x + c.x) / 2), abs(a.y - (b.y + c.y) / 2)) <= 0.05


def _in_gap(a: Thing, b: Thing, c: Thing) -> bool:
    return not (overlap(a, b) or overlap(a, c))


# Words that say more than their relation asks for: what must hold besides, given the things that the clause is about.
# None: no layout of ours makes them true for sure.
STRICTER = {
    r"\btouch": lambda clause, things: _gap(things[0], clause.relation.split("_")[0]) <= 0.01,
    r"\bright at\b": lambda clause, things: _gap(things[0], clause.relation.split("_")[0]) <= 0.02,
    r"\bmidway|\bhalfway|\bmidpoint": lambda clause, things: _midway(*things),
    r"\bgap\b|\bseparates": lambda clause, things: _in_gap(*things),
    r"\bvery (center|middle)|\bright in the middle|\bis centered": lambda clause, things: max(abs(things[0].x - 0.5), abs(things[0].y - 0.5)) <= 0.03,
    r"\bat the same height|\blevel\b|\baligned|\bone (horizontal |vertical )?line|\bin line|\ba vertical line": lambda clause, things: abs(
        things[0].y - things[1].y if clause.relation == "in_row" else things[0].x - things[1].x
    )
    <= 0.02,
    r"\bfills\b|\btakes the center|\bhangs\b|\bflank|\beither side|\btucked": None,
}


@lru_cache(1024)
def _held_to(phrase: str) -> list[Callable | None]:
    """What a phrasing's words ask of the layout beyond its clause."""
    return [holds for words, holds in STRICTER.items() if re.search(words, phrase)]


def says_true(phrase: str, clause: Clause, things: Things) -> bool:
    """Whether a phrasing of a clause that holds is true word for word."""
    by_kind = {thing.kind: thing for thing in things}
    about = [by_kind[kind] for kind in clause.about]
    return all(holds is not None and holds(clause, about) for holds in _held_to(phrase))


def arity(relation: str) -> int:
    """How many things a relation is about."""
    return EVERY[relation.removeprefix("not_")].__code__.co_argcount - 1


def family(relation: str) -> str:
    """The name under which relations of one sort are counted."""
    denied = "not_" if relation.startswith("not_") else ""
    return denied + next((sort for sort in ("corner", "edge", "empty") if relation.endswith(sort)), relation.removeprefix("not_"))


Index = dict[str, tuple[int, ...]]
"""Which things of a layout are of each kind, of those that are there."""


def index(things: Things) -> Index:
    """For many a `verdict` on one layout."""
    found: dict[str, list[int]] = {}
    for i, thing in enumerate(things):
        if thing.there:
            found.setdefault(thing.kind, []).append(i)
    return {kind: tuple(which) for kind, which in found.items()}


def verdict(clause: Clause, things: Things, indexed: Index | None = None) -> bool | None:
    """Whether the layout keeps the clause (True), breaks it (False), or is too close to call (None).

    A clause about a thing that is missing, or cut off, is broken, be it denied or not. So is one about the place of a thing that is
    there twice: else a picture full of both things kept most prompts. Whether such a thing is there, or is not in a place, is
    broken where it is so of either, and otherwise too close to call.
    """
    indexed = index(things) if indexed is None else indexed
    relation, about = clause
    if relation == "without":
        return about[0] not in indexed
    said = [EVERY[relation](things, *which) for which in product(*(indexed.get(kind, ()) for kind in about))]
    if not said or False in said:
        return False
    if len(said) > 1:
        return None if relation == "there" or relation.startswith("not_") else False
    return said[0]


def clauses_about(kinds: Iterable[str], relation: str) -> list[Clause]:
    """Every clause of a relation about things of these kinds. What is between two things is so in either order."""
    every = permutations(kinds, arity(relation))
    if relation == "between":
        every = (about for about in every if about[1] < about[2])
    return [Clause(relation, about) for about in every]
