"""Classes for the contract's messages, in a descriptor pool of their own.

In the pool that a process shares, a second file called `google/rpc/status.proto` fails to load, and trainers bring one
with googleapis-common-protos, opentelemetry or ray.
"""

from base64 import b64decode
from typing import Any

from google.protobuf.descriptor_pb2 import FileDescriptorSet
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass

from .descriptors import DESCRIPTORS

_POOL = DescriptorPool()
for _file in FileDescriptorSet.FromString(b64decode(DESCRIPTORS)).file:
    _POOL.AddSerializedFile(_file.SerializeToString())


def messages(path: str) -> dict[str, Any]:
    """The message classes and the enum values of one file of the contract, by name."""
    file = _POOL.FindFileByName(path)
    found: dict[str, Any] = {name: GetMessageClass(message) for name, message in file.message_types_by_name.items()}
    for enum in file.enum_types_by_name.values():
        found.update({value.name: value.number for value in enum.values})
    return found
