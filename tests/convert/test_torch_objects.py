"""Objects in torch files: each has a plain form, or is left out and listed; none is called."""

from __future__ import annotations

import collections
import datetime
import enum
import os
import pathlib
import pickle
import shutil
import threading
import types

import numpy as np
import pytest
import torch

from shardckpt import errors
from shardckpt.convert.convert import convert
from shardckpt.convert.opening import open_source
from tests.convert import layouts
from tests.convert.layouts import Call, loaded


class Color(enum.Enum):
    RED = 1


class Config(dict):
    pass


class Image(torch.Tensor):
    pass


class Steps(list):
    pass


class Slots:
    __slots__ = ("a",)

    def __init__(self):
        self.a = 1


TAKEN = {
    "array": (np.arange(6.0).reshape(2, 3), [[0, 1, 2], [3, 4, 5]]),
    "fortran": (np.asfortranarray(np.arange(6).reshape(2, 3)), [[0, 1, 2], [3, 4, 5]]),
    "big-endian": (np.arange(3, dtype=">i4"), [0, 1, 2]),
    "empty array": (np.zeros((0, 3), dtype=np.float16), []),
    "0-d array": (np.array(3), 3),
    "numpy bool": (np.bool_(True), True),
    "numpy number": (np.int64(3), 3),
    "version": (torch.__version__, str(torch.__version__)),
    "path": (pathlib.PurePosixPath("a/b"), "a/b"),
    "namespace": (types.SimpleNamespace(a=[1]), {"a": [1]}),
    "dict": (Config(a=1), {"a": 1}),
    "defaultdict": (collections.defaultdict(list, {"k": [1]}), {"k": [1]}),
    "list": (Steps([1, 2]), [1, 2]),
    "deque": (collections.deque([1, 2]), [1, 2]),
    "set": ({1, 2}, {1, 2}),
    "bytes": (b"x", b"x"),
    "no bytes": (b"", b""),
}


LEFT = {
    "enum": Color.RED,
    "object": layouts.Loss(),
    "slots": Slots(),
    "class": Config,
    "function": len,
    "date": datetime.date(2026, 1, 1),
    "array of objects": np.array([None, {}], dtype=object),
    "generator": np.random.default_rng(0),
    "in a list": [1, layouts.Loss()],
    "in a tuple": (1, (2, layouts.Loss())),
    "sparse": torch.eye(2).to_sparse(),
}


@pytest.mark.parametrize("dcp", [False, True])
def test_values_of_all_kinds(tmp_path, dcp):
    state = {"taken": {name: value for name, (value, _) in TAKEN.items()}, "left": LEFT, "n": 1}
    if dcp:
        state["left"] = {n: value for n, value in LEFT.items() if n != "sparse"}
        layouts.write_dcp(state, tmp_path / "c")
    else:
        torch.save(state, tmp_path / "c")
    report, found = loaded(tmp_path / "c")
    assert report.left_out.keys() == {f"left.{name}" for name in state["left"]}
    assert "tests.convert.layouts.Loss" in report.left_out["left.in a tuple"]
    assert "builtins.len" in report.left_out["left.function"]
    for name, (_, want) in TAKEN.items():
        value = found["taken"][name]
        assert (value.tolist() if isinstance(value, np.ndarray) else value) == want, name


@pytest.mark.parametrize("zipped", [True, False])
def test_a_tensor_of_a_subclass_becomes_a_tensor(tmp_path, zipped):
    weight = torch.arange(6.0).reshape(2, 3)
    image = weight[1].as_subclass(Image)
    image.note = "an attribute"
    state = {"image": image, "weight": weight, "class": Image}
    path = tmp_path / "a.pt"
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    report = convert(path, tmp_path / "b.pt")
    found = torch.load(tmp_path / "b.pt", weights_only=True)
    assert type(found["image"]) is torch.Tensor
    assert torch.equal(found["image"], weight[1])
    assert torch.equal(found["weight"], weight)
    name = f"{__name__}.Image"
    assert report.changed == {"image": f"{name}, taken as a tensor"}
    assert report.left_out == {"class": f"the class or function {name}"}


def test_a_class_of_tensors_is_never_called(tmp_path):
    path = tmp_path / "a.pt"
    made = Call(Image, 1 << 40)
    torch.save({"image": torch.ones(2).as_subclass(Image), "made": made}, path)
    with pytest.raises(errors.CheckpointError):
        convert(path, tmp_path / "b.pt")


