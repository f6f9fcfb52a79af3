"""A replica group of a training with torchft, as a script: REPLICA FOLDER STEPS PORT [OPTION...]

Trains to STEPS, and saves every four steps. Options: `same` gives all groups the same data, so that
a step does not depend on who takes part; `async`; `keep`; `position` saves the position in the data
by group; `three` begins with three groups; `die-at-N` ends this group after step N, and
`die-in-save-N` when it commits the checkpoint of step N; `slow-save-N` commits it when the other
groups have trained on to step 8; `wait-at-N` waits there until group 0 has come `back`.
"""

import datetime
import hashlib
import json
import os
import signal
import sys
import time
import warnings
from pathlib import Path

warnings.simplefilter("ignore")
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torchft  # noqa: E402
from torch.distributed.fsdp import fully_shard  # noqa: E402

import shardckpt  # noqa: E402
from shardckpt.integrations.torchft import resume  # noqa: E402
from shardckpt.saving import pipeline  # noqa: E402

REPLICA, FOLDER, STEPS, PORT, *OPTIONS = sys.argv[1:]
dist.init_process_group("gloo")
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
if dist.get_world_size() > 1:
    fully_shard(model)


class Position:
    value = 0

    def state_dict(self):
        return {"value": self.value}

    def load_state_dict(self, state):
        self.value = state["value"]


def load_from_peer(values):
    """Live recovery: torchft hands over what a healthy group had."""
    model.load_state_dict(values["model"])
    optimizer.load_state_dict(values["optimizer"])


seconds = datetime.timedelta(seconds=20)
manager = torchft.Manager(
    pg=torchft.ProcessGroupGloo(timeout=datetime.timedelta(seconds=5)),
    load_state_dict=load_from_peer,
    state_dict=lambda: {"model": model.state_dict(), "optimizer": optimizer.state_dict()},
    min_replica_size=1,
    timeout=seconds,
    quorum_timeout=seconds,
    replica_id=f"replica_{REPLICA}",
    hostname="127.0.0.1",
    lighthouse_addr=f"http://127.0.0.1:{PORT}",
    use_async_quorum=dist.get_world_size() == 1,
)
optimizer = torchft.Optimizer(manager, torch.optim.AdamW(model.parameters(), lr=0.01))
position = Position()
options = {"keep": [shardckpt.KeepLast(2)]} if "keep" in OPTIONS else {}
if "position" in OPTIONS:
    options |= {"replica_id": REPLICA, "replica_state": {"data": position}}
checkpoints = resume(
    manager,
    FOLDER,
    {"model": model, "optimizer": optimizer},
    asynchronous="async" in OPTIONS,
    **options,
)
first, first_position = manager.current_step(), position.value


def tell(event):
    Path(f"{FOLDER}-{STEPS}-{event}").touch()


def wait_for(event):
    while not Path(f"{FOLDER}-{STEPS}-{event}").exists():
        time.sleep(0.01)


def die(*arguments, **named):
    wait_for(f"1-at-{manager.current_step()}")  # the other group does not repeat the step
    os.kill(os.getpid(), signal.SIGKILL)


def commit_late(*arguments):
    wait_for("1-at-8")
    pipeline.commit = commit
    committed = commit(*arguments)
    tell("back")
    return committed


commit = pipeline.commit
if "back" in OPTIONS:
    tell("back")
else:  # the first quorum has all groups
    tell(f"{REPLICA}-at-0")
    for number in range(3 if "three" in OPTIONS else 2):
        wait_for(f"{number}-at-0")
saved, waited = [], False
while manager.current_step() < int(STEPS):
    step = manager.current_step()
    optimizer.zero_grad()
    generator = torch.Generator().manual_seed(step * 10 + int(REPLICA) * ("same" not in OPTIONS))
    x = torch.randn(8, 8, generator=generator)
    torch.nn.functional.cross_entropy(model(x), x[:, :4].argmax(1)).backward()
    for parameter in model.parameters():
        gradient = parameter.grad
        gradient = gradient.to_local() if hasattr(gradient, "to_local") else gradient
        manager.allreduce(gradient).wait()
    optimizer.step()
    position.value += 1
    tell(f"{REPLICA}-at-{manager.current_step()}")
    if f"die-at-{manager.current_step()}" in OPTIONS:
        die()
    if f"die-in-save-{manager.current_step()}" in OPTIONS:
        pipeline.commit = die
    if f"slow-save-{manager.current_step()}" in OPTIONS:
        pipeline.commit = commit_late
    if (checkpoint := checkpoints.save(every=4)) is not None:
        saved.append(checkpoint.step)
    if f"wait-at-{manager.current_step()}" in OPTIONS:
        wait_for("back")
        waited = True
    if waited and manager.num_participants() < 2:
        time.sleep(0.1)  # group 0 joins within a few of the steps
checkpoints.wait()
weights = torch.cat(
    [
        (value.full_tensor() if hasattr(value, "full_tensor") else value).flatten()
        for value in model.state_dict().values()
    ]
)
found = {
    "digest": hashlib.sha256(weights.numpy().tobytes()).hexdigest(),
    "sum": weights.double().sum().item(),
    "first": first,
    "position": first_position,
    "saved": saved,
    "batches": manager.batches_committed(),
}
print(json.dumps(found))
manager.shutdown(wait=False)
dist.destroy_process_group()
