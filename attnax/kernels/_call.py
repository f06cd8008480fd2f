"""One call of exact attention: checked, prepared once for every engine that may run it, and differentiated.

The tile loop (`_xla`) runs anywhere. A program lowered for an NVIDIA GPU runs cuDNN or the kernels of `_gpu`, one for a
TPU the kernels of `_tpu`, where these serve the call. All engines keep the same few residuals.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Unpack

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from attnax.checks import check_attention, is_concrete, wide_dtype
from attnax.kernels._core import softmax
from attnax.kernels._core.dropout import dropout_words, words_of_shard
from attnax.kernels._core.finite import scale_query
from attnax.kernels._core.lift import Deferred, Lifted, defer
from attnax.kernels._core.mesh import vary, varying_axes
from attnax.kernels._core.pairs import check_pairs
from attnax.kernels._core.platform import by_platform, has_nvidia_gpu, why_no_card, why_no_triton
from attnax.kernels._core.shards import Offset, Shards, find_shards
from attnax.kernels._gpu import split, tile_lists, tile_sizes
from attnax.kernels._gpu.cudnn import Cudnn, cudnn_backward, cudnn_forward, why_not_cudnn_call, why_not_cudnn_here
from attnax.kernels._gpu.tile_sizes import Tile
from attnax.kernels._tpu.splash import splash_backward, splash_forward, why_not_splash
from attnax.kernels._xla import tile_loop
from attnax.masks import Mask, resolve_masks
from attnax.pytrees import pytree_dataclass
from attnax.typing import Array, AttentionOptions, ScoreMod

if TYPE_CHECKING:
    from attnax.kernels._gpu.launch import Setup

__all__ = [
    "Backend",
    "Call",
    "Operands",
    "Plan",
    "attend",
    "attend_part",
    "bind",
    "finish_parts",
    "kernel_tiles",
    "part_backward",
    "prepare",
    "why_no_kernel",
]

Arrays = tuple[Array, Array, Array, Array]
"""query (B, N, T, H), key (B, K, S, H), value (B, K, S, V) in one floating dtype, and the scale in float32 at least."""

Backend = Literal["tiles", "automatic", "pallas", "interpret"]
"""`_xla/tile_loop.py` everywhere, what is fastest, or the kernels of `_gpu/kernels.py`: as they are, or interpreted."""


class KernelTiles(NamedTuple):
    """Tiles of the GPU kernels, forward and backward."""

    plain: tuple[Tile, Tile]
    busy: tuple[Tile, Tile]  # where dropout is drawn, or something is loaded for each pair


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that is static about a call, beside shapes."""

    tiles: tile_loop.Plan
    backend: Backend
    kernel: KernelTiles | None  # of the GPU kernels, where they serve the arrays
    cudnn: Cudnn | None  # what cuDNN is told, where it serves the call
    splash: tuple[Mask | None, ScoreMod | None] | None  # what a TPU's kernels are told, where they serve the call
    has_score_mod: bool
    learn_scale: bool
    is_part: bool = False  # the indices of queries and keys are those of the operands, and results are wide


@pytree_dataclass
class KernelOperands:
    """The mask and the score mod as the GPU kernels take them, before they are split."""

    mask: Lifted | Deferred | None
    bounds: tuple[Lifted, Lifted] | None  # of the mask, over the tiles
    score_mod: Lifted | Deferred | None
    tiles: tuple[Tile, Tile] | None = dataclasses.field(metadata={"static": True})  # None while anything is deferred
    is_opaque: bool = dataclasses.field(metadata={"static": True})


