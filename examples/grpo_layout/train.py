#!/usr/bin/env python3
"""GRPO trains a small policy that places drawings, on nothing but the scores of a running SpatialScore server.

    train.py [HOST:PORT]            the whole example: learns and plots
    train.py [HOST:PORT] --hard     the same with five to eight things and three to twelve relations
    train.py [HOST:PORT] --short    two things and one relation, three seeds; exits 1 where the gain is not clear

HOST:PORT is SPATIALSCORE_ADDRESS where it is not given. Geometry is measured on the way and shown beside the scores; no
policy ever sees it.
"""

import argparse
import json
import math
import os
import sys
import urllib.request
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
from spatialscore_client import SpatialScoreClient
from spatialscore_training.drawings import DEFAULT_FOLDER, Drawings

from grpo import GROUP, Recipe, Reward, Scorer, Step, accuracy, lay_out, train
from plots import Glance, plot_curves, plot_strip
from policy import Policy
from tasks import WORLD, Task, Tasks

HELD_OUT = 100
"""Prompts on which accuracy is measured."""
HELD_OUT_SEED = 10_000
"""Policies are trained on the prompts of the seeds from 0 on."""
WATCHED = 48
"""Of these, those of which a picture is scored now and then, to show."""
SHOWN = 8
"""Of these, those whose pictures are kept."""


def full(scorer: Scorer, args: argparse.Namespace) -> bool:
    """Whether a policy gets from chance to the goal; its curves and pictures."""
    form = "hard" if args.hard else "easy"
    held_out = Tasks(scorer.drawings, HELD_OUT_SEED, held_out=True, form=form).some(HELD_OUT)
    policy, glances = Policy(0), []
    watch = lambda pictures: glances.append(glance(pictures, scorer, policy, held_out[:WATCHED]))
    published = Published()
    tasks, recipe = Tasks(scorer.drawings, 0, held_out=False, form=form), Recipe(kl=args.kl, warm=args.warm)
    counts = {"iterations": args.iterations, "prompts": args.prompts}
    history = train(policy, scorer, tasks, held_out, **counts, recipe=recipe, name="policy", watch=watch)
    watch(args.iterations * args.prompts * GROUP)
    plot_curves(history, glances, args.out / "curves.png")
    plot_strip(held_out[:SHOWN], (glances[0], glances[-1]), args.out / "strip.png")
    result = {
        "model": asdict(scorer.client.model()),
        "pictures": scorer.pictures,
        "pictures_per_second": scorer.pictures / scorer.seconds,
        "relations_kept": {"before": history[0].accuracy, "after": accuracy(policy, held_out)},
        "held_out_pictures": [summary(each) for each in glances],
        "recipe": {"kl": recipe.kl, "warm": recipe.warm, "rate": recipe.rate},
        "quarters": quarters(history),
        "published_mean_score": published.mean(),
        "history": [asdict(step) for step in history],
    }
    report(result, args.out)
    return result["relations_kept"]["after"] >= args.goal


def report(result: dict, folder: Path) -> None:
    """`result.json`, and what is short of it printed."""
    (folder / "result.json").write_text(json.dumps(result, indent=1))
    print(json.dumps({key: value for key, value in result.items() if key not in ("history", "model")}, indent=1))


def glance(pictures: int, scorer: Scorer, policy: Policy, tasks: list[Task]) -> Glance:
    """What the policy does after so many pictures: one of each task, on the same background at each call."""
    _, _, layouts = lay_out(policy, tasks, 1)
    images = scorer.draw(layouts, list(range(len(tasks))))
    kept = [task.kept(layout) for task, layout in zip(tasks, layouts)]
    return Glance(pictures, images, scorer.score(tasks, images), kept)


def summary(glance: Glance) -> dict[str, float | None]:
    """The mean score of pictures, also of those that keep all of their prompt and of the others: a policy that pleases
    the scorer without the geometry has many of the second sort, and they score like the first."""
    whole = [score for score, share in zip(glance.scores, glance.kept) if share == 1]
    broken = [score for score, share in zip(glance.scores, glance.kept) if share < 1]
    return {
        "pictures": glance.pictures,
        "mean_score": fmean(glance.scores),
        "relations_kept": fmean(glance.kept),
        "all_kept": len(whole) / len(glance.kept),
        "mean_score_of_all_kept": fmean(whole) if whole else None,
        "mean_score_of_others": fmean(broken) if broken else None,
    }


