"""Checks of arguments, each written once for all functions; the messages name the caller."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnax.typing import Array, AttentionOptions, ScoreMod, ScoreShape

__all__ = [
    "apply_score_mod",
    "attention_options",
    "check_attention",
    "check_broadcast",
    "check_options",
    "check_positions",
    "check_shape",
    "explain_tracing",
    "is_concrete",
    "wide_dtype",
]


def is_concrete(x: Any) -> bool:
    """Whether the value of `x` can be read now: no transformation traces `x`."""
    return not isinstance(x, jax.core.Tracer)


def wide_dtype(dtype: Any) -> Any:
    """The dtype of scores and sums: float32, or the floating dtype itself if it has more bits."""
    return jnp.dtype(jnp.float32) if jnp.dtype(dtype).itemsize < 4 else jnp.dtype(dtype)


def check_broadcast(caller: str, name: str, shape: Sequence[int], score_shape: ScoreShape) -> None:
    """Raises ValueError unless an array of `shape` broadcasts to (B, N, T, S) = `score_shape`."""
    fits = len(shape) <= 4 and all(
        want is None or have in (1, want) for have, want in zip(reversed(shape), reversed(score_shape), strict=False)
    )
    if not fits:
        sizes = ", ".join("any" if want is None else str(want) for want in score_shape)
        raise ValueError(
            f"{caller}: {name} must broadcast to (batch, num_heads, seq_q, seq_kv)=({sizes}); "
            f"got {name}.shape={tuple(shape)}. Insert axes of size 1 where the {name} does not vary."
        )


@contextlib.contextmanager
def explain_tracing(caller: str, name: str) -> Iterator[None]:
    """If a user's function asks for the value of a traced index or score, raises ValueError with the remedy."""
    try:
        yield
    except (jax.errors.TracerArrayConversionError, jax.errors.ConcretizationTypeError, ValueError) as error:
        if isinstance(error, ValueError) and "truth value" not in str(error):
            raise
        asked = "NumPy" if isinstance(error, jax.errors.TracerArrayConversionError) else "Python"
        raise ValueError(
            f"{caller}: {name} is traced, so its indices and scores have no values that {asked} could ask for. Index a "
            "NumPy array as jnp.asarray(array)[...], call jax.numpy instead of numpy, and write jnp.where for `if`, "
            "`&`, `|` and `~` for `and`, `or` and `not`."
        ) from error


def apply_score_mod(caller: str, score_mod: ScoreMod, scores: Array, *indices: Any) -> Array:
    """The result of a score mod in the dtype of `scores`; ValueError for another shape or no floating dtype."""
    with explain_tracing(caller, "score_mod"):
        result = jnp.asarray(score_mod(scores, *indices))
    return check_scores(caller, result, scores).astype(scores.dtype)


def check_scores(caller: str, result: Any, scores: Any) -> Array:
    """The result of a score mod; ValueError for another shape than that of `scores` or no floating dtype."""
    result = jnp.asarray(result)
    if result.shape != scores.shape:
        raise ValueError(
            f"{caller}: score_mod must return scores of the shape that it is given; got {result.shape} "
            f"for {scores.shape}. Let indices and arrays broadcast against the scores."
        )
    if not jnp.issubdtype(result.dtype, jnp.floating):
        raise ValueError(
            f"{caller}: score_mod must return floating scores; got dtype={result.dtype}. "
            "Pass a function that returns booleans as the mask, or through mask_mod_to_score_mod."
        )
    return result


def check_positions(caller: str, name: str, positions: Any, batch: int, length: int) -> Array:
    """Positions as int32 (1 or batch, length); ValueError unless they are integers (length,) or (batch, length)."""
    if isinstance(positions, list | tuple):
        try:
            positions = np.asarray(positions)
        except ValueError as error:
            raise ValueError(f"{caller}: {name} must have rows of one length; got lists of several.") from error
    shape, dtype = jnp.shape(positions), jnp.result_type(positions)
    if shape not in ((length,), (1, length), (batch, length)) or not jnp.issubdtype(dtype, jnp.integer):
        raise ValueError(
            f"{caller}: {name} must be integers of shape ({length},) or ({batch}, {length}); "
            f"got shape={shape}, dtype={dtype}."
        )
    return jnp.atleast_2d(jnp.asarray(positions, jnp.int32))


def attention_options(
    mask: Any,
    score_mod: ScoreMod | None,
    dropout_rng: Array | None,
    dropout_rate: float,
    deterministic: bool,
    scale: float | Array | None,
) -> AttentionOptions:
    """The options of a call, in the order in which all built-in softmax kernels list them."""
    return AttentionOptions(
        mask=mask,
        score_mod=score_mod,
        dropout_rng=dropout_rng,
        dropout_rate=dropout_rate,
        deterministic=deterministic,
        scale=scale,
    )


