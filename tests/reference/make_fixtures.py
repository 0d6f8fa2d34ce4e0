"""Makes the golden fixtures: small seeded checkpoints, items to score, and every stage as the reference computes it.

    python tests/reference/make_fixtures.py OUT [--seed S] [--only CASE ...]

For each case:

    OUT/CASE/checkpoint/           as `save_pretrained` would leave it, with reward_config.json
    OUT/CASE/items/{k}.png …       pictures
    OUT/CASE/items.json            a list of {"prompt", "image", "references"}; paths are relative to OUT/CASE; the
                                   last is absent where an item has one picture
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

# Small enough for eight checkpoints more.
SMALL = dict(
    dtype="bf16",
    tied=True,
    keys="new",
    vocabulary=300,
    widths=(12, 6),
)


def qwen2(hidden=16, depth=2, heads=2, ratio=2):
    return dict(hidden=hidden, depth=depth, heads=heads, ratio=ratio)


def qwen3(deepstack, hidden=16, depth=2, heads=2, intermediate=24, places=16):
    return dict(
        hidden=hidden, depth=depth, heads=heads, intermediate=intermediate, places=places, deepstack=deepstack
    )


def decoder(sections, hidden=16, intermediate=24, layers=2, heads=2, kv_heads=1, theta=10000.0, **more):
    shape = dict(hidden=hidden, intermediate=intermediate, layers=layers, heads=heads, kv_heads=kv_heads)
    return shape | dict(theta=theta, sections=sections) | more


CASES |= {
    # Two pictures before the text, three and one besides; windows.
    "several": SMALL
    | dict(
        pictures=2,
        max_pixels=6272,
        vision=dict(depth=2, hidden=16, intermediate=24, heads=2, window=56, full=[1]),
        text=decoder([2, 1, 1]),
        sizes=[[(60, 50), (150, 100)], [(90, 60)], [(40, 120), (84, 84), (30, 30)]],
    ),
    # Qwen2-VL: an MLP head, the grid.
    "qwen2": SMALL
    | dict(
        family="qwen2_vl",
        max_pixels=8000,
        vision=qwen2(depth=3),
        text=decoder([2, 1, 1], layers=3),
        sizes=[(60, 50), (150, 100), (30, 200)],
    ),
    # The files as Qwen2-VL's own are: keys and configuration of old, with lm_head, tokens numbered flat.
    "qwen2_old": SMALL
    | dict(
        family="qwen2_vl",
        keys="old",
        config="old",
        scaling={"type": "mrope"},
        tied=False,
        template="json",
        positions="flat",
        vision=qwen2(heads=4, ratio=4),
        text=decoder([1, 2, 1], kv_heads=2),
        sizes=[(70, 130), (56, 56)],
    ),
    # fp16 in shards, a scalar at the last token, fewer rows than the config says, four queries to a key.
    "qwen2_shards": SMALL
    | dict(
        family="qwen2_vl",
        dtype="fp16",
        shards="60KB",
        spare_rows=33,
        template="config",
        instruction=INSTRUCTIONS[2],
        reward_token=None,
        output="scalar",
        head=(),
        max_pixels=6272,
        vision=qwen2(ratio=3),
        text=decoder([2, 1, 1], hidden=32, heads=4, kv_heads=1, theta=1000000.0),
        sizes=[(84, 60), (40, 100)],
    ),
    # Several pictures without the grid, and an adapter on the tower too.
    "qwen2_several": SMALL
    | dict(
        family="qwen2_vl",
        pictures=2,
        positions="flat",
        max_pixels=4704,
        lora=dict(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj", "down_proj", "qkv", "fc1", "fc2"]),
        vision=qwen2(),
        text=decoder([2, 1, 1]),
        sizes=[[(60, 50), (50, 110)], [(56, 84), (30, 30), (84, 56)]],
    ),
    # Qwen3-VL: heads wider than a token's share, a deepstack behind two of three layers.
    "qwen3": SMALL
    | dict(
        family="qwen3_vl",
        max_pixels=9216,
        vision=qwen3([0, 1], depth=3, places=25),
        text=decoder([4, 2, 2], layers=3, head_dim=16),
        sizes=[(60, 50), (150, 100), (200, 30)],
    ),
    # Untied, with biases, flat; more features than layers that take them, in no order.
    "qwen3_flat": SMALL
    | dict(
        family="qwen3_vl",
        tied=False,
        template="config",
        positions="flat",
        max_pixels=9216,
        vision=qwen3([2, 0, 1], depth=3),
        text=decoder([2, 3, 3], head_dim=16, attention_bias=True),
        sizes=[(70, 130), (64, 64)],
    ),
    # bf16 in shards, a scalar at the last token, sections that do not add up to half a head.
    "qwen3_shards": SMALL
    | dict(
        family="qwen3_vl",
        shards="60KB",
        spare_rows=33,
        template="json",
        instruction=INSTRUCTIONS[0],
        reward_token=None,
        output="scalar",
        head=(),
        max_pixels=9216,
        vision=qwen3([1], heads=4),
        text=decoder([2, 1, 1], heads=4, kv_heads=2, theta=500000.0, head_dim=24),
        sizes=[(84, 60), (40, 200)],
    ),
    # An adapter over both towers; limits of the preprocessor's own file.
    "qwen3_lora": SMALL
    | dict(
        family="qwen3_vl",
        pixels=(4096, 8192),
        min_pixels=None,
        max_pixels=None,
        lora=dict(r=2, lora_alpha=4, target_modules=["q_proj", "k_proj", "o_proj", "qkv", "linear_fc1", "linear_fc2"]),
        vision=qwen3([0]),
        text=decoder([4, 2, 2], head_dim=16),
        sizes=[(100, 70), (64, 96)],
    ),
    "qwen3_several": SMALL
    | dict(
        family="qwen3_vl",
        pictures=2,
        max_pixels=6144,
        vision=qwen3([0, 1]),
        text=decoder([4, 2, 2], layers=3, head_dim=16),
        sizes=[[(60, 50), (50, 140)], [(64, 96)], [(40, 40), (96, 64), (130, 60)]],
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
    items, saved = [], 0
    for k, text in enumerate(texts):
        sizes = case["sizes"][k % len(case["sizes"])]
        names = []
        for size in sizes if isinstance(sizes, list) else [sizes]:
            names.append(save_picture(directory, saved, size, seed + saved))
            saved += 1
        item = {"prompt": text, "image": names.pop()}
        items.append(item | ({"references": names} if names else {}))
    write_json(directory / "items.json", items)

    reference = Reference(directory / "checkpoint")
    check_tokenizer(reference, directory, [item["prompt"] for item in items])
    golden = {}
    for k, item in enumerate(items):
        paths = [directory / name for name in item.get("references", []) + [item["image"]]]
        stages = reference.score(item["prompt"], *paths)
        if not spells_special(item["prompt"]):
            reference.check(item["prompt"], *paths)
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
