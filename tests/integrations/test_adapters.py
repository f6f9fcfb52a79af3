"""Adapters of PEFT: the files are those of peft, and a load gives the model what peft gives it."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from shardckpt.errors import LoadMismatchError, StateError  # noqa: E402
from shardckpt.integrations import adapters  # noqa: E402
from shardckpt.integrations.transformers import load_pretrained, save_pretrained  # noqa: E402

pytestmark = pytest.mark.filterwarnings("default")

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}


def base(*, tied: bool = False):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        vocab_size=16, tie_word_embeddings=tied,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def adapted(config, *, seed: int = 1, tied: bool = False):
    torch.manual_seed(seed)
    model = peft.get_peft_model(base(tied=tied), config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.normal_()
    return model


def equal(one, other):
    names = one.keys()
    return names == other.keys() and all(torch.equal(one[name], other[name]) for name in names)


CONFIGS = {
    "lora": (lambda: peft.LoraConfig(**LORA, task_type="CAUSAL_LM"), False),
    "lora without a task": (lambda: peft.LoraConfig(**LORA), False),
    "tied embeddings": (
        lambda: peft.LoraConfig(r=2, target_modules=["v_proj", "embed_tokens", "lm_head"]),
        True,
    ),
    "tied modules_to_save": (
        lambda: peft.LoraConfig(**LORA, modules_to_save=["embed_tokens"], ensure_weight_tying=True),
        True,
    ),
    "prompts": (
        lambda: peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
        False,
    ),
    "prefixes": (
        lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
        False,
    ),
    "vector banks": (
        lambda: peft.VBLoRAConfig(
            r=2, target_modules=["q_proj"], num_vectors=6, vector_length=4, topk=2,
            save_only_topk_weights=True,
        ),
        False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", CONFIGS)
def test_an_adapter_is_saved_and_loaded_as_by_peft(tmp_path, kind):
    config, tied = CONFIGS[kind]
    model = adapted(config(), tied=tied)
    model.save_pretrained(tmp_path / "peft")
    save_pretrained(model, tmp_path / "ours")
    saved = [load_file(tmp_path / name / WEIGHTS) for name in ("ours", "peft")]
    assert equal(*saved)
    assert json.loads((tmp_path / "ours" / CONFIG).read_text()) == json.loads(
        (tmp_path / "peft" / CONFIG).read_text()
    )
    loaded = adapted(config(), seed=2, tied=tied)
    report = load_pretrained(loaded, tmp_path / "peft")
    assert (report.missing, report.unexpected) == ((), ())
    expected = peft.PeftModel.from_pretrained(base(tied=tied), tmp_path / "peft").state_dict()
    assert equal(loaded.state_dict(), expected)


@pytest.mark.parametrize("encoder", ["PromptEncoderConfig", "PrefixTuningConfig"])
def test_a_prompt_encoder_with_layers_is_loaded_for_inference_only(tmp_path, encoder):
    """Its file has the output of the layers, not their weights."""
    options = {"prefix_projection": True} if encoder == "PrefixTuningConfig" else {}
    options |= {"num_virtual_tokens": 3, "encoder_hidden_size": 4, "task_type": "CAUSAL_LM"}
    model = adapted(getattr(peft, encoder)(**options))
    save_pretrained(model, tmp_path / "adapter")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(StateError, match="prompt encoder with layers") as raised:
        load_pretrained(model, tmp_path / "adapter")
    assert "inference_mode=True" in raised.value.remedy
    assert equal(model.state_dict(), before)
    loaded = adapted(getattr(peft, encoder)(**options, inference_mode=True), seed=2)
    load_pretrained(loaded, tmp_path / "adapter")
    prompts = model.get_prompt_embedding_to_save("default")
    assert torch.equal(loaded.prompt_encoder["default"].embedding.weight, prompts)


def test_an_adapter_of_transformers_gets_the_names_of_peft(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.integrations.peft.check_peft_version", lambda **_: None)

    def with_adapter(seed):
        model = base()
        torch.manual_seed(seed)
        model.add_adapter(peft.LoraConfig(**LORA))
        return model

    model = with_adapter(1)
    model.save_pretrained(tmp_path / "transformers")
    save_pretrained(model, tmp_path / "ours")
    saved = [load_file(tmp_path / name / WEIGHTS) for name in ("ours", "transformers")]
    assert equal(*saved)
    loaded = with_adapter(2)
    load_pretrained(loaded, tmp_path / "transformers")
    assert equal(loaded.state_dict(), model.state_dict())


def test_values_of_tied_weights_that_differ_are_refused(tmp_path):
    model = adapted(CONFIGS["tied embeddings"][0](), tied=True)
    save_pretrained(model, tmp_path / "adapter")
    weights = load_file(tmp_path / "adapter" / WEIGHTS)
    name = "base_model.model.lm_head.base_layer.weight"
    weights[name] = weights[name] + 1
    save_file(weights, tmp_path / "adapter" / WEIGHTS)
    with pytest.raises(LoadMismatchError, match="tied in the model have different values") as info:
        load_pretrained(model, tmp_path / "adapter")
    assert "tie_word_embeddings=False" in info.value.remedy


def test_two_active_adapters_are_refused(tmp_path):
    model = adapted(peft.LoraConfig(**LORA))
    model.add_adapter("second", peft.LoraConfig(**LORA))
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(StateError, match="Only one adapter") as raised:
        save_pretrained(model, tmp_path / "adapter")
    assert raised.value.actual == "default, second"


def test_a_module_that_peft_has_changed_is_not_an_adapter_model():
    module = nn.Sequential(nn.Linear(2, 2))
    model = peft.get_peft_model(module, peft.LoraConfig(r=1, target_modules=["0"]))
    assert adapters.is_adapter(model)
    assert not adapters.is_adapter(module)
