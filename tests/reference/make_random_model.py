"""Makes `models/spatialscore-mini`: a checkpoint of random weights, until a trained one takes its place.

    python tests/reference/make_random_model.py OUT [--seed S]

OUT becomes a checkpoint directory of some 5 MB: Qwen2.5-VL with 4 vision blocks of 128 and 4 decoder layers of 192,
pictures of 224 by 224, byte pairs learnt from sentences about spatial relations, a Gaussian reward read at
`<|Reward|>`. Its numbers depend on prompt and picture, and mean nothing; reward_config.json says so.
"""

import argparse
import shutil
from pathlib import Path

import torch

from checkpoints import REWARD_TOKEN, write_checkpoint
from pictures import drawing
from reference import Reference

SIDE = 224

RECIPE = dict(
    dtype="bf16",
    tied=True,
    keys="new",
    config="new",
    vocabulary=2000,
    template="jinja",
    pixels=(SIDE * SIDE, SIDE * SIDE),
    min_pixels=SIDE * SIDE,
    max_pixels=SIDE * SIDE,
    instruction="Rate how well the picture keeps the spatial relations that this prompt states.\n"
    f"Prompt: {{prompt}}\n{REWARD_TOKEN}",
    reward_token=REWARD_TOKEN,
    positions="mrope",
    output="gaussian",
    head=(0, 2, 4),
    widths=(64, 16),
    notice="seeded random weights: the scores mean nothing",
    vision=dict(depth=4, hidden=128, intermediate=160, heads=4, window=112, full=[1, 3]),
    text=dict(hidden=192, intermediate=256, layers=4, heads=6, kv_heads=2, theta=100.0, sections=[8, 4, 4]),
)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    shutil.rmtree(arguments.out, ignore_errors=True)
    write_checkpoint(arguments.out, RECIPE | {"seed": arguments.seed})

    reference = Reference(arguments.out)
    picture = arguments.out / "try.png"
    for seed, prompt in enumerate(
        ("A red cup to the left of a blue bowl.", "A cat behind the sofa.", "A cat on the sofa.")
    ):
        drawing(300, 200, seed).save(picture)
        reference.check(prompt, picture)
        stages = reference.score(prompt, picture)
        print(f"{stages['mean']:+.4f} ± {stages['stddev']:.4f}  {len(stages['input_ids'])} tokens  {prompt}")
    picture.unlink()
    print(f"{reference.tokenizer.backend_tokenizer.get_vocab_size(with_added_tokens=False)} byte pairs")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
