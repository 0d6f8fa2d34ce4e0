"""What the Dockerfile's last stage makes, without a daemon, and run as a cluster runs it. Root, on a Debian.

    image.py FOLDER    the image's root goes to FOLDER, and is kept for a second run

The stage's own lines are followed: its base from Debian's packages by mmdebstrap, what it copies from the build stage out of
this tree, where `make build` has put the same files. Then it is started as a user that it has never heard of, as process 1, on
a root file system that cannot be written, with nothing but /tmp beside it; asked for scores; and stopped by SIGTERM, also
before it serves.
"""

import atexit
import contextlib
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ROOT / ".cache/image"
BINARY = ROOT / "target/release/spatialscore"
# As OpenShift does: any user, in root's group.
USER = "1000870000:0"
# How long anything may take here.
LIMIT = 120


def last_stage():
    """The lines of the last stage: instructions and what follows them."""
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line.split(maxsplit=1) for line in text.splitlines() if line and not line.startswith("#")]
    begin = max(n for n, (word, _) in enumerate(lines) if word == "FROM")
    return lines[begin:]


def chroot(image, *command, **more):
    return subprocess.run(["chroot", image, *command], check=True, **more)


def build(image):
    """Follows the stage. Returns the environment, the user, and the command."""
    environment = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/"}
    user, entry, command = None, [], []
    fresh = not image.exists()
    made = image.with_name(image.name + ".partial") if fresh else image
    for word, rest in last_stage():
        match word:
            case "FROM" if fresh:
                shutil.rmtree(made, ignore_errors=True)
                suite = rest.split()[0].removeprefix("debian:").removesuffix("-slim")
                subprocess.run([ROOT / "scripts/debian.sh", "mmdebstrap", TOOLS, "mmdebstrap"], check=True)
                subprocess.run([TOOLS / "mmdebstrap", "--mode=root", "--variant=minbase", suite, made], check=True)
                shutil.copy("/etc/resolv.conf", made / "etc/resolv.conf")
            case "RUN" if fresh:
                # Without services that a package would start.
                chroot(made, "/bin/sh", "-c", rest, env=environment | {"DEBIAN_FRONTEND": "noninteractive"})
            case "COPY":
                _, source, target = rest.split()
                source, target = ROOT / Path(source).relative_to("/src"), made / target.lstrip("/")
                if source.is_dir() and fresh:
                    shutil.copytree(source, target)
                elif source.is_file():
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.unlink(missing_ok=True)
                    shutil.copy2(source, target)
            case "ENV":
                environment |= dict(part.split("=", 1) for part in shlex.split(rest))
            case "USER":
                user = rest
            case "ENTRYPOINT":
                entry = json.loads(rest)
            case "CMD":
                command = json.loads(rest)
            case "FROM" | "RUN" | "EXPOSE" | "STOPSIGNAL":
                pass
            case _:
                sys.exit(f"image.py does not know {word}")
    made.rename(image)
    return environment, user, entry, command


class Container:
    """A process 1 in namespaces of its own, on the machine's network."""

    def __init__(self, image, user, environment, command):
        setting = [f"{name}={value}" for name, value in environment.items()]
        # Mounts are of this namespace alone, and go with it.
        script = (
            'set -e; mount --bind "$1" "$1"; mount -t proc proc "$1/proc"; mount --rbind /dev "$1/dev"; '
            'mount -t sysfs -o ro sys "$1/sys"; mount -t tmpfs tmp "$1/tmp"; mount -o remount,bind,ro "$1"; '
            'user=$2; image=$1; shift 2; exec chroot --userspec="$user" --groups= "$image" "$@"'
        )
        namespaces = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--propagation", "private"]
        started = [*namespaces, "sh", "-c", script, "sh", image, user, "/usr/bin/env", "-i", *setting, *command]
        self.outside = subprocess.Popen(list(map(str, started)), stderr=subprocess.PIPE, text=True)
        # Whatever comes of this, nothing is left behind: what dies with process 1 is all that there is.
        atexit.register(self.kill)

    def children(self):
        """What was started, as the machine counts."""
        with contextlib.suppress(OSError):
            return list(map(int, Path(f"/proc/{self.outside.pid}/task/{self.outside.pid}/children").read_text().split()))
        return []

    def kill(self):
        for child in self.children():
            os.kill(child, signal.SIGKILL)

    def inside(self):
        """What is process 1 in there, as the machine counts, once the program has taken its place."""
        end = time.monotonic() + LIMIT
        while time.monotonic() < end:
            for child in self.children():
                with contextlib.suppress(OSError):
                    if Path(f"/proc/{child}/comm").read_text().strip() == "spatialscore":
                        return child
            time.sleep(0.001)
        sys.exit("the program was not started")

    def stop(self):
        """Sends SIGTERM, and gives the exit code and what was logged."""
        os.kill(self.inside(), signal.SIGTERM)
        _, log = self.outside.communicate(timeout=LIMIT)
        return self.outside.returncode, log


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def score(port):
    command = [BINARY, "score", "--server", f"127.0.0.1:{port}", "--wait", "60", "--format", "json"]
    command += ["--prompt", "a panda is partly hidden by an umbrella", ROOT / "samples/panda.right.png"]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True, timeout=LIMIT).stdout)


def main():
    image = Path(sys.argv[1]).resolve()
    environment, user, entry, command = build(image)
    users = chroot(image, "id", "-u", user, capture_output=True, text=True).stdout.strip()
    expected = None
    for who in (f"{users}:{users}", USER):
        port, metrics = free_port(), free_port()
        addresses = {
            "SPATIALSCORE__SERVER__LISTEN": f"127.0.0.1:{port}", "SPATIALSCORE__METRICS__LISTEN": f"127.0.0.1:{metrics}"
        }  # fmt: skip
        container = Container(image, who, environment | addresses, [*entry, *command])
        answer = score(port)
        status = Path(f"/proc/{container.inside()}/status").read_text()
        seen = {line.split(":")[0]: line.split()[1:] for line in status.splitlines()}
        assert seen["NSpid"][-1] == "1", "it is not process 1"
        assert seen["Uid"][0] == who.split(":")[0], seen["Uid"]
        mounts = Path(f"/proc/{container.inside()}/mounts").read_text().splitlines()
        root = next(line.split()[3] for line in mounts if line.split()[1] == "/")
        assert root.split(",")[0] == "ro", f"its root is {root}"
        code, log = container.stop()
        assert code == 0, f"{code}: {log}"
        assert expected in (None, answer["mean"]), "not the same score"
        expected = answer["mean"]
        print(f"as {who}: {answer['mean']:.4f}, stopped by SIGTERM with 0", flush=True)
    # A signal before it serves.
    for wait in (0, 0.05, 0.2, 0.5):
        container = Container(image, USER, environment, [*entry, *command])
        container.inside()
        time.sleep(wait)
        code, log = container.stop()
        assert code == 0, f"SIGTERM after {wait} s: {code}: {log}"
    print("stopped by SIGTERM before it serves, four times, with 0")


if __name__ == "__main__":
    main()
