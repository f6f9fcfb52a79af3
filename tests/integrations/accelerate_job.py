"""A training with an Accelerator on CPU ranks, as a script: FOLDER STEPS [OPTION...]

Trains to STEPS of the steps of two epochs, resuming if there is a checkpoint; saves at the end.
"""

import hashlib
import json
import os
import sys
import warnings

warnings.simplefilter("ignore")
import torch  # noqa: E402
from accelerate import Accelerator  # noqa: E402
from accelerate.utils import DataLoaderConfiguration, ProjectConfiguration  # noqa: E402

from shardckpt.integrations.accelerate import use_shardckpt  # noqa: E402

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
accelerator = Accelerator(
    cpu=True,
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
weights = torch.cat(
    [value.flatten() for value in accelerator.unwrap_model(model).state_dict().values()]
)
digest = hashlib.sha256(weights.numpy().tobytes()).hexdigest()
accelerator.print(
    json.dumps({"digest": digest, "sum": weights.double().sum().item(), "steps": counter.value})
)
accelerator.end_training()
