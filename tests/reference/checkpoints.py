"""Small seeded checkpoints: a tokenizer trained on our own sentences, random weights, every form that we serve.

A library for make_fixtures.py and parity.py; not run by itself. `write_checkpoint` says what a
recipe may hold.
"""

import json
import random
import re
from functools import cache
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import nn
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from reference import head_from

# Prompts

OBJECTS = """apple armchair backpack ball balloon banana basket bear bed bench bicycle bird blanket board boat book
bookcase boots bottle bowl box bread broom brush bucket bus butterfly cabinet cactus cake calendar camera candle car
carpet carrot cat chair chalkboard chandelier chest clock coat coffee computer cone couch crate cube cup curtain cushion
cutlery dictionary dog door drawer dresser drum duck easel eraser fan fence fern fireplace fish flag flashlight flower
fork fountain frame fridge frog globe glove goldfish guitar hammer hat headphones helmet horse hose jacket jar kettle
keyboard kite knife ladder lamp lantern laptop lemon lighthouse locker mailbox map mat microscope microwave mirror
monitor mop mug notebook orange oven owl painting pan paper parrot pear pencil penguin piano pillow pineapple pitcher
plant plate pot printer projector pumpkin puppy rabbit racket radio rocket rope rug ruler sandwich saucer saw scarf
scissors screwdriver sculpture shelf shoe sink skateboard sofa spoon stapler statue stool stove strawberry suitcase
sunflower table tablet teapot telephone telescope television tennis toaster tomato toolbox towel toy train tray tree
trophy trumpet turtle typewriter umbrella vacuum vase violin wagon wardrobe watch wheel whiteboard window wrench
""".split()
COLOURS = """red blue green yellow white black orange purple pink grey brown golden silver turquoise beige crimson
wooden striped brass marble ceramic glass leather plastic metal woven checkered dotted polished rusty folded open closed
empty small large tall round square narrow wide""".split()
SCENES = (
    """kitchen|living room|classroom|study|bedroom|hallway|garage|garden|workshop|library|studio|harbour|bathroom
balcony|office|museum|bakery|laboratory|playground|beach|station|market|attic|cellar|greenhouse|park|restaurant
""".strip()
    .replace("\n", "|")
    .split("|")
)
RELATIONS = """to the left of|to the right of|in front of|behind|above|below|on top of|underneath|next to|beside
at the left edge of|at the right edge of|exactly at the midpoint between the window and|aligned with|centered on|facing
in the top left corner of|in the bottom right corner of|leaning against|hanging over|directly below|slightly behind
far from|close to|between the door and|inside|outside|on the near side of|on the far side of|diagonally across from
parallel to|surrounded by""".replace("\n", "|").split("|")


def spatial_prompt(rng, relations):
    """A sentence or a few that state so many relations."""
    thing = lambda: f"{rng.choice(COLOURS)} {rng.choice(OBJECTS)}"
    clauses = [
        f"the {thing()} {rng.choice(('is', 'stands', 'sits', 'lies', 'hangs'))} {rng.choice(RELATIONS)} the {thing()}"
        for _ in range(relations)
    ]
    scene = rng.choice((f"In the {rng.choice(SCENES)}, ", f"A {rng.choice(SCENES)}: ", f"{rng.choice(SCENES)}; ", ""))
    return scene + rng.choice((", ", ". ", "; ", ", and ")).join(clauses) + "."


# The tokenizer

# Name, and whether it is special in the sense of the tokenizers library, in the order of Qwen2.5-VL's ids.
SPECIAL = [
    (f"<|{name}|>", True)
    for name in """endoftext im_start im_end object_ref_start object_ref_end box_start
box_end quad_start quad_end vision_start vision_end vision_pad image_pad video_pad""".split()
] + [
    (name, False)
    for name in """<tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|>
<|repo_name|> <|file_sep|>""".split()
]

REWARD_TOKEN = "<|Reward|>"


def untrained_tokenizer(model):
    """Qwen's steps round a byte-pair model: NFC, its regular expression, bytes as letters."""
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def add_special_tokens(tokenizer, reward_token):
    """Behind the ordinary vocabulary, the reward's token last, as trainers add it."""
    names = SPECIAL + ([(reward_token, True)] if reward_token else [])
    for name, special in names:
        tokenizer.add_tokens([AddedToken(name, special=special, normalized=False)])
    return tokenizer


