"""The folder layouts of other libraries: the library that wrote a folder, and the role of each
file.

Only file names decide; no file is opened. The names are those of transformers 5.24 (Trainer),
accelerate 1.15, lightning 2.6, torchtune 0.6, deepspeed 0.19, megatron-core 0.15, peft, diffusers
and nemo.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection

from shardckpt.errors import NotACheckpointError
from shardckpt.storage.base import MANIFEST_NAME
from shardckpt.storage.posix import translated

__all__ = [
    "WEIGHTS",
    "companions",
    "left_beside",
    "names_in",
    "raise_unreadable",
    "writer_of",
]

WEIGHTS = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
    "adapter_model.safetensors",
    "adapter_model.bin",
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors",
)
"""Files with the weights of a folder in the layout of Hugging Face, or with their index. The first
that exists is read."""

_CONVERTIBLE = "pass this path to `shardckpt convert`"
_COMPANION = re.compile(
    r"(config|generation_config|adapter_config|vocab|special_tokens_map|added_tokens)\.json"
    r"|(tokenizer|preprocessor|processor|image_processor|video_preprocessor|chat_template).*"
    r"\.(json|model|jinja)|vocab\.txt|merges\.txt|(spiece|sentencepiece.*)\.(model|bpe\.model)"
    r"|(modeling|configuration|tokenization|processing)_\w+\.py"
)
_ROLES = tuple(
    (re.compile(pattern), role)
    for pattern, role in (
        (r"optimizer(_\d+)?\.(pt|bin)", f"the optimizer's state; {_CONVERTIBLE}"),
        (r"scheduler(_\d+)?\.(pt|bin)", f"the scheduler's state; {_CONVERTIBLE}"),
        (r"scaler\.pt", f"the gradient scaler's state; {_CONVERTIBLE}"),
        (
            r"rng_state(_\d+)?\.pth|random_states_\d+\.pkl",
            f"random-number state of a rank; {_CONVERTIBLE}",
        ),
        (r"(sampler|dl_state_dict)(_\d+)?\.bin", f"a position in the data; {_CONVERTIBLE}"),
        (r"custom_checkpoint_\d+\.pkl", f"state registered with accelerate; {_CONVERTIBLE}"),
        (r"trainer_state\.json", "the progress and history of a transformers Trainer"),
        (r"training_args\.bin", "a pickled object: the arguments of a transformers Trainer"),
        (r"recipe_state(\.pt)?", f"torchtune's progress and optimizer state; {_CONVERTIBLE}"),
        (r"pytorch_model_fsdp(_\d+)?", f"weights sharded by FSDP; {_CONVERTIBLE}"),
        (r"(optimizer|fsdp_optimizer)_\d+", f"optimizer state sharded by FSDP; {_CONVERTIBLE}"),
        (r"global_step\d+|.*_(model|optim)_states\.pt", f"DeepSpeed's state; {_CONVERTIBLE}"),
        (r"zero_to_\w+\.py|latest(_universal)?", "a file that DeepSpeed writes beside the state"),
        (r"adapter_model\.\w+", f"an adapter's weights; {_CONVERTIBLE}"),
        (
            r"(model|pytorch_model)_\d+\.(safetensors|bin)|.*\.(safetensors|bin|pth|pt|ckpt)",
            f"other weights or state; {_CONVERTIBLE}",
        ),
        (r".*\.(h5|msgpack|onnx|ot|tflite|mlmodel)", "weights for another framework"),
        (r".*\.gguf", f"weights of llama.cpp; {_CONVERTIBLE}"),
        (r".*\.npz", f"arrays of numpy; {_CONVERTIBLE}"),
        (r"__\d+_\d+\.distcp", "a data file to which the metadata does not refer"),
        (r"metadata\.json|context", "Megatron's or NeMo's description of the run"),
    )
)


def names_in(path: str) -> list[str]:
    """Return the sorted names in a folder."""
    with translated(path):
        return sorted(os.listdir(path))


def companions(path: str) -> tuple[str, ...]:
    """Return the files beside the weights that users of a model need: configuration and tokenizer.

    A symbolic link is resolved within the cache of the hub of Hugging Face. Other links out of the
    folder are ignored, since they could lead to any file of this machine.
    """
    home = os.path.realpath(path)
    cache = os.path.join(os.path.dirname(os.path.dirname(home)), "blobs")

    def inside(name: str) -> bool:
        file = os.path.realpath(os.path.join(path, name))
        return os.path.isfile(file) and os.path.dirname(file) in (home, cache)

    return tuple(name for name in names_in(path) if _COMPANION.fullmatch(name) and inside(name))


def left_beside(path: str, used: Collection[str]) -> dict[str, str]:
    """Return the files in a folder that are not read, with a description of each."""
    return {name: _role(name) for name in names_in(path) if name not in used}


def _role(name: str) -> str:
    if _COMPANION.fullmatch(name):
        return "describes the model or its input; a conversion to `--format hf` copies it"
    for pattern, role in _ROLES:
        if pattern.fullmatch(name):
            return role
    return "convert does not read files of this name"


def writer_of(path: str) -> str | None:
    """Return the library that wrote a folder, if the names of its files show it."""
    names = set(names_in(path))
    if {"trainer_state.json", "training_args.bin"} & names:
        return "transformers' Trainer"
    if any(re.fullmatch(r"random_states_\d+\.pkl|pytorch_model_fsdp_\d+", n) for n in names):
        return "accelerate"
    if "recipe_state" in names or "recipe_state.pt" in names:
        return "torchtune"
    if {".metadata", "meta.pt"} <= names:
        return "Lightning"
    if {".metadata", "common.pt"} <= names:
        return "Megatron-Core"
    if "adapter_config.json" in names:
        return "peft"
    if "config.json" in names:
        return "transformers"
    return None


_UNREADABLE = (
    (
        r"(.*/)?(mp_rank_\d+_model_states\.pt|(bf16_)?zero_pp_rank_.*_states\.pt|zero_to_fp32\.py)",
        "a DeepSpeed checkpoint whose file `latest` does not name a folder in it",
        "convert the folder in it that has the files *_states.pt",
    ),
    (
        r"(.*/)?mp_rank_\d+(_\d+)?/model_optim_rng\.pt|(.*/)?mp_rank_\d+(_\d+)?",
        "a Megatron-LM checkpoint with a file for each rank of the model",
        "convert it with Megatron-LM's tools/checkpoint/convert.py to --ckpt-format torch_dist",
    ),
    (
        r"__\d+\.metadata",
        "a DCP checkpoint whose ranks each wrote metadata of their own (use_collectives=False)",
        "load it with dcp.load on as many ranks, and save it again with use_collectives=True",
    ),
    (
        r"shard-\d+-model-.*\.safetensors",
        "a DCP checkpoint in safetensors files, each with parts of tensors",
        "merge its files with torch.distributed.checkpoint's consolidate_safetensors_files",
    ),
    (
        r"__\d+_\d+\.distcp",
        "a DCP checkpoint without its .metadata: the save did not end",
        "use the checkpoint before it",
    ),
    (
        r"pytorch_model_fsdp(_\d+)?(_rank\d+)?\.bin",
        "accelerate's folder with FSDP weights in one file, or one for each rank",
        "convert pytorch_model_fsdp.bin; parts by rank (LOCAL_STATE_DICT) only FSDP itself loads",
    ),
    (
        r"consolidated\.\d+\.pth",
        "weights as Meta distributes Llama: a file for each rank of model parallelism",
        "convert consolidated.00.pth if it is the only one, else transformers' "
        "convert_llama_weights_to_hf.py first",
    ),
    (
        r".*\.gguf",
        "weights of llama.cpp",
        "convert the .gguf file itself",
    ),
    (
        r"saved_model\.pb|.*\.ckpt\.index|.*\.(h5|msgpack|onnx|keras)",
        "weights for another framework than PyTorch",
        "export them for PyTorch with that framework",
    ),
)  # fmt: skip


def raise_unreadable(path: str) -> None:
    """Raise NotACheckpointError with a description of the path, or with the folders and files in it
    that convert can read. Returns if shardckpt's own error describes it."""
    if not os.path.exists(path):
        return
    if not os.path.isdir(path):
        raise NotACheckpointError(
            "The path is neither a file nor a folder",
            path=path,
            expected="one of the sources in docs/convert.md",
            actual="a device, a pipe or a socket",
            remedy="pass the path of a checkpoint",
        )
    names = names_in(path)
    if any(re.fullmatch(r"shard-\d+-of-\d+\.safetensors", name) for name in names):
        return  # a checkpoint of shardckpt without its manifest
    inner = [
        f"{name}/{below}"
        for name in names[:100]
        if os.path.isdir(os.path.join(path, name))
        for below in names_in(os.path.join(path, name))[:1000]
    ]
    marks = (".metadata", MANIFEST_NAME, "latest", *WEIGHTS)
    readable = sorted({name.split("/")[0] for name in inner if name.split("/")[1] in marks})
    for pattern, what, remedy in _UNREADABLE:
        match = next((name for name in [*names, *inner] if re.fullmatch(pattern, name)), None)
        if match is not None and not readable:
            raise NotACheckpointError(
                f"Conversion of this folder is not supported: it is {what}",
                path=path,
                expected="one of the sources in docs/convert.md",
                actual=match,
                remedy=remedy.format(path=path),
            )
    files = [n for n in names if n.endswith((".safetensors", ".bin", ".pt", ".pth", ".ckpt"))]
    if readable or files:
        found = list(dict.fromkeys(readable + files))
        raise NotACheckpointError(
            "This folder is not a checkpoint, but contains checkpoints or files of weights",
            path=path,
            expected="one of the sources in docs/convert.md",
            actual=", ".join(found[:8]),
            remedy=f"pass one of them, such as {os.path.join(path, found[0])}",
        )
    raise NotACheckpointError(
        "This folder is not a checkpoint of a known format",
        path=path,
        expected="one of the sources in docs/convert.md",
        actual=", ".join(names[:8]) or "an empty folder",
        remedy="pass the folder that holds the files of the checkpoint",
    )
