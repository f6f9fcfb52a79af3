"""Read files of torch.save with torch.load(weights_only=True), after checking what they declare.

torch.load allocates whatever a file declares: a record that inflates to terabytes, a tensor without
strides, a bytearray of any length. Therefore the pickle is first read with stand-ins for all names
in it, and its tensors are compared with the records of the file.
"""

from __future__ import annotations

import io
import math
import pickle
import re
import struct
import zipfile
from collections.abc import Callable, Iterable
from typing import Any, BinaryIO, NamedTuple, NoReturn, cast

import torch

from shardckpt.convert.foreign_file import mapped, utf8_path
from shardckpt.convert.pickle_scan import Named, PickleStructure, Readable, scan
from shardckpt.errors import CorruptionError, NotACheckpointError

__all__ = [
    "LoadTorch",
    "StorageRecord",
    "StorageStandIn",
    "check_torch_file",
    "load_torch",
    "load_torch_bytes",
    "load_torch_file",
    "read_structure",
]

_MAGIC = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)  # the format of torch before 1.6
_SPREAD, _SPREAD_BYTES = 4, 64 << 20
"""Tensors may take so many times the bytes of their file, and so many bytes more: those that share
memory, or are expanded."""
_SHARED_VALUES = 200_000  # a state may have so many more values than its pickle has bytes
_MOST_LEVELS = 1000
_PICKLE_LIMIT_BYTES = 1 << 30
_REMEDY = "load another checkpoint; don't trust this one"

_STORAGE_ITEM_BYTES = {"Double": 8, "Long": 8, "ComplexFloat": 8, "ComplexDouble": 16, "Float": 4,
                       "Int": 4, "QInt32": 4, "Half": 2, "BFloat16": 2, "Short": 2}  # fmt: skip
_VIEWS = {f"torch._utils._rebuild_{name}": name == "tensor_v3"
          for name in ("tensor", "tensor_v2", "tensor_v3", "qtensor")}  # fmt: skip
_TYPED = "torch._tensor._rebuild_from_type_v2"
_CALLS = {
    *_VIEWS,
    _TYPED,
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_parameter_with_state",
    "torch._utils._rebuild_sparse_tensor",
    "torch._utils._rebuild_meta_tensor_no_storage",
    "torch.nn.parameter.Parameter",
    "torch.serialization._get_layout",
    "torch.device",
    "builtins.complex",
    "collections.Counter",
}
"""The functions that a file may call: those whose result is not larger than their arguments."""
_WRAPPER = "torch._utils._rebuild_wrapper_subclass"
_OF_TENSORS = re.compile(r"torch\._utils\._rebuild_\w+|torch(\.\w+)*\.\w*(Tensor|Storage)")
"""Other functions that torch.load(weights_only=True) would call, with a result as large as they ask
for."""


class StorageStandIn:
    """Stands for a storage. `type_name`, `key` and `numel` are those of the pickle, `size_bytes` is
    what it needs."""

    def __init__(self, type_name: str, key: str, item_bytes: int, numel: int) -> None:
        self.type_name, self.key = type_name, key
        self.item_bytes, self.numel = item_bytes, numel
        self.size_bytes = item_bytes * numel


class StorageRecord(NamedTuple):
    """The place of a storage in a torch file, and its checksum, which is 0 without checksums."""

    begin: int
    size_bytes: int
    crc: int


def load_torch(file: str | BinaryIO, mmap: bool = False, tensor_classes: Iterable[str] = ()) -> Any:
    """Load a torch file on the CPU. Torch refuses files that hold objects."""
    return torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)


LoadTorch = Callable[[str | BinaryIO, bool, Iterable[str]], Any]
"""Reads a torch file that was checked, mapped into memory if the second argument is true. The third
has the names of subclasses of Tensor in the file."""


def load_torch_file(path: str, load: LoadTorch = load_torch) -> Any:
    """Load a torch file on the CPU. Tensors of a zip file are maps of it."""
    with mapped(path) as data:
        tensor_classes = check_torch_file(data, path)
        is_zip = _is_zip(data)
    with utf8_path(path) as name:
        return load(name, is_zip, tensor_classes)


def load_torch_bytes(data: Readable, path: str, load: LoadTorch = load_torch) -> Any:
    """Load a torch file that is a part of another file, on the CPU. `path` is for errors."""
    tensor_classes = check_torch_file(data, path)
    file = cast(BinaryIO, _Reader(data))
    return load(file, False, tensor_classes)


