"""The loop: layouts from the policy, scores from the server, GRPO from the scores."""

import time
from dataclasses import dataclass
from statistics import fmean
from typing import Callable

import numpy as np
from PIL import Image
from spatialscore_client import SpatialScoreClient
from spatialscore_client.rewards import top_k_bottom_k
from spatialscore_training.drawings import Drawings

from policy import Policy
from tasks import Layout, Task, Tasks, picture

GROUP = 24
"""How many layouts of a prompt are held against each other."""
KEPT = 6
"""How many of the best, and how many of the worst of a group train the policy."""
RATE = 0.02
"""The rate of learning at first; it falls in a line to nothing, and with it what the scores' noise leaves behind."""
DRAWS = 8
"""How often each held-out prompt is laid out to measure accuracy: geometry needs no picture."""

Reward = Callable[[list[Task], list[Layout]], list[float]]
"""From prompts and as many layouts to rewards."""


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


def accuracy(policy: Policy, held_out: list[Task]) -> float:
    """What share of the relations of these prompts the policy's layouts keep, by geometry."""
    tasks, _, layouts = lay_out(policy, held_out, DRAWS)
    return fmean(task.kept(layout) for task, layout in zip(tasks, layouts))


def agreement(rewards: list[float], kept: list[float]) -> tuple[float, int]:
    """`agreed` and `pairs` of a step. `kept` is what geometry says; groups lie one behind the other."""
    right = []
    for first in range(0, len(rewards), GROUP):
        group = list(zip(rewards, kept))[first : first + GROUP]
        right += [(a > b) + 0.5 * (a == b) for a, whole in group if whole == 1 for b, part in group if part < 1]
    return sum(right), len(right)


def filtered(rewards: list[float], k: int) -> tuple[list[int], np.ndarray]:
    """Which items of groups that lie one behind the other train the policy, and their advantages. `k` at half a group
    or more keeps all of it: no filter."""
    kept, advantages = [], []
    for first in range(0, len(rewards), GROUP):
        chosen = top_k_bottom_k(rewards[first : first + GROUP], k)
        kept += [first + index for index in chosen.indices]
        advantages += chosen.advantages
    return kept, np.array(advantages)


def train(
    policy: Policy,
    reward: Reward,
    tasks: Tasks,
    held_out: list[Task],
    *,
    iterations: int,
    prompts: int,
    k: int = KEPT,
    name: str = "",
    watch: Callable[[int], None] | None = None,
) -> list[Step]:
    """So many iterations with so many prompts each, and how they went; with a name, progress is printed. `watch` is
    called with the number of pictures so far before each fifth iteration."""
    history: list[Step] = []
    for iteration in range(iterations):
        if watch and iteration % 5 == 0:
            watch(iteration * prompts * GROUP)
        start = time.monotonic()
        repeated, actions, layouts = lay_out(policy, tasks.some(prompts), GROUP)
        rewards = reward(repeated, layouts)
        truth = [task.kept(layout) for task, layout in zip(repeated, layouts)]
        step = Step(iteration * len(rewards), fmean(rewards), accuracy(policy, held_out), *agreement(rewards, truth))
        history.append(step)
        kept, advantages = filtered(rewards, k)
        rows, used = (np.stack([rows[i] for i in kept]) for rows in zip(*((t.features, t.used()) for t in repeated)))
        policy.train(rows, actions[kept], used, advantages, RATE * (1 - iteration / iterations))
        if name:
            print(
                f"{name}  iteration {iteration + 1:3}/{iterations}  mean score {step.score:6.2f}"
                f"  relations kept {step.accuracy:4.0%}  {len(rewards) / (time.monotonic() - start):4.0f} pictures/s",
                flush=True,
            )
    return history
