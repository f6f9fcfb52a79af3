"""Checkpoints of DeepSpeed, written by DeepSpeed itself: see made_by/write_deepspeed.py."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

import shardckpt
from shardckpt import errors
from shardckpt.convert.opening import open_source
from shardckpt.convert.torch_objects import ObjectsLoader
from shardckpt.convert.torch_sources import read_objects
from tests.convert.layouts import Call

WRITTEN = Path(__file__).parent / "made_by" / "deepspeed-0.19.8"
ZERO = ["stage-1", "stage-1-bf16", "stage-2", "stage-2-aligned", "stage-3", "stage-3-subgroups"]
SCALED = {kind: {"loss_scaler"} for kind in ZERO if kind != "stage-1-bf16"}
UNIVERSAL = ["universal", "universal-of-stage-3"]
SHARDED = ["stage-2", "stage-3", "universal"]


class Model(nn.Module):
    """The model of write_deepspeed.py."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 3)
        self.layer = nn.Linear(3, 5)
        self.frozen = nn.Linear(5, 3).requires_grad_(False)
        self.norm = nn.LayerNorm(3)
        self.head = nn.Linear(3, 7, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("shift", torch.zeros(3))


def groups(model):
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]


def copied(kind: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(WRITTEN / kind, tmp_path / "saved"))


def expected(kind: str) -> dict:
    return torch.load(WRITTEN / kind / "expected.pt", weights_only=True)


def states_in(folder: Path, pattern: str) -> Path:
    return sorted(folder.rglob(pattern))[0]


@pytest.mark.parametrize("kind", ["stage-0", *ZERO, *UNIVERSAL])
def test_weights_and_moments_are_those_that_deepspeed_gathers(kind, tmp_path):
    report = shardckpt.convert(WRITTEN / kind, tmp_path / "c")
    state = shardckpt.load_state(tmp_path / "c")
    wanted = expected(kind)
    for name, tensor in wanted["weights"].items():
        assert torch.equal(state["model"][name].float(), tensor.float()), name
    assert state["model"]["shift"].tolist() == [0.25, 0.5, -0.75]
    assert torch.equal(state["model"]["head.weight"], state["model"]["embedding.weight"])
    assert set(state["model"]) == set(Model().state_dict())
    assert (state["note"], state["global_steps"]) == ("three steps", 3)
    for key in ("exp_avg", "exp_avg_sq"):
        for name, tensor in wanted.get(key, {}).items():
            assert torch.equal(state["optimizer"]["state"][name][key], tensor), (key, name)
    assert report.writer == "DeepSpeed 0.19.8"
    assert not [name for name in report.left_out if name.startswith(("model", "optimizer."))]
    assert set(report.left_out) == {"expected.pt"} | (SCALED.get(kind, set()))


@pytest.mark.parametrize("kind", [*ZERO, *UNIVERSAL])
def test_a_model_and_its_optimizer_load_the_converted_checkpoint(kind, tmp_path):
    shardckpt.convert(WRITTEN / kind, tmp_path / "c")
    model = Model()
    optimizer = torch.optim.AdamW(groups(model), lr=0.5)
    shardckpt.load(
        {"model": model, "optimizer": optimizer}, tmp_path / "c", keys=["model", "optimizer"],
        dtype="cast",
    )  # fmt: skip
    wanted = expected(kind)
    assert torch.equal(model.layer.weight, wanted["weights"]["layer.weight"].float())
    assert optimizer.param_groups[0]["lr"] == 0.01
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    found = optimizer.state[model.layer.weight]["exp_avg"]
    assert torch.equal(found, wanted["exp_avg"]["layer.weight"])
    assert optimizer.state[model.layer.bias]["step"] == 3


@pytest.mark.parametrize("kind", ["stage-2-aligned", "stage-3-subgroups"])
def test_every_box_of_a_tensor_is_read(kind):
    wanted = expected(kind)["weights"]["layer.weight"]
    with open_source(WRITTEN / kind) as source:
        for row in range(5):
            for column in range(3):
                for rows in range(6 - row):
                    box = source.read_box("model.layer.weight", (row, column), (rows, 3 - column))
                    assert torch.equal(box, wanted[row : row + rows, column:])


