"""The public reward packages themselves, on our small checkpoints: what our server is held against.

    real_packages.py items OUT [--seed S] [--count N]    in .venv/reference: checkpoints, pictures, prompts
    real_packages.py PACKAGE OUT [--source DIR]          in the package's own environment: its numbers
    real_packages.py ours OUT --source BINARY            our server's numbers, in .venv/reference: OUT/ours.json
    real_packages.py compare EXPECTED.json OURS.json [--tolerance T]

`make real-packages` does all of it. `items` empties OUT and puts there: OUT/profiles, the committed fixtures of
make_profiles.py or those of another seed; OUT/items, N pictures of mixed sizes;
OUT/items.json, a list of {"prompt", "image", "source"}, where `source` is the picture before an edit; and
OUT/reference.json, what transformers says by way of reference.py. Each package then writes OUT/PACKAGE.json:

    hpsv3         PyPI's hpsv3: {"hpsv3": [[mean, sigma], …]}
    editreward    TIGER-AI-Lab/EditReward in DIR: {"editreward-mean": [[mean, sigma], …], "-min", "-sum",
                  "-components"} and "editreward_shared-mean", "-min"; components are [mean, sigma, mean, sigma]
    vqascore      PyPI's t2v-metrics: {"vqascore-BASE": [[probability], …]}, BASE of the two families that it knows
    geneval2      facebookresearch/GenEval2 in DIR: {"vqascore-geneval2-BASE": …, "soft-tifa-BASE": [[a share each]]}
    sizes         PyPI's qwen-vl-utils: {"sizes-FACTOR": [[height, width] of each picture], "sizes-28-200704"}

The code of the packages is not changed; they are told folders for hub ids, fp32 and the CPU. They let special tokens of
a prompt into the conversation, where a second `<|Reward|>` moves a neighbour's score; we do not, so for those prompts
their model is given the ids that the prompt has as plain text.

`compare` holds every list that both files have: numbers within T of each other, or of T times the expected where that
is greater than 1; probabilities within T times themselves. It exits with 1 where one is not.
"""

import argparse
import json
import os
import random
import re
import shutil
import subprocess
import sys
import types
import unittest.mock
from pathlib import Path

REWARD_TOKEN = "<|Reward|>"
# How pictures are resized: factor, fewest and most pixels.
RESIZED = [
    ("sizes-28", 28, 4 * 28**2, 16384 * 28**2),
    ("sizes-28-200704", 28, 200704, 200704),
    ("sizes-32", 32, 4 * 32**2, 16384 * 32**2),
]
SIZES = [(512, 512), (1024, 768), (300, 200), (333, 1000), (64, 48), (900, 31), (28, 28), (448, 448), (731, 402)]


def write(path, value):
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_items(out):
    """Prompt, picture and source picture of each item, with their places."""
    return [
        (item["prompt"], str(out / item["image"]), str(out / item["source"]))
        for item in json.loads((out / "items.json").read_text())
    ]


# What is scored


def make_items(out, seed, count):
    import make_profiles
    from checkpoints import spatial_prompt
    from make_fixtures import UNUSUAL
    from pictures import drawing

    shutil.rmtree(out, ignore_errors=True)
    if seed:
        make_profiles.make(out / "profiles", seed)
    else:
        shutil.copytree(Path(__file__).parents[1] / "fixtures/profiles", out / "profiles")
    rng = random.Random(seed)
    (out / "items").mkdir()
    spelled = f"A sign says {REWARD_TOKEN} above the {{door}}."
    texts = [spelled, *UNUSUAL, 'the word "Yes", and No other', "How many cups are in the image?", ""]
    texts += [spatial_prompt(rng, rng.randint(1, 8)) for _ in range(count - len(texts))]
    items = []
    for k, text in enumerate(texts):
        width, height = SIZES[k] if k < len(SIZES) else (rng.randint(28, 700), rng.randint(28, 700))
        image = drawing(width, height, seed + k)
        if k % 5 == 4:
            from PIL import Image

            image.putalpha(Image.linear_gradient("L").resize(image.size))
        image.save(out / f"items/{k}.png")
        items.append({"prompt": text, "image": f"items/{k}.png", "source": f"items/{k - k % 2}.png"})
    write(out / "items.json", items)
    write(out / "reference.json", reference_numbers(out, read_items(out)))


