"""The agreement of all ranks on one load: the same checkpoint is open, and it fits their states."""

from __future__ import annotations

import enum
import platform
import secrets
import zlib
from collections.abc import Callable
from contextlib import ExitStack

import msgspec

from shardckpt.config import current
from shardckpt.coordination.base import Coordinator
from shardckpt.coordination.exchange import Attempt, attempt, exchange
from shardckpt.errors import DirectoryNotSharedError
from shardckpt.format.divided_manifest import check_manifest_parts, part_from_bytes
from shardckpt.format.entries import Manifest
from shardckpt.io.sockets import own_address
from shardckpt.loading.sharing import TOKEN_BYTES, Sharing
from shardckpt.plan.local_plan import pack_columns, unpack_columns
from shardckpt.plan.page_cache_policy import ReadSummary, past_cache, summarize_reads
from shardckpt.plan.read_plan import Reads
from shardckpt.plan.shared_reads import NeededBlocks, Segments, find_segments, units_of, wanted_runs
from shardckpt.state.matching import MatchedState
from shardckpt.state.mismatches import Mismatches, check_unused
from shardckpt.storage.base import CheckpointFiles, Storage

__all__ = [
    "Shares",
    "agree_on_reads",
    "agree_on_sharing",
    "open_manifest",
    "open_together",
    "same_checkpoint",
]


_Address = tuple[str, int]


class Shares(enum.IntEnum):
    """Whether ranks may read blocks for others: ranks of one machine, or of several ones."""

    NOTHING = 0
    ON_ONE_MACHINE = 1
    ACROSS_MACHINES = 2


def open_manifest(
    storage: Storage, path: str, *, newest: bool = False, rank: int = 0, world_size: int = 1
) -> tuple[CheckpointFiles, Manifest]:
    """Open a checkpoint and read its manifest. Not collective.

    See Storage.open_newest and part_from_bytes.
    """
    files = storage.open_newest(path) if newest else storage.open(path)
    try:
        text = files.manifest()
        return files, part_from_bytes(text, path=files.path, rank=rank, world_size=world_size)
    except BaseException:
        files.close()
        raise


def open_together(
    coordinator: Coordinator, storage: Storage, path: str
) -> Attempt[tuple[CheckpointFiles, Manifest]]:
    """Open a checkpoint on all ranks. Collective if each machine may hold a part of it.

    Then all ranks open the newest checkpoint that any rank finds at the path: the disk of a
    machine that was away may hold an older one, or none. They get the manifest from a rank that has
    it. Rank 0 looks in all places.

    Returns:
        The checkpoint, or the error with which this rank did not open it.
    """
    ranks = {"rank": coordinator.rank, "world_size": coordinator.world_size}
    newest = coordinator.rank == 0
    opened = attempt(lambda: open_manifest(storage, path, newest=newest, **ranks))
    if not storage.in_parts or coordinator.world_size == 1:
        return opened

    lacking: list[int] = []  # on rank 0

    def find() -> bytes:
        facts = (opened.value[1].created, opened.value[1].checkpoint_id) if opened.value else ()
        return msgspec.msgpack.encode(facts)

    def choose(payloads: list[bytes]) -> list[bytes]:
        found = [tuple(msgspec.msgpack.decode(payload)) for payload in payloads]
        newest = max(found)
        lacking.extend(rank for rank, facts in enumerate(found) if facts != newest)
        sender = found.index(newest)
        return [
            msgspec.msgpack.encode((bool(lacking), rank == sender, rank in lacking))
            for rank in range(len(found))
        ]

    any_lacks, sends, lacks = msgspec.msgpack.decode(exchange(coordinator, "find", find, choose))
    if not any_lacks:
        return opened

    def send() -> bytes:
        return opened.get()[0].manifest() if sends else b""

    def forward(payloads: list[bytes]) -> list[bytes]:
        manifest = b"".join(payloads)
        return [manifest if rank in lacking else b"" for rank in range(len(payloads))]

    manifest = exchange(coordinator, "manifest", send, forward)
    if not lacks:
        return opened
    if opened.value is not None:
        opened.value[0].close()

    def open_part() -> tuple[CheckpointFiles, Manifest]:
        files = storage.open_part(path, manifest)
        return files, part_from_bytes(manifest, path=files.path, **ranks)

    return attempt(open_part)


