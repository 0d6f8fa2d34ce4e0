"""Makes the golden fixtures: small seeded checkpoints, items to score, and every stage as the reference computes it.

    python tests/reference/make_fixtures.py OUT [--seed S] [--only CASE ...]

For each case:

    OUT/CASE/checkpoint/           as `save_pretrained` would leave it, with reward_config.json
    OUT/CASE/items/{k}.png …       pictures
    OUT/CASE/items.json            a list of {"prompt", "image"}; `image` is relative to OUT/CASE
    OUT/CASE/golden.safetensors    "{k}/{stage}" for item k; reference.py names the stages. `pixel_values` is there
                                   for the smallest pictures only; the bytes behind it, `pixels`, always.

`adapters` is what make_adapters.py makes, on the checkpoint of `mlp`. The case `spread` has 200 items over a few pictures and only `{k}/mean` in its golden file: it measures how well a
lower precision keeps their order. With seed 0 (the default) the result is what is committed; another seed gives other
weights, pictures and prompts of the same shapes. Each case checks itself: a plain, un-hooked run of transformers'
processor and model gives the same tokens and the same score.
"""

import argparse
import random
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

import make_adapters
from checkpoints import INSTRUCTIONS, REWARD_TOKEN, spatial_prompt, write_checkpoint, write_json
from pictures import drawing
from reference import Reference

BESIDE = "Rate how well the picture keeps the spatial relations of this prompt: {prompt}\n<|Reward|> Be exact. "
EVERY_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "qkv"]

# What a case does not say.
COMMON = dict(
    dtype="fp32",
    tied=False,
    keys="old",
    config="new",
    vocabulary=700,
    template="jinja",
    pixels=(3136, 12845056),
    min_pixels=3136,
    max_pixels=12544,
    instruction=BESIDE,
    reward_token=REWARD_TOKEN,
    positions="mrope",
    output="gaussian",
    head=(0, 3, 5),
)

