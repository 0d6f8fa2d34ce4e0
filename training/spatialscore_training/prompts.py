"""Clauses in people's words.

Each relation has several phrasings; the last two of each are held out of training and serve to tell whether the model
knows the relation or the phrase. `{a}`, `{b}`, `{c}` stand for noun phrases and `{v}` for a verb of place.
"""

import random
import re
from typing import NamedTuple

from .relations import Clause, Things, says_true

VERBS = ("is", "is", "stands", "sits", "lies", "rests", "can be seen", "is placed", "appears")

_CORNER = (
    "{a} {v} in the {where} corner",
    "{a} {v} in the {where} corner of the picture",
    "the {where} corner holds {a}",
    "{a} {v} close to the {where} corner",
    "in the {where} corner there is {a}",
    "the {where} corner has {a} in it",
    "{a} fills the {where} corner",
    "you find {a} in the {where} corner",
    "{a} has its place in the {where} corner",
    "the {where} corner has {a} tucked into it",
    "look into the {where} corner to see {a}",
    "{a} {v} tucked into the {where} corner",
    "the {where} corner is where {a} {v}",
)
_EDGE = (
    "{a} {v} at the {where} edge",
    "{a} {v} at the {where} edge of the picture",
    "{a} {v} right at the {where} edge",
    "along the {where} edge there is {a}",
    "{a} touches the {where} edge",
    "against the {where} edge {v} {a}",
    "next to the {where} edge there is {a}",
    "the {where} edge is touched by {a}",
    "{a} {v} along the {where} edge",
    "{a} {v} next to the {where} edge",
    "the {where} edge has {a} at it",
    "{a} {v} against the {where} edge",
    "the {where} edge has {a} next to it",
)
_EMPTY = (
    "the {where} half is empty",
    "the {where} half of the picture is empty",
    "nothing {v} in the {where} half",
    "there is nothing in the {where} half",
    "the {where} half stays clear",
    "the {where} half is left blank",
    "the {where} half of the frame is empty",
    "no object is found in the {where} half",
    "there is no object in the {where} half of the picture",
    "the {where} half holds nothing",
    "nothing stands in the {where} half of the frame",
    "the {where} half of the frame is left blank",
    "no object stands in the {where} half",
)

