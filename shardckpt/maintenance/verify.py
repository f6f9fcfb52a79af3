"""Verify the blocks of all shards, and check that the headers of shards match the manifest."""

from __future__ import annotations

import errno
import itertools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, wait
from dataclasses import dataclass

import msgspec

from shardckpt.config import current
from shardckpt.coordination.base import Coordinator
from shardckpt.coordination.exchange import exchange
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
from shardckpt.format.dtype_names import shard_form
from shardckpt.format.entries import Manifest, ShardEntry
from shardckpt.format.safetensors_header import chunk_name, header_bytes, parse_header
from shardckpt.io.buffers import BUFFER_BYTES, lease
from shardckpt.io.threads import stalled, workers
from shardckpt.loading.shard_reader import affected_tensors, corrupted_blocks
from shardckpt.maintenance.bit_flips import find_flipped_bit
from shardckpt.reports import VerifyReport
from shardckpt.storage.base import CheckpointFiles

__all__ = ["ShardCorruption", "find_corruption", "read_header", "verify_shards"]

_MAX_SEARCHED_BLOCKS = 3
"""A shard with more corrupted blocks is not searched for flipped bits: a search takes up to a
minute."""

OnProgress = Callable[[int], None]


def _silent(checked_bytes: int) -> None:
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardCorruption:
    """The corruption of one shard.

    Attributes:
        shard: The number of the shard.
        message: The problem, in one sentence.
        expected: The expected size or digests.
        actual: The actual size or digests.
        blocks: The numbers of the corrupted blocks. Empty if bytes were appended to the shard.
        flips: For each block its flipped bit, as (byte of the file, bit), if every corrupted
            block has a single flipped bit; otherwise empty.
    """

    shard: int
    message: str
    expected: str
    actual: str
    blocks: tuple[int, ...]
    flips: tuple[tuple[int, int], ...] = ()

    def tensors(self, manifest: Manifest) -> list[str]:
        """Return the names of the tensors with bytes that are, or may be, corrupted."""
        ranges = [(number * BLOCK_BYTES, (number + 1) * BLOCK_BYTES) for number in self.blocks]
        if self.flips:
            ranges = [(byte, byte + 1) for byte, _ in self.flips]
        return affected_tensors(manifest, ranges, shard=self.shard)

    def error(self, manifest: Manifest, path: str) -> CorruptionError:
        """Return the error that names the file and the tensors."""
        return CorruptionError(
            self.message,
            path=f"{path}/{manifest.shards[self.shard].name}",
            tensor=", ".join(self.tensors(manifest)) or None,
            expected=self.expected,
            actual=self.actual,
            remedy="load another checkpoint, or rescue the intact tensors: `shardckpt rescue`",
        )


def _check_values(manifest: Manifest) -> None:
    for node in (manifest.state, *manifest.per_rank):
        try:
            values.decode(node, tensor=lambda ref: ref)
        except (CorruptionError, FormatVersionError):
            raise
        except CheckpointError:  # an enum whose class is not imported here
            continue


def verify_shards(
    files: CheckpointFiles,
    manifest: Manifest,
    *,
    subset: tuple[int, int] = (1, 1),
    progress: OnProgress = _silent,
    coordinator: Coordinator | None = None,
) -> VerifyReport:
    """Verify all shards, or one part of them.

    Collective over the ranks of `coordinator`, by default this process alone. The ranks divide the
    bytes, and all get the same report.

    Args:
        files: The files of the checkpoint.
        manifest: Its manifest.
        subset: (n, t) verifies the n-th of t parts.
        progress: Called with the bytes that this rank verified since its last call, from several
            threads.
        coordinator: The ranks that divide the work.

    Returns:
        The corrupted and the intact tensors, with an error for each corrupted shard.

    Raises:
        StateError: `subset` is invalid.
        CorruptionError: A value in the manifest is invalid.
    """
    ranks = coordinator or SingleCoordinator()
    bad, checked_bytes = _check_by_all(files, manifest, ranks, subset, progress)
    corruption, messages = _diagnose_by_all(files, manifest, ranks, bad)
    corrupted = {name for one in corruption for name in one.tensors(manifest)}
    return VerifyReport(
        path=files.path,
        checked_bytes=checked_bytes,
        corrupted=tuple(name for name in manifest.tensors if name in corrupted),
        intact=tuple(name for name in manifest.tensors if name not in corrupted),
        errors=(
            *(one.error(manifest, files.path) for one in corruption),
            *(message.error() for message in messages),
        ),
    )


