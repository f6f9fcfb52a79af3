"""Files of other formats that someone made to do harm. Each attack makes something in a folder of
its own, and returns the path to be opened."""

from __future__ import annotations

import functools
import io
import json
import os
import pickle
import shutil
import socket
import struct
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

from shardckpt.convert.single_files import DIGEST, TREE, write_many, write_one
from tests.faults.hostile import Evil

Attack = Callable[[Path], Path]
STATE = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(5, dtype=torch.int8)}


def lone(name: str) -> Attack:
    def make(folder: Path) -> Path:
        write_one(STATE, str(folder / name), overwrite=False)
        return folder / name

    return make


def components(file_format: Any) -> Attack:
    def make(folder: Path) -> Path:
        write_many(STATE, str(folder / "parts"), file_format, overwrite=False)
        return folder / "parts"

    return make


@functools.cache
def dcp_files() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        dcp.save({"a": STATE["a"], "n": 1}, checkpoint_id=folder)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def dcp_folder(folder: Path) -> Path:
    made = folder / "dcp"
    made.mkdir(exist_ok=True)
    for file_name, data in dcp_files().items():
        (made / file_name).write_bytes(data)
    return made


def hub(folder: Path) -> Path:
    """As the hub's cache has it: links to blobs."""
    made, blobs = folder / "models--x/snapshots/rev", folder / "models--x/blobs"
    made.mkdir(parents=True)
    blobs.mkdir()
    save_file(STATE, blobs / "0")
    (made / "model.safetensors").symlink_to("../../blobs/0")
    return made


def torchsnapshot(folder: Path) -> Path:
    written = Path(__file__).parent.parent / "convert" / "made_by" / "torchsnapshot-0.1.0"
    return Path(shutil.copytree(written, folder / "torchsnapshot", dirs_exist_ok=True))


def torch_checkpointing(name: str) -> Attack:
    def make(folder: Path) -> Path:
        written = Path(__file__).parent.parent / "convert" / "made_by" / "torch_checkpointing-0.1.1"
        ignore = shutil.ignore_patterns("expected.pt")
        made = folder / "torch_checkpointing"
        return Path(shutil.copytree(written / name, made, dirs_exist_ok=True, ignore=ignore))

    return make


def hugging_face(folder: Path) -> Path:
    made = folder / "hf"
    made.mkdir()
    save_file(STATE, made / "model-00001-of-00001.safetensors")
    places = dict.fromkeys(STATE, "model-00001-of-00001.safetensors")
    (made / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return made


GOOD: dict[str, Attack] = {
    "pth": lone("x.pth"),
    "pt": lone("x.pt"),
    "safetensors": lone("x.safetensors"),
    "components": components("torch"),
    "safetensors components": components("safetensors"),
    "dcp": dcp_folder,
    "hub": hub,
    "hugging face": hugging_face,
    "torchsnapshot": torchsnapshot,
    "torch_checkpointing": torch_checkpointing("fsdp2"),
    "torch_checkpointing, safetensors": torch_checkpointing("mixed"),
}


# Something else in place of a file.


def to_socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # its name has 107 bytes at most
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path.name)
    os.chdir(here)


def sparse(size_bytes: int) -> Callable[[Path], Any]:
    def make(path: Path) -> None:
        path.write_bytes(b"")
        os.truncate(path, size_bytes)

    return make


KINDS: dict[str, Callable[[Path], Any]] = {
    "a pipe": os.mkfifo,
    "a directory": os.mkdir,
    "a socket": to_socket,
    "a link to /dev/zero": lambda path: path.symlink_to("/dev/zero"),
    "a terabyte of nothing": sparse(1 << 40),
    "empty": sparse(0),
}
PLACES: dict[str, tuple[str, str]] = {
    "a torch file": ("pth", ""),
    "a .pt file": ("pt", ""),
    "a safetensors file": ("safetensors", ""),
    "components.json": ("components", "components.json"),
    "a component": ("components", "a.pth"),
    "a safetensors component": ("safetensors components", "a.safetensors"),
    ".metadata": ("dcp", ".metadata"),
    "a data file of DCP": ("dcp", "__0_0.distcp"),
    "the hub's link": ("hub", "model.safetensors"),
    ".snapshot_metadata": ("torchsnapshot", ".snapshot_metadata"),
    "a torch file of torchsnapshot": ("torchsnapshot", "0/progress/pair"),
    "metadata.pkl": ("torch_checkpointing", "metadata.pkl"),
    "a file of a rank": ("torch_checkpointing", "model_1.pt"),
    "a safetensors file of a rank": (
        "torch_checkpointing, safetensors",
        "rank_1/model.safetensors",
    ),
    "an index of Hugging Face": ("hugging face", "model.safetensors.index.json"),
    "a file of Hugging Face": ("hugging face", "model-00001-of-00001.safetensors"),
}


