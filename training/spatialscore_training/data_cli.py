"""Pairs of pictures that differ in a spatial relation, composed from named drawings.

    spatialreward-data fetch                                   the drawings, by npm, into .cache/drawings; --styles for others
    spatialreward-data make pairs --preset paper               80,000 pairs with the paper's words, relations and perturbations
    spatialreward-data make mine --pairs 2000 --seed 1         a world of all relations, with shorter prompts
    spatialreward-data make wide --preset wide --pairs 2000    in the grammar's words, with things missing or there twice
    spatialreward-data make plain --pairs 2000 --seed 1 --relations plain --things 2 2 --clauses 1 1
    spatialreward-data stats pairs                             pairs/stats.png and pairs/stats.html
    spatialreward-data validate pairs                          also for pairs of your own
    spatialreward-data export pairs hub                        Parquet and a data card, as the Hugging Face hub has them
    spatialreward-data export train=pairs test=held-out hub    splits by name

What is made depends on the arguments alone. A run that was stopped goes on where it stood; a folder that holds something
else is refused.
"""

import argparse
import sys
from itertools import islice
from pathlib import Path

from .data_sets import home
from .drawings import DEFAULT_FOLDER, EVERY_STYLE, LOOKS, STYLES, fetch, kinds
from .files import Refusal, command
from .figures import draw_figures
from .hub import export
from .manifest import validate, write_pairs
from .relations import EVERY, PLAIN, RULES
from .scenes import World
from .survey import Survey


RELATIONS = {"plain": PLAIN, "all": tuple(RULES), "every": tuple(EVERY)}
PRESETS = {
    # arXiv 2602.24233: 80,000 pairs; 40 to 100 words, most often 59; 3 to 12 relations, most often 7.
    "paper": dict(pairs=80000, things=(4, 8), clauses=(3, 12), words=(40, 100), relations="all"),
    # What people type and policies paint.
    "wide": dict(kinds=len(kinds()), things=(2, 6), clauses=(1, 4), words=(1, 100), relations="every", grammar=0.8, lost=0.3, doubled=0.1),
}


def make(options: argparse.Namespace) -> None:
    world = World(
        kinds=options.kinds,
        things=tuple(options.things),
        size=tuple(options.size),
        relations=RELATIONS[options.relations],
        clauses=tuple(options.clauses),
        phrasings=(-2, 99) if options.phrasings == "held-out" else (0, 99),
        styles=tuple(options.styles),
        shadow=options.shadow,
        depth=0.0 if options.relations == "plain" else 0.15,
        length=tuple(options.words),
        paper=options.preset == "paper",
        grammar=options.grammar,
        held_out=options.phrasings == "held-out",
        lost=options.lost,
        doubled=options.doubled,
        looks=tuple(options.looks),
    )
    write_pairs(options.folder, world, options.drawings, options.seed, options.side, options.pairs, options.jobs)


def stats(options: argparse.Namespace) -> None:
    print(draw_figures(options.folder, options.out or home(options.folder)))


def check(options: argparse.Namespace) -> None:
    survey = Survey()
    faults = list(islice(validate(options.folder, survey), 100))
    print("\n".join(faults) or f"{options.folder}: no faults")
    print("".join(f"warning: {warning}\n" for warning in survey.warnings()), end="")
    sys.exit(bool(faults))


def split(text: str) -> tuple[str, Path]:
    """[SPLIT=]PATH."""
    name, equals, path = text.partition("=")
    return (name, Path(path)) if equals and "/" not in name else ("train", Path(text))


def publish(options: argparse.Namespace) -> None:
    if len(sources := dict(options.pairs)) < len(options.pairs):
        raise Refusal("two data sets have the same split; name each: SPLIT=PATH")
    export(sources, options.out)
    print(f"{options.out / 'README.md'}")


@command
def main() -> None:
    parser = argparse.ArgumentParser(prog="spatialreward-data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--drawings", type=Path, default=DEFAULT_FOLDER, help="folder STYLE/WORD.png (default: %(default)s)")
    commands = parser.add_subparsers(required=True)

    fetching = commands.add_parser("fetch", help="get the drawings from npm")
    fetching.add_argument("--styles", nargs="+", choices=EVERY_STYLE, default=STYLES, help="sets of drawings (default: %(default)s)")
    fetching.set_defaults(run=lambda options: fetch(options.drawings, options.styles))

    making = commands.add_parser("make", help="write a data set", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    making.add_argument("folder", type=Path, help="where to")
    making.add_argument("--preset", choices=PRESETS, help="what follows as a paper has it, where nothing else is said")
    making.add_argument("--pairs", type=int, default=80000, help="how many")
    making.add_argument("--seed", type=int, default=0, help="another seed, other pairs")
    making.add_argument("--side", type=int, default=224, help="of the pictures, in pixels")
    making.add_argument("--kinds", type=int, default=World().kinds, help="how many kinds of thing, from the top of kinds.tsv")
    making.add_argument("--things", type=int, nargs=2, default=(2, 8), metavar=("LEAST", "MOST"), help="things in a scene")
    making.add_argument("--size", type=float, nargs=2, default=(0.16, 0.34), metavar=("LEAST", "MOST"), help="of a thing, as a fraction of the side")
    making.add_argument("--relations", choices=RELATIONS, default="all", help="plain: left, right, above, below; every: also near, far, what is there, and denied ones")
    making.add_argument("--clauses", type=int, nargs=2, default=(1, 12), metavar=("LEAST", "MOST"), help="relations in a prompt")
    making.add_argument("--words", type=int, nargs=2, default=(8, 100), metavar=("LEAST", "MOST"), help="in a prompt")
    making.add_argument("--phrasings", choices=("training", "held-out"), default="training", help="which ways of saying it")
    making.add_argument("--styles", nargs="+", choices=EVERY_STYLE, default=STYLES, help="of the drawings")
    making.add_argument("--shadow", type=float, default=World().shadow, help="how far a thing casts one, as a fraction of the side")
    making.add_argument("--grammar", type=float, default=0.0, help="share of prompts by the grammar")
    making.add_argument("--lost", type=float, default=0.0, help="share of twins that lack a thing, have another in its place or have one twice")
    making.add_argument("--doubled", type=float, default=0.0, help="share of scenes with one thing, or two, twice to four times")
    making.add_argument("--looks", nargs="+", choices=LOOKS, default=(), help="of the drawings in half of the scenes")
    making.add_argument("--jobs", type=int, help="processes; one a core if not given")
    making.set_defaults(run=make)

    counting = commands.add_parser("stats", help="figures as PNG and HTML")
    counting.add_argument("folder", type=Path, help="of the data set, or a file of pairs")
    counting.add_argument("--out", type=Path, help="where the figures go (default: the data set's folder)")
    counting.set_defaults(run=stats)

    checking = commands.add_parser("validate", help="check a data set, yours or ours")
    checking.add_argument("folder", type=Path, help="of the data set, or a file of pairs")
    checking.set_defaults(run=check)

    exporting = commands.add_parser("export", help="write Parquet with a data card, for the Hugging Face hub and `datasets`")
    exporting.add_argument("pairs", type=split, nargs="+", metavar="[SPLIT=]PAIRS", help="a data set's folder, or a file of pairs; of the split `train` if none is named")
    exporting.add_argument("out", type=Path, help="where to")
    exporting.set_defaults(run=publish)

    options = parser.parse_args()
    if preset := PRESETS.get(getattr(options, "preset", None)):
        making.set_defaults(**preset)
        options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
