"""The trainer's short cuts give what transformers gives, and a stage resumes bit for bit."""

import math
import os
import random
import subprocess
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import save_file
from transformers import Qwen2VLImageProcessorPil

from spatialscore_training import language, merge
from spatialscore_training.batches import Lessons
from spatialscore_training.drawings import kinds
from spatialscore_training.files import Refusal
from spatialscore_training.model import look, new_model, patches, read
from spatialscore_training.relations import EVERY, clauses_about
from spatialscore_training.scenes import World
from spatialscore_training.start import EMBEDDING, start_from
from spatialscore_training.tokenizer import BEFORE, BEHIND, kind_ids, train_tokenizer
from spatialscore_training.train import Stage, Trainer, has_ended, main, read_recipe

from test_generator import drawings, folder  # noqa: F401
from test_language import WIDE

WORLD = World(kinds=16, things=(2, 3), clauses=(1, 2))
SIDE = 112


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer()


@pytest.fixture(scope="module")
def batch(folder, tokenizer):
    return Lessons(WORLD, SIDE, 2, 3, duel=True, drawn=True, tokenizer=tokenizer, drawings=folder, seed="0")[0]


def test_any_text_is_legal(tokenizer):
    text = "ünïcode ☃ and 日本語, tabs"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert len(set(kind_ids(tokenizer))) == len(kind_ids(tokenizer))


@pytest.mark.parametrize("typed", ["A Cat  Is LEFT\tof a\u00a0Dog", "A CAT IS LEFT OF A DOG \r\n\n", "\u3000a cat is\nleft of a dog"])
def test_a_prompt_may_be_typed_in_any_way(tokenizer, typed):
    ids = lambda prompt: tokenizer.encode(f"{BEFORE} {prompt}{BEHIND}").ids
    assert ids(typed) == ids("a cat is left of a dog") != ids("a dog is left of a cat")
    # What the conversation says itself stays as it is.
    assert tokenizer.decode(ids("a cat"), skip_special_tokens=False) == f"{BEFORE} a cat{BEHIND}"


def test_names_and_clauses_end_with_a_token(tokenizer):
    for seed in range(300):
        rng = random.Random(seed)
        clauses = tuple(rng.choice(clauses_about(rng.sample(list(kinds()), 3), rng.choice(list(EVERY)))) for _ in range(3))
        prompt = language.write(rng, clauses, held_out=seed % 5 == 0)
        ends = {stop - 1 for _, stop in tokenizer.encode(f" {prompt.text}{BEHIND}").offsets}
        assert {*prompt.ends, *(mention.end for mention in prompt.mentions)} <= ends, prompt.text