class Operands(NamedTuple):
    """What both passes read beside query, key, value and scale."""

    tiles: tile_loop.Operands
    kernel: KernelOperands | None

    @property
    def learned(self) -> tuple[Array, ...]:
        """The floating arrays that get gradients: those of the tiles, then those of the kernels."""
        return (*self.tiles.learned, *self.of_kernel)

    @property
    def of_kernel(self) -> tuple[Array, ...]:
        """Those of the kernels."""
        score_mod = None if self.kernel is None else self.kernel.score_mod
        return () if score_mod is None else score_mod.floats

    def sums(self) -> Sums:
        """Zeros to accumulate the gradients of `learned` in, of which one engine computes its own."""
        of_kernel = (vary(jnp.zeros(x.shape, wide_dtype(x.dtype)), varying_axes(x)) for x in self.of_kernel)
        return Sums(self.tiles.gradients(), tuple(of_kernel))

    def gradients(self, *, kernel: tuple[Array, ...] | None = None) -> tuple[Array, ...]:
        """The gradients of `learned`: those of the kernels, and 0."""
        of_tiles = tuple(map(jnp.zeros_like, self.tiles.learned))
        return (*of_tiles, *(tuple(map(jnp.zeros_like, self.of_kernel)) if kernel is None else kernel))


class Sums(NamedTuple):
    """Gradients of learned arrays, in float32 at least, summed over parts of the keys."""

    tiles: tuple[Array, ...]
    kernel: tuple[Array, ...]


BlockSize = int | tuple[int | None, int | None] | None
"""Of queries and keys, or one each; None is chosen by shape."""


def attend(
    caller: str,
    query: Any,
    key: Any,
    value: Any,
    *,
    return_lse: bool,
    block_size: BlockSize,
    backend: Backend,
    **options: Unpack[AttentionOptions],
) -> Any:
    """The call of a built-in kernel, checked, prepared and run; `caller` is its name for errors."""
    call = prepare(caller, query, key, value, return_lse=return_lse, block_size=block_size, backend=backend, **options)
    if isinstance(call, Call):
        needs_kernel = backend == "interpret" or (backend == "pallas" and has_nvidia_gpu())
        reason = why_no_kernel(call.plan, call.arrays, call.operands.kernel) if needs_kernel else None
        if reason is not None:
            raise NotImplementedError(f"{caller}: {reason}. Use flash_attention.")
        out, lse = _run(call)
    else:
        out, lse = call
    return (out, lse) if return_lse else out


class Call(NamedTuple):
    """A checked call."""

    plan: Plan
    arrays: Arrays  # query, key, value, scale
    operands: Operands
    shards: tuple[Shards, Offset] | None  # of a mesh with Explicit axes, with zeros that stand for a shard's place


def _run(call: Call) -> tuple[Array, Array]:
    """(out, log-sum-exp) of a call."""
    if call.shards is None:
        return _attention(call.plan, *call.arrays, call.operands.learned, call.operands)
    shards, anywhere = call.shards
    # Masks and score mods were traced with `anywhere` as the place of their shard: each shard puts its own place there.
    is_place = [(x is anywhere.row, x is anywhere.head) for x in jax.tree.leaves(call.operands)]

    def attend(offset: Offset, query: Array, key: Array, value: Array, rest: Any) -> tuple[Array, Array]:
        scale, operands = rest
        leaves, structure = jax.tree.flatten(operands)
        operands = jax.tree.unflatten(
            structure,
            [
                offset.row if is_row else offset.head if is_head else x
                for x, (is_row, is_head) in zip(leaves, is_place, strict=True)
            ],
        )
        words = operands.tiles.dropout
        if words is not None:
            words = words_of_shard(words, offset.row, offset.head)
        operands = operands._replace(tiles=operands.tiles._replace(dropout=words))
        return _attention(call.plan, query, key, value, scale, operands.learned, operands)

    query, key, value, scale = call.arrays
    return shards.run(attend, query, key, value, (scale, call.operands))


