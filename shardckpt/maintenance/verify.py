"""Check every block of every shard, and that shards and manifest tell the same."""

from __future__ import annotations

import errno
import itertools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, wait
from dataclasses import dataclass

import msgspec

from shardckpt.config import current
from shardckpt.coordination.base import Coordinator, exchange
from shardckpt.coordination.single import SingleCoordinator
from shardckpt.errors import (
    CheckpointError,
    CorruptionError,
    FormatVersionError,
    ShardckptError,
    StateError,
    StorageError,
)
from shardckpt.format import typed_json as values
from shardckpt.format.digests import BLOCK_BYTES
from shardckpt.format.dtypes import shard_form
from shardckpt.format.entries import Manifest, ShardEntry
from shardckpt.format.safetensors_header import chunk_name, header_bytes, parse_header
from shardckpt.io.buffers import BUFFER_BYTES, lease
from shardckpt.io.threads import stalled, workers
from shardckpt.loading.shard_reader import bad_blocks, tensors_in
from shardckpt.maintenance.bit_flips import find_flipped_bit
from shardckpt.reports import VerifyReport
from shardckpt.storage.base import CheckpointFiles

__all__ = ["ShardDamage", "read_header", "survey", "verify_shards"]

_DIAGNOSED = 3
"""More damaged blocks in a shard than this are no flipped bits; a search takes up to a minute."""

Progress = Callable[[int], None]


def _silent(checked_bytes: int) -> None:
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardDamage:
    """What is wrong with a shard: the blocks that don't verify, and for each its flipped bit, as
    (byte of the file, bit), if each of them has a single one. No blocks: what was appended."""

    shard: int
    what: str
    expected: str
    actual: str
    blocks: tuple[int, ...]
    flips: tuple[tuple[int, int], ...] = ()

    def hurt(self, manifest: Manifest) -> list[str]:
        """Names of the tensors with bytes that are wrong, or may be."""
        ranges = [(number * BLOCK_BYTES, (number + 1) * BLOCK_BYTES) for number in self.blocks]
        if self.flips:
            ranges = [(byte, byte + 1) for byte, _ in self.flips]
        return tensors_in(manifest, ranges, shard=self.shard)

    def error(self, manifest: Manifest, path: str) -> CorruptionError:
        """It as an error that names the file and the tensors."""
        return CorruptionError(
            self.what,
            path=f"{path}/{manifest.shards[self.shard].name}",
            tensor=", ".join(self.hurt(manifest)) or None,
            expected=self.expected,
            actual=self.actual,
            remedy="load another checkpoint, or `shardckpt rescue` what is whole",
        )


def _check_values(manifest: Manifest) -> None:
    for node in (manifest.state, *manifest.per_rank):
        try:
            values.decode(node, tensor=lambda ref: ref)
        except (CorruptionError, FormatVersionError):
            raise
        except CheckpointError:  # an enum whose class is not imported here: no damage
            continue


def verify_shards(
    files: CheckpointFiles,
    manifest: Manifest,
    *,
    subset: tuple[int, int] = (1, 1),
    progress: Progress = _silent,
    coordinator: Coordinator | None = None,
) -> VerifyReport:
    """Read all shards, or the part (n, t) of them: the blocks that the n-th of t scrubs checks.

    Collective over the coordinator's ranks, by default this process alone; they divide the
    bytes, and all get the whole report. `progress` is called, from several threads, with the
    bytes that this rank has checked since its last call.
    """
    ranks = coordinator or SingleCoordinator()
    (part, parts), count = subset, len(manifest.shards)

    def advance(checked_bytes: int) -> None:
        ranks.progress(checked_bytes)
        progress(checked_bytes)

    def check() -> bytes:
        _check_subset(subset)
        _check_values(manifest)
        own = (part + parts * ranks.rank, parts * ranks.world_size)
        return _encode(_check_blocks(files, manifest, subset=own, progress=advance))

    def merge(payloads: list[bytes]) -> bytes:
        found = [msgspec.msgpack.decode(payload, type=_Checked) for payload in payloads]
        bad = {shard: [n for own, _ in found for n in own.get(shard, ())] for shard in range(count)}
        return _encode(({shard: n for shard, n in bad.items() if n}, sum(n for _, n in found)))

    bad, checked_bytes = msgspec.msgpack.decode(
        exchange(ranks, "verify", check, merge), type=_Checked
    )

    def diagnose() -> bytes:
        own = range(ranks.rank, count, ranks.world_size)
        damage = _diagnose(files, manifest, bad, own)
        broken = {found.shard for found in damage}
        others = _disagreements(files, manifest, [shard for shard in own if shard not in broken])
        return _encode((damage, [_Told.of(error) for error in others]))

    def gather(payloads: list[bytes]) -> bytes:
        found = [msgspec.msgpack.decode(payload, type=_Found) for payload in payloads]
        damage = sorted((one for own, _ in found for one in own), key=lambda one: one.shard)
        return _encode((damage, [one for _, own in found for one in own]))

    answer = exchange(ranks, "diagnose", diagnose, gather)
    damage, told = msgspec.msgpack.decode(answer, type=_Found)
    hurt = {name for found in damage for name in found.hurt(manifest)}
    return VerifyReport(
        path=files.path,
        checked_bytes=checked_bytes,
        hurt=tuple(name for name in manifest.tensors if name in hurt),
        whole=tuple(name for name in manifest.tensors if name not in hurt),
        damage=(
            *(found.error(manifest, files.path) for found in damage),
            *(t.error() for t in told),
        ),
    )


