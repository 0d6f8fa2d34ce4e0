"""What is sent: a call's items as requests that keep the server's limits, in order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ._proto import spatialscore as pb
from .errors import ItemFailure, ItemsFailedError
from .images import Codec, Encoded, Picture, PictureError, Pictures, Source, source, sources
from .scores import Limits, check_weights
from .settings import Priority

# A request of ours at most. Smaller than what a server takes: several small ones overlap and spread over replicas.
_MAX_ITEMS = 64
_MAX_BYTES = 32 << 20
# What a message has around its pictures and prompts, per item.
_OVERHEAD = 64


@dataclass(frozen=True)
class Question:
    """A question about a picture, for models that read the probability of answers."""

    text: str
    """Stands where the prompt goes."""
    answers: Sequence[str] = ()
    """The answers whose probability is read, each by its first token; none: the profile's, as a rule forms of Yes."""


Questions = Sequence[str | Question]
"""Questions about one picture, which is read once for all of them."""


@dataclass(frozen=True)
class Item:
    """One picture and its prompt, and what belongs to it."""

    prompt: str
    source: Source
    references: tuple[Source, ...] = ()
    questions: tuple[Question, ...] = ()

    def encode(self, codec: Codec) -> Encodings:
        """Its pictures as they are sent. Raises PictureError."""
        return Encodings(self.source.encode(codec), tuple(each.encode(codec) for each in self.references))


@dataclass(frozen=True)
class Encodings:
    """The pictures of one item as they are sent."""

    judged: Encoded
    references: tuple[Encoded, ...]

    @property
    def size(self) -> int:
        """Bytes of all of them."""
        return len(self.judged.data) + sum(len(each.data) for each in self.references)


@dataclass(frozen=True)
class Batch:
    """Consecutive items that go in one request."""

    start: int
    """The place of the first of them in the call."""
    request: pb.ScoreRequest


def items(
    prompts: str | Sequence[str] | None,
    images: Pictures,
    references: Sequence[Sequence[Picture]] | None = None,
    questions: Questions | Sequence[Questions] | None = None,
) -> list[Item]:
    """The items of a call.

    Raises TypeError or ValueError where they do not fit each other, and ItemsFailedError with every picture that
    is not of a form we send.
    """
    found = sources(images)
    if prompts is None:
        if questions is None:
            raise TypeError("prompts is None; only questions need no prompt")
        prompts = ""
    texts = [prompts] * len(found) if isinstance(prompts, str) else list(prompts)
    asked = _questions(questions, len(found))
    if len(texts) != len(found):
        raise ValueError(f"{len(texts)} prompts for {len(found)} images")
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"prompt {index} is a {type(text).__name__}, not a str")
    failures = [refusal(index, str(fault)) for index, fault in enumerate(found) if isinstance(fault, PictureError)]
    failures += [
        refusal(index, "the prompt is not valid Unicode") for index, text in enumerate(texts) if _broken(text)
    ]
    before, refused = _references(references, len(found))
    failures += refused
    if failures:
        raise ItemsFailedError(failures, [None] * len(found))
    parts = zip(texts, found, before, asked, strict=True)
    return [Item(text, judged, refs, qs) for text, judged, refs, qs in parts if isinstance(judged, Source)]


def _references(
    references: Sequence[Sequence[Picture]] | None, count: int
) -> tuple[list[tuple[Source, ...]], list[ItemFailure]]:
    """The pictures before each item's own, and those that cannot be sent."""
    if references is None:
        return [()] * count, []
    if len(references) != count:
        raise ValueError(f"{len(references)} lists of references for {count} images")
    before: list[tuple[Source, ...]] = []
    failures = []
    for index, pictures in enumerate(references):
        if isinstance(pictures, (str, bytes, dict)):
            raise TypeError(
                f"references {index} is a {type(pictures).__name__}; give a list of pictures for each image"
            )
        try:
            before.append(tuple(source(picture) for picture in pictures))
        except PictureError as error:
            before.append(())
            failures.append(refusal(index, f"a reference: {error}"))
    return before, failures


def _questions(questions: Questions | Sequence[Questions] | None, count: int) -> list[tuple[Question, ...]]:
    """The questions of each item: the same for all, or a list for each."""
    if questions is None:
        return [()] * count
    if isinstance(questions, str):
        raise TypeError("questions is a str; give a list of questions, or one for each image")
    if all(isinstance(each, (str, Question)) for each in questions):
        return [tuple(map(_question, questions))] * count
    if len(questions) != count:
        raise ValueError(f"{len(questions)} lists of questions for {count} images")
    return [tuple(map(_question, each)) for each in questions]  # type: ignore[arg-type]


def _question(question: object) -> Question:
    if isinstance(question, Question):
        return question
    if isinstance(question, str):
        return Question(question)
    raise TypeError(f"a question is a {type(question).__name__}, not a str or a Question")


def write(message: pb.ScoreItem, item: Item, pictures: Encodings) -> None:
    """Writes all of an item but its prompt."""
    pictures.judged.write(message.image)
    for each in pictures.references:
        each.write(message.references.add())
    for question in item.questions:
        message.questions.add(text=question.text, answers=list(question.answers))


def _text_size(item: Item) -> int:
    texts = [text for question in item.questions for text in (question.text, *question.answers)]
    return sum(len(text.encode()) + 8 for text in texts)


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


def names(models: Sequence[str] | None, weights: Mapping[str, float] | None) -> list[str] | None:
    """The models that a call names; None where it names none. Raises TypeError or ValueError."""
    if models is None:
        return None if weights is None else list(check_weights(weights, list(weights)))
    if isinstance(models, str):
        raise TypeError(f"models is a str; give a list of names, such as [{models!r}]")
    found = list(models)
    if not found:
        raise ValueError("models is empty; leave it out for the default one")
    for name in found:
        if not isinstance(name, str) or not name:
            raise TypeError(f"models has {name!r}, which is no name")
        if found.count(name) > 1:
            raise ValueError(f"models has {name!r} twice")
    if weights is not None:
        check_weights(weights, found)
    return found


def batches(
    wanted: Sequence[Item], limits: Limits, codec: Codec, priority: Priority, models: Sequence[str] | None = None
) -> Iterator[Batch]:
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

    def begin() -> pb.ScoreRequest:
        named = list(models or ())
        # What judged it must be who was asked: an older server knows nothing of names, and answers all the same.
        return pb.ScoreRequest(prompt=shared, priority=wire(priority), models=named, wants_receipts=bool(named))

    start, request, size = 0, begin(), base
    for index, item in enumerate(wanted):
        try:
            pictures = item.encode(codec)
        except PictureError as error:
            raise ItemsFailedError([refusal(index, str(error))], [None] * len(wanted)) from error
        bytes_more = pictures.size + _text_size(item) + _OVERHEAD * (1 + len(item.references))
        bytes_more += 0 if shared is not None else len(item.prompt.encode())
        if base + bytes_more > limits.max_message_bytes:
            text = f"takes {base + bytes_more} bytes; the server takes messages of {limits.max_message_bytes}"
            raise ItemsFailedError([refusal(index, text)], [None] * len(wanted))
        if request.items and (len(request.items) == most_items or size + bytes_more > most_bytes):
            yield Batch(start, request)
            start, request, size = index, begin(), base
        message = request.items.add()
        if shared is None:
            message.prompt = item.prompt
        write(message, item, pictures)
        size += bytes_more
    yield Batch(start, request)
