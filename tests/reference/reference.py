"""The reference: a checkpoint of ours run by the real transformers classes, every stage laid bare.

    from reference import Reference
    stages = Reference("path/to/checkpoint").score("A red cup left of a blue bowl.", "picture.png")
    stages["mean"], stages["stddev"], stages["text.layers.0"], ...

or, to score one pair from the shell:

    python tests/reference/reference.py CHECKPOINT PROMPT IMAGE

Nothing of the model, the tokenizer or the image processor is written anew here: stages are caught by forward hooks on
the modules of the family's `…ForConditionalGeneration`, in fp32 on the CPU. The conversation is run whole; what stands
behind the token where the reward is read is then cut off, which causal attention permits.

`score` gives these tensors; T tokens up to and including the reward's, N patches in the image processor's order, those
of several pictures one behind the other, when `grid` is [pictures, 2]:

    input_ids             [T] int64         vision.patch_embed    [N, D]
    grid                  [2] int64         vision.blocks.{i}     [N, D]       not in window order
    pixels                [N, 588] u8       vision.merger         [N/4, out]   row by row
    pixel_values          [N, 1176]         vision.position_embed [N, D]       Qwen3-VL: learnt positions added
    head                  [outputs] columns vision.deepstack.{i}  [N/4, out]   Qwen3-VL
    text.positions        [3, T] int64      mean, stddev          []           stddev only where output is gaussian
    text.embeddings       [T, D]            text.norm             [1, D]       the reward's row
    text.layers.{i}       [T, D]            text.layers.{last}    [1, D]       the reward's row

`pixels` is `pixel_values` before rescaling and normalising, with the temporal axis once: channel, row, column.
"""

import json
import re
import sys
import tempfile
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor
from transformers.image_utils import load_image
from transformers.utils import logging
from transformers.vision_utils import get_vision_window_index

logging.set_verbosity_error()
logging.disable_progress_bar()

# Stands for the caller's prompt while the chat template is rendered; text that no template rewrites.
SENTINEL = "PROMPT-STANDS-HERE"


def linear(tensors, name):
    """An empty layer with the shape of this one."""
    rows, columns = tensors[f"{name}.weight"].shape
    return nn.Linear(columns, rows, bias=f"{name}.bias" in tensors)


def head_from(tensors):
    """The reward head whose state dict this is: `weight` alone, or a sequence of linear layers with ReLU between.

    A slot that holds no weights is the activation if it is the first behind a layer, else dropout, which is nothing.
    With `output_layer` it is the head that HPSv3's trainer makes of `rm_head_kwargs`.
    """
    if "weight" in tensors:
        rows, columns = tensors["weight"].shape
        head = nn.Linear(columns, rows, bias="bias" in tensors)
    elif "output_layer.weight" in tensors:
        head = nn.Sequential(linear(tensors, "0"), nn.ReLU(), nn.Dropout())
        layer = 1
        while f"layer_{layer}.0.weight" in tensors:
            block = nn.Sequential(linear(tensors, f"layer_{layer}.0"), nn.ReLU(), nn.Dropout())
            head.add_module(f"layer_{layer}", block)
            layer += 1
        head.add_module("output_layer", linear(tensors, "output_layer"))
    else:
        slots = sorted({int(key.split(".")[0]) for key in tensors})
        head = nn.Sequential()
        for slot in range(slots[-1] + 1):
            if slot in slots:
                head.append(linear(tensors, str(slot)))
            else:
                head.append(nn.ReLU() if slot - 1 in slots else nn.Identity())
    head.load_state_dict(tensors)
    return head.float()


def read_tensors(files, wanted):
    """The tensors of these safetensors files whose key `wanted` maps to a name."""
    found = {}
    for file in files:
        with safe_open(file, "pt") as tensors:
            found |= {wanted(key): tensors.get_tensor(key) for key in tensors.keys() if wanted(key)}
    return found


def load_head(directory, key):
    """The head under this key, from the model's own files or else from the adapter's."""
    name = re.compile(rf"(?:base_model\.model\.)?{re.escape(key)}\.(.*)")
    wanted = lambda key: (match := name.fullmatch(key)) and match[1]
    tensors = read_tensors(sorted(directory.glob("model*.safetensors")), wanted)
    return head_from(tensors or read_tensors(directory.glob("adapter_model.safetensors"), wanted))


