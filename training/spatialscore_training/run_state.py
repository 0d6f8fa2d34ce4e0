"""What a run keeps of itself: what it is, how far it came, and the checkpoints that can be served.

    OUT/run.json                        what the run is made of; another recipe, seed or data is refused
    OUT/state/step-00000100.pt          what trains, the optimiser and the best checkpoint so far; the last two
    OUT/checkpoints/step-00000250/      what the server reads
    OUT/last, OUT/best                  links to two of these, within OUT
    OUT/metrics.jsonl                   the learning curve, and each validation
"""

import json
import os
import sys
from pathlib import Path

import torch

from .files import Refusal, beside, remove, write_text

KEPT = 2
"""States: the one before the last is gone back to where the last cannot be read."""


class RunFolder:
    """A run on disk. Whatever is written is whole or not there, whenever the process dies."""

    def __init__(self, out: Path):
        self.out = out
        self.states, self.checkpoints = out / "state", out / "checkpoints"

    def check(self, run: dict) -> None:
        """Refuses a folder that is another run's, or no run's."""
        said_in = self.out / "run.json"
        if not said_in.exists():
            if self.out.exists() and any(self.out.iterdir()):
                raise Refusal(f"{self.out} is not empty and has no run.json, so it is no run to go on with; name a new folder")
            return
        flat = lambda run: {f"{key}.{inner}" if inner else key: v for key, value in run.items() for inner, v in (value.items() if isinstance(value, dict) else [("", value)])}
        then, now = flat(json.loads(said_in.read_text())), flat(run)
        if differing := sorted(key for key in then.keys() | now.keys() if then.get(key) != now.get(key)):
            told = "; ".join(f"{key} was {then.get(key)}, is now {now.get(key)}" for key in differing)
            raise Refusal(f"{self.out} holds another run: {told}. Name a new folder, or --init {self.out / 'last'} for a second stage")

    def claim(self, run: dict) -> None:
        """Makes a new folder this run's."""
        if not (self.out / "run.json").exists():
            write_text(self.out / "run.json", json.dumps(run, indent=1) + "\n")

    def save(self, step: int, state: dict) -> None:
        with beside(self._state(step)) as part:
            torch.save(state | {"step": step}, part)
        for old in sorted(self.states.glob("step-*.pt"))[:-KEPT]:
            remove(old)

    def load(self) -> dict | None:
        """The newest state that can be read."""
        for path in sorted(self.states.glob("step-*.pt"), reverse=True):
            try:
                return torch.load(path, map_location="cpu", weights_only=True)
            except (RuntimeError, OSError, EOFError, ValueError) as error:
                print(f"{path} cannot be read ({error}); going back to the one before", file=sys.stderr)
        return None

    def _state(self, step: int) -> Path:
        return self.states / f"step-{step:08}.pt"

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:08}"

    def point(self, best: int | None, last: int) -> None:
        """Names the best and the last checkpoint, and drops those that are neither."""
        for name, step in (("last", last), ("best", best)):
            if step is not None:
                link = self.out / f"{name}.part"
                link.unlink(missing_ok=True)
                link.symlink_to(os.path.relpath(self.checkpoint(step), self.out))
                link.replace(self.out / name)
        for folder in self.checkpoints.iterdir():
            if folder not in [self.checkpoint(step) for step in (best, last) if step is not None]:
                remove(folder)

    def note(self, entry: dict) -> None:
        with (self.out / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(entry) + "\n")

    def forget_after(self, step: int) -> None:
        """Drops what was noted of steps that will be taken again."""
        path = self.out / "metrics.jsonl"
        if path.exists():
            whole = [line for line in path.read_text().splitlines() if line.endswith("}")]
            write_text(path, "".join(f"{line}\n" for line in whole if json.loads(line)["step"] <= step))
