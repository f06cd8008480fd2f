"""Marks the results of a loop of traced length; their reverse-mode derivative raises a clear error."""

from __future__ import annotations

from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

__all__ = ["without_reverse"]


def without_reverse(tree: Any, message: str) -> Any:
    """The arrays unchanged. Their reverse-mode derivative raises NotImplementedError(message); forward mode works."""
    return jax.tree.map(lambda x: _no_reverse_p.bind(x, message=message), tree)


def _refuse(cotangent: Any, x: Any, *, message: str) -> Any:
    raise NotImplementedError(message)


_no_reverse_p = Primitive("attnax_no_reverse")
_no_reverse_p.def_impl(lambda x, *, message: x)
_no_reverse_p.def_abstract_eval(lambda x, *, message: x)
ad.deflinear2(_no_reverse_p, _refuse)
batching.defvectorized(_no_reverse_p)
mlir.register_lowering(_no_reverse_p, lambda _, x, *, message: [x])
