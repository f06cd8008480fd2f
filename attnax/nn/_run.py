"""A module computes in `run`, and its `__call__` is sugar on top: the modules around it call `run`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["overrides_call", "run_of", "runs"]


def run_of(module: Any) -> Callable[..., Any]:
    """`module.run`, for a caller that would otherwise ignore an overridden `__call__`.

    Raises:
        NotImplementedError: the module's class, or the object itself, overrides `__call__` without `run`.
    """
    if overrides_call(module) or "__call__" in vars(module):
        raise NotImplementedError(
            f"{type(module).__name__}: the module around it calls run, so a __call__ of its own would be ignored; got "
            "__call__ without run. Override run, with the arguments and the result that it has in attnax."
        )
    run: Callable[..., Any] = module.run
    return run


def runs(module: Any, run: Callable[..., Any]) -> bool:
    """Whether `module.run` is this function: no subclass overrides it, and nobody assigned another."""
    return getattr(module.run, "__func__", None) is run


def overrides_call(module: Any) -> bool:
    """Whether a subclass overrides `__call__` without `run`: `__call__` comes from a class that is more derived."""
    classes = type(module).__mro__
    depths = [
        next((depth for depth, cls in enumerate(classes) if name in vars(cls)), len(classes))
        for name in ("__call__", "run")
    ]
    return depths[0] < depths[1]
