"""Makes the fixtures of the profiles: small seeded checkpoints in the layouts of public trainers, and their rewards.

    python tests/reference/make_profiles.py OUT [--seed S]

Below OUT:

    bases/FAMILY[_tied]/       an instruct checkpoint as the hub has it: lm_head, no reward. `generation_config.json` of
                               Qwen2.5-VL asks for a repetition penalty. Its table has more rows than tokens.
    hpsv3/HPSv3.safetensors    as HPSv3's trainer leaves it, on bases/qwen2_vl: this file alone, keys of before
                               transformers 4.52, one row for each token and one more for `<|Reward|>`
    editreward/, editreward_shared/    model.safetensors as EditReward's trainer leaves it, on bases/qwen2_5_vl: two
                               heads and keys of today; one head for both passes and keys of old
    pictures/                  PNG of mixed sizes, with alpha and with a palette among them
    hpsv3.json, editreward.json, editreward_shared.json
                               base, weights, items: prompt, pictures, tokens of the (first) pass, mean and sigma; for
                               EditReward those of each pass as `components`, and of `mean`, `min` and `sum` of them
    probabilities.json         for each base and reading: text, answers, ids, items: probability and its logit
    soft_tifa.json             for each base items of several questions: each one's probability, and their arithmetic
                               and geometric mean

Instructions stand in profiles.json beside this script, with their sources. A profile is assembled into a checkpoint
that the classes of transformers load, and read by reference.py, stage by stage; where no prompt spells a special token
the answers' probabilities are asked of `generate` too, penalty included, and HPSv3's and EditReward's rewards of a
forward pass from embeddings without positions, which is what theirs are.
"""

import json
import math
import random
import shutil
import tempfile
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer
from torch import nn
from transformers.image_utils import load_image

from checkpoints import (
    CHAT_TEMPLATE,
    REWARD_TOKEN,
    add_special_tokens,
    new_head,
    new_model,
    randomise,
    spatial_prompt,
    trained_pairs,
    write_json,
    write_model,
    write_texts,
)
from command import run
from make_fixtures import COMMON, UNUSUAL, decoder, qwen2, qwen3, seed_of, spells_special
from pictures import drawing
from reference import Reference

PROFILES = json.loads(Path(__file__).with_name("profiles.json").read_text())

NUMBERS = "zero one two three four five six seven eight nine ten".split()
YES = ["Yes", "yes", " yes", " Yes"]
PENALTY = 1.05
SPARE_ROWS = 13

SMALL = COMMON | dict(dtype="bf16", output="gaussian", widths=(1024, 16), config="old", template="json")

BASES = {
    "qwen2_vl": dict(
        family="qwen2_vl", scaling={"type": "mrope"}, keys="old", vision=qwen2(hidden=16), text=decoder([2, 1, 1])
    ),
    "qwen2_vl_tied": dict(
        family="qwen2_vl", scaling={"type": "mrope"}, keys="old", vision=qwen2(hidden=8), text=decoder([2, 1, 1])
    ),
    "qwen2_5_vl": dict(
        scaling={"type": "mrope"},
        keys="old",
        vision=dict(depth=2, hidden=16, intermediate=24, heads=2, window=56, full=[1]),
        text=decoder([2, 1, 1]),
    ),
    "qwen2_5_vl_tied": dict(
        scaling={"type": "mrope"},
        keys="old",
        vision=dict(depth=2, hidden=8, intermediate=16, heads=2, window=56, full=[1]),
        text=decoder([2, 1, 1]),
    ),
    "qwen3_vl": dict(
        family="qwen3_vl",
        config="new",
        keys="new",
        pixels=(65536, 16777216),
        vision=qwen3([0], hidden=8),
        text=decoder([4, 2, 2], head_dim=16),
    ),
    "qwen3_vl_tied": dict(
        family="qwen3_vl",
        config="new",
        keys="new",
        pixels=(65536, 16777216),
        vision=qwen3([0, 1], hidden=8),
        text=decoder([4, 2, 2], head_dim=16),
    ),
}

PICTURES = {
    "wide": (150, 100),
    "small": (60, 50),
    "tall": (60, 140),
    "strip": (200, 30),
    "edited": (140, 90),
    "alpha": (80, 80),
    "palette": (100, 64),
}


