"""What the benchmarks share: both sides, the inputs that they read, and a table of medians.

Both sides of a comparison run in one session and take turns, round after round, so that whatever else the machine does
burdens both alike. What is reported is the median of each side, and the median of the rounds' ratios.
"""

import json
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BINARY = Path(os.environ.get("SPATIALSCORE_BINARY", ROOT / "target/release/spatialscore"))
OUT = ROOT / "target/bench"
MINI = ROOT / "models/spatialscore-mini"
sys.path.insert(0, str(ROOT / "tests/reference"))


class Ours:
    """`spatialscore bench --commands`: measures what it is asked for. src/cli/bench/commands.rs has the protocol."""

    def __init__(self, checkpoint, threads, *flags):
        command = [BINARY, "bench", "--commands", "--checkpoint", checkpoint, "--threads", str(threads), *flags]
        self.process = subprocess.Popen(
            list(map(str, command)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.about = self.read()

    def read(self):
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"spatialscore bench ended with {self.process.wait()}")
        return json.loads(line)

    def ask(self, **command):
        print(json.dumps(command, default=str), file=self.process.stdin, flush=True)
        return self.read()

    def processor_time(self):
        """Seconds that the process's threads have had a core: what does not depend on who else wants one."""
        tasks = Path(f"/proc/{self.process.pid}/task").glob("*/schedstat")
        return sum(int(task.read_text().split()[0]) for task in tasks) / 1e9

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        self.process.wait()


def take_turns(rounds, sides):
    """Times each side once a round, in an order that changes from round to round; `sides` maps names to functions that
    return seconds. One round before the first is not counted. The seconds of each side, round by round."""
    seconds = {name: [] for name in sides}
    names = list(sides)
    for n in range(rounds + 1):
        for name in names if n % 2 else reversed(names):
            took = sides[name]()
            if n:
                seconds[name].append(took)
            # Threads of OpenMP spin for a while when their work is done, and would take the other side's time.
            time.sleep(0.005)
    return seconds


def ratio(seconds, ours, theirs):
    """How many times as fast ours is: the median over the rounds."""
    return statistics.median(b / a for a, b in zip(seconds[ours], seconds[theirs]))


def machine():
    """The machine in words, for the head of a table."""
    import torch
    import transformers

    model = next(
        (line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), "unknown CPU"
    )
    flags = next((line for line in open("/proc/cpuinfo") if line.startswith("flags")), "")
    widths = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags.split()]
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "extensions": widths,
        "load": round(os.getloadavg()[0], 2),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "spatialscore": version(),
    }


def version():
    said = subprocess.run([BINARY, "--version"], capture_output=True, text=True, check=True).stdout.split()[-1]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return f"{said} ({commit.stdout.strip()})" if commit.returncode == 0 else said


def save(name, rows):
    """Keeps the rows of a benchmark, for the table and for a machine to read."""
    OUT.mkdir(parents=True, exist_ok=True)
    path = OUT / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")


def show(rows):
    """Prints rows of one shape as a table."""
    text = lambda value: f"{value:.3g}" if isinstance(value, float) else str(value)
    lines = [list(rows[0])] + [[text(value) for value in row.values()] for row in rows]
    widths = [max(len(line[n]) for line in lines) for n in range(len(lines[0]))]
    lines.insert(1, ["-" * width for width in widths])
    for line in lines:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |")
    print(flush=True)


# Inputs


def prompts(count, seed=0):
    """Prompts of one to four relations."""
    from checkpoints import spatial_prompt

    rng = random.Random(seed)
    return [spatial_prompt(rng, 1 + n % 4) for n in range(count)]


def pictures(directory, count, size, form="png", seed=0):
    """Pictures of shapes and soft noise, `size` as (width, height): neither trivial nor hopeless to compress."""
    from PIL import Image, ImageDraw, ImageFilter

    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for n in range(count):
        path = directory / f"{size[0]}x{size[1]}-{n}.{form}"
        paths.append(path)
        if path.exists():
            continue
        rng = random.Random(f"{seed} {n}")
        image = Image.frombytes("RGB", size, rng.randbytes(3 * size[0] * size[1]))
        image = Image.blend(image.filter(ImageFilter.GaussianBlur(3)), Image.new("RGB", size, "grey"), 0.5)
        draw = ImageDraw.Draw(image)
        for _ in range(12):
            x, y = rng.randrange(size[0]), rng.randrange(size[1])
            w, h = rng.randrange(size[0] // 8, size[0] // 2), rng.randrange(size[1] // 8, size[1] // 2)
            shape = draw.ellipse if rng.random() < 0.5 else draw.rectangle
            shape((x, y, x + w, y + h), fill=tuple(rng.randrange(256) for _ in range(3)))
        if form == "rgb":
            path.write_bytes(image.tobytes())
        else:
            image.save(path, **({"quality": 90} if form != "png" else {}))
    return paths