def instead(good: str, name: str, kind: Callable[[Path], Any]) -> Attack:
    def make(folder: Path) -> Path:
        made = GOOD[good](folder)
        (made / name if name else made).unlink()
        kind(made / name if name else made)
        return made

    return make


def linked_out(good: str, name: str) -> Attack:
    """A good file, to which a link leads out of the checkpoint."""

    def make(folder: Path) -> Path:
        made = GOOD[good](folder)
        (made / name).rename(folder / "elsewhere")
        (made / name).symlink_to("../elsewhere")
        return made

    return make


# Pickles.


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def name(module: str, qualname: str) -> bytes:
    return f"c{module}\n{qualname}\n".encode()


def call(module: str, qualname: str, arguments: bytes) -> bytes:
    return name(module, qualname) + b"(" + arguments + b"tR"


def state(value: bytes) -> bytes:
    """The pickle of a dict with this value."""
    return b"\x80\x02}" + text("a") + value + b"s."


def whole(number: int) -> bytes:
    return b"\x8a\x0a" + number.to_bytes(10, "little", signed=True)


STORAGE = (
    b"(" + text("storage") + name("torch", "FloatStorage") + text("0") + text("cpu") + b"K\x06tQ"
)
HOOKS = name("collections", "OrderedDict") + b")R"


def tensor(offset: int, size: list[int], stride: list[int], storage: bytes = STORAGE) -> bytes:
    shape, steps = (b"(" + b"".join(map(whole, n)) + b"t" for n in (size, stride))
    arguments = storage + whole(offset) + shape + steps + b"\x89" + HOOKS
    return call("torch._utils", "_rebuild_tensor_v2", arguments)


def laughs() -> bytes:
    """A list of a list twice of a list twice, and so on."""
    lists = b"]q\x00"
    for i in range(40):
        lists += b"](h%ch%ceq%c" % (i, i, i + 1)
    return state(b"](" + lists + b"e")


PICKLES: dict[str, bytes] = {
    "runs a command": pickle.dumps(Evil(), protocol=2),
    "runs a command, protocol 0": pickle.dumps(Evil(), protocol=0),
    "runs a command, protocol 4": pickle.dumps({"a": Evil()}, protocol=4),
    "runs eval": state(call("builtins", "eval", text("1"))),
    "a memo index of 2**31": b"\x80\x02Nr\xff\xff\xff\x7f.",
    "a memo index of 2**24": b"\x80\x02Nr\x00\x00\x00\x01.",
    "bytes of 1 TB": b"\x80\x04\x8e" + struct.pack("<Q", 10**12) + b"x.",
    "text of 1 TB": b"\x80\x04\x8d" + struct.pack("<Q", 10**12) + b"x.",
    "a bytearray of 1 TB": b"\x80\x05\x96" + struct.pack("<Q", 10**12) + b"x.",
    "text of 4 GB": b"\x80\x02X\xff\xff\xff\xffx.",
    "a frame of 1 TB": b"\x80\x04\x95" + struct.pack("<Q", 10**12) + b"N.",
    "3,000,000 marks": b"\x80\x02" + b"(" * 3_000_000 + b"t.",
    "a class of copyreg's registry": b"\x80\x02\x82\x01.",
    "a persistent id as text": b"\x80\x02Pos.system\n.",
    "an instance in text": b"\x80\x02(ios\nsystem\n.",
    "an int of a million digits": b"\x80\x02L" + b"9" * 1_000_000 + b"L\n.",
    "a name without an end": b"\x80\x02c" + b"x" * 100_000,
    "an empty stack": b"\x80\x020000.",
    "nothing in the memo": b"\x80\x02h\x07.",
    "out-of-band data": b"\x80\x05\x97.",
    "100,000 levels": b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
    "a list in itself": state(b"]q\x00h\x00a"),
    "2**40 shared lists": laughs(),
    "bytes after the end": state(b"N") + b"N.",
    "cut": state(b"N")[:-1],
    "200,000 names of classes": state(
        b"](" + b"".join(b"ca%d\nb\n" % number for number in range(200_000)) + b"e"
    ),
    "keys that have one hash": state(
        b"}(" + b"".join(whole(((1 << 61) - 1) * n) + b"N" for n in range(1, 30_000)) + b"u"
    ),
    "no dict": b"\x80\x02K\x01.",
}


