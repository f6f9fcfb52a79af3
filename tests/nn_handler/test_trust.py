"""Names in a handler's checkpoint are data. They resolve by rules."""

from __future__ import annotations

import sys
import types
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn import functional

import shardckpt
from shardckpt import NNHandler, errors
from shardckpt.nn_handler import trust
from tests.faults import handler_attacks as attacks
from tests.nn_handler.models import Block, Net, a_handler, data, number, with_data


def to_trust(outputs, targets):
    return functional.cross_entropy(outputs, targets)


def test_a_function_needs_trust(tmp_path, untrusted):
    handler = a_handler()
    handler.set_loss_fn(to_trust)
    handler.save(tmp_path / "c")
    waiting = with_data(NNHandler.load(tmp_path / "c"))
    assert waiting.loss_fn is None
    with pytest.raises(errors.StateError, match=r"set_loss_fn\(...\), add_metric"):
        waiting.train(1)
    waiting.save(tmp_path / "c")  # its name goes on
    shardckpt.trust(__name__)
    assert NNHandler.load(tmp_path / "c").loss_fn is to_trust
    trust._prefixes.clear()
    shardckpt.trust(to_trust)
    assert NNHandler.load(tmp_path / "c").loss_fn is to_trust
    assert NNHandler.load(tmp_path / "c", loss_fn=number).loss_fn is number


def test_a_prefix_ends_with_a_name():
    assert not trust._is_trusted(types.FunctionType(number.__code__, {"__name__": "tests2"}))


@pytest.mark.parametrize("bad", ["", "a b", "os:system", 3, "a..b", len])
def test_what_can_not_be_trusted(bad):
    with pytest.raises(errors.StateError, match="trusted"):
        shardckpt.trust(bad)


@dataclass
class Clamp:
    """An activation that is an object, made of plain values."""

    least: float

    def __call__(self, inputs):
        return inputs.clamp(min=self.least)


def test_an_object_as_an_argument_needs_trust(tmp_path, untrusted):
    NNHandler(Block, activation=Clamp(0.5)).save(tmp_path / "c")
    with pytest.raises(errors.CheckpointError, match=r"model\.kwargs\.activation") as caught:
        NNHandler.load(tmp_path / "c")
    assert f"shardckpt.trust({__name__!r})" in caught.value.remedy
    shardckpt.trust(Clamp)
    assert NNHandler.load(tmp_path / "c").module.activation == Clamp(0.5)
    trust._objects.clear()
    shardckpt.trust(__name__)
    assert NNHandler.load(tmp_path / "c").module.activation == Clamp(0.5)


def ours(name: str) -> str:
    return f"{__name__}:{name}"


def test_one_error_lists_all_names(tmp_path, untrusted):
    state = attacks.base().state()
    for path in ("config.model.class", "config.optimizer.class"):
        attacks.put(path, attacks.name(f"not_imported.{path[7:12]}:Thing"))(state)
    attacks.put("config.callbacks.0.args.0", attacks.name(ours("number")))(state)
    shardckpt.save(state, tmp_path / "c")
    with pytest.raises(errors.CheckpointError) as caught:
        NNHandler.load(tmp_path / "c")
    assert caught.value.tensor == "model.class, optimizer.class, callbacks.0.args.0"
    for text in ("model_class=", "skip_optimizer=True", "skip_callbacks=True", "objects={"):
        assert text in caught.value.remedy
    assert "import not_imported.model" in caught.value.remedy
    loaded = NNHandler.load(
        tmp_path / "c",
        model_class=nn.Linear,
        objects={"optimizer.class": torch.optim.SGD},
        skip_callbacks=True,
    )
    assert loaded.optimizer is not None


def test_the_model_class_can_be_given(tmp_path, monkeypatch):
    NNHandler(Net, width=5).save(tmp_path / "c")
    monkeypatch.delattr("tests.nn_handler.models.Net")
    with pytest.raises(errors.CheckpointError, match=r"model\.class: tests.*:Net"):
        NNHandler.load(tmp_path / "c")
    assert NNHandler.load(tmp_path / "c", model_class=Net).module.head.in_features == 5


def test_no_getattr_of_a_module_or_class_runs(tmp_path):
    from tests.faults import handler_bait

    shardckpt.save({"n": 1}, tmp_path / "c")
    manifest = (tmp_path / "c" / "manifest.json").read_text()
    for module, name in (
        ("tests.faults.handler_bait", "something"),
        ("tests.faults.handler_bait", "Holder.attribute"),
        ("tests.faults.handler_lazy", "something"),
    ):
        node = f'{{"$enum":["{module}","{name}","x"]}}'
        body = manifest.rpartition(',"digest"')[0].replace('"n":1', f'"n":{node}')
        from tests.faults.hostile import seal_text

        (tmp_path / "c" / "manifest.json").write_bytes(seal_text(body))
        handler_bait.called.clear()
        with pytest.raises(errors.CheckpointError, match="enum"):
            shardckpt.load_state(tmp_path / "c")
        assert handler_bait.called == []
    assert "tests.faults.handler_lazy" in sys.modules


def test_a_script_s_own_functions_are_resolved():
    main = sys.modules["__main__"]
    main.own = types.FunctionType(number.__code__, vars(main), "own")
    try:
        main.own.__module__ = "__main__"
        main.alias = number
        slot = trust.Slot.FUNCTION
        assert trust.resolve_name("__main__:own", slot, instance=False) is main.own
        assert trust.resolve_name("__main__:own", slot, instance=True) is None
        # a partial would call it with arguments of the checkpoint
        assert trust.resolve_name("__main__:own", slot, instance=False, with_arguments=True) is None
        assert trust.resolve_name("__main__:own", trust.Slot.MODEL, instance=False) is None
        trusted, trust._prefixes = trust._prefixes, set()
        assert trust.resolve_name("__main__:alias", slot, instance=False) is None
        trust._prefixes = trusted
    finally:
        del main.own, main.alias
    assert data(3)
