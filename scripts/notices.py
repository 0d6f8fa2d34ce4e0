#!/usr/bin/env python3
"""Write the licences of the crates that the binary is made of: they ask that their texts go along with it.

    notices.py FILE

Reads what `cargo metadata` finds, so the crates must have been fetched. Texts that are the same stand once.
"""

import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("licen", "copying", "notice", "copyright", "unlicense")


def linked(metadata: dict) -> list[dict]:
    """The packages that the binary is made of, itself left out: no tests' and no build scripts' ones."""
    nodes = {node["id"]: node for node in metadata["resolve"]["nodes"]}
    root = metadata["resolve"]["root"]
    found, ahead = set(), [root]
    while ahead:
        here = ahead.pop()
        if here in found:
            continue
        found.add(here)
        ahead += [d["pkg"] for d in nodes[here]["deps"] if any(kind["kind"] is None for kind in d["dep_kinds"])]
    packages = [package for package in metadata["packages"] if package["id"] in found - {root}]
    return sorted(packages, key=lambda package: (package["name"], package["version"]))


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    command = ["cargo", "metadata", "--format-version=1", "--locked", "--filter-platform=x86_64-unknown-linux-gnu"]
    texts: dict[str, list[str]] = defaultdict(list)
    lines = ["The binary is made of these crates, each under a licence of its own. Their texts follow.", ""]
    for package in linked(json.loads(subprocess.check_output(command, cwd=ROOT))):
        name = f"{package['name']} {package['version']}"
        lines.append(f"{name}: {package['license'] or package['license_file']}; {package['repository'] or 'crates.io'}")
        for file in sorted(Path(package["manifest_path"]).parent.iterdir()):
            if file.name.lower().startswith(NAMES) and file.is_file():
                texts[file.read_text(errors="replace").strip()].append(f"{name}, {file.name}")
    for text, owners in texts.items():
        lines += ["", "=" * 80, *owners, "=" * 80, "", text]
    Path(sys.argv[1]).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