def prepare(
    caller: str,
    query: Any,
    key: Any,
    value: Any,
    *,
    block_size: BlockSize,
    backend: Backend,
    return_lse: bool = False,
    **options: Unpack[AttentionOptions],
) -> Call | tuple[Array, Array]:
    """The call, ready to run; or its results, (out, lse), where there is nothing to compute."""
    query, key, value = jnp.asarray(query), jnp.asarray(key), jnp.asarray(value)
    check_attention(caller, query, key, value, **options)
    scale, dropout_rng = options.get("scale"), options.get("dropout_rng")
    dropout_rate = 0.0 if options.get("deterministic", True) else options.get("dropout_rate", 0.0)
    tile_loop.check_block_size(caller, block_size)
    full = *query.shape[:3], key.shape[2]
    if not all(isinstance(size, int) for size in (*query.shape[1:], *key.shape[1:], value.shape[3])):
        raise NotImplementedError(
            f"{caller}: of its sizes tiles need all but the batch to be known; got query.shape={query.shape}, "
            f"key.shape={key.shape}. Use standard_attention."
        )
    mask, score_mod = resolve_masks(caller, options.get("mask"), options.get("score_mod"), full)
    dtype = wide_dtype(query.dtype)
    if 0 in (*full, value.shape[3]):
        return jnp.zeros((*full[:3], value.shape[3]), query.dtype), jnp.full(full[:3], -jnp.inf, dtype)
    shards = find_shards(caller, query, key, value)
    if shards is not None:
        mask, score_mod = shards.whole(mask), shards.whole(score_mod)
    check_pairs(caller, mask, score_mod, full, frozenset().union(*map(varying_axes, (query, key, value))))
    learn_scale = not is_concrete(scale)
    scale = jnp.asarray(query.shape[-1] ** -0.5 if scale is None else scale, dtype)
    cudnn = splash = None
    if backend == "automatic":
        unserved = why_not_cudnn_call(
            query,
            key,
            value,
            mask=mask,
            score_mod=score_mod,
            dropout_rate=dropout_rate,
            return_lse=return_lse,
            scale=options.get("scale"),
        )
        cudnn = Cudnn.of(query, mask, options.get("scale")) if unserved is None else None
    whole, offset = (query, key, value), None
    if shards is not None:
        offset = Offset(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))
        mask, score_mod = offset.mask(mask), offset.score_mod(score_mod)
        query, key, value = shards.local(query), shards.local(key, of_keys=True), shards.local(value, of_keys=True)
        full = *query.shape[:3], key.shape[2]
    tiles = tile_loop.Plan(*tile_loop.choose_tiles(full, key.shape[1], block_size), dropout_rate)
    kernel = None if backend == "tiles" else kernel_tiles(query, value, block_size)
    if backend == "automatic":
        reason = why_not_splash(
            query,
            key,
            value,
            mask=mask,
            score_mod=score_mod,
            dropout_rate=tiles.dropout_rate,
            return_lse=return_lse,
        )
        splash = (mask, score_mod) if reason is None else None
    plan = Plan(tiles, backend, kernel, cudnn, splash, score_mod is not None, learn_scale)
    words = dropout_words(dropout_rng) if tiles.dropout_rate > 0.0 and dropout_rng is not None else None
    index = jnp.arange(full[2], dtype=jnp.int32), jnp.arange(full[3], dtype=jnp.int32)
    arrays, operands = bind(caller, plan, (query, key, value, scale), mask, score_mod, index, words)
    if shards is None or offset is None:
        return Call(plan, arrays, operands, None)
    return Call(plan, (*whole, scale), operands, (shards, offset))


def bind(
    caller: str,
    plan: Plan,
    arrays: tuple[Any, Any, Any, Array],
    mask: Mask | None,
    score_mod: ScoreMod | None,
    index: tuple[Array, Array],
    words: Array | None,
) -> tuple[tuple[Any, Any, Any, Array], Operands]:
    """The arrays, or the shapes of shards, and what else all engines need; `index` are those of queries and keys."""
    bound, of_tiles = tile_loop.bind(caller, plan.tiles, arrays, mask, score_mod, index, words)
    arrays = bound[0], bound[1], bound[2], bound[3]
    return arrays, Operands(of_tiles, _bind_kernel(caller, plan, arrays, mask, score_mod))


