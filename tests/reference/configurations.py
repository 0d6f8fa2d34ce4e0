"""Checkpoints whose configuration or head is changed in one place, and what the reference makes of each.

    python tests/reference/configurations.py FIXTURES [FIXTURES/configurations.json]

FIXTURES holds the cases that make_fixtures.py makes. Written is a list of

    case, item      whose checkpoint is changed, and which of its items is scored
    edits           a list of {"file", "at" (a JSON pointer), "value" (absent: the key is removed)}
    renames         the beginning of a tensor's name, and what it is replaced by
    score           the reference's, or null where it refuses or gives no finite number
    refused         what the server's refusal must say, or null where it must give that score

The server may refuse what the reference scores, where it does not support it, but must never score what the reference
refuses. Floats that JSON has no number for are written as transformers writes them.
"""

import json
import math
import shutil
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from reference import Reference

NAN, INFINITY = float("nan"), float("inf")
# Removes a key.
ABSENT = object()

CONFIG, PICTURES, PROCESSOR, REWARD = (
    "config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "reward_config.json",
)
TEXT, VISION = "/text_config/", "/vision_config/"
ROPE, AXES = TEXT + "rope_parameters/", VISION + "rope_parameters/"
FULL, SLIDING = "full_attention", "sliding_attention"

# In the form of today (`deep`): what is changed, and the words of our refusal where we refuse.
CONFIGURATION = [
    # Sections: any number of them, which take turns over the three axes.
    ({ROPE + "mrope_section": [8]}, None),
    ({ROPE + "mrope_section": [4, 4]}, None),
    ({ROPE + "mrope_section": [2, 2, 2, 2]}, None),
    ({ROPE + "mrope_section": [1] * 8}, None),
    ({ROPE + "mrope_section": [0, 4, 4]}, None),
    ({ROPE + "mrope_section": [4, 2, 2, 0]}, None),
    (
        {ROPE + "mrope_section": [4, 2, 3]},
        "mrope_section is [4,2,3]; its parts must be at least 0 and must add up to half the width of a head, 8",
    ),
    ({ROPE + "mrope_section": [4, -2, 6]}, "mrope_section is [4,-2,6]"),
    ({ROPE + "mrope_section": [2**63 - 1, 1, 2**63 - 1]}, "mrope_section"),
    ({ROPE + "mrope_section": [2**63, 2**63, 8]}, "must be a list of integers"),
    ({ROPE + "mrope_section": None}, "mrope_section is null"),
    ({ROPE + "mrope_section": [4.0, 2, 2]}, "must be a list of integers"),
    ({ROPE + "mrope_section": []}, "mrope_section is []"),
    ({ROPE + "mrope_section": "422"}, "must be a list of integers"),
    ({ROPE + "mrope_section": ABSENT}, "mrope_section is absent, which means [16, 24, 24]"),
    # The base of the angles, wherever it stands.
    ({ROPE + "rope_theta": 0}, "rope_theta is 0, must be a finite number above 0"),
    ({ROPE + "rope_theta": -1.0}, "rope_theta is -1.0"),
    ({ROPE + "rope_theta": NAN}, "rope_theta is NaN"),
    ({ROPE + "rope_theta": INFINITY}, "rope_theta is inf"),
    ({ROPE + "rope_theta": None}, "rope_theta is null"),
    ({ROPE + "rope_theta": "20"}, 'rope_theta is "20"'),
    ({ROPE + "rope_theta": ABSENT}, None),
    ({ROPE + "rope_theta": 20}, None),
    ({ROPE + "rope_theta": 0.5}, None),
    ({ROPE + "rope_theta": ABSENT, TEXT + "rope_theta": 50.0}, None),
    ({ROPE + "rope_theta": ABSENT, "/rope_theta": 50.0}, None),
    ({TEXT + "rope_theta": 50.0}, None),
    ({TEXT + "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}, None),
    ({TEXT + "rope_scaling": {}}, None),
    ({TEXT + "rope_scaling": None}, None),
    ({TEXT + "rope_scaling": {"type": "mrope"}}, "mrope_section is absent"),
    ({TEXT + "rope_scaling": [1]}, "must be an object"),
    ({AXES + "rope_theta": 100}, None),
    ({AXES + "rope_theta": ABSENT, VISION + "rope_theta": 100.0}, None),
    ({VISION + "rope_parameters": ABSENT, VISION + "rope_theta": 100.0}, None),
    ({VISION + "rope_parameters": None}, None),
    ({VISION + "rope_theta": 100.0}, None),
    ({VISION + "rope_scaling": {"rope_theta": 100.0}}, None),
    ({AXES + "rope_theta": 0}, "vision_config.rope_parameters.rope_theta is 0"),
    # Kinds of rope.
    ({ROPE + "rope_type": "mrope"}, None),
    ({ROPE + "rope_type": ABSENT}, None),
    ({ROPE + "rope_type": ABSENT, ROPE + "type": "mrope"}, None),
    ({ROPE + "rope_type": "default", ROPE + "type": "yarn"}, None),
    ({ROPE + "factor": 4.0, ROPE + "partial_rotary_factor": 0.5}, None),
    (
        {ROPE + "rope_type": ABSENT, ROPE + "type": "yarn"},
        '"yarn", must be "default" or "mrope": others are not supported',
    ),
    ({ROPE + "rope_type": "yarn", ROPE + "factor": 4.0}, '"yarn", must be'),
    ({ROPE + "rope_type": "linear", ROPE + "factor": 2.0}, '"linear", must be'),
    ({ROPE + "rope_type": "dynamic", ROPE + "factor": 2.0}, '"dynamic", must be'),
    ({ROPE + "rope_type": "llama3"}, '"llama3", must be'),
    ({ROPE + "rope_type": "longrope"}, '"longrope", must be'),
    ({ROPE + "rope_type": None}, "rope_type is null"),
    ({ROPE + "rope_type": "axial"}, '"axial", must be'),
    ({TEXT + "rope_parameters": {FULL: {"rope_type": "default", "mrope_section": [4, 2, 2]}}}, "by kinds of layers"),
    ({AXES + "rope_type": "default"}, None),
    ({AXES + "rope_type": "linear"}, '"linear", must be "axial" or "default": others are not supported'),
    ({VISION + "rope_scaling": {"type": "linear", "factor": 2.0}}, '"linear", must be'),
    # The reference's other names for keys.
    ({VISION + "num_heads": ABSENT, VISION + "num_attention_heads": 2}, None),
    ({VISION + "num_attention_heads": 2}, None),
    ({VISION + "num_attention_heads": 4.0}, "num_heads is 4.0, must be at least 1 and at most 1048576, an integer"),
    ({VISION + "depth": ABSENT, VISION + "num_hidden_layers": 5}, None),
    ({VISION + "in_chans": 1, VISION + "spatial_patch_size": 7, VISION + "tokens_per_second": 100}, None),
    # Widths that do not fit.
    ({VISION + "head_dim": 8}, None),
    ({VISION + "head_dim": 4}, "vision_config.head_dim is 4, but"),
    ({TEXT + "head_dim": 16}, None),
    ({TEXT + "head_dim": 0}, None),
    ({TEXT + "head_dim": None}, None),
    ({TEXT + "head_dim": 8}, "text_config.head_dim is 8, but hidden_size over the heads is 16"),
    ({TEXT + "head_dim": 32}, "text_config.head_dim is 32"),
    ({TEXT + "num_key_value_heads": None}, None),
    ({TEXT + "num_key_value_heads": ABSENT}, "must be a multiple of num_key_value_heads 8"),
    ({VISION + "window_size": 56}, None),
    ({VISION + "window_size": 100}, None),
    ({VISION + "window_size": 20}, "window_size 20 must be at least a visual token's side, 28"),
    ({VISION + "window_size": -112}, "window_size is -112, must be at least 1"),
    ({VISION + "window_size": 10**12}, "window_size is 1000000000000, must be at least 1 and at most"),
    ({VISION + "fullatt_block_indexes": []}, None),
    ({VISION + "fullatt_block_indexes": [-1, 4, 99]}, None),
    ({VISION + "fullatt_block_indexes": ABSENT}, None),
    ({VISION + "fullatt_block_indexes": 4}, "fullatt_block_indexes is 4, must be a list of integers"),
    ({VISION + "fullatt_block_indexes": [1.0, 4]}, "must be a list of integers"),
    ({VISION + "in_channels": None}, "in_channels is null"),
    # Activations.
    ({VISION + "hidden_act": "swish", TEXT + "hidden_act": "swish"}, None),
    ({VISION + "hidden_act": "quick_gelu"}, '"quick_gelu", must be "silu" or "swish": others are not supported'),
    ({TEXT + "hidden_act": "gelu"}, '"gelu", must be'),
    ({TEXT + "hidden_act": None}, "hidden_act is null, must be a string"),
    # Attention over less than all.
    ({TEXT + "layer_types": None}, None),
    ({TEXT + "layer_types": ["attention"] * 4}, None),
    ({TEXT + "layer_types": [FULL] * 3}, "layer_types has 3 entries for num_hidden_layers 4"),
    (
        {TEXT + "layer_types": [FULL] * 3 + [SLIDING]},
        f'"{SLIDING}", must be "{FULL}" or "attention": others are not supported',
    ),
    ({TEXT + "layer_types": ["linear_attention"] * 4}, '"linear_attention", must be "full_attention"'),
    ({TEXT + "layer_types": ["foo"] * 4}, '"foo", must be "full_attention"'),
    ({TEXT + "use_sliding_window": None}, None),
    ({TEXT + "use_sliding_window": True}, None),
    ({TEXT + "use_sliding_window": True, TEXT + "layer_types": ABSENT, TEXT + "sliding_window": 4}, None),
    ({TEXT + "use_sliding_window": True, TEXT + "layer_types": ABSENT, TEXT + "max_window_layers": 0}, None),
    (
        {
            TEXT + "use_sliding_window": True,
            TEXT + "layer_types": ABSENT,
            TEXT + "max_window_layers": 0,
            TEXT + "sliding_window": 4,
        },
        f'"{SLIDING}", must be "full_attention"',
    ),
    # Numbers of other kinds.
    ({TEXT + "attention_dropout": NAN, TEXT + "initializer_range": INFINITY}, None),
    ({TEXT + "rms_norm_eps": 0.0}, None),
    ({TEXT + "rms_norm_eps": ABSENT}, None),
    ({TEXT + "rms_norm_eps": -1.0}, "rms_norm_eps is -1.0, must be a finite float of at least 0"),
    ({TEXT + "rms_norm_eps": NAN}, "rms_norm_eps is NaN"),
    ({TEXT + "rms_norm_eps": 1}, "rms_norm_eps is 1, must be a finite float"),
    ({TEXT + "hidden_size": 32.0}, "hidden_size is 32.0, must be at least 1 and at most 1048576, an integer"),
    ({TEXT + "hidden_size": "32"}, 'hidden_size is "32"'),
    (
        {TEXT + "num_hidden_layers": 10**9},
        "num_hidden_layers is 1000000000, must be at least 1 and at most 1024, an integer",
    ),
    ({TEXT + "num_hidden_layers": True}, "num_hidden_layers is true"),
    ({TEXT + "vocab_size": 723.0}, "vocab_size is 723.0"),
    ({VISION + "initializer_range": 1}, "initializer_range is 1, must be a float"),
    ({"/image_token_id": "712"}, "image_token_id"),
    ({"/image_token_id": -1}, "image_token_id is -1"),
    ({"/image_token_id": ABSENT}, "151655"),
    ({"/tie_word_embeddings": None}, "tie_word_embeddings is null, must be true or false"),
    # Keys that make another model.
    ({"/quantization_config": None}, None),
    ({"/quantization_config": {}}, None),
    ({"/quantization_config": {"quant_method": "awq", "bits": 4}}, "quantization_config: quantised weights"),
    ({TEXT + "quantization_config": {"quant_method": "fp8"}}, "text_config.quantization_config: quantised weights"),
    ({TEXT + "quantization_config": {}}, "text_config.quantization_config"),
    ({"/quantization_config": False}, "quantization_config"),
    ({TEXT + "pad_token_id": 723}, "pad_token_id is 723, but vocab_size is 723"),
    ({TEXT + "pad_token_id": -723}, None),
    ({VISION + "quantization_config": {"quant_method": "fp8"}}, "vision_config.quantization_config: quantised"),
    ({TEXT + "per_layer_config": {"0": {"intermediate_size": 8}}}, "text_config.per_layer_config"),
    ({"/vision_config": None}, "vision_config is missing"),
    ({"/vision_config": 5}, "vision_config is 5, must be an object"),
    ({"/dtype": "bfloat16", TEXT + "dtype": "float16"}, None),
    ({"/model_type": "llava"}, "model_type"),
]

# In the form before transformers 4.52 (`half`).
OLD_CONFIGURATION = [
    ({"/text_config": None}, None),
    ({"/rope_theta": 50.0}, None),
    ({"/rope_scaling/mrope_section": [2, 2, 4]}, None),
    ({"/rope_scaling": None, "/rope_parameters": {"rope_type": "default", "mrope_section": [2, 2, 4]}}, None),
    ({"/rope_scaling/type": "yarn", "/rope_scaling/rope_type": ABSENT}, '"yarn", must be'),
    ({"/rope_theta": None}, "rope_theta is null"),
    ({"/use_sliding_window": True, "/max_window_layers": 2}, None),
    ({"/layer_types": [FULL]}, "layer_types has 1 entries for num_hidden_layers 2"),
    ({"/quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config"),
]

# The other families.
QWEN2_CONFIGURATION = [
    ({ROPE + "mrope_section": [1, 1, 1, 1]}, None),
    ({ROPE + "mrope_section": [2, 1, 2]}, "mrope_section is [2,1,2]"),
    ({VISION + "mlp_ratio": 2.0}, "mlp_ratio is 2.0, must be an integer"),
    ({VISION + "mlp_ratio": None}, "mlp_ratio is null"),
    ({VISION + "num_heads": 4}, None),
    ({VISION + "rope_theta": 77.0}, None),
    ({VISION + "intermediate_size": 7, VISION + "out_hidden_size": 99}, None),
    ({VISION + "hidden_act": "gelu"}, '"gelu", must be "quick_gelu"'),
    ({VISION + "embed_dim": 32}, "cannot be served"),
]
QWEN3_CONFIGURATION = [
    ({ROPE + "mrope_section": [3, 3, 2]}, None),
    ({ROPE + "mrope_section": [4, 9, 9]}, None),
    ({ROPE + "mrope_section": [2, 2, 2, 2]}, None),
    ({ROPE + "mrope_section": [8]}, "mrope_section is [8]"),
    ({ROPE + "mrope_section": [4, 2]}, "mrope_section is [4,2]"),
    ({ROPE + "mrope_interleaved": True}, None),
    ({ROPE + "mrope_interleaved": False}, None),
    ({TEXT + "attention_bias": True}, "bias is missing"),
    ({TEXT + "rms_norm_eps": 0.1}, None),
    ({TEXT + "head_dim": 8}, "cannot be served"),
    ({VISION + "deepstack_visual_indexes": [1, 0]}, None),
    ({VISION + "deepstack_visual_indexes": [2, 1]}, None),
    ({VISION + "deepstack_visual_indexes": []}, "deepstack_merger_list"),
    ({VISION + "num_position_embeddings": 16}, "pos_embed.weight"),
    ({VISION + "num_heads": 4}, None),
    ({AXES + "rope_theta": 77.0}, None),
    ({VISION + "hidden_act": "gelu"}, '"gelu", must be "gelu_pytorch_tanh"'),
]

# The image processor's file, beside a reward_config.json that leaves the sizes to it (`deep`).
PREPROCESSOR = [
    ({"/size/longest_edge": 5500}, None),
    ({"/size/longest_edge": 5500.0}, None),
    ({"/max_pixels": 5500.0}, None),
    ({"/min_pixels": 100352, "/max_pixels": None}, None),
    ({"/size": None}, None),
    ({"/size": {"shortest_edge": 3136}, "/max_pixels": 5500}, None),
    ({"/size": {"min_pixels": 3136}, "/max_pixels": 5500, "/min_pixels": 3136}, None),
    ({"/size/shortest_edge": 9408.5}, "shortest_edge is 9408.5, must be a whole number"),
    (
        {"/min_pixels": 2**63, "/max_pixels": 2**63},
        "min_pixels 9223372036854775808 of preprocessor_config.json are more than",
    ),
    ({"/min_pixels": 0}, "min_pixels is 0"),
    ({"/max_pixels": -1}, "max_pixels is -1"),
    ({"/min_pixels": "3136"}, 'min_pixels is "3136"'),
    (
        {"/min_pixels": 50000, "/max_pixels": 5500},
        "min_pixels 50000 of preprocessor_config.json is more than max_pixels 5500",
    ),
    ({"/size": {"min_pixels": 3136, "max_pixels": 5500}}, "must have shortest_edge and longest_edge"),
    ({"/size": {"shortest_edge": 3136}}, "must have shortest_edge and longest_edge"),
    ({"/size": {"height": 56, "width": 56}}, "must have shortest_edge and longest_edge"),
    ({"/size": {"shortest_edge": 3136, "longest_edge": 5500, "foo": 1}}, "longest_edge alone"),
    ({"/size": 56}, "size is 56"),
    ({"/size/longest_edge": INFINITY}, "longest_edge is inf"),
    ({"/image_mean": 0.5}, None),
    ({"/image_std": 0.5}, None),
    ({"/image_mean": [1, 0, 0]}, None),
    ({"/image_mean": [0.5]}, "image_mean is [0.5], must be a number or three"),
    ({"/image_mean": None}, "image_mean is null"),
    ({"/image_std": None}, "image_std is null"),
    ({"/image_std": [0.5, 0, 0.5]}, "above 0"),
    ({"/image_std": -0.5}, "above 0"),
    ({"/image_mean": NAN}, "must be finite"),
    ({"/rescale_factor": 0.01}, None),
    ({"/rescale_factor": 1}, None),
    ({"/rescale_factor": None}, "rescale_factor is null"),
    ({"/rescale_factor": None, "/do_rescale": False}, None),
    ({"/do_rescale": False}, None),
    ({"/do_rescale": None}, None),
    ({"/do_rescale": 0}, None),
    ({"/do_normalize": None}, None),
    ({"/do_normalize": False, "/image_std": None}, None),
    ({"/do_normalize": 1}, None),
    ({"/do_resize": None}, "do_resize"),
    ({"/do_resize": 0}, "do_resize"),
    ({"/resample": 2}, "resample is 2: only 3 (bicubic)"),
    ({"/resample": None}, "resample is null"),
    ({"/resample": "bicubic"}, "resample"),
    ({"/patch_size": 14.0}, "patch_size is 14.0"),
    ({"/patch_size": None}, "patch_size is null"),
    ({"/merge_size": 1}, "merge_size is 1"),
    ({"/temporal_patch_size": 1}, "temporal_patch_size is 1"),
    ({"/image_processor_type": ABSENT}, None),
    ({"/image_processor_type": "Qwen2VLImageProcessorFast"}, None),
    ({"/image_processor_type": "CLIPImageProcessor"}, '"CLIPImageProcessor", must be'),
    ({"/do_convert_rgb": None, "/do_pad": True}, None),
    ({"/do_center_crop": True, "/crop_size": {"height": 28, "width": 28}}, None),
    ({"/do_center_crop": True}, "do_center_crop without crop_size"),
]

# What processor_config.json holds beside it.
NESTED = [
    ({"image_processor": None}, None),
    ({"image_processor": {}}, None),
    ({"image_processor": {"max_pixels": 5500, "do_normalize": None}}, None),
    ({"min_pixels": 100352, "max_pixels": 100352, "processor_class": "Qwen2_5_VLProcessor"}, None),
    ({"image_processor": 3}, "settings are 3, must be an object"),
]

TEMPLATE = "{% for m in messages %}{% for c in m.content %}{% if c.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c.text }}{% endif %}{% endfor %}{% endfor %}"

# Heads of other forms, made of the three layers of `mlp`'s: 0, 3 and 5.
HEADS = [
    ({"rm_head.3": "rm_head.2", "rm_head.5": "rm_head.4"}, None),
    ({"rm_head.3": "rm_head.1", "rm_head.5": "rm_head.2"}, None),
    ({"rm_head.3": "rm_head.1", "rm_head.5": "rm_head.4"}, None),
    ({"rm_head.0": "rm_head.1", "rm_head.3": "rm_head.9", "rm_head.5": "rm_head.10"}, None),
    ({"rm_head.3": "rm_head.layer_1.0", "rm_head.5": "rm_head.output_layer"}, None),
    ({"rm_head.3": "rm_head.+3"}, "rm_head.+3"),
    ({"rm_head": "rm_head.mlp"}, "no head that is known"),
    ({"rm_head": "rm_heads.head_0"}, "no head that is known"),
]


def refers(pointer, document):
    """The object in which the pointer's last part is a key, and that key."""
    *path, key = pointer.strip("/").split("/")
    for part in path:
        document = document[part]
    return document, key


def edit_file(directory, file, edits):
    path = directory / file
    document = json.loads(path.read_text()) if path.exists() else {}
    for edit in edits:
        place, key = refers(edit["at"], document)
        if "value" in edit:
            place[key] = edit["value"]
        else:
            place.pop(key, None)
    path.write_text(json.dumps(document))


def rename(directory, renames):
    path = directory / "model.safetensors"
    name = lambda key: next(
        (new + key.removeprefix(old) for old, new in renames.items() if key.startswith(old + ".")), key
    )
    save_file({name(key): tensor for key, tensor in load_file(path).items()}, path, metadata={"format": "pt"})


def score(fixtures, change):
    """What the reference gives for the changed checkpoint, or None."""
    case = fixtures / change["case"]
    item = json.loads((case / "items.json").read_text())[change["item"]]
    with tempfile.TemporaryDirectory() as directory:
        checkpoint = Path(directory) / "checkpoint"
        shutil.copytree(case / "checkpoint", checkpoint)
        for file in {edit["file"] for edit in change["edits"]}:
            edit_file(checkpoint, file, [edit for edit in change["edits"] if edit["file"] == file])
        if change["renames"]:
            rename(checkpoint, change["renames"])
        try:
            mean = Reference(checkpoint).mean(item["prompt"], case / item["image"])
        except Exception as refusal:  # noqa: BLE001: whatever the reference throws is its refusal
            print(f"    refused: {type(refusal).__name__} {' '.join(str(refusal).split())[:100]}")
            return None
    return mean if math.isfinite(mean) else None


def changes():
    def change(case, refused, edits=(), renames=None):
        return {"case": case, "item": 1, "edits": list(edits), "renames": renames or {}, "refused": refused}

    def edits(file, values):
        say = lambda value: {} if value is ABSENT else {"value": value}
        return [{"file": file, "at": at} | say(value) for at, value in values.items()]

    for values, refused in CONFIGURATION:
        yield change("deep", refused, edits(CONFIG, values))
    for values, refused in OLD_CONFIGURATION:
        yield change("half", refused, edits(CONFIG, values))
    for values, refused in QWEN2_CONFIGURATION:
        yield change("qwen2", refused, edits(CONFIG, values))
    for values, refused in QWEN3_CONFIGURATION:
        yield change("qwen3", refused, edits(CONFIG, values))
    # A template in the processor's file counts for more than chat_template.jinja.
    other = {"/chat_template": TEMPLATE}
    yield change("deep", "processor_config.json: it holds another chat template than chat_template.jinja", edits(PROCESSOR, other))
    unsaid = edits(REWARD, {"/min_pixels": ABSENT, "/max_pixels": ABSENT})
    for values, refused in PREPROCESSOR:
        yield change("deep", refused, unsaid + edits(PICTURES, values))
    for values, refused in NESTED:
        yield change("deep", refused, unsaid + edits(PROCESSOR, {f"/{key}": value for key, value in values.items()}))
    # The other file's limit is the one that is wrong.
    mixed = unsaid[:1] + edits(REWARD, {"/max_pixels": 3000.0}) + edits(PICTURES, {"/size/shortest_edge": 4000})
    yield change("deep", "shortest_edge 4000 of preprocessor_config.json is more than max_pixels 3000 of reward", mixed)
    yield change("deep", None, edits(REWARD, {"/min_pixels": 784.0, "/max_pixels": 5500.0}))
    for renames, refused in HEADS:
        yield change("mlp", refused, renames=renames)
    # One of two tied tensors stands for both.
    tied = {"model.language_model.embed_tokens": "lm_head"}
    yield change("flat", None, renames=tied)
    yield change("flat", "embed_tokens.weight is missing", edits(CONFIG, {"/tie_word_embeddings": False}), tied)


def tagged(value):
    """The same with transformers' own words for floats that JSON has no number for."""
    match value:
        case float() if not math.isfinite(value):
            return {"__float__": {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}[str(value)]}
        case dict():
            return {key: tagged(value) for key, value in value.items()}
        case list():
            return [tagged(value) for value in value]
    return value


def make(fixtures, path):
    made = []
    for change in changes():
        change["score"] = score(fixtures, change)
        said = change["refused"] or "scored"
        print(f"  {change['score']} ({said}): {change['edits'] or change['renames']}")
        assert change["refused"] or change["score"] is not None, "the reference refuses what we are to score"
        made.append(tagged(change))
    path.write_text("[\n" + ",\n".join(json.dumps(change, ensure_ascii=False) for change in made) + "\n]\n")


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    fixtures = Path(sys.argv[1])
    make(fixtures, Path(sys.argv[2]) if len(sys.argv) > 2 else fixtures / "configurations.json")
