"""A training with an Accelerator on CPU ranks, as a script: FOLDER STEPS [OPTION...]

Trains to STEPS of the steps of two epochs, resuming if there is a checkpoint; saves at the end.
Options: `automatic` names, `fsdp2`.
"""

import hashlib
import json
import os
import sys
import warnings

warnings.simplefilter("ignore")
import torch  # noqa: E402
from accelerate import Accelerator  # noqa: E402
from accelerate.utils import (  # noqa: E402
    DataLoaderConfiguration,
    FullyShardedDataParallelPlugin,
    ProjectConfiguration,
)

from shardckpt.integrations.accelerate import use_shardckpt  # noqa: E402
from tests.integrations.jobs import allow_fsdp_on_cpu  # noqa: E402

FOLDER, STEPS, *OPTIONS = sys.argv[1:]
WORLD = int(os.environ.get("WORLD_SIZE", "1"))


class Counter:
    value = 0

    def state_dict(self):
        return {"value": self.value}

    def load_state_dict(self, state):
        self.value = state["value"]


automatic = "automatic" in OPTIONS
configuration = ProjectConfiguration(
    FOLDER, automatic_checkpoint_naming=automatic, total_limit=2 if automatic else None
)
plugins = {}
if "fsdp2" in OPTIONS and WORLD > 1:
    allow_fsdp_on_cpu()
    plugins["fsdp_plugin"] = FullyShardedDataParallelPlugin(fsdp_version=2)
accelerator = Accelerator(
    cpu=True,
    **plugins,
    step_scheduler_with_optimizer=False,  # otherwise a scheduler takes a step for each rank
    project_config=configuration,
    dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=5),
)
use_shardckpt(accelerator)
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
data = torch.utils.data.DataLoader(torch.randn(64, 8), batch_size=8 // WORLD, shuffle=True)
model, optimizer, scheduler, data = accelerator.prepare(model, optimizer, scheduler, data)
counter = Counter()
accelerator.register_for_checkpointing(counter)
checkpoint = None if automatic else os.path.join(FOLDER, "checkpoint")
if automatic and os.path.isdir(os.path.join(FOLDER, "checkpoints")):
    accelerator.load_state()
elif checkpoint and os.path.isdir(checkpoint):
    accelerator.load_state(checkpoint)
while counter.value < int(STEPS):
    for x in accelerator.skip_first_batches(data, counter.value % 8):
        loss = torch.nn.functional.cross_entropy(model(x), x[:, :4].argmax(1))
        accelerator.backward(loss)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        counter.value += 1
        if automatic:
            accelerator.save_state()
        if counter.value >= int(STEPS):
            break
if not automatic:
    accelerator.save_state(checkpoint)
state = accelerator.unwrap_model(model).state_dict().values()
full = [value.full_tensor() if hasattr(value, "full_tensor") else value for value in state]
weights = torch.cat([value.flatten() for value in full])
found = {
    "digest": hashlib.sha256(weights.numpy().tobytes()).hexdigest(),
    "sum": weights.double().sum().item(),
    "steps": counter.value,
    "sharded": any(hasattr(value, "full_tensor") for value in model.parameters()),
}
accelerator.print(json.dumps(found))
accelerator.end_training()
