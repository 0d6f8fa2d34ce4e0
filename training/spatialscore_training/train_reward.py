"""Trains a reward model on pairs: a Qwen-VL with a head that gives a Gaussian, by a recipe.

    spatialscore-train-reward pairs out --validation held-out      the paper's recipe, as far as it is told
    spatialscore-train-reward pairs out --recipe hpsv3             HPSv3's; `editreward`: EditReward's; or a file of yours
    accelerate launch -m spatialscore_training.train_reward …      several devices, several hosts; --shard splits the model
    spatialscore-train-reward more out2 --init out/best            a second stage, with adapter and head of the first
    spatialscore-train-reward pairs out --base FOLDER --set pixels=12544 --steps 8    a try on a small base

PAIRS is a data set of `spatialreward-data`, or your own: a file or a folder with prompt, chosen, rejected and, where there
are any, confidence, tie and source, in one of the forms that training/README.md names. The server reads OUT/best and
OUT/last, of which each evaluation writes one. A run that was stopped, however it was, goes on with the same command and ends
with the bits of one that was not.
"""

import argparse
import os
import random
import time
import tomllib
from collections.abc import Iterator
from contextlib import nullcontext
from functools import lru_cache
from importlib.util import find_spec
from math import ceil, cos, isfinite, pi
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from .calibration import judge
from .files import Refusal, beside, command, keep_apart
from .losses import gaussian_bradley_terry
from .pair_files import check_pictures, pairs_digest, read_pairs
from .preprocessing import Item, Preprocessor
from .recipe import Recipe, names, read_recipe, told
from .reward_model import RewardModel, base_of, check_init, checkpoint_digest, export, find, new_model, shard, whole_weights
from .run_state import RunFolder

PARALLEL = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


class Share(NamedTuple):
    """What a process does at once: the pairs, by number, each with its weight in the step's loss."""

    step: int
    number: int
    """Of the step's shares."""
    pairs: tuple[tuple[int, float], ...]
    ends_step: bool


