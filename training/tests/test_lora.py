"""The paper's recipe on a small random base: it trains, it goes on, and the server gives the scores of what it writes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from spatialscore_training.export import export
from spatialscore_training.manifest import read_pairs, write_pairs
from spatialscore_training.model import new_model
from spatialscore_training.scenes import World
from spatialscore_training.scorers import Item
from spatialscore_training.tokenizer import train_tokenizer

from test_generator import folder  # noqa: F401

peft = pytest.importorskip("peft", reason="needs the extra `lora`")
lora = pytest.importorskip("spatialscore_training.lora", reason="needs the extra `lora`")

RECIPE = dict(
    instruction="Rate: {prompt}\n<|Reward|>", pixels=112 * 112, rank=4, alpha=8, dropout=0.0, head=[32, 8], rate=1e-2,
    targets=r".*language_model.*\.(q_proj|v_proj)", warmup=0.1, pairs=2, accumulate=2, epochs=1, save_every=1,
)


REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    """Pairs, a base, what one step wrote of the adapter, and the checkpoint after three."""
    root = tmp_path_factory.mktemp("lora")
    pairs, base, out = root / "pairs", root / "base", root / "out"
    write_pairs(pairs, World(kinds=16, things=(2, 3)), folder, seed=0, side=112, pairs=8, jobs=1)
    tokenizer = train_tokenizer()
    export(new_model(tokenizer, 0).state_dict(), tokenizer, base, torch.float32)
    lora.train(pairs, out, RECIPE | {"base": str(base)}, steps=1, seed=0)
    first = load_file(out / "adapter_model.safetensors")
    lora.train(pairs, out, RECIPE | {"base": str(base)}, steps=3, seed=0)
    return pairs, base, first, out


def test_a_few_steps_give_a_checkpoint(trained):
    _, _, first, out = trained
    second = load_file(out / "adapter_model.safetensors")
    assert any("rm_head" in name for name in second) and any("lora_B" in name for name in second)
    assert all(torch.isfinite(weight).all() for weight in second.values())
    assert any(not torch.equal(first[name], second[name]) for name in first)
    assert json.loads((out / "reward_config.json").read_text())["special_token"] == "<|Reward|>"
    wanted = {"config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json", "chat_template.jinja"}
    assert wanted <= {path.name for path in out.iterdir()}


SERVED = """
import json, sys
from pathlib import Path
from spatialscore_training.scorers import Item, ServerScorer
import os
items = [Item(*entry) for entry in json.loads(sys.argv[1])]
scores = dict(ServerScorer(os.environ["SPATIALSCORE_ADDRESS"], Path("proto")).scores(items))
print(json.dumps([scores[i] for i in range(len(items))]))
"""


@torch.no_grad()
def test_the_server_scores_the_adapter_as_peft_does(trained):
    binary = REPOSITORY / "target/release/spatialscore"
    if not binary.exists():
        pytest.skip("needs the server: make build")
    pairs, base, _, out = trained
    records = list(read_pairs(pairs))
    processor = lora.load_processor(base, RECIPE["pixels"])
    model = peft.PeftModel.from_pretrained(lora.load_base(base, RECIPE), out).eval()
    token = processor.tokenizer.convert_tokens_to_ids("<|Reward|>")
    expected = lora.rewards(model, lora.collate(records, processor, RECIPE["instruction"]), token)
    items = [Item(record["prompt"], record[name]) for name in ("kept", "broken") for record in records]
    served = subprocess.run(
        ["scripts/with_server.sh", binary, sys.executable, "-c", SERVED, json.dumps(items)],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": "training", "SPATIALSCORE__MODEL__CHECKPOINT": str(out)},
        check=True,
        stdout=subprocess.PIPE,
    )
    told = torch.tensor(json.loads(served.stdout))
    assert len(expected) == 16 and expected[:, 0].std() > 1e-3
    assert torch.allclose(told[:, 0], expected[:, 0], rtol=1e-4, atol=1e-4)
    assert torch.allclose(told[:, 1], expected[:, 1].exp(), rtol=1e-4, atol=1e-4)
