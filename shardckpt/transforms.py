"""Transforms of saved tensors on load and in convert: other names, splits, layouts and sizes.

    shardckpt.load(state, path, transforms=[
        Split("*.qkv.weight", into=("*.q.weight", "*.k.weight", "*.v.weight")),
        Transpose("*.fc1.weight"),
    ])

Transforms apply in order, each to the names and tensors that the one before it leaves. No tensor is
changed on disk, and each rank reads only the bytes of its part. In a pattern `*` stands for any
text. In a new name each `*` repeats the text of the same `*` of the pattern.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any, TypeAlias

import torch

from shardckpt.errors import LoadMismatchError, StateError
from shardckpt.format import typed_json as values
from shardckpt.format.dtype_names import NOT_COPYABLE
from shardckpt.format.dtypes import DTYPES
from shardckpt.format.entries import Manifest, TensorEntry
from shardckpt.format.typed_json import TensorRef
from shardckpt.state.derived import DerivedEntry, concatenated, cut, derived, padded, permuted
from shardckpt.state.saved_tree import SavedState, below, children, rebuilt, under

__all__ = [
    "Concatenate",
    "Pad",
    "Rename",
    "Split",
    "Transform",
    "Transforms",
    "Transpose",
    "Trim",
    "transformed",
]


class Transform(ABC):
    """The base class of all transforms. Users create the subclasses.

    Example:
        >>> from shardckpt.transforms import Rename, Transform
        >>> isinstance(Rename("*.gamma", "*.weight"), Transform)
        True
    """

    def __post_init__(self) -> None:
        """Check the types of the arguments. Raises StateError."""
        for name, value in vars(self).items():
            check = _CHECKS.get(f"{type(self).__name__}.{name}") or _CHECKS.get(name)
            if check is not None and not check[0](value):
                raise StateError(
                    f"Invalid argument of the transform {type(self).__name__}",
                    expected=f"{name}: {check[1]}",
                    actual=repr(value)[:200],
                    remedy="correct the transform",
                )

    @abstractmethod
    def patterns(self) -> tuple[str, ...]:
        """Return the patterns of the saved names; all have the same number of `*`."""

    @abstractmethod
    def new_names(self) -> tuple[str, ...]:
        """Return the patterns of the new names."""

    @abstractmethod
    def apply(self, tensors: Sequence[DerivedEntry]) -> Sequence[DerivedEntry]:
        """Return the new tensors, one for each new name.

        Args:
            tensors: A tensor for each pattern.

        Raises:
            ValueError: The tensors do not fit. The text says what was expected.
        """


_GROUPS = "param_groups"  # beside `state`, in the state of an optimizer

Transforms: TypeAlias = Sequence[Transform]


@dataclass(frozen=True)
class Rename(Transform):
    """Give tensors new names.

    Args:
        pattern: The pattern of the saved names.
        name: The pattern of the new names.

    Example:
        >>> import torch, shardckpt
        >>> from shardckpt.transforms import Rename
        >>> _ = shardckpt.save({"norm": {"gamma": torch.ones(2)}}, "run/step-1")
        >>> state = {"norm": {"weight": torch.zeros(2)}}
        >>> renamed = [Rename("*.gamma", "*.weight")]
        >>> report = shardckpt.load(state, "run/step-1", transforms=renamed)
        >>> state["norm"]["weight"]
        tensor([1., 1.])
    """

    pattern: str
    name: str

    def patterns(self) -> tuple[str, ...]:
        """See Transform.patterns."""
        return (self.pattern,)

    def new_names(self) -> tuple[str, ...]:
        """See Transform.new_names."""
        return (self.name,)

    def apply(self, tensors: Sequence[DerivedEntry]) -> Sequence[DerivedEntry]:
        """See Transform.apply."""
        return tensors


@dataclass(frozen=True)
class Split(Transform):
    """Split a tensor along a dimension into several tensors.

    With `groups`, the dimension consists of that many equal groups, and each group is split: this
    undoes an interleaving. A fused QKV weight that stores the rows of q, k and v of one head after
    another has as many groups as heads (with grouped queries, as groups of queries). A fused SwiGLU
    weight whose rows alternate has as many groups as rows of one part.

    Args:
        pattern: The pattern of the saved names.
        into: The pattern of the new names of each part.
        dim: The dimension; negative numbers count from the end.
        sizes: The size of each part in that dimension, over all groups. By default all parts are
            equal.
        groups: The number of groups.

    Example:
        >>> import torch, shardckpt
        >>> from shardckpt.transforms import Split
        >>> _ = shardckpt.save({"kv": torch.arange(8)}, "run/step-1")
        >>> state = {"k": torch.zeros(4, dtype=torch.int64), "v": torch.zeros(4, dtype=torch.int64)}
        >>> split = Split("kv", into=("k", "v"), groups=2)
        >>> report = shardckpt.load(state, "run/step-1", transforms=[split])
        >>> state
        {'k': tensor([0, 1, 4, 5]), 'v': tensor([2, 3, 6, 7])}
    """

    pattern: str
    into: Sequence[str]
    dim: int = 0
    sizes: Sequence[int] | None = None
    groups: int = 1

    def patterns(self) -> tuple[str, ...]:
        """See Transform.patterns."""
        return (self.pattern,)

    def new_names(self) -> tuple[str, ...]:
        """See Transform.new_names."""
        return tuple(self.into)

    def apply(self, tensors: Sequence[DerivedEntry]) -> Sequence[DerivedEntry]:
        """See Transform.apply."""
        (tensor,) = tensors
        dim, parts = _dim(self.dim, tensor), len(self.into)
        length = tensor.shape[dim]
        sizes = [length // parts] * parts if self.sizes is None else list(self.sizes)
        if len(sizes) != parts or sum(sizes) != length or min(sizes) < 0:
            raise ValueError(f"{parts} sizes whose sum is {length}, not {sizes}")
        _check_groups(sizes, self.groups)
        begins, ranges = [sum(sizes[:part]) for part in range(parts)], []
        for size, begin in zip(sizes, begins, strict=True):
            step, at = length // self.groups, begin // self.groups
            width = size // self.groups
            ranges.append([(g * step + at, g * step + at + width) for g in range(self.groups)])
        return [cut(tensor, dim, each) for each in ranges]


@dataclass(frozen=True)
class Concatenate(Transform):
    """Join several tensors along a dimension.

    With `groups`, each tensor consists of that many equal groups along the dimension, and the
    groups are interleaved: the first groups of all tensors, then the second ones, and so on. This
    undoes a Split with the same number of groups.

    Args:
        names: The pattern of the saved names of each part.
        into: The pattern of the new names.
        dim: The dimension; negative numbers count from the end.
        groups: The number of groups.

    Example:
        >>> import torch, shardckpt
        >>> from shardckpt.transforms import Concatenate
        >>> _ = shardckpt.save({"gate": torch.zeros(2), "up": torch.ones(2)}, "run/step-1")
        >>> state = {"fused": torch.full((4,), 9.0)}
        >>> fused = Concatenate(("gate", "up"), into="fused", groups=2)
        >>> report = shardckpt.load(state, "run/step-1", transforms=[fused])
        >>> state["fused"]
        tensor([0., 1., 0., 1.])
    """

    names: Sequence[str]
    into: str
    dim: int = 0
    groups: int = 1

    def patterns(self) -> tuple[str, ...]:
        """See Transform.patterns."""
        return tuple(self.names)

    def new_names(self) -> tuple[str, ...]:
        """See Transform.new_names."""
        return (self.into,)

    def apply(self, tensors: Sequence[DerivedEntry]) -> Sequence[DerivedEntry]:
        """See Transform.apply."""
        first = tensors[0]
        dim = _dim(self.dim, first)
        forms = {(t.dtype, *t.shape[:dim], *t.shape[dim + 1 :]) for t in tensors}
        if len(forms) > 1 or len({len(tensor.shape) for tensor in tensors}) > 1:
            shown = ", ".join(f"{tensor.dtype} {list(tensor.shape)}" for tensor in tensors)
            raise ValueError(f"tensors that differ only in dimension {dim}, not {shown}")
        sizes = [tensor.shape[dim] for tensor in tensors]
        _check_groups(sizes, self.groups)
        parts = []
        for group in range(self.groups):
            for tensor, size in zip(tensors, sizes, strict=True):
                width = size // self.groups
                parts.append(cut(tensor, dim, [(group * width, (group + 1) * width)]))
        return [concatenated(parts, dim)]


@dataclass(frozen=True)
class Transpose(Transform):
    """Permute the dimensions of tensors.

    Args:
        pattern: The pattern of the names, which stay.
        dims: The new order of the dimensions, as `torch.permute` takes it. By default the order is
            reversed.

    Example:
        >>> import torch, shardckpt
        >>> from shardckpt.transforms import Transpose
        >>> _ = shardckpt.save({"w": torch.arange(6.0).reshape(2, 3)}, "run/step-1")
        >>> state = {"w": torch.zeros(3, 2)}
        >>> report = shardckpt.load(state, "run/step-1", transforms=[Transpose("w")])
        >>> state["w"][2]
        tensor([2., 5.])
    """

    pattern: str
    dims: Sequence[int] | None = None

    def patterns(self) -> tuple[str, ...]:
        """See Transform.patterns."""
        return (self.pattern,)

    def new_names(self) -> tuple[str, ...]:
        """See Transform.new_names."""
        return (self.pattern,)

    def apply(self, tensors: Sequence[DerivedEntry]) -> Sequence[DerivedEntry]:
        """See Transform.apply."""
        (tensor,) = tensors
        every = list(range(len(tensor.shape)))
        dims = every[::-1] if self.dims is None else [_dim(dim, tensor) for dim in self.dims]
        if sorted(dims) != every:
            raise ValueError(f"a permutation of {every}, not {dims}")
        return [permuted(tensor, dims)]


@dataclass(frozen=True)
class Pad(Transform):
    """Extend tensors with a constant at the end of a dimension, such as a vocabulary.

    Args:
        pattern: The pattern of the names, which stay.
        size: The new size of the dimension.
        dim: The dimension; negative numbers count from the end.
        value: The constant.

    Example:
        >>> import torch, shardckpt
        >>> from shardckpt.transforms import Pad
        >>> _ = shardckpt.save({"embedding": torch.ones(3, 1)}, "run/step-1")
        >>> state = {"embedding": torch.full((4, 1), 9.0)}
        >>> report = shardckpt.load(state, "run/step-1", transforms=[Pad("embedding", 4)])
        >>> state["embedding"].flatten()
        tensor([1., 1., 1., 0.])
    """

    pattern: str
    size: int
    dim: int = 0
    value: float = 0

    def patterns(self) -> tuple[str, ...]:
        """See Transform.patterns."""
        return (self.pattern,)

    def new_names(self) -> tuple[str, ...]:
        """See Transform.new_names."""
        return (self.pattern,)

    def apply(self, tensors: Sequence[DerivedEntry]) -> Sequence[DerivedEntry]:
        """See Transform.apply."""
        (tensor,) = tensors
        dim = _dim(self.dim, tensor)
        if self.size < tensor.shape[dim]:
            raise ValueError(f"a size of {tensor.shape[dim]} or more, not {self.size}")
        if tensor.dtype in NOT_COPYABLE:
            raise ValueError(f"a dtype with constants, not {tensor.dtype}")
        if not _holds(tensor.dtype, self.value):
            raise ValueError(f"a value that {tensor.dtype} can hold, not {self.value!r}")
        return [padded(tensor, dim, self.size, self.value)]


@dataclass(frozen=True)
class Trim(Transform):
    """Leave out the end of a dimension of tensors, such as the padding of a vocabulary.

    Args:
        pattern: The pattern of the names, which stay.
        size: The new size of the dimension.
        dim: The dimension; negative numbers count from the end.

    Example:
        >>> import torch, shardckpt
        >>> from shardckpt.transforms import Trim
        >>> _ = shardckpt.save({"embedding": torch.arange(4.0)}, "run/step-1")
        >>> state = {"embedding": torch.zeros(3)}
        >>> report = shardckpt.load(state, "run/step-1", transforms=[Trim("embedding", 3)])
        >>> state["embedding"]
        tensor([0., 1., 2.])
    """

    pattern: str
    size: int
    dim: int = 0

    def patterns(self) -> tuple[str, ...]:
        """See Transform.patterns."""
        return (self.pattern,)

    def new_names(self) -> tuple[str, ...]:
        """See Transform.new_names."""
        return (self.pattern,)

    def apply(self, tensors: Sequence[DerivedEntry]) -> Sequence[DerivedEntry]:
        """See Transform.apply."""
        (tensor,) = tensors
        dim = _dim(self.dim, tensor)
        if not 0 <= self.size <= tensor.shape[dim]:
            raise ValueError(f"a size from 0 to {tensor.shape[dim]}, not {self.size}")
        return [cut(tensor, dim, [(0, self.size)])]


def _is_int(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _are(items: Any, check: Callable[[Any], bool]) -> bool:
    return isinstance(items, Sequence) and not isinstance(items, str) and all(map(check, items))


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _are_names(value: Any) -> bool:
    return _are(value, _is_name) and len(value) > 0


_CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "pattern": (_is_name, "a str that is not empty"),
    "name": (_is_name, "a str that is not empty"),
    "names": (_are_names, "a list or tuple of str that are not empty"),
    "into": (_is_name, "a str that is not empty"),
    "Split.into": (_are_names, "a list or tuple of str that are not empty"),
    "dim": (_is_int, "an int"),
    "size": (_is_int, "an int"),
    "groups": (_is_int, "an int"),
    "sizes": (lambda value: value is None or _are(value, _is_int), "None or ints"),
    "dims": (lambda value: value is None or _are(value, _is_int), "None or ints"),
    "value": (lambda value: isinstance(value, (bool, Real)), "a number"),
}
"""Argument of a transform -> whether a value is valid, and what is."""


def _holds(dtype: str, value: float) -> bool:
    """Whether a dtype can hold a constant: rounded if it has fractions, otherwise exactly.

    Torch converts to the nearest number that the dtype has. It must be the constant within the
    precision of the dtype, and have its sign.
    """
    try:
        found = torch.tensor(value, dtype=DTYPES[dtype], device="cpu")
    except (RuntimeError, OverflowError, TypeError, ValueError):
        return False
    if not (found.is_floating_point() or found.is_complex()):
        return bool(found.item() == value)
    rounded = found.to(torch.complex128 if found.is_complex() else torch.float64).real.item()
    if not math.isfinite(value) or value == 0:
        return rounded == value or (math.isnan(rounded) and math.isnan(value))
    facts = torch.finfo(found.dtype)
    return abs(rounded - value) <= max(facts.eps * abs(value), facts.tiny) and rounded * value >= 0


def _dim(dim: int, tensor: TensorEntry) -> int:
    if not -len(tensor.shape) <= dim < len(tensor.shape):
        raise ValueError(f"a tensor with dimension {dim}, not the shape {list(tensor.shape)}")
    return dim % len(tensor.shape)


def _check_groups(sizes: Sequence[int], groups: int) -> None:
    if groups < 1 or any(size % groups for size in sizes):
        raise ValueError(f"sizes that {groups} groups divide, not {list(sizes)}")


def transformed(manifest: Manifest, transforms: Transforms | None, *, path: str) -> Manifest:
    """Return the manifest that a checkpoint with the transformed tensors would have.

    Its tensors may be DerivedEntries, without chunks of their own.

    Args:
        manifest: The manifest.
        transforms: The transforms, in order.
        path: The path of the checkpoint, for errors.

    Raises:
        LoadMismatchError: A pattern matches no tensor, or a tensor does not fit.
        StateError: A transform is invalid, or two tensors get the same name.
    """
    for transform in transforms or ():
        if not isinstance(transform, Transform):
            raise StateError(
                "Invalid transform",
                expected="an object of shardckpt.transforms",
                actual=repr(transform)[:200],
            )
        manifest = _apply(manifest, transform, path)
    return manifest


def _apply(manifest: Manifest, transform: Transform, path: str) -> Manifest:
    saved = SavedState(manifest)
    refs = {
        name: node
        for name, node in saved.leaves.items()
        if isinstance(node, TensorRef) and node.ref_type != "per_rank"
    }
    tensors = dict(manifest.tensors)
    removed: set[str] = set()
    added: dict[str, tuple[TensorRef, str]] = {}  # new name -> tensor, name of its first source
    made: dict[Any, TensorRef] = {}  # so that tied tensors stay tied
    groups = _groups(saved)
    moved: dict[str, dict[str, dict[str, None]]] = {}  # groups -> parameter -> its new names
    for names, new_names in _matches(transform, list(refs), path):
        sources = [refs[name] for name in names]
        entries = [derived(tensors[ref.name], ref.name) for ref in sources]
        try:
            results = transform.apply(entries)
        except ValueError as error:
            raise LoadMismatchError(
                f"{type(transform).__name__} does not fit a tensor",
                path=path,
                tensor=names[0],
                expected=str(error),
                remedy="correct the transform",
            ) from None
        made_of = tuple(ref.name for ref in sources)
        pairs = zip(new_names, results, _same(entries, results), strict=True)
        for number, (name, entry, before) in enumerate(pairs):
            key = number, made_of
            if before is not None:  # only the name changes
                made[key] = sources[before]
            if key not in made:
                made[key] = TensorRef(_unused(name, tensors), sources[0].ref_type)
                tensors[made[key].name] = entry
            if name in added or (name in saved.leaves and name not in names):
                raise StateError(
                    "Two tensors have the same name after a transform",
                    path=path,
                    tensor=name,
                    remedy="correct the new names of the transform",
                )
            added[name] = (made[key], names[0])
        removed.update(names)
        for optimizer, old, new in _parameters(groups, names, new_names):
            moved.setdefault(optimizer, {}).setdefault(old, {})[new] = None
    _check_moved(saved, moved, removed, path)
    tree = _edited(_with_parameters(saved.tree, "", moved), removed, added, _homes(moved))
    held = {ref.name for ref in refs.values()} - {ref.name for ref in _refs(tree)}
    return replace(
        manifest,
        tensors={name: entry for name, entry in tensors.items() if name not in held},
        state=values.encode(tree, at=""),
    )


def _same(entries: Sequence[DerivedEntry], results: Sequence[DerivedEntry]) -> Iterator[int | None]:
    """Yield the index of the entry that each result is, or None."""
    for result in results:
        yield next((index for index, entry in enumerate(entries) if entry is result), None)


def _unused(name: str, tensors: Mapping[str, TensorEntry]) -> str:
    """Return a key for a new tensor. It is the name, unless the manifest has that already."""
    while name in tensors:
        name += "'"
    return name


def _groups(saved: SavedState) -> dict[str, set[str]]:
    """Return the names of the parameters of each optimizer, by the name of its groups."""
    found = {}
    for name, node in saved.nodes.items():
        if name.rpartition(".")[2] == _GROUPS and isinstance(node, list):
            lists = [group.get("params") for group in node if isinstance(group, dict)]
            names = {n for each in lists if isinstance(each, list) for n in each if _is_name(n)}
            found[name] = names
    return found


def _parameters(
    groups: Mapping[str, set[str]], names: Sequence[str], new_names: Sequence[str]
) -> Iterator[tuple[str, str, str]]:
    """Yield (groups, parameter, its new name) for tensors of the state of an optimizer that get the
    name of another parameter."""
    for at, parameters in groups.items():
        prefix = f"{at.removesuffix(_GROUPS)}state."
        for name in names:
            parts = name.removeprefix(prefix).split(".") if name.startswith(prefix) else []
            for length in range(1, len(parts)):
                old, key = ".".join(parts[:length]), ".".join(["", *parts[length:]])
                if old not in parameters:
                    continue
                for new in new_names:
                    if new.startswith(prefix) and new.endswith(key):
                        yield at, old, new.removeprefix(prefix).removesuffix(key)


def _check_moved(
    saved: SavedState, moved: Mapping[str, Mapping[str, Any]], removed: set[str], path: str
) -> None:
    """Raise StateError if a part of the state of a parameter keeps the old name."""
    for at, names in moved.items():
        for old in names:
            prefix = f"{at.removesuffix(_GROUPS)}state.{old}."
            left = [name for name in saved.leaves if name.startswith(prefix)]
            if rest := [name for name in left if name not in removed]:
                raise StateError(
                    "A transform renames a part of the state of a parameter",
                    path=path,
                    tensor=rest[0],
                    expected=f"new names for all of {prefix}*, which are tensors",
                    remedy="rename all of them, or load without the optimizer: "
                    'keys=["model"], for example',
                )


def _homes(moved: Mapping[str, Mapping[str, Any]]) -> set[str]:
    """Return the names of the dicts with the state of renamed parameters."""
    return {
        f"{at.removesuffix(_GROUPS)}state.{new}"
        for at, names in moved.items()
        for each in names.values()
        for new in each
    }


def _with_parameters(node: Any, name: str, moved: Mapping[str, Mapping[str, Any]]) -> Any:
    """Return the tree with the new names of parameters in the groups of optimizers."""
    if name in moved:
        return [_with_names(group, moved[name]) for group in node]
    if not any(under(at, name) for at in moved):
        return node
    if not (items := children(node)):
        return node
    return rebuilt(node, ((k, _with_parameters(v, below(name, k), moved)) for k, v in items))


def _with_names(group: Any, moved: Mapping[str, Any]) -> Any:
    if not isinstance(group, dict) or not isinstance(group.get("params"), list):
        return group
    names = dict.fromkeys(new for old in group["params"] for new in moved.get(old, (old,)))
    return {**group, "params": list(names)}


def _refs(node: Any) -> Iterator[TensorRef]:
    stack = [node]
    while stack:
        node = stack.pop()
        if isinstance(node, TensorRef):
            yield node
        stack += [item for _, item in children(node)]


def _matches(
    transform: Transform, names: list[str], path: str
) -> Iterator[tuple[list[str], list[str]]]:
    """Yield the names of tensors that a transform takes together, and their new names."""
    first, *others = patterns = transform.patterns()
    every = [*patterns, *transform.new_names()]
    if any(not isinstance(each, str) for each in every):
        raise StateError("Invalid names of a transform", expected="str", actual=repr(transform))
    if len({each.count("*") for each in every}) > 1 or len(set(transform.new_names())) < len(
        transform.new_names()
    ):
        raise StateError(
            "The names of a transform do not fit together",
            expected="different new names, and as many * in each name as in the others",
            actual=", ".join(every),
            remedy="correct the names",
        )
    form = re.compile("(.*)".join(map(re.escape, first.split("*"))), re.DOTALL)
    known, found = set(names), False
    for name in names:
        if match := form.fullmatch(name):
            found = True
            together = [name, *(_filled(other, match.groups()) for other in others)]
            for other in together:
                if other not in known:
                    raise _absent(other, names, path, transform)
            yield together, [_filled(new, match.groups()) for new in transform.new_names()]
    if not found:
        raise _absent(first, names, path, transform)


def _filled(pattern: str, texts: Sequence[str | Any]) -> str:
    """Return a pattern with texts in place of its stars."""
    first, *rest = pattern.split("*")
    return first + "".join(text + part for text, part in zip(texts, rest, strict=True))


def _absent(name: str, names: list[str], path: str, transform: Transform) -> LoadMismatchError:
    return LoadMismatchError(
        f"{type(transform).__name__} names {name!r}, and no saved tensor has this name",
        path=path,
        expected="the name of a saved tensor, or a pattern with *",
        actual=", ".join(names[:8]) or "a checkpoint without tensors",
        remedy="correct the transform, or list the names with `shardckpt inspect`",
    )


def _edited(
    tree: Any,
    removed: set[str],
    added: Mapping[str, tuple[TensorRef, str]],
    new_dicts: set[str],
) -> Any:
    """Return the tree without the removed leaves, and with the added ones.

    An added tensor stands in the place of a removed one of the same name. Otherwise it stands in
    the innermost dict around its source whose name begins its own name, or in a new dict in there.
    """
    homes: dict[str, dict[str, Any]] = {}
    holders = _dicts_around(tree, removed)
    for name, (ref, source) in added.items():
        if name in removed:
            continue
        home = next((at for at in holders[source] if under(name, at) and name != at), None)
        if home is None:
            raise StateError(
                "A new tensor has no place in the saved state",
                tensor=name,
                expected=f"a name that begins with the name of a dict around {source}",
                remedy="correct the new names of the transform",
            )
        inside = homes.setdefault(home, {})
        new_dict = next((at for at in new_dicts if under(name, at) and under(at, home)), home)
        if new_dict != home:
            inside = inside.setdefault(new_dict[len(home) :].lstrip("."), {})
        inside[name[len(new_dict) :].lstrip(".")] = ref
    nothing = object()

    def edit(node: Any, name: str) -> Any:
        items = children(node)
        if not items:
            return (added[name][0] if name in added else nothing) if name in removed else node
        kept = [(key, edit(item, below(name, key))) for key, item in items]
        if not isinstance(node, dict):
            gone = all(value is nothing for _, value in kept)
            filled = ((key, None if value is nothing else value) for key, value in kept)
            return nothing if gone else rebuilt(node, filled)
        new = homes.pop(name, {})
        for key, value in kept:
            if str(key) in new and value is not nothing:
                raise StateError(
                    "A tensor gets the name of a dict that holds other entries",
                    tensor=below(name, key),
                    expected="a name that no entry has",
                    remedy="correct the new names of the transform",
                )
        # a tensor that gets the name of a removed dict takes its place
        kept = [(key, new.pop(str(key)) if str(key) in new else value) for key, value in kept]
        chosen = [(key, value) for key, value in kept if value is not nothing]
        return rebuilt(node, [*chosen, *new.items()]) if chosen or new else nothing

    result = edit(tree, "")
    return {} if result is nothing else result


def _dicts_around(tree: Any, names: set[str]) -> dict[str, list[str]]:
    """Return the names of the dicts around each leaf, from the innermost to the outermost."""
    found: dict[str, list[str]] = {}
    stack: list[tuple[Any, str, list[str]]] = [(tree, "", [])]
    while stack:
        node, name, above = stack.pop()
        if name in names:
            found[name] = above
        around = [name, *above] if isinstance(node, dict) else above
        stack += [(item, below(name, key), around) for key, item in children(node)]
    return found