def load_model(directory, dtype=torch.float32, head="rm_head"):
    """The backbone with the head of this key at `rm_head`, the adapter, if there is one, merged.

    `lm_head` is a head too: its columns are the logits of the vocabulary.
    """
    directory = Path(directory)
    config = AutoConfig.from_pretrained(directory)
    embeddings = read_tensors(
        sorted(directory.glob("model*.safetensors")),
        lambda key: "rows" if key.endswith("embed_tokens.weight") else None,
    ) or read_tensors(
        # Of two tied tensors a file may hold the other one alone.
        sorted(directory.glob("model*.safetensors")),
        lambda key: "rows" if key == "lm_head.weight" else None,
    )
    # Trainers that add a token shrink the padded table and leave the config behind: the tensor decides.
    config.text_config.vocab_size = len(embeddings["rows"])
    with tempfile.TemporaryDirectory() as base:
        # from_pretrained would load an adapter that lies beside the weights, and without the head; peft does it below.
        for file in directory.iterdir():
            if not file.name.startswith("adapter"):
                (Path(base) / file.name).symlink_to(file.resolve())
        model = AutoModelForImageTextToText.from_pretrained(
            base, config=config, dtype=dtype, attn_implementation="eager"
        )
    model.rm_head = model.lm_head if head == "lm_head" else load_head(directory, head)
    if (directory / "adapter_config.json").exists():
        model = PeftModel.from_pretrained(model, str(directory)).merge_and_unload()
        model.rm_head.float()
    return model.eval()