def test_the_folder_of_a_step_is_a_source_too(tmp_path):
    report = shardckpt.convert(WRITTEN / "stage-2" / "global_step3", tmp_path / "c")
    assert "model.layer.weight" in report.tensors
    assert report.source_format == "DeepSpeed, ZeRO stage 2"


def test_a_missing_file_of_a_rank_is_found(tmp_path):
    folder = copied("stage-2", tmp_path)
    states_in(folder, "*rank_1_*optim_states.pt").unlink()
    with pytest.raises(errors.CorruptionError, match="1 of 2 files"):
        shardckpt.convert(folder, tmp_path / "c")


def test_model_parallel_ranks_and_experts_are_refused(tmp_path):
    for name in ("mp_rank_01_model_states.pt", "layer_0_expert_1_mp_rank_00_model_states.pt"):
        folder = Path(shutil.copytree(WRITTEN / "stage-2", tmp_path / name))
        shutil.copy(states_in(folder, "mp_rank_00_model_states.pt"), folder / "global_step3" / name)
        with pytest.raises(errors.NotACheckpointError, match="model parallelism"):
            shardckpt.convert(folder, tmp_path / "c")


def damaged(file: Path, change) -> None:
    """Change a torch file, whose objects are left out."""
    state = read_objects(str(file), ObjectsLoader())
    change(state)
    torch.save(state, file)


def optimizer_state(state):
    return state["optimizer_state_dict"]


def base_state(state):
    saved = optimizer_state(state)
    return saved.get("base_optimizer_state", saved.get("optimizer_state_dict"))["state"]


MODEL, OPTIMIZER = "*model_states.pt", "*optim_states.pt"
DAMAGE = {
    "shape": (MODEL, lambda s: s["param_shapes"][0].update({"layer.weight": torch.Size([50, 3])})),
    "huge": (MODEL, lambda s: s["param_shapes"][0].update({"x": torch.Size([1 << 60, 1 << 60])})),
    "negative": (MODEL, lambda s: s["param_shapes"][0].update({"x": (-1, 3)})),
    "name": (MODEL, lambda s: s["param_shapes"][0].update({3: torch.Size([1])})),
    "groups": (MODEL, lambda s: s["param_shapes"].pop()),
    "twice": (MODEL, lambda s: s["param_shapes"][1].update(s["param_shapes"][0])),
    "module": (MODEL, lambda s: s.update(module=[1])),
    "no shapes": (MODEL, lambda s: s.pop("param_shapes")),
    "stage": (OPTIMIZER, lambda s: optimizer_state(s).update(zero_stage="x")),
    "no optimizer": (OPTIMIZER, lambda s: s.pop("optimizer_state_dict")),
    "count": (OPTIMIZER, lambda s: optimizer_state(s).update(partition_count=[1 << 40])),
    "text": (OPTIMIZER, lambda s: optimizer_state(s).update(partition_count="2")),
    "padding": (
        OPTIMIZER,
        lambda s: optimizer_state(s).update(param_alignment_paddings=[[-1, 0], [0, 0, 0]]),
    ),
    "states": (OPTIMIZER, lambda s: next(iter(base_state(s).values())).clear()),
}


