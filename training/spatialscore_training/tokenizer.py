"""A byte-level BPE tokenizer in Qwen2.5-VL's form, learnt from our own prompts, and the conversation round a prompt.

Every kind's word becomes one token, so that matching a name with a drawing is matching one token with some others. All
256 bytes are in the vocabulary, so any text is legal.
"""

import os
import random
import re
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from . import language, prompts
from .drawings import kinds
from .relations import EVERY, RULES, clauses_about

# Name, and whether it is special in the sense of the tokenizers library, in the order of Qwen2.5-VL's ids.
SPECIAL = [(f"<|{name}|>", True) for name in """endoftext im_start im_end object_ref_start object_ref_end box_start
box_end quad_start quad_end vision_start vision_end vision_pad image_pad video_pad""".split()] + [
    (name, False) for name in """<tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|>
<|repo_name|> <|file_sep|>""".split()
]
REWARD_TOKEN = "<|Reward|>"

INSTRUCTION = f"Rate how well the picture keeps this prompt: {{prompt}}\n{REWARD_TOKEN}"

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

# What the template and the instruction put before the prompt and behind it, up to the reward's token.
BEFORE = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>" + INSTRUCTION.split(" {prompt}")[0]
)
BEHIND = INSTRUCTION.split("{prompt}")[1]


def _texts(conversation: str) -> list[str]:
    """What stands between its special tokens."""
    return [text for text in re.split(r"<\|.*?\|>", conversation) if text]


def normalizer() -> normalizers.Normalizer:
    """What makes one text of all the ways to type it: NFC, lower case, each run of white space one space, none at the ends.

    It sees each text between two special tokens. What the conversation itself says there must come out as it went in: the
    line's end behind the prompt, and the capitals and the line's end in the two texts before it.
    """
    before = [text for text in _texts(BEFORE) if text != text.lower()]
    kept = [normalizers.Replace(Regex(r"\A" + re.escape(re.sub(r"\s+", " ", text.lower()))), text) for text in before]
    spaces = [normalizers.Replace(Regex(r"\s+(?=\S)"), " "), normalizers.Replace(Regex(r"\s+\z"), "\n")]
    return normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase(), *spaces, *kept])


def _prompts(rng: random.Random, count: int):
    """Prompts of one to six clauses about random kinds, every relation, phrasing and other word among them."""
    words = list(kinds())
    for _ in range(count):
        by_grammar, clauses = rng.random() < 0.6, []
        for _ in range(rng.randint(1, 6)):
            relation = rng.choice(list(EVERY if by_grammar else RULES))
            clauses.append(rng.choice(clauses_about(rng.sample(words, 3), relation)))
        if by_grammar:
            yield language.write(rng, tuple(clauses), held_out=rng.random() < 0.1).text
        else:
            yield prompts.write(rng, tuple(clauses), (rng.choice((0, -2)), 99)).text


def train_tokenizer(vocabulary: int = 2048, seed: int = 0) -> Tokenizer:
    """The tokenizer with at most so many ordinary tokens, the special ones behind them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False)
    sentences = [f" {prompt}\n" for prompt in _prompts(random.Random(seed), 20000)]
    tokenizer.train_from_iterator(sentences + _texts(BEFORE) * 100, trainer)
    for name, special in [*SPECIAL, (REWARD_TOKEN, True)]:
        tokenizer.add_tokens([AddedToken(name, special=special, normalized=False)])
    for word in kinds():
        assert len(tokenizer.encode(f" {word}").ids) == 1, f"{word} is not one token"
    return tokenizer


def run_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a run, trained once: what the weights learn belongs to its tokens, whatever prompts come later."""
    path = folder / "tokenizer.json"
    if not path.exists():
        # Another process may want it at the same moment; both make the same.
        part = path.with_suffix(f".{os.getpid()}")
        train_tokenizer().save(str(part))
        part.replace(path)
    return Tokenizer.from_file(str(path))


def kind_ids(tokenizer: Tokenizer) -> list[int]:
    """The token of each kind's word, in the order of `kinds.tsv`."""
    return [tokenizer.encode(f" {word}").ids[0] for word in kinds()]
