"""The processor alone, pictures per second and core, against the reference processor (transformers, PIL backend).

    processor.py [--rounds N]

1024×1024 to 448×448 and to the largest size of the reference's defaults, as PNG, JPEG, WebP and raw RGB; file and prompt
to what the model reads. One thread each: a server has as many of these side by side as it has cores.
"""

import argparse
import json
import shutil
import statistics
import time

import numpy as np
import torch
from PIL import Image

from common import MINI, OUT, Ours, pictures, prompts, ratio, save, show, take_turns
from reference import Reference

GOAL = 3.0
SIDE = 1024
# HPSv3's recipe, and the reference's own greatest size for chat.
PIXELS = (448 * 448, 1280 * 28 * 28)


def with_pixels(limit):
    """The built-in checkpoint, told to resize to at most so many pixels."""
    directory = OUT / f"mini-{limit}"
    shutil.copytree(MINI, directory, dirs_exist_ok=True)
    path = directory / "reward_config.json"
    said = json.loads(path.read_text()) | {"min_pixels": 3136, "max_pixels": limit}
    path.write_text(json.dumps(said))
    return directory


def reader(form, path):
    if form == "rgb":
        return lambda: Image.fromarray(np.frombuffer(path.read_bytes(), np.uint8).reshape(SIDE, SIDE, 3))
    return lambda: Image.open(path).convert("RGB")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows, text = [], prompts(1)[0]
    for limit in PIXELS:
        checkpoint = with_pixels(limit)
        reference = Reference(checkpoint)
        rendered = reference.render(text)
        with Ours(checkpoint, 1) as ours:
            for form in ("png", "jpeg", "webp", "rgb"):
                path = pictures(OUT / "pictures", 1, (SIDE, SIDE), form)[0]
                read = reader(form, path)
                item = {"prompt": text, "image": path}
                ours.ask(load=[item | ({"width": SIDE, "height": SIDE} if form == "rgb" else {})])

                def time_theirs():
                    start = time.perf_counter()
                    reference.processor(text=[rendered], images=[read()], return_tensors="pt")
                    return time.perf_counter() - start

                seconds = take_turns(
                    arguments.rounds, {"ours": lambda: ours.ask(process=[0])["seconds"], "theirs": time_theirs}
                )
                rows.append(
                    {
                        "picture": form,
                        "to pixels": limit,
                        "ours, pictures/s": 1 / statistics.median(seconds["ours"]),
                        "reference, pictures/s": 1 / statistics.median(seconds["theirs"]),
                        "times as fast": ratio(seconds, "ours", "theirs"),
                        "goal": GOAL,
                    }
                )
    print(f"Processor, {SIDE}×{SIDE}, one core each")
    show(rows)
    save("processor", rows)


if __name__ == "__main__":
    main()
