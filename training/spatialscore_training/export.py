"""Writes the checkpoint that the server reads.

    python -m spatialscore_training.export .cache/runs/mini/STAGE.pt models/spatialscore-mini

`config.json`, `model.safetensors` (the backbone and `rm_head.*`), the tokenizer, the chat template, the image
processor's and the reward's own configuration. Nothing of the first stage's heads is in it.
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import Qwen2VLImageProcessorPil

from .files import Refusal, beside, command, keep_apart
from .model import new_model
from .tokenizer import CHAT_TEMPLATE, INSTRUCTION, REWARD_TOKEN, run_tokenizer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SIDE = 224


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def export(
    weights: dict[str, torch.Tensor], tokenizer: Tokenizer, folder: Path, dtype: torch.dtype, notice: str | None = None
) -> None:
    """Writes a checkpoint with these weights into `folder`, whole or not at all."""
    with beside(folder) as part:
        part.mkdir()
        _export(weights, tokenizer, part, dtype, notice)


def _export(weights: dict[str, torch.Tensor], tokenizer: Tokenizer, folder: Path, dtype: torch.dtype, notice: str | None) -> None:
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    # Qwen2Tokenizer would bring a normalizer of its own in place of the file's.
    said = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    said |= {"model_max_length": 4096, "split_special_tokens": False, "add_prefix_space": False}
    _write_json(folder / "tokenizer_config.json", said)
    images = Qwen2VLImageProcessorPil(min_pixels=SIDE * SIDE, max_pixels=SIDE * SIDE).to_dict()
    _write_json(folder / "preprocessor_config.json", images | {"processor_class": "Qwen2_5_VLProcessor"})
    reward = {"instruction": INSTRUCTION, "reward_token": "special", "special_token": REWARD_TOKEN, "positions": "mrope", "output": "gaussian"}
    reward |= {"min_pixels": SIDE * SIDE, "max_pixels": SIDE * SIDE} | ({"notice": notice} if notice else {})
    _write_json(folder / "reward_config.json", reward)
    model = new_model(tokenizer, 0)
    model.load_state_dict(weights)
    _write_json(folder / "config.json", model.config.to_dict())
    tensors = {name: tensor.to(dtype).contiguous() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("state", type=Path, help="a stage's state, as spatialscore-train writes it")
    parser.add_argument("folder", type=Path, help="where to")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the weights on disk (default: %(default)s)")
    parser.add_argument("--notice", help="what callers should know, for reward_config.json")
    options = parser.parse_args()
    if options.folder.exists() and any(options.folder.iterdir()) and not (options.folder / "reward_config.json").exists():
        raise Refusal(f"{options.folder} is not empty, and no checkpoint that may be replaced")
    keep_apart(options.folder, run=options.state.parent)
    state = torch.load(options.state, map_location="cpu", weights_only=True)
    tokenizer = run_tokenizer(options.state.parent)
    export(state["model"], tokenizer, options.folder, DTYPES[options.dtype], options.notice)
    size = sum(file.stat().st_size for file in options.folder.iterdir())
    print(f"{options.folder}: {size / 1e6:.1f} MB, from step {state['step']} of {options.state.stem}")


if __name__ == "__main__":
    main()
