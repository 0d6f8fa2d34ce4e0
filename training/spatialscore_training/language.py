"""Clauses as benchmarks and people say them, by the grammar in `grammar.toml`.

`prompts` has a fixed list of sentences for each relation; here sentences and bare noun phrases are put together from the
relation's places and the shapes that all relations share, with adjectives before any noun, other words for a kind, names in the
plural, openers, asides, and clauses that are denied. A tenth of the phrasings and the last adjectives are held out of training.
"""

import random
import re
import tomllib
from functools import cache
from importlib.resources import files
from zlib import crc32

from .drawings import kinds
from .files import digest
from .prompts import HELD_OUT, PHRASINGS, Mention, Prompt
from .relations import Clause, arity

GRAMMAR = tomllib.loads((files(__package__) / "grammar.toml").read_text())
WRITTEN_WITH = digest((files(__package__) / name).read_bytes() for name in ("grammar.toml", "kinds.tsv"))
"""Of the grammar's phrasings and the kinds' names: with others the same arguments give other prompts."""
SHAPES = {1: "one", 2: "two", 3: "three"}
KINDS = kinds()
A_BEFORE_VOWEL = re.compile(r"uni|use|ufo|eu|one")
AN_BEFORE = re.compile(r"[aeiou]|hour")


IRREGULAR = {"knife": "knives", "wolf": "wolves", "leaf": "leaves", "loaf": "loaves", "mouse": "mice"}
IRREGULAR |= {name: f"{name}es" for name in ("tomato", "potato", "mango")}
IRREGULAR |= {name: name for name in ("sheep", "fish", "deer", "shrimp", "squid", "aircraft")}


def plural(name: str) -> str:
    """Of a kind's name: "cactuses", "slices of pizza"."""
    head, of, rest = name.partition(" of ")
    before, space, noun = head.rpartition(" ")
    noun = IRREGULAR.get(noun) or (re.sub("y$", "ies", noun) if re.search("[^aeiou]y$", noun) else noun + ("es" if re.search("(s|x|ch|sh)$", noun) else "s"))
    return before + space + noun + of + rest


def article(word: str) -> str:
    return "an" if AN_BEFORE.match(word) and not A_BEFORE_VOWEL.match(word) else "a"


def _places(relation: str) -> tuple[dict, tuple[str, ...]]:
    """What the grammar says of a relation, and its places in words."""
    if entry := GRAMMAR["relations"].get(relation):
        return entry, tuple(entry.get("places", ()))
    first, *rest, sort = relation.split("_")
    if sort == "corner":
        entry = GRAMMAR["corner"]
        names = (first, *entry["also"][first])
        return {}, tuple(place.replace("{y}", y).replace("{x}", rest[0]) for y in names for place in entry["places"])
    if sort == "edge":
        return {}, tuple(place.replace("{side}", first) for place in GRAMMAR["edge"]["places"])
    return {key: [said.replace("{half}", first) for said in GRAMMAR["half"][key]] for key in ("said", "bare")}, ()


@cache
def phrasings(relation: str, held_out: bool) -> dict[str, tuple[tuple[str, ...], ...]]:
    """`said` and `bare` phrasings of a relation, in groups: those of its places, its own, and those of `prompts`."""
    base = relation.removeprefix("not_")
    denied = "not_" if base != relation else ""
    entry, places = _places(base)
    shapes = GRAMMAR["shapes"].get(SHAPES.get(arity(base)), {})
    old = [phrase.replace("{v}", "{is}") for phrase in PHRASINGS.get(base, ())]
    found = {}
    for form in ("said", "bare"):
        groups = [[shape.replace("{p}", place) for shape in shapes.get(denied + form, ()) for place in places]]
        if not denied:
            groups += [entry.get(form, [])] + ([old] if form == "said" else [])
        late = set(old[len(old) - HELD_OUT :])
        wanted = [tuple(p for p in group if _is_held_out(p, late) == held_out) for group in groups]
        found[form] = tuple(group for group in wanted if group)
    return found


def _is_held_out(phrase: str, late: set[str]) -> bool:
    return phrase in late or crc32(phrase.encode()) % 10 == 0


PLURAL = {r"\bis\b|\{is\}": "are", r"\bhas\b": "have", r"\bit\b": "them", r"\bnot a\b": "not any"}
"""What a phrasing says otherwise of names in the plural."""


