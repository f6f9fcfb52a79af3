"""Imported once by the server that rank processes are forked from."""

import torch.distributed.checkpoint.state_dict
import torch.distributed.fsdp
import torch.distributed.tensor  # noqa: F401

import shardckpt.api  # noqa: F401