@torch.no_grad()
def test_a_model_starts_where_a_checkpoint_of_fewer_words_stands(batch, tokenizer, tmp_path, monkeypatch):
    """In words that both know, their rewards are the same; a new kind's name is no old one's."""
    with monkeypatch.context() as then:
        then.setattr("spatialscore_training.tokenizer.kinds", lambda: dict(islice(kinds().items(), 64)))
        before = train_tokenizer()
    before.save(str(tmp_path / "tokenizer.json"))
    weights = {name: weight for name, weight in new_model(before, 7).state_dict().items() if name != "lm_head.weight"}
    save_file(weights, tmp_path / "model.safetensors")
    prompt, rewards = " a cat is to the left of a dog.", []
    for words in (before, tokenizer):
        model = new_model(words, 0).eval()
        start_from(tmp_path, model, words)
        ids = torch.tensor([words.encode(BEFORE + prompt + BEHIND).ids])
        model.model.language_model.config._attn_implementation = "sdpa"
        pads = ids[0].tolist().index(words.token_to_id("<|image_pad|>"))
        cells = (SIDE // 28) ** 2
        ids = torch.cat([ids[:, :pads], ids[:, pads : pads + 1].expand(1, cells), ids[:, pads + 1 :]], dim=1)
        seen = model.model(
            input_ids=ids,
            pixel_values=patches(batch.pictures[:1]),
            image_grid_thw=torch.tensor([[1, SIDE // 14, SIDE // 14]]),
            mm_token_type_ids=(ids == model.config.image_token_id).int(),
            use_cache=False,
        )
        rewards.append(model.rm_head(seen.last_hidden_state[0, -1]))
    assert torch.allclose(*rewards, atol=1e-5)
    table, zebra = model.get_parameter(EMBEDDING), tokenizer.encode(" zebra").ids
    assert not any(torch.equal(table[zebra[0]], row) for row in weights[EMBEDDING])


def test_patches_are_the_image_processors(batch):
    processor = Qwen2VLImageProcessorPil(min_pixels=SIDE * SIDE, max_pixels=SIDE * SIDE)
    values = processor(Image.fromarray(batch.pictures[1].numpy()), return_tensors="pt")["pixel_values"]
    assert torch.allclose(patches(batch.pictures[1:]), values, atol=1e-6)


@torch.no_grad()
def test_prompts_packed_and_pictures_together_are_as_alone(batch, tokenizer):
    model = new_model(tokenizer, 0).eval()
    hidden = read(model, look(model, batch.pictures)[0], batch.ids, batch.positions, batch.spans)[-1]
    grid = SIDE // 14
    start = int(batch.spans[0, 0])  # the end of the common frame
    first, last = int(batch.reward[1, 1]) + 1, int(batch.reward[1, 2])
    ids = torch.cat([batch.ids[1:, :start], batch.ids[1:, first : last + 1]], dim=1)
    for part in (model.model.language_model, model.model.visual):
        part.config._attn_implementation = "sdpa"
    alone = model.model(
        input_ids=ids,
        pixel_values=patches(batch.pictures[1:]),
        image_grid_thw=torch.tensor([[1, grid, grid]]),
        mm_token_type_ids=(ids == model.config.image_token_id).int(),
        use_cache=False,
    ).last_hidden_state[0, -1]
    assert torch.allclose(hidden[1, last], alone, atol=1e-4)


@pytest.mark.parametrize("trains", ["eyes", "reader", "head", "all"])
@pytest.mark.parametrize("world", [WORLD, WIDE], ids=["before", "wide"])
def test_a_stage_resumes_bit_for_bit(trains, world, folder, tmp_path):
    stage = Stage("try", trains, world, steps=4, rows=2, prompts=2, rate=1e-3, side=SIDE, duel=trains in ("head", "all"))
    weights = []
    for name, halts in (("whole", [4]), ("halves", [2, 4])):
        (tmp_path / name).mkdir()
        for halt in halts:
            trainer = Trainer(stage, tmp_path / name, folder, 0, Accelerator(cpu=True))
            while trainer.step < halt:
                trainer.advance(trainer.lessons[trainer.step])
            trainer.save()
        weights.append(trainer.model.state_dict())
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_eyes_may_be_asked_nothing_and_see_things_that_do_not_touch(folder, tmp_path):
    stage = Stage("try", "eyes", replace(WORLD, size=(0.15, 0.17)), steps=2, rows=2, prompts=0, rate=1e-3, side=SIDE)
    trainer = Trainer(stage, tmp_path, folder, 0, Accelerator(cpu=True))
    batch = next(batch for batch in map(trainer.lessons.__getitem__, range(20)) if not batch.order.any())
    figures = trainer.advance(batch)
    assert all(map(math.isfinite, figures.values())), figures


def test_a_reader_reads_what_the_eyes_see(folder, tmp_path, monkeypatch):
    stage = Stage("try", "reader", WORLD, steps=2, rows=2, prompts=2, rate=1e-3, side=SIDE, seen=True)
    trainer = Trainer(stage, tmp_path, folder, 0, Accelerator(cpu=True))
    monkeypatch.setattr(trainer, "_imagine", lambda *_: pytest.fail("these tokens are made of the truth"))
    before = {name: weight.clone() for name, weight in trainer.model.state_dict().items()}
    trainer.advance(trainer.lessons[0])
    changed = {name.split(".")[1] for name, weight in trainer.model.state_dict().items() if not torch.equal(weight, before[name])}
    assert "language_model" in changed and "visual" not in changed


RECIPE = """
[world]
kinds = 16
things = [2, 3]
relations = "all"
stress = ["between", "empty"]

[stages.try]
trains = "reader"
side = 112
rows = 2
prompts = 2
rate = 1e-3
steps = 3
"""
THEN = """
[stages.then]
after = ["try"]
trains = "head"
side = 112
rows = 2
prompts = 2
rate = 1e-3
steps = 3
"""


def test_a_stage_waits_for_those_it_comes_after(folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "recipe.toml").write_text(RECIPE + THEN)
    monkeypatch.chdir(tmp_path)

    def train(*arguments: str) -> dict[str, int]:
        monkeypatch.setattr("sys.argv", ["train", "--cpu", "--recipe", "recipe.toml", "--drawings", str(folder), *arguments])
        main()
        return {path.stem: torch.load(path, weights_only=True)["step"] for path in Path(".cache/runs/mini").glob("*.pt")}

    with pytest.raises(SystemExit) as ended:
        train("--steps", "4", "--trains", "head")
    assert not ended.value.code and capsys.readouterr().err == "then waits for try\n"
    assert train("--steps", "4", "--minutes", "0.0001") == {"try": 1}
    assert train("--trains", "reader") == {"try": 3}
    assert train("--trains", "head") == {"try": 3, "then": 3}


@pytest.mark.parametrize("arguments", ["--steps 0", "--stage nowhere", "--seed -1", "--threads 0", "--minutes -1"])
def test_impossible_arguments_are_refused(folder, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["train", "--cpu", "--drawings", str(folder), *arguments.split()])
    with pytest.raises(SystemExit, match="error: --"):
        main()
    assert not (tmp_path / ".cache").exists()


def test_a_state_made_otherwise_is_refused(folder, tmp_path):
    stage = Stage("try", "head", WORLD, steps=4, rows=2, prompts=2, rate=1e-3, side=SIDE)
    begin = lambda stage, seed: Trainer(stage, tmp_path, folder, seed, Accelerator(cpu=True))
    begin(stage, 0).save()
    begin(replace(stage, steps=9), 0)
    for other, seed, said in ((stage, 1, "seed was 0, is now 1"), (replace(stage, rate=1e-2), 0, "rate was 0.001, is now 0.01")):
        with pytest.raises(Refusal, match=said):
            begin(other, seed)


def test_a_stage_goes_on_in_the_grammar_that_it_began_with(folder, tmp_path, monkeypatch):
    stage = Stage("try", "head", WIDE, steps=2, rows=2, prompts=2, rate=1e-3, side=SIDE)
    trainer = Trainer(stage, tmp_path, folder, 0, Accelerator(cpu=True))
    trainer.save()
    monkeypatch.setattr("spatialscore_training.train.WRITTEN_WITH", "sha256:another")
    with pytest.raises(Refusal, match="written_with was sha256:.*, is now sha256:another"):
        has_ended(stage, tmp_path, folder, 0)
    trainer.step = stage.steps
    trainer.save()
    assert has_ended(stage, tmp_path, folder, 0)


def test_two_processes_go_as_one_with_both_their_lessons(folder, tmp_path):
    (tmp_path / "recipe.toml").write_text(RECIPE)
    # As `accelerate launch` does for GPUs; for CPUs it wants MPI.
    launch = f"{sys.executable} -m torch.distributed.run --standalone --nproc_per_node 2"
    train = f"-m spatialscore_training.train --cpu --threads 1 --recipe recipe.toml --drawings {folder}"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    subprocess.run(f"{launch} {train}".split(), cwd=tmp_path, env=environment, check=True, timeout=300)
    two = torch.load(tmp_path / ".cache/runs/mini/try.pt", weights_only=True)
    # A stage after it, stopped and gone on with.
    (tmp_path / "recipe.toml").write_text(f'{RECIPE}\n[stages.then]\nafter = ["try"]\n{RECIPE.partition("[stages.try]")[2]}')
    for steps in (1, 2):
        subprocess.run(f"{launch} {train} --stage then --steps {steps}".split(), cwd=tmp_path, env=environment, check=True, timeout=300)
    assert torch.load(tmp_path / ".cache/runs/mini/then.pt", weights_only=True)["step"] == 2

    (tmp_path / "recipe.toml").write_text(RECIPE)
    (stage,) = read_recipe(tmp_path / "recipe.toml")
    (tmp_path / "one").mkdir()
    one = Trainer(stage, tmp_path / "one", folder, 0, Accelerator(cpu=True))
    one.model.train()
    trained = [p for group in one.optimiser.param_groups for p in group["params"]]
    while one.step < stage.steps:
        lessons, step, gradients = (2 * one.step, 2 * one.step + 1), one.step, []
        for lesson in lessons:
            torch.manual_seed((one.seed << 32) + lesson)
            one.optimiser.zero_grad()
            one.losses(one.lessons[lesson])[0].backward()
            gradients.append([p.grad for p in trained])
        # Its own share of the step is that of the lesson asked last; the mean of both takes its place.
        one._share_gradients = lambda: [setattr(p, "grad", (a + b) / 2 if a is not None else None) for p, a, b in zip(trained, *gradients)]
        one.lesson = lambda _: lessons[1]
        one.advance(one.lessons[lessons[1]])
        assert one.step == step + 1
    assert two["step"] == stage.steps
    for name, weight in one.model.state_dict().items():
        assert torch.allclose(two["model"][name], weight, atol=1e-5), name


def test_merge_takes_the_eyes_of_one_state_and_the_rest_of_the_other(tmp_path, monkeypatch):
    eyes = {"model.visual.a": torch.ones(2), "rm_head.0.weight": torch.ones(2)}
    reader = {"model.visual.a": torch.zeros(2), "rm_head.0.weight": torch.zeros(2)}
    torch.save({"model": eyes, "step": 3}, tmp_path / "eyes.pt")
    torch.save({"model": reader, "step": 5}, tmp_path / "reader.pt")
    paths = [str(tmp_path / f"{name}.pt") for name in ("eyes", "reader", "merged")]
    monkeypatch.setattr("sys.argv", ["merge", *paths])
    merge.main()
    merged = torch.load(paths[2], weights_only=True)
    assert merged["step"] == 5
    assert merged["model"]["model.visual.a"].tolist() == [1, 1]
    assert merged["model"]["rm_head.0.weight"].tolist() == [0, 0]
