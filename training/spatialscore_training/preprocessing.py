"""What a model reads of prompts and pictures: one way for trainer and evaluation, and the server's own.

A caller's prompt is text and nothing else: the conversation round it is cut at its special tokens, and in the stretch that
holds the prompt none is ever matched. What stands behind the reward token is dropped, since it cannot matter there.
"""

import re
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoImageProcessor, AutoProcessor

from .files import Refusal
from .pictures import Picture, open_picture
from .tokenizer import REWARD_TOKEN

# Stands for the prompt while the template is rendered: private-use characters, which no template looks at.
MARK = "\uf8e0prompt\uf8e1"


class Item(NamedTuple):
    """What is judged: a prompt and a picture, with the pictures that are shown before it."""

    prompt: str
    picture: Picture
    before: tuple[Picture, ...] = ()


class Preprocessor:
    """Items to what a Qwen-VL reads."""

    def __init__(self, checkpoint: Path, instruction: str, pixels: tuple[int, int], pictures: int = 1, reward_token: str = REWARD_TOKEN):
        self.processor = processor = AutoProcessor.from_pretrained(checkpoint)
        # The PIL backend: the server resizes as PIL does.
        processor.image_processor = AutoImageProcessor.from_pretrained(checkpoint, backend="pil")
        processor.image_processor.size = dict(processor.image_processor.size) | dict(zip(("shortest_edge", "longest_edge"), pixels))
        self.tokenizer = processor.tokenizer
        processor.chat_template = processor.chat_template or self.tokenizer.chat_template
        self.tokenizer.add_tokens(reward_token, special_tokens=True)
        self.reward_id = self.tokenizer.convert_tokens_to_ids(reward_token)
        self.image_id = self.tokenizer.convert_tokens_to_ids(processor.image_token)
        self.pictures = pictures
        text = instruction.replace("{prompt}", MARK)
        turn = {"role": "user", "content": [{"type": "image"}] * pictures + [{"type": "text", "text": text}]}
        rendered = processor.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)
        special = [token for token in self.tokenizer.added_tokens_decoder.values() if token.special or token.content in rendered]
        if spaced := [token.content for token in special if token.lstrip or token.rstrip or token.single_word]:
            raise Refusal(f"{checkpoint}: the special token {spaced[0]!r} takes the spaces beside it, which is not supported")
        self.plain = Tokenizer.from_str(self.tokenizer.backend_tokenizer.to_str())
        for token in special:
            token.special = True
        self.plain.add_special_tokens(special)
        self.plain.encode_special_tokens = True
        longest_first = sorted((re.escape(token.content) for token in special), key=len, reverse=True)
        pieces = re.split(f"({'|'.join(longest_first)})", rendered)
        self.pieces = pieces[: pieces.index(reward_token) + 1]
        self.special = {token.content for token in special}

    def encode(self, prompt: str, visual_tokens: list[int]) -> list[int]:
        """The ids up to the reward token, for pictures of so many visual tokens."""
        ids, visual = [], iter(visual_tokens)
        for piece in self.pieces:
            if piece in self.special:
                token = self.tokenizer.convert_tokens_to_ids(piece)
                ids += [token] * (next(visual) if token == self.image_id else 1)
            elif piece:
                ids += self.plain.encode(piece.replace(MARK, prompt), add_special_tokens=False).ids
        return ids

    def __call__(self, items: list[Item]) -> dict[str, Tensor]:
        """The model's inputs, padded on the right."""
        images = [open_picture(picture) for item in items for picture in (*item.before, item.picture)]
        if len(images) != len(items) * self.pictures:
            raise Refusal(f"items have {len(images) / len(items):g} pictures; the recipe wants {self.pictures}")
        seen = self.processor.image_processor(images, return_tensors="pt")
        counts = (seen["image_grid_thw"].prod(-1) // self.processor.image_processor.merge_size**2).view(len(items), -1)
        rows = [torch.tensor(self.encode(item.prompt, own)) for item, own in zip(items, counts.tolist())]
        pad = self.tokenizer.pad_token_id
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "mm_token_type_ids": (ids == self.image_id).int(),
            "pixel_values": seen["pixel_values"].float(),
            "image_grid_thw": seen["image_grid_thw"],
        }
