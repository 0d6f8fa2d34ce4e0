"""UniRL's reward service with its HPSv3 scorer beside our server: the same checkpoint, pictures, machine and run.

    unirl_service.py SOURCE PYTHON [--rounds N] [--replicas N] [--skip-overload]

SOURCE is the folder unirl-reward-service of a checkout of Tencent-Hunyuan/UniRL (measured at 1a7b501e), which runs as it is;
PYTHON has what it imports: `make bench-unirl UNIRL=CHECKOUT` makes that environment, of benches/unirl.txt, on the torch
that stands beside our libtorch. The checkpoint is HPSv3's layout on a Qwen2-VL of random weights in which the forward is
most of the work (SHAPE below), in fp32 on both sides; UniRL's scores it at `max_batch_size: 1`, its best on a CPU.

Eight callers send a group each, 24 PNGs of 512×512, as UniRL's own client does: one body of base64 for a group, made
beforehand. Ours gets the same bodies at its HTTP port, and the same files over gRPC. A round is all eight groups; sides
take turns, and one group before the first is not counted. Beside pictures a second stands processor time a picture, of all
processes of a side, which other programs on the machine do not change much. That both give the same scores is
checked. Then one bad picture in a group, and 200 callers at once.
"""

import argparse
import base64
import collections
import contextlib
import io
import json
import os
import statistics
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import requests

from common import OUT, ROOT, pictures, prompts, save, show
from servers import UNCACHED, Server, free_port, ours

sys.path.insert(0, str(ROOT / "clients/python/src"))

CALLERS, GROUP, AT_ONCE = 8, 24, 200
SHAPE = {
    "vision": {"hidden": 64, "depth": 3, "heads": 2, "ratio": 4},
    "text": {"hidden": 128, "intermediate": 352, "layers": 3, "heads": 4, "kv_heads": 2, "theta": 1e6,
             "sections": [4, 6, 6]},
}  # fmt: skip
# For all eight groups at once, some 1900 tokens a picture, from what the server takes for one caller.
ROOM = ("--set", "queue.max_tokens=1000000")
# ray.init reads the machine; here it is told: loopback, no dashboard, and no more of the memory than it needs.
STARTER = """import ray
ray.init(
    address="local", num_cpus={cores}, object_store_memory=800_000_000, include_dashboard=False,
    _node_ip_address="127.0.0.1",
)
from reward_service.__main__ import main
main()
"""


def checkpoint(directory):
    """The base, HPSv3's one file on it, and the profile that says so, each written once."""
    from make_profiles import old_keys, recipe_of, save_weights, trained_weights, write_base

    base, weights, profile = directory / "base", directory / "hpsv3/HPSv3.safetensors", directory / "hpsv3.json"
    if not profile.exists():
        recipe = recipe_of("qwen2_vl", None) | SHAPE
        write_base(base, recipe)
        save_weights(weights, old_keys(trained_weights(base, recipe, ["rm_head"], 1)), True)
        shipped = json.loads((ROOT / "src/model/profile/shipped/hpsv3.json").read_text())
        profile.write_text(json.dumps(shipped | {"base": str(base.resolve())}))
    return base, weights, profile


