"""What each fault of a caller or of a configuration costs: the table of docs/rewards-look-wrong.md.

    PYTHONPATH=training python benches/wrong_inputs.py                  the checkpoint in the box, 200 pairs a row
    PYTHONPATH=training python benches/wrong_inputs.py --pairs 1000

Serves the checkpoint once for each row of the configuration, and sends changed pictures for the others. Needs what
`make goals` needs. The pairs are of its second sort, one thing changed at a time.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator
from io import BytesIO
from math import log
from pathlib import Path
from statistics import fmean

from PIL import Image, ImageOps
from spatialscore_training.calibration import judge
from spatialscore_training.drawings import DEFAULT_FOLDER, Drawings
from spatialscore_training.evaluate import percent
from spatialscore_training.goals import MIXED, pairs
from spatialscore_training.scenes import draw
from spatialscore_training.scorers import Item, ServerScorer

from common import MINI, OUT, ROOT
from servers import ours

Picture = Image.Image


def jpeg(quality: int) -> Callable[[Picture], Picture]:
    def change(picture: Picture) -> Picture:
        file = BytesIO()
        picture.save(file, "JPEG", quality=quality)
        return Image.open(file)

    return change


SAID = json.loads((MINI / "reward_config.json").read_text())
SIDE = 224
CONFIGURED = {
    "nothing": {},
    "`flat` where `mrope` was trained": {"positions": "flat"},
    "another wording around the prompt": {"instruction": "Does the image match this description?\n{prompt}\n<|Reward|>"},
    "`reward_token: last` where a special token was trained": {"reward_token": "last", "special_token": None, "instruction": SAID["instruction"].replace("<|Reward|>", "").rstrip()},
    "pictures of half the side": {"min_pixels": (SIDE // 2) ** 2, "max_pixels": (SIDE // 2) ** 2},
    "pictures of twice the side": {"min_pixels": (SIDE * 2) ** 2, "max_pixels": (SIDE * 2) ** 2},
}
CHANGED: dict[str, Callable[[Picture], Picture]] = {
    "JPEG of quality 75": jpeg(75),
    "JPEG of quality 95": jpeg(95),
    "mirrored": ImageOps.mirror,
    "on its side": lambda picture: picture.transpose(Image.Transpose.ROTATE_90),
    "blue and red swapped": lambda picture: Image.merge("RGB", picture.split()[::-1]),
    "contrast halved, as [0, 1] taken for [-1, 1] gives": lambda picture: picture.point(lambda value: 127.5 + value / 2),
    "all black": lambda picture: Image.new("RGB", picture.size),
}


def row(scorer: ServerScorer, label: str, drawn: list[tuple[str, Picture]], change: Callable[[Picture], Picture]) -> None:
    """Prints a row of the table: of prompts with their pictures, each right one before its wrong one."""

    def items() -> Iterator[Item]:
        for prompt, picture in drawn:
            file = BytesIO()
            change(picture).save(file, "PNG", compress_level=1)
            yield Item(prompt, file.getvalue())

    found = dict(scorer.scores(items()))
    scores = [found[number] for number in range(len(drawn))]
    rewards = [(score.mean, log(score.stddev)) for score in scores]
    right = judge(list(zip(rewards[0::2], rewards[1::2])))
    means = [score.mean for score in scores]
    ahead = fmean(means[0::2]) - fmean(means[1::2])
    print(f"| {label} | {percent(right)} | {ahead:.2f} | {fmean(means):.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=MINI, help="default: %(default)s")
    parser.add_argument("--pairs", type=int, default=200, help="of each row (default: %(default)s)")
    parser.add_argument("--drawings", type=Path, default=DEFAULT_FOLDER, help="folder STYLE/WORD.png (default: %(default)s)")
    options = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    drawings = Drawings(options.drawings, MIXED.words, MIXED.styles)
    chosen = (pair for _, pair in pairs(MIXED, 2, options.pairs, drawings))
    drawn = [(pair.prompt.text, draw(scene, SIDE, drawings)) for pair in chosen for scene in (pair.kept, pair.broken)]
    print("| what is wrong | pairs in the right order | mean difference in a pair | mean of all scores |\n|---|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as folder:
        for label, changes in CONFIGURED.items():
            path = Path(folder) / "reward_config.json"
            path.write_text(json.dumps({key: value for key, value in (SAID | changes).items() if value is not None}))
            with ours(options.checkpoint, OUT, "--reward-config", path) as (_, address, _):
                scorer = ServerScorer(address, ROOT / "proto")
                row(scorer, label, drawn, lambda picture: picture)
                for name, change in CHANGED.items() if label == "nothing" else ():
                    row(scorer, name, drawn, change)


if __name__ == "__main__":
    main()
