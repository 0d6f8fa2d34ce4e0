"""The client of SpatialScore, the reward server for RL training of text-to-image models.

    from spatialscore_client import SpatialScoreClient

    client = SpatialScoreClient("scorer:50051")
    scores = client.score("a cup to the left of a book", images)
    scores.means

What a call cannot score raises; see `errors`. numpy, Pillow and torch are accepted where the caller has them, and
never imported where not.
"""

from .admin import AdminClient
from .aio import AsyncSpatialScoreClient
from .client import SpatialScoreClient
from .errors import (
    AuthenticationError,
    BusyError,
    CallError,
    ConfigurationError,
    DeadlineExceededError,
    InvalidRequestError,
    ItemFailure,
    ItemsFailedError,
    ModelMismatchError,
    ServerFaultError,
    SpatialScoreError,
    UnavailableError,
)
from .explain import Change, Dropped, Explanation, Turned
from .plan import Question
from .rewards import Selection, rank, top_k_bottom_k, win_probability
from .scores import Columns, Component, Limits, ModelInfo, Receipt, Score, Scores, StreamedScore, StreamedScores
from .settings import TLS

__version__ = "0.1.0"

__all__ = [
    "TLS",
    "AdminClient",
    "AsyncSpatialScoreClient",
    "AuthenticationError",
    "BusyError",
    "CallError",
    "Change",
    "Columns",
    "Component",
    "ConfigurationError",
    "DeadlineExceededError",
    "Dropped",
    "Explanation",
    "InvalidRequestError",
    "ItemFailure",
    "ItemsFailedError",
    "Limits",
    "ModelInfo",
    "ModelMismatchError",
    "Question",
    "Receipt",
    "Score",
    "Scores",
    "Selection",
    "ServerFaultError",
    "SpatialScoreClient",
    "SpatialScoreError",
    "StreamedScore",
    "StreamedScores",
    "Turned",
    "UnavailableError",
    "rank",
    "top_k_bottom_k",
    "win_probability",
]
