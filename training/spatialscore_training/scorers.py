"""Two ways to have a pair's pictures scored: by a server, and by transformers on this machine."""

import json
import queue
from math import exp
from pathlib import Path
from typing import Iterable, Iterator, NamedTuple


class Item(NamedTuple):
    prompt: str
    picture: str
    """The file's name."""


class Score(NamedTuple):
    mean: float
    stddev: float | None


class ServerScorer:
    """A SpatialScore server, through `ScoreStream`: so many items under way at a time."""

    def __init__(self, address: str, protos: Path, ahead: int = 64, token: str | None = None):
        import sys

        import grpc

        # grpcio-tools compiles the contract in memory, from the folder that is on Python's path.
        sys.path.insert(0, str(protos))
        name = "spatialscore/v1/spatialscore.proto"
        self.messages, services = grpc.protos_and_services(name)
        self.stub = services.SpatialScoreServiceStub(grpc.insecure_channel(address))
        self.ahead = ahead
        self.metadata = (("authorization", f"Bearer {token}"),) if token else ()

    def describe(self) -> str:
        model = self.stub.GetModel(self.messages.GetModelRequest(), metadata=self.metadata, timeout=10)
        return f"{model.name} {model.revision} ({model.dtype}) through SpatialScore {model.server_version}"

    def scores(self, items: Iterable[Item]) -> Iterator[tuple[int, Score]]:
        """The number of each item with its score, as they come. An item that fails raises."""
        items, waiting = enumerate(items), queue.Queue()

        def request(number: int, item: Item):
            image = self.messages.Image(encoded=Path(item.picture).read_bytes())
            scored = self.messages.ScoreItem(prompt=item.prompt, image=image)
            return self.messages.ScoreStreamRequest(id=str(number), item=scored)

        def feed() -> None:
            waiting.put(next(items, None))

        for _ in range(self.ahead):
            feed()
        requests = (request(*entry) for entry in iter(waiting.get, None))
        for reply in self.stub.ScoreStream(requests, metadata=self.metadata):
            if reply.result.WhichOneof("outcome") != "score":
                raise RuntimeError(f"item {reply.id}: {reply.result.error.message}")
            score = reply.result.score
            yield int(reply.id), Score(score.mean, score.stddev if score.HasField("stddev") else None)
            feed()


class LocalScorer:
    """A checkpoint in transformers, in fp32: the processor's own pictures and tokens, one item at a time."""

    def __init__(self, checkpoint: Path):
        # Imported here, so that a server is measured without torch.
        import torch
        from safetensors.torch import load_file
        from transformers import AutoImageProcessor, AutoTokenizer, Qwen2_5_VLForConditionalGeneration
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        from .model import reward_head

        self.checkpoint = checkpoint
        self.reward = json.loads((checkpoint / "reward_config.json").read_text())
        self.images = AutoImageProcessor.from_pretrained(checkpoint, backend="pil")
        self.tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        self.model = Qwen2_5_VLForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()
        head = {k.removeprefix("rm_head."): v for k, v in load_file(checkpoint / "model.safetensors").items() if k.startswith("rm_head.")}
        self.head = reward_head(self.model.config.text_config.hidden_size)
        self.head.load_state_dict({name: weight.float() for name, weight in head.items()})

    def describe(self) -> str:
        return f"{self.checkpoint.name} in transformers, fp32"

    def scores(self, items: Iterable[Item]) -> Iterator[tuple[int, Score]]:
        import torch
        from PIL import Image

        torch.set_grad_enabled(False)
        reward_token = self.tokenizer.convert_tokens_to_ids(self.reward["special_token"])
        for number, item in enumerate(items):
            image = self.images(Image.open(item.picture).convert("RGB"), return_tensors="pt")
            text = self.reward["instruction"].replace("{prompt}", item.prompt)
            turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}
            rendered = self.tokenizer.apply_chat_template([turn], tokenize=False)
            cells = int(image["image_grid_thw"].prod()) // 4
            ids = self.tokenizer(rendered.replace("<|image_pad|>", "<|image_pad|>" * cells), return_tensors="pt")["input_ids"]
            output = self.model.model(
                input_ids=ids,
                pixel_values=image["pixel_values"],
                image_grid_thw=image["image_grid_thw"],
                mm_token_type_ids=(ids == self.model.config.image_token_id).int(),
                use_cache=False,
            ).last_hidden_state[0]
            mean, log_sigma = self.head(output[(ids[0] == reward_token).nonzero()[-1, 0]]).tolist()
            yield number, Score(mean, exp(log_sigma))