def check_torch_file(data: Readable, path: str) -> set[str]:
    """Raise CorruptionError if a torch file declares more than it holds, NotACheckpointError if it
    calls a function that a plain state does not need. Classes are left for torch.load to refuse.
    Returns the names of subclasses of Tensor in it."""
    if _is_zip(data):
        return _ZipCheck(data, path).run()[1]
    if bytes(data[: len(_MAGIC)]) == _MAGIC:
        return _check_legacy(data, path)
    raise NotACheckpointError(
        "torch.save did not write this file",
        path=path,
        expected="a zip archive, or a file of torch before 1.6",
        actual=f"a file that begins with {bytes(data[:8])!r}" if len(data) else "an empty file",
        remedy="check the path",
    )


def read_structure(data: Readable, path: str) -> tuple[Any, dict[str, StorageRecord]]:
    """Read the pickle of a torch file that may hold DTensors, with stand-ins for all names in it.

    Returns:
        The root of the pickle, in which a Named stands for each tensor and object; and the records
        of the storages, by key.

    Raises:
        CorruptionError: See check_torch_file; or the bytes of the file are in another order.
    """
    if not _is_zip(data):
        _refuse(path, "a zip archive of torch.save", f"a file that begins {bytes(data[:4])!r}")
    return _ZipCheck(data, path, wrappers=True).structure()


def _is_zip(data: Readable) -> bool:
    return bytes(data[:4]) == b"PK\x03\x04"


class _ZipCheck:
    """Compares the records of an archive with its pickle."""

    def __init__(self, data: Readable, path: str, *, wrappers: bool = False) -> None:
        self.data, self.path, self.wrappers = data, path, wrappers
        self.records: dict[str, zipfile.ZipInfo] = {}
        self.root = ""

    def structure(self) -> tuple[Any, dict[str, StorageRecord]]:
        """See read_structure."""
        found = self.run()[0]
        order = self.records.get(f"{self.root}/byteorder")
        if order is not None and self._bytes(order) != b"little":
            _refuse(self.path, "little-endian numbers", "another byte order")
        folder = f"{self.root}/data/"
        return found, {
            name.removeprefix(folder): StorageRecord(self._begin(info), info.file_size, info.CRC)
            for name, info in self.records.items()
            if name.startswith(folder)
        }

    def _begin(self, info: zipfile.ZipInfo) -> int:
        begin: int = info.header_offset
        begin += 30 + sum(struct.unpack("<HH", self.data[begin + 26 : begin + 30]))
        if begin + info.file_size > len(self.data):
            _refuse(self.path, "records within the file", info.filename[:200])
        return begin

    def _bytes(self, info: zipfile.ZipInfo) -> bytes:
        begin = self._begin(info)
        return bytes(self.data[begin : begin + info.file_size])

    def run(self) -> tuple[Any, set[str]]:
        """Check the archive; see check_torch_file. Returns the root of its pickle, and the names of
        subclasses of Tensor."""
        root = self.root = self._read_directory()
        pickled = self.records.get(f"{root}/data.pkl")
        if pickled is None or pickled.file_size > _PICKLE_LIMIT_BYTES:
            _refuse(self.path, "a pickle, data.pkl", "none, or too large a one")
        text = self._bytes(pickled)
        if scan(text) != len(text):
            _refuse(self.path, "one pickle in data.pkl", "bytes after its end")

        def storage_bytes(storage: StorageStandIn) -> int:
            record = self.records.get(f"{root}/data/{storage.key}")
            return record.file_size if record else -1

        return _check_pickle(text, storage_bytes, len(self.data), self.path, wrappers=self.wrappers)

    def _read_directory(self) -> str:
        """Read the records of the archive. Returns the name of their folder."""
        # Without a comment, and without bytes before or between records, all zip readers agree.
        end = len(self.data)
        size, offset = struct.unpack("<II", self.data[end - 10 : end - 2])
        tail = 22
        if bytes(self.data[end - 42 : end - 38]) == b"PK\x06\x07":
            size, offset = struct.unpack("<QQ", self.data[end - 58 : end - 42])
            tail += 76
        if bytes(self.data[end - 22 : end - 18]) != b"PK\x05\x06" or offset + size + tail != end:
            _refuse(self.path, "an archive that ends with its directory", "other bytes")
        with zipfile.ZipFile(cast(BinaryIO, _Reader(self.data))) as archive:
            infos = archive.infolist()
        if any(info.filename.endswith("/constants.pkl") for info in infos):
            raise pickle.UnpicklingError("TorchScript")
        for info in infos:
            if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
                _refuse(self.path, "records that are not compressed", info.filename[:200])
            self.records[info.filename] = info
        if len({name.casefold() for name in self.records}) < max(len(infos), 1):
            _refuse(self.path, "records of different names", "a name that occurs twice, or none")
        if (total := sum(info.file_size for info in infos)) > offset:
            _refuse(self.path, f"records of {offset} bytes at most", f"{total} bytes")
        return infos[0].filename.split("/")[0]


