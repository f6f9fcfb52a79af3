"""A training with torchtitan's components on CPU ranks, as a script: FOLDER STEPS [OPTION...]"""

import hashlib
import json
import os
import sys
import warnings

warnings.simplefilter("ignore")
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch.distributed.fsdp import fully_shard  # noqa: E402
from torchtitan.components.dataloader import ParallelAwareDataloader  # noqa: E402
from torchtitan.components.optimizer import LRSchedulersContainer, default_adamw  # noqa: E402

from shardckpt.integrations.torchtitan import ShardckptManager  # noqa: E402

FOLDER, STEPS, *OPTIONS = sys.argv[1:]
dist.init_process_group("gloo")
RANK, WORLD = dist.get_rank(), dist.get_world_size()


class Samples(torch.utils.data.IterableDataset):
    """Endless samples, divided among the ranks, with a position."""

    def __init__(self):
        self.position = 0

    def __iter__(self):
        while True:
            generator = torch.Generator().manual_seed(self.position)
            sample = torch.randn(8, 8, generator=generator)
            self.position += 1
            yield sample[RANK * 8 // WORLD : (RANK + 1) * 8 // WORLD]

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


class Trainer:
    step = 0

    def state_dict(self):
        return {"step": self.step}

    def load_state_dict(self, state):
        self.step = state["step"]


class Adapter:
    """The names of Hugging Face, as torchtitan's state-dict adapters give them."""

    hf_assets_path = None

    def to_hf(self, state):
        return {f"model.{name}": value for name, value in state.items()}

    def from_hf(self, state):
        return {name.removeprefix("model."): value for name, value in state.items()}


torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
fully_shard(model)
optimizer_config = default_adamw(lr=0.01)
optimizer_config.implementation = "for-loop"
optimizers = optimizer_config.build(model_parts=[model])
schedulers = LRSchedulersContainer.Config(warmup_steps=2).build(
    optimizers=optimizers, training_steps=12
)
trainer = Trainer()
loader = ParallelAwareDataloader(Samples(), dp_rank=RANK, dp_world_size=WORLD, batch_size=None)
options = {"last_save_model_only": "full" not in OPTIONS}
if "asynchronous" in OPTIONS:
    options["asynchronous"] = True
if "hf" in OPTIONS:
    options["last_save_in_hf"] = True
if "bfloat16" in OPTIONS:
    options["export_dtype"] = "bfloat16"
if "anew" in OPTIONS:
    options["exclude_from_loading"] = ["dataloader"]
for option in OPTIONS:
    if option.startswith("/"):
        options |= {"initial_load_path": option, "initial_load_in_hf": "from-hf" in OPTIONS}
config = ShardckptManager.Config(enable=True, interval=3, keep_latest_k=2, **options)
manager = config.build(
    dataloader=loader,
    model_parts=[model],
    optimizers=optimizers,
    lr_schedulers=schedulers,
    states={"train_state": trainer},
    sd_adapter=Adapter(),
    base_folder=FOLDER,
)
loaded = manager.load()
first, start = trainer.step, model[0].weight.full_tensor()
if "anew" in OPTIONS:
    loader.dataset.position = trainer.step
batches = iter(loader)
while trainer.step < int(STEPS):
    trainer.step += 1
    x = next(batches)
    torch.nn.functional.cross_entropy(model(x), x[:, :4].argmax(1)).backward()
    optimizers.step()
    schedulers.step()
    optimizers.zero_grad()
    manager.maybe_wait_for_staging()
    manager.save(trainer.step, last_step=trainer.step == 12)
manager.close()
saved = os.path.join(FOLDER, "checkpoint")  # missing if no step was saved
weights = torch.cat([value.full_tensor().flatten() for value in model.state_dict().values()])
if RANK == 0:
    found = {
        "digest": hashlib.sha256(weights.detach().numpy().tobytes()).hexdigest(),
        "sum": weights.double().sum().item(),
        "first": first,
        "loaded": loaded,
        "start": start.sum().item(),
        "steps": sorted(os.listdir(saved)) if os.path.isdir(saved) else [],
    }
    print(json.dumps(found))
dist.destroy_process_group()