class _Told(msgspec.Struct, array_like=True):
    """A CorruptionError in words, for the way between ranks."""

    message: str
    path: str | None
    tensor: str | None
    expected: str
    actual: str
    remedy: str | None

    @classmethod
    def of(cls, error: CorruptionError) -> _Told:
        facts = (error.path, error.tensor, str(error.expected), str(error.actual), error.remedy)
        return cls(error.message, *facts)

    def error(self) -> CorruptionError:
        facts = {name: getattr(self, name) for name in self.__struct_fields__[1:]}
        return CorruptionError(self.message, **facts)


_Checked = tuple[dict[int, list[int]], int]
_Found = tuple[list[ShardDamage], list[_Told]]
_encode = msgspec.msgpack.encode


def survey(files: CheckpointFiles, manifest: Manifest) -> list[ShardDamage]:
    """What is wrong with the shards, each at most once. Not collective."""
    bad, _ = _check_blocks(files, manifest, subset=(1, 1), progress=_silent)
    return _diagnose(files, manifest, bad, range(len(manifest.shards)))


def _check_subset(subset: tuple[int, int]) -> None:
    part, parts = subset
    if not 1 <= part <= parts:
        raise StateError(
            "There is no such part",
            expected="n/t with n from 1 to t",
            actual=f"{part}/{parts}",
            remedy="1/4, 2/4, 3/4 and 4/4 together check all",
        )


def _check_blocks(
    files: CheckpointFiles, manifest: Manifest, *, subset: tuple[int, int], progress: Progress
) -> _Checked:
    """By shard, the numbers of the blocks that don't verify; and how many bytes were read."""
    part, parts = subset
    ends = [min(_size(files, shard) or 0, shard.size_bytes) for shard in manifest.shards]
    jobs = [(index, low) for index, end in enumerate(ends) for low in range(0, end, BUFFER_BYTES)][
        part - 1 :: parts
    ]
    bad: dict[int, list[int]] = {}
    checked: list[int] = []

    def check(job: tuple[int, int]) -> None:
        index, low = job
        shard = manifest.shards[index]
        high = min(low + BUFFER_BYTES, ends[index])
        if high < shard.size_bytes:
            high -= high % BLOCK_BYTES  # what is left of a cut block can't be verified
        found = _bad_in(files, shard, low, high)
        if found:
            bad.setdefault(index, []).extend(found)
        checked.append(high - low)
        progress(high - low)

    with workers(current().read_threads, "shardckpt-verify", buffers=0) as (pool, _):
        pending = {pool.submit(check, job) for job in jobs}
        while pending:
            done, pending = wait(pending, current().stall_deadline_s, FIRST_COMPLETED)
            if not done:
                raise stalled("Reading", files.path)
            for future in done:
                future.result()
    return bad, sum(checked)


def _diagnose(
    files: CheckpointFiles, manifest: Manifest, bad: dict[int, list[int]], shards: Iterable[int]
) -> list[ShardDamage]:
    found = (
        _damage(
            files, manifest, index, _size(files, manifest.shards[index]), sorted(bad.get(index, ()))
        )
        for index in shards
    )
    return [damage for damage in found if damage]


def _size(files: CheckpointFiles, shard: ShardEntry) -> int | None:
    """The size of a shard's file; None if there is no regular file."""
    try:
        return files.size_bytes(shard.name)
    except CorruptionError:
        return None