@cache
def trained_pairs(size, more=()):
    """Byte pairs learnt from sentences of ours and these: the JSON of a tokenizer without special tokens."""
    rng = random.Random(0)
    tokenizer = untrained_tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    sentences = [spatial_prompt(rng, rng.randint(1, 6)) for _ in range(2000)]
    sentences += ["system\nYou are a helpful assistant.\nuser\nassistant\n" + text for text in INSTRUCTIONS] * 50
    sentences += more
    tokenizer.train_from_iterator(sentences, trainer)
    return tokenizer.to_str()


def small_tokenizer(size, reward_token=None):
    """A tokenizer in Qwen's form with at most `size` ordinary tokens."""
    return add_special_tokens(Tokenizer.from_str(trained_pairs(size)), reward_token)


# The conversation

# The structure of Qwen's template, for pictures and text: a system turn where the caller gave none, the turns, and the
# opening of the answer.
CHAT_TEMPLATE = """{%- if messages[0].role != 'system' -%}
<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif -%}
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.content is string -%}
{{ message.content }}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' or 'image' in part -%}
<|vision_start|><|image_pad|><|vision_end|>
{%- elif 'text' in part -%}
{{ part.text }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""

INSTRUCTIONS = (
    "Rate how well the picture keeps the spatial relations of this prompt: {prompt}\n",
    "{prompt}",
    "Does the picture show this?\n{prompt}\nLook at each relation in turn, then judge. ",
)


# Weights


def gain(name):
    """How much wider than plain scaling a matrix is drawn."""
    # With it alone, every query would see much the same average, and the reward's token mostly itself.
    keen = dict(q_proj=2.0, k_proj=2.0, o_proj=2.0, qkv=1.4) | {"rm_head.0": 2.0}
    return next((factor for part, factor in keen.items() if part in name), 1.0)


def randomise(model, seed):
    """Seeded weights under which activations stay of order one and every part of the model matters."""
    generator = torch.Generator().manual_seed(seed)
    normal = lambda weight: torch.randn(weight.shape, generator=generator)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("bias"):
                weight.copy_(0.2 * normal(weight))
            elif "norm" in name or "ln_q" in name:
                weight.copy_(1 + 0.2 * normal(weight))
            elif "pos_embed" in name:
                weight.copy_(0.5 * normal(weight))
            elif "embed_tokens" in name:
                weight.copy_(normal(weight))
            else:
                weight.copy_(gain(name) * normal(weight) / weight[0].numel() ** 0.5)


def new_head(hidden, recipe):
    """The reward head of a recipe: `slots` of the layers, or linear."""
    outputs = 2 if recipe["output"] == "gaussian" else 1
    slots = recipe["head"]
    if not slots:
        return nn.Linear(hidden, outputs, bias=False)
    widths = [hidden, *recipe.get("widths", (24, 8)), outputs]
    layers = {f"{slot}.weight": torch.empty(widths[i + 1], widths[i]) for i, slot in enumerate(slots)}
    biases = {f"{slot}.bias": torch.empty(widths[i + 1]) for i, slot in enumerate(slots)}
    return head_from(layers | biases)


FAMILIES = {
    "qwen2_vl": (Qwen2VLConfig, Qwen2VLForConditionalGeneration, "Qwen2VLProcessor"),
    "qwen2_5_vl": (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, "Qwen2_5_VLProcessor"),
    "qwen3_vl": (Qwen3VLConfig, Qwen3VLForConditionalGeneration, "Qwen3VLProcessor"),
}


def family_of(recipe):
    return recipe.get("family", "qwen2_5_vl")


def vision_config(recipe):
    """The shape of the vision tower under its family's names."""
    vision, out = recipe["vision"], recipe["text"]["hidden"]
    shape = dict(depth=vision["depth"], num_heads=vision["heads"])
    match family_of(recipe):
        case "qwen2_vl":
            return shape | dict(embed_dim=vision["hidden"], mlp_ratio=vision["ratio"], hidden_size=out)
        case "qwen2_5_vl":
            return shape | dict(
                hidden_size=vision["hidden"],
                intermediate_size=vision["intermediate"],
                window_size=vision["window"],
                fullatt_block_indexes=vision["full"],
                out_hidden_size=out,
                tokens_per_second=2,
            )
        case "qwen3_vl":
            return shape | dict(
                hidden_size=vision["hidden"],
                intermediate_size=vision["intermediate"],
                num_position_embeddings=vision["places"],
                deepstack_visual_indexes=vision["deepstack"],
                out_hidden_size=out,
            )


