"""Parity, live: fresh checkpoints, pictures and prompts from a new seed, the reference against the server's own code.

    python tests/reference/parity.py [--seed S] [--out DIRECTORY] [--only-make]

Makes what make_fixtures.py, make_processor_fixtures.py, make_profiles.py and configurations.py make, from a seed drawn at random and
printed, and one case more, `qwen`: a tiny model under Qwen's real vocabulary, its 151,643 byte-pair ranks taken from
PyPI's `dashscope`, with a long list of prompts in OUT/qwen/tokens.json. Then it runs the tests `parity`, `processor`,
`adapters`, `profiles` and `configurations` on them (SPATIALSCORE_FIXTURES names the directory), which prints the worst difference of
every stage, and exits as that does. OUT is target/parity unless told otherwise.
"""

import argparse
import base64
import os
import random
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from zipfile import ZipFile

import torch
from tokenizers import models
from transformers.convert_slow_tokenizer import bytes_to_unicode

import configurations
import make_fixtures
import make_processor_fixtures
import make_profiles
from checkpoints import REWARD_TOKEN, add_special_tokens, untrained_tokenizer
from reference import Reference

ROOT = Path(__file__).resolve().parents[2]

DASHSCOPE = "dashscope==2.0.2"

QWEN = dict(
    tied=True,
    vision=dict(depth=2, hidden=32, intermediate=40, heads=2, window=56, full=[1]),
    text=dict(hidden=16, intermediate=32, layers=2, heads=2, kv_heads=1, theta=1000000.0, sections=[2, 1, 1]),
    sizes=[(84, 60), (60, 84), (112, 56)],
)


def read_ranks():
    """Byte sequences of the vocabulary and their ranks, from the package's wheel; its code is not run."""
    cache = ROOT / ".cache/parity"
    if not list(cache.glob("dashscope*.whl")):
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", cache, DASHSCOPE]
        subprocess.run(download, check=True)
    (wheel,) = cache.glob("dashscope*.whl")
    lines = ZipFile(wheel).read("dashscope/resources/qwen.tiktoken").splitlines()
    return {base64.b64decode(text): int(rank) for text, rank in (line.split() for line in lines if line)}


def pieces(ranks, text, below):
    """What byte-pair encoding makes of `text` with only the merges that rank below this."""
    parts = [text[i : i + 1] for i in range(len(text))]
    while len(parts) > 1:
        rank, at = min((ranks.get(parts[i] + parts[i + 1], below), i) for i in range(len(parts) - 1))
        if rank >= below:
            break
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def qwen_tokenizer():
    """The tokenizer of Qwen2.5-VL with the reward's token; the merges, which the ranks only imply, are worked out."""
    ranks = read_ranks()
    assert len(ranks) == 151_643
    letters = bytes_to_unicode()
    spelled = lambda text: "".join(letters[byte] for byte in text)
    merges = []
    for text, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(text) > 1:
            # A token is made by its last merge; the merges before it are those of lower rank.
            left, right = pieces(ranks, text, rank)
            merges.append((spelled(left), spelled(right)))
    vocabulary = {spelled(text): rank for text, rank in ranks.items()}
    tokenizer = add_special_tokens(untrained_tokenizer(models.BPE(vocabulary, merges)), REWARD_TOKEN)
    assert tokenizer.token_to_id("<|im_start|>") == 151_644 and tokenizer.token_to_id("<|image_pad|>") == 151_655
    return tokenizer, ranks, {letter: byte for byte, letter in letters.items()}


def check_merges(tokenizer, ranks, bytes_of, prompts):
    """The merges say what the ranks say: encoding by ranks alone gives the same ids."""
    for prompt in prompts:
        words = tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(prompt))
        texts = [bytes(bytes_of[letter] for letter in word) for word, _ in words]
        ids = [ranks[piece] for text in texts for piece in pieces(ranks, text, len(ranks))]
        assert ids == tokenizer.encode(prompt).ids, prompt


def make_qwen(out, seed):
    print("qwen")
    directory = out / "qwen"
    shutil.rmtree(directory, ignore_errors=True)
    tokenizer, ranks, bytes_of = qwen_tokenizer()
    check_merges(tokenizer, ranks, bytes_of, make_processor_fixtures.WORDS)
    texts = [text for text in make_processor_fixtures.WORDS[:12] + make_processor_fixtures.SPELLED if text]
    seed = make_fixtures.seed_of("qwen", seed)
    make_fixtures.make_case(directory, QWEN | {"vocabulary": tokenizer}, seed, texts)
    reference = Reference(directory / "checkpoint")
    make_processor_fixtures.make_tokens(directory / "tokens.json", reference, random.Random(seed), fuzzed=2000)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**31))
    parser.add_argument("--out", type=Path, default=ROOT / "target/parity")
    parser.add_argument("--only-make", action="store_true", help="make the files and run nothing on them")
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    print(f"seed {arguments.seed}, files in {out}", flush=True)
    make_fixtures.make(out, arguments.seed, make_fixtures.ALL)
    make_processor_fixtures.make(out, arguments.seed)
    make_qwen(out, arguments.seed)
    make_profiles.make(out / "profiles", arguments.seed)
    configurations.make(out, out / "configurations.json")
    if arguments.only_make:
        return
    sys.stdout.flush()
    test = ["cargo", "test", "--release"]
    test += [word for name in ("parity", "processor", "adapters", "profiles", "configurations") for word in ("--test", name)]
    test += ["--", "--nocapture"]
    sys.exit(subprocess.run(test, cwd=ROOT, env=os.environ | {"SPATIALSCORE_FIXTURES": str(out)}).returncode)


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(1)
    main()
