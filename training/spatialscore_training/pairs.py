"""A prompt, a picture that keeps all of it, and an adversarial twin.

A scene and its twin are alike but for one change; a coin says which of the two the prompt describes. So neither picture
is the likelier one without the prompt, and the prompt, which is the same for both, says nothing without the pictures.
"""

import random
from collections.abc import Iterator
from typing import NamedTuple

from . import language, prompts
from .drawings import Drawings
from .files import tries
from .prompts import Prompt
from .relations import Clause, Things, clauses_about, fact, family, index, verdict
from .scenes import Scene, World, new_scene, new_twin


class Pair(NamedTuple):
    prompt: Prompt
    kept: Scene
    """The scene that keeps every clause of the prompt."""
    broken: Scene
    """The twin, which breaks one clause or two."""
    twin_prompt: Prompt
    """The prompt with the broken clauses replaced by ones that the twin keeps."""
    perturbed: tuple[int, ...]
    """Which clauses the twin breaks."""


PRESENCE = ("there", "without")


def verdicts(world: World, *layouts: Things, strangers: tuple[str, ...] = ()) -> dict[str, dict[Clause, tuple[bool | None, ...]]]:
    """For each relation of the world, what each layout says of each of its clauses; of `strangers`, which no layout has, who
    is there is asked alone."""
    kinds = sorted({thing.kind for things in layouts for thing in things})
    indexed = [(things, index(things)) for things in layouts]
    return {
        relation: {
            clause: tuple(verdict(clause, *layout) for layout in indexed)
            for clause in clauses_about([*kinds, *strangers] if relation in PRESENCE else kinds, relation)
        }
        for relation in world.relations
    }


def write(rng: random.Random, clauses: tuple[Clause, ...], world: World, things: Things | None = None) -> Prompt:
    """A prompt in this world's words."""
    by_grammar = bool(world.grammar) and rng.random() < world.grammar
    if by_grammar or any(clause.relation not in prompts.PHRASINGS for clause in clauses):
        return language.write(rng, clauses, world.adjectives, world.held_out)
    return prompts.write(rng, clauses, world.phrasings, things)


def _by_relation(said: dict, wanted: tuple) -> dict[str, list[Clause]]:
    """The clauses of which the layouts say `wanted`, by relation; relations without any are left out."""
    found = {relation: [c for c, v in clauses.items() if v == wanted] for relation, clauses in said.items()}
    return {relation: clauses for relation, clauses in found.items() if clauses}


def _by_family(said: dict, wanted: tuple) -> dict[str, list[Clause]]:
    """The same by family."""
    found: dict[str, list[Clause]] = {}
    for relation, clauses in _by_relation(said, wanted).items():
        found.setdefault(family(relation), []).extend(clauses)
    return found


def _sort(rng: random.Random, sorts: list[str]) -> str:
    """One of these relations or families; of the denied ones, which are as many as the others, one in six."""
    denied = [sort for sort in sorts if sort.startswith("not_")]
    if denied and len(denied) < len(sorts):
        sorts = denied if rng.random() < 1 / 6 else [sort for sort in sorts if sort not in denied]
    return rng.choice(sorts)


def _draw(rng: random.Random, found: dict[str, list[Clause]], count: int) -> list[Clause]:
    """So many different clauses, relations being equally likely."""
    drawn: list[Clause] = []
    while found and len(drawn) < count:
        relation = _sort(rng, list(found))
        drawn.append(clause := rng.choice(found[relation]))
        found[relation] = [other for other in found[relation] if set(other.about) != set(clause.about)]
        if not found[relation]:
            del found[relation]
    return drawn


def _scenes(rng: random.Random, world: World, drawings: Drawings, wanted: str) -> Iterator[tuple[Scene, Scene, dict]]:
    """A scene and its twin, in the order of a coin, with what each says of every clause; others until one pair will do."""
    for _ in tries(wanted):
        scene = new_scene(rng, world, drawings)
        if twin := new_twin(rng, scene, world, drawings):
            kept, broken = (scene, twin) if rng.random() < 0.5 else (twin, scene)
            yield kept, broken, verdicts(world, kept.things, broken.things)


