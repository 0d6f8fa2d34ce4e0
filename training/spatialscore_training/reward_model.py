"""A Qwen-VL with a reward head: made from a base or an earlier run, called, and written as the server reads it."""

import json
import shutil
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import AutoModelForImageTextToText

from .files import Refusal, digest, write_text
from .preprocessing import Preprocessor
from .recipe import Recipe
from .tokenizer import REWARD_TOKEN

HEAD = "rm_head."


def find(name: str) -> Path:
    """A checkpoint's folder: the folder itself, or the hub's snapshot."""
    if Path(name).is_dir():
        return Path(name)
    if name.count("/") != 1 or name.startswith((".", "/")):
        raise Refusal(f"{name}: no such folder, and no hub id (owner/model)")
    return Path(snapshot_download(name))


def weight_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("model*.safetensors"))


def base_of(folder: Path) -> Path | None:
    """What an adapter without weights of its own stands on."""
    said = folder / "adapter_config.json"
    if not said.exists() or weight_files(folder):
        return None
    return find(json.loads(said.read_text())["base_model_name_or_path"])


def head_tensors(folder: Path) -> dict[str, Tensor]:
    """The head of a whole checkpoint; none where it has none."""
    found = {}
    for file in weight_files(folder):
        with safe_open(file, "pt") as tensors:
            found |= {key.removeprefix(HEAD): tensors.get_tensor(key) for key in tensors.keys() if key.startswith(HEAD)}
    return found


def checkpoint_digest(folder: Path) -> str:
    """Of a checkpoint's names, sizes and the ends of its weights: enough to tell another one, quickly."""

    def ends(file: Path) -> bytes:
        with file.open("rb") as opened:
            first = opened.read(1 << 20)
            opened.seek(-min(1 << 20, file.stat().st_size), 2)
            return first + opened.read()

    told = [*weight_files(folder), *folder.glob("adapter_model.safetensors"), *folder.glob("*config.json"), *folder.glob("tokenizer.json")]
    return digest(part for file in sorted(told) for part in (file.name.encode(), str(file.stat().st_size).encode(), ends(file)))


def new_head(width: int, recipe: Recipe) -> nn.Sequential:
    """As transformers initialises a head that its base lacks."""
    widths = [width, *recipe.head]
    layers: list[nn.Module] = []
    for number, (a, b) in enumerate(zip(widths, widths[1:])):
        layers += [nn.Linear(a, b), nn.ReLU()]
        if number == 0 and recipe.head_dropout:
            layers.append(nn.Dropout(recipe.head_dropout))
    layers.append(nn.Linear(widths[-1], 2))
    for layer in layers:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


class OneRow(nn.Module):
    """A table of embeddings of which one row is trained: for the others neither gradient nor moments are held."""

    def __init__(self, table: nn.Embedding, number: int):
        super().__init__()
        self.table, self.number = table.requires_grad_(False), number
        self.row = nn.Parameter(table.weight[number].detach().clone())

    @property
    def weight(self) -> Tensor:
        return self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return torch.where((ids == self.number)[..., None], self.row.to(self.weight.dtype), self.table(ids))


