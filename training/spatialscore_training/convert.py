"""Makes a checkpoint that the server reads of what trainers of this family leave as Python's pickles.

    spatialscore-convert FOLDER OUT [--base FOLDER] [--tokenizer FOLDER]

FOLDER is what a trainer wrote, or one `checkpoint-N` of it: `final_model.pth` or `model.pth` (HPSv3, EditReward),
`pytorch_model.bin` with or without an index, or a LoRA (`adapter_model.safetensors` or `.bin`) with its head in
`non_lora_state_dict.pth`. The tokenizer is taken from FOLDER, its `tokenizer/` subfolder, or the folder above; what is
in none of them comes from --base, the model that was trained. Pickles are read with `torch.load(weights_only=True)`,
which runs no code of theirs.

OUT gets safetensors, in shards where they are long, every tensor in the number format that it has; the settings; and a
`reward_config.json` to be confirmed: a pickle does not say what was asked of the model. Where FOLDER has none, look up
`instruction` and `positions` in the trainer's source; the server refuses the file until both are there.
"""

import argparse
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from .files import Refusal, beside, command, keep_apart

SETTINGS = ["config.json", "reward_config.json", "preprocessor_config.json", "processor_config.json", "adapter_config.json"]
TEXTS = [
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json",
    "chat_template.jinja", "chat_template.json",
]
WHOLE = ["final_model.pth", "model.pth", "pytorch_model.bin", "model.safetensors"]
INDEXES = ["pytorch_model.bin.index.json", "model.safetensors.index.json"]
ADAPTERS = ["adapter_model.safetensors", "adapter_model.bin"]
REST = ["non_lora_state_dict.pth", "non_lora_state_dict.bin"]
REWARD_TOKENS = ["<|Reward|>"]
FORMATS = (torch.float32, torch.bfloat16, torch.float16)
SHARD = 5 * 10**9


def read(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of one file. Nothing that is in it is run."""
    if path.suffix == ".safetensors":
        return load_file(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise Refusal(f"{path}: it holds more than tensors, or is no state dict of torch: {error}") from error
    # Trainers wrap the state in what else they keep.
    for key in ("state_dict", "model", "module"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not state or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise Refusal(f"{path}: not a map from names to tensors")
    # What wraps a model for several devices puts its name before each.
    return {key.removeprefix("module.").removeprefix("_orig_mod."): value for key, value in state.items()}


def read_indexed(index: Path) -> dict[str, torch.Tensor]:
    names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    if strays := [name for name in names if Path(name).name != name]:
        raise Refusal(f"{index}: names {strays[0]!r}, which is not in its folder")
    tensors: dict[str, torch.Tensor] = {}
    for name in names:
        tensors |= read(index.parent / name)
    return tensors


def first(folders: list[Path], names: list[str]) -> Path | None:
    return next((folder / name for folder in folders for name in names if (folder / name).is_file()), None)


def tidy(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Contiguous, none of them a view of another, in a number format that the server reads."""
    kept, seen = {}, {}
    for name, tensor in sorted(tensors.items()):
        if "inv_freq" in name:
            continue
        if tensor.dtype not in FORMATS:
            raise Refusal(f"{name} is {tensor.dtype}; the server reads float32, bfloat16 and float16")
        place = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if tensor.numel() and seen.setdefault(place, name) != name and name.startswith("lm_head."):
            continue
        kept[name] = tensor.contiguous().clone() if tensor.numel() and seen[place] != name else tensor.contiguous()
    return kept


def shards(tensors: dict[str, torch.Tensor], limit: int) -> Iterator[dict[str, torch.Tensor]]:
    part, size = {}, 0
    for name, tensor in tensors.items():
        if part and size + tensor.nbytes > limit:
            yield part
            part, size = {}, 0
        part[name] = tensor
        size += tensor.nbytes
    yield part


def write(tensors: dict[str, torch.Tensor], out: Path, limit: int = SHARD) -> list[str]:
    parts = list(shards(tensors, limit))
    if len(parts) == 1:
        save_file(parts[0], out / "model.safetensors", metadata={"format": "pt"})
        return ["model.safetensors"]
    names, places = [], {}
    for number, part in enumerate(parts, 1):
        names.append(f"model-{number:05}-of-{len(parts):05}.safetensors")
        save_file(part, out / names[-1], metadata={"format": "pt"})
        places |= dict.fromkeys(part, names[-1])
    index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())}, "weight_map": places}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
    return names


def reward_config(tensors: dict[str, torch.Tensor], out: Path) -> dict:
    """What can be known of the reward without its trainer's source; the rest is left out, so that nobody serves a guess."""
    reward: dict = {}
    tokenizer = (out / "tokenizer.json").read_text() if (out / "tokenizer.json").is_file() else ""
    added = (out / "added_tokens.json").read_text() if (out / "added_tokens.json").is_file() else ""
    found = [token for token in REWARD_TOKENS if token in tokenizer or token in added]
    reward |= {"reward_token": "special", "special_token": found[0]} if found else {"reward_token": "last"}
    heads = [tensor for name, tensor in sorted(tensors.items()) if "rm_head" in name and name.endswith("weight")]
    columns = heads[-1].shape[0] if heads else 0
    if columns in (1, 2):
        reward["output"] = {1: "scalar", 2: "gaussian"}[columns]
    return reward


