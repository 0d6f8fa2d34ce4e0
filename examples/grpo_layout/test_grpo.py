"""What the example rests on: gradients that were written by hand, and a check that can fail."""

import copy
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
from spatialscore_training.drawings import DEFAULT_FOLDER, Drawings

from policy import Policy
from tasks import WORLD, Tasks
from train import short


@pytest.fixture(scope="module")
def drawings() -> Drawings:
    return Drawings(Path(DEFAULT_FOLDER), WORLD.words)


def test_gradients_are_those_of_finite_differences(drawings):
    policy, rng = Policy(0), np.random.default_rng(1)
    for weight in policy.weights:
        weight += rng.normal(0, 0.1, weight.shape)
    tasks = Tasks(drawings, 0, held_out=False).some(6)
    rows, used = np.stack([task.features for task in tasks]), np.stack([task.used() for task in tasks])
    actions, pulls = policy.sample(rows), rng.normal(size=len(tasks))
    stepped = copy.deepcopy(policy)
    stepped._ascend(rows, actions, used, pulls, 0.0)
    for weight, (first, _) in zip(policy.weights, stepped.moments):
        for place in list(np.ndindex(weight.shape))[::5]:
            ends, middle = [], weight[place]
            for step in (1e-5, -1e-5):
                weight[place] = middle + step
                ends.append((pulls * policy.log_probability(rows, actions, used)).sum())
            weight[place] = middle
            # The first moment after one step is a tenth of the gradient.
            assert 10 * first[place] == pytest.approx((ends[0] - ends[1]) / 2e-5, abs=1e-5)


def test_held_out_prompts_share_neither_kinds_nor_combinations_with_those_of_training(drawings):
    trained, held_out = (Tasks(drawings, 0, held_out=each) for each in (False, True))
    assert not set(trained.words) & set(held_out.words)
    assert not {two for two, _ in trained.twos} & {two for two, _ in held_out.twos}
    assert len(trained.twos) > 3 * len(held_out.twos) > 0


class Judge:
    """A reward without a server: what geometry says, or that of another picture."""

    def __init__(self, drawings: Drawings, shift: int):
        self.drawings, self.shift, self.rng = drawings, shift, np.random.default_rng(0)

    def __call__(self, tasks, layouts):
        scores = [task.kept(layout) + 0.6 * self.rng.normal() for task, layout in zip(tasks, layouts)]
        return np.roll(scores, self.shift).tolist()


@pytest.mark.parametrize(("shift", "clear"), [(0, True), (1, False)])
def test_the_short_form_tells_right_scores_from_those_of_the_neighbour(drawings, shift, clear):
    assert short(Judge(drawings, shift), Namespace(iterations=15, prompts=4)) is clear