def quarters(history: list[Step]) -> list[dict[str, float | None]]:
    """Score, accuracy and agreement in each quarter of the training. Score up and accuracy not: reward hacking."""
    found, size = [], math.ceil(len(history) / 4)
    for first in range(0, len(history), size):
        steps = history[first : first + size]
        pairs = sum(step.pairs for step in steps)
        means = {name: fmean(getattr(step, name) for step in steps) for name in ("score", "accuracy")}
        found.append({**means, "agreement": sum(step.agreed for step in steps) / pairs if pairs else None})
    return found


class Published:
    """The mean of all scores since this was made, as an operator reads it from the server's metrics."""

    def __init__(self) -> None:
        self.url = os.environ.get("SPATIALSCORE_METRICS")
        self.start = self._read()

    def mean(self) -> float | None:
        """None where SPATIALSCORE_METRICS does not say where the metrics are, or nothing was scored."""
        total, count = (now - then for now, then in zip(self._read(), self.start))
        return total / count if count else None

    def _read(self) -> tuple[float, float]:
        if not self.url:
            return 0.0, 0.0
        with urllib.request.urlopen(self.url, timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        values = lambda name: (float(line.split()[-1]) for line in lines if line.startswith(name))
        return sum(values("spatialscore_score_mean_sum")), sum(values("spatialscore_score_mean_count"))


def short(scorer: Scorer, args: argparse.Namespace) -> bool:
    """Whether three seeds gain clearly more by the scores than eight seeds do by noise."""
    held_out = Tasks(scorer.drawings, HELD_OUT_SEED, held_out=True, form="one").some(HELD_OUT)

    def gain(reward: Reward, seed: int, name: str = "") -> float:
        policy, tasks = Policy(seed), Tasks(scorer.drawings, seed, held_out=False, form="one")
        start = accuracy(policy, held_out)
        train(policy, reward, tasks, held_out, iterations=args.iterations, prompts=args.prompts, name=name)
        return accuracy(policy, held_out) - start

    rng = np.random.default_rng(0)
    noise = [gain(lambda tasks, _: rng.normal(size=len(tasks)).tolist(), seed) for seed in range(8)]
    gains = [gain(scorer, seed, f"seed {seed}") for seed in range(3)]
    error = math.hypot(stdev(gains) / math.sqrt(len(gains)), stdev(noise) / math.sqrt(len(noise)))
    ahead = (fmean(gains) - fmean(noise)) / error
    clear = ahead >= 4 and min(gains) > max(noise)
    print(
        f"relations kept on held-out prompts: {fmean(gains):+.1%} by the scores"
        f" ({', '.join(f'{each:+.1%}' for each in gains)}), {fmean(noise):+.1%} by noise"
        f" ({min(noise):+.1%} to {max(noise):+.1%}); {ahead:.1f} standard errors apart:"
        f" {'clear' if clear else 'NOT CLEAR'}"
    )
    return clear


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", nargs="?", default=os.environ.get("SPATIALSCORE_ADDRESS", "127.0.0.1:50051"))
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--short", action="store_true", help="the two-minute form")
    form.add_argument("--hard", action="store_true", help="prompts like the paper's")
    parser.add_argument("--iterations", type=int, help="of a policy's training (40; 15 in the short form)")
    parser.add_argument("--prompts", type=int, default=4, help=f"groups of {GROUP} in an iteration (4)")
    parser.add_argument("--kl", type=float, default=0.0, help="the weight of the KL term (0: none)")
    parser.add_argument("--warm", type=int, default=10, help="after so many iterations: its reference (10)")
    parser.add_argument("--goal", type=float, help="the share of relations below which it fails (0.85; hard 0.6)")
    parser.add_argument("--shadow", type=float, default=WORLD.shadow, help=f"how far shadows reach ({WORLD.shadow})")
    parser.add_argument("--drawings", type=Path, default=DEFAULT_FOLDER)
    parser.add_argument("--out", type=Path, default=Path("target/grpo_layout"), help="a folder (target/grpo_layout)")
    args = parser.parse_args()
    args.iterations = args.iterations or (15 if args.short else 40)
    args.goal = (0.6 if args.hard else 0.85) if args.goal is None else args.goal
    args.out.mkdir(parents=True, exist_ok=True)
    with SpatialScoreClient(args.target, timeout=300) as client:
        served = client.model()
        print(f"{args.target} serves {served.name} {served.revision}", flush=True)
        scorer = Scorer(client, Drawings(args.drawings, WORLD.words), args.shadow)
        sys.exit(0 if (short if args.short else full)(scorer, args) else 1)


if __name__ == "__main__":
    main()
