"""Ten times more than the server can do: what still gets through, how fast the rest is refused, and what it costs.

    overload.py [--seconds 60] [--times 10] [--queue 256] [--threads N]

Capacity is what 64 callers get who wait for each answer, measured before and after. The queue holds `--queue` items: some
seconds of work. Memory must be as flat at the end as when the queue had filled up for the first time.
"""

import argparse
import os
import threading
import time

from common import MINI, OUT, pictures, prompts, save, show
from servers import UNCACHED, load, ours, rate


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--times", type=float, default=10)
    parser.add_argument("--queue", type=int, default=256)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args()
    # More than are ever under way at once: what is asked twice would be computed once.
    files, text = pictures(OUT / "pictures", 512, (256, 256)), prompts(1)[0]
    # The most that a request may hold cannot be more than the queue.
    named = ("queue.max_items", "limits.max_items_per_request")
    settings = [part for name in named for part in ("--set", f"{name}={arguments.queue}")] + list(UNCACHED)
    with ours(MINI, OUT, "--threads", arguments.threads, *settings) as (server, address, _):
        target = ("--grpc", f"http://{address}")
        load(target, files, text, 2, "--callers", 64)
        before = rate(load(target, files, text, min(15, arguments.seconds), "--callers", 64))
        memory, done = [], threading.Event()

        def watch():
            while not done.wait(1):
                memory.append((time.monotonic(), server.resident()))

        watcher = threading.Thread(target=watch)
        watcher.start()
        said = load(target, files, text, arguments.seconds, "--rate", arguments.times * before)
        done.set()
        watcher.join()
        after = rate(load(target, files, text, min(15, arguments.seconds), "--callers", 64))
    capacity = (before + after) / 2
    refused = said["outcomes"].get("ResourceExhausted", {"count": 0, "median_ms": float("nan")})
    settled = [value for _, value in memory[len(memory) // 5 :]] or [float("nan")]
    others = {name: o["count"] for name, o in said["outcomes"].items() if name not in ("scored", "ResourceExhausted")}
    row = {
        "sent, times capacity": arguments.times,
        "seconds": arguments.seconds,
        "capacity, pictures/s": capacity,
        "goodput, pictures/s": rate(said),
        "of capacity": rate(said) / capacity,
        "goal": 0.95,
        "refused": refused["count"],
        "refused in, ms (median)": refused["median_ms"],
        "memory, MiB": f"{settled[0]:.0f} to {settled[-1]:.0f}",
        "anything else": others or "-",
    }
    show([row])
    save("overload", [row])


if __name__ == "__main__":
    main()
