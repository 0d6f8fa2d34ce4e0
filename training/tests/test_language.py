"""The grammar: that what it says is what the clause claims, by a reader that knows neither relations nor phrasings."""

import colorsys
import hashlib
import json
import random
import re
from dataclasses import replace

import numpy as np
import pytest

from spatialscore_training import evaluate, goals, language
from spatialscore_training.drawings import LOOKS, STYLES, _to_hls, _to_rgb, kinds
from spatialscore_training.files import Refusal
from spatialscore_training.manifest import validate, write_pairs
from spatialscore_training.pair_files import read_pairs
from spatialscore_training.pairs import new_duels, new_pair, new_questions
from spatialscore_training.relations import EVERY, PLAIN, Clause, verdict
from spatialscore_training.scenes import Scene, World, draw, layers, new_scene, shade

from test_generator import FULL, drawings, folder, thing  # noqa: F401

WIDE = World(kinds=16, things=(2, 5), relations=tuple(EVERY), clauses=(1, 4), depth=0.2, grammar=0.8, lost=0.5, doubled=0.2)
SIDE = re.compile(r"\b(left|right(?! (?:above|over|under|beneath|below))|above|over|on top|atop|higher|below|under|underneath|beneath|lower|bottom|top|upper|on side|up|down)\b")
AXIS = {"left": ("x", -1), "right": ("x", 1)} | {word: ("y", -1) for word in ("above", "over", "on top", "atop", "higher", "top", "upper", "up")}
AXIS |= {word: ("y", 1) for word in ("below", "under", "underneath", "beneath", "lower", "bottom", "down")}


def heard(text: str, first: str, second: str) -> tuple[str, int]:
    """Along which axis, and which way from the second name, a listener looks for what the first name means.

    People hear what a side is said of: the name behind "of" and its like is the one to start from; "it" is the name before;
    where each name has its own side, each is on that side; a list from one side to the other begins there.
    """
    text = text.lower()
    at, then = (re.search(rf"\b{name}\b", text).start() for name in (first, second))
    names = sorted(((at, first), (then, second)))
    (start, one), (stop, other) = names
    before, between, behind = text[:start], text[start + len(one) : stop], text[stop + len(other) :]
    sides = [[found[0] for found in SIDE.finditer(part)] for part in (before, between, behind)]
    if "from left to right" in before or "from top to bottom" in before or "looking from left" in before:
        side, subject = sides[0][0], one
    elif sides[0] and re.search(r"\band\b|,", between) and sides[1] and not re.search(r"\b(of|than)\s*\S*\s*$", before):
        side, subject = sides[0][0], one  # "on the left X and on the right Y"
    elif sides[1] and sides[2] and not re.search(r"\bit\b|\bwhere\b", behind):
        side, subject = sides[1][0], one  # "X on the left and Y on the right"
    elif sides[0] and not sides[1]:
        side, subject = sides[0][0], other  # "left of X there is Y", "look left of X to see Y"
        if re.search(r"side shows|part shows", before):
            subject = one
    elif sides[1]:
        side, subject = sides[1][0], one  # "X is left of Y", "X, left of Y"
    else:
        side, subject = sides[2][0], other  # "X has Y to its left", "X with Y left of it"
    axis, way = AXIS[side]
    return axis, way if subject == first else -way


@pytest.mark.parametrize("relation", PLAIN)
@pytest.mark.parametrize("held_out", [False, True])
def test_a_listener_hears_what_the_clause_claims(relation, held_out):
    told = {"left_of": ("x", -1), "right_of": ("x", 1), "above": ("y", -1), "below": ("y", 1)}[relation]
    wrong = set()
    for forms in language.phrasings(relation, held_out).values():
        for phrase in (phrase for group in forms for phrase in group):
            text = phrase.format_map({"a": "the cat", "b": "the dog", "is": "is", "placed": "placed"})
            if heard(text, "cat", "dog") != told:
                wrong.add(text)
    assert not wrong


DENIAL = re.compile(r"\b(not|no|never|isn't|cannot|without|missing|nothing|empty|blank|free|stays clear|clear)\b")