class Plan:
    """Which pairs a step takes. An epoch visits all of them, in an order of its own."""

    def __init__(self, count: int, size: int, seed: int):
        self.count, self.size, self.seed = count, size, seed
        self.an_epoch = ceil(count / size)

        self._order = lru_cache(maxsize=1)(self._shuffled)

    def _shuffled(self, epoch: int) -> list[int]:
        order = list(range(self.count))
        random.Random(f"{self.seed}:{epoch}").shuffle(order)
        return order

    def step(self, step: int) -> list[int]:
        epoch, part = divmod(step, self.an_epoch)
        return self._order(epoch)[part * self.size : (part + 1) * self.size]

    def shares(self, first: int, end: int, records: list[dict], process: int, processes: int, at_once: int) -> Iterator[Share]:
        """This process's part of these steps. The last step of an epoch may have fewer pairs; each counts alike in it."""
        for step in range(first, end):
            # Of like length, so that little is padded.
            pairs = sorted(self.step(step), key=lambda i: (len(records[i]["prompt"]), i))
            weighted = [(i, processes / len(pairs)) for i in pairs]
            # Every process has as many, lest one wait for ever: some count nothing.
            weighted += [(pairs[0], 0.0)] * (-len(pairs) % processes)
            mine = weighted[process::processes]
            for start in range(0, len(mine), at_once):
                yield Share(step, start // at_once, tuple(mine[start : start + at_once]), start + at_once >= len(mine))


def items(records: list[dict]) -> list[Item]:
    """The better pictures of these pairs, then the worse ones."""
    before = lambda record: (record["source"],) if "source" in record else ()
    return [Item(record["prompt"], record[name], before(record)) for name in ("kept", "broken") for record in records]


class Batches(Dataset):
    """Shares, ready to be computed. The noise depends on seed, step and pair alone, whatever process draws it."""

    def __init__(self, records: list[dict], preprocessor: Preprocessor, draws: int, seed: int):
        self.records, self.preprocessor, self.draws, self.seed = records, preprocessor, draws, seed

    def __getitem__(self, share: Share) -> dict:
        records = [self.records[i] for i, _ in share.pairs]
        noise = [
            torch.randn(self.draws, generator=torch.Generator().manual_seed(random.Random(f"{self.seed}:{share.step}:{i}").getrandbits(63)))
            for i, _ in share.pairs
        ]
        return {
            "share": share,
            "inputs": self.preprocessor(items(records)),
            "noise": torch.stack(noise),
            "weights": torch.tensor([weight for _, weight in share.pairs]),
            "ties": torch.tensor([bool(record.get("tie")) for record in records]),
        }


def pair_losses(rewards: Tensor, batch: dict, gaussian: bool) -> Tensor:
    """Of each pair; of one that people held for a tie, the mean over both orders."""
    better, worse = rewards.chunk(2)
    noise = batch["noise"].to(rewards.device)
    if not gaussian:
        noise = torch.zeros_like(noise[:, :1])
    one, other = (gaussian_bradley_terry(*order, noise) for order in ((better, worse), (worse, better)))
    return torch.where(batch["ties"].to(one.device), (one + other) / 2, one)


def rate(recipe: Recipe, step: int, steps: int) -> float:
    """The share of the greatest learning rate at a step, as transformers' schedules with warm-up have it."""
    warmup = ceil(recipe.warmup * steps)
    if step < warmup:
        return step / warmup
    return 1.0 if recipe.schedule == "constant" else (1 + cos(pi * (step - warmup) / max(1, steps - warmup))) / 2


def new_optimiser(model: RewardModel, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW with a group for each part that may have a rate of its own."""
    parts: dict[str, list[nn.Parameter]] = {"head": [], "token": [], "vision": [], "decoder": []}
    for name, parameter in model.trained().items():
        sort = next((sort for word, sort in (("rm_head", "head"), ("embed_tokens", "token"), ("visual", "vision")) if word in name), "decoder")
        parts[sort].append(parameter)
    own = {"head": recipe.head_rate, "token": recipe.token_rate, "vision": recipe.vision_rate}
    groups = [
        {"params": group, "rate": own.get(sort) or recipe.rate, "weight_decay": 0.0 if sort == "token" else recipe.weight_decay}
        for sort, group in parts.items()
        if group
    ]
    return torch.optim.AdamW(groups, lr=recipe.rate)


class Run:
    """A run in progress."""

    def __init__(self, recipe: Recipe, pairs: Path, out: Path, *, seed: int = 0, steps: int | None = None, validation: Path | None = None, init: Path | None = None, with_base: bool = False, sharded: bool = False, trackers: tuple[str, ...] = (), cpu: bool = False):
        self.recipe, self.seed, self.with_base, self.sharded = recipe, seed, with_base, sharded
        adapter_base = base_of(init) if init else None
        self.base_name = str(adapter_base or init) if init else recipe.base
        self.base = find(self.base_name)
        keep_apart(out, pairs=pairs, validation=validation, init=init, base=self.base)
        if init:
            check_init(init, recipe)
        self.folder = RunFolder(out)
        self.records = [r for r in read_pairs(pairs) if (1.0 if r.get("confidence") is None else r["confidence"]) >= recipe.confidence]
        if not self.records:
            raise Refusal(f"{pairs}: of no pair people were as sure as the recipe's confidence, {recipe.confidence}")
        self.validation = [r for r in read_pairs(validation) if not r.get("tie")] if validation else []
        for record in (*self.records, *self.validation):
            if ("source" in record) != (recipe.pictures == 2):
                raise Refusal(f"{record['where']}: the recipe has {recipe.pictures} picture(s) an item, so `source` is {'needed' if recipe.pictures == 2 else 'not read'}")
        if lacking := [name for name in trackers if find_spec(name) is None]:
            # accelerate would go on without a word.
            raise Refusal(f"--track {lacking[0]}: it is not installed here: pip install {lacking[0]}")
        bf16 = torch.cuda.is_available() and not cpu
        self.accelerator = accelerator = Accelerator(mixed_precision="bf16" if bf16 else "no", cpu=cpu, log_with=list(trackers) or None, project_dir=out / "trackers")
        if accelerator.distributed_type not in PARALLEL:
            raise Refusal(f"{accelerator.distributed_type.value} by accelerate is not supported; --shard splits the model among the devices")
        processes = accelerator.num_processes
        if sharded and processes == 1:
            raise Refusal("--shard splits the model among several processes, and here is one: accelerate launch -m spatialscore_training.train_reward …")
        self.plan = Plan(len(self.records), recipe.pairs * recipe.accumulate * processes, seed)
        self.steps = steps or self.plan.an_epoch * recipe.epochs
        run = {"recipe": told(recipe), "seed": seed, "steps": self.steps, "processes": processes}
        run |= {"pairs": pairs_digest(self.records), "validation": pairs_digest(self.validation), "starts_from": checkpoint_digest(init or self.base)}
        self.folder.check(run)
        begun = self.folder.begun()
        if not begun and accelerator.is_main_process:
            check_pictures(self.records + self.validation)
        torch.manual_seed(seed)
        self.preprocessor = Preprocessor(self.base, recipe.instruction, (recipe.pixels, recipe.pixels), recipe.pictures)
        model = new_model(self.base_name, init, recipe, self.preprocessor)
        if sharded:
            shard(model, accelerator.device)
        else:
            model.to(accelerator.device)
        self.plain, self.optimiser = model, new_optimiser(model, recipe)
        self.step, self.best = 0, None
        if begun:
            state = self._state()
            progress = self.folder.load(state)
            self.step, self.best = progress["step"], progress["best"]
            set_optimizer_state_dict(model, self.optimiser, state["optimiser"])
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            self.folder.claim(run)
            self.folder.forget_after(self.step)
        if trackers:
            accelerator.init_trackers("spatialscore", {key: value for key, value in told(recipe).items() if isinstance(value, (int, float, str))})
        self.model = model if sharded else accelerator.prepare(model)

    def _state(self) -> dict:
        """What a state holds: the very weights that are trained, and the optimiser's moments. Of a sharded model, this
        process's part."""
        weights = {name: parameter.detach() for name, parameter in self.plain.trained().items()}
        return {"weights": weights, "optimiser": get_optimizer_state_dict(self.plain, self.optimiser)}

    def go(self, until: float = float("inf"), halt: int | None = None) -> bool:
        """Trains to the end, to the time `until` or to the step `halt`; tells whether the end has come."""
        end = min(self.steps, halt or self.steps)
        accelerator, recipe = self.accelerator, self.recipe
        shares = self.plan.shares(self.step, end, self.records, accelerator.process_index, accelerator.num_processes, recipe.pairs)
        workers = min(8, (os.cpu_count() or 1) // accelerator.num_processes) if accelerator.device.type != "cpu" else 0
        batches = Batches(self.records, self.preprocessor, recipe.draws, self.seed)
        loader = DataLoader(batches, batch_size=None, sampler=shares, num_workers=workers)
        bar = tqdm(total=self.steps, initial=self.step, unit="step", mininterval=5, disable=not accelerator.is_main_process)
        self.model.train()
        loss = 0.0
        for batch in loader:
            loss += self._learn(batch)
            if not batch["share"].ends_step:
                continue
            self._advance(loss)
            bar.update()
            loss = 0.0
            over = self._is_over(until)
            evaluates = self.step % recipe.evaluate_every == 0 or self.step == self.steps
            if evaluates:
                self.evaluate()
            if self.step % recipe.save_every == 0 or evaluates or over or self.step == end:
                self.save()
            if over:
                break
        accelerator.wait_for_everyone()
        if accelerator.trackers:
            accelerator.end_training()
        return self.step == self.steps

    def _learn(self, batch: dict) -> float:
        """Adds a share's part to the step's gradient; returns what it adds to the loss."""
        share, accelerator = batch["share"], self.accelerator
        # Dropout too depends on seed, step, share and process alone.
        torch.manual_seed(random.Random(f"{self.seed}:{share.step}:{share.number}:{accelerator.process_index}").getrandbits(63))
        if self.sharded:
            self.model.set_requires_gradient_sync(share.ends_step)
        with nullcontext() if share.ends_step or self.sharded else accelerator.no_sync(self.model), accelerator.autocast():
            rewards = self.model({name: value.to(accelerator.device) for name, value in batch["inputs"].items()})
            loss = (pair_losses(rewards, batch, self.recipe.gaussian) * batch["weights"].to(rewards.device)).sum()
            accelerator.backward(loss)
        return float(loss.detach()) / accelerator.num_processes

    def _advance(self, loss: float) -> None:
        for group in self.optimiser.param_groups:
            group["lr"] = group["rate"] * rate(self.recipe, self.step, self.steps)
        norm = nn.utils.clip_grad_norm_(self.plain.trained().values(), self.recipe.clip)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        loss = float(self.accelerator.reduce(torch.tensor(loss, device=self.accelerator.device), "sum"))
        if not (isfinite(loss) and isfinite(float(norm))):
            raise Refusal(f"step {self.step + 1}: the loss is {loss}, its gradient {float(norm)}; a lower rate may help. The last state stands")
        self.optimiser.step()
        self.optimiser.zero_grad()
        self.step += 1
        self._note({"loss": loss, "gradient": float(norm), "rate": self.optimiser.param_groups[-1]["lr"]})

    def _note(self, figures: dict[str, float]) -> None:
        if self.accelerator.is_main_process:
            self.folder.note({"step": self.step} | figures)
        self.accelerator.log(figures, step=self.step)

    def _is_over(self, until: float) -> bool:
        """Whether any process's time is over: they stop at the same step."""
        late = torch.tensor(float(time.monotonic() > until), device=self.accelerator.device)
        return bool(self.accelerator.reduce(late, "sum"))

    @torch.no_grad()
    def rewards(self, records: list[dict]) -> list[tuple[tuple[float, float], tuple[float, float]]]:
        """Of both pictures of each pair, as the model gives them when it is served."""
        process, processes = self.accelerator.process_index, self.accelerator.num_processes
        # Every process has as many, lest one wait for ever where the model is sharded: some do not count.
        mine, found = (records + records[:1] * (-len(records) % processes))[process::processes], []
        self.model.eval()
        for start in range(0, len(mine), self.recipe.pairs):
            batch = self.preprocessor(items(mine[start : start + self.recipe.pairs]))
            with self.accelerator.autocast():
                rewards = self.plain({name: value.to(self.accelerator.device) for name, value in batch.items()}).float().cpu()
            found += [(tuple(a), tuple(b)) for a, b in zip(*(half.tolist() for half in rewards.chunk(2)))]
        self.model.train()
        found = found[: len(records[process::processes])]
        return gather_object(found) if processes > 1 else found

    def evaluate(self) -> None:
        """Writes a checkpoint that can be served, and judges it."""
        if self.validation:
            figures = judge(self.rewards(self.validation))
            self._note({f"validation_{name}": value for name, value in figures.items()})
            standing = [figures["accuracy"], -figures["nll"], self.step]
            if self.best is None or standing[:2] > self.best[:2]:
                self.best = standing
        weights = whole_weights(self.plain, self.recipe)
        if self.accelerator.is_main_process:
            with beside(self.folder.checkpoint(self.step)) as part:
                export(self.plain, weights, self.preprocessor, self.recipe, self.base, part, self.with_base)
            self.folder.point(self.best[2] if self.best else None, self.step)
        self.accelerator.wait_for_everyone()

    def save(self) -> None:
        accelerator = self.accelerator
        self.folder.save(self.step, self.best, self._state(), accelerator.is_main_process, accelerator.wait_for_everyone)


def change(text: str) -> tuple[str, object]:
    """KEY=VALUE, the value as TOML has it."""
    try:
        ((key, value),) = tomllib.loads(text).items()
    except (tomllib.TOMLDecodeError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no KEY=VALUE of TOML: {error}") from error
    return key, value


def at_least(least: float, kind: type = int):
    def read(text: str):
        value = kind(text)
        if not value >= least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, not {text}")
        return value

    return read


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", type=Path, help="a data set's folder, or a file of pairs")
    parser.add_argument("out", type=Path, help="the run's folder")
    parser.add_argument("--recipe", default="paper-lora", help=f"{', '.join(names())}, or a file (default: %(default)s)")
    parser.add_argument("--set", type=change, action="append", default=[], metavar="KEY=VALUE", help="in place of what the recipe says")
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--base", help="in place of the recipe's base: a hub id or a folder")
    start.add_argument("--init", type=Path, help="a checkpoint of an earlier run: goes on with its adapter (or model) and head")
    parser.add_argument("--validation", type=Path, help="pairs to judge each checkpoint by")
    parser.add_argument("--steps", type=at_least(1), help="in place of the recipe's epochs")
    parser.add_argument("--minutes", type=at_least(0, float), default=float("inf"), help="stop, to be gone on with, after so long")
    parser.add_argument("--seed", type=at_least(0), default=0)
    parser.add_argument("--with-base", action="store_true", help="an adapter's checkpoint has the base's weights beside it")
    parser.add_argument("--shard", action="store_true", help="split weights, gradients and moments among the processes (FSDP)")
    parser.add_argument("--track", action="append", default=[], choices=("tensorboard", "wandb"), help="also write the curve there")
    parser.add_argument("--threads", type=at_least(1), help="of the CPU")
    parser.add_argument("--cpu", action="store_true", help="leave the GPU alone")
    options = parser.parse_args()
    until = time.monotonic() + 60 * options.minutes
    if options.threads:
        torch.set_num_threads(options.threads)
    recipe = read_recipe(options.recipe, dict(options.set) | ({"base": options.base} if options.base else {}))
    run = Run(
        recipe, options.pairs, options.out, seed=options.seed, steps=options.steps, validation=options.validation,
        init=options.init, with_base=options.with_base, sharded=options.shard, trackers=tuple(options.track), cpu=options.cpu,
    )
    ended = run.go(until)
    if run.accelerator.is_main_process:
        print(f"{options.out}: {run.step} of {run.steps} steps" + (f"; serve {options.out / ('best' if run.best else 'last')}" if ended else ""))


if __name__ == "__main__":
    main()
