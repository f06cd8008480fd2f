"""Names that a profile and a policy of `jax.checkpoint` find in a program."""

import contextlib
import io

import jax
import numpy as np
import pytest
from flax import nnx
from jax.ad_checkpoint import print_saved_residuals

import attnax
from attnax import EncoderBlock, TransformerConfig, TransformerLM
from attnax.nn import Stack

SMALL = {"vocab_size": 11, "d_model": 8, "num_heads": 2, "num_layers": 2, "d_ff": 6, "dropout_rate": 0.0}
IDS = np.zeros((2, 5), np.int32)


def lowered(make, *arguments):
    graphdef, state = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    return jax.jit(lambda state: nnx.merge(graphdef, state)(*arguments)).lower(state).as_text(debug_info=True)


def test_operations_are_named_after_the_parts_of_a_model():
    pattern = ({"num_experts": 2}, {})
    text = lowered(lambda rngs: TransformerLM(rngs, **SMALL, layer_pattern=pattern), IDS)
    parts = (
        "embedding/",
        "layer_1/",
        "attention/flash_attention/",
        "norm/",
        "mixture_of_experts/",
        "feed_forward/",
        "head/",
    )
    assert not [part for part in parts if part not in text]


def test_operations_are_named_after_the_parts_of_a_scanned_encoder_and_decoder():
    config = TransformerConfig(**SMALL, scan_layers=True)
    text = lowered(lambda rngs: attnax.Transformer(rngs, encoder=config, decoder=config), IDS, IDS)
    assert "period_0/attention/flash_attention/" in text and "period_0/cross/attention/flash_attention/" in text


@pytest.mark.parametrize("scan_layers", [False, True])
def test_a_policy_saves_what_heads_gather_by_its_name(scan_layers):
    config = TransformerConfig(**SMALL, scan_layers=scan_layers, remat="attention_out")
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Stack(nnx.Rngs(0), config, EncoderBlock)))
    x = jax.ShapeDtypeStruct((3, 5, 8), np.float32)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        print_saved_residuals(lambda state, x: nnx.merge(graphdef, state).run(x).hidden, state, x)
    saved = [line for line in printed.getvalue().splitlines() if "from the argument" not in line]
    gathered = "f32[2,3,2,5,4]" if scan_layers else "f32[3,2,5,4]"
    assert sum(line.startswith(gathered) for line in saved) == (1 if scan_layers else 2), saved
    assert not [line for line in saved if "3,2,5,5" in line or "3,5,6" in line], saved  # no scores, nothing hidden


def test_a_policy_of_ones_own_finds_queries_keys_and_values():
    graphdef, state = nnx.split(nnx.eval_shape(lambda: EncoderBlock(nnx.Rngs(0), d_model=8, num_heads=2, d_ff=6)))
    policy = jax.checkpoint_policies.save_only_these_names("attention_query", "attention_key", "attention_value")
    run = jax.checkpoint(lambda state, x: nnx.merge(graphdef, state)(x, deterministic=True), policy=policy)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        print_saved_residuals(run, state, jax.ShapeDtypeStruct((3, 5, 8), np.float32))
    assert sum(line.startswith("f32[3,2,5,4]") for line in printed.getvalue().splitlines()) == 3, printed.getvalue()