def adapter(path: Path, out: Path) -> dict[str, torch.Tensor]:
    """A LoRA, with the tensors that its trainer kept beside it under the names that PEFT would give them."""
    tensors = read(path)
    if rest := first([path.parent], REST):
        for name, tensor in read(rest).items():
            name = name if name.startswith("base_model.model.") else f"base_model.model.{name}"
            name = name.replace(".modules_to_save.default.", ".").replace(".modules_to_save.", ".")
            if ".original_module." in name:
                continue
            if name in tensors and not torch.equal(tensors[name], tensor):
                raise Refusal(f"{name} stands in {path.name} and, otherwise, in {rest.name}")
            tensors[name] = tensor
    tensors = tidy({name.replace(".default.", "."): tensor for name, tensor in tensors.items()})
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    return tensors


def convert(folder: Path, out: Path, base: Path | None = None, tokenizer: Path | None = None, limit: int = SHARD) -> str:
    """Writes the checkpoint; says what was done and what is left to do."""
    if out.exists() and any(out.iterdir()):
        raise Refusal(f"{out} is not empty")
    keep_apart(out, folder=folder, base=base, tokenizer=tokenizer)
    whole, index = first([folder], WHOLE), first([folder], INDEXES)
    lora = first([folder], ADAPTERS)
    if not (whole or index or lora):
        raise Refusal(f"{folder}: none of {', '.join([*WHOLE, *INDEXES, *ADAPTERS])}")
    with beside(out) as part:
        part.mkdir()
        lines = _fill(part, folder, whole, index, lora, base, tokenizer, limit)
    return "\n".join(lines).replace(str(part), str(out))


def _fill(out: Path, folder: Path, whole: Path | None, index: Path | None, lora: Path | None, base: Path | None, tokenizer: Path | None, limit: int) -> list[str]:
    """Writes the checkpoint's files; returns what there is to say of them."""
    above = [folder.parent] if folder.name.startswith("checkpoint-") else []
    for name in SETTINGS:
        if file := first([folder, *above, *([base] if base else [])], [name]):
            shutil.copyfile(file, out / name)
    # One folder's whole tokenizer, never two mixed.
    places = [tokenizer, folder, folder / "tokenizer", *above, *(place / "tokenizer" for place in above), base]
    places = [place for place in places if place and first([place], ["tokenizer.json", "vocab.json"])]
    for name in TEXTS:
        if places and (places[0] / name).is_file():
            shutil.copyfile(places[0] / name, out / name)
    if lora:
        said = json.loads((out / "adapter_config.json").read_text()) if (out / "adapter_config.json").is_file() else None
        if said is None:
            raise Refusal(f"{folder}: {lora.name} without adapter_config.json")
        tensors = adapter(lora, out)
        if base:
            said["base_model_name_or_path"] = str(base.resolve())
            (out / "adapter_config.json").write_text(json.dumps(said, indent=1) + "\n")
        written = ["adapter_model.safetensors"]
    else:
        tensors = tidy(read(whole) if whole else read_indexed(index))
        written = write(tensors, out, limit)
    lines = [f"{out}: {len(tensors)} tensors in {', '.join(written)}, {sum(t.nbytes for t in tensors.values()) / 1e6:.1f} MB"]
    if not (out / "reward_config.json").exists():
        reward = reward_config(tensors, out)
        (out / "reward_config.json").write_text(json.dumps(reward, indent=1) + "\n")
        missing = [key for key in ("instruction", "positions", "output") if key not in reward]
        lines.append(f"reward_config.json is to be confirmed; add {', '.join(missing)} from the trainer's source")
    needed = ["tokenizer.json", "preprocessor_config.json"] if lora else ["config.json", "tokenizer.json", "preprocessor_config.json"]
    if lacking := [name for name in needed if not (out / name).exists()]:
        lines.append(f"it lacks {', '.join(lacking)}: {'they come with the adapter' + chr(39) + 's base' if lora else 'name the model that was trained with --base'}")
    lines.append(f"then: spatialscore inspect {out}")
    return lines


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what the trainer wrote")
    parser.add_argument("out", type=Path, help="the checkpoint's folder, new or empty")
    parser.add_argument("--base", type=Path, help="the folder of the model that was trained: settings that FOLDER lacks")
    parser.add_argument("--tokenizer", type=Path, help="the folder of the tokenizer, where it is none of the usual")
    options = parser.parse_args()
    try:
        print(convert(options.folder, options.out, options.base, options.tokenizer))
    except (ValueError, KeyError) as error:
        raise Refusal(str(error)) from error


if __name__ == "__main__":
    main()
