"""Two ways to have a pair's pictures scored: by a server, and by transformers on this machine."""

import queue
from math import exp
from pathlib import Path
from typing import Iterable, Iterator, NamedTuple

from .pictures import Picture, picture_bytes


class Item(NamedTuple):
    prompt: str
    picture: Picture


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
            image = self.messages.Image(encoded=picture_bytes(item.picture))
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
    """A checkpoint in transformers, in fp32, one item at a time, read as the trainer reads it."""

    def __init__(self, checkpoint: Path):
        # Imported here, so that a server is measured without torch.
        from .reward_model import load_checkpoint

        self.checkpoint = checkpoint
        self.model, self.preprocessor = load_checkpoint(checkpoint)

    def describe(self) -> str:
        return f"{self.checkpoint.name} in transformers, fp32"

    def scores(self, items: Iterable[Item]) -> Iterator[tuple[int, Score]]:
        import torch

        from .preprocessing import Item as Judged

        with torch.no_grad():
            for number, item in enumerate(items):
                mean, log_sigma = self.model(self.preprocessor([Judged(item.prompt, item.picture)]))[0].tolist()
                yield number, Score(mean, exp(log_sigma))