def kernel_tiles(query: Any, value: Any, block_size: Any) -> KernelTiles | None:
    """Tiles of the GPU kernels, None where they do not serve the arrays."""
    size = max(query.shape[-1], value.shape[-1])
    if query.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16) or size > tile_sizes.LARGEST_HEAD:
        return None
    if not isinstance(query.shape[0], int):  # Pallas makes no blocks of a symbolic batch
        return None
    block_q, block_kv = block_size if isinstance(block_size, tuple) else (block_size, block_size)
    bits, card = query.dtype.itemsize * 8, tile_sizes.running_card()

    def choose(kind: str, busy: bool) -> Tile:
        tile = tile_sizes.choose(kind, size, bits, card, busy=busy)
        return tile._replace(block_q=block_q or tile.block_q, block_kv=block_kv or tile.block_kv)

    return KernelTiles(*((choose("forward", busy), choose("backward", busy)) for busy in (False, True)))


def _bind_kernel(
    caller: str, plan: Plan, arrays: Any, mask: Mask | None, score_mod: ScoreMod | None
) -> KernelOperands | None:
    """What a GPU's kernels need. Masks and score mods of the library's own are traced when a GPU is lowered for."""
    if plan.kernel is None:
        return None
    axes, is_opaque = varying_axes(arrays[0]), mask is not None and mask.is_opaque
    deferred = [None if function is None else defer(function) for function in (mask, score_mod)]
    can_wait = all((x is None) == (y is None) for x, y in zip(deferred, (mask, score_mod), strict=True))
    if plan.backend == "automatic" and can_wait:
        operands = KernelOperands(deferred[0], None, deferred[1], None, is_opaque)
    else:
        lifted_mod = None if score_mod is None else split.lift_score_mod(caller, score_mod, axes)
        operands = _lift_mask(plan, arrays, mask, KernelOperands(None, None, lifted_mod, None, is_opaque))
    return jax.tree.map(lambda x: vary(x, axes), operands)


def _lift_mask(plan: Plan, arrays: Any, mask: Mask | None, operands: KernelOperands) -> KernelOperands:
    """The operands, whose score mod is lifted, with the mask too, and with the tiles that both ask for."""
    assert plan.kernel is not None and not isinstance(operands.score_mod, Deferred)
    (query, key, *_), axes = arrays, varying_axes(arrays[0])
    lifted = None if mask is None else split.lift_mask(mask, axes)
    functions = [function for function in (lifted, operands.score_mod) if function is not None]
    is_busy = plan.tiles.dropout_rate > 0.0 or any(map(split.reads_pairs, functions))
    tiles, bounds = plan.kernel.busy if is_busy else plan.kernel.plain, None
    if mask is not None:
        (batch, heads, seq_q, _), seq_kv = query.shape, key.shape[2]
        forward, backward = (
            tile_lists.lift_bounds(mask, tile_lists.TileGrid.of(tile, seq_q, seq_kv), batch, heads, axes)
            for tile in tiles
        )
        bounds = forward, backward
    return dataclasses.replace(operands, mask=lifted, bounds=bounds, tiles=tiles)


def _lift_deferred(plan: Plan, arrays: Arrays, operands: KernelOperands) -> tuple[KernelOperands, Any]:
    """The operands with all functions lifted, and the pullback of what this made of the mod's floats."""
    if operands.tiles is not None:
        return operands, lambda gradients: gradients
    deferred, axes, pull = operands.score_mod, varying_axes(arrays[0]), None
    if isinstance(deferred, Deferred):

        def lifted_of(floats: tuple[Array, ...]) -> tuple[tuple[Array, ...], Lifted]:
            lifted = split.lift_score_mod("flash_attention", deferred.with_floats(floats)(), axes)
            return lifted.floats, lifted

        _, pull, lifted = jax.vjp(lifted_of, deferred.floats, has_aux=True)
        operands = dataclasses.replace(operands, score_mod=lifted)
    mask = operands.mask() if isinstance(operands.mask, Deferred) else None
    operands = _lift_mask(plan, arrays, mask, operands)
    return operands, lambda gradients: gradients if pull is None else pull(gradients)[0]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention_of(
    plan: Plan,
    query: Array,
    key: Array,
    value: Array,
    scale: Array,
    learned: tuple[Array, ...],
    operands: Operands,
) -> tuple[Array, Array]:
    out, lse, _ = _forward(plan, (query, key, value, scale), operands, exact=False)
    return out, lse / softmax.LOG2E