def _check_by_all(
    files: CheckpointFiles,
    manifest: Manifest,
    ranks: Coordinator,
    subset: tuple[int, int],
    progress: OnProgress,
) -> _Checked:
    """Verify blocks on all ranks, each a part. Collective; all ranks get the same result."""
    part, parts = subset

    def advance(checked_bytes: int) -> None:
        ranks.progress(checked_bytes)
        progress(checked_bytes)

    def check() -> bytes:
        _check_subset(subset)
        _check_values(manifest)
        rank_subset = (part + parts * ranks.rank, parts * ranks.world_size)
        return _encode(_check_blocks(files, manifest, subset=rank_subset, progress=advance))

    def merge(payloads: list[bytes]) -> bytes:
        results = [msgspec.msgpack.decode(payload, type=_Checked) for payload in payloads]
        bad: dict[int, list[int]] = {}
        for of_rank, _ in results:
            for shard, blocks in of_rank.items():
                bad.setdefault(shard, []).extend(blocks)
        return _encode((bad, sum(checked_bytes for _, checked_bytes in results)))

    answer = exchange(ranks, "verify", check, merge)
    checked: _Checked = msgspec.msgpack.decode(answer, type=_Checked)
    return checked


def _diagnose_by_all(
    files: CheckpointFiles, manifest: Manifest, ranks: Coordinator, bad: dict[int, list[int]]
) -> _Diagnosis:
    """Describe corruption on all ranks, each for some shards. Collective; as _check_by_all."""

    def diagnose() -> bytes:
        shards = range(ranks.rank, len(manifest.shards), ranks.world_size)
        corruption = _diagnose(files, manifest, bad, shards)
        broken = {one.shard for one in corruption}
        others = _disagreements(files, manifest, [shard for shard in shards if shard not in broken])
        return _encode((corruption, [_ErrorMessage.of(error) for error in others]))

    def gather(payloads: list[bytes]) -> bytes:
        results = [msgspec.msgpack.decode(payload, type=_Diagnosis) for payload in payloads]
        corruption = sorted((one for ones, _ in results for one in ones), key=lambda one: one.shard)
        return _encode((corruption, [error for _, errors in results for error in errors]))

    answer = exchange(ranks, "diagnose", diagnose, gather)
    diagnosis: _Diagnosis = msgspec.msgpack.decode(answer, type=_Diagnosis)
    return diagnosis


class _ErrorMessage(msgspec.Struct, array_like=True):
    """The message by which a CorruptionError travels between ranks."""

    message: str
    path: str | None
    tensor: str | None
    expected: str
    actual: str
    remedy: str | None

    @classmethod
    def of(cls, error: CorruptionError) -> _ErrorMessage:
        facts = (error.path, error.tensor, str(error.expected), str(error.actual), error.remedy)
        return cls(error.message, *facts)

    def error(self) -> CorruptionError:
        facts = {name: getattr(self, name) for name in self.__struct_fields__[1:]}
        return CorruptionError(self.message, **facts)


_Checked = tuple[dict[int, list[int]], int]
_Diagnosis = tuple[list[ShardCorruption], list[_ErrorMessage]]
_encode = msgspec.msgpack.encode


def find_corruption(files: CheckpointFiles, manifest: Manifest) -> list[ShardCorruption]:
    """Verify all shards and describe each corrupted one. Not collective."""
    bad, _ = _check_blocks(files, manifest, subset=(1, 1), progress=_silent)
    return _diagnose(files, manifest, bad, range(len(manifest.shards)))


def _check_subset(subset: tuple[int, int]) -> None:
    part, parts = subset
    if not 1 <= part <= parts:
        raise StateError(
            "Invalid subset of a checkpoint",
            expected="n/t with n from 1 to t",
            actual=f"{part}/{parts}",
            remedy="verify 1/4, 2/4, 3/4 and 4/4 to verify everything in four parts",
        )


def _check_blocks(
    files: CheckpointFiles, manifest: Manifest, *, subset: tuple[int, int], progress: OnProgress
) -> _Checked:
    """Verify blocks. Returns the numbers of the corrupted ones by shard, and the bytes read."""
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
            high -= high % BLOCK_BYTES  # a truncated block can't be verified
        numbers = _bad_in(files, shard, low, high)
        if numbers:
            bad.setdefault(index, []).extend(numbers)
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
) -> list[ShardCorruption]:
    each = (
        _corruption_of(
            files, manifest, index, _size(files, manifest.shards[index]), sorted(bad.get(index, ()))
        )
        for index in shards
    )
    return [corruption for corruption in each if corruption]


def _size(files: CheckpointFiles, shard: ShardEntry) -> int | None:
    """Return the size of a shard in bytes. None if it is missing or not a regular file."""
    try:
        return files.size_bytes(shard.name)
    except CorruptionError:
        return None


