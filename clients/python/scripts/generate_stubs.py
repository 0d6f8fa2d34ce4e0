#!/usr/bin/env python3
"""Makes the client's message classes from the contract: run by `make client-stubs`.

    generate_stubs.py            writes src/spatialscore_client/_proto
    generate_stubs.py --check    fails where what stands there is not what would be written

protoc's own Python output is not used: it refuses to load under a protobuf older than the one that made it, and it
registers its files for the whole process, where they clash with every other package that brings google/rpc. What is
written instead is the contract's descriptors, built into classes in a pool of their own, and protoc's type stubs.
"""

import base64
import re
import sys
import tempfile
from pathlib import Path

import grpc_tools
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from grpc_tools import protoc

CLIENT = Path(__file__).resolve().parent.parent
CONTRACT = CLIENT.parent.parent / "proto"
TARGET = CLIENT / "src/spatialscore_client/_proto"
# The contract's files, and the module of ours that each becomes.
MODULES = {
    "google/rpc/status.proto": "status",
    "spatialscore/v1/spatialscore.proto": "spatialscore",
    "spatialscore/v1/admin.proto": "admin",
    "error_details.proto": "error_details",
}
HEADER = "# Made by `make client-stubs` from the contract. Do not edit.\n"


def compile_protos(directory: Path) -> FileDescriptorSet:
    """Runs protoc: type stubs into `directory`, and the descriptors of all files with their imports."""
    well_known = Path(grpc_tools.__file__).parent / "_proto"
    descriptors = directory / "descriptors.binpb"
    includes = [f"-I{CONTRACT}", f"-I{CLIENT / 'proto'}", f"-I{well_known}"]
    outputs = [f"--pyi_out={directory}", f"--descriptor_set_out={descriptors}", "--include_imports"]
    if protoc.main(["protoc", *includes, *outputs, *MODULES]) != 0:
        sys.exit("protoc failed")
    return FileDescriptorSet.FromString(descriptors.read_bytes())


def literal(data: bytes, width: int = 100) -> str:
    """Bytes as lines of base64, in Python source."""
    text = base64.b64encode(data).decode()
    return "\n".join(f'    "{text[start : start + width]}"' for start in range(0, len(text), width))


def stub(text: str) -> str:
    """protoc's type stub, with its imports of our modules made relative."""
    for path, module in MODULES.items():
        package, _, name = path.removesuffix(".proto").rpartition("/")
        package = package.replace("/", ".")
        text = re.sub(rf"^from {package} import {name}_pb2 as", f"from . import {module} as", text, flags=re.M)
    # What mypy --strict wants to know.
    return HEADER + text.replace("_Mapping]", "_Mapping[str, object]]")


def generate() -> dict[str, str]:
    """The files of `_proto`, by name."""
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        descriptors = compile_protos(directory)
        files = {
            f"{module}.pyi": stub((directory / path).with_name(Path(path).stem + "_pb2.pyi").read_text())
            for path, module in MODULES.items()
        }
    data = literal(descriptors.SerializeToString(deterministic=True))
    files["descriptors.py"] = (
        f'{HEADER}"""The contract\'s files, serialised."""\n\nDESCRIPTORS = (\n{data}\n)  # base64\n'
    )
    for path, module in MODULES.items():
        files[f"{module}.py"] = (
            f'{HEADER}"""The messages of {path}."""\n\n'
            f'from .pool import messages\n\nglobals().update(messages("{path}"))\n'
        )
    return files


def main() -> None:
    files = generate()
    if sys.argv[1:] == ["--check"]:
        there = {path.name: path.read_text() for path in TARGET.glob("*.py*") if path.read_text().startswith(HEADER)}
        stale = sorted(name for name in files.keys() | there.keys() if files.get(name) != there.get(name))
        if stale:
            sys.exit(f"not what the contract makes: {', '.join(stale)}; run `make client-stubs`")
        return
    for name, text in files.items():
        (TARGET / name).write_text(text)


if __name__ == "__main__":
    main()