def _tell(rng: random.Random, breaks: list, replacements: list, holds: list) -> tuple[tuple, tuple, tuple[int, ...]]:
    """The clauses of both prompts in one order, and the places of those that the twin breaks."""
    clauses = list(zip(breaks, replacements)) + [(clause, clause) for clause in holds]
    rng.shuffle(clauses)
    told, told_of_twin = (tuple(side) for side in zip(*clauses))
    return told, told_of_twin, tuple(i for i, (clause, other) in enumerate(clauses) if clause != other)


RELATIONS = {3: 4, 4: 9, 5: 14, 6: 18, 7: 20, 8: 15, 9: 9, 10: 6, 11: 3, 12: 2}
"""How often a prompt of the paper has so many relations: 3 to 12, most often 7. The shape between is a guess."""


def _draw_facts(rng: random.Random, found: dict[str, list[Clause]], count: int, taken: set[Clause]) -> list[Clause]:
    """So many clauses, each a fact that is not yet `taken`, relations being equally likely."""
    drawn: list[Clause] = []
    while len(drawn) < count:
        left = {relation: fresh for relation, clauses in found.items() if (fresh := [c for c in clauses if fact(c) not in taken])}
        if not left:
            break
        drawn.append(clause := rng.choice(left[rng.choice(list(left))]))
        taken.add(fact(clause))
    return drawn


def _paper_pair(rng: random.Random, world: World, drawings: Drawings) -> Pair:
    """A pair with the paper's number of relations, one or two of which are perturbed, each fact told once."""
    (count,) = rng.choices(list(RELATIONS), [weight * (world.clauses[0] <= n <= world.clauses[1]) for n, weight in RELATIONS.items()])
    wanted = f"a pair with {count} relations and {world.length[0]} to {world.length[1]} words"
    for kept, broken, said in _scenes(rng, world, drawings, wanted):
        taken: set[Clause] = set()
        breaks = _draw_facts(rng, _by_family(said, (True, False)), rng.randint(1, 2), taken)
        gains = _by_relation(said, (False, True))
        replacements = [_replacement(rng, clause, gains) for clause in breaks]
        taken.update(fact(clause) for clause in replacements if clause)
        holds = _draw_facts(rng, _by_relation(said, (True, True)), count - len(breaks), taken)
        if not breaks or None in replacements or len(breaks) + len(holds) != count or len({*map(fact, replacements)}) < len(breaks):
            continue
        told, told_of_twin, perturbed = _tell(rng, breaks, replacements, holds)
        for seed in (rng.getrandbits(32) for _ in range(8)):
            both = [write(random.Random(seed), t, world, s.things) for t, s in ((told, kept), (told_of_twin, broken))]
            if all(world.length[0] <= len(prompt.text.split()) <= world.length[1] for prompt in both):
                return Pair(both[0], kept, broken, both[1], perturbed)
    raise AssertionError("tries ends by a refusal")


def new_pair(rng: random.Random, world: World, drawings: Drawings) -> Pair:
    """A pair of this world."""
    if world.paper:
        return _paper_pair(rng, world, drawings)
    for kept, broken, said in _scenes(rng, world, drawings, f"a pair with {world.clauses[0]} to {world.clauses[1]} relations"):
        count = rng.randint(*world.clauses)
        breaks = _draw(rng, _by_relation(said, (True, False)), rng.randint(1, min(2, count)))
        gains = _by_relation(said, (False, True))
        replacements = [_replacement(rng, clause, gains) for clause in breaks]
        holds = _draw(rng, _by_relation(said, (True, True)), count - len(breaks))
        if not breaks or None in replacements or len(breaks) + len(holds) < world.clauses[0]:
            continue
        told, told_of_twin, perturbed = _tell(rng, breaks, replacements, holds)
        seed = rng.getrandbits(32)
        prompt, twin_prompt = (write(random.Random(seed), clauses, world) for clauses in (told, told_of_twin))
        return Pair(prompt, kept, broken, twin_prompt, perturbed)