def agree_on_reads(
    coordinator: Coordinator,
    path: str,
    opened: Attempt[tuple[CheckpointFiles, Manifest]],
    matched: Attempt[MatchedState],
    *,
    strict: bool,
) -> tuple[float, Shares]:
    """Agree that the checkpoint fits, before any rank changes its state. Collective.

    Args:
        coordinator: The ranks.
        path: The checkpoint.
        opened: The checkpoint that this rank opened.
        matched: This rank's state, matched against the checkpoint, or the error of the match.
        strict: Raise an error for mismatches.

    Returns:
        The fraction of a block that this rank must need for a read that bypasses the page cache,
        see plan/page_cache_policy; and whether ranks may read blocks for others.

    Raises:
        DirectoryNotSharedError: Ranks opened different checkpoints.
        LoadMismatchError: The checkpoint does not fit the states.
        ShardckptError: The error in `matched`, on its rank. The other ranks raise an error that
            names that rank.
    """
    several = coordinator.world_size > 1

    def report() -> bytes:
        state = matched.get()
        refused = state.strict_mismatches if strict else Mismatches()
        error = refused.error(path)
        if error is not None and not (several and refused.only_unexpected):
            raise error
        _, manifest = opened.get()
        summary = summarize_reads(state.reads if several else (), machine=platform.node())
        unused = zlib.compress(msgspec.msgpack.encode(refused.unexpected), 1)
        identity, ranges = manifest.checkpoint_id, b""
        if (part := manifest.part) is not None:  # the parts of one text are a whole
            identity, ranges = f"{identity}, digest {part.digest}", pack_columns(part.ranges)
        return msgspec.msgpack.encode((identity, summary, unused, ranges))

    def decide(payloads: list[bytes]) -> list[bytes]:
        decode = msgspec.msgpack.Decoder(tuple[str, ReadSummary, bytes, bytes]).decode
        ids, summaries, unused, ranges = zip(*map(decode, payloads), strict=True)
        same_checkpoint(path)([identity.encode() for identity in ids])
        files, manifest = opened.get()
        if manifest.part is not None:
            parts = [unpack_columns(packed) for packed in ranges]
            check_manifest_parts(parts, len(manifest.shards), files.manifest, path=path)
        check_unused([msgspec.msgpack.decode(zlib.decompress(names)) for names in unused], path)
        shares = Shares.NOTHING
        if len({summary.machine for summary in summaries}) > 1:
            shares = Shares.ACROSS_MACHINES
        elif several and (files.remote or files.nearby() is not None):
            shares = Shares.ON_ONE_MACHINE
        if not current().read_once and files.nearby() is None:
            shares = Shares.NOTHING
        return [msgspec.msgpack.encode((part, shares)) for part in past_cache(summaries)]

    answer = exchange(coordinator, "open", report, decide)
    return msgspec.msgpack.decode(answer, type=tuple[float, Shares])


def agree_on_sharing(
    coordinator: Coordinator,
    files: CheckpointFiles,
    manifest: Manifest,
    reads: Attempt[Reads],
    shares: Shares,
    closing: ExitStack,
) -> Sharing | None:
    """Agree on the blocks that one rank reads for others. Collective.

    Args:
        coordinator: The ranks.
        files: The checkpoint.
        manifest: Its manifest.
        reads: The reads of this rank, or the error of their plan.
        shares: Whether ranks of several machines read for each other.
        closing: Ends the transfers.

    Returns:
        The blocks that this rank sends or receives. None if no rank does.
    """

    across = shares is Shares.ACROSS_MACHINES
    opened = attempt(
        lambda: Sharing(own_address(coordinator.host, across_machines=across), coordinator.rank)
    )
    if opened.value is not None:
        closing.callback(opened.value.close)

    def describe() -> bytes:
        names = files.nearby()
        numbers = {shard.name: number for number, shard in enumerate(manifest.shards)}
        nearby = None if names is None else tuple(numbers[name] for name in names)
        runs = wanted_runs(reads.get()).tobytes()
        wanted = NeededBlocks(platform.node(), runs, nearby)
        return msgspec.msgpack.encode((wanted, opened.value.address if opened.value else None))

    def decide(payloads: list[bytes]) -> bytes:
        decode = msgspec.msgpack.Decoder(tuple[NeededBlocks, _Address | None]).decode
        wanted, addresses = zip(*map(decode, payloads), strict=True)
        # A rank that can't listen can't send.
        segments = find_segments(wanted, remote=files.remote) if all(addresses) else Segments()
        return msgspec.msgpack.encode((secrets.token_bytes(TOKEN_BYTES), addresses, segments))

    answer = exchange(coordinator, "share", describe, decide)
    agreed = tuple[bytes, tuple[_Address | None, ...], Segments]
    token, addresses, segments = msgspec.msgpack.decode(answer, type=agreed)
    if not segments.rows or opened.value is None:
        return None
    reachable = [address for address in addresses if address is not None]
    opened.value.begin(units_of(segments), reachable, token)
    return opened.value


def same_checkpoint(path: str) -> Callable[[list[bytes]], bytes]:
    """Return the function with which rank 0 compares the checkpoint ids of an exchange.

    The function raises DirectoryNotSharedError if they differ.
    """

    def decide(payloads: list[bytes]) -> bytes:
        others = tuple(rank for rank, payload in enumerate(payloads) if payload != payloads[0])
        if others:
            raise DirectoryNotSharedError(
                "Some ranks see another checkpoint at this path than rank 0",
                path=path,
                rank=others,
                expected=f"checkpoint {payloads[0].decode()}",
                actual=f"checkpoint {payloads[others[0]].decode()}",
                remedy="load from a file system that all ranks share",
            )
        return b""

    return decide
