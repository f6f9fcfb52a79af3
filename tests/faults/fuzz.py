"""Inputs without end for the parsers of manifest and shard header: only ShardckptError may escape.

Most inputs are a valid document with a few changes and a digest that fits: without it nearly all
would be refused at the door. `python -m tests.faults.fuzz manifest 1000000 SEED` lets
atheris choose them by coverage.
"""

from __future__ import annotations

import inspect
import json
import random
import re
import struct
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any
from unittest import mock

import numpy as np
import torch

from shardckpt.errors import ShardckptError
from shardckpt.format import divided_manifest as divided
from shardckpt.format import lazy_manifest as lazy
from shardckpt.format import manifest, number_lists
from shardckpt.format import safetensors_header as shard
from shardckpt.format import tiling as boxes
from shardckpt.format import typed_json as values
from shardckpt.format import validation as rules
from shardckpt.format.digests import text_digest
from shardckpt.format.entries import Manifest, ShardEntry, TensorEntry
from shardckpt.format.lazy_manifest import LazyManifest
from shardckpt.format.manifest import to_bytes
from shardckpt.format.safetensors_header import build_header
from shardckpt.state.local_chunks import LocalChunk
from shardckpt.state.saved_tree import SavedState

INPUTS_A_TRIAL = 5000
SLOWEST_S = 1.0


def _manifest() -> bytes:
    row = np.array([[0, 4096, 4108, 0, 0, 1, 3], [1, 4096, 4108, 1, 0, 1, 3]], np.int64)
    scalar = np.array([[0, 4108, 4112]], np.int64)
    names = [f"shard-0000{rank}-of-00002.safetensors" for rank in range(2)]
    return to_bytes(
        Manifest(
            checkpoint_id="0" * 32,
            created="2026-01-01T00:00:00+00:00",
            library="shardckpt",
            world_size=2,
            shards=tuple(
                ShardEntry(name=name, size_bytes=4112, digests=np.array([7], np.uint64))
                for name in names
            ),
            tensors={
                "w": TensorEntry(dtype="F32", shape=(2, 3), chunks=row),
                "s": TensorEntry(dtype="F32", shape=(), chunks=scalar),
            },
            state={
                "w": {"$tensor": "w"},
                "l": [{"$ndarray": "s"}, {"$per_rank": "0"}, None, True, 1.5, "text"],
                "t": {
                    "$tuple": [{"$set": [1, 2]}, {"$int": "9" * 20}, {"$float": "7ff0" + "0" * 12}]
                },
                "d": {
                    "$dict": [[1, {"$bytes": "AAAA"}], [{"$tuple": [1]}, {"$slice": [0, 1, None]}]]
                },
                "o": [{"$numpy": ["<f4", "AACAPw=="]}, {"$dtype": "bfloat16"}, {"$device": "cpu"}],
                "r": [
                    {"$range": [0, 9, 3]},
                    {"$size": [2]},
                    {"$path": "a/b"},
                    {"$complex": [1.0, 2.0]},
                ],
                "e": [
                    {"$enum": ["signal", "Signals", "SIGINT"]},
                    {"$str": "61"},
                    {"$bytearray": ""},
                ],
            },
            per_rank=([1], [2]),
        )
    )


VALID_MANIFEST = _manifest()
VALID_HEADER = build_header(
    [("w[0:1,0:3]", "F32", (1, 3), 12), ("s", "I8", (), 1), ("e", "F64", (0, 2), 0)],
    {"format": "shardckpt", "rank": "0"},
)
FILE_BYTES = len(VALID_HEADER) + 13


def parse_manifest(data: bytes) -> None:
    """Open a slice and load, with these bytes as the manifest."""
    with suppress(ShardckptError):
        manifest.check_text(data, path="fuzz")
        outline = LazyManifest(data, path="fuzz")
        for name in ("w", "s", "d.1", "t.0"):
            outline.find(name)
            outline.tensor(name)
    SavedState(manifest.from_bytes(data, path="fuzz"))


def parse_large(data: bytes) -> None:
    """Let two ranks check the bytes of a large manifest. Together they refuse the same manifests
    as one rank alone."""
    try:
        manifest.from_bytes(data, path="fuzz")
        valid = True
    except ShardckptError:
        valid = False
    with (
        mock.patch.multiple(divided, LARGE_BYTES=0, LONG_BYTES=0),
        mock.patch.multiple(lazy, LARGE_OBJECT_BYTES=0, LONG_BYTES=0, _MANY=0),
        mock.patch.multiple(manifest, LARGE_BYTES=0, _BATCH_BYTES=8),
    ):
        try:
            _parse_together(data)
        except ShardckptError:
            assert not valid, f"two ranks refuse {data!r}"
            raise
    assert valid, f"two ranks accept {data!r}"


def _parse_together(data: bytes) -> None:
    with suppress(ShardckptError):
        outline = LazyManifest(data, path="fuzz")
        for name in ("w", "s"):
            outline.find(name)
            if entry := outline.tensor(name):
                _read_all(entry)
    found = [divided.part_from_bytes(data, path="fuzz", rank=r, world_size=2) for r in range(2)]
    for each in found:
        for entry in each.tensors.values():
            _read_all(entry)
    ranges = [each.part.ranges for each in found if each.part]
    divided.check_manifest_parts(ranges, len(found[0].shards), lambda: data, path="fuzz")