@pytest.mark.parametrize("relation", EVERY)
def test_what_is_denied_says_so_and_nothing_else_does(relation):
    phrases = [p for held_out in (False, True) for groups in language.phrasings(relation, held_out).values() for group in groups for p in group]
    denies = relation == "without" or relation.startswith("not_") or relation.endswith("empty")
    words = [phrase.replace("{not}", "is not") if denies else phrase.replace("not far from", "near") for phrase in phrases]
    assert phrases and all(bool(DENIAL.search(phrase)) == denies for phrase in words)


def test_what_is_held_out_is_never_trained_on():
    for relation in EVERY:
        shown, held = ({p for groups in language.phrasings(relation, late).values() for group in groups for p in group} for late in (False, True))
        assert shown and not shown & held
    said = {late: " ".join(language.write(random.Random(i), (Clause("there", ("cat",)),), 1.0, late).text for i in range(3000)) for late in (False, True)}
    last = language.GRAMMAR["nouns"]["adjectives"][-language.GRAMMAR["nouns"]["held_out"] :]
    assert not any(re.search(rf"\b{word}\b", said[False]) for word in last) and all(word in said[True] for word in last)


def test_names_stand_in_the_plural_too():
    names = ("cat", "slice of pizza", "wine glass", "cherry", "key", "kitchen knife", "box", "cactus", "wolf", "bunny", "potato", "torch")
    many = ("cats", "slices of pizza", "wine glasses", "cherries", "keys", "kitchen knives", "boxes", "cactuses", "wolves", "bunnies", "potatoes", "torches")
    assert tuple(map(language.plural, names)) == many
    clause = Clause("left_of", ("cat", "dog"))
    said = [language.write(random.Random(i), (clause,), 0.0).text.lower() for i in range(4000)]
    said = [text for text in said if re.search(r"\b(cats|kittens)\b", text)]
    assert 80 < len(said) < 250 and all(re.search(r"\b(dogs|puppies)\b", text) for text in said)
    assert not any(re.search(r"\b(is|it|has)\b|\b(an?|one) (cat|kitten|dog|pupp)", text) for text in said)


def test_prompts_say_where_their_names_are():
    for seed in range(600):
        rng = random.Random(seed)
        clauses = tuple(Clause(rng.choice(["left_of", "near", "not_above", "behind"]), tuple(rng.sample(list(kinds()), 2))) for _ in range(3))
        prompt = language.write(rng, clauses)
        assert len(prompt.mentions) >= 3 and len(prompt.ends) == 3
        for mention in prompt.mentions:
            names = (mention.kind, *kinds()[mention.kind].synonyms)
            assert prompt.text[mention.start : mention.end].lower() in (*names, *map(language.plural, names))
        assert all(prompt.text[end : end + 1] in ("", ".", ",", ";", " ", '"') for end in prompt.ends)
        assert "  " not in prompt.text and " ," not in prompt.text and "{" not in prompt.text
        for article, word in re.findall(r"\b([Aa]n?) (\w+)", prompt.text):
            vowel = word[0].lower() in "aeiou" and word not in ("unicorn", "ufo", "used", "one")
            assert (article.lower() == "an") == (vowel or word == "hourglass"), prompt.text


