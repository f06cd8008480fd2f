"""What a training takes, from the shapes of its model alone: parameters, memory of a device, tokens, operations."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx

from attnax.config import TransformerConfig
from attnax.models import TransformerLM
from attnax.sharding import Layout
from attnax.training.flops import Flops, update_flops
from attnax.training.loss import logits_of_chunk
from attnax.training.optimizer import OptimizerConfig
from attnax.training.traffic import abstract_mesh, held_bytes, place_parameters

__all__ = ["Memory", "Plan", "plan_training"]


class Memory(NamedTuple):
    """Bytes of a device, at least.

    Attributes:
        parameters: of the model.
        gradients: of one forward and backward pass.
        moments: of the optimizer.
        ema: the exponential average of the parameters, in float32.
        activations: what lives at the end of the forward pass however much is computed again: the hidden states between
            layers, and the logits of a chunk.
    """

    parameters: int
    gradients: int
    moments: int
    ema: int
    activations: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a training takes.

    Attributes:
        num_parameters: of the model.
        num_devices: of the layout.
        memory: of a device.
        tokens: of an update.
        flops: of an update, on all devices together.
    """

    num_parameters: int
    num_devices: int
    memory: Memory
    tokens: int
    flops: Flops


def plan_training(
    model: TransformerConfig,
    optimizer: OptimizerConfig,
    *,
    layout: Layout | None = None,
    ema: bool = False,
) -> Plan:
    """What the training of a `TransformerLM` on windows of `max_len` tokens takes; nothing is allocated.

    Args:
        model: the configuration of the model.
        optimizer: the configuration of the training.
        layout: of the devices, without -1; they need not be there. None is one device.
        ema: whether the state holds an exponential average of the parameters.

    Raises:
        ValueError: a configuration that the model refuses.

    Example:
        >>> from attnax import Layout, TransformerConfig
        >>> from attnax.training import OptimizerConfig, plan_training
        >>> model = TransformerConfig(vocab_size=64, d_model=32, num_heads=2, num_layers=1, d_ff=64, max_len=16)
        >>> plan = plan_training(model, OptimizerConfig(batch_size=4), layout=Layout(fsdp=4))
        >>> plan.num_parameters, plan.tokens, plan.memory.parameters
        (12704, 64, 13952)
    """
    params = nnx.state(nnx.eval_shape(lambda: TransformerLM(nnx.Rngs(0), model)), nnx.Param)
    mesh = abstract_mesh(Layout(fsdp=1) if layout is None else layout)
    placed = place_parameters(params, mesh)
    held, here = held_bytes(placed, optimizer, mesh), sum(each.size(mesh) for each in placed)
    sequences = optimizer.batch_size * optimizer.accumulate
    return Plan(
        num_parameters=sum(math.prod(each.shape) for each in placed),
        num_devices=mesh.size,
        memory=Memory(
            parameters=held.parameters,
            gradients=held.parameters,
            moments=held.moments,
            ema=4 * here if ema else 0,
            activations=_least_activations(model, optimizer, layout),
        ),
        tokens=sequences * model.max_len,
        flops=update_flops(model, params, sequences=sequences, length=model.max_len),
    )


def _least_activations(model: TransformerConfig, optimizer: OptimizerConfig, layout: Layout | None) -> int:
    """Bytes of a device for the hidden states between layers and the logits of a chunk, of one pass.

    Args:
        model: the configuration of the model.
        optimizer: the configuration of the training.
        layout: without -1, or None for one device.
    """
    sized = Layout(fsdp=1) if layout is None else layout
    rows = optimizer.batch_size // (sized.data * sized.fsdp * sized.expert)
    length = model.max_len // sized.context
    hidden = rows * length * model.num_layers * model.d_model * jnp.dtype(model.dtype).itemsize
    return hidden + 4 * logits_of_chunk(rows, length, model.vocab_size) // sized.tensor