CASES = {
    # An MLP head with dropout's slots, windows of four by four visual tokens, two queries to a key.
    "mlp": dict(
        tied=True,
        vision=dict(depth=3, hidden=32, intermediate=40, heads=2, window=112, full=[2]),
        text=dict(hidden=48, intermediate=64, layers=2, heads=6, kv_heads=3, theta=10000.0, sections=[2, 1, 1]),
        sizes=[(60, 50), (150, 100), (200, 60)],
    ),
    # A scalar from one linear layer at the last token, tokens numbered flat, everything in the files' old form.
    "flat": dict(
        keys="new",
        config="old",
        scaling={"type": "mrope"},
        template="json",
        tied=True,
        instruction=INSTRUCTIONS[0],
        reward_token=None,
        positions="flat",
        output="scalar",
        head=(),
        vision=dict(depth=2, hidden=32, intermediate=48, heads=4, window=56, full=[1]),
        text=dict(hidden=32, intermediate=48, layers=3, heads=4, kv_heads=4, theta=10000.0, sections=[2, 1, 1]),
        sizes=[(60, 60), (70, 130), (90, 60)],
    ),
    # bf16 in shards by save_pretrained itself, fewer rows of vocabulary than the config says, four queries to a key.
    "shards": dict(
        dtype="bf16",
        tied=True,
        shards="150KB",
        spare_rows=41,
        template="config",
        head=(0, 2, 4),
        vision=dict(depth=4, hidden=32, intermediate=40, heads=2, window=112, full=[1, 3]),
        text=dict(hidden=64, intermediate=80, layers=2, heads=4, kv_heads=1, theta=1000000.0, sections=[2, 3, 3]),
        sizes=[(56, 56), (130, 84), (84, 170)],
    ),
    # fp16, no block with full attention, both keys that say the kind of rope, the limits of the preprocessor's file.
    "half": dict(
        dtype="fp16",
        keys="old",
        config="old",
        scaling={"rope_type": "default", "type": "default"},
        pixels=(3136, 11000),
        min_pixels=None,
        max_pixels=None,
        instruction=INSTRUCTIONS[2],
        reward_token=None,
        head=(),
        vision=dict(depth=2, hidden=32, intermediate=56, heads=4, window=56, full=[]),
        text=dict(hidden=64, intermediate=72, layers=2, heads=4, kv_heads=2, theta=1000000.0, sections=[4, 2, 2]),
        sizes=[(50, 90), (40, 160), (112, 84)],
    ),
    # An adapter over every linear layer by name, the vision tower's among them, the head saved with it.
    "lora": dict(
        dtype="bf16",
        positions="flat",
        keys="new",
        template="config",
        lora=dict(r=4, lora_alpha=8, target_modules=EVERY_LINEAR, modules_to_save=["rm_head"]),
        head_in_adapter=True,
        vision=dict(depth=2, hidden=32, intermediate=40, heads=2, window=56, full=[0]),
        text=dict(hidden=32, intermediate=48, layers=2, heads=4, kv_heads=2, theta=10000.0, sections=[2, 1, 1]),
        sizes=[(80, 50), (60, 120), (120, 70)],
    ),
    # An adapter for the decoder alone, scaled by the root of its rank, over an fp16 base that holds the head.
    "rslora": dict(
        dtype="fp16",
        keys="old",
        config="old",
        scaling={"type": "mrope"},
        instruction=BESIDE.replace(REWARD_TOKEN, "<|VQ_Reward|>"),
        reward_token="<|VQ_Reward|>",
        lora=dict(r=4, lora_alpha=6, use_rslora=True, target_modules=r".*language_model.*\.(q_proj|v_proj|down_proj)"),
        vision=dict(depth=2, hidden=32, intermediate=40, heads=2, window=56, full=[1]),
        text=dict(hidden=32, intermediate=48, layers=2, heads=2, kv_heads=1, theta=10000.0, sections=[4, 2, 2]),
        sizes=[(84, 56), (64, 100)],
    ),
    # The deepest, with long and narrow pictures, and with lm_head on disk although the embeddings are tied.
    "deep": dict(
        dtype="bf16",
        tied=True,
        lm_head=True,
        keys="new",
        output="scalar",
        head=(0, 2, 4),
        min_pixels=784,
        max_pixels=14000,
        vision=dict(depth=5, hidden=32, intermediate=32, heads=4, window=112, full=[1, 4]),
        text=dict(hidden=32, intermediate=40, layers=4, heads=2, kv_heads=2, theta=20.0, sections=[4, 2, 2]),
        sizes=[(30, 30), (300, 40), (130, 110), (28, 400)],
    ),
}

SPREAD = dict(
    dtype="bf16",
    tied=True,
    keys="new",
    min_pixels=3136,
    max_pixels=3136,
    vision=dict(depth=2, hidden=32, intermediate=40, heads=2, window=56, full=[1]),
    text=dict(hidden=32, intermediate=40, layers=2, heads=2, kv_heads=1, theta=10000.0, sections=[4, 2, 2]),
)

# Prompts that a trained splitter of words must not be alone to get right; the rest are sentences about relations.
UNUSUAL = (
    "Ein grüner Stuhl steht links neben dem Tisch; el gato está detrás de la mesa.",
    "红色的杯子在蓝色碗的左边，猫坐在椅子下面。",
    "A cat 🐈 to the left of the lamp 💡 — 3.5 m apart, it's   centred\n\n",
    "The word <|vision_start|><|image_pad|> and <|im_end|> and <|Reward|> hang above the door.",
)


def prompts(rng, count):
    """So many prompts of different lengths, an unusual one among them."""
    made = [spatial_prompt(rng, 1 + k % 2) for k in range(count - 1)]
    return made + [rng.choice(UNUSUAL)]


def recipe_of(case, seed):
    recipe = COMMON | case | {"seed": seed}
    return {key: value for key, value in recipe.items() if value is not None}


def save_picture(directory, index, size, seed):
    """A picture in one of the three formats; PNG first, since all decoders agree on it to the bit."""
    image = drawing(*size, seed)
    name = f"items/{index}." + ("png", "png", "jpg", "webp")[index % 4]
    image.save(directory / name, **({"quality": 90} if name.endswith("jpg") else {}))
    return name


