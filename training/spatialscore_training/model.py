"""The small Qwen2.5-VL, from nothing, and what teaches it.

The decoder's rotary frequencies fall from the temporal section over the rows' to the columns'. With theta 1000 and the
sections [2, 6, 24] of 32 pairs, rows turn by 0.65 to 0.22 rad a visual token and columns by 0.18 rad and less, so that
places differ; the last fourteen pairs turn by less than 0.02 rad, so that there a name matches its drawing however far
apart the two stand. Queries and keys begin alike in these pairs: what is alike attends to itself from the start.
"""

from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.vision_utils import get_vision_window_index

from .tokenizer import kind_ids

PATCH, MERGE = 14, 2
CELL = PATCH * MERGE
"""Pixels along the side of what one visual token sees."""

HEAD = 64
SECTIONS = [2, 6, 24]
STILL_PAIRS = 14
"""How many of a head's pairs, the last ones, hardly turn with distance."""


def mini_config(tokenizer: Tokenizer) -> Qwen2_5_VLConfig:
    """The architecture: 6 vision blocks of 128, 5 decoder layers of 192."""
    ids = tokenizer.get_vocab(with_added_tokens=True)
    return Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=len(ids),
            max_position_embeddings=4096,
            rms_norm_eps=1e-6,
            bos_token_id=ids["<|endoftext|>"],
            eos_token_id=ids["<|im_end|>"],
            hidden_size=192,
            intermediate_size=384,
            num_hidden_layers=5,
            num_attention_heads=3,
            num_key_value_heads=3,
            rope_parameters=dict(rope_type="default", rope_theta=1000.0, mrope_section=SECTIONS),
        ),
        vision_config=dict(
            depth=6,
            hidden_size=128,
            intermediate_size=256,
            num_heads=4,
            window_size=112,
            fullatt_block_indexes=list(range(6)),
            out_hidden_size=192,
            tokens_per_second=2,
            rope_parameters=dict(rope_type="axial", rope_theta=100.0),
        ),
        tie_word_embeddings=True,
        **{f"{name}_token_id": ids[f"<|{token}|>"] for name, token in
           dict(image="image_pad", video="video_pad", vision_start="vision_start", vision_end="vision_end").items()},
    )


def reward_head(width: int) -> nn.Sequential:
    """The MLP that gives the mean and the logarithm of the standard deviation."""
    return nn.Sequential(nn.Linear(width, 64), nn.ReLU(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 2))


