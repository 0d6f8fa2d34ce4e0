"""A long run of everything at once: mixed sizes and formats, bad items among good ones, callers who leave.

    soak.py [--minutes 30] [--callers 12] [--threads N]

Every item that was accepted must be answered once and with its own score, which a table of scores computed beforehand
in process tells; a bad item gets INVALID_ARGUMENT whatever its neighbours are; and memory stays flat. Ends with 1 where
any of it fails.
"""

import argparse
import collections
import os
import random
import statistics
import subprocess
import sys
import threading
import time

import grpc

from common import MINI, OUT, ROOT, Ours, pictures, prompts, save, show
from servers import ours

SIZES = ((64, 64), (97, 211), (224, 224), (300, 180), (512, 512), (640, 360), (1024, 1024))
FORMS = ("png", "jpeg", "webp")
TOLERANCE = 1e-4
INVALID_ARGUMENT = grpc.StatusCode.INVALID_ARGUMENT.value[0]
# What any call as a whole may end with: a full queue. Only one that is too late may end as too late.
FULL, LATE = grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.DEADLINE_EXCEEDED


def stubs():
    """The contract's Python modules, generated."""
    out = OUT / "stubs"
    out.mkdir(parents=True, exist_ok=True)
    proto = "spatialscore/v1/spatialscore.proto"
    tool = [sys.executable, "-m", "grpc_tools.protoc", f"-I{ROOT / 'proto'}", f"--python_out={out}"]
    subprocess.run([*tool, f"--grpc_python_out={out}", proto, *vendored()], check=True)
    sys.path.insert(0, str(out))
    from spatialscore.v1 import spatialscore_pb2, spatialscore_pb2_grpc

    return spatialscore_pb2, spatialscore_pb2_grpc


def vendored():
    """The protos beside ours that it imports."""
    return [str(p.relative_to(ROOT / "proto")) for p in (ROOT / "proto").rglob("*.proto") if "google" in p.parts]


class Table:
    """Items with the scores that they must get; `None` for those that must be refused."""

    def __init__(self, pb, threads):
        paths = [pictures(OUT / "pictures", 1, size, form, seed=7)[0] for size in SIZES for form in FORMS]
        texts = prompts(6, seed=3)
        pairs = [(text, path) for text in texts for path in paths]
        with Ours(MINI, threads) as bench:
            bench.ask(load=[{"prompt": text, "image": path} for text, path in pairs])
            scores = [bench.ask(forward=[n])["means"][0] for n in range(len(pairs))]
        assert len({round(score / TOLERANCE / 4) for score in scores}) > len(scores) * 0.6, "scores too much alike"
        item = lambda text, data: pb.ScoreItem(prompt=text, image=pb.Image(encoded=data))
        self.good = [(item(text, path.read_bytes()), score) for (text, path), score in zip(pairs, scores)]
        whole = paths[0].read_bytes()
        rubbish = [whole[:40], whole[: len(whole) // 2], b"", b"GIF89a" + bytes(64), random.Random(0).randbytes(500)]
        self.bad = [(item("a cup", data), None) for data in rubbish] + [(item("", whole), None)]

    def draw(self, rng, count):
        return [rng.choice(self.bad if rng.random() < 0.1 else self.good) for _ in range(count)]


class Caller:
    """One of several callers, each of whom does all sorts of things in turn."""

    def __init__(self, n, pb, rpc, address, table, said, until):
        self.rng, self.pb, self.table, self.said, self.until = random.Random(n), pb, table, said, until
        self.service = rpc.SpatialScoreServiceStub(grpc.insecure_channel(address))

    def run(self):
        while time.monotonic() < self.until:
            sort = self.rng.choice((self.unary, self.unary, self.stream, self.cancel, self.too_late))
            try:
                sort()
            except grpc.RpcError as error:
                self.said["calls ended with " + error.code().name] += 1
                own_doing = sort == self.too_late and error.code() == LATE
                if error.code() != FULL and not own_doing:
                    self.fault(f"{sort.__name__}: {error.code().name}: {error.details()}")
                time.sleep(0.05)

    def fault(self, text):
        self.said["faults"] += 1
        print("FAULT", text, flush=True)

    def check(self, result, expected):
        if expected is None:
            right = result.HasField("error") and result.error.code == INVALID_ARGUMENT
        else:
            right = result.HasField("score") and abs(result.score.mean - expected) <= TOLERANCE
        self.said["bad items refused" if expected is None else "scores"] += 1
        if not right:
            self.fault(f"expected {expected}, got {result}")

    def unary(self):
        drawn = self.table.draw(self.rng, self.rng.randint(1, 8))
        answer = self.service.Score(self.pb.ScoreRequest(items=[item for item, _ in drawn]), timeout=120)
        if len(answer.results) != len(drawn):
            self.fault(f"{len(answer.results)} results for {len(drawn)} items")
        for result, (_, expected) in zip(answer.results, drawn):
            self.check(result, expected)

    def stream(self):
        drawn = self.table.draw(self.rng, self.rng.randint(4, 24))
        requests = (self.pb.ScoreStreamRequest(id=str(n), item=item) for n, (item, _) in enumerate(drawn))
        answered = collections.Counter()
        for answer in self.service.ScoreStream(requests, timeout=120):
            answered[answer.id] += 1
            self.check(answer.result, drawn[int(answer.id)][1])
        if answered != collections.Counter(map(str, range(len(drawn)))):
            self.fault(f"a stream of {len(drawn)} was answered as {answered}")

    def cancel(self):
        items = [item for item, _ in self.table.draw(self.rng, self.rng.randint(1, 8))]
        call = self.service.Score.future(self.pb.ScoreRequest(items=items), timeout=120)
        time.sleep(self.rng.random() * 0.05)
        self.said["calls cancelled"] += call.cancel()

    def too_late(self):
        items = [item for item, _ in self.table.draw(self.rng, 4)]
        self.service.Score(self.pb.ScoreRequest(items=items), timeout=self.rng.random() * 0.1)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--callers", type=int, default=12)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args()
    pb, rpc = stubs()
    table, said, memory = Table(pb, arguments.threads), collections.Counter(), []
    # A cache that is too small for the table: every item is remembered now and then, and computed now and then.
    with ours(MINI, OUT, "--threads", arguments.threads, "--set", "cache.max_items=16") as (server, address, _):
        until = time.monotonic() + arguments.minutes * 60
        callers = [Caller(n, pb, rpc, address, table, said, until) for n in range(arguments.callers)]
        threads = [threading.Thread(target=caller.run) for caller in callers]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            memory.append(server.resident())
            time.sleep(1)
    fifth = max(1, len(memory) // 5)
    early, late = statistics.median(memory[fifth : 2 * fifth] or memory), statistics.median(memory[-fifth:])
    row = {"minutes": arguments.minutes, "faults": said.pop("faults", 0), **dict(sorted(said.items()))}
    row |= {"memory early, MiB": round(early), "memory late, MiB": round(late)}
    for name, value in row.items():
        print(f"{name}: {value}")
    save("soak", [row])
    if row["faults"] or late > 1.05 * early + 16:
        sys.exit("the soak failed")


if __name__ == "__main__":
    main()
