"""The table: seconds of shardckpt, of its peers and of the machine, in interleaved rounds."""

from __future__ import annotations

import gc
import importlib.util
import os
import shutil
import statistics
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp

import shardckpt
from shardckpt.io.buffers import page_locked

State = dict[str, torch.Tensor]
PIECE_BYTES = 8 << 20
COPY, DISK, OWN = "page-locked copy", "disk write", "shardckpt"
CASES = ("save, durable", "async_save, until staged", "load, warm")


@dataclass(slots=True)
class Results:
    """Seconds by case and contestant, and the reasons why a contestant has none."""

    seconds: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    failures: dict[tuple[str, str], str] = field(default_factory=dict)
    rounds: int = 0


def measure(
    device: torch.device, folder: str, *, size_bytes: int, rounds: int, until: float
) -> Results:
    """Measure all cases. The first round warms up and does not count if another one follows."""
    bench = Bench(device, Path(folder) / "bench", size_bytes)
    results, took = Results(), 0.0
    for number in range(rounds + 1):
        begun = time.monotonic()
        if number > 1 and begun + took > until:
            break
        if number == 1 and begun + took <= until:
            results = Results(failures=results.failures)
        for case, contestant, run in bench.runs():
            key = case, contestant
            if key in results.failures:
                continue
            try:
                results.seconds.setdefault(key, []).append(run())
            except Exception as error:
                results.failures[key] = f"{type(error).__name__}: {error}".splitlines()[0]
        results.rounds += 1
        took = time.monotonic() - begun
        print(f"round {number}: {took:.0f} s", flush=True)
    return results


