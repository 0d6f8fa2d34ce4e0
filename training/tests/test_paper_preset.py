"""The paper's preset, held against a geometry of the test's own: it reads prompts and boxes and knows no rule of ours."""

import random
import re
from collections import Counter

import numpy as np
import pytest

from spatialscore_training import data_cli
from spatialscore_training.drawings import Drawings
from spatialscore_training.pairs import new_pair
from spatialscore_training.prompts import SCENES
from spatialscore_training.relations import RULES
from spatialscore_training.scenes import World, draw

from test_generator import folder  # noqa: F401

PAPER = World(kinds=16, things=(4, 8), clauses=(3, 12), length=(40, 100), relations=tuple(RULES), depth=0.15, paper=True)


@pytest.fixture(scope="module")
def pairs(folder):
    drawings = Drawings(folder, PAPER.words)
    return [new_pair(random.Random(f"7:{i}"), PAPER, drawings) for i in range(60)]


def clauses(prompt) -> list[tuple[str, str, list[str]]]:
    """Relation, words and things of each clause of a prompt."""
    starts = [0, *prompt.ends[:-1]]
    return [(clause.relation, prompt.text[start:end], list(clause.about)) for clause, start, end in zip(prompt.clauses, starts, prompt.ends)]


def box(scene, kind):
    (thing,) = (thing for thing in scene.things if thing.kind == kind)
    return thing.box


def middle(scene, kind):
    left, top, right, bottom = box(scene, kind)
    return np.array([(left + right) / 2, (top + bottom) / 2])


def holds(scene, relation, about) -> bool:
    """What a person with a ruler would say."""
    order = [thing.kind for thing in scene.things]
    if relation in ("left_of", "right_of", "above", "below"):
        across, sign = {"left_of": (0, -1), "right_of": (0, 1), "above": (1, -1), "below": (1, 1)}[relation]
        return sign * (middle(scene, about[0]) - middle(scene, about[1]))[across] > 0.1
    if relation in ("in_front_of", "behind"):
        a, b = (np.array(box(scene, kind)) for kind in about)
        meet = np.minimum(a[2:], b[2:]) > np.maximum(a[:2], b[:2])
        return bool(meet.all()) and (order.index(about[0]) > order.index(about[1])) == (relation == "in_front_of")
    if relation in ("in_row", "in_column"):
        return abs((middle(scene, about[0]) - middle(scene, about[1]))[1 if relation == "in_row" else 0]) < 0.05
    if relation == "between":
        a, b, c = (middle(scene, kind) for kind in about)
        # Nearer to the middle of the two than either is, and within the angle of a clear "between".
        return np.linalg.norm(a - (b + c) / 2) < np.linalg.norm(b - c) / 2 * 0.7
    if relation == "centered":
        return bool((np.abs(middle(scene, about[0]) - 0.5) < 0.08).all())
    gaps = lambda kind: dict(zip(("left", "top", "right", "bottom"), np.array(box(scene, kind)) * [1, 1, -1, -1] + [0, 0, 1, 1]))
    if relation.endswith("_corner"):
        return max(gaps(about[0])[side] for side in relation.split("_")[:2]) < 0.07
    if relation.endswith("_edge"):
        return gaps(about[0])[relation.split("_")[0]] < 0.06
    side = relation.split("_")[0]
    edge, far = {"left": (0, False), "right": (2, True), "upper": (1, False), "lower": (3, True)}[side]
    return all((thing.box[edge] <= 0.5 + 1e-9) if far else (thing.box[edge] >= 0.5 - 1e-9) for thing in scene.things)


def says_more(scene, relation, words, about) -> bool:
    """Whether words that say more than the relation are true."""
    if re.search(r"\btouch", words):
        left, top, right, bottom = box(scene, about[0])
        return {"left": left, "top": top, "right": 1 - right, "bottom": 1 - bottom}[relation.split("_")[0]] < 0.0101
    if re.search(r"midway|halfway|midpoint", words):
        a, b, c = (middle(scene, kind) for kind in about)
        return bool((np.abs(a - (b + c) / 2) < 0.0501).all())
    if re.search(r"very (center|middle)|right in the middle|is centered", words):
        return bool((np.abs(middle(scene, about[0]) - 0.5) < 0.0301).all())
    if re.search(r"same height|\blevel\b|aligned", words):
        return abs((middle(scene, about[0]) - middle(scene, about[1]))[1 if relation == "in_row" else 0]) < 0.0201
    return not re.search(r"\bfills|takes the center|\bhangs|flank|either side", words)


