"""An object store that fails: each request of saves, removals and loads refuses, answers late, is
repeated, is cut, or is the last of its process.

After each trial an oracle looks at the store: a checkpoint that was acknowledged is there, bit for
bit, or the one that replaced it; none is there in part; every error is typed; and the next save
works and leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch

import shardckpt
from shardckpt.errors import (
    CheckpointNotFoundError,
    NotACheckpointError,
    ShardckptError,
    StoreUnavailableError,
)
from shardckpt.storage import object_store
from shardckpt.storage.copying import copy_part
from shardckpt.storage.memory import MemoryObjects, MemoryStorage
from shardckpt.storage.object_store import ObjectStorage
from shardckpt.storage.objects import ConditionFailedError, ObjectInfo, Objects, Upload

URL = "store://bucket/run"
PATH = f"{URL}/step-1"
KINDS = (
    "refused",  # 503 or SlowDown: nothing is done
    "late",  # it is done, and the answer is lost
    "late commits",  # the same with a commit, whose further attempts are refused
    "repeated",  # it is done twice
    "conflict",  # 412 or 409, with or without a reason
    "cut",  # the body of the answer ends too early
    "stale",  # a list or a get from before the last change
    "killed",  # the process dies before it
    "killed late",  # the process dies when it is done
)


class ProcessDied(BaseException):
    """The process is killed."""


class FaultyObjects(Objects):
    """The objects of a store, of which the request number `at` fails, or all from there on.

    With `dice` each request fails with the probability `rate`, each in a way of its own.
    """

    in_memory = True

    def __init__(self, objects: MemoryObjects) -> None:
        self.url = objects.url
        self.objects = objects
        self.kind, self.at, self.for_ever = "", -1, False
        self.dice: random.Random | None = None
        self.rate = 0.0
        self.requests = 0
        self.faults = 0
        self.seen: Counter[str] = Counter()  # the faults by kind
        self.hook: Callable[[], None] | None = None
        self.before: dict[str, tuple[bytes, ObjectInfo]] = {}
        """The content of the store before its last change."""

    def restart(self) -> None:
        """Begin to count anew; no request fails."""
        self.kind, self.at, self.for_ever, self.requests, self.hook = "", -1, False, 0, None
        self.dice = None

    def _fails(self, conditional: bool) -> bool:
        number, self.requests = self.requests, self.requests + 1
        if self.dice is not None:
            fails = self.dice.random() < self.rate
            if fails:
                self.kind = self.dice.choice([kind for kind in KINDS if kind != "late commits"])
                self.seen[self.kind] += 1
            self.faults += fails
            return fails
        fails = number == self.at or (self.for_ever and number > self.at >= 0)
        if self.kind == "late commits":
            fails = conditional and number >= self.at >= 0
        self.faults += fails
        if fails and self.hook is not None:
            hook, self.hook = self.hook, None
            hook()
        return fails and bool(self.kind)

    def ask(self, call: Callable[[], Any], *, changes: bool, conditional: bool = False) -> Any:
        """Make a request, or let it fail."""
        before = dict(self.objects._objects)
        if not self._fails(conditional):
            found = call()
            if changes:
                self.before = before
            return found
        if self.kind == "killed":
            raise ProcessDied
        again = self.kind == "late commits" and self.faults > 1
        if again or self.kind == "refused" or (self.kind == "conflict" and not conditional):
            raise StoreUnavailableError("503")
        if self.kind == "conflict":
            raise ConditionFailedError
        if self.kind == "stale" and not changes:
            now = self.objects._objects
            try:
                self.objects._objects = self.before
                return call()
            finally:
                self.objects._objects = now
        found = call()
        if changes:
            self.before = before
        if self.kind == "killed late":
            raise ProcessDied
        if self.kind.startswith("late"):
            raise StoreUnavailableError("no answer")
        if self.kind == "repeated":
            return call()  # the second one of two conditional requests is refused
        if self.kind == "cut" and isinstance(found, (bytes, memoryview)):
            return found[: len(found) // 2]
        return found

    def put_if(self, key: str, data: bytes, *, replaces: str | None) -> str:
        return str(
            self.ask(
                lambda: self.objects.put_if(key, data, replaces=replaces),
                changes=True,
                conditional=True,
            )
        )

    def upload(self, key: str, *, size_bytes: int) -> Upload:
        return _FaultyUpload(self, key)

    def get(self, key: str) -> tuple[bytes, str]:
        version = ""

        def get() -> bytes:
            nonlocal version
            data, version = self.objects.get(key)
            return data

        # A client sees a body that was cut, since the answer has its length.
        data = self.ask(get, changes=False)
        if self.kind == "cut" and version and len(data) < len(self.objects.get(key)[0]):
            raise StoreUnavailableError("the body was cut")
        return data, version

    def read(self, key: str, *, offset: int, size_bytes: int) -> memoryview:
        found: memoryview = self.ask(
            lambda: self.objects.read(key, offset=offset, size_bytes=size_bytes), changes=False
        )
        return found

    def head(self, key: str) -> ObjectInfo | None:
        found: ObjectInfo | None = self.ask(lambda: self.objects.head(key), changes=False)
        return found

    def list(self, prefix: str) -> Iterable[ObjectInfo]:
        found: list[ObjectInfo] = self.ask(lambda: list(self.objects.list(prefix)), changes=False)
        return found

    def folders(self, prefix: str) -> Sequence[str]:
        found: Sequence[str] = self.ask(lambda: self.objects.folders(prefix), changes=False)
        return found

    def delete(self, keys: Sequence[str]) -> None:
        # A store deletes many objects in any order, and may stop in between.
        for key in keys:
            self.ask(lambda key=key: self.objects.delete([key]), changes=True)  # type: ignore[misc]

    def copy(self, source: str, target: str) -> None:
        self.ask(lambda: self.objects.copy(source, target), changes=True)


class _FaultyUpload(Upload):
    """A torn upload leaves no object: parts are invisible until the last request."""

    def __init__(self, faulty: FaultyObjects, key: str) -> None:
        self.faulty, self.key = faulty, key
        self.parts: dict[int, bytes] = {}

    def write(self, data: memoryview) -> None:
        number = len(self.parts)  # a part that is sent twice has the same number
        self.faulty.ask(lambda: self.parts.update({number: bytes(data)}), changes=False)

    def finish(self) -> None:
        content = b"".join(self.parts.values())
        self.faulty.ask(lambda: self.faulty.objects.put(self.key, content), changes=True)

    def cancel(self) -> None:
        self.parts.clear()


def state_of(version: int) -> dict[str, Any]:
    return {
        "w": torch.full((50,), float(version)),
        "frozen": torch.arange(70.0),
        "version": version,
    }


def is_state(state: Any) -> bool:
    expected = state_of(state["version"])
    return all(torch.equal(state[name], expected[name]) for name in ("w", "frozen"))


class Trial:
    """A store with an acknowledged checkpoint, version 1, at PATH."""

    def __init__(self) -> None:
        self.faulty = FaultyObjects(MemoryObjects("store://bucket"))
        self.storage = ObjectStorage(lambda url: self.faulty)
        self.save(1)

    def save(self, version: int, path: str = PATH, **options: Any) -> None:
        shardckpt.save(state_of(version), path, storage=self.storage, overwrite=True, **options)

    def found(self, path: str = PATH) -> int | None:
        """The version at a path; None if there is none. Raises for a checkpoint in part."""
        self.faulty.restart()
        try:
            state = shardckpt.load_state(path, storage=self.storage)
        except (CheckpointNotFoundError, NotACheckpointError):
            return None
        assert is_state(state), f"the bytes of other versions at {path}"
        return int(state["version"])

    def check_clean(self) -> None:
        """Check that leftovers of dead saves are collected by age, and nothing else."""
        self.faulty.restart()
        before = {path: self.found(path) for path in (PATH, f"{URL}/step-2", f"{URL}/step-3")}
        objects = self.faulty.objects._objects
        for key, (data, found) in list(objects.items()):
            objects[key] = data, found._replace(modified_s=0.0)
        self.storage.sweep(URL)
        assert before == {path: self.found(path) for path in before}
        alive = sum(version is not None for version in before.values())
        assert len(self.faulty.objects._objects) == 2 * alive, sorted(self.faulty.objects._objects)


def replaces(trial: Trial) -> tuple[str, set[int | None], int | None]:
    """Returns the path, the versions that an error may leave, and that of a success."""
    trial.save(2)
    return PATH, {1, 2}, 2


def with_base(trial: Trial) -> tuple[str, set[int | None], int | None]:
    trial.save(2, f"{URL}/step-2", base=PATH)
    return f"{URL}/step-2", {None, 2}, 2


def removes(trial: Trial) -> tuple[str, set[int | None], int | None]:
    trial.storage.remove(PATH)
    return PATH, {1, None}, None


def loads(trial: Trial) -> tuple[str, set[int | None], int | None]:
    assert is_state(shardckpt.load_state(PATH, storage=trial.storage))
    return PATH, {1}, 1


def copies(trial: Trial) -> tuple[str, set[int | None], int | None]:
    """As the thread of a tiered storage does, which comes again after an error."""
    source = MemoryStorage()
    shardckpt.save(state_of(2), PATH.replace("store", "memory"), storage=source)
    with contextlib.closing(source.open(PATH.replace("store", "memory"))) as files:
        copy_part(files, trial.storage, PATH)
    return PATH, {1, 2}, 2


def prunes(trial: Trial) -> tuple[str, set[int | None], int | None]:
    """The oldest goes, once the newest is there."""
    keep = [shardckpt.KeepLast(1)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a removal that fails is tried again later
        manager = shardckpt.CheckpointManager(URL, keep=keep, storage=trial.storage, label="job")
        for step in (2, 3):
            manager.save(step, state_of(step))
    return f"{URL}/step-3", {None, 3}, 3


OPERATIONS = {f.__name__: f for f in (replaces, with_base, removes, loads, copies, prunes)}
_OUTCOMES = {
    "replaces": (PATH, {1, 2}),
    "with_base": (f"{URL}/step-2", {None, 2}),
    "removes": (PATH, {1, None}),
    "loads": (PATH, {1}),
    "copies": (PATH, {1, 2}),
    "prunes": (f"{URL}/step-3", {None, 3}),
}


@contextlib.contextmanager
def hurried() -> Iterator[None]:
    """Waits between attempts that a test can afford."""
    with (
        mock.patch.object(object_store, "_FIRST_WAIT_S", 0.001),
        mock.patch.object(object_store, "_LONGEST_WAIT_S", 0.02),
        shardckpt.options(store_deadline_s=0.1, shared_deadline_s=0.1),
    ):
        yield


def fail(operation: str, kind: str, at: int, *, for_ever: bool) -> bool:
    """One trial: the request number `at` of an operation fails; whether it made so many."""
    trial = Trial()
    faulty = trial.faulty
    faulty.restart()
    faulty.kind, faulty.at, faulty.for_ever, faulty.faults = kind, at, for_ever, 0
    what = f"{operation}, request {at} {kind}{' for ever' if for_ever else ''}"
    attempt(trial, operation, what)
    return faulty.faults > 0


def attempt(trial: Trial, operation: str, what: str) -> None:
    """Try an operation on a store that fails, and look at the store afterwards."""
    path, outcomes = _OUTCOMES[operation]
    acknowledged = False
    try:
        OPERATIONS[operation](trial)
        acknowledged = True
    except (ShardckptError, ProcessDied):
        pass
    found = trial.found(path)
    assert found in outcomes, f"{what}: {found} at {path}"
    if acknowledged:
        success = {"removes": None, "loads": 1, "prunes": 3}.get(operation, 2)
        assert found == success, f"{what}: {found} at {path} after success"
    if operation in ("with_base", "loads"):
        assert trial.found() == 1, f"{what}: the base is lost"
    trial.save(9)
    assert trial.found() == 9, what
    trial.check_clean()


def at_random(seed: int, faults: int) -> Counter[str]:
    """Operations whose requests fail at random, several of them in one operation; the faults by
    kind, at least so many in all."""
    dice, seen = random.Random(seed), Counter[str]()
    with hurried():
        while seen.total() < faults:
            trial = Trial()
            trial.faulty.restart()
            trial.faulty.dice, trial.faulty.rate = dice, dice.choice([0.03, 0.1, 0.3, 0.7])
            operation = dice.choice(sorted(OPERATIONS))
            attempt(trial, operation, f"{operation} after {seen.total()} faults of seed {seed}")
            seen += trial.faulty.seen
    return seen


def race(operation: str, at: int, *, remove: bool) -> bool:
    """Another process saves to the same path, or removes it, at a request of an operation."""
    trial = Trial()
    other = ObjectStorage(lambda url: trial.faulty.objects)

    def rival() -> None:
        if remove:
            other.remove(PATH)
        else:
            shardckpt.save(state_of(7), PATH, storage=other, overwrite=True)

    faulty = trial.faulty
    faulty.restart()
    faulty.at, faulty.hook, faulty.faults = at, rival, 0
    try:
        OPERATIONS[operation](trial)
        done = True
    except ShardckptError:
        done = False
    failed = faulty.faults > 0
    found = trial.found()
    what = f"{operation}, a rival {'removes' if remove else 'saves'} at request {at}: {found}"
    if not failed:
        return False
    if remove:
        assert found in ({None, 2} if operation == "replaces" else {None}), what
        assert done or operation != "removes", what
    elif operation == "removes":
        assert found in (7, None), what  # removed before or after the rival
        assert found == 7 or done, what
    else:
        # `begin` reads the manifest with its second request.
        assert found == (2 if operation == "replaces" and at <= 1 else 7), what
    trial.save(9)
    trial.check_clean()
    return True


def every_fault(kinds: Sequence[str] = KINDS, *, step: int = 1, begin: int = 0) -> int:
    """Each kind at each request of each operation, once and for ever; how many faults."""
    tried = 0
    with hurried():
        for operation, kind, for_ever in itertools.product(OPERATIONS, kinds, (False, True)):
            if for_ever and kind.startswith(("killed", "late commits")):
                continue
            for at in itertools.count(begin, step):
                if not fail(operation, kind, at, for_ever=for_ever):
                    break
                tried += 1
    return tried


def every_race(*, step: int = 1, begin: int = 0) -> int:
    """A rival at each request of each operation that changes the path; how many races."""
    tried = 0
    with hurried():
        for operation, remove in itertools.product(("replaces", "removes", "loads"), (False, True)):
            for at in itertools.count(begin, step):
                if not race(operation, at, remove=remove):
                    break
                tried += 1
    return tried


def trial(seed: int) -> int:
    """For tests.faults.torture: a part of all faults and races."""
    step = 5
    begin = random.Random(seed).randrange(step) if seed else 0
    planned = every_fault(step=step, begin=begin) + every_race(step=step, begin=begin)
    return planned + at_random(seed, 200).total()