def reference_numbers(out, items):
    """The same by transformers alone."""
    from PIL import Image
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    from make_profiles import PROFILES, first_ids, fuse, penalised, probability, read_head, read_vocabulary, readings

    made, profiles = {}, out / "profiles"
    (step,) = PROFILES["hpsv3"]["passes"]
    pair = lambda gaussian: [gaussian["mean"], gaussian["sigma"]]
    columns = lambda values: pair(dict(mean=float(values[0]), sigma=float(values[1].exp())))
    hpsv3 = read_head(profiles / "bases/qwen2_vl", profiles / "hpsv3/HPSv3.safetensors", PROFILES["hpsv3"], step)
    made["hpsv3"] = [columns(hpsv3.score(prompt, image)["head"]) for prompt, image, _ in items]

    for name in ("editreward", "editreward_shared"):
        base, weights = profiles / "bases/qwen2_5_vl", profiles / name / "model.safetensors"
        steps = PROFILES["editreward"]["passes"]
        heads = [{"head": "rm_head"}] * 2 if name.endswith("shared") else [{}, {}]
        passes = [read_head(base, weights, PROFILES["editreward"], a | b) for a, b in zip(steps, heads)]
        for prompt, image, source in items:
            read = [reference.score(prompt, source, image)["head"] for reference in passes]
            made.setdefault(f"{name}-components", []).append([*columns(read[0]), *columns(read[1])])
            for way, fused in fuse(read).items():
                made.setdefault(f"{name}-{way}", []).append(pair(fused))

    for base in sorted(path.name for path in (profiles / "bases").iterdir()):
        said = json.loads((profiles / "bases" / base / "generation_config.json").read_text())
        # The one that knows the family.
        reading = "vqascore-geneval2" if base.startswith("qwen3") else "vqascore"
        told = readings()[reading]
        reference = read_vocabulary(profiles / "bases" / base, told["text"])
        ids, shares = first_ids(reference.tokenizer, told["answers"]), []
        for prompt, image, _ in items:
            stages = reference.score(prompt, image)
            logits = penalised(stages["head"], stages["input_ids"].unique(), said["repetition_penalty"])
            shares.append([probability(logits, ids)["probability"]])
        made[f"{reading}-{base}"] = shares
        if base.startswith("qwen3"):
            made[f"soft-tifa-{base}"] = soft_tifa(profiles / "bases" / base, items)

    for _, image, _ in items:
        width, height = Image.open(image).size
        for key, factor, least, most in RESIZED:
            made.setdefault(key, []).append(list(smart_resize(height, width, factor, least, most)))
    return made


def questions_about(items):
    """Some pictures with questions and their answers, as GenEval2 has them."""
    for prompt, image, _ in items[9::10]:
        yield image, [["How many cups are in the image?", "three"], [f"Is it so that {prompt}", "Yes"]]


def soft_tifa(base, items):
    """Each answer's share by transformers alone."""
    from make_profiles import PROFILES, answers_to, first_ids, probability, read_vocabulary

    reference = read_vocabulary(base, PROFILES["soft-tifa"]["text"])
    share = lambda image, question, answer: probability(
        reference.score(question, image)["head"], first_ids(reference.tokenizer, answers_to(question, answer))
    )["probability"]
    return [[share(image, *pair) for pair in asked] for image, asked in questions_about(items)]


# The packages


def plain_ids(processor, ids, text, pictures):
    """Ids of a conversation in which the prompt's special tokens are text: from the last picture to the reward."""
    tokenizer = processor.tokenizer
    end, reward = (tokenizer.convert_tokens_to_ids(token) for token in ("<|vision_end|>", REWARD_TOKEN))
    start = [place for place, id in enumerate(ids) if id == end][pictures - 1] + 1
    stop = len(ids) - 1 - ids[::-1].index(reward)
    segment = text.split("<|vision_end|>", pictures)[pictures].rsplit(REWARD_TOKEN, 1)[0]
    middle = tokenizer(segment, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return ids[:start] + middle + ids[stop:]


def without_special(prompt):
    """A prompt that gives the same batch but for its own tokens."""
    return prompt.replace("<|", "")


def settings(path, source, **told):
    """A package's own yaml with some keys changed."""
    import yaml

    path.write_text(yaml.safe_dump(yaml.safe_load(Path(source).read_text()) | told))
    return str(path)


LOCAL = dict(bf16=False, torch_dtype="float32", disable_flash_attn2=True)


def with_plain_prompt(batch, processor, messages, pictures):
    """The batch of one item with the ids that its prompt has as plain text."""
    import torch

    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)[0]
    ids = plain_ids(processor, batch["input_ids"][0].tolist(), text, pictures)
    batch["input_ids"] = torch.tensor([ids])
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    return batch


