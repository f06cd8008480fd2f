"""The engines of exact attention. `ENGINES` has, for each engine, a test of calls and the two passes.

The tile loop (`_xla`) runs on any platform. A program for an NVIDIA GPU runs cuDNN or the kernels of `_gpu`, a program
for a TPU runs splash attention or the kernels of `_tpu`, if these serve the call. All engines keep the same few
residuals.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp

from attnax.kernels._core import softmax
from attnax.kernels._core.finite import scale_query
from attnax.kernels._core.operands import Arrays, Operands
from attnax.kernels._core.platform import by_platform, has_nvidia_gpu, why_no_card
from attnax.kernels._core.setup import Setup
from attnax.kernels._core.shards import on_shards
from attnax.kernels._gpu.cudnn import Cudnn, cudnn_backward, cudnn_forward, why_not_cudnn_here
from attnax.kernels._gpu.prepare import KernelTiles, gpu_tile, why_no_kernel
from attnax.kernels._tpu.prepare import TpuTiles, tpu_tile, why_not_tpu_kernels
from attnax.kernels._tpu.splash import splash_backward, splash_forward
from attnax.kernels._xla import tile_loop
from attnax.kernels._xla.tiles import Tiles
from attnax.masks import Mask
from attnax.typing import Array, ScoreMod

__all__ = [
    "GPU_KERNELS",
    "TPU_KERNELS",
    "Backend",
    "Plan",
    "attend_part",
    "backward",
    "backward_part",
    "finish",
    "forward",
]

Backend = Literal["tiles", "automatic", "pallas", "interpret", "interpret tpu"]
"""The tile loop on all platforms, the fastest engine, the Pallas kernels, or the GPU's or TPU's kernels interpreted."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """The static part of a call besides shapes."""

    tiles: Tiles
    backend: Backend
    gpu: KernelTiles | None  # of the GPU kernels; None if the kernels do not serve the arrays
    tpu: TpuTiles | None  # of the TPU kernels, likewise
    dropout_rate: float
    learn_scale: bool
    cudnn: Cudnn | None = None  # the arguments of cuDNN, if cuDNN serves the call
    splash: tuple[Mask | None, ScoreMod | None] | None = None  # the arguments of splash, if splash serves the call
    is_part: bool = False  # the keys are some of all keys: `Operands` has their indices; results are float32 or wider

    @property
    def interprets(self) -> bool:
        """Whether kernels run as ordinary JAX."""
        return self.backend in ("interpret", "interpret tpu")


class Results(NamedTuple):
    """The results of a whole call, and their cotangents."""

    out: Array  # (B, N, T, V), in float32 at least
    lse: Array  # (B, N, T), in units of log 2
    d_out: Array
    d_lse: Array  # of the natural log-sum-exp


Gradients = tuple[Array, Array, Array, tuple[Array, ...]]
"""The gradients of scale * query, key, value and the learned arrays, in float32 at least."""


class Engine(NamedTuple):
    """One way to run a call."""

    serves: Callable[[Plan], bool]  # whether a program for the platform may use the engine
    # (plan, exact, arrays, operands) -> out, lse in units of log 2, and if `exact` the rounding error of out.
    forward: Callable[[Plan, bool, Arrays, Operands], tuple[Array, Array, Any]]
    # (plan, arrays, operands, results) -> the gradients of the arrays and of `operands.learned`.
    backward: Callable[[Plan, Arrays, Operands, Results], tuple[Any, ...]]
    # (plan, arrays, operands, results, sums) -> gradients from some keys; those of `learned` are added to `sums`.
    backward_part: Callable[[Plan, Arrays, Operands, Results, tuple[Array, ...]], Gradients] | None = None


def forward(plan: Plan, arrays: Arrays, operands: Operands, *, exact: bool) -> tuple[Array, Array, Any]:
    """(out, lse in units of log 2, the rounding error of out if `exact` and out is rounded, else None)."""
    # If cuDNN is sure to run, no engine reads the rounding error. A program for another machine keeps the error.
    is_sure = plan.cudnn is not None and has_nvidia_gpu() and why_not_cudnn_here() is None
    exact = exact and arrays[0].dtype.itemsize < 4 and not is_sure
    return _by_platform(plan, lambda engine: partial(engine.forward, plan, exact), arrays, operands)


def backward(plan: Plan, arrays: Arrays, operands: Operands, results: Results) -> tuple[Any, ...]:
    """The gradients of query, key, value, scale and `operands.learned`."""
    return _by_platform(plan, lambda engine: partial(engine.backward, plan), arrays, operands, results)


def attend_part(plan: Plan, arrays: Arrays, operands: Operands) -> tuple[Array, Array]:
    """(out, log-sum-exp in units of log 2), in float32 at least, of the queries over some of the keys."""
    out, lse, _ = forward(plan, arrays, operands, exact=False)
    return out, lse


def backward_part(
    plan: Plan, arrays: Arrays, operands: Operands, results: Results, sums: tuple[Array, ...]
) -> Gradients:
    """The gradients from some of the keys; `sums` holds the gradients of `learned` from other keys."""
    return _by_platform(
        plan,
        lambda engine: engine.backward_part and partial(engine.backward_part, plan),
        arrays,
        operands,
        results,
        sums,
    )


def _by_platform(plan: Plan, pass_of: Callable[[Engine], Any], *arguments: Any) -> Any:
    """The result of the engine that is chosen when the program is lowered."""
    alone = {"tiles": "tiles", "interpret": "cuda", "interpret tpu": "tpu"}.get(plan.backend)
    if alone is not None:
        return pass_of(ENGINES[alone])(*arguments)
    passes = {platform: pass_of(engine) for platform, engine in ENGINES.items() if engine.serves(plan)}
    tiles = passes.pop("tiles")
    # On a GPU JAX must see cuDNN's kernels at once, to partition them over several devices.
    now = ["cudnn"] if "cudnn" in passes and has_nvidia_gpu() else []
    return by_platform(tiles, *arguments, now=now, **{name: run for name, run in passes.items() if run is not None})


def finish(plan: Plan, arrays: Arrays, operands: Operands, gradients: Gradients) -> tuple[Any, ...]:
    """The gradients of query, key, value, scale and `operands.learned`, in their dtypes."""
    query, key, value, scale = arrays
    d_raw, d_key, d_value, d_learned = gradients
    d_query, d_scale = (d_raw * scale).astype(query.dtype), jnp.zeros_like(scale)
    if plan.learn_scale:
        d_scale = (d_raw * query.astype(d_raw.dtype)).sum()
    return d_query, d_key.astype(key.dtype), d_value.astype(value.dtype), d_scale, operands.finish(d_learned)


def _tiles_forward(plan: Plan, exact: bool, arrays: Arrays, operands: Operands) -> tuple[Array, Array, Any]:
    out, lse = tile_loop.forward(plan.tiles, plan.dropout_rate, *_in_float32(arrays, operands), operands)
    rounded = out if plan.is_part else out.astype(arrays[0].dtype)
    return rounded, lse, (out - rounded.astype(out.dtype)).astype(rounded.dtype) if exact else None


def _tiles_backward(plan: Plan, arrays: Arrays, operands: Operands, results: Results) -> tuple[Any, ...]:
    gradients = _tiles_backward_part(plan, arrays, operands, results, operands.gradients())
    return finish(plan, arrays, operands, gradients)


def _tiles_backward_part(
    plan: Plan, arrays: Arrays, operands: Operands, results: Results, sums: tuple[Array, ...]
) -> Gradients:
    scaled, key, value = _in_float32(arrays, operands)
    out, lse, d_out, d_lse = results
    rows = tile_loop.prepare_rows(scaled, out, lse, d_out.astype(out.dtype), d_lse)
    d_scaled, d_key, d_value, sums = tile_loop.backward(plan.tiles, plan.dropout_rate, rows, key, value, operands, sums)
    return d_scaled * softmax.unit(has_score_mod=operands.score_mod is not None), d_key, d_value, sums


def _in_float32(arrays: Arrays, operands: Operands) -> tuple[Array, Array, Array]:
    """The arrays in float32 at least, the query scaled so that scores have the units of the tile loop."""
    query, key, value, scale = arrays
    query = scale_query(query, scale, has_score_mod=operands.score_mod is not None)
    return query, key.astype(query.dtype), value.astype(query.dtype)


@dataclasses.dataclass(frozen=True)
class Kernels:
    """The Pallas kernels of a platform."""

    tiles: Callable[[Plan], Any]
    why_not: Callable[[Plan, Arrays, Operands], str | None]  # why the kernels do not serve a call
    why_not_here: Callable[[], str | None]  # why no program can hold them here
    tile: Callable[..., Any]  # (tiles, operands, dropout rate, backward) -> the tile of a pass
    launch: Callable[[], Any]  # the module that runs them: Pallas takes long to import, and is seldom needed

    def setup(self, plan: Plan, arrays: Arrays, operands: Operands, *, backward: bool) -> Setup | None:
        """The setup of a pass; None if the tile loop must run.

        Raises:
            NotImplementedError: the plan asks for kernels, and they do not serve the call.
        """
        reason = self.why_not(plan, arrays, operands)
        if reason is None and not plan.interprets:
            reason = self.why_not_here()
            if reason is not None and plan.backend == "automatic":
                warnings.warn(f"flash_attention: {reason}. It runs in tiles.", stacklevel=1)
        if reason is None:
            setup = Setup.of(
                self.tile(self.tiles(plan), operands, plan.dropout_rate, backward=backward),
                operands,
                plan.dropout_rate,
                learn_scale=plan.learn_scale,
                is_part=plan.is_part,
                interpret=plan.interprets,
            )
            captured = setup.captured(arrays) if backward else None
            reason = None if captured is None else captured.why_not_learn()
            if reason is None:
                return setup
        if plan.backend != "automatic":
            raise NotImplementedError(f"pallas_flash_attention: {reason}. Use flash_attention.")
        return None

    def forward(self, plan: Plan, exact: bool, arrays: Arrays, operands: Operands) -> tuple[Array, Array, Any]:
        setup = self.setup(plan, arrays, operands, backward=False)
        if setup is None:
            return _tiles_forward(plan, exact, arrays, operands)
        out: tuple[Array, Array, Any] = self.launch().forward(arrays, setup, low=exact)
        return out

    def backward(self, plan: Plan, arrays: Arrays, operands: Operands, results: Results) -> tuple[Any, ...]:
        setup = self.setup(plan, arrays, operands, backward=True)
        if setup is None:
            return _tiles_backward(plan, arrays, operands, results)
        gradients = self.launch().backward(arrays, setup, *results)
        if plan.learn_scale:
            return finish(plan, arrays, operands, gradients)
        return *gradients[:3], jnp.zeros_like(arrays[3]), gradients[3]

    def backward_part(
        self, plan: Plan, arrays: Arrays, operands: Operands, results: Results, sums: tuple[Array, ...]
    ) -> Gradients:
        setup = self.setup(plan, arrays, operands, backward=True)
        if setup is None:
            return _tiles_backward_part(plan, arrays, operands, results, sums)
        d_query, d_key, d_value, d_learned = self.launch().backward(arrays, setup, *results)
        return d_query, d_key, d_value, tuple(x + y.astype(x.dtype) for x, y in zip(sums, d_learned, strict=True))


def _why_no_card_here() -> str | None:
    return why_no_card()  # by its name here, which tests replace


def _gpu_launch() -> Any:
    from attnax.kernels._gpu import launch

    return launch


def _tpu_launch() -> Any:
    from attnax.kernels._tpu import launch

    return launch


GPU_KERNELS = Kernels(
    lambda plan: plan.gpu,
    lambda plan, arrays, operands: why_no_kernel(
        plan.gpu, arrays, operands, plan.dropout_rate, interpret=plan.interprets
    ),
    _why_no_card_here,
    gpu_tile,
    _gpu_launch,
)
TPU_KERNELS = Kernels(
    lambda plan: plan.tpu,
    lambda plan, arrays, operands: why_not_tpu_kernels(plan.tpu, arrays, operands, is_part=plan.is_part),
    lambda: None,
    tpu_tile,
    _tpu_launch,
)


def _cudnn_forward(plan: Plan, exact: bool, arrays: Arrays, operands: Operands) -> tuple[Array, Array, Any]:
    assert plan.cudnn is not None
    out, lse = cudnn_forward(*arrays[:3], plan.cudnn)
    return out, softmax.in_log2(lse), jnp.zeros_like(out) if exact else None


def _cudnn_backward(plan: Plan, arrays: Arrays, operands: Operands, results: Results) -> tuple[Any, ...]:
    assert plan.cudnn is not None
    query, key, value, scale = arrays
    out, lse = results.out.astype(query.dtype), softmax.in_nats(results.lse)
    return *cudnn_backward(query, key, value, plan.cudnn, out, lse, results.d_out), jnp.zeros_like(scale), ()


def _tpu_forward(plan: Plan, exact: bool, arrays: Arrays, operands: Operands) -> tuple[Array, Array, Any]:
    if plan.splash is None:
        return TPU_KERNELS.forward(plan, exact, arrays, operands)
    mask, score_mod = plan.splash
    out, lse = on_shards(partial(splash_forward, mask=mask, score_mod=score_mod), *arrays)
    return out, softmax.in_log2(lse), jnp.zeros_like(out) if exact else None


def _tpu_backward(plan: Plan, arrays: Arrays, operands: Operands, results: Results) -> tuple[Any, ...]:
    if plan.splash is None:
        return TPU_KERNELS.backward(plan, arrays, operands, results)
    mask, score_mod = plan.splash
    run = partial(splash_backward, mask=mask, score_mod=score_mod)
    d_arrays = on_shards(run, *arrays, results.out, softmax.in_nats(results.lse), results.d_out)
    return finish(plan, arrays, operands, (*d_arrays, operands.gradients()))


ENGINES = {  # by the platform's name in `by_platform`
    "tiles": Engine(lambda plan: True, _tiles_forward, _tiles_backward, _tiles_backward_part),
    "cuda": Engine(lambda plan: True, GPU_KERNELS.forward, GPU_KERNELS.backward, GPU_KERNELS.backward_part),
    "cudnn": Engine(
        lambda plan: plan.cudnn is not None and why_not_cudnn_here() is None, _cudnn_forward, _cudnn_backward
    ),
    "tpu": Engine(lambda plan: True, _tpu_forward, _tpu_backward, TPU_KERNELS.backward_part),
}
