"""Trains the paper's SpatialScore: LoRA on Qwen2.5-VL and a reward head, on pairs of a manifest.

    spatialscore-train-lora pairs out                           one device
    accelerate launch -m spatialscore_training.lora pairs out   several devices, several hosts
    spatialscore-train-lora pairs out --base FOLDER --steps 4   a try on a small base

PAIRS is a data set of `spatialreward-data`, or your own manifest. OUT becomes a checkpoint that the server reads: the
adapter with the head in it, tokenizer, processor and reward configuration, and links to the base's weights. A run that
was stopped goes on from its last state under OUT/state.
"""

import argparse
import json
import os
import random
import tomllib
from functools import partial
from importlib.resources import files
from pathlib import Path

import torch
from accelerate import Accelerator
from huggingface_hub import snapshot_download
from peft import LoraConfig, get_peft_model
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import AutoImageProcessor, AutoProcessor, Qwen2_5_VLForConditionalGeneration, get_cosine_schedule_with_warmup

from .losses import bradley_terry
from .manifest import read_pairs
from .tokenizer import REWARD_TOKEN


def load_processor(base: Path, pixels: int):
    """The base's processor, which makes every picture this large, with the reward token added."""
    processor = AutoProcessor.from_pretrained(base)
    processor.image_processor = AutoImageProcessor.from_pretrained(base, backend="pil", min_pixels=pixels, max_pixels=pixels)
    processor.chat_template = processor.chat_template or processor.tokenizer.chat_template
    processor.tokenizer.add_tokens(REWARD_TOKEN, special_tokens=True)
    processor.tokenizer.padding_side = "right"
    return processor


def load_base(base: Path, recipe: dict) -> nn.Module:
    """The base with a new head at `rm_head`."""
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(base, dtype="auto")
    widths = [model.config.text_config.hidden_size, *recipe["head"]]
    layers = [part for a, b in zip(widths, widths[1:]) for part in (nn.Linear(a, b), nn.ReLU())]
    model.rm_head = nn.Sequential(*layers, nn.Linear(widths[-1], 2))
    return model


def load_model(base: Path, recipe: dict, tokens: int) -> nn.Module:
    """The base under an adapter; its head is trained whole."""
    model = load_base(base, recipe)
    if tokens > model.get_input_embeddings().num_embeddings:
        raise ValueError("the base's table of embeddings has no spare row for the reward token")
    lora = LoraConfig(
        r=recipe["rank"],
        lora_alpha=recipe["alpha"],
        lora_dropout=recipe["dropout"],
        target_modules=recipe["targets"],
        modules_to_save=["rm_head"],
    )
    return get_peft_model(model, lora)


def collate(records: list[dict], processor, instruction: str):
    """The kept pictures of these pairs, then the broken ones, each with its prompt."""
    texts, pictures = [], []
    for name in ("kept", "broken"):
        for record in records:
            # A prompt that spells a special token would otherwise be read as one.
            prompt = record["prompt"].replace("<|", "< |")
            turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": instruction.replace("{prompt}", prompt)}]}
            texts.append(processor.apply_chat_template([turn], tokenize=False, add_generation_prompt=True))
            pictures.append(Image.open(record[name]).convert("RGB"))
    return processor(text=texts, images=pictures, padding=True, return_tensors="pt")


def rewards(model: nn.Module, batch, reward_token: int) -> torch.Tensor:
    """Mean and logarithm of sigma for each row, in fp32, from the hidden state at the reward token."""
    inner = model.get_base_model()
    hidden = inner.model(**batch, use_cache=False).last_hidden_state
    at = (batch["input_ids"] == reward_token).int().argmax(1)
    return inner.rm_head(hidden[torch.arange(len(at)), at].float())


class Rewarder(nn.Module):
    """The model as one call, so that several devices keep their gradients alike."""

    def __init__(self, model: nn.Module, reward_token: int):
        super().__init__()
        self.model, self.reward_token = model, reward_token

    def forward(self, batch) -> torch.Tensor:
        return rewards(self.model, batch, self.reward_token)


