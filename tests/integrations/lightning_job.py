"""A training with Lightning on CPU ranks, as a script: KIND FOLDER EPOCHS [CHECKPOINT] [OPTION...]

Prints the weights' digest and the losses of the epochs that it ran, on rank 0.
"""

import hashlib
import json
import os
import sys
import warnings

warnings.simplefilter("ignore")
import lightning.pytorch as pl  # noqa: E402
import torch  # noqa: E402
from lightning.pytorch.callbacks import ModelCheckpoint  # noqa: E402
from torch.distributed.fsdp import fully_shard  # noqa: E402

from shardckpt.integrations.lightning import (  # noqa: E402
    ShardckptCallback,
    ShardckptFSDPStrategy,
    ShardckptModelParallelStrategy,
    ShardckptStrategy,
)

WORLD = int(os.environ.get("WORLD_SIZE", "1"))


class Model(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.save_hyperparameters({"width": 16})
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4)
        )
        self.losses = []

    def configure_model(self):
        if KIND == "model_parallel" and not hasattr(self.layers[0], "unshard"):
            mesh = self.device_mesh["data_parallel"]
            fully_shard(self.layers[0], mesh=mesh)
            fully_shard(self.layers, mesh=mesh)

    def training_step(self, batch, index):
        (x,) = batch
        loss = torch.nn.functional.cross_entropy(self.layers(x), x[:, :4].argmax(1))
        self.log("loss", loss, sync_dist=True, on_step=False, on_epoch=True)
        return loss

    def on_train_epoch_end(self):
        self.losses.append(round(float(self.trainer.callback_metrics.get("loss", 0)), 5))

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]

    def train_dataloader(self):
        torch.manual_seed(1)
        data = torch.utils.data.TensorDataset(torch.randn(64, 8))
        return torch.utils.data.DataLoader(data, batch_size=16 // WORLD, shuffle=False)


def strategy(options):
    if KIND == "ddp":
        return ShardckptStrategy(**options)
    if KIND == "model_parallel":
        return ShardckptModelParallelStrategy(
            data_parallel_size=WORLD, tensor_parallel_size=1, **options
        )
    if KIND == "fsdp":
        return ShardckptFSDPStrategy(**options)
    return {"lightning": "ddp", "callback": "ddp"}[KIND]


KIND, FOLDER, EPOCHS, CHECKPOINT, *OPTIONS = sys.argv[1:]
pl.seed_everything(0)
torch.manual_seed(0)
options = {"asynchronous": True} if "asynchronous" in OPTIONS else {}
callbacks = []
if KIND == "callback":
    callbacks = [ShardckptCallback(FOLDER, every_n_steps=4)]
else:
    keep = 1 if "keep" in OPTIONS else -1
    monitor = {"monitor": "loss"} if "keep" in OPTIONS else {}
    callbacks = [
        ModelCheckpoint(FOLDER, filename="{epoch}", save_top_k=keep, save_last=True, **monitor)
    ]
model = Model()
trainer = pl.Trainer(
    strategy=strategy(options),
    accelerator="cpu",
    devices=WORLD,
    max_epochs=int(EPOCHS),
    callbacks=callbacks,
    enable_checkpointing=KIND != "callback",
    logger=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(model, ckpt_path=CHECKPOINT if CHECKPOINT != "-" else None)
if KIND == "fsdp":
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    state = get_model_state_dict(
        trainer.strategy.model, options=StateDictOptions(full_state_dict=True)
    )
else:
    state = {
        name: value.full_tensor() if hasattr(value, "full_tensor") else value
        for name, value in model.state_dict().items()
    }
if trainer.is_global_zero:
    weights = torch.cat([value.flatten() for value in state.values()]) if state else torch.zeros(1)
    digest = hashlib.sha256(weights.numpy().tobytes()).hexdigest()
    print(json.dumps({"digest": digest, "losses": model.losses, "sum": weights.sum().item()}))
