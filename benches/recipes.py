#!/usr/bin/env python3
"""The recipes that ship, at the size of the model in the box, on the same pairs: accuracy, calibration, time.

    .venv/training/bin/python benches/recipes.py        about half an hour on one core; goes on where it was stopped

The base is the built-in checkpoint without its head, which reads prompts and pictures already. What a recipe says of how
much is trained, of the head, the loss, dropout, schedule and order stands; what fits a large model alone does not: prompt,
size and positions are those of the base, and the rates are larger, but where a row says `as shipped`. Two pictures an item
(EditReward's form) are a grey one and the judged one. Held-out pairs are of another seed.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from spatialscore_training import recipe as recipes
from spatialscore_training.drawings import DEFAULT_FOLDER
from spatialscore_training.files import beside, command
from spatialscore_training.manifest import write_pairs
from spatialscore_training.pair_files import read_pairs
from spatialscore_training.relations import RULES
from spatialscore_training.reward_model import HEAD
from spatialscore_training.scenes import World
from spatialscore_training.train_reward import Run

BOX = Path(__file__).parents[1] / "models/spatialscore-mini"
WORLD = World(kinds=64, things=(2, 5), clauses=(1, 4), relations=tuple(RULES), depth=0.15)
SMALL = {"pixels": 224 * 224, "positions": "mrope", "gradient_checkpointing": False, "save_every": 25, "evaluate_every": 50}
LORA, WHOLE = {"rate": 1e-3, "rank": 16, "alpha": 32}, {"rate": 1e-4, "head_rate": 1e-3, "token_rate": 1e-3}
RUNS = {
    "paper-lora": ("paper-lora", LORA),
    "paper-lora, plain Bradley-Terry": ("paper-lora", LORA | {"gaussian": False}),
    "paper-lora, one draw": ("paper-lora", LORA | {"draws": 1}),
    "hpsv3": ("hpsv3", WHOLE),
    "hpsv3, plain Bradley-Terry": ("hpsv3", WHOLE | {"gaussian": False}),
    "hpsv3, rates as shipped": ("hpsv3", {}),
    "editreward": ("editreward", WHOLE),
}


def headless(folder: Path) -> Path:
    """The built-in checkpoint as a base."""
    if not folder.exists():
        with beside(folder) as part:
            part.mkdir()
            for file in BOX.iterdir():
                if file.is_file() and file.suffix != ".safetensors" and file.name not in ("reward_config.json", "README.md"):
                    (part / file.name).write_bytes(file.read_bytes())
            tensors = load_file(BOX / "model.safetensors")
            save_file({key: tensor.float() for key, tensor in tensors.items() if not key.startswith(HEAD)}, part / "model.safetensors", {"format": "pt"})
    return folder


def with_source(pairs: Path) -> Path:
    """The same pairs with a grey picture before both."""
    found = pairs.with_name(f"{pairs.name}-edits.jsonl")
    grey = pairs.with_name("grey.png")
    Image.new("RGB", (224, 224), (128, 128, 128)).save(grey)
    lines = [{"prompt": p["prompt"], "chosen": p["kept"], "rejected": p["broken"], "source": str(grey.resolve())} for p in read_pairs(pairs.resolve())]
    found.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return found


def row(name: str, out: Path, seconds: float, run: Run) -> dict:
    """What a run came to: the figures of its best checkpoint."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    best = next(line for line in lines if line["step"] == run.best[2] and "validation_accuracy" in line)
    trained = sum(parameter.numel() for parameter in run.plain.trained().values())
    return {"name": name, "trained": trained, "steps": run.step, "best": run.best[2], "seconds": seconds} | {key: best[f"validation_{key}"] for key in ("accuracy", "low", "high", "nll", "calibration_error")}


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=400, help="to train on (%(default)s)")
    parser.add_argument("--held-out", type=int, default=500, help="to judge by (%(default)s)")
    parser.add_argument("--epochs", type=int, default=2, help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--drawings", type=Path, default=DEFAULT_FOLDER)
    parser.add_argument("--out", type=Path, default=Path("target/recipes"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    base = headless(options.out / "base")
    sets = {}
    for name, seed, count in (("train", 1, options.pairs), ("held-out", 2, options.held_out)):
        write_pairs(options.out / name, WORLD, options.drawings, seed=seed, side=224, pairs=count, jobs=1)
        sets[name] = options.out / name
    edits = {name: with_source(pairs) for name, pairs in sets.items()}
    instruction = json.loads((BOX / "reward_config.json").read_text())["instruction"]
    rows = []
    for name, (shipped, changes) in RUNS.items():
        recipe = recipes.read_recipe(shipped, SMALL | {"base": str(base), "instruction": instruction, "epochs": options.epochs} | changes)
        data = edits if recipe.pictures == 2 else sets
        out = options.out / name.replace(", ", "-").replace(" ", "-")
        begun = time.process_time()
        run = Run(recipe, data["train"], out, seed=options.seed, validation=data["held-out"], cpu=True)
        run.go()
        spent = out / "seconds"
        spent.write_text(str(float(spent.read_text() if spent.exists() else 0) + time.process_time() - begun))
        rows.append(row(name, out, float(spent.read_text()), run))
        told = rows[-1]
        print(f"| {name} | {told['trained']:,} | {told['accuracy']:.1%} ({told['low']:.1%} to {told['high']:.1%}) | {told['nll']:.3f} | {told['calibration_error']:.3f} | {told['best']} of {told['steps']} | {told['seconds']:.0f} s |", flush=True)
        (options.out / "table.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
