# Made by `make client-stubs` from the contract. Do not edit.
from . import spatialscore as _spatialscore_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ModelSource(_message.Message):
    __slots__ = ("name", "checkpoint", "revision", "profile", "device", "dtype")
    NAME_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    PROFILE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    name: str
    checkpoint: str
    revision: str
    profile: str
    device: str
    dtype: str
    def __init__(self, name: _Optional[str] = ..., checkpoint: _Optional[str] = ..., revision: _Optional[str] = ..., profile: _Optional[str] = ..., device: _Optional[str] = ..., dtype: _Optional[str] = ...) -> None: ...

class LoadModelRequest(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: ModelSource
    def __init__(self, model: _Optional[_Union[ModelSource, _Mapping[str, object]]] = ...) -> None: ...

class LoadModelResponse(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: _spatialscore_pb2.GetModelResponse
    def __init__(self, model: _Optional[_Union[_spatialscore_pb2.GetModelResponse, _Mapping[str, object]]] = ...) -> None: ...

class ReplaceModelRequest(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: ModelSource
    def __init__(self, model: _Optional[_Union[ModelSource, _Mapping[str, object]]] = ...) -> None: ...

class ReplaceModelResponse(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: _spatialscore_pb2.GetModelResponse
    def __init__(self, model: _Optional[_Union[_spatialscore_pb2.GetModelResponse, _Mapping[str, object]]] = ...) -> None: ...

class UnloadModelRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class UnloadModelResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SleepModelRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class SleepModelResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WakeModelRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class WakeModelResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DescribeModelsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DescribeModelsResponse(_message.Message):
    __slots__ = ("models",)
    MODELS_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[_spatialscore_pb2.GetModelResponse]
    def __init__(self, models: _Optional[_Iterable[_Union[_spatialscore_pb2.GetModelResponse, _Mapping[str, object]]]] = ...) -> None: ...
