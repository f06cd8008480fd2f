"""Blocks whose parameters have an axis of layers, and copies of one layer, which refuse every change."""

from __future__ import annotations

import functools
import operator
import types
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attnax.nn._parts import name_of

__all__ = ["COPY_OF_A_LAYER", "read_only", "refuse_shared", "stack_blocks", "take_block"]

COPY_OF_A_LAYER = (
    "Stack.layers: with scan_layers layers share stacked parameters, and these are copies, so a change would be "
    "lost. Change model = attnax.nn.with_scan_layers(model, False), and go back by with_scan_layers(model, True); or "
    "change stack.periods, whose parameters have one entry a layer along axis 0. nnx.clone(layer) is a copy to keep."
)


def stack_blocks(blocks: Sequence[nnx.Module]) -> nnx.Module:
    """One block whose arrays hold those of all blocks along a new axis 0.

    Raises:
        ValueError: the blocks differ in more than the values of their arrays.
    """
    graphdefs, states = zip(*(nnx.split(block) for block in blocks), strict=True)
    kinds = [jax.tree.map(_kind, state) for state in states]
    for layer, (graphdef, kind) in enumerate(zip(graphdefs, kinds, strict=True)):
        if graphdef != graphdefs[0] or jax.tree.flatten(kind) != jax.tree.flatten(kinds[0]):
            found = next(_differences(blocks[0], blocks[layer]), "their structure")
            raise ValueError(
                "Stack: with scan_layers the blocks at one place of the layer_pattern are one program, so they must "
                f"be equal but for the values of their arrays; got {type(blocks[0]).__name__}s that differ in {found}. "
                "Keep what differs in an array (an nnx.Variable), or take scan_layers=False."
            )
    return nnx.merge(graphdefs[0], jax.tree.map(lambda *arrays: jnp.stack(arrays), *states))


def refuse_shared(blocks: Sequence[nnx.Module]) -> None:
    """Raises ValueError if two of the blocks share a parameter, of which stacking would make two."""
    owners: dict[int, int] = {}
    for layer, block in enumerate(blocks):
        for path, node in nnx.iter_graph(block):
            if isinstance(node, nnx.Variable) and owners.setdefault(id(node), layer) != layer:
                raise ValueError(
                    "Stack: with scan_layers each layer has parameters of its own, which are stacked; got layers "
                    f"{owners[id(node)]} and {layer} that share {'.'.join(map(str, path))}. Take scan_layers=False."
                )


def take_block(block: nnx.Module, index: int) -> nnx.Module:
    """A copy of one of the blocks that `stack_blocks` put together."""
    graphdef, state = nnx.split(block)
    return nnx.merge(graphdef, jax.tree.map(operator.itemgetter(index), state))


def _kind(x: Any) -> str:
    return f"{x.dtype}{list(x.shape)}"


def _differences(one: nnx.Module, other: nnx.Module) -> Iterator[str]:
    """The attributes in which two blocks differ, in words."""
    parts = [dict(nnx.iter_modules(block)) for block in (one, other)]
    for path in dict.fromkeys((*parts[0], *parts[1])):
        left, right = (part.get(path) for part in parts)
        where = ".".join(map(str, path))
        if type(left) is not type(right):
            yield f"{where or 'their class'}: {type(left).__name__} and {type(right).__name__}"
            continue
        for name in dict.fromkeys((*vars(left), *vars(right))):
            if name.startswith("_pytree__"):
                continue
            values = [vars(side).get(name) for side in (left, right)]
            if not _is_equal(*values):
                yield f"{where}.{name}: {_words(values[0])} and {_words(values[1])}".lstrip(".")


def _is_equal(one: Any, other: Any) -> bool:
    """Whether two attributes are equal; modules have a path of their own, and variables differ by shape and dtype."""
    if isinstance(one, nnx.Module | nnx.Variable) or isinstance(other, nnx.Module | nnx.Variable):
        return _words(one) == _words(other)
    return one is other or bool(np.all(one == other))


def _words(value: Any) -> str:
    if isinstance(value, nnx.Module):
        return ""  # it has a path of its own
    if isinstance(value, nnx.Variable):
        return jax.tree_util.tree_map(_kind, value.get_raw_value()) if value.get_raw_value() is not None else "None"
    return f"{name_of(value)} at {id(value):#x}" if callable(value) else repr(value)


class _Refusing:
    """In place of the trace that a Variable or a Module was made in: Flax asks it before every change."""

    def __init__(self, message: str):
        self.message = message

    def is_valid(self) -> bool:
        raise ValueError(self.message)


def read_only(block: Any, message: str) -> Any:
    """The block, which from now on raises ValueError with `message` for every change of its parts and parameters."""
    refusing = _Refusing(message)
    for _, node in nnx.iter_graph(block):
        if isinstance(node, nnx.Variable):
            object.__setattr__(node, "_trace_state", refusing)
        elif isinstance(node, nnx.Pytree):
            node.__class__ = _read_only_class(type(node))
            node._pytree__state._trace_state = refusing  # type: ignore[assignment]
    return block


@functools.cache  # one class for each class, so that the copies of equal blocks are equal
def _read_only_class(cls: type[Any]) -> type[Any]:
    """A class that refuses deletions too, of which Flax asks nobody; `nnx.clone` gives the class itself again."""

    def delete(self: Any, name: str) -> None:
        self._pytree__state.trace_state.is_valid()
        super(own, self).__delattr__(name)  # type: ignore[arg-type]

    members: dict[str, Any] = {"__delattr__": delete, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
    members["__doc__"] = cls.__doc__
    members["_graph_node_create_empty"] = staticmethod(lambda node_type: object.__new__(cls))
    own = types.new_class(cls.__name__, (cls,), exec_body=lambda namespace: namespace.update(members))
    return own
