"""Checkpoints that someone made to do harm: one rule of the format broken in each, by somebody who
knows the format and gives every digest its right value."""

from __future__ import annotations

import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import shardckpt
from shardckpt.format.digests import BLOCK_BYTES, block_digest, text_digest

SHARD = "shard-00000-of-00001.safetensors"
MANIFEST = "manifest.json"
STATE = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(5, dtype=torch.int8), "n": 1}

Document = dict[str, Any]


def seal(document: Document) -> bytes:
    """A manifest with a digest that fits."""
    members = {key: value for key, value in document.items() if key != "digest"}
    body = json.dumps(members, separators=(",", ":"), ensure_ascii=False)[:-1]
    return seal_text(body)


def seal_text(body: str) -> bytes:
    data = body.encode("utf-8", "surrogatepass")
    return data + f',"digest":"{text_digest(data)}"}}\n'.encode()


def reseal_shard(folder: Path, data: bytes) -> None:
    """A shard with these bytes, and a manifest whose size and digests fit it."""
    (folder / SHARD).write_bytes(data)
    document = json.loads((folder / MANIFEST).read_bytes())
    blocks = [data[low : low + BLOCK_BYTES] for low in range(0, len(data), BLOCK_BYTES)]
    digests = "".join(f"{block_digest(block):016x}" for block in blocks)
    document["shards"][0].update(size=len(data), digests=digests)
    (folder / MANIFEST).write_bytes(seal(document))


Attack = Callable[[Path], None]


def manifest(change: Callable[[Document], Any]) -> Attack:
    def attack(folder: Path) -> None:
        document = json.loads((folder / MANIFEST).read_bytes())
        change(document)
        (folder / MANIFEST).write_bytes(seal(document))

    return attack


def manifest_text(change: Callable[[str], str]) -> Attack:
    """Changes to the text of the manifest, before it is sealed."""

    def attack(folder: Path) -> None:
        body = (folder / MANIFEST).read_text().rpartition(',"digest"')[0]
        changed = change(body)
        assert changed != body
        (folder / MANIFEST).write_bytes(seal_text(changed))

    return attack


def raw(data: bytes, name: str = MANIFEST) -> Attack:
    return lambda folder: (folder / name).write_bytes(data) and None


def header(change: Callable[[dict[str, Any]], Any]) -> Attack:
    """Changes to the header of the shard, which keeps its length."""

    def attack(folder: Path) -> None:
        data = (folder / SHARD).read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        found = json.loads(data[8 : 8 + length])
        found = change(found) or found
        header_text(json.dumps(found))(folder)

    return attack


def header_text(text: str) -> Attack:
    def attack(folder: Path) -> None:
        data = (folder / SHARD).read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        new = text.encode().ljust(length)
        reseal_shard(folder, struct.pack("<Q", len(new)) + new + data[8 + length :])

    return attack


def header_length(length: int) -> Attack:
    def attack(folder: Path) -> None:
        reseal_shard(folder, struct.pack("<Q", length) + (folder / SHARD).read_bytes()[8:])

    return attack


def instead(name: str, make: Callable[[Path], Any]) -> Attack:
    """Something else in place of a file."""

    def attack(folder: Path) -> None:
        os.rename(folder / name, folder.parent / f"{folder.name}-{name}")
        make(folder / name)

    return attack


