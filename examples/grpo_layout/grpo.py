"""The loop: layouts from the policy, scores from the server, GRPO from the scores."""

import copy
import time
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Callable

import numpy as np
from PIL import Image
from spatialscore_client import SpatialScoreClient
from spatialscore_client.rewards import Selection, top_k_bottom_k
from spatialscore_training.drawings import Drawings

from policy import Policy
from tasks import Layout, Task, Tasks, picture

GROUP = 24
"""How many layouts of a prompt are held against each other."""
KEPT = 6
"""How many of the best, and how many of the worst of a group train the policy."""
DRAWS = 8
"""How often each held-out prompt is laid out to measure accuracy: geometry needs no picture."""

Reward = Callable[[list[Task], list[Layout]], list[float]]
"""From prompts and as many layouts to rewards."""
Choose = Callable[[list[float]], Selection]
"""From a group's rewards to those that train the policy, and their advantages."""


@dataclass(frozen=True)
class Recipe:
    """How scores move the policy."""

    choose: Choose = partial(top_k_bottom_k, k=KEPT)
    group: int = GROUP
    rate: float = 0.02
    """Of learning, at first; it falls in a line to nothing, and with it what the scores' noise leaves behind."""
    epochs: int = 2
    """Steps of ascent on each batch."""
    kl: float = 0.0
    """The weight of the divergence from the policy as it was after `warm` iterations; before them there is none."""
    warm: int = 0


@dataclass
class Step:
    """An iteration, before its training."""

    pictures: int
    """That trained the policy before."""
    score: float
    """The mean score of this iteration's pictures: all that the policy learns from."""
    accuracy: float
    """What share of the relations of held-out prompts the policy's layouts keep."""
    agreed: float
    """Of `pairs`, how many the scorer puts the right way round; a tie is half."""
    pairs: int
    """Pairs of layouts for one prompt of which geometry says that one keeps all of it and the other does not."""
    blamed: float | None
    """Of the layouts that train the policy and keep all of their prompt, which share it is trained to avoid."""
    divergence: float | None = None
    """From the reference of the recipe, where it has one."""


class Scorer:
    """The reward: draws layouts and has the server score the pictures."""

    def __init__(self, client: SpatialScoreClient, drawings: Drawings, shadow: float):
        self.client, self.drawings, self.shadow = client, drawings, shadow
        self.grounds = np.random.default_rng(0)
        self.pictures, self.seconds = 0, 0.0

    def __call__(self, tasks: list[Task], layouts: list[Layout]) -> list[float]:
        return self.score(tasks, self.draw(layouts, self.grounds.integers(2**32, size=len(layouts)).tolist()))

    def draw(self, layouts: list[Layout], grounds: list[int]) -> list[Image.Image]:
        """The pictures of layouts on the backgrounds of these seeds."""
        return [picture(*each, self.shadow, self.drawings) for each in zip(layouts, grounds)]

    def score(self, tasks: list[Task], pictures: list[Image.Image]) -> list[float]:
        """What the server says of pictures: one score for each, or an exception."""
        start = time.monotonic()
        scores = self.client.score([task.text for task in tasks], pictures)
        self.seconds += time.monotonic() - start
        self.pictures += len(pictures)
        return scores.means


def lay_out(policy: Policy, tasks: list[Task], each: int) -> tuple[list[Task], np.ndarray, list[Layout]]:
    """So many layouts of each task: the tasks repeated, the actions, and the layouts."""
    repeated = [task for task in tasks for _ in range(each)]
    actions = policy.sample(np.stack([task.features for task in repeated]))
    return repeated, actions, [task.layout(action) for task, action in zip(repeated, actions)]


def accuracy(policy: Policy, held_out: list[Task], draws: int = DRAWS) -> float:
    """What share of the relations of these prompts the policy's layouts keep, by geometry."""
    tasks, _, layouts = lay_out(policy, held_out, draws)
    return fmean(task.kept(layout) for task, layout in zip(tasks, layouts))


def agreement(rewards: list[float], kept: list[float], size: int) -> tuple[float, int]:
    """`agreed` and `pairs` of a step. `kept` is what geometry says; groups of this size lie one behind the other."""
    right = []
    for first in range(0, len(rewards), size):
        group = list(zip(rewards, kept))[first : first + size]
        right += [(a > b) + 0.5 * (a == b) for a, whole in group if whole == 1 for b, part in group if part < 1]
    return sum(right), len(right)


def chosen(rewards: list[float], recipe: Recipe) -> tuple[list[int], np.ndarray]:
    """Which items of groups that lie one behind the other train the policy, and their advantages."""
    indices, advantages = [], []
    for first in range(0, len(rewards), recipe.group):
        selection = recipe.choose(rewards[first : first + recipe.group])
        indices += [first + index for index in selection.indices]
        advantages += selection.advantages
    return indices, np.array(advantages)


def train(
    policy: Policy,
    reward: Reward,
    tasks: Tasks,
    held_out: list[Task],
    *,
    iterations: int,
    prompts: int,
    recipe: Recipe = Recipe(),
    name: str = "",
    watch: Callable[[int], None] | None = None,
) -> list[Step]:
    """So many iterations with so many prompts each, and how they went; with a name, progress is printed. `watch` is
    called with the number of pictures so far before each fifth iteration."""
    history: list[Step] = []
    reference = None
    for iteration in range(iterations):
        if watch and iteration % 5 == 0:
            watch(iteration * prompts * recipe.group)
        if recipe.kl and iteration == recipe.warm:
            reference = copy.deepcopy(policy)
        start = time.monotonic()
        repeated, actions, layouts = lay_out(policy, tasks.some(prompts), recipe.group)
        rewards = reward(repeated, layouts)
        truth = [task.kept(layout) for task, layout in zip(repeated, layouts)]
        rows, used = (np.stack(each) for each in zip(*((task.features, task.used()) for task in repeated)))
        kept, advantages = chosen(rewards, recipe)
        blamed = [advantage < 0 for index, advantage in zip(kept, advantages) if truth[index] == 1]
        step = Step(
            iteration * len(rewards),
            fmean(rewards),
            accuracy(policy, held_out),
            *agreement(rewards, truth, recipe.group),
            fmean(blamed) if blamed else None,
            float(policy.divergence(reference, rows, used).mean()) if reference else None,
        )
        history.append(step)
        rate = recipe.rate * (1 - iteration / iterations)
        pull = {"epochs": recipe.epochs, "kl": recipe.kl, "reference": reference}
        policy.train(rows[kept], actions[kept], used[kept], advantages, rate, **pull)
        if name:
            print(
                f"{name}  iteration {iteration + 1:3}/{iterations}  mean score {step.score:6.2f}"
                f"  relations kept {step.accuracy:4.0%}  {len(rewards) / (time.monotonic() - start):4.0f} pictures/s",
                flush=True,
            )
    return history