@contextlib.contextmanager
def unirl(arguments, base, weights, timeout):
    """UniRL's service; gives the process and its URL."""
    import yaml

    config, place, port = OUT / "hpsv3.yaml", OUT / "unirl", free_port()
    place.mkdir(exist_ok=True)
    # A list of packages without any: those of PYTHON are taken.
    (place / "empty.txt").write_text("# none\n")
    told = dict(model_name_or_path=str(base.resolve()), bf16=False, torch_dtype="float32", disable_flash_attn2=True)
    shipped = next(Path(arguments.python).parent.parent.glob("lib/python*/site-packages/hpsv3/config/HPSv3_7B.yaml"))
    config.write_text(yaml.safe_dump(yaml.safe_load(shipped.read_text()) | told | {"output_dir": str(place)}))
    cores = len(os.sched_getaffinity(0))
    reward = {
        "name": "hpsv3", "scorer": "hpsv3", "runtime_env": str(place / "empty.txt"), "num_gpus": 0,
        "num_replicas": arguments.replicas, "num_cpus": cores / arguments.replicas,
        "params": {"weights_path": str(weights), "config_path": str(config), "device": "cpu", "max_batch_size": 1},
    }  # fmt: skip
    server = {"host": "127.0.0.1", "port": port, "score_timeout_s": timeout}
    (place / "service.yaml").write_text(yaml.safe_dump({"server": server, "rewards": [reward]}))
    (place / "start.py").write_text(STARTER.format(cores=cores))
    # Ray puts its workers behind everything else (nice 15): here both sides have the same priority.
    environment = {"PYTHONPATH": str(arguments.source), "RAY_worker_niceness": "0", "RAY_AUTH_MODE": "disabled"}
    command = ["env", *(f"{name}={value}" for name, value in environment.items()), arguments.python]
    url = f"http://127.0.0.1:{port}"

    def ready():
        with contextlib.suppress(requests.RequestException):
            return requests.get(f"{url}/rewards", timeout=1).ok

    served = Server([*command, place / "start.py", "--config", place / "service.yaml"], OUT / "unirl.log", ready, 600)
    try:
        yield served.process.pid, url
    finally:
        # What Ray started ends with its driver; what does not is ended here.
        below = psutil.Process(served.process.pid).children(recursive=True)
        served.stop()
        for process in psutil.wait_procs(below, timeout=20)[1]:
            process.kill()


@contextlib.contextmanager
def spatialscore(weights, profile, *flags):
    """Our server; gives its process, its HTTP port's URL and its gRPC address."""
    port = free_port()
    model = f"hpsv3={weights.parent},profile={profile},dtype=float32"
    flags = ["--model", model, "--http", f"127.0.0.1:{port}", *flags]
    with ours(None, OUT, *flags) as (server, address, _):
        yield server.process.pid, f"http://127.0.0.1:{port}", address


def body(group):
    """What UniRL's client sends for a group of pictures with their prompts."""
    turns = [{"text": prompt, "image_b64": base64.b64encode(data).decode()} for prompt, data in group]
    asked = [{"history": [turn], "required_rewards": ["hpsv3"], "metadata": None} for turn in turns]
    return json.dumps({"requests": asked}).encode()


def post(url, data, timeout=600):
    answer = requests.post(f"{url}/score", data, headers={"Content-Type": "application/json"}, timeout=timeout)
    return answer.status_code, answer.json()


def scores_of(answer):
    """The score of each picture; None where there is none."""
    return [next(iter(result.get("hpsv3", {}).values()), None) for result in answer.get("results", [])]


def processor_time(pid):
    """Seconds of a process and all below it."""
    seconds = 0.0
    for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            seconds += times.user + times.system
    return seconds


def measure(rounds, sides, count):
    """Pictures a second and processor time a picture of each side, round by round, and each side's last scores."""
    rates, costs, scores = collections.defaultdict(list), collections.defaultdict(list), {}
    names = list(sides)
    for name in names:
        sides[name][1](0)
    for n in range(rounds):
        for name in names if n % 2 else reversed(names):
            pid, call = sides[name]
            before, start = processor_time(pid), time.monotonic()
            with ThreadPoolExecutor(CALLERS) as callers:
                scores[name] = [score for group in callers.map(call, range(CALLERS)) for score in group]
            seconds = time.monotonic() - start
            assert len(scores[name]) == count and None not in scores[name], f"{name} left pictures without a score"
            rates[name].append(count / seconds)
            costs[name].append((processor_time(pid) - before) / count)
            print(f"round {n}, {name}: {count / seconds:.2f} pictures/s, load {os.getloadavg()[0]:.1f}", flush=True)
    return rates, costs, scores