def conversation(pictures, text):
    return [[{"role": "user", "content": [{"type": "image"}] * pictures + [{"type": "text", "text": text}]}]]


def run_hpsv3(out, _source):
    import hpsv3.inference as package
    import torch

    profiles = out / "profiles"
    shipped = Path(package.__file__).with_name("config") / "HPSv3_7B.yaml"
    told = settings(out / "hpsv3.yaml", shipped, model_name_or_path=str(profiles / "bases/qwen2_vl"), **LOCAL)
    inferencer = package.HPSv3RewardInferencer(told, str(profiles / "hpsv3/HPSv3.safetensors"), device="cpu")
    made = []
    with torch.no_grad():
        for prompt, image, _ in read_items(out):
            if "<|" in prompt:
                batch = inferencer.prepare_batch([image], [without_special(prompt)])
                text = package.INSTRUCTION.format(text_prompt=prompt) + package.prompt_with_special_token
                batch = with_plain_prompt(batch, inferencer.processor, conversation(1, text), 1)
                read = inferencer.model(return_dict=True, **batch)["logits"][0]
            else:
                read = inferencer.reward([image], [prompt])[0]
            made.append([float(read[0]), float(read[1].exp())])
    return {"hpsv3": made}


def with_keys_of_today(file, folder):
    """A copy with transformers' names since 4.52: EditReward's loader takes those of its own version alone."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(file)
    if "model.norm.weight" in tensors:
        tensors = {re.sub(r"^model\.", "model.language_model.", key): tensor for key, tensor in tensors.items()}
        tensors = {re.sub(r"^visual\.", "model.visual.", key): tensor for key, tensor in tensors.items()}
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    return str(folder)


def run_editreward(out, source):
    import torch

    sys.path.insert(0, str(source))
    import EditReward.inference_edit as package
    from EditReward.dataset import prompts

    profiles, made = out / "profiles", {}
    shipped = Path(package.__file__).with_name("config") / "EditReward-Qwen2.5-7B-VL.yaml"
    texts = [prompts.INSTRUCTION_EDIT_FOLLOWING, prompts.INSTRUCTION_EDIT_QUALITY]
    for name, kind, ways in (
        ("editreward", "ranknet_multi_head", ("mean", "min", "sum")),
        ("editreward_shared", "ranknet_share_head", ("mean", "min")),
    ):
        base = str(profiles / "bases/qwen2_5_vl")
        more = dict(model_name_or_path=base, rm_head_type=kind, output_dir=str(out)) | LOCAL
        told = settings(out / f"{name}.yaml", shipped, **more)
        # Its inferencer makes the two batches for this word alone; the model decides by the yaml.
        weights = with_keys_of_today(profiles / name / "model.safetensors", out / name)
        inferencer = package.EditRewardInferencer(told, weights, "cpu", rm_head_type="ranknet_multi_head")
        model = inferencer.model
        for prompt, image, before in read_items(out):
            clean = without_special(prompt) if "<|" in prompt else prompt
            batch = inferencer.prepare_batch([before], [image], [clean])
            if "<|" in prompt:
                for key, text in zip(("batch_dim1", "batch_dim2"), texts):
                    text = text.format(text_prompt=prompt) + package.prompt_with_special_token
                    batch[key] = with_plain_prompt(batch[key], inferencer.processor, conversation(2, text), 2)
            with torch.no_grad():
                model.pooling_strategy = None
                parts = model(return_dict=True, **batch)
                for way in ways:
                    # Its own fusion, over what its own heads said; only the two passes are not run again.
                    model.pooling_strategy, again = way, iter(parts)
                    with unittest.mock.patch.object(
                        model, "_run_single_batch_through_model_and_head", lambda *_: next(again)
                    ):
                        (read,) = model(return_dict=True, **batch)["logits"]
                    made.setdefault(f"{name}-{way}", []).append([float(read[0]), float(read[1].exp())])
            flat = [number for (part,) in parts for number in (float(part[0]), float(part[1].exp()))]
            made.setdefault(f"{name}-components", []).append(flat)
    return made


def open_alone(package, path, *parts):
    """A module of a package without what its __init__ files import, which is every other model's library."""
    for depth in range(len(parts)):
        name = ".".join((package, *parts[:depth]))
        parent = types.ModuleType(name)
        parent.__path__ = [str(Path(path, *parts[:depth]))]
        sys.modules[name] = parent
    return __import__(".".join((package, *parts)), fromlist=["_"])


