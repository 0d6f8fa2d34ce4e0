"""Score pictures with gRPC's own Python client: `score.py STUBS ADDRESS PICTURE…` prints what it got as JSON."""

import json
import sys
from pathlib import Path

stubs, address, *pictures = sys.argv[1:]
sys.path.insert(0, stubs)

import grpc  # noqa: E402
from spatialscore.v1 import spatialscore_pb2 as pb  # noqa: E402
from spatialscore.v1 import spatialscore_pb2_grpc as rpc  # noqa: E402


def item(picture: str) -> pb.ScoreItem:
    return pb.ScoreItem(prompt="a cup to the left of a plate", image=pb.Image(encoded=Path(picture).read_bytes()))


def outcome(result: pb.ScoreResult) -> float | str:
    if result.HasField("score"):
        return result.score.mean
    return next(code.name for code in grpc.StatusCode if code.value[0] == result.error.code)


with grpc.insecure_channel(address) as channel:
    service = rpc.SpatialScoreServiceStub(channel)
    items = [item(picture) for picture in pictures]
    unary = service.Score(pb.ScoreRequest(items=items), timeout=60, compression=grpc.Compression.Gzip)
    requests = (pb.ScoreStreamRequest(id=str(i), item=item) for i, item in enumerate(items))
    stream = {answer.id: outcome(answer.result) for answer in service.ScoreStream(requests, timeout=60)}
    try:
        service.Score(pb.ScoreRequest(), timeout=60)
        empty = "OK"
    except grpc.RpcError as error:
        empty = error.code().name
    print(
        json.dumps(
            {
                "unary": [outcome(result) for result in unary.results],
                "stream": [stream[str(i)] for i in range(len(items))],
                "empty": empty,
            }
        )
    )