def of_storage(old: bytes, new: bytes) -> bytes:
    return state(tensor(0, [1], [1], STORAGE.replace(old, new)))


TORCH_PICKLES: dict[str, bytes] = {
    "a bytearray of 1 TiB": state(call("builtins", "bytearray", whole(1 << 40))),
    "a bytearray through torch": state(
        call("torch._tensor", "_rebuild_from_type_v2", name("builtins", "bytearray")
             + name("torch", "Tensor") + b"(" + whole(1 << 40) + b"tN")
    ),
    "a tensor of 4 TiB without data": state(call("torch", "FloatTensor", whole(1 << 40))),
    "a storage of 1 TiB without data": state(call("torch", "FloatStorage", whole(1 << 40))),
    "text in a codec": state(call("_codecs", "encode", text("x" * 100) + text("punycode"))),
    "a nested tensor beyond its data": state(
        call("torch._utils", "_rebuild_nested_tensor", STORAGE * 4)
    ),
    "a wrapper": state(call("torch._utils", "_rebuild_wrapper_subclass", STORAGE * 8)),
    "a tensor of 4 TB, expanded": state(tensor(0, [10**6, 10**6], [0, 0])),
    "a tensor beyond its storage": state(tensor(0, [7], [1])),
    "an offset beyond its storage": state(tensor(1 << 40, [1], [1])),
    "a negative offset": state(tensor(-1, [1], [1])),
    "a negative stride": state(tensor(5, [3], [-1])),
    "a negative size": state(tensor(0, [-1], [1])),
    "a shape that overflows": state(tensor(0, [1 << 62, 1 << 62], [0, 0])),
    "strides that overflow": state(tensor(0, [2, 2], [1 << 62, 1 << 62])),
    "a storage of a terabyte": of_storage(b"K\x06", whole(1 << 38)),
    "a storage that is not there": of_storage(text("0"), text("9")),
    "a storage elsewhere": of_storage(text("0"), text("../x")),
    "another persistent id": state(b"K\x07Q"),
    "a tensor with another storage": state(tensor(0, [1], [1]) + b"(" + STORAGE + b"K\x00tb"),
    "a parameter of a storage": state(
        call("torch._utils", "_rebuild_parameter", STORAGE + b"\x89" + HOOKS)
    ),
}  # fmt: skip


