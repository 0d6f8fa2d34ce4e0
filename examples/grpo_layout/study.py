#!/usr/bin/env python3
"""What the top-k filter and the KL term do, over many runs with the same seeds in each arm.

    study.py                 rewards are what geometry says, blurred by noise: no server, no pictures
    study.py HOST:PORT       rewards are a running server's scores

Each run is a line of `runs.jsonl` in --out; those that are there are not run again. At the end of each part, and at once
with --report, differences between arms are printed with 95 % intervals (Student's t over the seeds' differences).
"""

import argparse
import json
import math
import random
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
from spatialscore_client import SpatialScoreClient
from spatialscore_client.rewards import Selection, top_k_bottom_k
from spatialscore_training.drawings import DEFAULT_FOLDER, Drawings

from grpo import GROUP, Recipe, Reward, Scorer, accuracy, train
from plots import plot_differences
from policy import Policy
from tasks import WORLD, Form, Layout, Task, Tasks

ALL = Recipe(choose=partial(top_k_bottom_k, k=10**6))
HELD_OUT_SEED = 10_000


def at_random(rewards: list[float]) -> Selection:
    """As many as the filter keeps, but any: what half of the samples alone does."""
    indices = sorted(random.Random(repr(rewards)).sample(range(len(rewards)), len(rewards) // 2))
    return Selection(indices, top_k_bottom_k([rewards[index] for index in indices], k=10**6).advantages)


def by_the_group(rewards: list[float]) -> Selection:
    """The filter, with the advantages that the whole group gives."""
    every, kept = top_k_bottom_k(rewards, k=10**6).advantages, top_k_bottom_k(rewards, k=len(rewards) // 4).indices
    return Selection(kept, [every[index] for index in kept])


@dataclass(frozen=True)
class Part:
    """Runs that differ in their arm and their seed only."""

    arms: dict[str, Recipe]
    """The first is what the others are held against."""
    form: Form = "easy"
    iterations: dict[str, int] | int = 10
    prompts: dict[str, int] | int = 4
    noise: float = 0.3
    """Of the geometric reward: the standard deviation, where one is between all relations kept and none."""
    seeds: int = 16
    live: bool = False
    """Whether the rewards are the server's."""

    def of(self, arm: str, name: str):
        value = getattr(self, name)
        return value[arm] if isinstance(value, dict) else value


BOTH = {"none": ALL, "filter": Recipe()}


def each(**changed) -> dict[str, Recipe]:
    """Both, with something else than usual."""
    return {arm: replace(recipe, **changed) for arm, recipe in BOTH.items()}


def grouped(size: int) -> dict[str, Recipe]:
    """Both in groups of another size, of which the filter keeps half too."""
    return {"none": replace(ALL, group=size), "filter": Recipe(partial(top_k_bottom_k, k=size // 4), size)}


PARTS = {
    # Without a server.
    "easy": Part({**BOTH, "half at random": replace(ALL, choose=at_random), "filter, advantages of all": replace(ALL, choose=by_the_group)}),
    "easy, k": Part({"none": ALL, **{f"filter, k {k}": Recipe(partial(top_k_bottom_k, k=k)) for k in (1, 2, 4, 8)}}),
    **{f"easy, noise {noise}": Part(BOTH, noise=noise) for noise in (0.0, 0.6, 1.2, 2.4)},
    **{f"easy, rate {rate}": Part(each(rate=rate)) for rate in (0.04, 0.08)},
    **{f"easy, {epochs} epochs": Part(each(epochs=epochs)) for epochs in (1, 4)},
    **{f"easy, groups of {size}": Part(grouped(size), prompts=96 // size) for size in (12, 48, 96)},
    "easy, 40 iterations": Part(BOTH, iterations=40),
    "easy, as much training": Part(
        {**BOTH, "none, groups of 12": replace(ALL, group=12)},
        iterations={"none": 10, "filter": 20, "none, groups of 12": 20},
    ),
    "hard, 10 iterations": Part(BOTH, form="hard", seeds=12),
    "hard": Part({**BOTH, "half at random": replace(ALL, choose=at_random)}, form="hard", iterations=30, seeds=12),
    "hard, noise 1.2": Part(BOTH, form="hard", iterations=30, noise=1.2, seeds=12),
    "hard, as much training": Part(
        {**BOTH, "none, groups of 12": replace(ALL, group=12)},
        form="hard",
        iterations={"none": 10, "filter": 20, "none, groups of 12": 20},
        seeds=12,
    ),
    # With one.
    "scored, easy": Part(BOTH, seeds=5, live=True),
    "scored, hard": Part(BOTH, form="hard", iterations=20, seeds=3, live=True),
    "scored, kl": Part(
        {"none": ALL, **{f"kl {kl}": replace(ALL, kl=kl, warm=10) for kl in (0.01, 0.1)}},
        iterations=30, prompts=2, seeds=3, live=True,
    ),
}  # fmt: skip


class Judge:
    """What geometry says of each layout, and noise."""

    def __init__(self, noise: float, seed: int):
        self.noise, self.rng = noise, np.random.default_rng(seed)

    def __call__(self, tasks: list[Task], layouts: list[Layout]) -> list[float]:
        return [task.kept(layout) + self.noise * self.rng.normal() for task, layout in zip(tasks, layouts)]


def run(part: Part, arm: str, seed: int, reward: Reward, drawings: Drawings) -> dict:
    """One run: what it ended with on 100 held-out prompts, and its curve on twenty of them."""
    held_out = Tasks(drawings, HELD_OUT_SEED, held_out=True, form=part.form).some(100)
    policy, tasks = Policy(seed), Tasks(drawings, seed, held_out=False, form=part.form)
    counts = {"iterations": part.of(arm, "iterations"), "prompts": part.of(arm, "prompts")}
    history = train(policy, reward, tasks, held_out[:20], recipe=part.arms[arm], **counts)
    blamed = [step.blamed for step in history if step.blamed is not None]
    return {
        "last": accuracy(policy, held_out),
        "mean": fmean(step.accuracy for step in history),
        "blamed": fmean(blamed) if blamed else None,
        "history": [asdict(step) for step in history],
    }


def interval(values: list[float]) -> tuple[float, float]:
    """The mean, and how far to either side its 95 % interval reaches."""
    return fmean(values), T95[len(values) - 1] * stdev(values) / math.sqrt(len(values))


T95 = {2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 7: 2.365, 9: 2.262, 11: 2.201, 15: 2.131, 23: 2.069}
"""Student's t at 97.5 %, by degrees of freedom."""


def report(runs: dict[tuple[str, str, int], dict], out: Path) -> None:
    """A line for each arm, and the differences of each from its part's first as a picture."""
    rows = []
    for name, part in PARTS.items():
        seeds = [seed for seed in range(part.seeds) if all((name, arm, seed) in runs for arm in part.arms)]
        if len(seeds) - 1 not in T95:
            continue
        base, *_ = part.arms
        for arm in part.arms:
            of = lambda key, arm=arm: [runs[name, arm, seed][key] for seed in seeds]
            gains = {key: interval([a - b for a, b in zip(of(key), of(key, base))]) for key in ("last", "mean")}
            blamed = [share for share in of("blamed") if share is not None]
            rows.append((name, arm, gains["last"], arm == base))
            print(
                f"{name:24} {arm:20} {len(seeds):3} seeds  kept at the end {100 * fmean(of('last')):5.1f}"
                + ("" if arm == base else "".join(f"  {key} {100 * m:+5.1f} ± {100 * e:3.1f}" for key, (m, e) in gains.items()))
                + (f"  blamed {fmean(blamed):.0%}" if blamed else "")
            )
    plot_differences([(f"{name}: {arm}", *gain) for name, arm, gain, first in rows if not first], out / "study.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", nargs="?", help="HOST:PORT of a server: run the parts that need one, and only these")
    parser.add_argument("--parts", nargs="*", help=f"only these: {'; '.join(PARTS)}")
    parser.add_argument("--report", action="store_true", help="say what is known, run nothing")
    parser.add_argument("--drawings", type=Path, default=DEFAULT_FOLDER)
    parser.add_argument("--out", type=Path, default=Path("target/grpo_layout"), help="a folder (target/grpo_layout)")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    file, runs = args.out / "runs.jsonl", {}
    for line in file.read_text().splitlines() if file.exists() else []:
        said = json.loads(line)
        runs[said["part"], said["arm"], said["seed"]] = said
    drawings = Drawings(args.drawings, WORLD.words)
    wanted = {} if args.report else {n: p for n, p in PARTS.items() if p.live == bool(args.target) and n in (args.parts or PARTS)}
    cells = [(n, p, arm, seed) for n, p in wanted.items() for seed in range(p.seeds) for arm in p.arms]
    for i, (name, part, arm, seed) in enumerate(cells):
        if (name, arm, seed) in runs:
            continue
        start = time.monotonic()
        if part.live:
            with SpatialScoreClient(args.target, timeout=300) as client:
                found = run(part, arm, seed, Scorer(client, drawings, WORLD.shadow), drawings)
        else:
            found = run(part, arm, seed, Judge(part.noise, seed), drawings)
        runs[name, arm, seed] = {"part": name, "arm": arm, "seed": seed, **found}
        with file.open("a") as lines:
            print(json.dumps(runs[name, arm, seed]), file=lines)
        print(
            f"{i + 1}/{len(cells)}  {name}, {arm}, seed {seed}: {found['last']:.1%} kept,"
            f" {time.monotonic() - start:.1f} s", flush=True
        )  # fmt: skip
    report(runs, args.out)


if __name__ == "__main__":
    main()