def recipe_of(name, seed):
    return SMALL | BASES[name] | {"tied": name.endswith("_tied"), "seed": seed_of(name, seed)}


def tokenizer_of_base():
    """Qwen's form, with the words of answers as tokens of their own where Qwen has them so."""
    rng = random.Random(1)
    words = [*YES, "No", "no", " No", " no", *NUMBERS]
    more = tuple(" ".join(rng.choice(words) for _ in range(20)) for _ in range(2000))
    texts = tuple(step["text"] for name in ("hpsv3", "editreward") for step in PROFILES[name]["passes"])
    return add_special_tokens(Tokenizer.from_str(trained_pairs(440, more + 60 * texts)), None)


# Checkpoints


@torch.no_grad()
def lean(model, tokenizer):
    """Inclines the model to say yes or no, of which random rows alone would make one word in some hundreds."""
    rows = model.lm_head.weight
    rows.mul_(0.4 / rows.std())
    opening = torch.tensor([tokenizer.encode("<|im_start|>assistant\n").ids])
    hidden = model.model(input_ids=opening, position_ids=torch.arange(opening.shape[1]).expand(3, 1, -1))[0][0, -1]
    answers = sorted({tokenizer.encode(answer).ids[0] for answer in [*YES, "No", "no"]})
    rows[answers] += 8 * hidden / hidden.square().sum()


def as_the_hub_has_it(path):
    """Qwen3-VL's config.json with the decoder's keys of transformers 4.57, which wrote those of the hub."""
    config = json.loads(path.read_text())
    config["text_config"]["tie_word_embeddings"] = config["tie_word_embeddings"]
    rope = config["text_config"].pop("rope_parameters")
    config["text_config"]["rope_theta"] = rope.pop("rope_theta")
    config["text_config"]["rope_scaling"] = rope | {"mrope_interleaved": True}
    write_json(path, config)


def write_base(directory, recipe):
    """An instruct checkpoint: what a reward's weights stand on, or what is asked questions."""
    directory.mkdir(parents=True)
    tokenizer = tokenizer_of_base()
    write_texts(directory, tokenizer, recipe)
    if recipe.get("family") == "qwen3_vl":
        # This family's template writes no system turn of its own.
        template = CHAT_TEMPLATE[CHAT_TEMPLATE.index("{%- for message in messages") :]
        write_json(directory / "chat_template.json", {"chat_template": template})
    ids = tokenizer.get_vocab(with_added_tokens=True)
    model = new_model(recipe, len(ids) + SPARE_ROWS, ids)
    del model.rm_head
    lean(model, tokenizer)
    write_model(directory, model, recipe)
    if recipe["config"] == "new":
        as_the_hub_has_it(directory / "config.json")
    ends = [ids["<|im_end|>"], ids["<|endoftext|>"]]
    said = {"bos_token_id": ends[1], "pad_token_id": ends[1], "eos_token_id": ends, "do_sample": True}
    said |= {"repetition_penalty": PENALTY if "qwen2_5" in directory.name else 1.0, "temperature": 0.01}
    write_json(directory / "generation_config.json", said)


def trained_weights(base, recipe, heads, seed):
    """All that a trainer saves: a backbone of its own, a row more than tokens, lm_head, the heads."""
    ids = Tokenizer.from_file(str(base / "tokenizer.json")).get_vocab(with_added_tokens=True)
    model = new_model(recipe, len(ids) + 1, ids)
    if heads == ["rm_head"]:
        model.rm_head = new_head(recipe["text"]["hidden"], recipe)
    else:
        del model.rm_head
        model.rm_heads = nn.ModuleDict({key.split(".")[1]: new_head(recipe["text"]["hidden"], recipe) for key in heads})
    randomise(model, seed)
    return {key: tensor.detach().clone() for key, tensor in model.state_dict().items()}


def old_keys(tensors):
    """The names of before transformers 4.52."""
    places = {"model.visual.": "visual.", "model.language_model.": "model."}
    for new, old in places.items():
        tensors = {old + key.removeprefix(new) if key.startswith(new) else key: t for key, t in tensors.items()}
    return tensors


