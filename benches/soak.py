"""A long run of everything at once: three models, mixed sizes and formats, bad items among good ones, callers who leave.

    soak.py [--minutes 30] [--callers 12] [--threads N]

One model is replaced every minute and one put to sleep and woken, under the load; a client is killed in the middle of its
calls. Every item that was accepted must be answered once, by the models that the call names and with their own scores, which
a table of scores computed beforehand in process tells, and a call whole by one of two that replace each other; a bad item
gets INVALID_ARGUMENT whatever its neighbours are; and memory stays flat. Ends with 1 where any of it fails.
"""

import argparse
import collections
import os
import random
import shutil
import statistics
import subprocess
import sys
import threading
import time

import grpc
import torch
from safetensors.torch import load_file, save_file

from common import BINARY, MINI, OUT, ROOT, Ours, pictures, prompts, save
from servers import free_port, ours

SIZES = ((64, 64), (97, 211), (224, 224), (300, 180), (512, 512), (640, 360), (1024, 1024))
FORMS = ("png", "jpeg", "webp")
TOLERANCE = 1e-4
INVALID_ARGUMENT = grpc.StatusCode.INVALID_ARGUMENT.value[0]
# What any call as a whole may end with: a full queue. Only one that is too late may end as too late, and only one that asks
# for the sleeper as not to be had.
FULL, LATE, AWAY = (
    grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNAVAILABLE
)  # fmt: skip
# By how much each model's scores lie above the shipped one's. The first is the default, and replaced by OTHER and back.
SHIFTS = {"replaced": 0.0, "sleeper": 10.0, "steady": 20.0}
OTHER = 30.0


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


def shifted(shift):
    """The shipped checkpoint, with so much on top of each mean."""
    to = OUT / f"shifted-{shift:g}"
    shutil.copytree(MINI, to, dirs_exist_ok=True)
    weights = load_file(to / "model.safetensors")
    weights["rm_head.4.bias"] = weights["rm_head.4.bias"] + torch.tensor([shift, 0.0])
    save_file(weights, to / "model.safetensors", {"format": "pt"})
    return to


class Table:
    """Items with the scores that they must get of the shipped checkpoint; `None` for those that must be refused."""

    def __init__(self, pb, threads):
        paths = [pictures(OUT / "pictures", 1, size, form, seed=7)[0] for size in SIZES for form in FORMS]
        texts = prompts(6, seed=3)
        pairs = [(text, path) for text in texts for path in paths]
        with Ours(MINI, threads) as bench:
            bench.ask(load=[{"prompt": text, "image": path} for text, path in pairs])
            scores = [bench.ask(forward=[n])["means"][0] for n in range(len(pairs))]
        assert len({round(score / TOLERANCE / 4) for score in scores}) > len(scores) * 0.6, "scores too much alike"
        assert max(scores) - min(scores) < 10, "a score could be another model's"
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
            # None is the default one.
            models = self.rng.sample(list(SHIFTS), self.rng.randint(0, len(SHIFTS)))
            try:
                sort(models)
            except grpc.RpcError as error:
                self.said["calls ended with " + error.code().name] += 1
                own_doing = error.code() == LATE and sort == self.too_late
                asleep = error.code() == AWAY and "sleeper" in models and '"sleeper"' in error.details()
                if error.code() != FULL and not own_doing and not asleep:
                    self.fault(f"{sort.__name__} of {models}: {error.code().name}: {error.details()}")
                time.sleep(0.05)

    def fault(self, text):
        self.said["faults"] += 1
        print("FAULT", text, flush=True)

    def check(self, models, result, expected, replaced_by):
        """Holds a result against the table. What the first model's scores are shifted by goes into `replaced_by`."""
        one = not models or len(models) == 1
        outcomes = [result] if one else result.outcomes
        if not one and [outcome.model for outcome in outcomes] != models:
            return self.fault(f"asked for {models}, got {result}")
        for model, outcome in zip(models or ["replaced"], outcomes):
            shifts = [SHIFTS[model]] + [OTHER] * (model == "replaced")
            if expected is None:
                right = outcome.HasField("error") and outcome.error.code == INVALID_ARGUMENT
            else:
                near = lambda shift: abs(outcome.score.mean - shift - expected) <= TOLERANCE
                found = [shift for shift in shifts if outcome.HasField("score") and near(shift)]
                right = bool(found)
                replaced_by.update(found * (model == "replaced"))
            self.said["bad items refused" if expected is None else f"scores of {model}"] += 1
            if not right:
                self.fault(f"expected {expected} of {model}, got {result}")

    def request(self, models, drawn):
        return self.pb.ScoreRequest(items=[item for item, _ in drawn], models=models)

    def unary(self, models):
        drawn, replaced_by = self.table.draw(self.rng, self.rng.randint(1, 8)), set()
        answer = self.service.Score(self.request(models, drawn), timeout=120)
        if len(answer.results) != len(drawn):
            self.fault(f"{len(answer.results)} results for {len(drawn)} items")
        for result, (_, expected) in zip(answer.results, drawn):
            self.check(models, result, expected, replaced_by)
        if len(replaced_by) > 1:
            self.fault("a call was answered by two models of one name")

    def stream(self, models):
        drawn = self.table.draw(self.rng, self.rng.randint(4, 24))
        requests = (
            self.pb.ScoreStreamRequest(id=str(n), item=item, models=models) for n, (item, _) in enumerate(drawn)
        )
        answered = collections.Counter()
        for answer in self.service.ScoreStream(requests, timeout=120):
            answered[answer.id] += 1
            if not self.asleep(models, answer.result):
                self.check(models, answer.result, drawn[int(answer.id)][1], set())
        if answered != collections.Counter(map(str, range(len(drawn)))):
            self.fault(f"a stream of {len(drawn)} was answered as {answered}")

    def asleep(self, models, result):
        """Whether a stream's item was refused because of the sleeper; a call is as a whole."""
        return "sleeper" in models and result.HasField("error") and result.error.code == AWAY.value[0]

    def cancel(self, models):
        drawn = self.table.draw(self.rng, self.rng.randint(1, 8))
        call = self.service.Score.future(self.request(models, drawn), timeout=120)
        time.sleep(self.rng.random() * 0.05)
        self.said["calls cancelled"] += call.cancel()

    def too_late(self, models):
        self.service.Score(self.request(models, self.table.draw(self.rng, 4)), timeout=self.rng.random() * 0.1)


