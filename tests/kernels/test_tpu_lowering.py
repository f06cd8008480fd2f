"""Attnax's TPU kernels, lowered for TPUs of each generation on a machine without one."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AbstractDevice, AbstractMesh

from attnax import flash_attention, masks
from attnax.kernels._core.natural import TPU_ELEMENTWISE
from attnax.kernels._core.programs import flatten

DEVICES = "TPU v4", "TPU v5 lite", "TPU v5", "TPU v6 lite"
FORWARD = {"attnax_forward"}
GRADIENT = FORWARD | {"attnax_d_query", "attnax_d_key_value"}


def kernels_in(function, *arguments, device="TPU v5 lite"):
    """The names of the kernels in the program for a TPU."""
    mesh = AbstractMesh((), (), abstract_device=AbstractDevice(device, 1, "tpu"))
    with jax.sharding.use_abstract_mesh(mesh):
        text = jax.jit(function).trace(*arguments).lower(lowering_platforms=("tpu",)).as_text()
    return set(re.findall(r'kernel_name = "(\w+)"', text))


def learned(shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


CASES = {
    "a user's mod": (masks.causal(), lambda s: lambda x, b, h, q, kv: x - s * jnp.log1p(abs(q - kv)), (), GRADIENT),
    "slopes": (masks.causal(), lambda s: lambda x, b, h, q, kv: x - s[h] * (q - kv), (4,), GRADIENT),
    "a small table": (
        None,
        lambda s: lambda x, b, h, q, kv: x + s[h, jnp.clip(abs(q - kv), 0, 7)],
        (4, 8),
        GRADIENT | {"attnax_d_table"},
    ),
    "a number for each pair": (
        None,
        lambda s: lambda x, b, h, q, kv: x + s[h, q, kv],
        (4, 131, 131),
        GRADIENT | {"attnax_d_pairs"},
    ),
}
QUICK = {("slopes", "TPU v5 lite", jnp.bfloat16), ("a small table", "TPU v4", jnp.float32)}


@pytest.mark.parametrize(
    ("name", "device", "dtype"),
    [
        pytest.param(name, device, dtype, marks=() if (name, device, dtype) in QUICK else pytest.mark.contract)
        for name in CASES
        for device in DEVICES
        for dtype in (jnp.bfloat16, jnp.float32)
    ],
)
def test_a_call_and_its_gradients_hold_the_kernels(name, device, dtype):
    mask, mod_of, shape, kernels = CASES[name]
    query, key = (jax.ShapeDtypeStruct((1, heads, 131, 24), dtype) for heads in (4, 2))

    def loss(table, query, key, value):
        return flash_attention(query, key, value, mask=mask, score_mod=mod_of(table)).astype(jnp.float32).sum()

    given = learned(shape), query, key, key
    assert kernels_in(jax.grad(loss, (0, 1, 2, 3)), *given, device=device) == kernels


@pytest.mark.contract
@pytest.mark.parametrize(
    ("mask", "options"),
    [
        (masks.causal() & masks.documents(jnp.zeros((1, 131), jnp.int32)), {}),
        (masks.padding(np.array([37])), {}),
        (lambda b, h, q, kv: (abs(q - kv) < 20) | (kv < 3 * h), {}),
        (jnp.ones((1, 1, 131, 131), bool), {}),
        (masks.causal(), {"dropout_rate": 0.1, "dropout_rng": jax.random.key(0), "deterministic": False}),
    ],
    ids=["documents", "padding", "a line", "booleans", "dropout"],
)
def test_a_mask_is_inside_the_kernels(mask, options):
    x = jax.ShapeDtypeStruct((1, 4, 131, 24), jnp.bfloat16)

    def loss(*arrays):
        return flash_attention(*arrays, mask=mask, **options).astype(jnp.float32).sum()

    assert kernels_in(jax.grad(loss, (0, 1, 2)), x, x, x) == GRADIENT


def test_a_mod_for_no_kernel_runs_in_tiles():
    x = jax.ShapeDtypeStruct((1, 4, 131, 24), jnp.bfloat16)
    assert kernels_in(lambda x: flash_attention(x, x, x, score_mod=lambda s, *_: jnp.arcsin(s)), x) == set()


def all_elementwise(x, whole):
    """Numbers computed with every primitive of `TPU_ELEMENTWISE` from floating and whole numbers."""
    u, n = x / (1 + abs(x)), lax.bitcast_convert_type(x, jnp.int32)
    floating = [
        *(f(u) for f in (jnp.abs, lax.ceil, lax.cos, lax.erf_inv, lax.exp, lax.exp2, lax.floor, lax.log1p)),
        *(f(u) for f in (lax.logistic, lax.neg, lax.sign, lax.sin, lax.tan, lax.tanh, lax.square, lax.copy_p.bind)),
        *(f(u * u + 1) for f in (lax.log, lax.sqrt, lax.rsqrt)),
        *(f(u, x) for f in (lax.add, lax.atan2, lax.div, lax.max, lax.min, lax.mul, lax.rem, lax.sub)),
        lax.pow(u * u + 1, x),
        lax.integer_pow(u, 3),
        lax.clamp(jnp.float32(0), u, jnp.float32(1)),
        lax.round(u, lax.RoundingMethod.TO_NEAREST_EVEN),
        lax.stop_gradient(u),
    ]
    numbers = [
        *(f(n) for f in (lax.clz, lax.population_count, lax.bitwise_not)),
        *(f(n, whole) for f in (lax.bitwise_and, lax.bitwise_or, lax.bitwise_xor)),
        *(f(n, whole & 7) for f in (lax.shift_left, lax.shift_right_arithmetic, lax.shift_right_logical)),
    ]
    truths = [f(u, x) for f in (lax.eq, lax.ne, lax.ge, lax.gt, lax.le, lax.lt)] + [lax.is_finite(u)]
    total = sum(floating) + sum(numbers).astype(jnp.float32)
    return sum((jnp.where(t, total, 0.5 * total) for t in truths), total)


def test_every_elementwise_primitive_lowers():
    x = jax.ShapeDtypeStruct((1, 1, 131, 24), jnp.float32)
    traced = jax.make_jaxpr(all_elementwise)(jnp.ones((2, 2)), jnp.ones((2, 2), jnp.int32))
    used = {eqn.primitive.name for eqn in flatten(traced, rules=False).jaxpr.eqns}
    missing = TPU_ELEMENTWISE - used
    assert missing <= {"add_any", "stop_gradient", "not", "bitcast_convert_type"}, missing

    def mod(scores, b, h, q, kv):
        return all_elementwise(scores, q - kv)

    assert kernels_in(lambda x: flash_attention(x, x, x, score_mod=mod), x) == FORWARD