PHRASINGS = {
    "left_of": (
        "{a} {v} to the left of {b}",
        "{a} {v} left of {b}",
        "{a} {v} on the left side of {b}",
        "to the left of {b} there is {a}",
        "on the left of {b} {v} {a}",
        "{a} {v} further left than {b}",
        "{b} has {a} to its left",
        "{b} has {a} on its left side",
        "on the left hand side of {b} {v} {a}",
        "left of {b} {v} {a}",
        "{a} {v} at the left of {b}",
        "{b} {v} with {a} to its left",
        "{a} {v} more to the left than {b}",
        "{b} is to the right of where {a} {v}",
        "look left of {b} to see {a}",
        "{b} has {a} on its left",
        "{a} {v} on the left hand of {b}",
    ),
    "right_of": (
        "{a} {v} to the right of {b}",
        "{a} {v} right of {b}",
        "{a} {v} on the right side of {b}",
        "to the right of {b} there is {a}",
        "on the right of {b} {v} {a}",
        "{a} {v} further right than {b}",
        "{b} has {a} to its right",
        "{b} has {a} on its right side",
        "on the right hand side of {b} {v} {a}",
        "right of {b} {v} {a}",
        "{a} {v} at the right of {b}",
        "{b} {v} with {a} to its right",
        "{a} {v} more to the right than {b}",
        "{b} is to the left of where {a} {v}",
        "look right of {b} to see {a}",
        "{b} has {a} on its right",
        "{a} {v} on the right hand of {b}",
    ),
    "above": (
        "{a} {v} above {b}",
        "{a} {v} higher than {b}",
        "{a} {v} over {b}",
        "above {b} there is {a}",
        "{a} {v} somewhere above {b}",
        "{a} hangs above {b}",
        "{b} has {a} over it",
        "{b} {v} with {a} above it",
        "{a} {v} up above {b}",
        "{a} {v} further up than {b}",
        "{a} {v} higher up in the picture than {b}",
        "over {b} hangs {a}",
        "{a} hangs over {b}",
        "look above {b} to see {a}",
        "{b} {v} lower than {a}",
        "{b} {v} under {a}",
        "{b} has {a} above it",
        "{a} {v} higher up than {b}",
    ),
    "below": (
        "{a} {v} below {b}",
        "{a} {v} lower than {b}",
        "{a} {v} under {b}",
        "below {b} there is {a}",
        "{a} {v} somewhere below {b}",
        "{a} {v} beneath {b}",
        "{b} has {a} under it",
        "{b} {v} with {a} below it",
        "{a} {v} down below {b}",
        "{a} {v} further down than {b}",
        "{a} {v} lower down in the picture than {b}",
        "under {b} {v} {a}",
        "beneath {b} there is {a}",
        "look below {b} to see {a}",
        "{b} {v} higher than {a}",
        "{b} hangs over {a}",
        "{b} has {a} below it",
        "{a} {v} lower down than {b}",
    ),
    "in_front_of": (
        "{a} {v} in front of {b}",
        "{a} {v} partly in front of {b}",
        "in front of {b} there is {a}",
        "{a} covers part of {b}",
        "{a} overlaps {b} from the front",
        "before {b} {v} {a}",
        "{a} {v} right in front of {b}",
        "{a} hides part of {b}",
        "{b} is partly hidden by {a}",
        "{b} is partly covered by {a}",
        "{b} {v} with {a} in front of it",
        "{a} {v} closer to the viewer than {b}",
        "{b} {v} partly behind {a}",
        "{a} partly covers {b}",
        "{b} has {a} before it",
        "{b} has {a} in front of it",
        "{a} {v} before {b}",
    ),
    "behind": (
        "{a} {v} behind {b}",
        "{a} {v} partly behind {b}",
        "behind {b} there is {a}",
        "{a} is partly hidden by {b}",
        "{a} is partly covered by {b}",
        "at the back of {b} {v} {a}",
        "{a} {v} right behind {b}",
        "{b} hides part of {a}",
        "{b} covers part of {a}",
        "{b} overlaps {a} from the front",
        "{b} {v} with {a} behind it",
        "{a} {v} farther from the viewer than {b}",
        "{b} {v} partly in front of {a}",
        "{b} partly covers {a}",
        "{b} has {a} at its back",
        "{b} has {a} behind it",
        "{a} {v} at the back of {b}",
    ),
    "between": (
        "{a} {v} between {b} and {c}",
        "{a} {v} in between {b} and {c}",
        "between {b} and {c} there is {a}",
        "{a} {v} midway between {b} and {c}",
        "{b} and {c} have {a} between them",
        "the gap between {b} and {c} holds {a}",
        "{a} has {b} and {c} on either side",
        "{a} separates {b} from {c}",
        "{a} {v} halfway between {b} and {c}",
        "{b} and {c} flank {a}",
        "{a} is flanked by {b} and {c}",
        "{a} {v} at the midpoint between {b} and {c}",
        "{b} and {c} stand with {a} between them",
        "on either side of {a} there are {b} and {c}",
        "{a} {v} in the gap between {b} and {c}",
        "{b} and {c} stand on either side of {a}",
    ),
    "centered": (
        "{a} {v} in the center",
        "{a} is centered in the picture",
        "{a} {v} in the middle of the picture",
        "in the center there is {a}",
        "the center holds {a}",
        "at the center of the picture {v} {a}",
        "in the very middle there is {a}",
        "{a} takes the center",
        "{a} {v} at the center",
        "{a} {v} in the very center",
        "the middle is where {a} {v}",
        "{a} fills the middle of the picture",
        "the center of the picture holds {a}",
        "{a} {v} right in the middle",
        "{a} {v} at the very center of the picture",
        "the middle of the picture holds {a}",
    ),
    "in_row": (
        "{a} and {b} are aligned in a row",
        "{a} {v} in a row with {b}",
        "{a} {v} at the same height as {b}",
        "{a} and {b} form a horizontal row",
        "{a} is horizontally aligned with {b}",
        "{a} shares a row with {b}",
        "{a} and {b} are level",
        "{a} and {b} are at the same height",
        "{a} {v} on one level with {b}",
        "{a} and {b} line up from left to right",
        "{a} and {b} stand in one horizontal line",
        "{a} {v} in one horizontal line with {b}",
        "{a} and {b} are horizontally aligned",
        "{a} and {b} share one row",
        "{a} {v} level with {b}",
    ),
    "in_column": (
        "{a} and {b} are aligned in a column",
        "{a} {v} in a column with {b}",
        "{a} and {b} form a vertical column",
        "{a} is vertically aligned with {b}",
        "{a} and {b} line up from top to bottom",
        "{a} shares a column with {b}",
        "{a} and {b} stand in one vertical line",
        "{a} {v} vertically in line with {b}",
        "{a} and {b} are vertically aligned",
        "{a} {v} in the same column as {b}",
        "{a} and {b} stand in a vertical line",
        "{a} lines up vertically with {b}",
        "{a} and {b} make one column",
        "{a} and {b} share one column",
        "{a} {v} in one vertical line with {b}",
    ),
    **{f"{y}_{x}_corner": tuple(p.replace("{where}", f"{y} {x}") for p in _CORNER) for y in ("top", "bottom") for x in ("left", "right")},
    **{f"{side}_edge": tuple(p.replace("{where}", side) for p in _EDGE) for side in ("left", "right", "top", "bottom")},
    **{f"{half}_half_empty": tuple(p.replace("{where}", half) for p in _EMPTY) for half in ("left", "right", "upper", "lower")},
}
HELD_OUT = 2
"""How many phrasings of each relation, the last ones, training never sees."""

