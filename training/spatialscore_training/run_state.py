"""What a run keeps of itself: what it is, how far it came, and the checkpoints that can be served.

    OUT/run.json                        what the run is made of; another recipe, seed or data is refused
    OUT/state/step-00000100/            what trains, the optimiser and the best checkpoint so far; the last two
    OUT/checkpoints/step-00000250/      what the server reads
    OUT/last, OUT/best                  links to two of these, within OUT
    OUT/metrics.jsonl                   the learning curve, and each validation
"""

import json
import os
import pickle
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

from torch import distributed
from torch.distributed import checkpoint
from torch.distributed.checkpoint import CheckpointException

from .files import Refusal, beside, part_of, remove, write_text

# What it warns of is a run of one process, which is as it should be.
warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)

PROGRESS = "progress.json"
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

    def save(self, step: int, best: list | None, state: dict, leads: bool, wait: Callable[[], None]) -> None:
        """Writes a state. Every process takes part and writes what it holds; one of them leads; `wait` waits for all."""
        path = self._state(step)
        with beside(path) if leads else nullcontext(part_of(path)) as part:
            wait()
            checkpoint.save(state, checkpoint_id=part, no_dist=not distributed.is_initialized())
            if leads:
                (part / PROGRESS).write_text(json.dumps({"step": step, "best": best}))
        if leads:
            for old in self._states()[:-KEPT]:
                remove(old)
        wait()

    def begun(self) -> bool:
        return bool(self._states())

    def load(self, state: dict) -> dict:
        """Reads the newest state that can be read into the tensors of `state`; tells its step and the best checkpoint."""
        for path in reversed(self._states()):
            try:
                checkpoint.load(state, checkpoint_id=path, no_dist=not distributed.is_initialized())
                return json.loads((path / PROGRESS).read_text())
            except (CheckpointException, pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError) as error:
                print(f"{path} cannot be read ({str(error).splitlines()[0]}); going back to the one before", file=sys.stderr)
        raise Refusal(f"{self.states}: no state can be read; to begin anew, remove it")

    def _states(self) -> list[Path]:
        return sorted(path for path in self.states.glob("step-*") if not path.suffix)

    def _state(self, step: int) -> Path:
        return self.states / f"step-{step:08}"

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
