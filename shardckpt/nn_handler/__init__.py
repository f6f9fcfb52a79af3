"""NNHandler: a model with its optimizer, loss and loaders, trained, saved and loaded as one."""

from shardckpt.nn_handler.auto_saver import AutoSaver
from shardckpt.nn_handler.callbacks import (
    Callback,
    CSVLogger,
    EarlyStopping,
    LearningRateMonitor,
    ModelCheckpoint,
    ProgressBar,
    TensorBoardLogger,
)
from shardckpt.nn_handler.handler import NNHandler

__all__ = [
    "AutoSaver",
    "CSVLogger",
    "Callback",
    "EarlyStopping",
    "LearningRateMonitor",
    "ModelCheckpoint",
    "NNHandler",
    "ProgressBar",
    "TensorBoardLogger",
]
