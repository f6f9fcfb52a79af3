"""The typed JSON of a state, without some of its tensors."""

from __future__ import annotations

from collections.abc import Set
from typing import Any

__all__ = ["without_tensors"]

_GONE = object()


def without_tensors(node: Any, gone: Set[str]) -> Any:
    """Return `node` without references to the tensors in `gone`.

    References are removed from dicts, and become None in lists, tuples and sets.
    """
    pruned = _prune(node, gone)
    return None if pruned is _GONE else pruned


def _prune(node: Any, gone: Set[str]) -> Any:
    if isinstance(node, list):
        return [without_tensors(item, gone) for item in node]
    if not isinstance(node, dict):
        return node
    if node.keys() <= {"$tensor", "$ndarray"} and len(node) == 1:
        return _GONE if next(iter(node.values())) in gone else node
    if node.keys() == {"$dict"}:
        pairs = [(key, _prune(item, gone)) for key, item in node["$dict"]]
        return {"$dict": [[key, item] for key, item in pairs if item is not _GONE]}
    pruned = {key: _prune(item, gone) for key, item in node.items()}
    return {key: item for key, item in pruned.items() if item is not _GONE}
