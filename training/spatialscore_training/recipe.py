"""Recipes of reward models that are made of a Qwen-VL: data, not code. `recipes/` has those that ship."""

import tomllib
from dataclasses import asdict, dataclass, fields
from importlib.resources import files
from pathlib import Path
from types import UnionType
from typing import Literal, get_args, get_origin

from .files import Refusal
from .tokenizer import REWARD_TOKEN

Positions = Literal["mrope", "flat"]
Schedule = Literal["constant", "cosine"]
Trains = Literal["lora", "all"]


@dataclass(frozen=True)
class Recipe:
    """How a reward model is trained."""

    base: str
    """A hub id or a folder."""
    instruction: str
    """The text of the user turn behind the picture; `{prompt}` stands for the prompt."""
    trains: Trains
    """`lora`: adapters on `targets`; `all`: decoder, vision tower and merger. The head, and of the table of embeddings the
    reward token's row, are trained by either."""
    pixels: int
    """Of every picture."""
    positions: Positions
    """`mrope`: the multimodal grid; `flat`: 0, 1, 2, … on all axes, as where `inputs_embeds` alone are passed."""
    head: tuple[int, ...]
    """Hidden widths of the head; the last layer gives mean and logarithm of sigma."""
    rate: float
    """The greatest learning rate of AdamW."""
    epochs: int
    pairs: int
    """On a device at a time."""
    accumulate: int
    """Such batches to a step."""
    save_every: int
    evaluate_every: int
    """Steps between states to go on from, and between checkpoints that are validated and can be served."""
    head_dropout: float = 0.0
    """Behind the head's first activation; above 0 it takes a slot of its own, as in HPSv3's keys."""
    head_rate: float | None = None
    token_rate: float | None = None
    vision_rate: float | None = None
    """Rates of their own; absent, `rate`."""
    schedule: Schedule = "constant"
    """Behind the warm-up."""
    warmup: float = 0.0
    """As a share of the steps."""
    weight_decay: float = 0.0
    clip: float = 1.0
    """The greatest norm of a step's gradient."""
    draws: int = 1000
    """Of z for each pair."""
    gaussian: bool = True
    """False: plain Bradley-Terry on the means; sigma is not trained."""
    confidence: float = 0.0
    """Pairs of which people were less sure are left out."""
    pictures: int = 1
    """Of an item, the judged one last; 2: pairs have a `source`."""
    rank: int = 0
    alpha: int = 0
    dropout: float = 0.0
    targets: str = ""
    """Of the adapters; `targets` is a regular expression over modules."""
    gradient_checkpointing: bool = False
    """Computes activations again in the backward pass in place of holding them."""
    attention: str = "sdpa"
    """transformers' name of it, such as `flash_attention_2`."""

    def __post_init__(self) -> None:
        at_least = {"pixels": 28 * 28, "epochs": 1, "pairs": 1, "accumulate": 1, "save_every": 1, "evaluate_every": 1, "draws": 1, "pictures": 1}
        if self.trains == "lora":
            at_least |= {"rank": 1, "alpha": 1}
        faults = [f"{name} must be at least {least}, not {getattr(self, name)}" for name, least in at_least.items() if getattr(self, name) < least]
        shares = ("head_dropout", "dropout", "warmup", "confidence")
        faults += [f"{name} must be from 0 to 1, not {getattr(self, name)}" for name in shares if not 0 <= getattr(self, name) <= 1]
        rates = ("rate", "head_rate", "token_rate", "vision_rate", "clip")
        faults += [f"{name} must be above 0, not {rate}" for name in rates if (rate := getattr(self, name)) is not None and not rate > 0]
        if self.weight_decay < 0:
            faults.append(f"weight_decay must be at least 0, not {self.weight_decay}")
        if any(width < 1 for width in self.head):
            faults.append(f"head must be widths of at least 1, not {list(self.head)}")
        if self.pictures > 2:
            faults.append(f"pictures must be 1 or 2, not {self.pictures}")
        for word in ("{prompt}", REWARD_TOKEN):
            if self.instruction.count(word) != 1:
                faults.append(f"instruction must have {word} once")
        if self.instruction.find(REWARD_TOKEN) < self.instruction.find("{prompt}"):
            faults.append(f"instruction must have {REWARD_TOKEN} behind {{prompt}}, which it could not see else")
        if self.trains == "lora" and not self.targets:
            faults.append("targets must say where the adapters go")
        if faults:
            raise Refusal("recipe: " + "; ".join(faults))


def names() -> list[str]:
    """The recipes that ship."""
    return sorted(path.name.removesuffix(".toml") for path in (files(__package__) / "recipes").iterdir() if path.name.endswith(".toml"))


def _fits(value: object, kind: object) -> bool:
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if isinstance(kind, UnionType):
        return any(_fits(value, option) for option in get_args(kind))
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if get_origin(kind) is tuple:
        return isinstance(value, (list, tuple)) and all(_fits(part, int) for part in value)
    return value is None if kind is type(None) else isinstance(value, kind)


def new_recipe(told: dict, source: str) -> Recipe:
    """A recipe of what a file says. What is unknown, missing or of another kind is refused."""
    kinds = {field.name: field for field in fields(Recipe)}
    if unknown := sorted(told.keys() - kinds.keys()):
        raise Refusal(f"{source}: unknown {', '.join(unknown)}; there are {', '.join(kinds)}")
    for name, value in told.items():
        if not _fits(value, kinds[name].type):
            raise Refusal(f"{source}: {name} = {value!r}: it must be {getattr(kinds[name].type, '__name__', kinds[name].type)}")
    try:
        return Recipe(**{name: tuple(value) if isinstance(value, list) else value for name, value in told.items()})
    except TypeError as error:
        raise Refusal(f"{source}: {str(error).removeprefix('Recipe.__init__() ')}") from error


def read_recipe(name: str, changes: dict | None = None) -> Recipe:
    """A recipe that ships, by its name, or a file; `changes` stand in place of what it says."""
    ours = files(__package__) / "recipes" / f"{name}.toml"
    if not ours.is_file() and not Path(name).is_file():
        raise Refusal(f"{name} is no recipe that ships ({', '.join(names())}), and no file")
    text = ours.read_text() if ours.is_file() else Path(name).read_text()
    try:
        return new_recipe(tomllib.loads(text) | (changes or {}), name)
    except tomllib.TOMLDecodeError as error:
        raise Refusal(f"{name}: {error}") from error


def told(recipe: Recipe) -> dict:
    """A recipe as JSON has it."""
    return asdict(recipe) | {"head": list(recipe.head)}