def check_attention(
    caller: str,
    query: Array,
    key: Array | jax.ShapeDtypeStruct,
    value: Array | jax.ShapeDtypeStruct,
    *,
    mask: Any = None,
    score_mod: Any = None,
    dropout_rng: Array | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = True,
    scale: Any = None,
) -> None:
    """Raises ValueError, before any compute, unless the arguments of an `AttentionFn` fit together."""
    shapes = f"query.shape={query.shape}, key.shape={key.shape}, value.shape={value.shape}"
    if not query.ndim == key.ndim == value.ndim == 4:
        raise ValueError(
            f"{caller}: query, key and value must have 4 axes (batch, heads, length, head_dim); got {shapes}."
        )
    (batch, heads, seq_q, head_dim), (kv_heads, seq_kv) = query.shape, key.shape[1:3]
    if not batch == key.shape[0] == value.shape[0]:
        raise ValueError(f"{caller}: query, key and value must have the same batch size; got {shapes}.")
    if key.shape[1:3] != value.shape[1:3]:
        raise ValueError(f"{caller}: key and value must have the same heads and length; got {shapes}.")
    if head_dim != key.shape[3] or head_dim == 0:
        raise ValueError(f"{caller}: query and key must have the same head_dim, at least 1; got {shapes}.")
    if kv_heads == 0 or heads == 0 or heads % kv_heads:
        raise ValueError(
            f"{caller}: the number of query heads must be a multiple of the number of key heads; "
            f"got {heads} and {kv_heads}."
        )
    dtypes = {jnp.dtype(x.dtype) for x in (query, key, value)}
    if len(dtypes) > 1 or not jnp.issubdtype(query.dtype, jnp.floating):
        raise ValueError(
            f"{caller}: query, key and value must have one floating dtype; "
            f"got {query.dtype}, {key.dtype}, {value.dtype}. Cast them with `.astype`."
        )
    if isinstance(mask, jax.Array | np.ndarray):
        if mask.dtype != jnp.bool_:
            raise ValueError(
                f"{caller}: mask must be boolean, True to attend; got mask.dtype={mask.dtype}. "
                "Pass an additive bias as a score_mod."
            )
        check_broadcast(caller, "mask", mask.shape, (batch, heads, seq_q, seq_kv))
    elif mask is not None and not callable(mask):
        raise ValueError(f"{caller}: mask must be a boolean array, a Mask or a function; got {mask!r}.")
    if score_mod is not None and not callable(score_mod):
        raise ValueError(f"{caller}: score_mod must be a function (scores, b, h, q, kv) -> scores; got {score_mod!r}.")
    if scale is not None and jnp.ndim(scale) != 0:
        raise ValueError(
            f"{caller}: scale must be one number; got scale.shape={jnp.shape(scale)}. Vary it in a score_mod."
        )
    if not 0.0 <= dropout_rate < 1.0:
        raise ValueError(f"{caller}: dropout_rate must be at least 0 and below 1; got dropout_rate={dropout_rate}.")
    if dropout_rng is not None and not isinstance(dropout_rng, jax.Array):
        raise ValueError(f"{caller}: dropout_rng must be a key, jax.random.key(seed); got dropout_rng={dropout_rng!r}.")
    if dropout_rate > 0.0 and not deterministic and dropout_rng is None:
        raise ValueError(
            f"{caller}: dropout needs a key; got dropout_rate={dropout_rate}, deterministic=False, dropout_rng=None. "
            "Pass dropout_rng=jax.random.key(...) or deterministic=True."
        )


def check_shape(caller: str, name: str, array: Any, *wanted: tuple[int | str, ...], integers: bool = False) -> None:
    """Raises ValueError unless an array, or a number, is of one of the shapes; a word stands for any size."""
    shape = jnp.shape(array)
    fits = any(
        len(shape) == len(want)
        and all(isinstance(size, str) or size == have for size, have in zip(want, shape, strict=True))
        for want in wanted
    )
    kind, given = "of shape ", ""
    if integers:
        dtype = jnp.result_type(array)
        fits = fits and bool(jnp.issubdtype(dtype, jnp.integer))
        kind, given = "integers of shape ", f", dtype={dtype}"
    if not fits:
        shapes = " or ".join(f"({', '.join(map(str, want))}{',' if len(want) == 1 else ''})" for want in wanted)
        raise ValueError(f"{caller}: {name} must be {kind}{shapes}; got {name}.shape={shape}{given}.")


def check_options(caller: str, options: Mapping[str, Any], kind: type) -> None:
    """Raises TypeError, as for any call, for an option that the TypedDict `kind` lacks."""
    unknown = [name for name in options if name not in kind.__annotations__]
    if unknown:
        raise TypeError(f"{caller}: options must be among {', '.join(kind.__annotations__)}; got {', '.join(unknown)}.")
