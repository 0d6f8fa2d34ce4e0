"""The paper's recipe on a small random base: it trains, it goes on, and what it writes is a checkpoint."""

import json

import pytest
import torch
from safetensors.torch import load_file

from spatialscore_training.export import export
from spatialscore_training.manifest import write_pairs
from spatialscore_training.model import new_model
from spatialscore_training.scenes import World
from spatialscore_training.tokenizer import train_tokenizer

from test_generator import folder  # noqa: F401

lora = pytest.importorskip("spatialscore_training.lora", reason="needs the extra `lora`")

RECIPE = dict(
    instruction="Rate: {prompt}\n<|Reward|>", pixels=112 * 112, rank=4, alpha=8, dropout=0.0, head=[32, 8], rate=1e-2,
    targets=r".*language_model.*\.(q_proj|v_proj)", warmup=0.1, pairs=2, accumulate=2, epochs=1, save_every=1,
)


def test_a_few_steps_give_a_checkpoint(folder, tmp_path):
    pairs, base, out = tmp_path / "pairs", tmp_path / "base", tmp_path / "out"
    write_pairs(pairs, World(kinds=16, things=(2, 3)), folder, seed=0, side=112, pairs=8, jobs=1)
    export(new_model(train_tokenizer(), 0).state_dict(), base, torch.float32)
    recipe = RECIPE | {"base": str(base)}
    lora.train(pairs, out, recipe, steps=1, seed=0)
    first = load_file(out / "adapter_model.safetensors")
    lora.train(pairs, out, recipe, steps=3, seed=0)
    second = load_file(out / "adapter_model.safetensors")
    assert any("rm_head" in name for name in second) and any("lora_B" in name for name in second)
    assert all(torch.isfinite(weight).all() for weight in second.values())
    assert any(not torch.equal(first[name], second[name]) for name in first)
    assert json.loads((out / "reward_config.json").read_text())["special_token"] == "<|Reward|>"
    wanted = {"config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json", "chat_template.jinja"}
    assert wanted <= {path.name for path in out.iterdir()}
