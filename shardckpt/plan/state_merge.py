"""Merge the states of ranks that hold different entries, such as pipeline stages.

Tensors: only some ranks may hold a tensor if every rank holds tensors that another rank lacks, as
pipeline stages do. A rank that lacks tensors and has none of its own most likely misses a key,
which is an error.

Values: only some ranks may have a key if it comes with such a tensor, below it or in the same dict.
The same holds in the state of an optimizer, and in a dict that is marked with Union. An entry of
several ranks must be equal on all of them.

Tied tensors: a rank that holds no elements of a tensor can't tell whether it is tied to another.
The ranks that hold some decide.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from shardckpt.errors import RankMismatchError, ReplicaMismatchError, ShardckptError
from shardckpt.format.typed_json import tag_of
from shardckpt.plan.local_plan import Offer, TensorSpec
from shardckpt.state.saved_tree import below, under

__all__ = ["Merged", "merge_states"]


@dataclass(frozen=True, slots=True)
class Merged:
    """The merged state of all ranks: the values, the tensors that each rank lists, and the names of
    the tensors that only some ranks hold."""

    tree: bytes
    common: tuple[tuple[TensorSpec, ...], ...]
    partial: frozenset[str] = frozenset()


def merge_states(offers: Sequence[Offer], *, partial: frozenset[str] | None = None) -> Merged:
    """Merge the states of all ranks. Pure.

    `partial` are the names of the tensors that only some ranks hold, if they are known from an
    earlier save; then the offers need no tensors. Raises RankMismatchError or ReplicaMismatchError,
    which name the entry and a rank.
    """
    parties: dict[Offer, int] = {}  # ranks with equal states count once
    for rank, offer in enumerate(offers):
        parties.setdefault(offer, rank)
    common = tuple(offer.common for offer in offers)
    if len(parties) == 1:
        return Merged(offers[0].tree, common)
    unions = {name for offer in parties for name in offer.unions}
    if partial is None:
        specs = {rank: {s.name: s for s in offer.common} for offer, rank in parties.items()}
        listed = {name for of_rank in specs.values() for name in of_rank}
        for offer, rank in parties.items():
            specs[rank].update((s.name, s) for s in offer.empty_ties if s.name in listed)
        partial = _check_tensors(specs, unions)
    trees = [(rank, msgspec.json.decode(offer.tree)) for offer, rank in parties.items()]
    empty = {(rank, spec.name) for offer, rank in parties.items() for spec in offer.empty_ties}
    tree = msgspec.json.encode(_Merger(unions, partial, empty).merge(trees, "", False))
    return Merged(tree, common, partial)


def _check_tensors(names: dict[int, dict[str, TensorSpec]], unions: set[str]) -> frozenset[str]:
    """Return the tensors that only some ranks hold.

    Raises RankMismatchError if that is not accepted, or if the ranks describe a tensor differently.
    """
    every: dict[str, tuple[int, TensorSpec]] = {}
    for rank, specs in names.items():
        for name, spec in specs.items():
            first, known = every.setdefault(name, (rank, spec))
            if known != spec:
                raise _different_tensors(first, known, rank, spec)
    partial = frozenset(n for n in every if not all(n in specs for specs in names.values()))
    if partial:
        stage = {
            rank: {name for name in partial & specs.keys() if not _any_over(unions, name)}
            for rank, specs in names.items()
        }
        for (a, names_a), (b, names_b) in itertools.combinations(stage.items(), 2):
            if names_a < names_b or names_b < names_a:
                having = a if names_b < names_a else b
                raise _different_keys(sorted(names_a ^ names_b), having, a, b)
    return partial


def _any_over(unions: Iterable[str], name: str) -> bool:
    return any(under(name, union) for union in unions)


def _different_tensors(
    first: int, known: TensorSpec, rank: int, spec: TensorSpec
) -> ShardckptError:
    return RankMismatchError(
        "The ranks pass a tensor with different dtypes or shapes",
        rank=rank,
        tensor=spec.name,
        expected=f"{known.dtype} {list(known.shape)}, as on rank {first}",
        actual=f"{spec.dtype} {list(spec.shape)}",
        remedy="pass DTensors for parts of a tensor, PerRank(...) for entries that differ by rank",
    )


def _different_keys(names: Sequence[str], having: int, a: int, b: int) -> ShardckptError:
    lacking = b if having == a else a
    return RankMismatchError(
        "The ranks pass states with different keys",
        rank=max(a, b),
        tensor=names[0],
        expected="the same keys on every rank, or tensors of its own on each rank",
        actual=f"rank {having} has the key, rank {lacking} does not; {len(names)} keys differ",
        remedy="pass the same keys on every rank; mark a dict whose keys differ by rank with "
        "Union(...), and an entry of one rank with PerRank(...) or FromRank0(...)",
    )


def _different_values(name: str, first: int, value: Any, rank: int, other: Any) -> ShardckptError:
    return ReplicaMismatchError(
        "The ranks pass different values",
        rank=rank,
        tensor=name,
        expected=f"{repr(value)[:200]}, as on rank {first}",
        actual=repr(other)[:200],
        remedy="pass the same value on every rank, or mark it with PerRank(...) or FromRank0(...)",
    )


_Nodes = list[tuple[int, Any]]
"""(rank, typed JSON) of each rank that has an entry."""


class _Merger:
    def __init__(
        self, unions: set[str], partial: frozenset[str], empty_ties: set[tuple[int, str]]
    ) -> None:
        self.unions = unions
        self.partial = partial
        self.empty_ties = empty_ties

    def merge(self, nodes: _Nodes, name: str, free: bool) -> Any:
        """Merge the nodes of several ranks. If `free` is set, keys of dicts may differ."""
        first_rank, first = nodes[0]
        if len(nodes) == 1:
            return first
        if all(type(node) is list for _, node in nodes):
            return self.sequence(nodes, name, free)
        if all(type(node) is dict for _, node in nodes):
            tags = {tag_of(node) for _, node in nodes}
            if tags <= {None, "$dict"}:
                return self.mapping(nodes, name, free or name in self.unions)
            if tags == {"$tuple"}:
                bodies = [(rank, node["$tuple"]) for rank, node in nodes]
                return {"$tuple": self.sequence(bodies, name, free)}
            if tags == {"$deque"} or tags == {"$record"}:
                (tag,) = tags  # [number of arguments or name of the class, content]
                if len({node[tag][0] for _, node in nodes}) == 1:
                    bodies = [(rank, node[tag][1]) for rank, node in nodes]
                    return {tag: [first[tag][0], self.merge(bodies, name, free)]}
        if self.empty_ties:
            nodes = [n for n in nodes if (n[0], name) not in self.empty_ties] or nodes
            first_rank, first = nodes[0]
        text = msgspec.json.encode(first)
        for rank, node in nodes:
            if msgspec.json.encode(node) != text:  # compare as text: 1, 1.0 and True differ
                raise _different_values(name, first_rank, first, rank, node)
        return first

    def sequence(self, nodes: _Nodes, name: str, free: bool) -> Any:
        """Merge lists item by item. Lists may be longer on ranks with tensors of their own."""
        length = max(len(node) for _, node in nodes)
        items = []
        for index in range(length):
            having = [(rank, node[index]) for rank, node in nodes if index < len(node)]
            if len(having) < len(nodes) and not self.comes_with_tensors(having):
                (first, value), *others = nodes
                rank, other = next((r, node) for r, node in others if len(node) != len(value))
                raise _different_values(name, first, value, rank, other)
            items.append(self.merge(having, below(name, index), free))
        return items

    def mapping(self, nodes: _Nodes, name: str, free: bool) -> Any:
        """Merge dicts key by key."""
        if not free and all(_is_optimizer(node) for _, node in nodes):
            return self.optimizer(nodes, name)
        plain = all(tag_of(node) is None for _, node in nodes)
        pairs = [(rank, _pairs(node)) for rank, node in nodes]
        keys = {text: key for _, items in pairs for text, (key, _) in items.items()}
        stage = any(self.is_partial(item) for _, items in pairs for _, item in items.values())
        merged = []
        for text, key in keys.items():
            having = [(rank, items[text][1]) for rank, items in pairs if text in items]
            inner = below(name, key)
            if len(having) < len(nodes):
                may = free or stage or self.comes_with_tensors(having)
                if not may or any(tag == "$per_rank" for _, i in having for tag, _ in _refs(i)):
                    rank = having[0][0]
                    lacking = next(r for r, items in pairs if text not in items)
                    raise _different_keys([inner], rank, rank, lacking)
            merged.append([key, self.merge(having, inner, free)])
        return dict(merged) if plain else {"$dict": merged}

    def optimizer(self, nodes: _Nodes, name: str) -> Any:
        """Merge optimizers: their state by parameter, and groups with equal options into one."""
        parts = {
            "state": self.merge(
                [(r, node["state"]) for r, node in nodes], below(name, "state"), True
            ),
            "param_groups": self.groups(
                [(r, node["param_groups"]) for r, node in nodes], below(name, "param_groups")
            ),
        }
        rest = [(r, {k: v for k, v in node.items() if k not in parts}) for r, node in nodes]
        return {**parts, **self.mapping(rest, name, False)}

    def groups(self, nodes: _Nodes, name: str) -> Any:
        """Merge the parameter groups of all ranks. Parameters on several ranks must have equal
        options. Parameters of one rank join a group with their options, or form a new one."""
        merged: list[dict[str, Any]] = []
        options: list[tuple[int, dict[str, Any]]] = []
        group_of: dict[str, int] = {}
        for rank, groups in nodes:
            for number, group in enumerate(groups):
                group_options = {key: v for key, v in group.items() if key not in _LISTS}
                known = {group_of[fqn] for fqn in group["params"] if fqn in group_of}
                for index in known:
                    pair = [options[index], (rank, group_options)]
                    self.merge(pair, below(name, number), False)
                equal = [at for at, (_, o) in enumerate(options) if _same(o, group_options)]
                if known:
                    index = min(known)
                elif equal:
                    index = number if number in equal else equal[0]
                else:
                    index = len(merged)
                    merged.append({**group, **{key: [] for key in _LISTS if key in group}})
                    options.append((rank, group_options))
                new = [at for at, fqn in enumerate(group["params"]) if fqn not in group_of]
                for key in _LISTS & group.keys() & merged[index].keys():
                    merged[index][key] += [group[key][at] for at in new]
                group_of.update((group["params"][at], index) for at in new)
        return merged

    def comes_with_tensors(self, having: _Nodes) -> bool:
        """Whether one of the nodes contains a tensor that only some ranks hold."""
        return any(
            tag != "$per_rank" and target in self.partial
            for _, node in having
            for tag, target in _refs(node)
        )

    def is_partial(self, node: Any) -> bool:
        """Whether a node is a tensor that only some ranks hold."""
        return type(node) is dict and any(
            node.get(tag) in self.partial for tag in ("$tensor", "$ndarray")
        )


_LISTS = {"params", "param_names"}
"""The options of a parameter group that have an item for each parameter."""


def _same(one: Any, other: Any) -> bool:
    return msgspec.json.encode(one) == msgspec.json.encode(other)


def _is_optimizer(node: dict[str, Any]) -> bool:
    groups = node.get("param_groups")
    return (
        type(node.get("state")) is dict
        and type(groups) is list
        and all(type(g) is dict and type(g.get("params")) is list for g in groups)
        and all(type(name) is str for group in groups for name in group["params"])
    )


def _pairs(node: dict[str, Any]) -> dict[bytes, tuple[Any, Any]]:
    """Return the items of a dict in typed JSON, by the text of their keys."""
    items = node["$dict"] if tag_of(node) == "$dict" else node.items()
    return {msgspec.json.encode(key): (key, item) for key, item in items}


def _refs(node: Any) -> Iterator[tuple[str, str]]:
    """Yield (tag, target) of the references in a node."""
    stack = [node]
    while stack:
        node = stack.pop()
        if type(node) is list:
            stack += node
        elif type(node) is dict:
            for tag in ("$tensor", "$ndarray", "$per_rank"):
                if type(target := node.get(tag)) is str:
                    yield tag, target
            stack += node.values()