def _attention_forward(
    plan: Plan, query: Array, key: Array, value: Array, scale: Array, learned: tuple[Array, ...], operands: Operands
) -> tuple[tuple[Array, Array], Any]:
    out, lse, low = _forward(plan, (query, key, value, scale), operands, exact=True)
    # By name a policy of `jax.checkpoint` saves what the backward pass reads, and the forward pass is not run again.
    out, lse, low = checkpoint_name((out, lse, low), "attention_out")
    return (out, lse / softmax.LOG2E), ((query, key, value, scale), operands, out, lse, low)


def _attention_backward(plan: Plan, residuals: Any, cotangents: tuple[Array, Array]) -> tuple[Any, ...]:
    arrays, operands, out, lse, low = residuals
    out = out.astype(lse.dtype) + (0 if low is None else low.astype(lse.dtype))
    results = _by_platform(
        plan,
        partial(_tiles_backward, plan),
        partial(_kernel_backward, plan),
        partial(_cudnn_backward, plan),
        partial(_splash_backward, plan),
        arrays,
        operands,
        out,
        lse,
        *cotangents,
    )
    return *results, None


_attention_of.defvjp(_attention_forward, _attention_backward)
_attention = jax.jit(_attention_of, static_argnums=0)  # so that a call outside of jit compiles once


def _forward(plan: Plan, arrays: Arrays, operands: Operands, *, exact: bool) -> tuple[Array, Array, Any]:
    """(out, lse in units of log 2, what rounding took from out if `exact` is wanted and anything was rounded)."""
    # Where cuDNN runs, nothing is kept for engines that do not; a program for other machines than this one keeps it.
    is_sure = plan.cudnn is not None and has_nvidia_gpu() and why_not_cudnn_here() is None
    exact = exact and arrays[0].dtype.itemsize < 4 and not is_sure
    engines = _tiles_forward, _kernel_forward, _cudnn_forward, _splash_forward
    return _by_platform(plan, *(partial(engine, plan, exact) for engine in engines), arrays, operands)


def _by_platform(
    plan: Plan,
    tiles: Callable[..., Any],
    kernel: Callable[..., Any],
    cudnn: Callable[..., Any],
    splash: Callable[..., Any],
    *args: Any,
) -> Any:
    """What the engine of the plan gives for `args`."""
    if plan.backend == "tiles":
        return tiles(*args)
    if plan.backend == "interpret":
        return kernel(*args)
    platforms: dict[str, Any] = {"cuda": kernel}
    if plan.splash is not None:
        platforms["tpu"] = splash
    if plan.cudnn is None or why_not_cudnn_here() is not None:
        return by_platform(tiles, *args, **platforms)
    # On a GPU JAX must see cuDNN's kernels, to cut them over several devices.
    return by_platform(tiles, *args, now=["cudnn"] if has_nvidia_gpu() else [], cudnn=cudnn, **platforms)


def attend_part(plan: Plan, arrays: Arrays, operands: Operands) -> tuple[Array, Array]:
    """(out, log-sum-exp in units of log 2), in float32 at least, of the queries over some of the keys."""
    out, lse, _ = _forward(plan, arrays, operands, exact=False)
    return out, lse