def run_vqascore(out, _source):
    import importlib.metadata

    import torch

    place = importlib.metadata.distribution("t2v_metrics").locate_file("t2v_metrics")
    package = open_alone("t2v_metrics", place, "models", "vqascore_models", "qwen2vl_model")
    made = {}
    for base, name in (("qwen2_vl", "qwen2-vl-2b"), ("qwen2_5_vl", "qwen2.5-vl-3b")):
        for tied in ("", "_tied"):
            folder = str(out / "profiles/bases" / (base + tied))
            told = package.QWEN2_VL_MODELS[name]
            told["tokenizer"]["path"] = told["model"]["path"] = folder
            told["model"] |= {"torch_dtype": torch.float32, "attn_implementation": "eager"}
            model = package.Qwen2VLModel(name)
            shares = []
            for prompt, image, _ in read_items(out):
                # A special token in a prompt changes the conversation there; a null says that nothing is expected.
                shares.append(None if "<|" in prompt else [float(model.forward([image], [prompt])[0])])
            made[f"vqascore-{base}{tied}"] = shares
    return made


def run_geneval2(out, source):
    import transformers

    sys.path.insert(0, str(source))
    made = {}
    kinds = (transformers.AutoProcessor, transformers.Qwen3VLForConditionalGeneration)
    open_processor, open_model = (kind.from_pretrained for kind in kinds)

    def processor_of(folder):
        """With PIL's resizing, which is the reference's; the default here is torch's, which is only close."""
        processor = open_processor(folder)
        size = json.loads(Path(folder, "preprocessor_config.json").read_text())["size"]
        # The class of that version for PIL forgets the limits of its file.
        limits = dict(min_pixels=size["shortest_edge"], max_pixels=size["longest_edge"])
        slow = transformers.AutoImageProcessor.from_pretrained(folder, use_fast=False, **limits)
        processor.image_processor = slow
        return processor

    for base in ("qwen3_vl", "qwen3_vl_tied"):
        folder = str(out / "profiles/bases" / base)
        # It opens a hub id where it is imported.
        kinds[0].from_pretrained = lambda _id, folder=folder, **_told: processor_of(folder)
        kinds[1].from_pretrained = lambda _id, folder=folder, **_told: open_model(folder, dtype="float32")
        sys.modules.pop("evaluation", None)
        import evaluation

        shares = []
        for prompt, image, _ in read_items(out):
            # It formats its question twice, which a brace in a prompt does not survive.
            strange = "<|" in prompt or "{" in prompt
            shares.append(None if strange else [evaluation.vqa_score(prompt, image)])
        softly = [evaluation.soft_tifa(asked, image)[1] for image, asked in questions_about(read_items(out))]
        made |= {f"vqascore-geneval2-{base}": shares, f"soft-tifa-{base}": softly}
    return made


