"""What peers can do to a server: attacks from twenty loopback addresses beside a token holder's calls.

    attack.py BINARY [--seconds 5] [--only NAME] [--limit-mib 1024]

Strangers' attacks go for a server that asks for tokens. Each goes for a second server first, while the token holder's rate
at the first is measured: the attackers cost the machine the same. Then it goes for the first. Callers' attacks are what a
caller may do that is let in: they go for a server without tokens, whose every address is a caller, and no rate is promised
beside them.

Each server runs in a memory control group where this system lets one be made, and is ended by it; else it is ended once its
resident memory is over the limit. A line for each attack: whether the server survived, the holder's calls that failed, the
rate kept, the slowest answer to a readiness probe, and resident memory before, at most and afterwards. The first line has
what is promised. Ends with 1 where a promise is broken.
"""

import argparse
import contextlib
import gzip
import http.client
import os
import select
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from pathlib import Path

import grpc

ADDRESSES = [f"127.0.0.{n}" for n in range(2, 22)]
TOKEN = "holder-0123456789abcdef"
PICTURES = 24
SIDE = 112
HEALTH = "/grpc.health.v1.Health/"
SCORING = "/spatialscore.v1.SpatialScoreService/"
# What is kept of the holder's rate at least, the seconds that a probe takes at most, and how much of its memory a server has
# afterwards at most.
GOALS = {"rate": 0.9, "readiness": 1.0, "memory": 1.2}
# Free memory goes back to the system every ten seconds.
REST = 30
MIB = 1 << 20
# What callers may hold has to fit into the memory that there is. In MiB.
BUDGETS = {"max_bytes_in_flight": 256, "max_decode_bytes": 512}


def field(number, payload):
    """A length-delimited field of a protobuf message."""
    return varint(number << 3 | 2) + varint(len(payload)) + payload


def varint(value):
    out = b""
    while value > 127:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


def raw_picture(width, height, rgb8):
    """The field `raw` of an image."""
    return field(
        2,
        varint(1 << 3)
        + varint(width)
        + varint(2 << 3)
        + varint(height)
        + field(3, rgb8),
    )


def request(fresh):
    """A Score request of pictures that were never sent before."""
    pixels = os.urandom(8) * (SIDE * SIDE * 3 // 8)
    items = b""
    for n in range(PICTURES):
        rgb8 = struct.pack("<QQ", fresh, n) + pixels[16:]
        items += field(2, field(2, raw_picture(SIDE, SIDE, rgb8)))
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
    "1000 watches a connection": (watches, 12, "grpc"),
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
    "all of these on the gRPC port": (None, 12, "grpc"),
}


# A mix of all that strangers do on the gRPC port.
STRANGERS = [watches, checks, one_watch, wrong_tokens]


def png(side):
    """A picture of one colour, in few bytes."""

    def chunk(name, content):
        return (
            len(content).to_bytes(4, "big")
            + name
            + content
            + zlib.crc32(name + content).to_bytes(4, "big")
        )

    pixels = zlib.compressobj(1)
    rows = b"".join(pixels.compress(bytes(1 + 3 * side)) for _ in range(side))
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", rows + pixels.flush())
        + chunk(b"IEND", b"")
    )


def packed_item():
    """A message of a stream, 12 MB unpacked."""
    side = 2000
    picture = field(2, raw_picture(side, side, bytes(3 * side * side)))
    packed = gzip.compress(
        field(1, b"x") + field(2, field(1, b"a cup") + picture), compresslevel=6
    )
    return b"\1" + len(packed).to_bytes(4, "big") + packed


def idle_streams(ports, address, message, stopped):
    """Streams that send one message, of few bytes packed and many unpacked, and then say nothing more."""
    head = literal(b"grpc-encoding", b"gzip")
    parts = [message[at : at + 16_000] for at in range(0, len(message), 16_000)]
    with socket.socket() as connection:
        connection.bind((address, 0))
        connection.connect(("127.0.0.1", ports["grpc"]))
        connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0))
        for stream in range(1, 12, 2):
            connection.sendall(call(stream, SCORING + "ScoreStream", head))
            for part in parts:
                connection.sendall(frame(0, 0, stream, part))
        stopped.wait()


