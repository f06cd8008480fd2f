"""Exact attention in O(T + S) memory: `memory_efficient_attention` in tiles, `flash_attention` on any engine."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, Unpack, overload

import jax
import jax.numpy as jnp

from attnax.checks import attention_options
from attnax.kernels._call import Backend, Call, attend, prepare, why_not_cudnn_here
from attnax.kernels._call import why_not_cudnn as why_not_cudnn_call
from attnax.kernels._core.pairs import MixedPairsError
from attnax.kernels._core.platform import abstract_device, has_nvidia_gpu, why_no_card
from attnax.masks import Mask, names_residuals, reads_cache_in_chunks, takes_mask_objects
from attnax.typing import Array, ArrayLike, AttentionOptions, Float, MaskMod, ScoreMod, Shaped

__all__ = [
    "flash_attention",
    "memory_efficient_attention",
    "pallas_flash_attention",
    "why_not_cudnn",
    "why_not_pallas",
    "why_not_tpu",
]


_INTERPRETED: dict[Any, Backend] = {True: "interpret", "cuda": "interpret", "tpu": "interpret tpu"}


class _Options(AttentionOptions, total=False):
    block_size: int | None


class _Out(_Options, total=False):
    return_lse: Literal[False]


class _OutAndLse(_Options):
    return_lse: Literal[True]


@overload
def memory_efficient_attention(
    query: ArrayLike, key: ArrayLike, value: ArrayLike, **options: Unpack[_Out]
) -> Array: ...
@overload
def memory_efficient_attention(
    query: ArrayLike, key: ArrayLike, value: ArrayLike, **options: Unpack[_OutAndLse]
) -> tuple[Array, Array]: ...
@names_residuals
@reads_cache_in_chunks
@takes_mask_objects
def memory_efficient_attention(
    query: Float[ArrayLike, "B N T H"],
    key: Float[ArrayLike, "B K S H"],
    value: Float[ArrayLike, "B K S Hv"],
    *,
    mask: Mask | MaskMod | ArrayLike | None = None,
    score_mod: ScoreMod | None = None,
    dropout_rng: Shaped[Array, "..."] | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = True,
    scale: float | Float[Array, ""] | None = None,
    return_lse: bool = False,
    block_size: int | None = None,
) -> Float[Array, "B N T Hv"] | tuple[Float[Array, "B N T Hv"], Float[Array, "B N T"]]:
    """softmax(scale * query @ key^T) @ value tile by tile, without the tiles that the mask forbids; memory O(T + S).

    The result and its gradients are those of `standard_attention`, which documents the arguments and the guarantees.
    Empty tiles, in which no query attends a key, are not computed, forward or backward. Full tiles, in which every
    query attends every key, need no mask test. Both hold for masks of `attnax.masks`, one-line functions and arrays.

    Args:
        query: (batch, num_heads, seq_q, head_dim), any floating dtype.
        key: (batch, num_kv_heads, seq_kv, head_dim); num_heads is a multiple of num_kv_heads.
        value: (batch, num_kv_heads, seq_kv, value_dim).
        mask: True to attend, by default all: a Mask, a function `(b, h, q, kv) -> bool`, or a boolean array that
            broadcasts to (batch, num_heads, seq_q, seq_kv).
        score_mod: `(scores, b, h, q, kv) -> scores` on the scaled scores. Captured JAX arrays get gradients. Traced
            indices cannot index a captured NumPy array (NumPy raises the error): make it a JAX array.
        dropout_rng: key of the attention dropout.
        dropout_rate: probability of dropping each attention weight.
        deterministic: no dropout.
        scale: factor of the scores, by default head_dim ** -0.5.
        return_lse: also return the log of each query's sum of exponentials.
        block_size: queries and keys of a tile, by default chosen by shape and mask.

    Returns:
        (batch, num_heads, seq_q, value_dim) in the dtype of query, and with `return_lse` the log-sum-exp
        (batch, num_heads, seq_q).

    Raises:
        ValueError: shapes, dtypes or options that do not fit together.
        TypeError: forward-mode differentiation (`jax.jvp`); `standard_attention` has every derivative. Forward over
            reverse (`jax.jvp` of `jax.grad`) works.
        NotImplementedError: reverse over reverse, with several tiles; a mask or score mod that mixes pairs
            (see `attnax.ScoreMod`), which `standard_attention` computes; a mesh that cuts the sequence.

    Example:
        >>> import jax.numpy as jnp
        >>> from attnax import memory_efficient_attention
        >>> x = jnp.ones((1, 4, 1031, 8))
        >>> memory_efficient_attention(x, x, x, mask=lambda b, h, q, kv: abs(q - kv) < 64).shape
        (1, 4, 1031, 8)

    References:
        M. N. Rabe, C. Staats, "Self-attention Does Not Need O(n^2) Memory", 2021, https://arxiv.org/abs/2112.05682.
        T. Dao, "FlashAttention-2", 2023, https://arxiv.org/abs/2307.08691.
    """
    options = attention_options(mask, score_mod, dropout_rng, dropout_rate, deterministic, scale)
    return attend(
        "memory_efficient_attention",
        query,
        key,
        value,
        return_lse=return_lse,
        block_size=block_size,
        backend="tiles",
        **options,
    )


@overload
def flash_attention(query: ArrayLike, key: ArrayLike, value: ArrayLike, **options: Unpack[_Out]) -> Array: ...
@overload
def flash_attention(
    query: ArrayLike, key: ArrayLike, value: ArrayLike, **options: Unpack[_OutAndLse]
) -> tuple[Array, Array]: ...
@names_residuals
@reads_cache_in_chunks
@takes_mask_objects
def flash_attention(
    query: Float[ArrayLike, "B N T H"],
    key: Float[ArrayLike, "B K S H"],
    value: Float[ArrayLike, "B K S Hv"],
    *,
    mask: Mask | MaskMod | ArrayLike | None = None,
    score_mod: ScoreMod | None = None,
    dropout_rng: Shaped[Array, "..."] | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = True,
    scale: float | Float[Array, ""] | None = None,
    return_lse: bool = False,
    block_size: int | None = None,
) -> Float[Array, "B N T Hv"] | tuple[Float[Array, "B N T Hv"], Float[Array, "B N T"]]:
    """softmax(scale * query @ key^T) @ value on the fastest exact kernel of the platform; memory O(T + S).

    An NVIDIA GPU runs cuDNN if `why_not_cudnn` gives None, else the Pallas kernel if `why_not_pallas` gives None. A TPU
    runs JAX's splash attention for plain calls, else the Pallas kernel if `why_not_tpu` gives None. All other calls,
    and calls with a `block_size`, run the tiles of `memory_efficient_attention`, with the same arguments, results and
    errors. The choice is made when the program is lowered: a program that is exported for "cuda" on a machine without a
    GPU holds the GPU kernel.

    Example:
        >>> import jax.numpy as jnp
        >>> from attnax import flash_attention, masks
        >>> x = jnp.ones((1, 4, 37, 8))
        >>> flash_attention(x, x[:, :2], x[:, :2], mask=masks.causal() & masks.padding(jnp.array([31]))).shape
        (1, 4, 37, 8)
    """
    options = attention_options(mask, score_mod, dropout_rng, dropout_rate, deterministic, scale)
    return attend(
        "flash_attention",
        query,
        key,
        value,
        return_lse=return_lse,
        block_size=block_size,
        backend="automatic" if block_size is None else "tiles",
        **options,
    )


@names_residuals
@takes_mask_objects
def pallas_flash_attention(
    query: Float[ArrayLike, "B N T H"],
    key: Float[ArrayLike, "B K S H"],
    value: Float[ArrayLike, "B K S Hv"],
    *,
    mask: Mask | MaskMod | ArrayLike | None = None,
    score_mod: ScoreMod | None = None,
    dropout_rng: Shaped[Array, "..."] | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = True,
    scale: float | Float[Array, ""] | None = None,
    return_lse: bool = False,
    block_q: int | None = None,
    block_kv: int | None = None,
    interpret: bool | Literal["cuda", "tpu"] = False,
    force_fallback: bool = False,
) -> Float[Array, "B N T Hv"] | tuple[Float[Array, "B N T Hv"], Float[Array, "B N T"]]:
    """softmax(scale * query @ key^T) @ value in a Pallas kernel for GPUs or TPUs that holds mask and score mod.

    On any other platform the call runs in the engine of `memory_efficient_attention`. Arguments, results and errors are
    those of that function, except for the last four arguments. Products of float32 arrays are in float32 (no TF32).
    Products of bfloat16, and of float16 on a GPU, are of numbers in that dtype, weights too, with all sums in float32.

    Args:
        query: (batch, num_heads, seq_q, head_dim).
        key: (batch, num_kv_heads, seq_kv, head_dim).
        value: (batch, num_kv_heads, seq_kv, value_dim).
        mask: True to attend.
        score_mod: `(scores, b, h, q, kv) -> scores`: elementwise operations, and captured arrays indexed in all their
            axes by whole numbers made of b, h, q and kv.
        dropout_rng: key of the attention dropout.
        dropout_rate: probability of dropping each attention weight.
        deterministic: no dropout.
        scale: factor of the scores, by default head_dim ** -0.5.
        return_lse: also return the log of each query's sum of exponentials.
        block_q: queries of a tile, by default chosen by shape and mask; on a GPU a power of 2, at least 16, on a TPU a
            multiple of 128.
        block_kv: keys of a tile, likewise.
        interpret: run the kernel for a GPU (True or "cuda") or for a TPU ("tpu") as ordinary JAX on any platform; slow,
            for debugging.
        force_fallback: run the tiles of `memory_efficient_attention` on any platform.

    Raises:
        ValueError: both interpret and force_fallback, or another word for interpret.
        NotImplementedError: on a GPU, or interpreted, the reason that `why_not_pallas` gives; on a TPU that of
            `why_not_tpu`.

    Example:
        >>> import jax.numpy as jnp
        >>> from attnax import pallas_flash_attention
        >>> x = jnp.ones((1, 4, 37, 8))
        >>> pallas_flash_attention(x, x, x, block_q=16, block_kv=32).shape
        (1, 4, 37, 8)
    """
    if interpret not in (False, *_INTERPRETED):
        raise ValueError(
            f'pallas_flash_attention: interpret must be True, False, "cuda" or "tpu"; got interpret={interpret!r}.'
        )
    if interpret and force_fallback:
        raise ValueError(
            "pallas_flash_attention: interpret runs a kernel and force_fallback does without; "
            f"got interpret={interpret!r}, force_fallback=True. Leave one of the two out."
        )
    options = attention_options(mask, score_mod, dropout_rng, dropout_rate, deterministic, scale)
    return attend(
        "pallas_flash_attention",
        query,
        key,
        value,
        return_lse=return_lse,
        block_size=(block_q, block_kv),
        backend="tiles" if force_fallback else "pallas" if not interpret else _INTERPRETED[interpret],
        **options,
    )


def why_not_pallas(
    query: ArrayLike | jax.ShapeDtypeStruct,
    key: ArrayLike | jax.ShapeDtypeStruct,
    value: ArrayLike | jax.ShapeDtypeStruct,
    *,
    platform: str | None = None,
    block_q: int | None = None,
    block_kv: int | None = None,
    **options: Unpack[AttentionOptions],
) -> str | None:
    """The reason why the Pallas kernel for GPUs does not serve these arguments, or None. For TPUs see `why_not_tpu`.

    If there is a reason, on a GPU `flash_attention` uses the engine of `memory_efficient_attention`, and
    `pallas_flash_attention` raises. On a platform without kernels both use that engine.

    Args:
        query: as in `pallas_flash_attention`, or a `jax.ShapeDtypeStruct`.
        key: likewise.
        value: likewise.
        platform: "cuda" asks for an NVIDIA GPU on any machine; by default the platform of this process.
        block_q: as in `pallas_flash_attention`.
        block_kv: as in `pallas_flash_attention`. The card that the program is for must have the shared memory for these
            tiles: the card of this process, or the card that the mesh of the program names; if neither is known, every
            card must.
        options: the keywords of `flash_attention`, except `block_size` and `return_lse`.

    Raises:
        ValueError: arguments that no kernel takes, or another platform.

    Example:
        >>> import jax.numpy as jnp
        >>> import jax
        >>> from attnax import why_not_pallas
        >>> x = jnp.ones((1, 4, 37, 8))
        >>> why_not_pallas(x, x, x)
        'the Pallas kernel is for NVIDIA GPUs; this process computes on cpu'
        >>> why_not_pallas(x, x, x, score_mod=lambda scores, b, h, q, kv: scores + jax.lax.erf(scores), platform="cuda")
        'no kernel can hold this score mod: erf'
    """
    _check_question("why_not_pallas", platform, options)

    reason = _why_not_kernels("why_not_pallas", query, key, value, (block_q, block_kv), of_tpu=False, **options)
    if reason is None and abstract_device() is not None:
        reason = why_no_card()
    if reason is None and platform != "cuda" and not has_nvidia_gpu():
        return f"the Pallas kernel is for NVIDIA GPUs; this process computes on {jax.default_backend()}"
    return reason


def why_not_tpu(
    query: ArrayLike | jax.ShapeDtypeStruct,
    key: ArrayLike | jax.ShapeDtypeStruct,
    value: ArrayLike | jax.ShapeDtypeStruct,
    *,
    block_q: int | None = None,
    block_kv: int | None = None,
    **options: Unpack[AttentionOptions],
) -> str | None:
    """The reason why the Pallas kernel for TPUs does not serve these arguments, or None; the same on any machine.

    If there is a reason, a program for a TPU runs `flash_attention` in tiles, unless JAX's splash attention serves the
    call, and `pallas_flash_attention` raises. JAX does not cut TPU kernels: a program that `jit` cuts over several TPUs
    holds them if its arrays lie on one mesh whose axes are all Auto, or are all Explicit and cut the call, or inside of
    a `jax.shard_map` over all axes. Any other such program runs in tiles.

    Args:
        query: as in `pallas_flash_attention`, or a `jax.ShapeDtypeStruct`.
        key: likewise.
        value: likewise.
        block_q: as in `pallas_flash_attention`; a multiple of 128.
        block_kv: likewise.
        options: the keywords of `flash_attention`, except `block_size` and `return_lse`.

    Raises:
        ValueError: arguments that no kernel takes.

    Example:
        >>> import jax.numpy as jnp
        >>> from attnax import why_not_tpu
        >>> x = jnp.ones((1, 4, 37, 8))
        >>> why_not_tpu(x, x, x, score_mod=lambda scores, b, h, q, kv: scores - 0.1 * jnp.log1p(abs(q - kv)))
        >>> why_not_tpu(x, x, x, score_mod=lambda scores, b, h, q, kv: jnp.arcsin(scores))
        'no TPU kernel can hold this score mod: asin'
    """
    _check_question("why_not_tpu", None, options)
    return _why_not_kernels("why_not_tpu", query, key, value, (block_q, block_kv), of_tpu=True, **options)


def why_not_cudnn(
    query: ArrayLike | jax.ShapeDtypeStruct,
    key: ArrayLike | jax.ShapeDtypeStruct,
    value: ArrayLike | jax.ShapeDtypeStruct,
    *,
    return_lse: bool = False,
    platform: str | None = None,
    **options: Unpack[AttentionOptions],
) -> str | None:
    """The reason why `flash_attention` does not use cuDNN for these arguments, or None.

    cuDNN serves float16 and bfloat16 without a mask, with `causal()`, or with a causal `sliding_window` of known size,
    without score mod, dropout and log-sum-exp. To write its kernels into a program JAX needs its CUDA plugin (package
    `jax-cuda13-plugin[with-cuda]`), on a machine without a GPU too.

    Args:
        query: as in `flash_attention`, or a `jax.ShapeDtypeStruct`.
        key: likewise.
        value: likewise.
        return_lse: as in `flash_attention`.
        platform: "cuda" asks for an NVIDIA GPU on any machine; by default the platform of this process.
        options: the other keywords of `flash_attention`, except `block_size`.

    Raises:
        ValueError: arguments that no kernel takes, or another platform.

    Example:
        >>> import jax.numpy as jnp
        >>> from attnax.kernels.flash import why_not_cudnn
        >>> x = jnp.ones((1, 4, 37, 8))
        >>> why_not_cudnn(x, x, x, score_mod=lambda scores, b, h, q, kv: scores + q)
        'cuDNN takes no score mod'
        >>> why_not_cudnn(*[x.astype(jnp.bfloat16)[:, :, :36]] * 3)
        'this machine has no NVIDIA GPU'
    """
    _check_question("why_not_cudnn", platform, options)

    ask = partial(why_not_cudnn_call, "why_not_cudnn", return_lse=return_lse, **options)
    reason = _of_shapes(ask, query, key, value)
    if reason is None and platform != "cuda" and not has_nvidia_gpu():
        return "this machine has no NVIDIA GPU"
    return reason or why_not_cudnn_here()


def _check_question(caller: str, platform: str | None, options: AttentionOptions) -> None:
    """Raises ValueError for an unsupported platform, TypeError for an unknown keyword."""
    if platform not in (None, "cuda"):
        raise ValueError(f'{caller}: platform must be "cuda" or None, for this process; got platform={platform!r}.')
    unknown = sorted(set(options) - set(AttentionOptions.__annotations__))
    if unknown:
        raise TypeError(f"{caller}() got an unexpected keyword argument {unknown[0]!r}")


def _why_not_kernels(
    caller: str,
    query: Any,
    key: Any,
    value: Any,
    blocks: tuple[int | None, int | None],
    *,
    of_tpu: bool,
    **options: Unpack[AttentionOptions],
) -> str | None:
    def ask(query: Array, key: Array, value: Array) -> str | None:
        try:
            call = prepare(caller, query, key, value, block_size=blocks, backend="pallas", **options)
        except MixedPairsError as error:
            return str(error).removeprefix(f"{caller}: ")
        return call.why_not_kernels(of_tpu=of_tpu) if isinstance(call, Call) else None

    return _of_shapes(ask, query, key, value)


def _of_shapes(ask: Callable[[Array, Array, Array], str | None], *arrays: Any) -> str | None:
    """The answer of `ask` for arrays, or for their shapes (`jax.ShapeDtypeStruct`)."""
    if not any(isinstance(x, jax.ShapeDtypeStruct) for x in arrays):
        query, key, value = map(jnp.asarray, arrays)
        return ask(query, key, value)
    answers = []
    jax.eval_shape(lambda *traced: answers.append(ask(*traced)), *arrays)
    return answers[0]
