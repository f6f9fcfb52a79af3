"""Transforms: equal to the same operations on full tensors, and each reads only its part."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import shardckpt
from shardckpt import ShardedArray
from shardckpt.cli.main import main
from shardckpt.errors import LoadMismatchError, StateError
from shardckpt.transforms import Concatenate, Pad, Rename, Split, Transpose, Trim
from tests.ranks import run_ranks

DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex128]


def dense(state: dict, transform) -> dict:
    """Apply a transform to the tensors of a flat state, with functions of torch."""
    state = dict(state)
    parts = [state.pop(name) for name in transform.patterns()]
    new = transform.new_names()
    if isinstance(transform, Split):
        (tensor,), groups = parts, transform.groups
        sizes = transform.sizes or [tensor.shape[transform.dim] // len(new)] * len(new)
        of_groups = tensor.chunk(groups, transform.dim)
        cut = [g.split([size // groups for size in sizes], transform.dim) for g in of_groups]
        made = [torch.cat(each, transform.dim) for each in zip(*cut, strict=True)]
    elif isinstance(transform, Concatenate):
        of_groups = [part.chunk(transform.groups, transform.dim) for part in parts]
        made = [
            torch.cat([g for each in zip(*of_groups, strict=True) for g in each], transform.dim)
        ]
    elif isinstance(transform, Transpose):
        made = [parts[0].permute(transform.dims)]
    elif isinstance(transform, Pad):
        shape = list(parts[0].shape)
        shape[transform.dim] = transform.size - shape[transform.dim]
        constant = torch.full(shape, transform.value).to(parts[0].dtype)
        made = [torch.cat([parts[0], constant], transform.dim)]
    elif isinstance(transform, Trim):
        made = [parts[0].narrow(transform.dim, 0, transform.size)]
    else:
        made = parts
    return {**state, **dict(zip(new, made, strict=True))}


@st.composite
def steps(draw, state: dict) -> list:
    """Draw transforms that fit a state, each for the state that the one before it leaves."""
    found = []
    for number in range(draw(st.integers(1, 4))):
        name = draw(st.sampled_from(sorted(state)))
        tensor = state[name]
        dim = draw(st.integers(0, tensor.dim() - 1))
        size = tensor.shape[dim]
        kind = draw(st.sampled_from(["split", "join", "transpose", "pad", "trim", "rename"]))
        if kind == "split":
            groups = draw(st.sampled_from([g for g in range(1, 5) if size % g == 0]))
            width = size // groups
            at = draw(st.integers(0, width))
            sizes = [at * groups, (width - at) * groups]
            step = Split(name, (f"{name}a{number}", f"{name}b{number}"), dim, sizes, groups)
        elif kind == "join":
            alike = [
                other
                for other, each in state.items()
                if other != name and each.shape == tensor.shape
            ]
            if not alike:
                continue
            groups = draw(st.sampled_from([g for g in range(1, 5) if size % g == 0]))
            names = (name, draw(st.sampled_from(sorted(alike))))
            step = Concatenate(names, f"{name}j{number}", dim, groups)
        elif kind == "transpose":
            step = Transpose(name, draw(st.permutations(range(tensor.dim()))))
        elif kind == "pad":
            value = draw(st.integers(0, 1))
            step = Pad(name, size + draw(st.integers(0, 3)), dim, value)
        elif kind == "trim":
            step = Trim(name, draw(st.integers(0, size)), dim)
        else:
            step = Rename(name, f"{name}r{number}")
        state = dense(state, step)
        found.append(step)
    return found


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_transforms_equal_dense_operations(tmp_path_factory, data):
    draw, folder = data.draw, tmp_path_factory.mktemp("run")
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    count = int(np.prod(shape))
    saved = {
        name: (torch.arange(count).reshape(shape) + 10 * number).to(dtype)
        for number, name in enumerate("uvw")
    }
    shardckpt.save(saved, folder / "c")
    transforms = draw(steps(saved))
    wanted = saved
    for step in transforms:
        wanted = dense(wanted, step)

    built = shardckpt.load_state(folder / "c", transforms=transforms)
    assert built.keys() == wanted.keys()
    assert all(torch.equal(built[name], each) for name, each in wanted.items())

    offsets, boxes = {}, {}
    for name, each in wanted.items():
        at = [draw(st.integers(0, size)) for size in each.shape]
        ends = [draw(st.integers(a, size)) for a, size in zip(at, each.shape, strict=True)]
        offsets[name] = tuple(at)
        boxes[name] = each[tuple(slice(a, b) for a, b in zip(at, ends, strict=True))]
    state = {
        name: ShardedArray(torch.zeros_like(box), wanted[name].shape, offsets[name])
        for name, box in boxes.items()
    }
    shardckpt.load(state, folder / "c", transforms=transforms)
    assert all(torch.equal(state[name].local, box) for name, box in boxes.items())

    shardckpt.convert(folder / "c", folder / "d", transforms=transforms, shards=2)
    copied = shardckpt.load_state(folder / "d")
    assert all(torch.equal(copied[name], each) for name, each in wanted.items())


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 8, bias=False) for _ in range(3))


def trained(model: nn.Module, steps: int = 1):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(steps):
        sum(p.square().sum() for p in model.parameters()).backward()
        optimizer.step()
    return optimizer


def test_a_module_takes_a_split_weight(tmp_path):
    fused = nn.Linear(8, 24, bias=False)
    shardckpt.save({"model": {"qkv": fused}, "n": 3}, tmp_path / "c")
    state = {"model": Attention(), "n": 0}
    split = Split("*qkv.weight", into=("*q.weight", "*k.weight", "*v.weight"))
    report = shardckpt.load(state, tmp_path / "c", transforms=[split])
    model = state["model"]
    assert torch.equal(torch.cat([model.q.weight, model.k.weight, model.v.weight]), fused.weight)
    assert state["n"] == 3
    assert not report.unexpected


class Norm(nn.Module):
    def __init__(self, name: str):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        setattr(self, name, nn.Parameter(torch.ones(2)))


def test_an_optimizer_follows_the_new_names_of_its_parameters(tmp_path):
    old = Norm("gamma")
    optimizer = trained(old)
    shardckpt.save({"model": old, "optimizer": optimizer}, tmp_path / "c")
    new = Norm("weight")
    again = trained(new, steps=3)
    renames = [
        Rename("model.gamma", "model.weight"),
        Rename("optimizer.state.gamma.*", "optimizer.state.weight.*"),
    ]
    state = {"model": new, "optimizer": again}
    report = shardckpt.load(state, tmp_path / "c", transforms=renames)
    assert not report.unexpected
    assert torch.equal(new.weight, old.gamma)
    for key in ("step", "exp_avg", "exp_avg_sq"):
        assert torch.equal(again.state[new.weight][key], optimizer.state[old.gamma][key])
        assert torch.equal(again.state[new.layer.bias][key], optimizer.state[old.layer.bias][key])
    shardckpt.convert(tmp_path / "c", tmp_path / "d", transforms=renames)
    groups = shardckpt.load_state(tmp_path / "d")["optimizer"]["param_groups"]
    assert groups[0]["params"] == ["weight", "layer.weight", "layer.bias"]


def test_a_part_of_the_state_of_a_parameter_is_not_renamed_alone(tmp_path):
    old = Norm("gamma")
    shardckpt.save({"model": old, "optimizer": trained(old)}, tmp_path / "c")
    for rename in (
        Rename("optimizer.state.gamma.exp_avg", "optimizer.state.weight.exp_avg"),
        Split("*.gamma.exp_avg", into=("*.a.exp_avg", "*.b.exp_avg")),
    ):
        with pytest.raises(StateError, match="a part of the state"):
            shardckpt.load_state(tmp_path / "c", transforms=[rename])


def test_an_optimizer_whose_parameters_keep_other_names_is_refused(tmp_path):
    old = Norm("gamma")
    shardckpt.save({"model": old, "optimizer": trained(old)}, tmp_path / "c")
    new = Norm("weight")
    renames = [Rename("model.gamma", "model.weight")]
    with pytest.raises(LoadMismatchError, match="gamma"):
        shardckpt.load(
            {"model": new, "optimizer": trained(new)}, tmp_path / "c", transforms=renames
        )


def rank_reads_its_part(folder: str) -> int:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    state = {
        name: distribute_tensor(torch.zeros(512, 2048), mesh, [Shard(0)]) for name in ("q", "k")
    }
    split = Split("qk", into=("q", "k"), groups=4)
    report = shardckpt.load(state, folder, transforms=[split])
    whole = torch.arange(1024.0).repeat_interleave(2048).reshape(1024, 2048)
    q, k = dense({"qk": whole}, split).values()
    assert torch.equal(state["q"].full_tensor(), q)
    assert torch.equal(state["k"].full_tensor(), k)
    return report.bytes_read


@pytest.mark.ranks
def test_a_rank_reads_only_its_bytes(tmp_path):
    whole = torch.arange(1024.0).repeat_interleave(2048).reshape(1024, 2048)  # 8 MiB
    shardckpt.save({"qk": whole, "other": torch.zeros(1 << 20)}, tmp_path / "c")
    for bytes_read in run_ranks(2, rank_reads_its_part, str(tmp_path / "c")):
        assert bytes_read <= whole.nbytes // 2 + (4 << 20)  # blocks of 1 MiB at the borders


def test_tied_tensors_stay_tied(tmp_path):
    weight = torch.ones(2, 3)
    shardckpt.save({"a": {"w": weight}, "b": {"w": weight}}, tmp_path / "c")
    for transforms in ([Rename("*.w", "*.v")], [Transpose("*.w")]):
        found = shardckpt.load_state(tmp_path / "c", transforms=transforms)
        (first,), (second,) = found["a"].values(), found["b"].values()
        assert first.data_ptr() == second.data_ptr()


def test_one_of_two_tied_tensors_is_transformed_alone(tmp_path):
    weight = torch.arange(6.0).reshape(2, 3)
    shardckpt.save({"a": weight, "b": weight}, tmp_path / "c")
    shardckpt.convert(tmp_path / "c", tmp_path / "d", transforms=[Transpose("a")])
    found = shardckpt.load_state(tmp_path / "d")
    assert torch.equal(found["a"], weight.T)
    assert torch.equal(found["b"], weight)


def test_names_in_nested_states(tmp_path):
    state = {"m": {"layers": [{"w": torch.ones(2)}, {"w": torch.zeros(2)}]}, 7: torch.ones(1)}
    shardckpt.save(state, tmp_path / "c")
    renames = [Rename("m.layers.*.w", "m.layers.*.weight"), Rename("7", "8")]
    found = shardckpt.load_state(tmp_path / "c", transforms=renames)
    assert [list(layer) for layer in found["m"]["layers"]] == [["weight"], ["weight"]]
    assert found["8"].tolist() == [1]


def test_tensors_in_lists_keep_their_places(tmp_path):
    saved = [torch.ones(2), torch.zeros(1)]
    shardckpt.save({"l": saved, "m": {"w": torch.ones(1)}}, tmp_path / "c")
    state = {"l": [torch.full((3,), 9.0), torch.full((1,), 9.0)]}
    shardckpt.load(state, tmp_path / "c", transforms=[Pad("l.0", 3)])
    assert state["l"][0].tolist() == [1, 1, 0]
    for transform, expected in (
        (Pad("l.*", 3), {"l": [[1, 1, 0], [0, 0, 0]], "m": {"w": [1]}}),
        (Concatenate(("l.0", "l.1"), "l.1"), {"l": [None, [1, 1, 0]], "m": {"w": [1]}}),
        (Rename("l.*", "k.*"), {"m": {"w": [1]}, "k.0": [1, 1], "k.1": [0]}),
        (Rename("m.w", "m"), {"l": [[1, 1], [0]], "m": [1]}),
    ):
        assert lists(shardckpt.load_state(tmp_path / "c", transforms=[transform])) == expected


def lists(state):
    if isinstance(state, dict):
        return {key: lists(item) for key, item in state.items()}
    if isinstance(state, list):
        return [lists(item) for item in state]
    return None if state is None else state.tolist()


@pytest.mark.parametrize(
    ("transform", "error", "text"),
    [
        (Split("w", ("a", "b"), sizes=(1, 2)), LoadMismatchError, "sizes whose sum is 6"),
        (Split("w", ("a", "b"), groups=4), LoadMismatchError, "4 groups"),
        (Split("w", ("a", "b"), dim=2), LoadMismatchError, "dimension 2"),
        (Split("x", ("a", "b")), LoadMismatchError, "names 'x'"),
        (Split("w", ("*a", "b")), StateError, "as many"),
        (Split("w", ("a", "a")), StateError, "different new names"),
        (Concatenate(("w", "n"), "x"), LoadMismatchError, "names 'n'"),
        (Concatenate(("w", "v"), "x"), LoadMismatchError, "differ only in dimension 0"),
        (Transpose("w", (0, 0)), LoadMismatchError, "a permutation"),
        (Pad("w", 3), LoadMismatchError, "a size of 6 or more"),
        (Trim("w", 7), LoadMismatchError, "from 0 to 6"),
        (Rename("w", "v"), StateError, "same name"),
        (Rename("w", "d"), StateError, "the name of a dict"),
        (Pad("i", 5, value=1.5), LoadMismatchError, "a value that I64 can hold"),
        (Pad("i", 5, value=1 << 70), LoadMismatchError, "a value that I64 can hold"),
        (Pad("i", 5, value=float("nan")), LoadMismatchError, "a value that I64 can hold"),
        (Pad("b", 5, value=2), LoadMismatchError, "a value that BOOL can hold"),
        (Pad("h", 5, value=1e9), LoadMismatchError, "a value that F16 can hold"),
        (Pad("f", 5, value=1e9), LoadMismatchError, "a value that F8_E4M3 can hold"),
        (Pad("e", 5, value=0), LoadMismatchError, "a value that F8_E8M0 can hold"),
        (Pad("e", 5, value=-1), LoadMismatchError, "a value that F8_E8M0 can hold"),
        ("w", StateError, "an object of shardckpt.transforms"),
    ],
)
def test_transforms_that_do_not_fit(tmp_path, transform, error, text):
    saved = {"w": torch.ones(6, 2), "v": torch.ones(6), "n": 3, "d": {"x": torch.ones(1)}}
    saved |= {"i": torch.arange(3), "b": torch.ones(3).bool(), "h": torch.ones(3).half()}
    saved["f"] = torch.ones(3).to(torch.float8_e4m3fn)
    if hasattr(torch, "float8_e8m0fnu"):
        saved["e"] = torch.ones(3).to(torch.float8_e8m0fnu)
    elif getattr(transform, "pattern", "") == "e":
        pytest.skip("this version of torch lacks the dtype")
    shardckpt.save(saved, tmp_path / "c")
    state = {"w": torch.zeros(6, 2)}
    for call in (
        lambda: shardckpt.load(state, tmp_path / "c", transforms=[transform]),
        lambda: shardckpt.load_state(tmp_path / "c", transforms=[transform]),
        lambda: shardckpt.convert(tmp_path / "c", tmp_path / "d", transforms=[transform]),
    ):
        with pytest.raises(error) as caught:
            call()
        assert text in str(caught.value)
    assert not state["w"].any()
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize(
    ("make", "arguments"),
    [
        (Split, ("w", ())),
        (Split, ("w", ("a", 3))),
        (Split, ("w", ("a", "b"), 1.5)),
        (Split, ("w", ("a", "b"), 0, (1.0, 5.0))),
        (Split, ("w", ("a", "b"), 0, None, 1.0)),
        (Concatenate, ("wv", "x")),
        (Concatenate, ((), "x")),
        (Transpose, ("w", ("a", "b"))),
        (Pad, ("w", "8")),
        (Pad, ("w", 8, 0, "x")),
        (Trim, ("w", 2.0)),
        (Trim, (3, 2)),
        (Rename, ("w", None)),
        (Rename, ("w", "")),
        (Split, ("w", "ab")),
        (Concatenate, (("v", "w"), ["x"])),
    ],
)
def test_arguments_of_wrong_types(make, arguments):
    with pytest.raises(StateError, match="Invalid argument of the transform"):
        make(*arguments)


def test_different_tensors_without_saved_elements_are_not_tied(tmp_path):
    shardckpt.save({"a": torch.ones(0, 2), "b": torch.ones(0, 2)}, tmp_path / "c")
    found = shardckpt.load_state(tmp_path / "c", transforms=[Pad("*", 3)])
    found["a"] += 1
    assert found["b"].sum() == 0
    split = Split("*", into=("*1", "*2"))
    found = shardckpt.load_state(tmp_path / "c", transforms=[split, Pad("*", 3)])
    found["a1"] += 1
    assert [found[name].sum().item() for name in ("a2", "b1", "b2")] == [0, 0, 0]


def test_a_transformed_tensor_can_not_stay_on_disk(tmp_path):
    shardckpt.save({"w": torch.ones(6, 2)}, tmp_path / "c")
    with pytest.raises(StateError, match="can't stay on disk"):
        shardckpt.load_state(tmp_path / "c", device_map="disk", transforms=[Transpose("w")])


def test_convert_changes_dtypes_and_names(tmp_path):
    state = {
        "m": {"gamma": torch.full((3,), 0.1), "half": torch.ones(2, dtype=torch.float16)},
        "code": torch.ones(4, dtype=torch.float8_e4m3fn),
        "ids": torch.arange(3),
    }
    shardckpt.save(state, tmp_path / "c")
    source, target = str(tmp_path / "c"), str(tmp_path / "d")
    assert main(["convert", source, target, "--dtype", "bfloat16", "--rename", "*.gamma=*.w"]) == 0
    found = shardckpt.load_state(target)
    assert torch.equal(found["m"]["w"], state["m"]["gamma"].bfloat16())
    assert found["m"]["half"].dtype == torch.bfloat16
    assert found["code"].dtype == torch.float8_e4m3fn
    assert found["ids"].dtype == torch.int64
    with pytest.raises(StateError, match="does not write this dtype"):
        shardckpt.convert(source, tmp_path / "e", dtype=torch.int8)
