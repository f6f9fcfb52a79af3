"""Every system call of every operation failing, once and for ever, with every error: typed, the
previous checkpoint loads, no descriptor stays open, and the next save leaves nothing behind."""

from __future__ import annotations

import errno
import functools
import itertools
import warnings
from collections.abc import Callable

import torch

import shardckpt
from shardckpt import errors
from shardckpt.storage.local import LocalStorage
from tests.faults import crash, files, retention
from tests.faults.disk import Disk

CODES = [errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EINTR, errno.EMFILE, errno.EROFS]


def replacing(run: crash.Run) -> None:
    run.save()


def two_renames(run: crash.Run) -> None:
    run.disk.can_exchange = False
    run.save()


def fresh(run: crash.Run) -> None:
    shardckpt.save(run.next_state(), f"{crash.FOLDER}/new", storage=run.storage)


def in_background(run: crash.Run) -> None:
    run.async_save()


def with_a_base(run: crash.Run) -> None:
    run.based_save()


def resharding(run: crash.Run) -> None:
    run.reshard(2)


def loading(run: crash.Run) -> None:
    state = {"w": torch.zeros(300), "b": torch.zeros(3, dtype=torch.int64)}
    shardckpt.load(state, crash.PATH, storage=run.storage)
    assert torch.equal(state["w"], crash.state_of(run.version)["w"])


def verifying(run: crash.Run) -> None:
    with shardckpt.open_checkpoint(crash.PATH, storage=run.storage) as opened:
        opened.verify()


def loading_from_cache(run: crash.Run) -> None:
    run.disk.in_cache = True
    loading(run)


def verifying_from_cache(run: crash.Run) -> None:
    run.disk.in_cache = True
    verifying(run)


LOADS = (loading, loading_from_cache)
VERIFIES = (verifying, verifying_from_cache)


def outcome(operation: Callable[[crash.Run], None], at: int, code: int, *, for_ever: bool) -> bool:
    """An operation whose system call number `at` fails; whether it makes so many."""
    disk = Disk()
    run = crash.Run(disk)
    run.based_save()
    disk.settle()
    faulty = LocalStorage(disk)
    run.storage = faulty
    before, calls = run.version, disk.calls
    disk.fail_at, disk.fail_for_ever = (calls + at, code), for_ever
    acknowledged = False
    try:
        operation(run)
        acknowledged = True
    except errors.StorageError as error:
        assert error.errno == code
        assert error.path
        assert error.remedy
    except errors.CorruptionError:
        assert operation in VERIFIES  # what can't be read is damage to it
    reached = disk.calls >= calls + at
    assert not disk.descriptors, f"{len(disk.descriptors)} descriptors stay open"
    disk.fail_at = None
    writes = operation not in LOADS + VERIFIES
    least = run.version if acknowledged and writes and operation is not fresh else before
    assert least <= (crash.version_at(disk) or 0) <= run.version
    run.save()
    assert crash.version_at(disk) == run.version
    assert not [name for name in disk.listdir(crash.FOLDER) if name.startswith(".c.")]
    return reached


def retaining(at: int, code: int, *, for_ever: bool) -> bool:
    """See `outcome`: for a save of a CheckpointManager and the removal that follows."""
    job = retention.prepared_job()
    disk = job.disk
    calls = disk.calls
    disk.fail_at, disk.fail_for_ever = (calls + at, code), for_ever
    acknowledged = {1, 2, 3}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a warning names each file that can't be removed
        try:
            job.save()
            acknowledged.add(4)
        except errors.StorageError as error:
            assert error.errno == code
            assert error.path
            assert error.remedy
    reached = disk.calls >= calls + at
    assert not disk.descriptors, f"{len(disk.descriptors)} descriptors stay open"
    disk.fail_at = None
    found = set(retention.versions_at(disk))
    retention.assert_kept(found, acknowledged)
    job.start()
    job.save()
    retention.assert_swept(disk, {*found, job.version // retention.STEP})
    return reached


Outcome = Callable[..., bool]
"""(at, code, for_ever=) -> whether so many calls were made; AssertionError if all is not well."""

OPERATIONS: dict[str, Outcome] = {
    **{
        operation.__name__: functools.partial(outcome, operation)
        for operation in (
            *(replacing, two_renames, fresh, in_background, with_a_base, resharding),
            *LOADS,
            *VERIFIES,
        )
    },
    "retaining": retaining,
    **{kind: functools.partial(files.outcome, kind) for kind in files.KINDS},
    **{
        f"{kind}, two renames": functools.partial(files.outcome, kind, can_exchange=False)
        for kind in ("torch", "components")
    },
}


def every_call(name: str, code: int, *, for_ever: bool) -> int:
    """An operation, each of its calls failing in turn; how many calls it makes."""
    for at in itertools.count(1):
        if not OPERATIONS[name](at, code, for_ever=for_ever):
            return at - 1
    raise AssertionError("it makes calls without end")


GRID = list(itertools.product(OPERATIONS, CODES, (False, True)))


def trial(seed: int) -> int:
    """Every call of one operation, with one error: successive seeds try all of them."""
    name, code, for_ever = GRID[seed % len(GRID)]
    return every_call(name, code, for_ever=for_ever)
