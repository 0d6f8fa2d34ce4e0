"""Reward models by recipe on small random bases: what is learnt, how a run survives, and that the server agrees."""

import json
import os
import re
import subprocess
import sys
import tomllib
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from spatialscore_training import calibration
from spatialscore_training.export import export
from spatialscore_training.files import Refusal
from spatialscore_training.losses import gaussian_bradley_terry
from spatialscore_training.manifest import write_pairs
from spatialscore_training.model import new_model
from spatialscore_training.pair_files import read_pairs
from spatialscore_training.scenes import World
from spatialscore_training.tokenizer import train_tokenizer

from test_generator import folder  # noqa: F401

pytest.importorskip("peft", reason="needs the extra `lora`")
reward_model = pytest.importorskip("spatialscore_training.reward_model")
from spatialscore_training import recipe as recipes  # noqa: E402
from spatialscore_training import train_reward  # noqa: E402
from spatialscore_training.preprocessing import Item, Preprocessor  # noqa: E402
from spatialscore_training.train_reward import Plan, Run  # noqa: E402

REPOSITORY = Path(__file__).parents[2]
BINARY = Path(os.environ.get("SPATIALSCORE_BINARY", REPOSITORY / "target/release/spatialscore"))
SMALL = dict(
    instruction="Rate: {prompt}\n<|Reward|>", pixels=112 * 112, head=(32, 8), head_dropout=0.1, rate=1e-2, pairs=2, accumulate=2,
    epochs=2, save_every=1, evaluate_every=4, draws=50, warmup=0.1, positions="mrope",
)
WHOLE = SMALL | dict(trains="all", positions="flat")
LORA = SMALL | dict(trains="lora", rank=4, alpha=8, dropout=0.1, targets=r".*language_model.*\.(q_proj|v_proj)")


def headless(checkpoint: Path, base: Path) -> Path:
    """A checkpoint without its head: what a reward model is trained from."""
    base.mkdir(parents=True)
    for file in checkpoint.iterdir():
        if file.suffix != ".safetensors" and file.name != "reward_config.json":
            (base / file.name).write_bytes(file.read_bytes())
    tensors = load_file(checkpoint / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if not k.startswith("rm_head")}, base / "model.safetensors", {"format": "pt"})
    return base


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    root = tmp_path_factory.mktemp("base")
    tokenizer = train_tokenizer()
    export(new_model(tokenizer, 0).state_dict(), tokenizer, root / "whole", torch.float32)
    return headless(root / "whole", root / "base")


