"""The example's pictures."""

from pathlib import Path
from statistics import fmean
from textwrap import fill
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from PIL import Image


class Glance(NamedTuple):
    """Some held-out prompts' pictures at one time of the training."""

    pictures: int
    """That were scored for the training before."""
    images: list[Image.Image]
    scores: list[float]
    kept: list[float]
    """What share of its prompt's relations each keeps, by geometry."""


def plot_curves(history, glances: list[Glance], path: Path) -> None:
    """Score and accuracy over the pictures scored, and how far the scorer and geometry agree."""
    pictures = [step.pictures for step in history]
    figure, (top, bottom) = pyplot.subplots(2, 1, figsize=(8, 7), sharex=True, height_ratios=(3, 1))
    label = "relations kept, held-out prompts (geometry)"
    lines = top.plot(pictures, [step.accuracy for step in history], color="tab:green", label=label)
    top.axhline(0.85, color="tab:green", linestyle=":", linewidth=1)
    top.set(ylim=(0, 1), ylabel="relations kept")
    scores = top.twinx()
    label = "mean score of a training batch (all that trains)"
    lines += scores.plot(pictures, [step.score for step in history], color="tab:blue", alpha=0.25, label=label)
    label = f"mean score, {len(glances[0].scores)} held-out prompts"
    points = [glance.pictures for glance in glances], [fmean(glance.scores) for glance in glances]
    lines += scores.plot(*points, color="tab:blue", marker="o", label=label)
    scores.set_ylabel("score")
    top.legend(lines, [line.get_label() for line in lines], loc="lower right")
    for first in range(0, len(history), 5):
        steps = history[first : first + 5]
        if pairs := sum(step.pairs for step in steps):
            agreement = sum(step.agreed for step in steps) / pairs
            bottom.plot([steps[0].pictures, steps[-1].pictures], [agreement] * 2, color="tab:gray", linewidth=3)
    bottom.axhline(0.5, color="tab:red", linestyle=":", linewidth=1)
    bottom.set(ylim=(0, 1), xlabel="pictures scored", ylabel="scorer agrees\nwith geometry")
    _save(figure, path)


def plot_differences(rows: list[tuple[str, float, float]], path: Path) -> None:
    """A point and its interval for each named difference, in points of relations kept."""
    figure, axis = pyplot.subplots(figsize=(8, 1 + 0.28 * len(rows)))
    names, means, reaches = zip(*rows)
    places = range(len(rows), 0, -1)
    axis.errorbar([100 * each for each in means], places, xerr=[100 * each for each in reaches], fmt="o", capsize=3)
    axis.axvline(0, color="tab:gray", linewidth=1)
    axis.set_yticks(places, names, fontsize=8)
    axis.set_xlabel("points of relations kept, held-out prompts, against the first arm (95 %)")
    _save(figure, path)


def plot_strip(tasks, glances, path: Path) -> None:
    """The same prompts on the same backgrounds before and after, with score and geometry."""
    figure, rows = pyplot.subplots(2, len(tasks), figsize=(2.3 * len(tasks), 6.2))
    for axes, (_, images, scores, kept) in zip(rows, glances):
        for axis, image, score, share in zip(axes, images, scores, kept):
            axis.imshow(image)
            axis.set_axis_off()
            axis.set_title(f"{score:.1f}, {share:.0%} kept", fontsize=9, color="green" if share == 1 else "firebrick")
    for axis, task in zip(rows[1], tasks):
        axis.text(0.5, -0.06, fill(task.text, 28), fontsize=8, ha="center", va="top", transform=axis.transAxes)
    figure.suptitle("above: before training; below: after it. Score, and what share of relations geometry finds kept")
    _save(figure, path)


def _save(figure, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