def _replacement(rng: random.Random, clause: Clause, gains: dict[str, list[Clause]]) -> Clause | None:
    """What the twin keeps instead of a clause: about the same things if there is such a one."""
    every = [other for clauses in gains.values() for other in clauses]
    for alike in (
        [other for other in every if set(other.about) == set(clause.about)],
        [other for other in every if set(other.about) & set(clause.about)],
        every,
    ):
        if alike:
            return rng.choice(alike)
    return None


class Question(NamedTuple):
    prompt: Prompt
    truths: tuple[tuple[bool, ...], ...]
    """For each picture that is asked about, whether it keeps each clause."""


def new_questions(rng: random.Random, world: World, drawings: Drawings, count: int) -> tuple[list[Scene], list[Question]]:
    """One scene and so many prompts about it, for the first stage.

    Half of the prompts are kept in full; in the others one clause or two are broken. A family of relations is asked only
    where the scene both keeps and breaks some clause of it, and then either with equal chance, so that the prompts alone
    say nothing. Of no prompts, any scene will do.
    """
    if not count:
        return [new_scene(rng, world, drawings)], []
    for _ in tries("a scene that keeps some clause of a relation and breaks another"):
        scene = new_scene(rng, world, drawings)
        there = {thing.kind for thing in scene.things}
        strangers = tuple(rng.sample([word for word in world.words if word not in there], 2)) if world.lost else ()
        said = verdicts(world, scene.things, strangers=strangers)
        true, false = _by_family(said, (True,)), _by_family(said, (False,))
        both = [sort for sort in true if sort in false]
        stressed = [sort for sort in world.stress if sort in both]
        if both:
            break
    questions = []
    for _ in range(count):
        length = rng.randint(*world.clauses)
        broken = rng.randint(1, min(2, length)) if rng.random() < 0.5 else 0
        truths = [False] * broken + [True] * (length - broken)
        rng.shuffle(truths)
        sorts = [_sort(rng, stressed if stressed and rng.random() < 0.5 else both) for _ in truths]
        clauses = [rng.choice((true if truth else false)[sort]) for sort, truth in zip(sorts, truths)]
        if strangers:
            lacks = [not truth and rng.random() < world.lost for truth in truths]
            clauses = [_about_a_stranger(rng, clause, strangers) if lack else clause for clause, lack in zip(clauses, lacks)]
        questions.append(Question(write(rng, tuple(clauses), world), (tuple(truths),)))
    return [scene], questions


def _about_a_stranger(rng: random.Random, clause: Clause, strangers: tuple[str, ...]) -> Clause:
    """The clause about one thing that is not there, in place of one that may be: it cannot hold."""
    if clause.relation in PRESENCE or not clause.about:
        return clause
    about = list(clause.about)
    about[rng.randrange(len(about))] = rng.choice(strangers)
    return Clause(clause.relation, tuple(about))


def new_duels(rng: random.Random, world: World, drawings: Drawings, count: int) -> tuple[list[Scene], list[Question]]:
    """A scene, its twin, and so many prompts, each of which one of the two keeps and the other breaks: the paper's stage."""
    for _ in tries("a scene and a twin, each of which keeps what the other breaks"):
        scene = new_scene(rng, world, drawings)
        twin = new_twin(rng, scene, world, drawings)
        if twin is None:
            continue
        if world.lost and rng.random() < 0.5:
            # What lacks a thing is no more often the second than the first.
            scene, twin = twin, scene
        said = verdicts(world, scene.things, twin.things)
        kept_by = {True: _by_relation(said, (True, False)), False: _by_relation(said, (False, True))}
        if all(kept_by.values()):
            break
    holds = _by_relation(said, (True, True))
    questions = []
    for _ in range(count):
        winner = rng.random() < 0.5
        length = rng.randint(*world.clauses)
        breaks = _draw(rng, dict(kept_by[winner]), rng.randint(1, min(2, length)))
        clauses = [(clause, False) for clause in breaks]
        clauses += [(clause, True) for clause in _draw(rng, dict(holds), length - len(breaks))]
        rng.shuffle(clauses)
        told, broken = (tuple(side) for side in zip(*clauses))
        kept = (True,) * len(told)
        questions.append(Question(write(rng, told, world), (kept, broken) if winner else (broken, kept)))
    return [scene, twin], questions