@pytest.fixture(scope="module")
def pairs(folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("pairs")
    write_pairs(root / "pairs", World(kinds=16, things=(2, 3)), folder, seed=0, side=112, pairs=10, jobs=1)
    return root / "pairs"


def new_run(base, pairs, out, told=LORA, **options) -> Run:
    changes = {key: options.pop(key) for key in list(options) if key in recipes.Recipe.__dataclass_fields__}
    return Run(recipes.new_recipe({"base": str(base)} | told | changes, "test"), pairs, out, cpu=True, **options)


@pytest.fixture(scope="module")
def trained(base, pairs, tmp_path_factory):
    """A run of ten pairs in six steps, with a validation."""
    out = tmp_path_factory.mktemp("run") / "out"
    assert new_run(base, pairs, out, validation=pairs).go()
    return out


def read_state(out: Path) -> dict:
    """The newest state, whole."""
    newest = max((out / "state").iterdir())
    dcp_to_torch_save(newest, out / "whole.pt")
    state = torch.load(out / "whole.pt", weights_only=False)
    (out / "whole.pt").unlink()
    return state | json.loads((newest / "progress.json").read_text())


def state_bytes(out: Path) -> dict[str, bytes]:
    """All tensors of the newest state, and the checkpoint that is served."""
    state = read_state(out)
    parts = {name: tensor for name, tensor in state["weights"].items()}
    parts |= {f"{of}.{name}": value for of, slot in state["optimiser"]["state"].items() for name, value in slot.items()}
    served = {path.name: path.read_bytes() for path in (out / "last").iterdir()}
    return {name: tensor.numpy().tobytes() for name, tensor in parts.items()} | served | {"best": str(state["best"]).encode()}


# Recipes


def test_recipes_that_ship_are_their_sources():
    assert recipes.names() == ["editreward", "hpsv3", "paper-lora"]
    for name in ("hpsv3", "editreward"):
        ours = recipes.read_recipe(name)
        assert (ours.trains, ours.positions, ours.rate, ours.token_rate, ours.draws) == ("all", "flat", 2e-6, 2e-6, 1000)
        assert (ours.schedule, ours.warmup, ours.epochs, ours.pairs, ours.accumulate) == ("constant", 0.05, 10, 2, 4)
        assert (ours.head, ours.head_dropout, ours.pixels, ours.weight_decay) == ((1024, 16), 0.05, 256 * 28 * 28, 0)
    assert recipes.read_recipe("hpsv3").base == "Qwen/Qwen2-VL-7B-Instruct" and recipes.read_recipe("hpsv3").confidence == 0.95
    # Of the paper's every number that is not told is marked as a guess.
    lines = (files("spatialscore_training") / "recipes" / "paper-lora.toml").read_text().splitlines()
    guessed = {line.split(" = ")[0] for before, line in zip(["", *lines], lines) if "a guess" in line or before.startswith("# A guess")}
    assert set(tomllib.loads("\n".join(lines))) - guessed == {"base", "gradient_checkpointing", "save_every", "evaluate_every"}
    assert "told; that decoder alone has adapters is a guess" in "\n".join(lines)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"learning_rate": 1}, "unknown learning_rate"),
        ({"rate": "fast"}, "rate = 'fast'"),
        ({"rate": -1e-3}, "rate must be above 0"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"epochs": True}, "epochs = True"),
        ({"warmup": 2.0}, "warmup must be from 0 to 1"),
        ({"trains": "some"}, "trains = 'some'"),
        ({"instruction": "{prompt}"}, "once"),
        ({"instruction": "<|Reward|> {prompt}"}, "behind"),
        ({"rank": 0}, "rank must be at least 1"),
        ({"targets": ""}, "targets must say"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused(change, said):
    with pytest.raises(Refusal, match=re.escape(said)):
        recipes.new_recipe({"base": "x"} | LORA | change, "mine.toml")
    with pytest.raises(Refusal, match="missing"):
        recipes.new_recipe({"base": "x"}, "mine.toml")
    with pytest.raises(Refusal, match="no recipe that ships"):
        recipes.read_recipe("nowhere")


def test_rates_go_as_transformers_schedules():
    from transformers import get_constant_schedule_with_warmup, get_cosine_schedule_with_warmup

    steps, recipe = 23, recipes.new_recipe({"base": "x"} | LORA | {"warmup": 0.2}, "")
    for name, schedule in (("constant", get_constant_schedule_with_warmup), ("cosine", get_cosine_schedule_with_warmup)):
        optimiser = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        known = schedule(optimiser, 5, *([steps] if name == "cosine" else []))
        for step in range(steps):
            assert train_reward.rate(replace(recipe, schedule=name), step, steps) == pytest.approx(known.get_last_lr()[0])
            optimiser.step(), known.step()


@pytest.mark.parametrize(
    "arguments, code, said",
    [
        ("--steps 0", 2, "must be at least 1"),
        ("--steps -3", 2, "must be at least 1"),
        ("--seed -1", 2, "must be at least 0"),
        ("--minutes nan", 2, "must be at least 0"),
        ("--set rate", 2, "no KEY=VALUE"),
        ("--base a/b --init c", 2, "not allowed with"),
        ("--set speed=1", 1, "unknown speed"),
        ("--set epochs=0", 1, "epochs must be at least 1"),
        ("--recipe nowhere", 1, "no recipe that ships"),
        ("--base ./nowhere", 1, "no such folder"),
    ],
)
def test_impossible_arguments_end_with_a_line_and_a_code(tmp_path, monkeypatch, capsys, arguments, code, said):
    monkeypatch.setattr("sys.argv", ["train", str(tmp_path / "pairs"), str(tmp_path / "out"), *arguments.split()])
    with pytest.raises(SystemExit) as ended:
        train_reward.main()
    # What `sys.exit` is given as a text is written to stderr, and the code is 1.
    assert (ended.value.code if isinstance(ended.value.code, int) else 1) == code
    assert said in f"{ended.value.code}{capsys.readouterr().err}"
    assert not (tmp_path / "out").exists()


def test_an_empty_manifest_is_refused(base, tmp_path):
    (tmp_path / "pairs.jsonl").write_text("")
    with pytest.raises(Refusal, match="there are no pairs in it"):
        new_run(base, tmp_path / "pairs.jsonl", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_pairs_of_which_people_were_less_sure_are_left_out(base, pairs, tmp_path):
    records = [{**r, "where": None, "confidence": c} for r, c in zip(read_pairs(pairs), (0.5, 0.95, 0.99, 1.0))]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert len(new_run(base, tmp_path / "pairs.jsonl", tmp_path / "out", confidence=0.95).records) == 3
    with pytest.raises(Refusal, match="as sure as the recipe's confidence"):
        (tmp_path / "few.jsonl").write_text(json.dumps(records[0]) + "\n")
        new_run(base, tmp_path / "few.jsonl", tmp_path / "none", confidence=0.95)


# The loss and the head


def test_the_loss_is_hpsv3s():
    torch.manual_seed(0)
    better, worse, noise = torch.randn(5, 2), torch.randn(5, 2), torch.randn(5, 1000)
    sigma = torch.sqrt(better[:, 1].exp() ** 2 + worse[:, 1].exp() ** 2)
    z = noise * sigma.unsqueeze(1).repeat(1, 1000) + (better[:, 0] - worse[:, 0]).unsqueeze(1).repeat(1, 1000)
    assert torch.allclose(gaussian_bradley_terry(better, worse, noise).mean(), -nn.functional.logsigmoid(z).mean())
    batch = {"noise": noise, "ties": torch.tensor([False, True, False, False, False])}
    losses = train_reward.pair_losses(torch.cat([better, worse]), batch, True)
    swapped = train_reward.pair_losses(torch.cat([worse, better]), batch, True)
    assert losses[1] == swapped[1] and (losses != swapped).sum() == 4
    plain = train_reward.pair_losses(torch.cat([better, worse]), batch, False)
    assert torch.allclose(plain[0], -nn.functional.logsigmoid(better[0, 0] - worse[0, 0]))


@pytest.fixture(scope="module")
def batch_of(base, pairs):
    preprocessor = Preprocessor(base, LORA["instruction"], (LORA["pixels"],) * 2)
    return preprocessor, preprocessor(train_reward.items(list(read_pairs(pairs))[:2]))


@torch.no_grad()
def test_the_head_is_in_fp32_under_autocast(base, batch_of):
    preprocessor, batch = batch_of
    model = reward_model.new_model(str(base), None, recipes.new_recipe({"base": str(base)} | LORA, ""), preprocessor).eval()
    seen = []
    model.inner.rm_head.register_forward_hook(lambda _, args, output: seen.append((args[0], output)))
    with torch.autocast("cpu", torch.bfloat16):
        model(batch)
    rows, told = seen[0]
    assert rows.dtype == told.dtype == torch.float32
    # Exactly what fp32 gives, which bf16 would not.
    assert torch.equal(told, model.inner.rm_head(rows))
    with torch.autocast("cpu", torch.bfloat16):
        assert not torch.equal(told, model.inner.rm_head(rows).float())


@pytest.mark.parametrize("told", [LORA, WHOLE], ids=["lora", "all"])
def test_of_the_embeddings_the_reward_tokens_row_alone_learns(base, pairs, tmp_path, told):
    run = new_run(base, pairs, tmp_path / "out", told, steps=2)
    before = run.plain.inner.get_input_embeddings()
    before = getattr(before, "base_layer", before).weight.detach().clone()
    run.go()
    out, token = tmp_path / "out/last", run.preprocessor.reward_id
    if told is LORA:
        delta = next(v for k, v in load_file(out / "adapter_model.safetensors").items() if "trainable_tokens" in k)
        assert json.loads((out / "adapter_config.json").read_text())["trainable_token_indices"] == [token]
        assert delta.shape[0] == 1 and not torch.equal(delta[0], before[token])
    else:
        after = next(v for k, v in load_file(out / "model.safetensors").items() if k.endswith("embed_tokens.weight"))
        changed = (after != before).any(1).nonzero().flatten().tolist()
        assert changed == [token]
        learnt = load_file(out / "model.safetensors")
        start = load_file(base / "model.safetensors")
        for part in ("visual.blocks.0.attn.qkv.weight", "visual.merger.mlp.0.weight", "layers.0.mlp.up_proj.weight"):
            assert any(k.endswith(part) and not torch.equal(learnt[k], start[k]) for k in start), part


def test_dropout_has_a_slot_and_acts(base, pairs, tmp_path):
    run = new_run(base, pairs, tmp_path / "out", steps=1)
    assert {name.rsplit(".", 2)[-2] for name in run.plain.trained() if "rm_head" in name} == {"0", "3", "5"}
    run.model.train()
    batch = run.preprocessor(train_reward.items(run.records[:1]))
    assert not torch.equal(run.plain(batch), run.plain(batch))


def test_checkpointing_changes_no_gradient(base, batch_of):
    preprocessor, batch = batch_of
    gradients = []
    for on in (False, True):
        torch.manual_seed(1)
        recipe = recipes.new_recipe({"base": str(base)} | LORA | {"gradient_checkpointing": on}, "")
        model = reward_model.new_model(str(base), None, recipe, preprocessor).train()
        assert any(getattr(part, "gradient_checkpointing", False) for part in model.modules()) is on
        torch.manual_seed(2)
        model(batch).square().sum().backward()
        gradients.append({name: p.grad for name, p in model.trained().items()})
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
    assert any(gradient.abs().sum() > 0 for name, gradient in gradients[0].items() if "lora_B" in name)


# Epochs


@pytest.mark.parametrize("count, size, processes, at_once", [(50, 32, 1, 4), (50, 32, 4, 2), (7, 8, 2, 1), (3, 2, 4, 2), (1, 1, 1, 1)])
def test_an_epoch_visits_every_pair_in_an_order_of_its_own(count, size, processes, at_once):
    records = [{"prompt": "word " * (i % 5)} for i in range(count)]
    plan = Plan(count, size, seed=3)
    orders = []
    for epoch in range(3):
        first, end = epoch * plan.an_epoch, (epoch + 1) * plan.an_epoch
        orders.append([i for step in range(first, end) for i in plan.step(step)])
        assert sorted(orders[-1]) == list(range(count))
        ranks = [list(plan.shares(first, end, records, rank, processes, at_once)) for rank in range(processes)]
        assert len({len(shares) for shares in ranks}) == 1
        for shares in zip(*ranks):
            assert len({(share.step, share.number, share.ends_step) for share in shares}) == 1
        for step in range(first, end):
            weights = [pair for shares in ranks for share in shares if share.step == step for pair in share.pairs]
            assert sorted(i for i, weight in weights if weight) == sorted(plan.step(step))
            # The mean over processes of what each adds is the mean over the step's pairs.
            assert sum(weight for _, weight in weights) / processes == pytest.approx(1)
    assert count < 5 or orders[0] != orders[1] != orders[2]


def test_the_number_of_steps_counts_the_last_short_one(base, pairs, tmp_path):
    assert new_run(base, pairs, tmp_path / "out").steps == 6  # ten pairs, four to a step, two epochs


# Runs that survive


def test_a_run_in_pieces_has_the_bits_of_one_at_once(base, pairs, trained, tmp_path):
    out = tmp_path / "out"
    for halt in (1, 3, 5):
        assert not new_run(base, pairs, out, validation=pairs).go(halt=halt)
    assert new_run(base, pairs, out, validation=pairs).go()
    assert state_bytes(out) == state_bytes(trained)
    assert (out / "metrics.jsonl").read_text() == (trained / "metrics.jsonl").read_text()
    assert len(list((out / "state").iterdir())) == 2


def test_the_curve_is_written_to_trackers_too(base, pairs, tmp_path):
    run = new_run(base, pairs, tmp_path / "out", validation=pairs, steps=2, evaluate_every=1, trackers=("tensorboard",))
    run.go()
    (events,) = {file.parent for file in (tmp_path / "out/trackers").rglob("events.*") if EventAccumulator(str(file.parent)).Reload().Tags()["scalars"]}
    board = EventAccumulator(str(events)).Reload()
    lines = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    for name in ("loss", "validation_accuracy"):
        told = [(line["step"], line[name]) for line in lines if name in line]
        assert [(event.step, event.value) for event in board.Scalars(name)] == [(step, pytest.approx(value)) for step, value in told] and len(told) == 2
    with pytest.raises(Refusal, match="pip install no_such_tracker"):
        new_run(base, pairs, tmp_path / "other", trackers=("no_such_tracker",))


@pytest.mark.parametrize("torn", ["*.distcp", ".metadata", "progress.json"])
def test_a_state_that_cannot_be_read_is_gone_behind(base, pairs, trained, tmp_path, capsys, torn):
    out = tmp_path / "out"
    new_run(base, pairs, out, validation=pairs).go(halt=3)
    for torn in max((out / "state").iterdir()).glob(torn):
        torn.write_bytes(torn.read_bytes()[:10])
    run = new_run(base, pairs, out, validation=pairs)
    assert run.step == 2 and "cannot be read" in capsys.readouterr().err
    run.go()
    assert state_bytes(out) == state_bytes(trained)
    for state in (out / "state").iterdir():
        (state / ".metadata").unlink()
    with pytest.raises(Refusal, match="no state can be read"):
        new_run(base, pairs, out, validation=pairs)


KILLED = """
import os, random, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from spatialscore_training import recipe, train_reward
told, base, pairs, out, undisturbed, kills = eval(sys.argv[1])
def train(out, tell=None):
    run = train_reward.Run(recipe.new_recipe({"base": base} | told, "test"), Path(pairs), Path(out), cpu=True, validation=Path(pairs))
    if tell is not None:
        os.write(tell, b"%3d" % run.step)
    run.go()
newest = lambda: max([int(path.stem[5:]) for path in Path(out, "state").glob("step-*") if not path.suffix], default=0)
rng, torn = random.Random(), 0
for _ in range(kills):
    hear, tell = os.pipe()
    child = os.fork()
    if not child:
        try:
            train(out, tell)
        finally:
            os._exit(0)
    os.close(tell)
    begun, end = int(os.read(hear, 3)), time.monotonic() + rng.uniform(0, 1)
    os.close(hear)
    # At any moment, but before it can come to its end.
    while time.monotonic() < end and newest() < begun + 2:
        time.sleep(0.003)
    os.kill(child, signal.SIGKILL)
    torn += os.WIFSIGNALED(os.waitpid(child, 0)[1])
train(out)
train(undisturbed)
print(torn)
"""


def test_a_run_that_is_killed_ten_times_has_the_bits_of_one_that_was_not(base, pairs, tmp_path):
    told = LORA | {"epochs": 14, "evaluate_every": 5, "draws": 10}
    arguments = told, str(base), str(pairs), str(tmp_path / "killed"), str(tmp_path / "undisturbed"), 10
    # One process for both, which forks those that are killed: to begin takes longer than to train.
    ran = subprocess.run(
        [sys.executable, "-c", KILLED, repr(arguments)], env=os.environ | {"PYTHONPATH": str(REPOSITORY / "training")}, check=True, stdout=subprocess.PIPE
    )
    assert ran.stdout.decode().splitlines()[-1] == "10"
    assert state_bytes(tmp_path / "killed") == state_bytes(tmp_path / "undisturbed")
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize(
    "change, said",
    [
        (dict(seed=1), "seed was 0, is now 1"),
        (dict(steps=9), "steps was 6, is now 9"),
        (dict(rate=1e-3), "recipe.rate was 0.01, is now 0.001"),
    ],
)
def test_another_run_in_the_same_folder_is_refused(base, pairs, trained, change, said):
    with pytest.raises(Refusal, match=re.escape(said)):
        new_run(base, pairs, trained, **{"validation": pairs} | change)


def test_other_pairs_and_other_folders_are_refused(base, pairs, trained, tmp_path, folder):
    write_pairs(tmp_path / "others", World(kinds=16, things=(2, 3)), folder, seed=9, side=112, pairs=10, jobs=1)
    with pytest.raises(Refusal, match="pairs was"):
        new_run(base, tmp_path / "others", trained, validation=pairs)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.txt").write_text("mine")
    with pytest.raises(Refusal, match="no run to go on with"):
        new_run(base, pairs, tmp_path / "full")
    before = {path: path.stat().st_mtime_ns for path in base.iterdir()}
    for out in (base, base.parent, base / "out", pairs / "out"):
        with pytest.raises(Refusal, match="the input"):
            new_run(base, pairs, out)
    assert before == {path: path.stat().st_mtime_ns for path in base.iterdir()}


def test_a_second_stage_begins_with_adapter_and_head_of_the_first(base, pairs, trained, tmp_path):
    second = new_run(base, pairs, tmp_path / "second", init=trained / "last")
    first = load_file(trained / "last/adapter_model.safetensors")
    learnt = {re.sub(r"\.(default|modules_to_save)(?=\.|$)", "", name.removeprefix("backbone.")): p for name, p in second.plain.trained().items()}
    assert len(learnt) == len(first)
    for name, tensor in first.items():
        assert torch.equal(tensor, learnt[name]), name
    with pytest.raises(Refusal, match="--init goes on with its weights"):
        new_run(trained / "last", pairs, tmp_path / "third")
    with pytest.raises(Refusal, match="--init goes on with its weights"):
        new_run(base.parent / "whole", pairs, tmp_path / "other")
    with pytest.raises(Refusal, match="positions is 'mrope', the recipe's 'flat'"):
        new_run(base, pairs, tmp_path / "unused", init=trained / "last", positions="flat")
    with pytest.raises(Refusal, match="r is 4, the recipe's 8"):
        new_run(base, pairs, tmp_path / "fourth", init=trained / "last", rank=8)
    with pytest.raises(Refusal, match="is an adapter, and the recipe trains all"):
        new_run(base, pairs, tmp_path / "unused", init=trained / "last", trains="all")


def two_processes(recipe: Path, pairs: Path, out: Path, *arguments: str) -> None:
    command = f"{sys.executable} -m torch.distributed.run --standalone --nproc_per_node 2 -m spatialscore_training.train_reward"
    told = f"{pairs} {out} --recipe {recipe} --validation {pairs} --cpu --threads 1"
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY / "training")}
    subprocess.run([*command.split(), *told.split(), *arguments], env=environment, check=True, timeout=600)


