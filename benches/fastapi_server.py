"""A reward server of the kind that RL frameworks ship: FastAPI before transformers, base64 PNG in JSON.

    fastapi_server.py CHECKPOINT --port PORT [--threads N] [--batched MILLISECONDS]

Each request is a forward of its own, one at a time, as those servers do. With `--batched`, a thread gathers the requests
that came within so many milliseconds, 32 at most, into one forward: what a careful author would add.
"""

import argparse
import asyncio
import base64
import io
import queue
import threading
import time
from concurrent.futures import Future

import torch
import uvicorn
from fastapi import FastAPI
from PIL import Image
from pydantic import BaseModel

import common  # noqa: F401  # The reference's folder on the path.
from transformers_side import Judge

MOST = 32


class Item(BaseModel):
    prompt: str
    image: str


class Batcher:
    """Gathers items for one forward."""

    def __init__(self, judge, wait):
        self.judge, self.wait, self.items = judge, wait, queue.Queue()
        threading.Thread(target=self.run, daemon=True).start()

    def score(self, prompt, image):
        answer = Future()
        self.items.put((prompt, image, answer))
        return answer.result()

    def run(self):
        while True:
            batch = [self.items.get()]
            until = time.monotonic() + self.wait
            while len(batch) < MOST and (left := until - time.monotonic()) > 0:
                try:
                    batch.append(self.items.get(timeout=left))
                except queue.Empty:
                    break
            prompts, images, answers = zip(*batch)
            for answer, mean in zip(answers, self.judge.score(list(prompts), list(images))):
                answer.set_result(mean)


def decode(text):
    return Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--batched", type=float, metavar="MILLISECONDS")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    judge = Judge(arguments.checkpoint)
    app = FastAPI()
    one_at_a_time = asyncio.Lock()
    batcher = Batcher(judge, arguments.batched / 1e3) if arguments.batched is not None else None

    @app.get("/health")
    async def health():
        return {}

    @app.post("/score")
    async def score(item: Item):
        if batcher:
            image = await asyncio.to_thread(decode, item.image)
            return {"mean": await asyncio.to_thread(batcher.score, item.prompt, image)}
        image = await asyncio.to_thread(decode, item.image)
        async with one_at_a_time:
            return {"mean": (await asyncio.to_thread(judge.score, [item.prompt], [image]))[0]}

    uvicorn.run(app, port=arguments.port, log_level="warning")


if __name__ == "__main__":
    main()
