"""What a stack asks of a block: a `run` that returns an Output, and the carry that passes from block to block."""

from __future__ import annotations

import inspect
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from attnax.nn._parts import is_own_class
from attnax.nn._run import overrides_call, run_of
from attnax.nn._stacked import read_only
from attnax.nn.blocks import DecoderBlock, EncoderBlock, Output
from attnax.typing import Array

__all__ = ["call_block", "check_block", "init_carry"]


def init_carry(block: Any, x: Array, input_ids: Array | None) -> Any:
    """The carry that a block makes from the stream that enters the stack and the token ids.

    Raises:
        ValueError: `init_carry` changes the block, or returns something else than a pytree of arrays.
    """
    name = type(block).__name__
    copy = read_only(
        nnx.clone(block),
        f"{name}.init_carry: it must leave the block as it is; got a change, which would be lost. Return what the "
        "blocks need, or change it in run.",
    )
    made = copy.init_carry(x, input_ids)
    try:
        return jax.tree.map(_as_array, made)
    except TypeError as error:
        raise ValueError(f"{name}.init_carry: the carry must be a pytree of arrays; {error}") from error


def check_block(block: Any) -> None:
    """Raises ValueError unless make_block has made a module with a `run`; a `__call__` alone is refused at the call."""
    is_module = isinstance(block, nnx.Module)
    if not is_module or not (hasattr(block, "run") or overrides_call(block)):
        raise ValueError(
            "Stack: make_block must return a block, an nnx.Module with run(x, **options) that returns an Output; got "
            f"{type(block).__name__}{' without run' if is_module else ''}."
        )


def call_block(block: Any, x: Array, carry: Any, options: dict[str, Any]) -> Output:
    """The Output of a block with the new carry; a block of a user is held to the protocol.

    Raises:
        ValueError: its run does not take the options or does not return an Output, the stream
            changes its shape or dtype, a cache is lost, or the carry changes its structure, shapes or dtypes.
    """
    if is_own_class(block):
        out: Output = run_of(block)(x, **options)
        return out._replace(carry=carry)
    name = type(block).__name__
    takes_carry, run = hasattr(block, "init_carry"), run_of(block)
    if takes_carry:
        options = options | {"carry": carry}
    try:
        inspect.signature(run).bind(x, **options)
    except TypeError as error:
        raise ValueError(
            f"Stack: the run of a block must take x and every option that the model hands down; got {name}.run, for "
            f"which {error}. Write run(self, x, **options), and hand the options on to attention."
        ) from None
    names_weights = "attention_weights" in inspect.signature(run).parameters
    if options.get("attention_weights") and not (names_weights or isinstance(block, EncoderBlock | DecoderBlock)):
        raise _without_weights(name)
    out = run(x, **options)
    if not isinstance(out, Output):
        raise ValueError(
            f"Stack: the run of a block must return an attnax.nn.Output; got {type(out).__name__} from {name}.run."
        )
    _check(name, out, x, options)
    return out._replace(carry=_next_carry(name, carry, out.carry, takes_carry))


def _check(name: str, out: Output, x: Array, options: dict[str, Any]) -> None:
    """Raises ValueError for an Output of a user's block that the stack or a loop around it cannot go on from."""
    for field, kind, wanted in (("hidden", jax.Array, "an array"), ("aux", dict, "a dictionary, {} for none")):
        if not isinstance(value := getattr(out, field), kind):
            raise ValueError(
                f"Stack: Output.{field} of a block must be {wanted}; got {type(value).__name__} from {name}.run."
            )
    if out.hidden.shape != x.shape or out.hidden.dtype != x.dtype:
        raise ValueError(
            f"Stack: a block must keep the shape and the dtype of the stream, {x.dtype}{list(x.shape)}; got "
            f"{out.hidden.dtype}{list(out.hidden.shape)} from {name}.run."
        )
    if options.get("cache") is not None and out.caches is None:
        raise ValueError(
            f"Stack: a block that gets a cache must return the new one; got caches=None from {name}.run. Hand "
            "`cache` to its attention, and return the new cache as Output.caches."
        )
    if options.get("attention_weights") and (out.probed is None or out.probed.attention_weights is None):
        raise _without_weights(name)


def _without_weights(name: str) -> ValueError:
    return ValueError(
        f"Probe: attention_weights needs them of every block; got none from {name}.run. Derive the block from "
        "EncoderBlock or DecoderBlock and hand its options on, or take attention_weights=False as an option of run and "
        "return Output(..., probed=Probed(attention_weights=weights))."
    )


def _next_carry(name: str, before: Any, after: Any, takes_carry: bool) -> Any:
    if after is None:
        return before
    if not takes_carry:
        raise ValueError(
            f"Stack: a block with a carry must have init_carry(x, input_ids); got a carry from {name}.run, which has "
            "none. Define init_carry, or derive the class from the one that has it."
        )
    had, has = (
        [f"{jnp.result_type(x)}{list(jnp.shape(x))}" for x in jax.tree.leaves(tree)] for tree in (before, after)
    )
    want, got = (str(jax.tree.structure(tree)) for tree in (before, after))
    if want != got:
        raise ValueError(f"Stack: a block must keep the structure of the carry, {want}; got {got} from {name}.run.")
    paths = [jax.tree_util.keystr(path) or "the carry" for path, _ in jax.tree_util.tree_flatten_with_path(before)[0]]
    for path, one, other in zip(paths, had, has, strict=True):
        if one != other:
            raise ValueError(
                f"Stack: a block must keep the shapes and dtypes of the carry; got {path} of {one} before, and {other} "
                f"from {name}.run."
            )
    return jax.tree.map(_as_array, after)


def _as_array(leaf: Any) -> Array:
    """The leaf as an array whose dtype is fixed, as a loop carries it."""
    array = jnp.asarray(leaf)
    # A random key is an array without weak types.
    return lax.convert_element_type(array, array.dtype) if getattr(array, "weak_type", False) else array
