# Made by `make client-stubs` from the contract. Do not edit.
import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from . import status as _status_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Priority(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PRIORITY_UNSPECIFIED: _ClassVar[Priority]
    PRIORITY_TRAINING: _ClassVar[Priority]
    PRIORITY_EVALUATION: _ClassVar[Priority]

class ModelState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    MODEL_STATE_UNSPECIFIED: _ClassVar[ModelState]
    MODEL_STATE_SERVING: _ClassVar[ModelState]
    MODEL_STATE_ASLEEP: _ClassVar[ModelState]
    MODEL_STATE_WAKING: _ClassVar[ModelState]
    MODEL_STATE_FAILED: _ClassVar[ModelState]

class RewardOutput(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    REWARD_OUTPUT_UNSPECIFIED: _ClassVar[RewardOutput]
    REWARD_OUTPUT_GAUSSIAN: _ClassVar[RewardOutput]
    REWARD_OUTPUT_SCALAR: _ClassVar[RewardOutput]
    REWARD_OUTPUT_PROBABILITY: _ClassVar[RewardOutput]
PRIORITY_UNSPECIFIED: Priority
PRIORITY_TRAINING: Priority
PRIORITY_EVALUATION: Priority
MODEL_STATE_UNSPECIFIED: ModelState
MODEL_STATE_SERVING: ModelState
MODEL_STATE_ASLEEP: ModelState
MODEL_STATE_WAKING: ModelState
MODEL_STATE_FAILED: ModelState
REWARD_OUTPUT_UNSPECIFIED: RewardOutput
REWARD_OUTPUT_GAUSSIAN: RewardOutput
REWARD_OUTPUT_SCALAR: RewardOutput
REWARD_OUTPUT_PROBABILITY: RewardOutput

class Image(_message.Message):
    __slots__ = ("encoded", "raw")
    ENCODED_FIELD_NUMBER: _ClassVar[int]
    RAW_FIELD_NUMBER: _ClassVar[int]
    encoded: bytes
    raw: RawImage
    def __init__(self, encoded: _Optional[bytes] = ..., raw: _Optional[_Union[RawImage, _Mapping[str, object]]] = ...) -> None: ...

class RawImage(_message.Message):
    __slots__ = ("width", "height", "rgb8")
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    RGB8_FIELD_NUMBER: _ClassVar[int]
    width: int
    height: int
    rgb8: bytes
    def __init__(self, width: _Optional[int] = ..., height: _Optional[int] = ..., rgb8: _Optional[bytes] = ...) -> None: ...

class ScoreItem(_message.Message):
    __slots__ = ("prompt", "image", "references", "questions")
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    REFERENCES_FIELD_NUMBER: _ClassVar[int]
    QUESTIONS_FIELD_NUMBER: _ClassVar[int]
    prompt: str
    image: Image
    references: _containers.RepeatedCompositeFieldContainer[Image]
    questions: _containers.RepeatedCompositeFieldContainer[Question]
    def __init__(self, prompt: _Optional[str] = ..., image: _Optional[_Union[Image, _Mapping[str, object]]] = ..., references: _Optional[_Iterable[_Union[Image, _Mapping[str, object]]]] = ..., questions: _Optional[_Iterable[_Union[Question, _Mapping[str, object]]]] = ...) -> None: ...

class Question(_message.Message):
    __slots__ = ("text", "answers")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    ANSWERS_FIELD_NUMBER: _ClassVar[int]
    text: str
    answers: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, text: _Optional[str] = ..., answers: _Optional[_Iterable[str]] = ...) -> None: ...

class ScoreRequest(_message.Message):
    __slots__ = ("prompt", "items", "priority", "models", "wants_receipts")
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    WANTS_RECEIPTS_FIELD_NUMBER: _ClassVar[int]
    prompt: str
    items: _containers.RepeatedCompositeFieldContainer[ScoreItem]
    priority: Priority
    models: _containers.RepeatedScalarFieldContainer[str]
    wants_receipts: bool
    def __init__(self, prompt: _Optional[str] = ..., items: _Optional[_Iterable[_Union[ScoreItem, _Mapping[str, object]]]] = ..., priority: _Optional[_Union[Priority, str]] = ..., models: _Optional[_Iterable[str]] = ..., wants_receipts: _Optional[bool] = ...) -> None: ...

class Score(_message.Message):
    __slots__ = ("mean", "stddev", "components")
    MEAN_FIELD_NUMBER: _ClassVar[int]
    STDDEV_FIELD_NUMBER: _ClassVar[int]
    COMPONENTS_FIELD_NUMBER: _ClassVar[int]
    mean: float
    stddev: float
    components: _containers.RepeatedCompositeFieldContainer[Component]
    def __init__(self, mean: _Optional[float] = ..., stddev: _Optional[float] = ..., components: _Optional[_Iterable[_Union[Component, _Mapping[str, object]]]] = ...) -> None: ...

class Component(_message.Message):
    __slots__ = ("name", "mean", "stddev")
    NAME_FIELD_NUMBER: _ClassVar[int]
    MEAN_FIELD_NUMBER: _ClassVar[int]
    STDDEV_FIELD_NUMBER: _ClassVar[int]
    name: str
    mean: float
    stddev: float
    def __init__(self, name: _Optional[str] = ..., mean: _Optional[float] = ..., stddev: _Optional[float] = ...) -> None: ...

class ScoreResult(_message.Message):
    __slots__ = ("score", "error", "outcomes")
    SCORE_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    OUTCOMES_FIELD_NUMBER: _ClassVar[int]
    score: Score
    error: _status_pb2.Status
    outcomes: _containers.RepeatedCompositeFieldContainer[ModelOutcome]
    def __init__(self, score: _Optional[_Union[Score, _Mapping[str, object]]] = ..., error: _Optional[_Union[_status_pb2.Status, _Mapping[str, object]]] = ..., outcomes: _Optional[_Iterable[_Union[ModelOutcome, _Mapping[str, object]]]] = ...) -> None: ...

class ModelOutcome(_message.Message):
    __slots__ = ("model", "score", "error")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    model: str
    score: Score
    error: _status_pb2.Status
    def __init__(self, model: _Optional[str] = ..., score: _Optional[_Union[Score, _Mapping[str, object]]] = ..., error: _Optional[_Union[_status_pb2.Status, _Mapping[str, object]]] = ...) -> None: ...

class Receipt(_message.Message):
    __slots__ = ("model", "revision", "profile_digest", "dtype", "server_version")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    PROFILE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SERVER_VERSION_FIELD_NUMBER: _ClassVar[int]
    model: str
    revision: str
    profile_digest: str
    dtype: str
    server_version: str
    def __init__(self, model: _Optional[str] = ..., revision: _Optional[str] = ..., profile_digest: _Optional[str] = ..., dtype: _Optional[str] = ..., server_version: _Optional[str] = ...) -> None: ...

class Timings(_message.Message):
    __slots__ = ("preprocess", "queue", "inference")
    PREPROCESS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_FIELD_NUMBER: _ClassVar[int]
    INFERENCE_FIELD_NUMBER: _ClassVar[int]
    preprocess: _duration_pb2.Duration
    queue: _duration_pb2.Duration
    inference: _duration_pb2.Duration
    def __init__(self, preprocess: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping[str, object]]] = ..., queue: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping[str, object]]] = ..., inference: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping[str, object]]] = ...) -> None: ...

