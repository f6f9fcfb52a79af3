"""A new handler takes its weights from checkpoints of many kinds."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import shardckpt
from shardckpt import NNHandler, errors
from shardckpt.errors import LoadMismatchError
from shardckpt.nn_handler.initializing import (
    skipped_entries,
    warn_of_skipped,
    weight_names,
    with_remedy,
)
from shardckpt.reports import LoadReport
from tests.nn_handler.models import Body, Net, a_handler, make, same, train, weights


def test_a_load_that_is_not_strict_says_what_it_skips(tmp_path):
    other = torch.nn.Linear(8, 5)
    weights = {"body.0.weight": torch.ones(8, 4), "head.bias": other.bias, "neck": torch.ones(1)}
    torch.save(weights, tmp_path / "w.ckpt")
    with pytest.warns(UserWarning, match="skipped") as caught:
        handler = NNHandler.initialize_from_checkpoint(tmp_path / "w.ckpt", Body, strict=False)
    assert torch.equal(handler.module.body[0].weight, weights["body.0.weight"])
    text = str(caught[0].message)
    assert "not in the checkpoint: model.body.0.bias, model.head.weight" in text
    assert "of another shape: model.head.bias (saved" in text
    assert "not in the handler: model.neck" in text
    torch.save({"neck": torch.ones(1)}, tmp_path / "none.ckpt")
    with pytest.raises(LoadMismatchError, match="prefix= chooses"):
        NNHandler.initialize_from_checkpoint(tmp_path / "none.ckpt", Body, strict=False)
    make().save(tmp_path / "a")
    kwargs = {"width": 8, "extra": True}
    for device_map in (None, "cpu"):
        with pytest.warns(UserWarning, match=r"not in the checkpoint: (model\.)?extra"):
            NNHandler.load(
                tmp_path / "a",
                device_map=device_map,
                strict=False,
                model_class=Extended,
                objects={"model.kwargs": kwargs},
                skip_optimizer=True,
            )


class Extended(Body):
    def __init__(self, width: int, extra: bool) -> None:
        super().__init__(width)
        self.extra = nn.Parameter(torch.zeros(int(extra)))


def test_remedies_of_a_mismatch_name_arguments_that_there_are(tmp_path):
    make().save(tmp_path / "a")
    with pytest.raises(LoadMismatchError, match="model_class=") as caught:
        NNHandler.load(tmp_path / "a", objects={"model.kwargs": {"width": 9}})
    assert "keys=" not in caught.value.remedy
    with pytest.raises(LoadMismatchError, match="create the model with the arguments"):
        make(width=9).restore(tmp_path / "a")
    with pytest.raises(LoadMismatchError, match="prefix="):
        NNHandler.initialize_from_checkpoint(tmp_path / "a", Body, width=9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_dtype_are_converted(tmp_path, dtype):
    saved = Body().to(dtype).state_dict()
    torch.save(saved, tmp_path / "w.pt")
    found = NNHandler.initialize_from_checkpoint(tmp_path / "w.pt", Body).module.state_dict()
    assert all(torch.equal(found[name], saved[name].float()) for name in saved)


@pytest.mark.parametrize("name", ["weights.ckpt", "pytorch_model.bin", "folder"])
def test_weights_of_other_programs(tmp_path, name):
    handler = a_handler()
    state = handler.module.state_dict()
    if name == "weights.ckpt":  # as Lightning writes it
        torch.save({"state_dict": {f"model.{n}": t for n, t in state.items()}}, tmp_path / name)
    elif name == "folder":  # as Hugging Face does
        from safetensors.torch import save_file

        (tmp_path / name).mkdir()
        save_file(state, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
    else:
        torch.save(state, tmp_path / name)
    from tests.nn_handler.models import Net

    made = NNHandler.initialize_from_checkpoint(tmp_path / name, Net, width=6)
    assert same(weights(made), weights(handler))


@pytest.mark.parametrize("name", ["c", "c.pth", "c.safetensors"])
def test_no_names_of_wrappers_and_no_random_weights(tmp_path, name):
    handler = a_handler()
    if name == "c":
        handler.compile_model(backend="eager")
    train(handler)
    handler.save(tmp_path / name)
    loaded = NNHandler.load(tmp_path / name)
    assert same(weights(loaded), weights(handler))
    if name == "c":
        with shardckpt.open_checkpoint(tmp_path / "c") as checkpoint:
            assert "model.head.weight" in checkpoint
            assert not [n for n in checkpoint if "_orig_mod" in n or ".module." in n]
    torch.save(
        {f"module._orig_mod.{k}": v for k, v in handler.module.state_dict().items()},
        tmp_path / "wrapped.pth",
    )
    within = {k.replace("head.", "head._orig_mod."): v for k, v in weights(handler).items()}
    torch.save(within, tmp_path / "within.pth")
    for wrapped in ("wrapped.pth", "within.pth"):
        clean = NNHandler.initialize_from_checkpoint(tmp_path / wrapped, Net, width=6)
        assert same(weights(clean), weights(handler))
    torch.save({"unrelated": torch.ones(1)}, tmp_path / "other.pth")
    with pytest.raises(errors.LoadMismatchError):
        NNHandler.initialize_from_checkpoint(tmp_path / "other.pth", Net)


@pytest.mark.parametrize("name", ["c", "c.pth", "c.safetensors"])
def test_weights_of_a_full_checkpoint(tmp_path, name):
    handler = train(a_handler(), ema_decay=0.9)
    handler.save(tmp_path / name)
    fresh = NNHandler.initialize_from_checkpoint(tmp_path / name, Net, width=6)
    assert same(weights(fresh), weights(handler))
    assert (fresh.epoch, fresh.optimizer, fresh.history) == (0, None, {})
    averaged = NNHandler.initialize_from_checkpoint(tmp_path / name, Net, width=6, ema=True)
    assert same(weights(averaged), handler.ema.weights)
    with pytest.raises(errors.LoadMismatchError):
        NNHandler.initialize_from_checkpoint(tmp_path / name, Net, width=7)


def test_weights_of_a_sharded_checkpoint_of_ones_own(tmp_path):
    model = Net(width=5)
    shardckpt.save({"net": {"inner": model}, "step": 3}, tmp_path / "c")
    fresh = NNHandler.initialize_from_checkpoint(tmp_path / "c", Net, width=5)
    assert torch.equal(fresh.module.head.bias, model.head.bias)


OWN = {"body.weight", "body.bias", "head.weight"}


@pytest.mark.parametrize(
    "prefix",
    ["", "module.", "_orig_mod.", "model.", "state_dict.", "model_state_dict.module.", "a.b.c."],
)
def test_the_prefix_of_the_weights_is_found(prefix):
    saved = [*(f"{prefix}{name}" for name in sorted(OWN)), "optimizer.lr", "epoch"]
    found = weight_names(saved, OWN)
    assert {found[f"{prefix}{name}"] for name in OWN} == OWN


def test_the_prefix_with_most_names_is_chosen_or_the_given_one():
    saved = [f"ema.weights.{name}" for name in OWN] + ["model.body.weight"]
    assert weight_names(saved, OWN) == {f"ema.weights.{name}": name for name in OWN}
    assert weight_names(saved, OWN, prefix="model") == {"model.body.weight": "body.weight"}
    assert weight_names(saved, OWN, prefix="model.") == {"model.body.weight": "body.weight"}
    assert weight_names(saved, OWN, prefix="mod") == {}


def test_wrappers_within_a_name_are_removed():
    saved = ["module.body._orig_mod.weight", "_orig_mod.head._checkpoint_wrapped_module.weight"]
    assert set(weight_names(saved, OWN).values()) == {"body.weight", "head.weight"}


def test_a_module_of_the_model_may_be_called_module():
    own = {"module.weight", "head.weight"}
    assert weight_names(sorted(own), own) == {name: name for name in own}


def test_a_checkpoint_without_names_of_the_model_keeps_its_own():
    assert weight_names(["a", "b"], OWN) == {"a": "a", "b": "b"}
    assert weight_names([], OWN) == {}


def test_a_warning_lists_what_was_skipped_on_rank_0_alone():
    skipped = {
        "missing": [f"model.{number}" for number in range(10)],
        "unexpected": ["model.neck"],
        "wrong_shape": [("model.head", (2,), (3,))],
        "wrong_dtype": [("model.body", "int8", "int64")],
    }
    with pytest.warns(UserWarning, match="strict=False skipped tensors of c") as caught:
        warn_of_skipped("c", 0, **skipped)
    text = str(caught[0].message)
    assert "model.6, model.7 and 2 more" in text
    assert "of another shape: model.head (saved (3,))" in text
    assert "of another dtype: model.body (saved int64)" in text
    assert "not in the handler: model.neck" in text
    warn_of_skipped("c", 1, **skipped)
    warn_of_skipped("c", 0)  # nothing was skipped


def test_the_parts_beside_the_model_are_not_missed():
    report = LoadReport(
        path="c",
        checkpoint_id="0" * 32,
        saved_world_size=1,
        bytes_read=0,
        seconds={},
        missing=("model.a",),
        unexpected=("optimizer.lr", "model.b"),
    )
    assert skipped_entries(report)["missing"] == ("model.a",)
    assert skipped_entries(report)["unexpected"] == ["model.b"]


def test_a_mismatch_gets_the_remedy_of_the_call():
    with pytest.raises(errors.LoadMismatchError) as caught, with_remedy("call this"):
        raise errors.LoadMismatchError("planted", remedy="call that")
    assert caught.value.remedy == "call this"
    with pytest.raises(errors.StateError) as other, with_remedy("call this"):
        raise errors.StateError("planted", remedy="call that")
    assert other.value.remedy == "call that"
