"""Modules have `run` underneath and `__call__` on top, and what is around a module calls `run`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["overrides_call", "run_of"]


def run_of(module: Any) -> Callable[..., Any]:
    """`module.run`.

    Raises:
        NotImplementedError: its class, or the object itself, has another `__call__` with the old `run`, or with none.
    """
    if overrides_call(module) or "__call__" in vars(module):
        raise NotImplementedError(
            f"{type(module).__name__}: the module around it calls run, so a __call__ of its own would be ignored; got "
            "__call__ without run. Override run, with the arguments and the result that it has in attnax."
        )
    run: Callable[..., Any] = module.run
    return run


def overrides_call(module: Any) -> bool:
    """Whether the class of a module changes `__call__` further down than `run`."""
    classes = type(module).__mro__
    depths = [
        next((depth for depth, cls in enumerate(classes) if name in vars(cls)), len(classes))
        for name in ("__call__", "run")
    ]
    return depths[0] < depths[1]
