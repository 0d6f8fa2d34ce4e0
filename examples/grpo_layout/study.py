#!/usr/bin/env python3
"""What the top-k filter and the KL term do, over many runs with the same seeds in each arm.

    study.py                 rewards are what geometry says, blurred by noise: no server, no pictures
    study.py HOST:PORT       rewards are a running server's scores

Each run is a line of `runs.jsonl` in --out, with what it was made with; those that are there are not run again. At the
end, and at once with --report, differences between arms are printed with 95 % intervals (Student's t over the seeds'
differences).
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

from grpo import Recipe, Reward, Scorer, accuracy, train
from plots import plot_differences
from policy import Policy
from tasks import WORLD, Form, Layout, Task, Tasks
from train import HELD_OUT, HELD_OUT_SEED

ALL = Recipe(choose=partial(top_k_bottom_k, k=10**6))
"""No filter: a group of no more than 2 k is kept whole."""


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
    prompts: int = 4
    noise: float = 0.3
    """Of the geometric reward: the standard deviation, where one is between all relations kept and none."""
    steep: int = 1
    """Of the geometric reward: the power of the share kept; a scorer that says little until nearly all is right."""
    weakness: float = 0.0
    """Of the geometric reward: what it adds to a layout for all of its things at the top, right or wrong."""
    seeds: int = 16
    live: bool = False
    """Whether the rewards are the server's."""

    def count(self, arm: str) -> int:
        """Of iterations."""
        return self.iterations[arm] if isinstance(self.iterations, dict) else self.iterations

    def made_with(self, arm: str) -> dict:
        """All that a run of this arm depends on, but its seed and who scores."""
        recipe = asdict(self.arms[arm])
        choose = recipe["choose"]
        named = (choose.func.__name__, choose.keywords) if isinstance(choose, partial) else choose.__name__
        return {
            "form": self.form,
            "prompts": self.prompts,
            "judge": None if self.live else [self.noise, self.steep, self.weakness],
            "live": self.live,
            "iterations": self.count(arm),
            "recipe": {**recipe, "choose": repr(named)},
        }


BOTH = {"none": ALL, "filter": Recipe()}
HALF = replace(ALL, choose=at_random)


def each(**changed) -> dict[str, Recipe]:
    """Both, with something else than usual."""
    return {arm: replace(recipe, **changed) for arm, recipe in BOTH.items()}