@pytest.mark.parametrize("kind", ["stage-2", "stage-3"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_a_typed_error(kind, damage, tmp_path):
    folder = copied(kind, tmp_path)
    pattern, change = DAMAGE[damage]
    damaged(states_in(folder, pattern), change)
    with pytest.raises(errors.CheckpointError):
        shardckpt.convert(folder, tmp_path / "c")
    assert not (tmp_path / "c").exists()


FLAT = {"stage-2": "single_partition_of_fp32_groups", "stage-3": "fp32_flat_groups"}
BASE = {"stage-2": "base_optimizer_state", "stage-3": "optimizer_state_dict"}
FLAT_DAMAGE = {
    "short": lambda flat, state: flat.__setitem__(0, flat[0][:-8].clone()),
    "matrix": lambda flat, state: flat.__setitem__(0, flat[0].reshape(1, -1)),
    "value": lambda flat, state: flat.__setitem__(0, 3.5),
    "empty": lambda flat, state: flat.clear(),
    "moment": lambda flat, state: state[0].update(exp_avg=torch.ones(2)),
    "dtype": lambda flat, state: state[0].update(exp_avg=state[0]["exp_avg"].double()),
}


@pytest.mark.parametrize("kind", FLAT)
@pytest.mark.parametrize("damage", FLAT_DAMAGE)
def test_damage_of_flat_tensors_is_a_typed_error(kind, damage, tmp_path):
    folder = copied(kind, tmp_path)

    def change(saved):
        inner = optimizer_state(saved)
        FLAT_DAMAGE[damage](inner[FLAT[kind]], inner[BASE[kind]]["state"])

    damaged(states_in(folder, OPTIMIZER), change)
    with pytest.raises(errors.CheckpointError):
        shardckpt.convert(folder, tmp_path / "c")


@pytest.mark.parametrize("kind", SHARDED)
def test_a_file_that_calls_a_program_is_refused(kind, tmp_path):
    folder = copied(kind, tmp_path)
    mark = tmp_path / "mark"
    pattern = "fp32.pt" if kind == "universal" else OPTIMIZER
    torch.save({"x": Call(os.system, f"touch {mark}")}, states_in(folder, pattern))
    with pytest.raises(errors.CheckpointError):
        shardckpt.convert(folder, tmp_path / "c")
    assert not mark.exists()


@pytest.mark.parametrize("tag", ["../outside", "/etc", "..", "", "a\0b", "x" * 5000])
def test_a_tag_that_leads_elsewhere_is_refused(tag, tmp_path):
    folder = copied("stage-2", tmp_path)
    shutil.copytree(folder / "global_step3", tmp_path / "outside")
    (folder / "latest").write_text(tag)
    with pytest.raises(errors.CheckpointError):
        shardckpt.convert(folder, tmp_path / "c")


@pytest.mark.parametrize("kind", SHARDED)
def test_a_truncated_file_is_found(kind, tmp_path):
    folder = copied(kind, tmp_path)
    file = states_in(folder, "fp32.pt" if kind == "universal" else OPTIMIZER)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(errors.CheckpointError):
        shardckpt.convert(folder, tmp_path / "c")


@pytest.mark.parametrize("kind", ["stage-1", "stage-3"])
def test_what_is_read_needs_no_gradient(kind):
    with open_source(WRITTEN / kind) as source:
        for name, entry in source.manifest.tensors.items():
            assert not source.read_box(name, (0,) * len(entry.shape), entry.shape).requires_grad


def test_the_state_of_stage_0_is_that_of_an_optimizer_of_torch(tmp_path):
    shardckpt.convert(WRITTEN / "stage-0", tmp_path / "c")
    state = shardckpt.load_state(tmp_path / "c")["optimizer"]
    shapes = [state["state"][index]["exp_avg"].shape for index in range(5)]
    counts = [len(group["params"]) for group in state["param_groups"]]
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    groups = [{"params": parameters[: counts[0]]}, {"params": parameters[counts[0] :]}]
    optimizer = torch.optim.AdamW(groups)
    optimizer.load_state_dict(state)
    for index, parameter in enumerate(parameters):
        moment = optimizer.state[parameter]["exp_avg"]
        assert torch.equal(moment, state["state"][index]["exp_avg"])
        assert moment.any()


def test_the_scripts_that_deepspeed_writes_are_described(tmp_path):
    folder = shutil.copytree(WRITTEN / "stage-0", tmp_path / "saved")
    (folder / "zero_to_torch.py").write_text("")
    report = shardckpt.convert(folder, tmp_path / "c")
    assert "DeepSpeed writes" in report.left_out["zero_to_torch.py"]
