"""The report of a checkpoint that was measured, as a page of Markdown with its figures.

    python -m spatialscore_training.report target/eval --out models/spatialscore-mini/report

Reads what `spatialscore-eval` wrote into each data set's folder, and draws: accuracy by relation and by number of
relations, accuracy against the model's own certainty, and pairs with their prompts and scores, right and wrong.
"""

import argparse
import json
import textwrap
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from .evaluate import percent
from .files import command, keep_apart
from .pictures import open_picture, picture_named

SHOWN = 4
"""Pairs of each data set on the page of examples, half of them the gravest mistakes."""


class Measured(NamedTuple):
    """A data set under the checkpoint."""

    name: str
    shares: dict
    """`eval.json`."""
    pairs: list[dict]
    """`scores.json`."""


def measured(folder: Path) -> list[Measured]:
    """Every data set in a folder that was measured, baselines behind their data set."""
    found = sorted(folder.rglob("eval.json"), key=lambda path: path.parent)
    read = lambda path: json.loads(path.read_text())
    return [Measured(str(path.parent.relative_to(folder)), read(path), read(path.with_name("scores.json"))) for path in found]


def _bars(axis, title: str, group: dict[str, dict]) -> None:
    """Accuracies with their intervals."""
    middles = [share["accuracy"] for share in group.values()]
    # An interval may end a rounding error short of 1.
    reach = [[max(0, way) for way in ways] for ways in zip(*((s["accuracy"] - s["low"], s["high"] - s["accuracy"]) for s in group.values()))]
    axis.bar(list(group), middles, yerr=reach, color="#3b6ea5", ecolor="#222", capsize=3)
    axis.axhline(0.5, color="#999", linewidth=1)
    axis.set(title=title, ylim=(0, 1.02), ylabel="pairs in the right order")
    axis.tick_params(axis="x", rotation=60)


def draw_accuracies(sets: list[Measured], path: Path) -> None:
    """By relation, by number of relations, and against certainty."""
    figure, axes = pyplot.subplots(len(sets), 3, figsize=(16, 4.6 * len(sets)), squeeze=False)
    for row, one in zip(axes, sets):
        numbers = dict(sorted(one.shares["by number of relations"].items(), key=lambda entry: int(entry[0])))
        _bars(row[0], f"{one.name}: by broken relation", one.shares["by relation"])
        _bars(row[1], f"{one.name}: by number of relations", numbers)
        _bars(row[2], f"{one.name}: by the model's own certainty", one.shares["by certainty"])
    figure.tight_layout()
    figure.savefig(path, dpi=70)
    pyplot.close(figure)


def draw_examples(one: Measured, path: Path) -> None:
    """The first pairs that are right and the gravest mistakes, each with its prompt and both scores."""
    right = [pair for pair in one.pairs if pair["right"] == 1][: SHOWN // 2]
    wrong = sorted((p for p in one.pairs if p["right"] < 1), key=lambda p: p["kept"]["mean"] - p["broken"]["mean"])
    shown = right + wrong[: SHOWN - len(right)]
    figure, axes = pyplot.subplots(len(shown), 2, figsize=(7, 4.3 * len(shown)), squeeze=False)
    for row, pair in zip(axes, shown):
        for axis, name in zip(row, ("kept", "broken")):
            score = pair[name]
            axis.imshow(open_picture(picture_named(score["picture"])))
            axis.set_axis_off()
            spread = f" ± {score['stddev']:.2f}" if score["stddev"] is not None else ""
            axis.text(0.5, -0.06, f"{'keeps' if name == 'kept' else 'breaks'} it: {score['mean']:+.2f}{spread}",
                      transform=axis.transAxes, ha="center", fontsize=10, color="black" if name == "kept" else "#a33")  # fmt: skip
        verdict = "right" if pair["right"] == 1 else "WRONG"
        row[0].set_title(f"{verdict}: " + textwrap.fill(pair["prompt"], 84), loc="left", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=70)
    pyplot.close(figure)


def page(sets: list[Measured], command: str) -> str:
    """The report in Markdown."""
    rows = "\n".join(f"| {one.name} | {percent(one.shares['all'])} | {one.shares['all']['pairs']:,} |" for one in sets)
    plain = [one for one in sets if "/" not in one.name]
    tables = "\n".join(
        f"\n### {one.name}, {title}\n\n| | accuracy | pairs |\n|---|---|---|\n"
        + "\n".join(f"| {name} | {percent(share)} | {share['pairs']:,} |" for name, share in group.items())
        for one in plain
        for title, group in one.shares.items()
        if title not in ("model", "all") and len(group) > 1
    )
    examples = "\n".join(f"\n### {one.name}\n\n![Pairs of {one.name}]({one.name}.png)" for one in plain)
    return f"""# {sets[0].shares["model"]}

How often the picture that keeps its prompt scores above its perturbed twin, with 95 % intervals (Wilson). Chance is 50 %.
Everything on this page is made by

    {command}

| pairs | accuracy | number |
|---|---|---|
{rows}

Names with a `/` are baselines: the same pairs without what should tell them apart.

![Accuracies](accuracies.png)
{tables}

## Examples
The first pairs of each data set that came out right, then its gravest mistakes.
{examples}
"""


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measured", type=Path, help="a folder of data sets that `spatialscore-eval` measured")
    parser.add_argument("--out", type=Path, required=True, help="where the report goes")
    parser.add_argument("--command", default="make report", help="what made all of it (default: %(default)s)")
    options = parser.parse_args()
    keep_apart(options.out, measured=options.measured)
    sets = measured(options.measured)
    if not sets:
        raise SystemExit(f"{options.measured}: no eval.json below it; run spatialscore-eval first")
    options.out.mkdir(parents=True, exist_ok=True)
    plain = [one for one in sets if "/" not in one.name]
    draw_accuracies(plain, options.out / "accuracies.png")
    for one in plain:
        draw_examples(one, options.out / f"{one.name}.png")
    (options.out / "README.md").write_text(page(sets, options.command))
    print(options.out / "README.md")


if __name__ == "__main__":
    main()
