"""Checks before a training."""

import numpy as np

from attnax import TransformerConfig
from attnax.generation import Sampler
from attnax.training import OptimizerConfig, Trainer, causal_lm, require_traces

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
