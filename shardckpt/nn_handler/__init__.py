"""NNHandler: a model with its optimizer, loss and loaders, trained, saved and loaded as one."""

from shardckpt.nn_handler.auto_saver import AutoSaver
from shardckpt.nn_handler.callback import Callback
from shardckpt.nn_handler.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from shardckpt.nn_handler.handler import NNHandler
from shardckpt.nn_handler.loggers import CSVLogger, ExperimentLogger, LogFile, TensorBoardLogger
from shardckpt.nn_handler.progress import ProgressBar
from shardckpt.nn_handler.recording import install

install()

__all__ = [
    "AutoSaver",
    "CSVLogger",
    "Callback",
    "EarlyStopping",
    "ExperimentLogger",
    "LearningRateMonitor",
    "LogFile",
    "ModelCheckpoint",
    "NNHandler",
    "ProgressBar",
    "TensorBoardLogger",
]