def grouped(size: int) -> dict[str, Recipe]:
    """Both in groups of another size, of which the filter keeps half too."""
    return {"none": replace(ALL, group=size), "filter": Recipe(partial(top_k_bottom_k, k=size // 4), size)}


def held(*weights: float) -> dict[str, Recipe]:
    """No filter, and the policy held to what it was after ten iterations."""
    return {f"kl {kl}": replace(ALL, kl=kl, warm=10) for kl in weights}


PARTS = {
    # Without a server.
    "easy": Part({**BOTH, "half at random": HALF, "filter, advantages of all": replace(ALL, choose=by_the_group)}),
    "easy, k": Part({"none": ALL, **{f"filter, k {k}": Recipe(partial(top_k_bottom_k, k=k)) for k in (1, 2, 4, 8)}}),
    **{f"easy, noise {noise}": Part(BOTH, noise=noise) for noise in (0.0, 1.2, 2.4)},
    **{f"easy, rate {rate}": Part(each(rate=rate)) for rate in (0.04, 0.08)},
    "easy, 1 epoch": Part(each(epochs=1)),
    **{f"easy, groups of {size}": Part(grouped(size), prompts=96 // size) for size in (12, 48)},
    "easy, 40 iterations": Part(BOTH, iterations=40),
    "easy, as much training": Part(
        {**BOTH, "none, groups of 12": replace(ALL, group=12)},
        iterations={"none": 10, "filter": 20, "none, groups of 12": 20},
    ),
    "hard": Part({**BOTH, "half at random": HALF}, form="hard", iterations=30, seeds=8),
    "hard, 12 iterations": Part(BOTH, form="hard", iterations=12, seeds=8),
    "hard, steep": Part(BOTH, form="hard", iterations=12, noise=0.1, steep=4, seeds=8),
    "hard, as much training": Part(
        {**BOTH, "none, groups of 12": replace(ALL, group=12)},
        form="hard",
        iterations={"none": 10, "filter": 20, "none, groups of 12": 20},
        seeds=8,
    ),
    "kl": Part({"none": ALL, **held(0.01, 0.1, 1.0)}, iterations=30, seeds=8),
    "kl, hacked": Part({"none": ALL, **held(0.01, 0.1, 1.0)}, iterations=30, weakness=1.5, seeds=8),
    # With one.
    "scored, easy": Part(BOTH, seeds=4, live=True),
    "scored, hard": Part(BOTH, form="hard", iterations=12, seeds=3, live=True),
    "scored, hard, learned": Part({"none": ALL}, form="hard", iterations=12, seeds=5, live=True),
}  # fmt: skip


class Judge:
    """What geometry says of each layout, and noise, and what the judge is weak for."""

    def __init__(self, noise: float, seed: int, steep: int = 1, weakness: float = 0.0):
        self.noise, self.steep, self.weakness = noise, steep, weakness
        self.rng = np.random.default_rng(seed)

    def __call__(self, tasks: list[Task], layouts: list[Layout]) -> list[float]:
        kept = [task.kept(layout) ** self.steep for task, layout in zip(tasks, layouts)]
        high = [fmean(1 - thing.y for thing in layout) for layout in layouts]
        return (kept + self.weakness * np.array(high) + self.noise * self.rng.normal(size=len(kept))).tolist()


def run(part: Part, arm: str, seed: int, reward: Reward, drawings: Drawings) -> dict:
    """One run: what it ended with on the held-out prompts, and its curve on twenty of them."""
    held_out = Tasks(drawings, HELD_OUT_SEED, held_out=True, form=part.form).some(HELD_OUT)
    policy, tasks = Policy(seed), Tasks(drawings, seed, held_out=False, form=part.form)
    counts = {"iterations": part.count(arm), "prompts": part.prompts}
    history = train(policy, reward, tasks, held_out[:20], recipe=part.arms[arm], **counts)
    blamed = [step.blamed for step in history if step.blamed is not None]
    return {
        "last": accuracy(policy, held_out),
        "mean": fmean(step.accuracy for step in history),
        "blamed": fmean(blamed) if blamed else None,
        "history": [asdict(step) for step in history],
    }


def known(file: Path, served: str | None) -> dict[tuple[str, str, int], dict]:
    """The runs of a file that were made as their part makes them today and, where one is served, with this model."""
    runs = {}
    for line in file.read_text().splitlines() if file.exists() else []:
        said = json.loads(line)
        part = PARTS.get(said["part"])
        same = part and said["arm"] in part.arms and said["made_with"] == part.made_with(said["arm"])
        if same and (served is None or said["model"] in (None, served)):
            runs[said["part"], said["arm"], said["seed"]] = said
    return runs


def interval(values: list[float]) -> tuple[float, float]:
    """The mean, and how far to either side its 95 % interval reaches."""
    return fmean(values), T95[min(len(values) - 1, len(T95)) - 1] * stdev(values) / math.sqrt(len(values))


T95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
"""Student's t at 97.5 %, for one degree of freedom, two, and so on; beyond thirty it hardly falls."""


def report(runs: dict[tuple[str, str, int], dict], out: Path) -> None:
    """A line for each arm, and the differences of each from its part's first as a picture."""
    rows = []
    for name, part in PARTS.items():
        seeds = [seed for seed in range(part.seeds) if all((name, arm, seed) in runs for arm in part.arms)]
        if len(seeds) < 2:
            continue
        base, *_ = part.arms
        for arm in part.arms:
            of = lambda key, arm=arm: [runs[name, arm, seed][key] for seed in seeds]
            gains = {key: interval([a - b for a, b in zip(of(key), of(key, base))]) for key in ("last", "mean")}
            blamed = [share for share in of("blamed") if share is not None]
            line = f"{name:24} {arm:24} {len(seeds):3} seeds  kept at the end {100 * fmean(of('last')):5.1f}"
            if blamed:
                line += f"  blamed {fmean(blamed):3.0%}"
            if arm != base:
                line += "".join(f"  {key} {100 * m:+5.1f} ± {100 * reach:3.1f}" for key, (m, reach) in gains.items())
                rows.append((f"{name}: {arm}", *gains["last"]))
            print(line)
    if rows:
        plot_differences(rows, out / "study.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", nargs="?", help="HOST:PORT of a server: run the parts that need one, and only these")
    parser.add_argument("--parts", nargs="*", help=f"only these: {'; '.join(PARTS)}")
    parser.add_argument("--report", action="store_true", help="say what is known, run nothing")
    parser.add_argument("--drawings", type=Path, default=DEFAULT_FOLDER)
    parser.add_argument("--out", type=Path, default=Path("target/grpo_layout"), help="a folder (target/grpo_layout)")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    served = None
    if args.target:
        with SpatialScoreClient(args.target, timeout=300) as client:
            served = client.model().revision
    file = args.out / "runs.jsonl"
    runs = known(file, served)
    drawings = Drawings(args.drawings, WORLD.words)
    may = lambda name, part: part.live == bool(args.target) and name in (args.parts or PARTS) and not args.report
    wanted = {name: part for name, part in PARTS.items() if may(name, part)}
    cells = [(n, p, arm, seed) for n, p in wanted.items() for seed in range(p.seeds) for arm in p.arms]
    for i, (name, part, arm, seed) in enumerate(cells):
        if (name, arm, seed) in runs:
            continue
        start = time.monotonic()
        if part.live:
            with SpatialScoreClient(args.target, timeout=300) as client:
                found = run(part, arm, seed, Scorer(client, drawings, WORLD.shadow), drawings)
        else:
            found = run(part, arm, seed, Judge(part.noise, seed, part.steep, part.weakness), drawings)
        made_with = part.made_with(arm)
        found = {"part": name, "arm": arm, "seed": seed, "made_with": made_with, "model": served, **found}
        runs[name, arm, seed] = found
        with file.open("a") as lines:
            print(json.dumps(found), file=lines)
        print(
            f"{i + 1}/{len(cells)}  {name}, {arm}, seed {seed}: {found['last']:.1%} kept,"
            f" {time.monotonic() - start:.1f} s", flush=True
        )  # fmt: skip
    report(runs, args.out)


if __name__ == "__main__":
    main()
