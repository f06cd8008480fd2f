"""The bytes of a layout: the formulas are those of the compiled step, and the state of a device is as large as said."""

import dataclasses
import functools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from attnax import TransformerConfig, TransformerLM
from attnax.sharding import Layout
from attnax.training import OptimizerConfig, Trainer, causal_lm
from attnax.training.traffic import abstract_mesh, held_bytes, place_parameters, step_traffic

MODEL = TransformerConfig(
    vocab_size=80,
    d_model=32,
    num_heads=4,
    num_kv_heads=2,
    num_layers=1,
    d_ff=48,
    max_len=64,
    dropout_rate=0.0,
    pos_emb_type="rope",
    norm_type="rms",
    ff_activation="swiglu",
    use_bias=False,
    tie_embeddings=True,
)
BATCH, LENGTH = 8, 32
OPTIMIZER = OptimizerConfig(batch_size=BATCH)


@pytest.fixture
def collectives(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import _collectives

    return _collectives


def placed_of(model, layout):
    mesh = abstract_mesh(layout)
    shapes = nnx.state(nnx.eval_shape(lambda: TransformerLM(nnx.Rngs(0), model)), nnx.Param)
    return place_parameters(shapes, mesh), mesh


@pytest.mark.parametrize(
    ("layout", "fields"),
    [
        ("fsdp=4,tensor=2", {}),
        pytest.param("data=8", {}, marks=pytest.mark.thorough),
        pytest.param("data=2,context=4", {}, marks=pytest.mark.thorough),
        pytest.param("fsdp=2,expert=4", {"num_experts": 4, "top_k": 2}, marks=pytest.mark.thorough),
        pytest.param("fsdp=8", {"tie_embeddings": False}, marks=pytest.mark.thorough),
        pytest.param("data=2,tensor=4", {"num_kv_heads": 4}, marks=pytest.mark.thorough),
        pytest.param("context=8", {}, marks=pytest.mark.thorough),
        pytest.param("fsdp=4,context=2", {}, marks=pytest.mark.thorough),
        pytest.param("data=2,expert=4", {"num_experts": 4, "top_k": 2}, marks=pytest.mark.thorough),
        pytest.param(
            "fsdp=2,expert=4", {"num_experts": 4, "top_k": 2, "dropout_rate": 0.1}, marks=pytest.mark.thorough
        ),
        pytest.param("fsdp=2,expert=2,tensor=2", {"num_experts": 4, "top_k": 2}, marks=pytest.mark.thorough),
        pytest.param("fsdp=4,tensor=2", {"remat": "full"}, marks=pytest.mark.thorough),
        pytest.param("fsdp=4,tensor=2", {"scan_layers": True, "num_layers": 2}, marks=pytest.mark.thorough),
    ],
)
def test_a_step_moves_the_bytes_of_the_formulas(layout, fields, collectives):
    model, layout = dataclasses.replace(MODEL, **fields), Layout.parse(layout).sized(8)
    batch = {"tokens": jax.ShapeDtypeStruct((1, BATCH, LENGTH + 1), jnp.int32)}
    program = Trainer(model, causal_lm(), OPTIMIZER, layout=layout).lower_step(batch).compile().as_text()
    found = collectives.bytes_by_kind(collectives.collectives_of(program))
    placed, mesh = placed_of(model, layout)
    said = step_traffic(model, placed, mesh, BATCH, LENGTH)
    reduced, total = found.get("all-reduce", 0) + found.get("reduce-scatter", 0), sum(found.values())
    near = functools.partial(pytest.approx, rel=0.1, abs=0.01 * total)  # a kind that is small beside the others
    assert said.gathers + said.to_experts == near(found.get("all-gather", 0))
    assert said.gradients + said.tensor + said.from_experts == near(reduced)
    assert said.ring == near(found.get("collective-permute", 0))
    assert sum(said) == near(total)


@pytest.mark.parametrize(
    ("algorithm", "moment_dtype"),
    [("adamw", "float32"), ("adamw", "bfloat16"), ("muon", "float32"), ("lion", "float32"), ("adafactor", "float32")],
)
def test_a_device_holds_the_bytes_that_are_said(algorithm, moment_dtype):
    """The vocabulary, 37, is no multiple of tensor. Adafactor factors the matrices of the feed-forward."""
    model = dataclasses.replace(MODEL, vocab_size=37, param_dtype="bfloat16", d_model=128, d_ff=160)
    layout = Layout.parse("fsdp=4,tensor=2")
    optimizer = OptimizerConfig(algorithm=algorithm, batch_size=BATCH, moment_dtype=moment_dtype)
    state = Trainer(model, causal_lm(), optimizer, layout=layout).shapes
    placed, mesh = placed_of(model, layout)

    def held(name, *, here):
        arrays = jax.tree.leaves(getattr(state, name))
        shapes = [x.sharding.shard_shape(x.shape) if here else x.shape for x in arrays]
        return sum(math.prod(shape) * x.dtype.itemsize for shape, x in zip(shapes, arrays, strict=True))

    for here in (True, False):
        said = held_bytes(placed, optimizer, mesh if here else None)
        assert (held("params", here=here), held("opt_state", here=here)) == said