def save_weights(path, tensors, full_heads=False):
    """In bf16, the heads in fp32 where a trainer keeps them so."""
    path.parent.mkdir(parents=True)
    kept = lambda key: torch.float32 if full_heads and key.startswith("rm_head") else torch.bfloat16
    save_file({key: tensor.to(kept(key)) for key, tensor in tensors.items()}, path, metadata={"format": "pt"})


# The reference


def assemble(directory, base, weights=None):
    """A checkpoint folder that transformers reads: the base, or the base's files round a trainer's weights."""
    for file in base.iterdir():
        if weights is None or not (file.name.startswith("model") or file.name == "tokenizer.json"):
            (directory / file.name).symlink_to(file.resolve())
    if weights is not None:
        (directory / "model.safetensors").symlink_to(weights.resolve())
        tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
        tokenizer.add_tokens([AddedToken(REWARD_TOKEN, special=True, normalized=False)])
        tokenizer.save(str(directory / "tokenizer.json"))


def open_reference(base, weights, head, reward):
    """The reference of one readout."""
    with tempfile.TemporaryDirectory() as place:
        assemble(Path(place), base, weights)
        write_json(Path(place) / "reward_config.json", reward)
        return Reference(place, head=head)


def read_head(base, weights, profile, step):
    """A head's reference at the reward's token."""
    reward = {"instruction": step["text"], "reward_token": "special", "special_token": REWARD_TOKEN}
    reward |= {"output": "gaussian"} | {key: profile[key] for key in ("positions", "min_pixels", "max_pixels")}
    return open_reference(base, weights, step["head"], reward)


def read_vocabulary(base, text):
    """lm_head's reference behind the opening of the answer."""
    reward = {"instruction": text, "reward_token": "last", "positions": "mrope", "output": "scalar"}
    return open_reference(base, None, "lm_head", reward)


@torch.no_grad()
def check_from_embeddings(reference, prompt, paths, columns):
    """HPSv3's and EditReward's own way: embeddings, pictures scattered into them, no ids and no positions."""
    images = [load_image(str(path)) for path in paths]
    inputs = reference.processor(text=[reference.render(prompt, len(paths))], images=images, return_tensors="pt")
    model, ids = reference.model, inputs["input_ids"]
    embeddings = model.get_input_embeddings()(ids)
    visual = model.model.visual(inputs["pixel_values"].float(), grid_thw=inputs["image_grid_thw"]).pooler_output
    places = (ids == model.config.image_token_id)[..., None].expand_as(embeddings)
    embeddings = embeddings.masked_scatter(places, visual)
    hidden = model.model.language_model(inputs_embeds=embeddings, attention_mask=inputs["attention_mask"])[0]
    read = model.rm_head(hidden)[ids == reference.tokenizer.convert_tokens_to_ids(REWARD_TOKEN)]
    assert torch.allclose(read[0], columns, rtol=1e-5, atol=1e-6), (read, columns)


@torch.no_grad()
def generated_scores(reference, prompt, path, penalty):
    """What `generate` scores the first token of its answer from."""
    text = [reference.render(prompt)]
    inputs = reference.processor(text=text, images=[load_image(str(path))], return_tensors="pt")
    settings = dict(max_new_tokens=1, do_sample=False, output_scores=True, return_dict_in_generate=True)
    settings |= dict(temperature=None, repetition_penalty=penalty)
    return reference.model.generate(**inputs, **settings).scores[0][0]


def penalised(logits, ids, penalty):
    """Logits of tokens that stand in the prompt, made smaller by the penalty of `generate`."""
    seen = logits[ids]
    return logits.index_put((ids,), torch.where(seen < 0, seen * penalty, seen / penalty))


def probability(logits, ids, others=None):
    """The share of these tokens among all, or among them and the others, and its logit."""
    logits = logits.double()
    positive = logits[ids].logsumexp(0)
    rest = torch.ones_like(logits, dtype=torch.bool)
    rest[ids] = False
    negative = (logits[rest] if others is None else logits[others]).logsumexp(0)
    logit = positive - negative
    return {"probability": float(logit.sigmoid()), "logit": float(logit)}