def new_model(recipe, rows, ids):
    """The model of a recipe with `rows` of vocabulary and random weights."""
    text = recipe["text"]
    config_class, model_class, _ = FAMILIES[family_of(recipe)]
    config = config_class(
        text_config=dict(
            vocab_size=rows,
            max_position_embeddings=32768,
            rms_norm_eps=1e-6,
            bos_token_id=ids["<|endoftext|>"],
            eos_token_id=ids["<|im_end|>"],
            hidden_size=text["hidden"],
            intermediate_size=text["intermediate"],
            num_hidden_layers=text["layers"],
            num_attention_heads=text["heads"],
            num_key_value_heads=text["kv_heads"],
            rope_parameters=dict(rope_type="default", rope_theta=text["theta"], mrope_section=text["sections"]),
            **{key: text[key] for key in ("head_dim", "attention_bias") if key in text},
        ),
        vision_config=vision_config(recipe),
        tie_word_embeddings=recipe["tied"],
        **{
            f"{name}_token_id": ids[f"<|{token}|>"]
            for name, token in dict(
                image="image_pad", video="video_pad", vision_start="vision_start", vision_end="vision_end"
            ).items()
        },
    )
    model = model_class(config)
    model.rm_head = new_head(text["hidden"], recipe)
    randomise(model, recipe["seed"])
    return model.eval()


# Files

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def old_config(config, dtype, scaling):
    """`config.json` as it was before transformers 4.52, from what it is now: the decoder's keys at the top."""
    text, vision = config.pop("text_config"), config.pop("vision_config")
    rope = text.pop("rope_parameters")
    for absent in ("layer_types", "dtype", "model_type", "pad_token_id"):
        text.pop(absent, None)
    for absent in ("rope_parameters", "dtype", "in_channels"):
        vision.pop(absent, None)
    config.pop("dtype", None)
    vision |= {"model_type": config["model_type"], "in_chans": 3, "spatial_patch_size": vision["patch_size"]}
    return (
        text
        | config
        | {
            "sliding_window": 32768,
            "torch_dtype": str(dtype).removeprefix("torch."),
            "transformers_version": "4.50.0",
            "rope_theta": rope["rope_theta"],
            "rope_scaling": scaling | {"mrope_section": rope["mrope_section"]},
            "vision_config": vision,
        }
    )


def write_json(path, value):
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_texts(directory, tokenizer, recipe):
    """The tokenizer, the chat template where the recipe wants it, and what the image processor is told."""
    tokenizer.save(str(directory / "tokenizer.json"))
    said = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    said |= {"model_max_length": 32768, "split_special_tokens": False, "add_prefix_space": False}
    match recipe["template"]:
        case "jinja":
            (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)
        case "json":
            write_json(directory / "chat_template.json", {"chat_template": CHAT_TEMPLATE})
        case "config":
            said["chat_template"] = CHAT_TEMPLATE
    write_json(directory / "tokenizer_config.json", said)

    own = dict(patch_size=16, image_mean=[0.5] * 3, image_std=[0.5] * 3) if family_of(recipe) == "qwen3_vl" else {}
    images = Qwen2VLImageProcessorPil(min_pixels=recipe["pixels"][0], max_pixels=recipe["pixels"][1], **own).to_dict()
    if recipe["config"] == "old":
        # Those files name the limits by their old keys.
        size = images.pop("size")
        images |= {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}
    write_json(directory / "preprocessor_config.json", images | {"processor_class": FAMILIES[family_of(recipe)][2]})


