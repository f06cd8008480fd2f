"""One call of exact attention: its checks, its preparation for all engines, and its derivative."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from attnax.checks import check_attention, is_concrete, wide_dtype
from attnax.kernels._core import softmax
from attnax.kernels._core.dropout import rate_of, words_of, words_of_shard
from attnax.kernels._core.operands import Arrays, Operands, bind
from attnax.kernels._core.platform import has_nvidia_gpu
from attnax.kernels._core.shards import Offset, Shards, find_shards
from attnax.kernels._engines import GPU_KERNELS, TPU_KERNELS, Backend, Plan, Results, backward, forward
from attnax.kernels._gpu.cudnn import Cudnn, why_not_cudnn_call, why_not_cudnn_here
from attnax.kernels._gpu.prepare import choose_kernel_tiles
from attnax.kernels._ring import Ring, attend_ring
from attnax.kernels._tpu.prepare import choose_tpu_tiles
from attnax.kernels._tpu.splash import why_not_splash
from attnax.kernels._xla.tiles import check_block_size, choose_tiles, tile_shape
from attnax.masks import And, AtPositions, Causal, Mask, resolve_masks
from attnax.typing import Array, AttentionOptions

__all__ = [
    "Backend",
    "BlockSize",
    "Call",
    "attend",
    "check_block_size",
    "nothing",
    "prepare",
    "prepare_part",
    "why_not_cudnn",
    "why_not_cudnn_here",
]

BlockSize = int | tuple[int | None, int | None] | None
"""The tile size: one number, or a pair (queries, keys). With None the shapes decide."""


class Call(NamedTuple):
    """A checked call."""

    plan: Plan
    arrays: Arrays  # query, key, value, scale
    operands: Operands
    shards: tuple[Shards, Offset] | None = None  # for a mesh that cuts the arrays; the offset is a placeholder
    ring: Ring | None = None  # where the mesh cuts the sequence too

    def why_not_kernels(self, *, of_tpu: bool = False) -> str | None:
        """The reason why the Pallas kernels of GPUs, or of TPUs, do not serve the call, or None."""
        kernels = TPU_KERNELS if of_tpu else GPU_KERNELS
        return kernels.why_not(self.plan, self.arrays, self.operands)

    def run(self) -> tuple[Array, Array]:
        """(out, log-sum-exp)."""
        if self.shards is None:
            return _attention(self.plan, *self.arrays, self.operands.learned, self.operands)
        shards, placeholder = self.shards
        # Masks and score mods were traced with a placeholder. Each shard puts its own offset in its place.
        is_offset = [(x is placeholder.row, x is placeholder.head) for x in jax.tree.leaves(self.operands)]

        def attend(offset: Offset, query: Array, key: Array, value: Array, rest: Any) -> tuple[Array, Array]:
            scale, operands = rest
            leaves, structure = jax.tree.flatten(operands)
            placed = (
                offset.row if is_row else offset.head if is_head else x
                for x, (is_row, is_head) in zip(leaves, is_offset, strict=True)
            )
            operands = jax.tree.unflatten(structure, placed)
            if operands.dropout is not None:
                words = words_of_shard(operands.dropout, offset.row, offset.head)
                operands = dataclasses.replace(operands, dropout=words)
            if self.ring is None:
                return _attention(self.plan, query, key, value, scale, operands.learned, operands)
            return self._attend_ring(self.ring, (query, key, value, scale), operands)

        query, key, value, scale = self.arrays
        return shards.run(attend, query, key, value, (scale, self.operands))

    def _attend_ring(self, ring: Ring, arrays: Arrays, operands: Operands) -> tuple[Array, Array]:
        """`run` on a device of the ring, whose queries and keys are a part of the sequence in order."""
        query, key, value, scale = arrays
        if ring.zigzag:
            query, key, value = map(ring.zigzag_of, (query, key, value))
        q_index, kv_index = (ring.index(0, x.shape[2]) for x in (query, key))
        operands = dataclasses.replace(operands, q_index=q_index, kv_index=kv_index)
        out, lse = attend_ring(self.plan, ring, (query, key, value, scale), operands.learned, operands)
        out = out.astype(query.dtype)
        if ring.zigzag:
            out, lse = ring.in_order(out), ring.in_order(lse)
        return out, lse


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
    """Checks, prepares and runs a call of a built-in kernel; errors name `caller`."""
    call = prepare(caller, query, key, value, return_lse=return_lse, block_size=block_size, backend=backend, **options)
    if isinstance(call, Call):
        of_tpu = backend == "interpret tpu" or (backend == "pallas" and jax.default_backend() == "tpu")
        of_gpu = backend == "interpret" or (backend == "pallas" and has_nvidia_gpu())
        reason = call.why_not_kernels(of_tpu=of_tpu) if of_tpu or of_gpu else None
        if reason is not None:
            raise NotImplementedError(f"{caller}: {reason}. Use flash_attention.")
        out, lse = call.run()
    else:
        out, lse = call
    return (out, lse) if return_lse else out


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
    """A call that is ready to run, or the results (out, lse) if there are no queries or no keys."""
    query, key, value = jnp.asarray(query), jnp.asarray(key), jnp.asarray(value)
    check_attention(caller, query, key, value, **options)
    check_block_size(caller, block_size)
    batch, heads, seq_q, _ = query.shape
    score_shape = batch, heads, seq_q, key.shape[2]
    if not all(isinstance(size, int) for size in (*query.shape[1:], *key.shape[1:], value.shape[3])):
        raise NotImplementedError(
            f"{caller}: of its sizes tiles need all but the batch to be known; got query.shape={query.shape}, "
            f"key.shape={key.shape}. Use standard_attention."
        )
    mask, score_mod = resolve_masks(caller, options.get("mask"), options.get("score_mod"), score_shape)
    if 0 in (*score_shape, value.shape[3]):
        return nothing(query, value)
    shards, offset = find_shards(caller, query, key, value, rings=True), None
    whole = query, key, value
    ring = None
    if shards is not None:
        mask, score_mod = shards.whole(mask), shards.whole(score_mod)
        if shards.length:
            (axis,) = shards.length
            size = shards.mesh.shape[axis]
            is_even = all(x.shape[2] % (2 * size) == 0 for x in (query, key))
            ring = Ring(axis, size, is_even and _is_triangular(mask, score_shape[3]))
    known: Any = {"dropout_rate": rate_of(options), "return_lse": return_lse}
    cudnn = splash = None
    if backend == "automatic" and ring is None:
        scale = options.get("scale")
        reason = why_not_cudnn_call(*whole, mask=mask, score_mod=score_mod, scale=scale, **known)
        cudnn = Cudnn.of(query, mask, scale) if reason is None else None
    if shards is not None:
        offset = Offset(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))
        mask, score_mod = offset.mask(mask), offset.score_mod(score_mod)
        query, key, value = shards.local(query), shards.local(key, of_keys=True), shards.local(value, of_keys=True)
    if backend == "automatic" and ring is None:
        reason = why_not_splash(query, key, value, mask=mask, score_mod=score_mod, **known)
        splash = (mask, score_mod) if reason is None else None
    index = jnp.arange(query.shape[2], dtype=jnp.int32), jnp.arange(key.shape[2], dtype=jnp.int32)
    resolved: AttentionOptions = {**options, "mask": mask, "score_mod": score_mod}
    arrays = query, key, value
    pieces = 2 if ring is not None and ring.zigzag else 1  # a tile of two pieces would have no useful bounds
    sizes: Any = {"block_size": block_size, "backend": backend, "pieces": pieces}
    call = prepare_part(caller, arrays, index, score_shape, resolved, **sizes)
    call = call._replace(plan=dataclasses.replace(call.plan, cudnn=cudnn, splash=splash, is_part=ring is not None))
    if shards is None or offset is None:
        return call
    return call._replace(arrays=(*whole, call.arrays[3]), shards=(shards, offset), ring=ring)


def _is_triangular(mask: Mask | None, seq_kv: int) -> bool:
    """Whether later queries attend more keys, so that equal parts of a sequence are unequal work; not in a window.

    Positions may begin anew, with every document of a packed row. Zigzag order then serves long documents, and costs
    short ones only the exchange.
    """
    if isinstance(mask, AtPositions):
        return _is_triangular(mask.mask, seq_kv)
    if isinstance(mask, And):
        sides = mask.left, mask.right
        narrow = any((keys := side.keys_per_query(seq_kv)) is not None and keys < seq_kv // 2 for side in sides)
        return not narrow and any(_is_triangular(side, seq_kv) for side in sides)
    return isinstance(mask, Causal)


def prepare_part(
    caller: str,
    arrays: tuple[Any, Any, Any],
    index: tuple[Array, Array],
    score_shape: tuple[int, int, int, int],
    options: AttentionOptions,
    *,
    block_size: BlockSize,
    backend: Backend,
    pieces: int = 1,
) -> Call:
    """A call over all or some of the keys; the arguments are checked already.

    Args:
        caller: the name in errors.
        arrays: query, key and value, or the shapes of their shards.
        index: the indices of queries and keys that masks and score mods see.
        score_shape: (B, N, T, S), of all devices together.
        options: options of the call; mask and score mod come from `resolve_masks`.
        block_size: as in `attend`.
        backend: as in `attend`.
        pieces: the number of pieces of the sequence on a device; a tile lies in one piece.
    """
    (batch, heads, seq_q, head_dim), (_, kv_heads, seq_kv, _) = arrays[0].shape, arrays[1].shape
    shape = batch, heads, seq_q // pieces, seq_kv // pieces
    tiles, scale = choose_tiles(shape, kv_heads, block_size, options.get("mask")), options.get("scale")
    plan = Plan(
        tiles,
        backend,
        None if backend == "tiles" else choose_kernel_tiles(arrays[0], arrays[2], block_size),
        None if backend == "tiles" else choose_tpu_tiles(arrays[0], arrays[2], block_size),
        rate_of(options),
        learn_scale=not is_concrete(scale),
        is_part=True,
    )
    scale = jnp.asarray(head_dim**-0.5 if scale is None else scale, wide_dtype(arrays[0].dtype))
    bound, operands = bind(
        caller,
        (*arrays, scale),
        options.get("mask"),
        options.get("score_mod"),
        index,
        words_of(options),
        score_shape=score_shape,
        tile_shape=tile_shape(tiles, (batch, heads, seq_q, kv_heads, seq_kv)),
    )
    return Call(plan, bound, operands)


def nothing(query: Array, value: Array) -> tuple[Array, Array]:
    """(out, log-sum-exp) of a call without queries or without keys."""
    shape = query.shape[:3]
    return jnp.zeros((*shape, value.shape[3]), query.dtype), jnp.full(shape, -jnp.inf, wide_dtype(query.dtype))


def why_not_cudnn(
    caller: str, query: Array, key: Array, value: Array, *, return_lse: bool, **options: Unpack[AttentionOptions]
) -> str | None:
    """The reason why `flash_attention` uses cuDNN on no machine for these arguments, or None."""
    check_attention(caller, query, key, value, **options)
    batch, heads, seq_q, _ = query.shape
    score_shape = batch, heads, seq_q, key.shape[2]
    mask, score_mod = resolve_masks(caller, options.get("mask"), options.get("score_mod"), score_shape)
    return why_not_cudnn_call(
        query,
        key,
        value,
        mask=mask,
        score_mod=score_mod,
        dropout_rate=rate_of(options),
        return_lse=return_lse,
        scale=options.get("scale"),
    )


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
    out, lse, _ = forward(plan, (query, key, value, scale), operands, exact=False)
    return out, softmax.in_nats(lse)


def _attention_forward(
    plan: Plan, query: Array, key: Array, value: Array, scale: Array, learned: tuple[Array, ...], operands: Operands
) -> tuple[tuple[Array, Array], Any]:
    out, lse, low = forward(plan, (query, key, value, scale), operands, exact=True)
    # A policy of `jax.checkpoint` can save these residuals by name. The forward pass is then not computed again.
    out, lse, low = checkpoint_name((out, lse, low), "attention_out")
    return (out, softmax.in_nats(lse)), ((query, key, value, scale), operands, out, lse, low)


def _attention_backward(plan: Plan, residuals: Any, cotangents: tuple[Array, Array]) -> tuple[Any, ...]:
    arrays, operands, out, lse, low = residuals
    out = out.astype(lse.dtype) + (0 if low is None else low.astype(lse.dtype))
    return *backward(plan, arrays, operands, Results(out, lse, *cotangents)), None


_attention_of.defvjp(_attention_forward, _attention_backward)
_attention = jax.jit(_attention_of, static_argnums=0)  # so that a call outside of jit compiles once
