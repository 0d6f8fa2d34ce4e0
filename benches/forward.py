"""The forward in process, against transformers with SDPA on the same checkpoint.

    forward.py [--threads N] [--rounds N] [--batches 1,8,32]

Both sides read the same prompts and pictures (224×224), prepared beforehand, in fp32 and with the same number of
threads; that they give the same rewards is checked before anything is timed. Beside the time stands the time for which
the threads had a core, which tells the two sides apart where other programs keep the machine busy.
"""

import argparse
import os
import statistics
import time

import torch

import ten_million
from common import MINI, OUT, Ours, pictures, prompts, ratio, save, show, take_turns
from transformers_side import Judge, open_picture

GOAL = 1.3


def parameters(judge):
    return sum(weight.numel() for weight in judge.model.parameters())


def measure(name, checkpoint, arguments):
    batches = [int(batch) for batch in arguments.batches.split(",")]
    paths = pictures(OUT / "pictures", max(batches), (224, 224))
    texts = prompts(max(batches))
    judge = Judge(checkpoint)
    rows = []
    with Ours(checkpoint, arguments.threads, "--dtype", "float32") as ours:
        ours.ask(load=[{"prompt": text, "image": path} for text, path in zip(texts, paths)])
        for batch in batches:
            inputs = judge.process(texts[:batch], [open_picture(path) for path in paths[:batch]])
            theirs = judge.forward(inputs)
            means = ours.ask(forward=list(range(batch)))["means"]
            worst = max(abs(a - b) / max(abs(b), 1e-2) for a, b in zip(means, theirs))
            assert worst < 1e-3, f"{name}, batch {batch}: rewards differ by {worst:.1e}"

            cores = {"ours": [], "theirs": []}

            def time_ours():
                before = ours.processor_time()
                seconds = ours.ask(forward=list(range(batch)))["seconds"]
                cores["ours"].append(ours.processor_time() - before)
                return seconds

            def time_theirs():
                start, before = time.perf_counter(), time.process_time()
                judge.forward(inputs)
                cores["theirs"].append(time.process_time() - before)
                return time.perf_counter() - start

            seconds = take_turns(arguments.rounds, {"ours": time_ours, "theirs": time_theirs})
            ms = {side: statistics.median(values) * 1e3 for side, values in seconds.items()}
            rows.append(
                {
                    "checkpoint": f"{name} ({parameters(judge) / 1e6:.1f} M)",
                    "batch": batch,
                    "ours, ms": ms["ours"],
                    "transformers, ms": ms["theirs"],
                    "ours, pictures/s": batch / ms["ours"] * 1e3,
                    "times as fast": ratio(seconds, "ours", "theirs"),
                    "by processor time": ratio(cores, "ours", "theirs"),
                    "goal": GOAL,
                }
            )
            # A long run may be cut short.
            show(rows[-1:])
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batches", default="1,8,32")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = measure("built-in", MINI, arguments)
    for family in ten_million.FAMILIES:
        rows += measure(f"random {family}", ten_million.write(OUT / f"ten-million-{family}", family), arguments)
    print(f"Forward, 224×224, fp32, {arguments.threads} threads each")
    show(rows)
    save("forward", rows)


if __name__ == "__main__":
    main()
