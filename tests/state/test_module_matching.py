"""Code of a module's author that torch runs in load_state_dict runs in a load as well."""

from __future__ import annotations

import io

import pytest
import torch
from torch import nn

import shardckpt
from shardckpt.errors import LoadMismatchError
from shardckpt.state.module_matching import has_custom_load


class PostHook(nn.Module):
    """Keeps a value that follows from its weight."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(2, 3))
        self.refresh()
        self.register_load_state_dict_post_hook(lambda module, keys: module.refresh())

    def refresh(self):
        self.twice = self.w.detach() * 2


class Override(PostHook):
    """Its load_state_dict takes only the state."""

    def __init__(self):
        super().__init__()
        self._load_state_dict_post_hooks.clear()

    def load_state_dict(self, state):
        found = super().load_state_dict(state)
        self.refresh()
        return found


class FromState(PostHook):
    """As an older style has it: the method of one module."""

    def __init__(self):
        super().__init__()
        self._load_state_dict_post_hooks.clear()

    def _load_from_state_dict(self, state, prefix, metadata, *rest):
        assert metadata["version"] == self._version
        super()._load_from_state_dict(state, prefix, metadata, *rest)
        self.refresh()


class Renames(PostHook):
    """A hook turns the weight when it is saved, another one turns it back."""

    def __init__(self):
        super().__init__()
        self.register_state_dict_post_hook(self.turn)
        self.register_load_state_dict_pre_hook(self.turn_back)

    @staticmethod
    def turn(module, state, prefix, metadata):
        state[f"{prefix}turned"] = state.pop(f"{prefix}w").t()

    @staticmethod
    def turn_back(module, state, prefix, *rest):
        state[f"{prefix}w"] = state.pop(f"{prefix}turned").t()


class Copies(Renames):
    """Its state dict holds memory that is not the module's own."""

    @staticmethod
    def turn(module, state, prefix, metadata):
        state[f"{prefix}turned"] = state.pop(f"{prefix}w").t().clone() + 1

    @staticmethod
    def turn_back(module, state, prefix, *rest):
        state[f"{prefix}w"] = state.pop(f"{prefix}turned").t() - 1


KINDS = [PostHook, Override, FromState, Renames, Copies]


@pytest.mark.parametrize("where", ["alone", "inside", "compiled", "meta"])
@pytest.mark.parametrize("kind", KINDS)
def test_values_that_follow_from_weights(tmp_path, kind, where):
    if kind is Override and where == "inside":
        pytest.skip("torch does not call it either")
    if where == "meta" and kind is Copies:
        pytest.skip("an addition on the meta device is not the module's memory")
    wrap = {
        "inside": lambda module: nn.Sequential(nn.Linear(2, 2), module),
        "compiled": lambda module: torch.compile(module, backend="eager"),
    }.get(where, lambda module: module)
    module = kind()
    module.w.data.copy_(torch.arange(6.0).reshape(2, 3))
    shardckpt.save({"m": wrap(module)}, tmp_path / "c")
    with torch.device("meta" if where == "meta" else "cpu"):
        other = kind()
    shardckpt.load({"m": wrap(other)}, tmp_path / "c")
    assert torch.equal(other.w, module.w)
    assert torch.equal(other.twice, module.w * 2)


@pytest.mark.parametrize("loaded", ["first", "second"])
@pytest.mark.parametrize("kind", KINDS[:-1])
def test_a_name_that_no_file_has_is_filled_through_its_tie_on_the_meta_device(
    tmp_path, kind, loaded
):
    def tied():
        module = nn.ModuleDict({"first": kind(), "second": kind()})
        module["second"].w = module["first"].w
        return module

    module = tied()
    module["first"].w.data.copy_(torch.arange(6.0).reshape(2, 3))
    shardckpt.save({"m": module}, tmp_path / "c")
    with torch.device("meta"):
        other = tied()
    shardckpt.load({"m": other}, tmp_path / "c", keys=f"m.{loaded}")
    assert torch.equal(other["first"].w, module["first"].w)
    assert other["second"].w is other["first"].w
    if kind is not Override:  # torch does not call it inside
        assert all(torch.equal(part.twice, part.w * 2) for part in other.values())


def test_modules_of_torch_alone_stay_fast():
    plain = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.LSTM(2, 2))
    assert not has_custom_load(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)))
    assert not has_custom_load(plain)
    assert has_custom_load(nn.Sequential(plain, PostHook()))


def test_own_tensors_are_not_copied(tmp_path):
    """load_state_dict gets the module's own memory."""
    given = {}

    class Sees(nn.Linear):
        def load_state_dict(self, state, strict=True):
            given.update({key: value.data_ptr() for key, value in state.items()})
            return super().load_state_dict(state, strict)

    module = Sees(2, 2)
    shardckpt.save({"m": module}, tmp_path / "c")
    shardckpt.load({"m": module}, tmp_path / "c")
    assert given == {key: value.data_ptr() for key, value in module.state_dict().items()}


class Extra(nn.Module):
    """Has extra state that this class makes and takes as it is."""

    def __init__(self, extra):
        super().__init__()
        self.extra = extra
        self.register_buffer("own", torch.zeros(3))
        self.calls = 0

    def get_extra_state(self):
        return self.own if self.extra is None else self.extra

    def set_extra_state(self, state):
        self.extra, self.calls = state, self.calls + 1


def stream(data):
    made = io.BytesIO()
    made.write(data)
    return made


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize(
    "value",
    [stream(b"scales"), b"abc", bytearray(b"abc"), torch.arange(5, dtype=torch.uint8), {"a": 1}],
    ids=lambda value: type(value).__name__,
)
def test_extra_state_is_passed_to_the_module(tmp_path, value, asynchronous):
    if asynchronous:
        shardckpt.async_save({"m": Extra(value)}, tmp_path / "c").result()
    else:
        shardckpt.save({"m": Extra(value)}, tmp_path / "c")
    for before in (None, stream(b""), torch.zeros(0, dtype=torch.uint8)):
        other = Extra(before)
        shardckpt.load({"m": other}, tmp_path / "c")
        assert other.calls == 1
        assert type(other.extra) is type(value)
        plain = [v.read() if isinstance(v, io.BytesIO) else v for v in (other.extra,)]
        wanted = value.getvalue() if isinstance(value, io.BytesIO) else value
        same = torch.equal if isinstance(value, torch.Tensor) else lambda a, b: a == b
        assert same(plain[0], wanted)


def test_a_parameter_whose_name_ends_like_extra_state(tmp_path):
    class Named(nn.Module):
        def __init__(self, value):
            super().__init__()
            self.my_extra_state = nn.Parameter(torch.full((2,), value))

    shardckpt.save({"m": Named(1.0)}, tmp_path / "c")
    other = Named(0.0)
    shardckpt.load({"m": other}, tmp_path / "c")
    assert other.my_extra_state.tolist() == [1.0, 1.0]


def test_an_entry_of_a_hook_that_no_code_takes_back_fails_a_strict_load(tmp_path):
    class Renaming(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(3))
            self._register_state_dict_hook(lambda module, state, *rest: {"other": state["w"] * 2})

    shardckpt.save({"m": Renaming()}, tmp_path / "c")
    target = Renaming()
    before = target.w.tolist()
    with pytest.raises(LoadMismatchError, match=r"m\.other"):
        shardckpt.load({"m": target}, tmp_path / "c")
    report = shardckpt.load({"m": target}, tmp_path / "c", strict=False)
    assert report.unexpected == ("m.other",)
    assert target.w.tolist() == before
