"""Checks of correctness: a save contains all submitted work, and a load restores it."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import shardckpt
from shardckpt.io.buffers import page_locked

State = dict[str, torch.Tensor]


def run_checks(device: torch.device, folder: str) -> list[str]:
    """Run all checks, and print a line for each. Returns the names of those that failed."""
    failed = []
    for check in CHECKS:
        name = check.__name__.replace("_", " ")
        try:
            check(device, Path(folder) / check.__name__)
            print(f"ok      {name}", flush=True)
        except Exception:
            failed.append(name)
            print(f"FAILED  {name}\n{traceback.format_exc()}", flush=True)
    return failed


def equal(found: State, expected: State) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name].cpu(), tensor.cpu()), name


def samples(device: torch.device) -> State:
    """Tensors of many dtypes, sizes and layouts."""
    made = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8):
        for shape in ((3,), (5, 7), (1000, 1001), (0, 4), ()):
            values = torch.randint(0, 200, shape, device=device).to(dtype)
            made[f"{dtype}-{list(shape)}"] = values
    wide = torch.randn(6000, 1000, device=device)
    made["large"] = wide
    made["turned"] = wide[:1000].t()
    made["strided"] = wide[::3]
    made["complex"] = torch.view_as_complex(wide[:, :500].reshape(-1, 2)).conj()
    made.update({f"small-{n:04}": torch.full((n % 50 + 1,), n, device=device) for n in range(2000)})
    return made


def other_stream(device: torch.device) -> Any:
    return torch.Stream(device) if device.type != "cpu" else contextlib.nullcontext()


def busy(device: torch.device) -> None:
    """Submit work that takes a while."""
    if device.type != "cpu":
        matrix = torch.randn(4096, 4096, device=device)
        for _ in range(20):
            matrix = (matrix @ matrix).tanh()


def saved_and_loaded(device: torch.device, path: Path) -> None:
    state = samples(device)
    shardckpt.save(state, path)
    equal(shardckpt.load_state(path, device_map=device), state)
    target = {name: torch.zeros_like(tensor).resolve_conj() for name, tensor in state.items()}
    shardckpt.load(target, path)
    equal(target, state)
    equal(shardckpt.load_state(path), state)


def work_on_another_stream_is_saved(device: torch.device, path: Path) -> None:
    with other_stream(device):
        weight = torch.zeros(4 << 20, device=device)
        busy(device)
        weight += 5
        shardckpt.save({"w": weight}, path)
    equal(shardckpt.load_state(path), {"w": torch.full((4 << 20,), 5.0)})


def memory_that_was_just_freed_is_filled(device: torch.device, path: Path) -> None:
    state = {"w": torch.randn(8 << 20, device=device)}
    shardckpt.save(state, path)
    for _ in range(10):
        old = torch.zeros(8 << 20, device=device)
        busy(device)
        old += 1
        del old
        found = shardckpt.load_state(path, device_map=device)
        assert torch.equal(found["w"], state["w"])


def steps_follow_async_saves(device: torch.device, path: Path) -> None:
    model = torch.nn.Sequential(*(torch.nn.Linear(1024, 1024) for _ in range(4))).to(device)
    optimizer = torch.optim.AdamW(model.parameters())
    kept, handles = [], []
    for number in range(6):
        model(torch.randn(64, 1024, device=device)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        kept.append({name: p.detach().clone() for name, p in model.named_parameters()})
        handles.append(
            shardckpt.async_save({"m": model, "o": optimizer}, path.with_name(f"s-{number}"))
        )
    for number, (expected, handle) in enumerate(zip(kept, handles, strict=True)):
        handle.result(300)
        equal(shardckpt.load_state(path.with_name(f"s-{number}"), keys=["m"])["m"], expected)


def unchanged_tensors_are_linked(device: torch.device, path: Path) -> None:
    state = {"w": torch.randn(8 << 20, device=device)}
    first = path.with_name("first")
    shardckpt.save(state, first)
    report = shardckpt.save(state, path, base=first)
    assert sum(report.linked_by_rank) > state["w"].nbytes
    equal(shardckpt.load_state(path), state)


def tensors_are_cast_on_load(device: torch.device, path: Path) -> None:
    state = {"w": torch.randn(3000, 1001, device=device)}
    shardckpt.save(state, path)
    target = {"w": torch.zeros(3000, 1001, dtype=torch.bfloat16, device=device)}
    shardckpt.load(target, path, dtype="cast")
    equal(target, {"w": state["w"].to(torch.bfloat16)})


def tensors_in_page_locked_memory(device: torch.device, path: Path) -> None:
    held = torch.randn(4 << 20)
    if device.type != "cpu":
        held = held.pin_memory()
    shardckpt.save({"w": held}, path)
    expected = held.clone()
    held.zero_()
    shardckpt.load({"w": held}, path)
    assert torch.equal(held, expected)


def memory_is_page_locked(device: torch.device, path: Path) -> None:
    memory = page_locked(64 << 20)
    tensor = torch.frombuffer(memory.view, dtype=torch.uint8)
    if device.type != "cpu":
        assert tensor.is_pinned(), "the driver locked no memory; copies are slower"


CHECKS: list[Callable[[torch.device, Path], None]] = [
    saved_and_loaded,
    work_on_another_stream_is_saved,
    memory_that_was_just_freed_is_filled,
    steps_follow_async_saves,
    unchanged_tensors_are_linked,
    tensors_are_cast_on_load,
    tensors_in_page_locked_memory,
    memory_is_page_locked,
]
