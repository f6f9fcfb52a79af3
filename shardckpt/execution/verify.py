"""Check every block of every shard, and that shards and manifest tell the same."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from shardckpt import knobs
from shardckpt.errors import CorruptionError
from shardckpt.execution.buffers import BUFFER_BYTES, lease
from shardckpt.execution.reader import bad_blocks, check_size, damaged_blocks
from shardckpt.format.manifest import Manifest
from shardckpt.format.shard import chunk_name, header_bytes, parse_header
from shardckpt.storage.base import CheckpointFiles

__all__ = ["verify_shards"]


def verify_shards(
    files: CheckpointFiles,
    manifest: Manifest,
    *,
    progress: Callable[[int], None] = lambda checked_bytes: None,
) -> None:
    """Read all shards; one CorruptionError tells of everything that is wrong.

    `progress` is called, from several threads, with the bytes checked since its last call.
    """
    damage: list[CorruptionError] = []
    bad: dict[int, list[int]] = {}
    jobs: list[tuple[int, int]] = []
    for index, shard in enumerate(manifest.shards):
        try:
            check_size(files, shard)
            jobs += [(index, low) for low in range(0, shard.size_bytes, BUFFER_BYTES)]
        except CorruptionError as error:
            damage.append(error)

    def check(job: tuple[int, int]) -> None:
        index, low = job
        shard = manifest.shards[index]
        with lease(1) as (buffer,):
            view = buffer.view[: min(BUFFER_BYTES, shard.size_bytes - low)]
            files.readinto(shard.name, [view], offset=low)
            found = bad_blocks(shard, low, [view])
        if found:
            bad.setdefault(index, []).extend(found)
        progress(len(view))

    with ThreadPoolExecutor(knobs.READ_THREADS, "shardckpt-verify") as pool:
        for done in [pool.submit(check, job) for job in jobs]:
            try:
                done.result()
            except CorruptionError as error:
                damage.append(error)
    for index, blocks in sorted(bad.items()):
        damage.append(damaged_blocks(manifest, sorted(blocks), shard=index, path=files.path))
    if not damage:
        damage = _disagreements(files, manifest)
    if damage:
        raise _together(damage, files.path)


def _disagreements(files: CheckpointFiles, manifest: Manifest) -> list[CorruptionError]:
    """Shards whose own header tells another story than the manifest."""
    planned: list[dict[str, tuple[str, int, int]]] = [{} for _ in manifest.shards]
    for name, entry in manifest.tensors.items():
        dims = len(entry.shape)
        for index, begin, end, *box in entry.chunks.tolist():
            own = chunk_name(name, entry.shape, box[:dims], box[dims:])
            planned[index][own] = (entry.dtype, begin, end)
    wrong = []
    for shard, expected in zip(manifest.shards, planned, strict=True):
        path = f"{files.path}/{shard.name}"
        head = bytearray(8)
        files.readinto(shard.name, [memoryview(head)], offset=0)
        data = bytearray(header_bytes(bytes(head), file_size_bytes=shard.size_bytes, path=path))
        files.readinto(shard.name, [memoryview(data)], offset=0)
        tensors, _ = parse_header(bytes(data), file_size_bytes=shard.size_bytes, path=path)
        found = {tensor.name: (tensor.dtype, tensor.begin, tensor.end) for tensor in tensors}
        for name in itertools.islice(
            (n for n in {**expected, **found} if expected.get(n) != found.get(n)), 1
        ):
            wrong.append(
                CorruptionError(
                    "A shard and the manifest disagree",
                    path=path,
                    tensor=name,
                    expected=expected.get(name, "no such chunk"),
                    actual=found.get(name, "no such chunk"),
                    remedy="load another checkpoint",
                )
            )
    return wrong


def _together(damage: list[CorruptionError], path: str) -> CorruptionError:
    if len(damage) == 1:
        return damage[0]
    hurt = dict.fromkeys(
        name for error in damage if error.tensor for name in error.tensor.split(", ")
    )
    return CorruptionError(
        "\n".join([f"{len(damage)} shards are damaged", *(str(error) for error in damage)]),
        path=path,
        tensor=", ".join(hurt) or None,
        remedy="load another checkpoint",
        damage=tuple(f"{error.path}: {error.message}" for error in damage),
    )