def part_backward(
    plan: Plan, arrays: Arrays, operands: Operands, out: Array, lse: Array, d_out: Array, d_lse: Array, sums: Sums
) -> tuple[Array, Array, Array, Sums]:
    """What some of the keys add to the gradients, in float32 at least.

    Args:
        plan: one whose `is_part` holds.
        arrays: query, these keys, their values, and the scale.
        operands: the rest.
        out: of the queries over all keys.
        lse: likewise, in units of log 2.
        d_out: cotangent of out.
        d_lse: cotangent of the natural log-sum-exp.
        sums: what other parts gave.

    Returns:
        the shares of the gradients of scale * query over scale, of key and of value, and the sums with this part's.
    """
    arguments = arrays, operands, out, lse, d_out, d_lse, sums
    tiles, kernel = partial(_tiles_part, plan), partial(_kernel_part, plan)
    if plan.backend == "automatic":
        return by_platform(tiles, *arguments, cuda=kernel)
    return (kernel if plan.backend == "interpret" else tiles)(*arguments)


def _tiles_forward(plan: Plan, exact: bool, arrays: Arrays, operands: Operands) -> tuple[Array, Array, Any]:
    query, key, value = _in_float32(plan, *arrays)
    out, lse = tile_loop.forward(plan.tiles, query, key, value, operands.tiles)
    rounded = out if plan.is_part else out.astype(arrays[0].dtype)
    return rounded, lse, (out - rounded.astype(out.dtype)).astype(rounded.dtype) if exact else None


def _tiles_backward(
    plan: Plan, arrays: Arrays, operands: Operands, out: Array, lse: Array, d_out: Array, d_lse: Array
) -> tuple[Any, ...]:
    d_raw, *d_keys, sums = _tiles_part(plan, arrays, operands, out, lse, d_out, d_lse, operands.sums())
    d_query, d_scale, gradients = finish_parts(plan, arrays, operands, d_raw, sums)
    return d_query, *(d.astype(x.dtype) for d, x in zip(d_keys, arrays[1:3], strict=True)), d_scale, gradients


def _tiles_part(
    plan: Plan, arrays: Arrays, operands: Operands, out: Array, lse: Array, d_out: Array, d_lse: Array, sums: Sums
) -> tuple[Array, Array, Array, Sums]:
    scaled, key, value = _in_float32(plan, *arrays)
    rows = tile_loop.prepare_rows(scaled, out, lse, d_out.astype(out.dtype), d_lse)
    d_scaled, d_key, d_value, of_tiles = tile_loop.backward(plan.tiles, rows, key, value, operands.tiles, sums.tiles)
    return d_scaled * (1.0 if plan.has_score_mod else softmax.LOG2E), d_key, d_value, sums._replace(tiles=of_tiles)


def _in_float32(plan: Plan, query: Array, key: Array, value: Array, scale: Array) -> tuple[Array, Array, Array]:
    """The arrays in float32 at least, the query scaled to give scores in the units that the tiles take."""
    query = scale_query(query, scale, natural=plan.has_score_mod)
    return query, key.astype(query.dtype), value.astype(query.dtype)


def _kernel_forward(plan: Plan, exact: bool, arrays: Arrays, operands: Operands) -> tuple[Array, Array, Any]:
    setup, _ = _setup(plan, arrays, operands, 0)
    if setup is None:
        return _tiles_forward(plan, exact, arrays, operands)
    from attnax.kernels._gpu import launch  # Pallas takes as long to import as all of the rest, and is seldom wanted

    return launch.forward(arrays, setup, low=exact)


def _kernel_backward(
    plan: Plan, arrays: Arrays, operands: Operands, out: Array, lse: Array, d_out: Array, d_lse: Array
) -> tuple[Any, ...]:
    setup, pull = _setup(plan, arrays, operands, 1)
    if setup is None:
        return _tiles_backward(plan, arrays, operands, out, lse, d_out, d_lse)
    from attnax.kernels._gpu import launch

    d_query, d_key, d_value, gradients = launch.backward(arrays, setup, out, lse, d_out, d_lse)
    query, *_, scale = arrays
    d_scale = jnp.zeros_like(scale)
    if plan.learn_scale:
        d_query, d_scale = _scale_gradients(query, scale, d_query)
    return d_query, d_key, d_value, d_scale, operands.gradients(kernel=pull(gradients))