def spells_special(prompt):
    return "<|" in prompt


def check_tokenizer(reference, directory, texts):
    """transformers rebuilds a tokenizer from the file's vocabulary; the file by itself must mean the same."""
    plain = Tokenizer.from_file(str(directory / "checkpoint/tokenizer.json"))
    for text in texts:
        assert plain.encode(text, add_special_tokens=False).ids == reference.tokenizer(text)["input_ids"], text


def make_case(directory, case, seed, texts=None):
    rng = random.Random(seed)
    directory.mkdir(parents=True)
    (directory / "items").mkdir()
    write_checkpoint(directory / "checkpoint", recipe_of(case, seed))
    texts = texts or prompts(rng, len(case["sizes"]))
    sizes = [case["sizes"][k % len(case["sizes"])] for k in range(len(texts))]
    items = [
        {"prompt": text, "image": save_picture(directory, k, size, seed + k)}
        for k, (text, size) in enumerate(zip(texts, sizes))
    ]
    write_json(directory / "items.json", items)

    reference = Reference(directory / "checkpoint")
    check_tokenizer(reference, directory, [item["prompt"] for item in items])
    golden = {}
    for k, item in enumerate(items):
        stages = reference.score(item["prompt"], directory / item["image"])
        if not spells_special(item["prompt"]):
            reference.check(item["prompt"], directory / item["image"])
        assert all(stage.isfinite().all() for stage in stages.values())
        if len(stages["pixels"]) > 16:
            # `pixels` says the same at an eighth of the size.
            del stages["pixel_values"]
        golden |= {f"{k}/{name}": stage for name, stage in stages.items()}
        spread = f" ± {stages['stddev']:.3f}" if "stddev" in stages else ""
        tokens, grid = len(stages["input_ids"]), stages["grid"].tolist()
        print(f"  {k}: {tokens} tokens, {grid} patches, {stages['mean']:+.4f}{spread}")
    save_file(golden, directory / "golden.safetensors")


def ranks(values):
    return torch.tensor(values).argsort().argsort().double()


def rank_correlation(a, b):
    return float(torch.corrcoef(torch.stack([ranks(a), ranks(b)]))[0, 1])


def make_spread(directory, seed, count=200):
    rng = random.Random(seed)
    (directory / "items").mkdir(parents=True)
    write_checkpoint(directory / "checkpoint", recipe_of(SPREAD, seed))
    pictures = []
    for k in range(8):
        pictures.append(f"items/{k}.png")
        drawing(56, 56, seed + k).save(directory / pictures[-1])
    items = [{"prompt": spatial_prompt(rng, rng.randint(1, 4)), "image": pictures[k % 8]} for k in range(count)]
    write_json(directory / "items.json", items)
    exact, rounded = (
        [reference.mean(item["prompt"], directory / item["image"]) for item in items]
        for reference in (Reference(directory / "checkpoint", dtype) for dtype in (torch.float32, torch.bfloat16))
    )
    save_file({f"{k}/mean": torch.tensor(mean) for k, mean in enumerate(exact)}, directory / "golden.safetensors")
    print(f"  standard deviation of the scores {torch.tensor(exact).std():.3f}; ", end="")
    print(f"the reference's own bf16 keeps their order to {rank_correlation(exact, rounded):.4f}")


def seed_of(name, seed):
    """A seed for each case of its own."""
    return random.Random(f"{seed} {name}").randrange(2**31)


def make(out, seed, names):
    for name in names:
        print(name)
        directory = out / name
        shutil.rmtree(directory, ignore_errors=True)
        if name == "spread":
            make_spread(directory, seed_of(name, seed))
        elif name == "adapters":
            make_adapters.make(out, seed_of(name, seed))
        else:
            make_case(directory, CASES[name], seed_of(name, seed))


ALL = [*CASES, "spread", "adapters"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=ALL, default=ALL)
    arguments = parser.parse_args()
    make(arguments.out, arguments.seed, arguments.only)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
