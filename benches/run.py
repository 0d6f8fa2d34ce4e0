"""Runs the benchmarks one after another and prints one table: `make bench`.

    run.py [--only forward,processor,socket,overload,soak] [--threads N] [--overload-seconds 60] [--soak-minutes 1]

First of all comes what `make bench-device` measures on a GPU, on the CPU and in small, to see that it works. Each
prints its own table as it ends; target/bench/table.md and table.json hold them all but that first one. Nothing is
asserted about a time: a figure is reported beside its goal, and whether it is met.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from common import OUT, machine

HERE = Path(__file__).resolve().parent
SMALL = "--shape tiny --device cpu --dtype float32 --side 112 --batch 1,3 --seconds 0.2".split()
"""What transformers_gpu.py does in some seconds on any machine."""


def rows_of(name):
    path = OUT / f"{name}.json"
    return json.loads(path.read_text())["rows"] if path.exists() else []


def line(what, ours, theirs, figure, goal, met):
    return {"benchmark": what, "ours": ours, "theirs": theirs, "figure": figure, "goal": goal, "met": met}


def faster(what, ours, theirs, row, unit="pictures/s"):
    times, goal = row["times as fast"], row["goal"]
    met = "-" if goal == "-" else "yes" if times >= goal else "no"
    wanted = "-" if goal == "-" else f"≥ {goal:g}×"
    return line(what, f"{ours:.3g} {unit}", f"{theirs:.3g} {unit}", f"{times:.2f}×", wanted, met)


def at_most(what, value, goal, unit, ours="", theirs=""):
    return line(what, ours, theirs, f"{value:.3g} {unit}", f"≤ {goal:g} {unit}", "yes" if value <= goal else "no")


def forward():
    for row in rows_of("forward"):
        theirs = row["batch"] / row["transformers, ms"] * 1e3
        what = f"forward, {row['checkpoint']}, batch {row['batch']}"
        yield faster(what, row["ours, pictures/s"], theirs, row)
        yield faster(f"{what}, by processor time", 0, 0, row | {"times as fast": row["by processor time"]}) | {
            "ours": "", "theirs": ""
        }  # fmt: skip


def processor():
    for row in rows_of("processor"):
        what = f"processor, 1024×1024 {row['picture']} to ≤ {row['to pixels']} pixels, one core"
        yield faster(what, row["ours, pictures/s"], row["reference, pictures/s"], row)


def socket():
    for row in rows_of("socket"):
        (key, name), *_ = row.items()
        what = f"socket, {key.removeprefix('against, ')}, against {name}"
        yield faster(what, row["ours, pictures/s"], row["theirs, pictures/s"], row)
    for row in rows_of("one-caller"):
        ours, theirs = f"{row['ms']:.2f} ms", f"{row['in process, ms']:.2f} ms"
        yield at_most("one caller, over the same work in process", row["added, ms"], 1, "ms", ours, theirs)


def overload():
    for row in rows_of("overload"):
        share, times = row["of capacity"], row["sent, times capacity"]
        ours, theirs = (f"{row[key]:.3g} pictures/s" for key in ("goodput, pictures/s", "capacity, pictures/s"))
        what = f"overload at {times:g}× for {row['seconds']:g} s, goodput of capacity"
        yield line(what, ours, theirs, f"{share:.1%}", "≥ 95 %", "yes" if share >= 0.95 else "no")
        yield at_most("overload, a refusal (median)", row["refused in, ms (median)"], 10, "ms")
        yield line("overload, memory", row["memory, MiB"] + " MiB", "", "", "flat", "")


def soak():
    for row in rows_of("soak"):
        memory = f"{row['memory early, MiB']} to {row['memory late, MiB']} MiB"
        what = f"soak of {row['minutes']:g} min: {row.get('scores', 0)} scores, faults"
        yield line(what, memory, "", str(row["faults"]), "0", "yes" if row["faults"] == 0 else "no")


def markdown(lines, about):
    head = (
        f"{about['cpu']}, {about['cores']} cores, {', '.join(about['extensions'])}; load before the start "
        f"{about['load']}; spatialscore {about['spatialscore']}; torch {about['torch']}, transformers "
        f"{about['transformers']}, Python {about['python']}."
    )
    columns = list(lines[0])
    rows = [columns, ["---"] * len(columns)] + [[str(row[name]) for name in columns] for row in lines]
    return head + "\n\n" + "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="forward,processor,socket,overload,soak")
    parser.add_argument("--threads", default=str(len(os.sched_getaffinity(0))))
    parser.add_argument("--overload-seconds", default="60")
    parser.add_argument("--soak-minutes", default="1")
    arguments = parser.parse_args()
    threads = ["--threads", arguments.threads]
    scripts = {
        "forward": ["forward.py", *threads],
        "processor": ["processor.py"],
        "socket": ["socket_load.py", *threads],
        "overload": ["overload.py", *threads, "--seconds", arguments.overload_seconds],
        "soak": ["soak.py", *threads, "--minutes", arguments.soak_minutes],
    }
    about = machine()
    # Both sides alike: threads of OpenMP that spin long for work would burden whichever side has its turn next.
    environment = os.environ | {"GOMP_SPINCOUNT": "10000"}
    device = [sys.executable, HERE / "transformers_gpu.py", *SMALL, *threads]
    subprocess.run(device, env=environment, check=True)
    chosen = arguments.only.split(",")
    for name in chosen:
        subprocess.run([sys.executable, HERE / scripts[name][0], *scripts[name][1:]], env=environment, check=True)
    tables = {"forward": forward, "processor": processor, "socket": socket, "overload": overload, "soak": soak}
    lines = [row for name in chosen for row in tables[name]()]
    text = markdown(lines, about)
    (OUT / "table.md").write_text(text)
    (OUT / "table.json").write_text(json.dumps({"machine": about, "rows": lines}, indent=1) + "\n")
    print(text)


if __name__ == "__main__":
    main()