def bad_pictures(urls, group):
    """What becomes of a group in which one picture is cut, or is one that the reference refuses: 600×2 pixels."""
    from PIL import Image

    strip = io.BytesIO()
    Image.new("RGB", (600, 2), "red").save(strip, "PNG")
    prompt, data = group[1]
    for what, bad in {"one PNG of the group is cut": data[: len(data) // 2], "one is 600×2": strip.getvalue()}.items():
        row = {"what": what}
        for name, url in urls.items():
            status, answer = post(url, body([group[0], (prompt, bad), *group[2:]]))
            there = [score is not None for score in scores_of(answer)]
            row[name] = f"HTTP {status}, {sum(there)} of {len(group)} scored"
            print(f"{what}, {name}: {row[name]}; it says {json.dumps(answer)[:300]}", flush=True)
        yield row


def overload(url, group, timeout):
    """What so many calls of one picture get that all come at once."""
    bodies = [body([item]) for item in group]
    together = threading.Barrier(AT_ONCE)

    def call(n):
        together.wait()
        try:
            status, answer = post(url, bodies[n % len(bodies)], timeout)
        except requests.ConnectionError:
            return "connection closed"
        scored = scores_of(answer) and scores_of(answer)[0] is not None
        return f"HTTP {status} {'with' if scored else 'without'} a score"

    with ThreadPoolExecutor(AT_ONCE) as callers:
        return dict(collections.Counter(callers.map(call, range(AT_ONCE))))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("python")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--skip-overload", action="store_true")
    arguments = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    base, weights, profile = checkpoint(OUT / "unirl-checkpoint")
    files = pictures(OUT / "pictures", CALLERS * GROUP, (512, 512))
    texts = prompts(CALLERS * GROUP)
    items = [(text, path.read_bytes()) for text, path in zip(texts, files)]
    groups = [items[n : n + GROUP] for n in range(0, len(items), GROUP)]
    bodies = [body(group) for group in groups]
    over_http = lambda url: lambda n: scores_of(post(url, bodies[n])[1])
    from spatialscore_client import SpatialScoreClient

    threads = ("--threads", str(len(os.sched_getaffinity(0))))
    with (
        unirl(arguments, base, weights, 600) as (their_pid, theirs),
        spatialscore(weights, profile, *threads, *UNCACHED, *ROOM) as (pid, url, address),
        SpatialScoreClient(address, timeout=600) as client,
    ):
        def over_grpc(n):
            texts, data = zip(*groups[n])
            return client.score(list(texts), list(data), models=["hpsv3"])["hpsv3"].means

        sides = {
            "UniRL's service": (their_pid, over_http(theirs)),
            "ours, UniRL's calls": (pid, over_http(url)),
            "ours, gRPC": (pid, over_grpc),
        }
        rates, costs, scores = measure(arguments.rounds, sides, len(items))
        reference = scores["UniRL's service"]
        spread = max(reference) - min(reference)
        rows = [
            {
                "side": name,
                "pictures/s": statistics.median(rates[name]),
                "least and most": f"{min(rates[name]):.3g} to {max(rates[name]):.3g}",
                "times as fast": statistics.median(a / b for a, b in zip(rates[name], rates["UniRL's service"])),
                "processor ms a picture": statistics.median(costs[name]) * 1e3,
                "worst difference": max(abs(a - b) for a, b in zip(scores[name], reference)),
                "of a spread of": spread,
            }
            for name in sides
        ]
        assert all(row["worst difference"] < 1e-3 * spread for row in rows), "the two sides give different scores"
        show(rows)
        save("unirl", rows)
        bad = list(bad_pictures({"UniRL's service": theirs, "ours": url}, groups[0]))
        show(bad)
        save("unirl-bad", bad)
    if arguments.skip_overload:
        return
    row = {"what": f"{AT_ONCE} calls of one picture at once"}
    with unirl(arguments, base, weights, 5) as (_, theirs):
        row["UniRL's service, score_timeout_s: 5"] = overload(theirs, items[:AT_ONCE], 600)
    bounds = ("queue.max_items=32", "batch.max_items=32", "limits.max_items_per_request=32", "http.queue_wait_seconds=5")
    small = [word for bound in bounds for word in ("--set", bound)]
    with spatialscore(weights, profile, *threads, *UNCACHED, *small) as (_, url, _):
        row["ours, queue.max_items=32, http.queue_wait_seconds=5"] = overload(url, items[:AT_ONCE], 600)
    show([row])
    save("unirl-overload", [row])


if __name__ == "__main__":
    main()