@pytest.mark.parametrize(
    "relation, about, layout, expected",
    [
        ("left_of", "ab", [("a", 0.2, 0.5)], False),
        ("not_left_of", "ab", [("a", 0.8, 0.5)], False),
        ("not_left_of", "ab", [("a", 0.8, 0.5), ("b", 0.2, 0.5)], True),
        ("not_left_of", "ab", [("a", 0.2, 0.5), ("b", 0.8, 0.5)], False),
        ("left_of", "ab", [("a", 0.1, 0.5), ("b", 0.35, 0.5), ("a", 0.6, 0.5), ("b", 0.9, 0.5)], False),
        ("left_of", "ab", [("a", 0.1, 0.2), ("a", 0.1, 0.8), ("b", 0.9, 0.5)], False),
        ("not_left_of", "ab", [("a", 0.9, 0.2), ("a", 0.9, 0.8), ("b", 0.1, 0.5)], None),
        ("not_left_of", "ab", [("a", 0.9, 0.2), ("a", 0.1, 0.8), ("b", 0.5, 0.5)], False),
        ("left_half_empty", "", [("a", 0.8, 0.2), ("a", 0.8, 0.8)], True),
        ("there", "a", [("a", 0.2, 0.5)], True),
        ("there", "c", [("a", 0.2, 0.5)], False),
        ("there", "a", [("a", 0.2, 0.5), ("a", 0.8, 0.5)], None),
        ("there", "a", [("a", 0.02, 0.5)], True),
        ("there", "a", [("a", -0.02, 0.5)], False),
        ("left_of", "ab", [("a", -0.02, 0.5), ("b", 0.8, 0.5)], False),
        ("without", "a", [("a", 0.5, 1.02)], True),
        ("without", "c", [("a", 0.2, 0.5)], True),
        ("without", "a", [("a", 0.2, 0.5)], False),
        ("near", "ab", [("a", 0.3, 0.5), ("b", 0.52, 0.5)], True),
        ("near", "ab", [("a", 0.2, 0.5), ("b", 0.8, 0.5)], False),
        ("far_from", "ab", [("a", 0.1, 0.1), ("b", 0.9, 0.9)], True),
        ("far_from", "ab", [("a", 0.3, 0.5), ("b", 0.52, 0.5)], False),
    ],
)
def test_what_is_missing_doubled_denied_or_near(relation, about, layout, expected):
    assert verdict(Clause(relation, tuple(about)), tuple(thing(*t) for t in layout)) is expected


def test_pairs_keep_what_they_promise(drawings):
    rng, presence = random.Random(1), 0
    for _ in range(150):
        pair = new_pair(rng, WIDE, drawings)
        assert all(verdict(clause, pair.kept.things) for clause in pair.prompt.clauses)
        assert not all(verdict(clause, pair.broken.things) for clause in pair.prompt.clauses)
        assert all(verdict(clause, pair.broken.things) for clause in pair.twin_prompt.clauses)
        counts = [sorted(t.kind for t in scene.things) for scene in (pair.kept, pair.broken)]
        presence += counts[0] != counts[1]
        for t in (*pair.kept.things, *pair.broken.things):
            width, height = drawings.shape(t.kind, t.style)
            assert t.width / t.height == pytest.approx(width / height)
    assert presence > 30


def test_things_are_there_up_to_four_times_and_often_in_a_line(drawings):
    rng, world = random.Random(2), replace(WIDE, doubled=1.0, size=(0.08, 0.2))
    most, rows, columns = 0, 0, 0
    for _ in range(100):
        by_kind: dict[str, list] = {}
        for t in new_scene(rng, world, drawings).things:
            by_kind.setdefault(t.kind, []).append(t)
        copies = [them for them in by_kind.values() if len(them) > 1]
        assert 1 <= len(copies) <= 2
        most = max(most, *map(len, copies))
        alike = lambda values: max(values) - min(values) < 1e-9
        rows += all(alike([t.y for t in them]) for them in copies)
        columns += all(alike([t.x for t in them]) for them in copies)
    assert most == 4 and 20 < rows < 50 and 20 < columns < 50


def test_a_data_set_of_such_pairs_is_sound_and_counts_what_was_done(folder, tmp_path):
    write_pairs(tmp_path / "wide", replace(WIDE, length=(1, 100)), folder, seed=5, side=112, pairs=24, jobs=1)
    assert list(validate(tmp_path / "wide")) == []
    done = [evaluate.perturbation(record) for record in read_pairs(tmp_path / "wide")]
    assert {"(missing)", "(another in its place)", "(there besides)", "(cut off)"} >= set().union(*done) and any(done) and not all(done)
    thing = lambda *kinds: [{"kind": kind.strip("~"), "box": [0.8, 0.1, 1.2 if "~" in kind else 1, 0.2]} for kind in kinds]
    told = lambda kept, broken: evaluate.perturbation({"things": {"kept": thing(*kept), "broken": thing(*broken)}})
    assert told("ab", ["a", "b~"]) == {"(cut off)"}
    assert (told("ab", "a"), told("ab", "ac"), told("ab", "aab"), told("ab", "ba")) == ({"(missing)"}, {"(another in its place)"}, {"(there besides)"}, set())


