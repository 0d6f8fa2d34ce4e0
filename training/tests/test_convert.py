"""What trainers pickle becomes what the server reads, tensor by tensor; nothing that is pickled beside them is run."""

import json
import os
import pickle
import subprocess
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
from safetensors.torch import load_file  # noqa: E402

from spatialscore_training.convert import Refusal, convert  # noqa: E402

REPOSITORY = Path(__file__).parents[2]
MLP = REPOSITORY / "tests/fixtures/mlp/checkpoint"
PLAIN = REPOSITORY / "tests/fixtures/adapters/plain"


@pytest.fixture
def trained(tmp_path):
    """A folder as HPSv3's and EditReward's trainers leave it: a pickle, a config, and a subfolder with the tokenizer."""
    folder = tmp_path / "run"
    (folder / "tokenizer").mkdir(parents=True)
    torch.save(load_file(MLP / "model.safetensors"), folder / "final_model.pth")
    for file in MLP.iterdir():
        if file.name.startswith(("tokenizer", "chat_template")):
            (folder / "tokenizer" / file.name).write_bytes(file.read_bytes())
        elif file.suffix == ".json" and file.name != "reward_config.json":
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


def inspect(folder):
    """What the server says of a folder, where the tests have one."""
    binary = os.environ.get("SPATIALSCORE_BINARY", REPOSITORY / "target/release/spatialscore")
    if not Path(binary).exists():
        pytest.skip("no server is built")
    return subprocess.run([binary, "inspect", folder], capture_output=True, text=True)


def confirm(folder):
    """What the trainer's source says, as whoever converts has to look it up."""
    said = json.loads((folder / "reward_config.json").read_text())
    known = json.loads((MLP / "reward_config.json").read_text())
    (folder / "reward_config.json").write_text(json.dumps(known | said))


def same(one, two):
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) and one[name].dtype == two[name].dtype for name in one)


def test_a_pickle_becomes_a_checkpoint(trained, tmp_path):
    told = convert(trained, tmp_path / "out")
    same(load_file(tmp_path / "out/model.safetensors"), load_file(MLP / "model.safetensors"))
    said = json.loads((tmp_path / "out/reward_config.json").read_text())
    assert said == {"reward_token": "special", "special_token": "<|Reward|>", "output": "gaussian"}
    assert "instruction, positions" in told
    assert (tmp_path / "out/tokenizer.json").exists()
    assert "missing field `instruction`" in inspect(tmp_path / "out").stderr
    confirm(tmp_path / "out")
    assert "It can be served" in inspect(tmp_path / "out").stdout


def test_the_server_names_the_command_where_it_sees_a_pickle(trained):
    (trained / "reward_config.json").write_bytes((MLP / "reward_config.json").read_bytes())
    told = inspect(trained)
    assert told.returncode == 1
    assert "final_model.pth" in told.stderr and "spatialscore-convert" in told.stderr


def test_long_weights_go_into_shards_in_their_own_number_format(trained, tmp_path):
    state = {name: tensor.bfloat16() for name, tensor in load_file(MLP / "model.safetensors").items()}
    state["rm_head.0.weight"] = state["rm_head.0.weight"].float()
    (trained / "final_model.pth").unlink()
    checkpoint = trained / "checkpoint-7"
    checkpoint.mkdir()
    torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}, checkpoint / "model.pth")
    convert(checkpoint, tmp_path / "out", limit=100_000)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 2
    found = {}
    for name in set(index.values()):
        part = load_file(tmp_path / "out" / name)
        assert all(index[key] == name for key in part)
        found |= part
    same(found, state)
    confirm(tmp_path / "out")
    assert "It can be served" in inspect(tmp_path / "out").stdout


def test_a_lora_takes_the_head_that_lies_beside_it(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    torch.save(load_file(PLAIN / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_config.json").write_bytes((PLAIN / "adapter_config.json").read_bytes())
    head = {n: 2 * t for n, t in load_file(MLP / "model.safetensors").items() if n.startswith("rm_head")}
    torch.save({f"base_model.model.{name}": tensor for name, tensor in head.items()}, folder / "non_lora_state_dict.pth")
    convert(folder, tmp_path / "out", base=MLP)
    found = load_file(tmp_path / "out/adapter_model.safetensors")
    assert {name.removeprefix("base_model.model."): t for name, t in found.items()}.keys() >= head.keys()
    assert torch.equal(found["base_model.model.rm_head.0.weight"], head["rm_head.0.weight"])
    assert "It can be served" in inspect(tmp_path / "out").stdout


class Deed:
    """What a pickle can do to whoever loads it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_pickle_that_does_something_does_nothing(trained, tmp_path):
    with open(trained / "final_model.pth", "wb") as file:
        pickle.dump({"rm_head.weight": Deed(str(tmp_path / "done"))}, file)
    with pytest.raises(Refusal, match="final_model.pth"):
        convert(trained, tmp_path / "out")
    assert not (tmp_path / "done").exists()


def test_what_cannot_be_served_is_refused_by_name(trained, tmp_path):
    torch.save({"rm_head.weight": torch.ones(2, 3, dtype=torch.int8)}, trained / "final_model.pth")
    with pytest.raises(Refusal, match="rm_head.weight is torch.int8"):
        convert(trained, tmp_path / "out")
    with pytest.raises(Refusal, match="none of final_model.pth"):
        (tmp_path / "empty").mkdir()
        convert(tmp_path / "empty", tmp_path / "other")
    assert not (tmp_path / "out").exists()
    with pytest.raises(Refusal, match="lies in the input"):
        convert(trained, trained / "served")
