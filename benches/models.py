"""Two models in one server, against two servers of one model each on the same cores.

    models.py [--seconds S] [--rounds N] [--callers 8] [--group 8] [--side 224] [--threads N]

Each model has callers of its own, all at once. All servers are up and are loaded in turns, by the same client; two servers
are tried as they start by default, where each takes all cores, and with half of the cores each.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess

from common import BINARY, OUT, save, show
from servers import UNCACHED, ours
from soak import shifted


def rates(targets, arguments):
    """Pictures a second of each target's callers, who call at the same time."""
    command = [BINARY, "load", "--json", "--callers", arguments.callers, "--group", arguments.group]
    command += ["--side", arguments.side, "--seconds", arguments.seconds]
    loads = [subprocess.Popen(list(map(str, [*command, *of])), stdout=subprocess.PIPE, text=True) for of in targets]
    return [json.loads(load.communicate()[0])["pictures_per_second"] for load in loads]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--callers", type=int, default=8)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args()
    checkpoints = {"one": shifted(0.0), "two": shifted(10.0)}
    both = [f"--model={name}={path}" for name, path in checkpoints.items()]
    with contextlib.ExitStack() as stack:

        def server(folder, threads, checkpoint, *flags):
            place = OUT / folder
            place.mkdir(exist_ok=True)
            return stack.enter_context(ours(checkpoint, place, "--threads", threads, *UNCACHED, *flags))[1]

        one = server("models", arguments.threads, None, *both)
        sides = {"one server": [["--server", one, "--model", name] for name in checkpoints]}
        for threads in sorted({arguments.threads, max(1, arguments.threads // 2)}, reverse=True):
            addresses = [server(f"{name}-{threads}", threads, path) for name, path in checkpoints.items()]
            sides[f"two servers, {threads} threads each"] = [["--server", address] for address in addresses]
        found = {name: [] for name in sides}
        for n in range(arguments.rounds + 1):
            for name in sides if n % 2 else reversed(sides):
                now = rates(sides[name], arguments)
                if n:
                    found[name].append(now)
    rows = []
    for name, rounds in found.items():
        ratios = [sum(a) / sum(b) for a, b in zip(found["one server"], rounds)]
        median = lambda numbers: f"{statistics.median(numbers):.1f}"
        rows.append(
            {
                f"{arguments.callers} callers of each": name,
                "pictures/s": median(map(sum, rounds)),
                "of which one, two": " ".join(median(part) for part in zip(*rounds)),
                "one server, times": f"{statistics.median(ratios):.3f}",
            }
        )
    show(rows)
    save("models", rows)


if __name__ == "__main__":
    main()
