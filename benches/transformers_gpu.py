"""transformers with SDPA beside `spatialscore bench --random-weights`, on the same device in the same run.

    transformers_gpu.py [--shape qwen2.5-vl-7b] [--device cuda:0] [--dtype bfloat16] [--side 448,1024] [--batch 1,8,32]

The same shape with random weights, the same picture and token counts. The two sides hold the device one after the other,
line by line, since two models of 7B and their activations do not fit beside each other; each line of ours measures
the device's rate of matrix products anew, so that a device that slows down shows.
"""

import argparse
import json
import statistics
import subprocess
import time

import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLModel
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from common import BINARY, ROOT, save, show

SHAPES = ROOT / "src/model/backbone/shapes"
TEXT_TOKENS = 128
GOAL = 1.3


def make_model(shape, device, dtype):
    """Random weights, made on the device."""
    config = Qwen2_5_VLConfig(**json.loads((SHAPES / f"{shape}.json").read_text()))
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with torch.device(device):
        model = Qwen2_5_VLModel(config)
    torch.set_default_dtype(torch.float32)
    return model.eval()


def make_inputs(config, side, batch, device):
    """What the processor gives for square pictures, without meaning: the samples of src/cli/bench/table.rs."""
    vision = config.vision_config
    block = vision.patch_size * vision.spatial_merge_size
    height, width = smart_resize(side, side, factor=block, min_pixels=3136, max_pixels=12_845_056)
    rows, columns = height // vision.patch_size, width // vision.patch_size
    picture = rows * columns // vision.spatial_merge_size**2
    word = int(config.image_token_id == 0)
    ids = [word] * (TEXT_TOKENS // 4) + [config.image_token_id] * picture + [word] * (TEXT_TOKENS - TEXT_TOKENS // 4)
    input_ids = torch.tensor([ids] * batch)
    values = 3 * vision.temporal_patch_size * vision.patch_size**2
    inputs = {
        "input_ids": input_ids,
        "mm_token_type_ids": (input_ids == config.image_token_id).int(),
        "attention_mask": torch.ones_like(input_ids),
        "image_grid_thw": torch.tensor([[1, rows, columns]] * batch),
        "pixel_values": torch.randn(batch * rows * columns, values),
    }
    return inputs, len(ids)


@torch.inference_mode()
def forward(model, head, inputs, device, dtype):
    """Seconds from inputs on the host to rewards on the host."""
    start = time.perf_counter()
    moved = {name: t.to(device, dtype if t.is_floating_point() else None) for name, t in inputs.items()}
    hidden = model(**moved, use_cache=False).last_hidden_state[:, -1]
    rewards = (hidden.float() @ head)[:, 0].tolist()
    seconds = time.perf_counter() - start
    assert len(rewards) == len(inputs["input_ids"])
    return seconds


def theirs(model, head, side, batch, arguments, dtype):
    inputs, tokens = make_inputs(model.config, side, batch, arguments.device)
    try:
        forward(model, head, inputs, arguments.device, dtype)
        until, all_seconds = time.monotonic() + arguments.seconds, []
        while len(all_seconds) < 3 or time.monotonic() < until:
            all_seconds.append(forward(model, head, inputs, arguments.device, dtype))
        return statistics.median(all_seconds), tokens
    except torch.OutOfMemoryError:
        return None, tokens


def ours(side, batch, arguments):
    command = [BINARY, "bench", "--json", "--random-weights", arguments.shape, "--device", arguments.device]
    command += ["--dtype", arguments.dtype, "--side", side, "--batch", batch, "--seconds", arguments.seconds]
    command += ["--threads", arguments.threads]
    out = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, text=True)
    return json.loads(out.stdout.splitlines()[0])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="qwen2.5-vl-7b")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--side", default="448,1024")
    parser.add_argument("--batch", default="1,8,32")
    parser.add_argument("--seconds", type=float, default=3)
    parser.add_argument("--threads", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    dtype = getattr(torch, arguments.dtype)
    model = make_model(arguments.shape, "cpu", dtype)
    head = torch.randn(model.config.text_config.hidden_size, 2)
    rows = []
    for side in map(int, arguments.side.split(",")):
        for batch in map(int, arguments.batch.split(",")):
            model, head = model.to(arguments.device), head.to(arguments.device)
            seconds, tokens = theirs(model, head, side, batch, arguments, dtype)
            model, head = model.cpu(), head.cpu()
            if arguments.device.startswith("cuda"):
                torch.cuda.empty_cache()
            said = ours(side, batch, arguments)
            assert said["tokens"] == tokens, (said, tokens)
            mine = said.get("ms_per_batch")
            rows.append(
                {
                    "side": side,
                    "tokens": tokens,
                    "batch": batch,
                    "ours, ms": mine or said.get("error"),
                    "ours, pictures/s": said.get("pictures_per_second"),
                    "share of matrix rate": said.get("share"),
                    "transformers, ms": seconds * 1e3 if seconds else "out of memory",
                    "times as fast": seconds * 1e3 / mine if seconds and mine else "-",
                    "goal": GOAL,
                }
            )
    print(f"{arguments.shape}, random weights, {arguments.device}, {arguments.dtype}")
    show(rows)
    save(f"device-{arguments.shape}", rows)


if __name__ == "__main__":
    main()