def test_each_clause_holds_in_the_kept_picture_word_for_word(pairs):
    for pair in pairs:
        for prompt, scene in ((pair.prompt, pair.kept), (pair.twin_prompt, pair.broken)):
            for relation, words, about in clauses(prompt):
                assert holds(scene, relation, about), (relation, about, words, scene)
                assert says_more(scene, relation, words, about), (words, scene)
        told = clauses(pair.prompt)
        broken = [i for i, (relation, _, about) in enumerate(told) if not holds(pair.broken, relation, about)]
        assert set(pair.perturbed) <= set(broken), (pair.perturbed, broken, told)
        assert len(broken) == len(pair.perturbed), "a relation that is not counted is broken too"


def same_fact(relation, about):
    """A fact as a person would write it down once: which way round is all one."""
    other = {"right_of": "left_of", "below": "above", "behind": "in_front_of"}
    if relation in other:
        return other[relation], tuple(reversed(about))
    return relation, tuple(about) if relation in ("left_of", "above", "in_front_of") else (about[0], *sorted(about[1:])) if relation == "between" else tuple(sorted(about))


def test_no_fact_stands_twice(pairs):
    for pair in pairs:
        for prompt in (pair.prompt, pair.twin_prompt):
            facts = [same_fact(relation, about) for relation, _, about in clauses(prompt)]
            assert len(set(facts)) == len(facts), facts
        changed = {same_fact(*clause[::2]) for clause in clauses(pair.prompt)} - {same_fact(*clause[::2]) for clause in clauses(pair.twin_prompt)}
        assert len(changed) == len(pair.perturbed) in (1, 2)


def test_it_means_who_stood_first_in_the_sentence_before(pairs):
    seen = 0
    for pair in pairs:
        told = clauses(pair.prompt)
        for (_, before, _), (_, words, about) in zip(told, told[1:]):
            if re.match(r"\W*(and |while )?it\b", words, re.IGNORECASE):
                seen += 1
                names = [kind for kind in PAPER.words if re.search(rf"\b{kind}\b", before)]
                first = min(names, key=lambda kind: re.search(rf"\b{kind}\b", before).start(), default=None)
                assert first in (about[0], None), (before, words, about)
    assert seen > 3


def test_words_relations_and_perturbations_are_the_papers(pairs, folder):
    lengths = [len(prompt.text.split()) for pair in pairs for prompt in (pair.prompt, pair.twin_prompt)]
    assert 40 <= min(lengths) and max(lengths) <= 100
    counts = Counter(len(pair.prompt.clauses) for pair in pairs)
    assert set(counts) <= set(range(3, 13)) and 6 <= np.mean([len(pair.prompt.clauses) for pair in pairs]) <= 8
    depth = [all(pair.prompt.clauses[i].relation in ("in_front_of", "behind") for i in pair.perturbed) for pair in pairs]
    assert np.mean(depth) < 0.25
    assert all(any(scene in pair.prompt.text for scene in SCENES) for pair in pairs) and len(SCENES) >= 25
    drawings = Drawings(folder, PAPER.words)
    empty = lambda scene: np.asarray(draw(scene._replace(things=()) if hasattr(scene, "_replace") else __import__("dataclasses").replace(scene, things=()), 56, drawings))
    assert all((empty(pair.kept) == empty(pair.broken)).all() for pair in pairs[:5])


def test_the_preset_is_what_the_command_makes(folder, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(data_cli, "write_pairs", lambda *arguments: made.append(arguments))
    for more in ((), ("--pairs", "12", "--kinds", "16")):
        monkeypatch.setattr("sys.argv", ["spatialreward-data", "make", str(tmp_path / "set"), "--preset", "paper", *more])
        data_cli.main()
    (_, world, _, _, _, pairs, _), (_, small, _, _, _, few, _) = made
    assert (world, pairs) == (World(things=(4, 8), clauses=(3, 12), length=(40, 100), relations=tuple(RULES), depth=0.15, paper=True), 80000)
    assert few == 12 and small == PAPER
