"""What peers without a token can do to a server: attacks from twenty loopback addresses beside a token holder's calls.

    attack.py BINARY [--seconds 12] [--only NAME] [--limit-mib 1024]

Two servers run. Each attack goes for the second one first, while the token holder's rate at the first is measured: the
attackers cost the machine the same. Then it goes for the first. A line for each attack: whether the server survived (it is
ended once its resident memory is over the limit, as a memory limit would), calls that failed, the rate kept, how long
readiness took to answer, and the memory before, at most, and 30 seconds after. Ends with 1 where a goal is missed.
"""

import argparse
import os
import select
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import grpc

ADDRESSES = [f"127.0.0.{n}" for n in range(2, 22)]
TOKEN = "holder-0123456789abcdef"
PICTURES = 24
SIDE = 112
HEALTH = "/grpc.health.v1.Health/"
SCORING = "/spatialscore.v1.SpatialScoreService/"
GOALS = {"rate": 0.9, "readiness": 1.0, "memory": 1.2}


def field(number, payload):
    """A length-delimited field of a protobuf message."""
    return varint(number << 3 | 2) + varint(len(payload)) + payload


def varint(value):
    out = b""
    while value > 127:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


def request(fresh):
    """A Score request of pictures that were never sent before."""
    pixels = os.urandom(8) * (SIDE * SIDE * 3 // 8)
    items = b""
    for n in range(PICTURES):
        rgb8 = struct.pack("<QQ", fresh, n) + pixels[16:]
        raw = (
            varint(1 << 3)
            + varint(SIDE)
            + varint(2 << 3)
            + varint(SIDE)
            + field(3, rgb8)
        )
        items += field(2, field(2, field(2, raw)))
    return field(1, b"a cup to the left of a plate") + items


def frame(kind, flags, stream, payload=b""):
    """A frame of HTTP/2."""
    return (
        len(payload).to_bytes(3, "big")
        + bytes([kind, flags])
        + stream.to_bytes(4, "big")
        + payload
    )


def literal(name, value):
    """A short header in HPACK, as it is."""
    return b"\0" + bytes([len(name)]) + name + bytes([len(value)]) + value


def call(stream, path, more=b"", body=None, end=True):
    """The frames of a call; without a body it never ends."""
    head = (
        b"\x83\x86\x04"
        + bytes([len(path)])
        + path.encode()
        + literal(b"content-type", b"application/grpc")
    )
    head += literal(b"te", b"trailers") + more
    frames = frame(1, 4, stream, head)
    if body is not None:
        frames += frame(0, 1 if end else 0, stream, body)
    return frames


# A peer that takes no answers: every stream's window is closed.
HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, struct.pack(">HI", 4, 0))
EMPTY = b"\0" * 5


def watches():
    return HELLO + b"".join(
        call(2 * n + 1, HEALTH + "Watch", body=EMPTY) for n in range(1000)
    )


def checks():
    headers = b"".join(literal(b"a%03d" % n, b"") for n in range(400))
    return HELLO + b"".join(
        call(2 * n + 1, HEALTH + "Check", headers) for n in range(200)
    )


def wrong_tokens():
    token = literal(b"authorization", b"Bearer wrong-0123456789abcdef")
    return HELLO + b"".join(
        call(
            2 * n + 1,
            SCORING + "Score",
            token,
            struct.pack(">BI", 0, 12_000) + bytes(12_000),
        )
        for n in range(60)
    )


def one_watch():
    return HELLO + call(1, HEALTH + "Watch", body=EMPTY)


ATTACKS = {
    # What is sent on each connection, how many each address has, and at which port.
    "1024 watches": (watches, 12, "grpc"),
    "checks that never end, 400 headers": (checks, 12, "grpc"),
    "one watch a connection": (one_watch, 60, "grpc"),
    "one byte a connection": (lambda: b"P", 60, "grpc"),
    "wrong tokens with pictures": (wrong_tokens, 4, "grpc"),
    "slow headers over HTTP": (
        lambda: b"POST /score HTTP/1.1\r\nx: " + b"x" * 60_000,
        30,
        "http",
    ),
    "scrapers": (lambda: b"GET /metrics HTTP/1.1\r\n", 60, "metrics"),
}


class Attack:
    """Connections that are held, and made again where they end, until it is stopped."""

    def __init__(self, make, each, ports):
        self.payload, self.ports, self.stopped = make(), ports, threading.Event()
        self.connections = 0
        slots = [
            (address, port)
            for address in ADDRESSES
            for port in ports
            for _ in range(each)
        ]
        parts = [slots[n::2] for n in range(2)]
        self.threads = [
            threading.Thread(target=self.hold, args=(part,)) for part in parts
        ]
        for thread in self.threads:
            thread.start()

    def hold(self, slots):
        poll, held, again = select.poll(), {}, list(slots)
        while not self.stopped.is_set():
            for slot in again[:50]:
                connection = self.connect(*slot)
                if connection:
                    held[connection.fileno()] = (connection, slot)
                    poll.register(
                        connection, select.POLLRDHUP | select.POLLHUP | select.POLLERR
                    )
            again = again[50:]
            for fd, _ in poll.poll(20):
                connection, slot = held.pop(fd)
                poll.unregister(fd)
                connection.close()
                again.append(slot)
        for connection, _ in held.values():
            connection.close()

    def connect(self, address, port):
        connection = socket.socket()
        try:
            connection.bind((address, 0))
            connection.settimeout(0.2)
            connection.connect(("127.0.0.1", port))
            self.connections += 1
            connection.sendall(self.payload)
        except OSError:
            # What it could not send all of it holds as it is.
            pass
        return connection

    def stop(self):
        self.stopped.set()
        for thread in self.threads:
            thread.join()


