"""Packages whose names are loaded when first used (PEP 562)."""

from __future__ import annotations

import builtins
import contextlib
import importlib
import threading
import types
from collections.abc import Iterator
from typing import Any

__all__ = ["lazy_imports"]

# One block at a time: two blocks that end out of order would restore each other's hook. A block waits for nothing, so
# there is no deadlock with the locks of modules.
_one_block = threading.Lock()


@contextlib.contextmanager
def lazy_imports(package: dict[str, Any]) -> Iterator[None]:
    """Imports in this block load nothing: each name is imported at its first use.

    The block makes the `__all__`, `__getattr__` and `__dir__` of the package from its imports, each of the form `from
    module import name`, so that every public name stands once. Editors and type checkers see plain imports. Python 3.15
    has `lazy from module import name` for this (PEP 810).

    Args:
        package: its `globals()`.

    Example:
        >>> scope = {"__name__": "mathematics"}
        >>> with lazy_imports(scope):
        ...     exec("from math import pi", scope)
        >>> "pi" in scope, scope["__getattr__"]("pi")
        (False, 3.141592653589793)
    """
    homes: dict[str, str] = {}

    def note(name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> Any:
        if globals is not package:  # another thread imports at the same time
            return original(name, globals, locals, fromlist, level)
        homes.update(dict.fromkeys(fromlist, name))
        return types.SimpleNamespace(**dict.fromkeys(fromlist))

    with _one_block:
        original = builtins.__import__
        builtins.__import__ = note
        try:
            yield
        finally:
            builtins.__import__ = original
    for name in homes:
        del package[name]

    def load(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package['__name__']!r} has no attribute {name!r}")
        if homes[name] == package["__name__"]:
            return importlib.import_module(f"{homes[name]}.{name}")
        return getattr(importlib.import_module(homes[name]), name)

    names = sorted(homes)
    package.update(__all__=names, __getattr__=load, __dir__=lambda: names)
