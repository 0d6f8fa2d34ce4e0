"""Joins the eyes of one state and the reader of another into a state that `export` takes, without a step of training.

    python -m spatialscore_training.merge EYES.pt READER.pt OUT.pt
"""

import argparse
from pathlib import Path

import torch

from .files import beside, command, keep_apart


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("eyes", type=Path, help="state of a stage that trains `eyes`")
    parser.add_argument("reader", type=Path, help="state of a stage that trains `reader`")
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    eyes, reader = (torch.load(path, map_location="cpu", weights_only=True) for path in (options.eyes, options.reader))
    seen = {name: weight for name, weight in eyes["model"].items() if name.startswith("model.visual.")}
    keep_apart(options.out, eyes=options.eyes, reader=options.reader)
    with beside(options.out) as part:
        torch.save({"model": reader["model"] | seen, "step": reader["step"]}, part)


if __name__ == "__main__":
    main()