class Server:
    """A server with a token, its ports found in its log, and its memory watched."""

    def __init__(self, binary, limit, folder):
        tokens = Path(folder) / "tokens"
        tokens.write_text(f"holder:{TOKEN}\n")
        arguments = [
            "serve",
            "--listen=127.0.0.1:0",
            "--http=127.0.0.1:0",
            "--metrics-listen=127.0.0.1:0",
        ]
        arguments += ["--tokens-file", str(tokens), "--device=cpu", "--log-format=json"]
        self.process = subprocess.Popen(
            [binary, *arguments], stderr=subprocess.PIPE, text=True
        )
        self.ports, self.limit, self.peak = {}, limit, 0
        for line in self.process.stderr:
            for word, name in (
                ("gRPC listens", "grpc"),
                ("HTTP listens", "http"),
                ('"metrics"', "metrics"),
            ):
                if word in line:
                    self.ports[name] = int(
                        line.split("127.0.0.1:")[1].split('"')[0].split("/")[0]
                    )
            if '"serving"' in line:
                break
        threading.Thread(
            target=lambda: [None for _ in self.process.stderr], daemon=True
        ).start()
        threading.Thread(target=self.watch, daemon=True).start()

    def memory(self):
        try:
            pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        except OSError:
            return 0
        return pages * os.sysconf("SC_PAGESIZE") >> 20

    def watch(self):
        while self.process.poll() is None:
            self.peak = max(self.peak, self.memory())
            if self.peak > self.limit:
                self.process.kill()
            time.sleep(0.02)

    def survived(self):
        return self.process.poll() is None

    def end(self):
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Holder:
    """Calls of a token holder, one after the other, and readiness probes on new connections beside them."""

    def __init__(self, server):
        self.port, self.done, self.failed, self.ready, self.fresh = (
            server.ports["grpc"],
            0,
            0,
            [],
            time.time_ns(),
        )
        self.stopped = threading.Event()
        self.threads = [
            threading.Thread(target=work) for work in (self.score, self.probe)
        ]
        self.start = time.time()
        for thread in self.threads:
            thread.start()

    def score(self):
        with grpc.insecure_channel(f"127.0.0.1:{self.port}") as channel:
            score = channel.unary_unary(SCORING + "Score")
            while not self.stopped.is_set():
                self.fresh += 1
                try:
                    score(
                        request(self.fresh),
                        metadata=[("authorization", f"Bearer {TOKEN}")],
                        timeout=20,
                    )
                    self.done += 1
                except grpc.RpcError:
                    self.failed += 1
                    time.sleep(0.05)

    def probe(self):
        options = [("grpc.use_local_subchannel_pool", 1)]
        while not self.stopped.is_set():
            start = time.time()
            try:
                with grpc.insecure_channel(
                    f"127.0.0.1:{self.port}", options
                ) as channel:
                    channel.unary_unary(HEALTH + "Check")(b"", timeout=10)
                self.ready.append(time.time() - start)
            except grpc.RpcError:
                self.ready.append(float("inf"))
            self.stopped.wait(0.5)

    def stop(self):
        """Calls a second, those that failed, and the slowest answer to a probe."""
        self.stopped.set()
        for thread in self.threads:
            thread.join()
        return (
            self.done / (time.time() - self.start),
            self.failed,
            max(self.ready, default=0),
        )


def measure(server, target, attack, seconds):
    """The holder's figures at `server` while `target` is attacked."""
    make, each, port = attack
    attacking = Attack(make, each, [target.ports[port]])
    time.sleep(1)
    holder = Holder(server)
    time.sleep(seconds)
    figures = holder.stop()
    attacking.stop()
    return figures, attacking.connections


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("binary")
    parser.add_argument("--seconds", type=float, default=8)
    parser.add_argument(
        "--rest",
        type=float,
        default=12,
        help="after each attack, before memory is read again",
    )
    parser.add_argument("--only")
    parser.add_argument("--limit-mib", type=int, default=1024)
    arguments = parser.parse_args()
    missed = []
    print(
        f"{'attack':36} survived failed rate kept readiness  MiB before/most/after  connections"
    )
    for name, attack in ATTACKS.items():
        if arguments.only and arguments.only not in name:
            continue
        with tempfile.TemporaryDirectory() as folder:
            # A fresh pair for each: what one attack leaves is not the next one's.
            servers = [
                Server(arguments.binary, arguments.limit_mib, folder) for _ in range(2)
            ]
            try:
                warm = Holder(servers[0])
                time.sleep(3)
                warm.stop()
                (beside, _, _), _ = measure(
                    servers[0], servers[1], attack, arguments.seconds
                )
                before = servers[0].memory()
                (rate, failed, ready), count = measure(
                    servers[0], servers[0], attack, arguments.seconds
                )
                time.sleep(arguments.rest)
                survived, after = servers[0].survived(), servers[0].memory()
            finally:
                for server in servers:
                    server.end()
        kept = rate / beside if beside else 0
        print(
            f"{name:36} {'yes' if survived else 'NO':8} {failed:6} {kept:8.0%} {ready:8.2f} s"
            f"  {before:6}/{servers[0].peak}/{after:<12} {count}",
            flush=True,
        )
        well = (
            survived
            and not failed
            and ready <= GOALS["readiness"]
            and after <= before * GOALS["memory"]
        )
        if not well or kept < GOALS["rate"]:
            missed.append(name)
    if missed:
        print("goals missed:", ", ".join(missed))
    sys.exit(bool(missed))


if __name__ == "__main__":
    main()