def first_ids(tokenizer, answers):
    """The first token of each answer, each once."""
    encoded = (tokenizer(answer, add_special_tokens=False)["input_ids"][0] for answer in answers)
    return list(dict.fromkeys(encoded))


def gaussian(columns):
    return {"mean": float(columns[0]), "sigma": float(columns[1].exp())}


def fuse(columns):
    """EditReward's three ways to make one Gaussian of several, over columns mean and log sigma."""
    columns = torch.stack(columns)
    summed = torch.stack([columns[:, 0].sum(), columns[:, 1].exp().square().sum().sqrt().log()])
    return {
        "mean": gaussian(columns.mean(0)),
        "min": gaussian(columns.min(0).values),
        "sum": gaussian(summed),
    }


# The fixtures


def write_pictures(directory, seed):
    directory.mkdir(parents=True)
    for k, (name, size) in enumerate(PICTURES.items()):
        image = drawing(*size, seed + k)
        if name == "alpha":
            image.putalpha(Image.linear_gradient("L").resize(size))
        elif name == "palette":
            image = image.quantize(32)
        image.save(directory / f"{name}.png", optimize=True)


def prompts(rng, count):
    return [spatial_prompt(rng, 1 + k % 3) for k in range(count - len(UNUSUAL))] + list(UNUSUAL)


def score_item(references, prompt, paths):
    """Each pass's columns, checked in the trainers' own way."""
    read = [reference.score(prompt, *paths) for reference in references]
    for reference, stages in zip(references, read):
        if not spells_special(prompt):
            reference.check(prompt, *paths)
            check_from_embeddings(reference, prompt, paths, stages["head"])
    return len(read[0]["input_ids"]), [stages["head"] for stages in read]


def make_hpsv3(out, seed):
    base, weights = out / "bases/qwen2_vl", out / "hpsv3/HPSv3.safetensors"
    recipe = recipe_of("qwen2_vl", seed)
    save_weights(weights, old_keys(trained_weights(base, recipe, ["rm_head"], seed_of("hpsv3", seed))), True)
    profile = PROFILES["hpsv3"]
    references = [read_head(base, weights, profile, profile["passes"][0])]
    items = []
    names = [name for name in PICTURES if name != "edited"]
    for k, prompt in enumerate(prompts(random.Random(seed_of("hpsv3", seed)), 8)):
        picture = f"pictures/{names[k % len(names)]}.png"
        tokens, columns = score_item(references, prompt, [out / picture])
        items.append({"prompt": prompt, "pictures": [picture], "tokens": tokens} | gaussian(columns[0]))
    write_json(out / "hpsv3.json", {"base": "bases/qwen2_vl", "weights": "hpsv3/HPSv3.safetensors", "items": items})


def make_editreward(out, seed, name):
    shared = name.endswith("_shared")
    base, weights = out / "bases/qwen2_5_vl", out / name / "model.safetensors"
    passes = [step | ({"head": "rm_head"} if shared else {}) for step in PROFILES["editreward"]["passes"]]
    heads = list(dict.fromkeys(step["head"] for step in passes))
    tensors = trained_weights(base, recipe_of("qwen2_5_vl", seed), heads, seed_of(name, seed))
    save_weights(weights, old_keys(tensors) if shared else tensors)
    references = [read_head(base, weights, PROFILES["editreward"], step) for step in passes]
    items = []
    pairs = [("wide", "edited"), ("small", "tall"), ("strip", "palette"), ("alpha", "wide"), ("tall", "small")]
    for k, prompt in enumerate(prompts(random.Random(seed_of(name, seed)), 6)):
        pictures = [f"pictures/{picture}.png" for picture in pairs[k % len(pairs)]]
        tokens, columns = score_item(references, prompt, [out / picture for picture in pictures])
        components = [{"name": step["name"]} | gaussian(column) for step, column in zip(passes, columns)]
        item = {"prompt": prompt, "pictures": pictures, "tokens": tokens, "components": components}
        items.append(item | {"fused": fuse(columns)})
    made = {"base": "bases/qwen2_5_vl", "weights": f"{name}/model.safetensors", "items": items}
    write_json(out / f"{name}.json", made)