def _read_all(entry: TensorEntry) -> None:
    if 0 not in entry.shape:
        whole = LocalChunk((0,) * len(entry.shape), entry.shape, torch.empty(0))
        divided.chunks_of([(entry, whole)])


def parse_shard(data: bytes) -> None:
    """Verify a shard that begins with these bytes."""
    shard.header_bytes(data[:8], file_size_bytes=FILE_BYTES, path="fuzz")
    shard.parse_header(data, file_size_bytes=FILE_BYTES, path="fuzz")


def seal(document: Any) -> bytes:
    if not isinstance(document, dict):
        return json.dumps(document).encode()
    members = {key: value for key, value in document.items() if key != "digest"}
    body = json.dumps(members, separators=(",", ":"), ensure_ascii=False)[:-1]
    data = body.encode("utf-8", "surrogatepass")
    return data + f',"digest":"{text_digest(data)}"}}\n'.encode()


def pack_header(document: Any) -> bytes:
    text = json.dumps(document).encode().ljust(len(VALID_HEADER) - 8)
    return struct.pack("<Q", len(text)) + text


NUMBERS = [0, 1, -1, 3, 8, 4096, 2**31, 2**53, 2**60, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30]
TEXTS = [
    *("", "w", "s", "$tensor", "F32", "F64", "BOOL", "../x", "/dev/zero", "\0", "\ud800", "é"),
    *("w[0:1]", "__metadata__", "shard-00000-of-00002.safetensors", "0" * 16, "g" * 16),
    *("9" * 5000, "cuda:99", "meta", "|O8", "<M8[s]", "float32", "load", "os.path", "{", "[" * 50),
]
TAGS = [
    *("$tensor", "$ndarray", "$per_rank", "$tuple", "$set", "$frozenset", "$dict", "$int"),
    *("$float", "$str", "$complex", "$bytes", "$bytearray", "$dtype", "$device", "$size"),
    *("$slice", "$range", "$path", "$enum", "$numpy", "$none"),
]


def node(rng: random.Random, depth: int = 0) -> Any:
    """Any JSON."""
    kind = rng.randrange(9 if depth < 3 else 6)
    if kind == 0:
        return rng.choice(NUMBERS)
    if kind == 1:
        return rng.choice(TEXTS)
    if kind == 2:
        return rng.choice([None, True, False, 0.5, -0.0, 1e308, float("nan"), float("inf")])
    if kind == 3:
        return rng.randrange(-5, 10)
    if kind == 4:
        return {rng.choice(TAGS): rng.choice(TEXTS)}
    if kind == 5:
        return "".join(chr(rng.randrange(0x250)) for _ in range(rng.randrange(6)))
    items = [node(rng, depth + 1) for _ in range(rng.randrange(4))]
    if kind == 6:
        return items
    if kind == 7:
        return {rng.choice(TAGS): items}
    return {rng.choice([*TEXTS, *TAGS]): item for item in items}


def change(document: Any, rng: random.Random) -> Any:
    """The document with one place changed: a value, a key, an item gone or doubled."""
    places: list[tuple[Any, Any]] = []
    stack = [document]
    while stack:
        found = stack.pop()
        items = found.items() if isinstance(found, dict) else enumerate(found)
        for key, value in items:
            places.append((found, key))
            if isinstance(value, (dict, list)):
                stack.append(value)
    if not places:
        return node(rng)
    where, key = rng.choice(places)
    action = rng.randrange(8)
    if action == 0:
        del where[key]
    elif action == 1 and isinstance(where, list):
        where.insert(key, where[key])
    elif action == 2 and isinstance(where, dict):
        where[rng.choice([*TEXTS, *TAGS])] = where.pop(key)
    elif action == 3:
        target, other = rng.choice(places)
        try:
            where[key] = json.loads(json.dumps(target[other]))
        except (KeyError, IndexError):
            pass
    elif action == 4 and isinstance(where[key], int):
        where[key] += rng.choice([-1, 1, 8, 4096])
    else:
        where[key] = node(rng)
    return document


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(changed) + 1)
        action = rng.randrange(4)
        if action == 0 and at < len(changed):
            changed[at] = rng.randrange(256)
        elif action == 1:
            changed[at:at] = rng.randbytes(rng.randrange(1, 9))
        elif action == 2:
            del changed[at : at + rng.randrange(1, 40)]
        else:
            begin = rng.randrange(len(changed) + 1)
            changed[at:at] = changed[begin : begin + rng.randrange(1, 40)]
    return bytes(changed)