OPENERS = (
    "A photo of a tidy arrangement: ",
    "Draw this: ",
    "We look at a plain scene. ",
    "The layout is as follows: ",
    "Imagine a page on which ",
    "In this picture, ",
    "In the scene, ",
    "A simple scene: ",
    "A picture of a few things: ",
    "In this drawing, ",
    "Please draw a picture in which ",
    "An illustration where ",
    "Here, ",
    "On a plain background, ",
    "A flat illustration with clear places: ",
)
SCENES = (
    "kitchen", "living room", "classroom", "study", "bedroom", "hallway", "garage", "office", "library", "bathroom", "balcony", "garden",
    "dining room", "workshop", "attic", "basement", "cafe", "playroom", "market stall", "greenhouse", "museum room", "shop window",
    "laboratory", "waiting room", "nursery", "pantry", "park", "beach", "campsite", "train compartment",
)  # fmt: skip
"""The paper's kinds of scene and their like. Our pictures are drawings on a plain ground, so a kind is a frame of words."""
FRAMES = ("In a {scene}, ", "A {scene}: ", "Draw a {scene}. ", "A plain {scene} scene: ", "The scene is a {scene}. ")
LONG_FRAMES = (
    "A flat illustration of a {scene}, with a few simple drawings on a plain background and nothing else in the picture. ",
    "This is an orderly layout for a {scene}, in which separate objects are shown as plain drawings seen from the front. ",
    "Please draw a {scene} as a clean arrangement of separate objects on one plain background, each in its own clear place. ",
)
FEW = 4
"""Relations: up to so many leave room for a long frame, lest the prompt be shorter than any of the paper's."""
JOINTS = (". ", ". ", ". ", ", and ", "; ", ", while ", ", ")


class Mention(NamedTuple):
    """Where a prompt names a thing: its word, the word's span in characters, and whose clause it is."""

    kind: str
    start: int
    end: int


