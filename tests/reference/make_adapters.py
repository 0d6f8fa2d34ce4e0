"""Makes the adapter fixtures: every kind of LoRA that PEFT saves, on one small checkpoint, and its score by PEFT.

    python tests/reference/make_adapters.py OUT [--seed S]

OUT/mlp must be there (make_fixtures.py): it is the base of them all. For each kind OUT/adapters/KIND holds what PEFT's
own `save_pretrained` wrote, without a base; OUT/adapters/cases.json says of each on what it stands ("mlp", or another
kind), and the score that the first item of `mlp` has under it: of the model that `PeftModel.from_pretrained` loads onto
a fresh base and merges. A kind whose name begins with `old_` is another with the names that modules had before
transformers 4.52, in its keys and in its patterns; PEFT scores the one that it was made from.

Kinds that PEFT cannot save or merge, or whose numbers are not a function of their files, have no score: they are refused,
and tests/adapters.rs makes them from others by an edit.
"""

import json
import random
import re
import shutil

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import save_file

from checkpoints import write_json
from command import run
from reference import Reference, load_model

BASE = "mlp"
ATTENTION = ["q_proj", "v_proj"]
LAYER = "model.language_model.layers"

# What each kind says to PEFT; `on`, which is not PEFT's, is the kind that it stands on, where not on the base.
KINDS = {
    "plain": dict(r=2, lora_alpha=6, target_modules=ATTENTION),
    "gaussian": dict(r=2, target_modules=["o_proj"], init_lora_weights="gaussian"),
    "orthogonal": dict(r=2, target_modules=["o_proj"], init_lora_weights="orthogonal"),
    "mica": dict(r=2, target_modules=["o_proj"], init_lora_weights="mica"),
    "fan_in_fan_out": dict(r=2, target_modules=ATTENTION, fan_in_fan_out=True),
    "negative": dict(r=2, lora_alpha=-3, target_modules=["down_proj"]),
    "rslora": dict(r=4, lora_alpha=6, use_rslora=True, target_modules=["up_proj"]),
    "patterns": dict(
        r=2,
        lora_alpha=4,
        target_modules=ATTENTION,
        # The first that matches counts, in the order of the file.
        rank_pattern={r"layers\.1\.self_attn\.v_proj": 3, "v_proj": 1},
        alpha_pattern={"v_proj": 9, r"layers\.1\.self_attn\.v_proj": 30, r"layers\.\d+\.self_attn\.q_proj": 7},
    ),
    "full_names": dict(
        r=2,
        lora_alpha=4,
        target_modules=[*ATTENTION, "qkv"],
        rank_pattern={f"{LAYER}.0.self_attn.q_proj": 4, "model.visual.blocks.1.attn.qkv": 1},
        alpha_pattern={
            f"{LAYER}.0.self_attn.q_proj": 40,
            f"^{LAYER}.1.self_attn.v_proj": 33,
            "model.visual.blocks.1.attn.qkv": 11,
        },
    ),
    "rslora_patterns": dict(
        r=2,
        lora_alpha=4,
        use_rslora=True,
        target_modules=ATTENTION,
        rank_pattern={"q_proj": 3},
        alpha_pattern={"q_proj": 12},
    ),
    "some_layers": dict(r=2, lora_alpha=8, target_modules=ATTENTION, layers_to_transform=[1], layers_pattern="layers"),
    "excluded": dict(r=2, lora_alpha=8, target_modules=["q_proj", "qkv"], exclude_modules=r".*blocks\.0.*"),
    "regex": dict(r=2, lora_alpha=8, target_modules=r"^(?!.*visual).*\.(k_proj|gate_proj)"),
    "bias_all": dict(r=2, lora_alpha=4, target_modules=ATTENTION, bias="all"),
    "bias_lora_only": dict(r=2, lora_alpha=4, target_modules=ATTENTION, bias="lora_only"),
    # PEFT saves the replaced head's biases beside those of the new one.
    "bias_all_saved": dict(r=2, lora_alpha=5, target_modules=["qkv"], modules_to_save=["rm_head"], bias="all"),
    "lora_bias": dict(r=2, lora_alpha=5, target_modules=[*ATTENTION, "qkv"], lora_bias=True),
    "embedding": dict(r=2, lora_alpha=3, target_modules=["embed_tokens", "q_proj"]),
    "convolution": dict(r=2, lora_alpha=3, target_modules=["proj"]),
    "head": dict(r=2, lora_alpha=3, target_modules=["rm_head.0", "rm_head.5", "k_proj"]),
    "saved": dict(r=2, target_modules=["q_proj"], modules_to_save=["rm_head", "embed_tokens"]),
    "tokens": dict(r=2, lora_alpha=4, target_modules=["q_proj"], trainable_token_indices=[5, 300, 41]),
    "named_tokens": dict(r=2, lora_alpha=4, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [7, 8]}),
    "pissa": dict(r=3, lora_alpha=6, target_modules=[*ATTENTION, "down_proj"], init_lora_weights="pissa"),
    # A table is not decomposed, whatever its factors are said to start from.
    "pissa_embedding": dict(r=3, lora_alpha=6, target_modules=["embed_tokens", "v_proj"], init_lora_weights="pissa"),
    "pissa_rslora": dict(r=3, lora_alpha=6, use_rslora=True, target_modules=["up_proj"], init_lora_weights="pissa"),
    "olora": dict(r=3, lora_alpha=6, target_modules=[*ATTENTION, "down_proj"], init_lora_weights="olora"),
    # The base of each is an adapter, the last one's base an adapter on an adapter.
    "on_plain": dict(r=2, lora_alpha=4, target_modules=["q_proj", "gate_proj"], on="plain"),
    "on_saved": dict(r=2, lora_alpha=4, target_modules=["q_proj", "rm_head.0"], on="saved"),
    "saved_on_head": dict(r=2, lora_alpha=4, target_modules=["q_proj"], modules_to_save=["rm_head"], on="head"),
    "tokens_on_embedding": dict(r=2, target_modules=["k_proj"], trainable_token_indices=[5, 6, 300], on="embedding"),
    "pissa_on_olora": dict(r=2, lora_alpha=4, target_modules=["q_proj"], init_lora_weights="pissa", on="olora"),
    "third": dict(r=2, lora_alpha=4, target_modules=["q_proj", "down_proj"], on="on_plain"),
}
OLD = ["plain", "full_names", "embedding", "tokens", "bias_all"]