@pytest.mark.parametrize("trains, sharded", [("lora", False), ("lora", True), ("all", True)])
def test_two_processes_go_as_one_with_as_many_pairs_to_a_step(base, pairs, tmp_path, trains, sharded):
    told = (LORA if trains == "lora" else WHOLE) | {"dropout": 0.0, "head_dropout": 0.0, "base": str(base), "gradient_checkpointing": sharded}
    recipe = tmp_path / "recipe.toml"
    # A step in two shares, so that the first of them is kept until the second.
    recipe.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in (told | {"pairs": 1}).items()))
    shard = ["--shard"] if sharded else []
    two_processes(recipe, pairs, tmp_path / "two", *shard)
    new_run(base, pairs, tmp_path / "one", told, validation=pairs).go()
    two, one = (read_state(tmp_path / name) for name in ("two", "one"))
    assert two["step"] == one["step"] == 6
    for name, weight in one["weights"].items():
        if name.endswith("4.bias"):
            # Both pictures of a pair share the mean's bias: its gradient is nought but for rounding, which Adam makes large.
            two["weights"][name][0] = weight[0]
        assert torch.allclose(two["weights"][name], weight, atol=1e-4), name
    lines = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("one", "two")]
    for a, b in zip(*lines, strict=True):
        assert json.loads(a) == pytest.approx(json.loads(b), rel=1e-3, abs=1e-4)
    # Stopped after a step, and gone on with: the same bits.
    two_processes(recipe, pairs, tmp_path / "pieces", "--minutes", "0", *shard)
    two_processes(recipe, pairs, tmp_path / "pieces", *shard)
    assert state_bytes(tmp_path / "pieces") == state_bytes(tmp_path / "two")