class Bench:
    """The contestants on one state. Each run returns its seconds."""

    def __init__(self, device: torch.device, folder: Path, size_bytes: int) -> None:
        self.device, self.folder = device, folder
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        self.state = state_of(device, size_bytes)
        self.size_bytes = sum(tensor.nbytes for tensor in self.state.values())
        # One piece at a time through two buffers, so that the host needs no copy of the state.
        self.host = [page_locked(PIECE_BYTES) for _ in range(2)]

    def runs(self) -> list[tuple[str, str, Callable[[], float]]]:
        """List (case, contestant, run) in the order of a round. Loads follow the saves."""
        save, staged, load = CASES
        found = [
            (save, COPY, lambda: self.copy(to_host=True)),
            (save, DISK, self.write),
            (save, OWN, lambda: self.timed("own", self.own_save)),
            (save, "DCP", lambda: self.timed("dcp", self.dcp_save)),
            (save, "safetensors", lambda: self.timed("st", self.safetensors_save)),
            (staged, COPY, lambda: self.copy(to_host=True)),
            (staged, OWN, self.own_async),
            (staged, "DCP", self.dcp_async),
            (load, COPY, lambda: self.copy(to_host=False)),
            (load, OWN, lambda: self.loaded("own", self.own_load)),
            (load, "DCP", lambda: self.loaded("dcp", self.dcp_load)),
            (load, "safetensors", lambda: self.loaded("st", self.safetensors_load)),
        ]
        if importlib.util.find_spec("fastsafetensors"):
            run = lambda: self.loaded("st", self.fastsafetensors_load)  # noqa: E731
            found.append((load, "fastsafetensors", run))
        return found

    # ---- the machine

    def copy(self, *, to_host: bool) -> float:
        """Copy the state between the device and page-locked memory."""
        held = [torch.frombuffer(buffer.view, dtype=torch.uint8) for buffer in self.host]
        flat = [t.reshape(-1).view(torch.uint8) for t in self.state.values()]
        pieces = [piece for tensor in flat for piece in tensor.split(PIECE_BYTES)]
        self.settle()
        begun = time.perf_counter()
        for number, piece in enumerate(pieces):
            buffer = held[number % 2][: len(piece)]
            target, source = (buffer, piece) if to_host else (piece, buffer)
            if self.device.type == "cpu" or to_host:
                target.copy_(source, non_blocking=True)
            else:  # the state must keep its values
                self.scratch(len(piece)).copy_(buffer, non_blocking=True)
        self.settle()
        return time.perf_counter() - begun

    def scratch(self, size_bytes: int) -> torch.Tensor:
        return torch.empty(size_bytes, dtype=torch.uint8, device=self.device)

    def write(self) -> float:
        """Write as many bytes to one file past the page cache, and call fsync."""
        path = self.folder / "raw"
        view = self.host[0].view
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        try:
            file = os.open(path, flags | os.O_DIRECT)
        except OSError:  # such as tmpfs
            file = os.open(path, flags)
        begun = time.perf_counter()
        with ThreadPoolExecutor(4) as pool:
            ends = range(0, self.size_bytes, PIECE_BYTES)
            list(pool.map(lambda at: os.pwrite(file, view, at), ends))
        os.fsync(file)
        seconds = time.perf_counter() - begun
        os.close(file)
        path.unlink()
        return seconds

    # ---- saves

    def timed(self, name: str, save: Callable[[Path], object]) -> float:
        path = self.folder / name
        shutil.rmtree(path, ignore_errors=True)
        self.settle()
        begun = time.perf_counter()
        save(path)
        return time.perf_counter() - begun

    def own_save(self, path: Path) -> None:
        shardckpt.save(self.state, path)

    def dcp_save(self, path: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.save(dict(self.state), checkpoint_id=path)

    def safetensors_save(self, path: Path) -> None:
        path.mkdir()
        safetensors.torch.save_file(self.state, path / "model.safetensors")
        file = os.open(path / "model.safetensors", os.O_RDONLY)
        os.fsync(file)
        os.close(file)

    def own_async(self) -> float:
        path = self.folder / "own-async"
        shutil.rmtree(path, ignore_errors=True)
        self.settle()
        begun = time.perf_counter()
        handle = shardckpt.async_save(self.state, path)
        handle.wait_staged()
        seconds = time.perf_counter() - begun
        handle.result()
        shutil.rmtree(path)
        return seconds

    def dcp_async(self) -> float:
        path = self.folder / "dcp-async"
        shutil.rmtree(path, ignore_errors=True)
        self.settle()
        begun = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            future = dcp.async_save(dict(self.state), checkpoint_id=path)
        seconds = time.perf_counter() - begun
        future.result()
        shutil.rmtree(path)
        return seconds

    # ---- loads

    def loaded(self, name: str, load: Callable[[Path], State | None]) -> float:
        path = self.folder / name
        for file in path.rglob("*"):
            if file.is_file():
                read_through(file)
        self.settle()
        begun = time.perf_counter()
        load(path)
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return time.perf_counter() - begun

    def own_load(self, path: Path) -> None:
        shardckpt.load(self.state, path)

    def dcp_load(self, path: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.load(dict(self.state), checkpoint_id=path)

    def safetensors_load(self, path: Path) -> State:
        return safetensors.torch.load_file(path / "model.safetensors", device=str(self.device))

    def fastsafetensors_load(self, path: Path) -> State:
        from fastsafetensors import SafeTensorsFileLoader, SingleGroup

        loader = SafeTensorsFileLoader(SingleGroup(), device=str(self.device), nogds=True)
        loader.add_filenames({0: [str(path / "model.safetensors")]})
        files = loader.copy_files_to_device()
        try:
            return {name: files.get_tensor(name) for name in self.state}
        finally:
            files.close()
            loader.close()

    def settle(self) -> None:
        """Wait for the device, and collect garbage."""
        gc.collect()
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)


def state_of(device: torch.device, size_bytes: int) -> State:
    """Layers of a large and two small bfloat16 tensors."""
    large = min(64 << 20, size_bytes // 2) // 2048 * 2048
    state = {}
    for number in range(max(1, round(size_bytes / large))):
        values = torch.randint(0, 1 << 15, (large // 2,), dtype=torch.int16, device=device)
        state[f"layers.{number}.weight"] = values.view(torch.bfloat16).view(-1, 1024)
        for name in ("bias", "norm"):
            state[f"layers.{number}.{name}"] = torch.ones(4096, dtype=torch.bfloat16, device=device)
    return state


def read_through(file: Path) -> None:
    """Read a file, so that it is in the page cache."""
    with open(file, "rb", buffering=0) as data:
        buffer = bytearray(PIECE_BYTES)
        while data.readinto(buffer):
            pass


def table(results: Results, device: torch.device, *, size_gb: float) -> str:
    """Return the table in Markdown, and a line for each goal."""
    medians = {key: statistics.median(values) for key, values in results.seconds.items()}
    names = list(dict.fromkeys(name for _, name in medians))
    lines = [
        f"{size_gb:g} GB on {device}, torch {torch.__version__}, "
        f"medians of {results.rounds} rounds",
        "",
        f"| seconds | {' | '.join(names)} |",
        "|---|" + "---|" * len(names),
    ]
    for case in CASES:
        cells = [f"{medians[case, n]:.3g}" if (case, n) in medians else "" for n in names]
        lines.append(f"| {case} | {' | '.join(cells)} |")
    lines.append("")
    save, staged, load = CASES
    slower = max((medians[save, name] for name in (COPY, DISK)), default=0.0)
    for case, against, factor in (
        (save, slower, 1.15),
        (staged, medians[staged, COPY], 1.15),
        (load, medians[load, COPY], 1.3),
    ):
        if (case, OWN) in medians:
            lines.append(
                f"{case}: {medians[case, OWN] / against:.2f} of the machine (goal {factor})"
            )
        if (case, OWN) in medians and (case, "DCP") in medians:
            times = medians[case, "DCP"] / medians[case, OWN]
            lines.append(f"{case}: {times:.2f} times as fast as DCP (goal 2)")
    lines += [f"{case}, {name}: {why}" for (case, name), why in results.failures.items()]
    return "\n".join(lines)