TOKENS = re.compile(rb'"(?:[^"\\\\]|\\\\.)*"|-?[0-9][0-9.eE+-]*|true|false|null|[][{},:]')
FRAGMENTS = [
    json.dumps(node(random.Random(number)), ensure_ascii=False).encode("utf-8", "surrogatepass")
    for number in range(800)
]
MANIFEST_BODY = VALID_MANIFEST.rpartition(b',"digest"')[0]
MANIFEST_TOKENS = [match.span() for match in TOKENS.finditer(MANIFEST_BODY)]
HEADER_TEXT = VALID_HEADER[8:].rstrip()
HEADER_TOKENS = [match.span() for match in TOKENS.finditer(HEADER_TEXT)]


def mutate_tokens(text: bytes, tokens: list[tuple[int, int]], rng: random.Random) -> bytes:
    """Other JSON in place of some tokens: much faster than change(), and less wild."""
    for begin, end in sorted(rng.sample(tokens, rng.choice([1, 1, 1, 2, 3])), reverse=True):
        other = rng.choice(FRAGMENTS)
        if rng.random() < 0.3:
            begin_of, end_of = rng.choice(tokens)
            other = text[begin_of:end_of]
        text = text[:begin] + other + text[end:]
    return text


def manifest_input(rng: random.Random) -> bytes:
    kind = rng.random()
    if kind < 0.1:
        return mutate_bytes(VALID_MANIFEST, rng)
    if kind < 0.8:
        data = mutate_tokens(MANIFEST_BODY, MANIFEST_TOKENS, rng)
        return data + f',"digest":"{text_digest(data)}"}}\n'.encode()
    document = json.loads(VALID_MANIFEST)
    for _ in range(rng.choice([1, 1, 1, 2, 3, 6])):
        document = change(document, rng)
    return seal(document)


def header_input(rng: random.Random) -> bytes:
    kind = rng.random()
    if kind < 0.2:
        return mutate_bytes(VALID_HEADER, rng)
    if kind < 0.7:
        text = mutate_tokens(HEADER_TEXT, HEADER_TOKENS, rng).ljust(len(VALID_HEADER) - 8)
        return struct.pack("<Q", len(text)) + text
    document = json.loads(VALID_HEADER[8:])
    for _ in range(rng.choice([1, 1, 2, 4])):
        document = change(document, rng)
    return pack_header(document)


TARGETS: dict[str, tuple[Callable[[bytes], None], Callable[[random.Random], bytes], bytes]] = {
    "manifest": (parse_manifest, manifest_input, VALID_MANIFEST),
    "large": (parse_large, manifest_input, VALID_MANIFEST),
    "header": (parse_shard, header_input, VALID_HEADER),
}


def attempt(parse: Callable[[bytes], None], data: bytes) -> bool:
    """Whether the input is accepted. Raises AssertionError if another error than ShardckptError
    escapes, or if it takes too long."""
    begun = time.process_time()
    try:
        parse(data)
        accepted = True
    except ShardckptError:
        accepted = False
    except Exception as error:
        raise AssertionError(f"{type(error).__name__}: {error}\nfor {data!r}"[:5000]) from error
    took_s = time.process_time() - begun
    assert took_s < SLOWEST_S, f"{took_s:.1f} s for {data[:500]!r}"
    return accepted


def trial_of(target: str, seed: int) -> int:
    parse, make, valid = TARGETS[target]
    rng = random.Random(f"{target} {seed}")
    assert attempt(parse, valid)
    for _ in range(INPUTS_A_TRIAL):
        attempt(parse, make(rng))
    return INPUTS_A_TRIAL


def manifest_trial(seed: int) -> int:
    """Inputs for the parser of manifests."""
    return trial_of("manifest", seed)


def large_trial(seed: int) -> int:
    """Inputs for ranks that parse a large manifest together."""
    return trial_of("large", seed)


def header_trial(seed: int) -> int:
    """Inputs for the parser of shard headers."""
    return trial_of("header", seed)


class Drawn(random.Random):
    """Random numbers that are bytes of an input, and others after it: an input with a byte changed
    is a document with a change changed."""

    def __init__(self, data: bytes) -> None:
        super().__init__(0)
        self.data = data

    def getrandbits(self, bits: int) -> int:
        count = -(-bits // 8)
        if len(self.data) < count:
            return super().getrandbits(bits)
        taken, self.data = self.data[:count], self.data[count:]
        return int.from_bytes(taken, "little") & ((1 << bits) - 1)

    def random(self) -> float:
        return self.getrandbits(16) / (1 << 16)


def main() -> None:
    """Let atheris choose the inputs, by what they make the parsers do."""
    import atheris

    target, runs, seed = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    parse, make, _ = TARGETS[target]
    for module in (manifest, divided, number_lists, shard, values, boxes, rules):
        for name, function in inspect.getmembers(module, inspect.isfunction):
            if function.__module__ == module.__name__:
                setattr(module, name, atheris.instrument_func(function))

    def one(data: bytes) -> None:
        # Most bytes are not JSON. They choose the changes to a valid document instead.
        attempt(parse, data[1:] if data[:1] < b"\x20" else make(Drawn(data)))

    options = [f"-runs={runs}", f"-seed={seed}", "-max_len=4096", "-rss_limit_mb=2000"]
    atheris.Setup([sys.argv[0], *options], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