def _bad_in(files: CheckpointFiles, shard: ShardEntry, low: int, high: int) -> list[int]:
    """Numbers of the blocks of [low, high) that don't verify, or that the disk can't read."""
    with lease(1) as (buffer,):
        view = buffer.view[: high - low]
        try:
            if not files.read_past_cache(
                shard.name, buffer.view, offset=low, size_bytes=high - low
            ):
                files.readinto(shard.name, [view], offset=low)
            return bad_blocks(shard, low, view)
        except (StorageError, CorruptionError) as error:
            if isinstance(error, StorageError) and error.errno != errno.EIO:
                raise
            if high - low <= BLOCK_BYTES:
                return [low // BLOCK_BYTES]
    blocks = range(low, high, BLOCK_BYTES)
    return [n for at in blocks for n in _bad_in(files, shard, at, min(at + BLOCK_BYTES, high))]


def _damage(
    files: CheckpointFiles, manifest: Manifest, index: int, size: int | None, bad: list[int]
) -> ShardDamage | None:
    shard = manifest.shards[index]
    last = len(shard.digests)
    if size is None:
        what = "A shard is missing, or no regular file"
        facts = ("the file", "no such file")
        return _shard_damage(index, what, facts, range(last))
    if size != shard.size_bytes:
        lost = range(size // BLOCK_BYTES, last) if size < shard.size_bytes else ()
        what = "A shard is cut" if lost else "Something was appended to a shard"
        facts = (f"{shard.size_bytes} bytes", f"{size} bytes")
        return _shard_damage(index, what, facts, sorted({*bad, *lost}))
    if not bad:
        return None
    names = ", ".join(map(str, bad[:8])) + (", ..." if len(bad) > 8 else "")
    flips = _flips(files, shard, bad) if len(bad) <= _DIAGNOSED else None
    if flips:
        places = ", ".join(f"bit {bit} of byte {byte}" for byte, bit in flips)
        what = f"{'A single bit was' if len(flips) == 1 else 'Single bits were'} flipped in a shard"
        facts = (f"the digests of the manifest for block {names}", f"{places} flipped")
        return _shard_damage(index, what, facts, bad, flips)
    facts = (f"the digests of the manifest for block {names}", "other bytes, or unreadable ones")
    return _shard_damage(index, "A shard's bytes are not those that were saved", facts, bad)


def _shard_damage(
    index: int,
    what: str,
    facts: tuple[str, str],
    blocks: range | list[int],
    flips: tuple[tuple[int, int], ...] = (),
) -> ShardDamage:
    expected, actual = facts
    return ShardDamage(
        shard=index,
        what=what,
        expected=expected,
        actual=actual,
        blocks=tuple(blocks),
        flips=flips,
    )


def _flips(
    files: CheckpointFiles, shard: ShardEntry, blocks: list[int]
) -> tuple[tuple[int, int], ...] | None:
    """(byte of the file, bit) for each block, if each has a single flipped bit."""
    found = []
    for number in blocks:
        low = number * BLOCK_BYTES
        data = bytearray(min(BLOCK_BYTES, shard.size_bytes - low))
        try:
            files.readinto(shard.name, [memoryview(data)], offset=low)
        except ShardckptError:
            return None
        flip = find_flipped_bit(data, int(shard.digests[number]))
        if flip is None:
            return None
        found.append((low + flip[0], flip[1]))
    return tuple(found)


def read_header(files: CheckpointFiles, name: str, *, size_bytes: int) -> bytes:
    """The bytes of a shard before its data."""
    head = bytearray(8)
    files.readinto(name, [memoryview(head)], offset=0)
    path = f"{files.path}/{name}"
    data = bytearray(header_bytes(bytes(head), file_size_bytes=size_bytes, path=path))
    files.readinto(name, [memoryview(data)], offset=0)
    return bytes(data)


def _disagreements(
    files: CheckpointFiles, manifest: Manifest, indices: list[int]
) -> Iterator[CorruptionError]:
    """For each of these shards the first place where its own header tells another story than the
    manifest."""
    planned: list[dict[str, tuple[str, int, int]]] = [{} for _ in manifest.shards]
    for name, entry in manifest.tensors.items():
        dims = len(entry.shape)
        for index, begin, end, *box in entry.chunks.tolist():
            own = chunk_name(name, entry.shape, box[:dims], box[dims:])
            planned[index][own] = (shard_form(entry.dtype, ())[0], begin, end)
    for index in indices:
        shard = manifest.shards[index]
        path = f"{files.path}/{shard.name}"
        try:
            data = read_header(files, shard.name, size_bytes=shard.size_bytes)
            tensors, _ = parse_header(data, file_size_bytes=shard.size_bytes, path=path)
        except CorruptionError as error:
            yield error
            continue
        expected = planned[index]
        found = {tensor.name: (tensor.dtype, tensor.begin, tensor.end) for tensor in tensors}
        names = (n for n in {**expected, **found} if expected.get(n) != found.get(n))
        for name in itertools.islice(names, 1):
            yield CorruptionError(
                "A shard and the manifest disagree",
                path=path,
                tensor=name,
                expected=expected.get(name, "no such chunk"),
                actual=found.get(name, "no such chunk"),
                remedy="load another checkpoint",
            )
