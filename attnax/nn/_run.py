"""A module computes in `run`, which other modules call; `__call__` only spells out the options for editors.

`run` takes the options as keywords; a TypedDict beside the class lists the options.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypedDict

from flax import nnx

from attnax.typing import ScoreMod

__all__ = ["Mode", "SelfAttentionOptions", "overrides_call", "run_of", "runs", "select_options"]


class Mode(TypedDict, total=False):
    """Whether a call uses dropout, and its randomness."""

    deterministic: bool | None
    rngs: nnx.Rngs | None


class SelfAttentionOptions(Mode, total=False):
    """The options that models, blocks and layers hand down to self-attention as they are."""

    score_mod: ScoreMod | None


def select_options(options: Mapping[str, Any], kind: type) -> dict[str, Any]:
    """The options that the TypedDict `kind` names."""
    return {name: value for name, value in options.items() if name in kind.__annotations__}


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
    """Whether `module.run` is `run`: neither overridden by a subclass nor replaced by an assignment."""
    return getattr(module.run, "__func__", None) is run


def overrides_call(module: Any) -> bool:
    """Whether a subclass overrides `__call__` but not `run`: `__call__` comes from a more derived class."""
    classes = type(module).__mro__
    depths = [
        next((depth for depth, cls in enumerate(classes) if name in vars(cls)), len(classes))
        for name in ("__call__", "run")
    ]
    return depths[0] < depths[1]
