"""The saved states: a decoder's weights with AdamW's moments, sharded, replicated or full."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_leaves, tree_map

_LAYERS = 6


class Block(nn.Module):
    """A decoder layer with a gated feed-forward network."""

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = 11 * width // 4
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down = nn.Linear(inner, width, bias=False)
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, time, width) to the same."""
        h = self.norms[0](x)
        h = nn.functional.scaled_dot_product_attention(
            self.q(h), self.k(h), self.v(h), is_causal=True
        )
        x = x + self.o(h)
        h = self.norms[1](x)
        return x + self.down(nn.functional.silu(self.gate(h)) * self.up(h))


class Decoder(nn.Module):
    """A decoder whose float32 weights, with AdamW's two moments, take about `size_bytes`."""

    def __init__(self, size_bytes: float) -> None:
        super().__init__()
        per_square = _LAYERS * (4 + 3 * 11 / 4) + 2 * 8
        width = max(16, 16 * round(math.sqrt(size_bytes / 12 / per_square) / 16))
        self.vocabulary = 8 * width
        self.embedding = nn.Embedding(self.vocabulary, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(_LAYERS))
        self.head = nn.Linear(width, self.vocabulary, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(batch, time) of tokens to logits."""
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def trained(size_bytes: float, *, sharded: bool) -> tuple[Decoder, torch.optim.Optimizer]:
    """A model and its AdamW after a step; under FSDP2 over all ranks, or the same on each."""
    with torch.device("meta"):
        model = Decoder(size_bytes)
    if sharded:
        for layer in model.layers:
            fully_shard(layer)
        fully_shard(model)
    return model, _first_step(model, seed=torch.distributed.get_rank() if sharded else 0)


def with_frozen_base(size_bytes: float) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model under FSDP2 of whose state 90% is frozen weights, and AdamW over the rest."""
    sizes = {"base": 0.9 * size_bytes / 4, "adapter": 0.1 * size_bytes / 12}
    with torch.device("meta"):
        layers = {name: _linears(round(size / 8192)) for name, size in sizes.items()}
    layers["base"].requires_grad_(False)
    for part in layers.values():
        fully_shard(part)
    model = nn.ModuleDict(layers)
    return model, _first_step(model, seed=torch.distributed.get_rank())


def _linears(rows: int) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(1024, max(4, rows), bias=False) for _ in range(8)))


def _first_step(model: nn.Module, *, seed: int) -> torch.optim.Optimizer:
    model.to_empty(device="cpu")
    torch.manual_seed(seed)
    for parameter in model.parameters():
        local(parameter.data).normal_(std=0.02)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    step(optimizer)
    return optimizer


def step(optimizer: torch.optim.Optimizer) -> None:
    """Change all that is trained."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = parameter.data * 0.1
    optimizer.step()
    optimizer.zero_grad()


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The state as DCP and shardckpt name it; made once, outside what is measured."""
    weights, moments = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": moments}


def whole_state(size_bytes: float) -> dict[str, Any]:
    """The state in one process, without a process group."""
    return state_of(*trained(size_bytes, sharded=False))


def small_tensors(count: int, *, seed: int = 0) -> dict[str, Any]:
    """Many tensors of 256 floats."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, 256, generator=generator)
    return {"small": {f"tensor.{index:05}": rows[index].clone() for index in range(count)}}


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that this rank holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_tensors(state: Any) -> Iterator[torch.Tensor]:
    """The part of each tensor of a state that this rank holds."""
    return (local(leaf).detach() for leaf in _tensors(state))


def local_state(state: Any) -> Any:
    """The state with each DTensor replaced by what this rank holds of it."""
    return tree_map(lambda leaf: local(leaf) if isinstance(leaf, torch.Tensor) else leaf, state)


def local_bytes(state: Any) -> int:
    """Bytes of what this rank holds."""
    return sum(tensor.nbytes for tensor in local_tensors(state))


def flat_tensors(state: Any, prefix: str = "") -> dict[str, torch.Tensor]:
    """All tensors of nested dicts, by dotted name."""
    flat: dict[str, torch.Tensor] = {}
    for key, value in state.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            flat |= flat_tensors(value, f"{name}.")
        elif isinstance(value, torch.Tensor):
            flat[name] = value
    return flat


def whole_of(state: Any) -> Any:
    """The state with every DTensor gathered, on every rank."""
    return tree_map(lambda leaf: leaf.full_tensor() if isinstance(leaf, DTensor) else leaf, state)


def fill_from(state: Any, whole: Any) -> None:
    """Give a sharded state, in place, the values of a whole one."""
    for own, full in zip(_tensors(state), _tensors(whole), strict=True):
        if isinstance(own, DTensor):
            full = distribute_tensor(full, own.device_mesh, own.placements, src_data_rank=None)
        local(own).detach().copy_(local(full))


def _tensors(state: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(state) if isinstance(leaf, torch.Tensor)]


class Check:
    """Remembers a state's values; `wipe` destroys them, `verify` says whether they are back."""

    def __init__(self, state: Any) -> None:
        self._kept = [tensor.clone() for tensor in local_tensors(state)]

    @staticmethod
    def wipe(state: Any) -> None:
        """Overwrite every tensor in place."""
        for tensor in local_tensors(state):
            tensor.fill_(-1)

    def verify(self, state: Any) -> None:
        """Raise AssertionError unless every bit is as it was."""
        found = list(local_tensors(state))
        assert len(found) == len(self._kept), f"{len(self._kept)} tensors, found {len(found)}"
        for index, (own, kept) in enumerate(zip(found, self._kept, strict=True)):
            assert torch.equal(own, kept), f"tensor {index} has other values than were saved"
