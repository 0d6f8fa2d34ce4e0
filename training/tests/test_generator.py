"""The generator: its geometry, its determinism, and that nothing but space tells a picture from its twin."""

import json
import random
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageDraw

from spatialscore_training.drawings import STYLES, Drawings, kinds
from spatialscore_training.manifest import validate, write_pairs
from spatialscore_training.pair_files import read_pairs
from spatialscore_training.pairs import new_duels, new_pair, new_questions
from spatialscore_training.prompts import HELD_OUT, PHRASINGS, write
from spatialscore_training.relations import RULES, Clause, Thing, arity, overlap, verdict
from spatialscore_training.scenes import Scene, World, draw, layers, new_scene
from spatialscore_training.truth import cells

PLAIN = World(kinds=16, things=(2, 3))
FULL = World(kinds=16, things=(3, 6), relations=tuple(RULES), clauses=(1, 5), depth=0.2)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Drawings of our own, so that the tests need none from elsewhere: a shape and a colour for each kind."""
    folder = tmp_path_factory.mktemp("drawings")
    for i, word in enumerate(list(kinds())[:16]):
        for style in STYLES:
            image = Image.new("RGBA", (64, 64))
            shape = ImageDraw.Draw(image)
            colour = (16 * i, 255 - 16 * i, 60 * (i % 4), 255)
            (shape.ellipse if style == "google" else shape.rectangle)((4, 4 + i, 60, 60 - i), fill=colour)
            (folder / style).mkdir(exist_ok=True)
            image.save(folder / style / f"{word}.png")
    return folder


@pytest.fixture(scope="session")
def drawings(folder):
    return Drawings(folder, FULL.words)


def thing(kind, x, y, size=0.2):
    return Thing(kind, "google", x, y, size, size)


@pytest.mark.parametrize(
    "relation, about, layout, expected",
    [
        ("left_of", "ab", [("a", 0.2, 0.5), ("b", 0.8, 0.5)], True),
        ("left_of", "ba", [("a", 0.2, 0.5), ("b", 0.8, 0.5)], False),
        ("left_of", "ab", [("a", 0.48, 0.2), ("b", 0.52, 0.8)], None),
        ("above", "ab", [("a", 0.5, 0.2), ("b", 0.5, 0.8)], True),
        ("below", "ab", [("a", 0.5, 0.2), ("b", 0.5, 0.8)], False),
        ("in_front_of", "ba", [("a", 0.5, 0.5), ("b", 0.6, 0.5)], True),
        ("behind", "ba", [("a", 0.5, 0.5), ("b", 0.6, 0.5)], False),
        ("behind", "ab", [("a", 0.2, 0.5), ("b", 0.8, 0.5)], None),
        ("between", "abc", [("b", 0.2, 0.5), ("a", 0.5, 0.5), ("c", 0.8, 0.5)], True),
        ("between", "bac", [("b", 0.2, 0.5), ("a", 0.5, 0.5), ("c", 0.8, 0.5)], False),
        ("top_left_corner", "a", [("a", 0.12, 0.12)], True),
        ("bottom_left_corner", "a", [("a", 0.12, 0.12)], False),
        ("right_edge", "a", [("a", 0.89, 0.4)], True),
        ("centered", "a", [("a", 0.5, 0.52)], True),
        ("in_row", "ab", [("a", 0.2, 0.5), ("b", 0.8, 0.52)], True),
        ("in_column", "ab", [("a", 0.2, 0.5), ("b", 0.8, 0.5)], False),
        ("lower_half_empty", "", [("a", 0.2, 0.2), ("b", 0.8, 0.3)], True),
        ("upper_half_empty", "", [("a", 0.2, 0.2), ("b", 0.8, 0.3)], False),
    ],
)
def test_geometry(relation, about, layout, expected):
    assert verdict(Clause(relation, tuple(about)), tuple(thing(*t) for t in layout)) is expected


def test_every_relation_has_phrasings_and_some_held_out():
    assert PHRASINGS.keys() == RULES.keys()
    assert all(len(set(said)) == len(said) > HELD_OUT + 3 for said in PHRASINGS.values())
    for relation, said in PHRASINGS.items():
        assert all(sum(f"{{{slot}}}" in phrase for slot in "abc") == arity(relation) for phrase in said)


def test_mentions_and_ends_are_where_they_are_said_to_be():
    clauses = (Clause("left_of", ("cat", "apple")), Clause("above", ("cat", "car")), Clause("centered", ("car",)))
    for seed in range(200):
        prompt = write(random.Random(seed), clauses)
        assert all(prompt.text[m.start : m.end] == m.kind for m in prompt.mentions)
        assert all(prompt.text[end : end + 1] in ("", ".", ",", ";") for end in prompt.ends)
        assert prompt.text[0].isupper()


def test_pairs_keep_what_they_promise(drawings):
    rng = random.Random(1)
    for _ in range(150):
        pair = new_pair(rng, FULL, drawings)
        kept = [verdict(c, pair.kept.things) for c in pair.prompt.clauses]
        broken = [verdict(c, pair.broken.things) for c in pair.prompt.clauses]
        assert all(kept) and None not in broken
        assert 1 <= broken.count(False) <= 2
        assert [i for i, said in enumerate(broken) if not said] == list(pair.perturbed)
        assert all(verdict(c, pair.broken.things) for c in pair.twin_prompt.clauses)


def accuracy_of_a_linear_guess(features, answers):
    """Of least squares on half of the examples, tried on the other half."""
    features = np.column_stack([features, np.ones(len(features))])
    half = len(features) // 2
    weights = np.linalg.lstsq(features[:half], 2.0 * answers[:half] - 1, rcond=None)[0]
    return np.mean((features[half:] @ weights > 0) == answers[half:])


def layout_features(scene, world):
    """For each kind: whether it is there, where, how large and how far in front; and the sum of their squares."""
    features = np.zeros((len(world.words), 5))
    for order, t in enumerate(scene.things):
        features[world.words.index(t.kind)] = 1, t.x, t.y, t.width, order / 8
    spread = np.array([[t.x, t.y, t.x**2, t.y**2] for t in scene.things]).mean(0)
    return np.concatenate([features.ravel(), spread])


@pytest.mark.parametrize("world", [PLAIN, FULL])
def test_the_pictures_alone_do_not_tell(world, drawings):
    """A guess from a pair's two layouts, without the prompt."""
    rng = random.Random(2)
    features, answers = [], []
    for i in range(2400):
        pair = new_pair(rng, world, drawings)
        first = rng.random() < 0.5
        one, other = (pair.kept, pair.broken) if first else (pair.broken, pair.kept)
        features.append(layout_features(one, world) - layout_features(other, world))
        answers.append(first)
    assert 0.45 < accuracy_of_a_linear_guess(np.array(features), np.array(answers)) < 0.55


