"""Makes layouts of tokenizer files, and what transformers' AutoTokenizer makes of each.

    python tests/reference/make_tokenizer_fixtures.py BASE OUT [--prompts N]

BASE is a checkpoint of make_fixtures.py, whose tokenizer.json the layouts change. OUT is one JSON file: `texts`, and
for each layout `files` (by name; a text is written as it is, all else as JSON; `tokenizer.json` is BASE's under the
merge patch given), the `special_tokens` that a chat template sees, and the `ids` of every text. Where the reference
raises, both are null.
"""

import argparse
import json
import random
import tempfile
from pathlib import Path

from transformers import AutoTokenizer

from make_processor_fixtures import prompts

SPECIAL = ["<|Reward|>", "<|image_pad|>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<new>", "<other>", "<|x|>"]
TEXTS = [
    "<|im_start|>user\n<|image_pad|>a red cup <|Reward|> left of\u00a0<new>  a bowl\n<|im_end|>\n<|im_start|>assistant\n",
    " leading and trailing <new> ", "<new><other><|x|>", "a <new> b <other> c", "\n<|Reward|>\n\n x", "word<new>word <new>",
    "e\u0301 ﬁ ① Ａ Å \u212b \u1e9b\u0323", "  two  spaces\t\ttabs \r\n lines\n\n\n", "don't I'LL we've 3.14 1234567 ½ ²", "左边的猫 🐈‍⬛ がぎ",
    "Rate how well the picture keeps this prompt:\tA  Cat\u00a0is\u3000LEFT of the Dog. \r\n\n", "system\nYou are a helpful assistant.", "user\n",
    "<TOOL> <tool> tool_call", "<|vision_start|><|im_end|>", "x", " ", "\u200b\ufeff", "ſ İ ı", "a<", "<new", "cup <|endoftext|>cup",
]  # fmt: skip