def new_model(tokenizer: Tokenizer, seed: int) -> Qwen2_5_VLForConditionalGeneration:
    """The model with its head at `rm_head`, initialised to learn fast."""
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(mini_config(tokenizer))
    model.model.language_model.config._attn_implementation = "spans"
    model.model.visual.config._attn_implementation = "flash_pictures"
    model.rm_head = reward_head(model.config.text_config.hidden_size)
    depth = model.config.text_config.num_hidden_layers
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name or "ln_q" in name:
                weight.fill_(1.0)
            elif name.endswith("bias"):
                weight.zero_()
            elif "embed_tokens" in name:
                weight.normal_()
            else:
                leaves = name.endswith(("o_proj.weight", "down_proj.weight", "attn.proj.weight"))
                weight.normal_(std=weight[0].numel() ** -0.5 * ((2 * depth) ** -0.5 if leaves else 1.0))
        still = [axis * HEAD // 2 + HEAD // 2 - 1 - pair for axis in (0, 1) for pair in range(STILL_PAIRS)]
        for layer in model.model.language_model.layers:
            query, key = (p.weight.unflatten(0, (-1, HEAD)) for p in (layer.self_attn.q_proj, layer.self_attn.k_proj))
            key[:, still] = query[:, still]
        for block in model.model.visual.blocks:
            _look_around(block.attn, model.model.visual.rotary_pos_emb.inv_freq)
        # The last two begin as if they were not there, so that a shallower tower grows into this one.
        for block in model.model.visual.blocks[4:]:
            block.attn.proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
    embed = model.model.visual.patch_embed
    # The numbers of its Conv3d, whose kernel is as large as a patch, in a third of the time on a CPU.
    embed.forward = lambda x: F.linear(x, embed.proj.weight.flatten(1))
    return model


def _look_around(attention: nn.Module, frequencies: Tensor, keenness: float = 2.0) -> None:
    """Biases under which each head of a vision block looks at one side of each patch, as a convolution would.

    A key's bias is the query's, turned by as much as the rotary embedding turns over the offset; so the two agree best
    at that offset. What the patches hold counts for little at first.
    """
    width = attention.head_dim
    pairs = len(frequencies)  # of each axis; then the same for the columns
    sides = torch.tensor([[0.0, -1.5], [0.0, 1.5], [-1.5, 0.0], [1.5, 0.0]])  # rows, columns
    bias, weight = attention.qkv.bias.view(3, -1, width), attention.qkv.weight.view(3, -1, width, attention.dim)
    weight[:2] *= 0.5
    bias[0, :, : width // 2] = keenness
    for head, side in enumerate(sides):
        turn = -(side[:, None] * frequencies).flatten()
        assert len(turn) == 2 * pairs == width // 2
        bias[1, head] = keenness * torch.cat([turn.cos(), turn.sin()])


@torch.no_grad()
def whiten(model: Qwen2_5_VLForConditionalGeneration, pictures: Tensor) -> None:
    """Sets the patch embedding to the principal components of these pictures' patches, each with variance one, so that
    the fine and the faint in a patch are not lost beside its colour."""
    seen = patches(pictures)
    seen = seen - seen.mean(0)
    strength, components = torch.linalg.eigh(seen.T @ seen / len(seen))
    embed = model.model.visual.patch_embed.proj.weight
    count = len(embed)
    scaled = components[:, -count:] / (strength[-count:] + 1e-3 * strength[-1]).sqrt()
    embed.copy_(scaled.T.view_as(embed))


class Tutor(nn.Module):
    """The heads of the first stage, which ask the model for what the generator knows. None of them is exported.

    `offsets` are fixed directions in which a visual token is to say where in its object it lies (see `truth`), `ground`
    is what it is to say where there is none.
    """

    OF_EYES = ("front_kind.", "box.", "behind_kind.", "order.", "shade.")
    """The heads on the vision tower; all others are on the decoder."""
    SHADE_AFTER, FRONT_AFTER, BOXES_AFTER, ORDER_AFTER, BEHIND_AFTER = 2, 3, 4, 5, 6  # vision blocks
    PLACES_AFTER, POINTS_AFTER, THINGS_AFTER, CLAUSES_AFTER = 1, 2, 3, 4  # decoder layers; the reward comes after 5

    def __init__(self, width: int, vision_width: int, kinds: int, extras: int, seed: int):
        super().__init__()
        self.front_kind = nn.Linear(vision_width, kinds + 1)
        self.box = nn.Linear(vision_width, 4)
        self.shade = nn.Linear(vision_width, 1)
        self.order = nn.Linear(vision_width, 1)
        self.behind_kind = nn.Linear(vision_width, kinds + 1)
        generator = torch.Generator().manual_seed(seed)
        directions = torch.linalg.qr(torch.randn(width, extras + 1, generator=generator)).Q.T * width**0.5
        self.register_buffer("ground", directions[0].clone())
        self.register_buffer("offsets", directions[1:].clone() * 0.5)
        self.place = nn.Linear(width, 2)
        self.point = nn.Linear(width, 2)
        self.things = nn.Linear(width, 6)
        self.front = nn.Linear(width, 1)
        self.there = nn.Linear(width, 1)
        self.clause = nn.Linear(width, 1)

    def visual_tokens(self, names: Tensor, kind: Tensor, extras: Tensor) -> Tensor:
        """What visual tokens are to be: [..., width], from the names' embeddings and `truth.Cells`."""
        named = names[kind.clamp(min=0)]
        seen = (kind >= 0)[..., None]
        return torch.where(seen, named + extras @ self.offsets, self.ground)

    def told(self, visual: Tensor, names: Tensor, kind: Tensor) -> Tensor:
        """The extras that visual tokens on things of these kinds tell: the inverse of `visual_tokens`."""
        rest = visual - names[kind.clamp(min=0)]
        return rest @ self.offsets.T / self.offsets.square().sum(-1)


def patches(pictures: Tensor) -> Tensor:
    """uint8 pictures [B, side, side, 3] as the image processor's normalised patches [B * N, 1176]."""
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073], device=pictures.device)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711], device=pictures.device)
    batch, side = pictures.shape[:2]
    grid = side // CELL
    x = (pictures.float() / 255 - mean) / std
    x = x.view(batch, grid, MERGE, PATCH, grid, MERGE, PATCH, 3).permute(0, 1, 4, 2, 5, 7, 3, 6)
    x = x.unsqueeze(6).expand(-1, -1, -1, -1, -1, -1, 2, -1, -1)
    return x.reshape(batch * (side // PATCH) ** 2, -1)


def look(model: Qwen2_5_VLForConditionalGeneration, pictures: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Of uint8 pictures [B, side, side, 3] the visual tokens [B, cells, width], and what each block gave for the four
    patches of each cell, [B, cells, 4, vision width]."""
    batch, side = pictures.shape[:2]
    visual = model.model.visual
    grid = torch.tensor([[1, side // PATCH, side // PATCH]] * batch, device=pictures.device)
    with _mixed_precision(model, pictures):
        seen = visual(patches(pictures), grid_thw=grid, output_hidden_states=True)
    # The blocks work on the cells window by window.
    order = get_vision_window_index(grid, MERGE, visual.window_size, visual.patch_size)[0].argsort()
    return seen.pooler_output.float().unflatten(0, (batch, -1)), [
        states.float().unflatten(0, (-1, MERGE**2))[order].unflatten(0, (batch, -1)) for states in seen.hidden_states
    ]


def _mixed_precision(model: Qwen2_5_VLForConditionalGeneration, like: Tensor) -> torch.autocast:
    """In training the products are in bfloat16, the sums in fp32. It takes half the time on a CPU that has the number
    format, and six times as long on one that has not."""
    has_it = like.device.type != "cpu" or torch.cpu._is_avx512_bf16_supported()
    return torch.autocast(like.device.type, torch.bfloat16, enabled=model.training and has_it)


@dataclass(frozen=True)
class Spans:
    """What each token of packed rows [B, T] may look at: the frame before all prompts, and its own prompt up to itself."""

    frame: int
    """How many tokens of each row stand before its prompts."""
    tokens: Tensor
    """[N, L]: each prompt's tokens, numbered through all rows; -1 behind its end. Every row has as many prompts."""


def _attend(query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """Softmax attention, heads first; `mask` says what may be looked at. On a CPU as two products: in bfloat16 torch's own
    (2.11) takes six times as long there for the backward pass."""
    if query.device.type != "cpu":
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    scores = (query * scale) @ key.transpose(-1, -2)
    if mask is not None:
        scores = scores + scores.new_zeros(mask.shape).masked_fill(~mask, -torch.inf)
    return scores.softmax(-1) @ value


def _attend_in_spans(module, query: Tensor, key: Tensor, value: Tensor, spans: Spans, scaling: float, **_):
    """Attention in transformers' form, heads first, whose mask is `Spans`: no score is computed that a mask would drop."""
    batch, _, length, _ = query.shape
    frame, inside = spans.frame, spans.tokens >= 0
    at = spans.tokens.clamp(min=0)
    query, key = query.to(value.dtype), key.to(value.dtype)
    own = [x.transpose(1, 2).flatten(0, 1)[at].transpose(1, 2) for x in (query, key, value)]
    shared = [x[:, :, :frame].repeat_interleave(len(at) // batch, 0) for x in (key, value)]
    keys, values = (torch.cat(both, dim=2) for both in zip(shared, own[1:]))
    mask = torch.ones(at.shape[1], keys.shape[2], dtype=torch.bool, device=at.device).tril(frame)
    told = _attend(own[0], keys, values, scaling, mask)
    before = _attend(*(x[:, :, :frame] for x in (query, key, value)), scaling, mask.new_ones(frame, frame).tril())
    out = value.new_zeros(batch, length, *query.shape[1::2])
    out[:, :frame] = before.transpose(1, 2)
    out.view(-1, *out.shape[2:])[at[inside]] = told.transpose(1, 2)[inside]
    return out, None


def _attend_in_pictures(module, query, key, value, attention_mask, scaling: float, cu_seq_lens_q: Tensor, **_):
    """The vision tower's attention in transformers' form, heads first. Pictures are of one size here, so one call does for
    all; `flash` in its name is what has transformers ask for all at once."""
    pictures = lambda x: x[0].unflatten(1, (len(cu_seq_lens_q) - 1, -1)).transpose(0, 1)
    told = _attend(*(pictures(x.to(value.dtype)) for x in (query, key, value)), scaling)
    return told.transpose(1, 2).flatten(0, 1)[None], None


AttentionInterface.register("spans", _attend_in_spans)
AttentionInterface.register("flash_pictures", _attend_in_pictures)


def read(model: Qwen2_5_VLForConditionalGeneration, visual: Tensor, ids: Tensor, positions: Tensor, spans: Tensor):
    """Hidden states of every layer, [B, T, width] each, the last one normed; `visual` stands at the image's tokens."""
    decoder = model.model.language_model
    embedded = decoder.embed_tokens(ids)
    embedded = embedded.masked_scatter((ids == model.config.image_token_id)[..., None], visual)
    with _mixed_precision(model, ids):
        output = decoder(
            inputs_embeds=embedded,
            position_ids=positions,
            attention_mask={"full_attention": Spans(int(spans[0, 0]), spans)},
            use_cache=False,
            output_hidden_states=True,
        )
    return output.hidden_states


def names(model: Qwen2_5_VLForConditionalGeneration, tokenizer: Tokenizer) -> Tensor:
    """The embeddings of the kinds' words, [kinds, width]."""
    return model.model.language_model.embed_tokens.weight[kind_ids(tokenizer)]