class ScoreResponse(_message.Message):
    __slots__ = ("results", "timings", "receipts")
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    RECEIPTS_FIELD_NUMBER: _ClassVar[int]
    results: _containers.RepeatedCompositeFieldContainer[ScoreResult]
    timings: Timings
    receipts: _containers.RepeatedCompositeFieldContainer[Receipt]
    def __init__(self, results: _Optional[_Iterable[_Union[ScoreResult, _Mapping[str, object]]]] = ..., timings: _Optional[_Union[Timings, _Mapping[str, object]]] = ..., receipts: _Optional[_Iterable[_Union[Receipt, _Mapping[str, object]]]] = ...) -> None: ...

class ScoreStreamRequest(_message.Message):
    __slots__ = ("id", "item", "priority", "models", "wants_receipts")
    ID_FIELD_NUMBER: _ClassVar[int]
    ITEM_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    WANTS_RECEIPTS_FIELD_NUMBER: _ClassVar[int]
    id: str
    item: ScoreItem
    priority: Priority
    models: _containers.RepeatedScalarFieldContainer[str]
    wants_receipts: bool
    def __init__(self, id: _Optional[str] = ..., item: _Optional[_Union[ScoreItem, _Mapping[str, object]]] = ..., priority: _Optional[_Union[Priority, str]] = ..., models: _Optional[_Iterable[str]] = ..., wants_receipts: _Optional[bool] = ...) -> None: ...

