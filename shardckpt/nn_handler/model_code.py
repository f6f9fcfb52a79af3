"""The source of a model: the module of its class, and the modules of its package that it uses."""

from __future__ import annotations

import ast
import importlib.abc
import importlib.machinery
import importlib.util
import inspect
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from shardckpt.errors import CheckpointError, StateError

__all__ = ["class_of_code", "collect_code", "in_notebook"]


def collect_code(model_class: Any) -> dict[str, str]:
    """Collect the source of a class by the names of modules.

    These are the module of the class, and the modules that it imports, directly or not, from its
    top-level package or, without a package, from its folder. Of `__main__`, a script or the cells
    of a notebook, only imports, definitions and constants are collected, so that the rest does not
    run again. Raises StateError if the source of the class can't be found.
    """
    found: dict[str, str] = {}
    waiting = [model_class.__module__]
    while waiting:
        name = waiting.pop()
        if name in found or not _is_users(name, model_class.__module__):
            continue
        try:
            source = _source(name)
        except (KeyError, OSError, TypeError) as error:
            if name == model_class.__module__:
                raise StateError(
                    "The source of the model's class can't be found",
                    expected="a class that is defined in a file or in a cell of a notebook",
                    actual=f"{name}:{model_class.__qualname__}",
                    remedy="define it in a file, or leave out save_model_code=True",
                ) from error
            if name not in sys.modules:
                continue
            source = ""  # getsource raises OSError for an empty file too
        found[name] = _definitions(source) if name == "__main__" else source
        waiting += _imports(source, name, is_package=hasattr(sys.modules[name], "__path__"))
        waiting += [name.rpartition(".")[0]] if "." in name else []
    return dict(sorted(found.items()))


def in_notebook() -> bool:
    """Whether `__main__` consists of the cells of a notebook or of an interactive session."""
    main = sys.modules.get("__main__")
    return not hasattr(main, "__file__") and isinstance(getattr(main, "In", None), list)


def _source(name: str) -> str:
    if name == "__main__" and in_notebook():
        return "\n".join(filter(_is_python, vars(sys.modules[name])["In"]))
    return inspect.getsource(sys.modules[name])


def _is_python(cell: str) -> bool:
    """Whether a cell can be parsed: not one with commands of IPython, such as `%time`."""
    try:
        ast.parse(cell)
    except SyntaxError:
        return False
    return True


def _is_users(name: str, own: str) -> bool:
    """Whether a module belongs to the same code as the module of the model."""
    if name == own or name.partition(".")[0] == own.partition(".")[0]:
        return True
    file, own_file = (getattr(sys.modules.get(n), "__file__", None) for n in (name, own))
    beside = "." not in own and bool(file) and bool(own_file)
    return beside and str(file).rpartition("/")[0] == str(own_file).rpartition("/")[0]


def _imports(source: str, name: str, *, is_package: bool) -> list[str]:
    package = name if is_package else name.rpartition(".")[0]
    names: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = importlib.util.resolve_name("." * node.level + base, package or name)
            names += [base, *(f"{base}.{alias.name}" for alias in node.names)]
    return names


def _definitions(source: str) -> str:
    kept = []
    for node in ast.parse(source).body:
        definition = isinstance(
            node, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        )
        if definition or (isinstance(node, ast.Assign) and _is_constant(node.value)):
            kept.append(ast.get_source_segment(source, node, padded=True) or "")
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                decorators = [f"@{ast.unparse(d)}" for d in node.decorator_list]
                kept[-1] = "\n".join([*decorators, kept[-1]])
    return "\n\n".join(kept) + "\n"


def _is_constant(node: ast.expr) -> bool:
    try:
        ast.literal_eval(node)
    except ValueError:
        return False
    return True


def class_of_code(code: Mapping[str, str], name: str, *, path: str) -> Any:
    """Run saved source and return the class named `module:qualname`.

    The source can do everything that the user can. Call this only with trust_code=True.
    """
    module, _, qualname = name.partition(":")
    if module not in code:
        raise CheckpointError(
            "The checkpoint holds no source of its model",
            path=path,
            expected=f"the source of {module}",
            remedy="save with save_model_code=True, or give model_class= to load",
        )
    with _imported_from(code):
        found: Any = importlib.import_module(_run_as(module))
        for part in qualname.split("."):
            found = getattr(found, part)
    return found


def _run_as(module: str) -> str:
    # code under `if __name__ == "__main__"` must not run
    return "shardckpt_saved_main" if module == "__main__" else module


@contextmanager
def _imported_from(code: Mapping[str, str]) -> Iterator[None]:
    """Import saved modules from their source inside the with block.

    Modules of the same names that were imported before are restored after it.
    """
    sources = {_run_as(name): source for name, source in code.items()}
    before = {name: sys.modules.pop(name) for name in sources if name in sys.modules}
    finder = _Finder(sources)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in sources:
            sys.modules.pop(name, None)
        sys.modules.update(before)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.InspectLoader):
    def __init__(self, sources: Mapping[str, str]) -> None:
        self.sources = sources

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: types.ModuleType | None = None,
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in self.sources:
            return None
        return importlib.util.spec_from_loader(fullname, self, is_package=self.is_package(fullname))

    def is_package(self, fullname: str) -> bool:
        return any(name.startswith(f"{fullname}.") for name in self.sources)

    def get_source(self, fullname: str) -> str:
        return self.sources[fullname]