def test_a_set_that_was_begun_before_worlds_had_all_this_goes_on(folder, tmp_path):
    write_pairs(tmp_path, FULL, folder, seed=5, side=112, pairs=3, jobs=1)
    said = json.loads((tmp_path / "dataset.json").read_text())
    for name in ("grammar", "adjectives", "held_out", "lost", "doubled", "looks", "shadows"):
        del said["made_with"]["world"][name]
    (tmp_path / "dataset.json").write_text(json.dumps(said))
    write_pairs(tmp_path, FULL, folder, seed=5, side=112, pairs=4, jobs=1)
    assert len(list(read_pairs(tmp_path))) == 4
    with pytest.raises(Refusal, match="lost was 0"):
        write_pairs(tmp_path, replace(FULL, lost=0.5), folder, seed=5, side=112, pairs=4, jobs=1)


@pytest.mark.parametrize("x, y", [(-0.05, 0.5), (1.05, 0.5), (0.5, -0.05), (0.5, 1.05)])
def test_what_is_cut_off_is_the_rest_of_the_whole(x, y, drawings):
    """Its layers and its picture are those of the thing within a picture, moved over the edge."""
    dx, dy = (round((there - 0.5) * 100) for there in (x, y))
    scenes = [Scene((thing("cat", *at, 0.3),), 1, 0.05) for at in ((x, y), (0.5, 0.5))]
    looks = [layers(scene.things, 100, drawings) for scene in scenes]
    for cut, whole in zip(*((*look, shade(scene, 100, drawings)) for look, scene in zip(looks, scenes))):
        edge = np.full_like(whole, whole[0, 0])
        moved = np.roll(whole, (dy, dx), (0, 1))
        # What was rolled round the edge is no part of it.
        kept = np.ones_like(whole, bool)
        if dx:
            kept[:, (100 + dx if dx < 0 else 0) : (100 if dx < 0 else dx)] = False
        if dy:
            kept[(100 + dy if dy < 0 else 0) : (100 if dy < 0 else dy)] = False
        assert np.allclose(np.where(kept, moved, edge), cut, atol=0.02)
    assert 0 < (looks[0].front == 0).sum() < (looks[1].front == 0).sum()


@pytest.mark.parametrize("ask", [new_questions, new_duels])
def test_the_prompt_alone_does_not_tell(ask, drawings):
    """Not whether it denies something, nor how many clauses it has; of those with one clause."""
    rng, seen = random.Random(3), {}
    world = replace(WIDE, clauses=(1, 1))
    for _ in range(400):
        _, questions = ask(rng, world, drawings, 4)
        for question in questions:
            relation = question.prompt.clauses[0].relation
            denied = relation.startswith("not_") or relation == "without"
            seen.setdefault(denied, []).append(question.truths[0][0])
    assert all(0.42 < sum(truths) / len(truths) < 0.58 for truths in seen.values()), {k: sum(v) / len(v) for k, v in seen.items()}


def test_worlds_of_before_give_the_pairs_of_before(drawings):
    """Their data sets are named by their arguments; another digest is another `GENERATOR`."""
    whole = hashlib.sha256()
    for world in (World(kinds=16, things=(2, 3)), FULL, replace(FULL, clauses=(3, 12), things=(4, 6), length=(30, 100), paper=True)):
        for seed in range(5):
            whole.update(repr(new_pair(random.Random(seed), world, drawings)).encode())
    assert whole.hexdigest() == "352c2682105d9a77cb17dd70cd3cee2db94addc00f1ae777a0c03aa91af0a8a7"


