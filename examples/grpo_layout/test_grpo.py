"""What the example rests on: gradients that were written by hand, and a check that can fail."""

import copy
import json
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
from spatialscore_training.drawings import DEFAULT_FOLDER, Drawings
from spatialscore_training.relations import Clause, fact, verdict

from grpo import Recipe, agreement, train
from policy import Policy
from study import PARTS, Judge, at_random, by_the_group, interval, known
from tasks import MANY, WORLD, Tasks
from train import short


@pytest.fixture(scope="module")
def drawings() -> Drawings:
    return Drawings(Path(DEFAULT_FOLDER), WORLD.words)


@pytest.mark.parametrize("form", ["easy", "hard"])
def test_gradients_are_those_of_finite_differences(drawings, form):
    policy, reference, rng = Policy(0), Policy(1), np.random.default_rng(1)
    for weight in policy.weights + reference.weights:
        weight += rng.normal(0, 0.03, weight.shape)
    tasks, kl = Tasks(drawings, 0, held_out=False, form=form).some(6), 0.7
    rows, used = np.stack([task.features for task in tasks]), np.stack([task.used() for task in tasks])
    actions, pulls = policy.sample(rows), rng.normal(size=len(tasks))

    def objective() -> float:
        divergence = policy.divergence(reference, rows, used)
        return (pulls * policy.log_probability(rows, actions, used) - kl * divergence).sum()

    stepped = copy.deepcopy(policy)
    stepped._ascend(rows, actions, used, pulls, 0.0, kl, reference)
    for weight, (first, _) in zip(policy.weights, stepped.moments):
        for place in list(np.ndindex(weight.shape))[::11]:
            ends, middle = [], weight[place]
            for step in (1e-5, -1e-5):
                weight[place] = middle + step
                ends.append(objective())
            weight[place] = middle
            # The first moment after one step is a tenth of the gradient.
            assert 10 * first[place] == pytest.approx((ends[0] - ends[1]) / 2e-5, abs=1e-5)


def test_the_divergence_is_what_samples_say(drawings):
    policy, reference = Policy(0), Policy(1)
    (task,) = Tasks(drawings, 0, held_out=False).some(1)
    rows, used = (np.repeat(each[None], 20_000, axis=0) for each in (task.features, task.used()))
    actions = policy.sample(rows)
    sampled = policy.log_probability(rows, actions, used) - reference.log_probability(rows, actions, used)
    error = sampled.std() / np.sqrt(len(sampled))
    assert policy.divergence(reference, rows[:1], used[:1])[0] == pytest.approx(sampled.mean(), abs=5 * error)
    assert policy.divergence(policy, rows[:1], used[:1])[0] == pytest.approx(0, abs=1e-12)


def test_held_out_prompts_share_neither_kinds_nor_combinations_with_those_of_training(drawings):
    trained, held_out = (Tasks(drawings, 0, held_out=each) for each in (False, True))
    assert not set(trained.words) & set(held_out.words)
    assert not {two for two, _ in trained.twos} & {two for two, _ in held_out.twos}
    assert len(trained.twos) > 3 * len(held_out.twos) > 0


@pytest.mark.parametrize("form", ["one", "easy", "hard"])
def test_what_is_kept_is_what_geometry_says(drawings, form):
    rng = np.random.default_rng(0)
    for task in Tasks(drawings, 0, held_out=False, form=form).some(20):
        layout = task.layout(rng.normal(size=2 * len(task.features)))
        clauses = [Clause(relation, tuple(task.things[i].kind for i in about)) for relation, *about in task.stated]
        assert task.kept(layout) == sum(verdict(clause, layout) is True for clause in clauses) / len(clauses)
        assert all(task.things[i].kind in task.text for _, *about in task.stated for i in about)


def test_hard_prompts_state_as_many_facts_about_as_many_things_as_they_should(drawings):
    tasks = Tasks(drawings, 0, held_out=True, form="hard").some(50)
    assert {len(task.things) for task in tasks} == set(range(MANY[0], MANY[1] + 1))
    facts = [{fact(Clause(relation, tuple(map(str, about)))) for relation, *about in task.stated} for task in tasks]
    assert all(len(each) == len(task.stated) for each, task in zip(facts, tasks))
    assert min(map(len, facts)) <= 4 and max(map(len, facts)) >= 9 and 5 <= np.median([*map(len, facts)]) <= 8
    assert not {thing.kind for task in tasks for thing in task.things} & set(Tasks(drawings, 0, held_out=False).words)


def test_the_kl_term_keeps_a_policy_near_what_it_was(drawings):
    tasks = lambda held_out: Tasks(drawings, 0, held_out=held_out)
    ends = []
    for kl in (1e-9, 10.0):
        recipe = Recipe(kl=kl, warm=4)
        history = train(
            Policy(0), Judge(0.3, 0), tasks(False), tasks(True).some(5), iterations=12, prompts=2, recipe=recipe
        )
        assert [step.divergence is None for step in history] == [True] * 4 + [False] * 8
        assert history[4].divergence == pytest.approx(0, abs=1e-12)
        ends.append(history[-1].divergence)
    assert ends[1] < 0.2 * ends[0]


def test_the_ways_to_choose_that_the_filter_is_held_against():
    rewards = [float(reward) for reward in (7, 1, 5, 3, 8, 2, 6, 4)]
    assert by_the_group(rewards).indices == [0, 1, 4, 5]
    assert by_the_group(rewards).advantages[0] == pytest.approx((7 - 4.5) / np.std(rewards), rel=1e-3)
    several = [at_random([reward + i for reward in rewards]) for i in range(50)]
    assert all(len(each.indices) == 4 for each in several)
    assert {index for each in several for index in each.indices} == set(range(8))
    assert sum(several[0].advantages) == pytest.approx(0, abs=1e-9)


def test_an_interval_is_students():
    assert interval([1.0, 2.0, 3.0]) == (2.0, pytest.approx(4.303 / np.sqrt(3)))


def test_a_run_that_was_made_otherwise_is_not_taken_for_this_one(tmp_path):
    made = {"part": "scored, easy", "arm": "filter", "made_with": PARTS["scored, easy"].made_with("filter"), "model": "a"}
    others = ({"model": "b"}, {"arm": "none"}, {"made_with": {**made["made_with"], "iterations": 11}})
    lines = [json.dumps({**made, **other, "seed": seed}) for seed, other in enumerate(({}, *others))]
    (tmp_path / "runs.jsonl").write_text("\n".join(lines))
    assert [*known(tmp_path / "runs.jsonl", "a")] == [("scored, easy", "filter", 0)]
    assert known(tmp_path / "none", "a") == {}


def test_agreement_is_counted_within_groups():
    assert agreement([3, 1, 2, 2], [1, 0.5, 0, 1], 2) == (1.5, 2)


class Shifted:
    """A reward without a server: what geometry says, or that of another picture."""

    def __init__(self, drawings: Drawings, shift: int):
        self.drawings, self.shift, self.judge = drawings, shift, Judge(0.6, 0)

    def __call__(self, tasks, layouts):
        return np.roll(self.judge(tasks, layouts), self.shift).tolist()


@pytest.mark.parametrize(("shift", "clear"), [(0, True), (1, False)])
def test_the_short_form_tells_right_scores_from_those_of_the_neighbour(drawings, shift, clear):
    assert short(Shifted(drawings, shift), Namespace(iterations=15, prompts=4)) is clear