class _Writer:
    """Writes a prompt and keeps account of what stands where."""

    def __init__(self, rng: random.Random, adjectives: float, held_out: bool):
        self.rng, self.adjectives, self.held_out = rng, adjectives, held_out
        nouns = GRAMMAR["nouns"]
        cut = len(nouns["adjectives"]) - nouns["held_out"]
        self.known_adjectives = nouns["adjectives"][cut:] if held_out else nouns["adjectives"][:cut]
        self.determiner = rng.choice(nouns["determiners"])
        self.british = rng.random() < 0.3
        self.plural = False
        self.text, self.known, self.mentions, self.subject = "", set(), [], None

    def noun(self, kind: str, with_article: bool = True) -> None:
        rng, first = self.rng, kind not in self.known
        self.known.add(kind)
        names = KINDS[kind].synonyms
        name = rng.choice(names) if names and rng.random() < 0.3 else kind
        name = plural(name) if self.plural else name
        words = []
        if rng.random() < self.adjectives:
            words = rng.sample(self.known_adjectives, 2 if rng.random() < 0.15 else 1)
        determiner = self.determiner
        if determiner == "first":
            determiner = "a" if first else "the"
        if self.plural and determiner in ("a", "one"):
            determiner = ""
        if determiner == "a":
            determiner = article((words or [name])[0])
        before = " ".join(([determiner] if determiner and with_article else []) + words)
        quote = '"' if rng.random() < 0.02 else ""
        self.text += (before and before + " ") + quote + name
        self.mentions.append(Mention(kind, len(self.text) - len(name), len(self.text)))
        self.text += quote

    def clause(self, clause: Clause, form: str, pronoun: bool) -> None:
        # Not every relation has phrasings of each form, or some held out.
        every = (phrasings(clause.relation, held_out)[each] for held_out in (self.held_out, False) for each in (form, "said", "bare"))
        phrase = self.rng.choice(self.rng.choice(next(filter(None, every))))
        if self.british:
            for american, british in GRAMMAR["spelling"].items():
                phrase = re.sub(rf"\b{american}\b", british, phrase)
        if self.plural:
            for one, many in PLURAL.items():
                phrase = re.sub(one, many, phrase)
        names = dict(zip("abc", clause.about))
        if pronoun and clause.about and clause.about[0] == self.subject and phrase.startswith("{a} {is}"):
            phrase = "it" + phrase[3:]
        for part in re.split(r"(\{[^}]*\})", phrase):
            if part in ("{a}", "{b}", "{c}", "{-a}"):
                self.noun(names[part[-2]], with_article=part[1] != "-")
            elif part.startswith("{"):
                self.text += self.rng.choice(GRAMMAR["words"][part[1:-1]])
                # A word that may be left out leaves no second space.
                self.text = self.text.rstrip(" ") if self.text.endswith("  ") else self.text
            elif self.text.endswith(" ") and part.startswith(" "):
                self.text += part[1:]
            else:
                self.text += part
        self.subject = clause.about[0] if clause.about and phrase.startswith(("{a} {is}", "it {is}")) else None


def write(rng: random.Random, clauses: tuple[Clause, ...], adjectives: float = 0.3, held_out: bool = False) -> Prompt:
    """A prompt that states these clauses in this order."""
    writer = _Writer(rng, adjectives, held_out)
    form = "bare" if rng.random() < (0.5 if len(clauses) <= 3 else 0.15) else "said"
    openers, joints = GRAMMAR["openers"][form], GRAMMAR["openers"][f"joints_{form}"]
    writer.text = rng.choice(openers)
    writer.plural = form == "bare" and rng.random() < 0.08
    ends = []
    for i, clause in enumerate(clauses):
        if i:
            writer.text += rng.choice(joints)
            if writer.text.endswith(". ") and rng.random() < 0.1:
                writer.text += rng.choice(GRAMMAR["openers"]["aside"]) + ". "
        writer.clause(clause, form, pronoun=form == "said" and rng.random() < 0.4)
        # A closing quote is one token with the sign behind it, and that is where a clause is over.
        ends.append(len(writer.text.removesuffix('"')))
    if form == "bare" and rng.random() < 0.15:
        writer.text += rng.choice(GRAMMAR["openers"]["behind"])
    if form == "said" and rng.random() < 0.1:
        writer.text += ". " + rng.choice(GRAMMAR["openers"]["aside"])
    if rng.random() < (0.3 if form == "bare" else 0.7):
        writer.text += "."
    text, mentions = _sentences(writer.text), tuple(writer.mentions)
    if rng.random() < 0.03:
        shift = lambda m: Mention(m.kind, m.start + 1, m.end + 1)
        return Prompt(f'"{text}"', clauses, tuple(end + 1 for end in ends), tuple(map(shift, mentions)))
    return Prompt(text, clauses, tuple(ends), mentions)


def _sentences(text: str) -> str:
    """With a capital at the beginning of each sentence."""
    return re.sub(r"(^|\. )([a-z])", lambda found: found[1] + found[2].upper(), text)