class ScoreStreamResponse(_message.Message):
    __slots__ = ("id", "result", "timings", "receipts")
    ID_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    RECEIPTS_FIELD_NUMBER: _ClassVar[int]
    id: str
    result: ScoreResult
    timings: Timings
    receipts: _containers.RepeatedCompositeFieldContainer[Receipt]
    def __init__(self, id: _Optional[str] = ..., result: _Optional[_Union[ScoreResult, _Mapping[str, object]]] = ..., timings: _Optional[_Union[Timings, _Mapping[str, object]]] = ..., receipts: _Optional[_Iterable[_Union[Receipt, _Mapping[str, object]]]] = ...) -> None: ...

class GetModelRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class ListModelsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListModelsResponse(_message.Message):
    __slots__ = ("models",)
    MODELS_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[GetModelResponse]
    def __init__(self, models: _Optional[_Iterable[_Union[GetModelResponse, _Mapping[str, object]]]] = ...) -> None: ...

class Limits(_message.Message):
    __slots__ = ("max_items_per_request", "max_message_bytes", "max_prompt_bytes", "max_image_pixels", "max_item_tokens", "max_prompt_tokens", "max_image_bytes", "max_calls_per_caller", "max_questions_per_item")
    MAX_ITEMS_PER_REQUEST_FIELD_NUMBER: _ClassVar[int]
    MAX_MESSAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_PROMPT_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_IMAGE_PIXELS_FIELD_NUMBER: _ClassVar[int]
    MAX_ITEM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_IMAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_CALLS_PER_CALLER_FIELD_NUMBER: _ClassVar[int]
    MAX_QUESTIONS_PER_ITEM_FIELD_NUMBER: _ClassVar[int]
    max_items_per_request: int
    max_message_bytes: int
    max_prompt_bytes: int
    max_image_pixels: int
    max_item_tokens: int
    max_prompt_tokens: int
    max_image_bytes: int
    max_calls_per_caller: int
    max_questions_per_item: int
    def __init__(self, max_items_per_request: _Optional[int] = ..., max_message_bytes: _Optional[int] = ..., max_prompt_bytes: _Optional[int] = ..., max_image_pixels: _Optional[int] = ..., max_item_tokens: _Optional[int] = ..., max_prompt_tokens: _Optional[int] = ..., max_image_bytes: _Optional[int] = ..., max_calls_per_caller: _Optional[int] = ..., max_questions_per_item: _Optional[int] = ...) -> None: ...

class GetModelResponse(_message.Message):
    __slots__ = ("name", "architecture", "revision", "dtype", "devices", "output", "notice", "server_version", "limits", "profile", "pictures", "components", "takes_questions", "checkpoint", "profile_digest", "state", "weight_bytes", "forward_bytes")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ARCHITECTURE_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_FIELD_NUMBER: _ClassVar[int]
    NOTICE_FIELD_NUMBER: _ClassVar[int]
    SERVER_VERSION_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    PROFILE_FIELD_NUMBER: _ClassVar[int]
    PICTURES_FIELD_NUMBER: _ClassVar[int]
    COMPONENTS_FIELD_NUMBER: _ClassVar[int]
    TAKES_QUESTIONS_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    PROFILE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_BYTES_FIELD_NUMBER: _ClassVar[int]
    FORWARD_BYTES_FIELD_NUMBER: _ClassVar[int]
    name: str
    architecture: str
    revision: str
    dtype: str
    devices: _containers.RepeatedScalarFieldContainer[str]
    output: RewardOutput
    notice: str
    server_version: str
    limits: Limits
    profile: str
    pictures: int
    components: _containers.RepeatedScalarFieldContainer[str]
    takes_questions: bool
    checkpoint: str
    profile_digest: str
    state: ModelState
    weight_bytes: int
    forward_bytes: int
    def __init__(self, name: _Optional[str] = ..., architecture: _Optional[str] = ..., revision: _Optional[str] = ..., dtype: _Optional[str] = ..., devices: _Optional[_Iterable[str]] = ..., output: _Optional[_Union[RewardOutput, str]] = ..., notice: _Optional[str] = ..., server_version: _Optional[str] = ..., limits: _Optional[_Union[Limits, _Mapping[str, object]]] = ..., profile: _Optional[str] = ..., pictures: _Optional[int] = ..., components: _Optional[_Iterable[str]] = ..., takes_questions: _Optional[bool] = ..., checkpoint: _Optional[str] = ..., profile_digest: _Optional[str] = ..., state: _Optional[_Union[ModelState, str]] = ..., weight_bytes: _Optional[int] = ..., forward_bytes: _Optional[int] = ...) -> None: ...