def archive(pickled: bytes, *, kind: int = zipfile.ZIP_STORED, **more: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", kind) as made:
        for entry, data in {
            "data.pkl": pickled,
            "data/0": bytes(24),
            "version": b"3\n",
            **more,
        }.items():
            made.writestr(f"x/{entry}", data)
    return file.getvalue()


def raw(file_name: str, make: Callable[[], bytes] | bytes) -> Attack:
    def attack(folder: Path) -> Path:
        (folder / file_name).write_bytes(make if isinstance(make, bytes) else make())
        return folder / file_name

    return attack


def with_metadata(pickled: bytes) -> Attack:
    def attack(folder: Path) -> Path:
        (dcp_folder(folder) / ".metadata").write_bytes(pickled)
        return folder / "dcp"

    return attack


GOOD_ZIP = archive(state(tensor(0, [6], [1])))


def legacy(pickled: bytes) -> bytes:
    file = io.BytesIO()
    torch.save({}, file, _use_new_zipfile_serialization=False)
    system = file.getvalue().rpartition(b"\x80\x02}q\x00.")[0]
    return system + pickled + b"\x80\x02]X\x01\x00\x00\x000a." + struct.pack("<q", 6) + bytes(24)


LEGACY_STORAGE = STORAGE.replace(b"K\x06tQ", b"K\x06NtQ")


def old(pickled: bytes) -> bytes:
    return legacy(pickled.replace(STORAGE, LEGACY_STORAGE))


TORCH_FILES: dict[str, Callable[[], bytes] | bytes] = {
    "records that inflate to 256 MB": lambda: archive(
        state(tensor(0, [6], [1])), kind=zipfile.ZIP_DEFLATED, **{"data/1": bytes(1 << 28)}
    ),
    "a pickle that inflates": lambda: archive(bytes(1 << 26), kind=zipfile.ZIP_DEFLATED),
    "a zip with a comment": GOOD_ZIP[:-2] + b"\x04\x00zip!",
    "bytes before the zip": b"PK\x03\x04" + GOOD_ZIP,
    "bytes after the zip": GOOD_ZIP + bytes(100),
    "a zip that is cut": GOOD_ZIP[:-30],
    "a directory of a zip that lies elsewhere": GOOD_ZIP[:-6] + struct.pack("<IH", 1 << 31, 0),
    "a zip without a pickle": archive(b"").replace(b"data.pkl", b"data.pkx"),
    "a pickle twice, by case": archive(state(b"N"), **{"DATA.pkl": state(b"N")}),
    "old: a tensor of 4 TiB": old(state(tensor(0, [1 << 40], [0]))),
    "old: a storage of 1 TiB": old(
        state(tensor(0, [1], [1], LEGACY_STORAGE.replace(b"K\x06", whole(1 << 38))))
    ),
    "old: a tensor that grows its storage": old(state(tensor(0, [1 << 28], [1]))),
    "old: a command": old(pickle.dumps(Evil(), protocol=2)),
    "old: a bytearray of 1 TiB": old(state(call("builtins", "bytearray", whole(1 << 40)))),
    "old: a memo index of 2**31": old(b"\x80\x02Nr\xff\xff\xff\x7f."),
    "old: cut": old(state(b"N"))[:60],
    "a tar file": b"x".ljust(257, b"\0") + b"ustar\0" + bytes(1000),
    "text": b"import os; os.system('touch shardckpt-was-here')\n",
}  # fmt: skip


# safetensors.


def st_file(header: Any, data: bytes = bytes(16), *, length: int | None = None) -> Attack:
    written = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = struct.pack("<Q", len(written) if length is None else length)
    return raw("x.safetensors", size + written + data)


def sealed(old: bytes, new: bytes) -> Attack:
    """A file of ours, with bytes that are others."""

    def attack(folder: Path) -> Path:
        path = lone("x.safetensors")(folder)
        data = path.read_bytes()
        assert old in data
        path.write_bytes(data.replace(old, new, 1))
        return path

    return attack


def flipped(key: str, at: int, bit: int) -> Attack:
    changed = bytearray(key.encode())
    changed[at] ^= 1 << bit
    return sealed(key.encode(), bytes(changed))


PAIR = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
SEALED = {"shardckpt.digest": "0" * 32}
SAFETENSORS: dict[str, Attack] = {
    "a header of 1 TB": st_file({}, length=1 << 40),
    "a header of 2**64 - 1": st_file({}, length=(1 << 64) - 1),
    "a header of 0 bytes": st_file({}, length=0),
    "a key twice": st_file(b'{"a":%s,"a":%s}' % ((json.dumps(PAIR).encode(),) * 2)),
    "metadata twice": st_file(b'{"__metadata__":{"a":"b","a":"c"}}', b""),
    "tensors that overlap": st_file({"a": PAIR, "b": PAIR}),
    "a hole": st_file({"a": {**PAIR, "shape": [3], "data_offsets": [4, 16]}}),
    "a shape that overflows": st_file({"a": {**PAIR, "shape": [1 << 62, 1 << 62]}}),
    "a shape of 2**64": st_file({"a": {**PAIR, "shape": [1 << 64]}}),
    "a negative shape": st_file({"a": {**PAIR, "shape": [-4]}}),
    "an unknown dtype": st_file({"a": {**PAIR, "dtype": "PICKLE"}}),
    "metadata of numbers": st_file({"__metadata__": {"a": 1}, "a": PAIR}),
    "metadata that is a list": st_file({"__metadata__": [], "a": PAIR}),
    "a header that is a list": st_file(b"[]"),
    "a header of 100,000 levels": st_file(b'{"a":' * 100_000),
    "a header that is not text": st_file(b"{\xff\xff}"),
    "bytes after the data": st_file({"a": PAIR}, bytes(17)),
    "a tree of a tensor that is not there": st_file(
        {"__metadata__": {TREE: '{"x":{"$tensor":"no"}}', **SEALED}, "a": PAIR}
    ),
    "a tree of 100,000 levels": st_file(
        {"__metadata__": {TREE: "[" * 100_000 + "]" * 100_000, **SEALED}, "a": PAIR}
    ),
    "a tree that is not JSON": st_file({"__metadata__": {TREE: "{", **SEALED}, "a": PAIR}),
    "a tree with a call": st_file(
        {"__metadata__": {TREE: '{"x":{"$call":["os","system"]}}', **SEALED}, "a": PAIR}
    ),
    "a digest that is not there": st_file({"__metadata__": {TREE: "{}"}, "a": PAIR}),
    "a tree that is not there": st_file({"__metadata__": SEALED, "a": PAIR}),
    "a digest of another file": sealed(b"shardckpt.digest\":\"", b"shardckpt.digest\":\"f"),
    "data of another file": sealed(struct.pack("<f", 5.0), struct.pack("<f", 6.0)),
    **{
        f"bit {bit} of character {at} of {key}": flipped(key, at, bit)
        for key in (TREE, DIGEST)
        for at, bit in ((0, 0), (5, 4), (9, 2), (len(key) - 1, 0))
    },
}  # fmt: skip


# DCP.


def dcp_with(change: Callable[[Any], Any], path: str | None = None, **place: Any) -> Attack:
    """Changes to DCP's metadata of the tensor "a"."""

    def attack(folder: Path) -> Path:
        made = dcp_folder(folder)
        metadata = pickle.loads((made / ".metadata").read_bytes())
        for index, info in list(metadata.storage_data.items()):
            if index.fqn == "a":
                facts = {"offset": info.offset, "length": info.length, **place}
                name = path if path is not None else info.relative_path
                metadata.storage_data[index] = _StorageInfo(name, **facts)
        change(metadata)
        (made / ".metadata").write_bytes(pickle.dumps(metadata))
        return made

    return attack


def nothing(metadata: Any) -> None:
    pass


def entry(**facts: Any) -> Callable[[Any], Any]:
    return lambda metadata: metadata.state_dict_metadata["a"].__dict__.update(facts)


def chunk(offsets: Any, sizes: Any) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(offsets, sizes)


HUGE = torch.Size([10**12])
DCP: dict[str, Attack] = {
    "a path with ../": dcp_with(nothing, "../secret.distcp"),
    "an absolute path": dcp_with(nothing, "/etc/passwd"),
    "an empty path": dcp_with(nothing, ""),
    "the path ..": dcp_with(nothing, ".."),
    "a path with NUL": dcp_with(nothing, "x\0"),
    "a path in a folder": dcp_with(nothing, "x/__0_0.distcp"),
    "a file that is not there": dcp_with(nothing, "__9_9.distcp"),
    "a data file that is a link": linked_out("dcp", "__0_0.distcp"),
    "metadata that is a link": linked_out("dcp", ".metadata"),
    "a negative offset": dcp_with(nothing, offset=-5),
    "a length of 1e15": dcp_with(nothing, length=10**15),
    "a negative length": dcp_with(nothing, length=-1),
    "an offset that is text": dcp_with(nothing, offset="0"),
    "4 TB in no chunk": dcp_with(entry(size=HUGE, chunks=[])),
    "4 TB in a chunk": dcp_with(entry(size=HUGE, chunks=[chunk(torch.Size([0]), HUGE)])),
    "a hole": dcp_with(entry(size=torch.Size([2, 4]))),
    "chunks that overlap": dcp_with(
        entry(chunks=[chunk(torch.Size([0, 0]), torch.Size([2, 3]))] * 2)
    ),
    "chunks of other dimensions": dcp_with(
        entry(chunks=[chunk(torch.Size([0]), torch.Size([6]))])
    ),
    "a negative box": dcp_with(entry(chunks=[chunk(torch.Size([-1, 0]), torch.Size([3, 3]))])),
    "a box at 2**63 - 1": dcp_with(
        entry(chunks=[chunk(torch.Size([2**63 - 1, 0]), torch.Size([2, 3]))])
    ),
    "chunks that are text": dcp_with(entry(chunks="ab")),
    "a size that is text": dcp_with(entry(size="ab")),
    "65 dimensions": dcp_with(entry(size=torch.Size([1] * 65), chunks=[])),
    "no properties": dcp_with(entry(properties=None)),
    "no data": dcp_with(lambda metadata: metadata.storage_data.clear()),
    "storage data that is a list": dcp_with(lambda metadata: setattr(metadata, "storage_data", [])),
    "entries that are a list": dcp_with(lambda m: setattr(m, "state_dict_metadata", [])),
    "paths that are numbers": dcp_with(lambda m: setattr(m, "planner_data", {"a": 1})),
    "a class that is changed": with_metadata(
        b"\x80\x02" + name("torch.distributed.checkpoint.metadata", "Metadata")
        + b"N}" + text("hole") + b"K\x01s\x86b."
    ),
    "a value that runs a command": lambda folder: evil_value(folder),
}  # fmt: skip


def evil_value(folder: Path) -> Path:
    made = dcp_with(nothing, "__1_0.distcp", offset=0, length=0)(folder)
    file = io.BytesIO()
    torch.save(Evil(), file)
    (made / "__1_0.distcp").write_bytes(file.getvalue())
    return dcp_with(nothing, "__1_0.distcp", offset=0, length=len(file.getvalue()))(folder)


# Indexes.


def index_of(good: str, file_name: str, content: Any) -> Attack:
    def attack(folder: Path) -> Path:
        made = GOOD[good](folder)
        written = content if isinstance(content, bytes) else json.dumps(content).encode()
        (made / file_name).write_bytes(written)
        return made

    return attack


def hf_index(content: Any) -> Attack:
    return index_of("hugging face", "model.safetensors.index.json", content)


def parts_index(content: Any) -> Attack:
    return index_of("components", "components.json", content)


def part(file_name: Any) -> Attack:
    return parts_index({"files": {"a": {"name": file_name, "xxh3_128": "0" * 32}}})


NAMES: dict[str, Any] = {
    "../": "../elsewhere", "absolute": "/etc/passwd", "..": "..", "empty": "", "NUL": "x\0",
    "not there": "no.safetensors", "a number": 7,
}  # fmt: skip
INDEXES: dict[str, Attack] = {
    **{f"hugging face, {what}": hf_index({"weight_map": {"a": n}}) for what, n in NAMES.items()},
    **{f"components, {what}": part(n) for what, n in NAMES.items()},
    "hugging face, a list": hf_index([]),
    "hugging face, no map": hf_index({"metadata": {}}),
    "hugging face, 100,000 levels": hf_index(b'{"weight_map":' * 100_000),
    "hugging face, a million digits": hf_index(b'{"weight_map":' + b"9" * 1_000_000 + b"}"),
    "hugging face, a pickle": hf_index(pickle.dumps(Evil())),
    "hugging face, a sparse GB": lambda folder: sparse_index(folder),
    "hugging face, a sparse configuration": lambda folder: sparse_companion(folder),
    "hugging face, a link that leads out": linked_out(
        "hugging face", "model-00001-of-00001.safetensors"
    ),
    "components, a list": parts_index({"files": [1, 2]}),
    "components, 100,000 levels": parts_index(b"[" * 100_000),
    "components, a pickle": parts_index(pickle.dumps(Evil())),
    "components, a link that leads out": linked_out("components", "a.pth"),
    "components, a digest that is a number": parts_index(
        {"files": {"a": {"name": "a.pth", "xxh3_128": 1}}}
    ),
}


# torch_checkpointing.


def rank_file(file_name: str, content: Callable[[], bytes] | bytes) -> Attack:
    def attack(folder: Path) -> Path:
        made = torch_checkpointing("fsdp2")(folder)
        (made / file_name).write_bytes(content if isinstance(content, bytes) else content())
        return made

    return attack


def named(module: str, qualname: str, facts: bytes) -> bytes:
    """The pickle of an object with this state."""
    return name(module, qualname) + b")\x81}(" + facts + b"ub"


def dtensor(*, mesh: bytes, placement: bytes, order: bytes = b"N") -> bytes:
    """The pickle of a state with a DTensor [6] on a mesh of two ranks, as torch writes it."""
    spec = named(
        "torch.distributed.tensor._dtensor_spec", "DTensorSpec",
        text("mesh") + named("torch.distributed.device_mesh", "DeviceMesh", mesh)
        + text("placements") + b"(" + placement + b"t"
        + text("tensor_meta") + name("torch.distributed.tensor._dtensor_spec", "TensorMeta")
        + b"((" + whole(12) + b"t(K\x01t" + name("torch", "float32") + b"t\x81"
        + text("shard_order") + order,
    )  # fmt: skip
    facts = b"}(" + text("_local_tensor") + tensor(0, [6], [1]) + text("_spec") + spec + b"u"
    cls = name("torch.distributed.tensor", "DTensor")
    return state(
        call(
            "torch._tensor",
            "_rebuild_from_type_v2",
            name("torch._utils", "_rebuild_wrapper_subclass") + cls + b"(t(N" + facts + b"t",
        )
    )


RANK_STORAGE = STORAGE.replace(b"Float", b"Int").replace(text("0"), text("1"))
RANKS = tensor(0, [2], [1], RANK_STORAGE.replace(b"K\x06", b"K\x02"))
COORDINATE = text("_coordinate_on_dim") + b"(K\x01t"


def mesh_of(tensor: bytes, coordinate: bytes = COORDINATE) -> bytes:
    return text("mesh") + tensor + coordinate


def layout_of(sizes: bytes, strides: bytes) -> bytes:
    layout = named(
        "torch.distributed._mesh_layout", "_MeshLayout",
        text("shape") + sizes + text("stride") + strides,
    )  # fmt: skip
    ranks = text("_rank_map") + RANKS + text("_rank") + b"K\x01"
    return ranks + text("_layout") + layout + COORDINATE


def shard(dim: int = 0, factor: int | None = None) -> bytes:
    kind = "Shard" if factor is None else "_StridedShard"
    more = b"" if factor is None else text("split_factor") + whole(factor)
    facts = text("dim") + whole(dim) + more
    return named("torch.distributed.tensor.placement_types", kind, facts)


MANY = b"(" + whole(1 << 40) + b"t"
DTENSORS: dict[str, bytes] = {
    "a mesh of floats": dtensor(mesh=mesh_of(tensor(0, [2], [1])), placement=shard()),
    "a mesh of 2**40 ranks": dtensor(
        mesh=mesh_of(RANKS.replace(whole(2), whole(1 << 40)).replace(whole(1), whole(0))),
        placement=shard(),
    ),
    "a mesh with a rank twice": dtensor(
        mesh=mesh_of(RANKS.replace(whole(0) + b"(" + whole(2), whole(1) + b"(" + whole(2)).replace(
            b"(" + whole(1) + b"t\x89", b"(" + whole(0) + b"t\x89")),
        placement=shard(),
    ),
    "the part of a tensor that another rank lacks": dtensor(mesh=mesh_of(RANKS), placement=shard()),
    "a mesh without ranks": dtensor(mesh=COORDINATE, placement=shard()),
    "a layout of 2**40 ranks": dtensor(mesh=layout_of(MANY, MANY), placement=shard()),
    "a layout of 2**40 dimensions": dtensor(
        mesh=layout_of(b"(" + b"K\x01" * 5000 + b"t", b"(" + b"K\x01" * 5000 + b"t"),
        placement=shard(),
    ),
    "strides of 2**40": dtensor(mesh=layout_of(b"(K\x02t", MANY), placement=shard()),
    "a coordinate that is text": dtensor(
        mesh=mesh_of(RANKS, text("_coordinate_on_dim") + text("x")), placement=shard()
    ),
    "a dimension of 2**40": dtensor(mesh=mesh_of(RANKS), placement=shard(1 << 40)),
    "a negative dimension": dtensor(mesh=mesh_of(RANKS), placement=shard(-1)),
    "a split factor of 2**62": dtensor(mesh=mesh_of(RANKS), placement=shard(0, 1 << 62)),
    "1,000 placements": dtensor(mesh=mesh_of(RANKS), placement=shard() * 1000),
    "an order that is text": dtensor(mesh=mesh_of(RANKS), placement=shard(), order=text("x")),
    "a spec that is text": dtensor(mesh=mesh_of(RANKS), placement=text("x")),
    "a wrapper of a function": state(
        call(
            "torch._tensor", "_rebuild_from_type_v2",
            name("torch._utils", "_rebuild_wrapper_subclass") + name("os", "system")
            + b"(" + text("touch shardckpt-was-here") + b"tN",
        )
    ),
}  # fmt: skip


def sparse_companion(folder: Path) -> Path:
    made = hugging_face(folder)
    sparse(1 << 40)(made / "config.json")
    return made


def sparse_index(folder: Path) -> Path:
    made = hugging_face(folder)
    os.truncate(made / "model.safetensors.index.json", 1 << 30)
    return made


# Files of llama.cpp.


def gguf(header: bytes, size_bytes: int = 0) -> Attack:
    """A header of version 3 behind the magic bytes, and zeros up to a size."""

    def attack(folder: Path) -> Path:
        path = folder / "x.gguf"
        path.write_bytes(b"GGUF\3\0\0\0" + header)
        os.truncate(path, max(size_bytes, 8 + len(header)))
        return path

    return attack


def array_of(type_number: int, length: int) -> bytes:
    """The counts of a header with one value, an array."""
    return struct.pack("<QQQ", 0, 1, 1) + b"a" + struct.pack("<IIQ", 9, type_number, length)


def ggml_tensor(sizes: tuple[int, ...], offset: int = 0, name: bytes = b"a") -> bytes:
    """A header with one tensor of float32."""
    head = struct.pack("<QQQ", 1, 0, len(name)) + name
    numbers = (len(sizes), *sizes, 0, offset)
    return head + struct.pack(f"<I{len(sizes)}QIQ", *numbers)


GGUF: dict[str, Attack] = {
    "2**26 bytes in an array": gguf(array_of(0, 1 << 26), 80 << 20),
    "2**23 numbers in an array": gguf(array_of(12, 1 << 23), 80 << 20),
    "2**40 numbers in an array": gguf(array_of(12, 1 << 40), 80 << 20),
    "2**22 empty texts": gguf(array_of(8, 1 << 22), 80 << 20),
    "an array of arrays": gguf(array_of(9, 1), 4096),
    "2**22 values": gguf(struct.pack("<QQ", 0, 1 << 22), 80 << 20),
    "2**16 values": gguf(struct.pack("<QQ", 0, 1 << 16), 80 << 20),
    "2**22 tensors": gguf(struct.pack("<QQ", 1 << 22, 0), 200 << 20),
    "2**16 tensors": gguf(struct.pack("<QQ", 1 << 16, 0), 200 << 20),
    "a text of 2**63 bytes": gguf(struct.pack("<QQQ", 0, 1, 1 << 63), 4096),
    "a tensor of 4 TB": gguf(ggml_tensor((1 << 40,)), 4096),
    "2**64 elements": gguf(ggml_tensor((1 << 16,) * 4), 4096),
    "an offset behind the end": gguf(ggml_tensor((1,), offset=1 << 40), 4096),
    "2**31 dimensions": gguf(struct.pack("<QQQ", 1, 0, 1) + b"a\0\0\0\x80", 4096),
    "a name that is not UTF-8": gguf(ggml_tensor((1,), name=b"\xff"), 4096),
    "a pipe": lambda folder: os.mkfifo(folder / "x.gguf") or folder / "x.gguf",
}


FOREIGN: dict[str, Attack] = {
    **{
        f"{kind} for {place}": instead(*where, make)
        for place, where in PLACES.items()
        for kind, make in KINDS.items()
    },
    **{f"torch: {what}": raw("x.pth", archive(p)) for what, p in PICKLES.items()},
    **{f"torch: {what}": raw("x.pth", archive(p)) for what, p in TORCH_PICKLES.items()},
    **{f"lightning: {what}": raw("x.ckpt", archive(p)) for what, p in TORCH_PICKLES.items()},
    **{f"metadata: {what}": with_metadata(p) for what, p in PICKLES.items()},
    **{f"torch file: {what}": raw("x.pth", made) for what, made in TORCH_FILES.items()},
    **{f"safetensors: {what}": attack for what, attack in SAFETENSORS.items()},
    **{f"dcp: {what}": attack for what, attack in DCP.items()},
    **{f"index: {what}": attack for what, attack in INDEXES.items()},
    **{f"gguf: {what}": attack for what, attack in GGUF.items()},
    **{f"metadata.pkl: {what}": rank_file("metadata.pkl", p) for what, p in PICKLES.items()},
    **{f"rank: {what}": rank_file("model_1.pt", archive(p)) for what, p in PICKLES.items()},
    **{f"rank: {what}": rank_file("model_1.pt", archive(p)) for what, p in TORCH_PICKLES.items()},
    **{
        f"rank: {what}": rank_file(
            "model_1.pt", archive(p, **{"data/1": struct.pack("<ii", 0, 1)})
        )
        for what, p in DTENSORS.items()
    },
    **{f"rank file: {what}": rank_file("model_1.pt", made) for what, made in TORCH_FILES.items()},
}  # fmt: skip