HELD = """
import sys
from pathlib import Path
from spatialscore_training import recipe, train_reward
told, pairs, out = eval(sys.argv[1])
run = train_reward.Run(recipe.new_recipe(told, "test"), Path(pairs), Path(out), cpu=True, steps=1, sharded=True)
run.go()
share = lambda tensors: sum(t.to_local().numel() for t in tensors) / sum(t.numel() for t in tensors)
moments = [slot["exp_avg"] for slot in run.optimiser.state.values()]
print(share(list(run.plain.parameters())), share(moments), flush=True)
"""


def test_each_process_holds_its_share_of_weights_and_moments(base, pairs, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    (tmp_path / "held.py").write_text(HELD)
    told = repr((WHOLE | {"base": str(base)}, str(pairs), str(tmp_path / "out")))
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY / "training"), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run([*command, str(tmp_path / "held.py"), told], env=environment, check=True, stdout=subprocess.PIPE, text=True)
    shares = [float(share) for line in ran.stdout.splitlines() for share in line.split()]
    assert len(shares) == 4 and shares == pytest.approx([0.5] * 4, abs=0.02)
    with pytest.raises(Refusal, match="here is one"):
        new_run(base, pairs, tmp_path / "alone", WHOLE, sharded=True)


# Validation


def test_calibration_by_hand():
    # Sure to 84.13 % each (one sigma apart), right in three of four.
    pair = ((2**0.5, 0.0), (0.0, 0.0))
    found = calibration.judge([pair, pair, pair, pair[::-1]])
    assert found["accuracy"] == 0.75 and found["pairs"] == 4
    assert found["calibration_error"] == pytest.approx(0.8413447 - 0.75, abs=1e-6)
    assert found["nll"] == pytest.approx(-(3 * 0.1727538 * -1 + 1.8410216 * -1) / 4, abs=1e-5)
    assert calibration.judge([((1.0, 0.0), (1.0, 0.0))])["accuracy"] == 0.5