def large_values(ports, address, body, stopped):
    """Four at once, again and again, that send a large value where there is to be a list."""
    while address in ADDRESSES[:4] and not stopped.is_set():
        connection = http.client.HTTPConnection(
            "127.0.0.1", ports["http"], timeout=60, source_address=(address, 0)
        )
        with contextlib.closing(connection), contextlib.suppress(OSError):
            connection.request(
                "POST", "/score", body, {"Content-Type": "application/json"}
            )
            connection.getresponse().read()


def large_pictures(ports, address, message, stopped):
    """Eight at once, again and again, that send a large picture in few bytes."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    with grpc.insecure_channel(f"127.0.0.1:{ports['grpc']}", options) as channel:
        while address in ADDRESSES[:8] and not stopped.is_set():
            with contextlib.suppress(grpc.RpcError):
                channel.unary_unary(SCORING + "Score")(message, timeout=30)


CALLERS = {
    # What is made once, what each address does with it, and the MiB that it may cost at most.
    "idle streams of gzip": (packed_item, idle_streams, 456),
    "HTTP values of 60 MiB, 4 at once": (
        lambda: b'{"requests": "' + b"x" * (60 * MIB) + b'"}',
        large_values,
        400,
    ),
    "pictures of 49 megapixels, 8 at once": (
        lambda: field(1, b"a cup") + field(2, field(2, field(1, png(7000)))),
        large_pictures,
        612,
    ),
}


class Calls:
    """A thread for each address that does what a caller may, until it is stopped."""

    def __init__(self, make, act, ports):
        self.stopped, self.connections = threading.Event(), len(ADDRESSES)
        payload = make()
        self.threads = [
            threading.Thread(target=act, args=(ports, address, payload, self.stopped))
            for address in ADDRESSES
        ]
        for thread in self.threads:
            thread.start()

    def stop(self):
        self.stopped.set()
        for thread in self.threads:
            thread.join()


class Attack:
    """Connections that are held, and made again where they end, until it is stopped."""

    def __init__(self, make, each, port):
        payloads = [make()] if make else [of() for of in STRANGERS]
        self.port, self.stopped, self.connections = port, threading.Event(), 0
        slots = [
            (address, payloads[n % len(payloads)])
            for address in ADDRESSES
            for n in range(each)
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

    def connect(self, address, payload):
        connection = socket.socket()
        try:
            connection.bind((address, 0))
            connection.settimeout(0.2)
            connection.connect(("127.0.0.1", self.port))
            self.connections += 1
            connection.sendall(payload)
        except OSError:
            # What it could not send all of it holds as it is.
            pass
        return connection

    def stop(self):
        self.stopped.set()
        for thread in self.threads:
            thread.join()


class Group:
    """A memory control group, of either version."""

    PLACES = {
        Path("/sys/fs/cgroup/memory"): "memory.limit_in_bytes",
        Path("/sys/fs/cgroup"): "memory.max",
    }

    def __init__(self, path, limit_file, limit):
        self.path = path
        path.mkdir()
        try:
            # What is no file of the system's is not made either.
            with open(path / limit_file, "r+") as file:
                file.write(str(limit * MIB))
        except OSError:
            path.rmdir()
            raise

    @classmethod
    def make(cls, limit, name):
        """`None` where this system lets none be made."""
        for place, limit_file in cls.PLACES.items():
            with contextlib.suppress(OSError):
                path = place / f"spatialscore-attack-{os.getpid()}-{name}"
                return cls(path, limit_file, limit)
        return None

    def enter(self):
        (self.path / "cgroup.procs").write_text("0")

    def remove(self):
        for _ in range(50):
            with contextlib.suppress(OSError):
                return self.path.rmdir()
            time.sleep(0.1)


class Server:
    """A server, its ports found in its log, and its memory bounded and watched."""

    def __init__(self, binary, limit, folder, name, tokens=True):
        self.group = Group.make(limit, name)
        file = Path(folder) / "tokens"
        file.write_text(f"holder:{TOKEN}\n")
        arguments = [
            "serve",
            "--listen=127.0.0.1:0",
            "--http=127.0.0.1:0",
            "--metrics-listen=127.0.0.1:0",
        ]
        arguments += ["--device=cpu", "--log-format=json"]
        arguments += ["--tokens-file", str(file)] if tokens else []
        for setting, mebibytes in BUDGETS.items():
            arguments.append(f"--set=limits.{setting}={mebibytes * MIB}")
        self.process = subprocess.Popen(
            [binary, *arguments],
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=self.group and self.group.enter,
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
            if not self.group and self.peak > self.limit:
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
        if self.group:
            self.group.remove()


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


def measure(server, attacking, seconds):
    """The holder's figures at `server` beside an attack that has begun."""
    time.sleep(1)
    holder = Holder(server)
    time.sleep(seconds)
    figures = holder.stop()
    attacking.stop()
    return figures