def write_reward(directory, recipe):
    reward = {"instruction": recipe["instruction"]}
    if token := recipe.get("reward_token"):
        assert token in reward["instruction"]
        reward |= {"reward_token": "special", "special_token": token}
    else:
        reward["reward_token"] = "last"
    reward |= {"positions": recipe["positions"], "output": recipe["output"]}
    reward |= {key: recipe[key] for key in ("min_pixels", "max_pixels", "pictures", "notice") if key in recipe}
    write_json(directory / "reward_config.json", reward)


def write_model(directory, model, recipe):
    dtype = DTYPES[recipe["dtype"]]
    model = model.to(dtype)
    if recipe.get("shards"):
        model.save_pretrained(directory, max_shard_size=recipe["shards"])
        (directory / "generation_config.json").unlink()
    else:
        tensors = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        if recipe["tied"] and not recipe.get("lm_head"):
            del tensors["lm_head.weight"]
        if recipe["keys"] == "old":
            tensors = {re.sub(r"^model\.visual\.", "visual.", name): tensor for name, tensor in tensors.items()}
            tensors = {re.sub(r"^model\.language_model\.", "model.", name): tensor for name, tensor in tensors.items()}
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        model.config.architectures = [type(model).__name__]
        config = json.loads(model.config.to_json_string())
        if recipe["config"] == "old":
            config = old_config(config, dtype, recipe["scaling"])
        write_json(directory / "config.json", config)


def write_adapter(directory, model, recipe):
    """A random LoRA adapter by peft's own hand, the head in it where the recipe says so."""
    torch.manual_seed(recipe["seed"])
    adapted = get_peft_model(model, LoraConfig(**recipe["lora"]))
    generator = torch.Generator().manual_seed(recipe["seed"] + 1)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_" in name:
                weight.copy_(0.5 * torch.randn(weight.shape, generator=generator) / weight.shape[1] ** 0.5)
            elif "modules_to_save" in name:
                weight.copy_(weight * (1 + 0.1 * torch.randn(weight.shape, generator=generator)))
    adapted.save_pretrained(directory)
    (directory / "README.md").unlink(missing_ok=True)
    # A set in peft's hands, so in no order: sorted, lest the file change with every run.
    path = directory / "adapter_config.json"
    said = json.loads(path.read_text())
    if isinstance(said["target_modules"], list):
        write_json(path, said | {"target_modules": sorted(said["target_modules"])})


def write_checkpoint(directory, recipe):
    """Writes the checkpoint that a recipe describes. A recipe holds

    family (the model_type; absent: qwen2_5_vl), pictures (how many an item has; absent: one),
    seed, dtype (fp32, bf16, fp16), tied, lm_head (on disk although tied), keys (old, new), config (old, new), scaling
    (what `rope_scaling` says besides the sections, for an old config), shards (the greatest size of one), spare_rows
    (how many fewer rows than the config says), vocabulary (how many ordinary tokens, or a tokenizer), template (jinja,
    json, config: where it stands), pixels (limits in the preprocessor's file), min_pixels and max_pixels (in ours),
    instruction, reward_token (absent: last), positions, output, head (slots of its layers; empty: linear), widths,
    notice, vision and text (the shape), lora (peft's arguments), head_in_adapter (the base has none).
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = recipe["vocabulary"]
    if isinstance(tokenizer, int):
        tokenizer = small_tokenizer(tokenizer, recipe.get("reward_token"))
    rows = tokenizer.get_vocab_size(with_added_tokens=True)
    write_texts(directory, tokenizer, recipe)
    write_reward(directory, recipe)
    model = new_model(recipe, rows, tokenizer.get_vocab(with_added_tokens=True))
    if "lora" in recipe:
        write_adapter(directory, model, recipe)
        model = new_model(recipe, rows, tokenizer.get_vocab(with_added_tokens=True))
        if recipe.get("head_in_adapter"):
            del model.rm_head
    write_model(directory, model, recipe)
    if spare := recipe.get("spare_rows"):
        path = directory / "config.json"
        config = json.loads(path.read_text())
        config.get("text_config", config)["vocab_size"] = rows + spare
        write_json(path, config)