def old_name(name):
    """A module's name as it was before transformers 4.52."""
    return name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")


def train(model, generator):
    """Moves whatever an adapter's training may move."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if "lora_" in name:
                # What an initialisation took out of the base has its own size; zeros become of order one.
                width = weight.shape[-1] if weight.dim() > 1 else 4
                weight.copy_(weight + 0.5 * noise / width**0.5)
            elif "modules_to_save" in name or "trainable_tokens_delta" in name:
                weight.copy_(weight * (1 + 0.2 * noise))
            elif weight.requires_grad:
                weight.copy_(weight + 0.2 * noise)


def save(directory, model, config, generator, on):
    torch.manual_seed(generator.initial_seed())
    adapted = get_peft_model(model, LoraConfig(**config))
    train(adapted, generator)
    adapted.save_pretrained(directory, save_embedding_layers=False)
    (directory / "README.md").unlink(missing_ok=True)
    # Sets in peft's hands, so in no order: sorted, lest the file change with every run.
    path = directory / "adapter_config.json"
    said = json.loads(path.read_text()) | {"base_model_name_or_path": on}
    write_json(path, {k: sorted(v) if k.endswith("_modules") and isinstance(v, list) else v for k, v in said.items()})


def rename(source, target):
    """An adapter with the names that modules had before transformers 4.52."""
    target.mkdir()
    path = source / "adapter_model.safetensors"
    with safe_open(path, "pt") as file:
        tensors = {old_name(key): file.get_tensor(key) for key in file.keys()}
    save_file(tensors, target / path.name, metadata={"format": "pt"})
    said = json.loads((source / "adapter_config.json").read_text())
    for pattern in ("alpha_pattern", "rank_pattern"):
        said[pattern] = {old_name(name): value for name, value in said[pattern].items()}
    write_json(target / "adapter_config.json", said)


def on_base(out, kind):
    """The model under an adapter, with all that it stands on merged: by PEFT."""
    if kind == BASE:
        return load_model(out / BASE / "checkpoint")
    base = on_base(out, KINDS[kind].get("on", BASE))
    return PeftModel.from_pretrained(base, str(out / "adapters" / kind)).merge_and_unload()


def make(out, seed):
    directory = out / "adapters"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    items = json.loads((out / BASE / "items.json").read_text())
    prompt, image = items[0]["prompt"], out / BASE / items[0]["image"]
    reference = Reference(out / BASE / "checkpoint")
    plain = reference.mean(prompt, image)
    cases = {}
    for kind, config in KINDS.items():
        config = dict(config)
        on = config.pop("on", BASE)
        generator = torch.Generator().manual_seed(random.Random(f"{seed} {kind}").randrange(2**31))
        save(directory / kind, on_base(out, on), config, generator, on)
        reference.model = on_base(out, kind).eval()
        mean = reference.mean(prompt, image)
        # An adapter that moves nothing would prove nothing.
        assert abs(mean - plain) > 1e-3 * abs(plain), (kind, mean, plain)
        cases[kind] = {"on": on, "mean": mean}
        print(f"  {kind}: {mean:+.4f}")
        if kind in OLD:
            rename(directory / kind, directory / f"old_{kind}")
            cases[f"old_{kind}"] = {"on": on, "mean": mean}
    write_json(directory / "cases.json", cases)


if __name__ == "__main__":
    run(__doc__, make)