class RewardModel(nn.Module):
    """The model as one call, so that several devices keep their gradients alike."""

    def __init__(self, backbone: nn.Module, reward_id: int, positions: str):
        super().__init__()
        self.backbone, self.reward_id, self.positions = backbone, reward_id, positions

    @property
    def inner(self) -> nn.Module:
        return self.backbone.get_base_model() if isinstance(self.backbone, PeftModel) else self.backbone

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Mean and logarithm of sigma for each row, in fp32, from the hidden state at the reward token."""
        ids = batch["input_ids"]
        batch = dict(batch)
        if self.positions == "flat":
            del batch["mm_token_type_ids"]
            batch["position_ids"] = torch.arange(ids.shape[1], device=ids.device).expand(3, *ids.shape)
        hidden = self.inner.model(**batch, use_cache=False).last_hidden_state
        rows = hidden[torch.arange(len(ids), device=ids.device), (ids == self.reward_id).int().argmax(1)]
        # The head is in fp32 whatever the backbone is in, as in both references.
        with torch.autocast(rows.device.type, enabled=False):
            return self.inner.rm_head(rows.float())

    def trained(self) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}


def _load(folder: Path, recipe: Recipe, dtype: torch.dtype | str) -> nn.Module:
    model, found = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=dtype, attn_implementation=recipe.attention, output_loading_info=True
    )
    lost = [key for key in found["missing_keys"] if key != "lm_head.weight"]
    strays = [key for key in found["unexpected_keys"] if not key.startswith(HEAD)]
    if lost or strays:
        raise Refusal(f"{folder}: {'it lacks' if lost else 'nobody knows'} {(lost or strays)[0]}")
    model.rm_head = new_head(model.config.text_config.hidden_size, recipe)
    return model


def new_model(base: str, init: Path | None, recipe: Recipe, preprocessor: Preprocessor) -> RewardModel:
    """A model that begins: on a base, or with what an earlier run has learnt."""
    whole = recipe.trains == "all"
    folder = find(base)
    if init is None and ((folder / "adapter_config.json").exists() or head_tensors(folder)):
        raise Refusal(f"{base} is a reward model already; --init goes on with its weights, a base would lose them")
    model = _load(folder, recipe, torch.float32 if whole else "auto")
    table = model.get_input_embeddings()
    if len(preprocessor.tokenizer) > table.num_embeddings:
        if not whole:
            raise Refusal(f"{base}: its table of embeddings has {table.num_embeddings} rows and no spare one for {REWARD_TOKEN}")
        model.resize_token_embeddings(len(preprocessor.tokenizer))
        table = model.get_input_embeddings()
    if recipe.gradient_checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    if whole:
        backbone = model
        if init is not None:
            try:
                model.rm_head.load_state_dict({key: tensor.float() for key, tensor in head_tensors(init).items()})
            except RuntimeError as error:
                raise Refusal(f"{init}: its head is not the recipe's: {error}") from error
        model.get_output_embeddings().requires_grad_(False)
        model.set_input_embeddings(OneRow(table, preprocessor.reward_id))
    elif init is None:
        lora = LoraConfig(
            r=recipe.rank,
            lora_alpha=recipe.alpha,
            lora_dropout=recipe.dropout,
            target_modules=recipe.targets,
            modules_to_save=["rm_head"],
            trainable_token_indices=[preprocessor.reward_id],
        )
        backbone = get_peft_model(model, lora)
        backbone.peft_config["default"].base_model_name_or_path = base
    else:
        try:
            backbone = PeftModel.from_pretrained(model, init, is_trainable=True)
        except (RuntimeError, ValueError) as error:
            raise Refusal(f"{init}: it is not what the recipe makes: {error}") from error
        said = backbone.peft_config["default"]
        wanted = {"r": recipe.rank, "lora_alpha": recipe.alpha, "target_modules": recipe.targets}
        if differing := [f"{key} is {getattr(said, key)}, the recipe's {value}" for key, value in wanted.items() if getattr(said, key) != value]:
            raise Refusal(f"{init}: {'; '.join(differing)}")
        said.lora_dropout = recipe.dropout
    reward_model = RewardModel(backbone, preprocessor.reward_id, recipe.positions)
    for parameter in reward_model.trained().values():
        parameter.data = parameter.data.float()
    return reward_model


def shard(model: RewardModel, device: torch.device) -> None:
    """Spreads weights, gradients and moments over all processes (FSDP2): a block's weights are whole only while it computes.

    On a GPU blocks compute in bf16 and their gradients are summed in fp32; the head is in fp32 throughout.
    """
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if device.type != "cpu" else MixedPrecisionPolicy()
    for module in list(model.modules()):
        if type(module).__name__ in model.inner._no_split_modules:
            fully_shard(module, mesh=mesh, mp_policy=policy)
    fully_shard(model.inner.rm_head, mesh=mesh)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def whole_weights(model: RewardModel, recipe: Recipe) -> dict[str, Tensor]:
    """What a checkpoint has of the backbone's weights, on the CPU. Every process must ask; where they hold shards, the first
    gets them."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=recipe.trains == "lora")
    weights = {key.removeprefix("backbone."): tensor for key, tensor in get_model_state_dict(model, options=options).items()}
    for key in [key for key in weights if key.endswith("embed_tokens.row")]:
        table = weights.pop(key.replace(".row", ".table.weight")).clone()
        table[model.reward_id] = weights.pop(key)
        weights[key.replace(".row", ".weight")] = table
    return weights


def reward_config(recipe: Recipe) -> dict:
    """`reward_config.json` of what a recipe makes."""
    reward = {"instruction": recipe.instruction, "reward_token": "special", "special_token": REWARD_TOKEN}
    reward |= {"positions": recipe.positions, "output": "gaussian", "min_pixels": recipe.pixels, "max_pixels": recipe.pixels}
    return reward | ({"pictures": recipe.pictures} if recipe.pictures > 1 else {})


