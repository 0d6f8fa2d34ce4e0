#!/usr/bin/env python3
"""Hold the crates of a manifest to deny.toml: licences, banned crates, wildcards, sources.

    deny.py MANIFEST…

cargo-deny does the same and more, and is used where it is installed. It is a large build of its own, so
else this reads the keys of deny.toml that `cargo metadata` can answer. Advisories need a database from the network
and are cargo-deny's alone.
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    from pip._vendor import tomli as tomllib

POLICY = Path(__file__).resolve().parent.parent / "deny.toml"


def permitted(expression: str, allowed: set[str]) -> bool:
    """Whether an SPDX expression can be met by the allowed licences alone.

    >>> permitted("MIT OR GPL-3.0-only", {"MIT"}), permitted("MIT AND GPL-3.0-only", {"MIT"})
    (True, False)
    >>> permitted("MIT/Apache-2.0", {"Apache-2.0"}), permitted("(MIT OR GPL-2.0) AND Zlib", {"MIT"})
    (True, False)
    >>> permitted("Apache-2.0 WITH LLVM-exception", {"Apache-2.0"}), permitted("", {"MIT"})
    (False, False)
    """
    words = re.findall(r"[()]|[^\s()]+", expression.replace("/", " OR ")) + [""]

    def either() -> bool:
        met = both()
        while words[0] == "OR":
            words.pop(0)
            met = both() or met
        return met

    def both() -> bool:
        met = one()
        while words[0] == "AND":
            words.pop(0)
            met = one() and met
        return met

    def one() -> bool:
        word = words.pop(0)
        if word == "(":
            met = either()
            return words.pop(0) == ")" and met
        if words[0] == "WITH":
            word = " ".join((word, words.pop(0), words.pop(0)))
        return word in allowed

    return bool(expression) and either() and words == [""]


def faults(manifest: str, policy: dict) -> list[str]:
    target = policy["graph"]["targets"][0]
    command = ["cargo", "metadata", "--format-version=1", "--locked", f"--filter-platform={target}"]
    metadata = json.loads(subprocess.check_output([*command, "--manifest-path", manifest]))
    used = {node["id"] for node in metadata["resolve"]["nodes"]}
    licences, bans, sources = policy["licenses"], policy["bans"], policy["sources"]
    exceptions = {entry["crate"]: set(entry["allow"]) for entry in licences["exceptions"]}
    banned = {entry["crate"]: entry["reason"] for entry in bans["deny"]}
    registries = {f"registry+{url}" for url in sources["allow-registry"]}
    found = []
    for package in (package for package in metadata["packages"] if package["id"] in used):
        name = f"{package['name']} {package['version']}"
        if package["source"] is None:
            wild = [d["name"] for d in package["dependencies"] if d["req"] == "*" and d["source"] is not None]
            found += [f"{name}: wants any version of {crate}" for crate in wild]
            continue
        if package["source"] not in registries:
            found.append(f"{name}: comes from {package['source']}")
        if package["name"] in banned:
            found.append(f"{name}: is banned: {banned[package['name']]}")
        allowed = set(licences["allow"]) | exceptions.get(package["name"], set())
        if not permitted(package["license"] or "", allowed):
            found.append(f"{name}: its licence is {package['license'] or 'a file'}, which deny.toml does not allow")
    return found


def main() -> None:
    manifests = sys.argv[1:] or sys.exit(__doc__)
    if shutil.which("cargo-deny"):
        for manifest in manifests:
            checks = ["licenses", "bans", "sources"]
            command = ["cargo", "deny", "--manifest-path", manifest, "--locked", "check", "--config", POLICY, *checks]
            subprocess.run(command, check=True)
        return
    policy = tomllib.loads(POLICY.read_text())
    found = sorted({fault for manifest in manifests for fault in faults(manifest, policy)})
    sys.exit("\n".join(found) or None)


if __name__ == "__main__":
    main()
