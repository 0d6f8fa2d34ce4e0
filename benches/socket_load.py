"""Through the socket, against FastAPI with transformers, and against our own rate in process.

    socket_load.py [--seconds S] [--rounds N] [--callers 32] [--side 512] [--threads N]

All servers are up at once and are loaded in turns, by one client. PNG files of 512×512; both sides decode, resize to
224×224 and score. Then one caller with one picture at a time: what the socket adds to the same work in process.
"""

import argparse
import os
import statistics
import time

from common import MINI, OUT, Ours, pictures, prompts, save, show
from servers import UNCACHED, fastapi, load, metric, ours, rate

BATCHES = "spatialscore_batch_items"


def in_process(bench, batch, seconds):
    """Pictures per second of processor and forward in batches of so many, without a server."""
    start, done, spent = time.monotonic(), 0, 0.0
    while time.monotonic() - start < seconds:
        spent += bench.ask(score=[(done + n) % 32 for n in range(batch)])["seconds"]
        done += batch
    return done / spent


def throughput(arguments, files, text):
    rates = {"ours": [], "in process": [], "FastAPI": [], "FastAPI, batched": []}
    threads = arguments.threads
    with (
        ours(MINI, OUT, "--threads", threads, *UNCACHED) as (_, address, metrics),
        fastapi(MINI, OUT, "--threads", threads) as naive,
        fastapi(MINI, OUT, "--threads", threads, "--batched", 5) as batched,
        Ours(MINI, threads) as bench,
    ):
        bench.ask(load=[{"prompt": text, "image": path} for path in files])
        run = lambda *target: rate(load(target, files, text, arguments.seconds, "--callers", arguments.callers))
        targets = {
            "ours": ("--grpc", f"http://{address}"), "FastAPI": ("--http", naive), "FastAPI, batched": ("--http", batched)
        }  # fmt: skip
        batch = 1
        for n in range(arguments.rounds + 1):
            before = [metric(metrics, BATCHES + end) for end in ("_sum", "_count")]
            now = {name: run(*target) for name, target in targets.items()}
            items, batches = (metric(metrics, BATCHES + end) - was for end, was in zip(("_sum", "_count"), before))
            batch = max(1, round(items / batches))
            now["in process"] = in_process(bench, batch, arguments.seconds)
            if n:
                for name, value in now.items():
                    rates[name].append(value)
    times = lambda other: statistics.median(a / b for a, b in zip(rates["ours"], rates[other]))
    goals = {"in process": 0.95, "FastAPI": 2.0, "FastAPI, batched": "-"}
    return [
        {
            f"against, {arguments.callers} callers": f"{name} (batches of {batch})" if name == "in process" else name,
            "ours, pictures/s": statistics.median(rates["ours"]),
            "theirs, pictures/s": statistics.median(rates[name]),
            "times as fast": times(name),
            "goal": goal,
        }
        for name, goal in goals.items()
    ]


def one_caller(arguments, files, text):
    """Milliseconds of a call, and of the same work in process, in turns."""
    socket, process = [], []
    with ours(MINI, OUT, "--threads", arguments.threads, *UNCACHED) as (_, address, _), Ours(MINI, arguments.threads) as bench:
        bench.ask(load=[{"prompt": text, "image": path} for path in files])
        for n in range(arguments.rounds * 4 + 1):
            said = load(("--grpc", f"http://{address}"), files, text, 1, "--callers", 1)["outcomes"]["scored"]
            alone = [bench.ask(score=[k % 32])["seconds"] * 1e3 for k in range(said["count"])]
            if n:
                socket.append(said["median_ms"])
                process.append(statistics.median(alone))
    added = statistics.median(a - b for a, b in zip(socket, process))
    return [
        {
            "one caller": "through the socket",
            "ms": statistics.median(socket),
            "in process, ms": statistics.median(process),
            "added, ms": added,
            "goal": 1.0,
        }
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=6)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--callers", type=int, default=32)
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args()
    files = pictures(OUT / "pictures", 32, (arguments.side, arguments.side))
    text = prompts(4)[3]
    rows = throughput(arguments, files, text)
    show(rows)
    save("socket", rows)
    rows = one_caller(arguments, files, text)
    show(rows)
    save("one-caller", rows)


if __name__ == "__main__":
    main()