def readings():
    """Each way to read answers: the text, the answers, the negative ones, the penalty."""
    plain, judged = PROFILES["vqascore"], PROFILES["vqascore-geneval2"]
    two_rows = dict(text=judged["text"], penalty=1.0)
    return {
        "vqascore": dict(text=plain["text"], answers=plain["answers"], negative=None, penalty=1.0),
        "vqascore-penalty": dict(text=plain["text"], answers=plain["answers"], negative=None, penalty=PENALTY),
        "vqascore-geneval2": dict(text=judged["text"], answers=judged["answers"], negative=None, penalty=1.0),
        "yes-no": two_rows | dict(answers=["Yes"], negative=["No"]),
        "no-yes": two_rows | dict(answers=["No"], negative=["Yes"]),
    }


def read_answers(reference, reading, prompt, path):
    """The probability of the answers to a question, held against `generate`."""
    stages = reference.score(prompt, path)
    logits = penalised(stages["head"], stages["input_ids"].unique(), reading["penalty"])
    if not spells_special(prompt):
        scores = generated_scores(reference, prompt, path, reading["penalty"])
        assert torch.allclose(logits, scores, rtol=1e-4, atol=1e-5), (logits - scores).abs().max()
    ids, others = (first_ids(reference.tokenizer, reading[key] or []) for key in ("answers", "negative"))
    return {"tokens": len(stages["input_ids"])} | probability(logits, ids, others or None)


def make_probabilities(out, seed):
    made = []
    asked = prompts(random.Random(seed_of("vqascore", seed)), 7)
    asked[0] = 'a sign that says "Yes", no more'
    names = list(PICTURES)
    for base in BASES:
        for name, reading in readings().items():
            reference = read_vocabulary(out / "bases" / base, reading["text"])
            items = []
            for k, prompt in enumerate(asked):
                picture = f"pictures/{names[k % len(names)]}.png"
                read = read_answers(reference, reading, prompt, out / picture)
                items.append({"prompt": prompt, "pictures": [picture]} | read)
            ids = first_ids(reference.tokenizer, reading["answers"])
            made.append({"base": f"bases/{base}", "reading": name} | reading | {"ids": ids, "items": items})
    write_json(out / "probabilities.json", made)


def answers_to(question, answer):
    """GenEval2's forms of an answer: the number in words and digits, or yes."""
    if not question.startswith("How many"):
        return YES
    forms = [answer, answer.capitalize(), str(NUMBERS.index(answer))]
    return [space + form for space in ("", " ") for form in forms]


def make_soft_tifa(out, seed):
    rng = random.Random(seed_of("soft-tifa", seed))
    made = []
    names = list(PICTURES)
    for base in BASES:
        reference = read_vocabulary(out / "bases" / base, PROFILES["soft-tifa"]["text"])
        items = []
        for k, count in enumerate((1, 3, 7)):
            picture = f"pictures/{names[(k + len(made)) % len(names)]}.png"
            asked = [(f"How many {rng.choice(('cups', 'dogs', 'lamps'))} are in the image?", rng.choice(NUMBERS[1:]))]
            asked += [(f"Is this true: {spatial_prompt(rng, 1)}", "Yes") for _ in range(count - 1)]
            questions = []
            for question, answer in asked:
                reading = dict(answers=answers_to(question, answer), negative=None, penalty=1.0)
                read = read_answers(reference, reading, question, out / picture)
                questions.append({"question": question, "answers": reading["answers"]} | read)
            shares = [question["probability"] for question in questions]
            means = {"arithmetic": sum(shares) / count, "geometric": math.exp(sum(map(math.log, shares)) / count)}
            items.append({"pictures": [picture], "questions": questions} | means)
        made.append({"base": f"bases/{base}", "text": PROFILES["soft-tifa"]["text"], "items": items})
    write_json(out / "soft_tifa.json", made)


def make(out, seed):
    shutil.rmtree(out, ignore_errors=True)
    write_pictures(out / "pictures", seed_of("pictures", seed))
    for base in BASES:
        write_base(out / "bases" / base, recipe_of(base, seed))
    make_hpsv3(out, seed)
    make_editreward(out, seed, "editreward")
    make_editreward(out, seed, "editreward_shared")
    make_probabilities(out, seed)
    make_soft_tifa(out, seed)


if __name__ == "__main__":
    run(__doc__, make)
