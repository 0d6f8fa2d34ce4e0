#!/usr/bin/env python3
"""What it costs to bring 24 pictures of 512x512 from a trainer to a server: four ways, in one run.

    wire.py [--pictures DIR] [--rounds 15]

base64 JSON is Flow-Factory's and UniRL's way (PNG), pickled JPEG flow_grpo's, the other two are ours. Each way has a
receiver of its own in another process, which does what a server must before its model can begin: it turns what came
into RGB pixels. No model runs, so that the wire is all that is measured. The ways take turns, and the median counts.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import http.server
import io
import json
import multiprocessing
import pickle
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from PIL import Image

from spatialscore_client import SpatialScoreClient
from spatialscore_client._proto import spatialscore as pb
from spatialscore_client.images import Codec

GROUP, SIDE = 24, 512
PROMPT = "a cup stands to the left of a book, and a lamp hangs above both"
SAMPLES = Path(__file__).resolve().parents[3] / "samples"


def group(directory: Path) -> Any:
    """24 pictures, uint8 (24, 512, 512, 3): crops of what the directory has, turned and enlarged where needed."""
    files = sorted(file for file in directory.iterdir() if file.suffix in (".png", ".jpg"))
    random = np.random.default_rng(1)
    pictures = []
    for number in range(GROUP):
        picture = Image.open(files[number % len(files)]).convert("RGB")
        side = int(min(picture.size) * random.uniform(0.7, 1.0))
        left, top = (int(random.integers(0, length - side + 1)) for length in picture.size)
        picture = picture.crop((left, top, left + side, top + side)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        pictures.append(np.asarray(picture)[:, :: random.choice([-1, 1])])
    return np.ascontiguousarray(pictures)


def compressed(picture: Any, form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, form, **options)
    return file.getvalue()


def pixels(data: bytes) -> Any:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


class Receiver(http.server.BaseHTTPRequestHandler):
    """Takes base64 JSON or pickles, by the path, and answers with as many numbers as there were pictures."""

    protocol_version = "HTTP/1.1"
    # http.server leaves Nagle's algorithm on, which costs its answer 40 ms.
    disable_nagle_algorithm = True

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        if self.path == "/json":
            found = [pixels(base64.b64decode(text)) for text in json.loads(body)["image"]]
        else:
            found = [pixels(data) for data in pickle.loads(body)["images"]]
        answer = json.dumps({"rewards": [float(picture.flat[0]) for picture in found]}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: Any) -> None:
        """Nothing: the terminal is for the table."""


def receive_http(port: Any) -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Receiver) as server:
        port.put(server.server_port)
        server.serve_forever()


def receive_grpc(port: Any) -> None:
    def score(request: pb.ScoreRequest, _: Any) -> pb.ScoreResponse:
        found = []
        for item in request.items:
            raw = item.image.raw
            if item.image.WhichOneof("source") == "raw":
                found.append(np.frombuffer(raw.rgb8, np.uint8).reshape(raw.height, raw.width, 3))
            else:
                found.append(pixels(item.image.encoded))
        scores = [pb.ScoreResult(score=pb.Score(mean=float(picture.flat[0]))) for picture in found]
        return pb.ScoreResponse(results=scores)

    def model(request: pb.GetModelRequest, _: Any) -> pb.GetModelResponse:
        limits = pb.Limits(
            max_items_per_request=256, max_message_bytes=64 << 20, max_prompt_bytes=8192,
            max_image_pixels=50_000_000, max_item_tokens=16384,
        )  # fmt: skip
        return pb.GetModelResponse(name="wire", limits=limits)

    handlers = {
        "Score": grpc.unary_unary_rpc_method_handler(
            score, pb.ScoreRequest.FromString, pb.ScoreResponse.SerializeToString
        ),
        "GetModel": grpc.unary_unary_rpc_method_handler(
            model, pb.GetModelRequest.FromString, pb.GetModelResponse.SerializeToString
        ),
    }
    server = grpc.server(ThreadPoolExecutor(4), options=[("grpc.max_receive_message_length", 64 << 20)])
    service = "spatialscore.v1.SpatialScoreService"
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(service, handlers)])
    port.put(server.add_insecure_port("127.0.0.1:0"))
    server.start()
    server.wait_for_termination()


def http_way(port: int, path: str, encode: Callable[[Any], bytes]) -> Callable[[Any], int]:
    """Sends a group over HTTP; gives the bytes that went."""
    connection = http.client.HTTPConnection("127.0.0.1", port)

    def send(pictures: Any) -> int:
        body = encode(pictures)
        connection.request("POST", path, body)
        answer = json.loads(connection.getresponse().read())
        assert len(answer["rewards"]) == len(pictures)
        return len(body)

    return send


def our_way(port: int, codec: Codec) -> Callable[[Any], int]:
    """Sends a group by the client; gives the bytes that went."""
    from spatialscore_client import plan
    from spatialscore_client.scores import Limits

    client = SpatialScoreClient(f"127.0.0.1:{port}", codec=codec)
    sizes: dict[int, int] = {}

    def send(pictures: Any) -> int:
        assert len(client.score(PROMPT, pictures)) == len(pictures)
        if id(pictures) not in sizes:
            items = plan.items(PROMPT, pictures)
            batches = plan.batches(items, Limits(256, 64 << 20, 8192, 50_000_000, 16384), codec, "training")
            sizes[id(pictures)] = sum(batch.request.ByteSize() for batch in batches)
        return sizes[id(pictures)]

    return send


def as_json(pictures: Any) -> bytes:
    texts = [base64.b64encode(compressed(picture, "PNG")).decode() for picture in pictures]
    return json.dumps({"prompt": [PROMPT] * len(texts), "image": texts, "video": None}).encode()


def as_pickle(pictures: Any) -> bytes:
    images = [compressed(picture, "JPEG") for picture in pictures]
    return pickle.dumps({"images": images, "prompts": [PROMPT] * len(images)})


def start(receiver: Callable[[Any], None]) -> tuple[Any, int]:
    context = multiprocessing.get_context("spawn")
    port = context.Queue()
    process = context.Process(target=receiver, args=(port,), daemon=True)
    process.start()
    return process, port.get(timeout=60)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=Path, default=SAMPLES, help="PNG or JPEG files (the repository's samples)")
    parser.add_argument("--rounds", type=int, default=15)
    given = parser.parse_args()
    pictures = group(given.pictures)
    (http_process, http_port), (grpc_process, grpc_port) = start(receive_http), start(receive_grpc)
    ways = {
        "base64 JSON, PNG": http_way(http_port, "/json", as_json),
        "pickled JPEG (quality 75, lossy)": http_way(http_port, "/pickle", as_pickle),
        "SpatialScore, raw RGB": our_way(grpc_port, "raw"),
        "SpatialScore, PNG": our_way(grpc_port, "png"),
    }
    sent = {name: send(pictures) for name, send in ways.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(given.rounds):
        for name, send in ways.items():
            begin = time.perf_counter()
            send(pictures)
            seconds[name].append(time.perf_counter() - begin)
    http_process.kill()
    grpc_process.kill()
    print(f"| {GROUP} pictures of {SIDE}x{SIDE} | pictures per second | bytes on the wire |\n|---|---:|---:|")
    for name in ways:
        print(f"| {name} | {GROUP / statistics.median(seconds[name]):.0f} | {sent[name]:,} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