class Reference:
    """A checkpoint, ready to score."""

    def __init__(self, directory, dtype=torch.float32, head="rm_head"):
        directory = Path(directory)
        self.reward = json.loads((directory / "reward_config.json").read_text())
        self.processor = AutoProcessor.from_pretrained(directory)
        # The PIL backend: the reference resizes as PIL does. The other one, torchvision's, is only close to it.
        images = AutoImageProcessor.from_pretrained(directory, backend="pil")
        images.size = dict(images.size) | {
            edge: self.reward[key]
            for edge, key in (("shortest_edge", "min_pixels"), ("longest_edge", "max_pixels"))
            if key in self.reward
        }
        self.processor.image_processor = images
        self.tokenizer = self.processor.tokenizer
        # The processor reads a template's own file and leaves the one in tokenizer_config.json to the tokenizer.
        self.processor.chat_template = self.processor.chat_template or self.tokenizer.chat_template
        self.model = load_model(directory, dtype, head)

    # What the model reads

    def render(self, prompt, pictures=1):
        """The conversation about so many pictures as text."""
        text = self.reward["instruction"].replace("{prompt}", prompt)
        turn = {"role": "user", "content": [{"type": "image"}] * pictures + [{"type": "text", "text": text}]}
        return self.processor.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)

    def prompt_segment(self, prompt, pictures):
        """The text between the template's special tokens in which the prompt stands, and what is before and behind."""
        before, behind = self.render(SENTINEL, pictures).split(SENTINEL)
        special = [token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        cuts = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))))
        start = max((match.end() for match in cuts.finditer(before)), default=0)
        end = min((match.start() for match in cuts.finditer(behind)), default=len(behind))
        return before[:start], before[start:] + prompt + behind[:end], behind[end:]

    def encode(self, prompt, pictures=1):
        """Token ids with one placeholder for each picture. Special tokens that the prompt spells are plain text."""
        before, segment, behind = self.prompt_segment(prompt, pictures)
        ids = lambda text, plain: self.tokenizer(text, add_special_tokens=False, split_special_tokens=plain)[
            "input_ids"
        ]
        return ids(before, False) + ids(segment, True) + ids(behind, False)

    def read_images(self, paths):
        """Grids, bytes and values of the patches of pictures."""
        images = [load_image(str(path)) for path in paths]
        values = self.processor.image_processor(images, return_tensors="pt")
        plain = self.processor.image_processor(images, return_tensors="pt", do_rescale=False, do_normalize=False)
        pixels = plain["pixel_values"].unflatten(1, (3, 2, -1))[:, :, 0].flatten(1).to(torch.uint8)
        return values["image_grid_thw"], pixels, values["pixel_values"].float()

    def expand(self, ids, grid):
        """Each placeholder once for each visual token of its picture."""
        visual = iter((grid.prod(-1) // self.processor.image_processor.merge_size**2).tolist())
        placeholder = self.model.config.image_token_id
        return [copy for id in ids for copy in [id] * (next(visual) if id == placeholder else 1)]

    def reward_index(self, ids):
        """Where the reward is read."""
        if self.reward["reward_token"] == "last":
            return len(ids) - 1
        token = self.tokenizer.convert_tokens_to_ids(self.reward["special_token"])
        assert ids.count(token) == 1, f"{ids.count(token)} reward tokens"
        return ids.index(token)

    # What the model says

    def forward(self, input_ids, grid, pixel_values):
        """The decoder's output for every token."""
        inputs = {"input_ids": input_ids[None], "pixel_values": pixel_values, "image_grid_thw": grid}
        if self.reward["positions"] == "mrope":
            # The model's own get_rope_index needs to know the visual tokens.
            inputs["mm_token_type_ids"] = (inputs["input_ids"] == self.model.config.image_token_id).int()
        else:
            inputs["position_ids"] = torch.arange(len(input_ids)).expand(3, 1, -1)
        return self.model.model(**inputs, use_cache=False).last_hidden_state[0]

    def read_head(self, hidden):
        """Raw columns, mean and, for a Gaussian, standard deviation from the hidden state at the reward's token."""
        head = self.model.rm_head(hidden.float())
        rewards = {"head": head, "mean": head[0]}
        if self.reward["output"] == "gaussian":
            rewards["stddev"] = head[1].exp()
        return rewards

    @torch.no_grad()
    def mean(self, prompt, *images):
        """The score alone, without hooks: for many items."""
        grid, _, values = self.read_images(images)
        ids = self.expand(self.encode(prompt, len(images)), grid)
        hidden = self.forward(torch.tensor(ids), grid, values)
        return float(self.read_head(hidden[self.reward_index(ids)])["mean"])

    @torch.no_grad()
    def score(self, prompt, *images):
        """Every stage on the way from (prompt, paths of pictures) to the reward."""
        grid, pixels, values = self.read_images(images)
        ids = self.expand(self.encode(prompt, len(images)), grid)
        index = self.reward_index(ids)
        stages = {
            "input_ids": torch.tensor(ids[: index + 1]),
            "grid": grid[:, 1:].squeeze(0),
            "pixels": pixels,
            "pixel_values": values,
        }

        visual, text = self.model.model.visual, self.model.model.language_model
        patch_order = lambda x: x
        if hasattr(visual, "window_size"):
            sizes = visual.spatial_merge_size, visual.window_size, visual.patch_size
            windows, _ = get_vision_window_index(grid, *sizes)
            patch_order = lambda x: x.unflatten(0, (-1, visual.spatial_merge_unit))[windows.argsort()].flatten(0, 1)
        hooks = []

        def catch(name, module, read):
            hook = lambda _module, _args, output: stages.__setitem__(name, read(output))
            hooks.append(module.register_forward_hook(hook))

        def catch_positions(_module, args):
            stages["text.positions"] = args[1][:, 0, : index + 1]

        def catch_embeddings(_module, _args, kwargs):
            stages["text.embeddings"] = kwargs["inputs_embeds"][0, : index + 1]

        def catch_placed(_module, args):
            stages["vision.position_embed"] = args[0]

        def catch_deepstack(_module, _args, output):
            stages.update({f"vision.deepstack.{i}": x for i, x in enumerate(output.deepstack_features)})

        catch("vision.patch_embed", visual.patch_embed, lambda x: x)
        if hasattr(visual, "pos_embed"):
            hooks.append(visual.blocks[0].register_forward_pre_hook(catch_placed))
            hooks.append(visual.register_forward_hook(catch_deepstack))
        for i, block in enumerate(visual.blocks):
            catch(f"vision.blocks.{i}", block, patch_order)
        catch("vision.merger", visual, lambda output: output.pooler_output)
        hooks.append(text.rotary_emb.register_forward_pre_hook(catch_positions))
        hooks.append(text.register_forward_pre_hook(catch_embeddings, with_kwargs=True))
        for i, layer in enumerate(text.layers):
            first = index if i + 1 == len(text.layers) else 0
            catch(f"text.layers.{i}", layer, lambda x, first=first: x[0, first : index + 1])
        catch("text.norm", text.norm, lambda x: x[0, index : index + 1])
        try:
            hidden = self.forward(torch.tensor(ids), grid, values)
        finally:
            for hook in hooks:
                hook.remove()
        stages |= self.read_head(hidden[index])
        return {name: stage.detach().clone().contiguous() for name, stage in stages.items()}

    @torch.no_grad()
    def check(self, prompt, *images):
        """Asserts that `score` is what transformers gives by its plainest path: processor, model, head, no hooks.

        Only for a prompt that spells no special token, since the plain path would let one in.
        """
        stages = self.score(prompt, *images)
        pictures = [load_image(str(image)) for image in images]
        plain = self.processor(text=[self.render(prompt, len(images))], images=pictures, return_tensors="pt")
        if self.reward["positions"] == "flat":
            del plain["mm_token_type_ids"]
            if self.model.config.model_type != "qwen2_5_vl":
                # The other families refuse ids without a grid; this one numbers tokens 0, 1, 2, …
                plain["position_ids"] = torch.arange(plain["input_ids"].shape[1]).expand(3, 1, -1)
        ids = plain["input_ids"][0].tolist()
        index = self.reward_index(ids)
        assert ids[: index + 1] == stages["input_ids"].tolist(), "tokens differ from transformers' own"
        plain["pixel_values"] = plain["pixel_values"].float()
        output = self.model(**plain, output_hidden_states=True)
        mean = self.read_head(output.hidden_states[-1][0, index])["mean"]
        assert torch.allclose(mean, stages["mean"], rtol=1e-5, atol=1e-6), (mean, stages["mean"])


if __name__ == "__main__":
    directory, prompt, image = sys.argv[1:]
    for name, stage in Reference(directory).score(prompt, image).items():
        print(f"{name:20} {str(list(stage.shape)):14}", stage.item() if stage.dim() == 0 else "")
