"""Checks, before a training, that the model can be trained."""

from __future__ import annotations

import dataclasses
import math
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnax.config import TransformerConfig
from attnax.errors import InputError
from attnax.generation import Sampler
from attnax.sharding import Layout
from attnax.training.optimizer import OptimizerConfig
from attnax.training.plan import plan_training
from attnax.training.trainer import Trainer

__all__ = ["memory_of_device", "require_memory", "require_traces"]


def require_memory(
    model: TransformerConfig, optimizer: OptimizerConfig, layout: Layout | None = None, *, ema: bool = False
) -> None:
    """Compares the memory with the least that a device needs (`plan_training`).

    Args:
        model: the configuration of the model.
        optimizer: the configuration of the training.
        layout: of the devices; None for one device.
        ema: whether there is an average of the parameters, in float32.

    Raises:
        InputError: the machine, or its first accelerator, has less memory, or the model is not possible.
    """
    sized = None if layout is None else layout.sized(jax.device_count())
    count, needed = _least(model, optimizer, sized, ema=ema)
    if layout is not None and jax.default_backend() == "cpu":  # those of a process share the memory of its machine
        needed *= jax.local_device_count()
    limit = memory_of_device()
    if needed > limit:
        where = "this machine" if layout is None or jax.default_backend() == "cpu" else "each device"
        tokens = optimizer.batch_size * model.max_len
        raise InputError(
            f"this model of {count:,} parameters needs at least {needed / 1e9:,.1f} GB to learn {tokens:,} tokens at a "
            f"time, and {where} has {limit / 1e9:,.1f} GB. Choose smaller sizes, or a smaller --batch-size."
        )


def _least(
    model: TransformerConfig, optimizer: OptimizerConfig, layout: Layout | None, *, ema: bool
) -> tuple[int, int]:
    """The number of parameters, and the bytes of a device, from the plans of two shallow models.

    A plan has the shapes of all layers, which takes long where a number of layers was mistyped. Both figures grow by
    the same with each period of the pattern of layers.
    """
    period = len(model.layer_pattern or (None,))
    depth = min(model.num_layers, period)
    try:
        plans = [
            plan_training(dataclasses.replace(model, num_layers=layers), optimizer, layout=layout, ema=ema)
            for layers in (depth, depth + period)
        ]
    except ValueError as error:
        raise InputError(f"this model cannot be trained: {error}") from error
    shallow, deep = ((plan.num_parameters, sum(plan.memory)) for plan in plans)
    more = model.num_layers - depth
    count, needed = (less + (more_of - less) * more // period for less, more_of in zip(shallow, deep, strict=True))
    return count, needed


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


def memory_of_device() -> float:
    """Bytes of memory of the device that JAX computes on; infinite if unknown."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return float(stats["bytes_limit"])
    if hasattr(os, "sysconf"):
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return math.inf
