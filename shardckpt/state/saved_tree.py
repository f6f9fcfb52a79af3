"""The saved state of a manifest, by name: every node of its tree."""

from __future__ import annotations

import collections
import difflib
import fnmatch
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

from shardckpt.errors import LoadMismatchError, StateError
from shardckpt.format import typed_json as values
from shardckpt.format.entries import Manifest
from shardckpt.format.typed_json import Record, TensorRef

__all__ = [
    "Renaming",
    "SavedState",
    "Select",
    "below",
    "children",
    "enums_as_text",
    "rebuilt",
    "under",
]

Renaming = Mapping[str, str] | Callable[[str], str] | None
Select = str | Iterable[str] | None

T = TypeVar("T")
_MOST_COMPARED = 2000  # names; a comparison takes some 0.1 ms
_SEQUENCES = {list, tuple, collections.deque}


def under(name: str, prefix: str) -> bool:
    """Whether a name is `prefix` or begins with its keys."""
    return not prefix or name == prefix or name.startswith(f"{prefix}.")


def rename_function(rename: Renaming) -> Callable[[str], str]:
    """Return the function that maps a saved name to a new one.

    A mapping renames prefixes. The longest prefix wins.
    """
    if rename is None:
        return lambda name: name
    if callable(rename):
        return rename
    if not isinstance(rename, Mapping) or any(
        type(name) is not str for pair in rename.items() for name in pair
    ):
        raise StateError(
            "Invalid rename",
            expected="a dict of str, or a function",
            actual=repr(rename)[:200],
            remedy='pass rename={"old": "new"}, or a function from saved name to new name',
        )
    prefixes = sorted(((a.rstrip("."), b.rstrip(".")) for a, b in rename.items()), reverse=True)
    prefixes.sort(key=lambda pair: -len(pair[0]))

    def renamed(name: str) -> str:
        for old, new in prefixes:
            if under(name, old):
                rest = name[len(old) :].lstrip(".")
                return ".".join(part for part in (new, rest) if part)
        return name

    return renamed


def _key_list(keys: Select) -> list[str] | None:
    if keys is None or isinstance(keys, str):
        return None if keys is None else [keys]
    listed = list(keys) if isinstance(keys, Iterable) else [keys]
    if any(type(key) is not str for key in listed):
        raise StateError(
            "Invalid keys", expected="a str, or a list of str", actual=repr(keys)[:200]
        )
    return listed


def _selects(key: str, name: str) -> bool:
    """Whether a key selects a name: as a prefix of whole keys, or as a pattern with *, ? and []."""
    return under(name, key.rstrip(".")) or fnmatch.fnmatchcase(name, key)


class SavedState:
    """The decoded tree of a manifest. Tensors are TensorRefs.

    Entries that `keys` does not select are left out, and `rename` has been applied. An entry whose
    new name does not begin with the name of its dict is moved to the top, under its full new name.
    Dicts that get the same name become one.

    Attributes:
        nodes: All nodes by name.
        leaves: The leaves by name.
    """

    def __init__(self, manifest: Manifest, *, keys: Select = None, rename: Renaming = None) -> None:
        self.manifest = manifest
        self._keys = _key_list(keys)
        self._rename = rename
        self.renamed = rename_function(rename)
        self.tree = values.decode(manifest.state, tensor=_keep, unknown=_keep)
        left: set[str] = set()
        if keys is not None or rename is not None:
            self.tree, left = _rewrite(self.tree, self.selected, self.renamed)
        if rename is not None:
            _check_names(self.tree)
        self.nodes: dict[str, Any] = {}
        self.leaves: dict[str, Any] = {}
        self._index(self.tree, "")
        for name in left:  # None stands in their place
            self.nodes.pop(name, None)
            self.leaves.pop(name, None)
        self._per_rank: dict[int, list[Any]] = {}

    def selected(self, name: str) -> bool:
        """Whether `keys` selects a name."""
        return self._keys is None or any(_selects(key, name) for key in self._keys)

    def check_used(self, *, path: str) -> SavedState:
        """Raise an error for a key that selects no entry, and for a prefix that renames none.

        Args:
            path: The path of the checkpoint, for the error.

        Returns:
            The saved state itself.

        Raises:
            LoadMismatchError: A key or a prefix is not among the saved names.
        """
        for key in self._keys or ():
            if not any(_selects(key, name) for name in self.nodes):
                raise self._unused("keys", key, path)
        if isinstance(self._rename, Mapping):
            names = SavedState(self.manifest).nodes
            for prefix in self._rename:
                if not any(under(name, prefix.rstrip(".")) for name in names):
                    raise self._unused("rename", prefix, path)
        return self

    def _unused(self, argument: str, word: str, path: str) -> LoadMismatchError:
        rename = self._rename if argument == "keys" else None
        saved = SavedState(self.manifest, rename=rename)
        close = difflib.get_close_matches(word, list(saved.nodes)[:_MOST_COMPARED], n=8)
        return LoadMismatchError(
            f"{argument}= names {word!r}, and no saved entry has this name",
            path=path,
            expected="the name of a saved entry, or a prefix or pattern of names",
            actual=", ".join(close or list(saved.leaves)[:8]) or "a checkpoint without entries",
            remedy=f"correct {argument}=, or list the names with `shardckpt inspect`",
        )

    def per_rank(self, ref: TensorRef, *, rank: int) -> Any:
        """Return the value that `rank` saved in a PerRank."""
        if rank not in self._per_rank:
            self._per_rank[rank] = values.decode(
                self.manifest.per_rank[rank], tensor=_keep, unknown=_keep
            )
        return self._per_rank[rank][int(ref.name)]

    def with_node(self, node: Any, name: str) -> SavedState:
        """Return a SavedState in which `node` is the only saved node, under `name`."""
        other = object.__new__(SavedState)
        other.__dict__.update(self.__dict__)
        other.nodes, other.leaves = {}, {}
        other._index(node, name)
        return other

    def _index(self, node: Any, name: str) -> None:
        self.nodes[name] = node
        items = children(node)
        if not items and self.selected(name):
            self.leaves[name] = node
        for key, item in items:
            inner = f"{name}.{key}" if name else str(key)
            if type(item) is TensorRef and (self._keys is None or self.selected(inner)):
                self.nodes[inner] = self.leaves[inner] = item
            else:
                self._index(item, inner)


