"""A new model with the weights of a checkpoint whose tokenizer was a smaller one."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import nn

from .drawings import kinds
from .files import Refusal

EMBEDDING = "model.language_model.embed_tokens.weight"


@torch.no_grad()
def start_from(checkpoint: Path, model: nn.Module, tokenizer: Tokenizer) -> None:
    """Sets every weight that the checkpoint has. A token that is new there begins as the mean of those that spelled it, a
    kind's name as it is drawn, and the last word of another name for a kind as the kind's."""
    if not (checkpoint / "model.safetensors").exists():
        raise Refusal(f"{checkpoint}: no checkpoint to start from; `make train-mini` exports the one that wide.toml names")
    weights = load_file(checkpoint / "model.safetensors")
    old, before = weights.pop(EMBEDDING), Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    model.load_state_dict(weights, strict=False)
    table, known = model.get_parameter(EMBEDDING), before.get_vocab()
    ids = lambda word: tokenizer.encode(f" {word}").ids
    named = {ids(word)[0] for word in kinds()}
    for token, row in tokenizer.get_vocab().items():
        if token in known:
            table[row] = old[known[token]]
        elif row not in named and (spelled := before.encode(tokenizer.decode([row])).ids):
            table[row] = old[spelled].mean(0)
    for word, kind in kinds().items():
        for name in kind.synonyms:
            last = ids(name)[-1]
            if last not in named and tokenizer.id_to_token(last) not in known:
                table[last] = table[ids(word)[0]] + 0.3 * torch.randn_like(table[last])