class Prompt(NamedTuple):
    text: str
    clauses: tuple[Clause, ...]
    ends: tuple[int, ...]
    """Where each clause ends, in characters."""
    mentions: tuple[Mention, ...]


def phrasings(relation: str, span: tuple[int, int]) -> tuple[str, ...]:
    """The phrasings that a world allows; from -2 on, the held-out ones."""
    every = PHRASINGS[relation]
    first, last = span
    return every[first:] if first < 0 else every[:-HELD_OUT][first:last]


class _Writer:
    """Puts clauses into sentences and keeps account of what stands where."""

    def __init__(self, rng: random.Random, span: tuple[int, int], things: Things | None):
        self.rng, self.span, self.things = rng, span, things
        self.plain = span == (0, 1)
        self.text, self.known, self.mentions = "", set(), []
        self.definite = rng.random() < 0.5
        self.subject = None
        """Whom "it" would mean."""

    def noun(self, kind: str) -> str:
        first = kind not in self.known and not self.definite
        self.known.add(kind)
        return f"{'an' if first and kind[0] in 'aeiou' else 'a' if first else 'the'} {kind}"

    def clause(self, clause: Clause, opens: bool, pronoun: bool) -> None:
        """One clause; a pronoun may stand for its first thing if the clause before was about that too."""
        said = phrasings(clause.relation, self.span)
        if self.things is not None:
            said = [phrase for phrase in said if says_true(phrase, clause, self.things)]
        phrase = self.rng.choice(said)
        verb = "is" if self.plain else self.rng.choice(VERBS)
        pronoun = pronoun and phrase.startswith("{a}") and "{a} and" not in phrase and clause.about[0] == self.subject
        words, names = [], dict(zip("abc", clause.about))
        # Nouns in the order in which they are read, so that the first mention takes the indefinite article.
        for part in phrase.replace("{v}", verb).replace("{", "\0{").replace("}", "}\0").split("\0"):
            if part.startswith("{"):
                kind = names[part[1]]
                if pronoun and part == "{a}":
                    words.append(("it", None))
                else:
                    words.append((self.noun(kind), kind))
            else:
                words.append((part, None))
        for word, kind in words:
            if opens and word:
                word, opens = word[0].upper() + word[1:], False
            if kind:
                end = len(self.text) + len(word)
                self.mentions.append(Mention(kind, end - len(kind), end))
            self.text += word
        self.subject = clause.about[0] if clause.about else None
        if self.things is not None and not (phrase.startswith("{a}") and "{a} and" not in phrase):
            # What stands first in the sentence is what the next "it" would be taken for.
            self.subject = None


def write(rng: random.Random, clauses: tuple[Clause, ...], span: tuple[int, int] = (0, 99), things: Things | None = None) -> Prompt:
    """A prompt that states these clauses in this order, in the phrasings that `span` allows. Where `things` are given, which
    keep the clauses, it is true of them word for word, and framed by a kind of scene."""
    writer = _Writer(rng, span, things)
    if things is not None:
        frame = rng.choice(LONG_FRAMES if len(clauses) <= FEW else FRAMES).format(scene=rng.choice(SCENES))
        writer.text = re.sub(r"\b([Aa]) (?=attic|office)", r"\1n ", frame)
    elif not writer.plain and rng.random() < 0.4:
        writer.text = rng.choice(OPENERS)
    ends, opens = [], not writer.text or writer.text.endswith(". ")
    for i, clause in enumerate(clauses):
        if i:
            joint = ". " if writer.plain else rng.choice(JOINTS)
            writer.text += joint
            opens = joint == ". "
        writer.clause(clause, opens, pronoun=not writer.plain and rng.random() < 0.5)
        ends.append(len(writer.text))
    # People leave out the last full stop now and then.
    if writer.plain or rng.random() < 0.85:
        writer.text += "."
    return Prompt(writer.text, clauses, tuple(ends), tuple(writer.mentions))
