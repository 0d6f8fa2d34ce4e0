"""A fleet that is larger than this machine: real servers, sockets, queues and the Python client; the devices alone are played.

    fleet.py [--seconds 30] [--only NAME]

Each replica is a process whose device computes `RATE` pictures a second (`simulated_device.rs`). A node is a process with
eight ranks, threads that share a client with all replicas as its targets; each rank scores group after group of 24 and holds
every score against its picture. Nothing of it fills the cores: waits are most of it.

Lines: how much of what the devices could compute a fleet does, at growing numbers of ranks; how evenly; how long a group takes
beside the time in which the fleet could have computed all that ranks have under way. Then one replica of sixteen that is killed,
hung (SIGSTOP), or four times as slow, and the same sixteen behind one HAProxy. Ends with 1 where a score was lost or another's.
"""

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy

from common import OUT, ROOT, save, show
from servers import built, free_port

sys.path.insert(0, str(ROOT / "clients/python/src"))

RATE, GROUP, RANKS, SIDE = 8.0, 24, 8, 56
# Of one node: what a rank of it may wait for a group, whatever becomes of the fleet.
TIMEOUT = 300


def node(number, targets, until):
    """Eight ranks: each group's start, how long it took, and how many of its scores were wrong."""
    from spatialscore_client import SpatialScoreClient

    groups, lock, client = [], threading.Lock(), SpatialScoreClient(targets.split(","), timeout=TIMEOUT)

    def rank(rank):
        generator = numpy.random.default_rng([number, rank])
        while time.time() < until:
            shades = generator.integers(0, 256, (GROUP, 2))
            pictures = numpy.empty((GROUP, SIDE, SIDE, 3), numpy.uint8)
            pictures[:, : SIDE // 2], pictures[:, SIDE // 2 :] = shades[:, :1, None, None], shades[:, 1:, None, None]
            begun = time.time()
            scores = client.score(f"picture {time.time_ns()} of rank {number}.{rank}", list(pictures))
            means = numpy.array([score.mean for score in scores])
            wrong = GROUP - int(numpy.sum(means == shades[:, 0] + 256.0 * shades[:, 1]))
            with lock:
                groups.append((begun, time.time() - begun, wrong))

    threads = [threading.Thread(target=rank, args=(n,)) for n in range(RANKS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(json.dumps({"groups": groups, "ended": len(groups)}))


class Replica:
    """A server whose device is played."""

    def __init__(self, folder, rate):
        self.port, self.rate = free_port(), rate
        self.log = folder / f"replica-{self.port}.txt"
        command = [built("simulated_device"), "--listen", f"127.0.0.1:{self.port}", "--pictures-per-second", str(rate)]
        command += ["--set", "processor.threads=1", "--set", "batch.max_items=8"]
        command += ["--set", "server.max_connections_per_address=1024"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKIO_WORKER_THREADS": "1"}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, stdout=log, env=environment)

    def computed(self, begin, end):
        """How many pictures it computed between two times."""
        lines = [line.split() for line in self.log.read_text().splitlines() if line.count(" ") == 1]
        seen = [(float(when), int(count)) for when, count in lines]
        return float(numpy.interp(end, *zip(*seen)) - numpy.interp(begin, *zip(*seen)))

    def stop(self):
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def fleet(rates):
    """So many replicas, that serve."""
    from spatialscore_client import SpatialScoreClient

    folder = OUT / "fleet"
    folder.mkdir(parents=True, exist_ok=True)
    replicas = [Replica(folder, rate) for rate in rates]
    try:
        for replica in replicas:
            with SpatialScoreClient(f"127.0.0.1:{replica.port}", timeout=60) as client:
                client.model()
        yield replicas
    finally:
        for replica in replicas:
            replica.stop()


def measure(replicas, ranks, seconds, targets=None, befalls=None, settles=0):
    """What so many ranks get of a fleet. `befalls` happens to the first replica in the middle; `settles` are seconds in which
    clients learn what their targets are like."""
    targets = targets or [f"127.0.0.1:{replica.port}" for replica in replicas]
    # Nodes need a moment to start, and the first groups come all at once.
    begin = time.time() + 5 + ranks / 20 + 2 * ranks * GROUP / sum(replica.rate for replica in replicas) + settles
    until = begin + seconds
    command = lambda n: [sys.executable, __file__, "--node", str(n), "--targets", ",".join(targets), "--until", str(until)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GRPC_DNS_RESOLVER": "native"}
    nodes = [
        subprocess.Popen(command(n), stdout=subprocess.PIPE, text=True, env=environment) for n in range(ranks // RANKS)
    ]
    if befalls:
        time.sleep((begin + until) / 2 - time.time())
        befalls(replicas[0])
    said = [json.loads(node.communicate(timeout=seconds + 4 * TIMEOUT)[0]) for node in nodes]
    groups = [group for one in said for group in one["groups"]]
    if befalls:
        began = (begin + until) / 2
        took = [took for when, took, _ in groups if began - 20 < when < until]
        half = until - began
        alive = replicas[1:]
        could = sum(replica.rate for replica in alive)
        done = [replica.computed(began, until) / half for replica in replicas[1:]]
    else:
        took = [took for when, took, _ in groups if when + took >= begin and when < until]
        could = sum(replica.rate for replica in replicas)
        done = [replica.computed(begin, until) / seconds for replica in replicas]
    fair = ranks * GROUP / could
    return {
        "replicas": len(replicas),
        "ranks": ranks,
        "of the rate": sum(done) / could,
        "least / most busy": f"{min(done) / RATE:.2f} / {max(done) / RATE:.2f}",
        "group, s: in the mean possible": fair,
        "median": statistics.median(took),
        "99 %": float(numpy.percentile(took, 99)),
        "longest": max(took),
        "groups": len(groups),
        "wrong or lost": sum(wrong for *_, wrong in groups),
    }


def behind_haproxy(replicas, folder):
    """One HAProxy before them all, of the shipped configuration's kind; its process and its address."""
    port = free_port()
    lines = ["global", "    maxconn 4096", "defaults", "    mode http", "    timeout connect 5s", "    timeout client 10m"]
    lines += ["    timeout server 10m", "frontend grpc", f"    bind 127.0.0.1:{port} proto h2", "    default_backend replicas"]
    lines += ["backend replicas", "    balance leastconn"]
    lines += [f"    server r{n} 127.0.0.1:{replica.port} proto h2" for n, replica in enumerate(replicas)]
    (folder / "haproxy.cfg").write_text("\n".join(lines) + "\n")
    balancers = ROOT / ".cache/balancers"
    environment = os.environ | {"LD_LIBRARY_PATH": str(next(balancers.glob("usr/lib/*-linux-gnu")))}
    program = [balancers / "usr/sbin/haproxy", "-f", folder / "haproxy.cfg"]
    return subprocess.Popen(program, env=environment), f"127.0.0.1:{port}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--only")
    parser.add_argument("--node", type=int)
    parser.add_argument("--targets")
    parser.add_argument("--until", type=float)
    arguments = parser.parse_args()
    if arguments.node is not None:
        return node(arguments.node, arguments.targets, arguments.until)
    rows = []

    def add(name, row):
        rows.append({"": name} | row)
        show(rows[-1:])
        sys.stdout.flush()

    wanted = lambda name: arguments.only in (None, name)
    for replicas in (1, 4, 16, 64):
        if wanted("sizes"):
            with fleet([RATE] * replicas) as running:
                for ranks in sorted({8, 2 * replicas, 8 * replicas}):
                    if 8 <= ranks <= 16 * replicas:
                        add("all well", measure(running, ranks, arguments.seconds))
    faults = {
        "killed": lambda replica: replica.process.kill(),
        "hung": lambda replica: replica.process.send_signal(signal.SIGSTOP),
    }
    for name, befalls in faults.items():
        if wanted(name):
            with fleet([RATE] * 16) as running:
                add(f"one {name}", measure(running, 64, 2 * arguments.seconds, befalls=befalls))
    if wanted("slow"):
        with fleet([RATE / 4] + [RATE] * 15) as running:
            add("one slow", measure(running, 64, 2 * arguments.seconds, settles=120))
    if wanted("haproxy"):
        with fleet([RATE] * 16) as running:
            proxy, address = behind_haproxy(running, OUT / "fleet")
            try:
                add("behind HAProxy", measure(running, 64, arguments.seconds, [address]))
            finally:
                proxy.kill()
    show(rows)
    save("fleet", rows)
    if any(row["wrong or lost"] for row in rows):
        sys.exit("a score was lost or another's")


if __name__ == "__main__":
    main()