@pytest.mark.parametrize("ask", [new_questions, new_duels])
def test_the_prompt_alone_does_not_tell(ask, drawings):
    """A guess from a prompt's words, without the picture: whether the first picture keeps it."""
    rng = random.Random(3)
    texts, answers = [], []
    for _ in range(600):
        _, questions = ask(rng, PLAIN, drawings, 4)
        texts += [question.prompt.text.lower().strip(".").split() for question in questions]
        answers += [all(question.truths[0]) for question in questions]
    known = sorted({word for text in texts for word in text})
    features = np.array([[text.count(word) for word in known] for text in texts], float)
    assert 0.45 < accuracy_of_a_linear_guess(features, np.array(answers)) < 0.55


def test_a_seed_gives_one_data_set(folder, tmp_path):
    for name, jobs in (("one", 1), ("two", 2)):
        write_pairs(tmp_path / name, FULL, folder, seed=5, side=112, pairs=12, jobs=jobs)
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.*"))
    assert len(files) == 26
    assert all((tmp_path / "one" / f).read_bytes() == (tmp_path / "two" / f).read_bytes() for f in files)


def test_the_validator_finds_faults(folder, tmp_path):
    write_pairs(tmp_path, FULL, folder, seed=6, side=112, pairs=8, jobs=1)
    assert list(validate(tmp_path)) == []
    records = list(read_pairs(tmp_path))
    records[0]["relations"][0]["kept"] = False
    records[1]["kept"] = "nowhere.png"
    records[2]["prompt"] = ""
    records[3]["id"] = records[4]["id"]
    manifest = next(tmp_path.rglob("manifest.jsonl"))
    manifest.write_text("\n".join(map(json.dumps, records)) + "\nnot json\n")
    faults = "\n".join(validate(tmp_path))
    for said in ("does not hold in the kept", "the boxes say True", "nowhere.png", "`prompt` is missing", "stands twice", "not JSON"):
        assert said in faults


@pytest.mark.parametrize("shadow", [0.0, 0.05])
def test_pictures_show_what_the_boxes_say(drawings, shadow):
    scene = replace(new_scene(random.Random(7), PLAIN, drawings), shadow=shadow)
    empty = draw(replace(scene, things=()), 224, drawings)
    changed = np.any(np.asarray(draw(scene, 224, drawings)) != np.asarray(empty), axis=-1)
    inside, near = np.zeros((2, 224, 224), bool)
    reach = round(shadow * 224)
    for t in scene.things:
        left, top, right, bottom = (round(edge * 224) for edge in t.box)
        inside[top:bottom, left:right] = True
        near[max(0, top - reach) : bottom + reach, max(0, left - reach) : right + reach] = True
    assert changed.any() and not (changed & ~near).any()
    assert (changed & ~inside).any() == (shadow > 0)


def test_things_that_overlap_really_cover_each_other(drawings):
    rng, crowded = random.Random(3), replace(FULL, depth=0.8)
    covered = 0
    for _ in range(40):
        scene = new_scene(rng, crowded, drawings)
        front, behind = layers(scene.things, 112, drawings)
        for i, a in enumerate(scene.things):
            for j in range(i):
                if overlap(a, scene.things[j]):
                    covered += 1
                    assert np.any((front == i) & (behind == j)), (a, scene.things[j])
    assert covered > 10


def test_the_truth_tells_who_is_over_whom(drawings):
    under, over = thing("cat", 0.4, 0.5, 0.4), thing("apple", 0.6, 0.5, 0.4)
    index = {"cat": 3, "apple": 5}
    for things in ((under, over), (over, under)):
        seen = cells(Scene(things, 1, 0.05), 8, index, drawings)
        back, front = (index[t.kind] for t in things)
        marks, main = seen.extras[:, -1], seen.kind
        assert set(main[marks > 0]) == {front} and set(main[marks < 0]) == {back}
        assert set(seen.front[seen.order > 0]) == {front} and set(seen.front[seen.order < 0]) == {back}
        assert set(seen.behind[seen.behind >= 0]) == {back}
        dark = seen.shade > 0.05
        assert (dark & (seen.front == back)).any() and not (dark & (seen.front == front)).any()
