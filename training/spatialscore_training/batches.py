"""Batches for the trainer, drawn as they are needed; the step's number is the seed, so a run resumes where it was.

Many prompts are asked of one picture in one sequence: the conversation up to the prompt, then each prompt with its own
reward token. A prompt sees what stands before all of them and itself, in the positions that it would have alone. So the
sequence computes exactly what as many separate ones would, and the picture is looked at once.
"""

import random
from collections import Counter, defaultdict
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import Dataset

from .drawings import Drawings
from .model import CELL
from .pairs import Question, new_duels, new_questions
from .scenes import Scene, World, draw
from .tokenizer import BEFORE, BEHIND
from .truth import Cells, cells, depth

NOWHERE = [(float("nan"), float("nan"))] * 3


@dataclass
class Batch:
    """B pictures with P prompts each, T tokens to a sequence, G × G visual tokens to a picture."""

    pictures: Tensor
    """[B, side, side, 3] uint8; empty where the stage does without."""
    kind: Tensor
    extras: Tensor
    front: Tensor
    boxes: Tensor
    behind: Tensor
    order: Tensor
    shade: Tensor
    """[B, G*G], [B, G*G, extras]; [B, G*G, 4] and more: `truth.Cells`."""
    ids: Tensor
    positions: Tensor
    """[B, T], [3, B, T]."""
    spans: Tensor
    """[B * P, L]: the tokens of each prompt, numbered through all rows; -1 behind its end."""
    reward: Tensor
    kept: Tensor
    """[B, P]: where each prompt's reward is read, and whether the picture keeps the prompt."""
    clauses: Tensor
    clause_kept: Tensor
    things: Tensor
    """[C, 2] row and token at which a clause is over, [C] whether it holds, [C, 3, 2] where the things are that it is
    about: x and y from -1 to 1; not a number behind the last."""
    mentions: Tensor
    places: Tensor
    fronts: Tensor
    there: Tensor
    """[M, 2] row and token of a name, [M, 2] where its thing is: x and y from -1 to 1; [M] whether it lies over another
    thing (1), under one (-1) or touches none (0). Not a number where no thing or more than one has the name; [M] how many
    have."""
    duel: bool
    """Whether rows 2i and 2i + 1 are a picture and its twin under the same prompts."""

    def to(self, device) -> "Batch":
        moved = {f.name: value.to(device) for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)}
        return Batch(**moved, duel=self.duel)


@dataclass(frozen=True)
class Frame:
    """The tokens before every prompt: ids and positions, with the picture's."""

    ids: np.ndarray
    positions: np.ndarray
    next_position: int


def frame(tokenizer: Tokenizer, grid: int) -> Frame:
    """As the chat template renders it and `get_rope_index` numbers it, for a picture of `grid` × `grid` visual tokens."""
    ids = tokenizer.encode(BEFORE).ids
    pad = tokenizer.token_to_id("<|image_pad|>")
    at = ids.index(pad)
    rows, columns = np.divmod(np.arange(grid * grid), grid)
    text = np.arange(len(ids) - 1)
    text = np.tile(np.where(text < at, text, text + grid), (3, 1))
    image = at + np.stack([np.zeros_like(rows), rows, columns])
    positions = np.concatenate([text[:, :at], image, text[:, at:]], axis=1)
    return Frame(np.array(ids[:at] + [pad] * (grid * grid) + ids[at + 1 :]), positions, len(ids) - 1 + grid)


