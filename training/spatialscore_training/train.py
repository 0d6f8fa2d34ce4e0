"""Trains the small SpatialScore, stage after stage, as a recipe (`mini.toml`) says.

    spatialscore-train                       every stage of the recipe, from where the run stands
    spatialscore-train --stage see           one stage
    spatialscore-train --trains eyes         those of one half; the other half's (reader) may go on beside it
    spatialscore-train --run NAME            a run of its own under .cache/runs/NAME
    accelerate launch -m spatialscore_training.train   several devices or hosts, each with batches of its own

Stages: the vision tower learns what lies under each of its tokens (`eyes`); meanwhile the decoder learns to read prompts
over visual tokens made from the generator's truth (`reader`), and at last over those that the eyes give; then the reward
head (`head`), or the whole (`all`), learns on pictures, where a stage duels by the paper's Gaussian Bradley-Terry loss on
pairs.

A run's folder holds a state for each stage (weights, optimiser, step), its learning curve as CSV, PNG and TensorBoard.
What is random depends on the step alone. A stage that is stopped goes on exactly where its last state was written.
"""

import argparse
import csv
import json
import os
import time
import tomllib
from dataclasses import asdict, dataclass, replace
from importlib.resources import files
from math import cos, pi
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from . import losses
from .batches import Batch, Lessons
from .curves import plot_curves
from .drawings import DEFAULT_FOLDER, EVERY_STYLE, drawings_digest, kinds
from .files import Refusal, beside, command
from .language import WRITTEN_WITH
from .model import Tutor, look, names, new_model, read, whiten
from .relations import EVERY, PLAIN, RULES
from .scenes import World
from .start import start_from
from .tokenizer import kind_ids, run_tokenizer
from .truth import EXTRAS

RUNS = Path(".cache/runs")
SAVE_EVERY, LOG_EVERY = 150.0, 20
"""Seconds between states, steps between lines of the learning curve."""


@dataclass(frozen=True)
class Stage:
    """One stage of a recipe."""

    name: str
    trains: str
    """`eyes` (the vision tower), `reader` (the decoder over true visual tokens), `head` (the reward's), or `all`."""
    world: World
    steps: int
    rows: int
    """Pictures in a batch."""
    prompts: int
    """Prompts to a picture."""
    rate: float
    """The greatest learning rate of AdamW."""
    side: int = 224
    duel: bool = False
    seen: bool = False
    """Whether a `reader` stage is over what the eyes see, faults and all, in place of true visual tokens."""
    final: float = 0.05
    """The learning rate at the end, as a share of the greatest."""
    warmup: int = 100
    after: tuple[str, ...] = ()
    """Stages whose weights this one starts from: of an `eyes` stage the eyes, of a `reader` stage the rest."""
    start: str = ""
    """A checkpoint whose weights it starts from before those (`start`)."""


def read_recipe(path: Path | None) -> list[Stage]:
    """The stages of a recipe: a world by default, with `pictures` where they are looked at, changed by each stage's own."""
    text = (path if path and path.suffix else files(__package__) / f"{path or 'mini'}.toml").read_text()
    recipe = tomllib.loads(text)
    stages = []
    for name, stage in recipe["stages"].items():
        drawn = recipe.get("pictures", {}) if stage["trains"] != "reader" or stage.get("seen") else {}
        told = recipe["world"] | drawn | stage.pop("world", {})
        world = {key: tuple(v) if isinstance(v, list) else v for key, v in told.items()}
        relations = {"plain": PLAIN, "all": tuple(RULES), "every": tuple(EVERY)}[world.pop("relations")]
        stages.append(Stage(name, world=World(relations=relations, **world), after=tuple(stage.pop("after", ())), **stage))
    return stages


def made_with(stage: Stage, drawings: Path, seed: int) -> str:
    """All that a stage's state depends on but the number of its steps, which may be cut short and gone on from."""
    told = asdict(stage) | {"seed": seed, "drawings": drawings_digest(drawings, stage.world.words, stage.world.styles)}
    del told["steps"]
    if stage.world.grammar:
        told["written_with"] = WRITTEN_WITH
    return json.dumps(told, sort_keys=True)


def has_ended(stage: Stage, folder: Path, drawings: Path, seed: int) -> bool:
    """Whether a run has taken all steps of a stage. A state of another recipe, seed or drawings is refused."""
    path = folder / f"{stage.name}.pt"
    if not path.exists():
        return False
    state = torch.load(path, weights_only=True, map_location="cpu")
    _check(state, path, stage, drawings, seed)
    return state["step"] >= stage.steps