def save(model: nn.Module, processor, recipe: dict, base: Path, out: Path) -> None:
    """Writes the checkpoint."""
    model.save_pretrained(out)
    processor.save_pretrained(out)
    reward = {"instruction": recipe["instruction"], "reward_token": "special", "special_token": REWARD_TOKEN}
    reward |= {"positions": "mrope", "output": "gaussian", "min_pixels": recipe["pixels"], "max_pixels": recipe["pixels"]}
    (out / "reward_config.json").write_text(json.dumps(reward, indent=1) + "\n")
    # The server reads the older of the two forms, and the limits from reward_config.json.
    for name in ("processor_config.json", "README.md"):
        (out / name).unlink(missing_ok=True)
    for file in [base / "config.json", base / "preprocessor_config.json", *base.glob("model*.safetensors"), *base.glob("model*.index.json")]:
        link = out / file.name
        link.unlink(missing_ok=True)
        link.symlink_to(file.resolve())


def train(pairs: Path, out: Path, recipe: dict, steps: int | None, seed: int) -> None:
    accelerator = Accelerator(gradient_accumulation_steps=recipe["accumulate"], mixed_precision="bf16" if torch.cuda.is_available() else "no")
    base = Path(recipe["base"])
    base = base if base.is_dir() else Path(snapshot_download(recipe["base"]))
    torch.manual_seed(seed)
    processor = load_processor(base, recipe["pixels"])
    model = Rewarder(load_model(base, recipe, len(processor.tokenizer)), processor.tokenizer.convert_tokens_to_ids(REWARD_TOKEN))
    records = list(read_pairs(pairs))
    random.Random(seed).shuffle(records)
    loader = DataLoader(records, recipe["pairs"], collate_fn=partial(collate, processor=processor, instruction=recipe["instruction"]), num_workers=min(4, os.cpu_count()))
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=recipe["rate"], weight_decay=0.0)
    loader, model, optimiser = accelerator.prepare(loader, model, optimiser)
    an_epoch = max(1, len(loader) // recipe["accumulate"])
    steps = steps or an_epoch * recipe["epochs"]
    rate = get_cosine_schedule_with_warmup(optimiser, int(recipe["warmup"] * steps), steps)
    accelerator.register_for_checkpointing(rate)
    state, done = out / "state", 0
    if state.exists():
        accelerator.load_state(state)
        done = rate.state_dict()["last_epoch"]
    bar = tqdm(total=steps, initial=done, unit="step", disable=not accelerator.is_main_process)
    while done < steps:
        ahead = accelerator.skip_first_batches(loader, (done % an_epoch) * recipe["accumulate"])
        for batch in ahead:
            with accelerator.accumulate(model):
                kept, broken = model(batch).chunk(2)
                loss, right = bradley_terry(kept, broken)
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimiser.step()
                optimiser.zero_grad()
            if accelerator.sync_gradients:
                rate.step()
                done += 1
                bar.update()
                bar.set_postfix(loss=f"{loss.item():.3f}", right=f"{right.item():.2f}", pairs=recipe["pairs"] * accelerator.num_processes)
                if done % recipe["save_every"] == 0 or done == steps:
                    accelerator.save_state(state)
            if done == steps:
                break
    if accelerator.is_main_process:
        save(accelerator.unwrap_model(model).model, processor, recipe, base, out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", type=Path, help="a data set's folder, or a manifest")
    parser.add_argument("out", type=Path, help="the checkpoint's folder")
    parser.add_argument("--recipe", type=Path, help="a recipe of your own (default: the package's qwen2.5-vl-7b-lora.toml)")
    parser.add_argument("--base", help="in place of the recipe's base: a hub id or a folder")
    parser.add_argument("--steps", type=int, help="in place of the recipe's epochs")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    text = (options.recipe or files(__package__) / "qwen2.5-vl-7b-lora.toml").read_text()
    recipe = tomllib.loads(text) | ({"base": options.base} if options.base else {})
    train(options.pairs, options.out, recipe, options.steps, options.seed)


if __name__ == "__main__":
    main()
