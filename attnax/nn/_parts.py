"""The parts of a model that a user wrote: how they are given, and how they are found."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from typing import Any, TypedDict

import jax
from flax import nnx

from attnax.config import BlockConfig
from attnax.masks import kernel_of
from attnax.typing import AttentionFn

__all__ = [
    "MakeBlock",
    "Parts",
    "block_maker",
    "check_function",
    "find_parts",
    "is_own",
    "is_own_class",
    "name_of",
    "part_names",
    "without_modules",
]

MakeBlock = Callable[[nnx.Rngs, BlockConfig], Any]

_OURS = ("attnax", "flax", "jax", "jaxlib", "numpy", "builtins", "functools")


class Parts(TypedDict, total=False):
    """The parts of a model that its config cannot hold, as its constructor takes them."""

    make_block: MakeBlock | None
    attention_fn: AttentionFn | None


def block_maker(
    caller: str, default: Callable[..., Any], make_block: MakeBlock | None, attention_fn: AttentionFn | None
) -> MakeBlock:
    """The function that makes the blocks of a model.

    Args:
        caller: the model, for messages.
        default: the block of the library, which takes `attention_fn`.
        make_block: of the user.
        attention_fn: of the user; a function that all layers share.

    Raises:
        ValueError: both are given, one that is no function, or an attention_fn with arrays.
    """
    check_function(caller, "attention_fn", attention_fn)
    if make_block is not None:
        _check_maker(caller, make_block)
        if attention_fn is not None:
            raise ValueError(
                f"{caller}: make_block makes the attention of the blocks too; got make_block={name_of(make_block)} and "
                f"attention_fn={name_of(attention_fn)}. Hand the attention_fn to the block in make_block."
            )
        return make_block
    if attention_fn is None:
        return default
    leaves = jax.tree.leaves(nnx.state(attention_fn) if isinstance(attention_fn, nnx.Module) else attention_fn)
    if any(hasattr(leaf, "shape") for leaf in leaves):
        block = getattr(kernel_of(default), "__name__", "EncoderBlock")
        raise ValueError(
            f"{caller}: attention_fn is one function for all layers, which would share its arrays; got "
            f"attention_fn={name_of(attention_fn)} with {len(leaves)} arrays. Make one for each layer: "
            f"make_block=lambda rngs, config: {block}(rngs, config, attention_fn=MyAttention(rngs, config))."
        )
    return functools.partial(default, attention_fn=attention_fn)


def _check_maker(caller: str, make_block: Any) -> None:
    """Raises ValueError unless `make_block` can be called with the random streams and a config."""
    advice = "make_block must be a class or a function (rngs, config) -> block"
    if isinstance(make_block, nnx.Module) or not callable(make_block):
        raise ValueError(
            f"{caller}: {advice}, which makes one for each layer; got an object of {type(make_block).__name__}."
        )
    try:
        inspect.signature(make_block).bind(None, None)
    except TypeError as error:
        raise ValueError(f"{caller}: {advice}; got {name_of(make_block)}, for which {error}.") from None


def check_function(caller: str, name: str, function: Any) -> None:
    """Raises ValueError for an argument that is neither None nor a function nor an object with __call__."""
    if function is not None and (isinstance(function, type) or not callable(function)):
        raise ValueError(
            f"{caller}: {name} must be a function, or an object with __call__; got {name}={function!r}. "
            f"{'Make an object of the class.' if isinstance(function, type) else 'Leave it out for none.'}"
        )


def part_names(**parts: Any) -> dict[str, str]:
    """The names of the parts that are given, such as {"make_block": "module.MyBlock"}.

    The name of a partial says what it binds.
    """
    return {name: _name_with_bound(part) for name, part in parts.items() if part is not None}


def without_modules(name: str) -> str:
    """A name of `part_names` as a script would write it."""
    return re.sub(r"([A-Za-z_<][\w<>]*\.)+", "", name)


def name_of(part: Any) -> str:
    """The module and name of a class or function, of the function in a partial, or of an object's class."""
    owner = _owner(part)
    return f"{owner.__module__}.{getattr(owner, '__qualname__', type(owner).__name__)}"


def is_own(part: Any) -> bool:
    """Whether a class, a function or an object's class comes from this library, Flax or JAX."""
    return str(_owner(part).__module__).partition(".")[0] in _OURS


def is_own_class(module: Any) -> bool:
    """Whether the class of a block comes from this library."""
    return type(module).__module__.startswith("attnax.")


def find_parts(module: nnx.Module) -> dict[str, Any]:
    """The classes and functions in a module that are neither from this library nor from Flax or JAX, by their path."""
    found: dict[str, Any] = {}
    for path, part in nnx.iter_modules(module):
        where = ".".join(map(str, path))
        if not is_own(type(part)):
            found[where] = type(part)
        for name, value in vars(part).items():
            if callable(value) and not isinstance(value, nnx.Module | nnx.Variable) and not is_own(value):
                found[f"{where}.{name}".lstrip(".")] = value
    return found


def _name_with_bound(part: Any) -> str:
    if isinstance(part, functools.partial):
        words = [*map(_name_with_bound, part.args), *(f"{k}={_name_with_bound(v)}" for k, v in part.keywords.items())]
        return f"functools.partial({', '.join([_name_with_bound(part.func), *words])})"
    return repr(part) if part is None or isinstance(part, int | float | str) else name_of(part)


def _owner(part: Any) -> Any:
    inner = kernel_of(part)
    is_named = isinstance(inner, type) or (hasattr(inner, "__qualname__") and getattr(inner, "__module__", None))
    return inner if is_named else type(inner)