class Lessons(Dataset):
    """Batch number `step` of a stage."""

    def __init__(self, world: World, side: int, rows: int, prompts: int, duel: bool, drawn: bool, tokenizer: Tokenizer, drawings: Path, seed: str):
        self.world, self.side, self.rows, self.prompts, self.duel, self.drawn = world, side, rows, prompts, duel, drawn
        self.tokenizer, self.seed = tokenizer, seed
        self.drawings = Drawings(drawings, world.words, world.styles)
        self.index = {word: i for i, word in enumerate(world.words)}
        self.frame = frame(tokenizer, side // CELL)

    def __len__(self) -> int:
        return 1 << 40

    def __getitem__(self, step: int) -> Batch:
        rng = random.Random(f"{self.seed}:{step}")
        new = new_duels if self.duel else new_questions
        rows: list[tuple[Scene, list[Question], int]] = []
        while len(rows) < self.rows:
            scenes, questions = new(rng, self.world, self.drawings, self.prompts)
            rows += [(scene, questions, i) for i, scene in enumerate(scenes)]
        return self._batch(rows)

    def _batch(self, rows: list[tuple[Scene, list[Question], int]]) -> Batch:
        seen = [cells(scene, self.side // CELL, self.index, self.drawings) for scene, _, _ in rows]
        drawn = [np.asarray(draw(scene, self.side, self.drawings)) for scene, _, _ in rows] if self.drawn else []
        texts = [f" {question.prompt.text}{BEHIND}" for _, questions, _ in rows for question in questions]
        encoded = iter(self.tokenizer.encode_batch(texts))
        tokens = [[next(encoded) for _ in questions] for _, questions, _ in rows]
        before = len(self.frame.ids)
        length = before + max(sum(len(e.ids) for e in row) for row in tokens)
        ids = np.full((len(rows), length), self.tokenizer.token_to_id("<|endoftext|>"))
        positions = np.zeros((3, len(rows), length), np.int64)
        ids[:, :before], positions[:, :, :before] = self.frame.ids, self.frame.positions[:, None]
        spans = np.full((len(texts), max((len(e.ids) for row in tokens for e in row), default=0)), -1)
        reward, kept, clauses, clause_kept, things, mentions, places, fronts, there = [], [], [], [], [], [], [], [], []
        for row, (scene, questions, which) in enumerate(rows):
            count = Counter(thing.kind for thing in scene.things if thing.there)
            one = [(i, thing) for i, thing in enumerate(scene.things) if thing.there and count[thing.kind] == 1]
            front = defaultdict(lambda: NOWHERE[0][0], {thing.kind: depth(scene.things, i) for i, thing in one})
            where = defaultdict(lambda: NOWHERE[0], {thing.kind: (2 * thing.x - 1, 2 * thing.y - 1) for _, thing in one})
            start = before
            for number, (question, tokenized) in enumerate(zip(questions, tokens[row]), len(reward)):
                end = start + len(tokenized.ids)
                ids[row, start:end] = tokenized.ids
                spans[number, : end - start] = row * length + np.arange(start, end)
                positions[:, row, start:end] = self.frame.next_position + np.arange(end - start)
                # The space before the prompt shifts its characters by one.
                ends_at = {stop - 1: start + i for i, (_, stop) in enumerate(tokenized.offsets)}
                truths = question.truths[which]
                reward.append(end - 1)
                kept.append(all(truths))
                # A clause is over at the sign behind it.
                clauses += [(row, ends_at[stop] + 1) for stop in question.prompt.ends]
                clause_kept += truths
                things += [[*(where[kind] for kind in clause.about), *NOWHERE][:3] for clause in question.prompt.clauses]
                mentions += [(row, ends_at[mention.end]) for mention in question.prompt.mentions]
                places += [where[mention.kind] for mention in question.prompt.mentions]
                fronts += [front[mention.kind] for mention in question.prompt.mentions]
                there += [count[mention.kind] for mention in question.prompt.mentions]
                start = end
        shape = (len(rows), self.prompts)
        return Batch(
            pictures=torch.from_numpy(np.stack(drawn)) if self.drawn else torch.empty(0, dtype=torch.uint8),
            **{name: torch.from_numpy(np.stack([getattr(c, name) for c in seen])) for name in Cells._fields},
            ids=torch.from_numpy(ids),
            positions=torch.from_numpy(positions),
            spans=torch.from_numpy(spans),
            reward=torch.tensor(reward).view(shape),
            kept=torch.tensor(kept).view(shape),
            clauses=torch.tensor(clauses),
            clause_kept=torch.tensor(clause_kept),
            things=torch.tensor(things),
            mentions=torch.tensor(mentions),
            places=torch.tensor(places),
            fronts=torch.tensor(fronts),
            there=torch.tensor(there),
            duel=self.duel,
        )
