"""The bytes of a layout: the formulas are those of the compiled step, and the state of a device is as large as said."""

import collections
import dataclasses
import functools
import math
from pathlib import Path
from typing import NamedTuple

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


def thorough(*values):
    return pytest.param(*values, marks=pytest.mark.thorough)


class Arrays(NamedTuple):
    """How many arrays a step moves, by kind; XLA puts several into one collective."""

    gathers: int = 0
    reductions: int = 0
    permutations: int = 0


MATRICES, VECTORS = 7, 3  # of the model: query, key, value, out, gate, up, down; two norms of the layer, and the last
GRADIENTS = MATRICES + VECTORS + 2  # the table has one as the table and one as the head
OUTPUTS, INPUTS = 2, 5  # tensor sums the outputs of out and down, and the gradients of the inputs of the others
TENSOR = OUTPUTS + INPUTS + 2 + 4  # rows of the table and their gradient; the head's input, and three sums of a softmax
ZIGZAG = 4 * 2 * 2  # query, key, value and out, each in two pieces, forward and backward
MIXTURE, ROUTED = {"num_experts": 4, "top_k": 2}, 4 + 4  # the matrices of attention; router, gate, up, down
TO_EXPERTS, FROM_EXPERTS = 4, 3  # tokens, numbers, weights, gradients of the outputs; outputs, gradients of both inputs
STATISTICS = 3  # how many tokens chose an expert; its mean probability, and the gradient of that


def hops(context):
    """Keys and values forward; they and their gradients backward, which then go home."""
    return 2 * (context - 1) + 4 * (context - 1) + 2


@pytest.mark.parametrize(
    ("layout", "fields", "arrays"),
    [
        ("fsdp=4,tensor=2", {}, Arrays(MATRICES + 2, GRADIENTS + TENSOR)),
        thorough("data=8", {}, Arrays(0, GRADIENTS)),
        thorough("fsdp=8", {}, Arrays(MATRICES + 1, GRADIENTS)),  # the table once for both of its uses
        thorough("fsdp=8", {"tie_embeddings": False}, Arrays(MATRICES + 2, GRADIENTS)),
        thorough("data=2,tensor=4", {"num_kv_heads": 4}, Arrays(0, GRADIENTS + TENSOR)),
        # A layer's gradients are summed over data and over context; those of the table and the head once over both.
        thorough("data=2,context=4", {}, Arrays(0, 2 * (MATRICES + VECTORS) + 2, ZIGZAG + hops(4))),
        thorough("context=8", {}, Arrays(0, GRADIENTS, ZIGZAG + hops(8))),
        # With two devices the backward pass has the keys and values already, and half of the zigzag stays in place.
        thorough("fsdp=4,context=2", {}, Arrays(MATRICES + 1, 2 * (MATRICES + VECTORS) + 4, ZIGZAG // 2 + hops(2) - 2)),
        thorough("data=2,expert=4", MIXTURE, Arrays(TO_EXPERTS, ROUTED + VECTORS + 2 + FROM_EXPERTS + STATISTICS)),
        # Gradients of matrices but the experts' are summed over fsdp, and then over expert.
        thorough(
            "fsdp=2,expert=4",
            MIXTURE,
            Arrays(ROUTED + 1 + TO_EXPERTS, ROUTED + 5 + VECTORS + 4 + FROM_EXPERTS + STATISTICS),
        ),
        thorough(
            "fsdp=2,expert=4",
            {**MIXTURE, "dropout_rate": 0.1},
            Arrays(ROUTED + 1 + TO_EXPERTS + 1, ROUTED + 5 + VECTORS + 4 + FROM_EXPERTS + STATISTICS),
        ),
        thorough("fsdp=2,expert=2,tensor=2", MIXTURE, None),  # XLA joins and splits some of the sums of a router
        # All but the last output of a layer is computed again.
        thorough("fsdp=4,tensor=2", {"remat": "full"}, Arrays(2 * MATRICES + 2, GRADIENTS + TENSOR + 1)),
        thorough(
            "fsdp=4,tensor=2",
            {"scan_layers": True, "num_layers": 2},
            Arrays(2 * MATRICES + 2, GRADIENTS + MATRICES + 2 + TENSOR + OUTPUTS + INPUTS),
        ),
    ],
)
def test_a_step_moves_the_bytes_of_the_formulas(layout, fields, arrays, collectives):
    model, layout = dataclasses.replace(MODEL, **fields), Layout.parse(layout).sized(8)
    batch = {"tokens": jax.ShapeDtypeStruct((1, BATCH, LENGTH + 1), jnp.int32)}
    program = Trainer(model, causal_lm(), OPTIMIZER, layout=layout).lower_step(batch).compile().as_text()
    moved = collectives.collectives_of(program)
    found = collectives.bytes_by_kind(moved)
    placed, mesh = placed_of(model, layout)
    said = step_traffic(model, placed, mesh, BATCH, LENGTH)
    reduced, total = found.get("all-reduce", 0) + found.get("reduce-scatter", 0), sum(found.values())
    near = functools.partial(pytest.approx, rel=0.1, abs=0.01 * total)  # a kind that is small beside the others
    assert said.gathers + said.to_experts == near(found.get("all-gather", 0))
    assert said.gradients + said.tensor + said.from_experts == near(reduced)
    assert said.ring == near(found.get("collective-permute", 0))
    assert sum(said) == near(total)
    if arrays is not None:
        assert counted(moved) == arrays


def counted(moved):
    counts = collections.Counter()
    for each in moved:
        if each.kind != "collective-permute" or not each.op_name.endswith(("slice", "squeeze")):  # of token ids
            counts[each.kind] += len(each.shapes) * each.runs
    return Arrays(counts["all-gather"], counts["all-reduce"] + counts["reduce-scatter"], counts["collective-permute"])


@pytest.mark.thorough
@pytest.mark.parametrize("layout", ["data=8", "fsdp=8", "fsdp=4,tensor=2", "data=2,fsdp=4"])
def test_a_device_computes_its_share(layout):
    """A model that is wide enough to make norms and the optimizer small, in one tile: XLA counts each loop once."""
    model, optimizer = dataclasses.replace(MODEL, d_model=64, d_ff=128), OptimizerConfig(batch_size=16)
    batch = {"tokens": jax.ShapeDtypeStruct((1, 16, 65), jnp.int32)}
    one, here = (
        Trainer(model, causal_lm(), optimizer, layout=each).lower_step(batch).compile().cost_analysis()["flops"]
        for each in (None, Layout.parse(layout))
    )
    assert one / 8 <= here <= 1.05 * one / 8


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