class Evil:
    """The code that a pickle would run."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch shardckpt-was-here",)


def shard(**facts: Any) -> Attack:
    return manifest(lambda d: d["shards"][0].update(facts))


def tensor(**facts: Any) -> Attack:
    return manifest(lambda d: d["tensors"]["a"].update(facts))


def value(node: Any) -> Attack:
    return manifest(lambda d: d["state"].update(n=node))


def deep(count: int) -> str:
    return "[" * count + "]" * count


EQUAL_HASHES = [{"$int": str(((1 << 61) - 1) * number)} for number in range(1, 10_000)]
ROW = [0, 4096, 4120, 0, 0, 2, 3]  # shard, begin, end, offsets, sizes of "a"
PAIR = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'

ATTACKS: dict[str, Attack] = {
    # Names of files.
    "parent directory": shard(name="../" + SHARD),
    "absolute name": shard(name="/etc/passwd"),
    "nul in a name": shard(name=SHARD + "\0"),
    "name of a device": shard(name="/dev/zero"),
    "name of the manifest": shard(name=MANIFEST),
    "name in another directory": shard(name="x/" + SHARD),
    "the same shard twice": manifest(lambda d: d["shards"].append(d["shards"][0])),
    "a very long name": shard(name="shard-" + "0" * 5000 + "-of-00001.safetensors"),
    # Other things in place of a file.
    "shard is a symlink": instead(
        SHARD, lambda path: path.symlink_to(f"../{path.parent.name}-{SHARD}")
    ),
    "shard is a fifo": instead(SHARD, os.mkfifo),
    "shard is a directory": instead(SHARD, os.mkdir),
    "shard is a symlink to a device": instead(SHARD, lambda path: path.symlink_to("/dev/zero")),
    "manifest is a symlink": instead(
        MANIFEST, lambda path: path.symlink_to(f"../{path.parent.name}-{MANIFEST}")
    ),
    "manifest is a fifo": instead(MANIFEST, os.mkfifo),
    "manifest is a directory": instead(MANIFEST, os.mkdir),
    "manifest is a device": instead(MANIFEST, lambda path: path.symlink_to("/dev/zero")),
    "sparse manifest of 3 GiB": lambda folder: os.truncate(folder / MANIFEST, 3 << 30),
    "sparse shard of 1 TiB": lambda folder: os.truncate(folder / SHARD, 1 << 40),
    # Numbers.
    "offsets of 2**63": tensor(chunks=[0, 2**63, 2**63 + 24, 0, 0, 2, 3]),
    "offsets of 2**64": tensor(chunks=[0, 2**64, 2**64 + 24, 0, 0, 2, 3]),
    "negative offsets": tensor(chunks=[0, -24, 0, 0, 0, 2, 3]),
    "box at 2**63 - 1": tensor(chunks=[0, 4096, 4120, 2**63 - 1, 0, 2, 3]),
    "shape overflow": tensor(shape=[1 << 33, 1 << 33]),
    "shape of 2**63": tensor(shape=[2**63, 1]),
    "negative shape": tensor(shape=[-2, -3]),
    "a tensor of 1 EiB": tensor(shape=[1 << 58], chunks=[0, 4096, 4120, 0, 1 << 58]),
    "size of 1 EiB": shard(size=1 << 60),
    "size of 1 TiB with digests cut": shard(size=1 << 40),
    "negative size": shard(size=-1),
    "NaN where an int belongs": manifest_text(
        lambda t: t.replace('"world_size":1', '"world_size":NaN')
    ),
    "a float where an int belongs": manifest_text(
        lambda t: t.replace('"world_size":1', '"world_size":1.0')
    ),
    "world size of 0": manifest(lambda d: d.update(world_size=0)),
    "an int of a million digits": manifest_text(
        lambda t: t.replace('"world_size":1', '"world_size":1' + "0" * 1_000_000)
    ),
    "a typed int of a million digits": value({"$int": "9" * 1_000_000}),
    # Boxes and bytes.
    "overlap of boxes": tensor(chunks=[*ROW, 0, 4120, 4132, 1, 0, 1, 3]),
    "hole between boxes": tensor(chunks=[0, 4096, 4108, 0, 0, 1, 3]),
    "bytes shared by two tensors": manifest(
        lambda d: d["tensors"]["b"].update(chunks=[0, 4096, 4101, 0, 5])
    ),
    "bytes beyond the file": tensor(chunks=[0, 1 << 40, (1 << 40) + 24, 0, 0, 2, 3]),
    "shard number out of range": tensor(chunks=[7, *ROW[1:]]),
    "65 dimensions": tensor(shape=[1] * 65, chunks=[]),
    # JSON.
    "a key twice": manifest_text(
        lambda t: t.replace('{"format"', '{"format":"shardckpt","format"')
    ),
    "an unknown member": manifest_text(lambda t: t + ',"run":"this"'),
    "100,000 levels": manifest_text(lambda t: t.replace('"n":1', f'"n":{deep(100_000)}')),
    "1,000 levels": manifest_text(lambda t: t.replace('"n":1', f'"n":{deep(1000)}')),
    "no JSON": raw(b"\x80\x04"),
    "nothing": raw(b""),
    "only zeros": raw(bytes(4096)),
    "no UTF-8": manifest_text(lambda t: t.replace('"library":"', '"library":"\ud800')),
    "a newer version": manifest(lambda d: d.update(version=99)),
    "version 0": manifest(lambda d: d.update(version=0)),
    # Values.
    "100,000 values of each rank, and one more reference": manifest(
        lambda d: d.update(
            state={"n": [{"$per_rank": str(index)} for index in range(100_001)]},
            per_rank=[[None] * 100_000],
        )
    ),
    "a reference to no rank's value": manifest(
        lambda d: d.update(state={"n": {"$per_rank": "01"}}, per_rank=[[1, 2]])
    ),
    "values of a rank that are no list": manifest(
        lambda d: d.update(state={"n": {"$per_rank": "0"}}, per_rank=[{"0": 1}])
    ),
    "a reference to nothing": value({"$tensor": "nothing"}),
    "an unknown tag": value({"$call": ["os", "system", "true"]}),
    "an enum of a module not imported": value({"$enum": ["antigravity", "Open", "UP"]}),
    "an enum that is a function": value({"$enum": ["os", "system", "x"]}),
    "an enum through a module's module": value({"$enum": ["os", "path.os.system", "x"]}),
    "a numpy scalar of objects": value({"$numpy": ["|O8", "AAAAAAAAAAA="]}),
    "a dtype that is a function": value({"$dtype": "load"}),
    "a dtype that torch would import": value({"$dtype": "onnx"}),
    "a layout that torch would import": value({"$layout": "_inductor"}),
    "a set of ints that have one hash": value({"$set": EQUAL_HASHES}),
    "keys that have one hash": value({"$dict": [[key, 0] for key in EQUAL_HASHES]}),
    "keys that are tuples of one hash": value(
        {"$dict": [[{"$tuple": [k]}, 0] for k in EQUAL_HASHES]}
    ),
    "a counter of keys that have one hash": value({"$counter": [[key, 0] for key in EQUAL_HASHES]}),
    "an enum that is a proxy": value({"$enum": ["tests.faults.hostile_child", "proxy", "x"]}),
    "a set of lists": value({"$set": [[1]]}),
    "a tag with another key": value({"$int": "1", "x": 1}),
    "a huge range is no work, a bad one is refused": value({"$range": [0, 1, 0]}),
    # Pickle bytes.
    "pickle as manifest": raw(pickle.dumps(Evil())),
    "torch file as shard": lambda folder: torch.save(Evil(), folder / SHARD),
}
"""The cases that load_state and verify must refuse. verify accepts an enum of an absent class."""

HEADERS: dict[str, Attack] = {
    "pickle as shard": lambda folder: reseal_shard(folder, pickle.dumps(Evil()).ljust(4200)),
    "a header of 1 GB": header_length(1 << 30),
    "a header of 2**64 - 1": header_length((1 << 64) - 1),
    "a header of 0": header_length(0),
    "a header that does not begin with a brace": header_text(" {}"),
    "a header that is an array": header_text("[]"),
    "a header that is no JSON": header_text("{oops"),
    "a tensor twice": header_text(f'{{"a":{PAIR},"a":{PAIR}}}'),
    "offsets not from 0": header(lambda h: h["a"].update(data_offsets=[8, 32])),
    "offsets backwards": header(lambda h: h["a"].update(data_offsets=[24, 0])),
    "offsets with a hole": header(lambda h: h["b"].update(data_offsets=[25, 30])),
    "offsets that overlap": header(lambda h: h["b"].update(data_offsets=[0, 5])),
    "offsets of 2**63 in a header": header(lambda h: h["a"].update(data_offsets=[0, 2**63])),
    "a shape that overflows in a header": header(lambda h: h["a"].update(shape=[2**62, 2**62])),
    "an unknown dtype in a header": header(lambda h: h["a"].update(dtype="PICKLE")),
    "metadata that is no text": header(lambda h: h.update(__metadata__={"a": 1})),
    "an unknown member in a header": header(lambda h: h["a"].update(run="this")),
    "100,000 levels in a header": header_text(deep(2000)),
    "another tensor's name in a header": header(lambda h: {**h, "c": h["b"]}),
    "NaN in a header": header_text('{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}'),
}
"""The cases that verify must refuse. A load reads no header, and accepts any bytes with the right
digest."""


def build(folder: Path, attack: Attack | None) -> Path:
    """A checkpoint, attacked."""
    shardckpt.save(STATE, folder)
    if attack is not None:
        attack(folder)
    return folder