def test_the_best_checkpoint_is_the_validations(trained):
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    judged = [line for line in lines if "validation_accuracy" in line]
    assert [line["step"] for line in judged] == [4, 6]
    best = max(judged, key=lambda line: (line["validation_accuracy"], -line["validation_nll"]))
    assert (trained / "best").resolve().name == f"step-{best['step']:08}"
    assert all(not Path(os.readlink(trained / name)).is_absolute() for name in ("best", "last"))
    assert not any(path.is_symlink() for path in (trained / "last").iterdir())


# The server


SERVED = """
import json, os, sys
from pathlib import Path
from spatialscore_training.scorers import Item, ServerScorer
items = [Item(*entry) for entry in json.loads(Path(sys.argv[1]).read_text())]
scores = dict(ServerScorer(os.environ["SPATIALSCORE_ADDRESS"], Path("proto")).scores(items))
print(json.dumps([scores[i] for i in range(len(items))]))
"""


def served(checkpoint: Path, items: list[tuple[str, str]], folder: Path) -> torch.Tensor:
    """Means and standard deviations of items, from a server."""
    if not BINARY.exists():
        pytest.skip("needs the server: make build")
    (folder / "items.json").write_text(json.dumps(items))
    told = subprocess.run(
        ["scripts/with_server.sh", BINARY, sys.executable, "-c", SERVED, folder / "items.json"],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": "training", "SPATIALSCORE__MODEL__CHECKPOINT": str(checkpoint)},
        check=True,
        stdout=subprocess.PIPE,
    )
    return torch.tensor(json.loads(told.stdout))