class _Reader(io.RawIOBase):
    """A buffer as a file, without copying it."""

    def __init__(self, data: Readable) -> None:
        self._data, self._at = data, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = max(0, offset + (0, self._at, len(self._data))[whence])
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        part = self._data[self._at : self._at + len(buffer)]
        buffer[: len(part)] = part
        self._at += len(part)
        return len(part)


def _check_legacy(data: Readable, path: str) -> set[str]:
    """Check a file of torch before 1.6: five pickles, then the storages. Returns the names of
    subclasses of Tensor."""
    ends = [0]
    for _ in range(5):
        ends.append(scan(data, ends[-1]))
    text = bytes(data[ends[3] : ends[4]])
    storages: dict[str, StorageStandIn] = {}

    def storage_bytes(storage: StorageStandIn) -> int:
        storages[storage.key] = storage
        total = sum(other.size_bytes for other in storages.values())
        return storage.size_bytes if total <= len(data) - ends[5] else -1

    return _check_pickle(text, storage_bytes, len(data), path)[1]


def _check_pickle(
    text: bytes,
    storage_bytes: Callable[[StorageStandIn], int],
    file_bytes: int,
    path: str,
    *,
    wrappers: bool = False,
) -> tuple[Any, set[str]]:
    """Check the pickle of a torch file against the bytes of its storages. Returns its root, and the
    names of subclasses of Tensor in it.

    `storage_bytes` returns the bytes of a storage in the file, -1 if they are missing. `wrappers`:
    it may hold DTensors, whose wrappers the caller does not make.
    """

    def storage(pid: Any) -> StorageStandIn:
        if type(pid) is tuple and len(pid) == 4 and pid[0] == "module":
            raise NotACheckpointError(
                "This file holds a module, which only unpickling could read",
                path=path,
                expected="tensors, numbers, text and containers of them",
                actual=f"an object of {getattr(pid[1], 'name', 'a class')}"[:200],
                remedy="if you trust it, load it in a program with its class; save its "
                "state_dict()",
            )
        storage_type, key, numel = (
            (pid[1], pid[2], pid[4]) if type(pid) is tuple and len(pid) > 4 else [0] * 3
        )
        if not isinstance(storage_type, type) or type(numel) is not int or numel < 0:
            raise pickle.UnpicklingError("a persistent id that is not a storage's")
        type_name = getattr(storage_type, "name", "")
        found = re.fullmatch(r"torch\.(\w+)Storage", type_name)
        item_bytes = _STORAGE_ITEM_BYTES.get(found[1], 1) if found else 1
        made = StorageStandIn(type_name, str(key), item_bytes, numel)
        in_file = storage_bytes(made)
        if made.size_bytes > in_file:
            expected = f"{made.size_bytes} bytes of the storage {key}"[:200]
            _refuse(path, expected, f"{max(in_file, 0)}")
        return made

    root = PickleStructure(text, allowed=lambda name: True, storage=storage).load()
    structure = _Structure(path, most_values=_SHARED_VALUES + len(text), wrappers=wrappers)
    tensors = structure.tensors_below(root)
    total = sum(math.prod(size) * item_bytes for (_, _, size, _, item_bytes) in tensors)
    limit = _SPREAD * file_bytes + _SPREAD_BYTES
    if total > limit:
        raise CorruptionError(
            "The tensors of this file are expanded far beyond the size of the file",
            path=path,
            expected=f"at most {limit} bytes in a file of {file_bytes}",
            actual=f"{total} bytes",
            remedy="if you trust the file, load it with torch.load, and save small tensors instead "
            "of the expanded ones",
        )
    return root, structure.tensor_classes


_View = tuple[str, int, tuple[int, ...], tuple[int, ...], int]


def _is_mesh(node: Any) -> bool:
    """Whether a node is a DeviceMesh, which refers to its root, which refers to it."""
    return isinstance(node, Named) and node.name.endswith(".DeviceMesh")