def test_looks_change_colours_and_nothing_else(drawings):
    scene = Scene((thing("cat", 0.3, 0.5, 0.4), thing("apple", 0.7, 0.5, 0.3)), 5, 0.0)
    plain = draw(scene, 112, drawings)
    for look in LOOKS:
        styled = replace(scene, things=tuple(replace(t, style=f"google~{look}") for t in scene.things))
        assert drawings.mask("cat", f"google~{look}", 40, 40).tolist() == drawings.mask("cat", "google", 40, 40).tolist()
        image = draw(styled, 112, drawings)
        assert image.getpixel((1, 1)) == plain.getpixel((1, 1)) and image.tobytes() != plain.tobytes()
    grey = drawings.scaled("cat", "google~grey", 40, 40).getpixel((20, 20))
    assert max(grey[:3]) - min(grey[:3]) <= 1


def test_a_set_is_not_gone_on_with_by_another_grammar(folder, tmp_path, monkeypatch):
    written = replace(FULL, grammar=0.5)
    write_pairs(tmp_path / "by grammar", written, folder, seed=5, side=112, pairs=2, jobs=1)
    write_pairs(tmp_path / "by none", FULL, folder, seed=5, side=112, pairs=2, jobs=1)
    monkeypatch.setattr("spatialscore_training.manifest.WRITTEN_WITH", "sha256:another")
    with pytest.raises(Refusal, match="written_with was sha256:.*, is now sha256:another"):
        write_pairs(tmp_path / "by grammar", written, folder, seed=5, side=112, pairs=3, jobs=1)
    write_pairs(tmp_path / "by none", FULL, folder, seed=5, side=112, pairs=3, jobs=1)


def test_colours_turn_as_colorsys_turns_them():
    rgb = np.random.default_rng(0).integers(0, 256, (3000, 3))
    rgb = np.concatenate([rgb, [(0, 0, 0), (255, 255, 255), (9, 9, 9), (255, 0, 0), (0, 255, 0), (0, 0, 255), (7, 7, 8)]]) / 255
    hls = np.array([colorsys.rgb_to_hls(*colour) for colour in rgb])
    assert np.array_equal(_to_hls(rgb), hls)
    assert np.array_equal(_to_rgb(hls), np.array([colorsys.hls_to_rgb(*colour) for colour in hls]))


def test_the_goals_prompts_say_the_clause(drawings):
    """The forms that the goals are measured in, heard by the same listener."""
    world = World(kinds=16, things=(2, 2))
    for seed in range(40):
        rng = random.Random(seed)
        pair = new_pair(rng, world, drawings)
        clause = pair.prompt.clauses[0]
        a, b = clause.about
        told = {"left_of": ("x", -1), "right_of": ("x", 1), "above": ("y", -1), "below": ("y", 1)}[clause.relation]
        for text in (*(goals.form(text)(rng, pair) for text in (*goals.FORMS.values(), *goals.PARAPHRASES)), goals.two_sided(rng, pair)):
            assert heard(text, a, b) == told, text
        for name, cheat in goals.CHEATS.items():
            there = [t.kind for t in cheat(rng, pair.kept, a, b).things]
            expected = {"A alone": [a], "B alone": [b], "neither": [], "A B A B in a line": [a, b, a, b], "rows of both": [a] * 4 + [b] * 4}.get(name)
            if expected is None:
                missing, other = (a, b) if "A's" in name else (b, a)
                assert missing not in there and other in there and len(there) == 2
            else:
                assert there == expected


@pytest.mark.parametrize("sort", goals.SORTS, ids=lambda sort: sort.name)
def test_every_sort_of_the_goals_can_be_made(sort, drawings):
    world = replace(sort.world, kinds=16, styles=STYLES)
    pair = new_pair(random.Random(1), world, drawings)
    text = sort.say(random.Random(1), pair)
    broken = sort.broken(random.Random(1), pair.kept, *pair.prompt.clauses[0].about) if sort.broken else pair.broken
    assert text.strip() and broken != pair.kept and "{" not in text
    assert all(draw(scene, 112, drawings).size == (112, 112) for scene in (pair.kept, broken))
