"""Write the folders deepspeed-0.19.8/* beside this file, with DeepSpeed itself on two CPU ranks:

DS_BUILD_OPS=0 pip install deepspeed==0.19.8
DS_ACCELERATOR=cpu torchrun --standalone --nproc-per-node 2 tests/convert/made_by/write_deepspeed.py

Stages 1 and 3 are also converted to universal checkpoints. `expected.pt` holds the weights that
DeepSpeed itself gathers, and the moments of its universal checkpoint.
"""

import argparse
import importlib
import shutil
import sys
import tempfile
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.checkpoint import ds_to_universal
from deepspeed.utils import safe_get_full_fp32_param
from torch import nn

FOLDER = Path(__file__).parent / "deepspeed-0.19.8"
STEP = "global_step3"
VARIANTS = {
    "stage-0": {"stage": 0},
    "stage-1": {"stage": 1},
    "stage-1-bf16": {"stage": 1},
    "stage-2": {"stage": 2},
    "stage-2-aligned": {"stage": 2, "parameter_alignment": True, "round_robin_gradients": True},
    "stage-3": {"stage": 3},
    "stage-3-subgroups": {"stage": 3, "sub_group_size": 5},
}
MORE = {"stage-1-bf16": {"data_types": {"grad_accum_dtype": "fp32"}}}
"""Options with which DeepSpeed uses another class of optimizer."""
UNIVERSAL = {"stage-1": "universal", "stage-3": "universal-of-stage-3"}


class Model(nn.Module):
    """Odd sizes, a buffer, and a frozen and a tied weight."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 3)
        self.layer = nn.Linear(3, 5)
        self.frozen = nn.Linear(5, 3).requires_grad_(False)
        self.norm = nn.LayerNorm(3)
        self.head = nn.Linear(3, 7, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("shift", torch.tensor([0.25, 0.5, -0.75]))

    def forward(self, tokens):
        hidden = torch.relu(self.layer(self.embedding(tokens)))
        hidden = self.norm(self.frozen(hidden))
        return self.head(hidden + self.shift.to(hidden.dtype))


def groups(model):
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]


def write(variant: str) -> None:
    zero = VARIANTS[variant]
    target = FOLDER / variant
    torch.manual_seed(0)
    model = Model()
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": zero["stage"] > 0},
        **MORE.get(variant, {}),
    }
    engine, _, _, _ = deepspeed.initialize(
        model=model, optimizer=torch.optim.AdamW(groups(model), lr=0.01), config=config
    )
    for step in range(3):
        tokens = (torch.arange(4) * (step + 1) + dist.get_rank()) % 7
        engine.backward(engine(tokens).float().logsumexp(1).mean())
        engine.step()
    if dist.get_rank() == 0:
        shutil.rmtree(target, ignore_errors=True)
    dist.barrier()
    engine.save_checkpoint(target, tag=STEP, client_state={"note": "three steps"})
    weights = gathered(engine, zero["stage"])
    if dist.get_rank() == 0:
        for script in target.glob("zero_to_*.py"):
            script.unlink()
        moments = write_universal(variant, weights) if zero["stage"] else {}
        torch.save({"weights": weights, **moments}, target / "expected.pt")
        if variant in UNIVERSAL:
            shutil.copy(target / "expected.pt", FOLDER / UNIVERSAL[variant])
    dist.barrier()


def gathered(engine, stage: int) -> dict:
    """Return the weights, as DeepSpeed gathers them."""
    weights = {}
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad and stage:
            weights[name] = safe_get_full_fp32_param(parameter).clone()
        elif stage == 3:
            with deepspeed.zero.GatheredParameters([parameter]):
                weights[name] = parameter.detach().clone()
        else:
            weights[name] = parameter.detach().clone()
    return weights


def write_universal(variant: str, weights: dict) -> dict:
    """Write a universal checkpoint, and return its moments by key and name. The moments of stage
    3 are flat."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "universal"
        target.mkdir()
        ds_to_universal.main(
            argparse.Namespace(
                input_folder=str(FOLDER / variant / STEP),
                output_folder=str(target / f"{STEP}_universal"),
                num_extract_workers=1,
                num_merge_workers=1,
                keep_temp_folder=False,
                strict=True,
                inject_missing_state=True,
            )
        )
        moments = {}
        for key in ("exp_avg", "exp_avg_sq"):
            files = (target / f"{STEP}_universal" / "zero").glob(f"*/{key}.pt")
            moments[key] = {}
            for file in files:
                value, name = torch.load(file, weights_only=False), file.parent.name
                value = value["param"] if isinstance(value, dict) else value
                moments[key][name] = value.reshape(weights[name].shape)
        if variant in UNIVERSAL:
            shutil.rmtree(FOLDER / UNIVERSAL[variant], ignore_errors=True)
            shutil.copytree(target, FOLDER / UNIVERSAL[variant])
    return moments


if __name__ == "__main__":
    # DeepSpeed would compile this operation, which is not needed here
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None
    deepspeed.init_distributed("gloo")
    for variant in sys.argv[1:] or VARIANTS:
        write(variant)
    dist.destroy_process_group()
