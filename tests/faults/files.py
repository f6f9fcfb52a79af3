"""Single files, component files and what convert writes, under the harnesses of sharded
checkpoints: every crash state, every failing call, every flipped bit."""

from __future__ import annotations

import contextlib
import functools
import os
import random
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import torch

from shardckpt.convert.convert import Format, convert_source
from shardckpt.convert.opening import open_source
from shardckpt.convert.single_files import write_many, write_one
from shardckpt.convert.sources import foreign, state_in_memory
from shardckpt.errors import CheckpointError, CheckpointNotFoundError, StorageError
from shardckpt.storage.atomic_write import sweep_writes
from shardckpt.storage.local import LocalStorage
from shardckpt.storage.posix import System
from shardckpt.storage.resolve import Location
from tests.faults import crash
from tests.faults.crash_states import Content
from tests.faults.disk import Disk, Mark, ProcessDied

FOLDER = crash.FOLDER
FLIPS_A_TRIAL = 2000


def _one(state: dict[str, Any], path: str, system: System) -> None:
    write_one(state, path, overwrite=True, system=system)


def _many(file_format: Any, state: dict[str, Any], path: str, system: System) -> None:
    write_many(state, path, file_format, overwrite=True, system=system)


def _converted(to: Format, state: dict[str, Any], path: str, system: System) -> None:
    if to == "hf":
        state = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    source = foreign("a state", "memory", state)
    shards, file_bytes = 2 if to == "dcp" else None, 400 if to == "hf" else None
    convert_source(
        source,
        Location(LocalStorage(system), path),
        to=to,
        shards=shards,
        file_bytes=file_bytes,
        overwrite=True,
    )


Write = Callable[[dict[str, Any], str, System], None]
KINDS: dict[str, tuple[str, Write]] = {
    "torch": ("c.pth", _one),
    "safetensors": ("c.safetensors", _one),
    "components": ("c", functools.partial(_many, "torch")),
    "safetensors components": ("c", functools.partial(_many, "safetensors")),
    "to torch": ("c.pt", functools.partial(_converted, "torch")),
    "to safetensors": ("c.safetensors", functools.partial(_converted, "safetensors")),
    "to dcp": ("c", functools.partial(_converted, "dcp")),
    "to hf": ("c", functools.partial(_converted, "hf")),
}
"""kind -> (name of the target, how a state is written there)."""
FILES = [kind for kind, (name, _) in KINDS.items() if "." in name]


def read(path: str) -> dict[str, Any]:
    """Load the checkpoint of any kind at a path. Raises CheckpointError."""
    with open_source(path) as source:
        found = state_in_memory(source, source.manifest.state)
    assert isinstance(found, dict)
    return found


def version_of(found: dict[str, Any]) -> int:
    """The version that was read; AssertionError for a mixture."""
    version = int(found["b"][0])
    expected = crash.state_of(version, elements=len(found["w"]))
    assert torch.equal(found["w"], expected["w"]), f"version {version} with other tensors"
    assert torch.equal(found["b"], expected["b"]), f"version {version} with other tensors"
    assert found.get("step", version) == version, f"version {version} with another step"
    return version


def version_at(disk: Disk, kind: str) -> int:
    """The version on a simulated disk, 0 if there is none."""
    name = KINDS[kind][0]
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.suppress(FileNotFoundError):
            _copy(disk, disk._inode(f"{FOLDER}/{name}"), f"{folder}/{name}")
        try:
            return version_of(read(f"{folder}/{name}"))
        except CheckpointNotFoundError:
            return 0


def _copy(disk: Disk, inode: int, path: str) -> None:
    if inode in disk.content.directories:
        os.mkdir(path)
        for name, below in disk.content.directories[inode].items():
            _copy(disk, below, f"{path}/{name}")
        return
    with open(path, "wb") as file:
        file.write(disk.content.files[inode])


def leftovers(disk: Disk) -> list[str]:
    return [name for name in disk.listdir(FOLDER) if name.startswith(".")]


class Run:
    """A history of one kind under way; see crash.Run."""

    def __init__(self, disk: Disk, kind: str, *, elements: int = 300) -> None:
        self.disk, self.kind, self.elements = disk, kind, elements
        self.version = 0

    def save(self) -> None:
        name, write = KINDS[self.kind]
        self.version += 1
        self.disk.mark("begun", self.version)
        state = crash.state_of(self.version, elements=self.elements)
        write(state, f"{FOLDER}/{name}", self.disk)
        self.disk.mark("acknowledged", self.version)

    def killed(self, at: int) -> bool:
        """A save whose process dies at its system call number `at`; whether it died."""
        self.disk.die_at = self.disk.calls + at
        try:
            self.save()
            return False
        except ProcessDied:
            return True
        finally:
            self.disk.restart()

    def failed(self, at: int, code: int) -> None:
        """A save one of whose system calls fails."""
        self.disk.fail_at = (self.disk.calls + at, code)
        with contextlib.suppress(StorageError):
            self.save()
        self.disk.restart()


