"""What is sent: a call's items as requests that keep the server's limits, in order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ._proto import spatialscore as pb
from .errors import ItemFailure, ItemsFailedError
from .images import Codec, PictureError, Pictures, Source, sources
from .scores import Limits
from .settings import Priority

# A request of ours at most. Smaller than what a server takes: several small ones overlap and spread over replicas.
_MAX_ITEMS = 64
_MAX_BYTES = 32 << 20
# What a message has around its pictures and prompts, per item.
_OVERHEAD = 64


@dataclass(frozen=True)
class Item:
    """One picture and its prompt."""

    prompt: str
    source: Source


@dataclass(frozen=True)
class Batch:
    """Consecutive items that go in one request."""

    start: int
    """The place of the first of them in the call."""
    request: pb.ScoreRequest


def items(prompts: str | Sequence[str], images: Pictures) -> list[Item]:
    """The items of a call.

    Raises TypeError or ValueError where prompts and images do not fit each other, and ItemsFailedError with every
    picture that is not of a form we send.
    """
    found = sources(images)
    texts = [prompts] * len(found) if isinstance(prompts, str) else list(prompts)
    if len(texts) != len(found):
        raise ValueError(f"{len(texts)} prompts for {len(found)} images")
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"prompt {index} is a {type(text).__name__}, not a str")
    failures = [refusal(index, str(fault)) for index, fault in enumerate(found) if isinstance(fault, PictureError)]
    failures += [
        refusal(index, "the prompt is not valid Unicode") for index, text in enumerate(texts) if _broken(text)
    ]
    if failures:
        raise ItemsFailedError(failures, [None] * len(found))
    return [Item(text, source) for text, source in zip(texts, found, strict=True) if isinstance(source, Source)]


def _broken(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def refusal(index: int, message: str) -> ItemFailure:
    """An item that is refused before it is sent."""
    return ItemFailure(index, "INVALID_ARGUMENT", message)


def check(index: int, item: Item, limits: Limits) -> ItemFailure | None:
    """What the server would refuse, where that can be told without the picture's bytes."""
    size = len(item.prompt.encode())
    if size > limits.max_prompt_bytes:
        return refusal(index, f"the prompt has {size} bytes; the server takes {limits.max_prompt_bytes}")
    if item.source.size and item.source.size[0] * item.source.size[1] > limits.max_image_pixels:
        width, height = item.source.size
        return refusal(index, f"the picture has {width}x{height} pixels; the server takes {limits.max_image_pixels}")
    return None


def wire(priority: Priority) -> str:
    """A priority as the contract names it."""
    return f"PRIORITY_{priority.upper()}"


def batches(wanted: Sequence[Item], limits: Limits, codec: Codec, priority: Priority) -> Iterator[Batch]:
    """The requests of a call. A picture's bytes are made when its request is, so that those of a large call are never
    there all at once.

    Raises ItemsFailedError with the items that the server's limits exclude, before anything is sent where that is
    known without their bytes.
    """
    failures = [failure for index, item in enumerate(wanted) if (failure := check(index, item, limits))]
    if failures:
        raise ItemsFailedError(failures, [None] * len(wanted))
    shared = wanted[0].prompt if len({item.prompt for item in wanted}) == 1 else None
    most_items = min(limits.max_items_per_request, _MAX_ITEMS)
    most_bytes = min(limits.max_message_bytes, _MAX_BYTES)
    base = len((shared or "").encode()) + _OVERHEAD
    urgency = wire(priority)
    start, request, size = 0, pb.ScoreRequest(prompt=shared, priority=urgency), base
    for index, item in enumerate(wanted):
        try:
            picture = item.source.encode(codec)
        except PictureError as error:
            raise ItemsFailedError([refusal(index, str(error))], [None] * len(wanted)) from error
        bytes_more = len(picture.data) + (0 if shared is not None else len(item.prompt.encode())) + _OVERHEAD
        if base + bytes_more > limits.max_message_bytes:
            text = f"takes {base + bytes_more} bytes; the server takes messages of {limits.max_message_bytes}"
            raise ItemsFailedError([refusal(index, text)], [None] * len(wanted))
        if request.items and (len(request.items) == most_items or size + bytes_more > most_bytes):
            yield Batch(start, request)
            start, request, size = index, pb.ScoreRequest(prompt=shared, priority=urgency), base
        message = request.items.add()
        if shared is None:
            message.prompt = item.prompt
        picture.write(message.image)
        size += bytes_more
    yield Batch(start, request)