def test_keys_that_are_objects_and_containers_that_stand_twice(tmp_path):
    shared = {"w": torch.ones(2), "o": layouts.Loss()}
    torch.save({"a": shared, "b": [shared], Config: 1, "n": 1}, tmp_path / "x.pt")
    report, state = loaded(tmp_path / "x.pt")
    assert state.keys() == {"a", "b", "n"}
    assert state["b"][0]["w"] is state["a"]["w"]
    assert set(report.left_out) == {"a.o", "tests.convert.test_torch_objects.Config"}


def test_a_container_that_holds_itself(tmp_path):
    state = {"n": 1}
    state["self"] = {"deeper": state}
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(errors.ShardckptError):
        convert(str(tmp_path / "x.pt"), str(tmp_path / "c"))


def calls(mark: str) -> dict:
    """Calls that would make a file at `mark`."""
    code = f"open({mark!r}, 'w').close()"
    return {
        "exec": Call(exec, code),
        "eval": Call(eval, code),
        "open": Call(open, mark, "w"),
        "copy": Call(shutil.copyfile, __file__, mark),
        "numpy": Call(np.save, mark, 1),
        "memmap": Call(np.memmap, mark, np.dtype("u1"), "w+", 0, (3,)),
    }


@pytest.mark.parametrize("kind", ["file", "legacy", "dcp", "metadata"])
def test_nothing_that_a_file_names_is_called(tmp_path, kind):
    mark = str(tmp_path / "owned")
    path, target = tmp_path / "x.ckpt", tmp_path / "c"
    for name, call in calls(mark).items():
        state = {"w": torch.ones(2), "x": call}
        if kind in ("file", "legacy"):
            torch.save(state, path, _use_new_zipfile_serialization=kind == "file")
        elif kind == "dcp":
            layouts.write_dcp(state, path)
        else:
            layouts.write_dcp({"w": torch.ones(2)}, path)
            layouts.change_metadata(path, lambda found, call=call: vars(found).update(more=call))
        if name in ("exec", "eval", "copy") and kind != "metadata":
            with pytest.raises(errors.CheckpointError, match="malicious"):
                convert(str(path), str(target), overwrite=True)
            assert not os.path.exists(mark), name
            continue
        report = convert(str(path), str(target), overwrite=True)
        assert not os.path.exists(mark), name
        assert report.tensors == ("w",)
        assert len(report.left_out) == 1, name
    pickle.loads(pickle.dumps(call))  # the harness can see it
    assert os.path.exists(mark)


def test_arrays_take_no_memory_that_the_file_has_not(tmp_path):
    rebuild = np.arange(2).__reduce__()[0]
    state = (1, (1 << 40,), np.dtype("f8"), False, b"x" * 16)

    class Huge:
        def __reduce__(self):
            return rebuild, (np.ndarray, (1 << 40,), b"d"), state

    torch.save({"w": torch.ones(2), "x": Huge()}, tmp_path / "x.pt")
    report, _ = loaded(tmp_path / "x.pt")
    assert "elements" in report.left_out["x"]


def test_safe_globals_of_the_program_stay_and_hold(tmp_path):
    torch.save({"date": datetime.date(2026, 1, 1), "x": np.arange(2)}, tmp_path / "x.pt")
    before = set(map(str, torch.serialization.get_safe_globals()))
    with torch.serialization.safe_globals([np.ndarray, np.dtype]):
        loaded(tmp_path / "x.pt")
        assert np.ndarray in torch.serialization.get_safe_globals()
    assert set(map(str, torch.serialization.get_safe_globals())) == before


def test_other_threads_meet_no_stand_ins(tmp_path):
    torch.save({f"k{n}": layouts.Loss() for n in range(3000)}, tmp_path / "x.pt")
    torch.save({"x": layouts.Loss()}, tmp_path / "y.pt")
    outcomes, done = [], threading.Event()

    def load() -> None:
        while not done.is_set():
            try:
                torch.load(tmp_path / "y.pt", weights_only=True)
                outcomes.append("loaded")
            except (pickle.UnpicklingError, KeyError) as error:
                # A KeyError, if the stand-ins go between torch's check and its look-up.
                outcomes.append("refused" if "Loss" in str(error) else str(error))

    thread = threading.Thread(target=load)
    thread.start()
    try:
        open_source(str(tmp_path / "x.pt")).close()
    finally:
        done.set()
        thread.join()
    assert set(outcomes) == {"refused"}