def run_sizes(out, _source):
    from qwen_vl_utils import vision_process

    made = {}
    for key, factor, least, most in RESIZED:
        # It has the limits of the first and the last by itself.
        told = {"min_pixels": least, "max_pixels": most} if least == most else {}
        for _, image, _ in read_items(out):
            fetched = vision_process.fetch_image({"image": image} | told, image_patch_size=factor // 2)
            made.setdefault(key, []).append([fetched.height, fetched.width])
    return made


# Our server


def run_ours(out, binary):
    root = Path(__file__).parents[2]
    shipped, profiles = root / "src/model/profile/shipped", out / "profiles"
    items = json.loads((out / "items.json").read_text())
    made = {}

    def served(checkpoint, profile, base=None, references=False):
        """The lines of `score` for all items, by a server of a profile that ships."""
        told = json.loads((shipped / f"{profile}.json").read_text())
        if base:
            told["base"] = str((profiles / base).resolve())
        write(out / "profile.json", told)
        lines = [
            {"prompt": item["prompt"], "image": item["image"]} | ({"references": [item["source"]]} if references else {})
            for item in items
        ]
        (out / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        command = f'"{binary}" score --server http://$SPATIALSCORE_ADDRESS --manifest "{out}/manifest.jsonl" --format json'
        environment = os.environ | {
            "SPATIALSCORE__MODEL__CHECKPOINT": str(profiles / checkpoint),
            "SPATIALSCORE__MODEL__REWARD_CONFIG": str(out / "profile.json"),
            "SPATIALSCORE__LIMITS__MAX_ITEM_TOKENS": "32768",
            "SPATIALSCORE__LIMITS__MAX_PROMPT_TOKENS": "32768",
        }
        start = [root / "scripts/with_server.sh", binary, "bash", "-c", command]
        # An item without a score, such as one without a prompt, is a status of 1, and its line says why.
        done = subprocess.run(start, env=environment, stdout=subprocess.PIPE, text=True, check=False)
        rows = [json.loads(line) for line in done.stdout.splitlines()]
        if len(rows) != len(items):
            sys.exit(f"{profile}: {len(rows)} lines for {len(items)} items")
        for row in rows:
            if "error" in row:
                print(f"{profile}: {row['prompt'][:40]!r}: {row['error']}")
        return rows

    def pair(row):
        return None if "error" in row else [row["mean"], row["stddev"]]

    made["hpsv3"] = [pair(row) for row in served("hpsv3", "hpsv3", base="bases/qwen2_vl")]
    for name, ways in (
        ("editreward", {"mean": "editreward", "min": "editreward-min", "sum": "editreward-sum"}),
        ("editreward_shared", {"mean": "editreward-shared"}),
    ):
        for way, profile in ways.items():
            rows = served(name, profile, base="bases/qwen2_5_vl", references=True)
            made[f"{name}-{way}"] = [pair(row) for row in rows]
        parts = lambda row: [number for part in row["components"] for number in (part["mean"], part["stddev"])]
        made[f"{name}-components"] = [None if "error" in row else parts(row) for row in rows]
    for base in sorted(path.name for path in (profiles / "bases").iterdir()):
        said = json.loads((profiles / "bases" / base / "generation_config.json").read_text())
        plain = "vqascore-penalty" if said["repetition_penalty"] != 1.0 else "vqascore"
        profile, key = ("vqascore-geneval2",) * 2 if base.startswith("qwen3") else (plain, "vqascore")
        rows = served(f"bases/{base}", profile)
        made[f"{key}-{base}"] = [None if "error" in row else [row["mean"]] for row in rows]
    return made


# Holding one against the other


def compare(expected, ours, tolerance):
    """Prints the worst difference of each list; true where all are within the tolerance."""
    fine = True
    common = [key for key in expected if key in ours]
    for key in common:
        probabilities = key.startswith(("vqascore", "soft-tifa"))
        worst, at = 0.0, None
        if len(expected[key]) != len(ours[key]):
            sys.exit(f"{key}: {len(expected[key])} items are expected, there are {len(ours[key])}")
        for k, (theirs, own) in enumerate(zip(expected[key], ours[key])):
            if theirs is None or own is None:
                continue
            assert len(theirs) == len(own), (key, k, theirs, own)
            for a, b in zip(theirs, own):
                difference = abs(a - b) / (abs(a) if probabilities else max(1.0, abs(a)))
                # Not a number is no agreement.
                if not difference <= worst:
                    worst, at = difference, k
        held = worst <= tolerance
        fine &= held
        items = sum(item is not None for item in expected[key])
        print(f"{'ok' if held else 'NO':3} {key:32} {items:3} items, worst {worst:.2e} at {at}")
    if not common:
        sys.exit("the two files have no list in common")
    return fine


PACKAGES = {
    "hpsv3": run_hpsv3,
    "editreward": run_editreward,
    "vqascore": run_vqascore,
    "geneval2": run_geneval2,
    "sizes": run_sizes,
    "ours": run_ours,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["items", "compare", *PACKAGES])
    parser.add_argument("place", type=Path)
    parser.add_argument("ours", type=Path, nargs="?")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--source", type=Path)
    parser.add_argument("--tolerance", type=float, default=1e-4)
    told = parser.parse_args()
    if told.what == "compare":
        read = [json.loads(path.read_text()) for path in (told.place, told.ours)]
        sys.exit(0 if compare(*read, told.tolerance) else 1)
    import torch

    torch.set_num_threads(1)
    if told.what == "items":
        make_items(told.place, told.seed, told.count)
    else:
        write(told.place / f"{told.what}.json", PACKAGES[told.what](told.place, told.source))


if __name__ == "__main__":
    main()
