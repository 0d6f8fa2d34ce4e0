"""Learning curves as pictures."""

import csv
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

ACCURACIES = ("kinds", "depth", "clauses", "broken", "reward", "pairs")


def plot_curves(folder: Path) -> None:
    """`curves.png` of a run: for each stage, what share of its answers was right, step by step."""
    stages = sorted(folder.glob("*.csv"), key=lambda path: path.stat().st_mtime)
    if not stages:
        return
    figure, axes = pyplot.subplots(1, len(stages), figsize=(5 * len(stages), 4), squeeze=False, sharey=True)
    for axis, path in zip(axes[0], stages):
        lines = list(csv.DictReader(path.open()))
        for name in ACCURACIES:
            if lines and name in lines[0]:
                axis.plot([int(line["step"]) for line in lines], [float(line[name]) for line in lines], label=name)
        axis.set(title=path.stem, xlabel="step", ylim=(0, 1))
        axis.grid(alpha=0.3)
        axis.legend()
    axes[0][0].set_ylabel("share of right answers")
    figure.tight_layout()
    figure.savefig(folder / "curves.png", dpi=110)
    pyplot.close(figure)