def children(node: Any) -> list[tuple[Any, Any]]:
    """List (key, item) of a saved node's items. Empty for a leaf, which an empty container
    also is.
    """
    cls = type(node)
    if cls is dict or cls is Record:  # a Counter is one value
        return list(node.items())
    return list(enumerate(node)) if cls in _SEQUENCES else []


def rebuilt(node: Any, items: Iterable[tuple[Any, Any]]) -> Any:
    """Return a node of the same type with other items."""
    if isinstance(node, Record):
        return Record(node.type_name, dict(items))
    if isinstance(node, dict):
        return dict(items)
    values = (value for _, value in items)
    if isinstance(node, collections.deque):
        return collections.deque(values, node.maxlen)
    return type(node)(values)


def below(name: str, key: Any) -> str:
    """Return the name of an item of the node at `name`."""
    return f"{name}.{key}" if name else str(key)


def _rewrite(
    tree: Any, selected: Callable[[str], bool], renamed: Callable[[str], str]
) -> tuple[Any, set[str]]:
    """Return the tree with renamed keys, without unselected entries (None in a list or tuple).

    Also return the names of the places in lists whose items got a name outside their list.
    """
    moved: list[tuple[str, Any]] = []
    left: set[str] = set()
    nothing = object()

    def rewrite(node: Any, old: str, new: str) -> Any:
        items = children(node)
        if not items:
            return node if selected(new) else nothing
        is_dict = isinstance(node, dict)
        kept: dict[Any, Any] = {}
        gone: list[str] = []
        for key, item in items:
            name = renamed(below(old, key))
            value = rewrite(item, below(old, key), name)
            stays = name == below(new, key)
            if not is_dict:
                kept[key] = value if stays else nothing
                gone += [] if stays else [below(new, key)]
            if value is nothing or (stays and not is_dict):
                continue
            if stays:
                _join(kept, key, value, name)
            elif is_dict and name == new:
                _merge(kept, value, name)
            elif is_dict and under(name, new):
                _join(kept, name[len(new) :].lstrip("."), value, name)
            else:
                moved.append((name, value))
        if all(value is nothing for value in kept.values()):
            return nothing
        left.update(gone)
        return rebuilt(node, ((k, None if v is nothing else v) for k, v in kept.items()))

    result = rewrite(tree, "", "")
    if result is nothing:
        result = {}
    dicts = dict(_dicts(result, ""))
    for name, value in moved:
        if name in dicts:
            _merge(dicts[name], value, name)
        else:
            _join(result, name, value, name)
            dicts.update(_dicts(value, name))
    return result, left


def _join(into: dict[Any, Any], key: Any, value: Any, name: str) -> None:
    """Put a node into a dict. Two dicts of one name become one."""
    if key not in into:
        into[key] = value
    elif type(into[key]) is dict and type(value) is dict and into[key] and value:
        _merge(into[key], value, name)
    else:
        raise _same_name(name)


def _merge(into: dict[Any, Any], node: Any, name: str) -> None:
    """Put the items of a node into the dict of the same name."""
    items = children(node)
    if not items and not name:
        raise StateError(
            "A saved entry has no name after renaming", remedy="change the rename rules"
        )
    if not items:
        raise _same_name(name)
    for key, item in items:
        _join(into, key if isinstance(node, dict) else str(key), item, below(name, key))


def _dicts(node: Any, name: str) -> Iterator[tuple[str, dict[Any, Any]]]:
    """Yield the name of each dict that has items, and the dict."""
    if type(node) is dict:
        yield name, node
    for key, item in children(node):
        yield from _dicts(item, below(name, key))


def _check_names(tree: Any) -> None:
    """Raise StateError if two nodes of a renamed tree have the same name."""
    seen: set[str] = set()
    for name in _names(tree, ""):
        if name in seen:
            raise _same_name(name)
        seen.add(name)


def _names(node: Any, name: str) -> Iterator[str]:
    """Yield the names of a node and of the nodes below it."""
    yield name
    for key, item in children(node):
        yield from _names(item, below(name, key))


def _same_name(name: str) -> StateError:
    return StateError(
        "Two saved entries have the same name after renaming",
        tensor=name,
        remedy="change the rename rules",
    )


def _keep(stand_in: T) -> T:
    return stand_in


def enums_as_text(node: Any) -> Any:
    """Return typed JSON in which the enums are text."""
    if isinstance(node, list):
        return [enums_as_text(item) for item in node]
    if not isinstance(node, dict):
        return node
    if list(node) == ["$enum"]:
        return ".".join(map(str, node["$enum"]))
    return {key: enums_as_text(item) for key, item in node.items()}