class Keeper:
    """Who has models come and go, and kills clients."""

    def __init__(self, address, admin, said, until):
        self.address, self.admin, self.said, self.until = address, admin, said, until
        self.seconds = collections.defaultdict(list)

    def order(self, *words):
        start = time.monotonic()
        done = subprocess.run([BINARY, "admin", "--server", self.admin, *map(str, words)], capture_output=True, text=True)
        self.seconds[words[0]].append(time.monotonic() - start)
        self.said[f"models: {words[0]}"] += 1
        if done.returncode:
            self.said["faults"] += 1
            print("FAULT", words, done.stderr, flush=True)

    def run(self, every=20):
        """A third of a minute for each of the three."""
        away = False
        while time.monotonic() + 3 * every < self.until:
            away = not away
            self.order("replace", f"replaced={shifted(OTHER if away else 0.0)}")
            time.sleep(every)
            self.order("sleep", "sleeper")
            time.sleep(5)
            self.order("wake", "sleeper")
            time.sleep(every - 5)
            load = [BINARY, "load", "--server", self.address, "--callers", 4, "--group", 8, "--side", 224, "--seconds", 60]
            client = subprocess.Popen(list(map(str, load)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            time.sleep(5)
            client.kill()
            client.wait()
            self.said["clients killed"] += 1
            time.sleep(every - 5)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--callers", type=int, default=12)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args()
    pb, rpc = stubs()
    table, said, memory = Table(pb, arguments.threads), collections.Counter(), []
    models = [word for name, shift in SHIFTS.items() for word in ("--model", f"{name}={shifted(shift)}")]
    admin = f"127.0.0.1:{free_port()}"
    # A cache that is too small for the table: every item is remembered now and then, and computed now and then.
    flags = ["--admin", admin, "--threads", arguments.threads, "--set", "cache.max_items=16"]
    with ours(None, OUT, *models, *flags) as (server, address, _):
        until = time.monotonic() + arguments.minutes * 60
        keeper = Keeper(address, admin, said, until)
        callers = [Caller(n, pb, rpc, address, table, said, until) for n in range(arguments.callers)]
        threads = [threading.Thread(target=one.run) for one in [*callers, keeper]]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            memory.append(server.resident())
            time.sleep(1)
    fifth = max(1, len(memory) // 5)
    early, late = statistics.median(memory[fifth : 2 * fifth] or memory), statistics.median(memory[-fifth:])
    row = {"minutes": arguments.minutes, "faults": said.pop("faults", 0)}
    row |= {"scores": sum(count for what, count in said.items() if what.startswith("scores of"))}
    row |= dict(sorted(said.items()))
    row |= {f"{order}, s (worst)": round(max(took), 2) for order, took in keeper.seconds.items()}
    row |= {"memory early, MiB": round(early), "memory late, MiB": round(late)}
    for name, value in row.items():
        print(f"{name}: {value}")
    save("soak", [row])
    save("soak-memory", [{"MiB each second": [round(one, 1) for one in memory]}])
    if row["faults"] or late > 1.05 * early + 16:
        sys.exit("the soak failed")


if __name__ == "__main__":
    main()