def _bad_in(files: CheckpointFiles, shard: ShardEntry, low: int, high: int) -> list[int]:
    """Return the numbers of the blocks in [low, high) that are corrupted or unreadable."""
    with lease(1) as (buffer,):
        view = buffer.view[: high - low]
        try:
            if not files.read_past_cache(
                shard.name, buffer.view, offset=low, size_bytes=high - low
            ):
                files.readinto(shard.name, [view], offset=low)
            return corrupted_blocks(shard, low, view)
        except (StorageError, CorruptionError) as error:
            if isinstance(error, StorageError) and error.errno != errno.EIO:
                raise
            if high - low <= BLOCK_BYTES:
                return [low // BLOCK_BYTES]
    blocks = range(low, high, BLOCK_BYTES)
    return [n for at in blocks for n in _bad_in(files, shard, at, min(at + BLOCK_BYTES, high))]


def _corruption_of(
    files: CheckpointFiles, manifest: Manifest, index: int, size: int | None, bad: list[int]
) -> ShardCorruption | None:
    shard = manifest.shards[index]
    last = len(shard.digests)
    if size is None:
        message = "A shard is missing, or is not a regular file"
        facts = ("a regular file", "no such file")
        return _shard_corruption(index, message, facts, range(last))
    if size != shard.size_bytes:
        lost = range(size // BLOCK_BYTES, last) if size < shard.size_bytes else ()
        message = "A shard is truncated" if lost else "Bytes were appended to a shard"
        facts = (f"{shard.size_bytes} bytes", f"{size} bytes")
        return _shard_corruption(index, message, facts, sorted({*bad, *lost}))
    if not bad:
        return None
    names = ", ".join(map(str, bad[:8])) + (", ..." if len(bad) > 8 else "")
    flips = _flips(files, shard, bad) if len(bad) <= _MAX_SEARCHED_BLOCKS else None
    if flips:
        bits = ", ".join(f"bit {bit} of byte {byte}" for byte, bit in flips)
        one = len(flips) == 1
        message = f"{'A single bit was' if one else 'Single bits were'} flipped in a shard"
        facts = (f"the digests in the manifest for block {names}", f"{bits} flipped")
        return _shard_corruption(index, message, facts, bad, flips)
    facts = (f"the digests in the manifest for block {names}", "different or unreadable bytes")
    return _shard_corruption(index, "A shard is corrupted", facts, bad)


def _shard_corruption(
    index: int,
    message: str,
    facts: tuple[str, str],
    blocks: range | list[int],
    flips: tuple[tuple[int, int], ...] = (),
) -> ShardCorruption:
    expected, actual = facts
    return ShardCorruption(
        shard=index,
        message=message,
        expected=expected,
        actual=actual,
        blocks=tuple(blocks),
        flips=flips,
    )


def _flips(
    files: CheckpointFiles, shard: ShardEntry, blocks: list[int]
) -> tuple[tuple[int, int], ...] | None:
    """Return the flipped bit of each block as (byte of the file, bit), if each has a single one."""
    flips = []
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
        flips.append((low + flip[0], flip[1]))
    return tuple(flips)


def read_header(files: CheckpointFiles, name: str, *, size_bytes: int) -> bytes:
    """Read the header of a shard: all bytes before its data."""
    head = bytearray(8)
    files.readinto(name, [memoryview(head)], offset=0)
    path = f"{files.path}/{name}"
    data = bytearray(header_bytes(bytes(head), file_size_bytes=size_bytes, path=path))
    files.readinto(name, [memoryview(data)], offset=0)
    return bytes(data)


def _disagreements(
    files: CheckpointFiles, manifest: Manifest, indices: list[int]
) -> Iterator[CorruptionError]:
    """Yield an error for each shard whose header does not match the manifest."""
    planned: list[dict[str, tuple[str, int, int]]] = [{} for _ in manifest.shards]
    for name, entry in manifest.tensors.items():
        dims = len(entry.shape)
        for index, begin, end, *box in entry.chunks.tolist():
            chunk = chunk_name(name, entry.shape, box[:dims], box[dims:])
            planned[index][chunk] = (shard_form(entry.dtype, ())[0], begin, end)
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
        actual = {tensor.name: (tensor.dtype, tensor.begin, tensor.end) for tensor in tensors}
        names = (n for n in {**expected, **actual} if expected.get(n) != actual.get(n))
        for name in itertools.islice(names, 1):
            yield CorruptionError(
                "The header of a shard does not match the manifest",
                path=path,
                tensor=name,
                expected=expected.get(name, "no such chunk"),
                actual=actual.get(name, "no such chunk"),
                remedy="load another checkpoint",
            )