@torch.no_grad()
def ours(run: Run, items: list[tuple[str, str]]) -> torch.Tensor:
    # As the server does, whatever the weights are stored in.
    run.plain.float().eval()
    rewards = torch.cat([run.plain(run.preprocessor([Item(*item)])) for item in items])
    return torch.stack([rewards[:, 0], rewards[:, 1].exp()], 1)


def odd_pictures(folder: Path) -> list[str]:
    """Pictures that a careless reader takes for others."""
    folder.mkdir()
    rng = __import__("numpy").random.default_rng(0)
    pixels = rng.integers(0, 255, (90, 140, 4)).astype("uint8")
    pixels[:45, :70, :3] = 250
    rgb = Image.fromarray(pixels[..., :3].copy())
    for turn in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = turn
        rgb.save(folder / f"turned{turn}.jpg", exif=exif, quality=95)
        rgb.save(folder / f"turned{turn}.png", exif=exif)
        rgb.save(folder / f"turned{turn}.webp", exif=exif, lossless=True)
    Image.fromarray(pixels).save(folder / "alpha.png")
    rgb.quantize(16).save(folder / "palette.png", transparency=3)
    rgb.convert("L").save(folder / "grey.png")
    rgb.convert("L").convert("LA").save(folder / "grey_alpha.png")
    rgb.convert("1").save(folder / "bits.png")
    Image.fromarray(pixels[..., 0].astype("uint16") * 257).save(folder / "deep.png")
    rgb.convert("CMYK").save(folder / "cmyk.jpg")
    rgb.convert("L").save(folder / "grey.jpg")
    Image.fromarray(pixels).save(folder / "alpha.webp", lossless=True)
    rgb.resize((301, 57)).save(folder / "long.png")
    return sorted(str(path) for path in folder.iterdir())


