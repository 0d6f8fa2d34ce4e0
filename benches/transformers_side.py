"""The other side: transformers with SDPA, fed as the RL frameworks feed it.

The processor pads a batch to its longest member, the decoder runs whole, and the head reads the reward token's row; no
logits are computed, since a reward model needs none.
"""

import json
from pathlib import Path

import torch
from PIL import Image

from reference import Reference


class Judge:
    """A checkpoint of ours under transformers."""

    def __init__(self, checkpoint, dtype=torch.float32, device="cpu"):
        # Processor, instruction and head as the parity tests have them; the model anew, with its fast attention.
        reference = Reference(checkpoint, dtype)
        self.processor, self.model, self.reward = reference.processor, reference.model.to(device), reference.reward
        self.model.set_attn_implementation("sdpa")
        self.render = reference.render
        self.device = device
        self.processor.tokenizer.padding_side = "right"
        if self.processor.tokenizer.pad_token is None:
            self.processor.tokenizer.pad_token = "<|endoftext|>"
        special = self.reward.get("special_token")
        self.reward_id = self.processor.tokenizer.convert_tokens_to_ids(special) if special else None

    def process(self, prompts, images):
        """What the model reads, of prompts and PIL pictures."""
        inputs = self.processor(
            text=[self.render(prompt) for prompt in prompts], images=images, padding=True, return_tensors="pt"
        )
        if self.reward["positions"] == "flat":
            del inputs["mm_token_type_ids"]
        return inputs

    @torch.inference_mode()
    def forward(self, inputs):
        """The mean of each sample."""
        inputs = {name: tensor.to(self.device) for name, tensor in inputs.items()}
        hidden = self.model.model(**inputs, use_cache=False).last_hidden_state
        ids = inputs["input_ids"]
        if self.reward_id is None:
            places = inputs["attention_mask"].sum(1) - 1
        else:
            places = (ids == self.reward_id).int().argmax(1)
        rows = hidden[torch.arange(len(ids), device=self.device), places]
        return self.model.rm_head(rows.float())[:, 0].tolist()

    def score(self, prompts, images):
        return self.forward(self.process(prompts, images))


def open_picture(path):
    """A picture as a server gets it: the file's bytes, decoded by PIL."""
    with Image.open(path) as image:
        return image.convert("RGB")