BUILT_IN = json.loads((Path(__file__).parents[2] / "models/spatialscore-mini/tokenizer.json").read_text())
CLASS = {"tokenizer_class": "Qwen2Tokenizer"}
NEW = {"content": "<new>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
TYPED = NEW | {"__type": "AddedToken"}
FILE = {"tokenizer_class": "PreTrainedTokenizerFast"}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def layouts(base):
    """Each layout's files: tokenizer.json as a patch to BASE's, or None for none."""
    named = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    config = CLASS | named
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in base["model"]["merges"]]
    slow = {
        "tokenizer.json": None,
        "vocab.json": base["model"]["vocab"],
        "merges.txt": "#version: 0.2\n" + "\n".join(merges) + "\n",
    }
    decoder = {str(t["id"]): {k: v for k, v in t.items() if k != "id"} for t in base["added_tokens"]}
    top = max(map(int, decoder))
    added = {t["content"]: t["id"] for t in base["added_tokens"]}
    of = lambda config, **files: {"tokenizer_config.json": config} | files
    json_file = lambda patch: {"tokenizer.json": patch}
    yield "plain", of(config)
    yield "no config", {}
    yield "fast class", of(config | {"tokenizer_class": "Qwen2TokenizerFast"})
    yield "no class", of(named)
    yield "decoder", of(config | {"added_tokens_decoder": decoder | {str(top + 1): NEW}})
    yield "decoder, another id", of(config | {"added_tokens_decoder": decoder | {str(top + 7): NEW}})
    yield "decoder without the file's", of(config | {"added_tokens_decoder": {str(top + 1): NEW}})
    yield "decoder lstrip", of(config | {"added_tokens_decoder": decoder | {str(top + 1): NEW | {"lstrip": True}}})
    yield "decoder rstrip", of(config | {"added_tokens_decoder": decoder | {str(top + 1): NEW | {"rstrip": True}}})
    yield "decoder single word", of(config | {"added_tokens_decoder": decoder | {str(top + 1): NEW | {"single_word": True}}})
    yield "decoder not special", of(config | {"added_tokens_decoder": decoder | {str(top + 1): NEW | {"special": False, "normalized": True}}})
    yield "decoder bare", of(config | {"added_tokens_decoder": decoder | {str(top + 1): {"content": "<new>"}}})
    yield "decoder out of order", of(config | {"added_tokens_decoder": {str(top + 2): NEW | {"content": "<other>"}, str(top + 1): NEW} | decoder})
    yield "extra list", of(config | {"extra_special_tokens": ["<new>", "<other>"]})
    yield "extra list, typed", of(config | {"extra_special_tokens": ["<other>", TYPED]})
    yield "extra list, untyped", of(config | {"extra_special_tokens": [NEW]})
    yield "extra dict", of(config | {"extra_special_tokens": {"z_token": "<new>", "a_token": "<other>"}})
    yield "additional", of(config | {"additional_special_tokens": ["<new>", "<|x|>"]})
    yield "additional and extra", of(config | {"additional_special_tokens": ["<|x|>"], "extra_special_tokens": ["<new>"]})
    yield "additional and dict", of(config | {"additional_special_tokens": ["<|x|>"], "extra_special_tokens": {"a_token": "<new>"}})
    yield "image token", of(config | {"image_token": "<new>", "add_bos_token": False, "b_token": TYPED | {"content": "<other>"}})
    yield "map", of(config, **{"special_tokens_map.json": {"eos_token": "<new>", "additional_special_tokens": ["<other>"]}})
    yield "map, object", of(config, **{"special_tokens_map.json": {"eos_token": NEW | {"lstrip": True}, "image_token": "<other>"}})
    yield "map, objects in list", of(config, **{"special_tokens_map.json": {"additional_special_tokens": [NEW]}})
    yield "map, extra", of(config | {"extra_special_tokens": ["<|x|>"]}, **{"special_tokens_map.json": {"extra_special_tokens": ["<other>", NEW]}})
    bare = {key: value for key, value in NEW.items() if key != "special"}
    yield "map, extra bare", of(config | {"extra_special_tokens": ["<|x|>"]}, **{"special_tokens_map.json": {"extra_special_tokens": ["<other>", bare]}})
    yield "map beside decoder", of(config | {"added_tokens_decoder": decoder}, **{"special_tokens_map.json": {"eos_token": "<new>"}})
    yield "added tokens", of(config, **{"added_tokens.json": {"<new>": top + 1, "<other>": top + 2}})
    yield "added tokens, special", of(config | {"additional_special_tokens": ["<new>"]}, **{"added_tokens.json": {"<other>": top + 1, "<new>": top + 2}})
    yield "named null", of(CLASS | {"eos_token": None, "unk_token": None, "pad_token": "<new>", "bos_token": "<other>"})
    yield "named typed", of(config | {"eos_token": TYPED | {"rstrip": True}})
    yield "named untyped", of(config | {"eos_token": NEW})
    yield "no normalizer", of(config) | json_file({"normalizer": None})
    yield "NFKC", of(config) | json_file({"normalizer": {"type": "NFKC"}})
    yield "prefix space in file", of(config) | json_file({"pre_tokenizer": BYTES | {"add_prefix_space": True}})
    yield "prefix space in config", of(config | {"add_prefix_space": True})
    yield "ignore merges", of(config) | json_file({"model": {"ignore_merges": True}})
    yield "file class", of(FILE | named)
    yield "file class, no normalizer", of(FILE | named) | json_file({"normalizer": None})
    yield "file class, NFKC", of(FILE | named) | json_file({"normalizer": {"type": "NFKC"}})
    yield "file class, the normalizer of the checkpoint in the box", of(FILE | named) | json_file({"normalizer": BUILT_IN["normalizer"]})
    yield "file class, prefix space", of(FILE | named) | json_file({"pre_tokenizer": BYTES | {"add_prefix_space": True}})
    yield "file class, prefix space in config", of(FILE | named | {"add_prefix_space": True})
    yield "file class, decoder", of(FILE | named | {"added_tokens_decoder": decoder | {str(top + 1): NEW | {"lstrip": True}}})
    yield "file class, extra", of(FILE | {"extra_special_tokens": ["<new>"], "eos_token": "<other>"})
    yield "file class, added tokens", of(FILE | named, **{"added_tokens.json": {"<new>": top + 1}})
    yield "file class, padding", of(FILE) | json_file({"padding": {"strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0, "pad_token": "<|im_end|>"}})
    yield "padding", of(CLASS) | json_file({"padding": {"strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0, "pad_token": "<|im_end|>"}})
    yield "backend class", of({"tokenizer_class": "TokenizersBackend"} | named)
    yield "slow", of(config) | slow
    yield "slow, no config", slow
    yield "slow, decoder", of(config | {"added_tokens_decoder": decoder}) | slow
    yield "slow, added tokens", of(config, **{"added_tokens.json": added}) | slow
    yield "slow, added and additional", of(config | {"additional_special_tokens": list(added)}, **{"added_tokens.json": added}) | slow
    yield "slow, map", of(config, **{"added_tokens.json": added, "special_tokens_map.json": {"eos_token": "<|im_end|>", "additional_special_tokens": list(added)}}) | slow
    yield "slow, prefix space", of(config | {"add_prefix_space": True}) | slow
    yield "slow, bos", of(config | {"add_bos_token": True, "bos_token": "<|im_start|>"}) | slow
    yield "slow, file class", of(FILE | named) | slow
    yield "slow beside file", of(config) | slow | json_file({})
    yield "decoder null", of(config | {"added_tokens_decoder": None})
    yield "model specific", of(config | {"model_specific_special_tokens": {"z_token": "<new>"}})
    yield "method's name", of(config | {"add_special_tokens": False})
    yield "another version", of(config) | json_file({"version": "2.0"})
    yield "file class, prefix of pieces", of(FILE | named) | json_file({"model": {"continuing_subword_prefix": "##"}})
    yield "slow, vocabulary too short", of(config) | slow | {"vocab.json": dict(list(slow["vocab.json"].items())[:250])}
    yield "single word at the left", of(config | {"added_tokens_decoder": decoder | {str(top + 1): NEW | {"single_word": True, "lstrip": True}}})
    yield "tokens in tokens", of(config | {"extra_special_tokens": ["<new><other>", "<other>", "<new>"]})
    yield "overlapping tokens", of(config | {"added_tokens_decoder": decoder | {str(top + 1): NEW, str(top + 2): NEW | {"content": "<new"}, str(top + 3): NEW | {"content": "new>"}}})
    yield "split special", of(config | {"split_special_tokens": True})


def merged(base, patch):
    """RFC 7396, but for null, which stays."""
    if not isinstance(patch, dict) or not isinstance(base, dict):
        return patch
    return base | {key: merged(base.get(key), value) for key, value in patch.items()}


def write(directory, base, files):
    (directory / "config.json").write_text('{"model_type": "qwen2_5_vl"}')
    for name, content in ({"tokenizer.json": {}} | files).items():
        if name == "tokenizer.json":
            if content is None:
                continue
            content = merged(base, content)
        text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
        (directory / name).write_text(text)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--prompts", type=int, default=12)
    arguments = parser.parse_args()
    base = json.loads((arguments.base / "tokenizer.json").read_text())
    texts = TEXTS + [text for text in prompts(random.Random(0), 60) if text][: arguments.prompts]
    made = {}
    for name, files in layouts(base):
        with tempfile.TemporaryDirectory() as directory:
            write(Path(directory), base, files)
            try:
                tokenizer = AutoTokenizer.from_pretrained(directory)
                result = {
                    "special_tokens": tokenizer.special_tokens_map,
                    "ids": [tokenizer(text)["input_ids"] for text in texts],
                }
            except BaseException as error:  # whatever it says, it refuses; Rust's panics are no Exception
                print(f"  {name}: {type(error).__name__} {str(error)[:100]}")
                result = {"special_tokens": None, "ids": None}
        made[name] = {"files": files} | result
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(layout)}" for name, layout in made.items())
    arguments.out.write_text(f'{{"texts": {json.dumps(texts)},\n"layouts": {{\n{lines}\n}}}}\n')
    print(f"{len(made)} layouts, {len(texts)} texts")


if __name__ == "__main__":
    main()