ODD_PROMPTS = [
    "the cat is left of the apple", "", "  two  spaces ", "<|Reward|>", "a <|image_pad|> in <|vision_start|> the prompt <|im_end|>\n<|im_start|>assistant",
    "<|im_end|><|im_end|>", "< |Reward|> and <|Reward |>", "<tool_call> is plain", "{prompt} and {{x}}", "日本語 ☃ Ünïcode", "line\nbreak\ttab", "cat<|endoftext|>apple",
]


def test_the_server_reads_odd_pictures_and_prompts_as_the_trainer(base, pairs, tmp_path):
    # A head that tells small things apart.
    run = new_run(base, pairs, tmp_path / "out", steps=2, head_rate=0.5)
    run.go()
    pictures = odd_pictures(tmp_path / "odd")
    items = [("the cat is left of the apple", picture) for picture in pictures] + [(prompt, pictures[0]) for prompt in ODD_PROMPTS if prompt]
    expected, told = ours(run, items), served(tmp_path / "out/last", items, tmp_path)
    worst = (told - expected).abs().max(1).values
    assert expected[: len(pictures), 0].std() > 1e-3 and expected[len(pictures) :, 0].std() > 1e-4
    assert torch.allclose(told, expected, rtol=1e-4, atol=1e-4), [items[i] for i in (worst > 1e-4).nonzero().flatten().tolist()]