def rested(server, before):
    """The memory once it is what was promised, or after a rest."""
    for _ in range(REST):
        time.sleep(1)
        if server.memory() <= before * GOALS["memory"]:
            break
    return server.memory()


def line(name, survived, failed, kept, ready, memory, connections, broken):
    print(
        f"{name:37} {survived:8} {failed:>6} {kept:>6} {ready:>9}  {memory:26} {connections:>11}  {broken}",
        flush=True,
    )


def run(arguments, name, attack):
    """One attack, its line, and whether all that is promised was kept."""
    callers = name in CALLERS
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as servers:
        # Fresh ones for each: what one attack leaves is not the next one's.
        names = ["attacked"] if callers else ["attacked", "other"]
        attacked, other = [
            Server(arguments.binary, arguments.limit_mib, folder, name, not callers)
            for name in names
        ] + [None] * callers
        for server in filter(None, (attacked, other)):
            servers.callback(server.end)
        holder = Holder(attacked)
        time.sleep(2)
        beside, _, _ = holder.stop()
        if not callers:
            make, each, port = attack
            attacking = Attack(make, each, other.ports[port])
            beside, _, _ = measure(attacked, attacking, arguments.seconds)
        before = attacked.memory()
        if callers:
            make, act, most = attack
            attacking = Calls(make, act, attacked.ports)
        else:
            most = arguments.limit_mib - before
            attacking = Attack(make, each, attacked.ports[port])
        rate, failed, ready = measure(attacked, attacking, arguments.seconds)
        after, survived = rested(attacked, before), attacked.survived()
        peak = attacked.peak
    kept = rate / beside if beside else 0
    broken = [
        word
        for word, promise in (
            ("survival", survived),
            ("calls", not failed),
            ("rate", callers or kept >= GOALS["rate"]),
            ("readiness", ready <= GOALS["readiness"]),
            ("peak", peak <= before + most),
            ("memory afterwards", after <= before * GOALS["memory"]),
        )
        if not promise
    ]
    line(
        name,
        "yes" if survived else "NO",
        failed,
        "-" if callers else f"{kept:.0%}",
        f"{ready:.2f} s",
        f"{before} / {peak} of {before + most} / {after}",
        attacking.connections,
        ", ".join(broken),
    )
    return not broken


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("binary")
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--only", default="")
    parser.add_argument("--limit-mib", type=int, default=1024)
    arguments = parser.parse_args()
    probe = Group.make(arguments.limit_mib, "probe")
    if probe:
        probe.remove()
    how = "a memory control group" if probe else "a watcher of resident memory"
    print(f"each server is bounded by {how} of {arguments.limit_mib} MiB")
    line(
        "attack",
        "survived",
        "failed",
        "kept",
        "readiness",
        "MiB before/most/after",
        "connections",
        "broken",
    )
    line(
        "promised",
        "yes",
        "0",
        f"{GOALS['rate']:.0%}",
        f"{GOALS['readiness']:.2f} s",
        f"- / - / {GOALS['memory']} x before",
        "",
        "",
    )
    attacks = {**ATTACKS, **CALLERS}
    kept = [
        run(arguments, name, attack)
        for name, attack in attacks.items()
        if arguments.only in name
    ]
    sys.exit(not all(kept))


if __name__ == "__main__":
    main()