def _kernel_part(
    plan: Plan, arrays: Arrays, operands: Operands, out: Array, lse: Array, d_out: Array, d_lse: Array, sums: Sums
) -> tuple[Array, Array, Array, Sums]:
    setup, pull = _setup(plan, arrays, operands, 1)
    if setup is None:
        return _tiles_part(plan, arrays, operands, out, lse, d_out, d_lse, sums)
    from attnax.kernels._gpu import launch

    d_query, d_key, d_value, gradients = launch.backward(arrays, setup, out, lse, d_out, d_lse)
    of_kernel = tuple(x + y.astype(x.dtype) for x, y in zip(sums.kernel, pull(gradients), strict=True))
    return d_query, d_key, d_value, sums._replace(kernel=of_kernel)


def finish_parts(
    plan: Plan, arrays: Arrays, operands: Operands, d_raw: Array, sums: Sums
) -> tuple[Array, Array, tuple[Array, ...]]:
    """The gradients of query, scale and `operands.learned`, from the sums over all parts of the keys."""
    query, *_, scale = arrays
    d_query, d_scale = (
        _scale_gradients(query, scale, d_raw)
        if plan.learn_scale
        else ((d_raw * scale).astype(query.dtype), jnp.zeros_like(scale))
    )
    of_kernel = tuple(x.astype(y.dtype) for x, y in zip(sums.kernel, operands.of_kernel, strict=True))
    return d_query, d_scale, (*operands.tiles.finish(sums.tiles), *of_kernel)


def _scale_gradients(query: Array, scale: Array, d_raw: Array) -> tuple[Array, Array]:
    """The gradients of query and scale from that of their product."""
    return (d_raw * scale).astype(query.dtype), (d_raw * query.astype(d_raw.dtype)).sum()


def _cudnn_forward(plan: Plan, exact: bool, arrays: Arrays, operands: Operands) -> tuple[Array, Array, Any]:
    assert plan.cudnn is not None
    out, lse = cudnn_forward(*arrays[:3], plan.cudnn)
    return out, lse * softmax.LOG2E, jnp.zeros_like(out) if exact else None


def _cudnn_backward(
    plan: Plan, arrays: Arrays, operands: Operands, out: Array, lse: Array, d_out: Array, d_lse: Array
) -> tuple[Any, ...]:
    assert plan.cudnn is not None
    query, key, value, scale = arrays
    results = out.astype(query.dtype), lse / softmax.LOG2E
    d_arrays = cudnn_backward(query, key, value, plan.cudnn, *results, d_out)
    return *d_arrays, jnp.zeros_like(scale), operands.gradients()


def _splash_forward(plan: Plan, exact: bool, arrays: Arrays, operands: Operands) -> tuple[Array, Array, Any]:
    assert plan.splash is not None
    out, lse = splash_forward(*arrays, *plan.splash)
    return out, lse * softmax.LOG2E, jnp.zeros_like(out) if exact else None


def _splash_backward(
    plan: Plan, arrays: Arrays, operands: Operands, out: Array, lse: Array, d_out: Array, d_lse: Array
) -> tuple[Any, ...]:
    assert plan.splash is not None
    d_scaled, d_key, d_value = splash_backward(*arrays, *plan.splash, out, lse / softmax.LOG2E, d_out)
    query, key, value, scale = arrays
    d_scale = (d_scaled * query.astype(scale.dtype)).sum() if plan.learn_scale else jnp.zeros_like(scale)
    d_query = (d_scaled * scale).astype(query.dtype)
    return d_query, d_key.astype(key.dtype), d_value.astype(value.dtype), d_scale, operands.gradients()


