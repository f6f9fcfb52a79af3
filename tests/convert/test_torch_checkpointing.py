"""Folders of torch_checkpointing: those that it wrote itself, see
made_by/write_torch_checkpointing.py, and others with any layout of DTensors."""

from __future__ import annotations

import itertools
import os
import pickle
import random
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

import shardckpt
from shardckpt import NNHandler, errors
from shardckpt.cli.main import main
from shardckpt.convert.opening import open_source
from shardckpt.torch_compat import distribute_locally
from shardckpt.transforms import Transpose

WRITTEN = Path(__file__).parent / "made_by" / "torch_checkpointing-0.1.1"
FOLDERS = ["single", "plain", "fsdp2", "mixed", "mesh", "hsdp"]


class Model(nn.Module):
    """The model of the script that wrote the folder."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(3, 7)
        self.down = nn.Linear(7, 3, bias=False)
        self.register_buffer("shift", torch.zeros(3))

    def forward(self, x):
        return self.down(torch.relu(self.up(x))) + self.shift


@pytest.fixture
def copied(tmp_path):
    """Copies a folder, without the expected state."""

    def copy(name):
        made = Path(shutil.copytree(WRITTEN / name, tmp_path / name))
        (made / "expected.pt").unlink()
        return made

    return copy


def equal(one, other) -> bool:
    """Whether two states are equal, bit for bit."""
    if isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor):
        return (
            one.dtype == other.dtype
            and one.shape == other.shape
            and torch.equal(
                torch.empty(one.shape, dtype=one.dtype).copy_(one).view(-1).view(torch.uint8),
                torch.empty(one.shape, dtype=one.dtype).copy_(other).view(-1).view(torch.uint8),
            )
        )
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and len(one) == len(other) and all(map(equal, one, other))
    return type(one) is type(other) and one == other


def loaded(folder, tmp_path, **options):
    report = shardckpt.convert(folder, tmp_path / "converted", overwrite=True, **options)
    return report, shardckpt.load_state(tmp_path / "converted")


@pytest.mark.parametrize("name", FOLDERS)
def test_the_state_is_that_which_torch_checkpointing_loads(name, copied, tmp_path):
    expected = torch.load(WRITTEN / name / "expected.pt", weights_only=True)
    expected.pop("note", None)
    options = {"keys": ["model", "alone"]} if name == "hsdp" else {}  # without partial sums
    report, state = loaded(copied(name), tmp_path, **options)
    assert report.source_format == "torch_checkpointing"
    assert set(expected) <= set(state)
    for key, value in expected.items():
        if key == "optimizer" and "_optimizer_state_format_version" in value:
            assert report.changed["optimizer"]
            del value["_optimizer_state_format_version"]
            value["param_groups"] = [
                {**g, "params": g["param_names"]} for g in value["param_groups"]
            ]
        if key in ("rng", "data"):  # differs by rank
            continue
        if name == "hsdp" and key == "model":  # other ranks have other layers
            value |= {f"layers.{rank}.weight": torch.full((2,), float(rank)) for rank in range(4)}
        assert equal(state[key], value), key


def test_files_that_the_metadata_do_not_list_are_listed(copied, tmp_path):
    report, _ = loaded(copied("mixed"), tmp_path)
    files = {f"rank_{rank}/{name}" for rank in range(2) for name in ("note", "settings.json")}
    assert report.left_out.keys() == files


def test_values_that_differ_by_rank_stay_those_of_each_rank(copied, tmp_path):
    report, state = loaded(copied("plain"), tmp_path)
    assert [rng.tolist() for rng in state["rng"]] == [[0, 1, 2, 3, 4], [1, 2, 3, 4, 5]]
    assert state["data"]["position"] == [10, 11]
    assert state["data"]["order"] == [3, (1, "x")]
    assert state["step"] == 7
    assert state["odd"] == {"none": None, "flag": True, "lr": 0.5, 3: b"\0\1"}
    assert report.left_out["odd.settings"].endswith("Settings")
    for rank in range(2):
        template = {"rng": shardckpt.PerRank(torch.zeros(5, dtype=torch.uint8))}
        with open_source(tmp_path / "converted") as source:
            assert source.manifest.world_size == 2
            assert source.manifest.per_rank[rank]
    del template
    half, every_second = state["data"]["tied"]
    assert torch.equal(half[::2], every_second)


def test_a_model_with_its_optimizer_loads_the_converted_state(copied, tmp_path):
    expected = torch.load(WRITTEN / "fsdp2" / "expected.pt", weights_only=True)
    shardckpt.convert(copied("fsdp2"), tmp_path / "converted")
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    shardckpt.load({"model": model, "optimizer": optimizer}, tmp_path / "converted", strict=False)
    assert equal(dict(model.state_dict()), expected["model"])
    assert optimizer.param_groups[0]["lr"] == 0.01
    moments = optimizer.state_dict()["state"]
    for number, (fqn, _) in enumerate(model.named_parameters()):
        assert equal(moments[number]["exp_avg"], expected["optimizer"]["state"][fqn]["exp_avg"])


@pytest.mark.parametrize("name", ["fsdp2", "mesh", "mixed", "plain"])
def test_a_handler_takes_the_weights(name, copied):
    expected = torch.load(WRITTEN / name / "expected.pt", weights_only=True)
    handler = NNHandler.initialize_from_checkpoint(copied(name), Model)
    assert equal(dict(handler.model.state_dict()), expected["model"])


def test_transforms_and_the_commands_take_it_as_a_source(copied, tmp_path, capsys):
    folder, expected = (
        copied("mesh"),
        torch.load(WRITTEN / "mesh" / "expected.pt", weights_only=True),
    )
    shardckpt.convert(
        folder,
        tmp_path / "t",
        keys="model",
        transforms=[Transpose("model.up.weight")],
    )
    turned = shardckpt.load_state(tmp_path / "t")["model"]["up.weight"]
    assert torch.equal(turned, expected["model"]["up.weight"].T)
    torch.save(expected["model"], tmp_path / "model.pth")
    options = ["--keys", "up.weight", "down.weight", "--rename", "model="]
    assert main(["diff", str(folder), str(tmp_path / "model.pth"), *options]) == 0
    for command in (["inspect"], ["stats"], ["verify"]):
        assert main([*command, str(folder)]) == 0, command
    assert "\n  torch_checkpointing\n" in capsys.readouterr().out
    assert main(["cat", str(folder), "model.up.weight[0]"]) == 0
    assert capsys.readouterr().out.startswith("[")


# ---- any layout


def by_rank(world_size, make, folder, *, item="x"):
    """Write the file of each rank, as torch_checkpointing does. `make` is called on each rank."""
    folder.mkdir(exist_ok=True)
    for rank in range(world_size):
        dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
        try:
            with open(folder / f"{item}_{rank}.pt", "wb") as file:
                torch.save(make(rank), file)
        finally:
            dist.destroy_process_group()
    return folder


def of_some_ranks(full, mesh, placements):
    """Return a DTensor on a mesh that may lack the rank."""
    if mesh.get_coordinate() is not None:
        return distribute_locally(full, mesh, placements)
    return DTensor.from_local(
        full.new_empty(0), mesh, placements, run_check=False, shape=full.shape, stride=full.stride()
    )


def placements_of(sizes, dims, rng):
    """Return placements for a mesh: Replicate, Shard, or strided shards to the left of shards."""
    found = [Replicate() if rng.random() < 0.3 else Shard(rng.randrange(dims)) for _ in sizes]
    for at in range(len(sizes) - 1):
        later = [
            d for d in range(at + 1, len(sizes)) if found[d] == found[at] and found[d].is_shard()
        ]
        if later and rng.random() < 0.5:
            factor = 1
            for d in later:
                factor *= sizes[d]
            found[at] = _StridedShard(found[at].dim, split_factor=factor)
    return found


def even(shape, sizes, placements):
    """Return a shape that strided shards divide into equal parts."""
    found = list(shape)
    for dim in {p.dim for p in placements if hasattr(p, "split_factor")}:
        for size, placement in zip(sizes, placements, strict=True):
            found[dim] *= size if getattr(placement, "dim", None) == dim else 1
    return tuple(found)


@pytest.mark.parametrize("seed", range(8))
def test_any_mesh_and_placements(seed, tmp_path):
    rng = random.Random(seed)
    sizes = rng.choice([(2,), (3,), (2, 2), (2, 3), (3, 2), (2, 2, 2), (1, 4)])
    count = 1
    for size in sizes:
        count *= size
    shapes = [tuple(rng.randrange(1, 9) for _ in range(rng.randrange(1, 4))) for _ in range(12)]
    layouts = [placements_of(sizes, len(shape), rng) for shape in [*shapes, (0, 3)]]
    # up to torch 2.9, distribute_tensor divides uneven strided shards in another way
    shapes = [even(shape, sizes, each) for shape, each in zip(shapes, layouts, strict=False)]
    full = [torch.randn(shape) for shape in [*shapes, (0, 3)]]

    def make(rank):
        mesh = init_device_mesh("cpu", sizes)
        return {
            f"t{number}": distribute_locally(tensor, mesh, placements)
            for number, (tensor, placements) in enumerate(zip(full, layouts, strict=True))
        }

    with open_source(by_rank(count, make, tmp_path / "c")) as source:
        for number, tensor in enumerate(full):
            box = [sorted(rng.choices(range(size + 1), k=2)) for size in tensor.shape]
            offsets = tuple(low for low, _ in box)
            parts = tuple(high - low for low, high in box)
            found = source.read_box(f"x.t{number}", (0,) * tensor.dim(), tuple(tensor.shape))
            assert torch.equal(found, tensor), layouts[number]
            index = tuple(slice(low, high) for low, high in box)
            assert torch.equal(source.read_box(f"x.t{number}", offsets, parts), tensor[index])


def test_strided_shards_in_the_order_of_fsdp2(tmp_path):
    """With sizes that the mesh does not divide, FSDP2 does not follow DTensor's order."""
    full = torch.arange(9.0)

    def make(rank):
        mesh = init_device_mesh("cpu", (4, 2), mesh_dim_names=("dp", "tp"))
        parts = [part.chunk(4) for part in full.chunk(2)]
        own = parts[rank % 2]
        local = own[rank // 2].clone() if rank // 2 < len(own) else torch.zeros(0)
        placements = [_StridedShard(0, split_factor=2), Shard(0)]
        tensor = DTensor.from_local(
            local, mesh, placements, run_check=False, shape=full.shape, stride=(1,)
        )
        return {"w": tensor}

    with open_source(by_rank(8, make, tmp_path / "c")) as source:
        assert torch.equal(source.read_box("x.w", (0,), (9,)), full)


def test_meshes_of_some_ranks_and_their_slices(tmp_path):
    full = torch.arange(12.0).reshape(4, 3)

    def make(rank):
        world = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        turned = DeviceMesh("cpu", [[3, 1], [0, 2]])
        pair = DeviceMesh("cpu", [3, 1])
        return {
            "slice": distribute_locally(full, world["tp"], [Shard(1)]),
            "other": distribute_locally(full, world["dp"], [Shard(0)]),
            "turned": distribute_locally(full, turned, [Shard(0), Shard(1)]),
            "flat": distribute_locally(full, world["dp", "tp"]._flatten(f"all{rank}"), [Shard(0)]),
            "pair": of_some_ranks(full, pair, [Shard(0)]),
            "list": [distribute_locally(full, turned, [Replicate(), Shard(0)]), 3],
        }

    _, state = loaded(by_rank(4, make, tmp_path / "c"), tmp_path)
    for name in ("slice", "other", "turned", "flat", "pair"):
        assert torch.equal(state["x"][name], full), name
    assert torch.equal(state["x"]["list"][0], full)


def test_views_bits_and_dtypes(tmp_path):
    storage = torch.arange(20, dtype=torch.float64)
    complex_ = torch.tensor([1 + 2j, 3 - 1j])
    plain = {
        "transposed": storage.reshape(4, 5).T,
        "steps": storage[3::4],
        "conjugated": complex_.conj(),
        "imaginary": torch.tensor([3 + 4j]).conj().imag,
        "expanded": torch.ones(1).expand(3, 2),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "parameter": nn.Parameter(torch.ones(3)),
        **{
            f"of {dtype}": torch.arange(5).to(dtype)
            for dtype in (torch.bool, torch.uint8, torch.int16, torch.bfloat16, torch.float8_e5m2,
                          torch.complex128, torch.uint16, torch.uint64)
        },
    }  # fmt: skip
    folder = by_rank(1, lambda rank: {**plain, "sparse": torch.eye(2).to_sparse()}, tmp_path / "c")
    report, state = loaded(folder, tmp_path)
    assert report.left_out.keys() == {"x.sparse"}
    for name, tensor in plain.items():
        assert equal(state["x"][name], tensor.detach().resolve_conj().resolve_neg()), name
    with open_source(folder) as source:
        assert torch.equal(
            source.read_box("x.transposed", (1, 1), (3, 2)), plain["transposed"][1:4, 1:3]
        )


def test_plain_tensors_that_differ_by_rank(tmp_path):
    def make(rank):
        return {"w": torch.ones(3), "mean": torch.full((2,), float(rank)), "n": rank}

    report, state = loaded(by_rank(2, make, tmp_path / "c"), tmp_path)
    assert state["x"]["mean"].tolist() == [0, 0]  # as DDP takes the buffers of rank 0
    assert "x.mean of rank 1" in report.left_out
    assert state["x"]["n"] == [0, 1]
    folder = by_rank(2, lambda rank: {"seed": torch.full((2,), rank)}, tmp_path / "d", item="rng")
    report, state = loaded(folder, tmp_path)
    assert [seed.tolist() for seed in state["rng"]["seed"]] == [[0, 0], [1, 1]]
    assert not report.left_out


def test_a_partial_placement_is_refused_when_it_is_read(copied, tmp_path):
    with pytest.raises(errors.NotACheckpointError, match=r"Partial\(sum\)") as caught:
        loaded(copied("hsdp"), tmp_path)
    assert caught.value.tensor == "sums.loss"
    _, state = loaded(tmp_path / "hsdp", tmp_path, keys=["model", "alone"])
    assert torch.equal(state["alone"], torch.arange(15.0).reshape(5, 3))


# ---- damage


def edited(folder, change):
    metadata = pickle.loads((folder / "metadata.pkl").read_bytes())
    change(metadata)
    (folder / "metadata.pkl").write_bytes(pickle.dumps(metadata))
    return folder


def sharding(metadata, path='["up.weight"]'):
    groups = metadata["metadata"]["model"]["nested_path_to_metadata"][path]
    return groups[0]["sharding_metadata"]["data"]


@pytest.mark.parametrize("name", ["fsdp2", "mesh", "mixed", "hsdp"])
def test_a_missing_file_of_a_rank_is_named(name, copied, tmp_path):
    folder = copied(name)
    lost = "rank_1/model.safetensors" if name == "mixed" else "model_1.pt"
    (folder / lost).unlink()
    with pytest.raises(errors.CorruptionError, match="is missing") as caught:
        loaded(folder, tmp_path)
    assert caught.value.path == str(folder / lost)
    assert caught.value.rank == 1
    assert caught.value.remedy
    assert not (tmp_path / "converted").exists()


CHANGES = {
    "a world of no ranks": lambda m: m.update(world_size=0),
    "a world that is text": lambda m: m.update(world_size="2"),
    "a world of 2**60 ranks": lambda m: m.update(world_size=1 << 60),
    "no items": lambda m: m.update(metadata=[]),
    "another dtype": lambda m: sharding(m).update(dtype="torch.float64"),
    "another shape": lambda m: sharding(m).update(global_shape=[8, 3]),
    "a shape of 4 TB": lambda m: sharding(m).update(global_shape=[10**6, 10**6]),
    "a negative shape": lambda m: sharding(m).update(global_shape=[-7, 3]),
    "another dimension": lambda m: sharding(m)["placements"][0].update(dim=1),
    "a dimension too far": lambda m: sharding(m)["placements"][0].update(dim=7),
    "an unknown placement": lambda m: sharding(m)["placements"][0].update(type="Odd"),
    "a mesh of one rank": lambda m: sharding(m)["mesh_spec"].update(mesh_shape=[1], mesh_data=[0]),
    "a mesh of three ranks": lambda m: sharding(m)["mesh_spec"].update(
        mesh_shape=[3], mesh_data=[0, 1, 2]
    ),
    "a mesh with a rank twice": lambda m: sharding(m)["mesh_spec"].update(mesh_data=[0, 0]),
    "a mesh of other sizes": lambda m: sharding(m)["mesh_spec"].update(mesh_shape=[2, 2]),
    "no groups": lambda m: m["metadata"]["model"].update(nested_path_to_metadata={"x": 1}),
    "a path that is not JSON": lambda m: m["metadata"]["model"]["nested_path_to_metadata"].update(
        {"[": []}
    ),
    "a path of text": lambda m: m["metadata"]["model"]["nested_path_to_metadata"].update({"1": []}),
}


@pytest.mark.parametrize("what", CHANGES)
@pytest.mark.parametrize("name", ["fsdp2", "mixed"])
def test_metadata_that_do_not_fit_are_refused(name, what, copied, tmp_path):
    folder = edited(copied(name), CHANGES[what])
    with pytest.raises((errors.CheckpointError, errors.CoverageError)) as caught:
        loaded(folder, tmp_path)
    assert caught.value.remedy
    assert not (tmp_path / "converted").exists()


LAYOUTS = ["../../x", "/etc/passwd", "rank_0/../../x", "", "rank_0//model.safetensors", "a\0b"]


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_file_outside_the_folder_is_not_opened(name, copied, tmp_path):
    def change(metadata):
        layouts = metadata["metadata"]["model"]["rank_to_layout_info"]
        layouts[1]["file_path"] = name

    with pytest.raises(errors.CheckpointError):
        loaded(edited(copied("mixed"), change), tmp_path)


def test_files_of_exchanged_ranks_are_found(copied, tmp_path):
    for name in ("fsdp2", "hsdp"):
        folder = copied(name)
        (folder / "model_0.pt").rename(folder / "kept")
        (folder / "model_1.pt").rename(folder / "model_0.pt")
        (folder / "kept").rename(folder / "model_1.pt")
        with pytest.raises(errors.CorruptionError, match="rank"):
            loaded(folder, tmp_path)


def test_parts_that_disagree_are_refused(tmp_path):
    def make(rank):
        mesh = init_device_mesh("cpu", (2,))
        local = torch.zeros(2 if rank else 3, 3)
        odd = DTensor.from_local(
            local, mesh, [Shard(0)], run_check=False, shape=(4, 3), stride=(3, 1)
        )
        return {"w": odd}

    with pytest.raises(errors.CorruptionError, match=r"x\.w") as caught:
        loaded(by_rank(2, make, tmp_path / "c"), tmp_path)
    assert caught.value.expected == "[2, 3]"
    assert caught.value.actual == "[3, 3]"

    def mixed(rank):
        mesh = init_device_mesh("cpu", (2,))
        full = torch.zeros(4, 3)
        return {"w": distribute_locally(full, mesh, [Shard(0)]) if rank else full}

    with pytest.raises(errors.CorruptionError, match="plain tensor on others"):
        loaded(by_rank(2, mixed, tmp_path / "d"), tmp_path)

    def dtypes(rank):
        mesh = init_device_mesh("cpu", (2,))
        full = torch.zeros(4, 3, dtype=torch.float64 if rank else torch.float32)
        return {"w": distribute_locally(full, mesh, [Shard(0)])}

    with pytest.raises(errors.CorruptionError, match="dtypes"):
        loaded(by_rank(2, dtypes, tmp_path / "e"), tmp_path)


def test_replicas_that_differ_are_listed(tmp_path):
    def make(rank):
        mesh = init_device_mesh("cpu", (2,))
        return {"w": DTensor.from_local(torch.full((3,), float(rank)), mesh, [Replicate()])}

    report, state = loaded(by_rank(2, make, tmp_path / "c"), tmp_path)
    assert state["x"]["w"].tolist() == [0, 0, 0]
    assert "x.w of rank 1" in report.left_out


@pytest.mark.parametrize("name", ["fsdp2", "mixed", pytest.param("plain", marks=pytest.mark.long)])
def test_truncated_and_changed_files_give_typed_errors(name, copied, tmp_path):
    """Every result is the right state or a typed error."""
    folder = copied(name)
    rng = random.Random(0)
    report = shardckpt.convert(folder, tmp_path / "good.pth")
    expected = torch.load(tmp_path / "good.pth", weights_only=True)
    refused = 0
    for file in [path for path in sorted(folder.rglob("*")) if path.is_file()]:
        good = file.read_bytes()
        cuts = [good[:size] for size in (0, 1, 21, 22, len(good) // 2, len(good) - 1)]
        flips = []
        for _ in range(12):
            changed = bytearray(good)
            changed[rng.randrange(len(good))] ^= 1 << rng.randrange(8)
            flips.append(bytes(changed))
        for data in [*cuts, *flips, good + b"x"]:
            file.write_bytes(data)
            try:
                shardckpt.convert(folder, tmp_path / "found.pth", overwrite=True)
            except errors.ShardckptError as error:
                assert error.remedy, error
                refused += 1
            else:
                found = torch.load(tmp_path / "found.pth", weights_only=True)
                if file.suffix == ".pt":  # has checksums
                    assert equal(found, expected), file
        file.write_bytes(good)
    assert refused > 20
    assert report.tensors


def test_other_folders_are_not_taken_for_it(tmp_path):
    folder = tmp_path / "epochs"
    folder.mkdir()
    for epoch in range(2):
        torch.save({"w": torch.full((2,), float(epoch))}, folder / f"model_{epoch}.pt")
    with pytest.raises(errors.NotACheckpointError, match=r"model_0\.pt"):
        loaded(folder, tmp_path)
    (folder / "metadata.pkl").write_bytes(pickle.dumps({"epoch": 3}))
    with pytest.raises(errors.NotACheckpointError):
        loaded(folder, tmp_path)


def test_old_metadata_and_boxes_of_other_tensors(copied, tmp_path):
    """Version 1.0 of the metadata, and tensors that describe their own boxes."""
    folder = copied("mixed")
    expected = torch.load(WRITTEN / "mixed" / "expected.pt", weights_only=True)

    def change(metadata):
        item = metadata["metadata"].pop("model")
        paths = item["nested_path_to_metadata"]
        boxes = {
            "global_shape": [7, 3],
            "local_offsets": [[0, 0]],
            "dtype": "torch.float32",
        }
        halves = [([[0, 0]], [[4, 3]]), ([[4, 0]], [[3, 3]])]
        paths['["up.weight"]'] = [
            {
                "ranks": [rank],
                "sharding_metadata": {
                    "type": "default_tensor_v1",
                    "data": {**boxes, "global_offsets": offsets, "local_sizes": sizes},
                },
            }
            for rank, (offsets, sizes) in enumerate(halves)
        ]
        metadata["metadata"] = {f'["model",{path[1:]}': groups for path, groups in paths.items()}
        layouts = item["rank_to_layout_info"]
        metadata["rank_to_layout_info_mappings"] = {
            rank: {"model": layout} for rank, layout in layouts.items()
        }
        metadata["version"] = "1.0"

    _, state = loaded(edited(folder, change), tmp_path)
    assert equal(state["model"], expected["model"])


def test_nothing_that_a_file_names_is_called(copied, tmp_path, monkeypatch):
    class Harm:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harm"),)

    for name, file in itertools.product(("fsdp2",), ("metadata.pkl", "model_1.pt")):
        folder = copied(name) if not (tmp_path / name).exists() else tmp_path / name
        good = (folder / file).read_bytes()
        if file == "metadata.pkl":
            (folder / file).write_bytes(pickle.dumps({"world_size": 2, "x": Harm()}))
        else:
            with open(folder / file, "wb") as opened:
                torch.save({"x": Harm()}, opened)
        with pytest.raises(errors.CheckpointError):
            loaded(folder, tmp_path)
        assert not (tmp_path / "harm").exists()
        (folder / file).write_bytes(good)
    partial = Partial()
    assert partial.is_partial()