class _Structure:
    """Visits all objects of a pickle, each once."""

    def __init__(self, path: str, *, most_values: int, wrappers: bool) -> None:
        self.path, self.most_values, self.wrappers = path, most_values, wrappers
        self.counts: dict[int, int] = {}  # id of an object -> values below it; 0 during the visit
        self.views: set[_View] = set()
        self.tensor_classes: set[str] = set()

    def tensors_below(self, root: Any) -> set[_View]:
        """Check the structure, and return its tensors."""
        todo, levels = [(root, False)], 0
        while todo:
            node, seen = todo.pop()
            if not isinstance(node, (dict, list, tuple, set, frozenset, Named)):
                continue
            below = self._below(node)
            if seen:
                count = 1 + sum(self.counts.get(id(item), 1) for item in below)
                if count > self.most_values:
                    self._refuse(f"at most {self.most_values} values", "more, in shared lists")
                self.counts[id(node)] = count
                levels -= 1
                continue
            if id(node) in self.counts:
                if not self.counts[id(node)] and not (self.wrappers and _is_mesh(node)):
                    self._refuse("values that don't contain themselves", "a cycle")
                continue
            self.counts[id(node)] = 0
            levels += 1
            if levels > _MOST_LEVELS:
                self._refuse(f"at most {_MOST_LEVELS} levels of nesting", "more")
            if isinstance(node, Named):
                self._check_call(node.name, node.args, node.state)
            todo.append((node, True))
            todo += [(item, False) for item in below]
        return self.views

    @staticmethod
    def _below(node: Any) -> list[Any]:
        if isinstance(node, Named):
            return [*node.args, node.state, *node.items]
        if isinstance(node, dict):
            return (
                [*node, *node.values(), *vars(node).values()]
                if type(node) is not dict
                else [*node, *node.values()]
            )
        return list(node)

    def _check_call(
        self, name: str, args: tuple[Any, ...], state: Any = None, *, wrapped: bool = False
    ) -> None:
        if name == _WRAPPER and wrapped:
            return
        if name == "_codecs.encode":
            good = len(args) == 2 and args[1] in ("latin1", "latin-1")
        elif name == "builtins.bytearray":
            good = not any(isinstance(arg, int) for arg in args)
        elif name == _TYPED:
            good = len(args) == 4 and isinstance(args[0], type) and issubclass(args[0], Named)
            if good:
                self._check_call(args[0].name, args[2], wrapped=self.wrappers)
                if isinstance(args[1], type) and issubclass(args[1], Named):
                    self.tensor_classes.add(args[1].name)
        else:
            good = name in _CALLS or not _OF_TENSORS.fullmatch(name)
        # The state of a tensor would give it another storage.
        if name in _CALLS and state is not None:
            good = False
        if not good:
            raise NotACheckpointError(
                "This file calls a function that a plain state does not need",
                path=self.path,
                expected="tensors, numbers, text and containers of them",
                actual=f"{name} of {len(args)} arguments",
                remedy="if you trust the file, load it with torch.load, and save plain tensors",
            )
        if name in _VIEWS:
            self._check_view(name, args)

    def _check_view(self, name: str, args: tuple[Any, ...]) -> None:
        """Check that a tensor lies within its storage."""
        storage, offset, size, stride = args[:4] if len(args) >= 4 else (None, 0, (), ())
        item_bytes = getattr(storage, "item_bytes", 1)
        if _VIEWS[name]:
            dtype = args[6] if len(args) > 6 else None
            item_bytes = dtype.itemsize if isinstance(dtype, torch.dtype) else 0
        numbers: Iterable[Any] = (offset, *size, *stride)
        good = isinstance(storage, StorageStandIn) and item_bytes > 0 and len(size) == len(stride)
        if good and all(type(n) is int and 0 <= n < 1 << 63 for n in numbers):
            last = sum((n - 1) * step for n, step in zip(size, stride, strict=True))
            if 0 in size or (offset + last + 1) * item_bytes <= storage.size_bytes:
                view = storage.key, offset, tuple(size), tuple(stride), item_bytes
                self.views.add(view)
                return
        self._refuse(
            "tensors within their storages", f"size {list(size)[:8]}, offset {offset}"[:200]
        )

    def _refuse(self, expected: str, actual: str) -> NoReturn:
        _refuse(self.path, expected, actual)


def _refuse(path: str, expected: str, actual: str) -> NoReturn:
    raise CorruptionError(
        "This torch file is corrupted, or declares more than it holds",
        path=path,
        expected=expected,
        actual=actual,
        remedy=_REMEDY,
    )
