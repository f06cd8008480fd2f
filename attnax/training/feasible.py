"""Checks, before a training, that the model can be trained."""

from __future__ import annotations

import dataclasses
import math
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attnax.config import TransformerConfig
from attnax.errors import InputError
from attnax.generation import Sampler
from attnax.models import TransformerLM
from attnax.sharding import Layout
from attnax.training.optimizer import OptimizerConfig
from attnax.training.plan import least_activations
from attnax.training.trainer import Trainer

__all__ = ["memory_of_device", "require_memory", "require_traces"]


def require_memory(
    model: TransformerConfig, optimizer: OptimizerConfig, layout: Layout | None = None, *, ema: bool = False
) -> None:
    """Compares the memory with a lower bound: weights, gradient, moments, average, hidden states, logits of a chunk.

    Args:
        model: the configuration of the model.
        optimizer: the configuration of the training.
        layout: of the devices, over which all of these are cut; None for one device.
        ema: whether there is an average of the parameters, in float32.

    Raises:
        InputError: the machine, or its first accelerator, has less memory than the bound.
    """
    period = len(model.layer_pattern or (None,))
    sizes = [_sizes(dataclasses.replace(model, num_layers=layers), optimizer) for layers in (period, 2 * period)]
    more = max(model.num_layers - period, 0)
    count, state = (shallow + (deep - shallow) * more // period for shallow, deep in zip(*sizes, strict=True))
    tokens = optimizer.batch_size * model.max_len
    sized = None if layout is None else layout.sized(jax.device_count())
    needed = (state + 4 * count * ema) // (1 if sized is None else sized.fsdp * sized.expert * sized.tensor)
    needed += least_activations(model, optimizer, sized)
    if layout is not None and jax.default_backend() == "cpu":  # its devices share the memory of the machine
        needed *= jax.device_count()
    limit = memory_of_device()
    if needed > limit:
        where = "this machine" if layout is None or jax.default_backend() == "cpu" else "each device"
        raise InputError(
            f"this model of {count:,} parameters needs at least {needed / 1e9:,.1f} GB to learn {tokens:,} tokens at a "
            f"time, and {where} has {limit / 1e9:,.1f} GB. Choose smaller sizes, or a smaller --batch-size."
        )


def require_traces(trainer: Trainer, sampler: Sampler) -> None:
    """Traces a training step and the generation of a text; nothing is computed.

    Raises:
        InputError: the step or the generation is not possible.
    """
    window, optimizer = trainer.config.max_len, trainer.optimizer
    rows = optimizer.accumulate, optimizer.batch_size  # of an update: the first one is not traced again
    start = np.zeros((1, 1), np.int32)
    options: dict[str, Any] = {"max_new_tokens": window - 1, "sampler": sampler, "key": jax.random.key(0)}
    try:
        trainer.trace_step({"tokens": jax.ShapeDtypeStruct((*rows, window + 1), jnp.int32)})
        jax.eval_shape(lambda params: trainer.merge(params).generate(start, **options), trainer.shapes.params)
    except (ValueError, NotImplementedError) as error:
        raise InputError(f"this model cannot be trained: {error}") from error


def _sizes(config: TransformerConfig, optimizer: OptimizerConfig) -> tuple[int, int]:
    """The number of parameters, and the bytes of them, of their gradient and of the optimizer's state."""
    try:
        model = nnx.eval_shape(lambda: TransformerLM(nnx.Rngs(0), config))
    except ValueError as error:
        raise InputError(f"this model cannot be trained: {error}") from error
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    held = params, params, jax.eval_shape(optimizer.build().init, params)
    return sum(math.prod(x.shape) for x in jax.tree.leaves(params)), sum(
        math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(held)
    )


def memory_of_device() -> float:
    """Bytes of memory of the device that JAX computes on; infinite if unknown."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return float(stats["bytes_limit"])
    if hasattr(os, "sysconf"):
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return math.inf