def _check(state: dict, path: Path, stage: Stage, drawings: Path, seed: int) -> None:
    then, now = json.loads(state.get("made_with", "{}")), json.loads(made_with(stage, drawings, seed))
    if state["step"] >= stage.steps:
        # A stage that has ended is not taught in other words by a grammar that has grown since.
        now.pop("written_with", None)
    if "world" in then:
        # What a world or a stage did not have at the time is what it is by default.
        then = {"start": "", "seen": False, "written_with": now.get("written_with")} | then | {"world": json.loads(json.dumps(asdict(World()))) | then["world"]}
    if differing := [key for key in now if then.get(key) != now[key]]:
        told = "; ".join(f"{key} was {then.get(key)}, is now {now[key]}" for key in differing)
        raise Refusal(f"{path} was made otherwise: {told}. Name another --run")


class Trainer:
    """A stage in progress."""

    def __init__(self, stage: Stage, folder: Path, drawings: Path, seed: int, accelerator: Accelerator):
        self.stage, self.folder, self.seed, self.accelerator = stage, folder, seed, accelerator
        self.device = device = accelerator.device
        self.tokenizer = run_tokenizer(folder)
        self.model = new_model(self.tokenizer, seed).to(device)
        config = self.model.config
        self.tutor = Tutor(config.text_config.hidden_size, config.vision_config.hidden_size, len(kinds()), EXTRAS, seed).to(device)
        if stage.start:
            start_from(Path(stage.start), self.model, self.tokenizer)
            # The heads that taught it are not in a checkpoint. At nought new ones ask nothing of it until they have learned.
            for parameter in self.tutor.parameters():
                nn.init.zeros_(parameter)
        for name in stage.after:
            self._inherit(torch.load(folder / f"{name}.pt", map_location="cpu", weights_only=True))
        eyes, head = (set(part.parameters()) for part in (self.model.model.visual, self.model.rm_head))
        trained = {"eyes": lambda p: p in eyes, "reader": lambda p: p not in eyes, "head": lambda p: p in head, "all": lambda p: True}
        wanted = trained[stage.trains]
        for parameter in self.model.parameters():
            parameter.requires_grad_(wanted(parameter))
        if stage.trains == "reader":
            self._fix_names()
        every = [*self.model.parameters(), *self.tutor.parameters()]
        matrices = [p for p in every if p.requires_grad and p.ndim >= 2]
        vectors = [p for p in every if p.requires_grad and p.ndim < 2]
        groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
        self.optimiser = torch.optim.AdamW(groups, lr=stage.rate, betas=(0.9, 0.98), fused=True)
        self.looks = stage.trains != "reader" or stage.seen
        self.lessons = Lessons(
            stage.world, stage.side, stage.rows, stage.prompts, stage.duel, self.looks, self.tokenizer, drawings, f"{seed}:{stage.name}"
        )
        if stage.trains == "eyes" and not (stage.after or stage.start):
            whiten(self.model, torch.cat([self.lessons[-i].pictures for i in range(1, 9)]).to(device))
        self.step = 0
        self.made_with = made_with(stage, drawings, seed)
        if self.path.exists():
            state = torch.load(self.path, map_location="cpu", weights_only=True)
            _check(state, self.path, stage, drawings, seed)
            self._restore(state)

    @property
    def path(self) -> Path:
        return self.folder / f"{self.stage.name}.pt"

    def _inherit(self, state: dict) -> None:
        """Weights of an earlier stage: those which it trained, the heads that taught them included. The eyes bring the
        names that they have learned to give."""
        seeing = ("model.visual.", "model.language_model.embed_tokens.", "lm_head.", *Tutor.OF_EYES)
        ours = {"eyes": lambda n: n.startswith(seeing), "reader": lambda n: not n.startswith((seeing[0], *Tutor.OF_EYES))}
        every = lambda n: True
        for module, part in ((self.model, "model"), (self.tutor, "tutor")):
            module.load_state_dict({n: w for n, w in state[part].items() if ours.get(state["trains"], every)(n)}, strict=False)

    def _fix_names(self) -> None:
        """Keeps the kinds' words where the eyes, which learn beside, look for them."""
        table = self.model.model.language_model.embed_tokens.weight
        fixed = torch.zeros(len(table), 1, device=self.device)
        fixed[kind_ids(self.tokenizer)] = 1
        table.register_hook(lambda gradient: gradient * (1 - fixed))

    def _restore(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        self.tutor.load_state_dict(state["tutor"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.step = state["step"]

    def save(self) -> None:
        """Writes the state, whole or not at all."""
        if not self.accelerator.is_main_process:
            return
        state = {"trains": self.stage.trains, "step": self.step, "made_with": self.made_with}
        state |= {"model": self.model.state_dict(), "tutor": self.tutor.state_dict(), "optimiser": self.optimiser.state_dict()}
        with beside(self.path) as part:
            torch.save(state, part)

    def _imagine(self, words: torch.Tensor, batch: Batch) -> torch.Tensor:
        """True visual tokens, blurred a little, some of them blank: what the eyes will give before they are perfect."""
        lost = torch.rand(batch.kind.shape, device=self.device) < 0.05
        visual = self.tutor.visual_tokens(words, batch.kind.masked_fill(lost, -1), batch.extras)
        return visual + 0.3 * torch.randn_like(visual)

    def losses(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The stage's loss on a batch, and the figures to watch."""
        words = names(self.model, self.tokenizer)
        loss, figures = torch.zeros((), device=self.device), {}
        if self.looks:
            visual, blocks = look(self.model, batch.pictures)
        else:
            visual = self._imagine(words.detach(), batch)
        if self.stage.trains in ("eyes", "all"):
            loss, figures = losses.seeing(visual, blocks, words[: self.stage.world.kinds].detach(), self.tutor, batch)
        if self.stage.trains != "eyes":
            hidden = read(self.model, visual, batch.ids, batch.positions, batch.spans)
            at = hidden[-1].gather(1, batch.reward[..., None].expand(-1, -1, hidden[-1].shape[-1]))
            parts = [losses.judging(self.model.rm_head(at), batch)]
            if self.stage.trains != "head":
                parts.append(losses.reading(hidden, self.tutor, batch, self.model.config.image_token_id))
            for part, seen in parts:
                loss, figures = loss + part, figures | seen
        return loss, {"loss": loss} | figures

    def _rate(self) -> float:
        """Linear warm-up, then half a cosine down to the final rate."""
        cosine = (1 + cos(pi * self.step / self.stage.steps)) / 2
        share = self.stage.final + (1 - self.stage.final) * cosine
        return self.stage.rate * min(1.0, (self.step + 1) / self.stage.warmup) * share

    def lesson(self, step: int) -> int:
        """Which lesson this process takes at a step."""
        return step * self.accelerator.num_processes + self.accelerator.process_index

    def _share_gradients(self) -> None:
        """Every process goes on with the mean of all. The model is called by its parts, so no wrapper does it."""
        if self.accelerator.num_processes > 1:
            for group in self.optimiser.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        parameter.grad = self.accelerator.reduce(parameter.grad, "mean")

    def advance(self, batch: Batch) -> dict[str, float]:
        """One step; returns the figures to watch."""
        for group in self.optimiser.param_groups:
            group["lr"] = self._rate()
        lesson = self.lesson(self.step)
        torch.manual_seed((self.seed << 32) + lesson)
        loss, figures = self.losses(batch)
        self.optimiser.zero_grad()
        loss.backward()
        self._share_gradients()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimiser.step()
        self.step += 1
        # All at once: each look at a number waits for a GPU.
        return dict(zip(figures, torch.stack([value.detach().float() for value in figures.values()]).tolist()))

    def _is_over(self, until: float) -> bool:
        """Whether any process's time is over: they stop at the same step, since each waits for all gradients."""
        late = torch.tensor(float(time.monotonic() > until), device=self.device)
        return bool(self.accelerator.reduce(late, "sum"))

    def run(self, workers: int, until: float) -> bool:
        """Trains to the end of the stage, or to the time `until`; tells whether that has come."""
        ours = [self.lesson(step) for step in range(self.step, self.stage.steps)]
        loader = DataLoader(self.lessons, batch_size=None, sampler=ours, num_workers=workers)
        curve = _Curve(self.folder, self.stage.name, self.step)
        saved = logged = time.monotonic()
        bar = tqdm(loader, desc=self.stage.name, initial=self.step, total=self.stage.steps, unit="step", mininterval=5, disable=not self.accelerator.is_main_process)
        self.model.train()
        over = False
        for batch in bar:
            curve.note(self.advance(batch.to(self.device)))
            now = time.monotonic()
            if self.step % LOG_EVERY == 0 and self.accelerator.is_main_process:
                pictures = self.stage.rows * LOG_EVERY * self.accelerator.num_processes
                means = curve.write(self.step, pictures / (now - logged))
                bar.set_postfix_str(" ".join(f"{name} {value:.3g}" for name, value in means.items()))
                logged = now
            if now - saved > SAVE_EVERY:
                self.save()
                saved = now
            if over := self._is_over(until):
                break
        self.save()
        # The next stage begins with what this one saved.
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            plot_curves(self.folder)
        return over


class _Curve:
    """The learning curve of a stage: means over the steps between two lines."""

    def __init__(self, folder: Path, name: str, step: int):
        self.path, self.values = folder / f"{name}.csv", []
        self.board = SummaryWriter(folder / "tensorboard" / name, purge_step=step)
        lines = list(csv.DictReader(self.path.open())) if step and self.path.exists() else []
        self.lines = [line for line in lines if int(line["step"]) <= step]

    def note(self, figures: dict[str, float]) -> None:
        self.values.append(figures)

    def write(self, step: int, pictures_per_second: float) -> dict[str, float]:
        means = {name: sum(value[name] for value in self.values) / len(self.values) for name in self.values[0]}
        means["pictures_per_second"] = pictures_per_second
        self.values = []
        self.lines.append({"step": step} | {name: f"{value:.5g}" for name, value in means.items()})
        # Whole or not at all: a stage that ends beside this one draws the curves of both.
        part = self.path.with_suffix(".csv.part")
        with part.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.lines[-1])
            writer.writeheader()
            writer.writerows(self.lines)
        part.replace(self.path)
        for name, value in means.items():
            self.board.add_scalar(name, value, step)
        return means


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, help="a recipe of the package (mini, wide) or a .toml of your own (default: mini)")
    parser.add_argument("--run", default="mini", help="the run's name (default: %(default)s)")
    parser.add_argument("--stage", help="only this stage, whatever it waits for (default: each in turn)")
    parser.add_argument("--trains", choices=("eyes", "reader", "head", "all"), help="only the stages that train this part")
    parser.add_argument("--steps", type=int, help="end a stage after so many steps in place of the recipe's")
    parser.add_argument("--minutes", type=float, default=1e6, help="stop, resumable, after so long (default: never)")
    parser.add_argument("--styles", nargs="+", choices=EVERY_STYLE, help="of the drawings (default: as the recipe says)")
    parser.add_argument("--drawings", type=Path, default=DEFAULT_FOLDER, help="folder of the drawings (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="threads of the CPU (default: %(default)s)")
    parser.add_argument("--workers", type=int, help="processes that draw ahead of the trainer (default: with a GPU every core, else none)")
    parser.add_argument("--cpu", action="store_true", help="leave the GPU alone")
    options = parser.parse_args()
    for name, least in (("steps", 1), ("seed", 0), ("threads", 1), ("workers", 0), ("minutes", 0)):
        if (value := getattr(options, name)) is not None and value < least:
            raise Refusal(f"--{name} must be at least {least}, not {value}")
    stages = read_recipe(options.recipe)
    if options.stage not in (None, *(stage.name for stage in stages)):
        raise Refusal(f"--stage {options.stage}: the recipe has {', '.join(stage.name for stage in stages)}")
    torch.set_num_threads(options.threads)
    accelerator = Accelerator(cpu=options.cpu)
    if options.workers is None:
        options.workers = 0 if accelerator.device.type == "cpu" else os.cpu_count() // accelerator.num_processes
    folder = RUNS / options.run
    folder.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + 60 * options.minutes
    ended = set()
    for stage in stages:
        if options.stage not in (None, stage.name):
            continue
        world = replace(stage.world, styles=tuple(options.styles or stage.world.styles))
        stage = replace(stage, world=world, steps=options.steps or stage.steps)
        if options.trains in (None, stage.trains) and not has_ended(stage, folder, options.drawings, options.seed):
            waits = [name for name in stage.after if name not in ended]
            if waits and not options.stage:
                parser.exit(message=f"{stage.name} waits for {', '.join(waits)}\n")
            if Trainer(stage, folder, options.drawings, options.seed, accelerator).run(options.workers, until):
                break
        if has_ended(stage, folder, options.drawings, options.seed):
            ended.add(stage.name)


if __name__ == "__main__":
    main()