def check_state(
    kind: str, marks: list[Mark], content: Content, *, again: bool, can_exchange: bool
) -> None:
    """The oracle for crash.check."""
    begun = max((mark.version for mark in marks if mark.kind == "begun"), default=0)
    acknowledged = max((mark.version for mark in marks if mark.kind == "acknowledged"), default=0)
    disk = Disk(content, can_exchange=can_exchange)
    if not can_exchange and kind not in FILES:
        sweep_writes(disk, FOLDER)  # as the next write does: puts a replaced folder back
    found = version_at(disk, kind)
    assert acknowledged <= found <= begun, f"version {found} loaded"
    if again:
        run = Run(disk, kind)
        run.version = begun
        run.save()
        assert version_at(disk, kind) == begun + 1, "the next save does not load"
        assert not leftovers(disk), f"leftovers: {leftovers(disk)}"


def replaced(kind: str, *, can_exchange: bool = True, disk: type[Disk] = Disk) -> Disk:
    """The disk after a save, all of which has reached it, and one that replaces it."""
    made = disk(can_exchange=can_exchange)
    run = Run(made, kind)
    run.save()
    made.settle()
    run.save()
    return made


def random_history(rng: random.Random) -> tuple[str, Disk]:
    """A kind, and the disk after some random saves of it, deaths and failures among them."""
    kind = rng.choice(list(KINDS))
    made = Disk(can_exchange=rng.random() < 0.6)
    run = Run(made, kind, elements=rng.choice([1, 300, 5000]))
    if rng.random() < 0.8:
        run.save()
        made.settle()
    for _ in range(rng.randint(1, 3)):
        at, code = rng.randint(1, 45), rng.choice([5, 28])
        rng.choice(
            [run.save, lambda at=at: run.killed(at), lambda a=at, c=code: run.failed(a, c)]
        )()
    run.save()
    return kind, made


def crash_trial(seed: int) -> int:
    """The crash states of a random history; how many."""
    rng = random.Random(seed)
    kind, disk = random_history(rng)
    oracle = functools.partial(check_state, kind)
    tried = crash.check(disk, per_prefix=8, rng=rng, oracle=oracle)
    assert not tried.failures, "\n".join([kind, *tried.failures[:5]])
    return tried.states


def outcome(kind: str, at: int, code: int, *, for_ever: bool, can_exchange: bool = True) -> bool:
    """See errnos.outcome."""
    disk = Disk(can_exchange=can_exchange)
    run = Run(disk, kind)
    run.save()
    calls = disk.calls
    disk.fail_at, disk.fail_for_ever = (calls + at, code), for_ever
    acknowledged = 1
    try:
        run.save()
        acknowledged = 2
    except StorageError as error:
        assert error.errno == code, error
        assert error.path
        assert error.remedy
    reached = disk.calls >= calls + at
    assert not disk.descriptors, f"{len(disk.descriptors)} descriptors stay open"
    assert not disk.locked
    disk.fail_at = None
    if kind not in FILES and not can_exchange:
        sweep_writes(disk, FOLDER)
    assert acknowledged <= version_at(disk, kind) <= 2
    run.save()
    assert version_at(disk, kind) == 3
    assert not leftovers(disk), leftovers(disk)
    return reached


SEALED = ("safetensors", "safetensors components", "torch", "components")
"""The kinds in which damage is found."""


def a_file(kind: str) -> Iterator[tuple[str, bytes]]:
    """The files of a checkpoint of a kind, by their paths below a folder."""
    disk = Disk()
    Run(disk, kind).save()
    inode = disk._inode(f"{FOLDER}/{KINDS[kind][0]}")
    names = disk.content.directories.get(inode)
    if names is None:
        yield KINDS[kind][0], disk.content.files[inode]
        return
    for name, below in names.items():
        yield f"{KINDS[kind][0]}/{name}", disk.content.files[below]


def all_bits(kind: str) -> list[tuple[str, int, int]]:
    """Every bit of every file."""
    return [
        (n, byte, bit) for n, data in a_file(kind) for byte in range(len(data)) for bit in range(8)
    ]


def try_flips(kind: str, bits: list[tuple[str, int, int]]) -> int:
    """Flip each of these bits and read. The result is the written state or a CheckpointError."""
    files = dict(a_file(kind))
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/{KINDS[kind][0]}"
        os.makedirs(os.path.dirname(f"{folder}/{next(iter(files))}"), exist_ok=True)
        for name, data in files.items():
            with open(f"{folder}/{name}", "wb") as file:
                file.write(data)
        for name, byte, bit in bits:
            with open(f"{folder}/{name}", "r+b") as file:
                for mask in (1 << bit, 0):
                    file.seek(byte)
                    file.write(bytes([files[name][byte] ^ mask]))
                    file.flush()
                    if mask:
                        _assert_same_or_refused(path, f"bit {bit} of byte {byte} of {name}")
    return len(bits)


def _assert_same_or_refused(path: str, what: str) -> None:
    try:
        found = read(path)
    except CheckpointError:
        return
    assert set(found) == {"w", "b", "step"}, f"{what}: other names {list(found)}"
    assert version_of(found) == 1, f"{what}: other values"


def damage_trial(seed: int) -> int:
    """A slice of all bits: successive seeds try every one of them."""
    bits = [(kind, bit) for kind in SEALED for bit in all_bits(kind)]
    slices = -(-len(bits) // FLIPS_A_TRIAL)
    part = bits[seed % slices :: slices]
    return sum(try_flips(kind, [bit for k, bit in part if k == kind]) for kind in SEALED)