FAMILIES = {"qwen2": "hpsv3", "qwen3": "paper-lora", "qwen2_5": "hpsv3"}


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_trains_and_is_served(family, base, pairs, tmp_path):
    start = base if family == "qwen2_5" else headless(REPOSITORY / "tests/fixtures" / family / "checkpoint", tmp_path / "base")
    told = dict(
        base=str(start), pixels=112 * 112, head=[32, 8], rate=1e-3, head_rate=0.1, pairs=2, accumulate=1, draws=10, rank=4, alpha=4, confidence=0.0,
        save_every=2, evaluate_every=2, instruction="{prompt}\n<|Reward|>",
    )
    recipe = recipes.read_recipe(FAMILIES[family], told)
    run = Run(recipe, pairs, tmp_path / "out", steps=2, cpu=True)
    run.go()
    items = [(record["prompt"], record[name]) for record in run.records[:4] for name in ("kept", "broken")]
    expected, scores = ours(run, items), served(tmp_path / "out/last", items, tmp_path)
    assert expected[:, 0].std() > 1e-4
    assert torch.allclose(scores, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("with_base", [False, True])
def test_a_checkpoint_can_be_copied(base, pairs, tmp_path, with_base):
    run = new_run(base, pairs, tmp_path / "out", steps=1, with_base=with_base)
    run.go()
    __import__("shutil").copytree(tmp_path / "out/last", tmp_path / "copy", symlinks=True)
    assert (tmp_path / "copy/model.safetensors").exists() == with_base
    items = [(record["prompt"], record["kept"]) for record in run.records[:3]]
    assert torch.allclose(served(tmp_path / "copy", items, tmp_path), ours(run, items), rtol=1e-4, atol=1e-4)


def test_a_run_is_scored_without_a_server_as_by_its_trainer(base, pairs, tmp_path):
    from spatialscore_training.scorers import Item as Scored
    from spatialscore_training.scorers import LocalScorer

    for told in (LORA, WHOLE):
        run = new_run(base, pairs, tmp_path / told["trains"], told, steps=2, head_rate=0.5)
        run.go()
        pictures = odd_pictures(tmp_path / f"odd-{told['trains']}")[:9]
        items = [("the cat <|Reward|> <|im_end|>", picture) for picture in pictures]
        scores = dict(LocalScorer(tmp_path / told["trains"] / "last").scores(Scored(*item) for item in items))
        assert torch.allclose(torch.tensor([scores[i] for i in range(9)]), ours(run, items), rtol=1e-5, atol=1e-5)