def check_init(init: Path, recipe: Recipe) -> None:
    """Refuses to go on with a run whose reward is read otherwise, or that trained other parts."""
    said_in = init / "reward_config.json"
    if not said_in.exists():
        raise Refusal(f"{init}: no reward_config.json, so it is no run of this trainer; a model without a head is a --base")
    said = json.loads(said_in.read_text())
    if differing := [key for key, value in reward_config(recipe).items() if said.get(key) != value]:
        told = "; ".join(f"{key} is {said.get(key)!r}, the recipe's {reward_config(recipe)[key]!r}" for key in differing)
        raise Refusal(f"{init}: its reward is read otherwise: {told}")
    adapter = (init / "adapter_config.json").exists()
    if adapter != (recipe.trains == "lora"):
        raise Refusal(f"{init} is {'an adapter' if adapter else 'a whole model'}, and the recipe trains {recipe.trains}")


def _head_of(tensors: dict[str, Tensor]) -> nn.Sequential:
    """A head with the shapes and slots of these tensors: ReLU behind each layer but the last, then what has no weights."""
    slots = sorted({int(key.split(".")[0]) for key in tensors})
    layers: list[nn.Module] = []
    for slot in range(slots[-1] + 1):
        if slot in slots:
            rows, columns = tensors[f"{slot}.weight"].shape
            layers.append(nn.Linear(columns, rows, bias=f"{slot}.bias" in tensors))
        else:
            layers.append(nn.ReLU() if slot - 1 in slots else nn.Identity())
    return nn.Sequential(*layers)


def load_checkpoint(folder: Path) -> tuple[RewardModel, Preprocessor]:
    """A checkpoint that can be served, in fp32, with what prepares its items."""
    reward = json.loads((folder / "reward_config.json").read_text())
    if reward["output"] != "gaussian" or reward["reward_token"] != "special":
        raise Refusal(f"{folder}: only a Gaussian that is read at a special token is read here; ask a server")
    base = base_of(folder) or folder
    adapter = folder / "adapter_model.safetensors"
    tensors = load_file(adapter) if adapter.exists() else {}
    head = {key.split(f".{HEAD}")[1]: tensor for key, tensor in tensors.items() if f".{HEAD}" in key} or head_tensors(folder)
    # Without an adapter that lies beside the weights: PEFT reads it, and its head, below.
    model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32, attn_implementation="sdpa")
    model.rm_head = _head_of(head)
    if adapter.exists():
        model = PeftModel.from_pretrained(model, folder)
    else:
        model.rm_head.load_state_dict({key: tensor.float() for key, tensor in head.items()})
    sizes = json.loads((folder / "preprocessor_config.json").read_text())
    pixels = tuple(reward.get(key) or sizes[key] for key in ("min_pixels", "max_pixels"))
    preprocessor = Preprocessor(folder, reward["instruction"], pixels, reward.get("pictures", 1), reward["special_token"])
    return RewardModel(model, preprocessor.reward_id, reward["positions"]).float().eval(), preprocessor


def export(model: RewardModel, weights: dict[str, Tensor], preprocessor: Preprocessor, recipe: Recipe, base: Path, folder: Path, with_base: bool) -> None:
    """Writes a checkpoint of these `whole_weights` that the server reads, of plain files alone."""
    folder.mkdir()
    if recipe.trains == "lora":
        model.backbone.save_pretrained(folder, state_dict=weights)
        (folder / "README.md").unlink(missing_ok=True)
        if with_base:
            for file in [base / "config.json", *weight_files(base), *base.glob("model*.index.json")]:
                shutil.copyfile(file, folder / file.name)
    else:
        dtype = getattr(torch, str(json.loads((base / "config.json").read_text()).get("dtype") or "float32"), torch.float32)
        state = {key: tensor.to(tensor.dtype if key.startswith(HEAD) else dtype) for key, tensor in weights.items()}
        if model.backbone.config.tie_word_embeddings or getattr(model.backbone.config.text_config, "tie_word_embeddings", False):
            state.pop("lm_head.weight", None)
        model.backbone.save_pretrained(folder, state_dict=state)
    preprocessor.processor.save_pretrained(folder)
    # The server reads the older of the two forms.
    (folder / "processor_config.json").unlink(missing_ok=True)
    shutil.copyfile(base / "preprocessor_config.json", folder / "preprocessor_config.json")
    write_text(folder / "reward_config.json", json.dumps(reward_config(recipe), indent=1) + "\n")
