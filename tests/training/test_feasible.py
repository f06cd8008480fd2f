"""Checks before a training."""

import dataclasses

import jax
import numpy as np
import pytest

from attnax import Layout, TransformerConfig
from attnax.errors import InputError
from attnax.generation import Sampler
from attnax.training import (
    OptimizerConfig,
    Trainer,
    causal_lm,
    feasible,
    plan_training,
    require_memory,
    require_traces,
)

MODEL = TransformerConfig(
    vocab_size=17, d_model=8, num_heads=2, num_layers=1, d_ff=12, max_len=5, dropout_rate=0.0, pos_emb_type="rope"
)


def test_a_step_that_was_checked_is_not_traced_again():
    calls, loss_of = [], causal_lm()

    def objective(model, batch, rngs):
        calls.append(batch["tokens"].shape)
        return loss_of(model, batch, rngs)

    trainer = Trainer(MODEL, objective, OptimizerConfig(batch_size=2, accumulate=3))
    require_traces(trainer, Sampler())
    assert set(calls) == {(2, 6)}
    checked = len(calls)
    trainer.trace_step({"tokens": np.zeros((3, 2, 6), np.int32)})
    assert len(calls) == checked


@pytest.mark.parametrize("layers", [1, 2, 6])
@pytest.mark.parametrize("layout", [None, Layout(fsdp=4, tensor=2)])
def test_the_memory_that_is_asked_for_is_that_of_the_plan(monkeypatch, layout, layers):
    """The check has the plans of one period of layers and of two; the devices of a CPU share the memory."""
    model = dataclasses.replace(MODEL, num_layers=layers, layer_pattern=({"d_ff": 16}, {}))
    optimizer = OptimizerConfig(batch_size=4)
    plan = plan_training(model, optimizer, layout=layout, ema=True)
    needed = sum(plan.memory) * (1 if layout is None else jax.device_count())
    monkeypatch.setattr(feasible, "memory_of_device", lambda: needed)
    require_memory(model, optimizer, layout, ema=True)
    monkeypatch.setattr(feasible, "memory_of_device", lambda: needed - 1)
    with pytest.raises(InputError, match=f"this model of {plan.num_parameters:,} parameters needs at least"):
        require_memory(model, optimizer, layout, ema=True)