def _setup(plan: Plan, arrays: Arrays, operands: Operands, which: int) -> tuple[Setup | None, Any]:
    """What the kernels of the forward (0) or backward (1) pass need, None where tiles must do, and a pullback.

    The pullback turns gradients of the floats that the kernels read into those of the operands.

    Raises:
        NotImplementedError: kernels are explicitly wanted, but cannot do it.
    """
    kernel, pull = operands.kernel, None
    if kernel is not None:
        kernel, pull = _lift_deferred(plan, arrays, kernel)
    reason = why_no_kernel(plan, arrays, kernel)
    if reason is None and plan.backend != "interpret":
        reason = why_no_card()
        if reason is not None and plan.backend == "automatic":
            warnings.warn(f"flash_attention: {reason}. It runs in tiles.", stacklevel=1)
    if reason is not None:
        _refuse(plan, reason)
        return None, pull
    assert kernel is not None and kernel.tiles is not None
    from attnax.kernels._gpu import launch

    mask, score_mod = kernel.mask, kernel.score_mod
    assert not isinstance(mask, Deferred) and not isinstance(score_mod, Deferred)
    bounds: Any = None if kernel.bounds is None else kernel.bounds[which]
    positions = (operands.tiles.q_index, operands.tiles.kv_index) if plan.is_part else None
    if positions is not None and mask is not None:
        bounds = tile_lists.BoundsAtPositions(bounds, positions[0][None], positions[1][None])
    setup = launch.Setup(
        kernel.tiles[which],
        None if mask is None else split.split(mask),
        () if mask is None else mask.values,
        bounds,
        kernel.is_opaque,
        None if score_mod is None else split.split(score_mod),
        () if score_mod is None else score_mod.values,
        positions,
        operands.tiles.dropout,
        plan.tiles.dropout_rate,
        learn_scale=plan.learn_scale or plan.is_part,
        is_wide=plan.is_part,
        interpret=plan.backend == "interpret",
    )
    if which == 1 and setup.score_mod is not None:
        reason = launch.why_not_learn(setup, arrays)
        if reason is not None:
            _refuse(plan, reason)
            return None, pull
    return setup, pull


def _refuse(plan: Plan, reason: str) -> None:
    """Raises NotImplementedError where kernels were asked for by name; otherwise tiles do."""
    if plan.backend != "automatic":
        raise NotImplementedError(f"pallas_flash_attention: {reason}. Use flash_attention.")


def why_no_kernel(plan: Plan, arrays: Arrays, operands: KernelOperands | None) -> str | None:
    """Why the GPU kernels do not serve a call; None if they do."""
    if operands is None:
        most = tile_sizes.LARGEST_HEAD
        return f"kernels take float32, bfloat16 and float16, heads of at most {most} and no symbolic batch"
    assert operands.tiles is not None
    for tile in operands.tiles:
        for size in (tile.block_q, tile.block_kv):
            if size < 16 or size & (size - 1):
                return f"tiles of kernels are powers of 2, at least 16; got {size}"
    pair_bytes = 0
    for name, function in (("mask", operands.mask), ("score mod", operands.score_mod)):
        assert not isinstance(function, Deferred)
        if function is not None:
            refused = split.why_not_split(function)
            if refused is not None:
                return f"no kernel can hold this {name}: {refused}"
            pair_bytes += split.split(function).pair_bytes
    if plan.backend == "interpret":
        return None
    return why_no_triton() or _why_no_room(operands.tiles, arrays, pair_bytes)


def _why_no_room(tiles: tuple[Tile, Tile], arrays: Arrays, pair_bytes: int) -> str | None:
    """Why the card has too little shared memory; None if it has enough, or if all cards have where none is known."""
    query, _, value, _ = arrays
    reason = tile_sizes.why_too_old(tile_sizes.running_card())
    if reason is not None:
        return reason
    sizes, card = (query.shape[-1], value.shape[-1], query.dtype.itemsize * 8), tile_sizes.running_card()
    for kind, whole in zip(("forward", "backward"), tiles, strict=True):
        footprint = tile_sizes.Footprint(kind, whole, *sizes, pair_bytes).fitted(card)
        tile, (need, have) = footprint.tile, footprint.need_and_have(card)
        if need > have:
            whose = "this card has" if card else "some cards have"
            return (
                f"tiles of {tile.block_q} x {tile.block_kv} need {-(-need // 1024)} KiB of shared memory in the "
                f"{kind} kernel, and {whose} {have // 1024}"
            )
    return None
