"""Write lightning-2.6.ckpt and the folder lightning-2.6-sharded.ckpt beside this file, with
Lightning itself:

pip install lightning==2.6.6
torchrun --standalone --nproc-per-node 2 tests/convert/made_by/write_lightning.py sharded
python tests/convert/made_by/write_lightning.py file
"""

import argparse
import shutil
import sys
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard

FOLDER = Path(__file__).parent
STEPS = 4


class Model(L.LightningModule):
    def __init__(self, arguments):
        super().__init__()
        self.save_hyperparameters()
        self.layers = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))

    def configure_model(self):
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            fully_shard(self.layers, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch, index):
        loss = self.layers(batch).square().mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]


def main() -> None:
    sharded = sys.argv[1] == "sharded"
    L.seed_everything(0)
    strategy = ModelParallelStrategy(save_distributed_checkpoint=True) if sharded else "auto"
    trainer = L.Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=2 if sharded else 1,
        max_steps=STEPS,
        logger=False,
        enable_progress_bar=False,
        callbacks=[ModelCheckpoint("unused", save_top_k=0)],
    )
    model = Model(argparse.Namespace(width=3))
    trainer.fit(model, torch.utils.data.DataLoader(torch.randn(32, 4), batch_size=4))
    name = "lightning-2.6-sharded.ckpt" if sharded else "lightning-2.6.ckpt"
    path = FOLDER / name
    if trainer.is_global_zero and path.is_dir():
        shutil.rmtree(path)
    trainer.strategy.barrier()
    trainer.save_checkpoint(path)
    weights = {
        key: value.full_tensor() if hasattr(value, "full_tensor") else value
        for key, value in model.state_dict().items()
    }
    if trainer.is_global_zero:
        torch.save(weights, FOLDER / f"{name}.expected.pt")


if __name__ == "__main__":
    main()
