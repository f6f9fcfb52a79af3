"""NNHandler: a model with its optimizer, loss and loaders, trained, saved and loaded as one."""

from shardckpt.nn_handler.auto_saver import AutoSaver
from shardckpt.nn_handler.callback import Callback
from shardckpt.nn_handler.callbacks import (
    CSVLogger,
    EarlyStopping,
    LearningRateMonitor,
    ModelCheckpoint,
    ProgressBar,
    TensorBoardLogger,
)
from shardckpt.nn_handler.handler import NNHandler
from shardckpt.nn_handler.recording import install

install()

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
