"""Merge the states of ranks that hold different entries, such as pipeline stages.

Tensors: that only some ranks hold a tensor is accepted if every rank holds tensors that another
rank lacks, as pipeline stages do. If a rank lacks tensors and has none of its own, a key is most
likely missing there: that is an error.

Values: a key that only some ranks have is accepted if it comes with such a tensor, below it or
beside it in the same dict; in the state of an optimizer; and in a dict that is marked with Union.
An entry that several ranks have must be equal on all of them.
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

__all__ = ["Merged", "merge"]


@dataclass(frozen=True, slots=True)
class Merged:
    """The merged state of all ranks: the values, the tensors that each rank lists, and the names of
    the tensors that only some ranks hold."""

    tree: bytes
    common: tuple[tuple[TensorSpec, ...], ...]
    partial: frozenset[str] = frozenset()


def merge(offers: Sequence[Offer], *, partial: frozenset[str] | None = None) -> Merged:
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
        partial = _check_tensors(specs, unions)
    trees = [(rank, msgspec.json.decode(offer.tree)) for offer, rank in parties.items()]
    tree = msgspec.json.encode(_Merger(unions, partial).merge(trees, "", False))
    return Merged(tree, common, partial)


def _check_tensors(names: dict[int, dict[str, TensorSpec]], unions: set[str]) -> frozenset[str]:
    """The tensors that only some ranks hold. Raises an error if that is not accepted, or if the
    ranks describe them differently."""
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
        for (a, mine), (b, theirs) in itertools.combinations(stage.items(), 2):
            if mine < theirs or theirs < mine:
                raise _different_keys(sorted(mine ^ theirs), a if theirs < mine else b, a, b)
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


def _different_values(name: str, first: int, mine: Any, rank: int, theirs: Any) -> ShardckptError:
    return ReplicaMismatchError(
        "The ranks pass different values",
        rank=rank,
        tensor=name,
        expected=f"{repr(mine)[:200]}, as on rank {first}",
        actual=repr(theirs)[:200],
        remedy="pass the same value on every rank, or mark it with PerRank(...) or FromRank0(...)",
    )


Nodes = list[tuple[int, Any]]
"""(rank, typed JSON) of each rank that has an entry."""


class _Merger:
    def __init__(self, unions: set[str], partial: frozenset[str]) -> None:
        self.unions = unions
        self.partial = partial

    def merge(self, nodes: Nodes, name: str, free: bool) -> Any:
        """Merge the nodes of several ranks. `free`: keys of dicts may differ."""
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
        text = msgspec.json.encode(first)
        for rank, node in nodes:
            if msgspec.json.encode(node) != text:  # compare as text: 1, 1.0 and True differ
                raise _different_values(name, first_rank, first, rank, node)
        return first

    def sequence(self, nodes: Nodes, name: str, free: bool) -> Any:
        """Merge lists item by item. Lists may be longer on ranks with tensors of their own."""
        length = max(len(node) for _, node in nodes)
        items = []
        for index in range(length):
            having = [(rank, node[index]) for rank, node in nodes if index < len(node)]
            if len(having) < len(nodes) and not self.comes_with_tensors(having):
                (first, mine), *others = nodes
                rank, theirs = next((r, node) for r, node in others if len(node) != len(mine))
                raise _different_values(name, first, mine, rank, theirs)
            items.append(self.merge(having, below(name, index), free))
        return items

    def mapping(self, nodes: Nodes, name: str, free: bool) -> Any:
        """Merge dicts key by key."""
        if not free and all(_is_optimizer(node) for _, node in nodes):
            return self.optimizer(nodes, name)
        plain = all(tag_of(node) is None for _, node in nodes)
        pairs = [(rank, _pairs(node)) for rank, node in nodes]
        keys = {text: key for _, own in pairs for text, (key, _) in own.items()}
        stage = any(self.is_partial(item) for _, own in pairs for _, item in own.values())
        merged = []
        for text, key in keys.items():
            having = [(rank, own[text][1]) for rank, own in pairs if text in own]
            inner = below(name, key)
            if len(having) < len(nodes):
                may = free or stage or self.comes_with_tensors(having)
                if not may or any(tag == "$per_rank" for _, i in having for tag, _ in _refs(i)):
                    rank = having[0][0]
                    lacking = next(r for r, own in pairs if text not in own)
                    raise _different_keys([inner], rank, rank, lacking)
            merged.append([key, self.merge(having, inner, free)])
        return dict(merged) if plain else {"$dict": merged}

    def optimizer(self, nodes: Nodes, name: str) -> Any:
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

    def groups(self, nodes: Nodes, name: str) -> Any:
        """Merge the parameter groups of all ranks. Parameters on several ranks must have equal
        options. Parameters of one rank join a group with their options, or form a new one."""
        merged: list[dict[str, Any]] = []
        options: list[tuple[int, dict[str, Any]]] = []
        place: dict[str, int] = {}
        for rank, groups in nodes:
            for number, group in enumerate(groups):
                own = {key: value for key, value in group.items() if key not in _LISTS}
                known = {place[fqn] for fqn in group["params"] if fqn in place}
                for index in known:
                    self.merge([options[index], (rank, own)], below(name, number), False)
                alike = [at for at, (_, theirs) in enumerate(options) if _same(theirs, own)]
                if known:
                    index = min(known)
                elif alike:
                    index = number if number in alike else alike[0]
                else:
                    index = len(merged)
                    merged.append({**group, **{key: [] for key in _LISTS if key in group}})
                    options.append((rank, own))
                new = [at for at, fqn in enumerate(group["params"]) if fqn not in place]
                for key in _LISTS & group.keys() & merged[index].keys():
                    merged[index][key] += [group[key][at] for at in new]
                place.update((group["params"][at], index) for at in new)
        return merged

    def comes_with_tensors(self, having: Nodes) -> bool:
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


def _same(mine: Any, theirs: Any) -> bool:
    return msgspec.json.encode(mine) == msgspec.json.encode(theirs)


def _is_optimizer(node: dict[str, Any]) -> bool:
    groups = node.get("param_groups")
    return (
        type(node.get("state")) is dict
        and type(groups) is list
        and all(type(g) is dict and type(g.get("params")) is list for g in groups)
        and all(type(name) is str for group in groups for name in group["params"])
    )


def _pairs(node: dict[str, Any]) -> dict[bytes, tuple[Any, Any]]:
    """The items of a dict in typed JSON, by the text of their keys."""
    items = node["$dict"] if tag_of(node) == "$dict" else node.items()
    return {msgspec.json.encode(key): (key, item) for key, item in items}


def _refs(node: Any) -> Iterator[tuple[str, str]]:
    """(tag, target) of the references in a node."""
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
