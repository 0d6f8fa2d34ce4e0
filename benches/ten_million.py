"""Writes a random checkpoint of about ten million parameters: `ten_million.py DIRECTORY`.

The same architecture and tokenizer as the built-in one, wider and deeper, with attention windows in the vision tower
and shared keys and values in the decoder, as the large models of this family have them.
"""

import sys
from pathlib import Path

from tokenizers import Tokenizer

from common import MINI
from checkpoints import write_checkpoint

RECIPE = {
    "seed": 10, "dtype": "fp32", "tied": True, "keys": "new", "config": "new", "template": "jinja",
    "pixels": (50176, 50176), "min_pixels": 50176, "max_pixels": 50176,
    "instruction": "Rate how well the picture keeps this prompt: {prompt}.\n<|Reward|>", "reward_token": "<|Reward|>",
    "positions": "mrope", "output": "gaussian", "head": (0, 2), "widths": (64,),
    "vision": {"depth": 8, "hidden": 192, "intermediate": 512, "heads": 6, "window": 112, "full": [3, 7]},
    "text": {"hidden": 320, "intermediate": 832, "layers": 6, "heads": 10, "kv_heads": 2, "theta": 1e6,
             "sections": [4, 6, 6]},
}  # fmt: skip


def write(directory):
    """Writes it, once."""
    directory = Path(directory)
    if not (directory / "config.json").exists():
        tokenizer = Tokenizer.from_file(str(MINI / "tokenizer.json"))
        write_checkpoint(directory, RECIPE | {"vocabulary": tokenizer})
    return directory


if __name__ == "__main__":
    write(sys.argv[1])
