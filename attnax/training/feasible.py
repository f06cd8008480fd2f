"""Checks, before a training, that the model can be trained."""

from __future__ import annotations

import dataclasses
import math
import os
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attnax.config import TransformerConfig
from attnax.errors import InputError
from attnax.generation import Sampler
from attnax.models import TransformerLM
from attnax.nn._parts import Parts
from attnax.sharding import Layout
from attnax.training.optimizer import OptimizerConfig
from attnax.training.plan import least_activations
from attnax.training.trainer import Trainer

__all__ = ["memory_of_device", "require_memory", "require_traces"]


def require_memory(
    model: TransformerConfig, optimizer: OptimizerConfig, layout: Layout | None = None, **parts: Unpack[Parts]
) -> None:
    """Compares the memory with a lower bound: weights, their gradient and moments, hidden states, logits of a chunk.

    Args:
        model: the configuration of the model.
        optimizer: the configuration of the training.
        layout: of the devices, over which all of these are cut; None for one device.
        **parts: the `make_block` and the `attention_fn` of the model.

    Raises:
        InputError: the machine, or its first accelerator, has less memory than the bound.
    """
    period = len(model.layer_pattern or (None,))
    shallow, deep = (
        _num_parameters(dataclasses.replace(model, num_layers=layers), parts) for layers in (period, 2 * period)
    )
    count = shallow + (deep - shallow) * max(model.num_layers - period, 0) // period
    tokens = optimizer.batch_size * model.max_len
    sized = None if layout is None else layout.sized(jax.device_count())
    needed = 4 * count * jnp.dtype(model.param_dtype).itemsize
    if sized is not None:
        needed //= sized.fsdp * sized.expert * sized.tensor
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
    window = trainer.model.max_len
    start = np.zeros((1, 1), np.int32)
    options: dict[str, Any] = {"max_new_tokens": window - 1, "sampler": sampler, "key": jax.random.key(0)}
    try:
        state = jax.eval_shape(trainer.init)
        trainer.trace_step(window + 1)
        jax.eval_shape(lambda params: trainer.merge(params).generate(start, **options), state.params)
    except (ValueError, NotImplementedError) as error:
        raise InputError(f"this model cannot be trained: {error}") from error


def _num_parameters(config: TransformerConfig, parts: Parts) -> int:
    try:
        model = nnx.eval_shape(lambda: TransformerLM(nnx.Rngs(0), config, **parts))
    except ValueError as error:
        raise InputError(f"this model cannot be trained: {error}") from error
    return sum(math.prod(x.shape) for x in jax.tree.leaves(nnx.state(model, nnx.Param)))


def memory_of_device() -> float:
    """Bytes of memory of the device that JAX computes on; infinite if unknown."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return float(stats["bytes_limit"])
    if hasattr(os, "sysconf"):
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return math.inf
