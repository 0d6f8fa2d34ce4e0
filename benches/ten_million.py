"""Writes a random checkpoint of about ten million parameters: `ten_million.py DIRECTORY [FAMILY]`.

The tokenizer of the built-in one and one of the architectures that are served, Qwen2.5-VL where none is named: wider and
deeper, with attention windows (Qwen2.5-VL) or a deepstack (Qwen3-VL) in the vision tower and shared keys and values in
the decoder, as the large models have them.
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


FAMILIES = {
    "qwen2_5_vl": {},
    "qwen2_vl": {"vision": {"depth": 8, "hidden": 192, "ratio": 4, "heads": 6}},
    "qwen3_vl": {
        "vision": {"depth": 8, "hidden": 192, "intermediate": 768, "heads": 6, "places": 256, "deepstack": [2, 4, 6]},
        "text": RECIPE["text"] | {"heads": 8, "kv_heads": 2, "head_dim": 48, "sections": [8, 8, 8]},
    },
}  # fmt: skip


def write(directory, family="qwen2_5_vl"):
    """Writes it, once."""
    directory = Path(directory)
    if not (directory / "config.json").exists():
        tokenizer = Tokenizer.from_file(str(MINI / "tokenizer.json"))
        write_checkpoint(directory, RECIPE | FAMILIES[family] | {"family": family, "vocabulary": tokenizer})
    return directory


if __name__ == "__main__":
    write(*sys.argv[1:])
