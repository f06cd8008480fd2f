"""Any mask, on every kernel: values and gradients are those of float64.

The parameters of masks are traced, so there are 40 programs. See SIGNATURES for the kernels of `make test` and of
`make properties`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import BACKENDS
from hypothesis import given, settings
from hypothesis import strategies as st

from attnax import masks, memory_efficient_attention

SMALL, TALL = (2, 4, 2, 7, 11), (1, 2, 1, 37, 41)  # (B, N, K, T, S)
KERNELS = {
    "standard": (BACKENDS["standard"], SMALL, jnp.float32),
    "flash": (BACKENDS["flash"], SMALL, jnp.float32),
    "tiles of 4": (BACKENDS["tiles of 4"], SMALL, jnp.float32),
    "tiles of 16": (functools.partial(memory_efficient_attention, block_size=16), TALL, jnp.float32),
    "tiles of 3, bfloat16": (functools.partial(memory_efficient_attention, block_size=3), SMALL, jnp.bfloat16),
}


def stripes(p):
    return lambda b, h, q, kv: (p["step"] * q + kv + h) % 3 != 0


# Name: the mask of parameters p, and the same mask in NumPy at indices b, h, q, kv.
FORMULAS = {
    "array, padding, positions": (
        lambda p: masks.as_mask(p["dense"]) & masks.padding(p["lengths"]) & at_positions(p, masks.causal()),
        lambda p, b, h, q, kv: (
            p["dense"] & (kv < p["lengths"][b]) & (p["kv_at"][kv] >= 0) & (p["kv_at"][kv] <= p["q_at"][q])
        ),
    ),
    "window or prefix": (
        lambda p: masks.sliding_window(p["window"]) | masks.prefix(p["lengths"]),
        lambda p, b, h, q, kv: (kv <= q) | (kv < p["lengths"][b]),
    ),
    "window": (
        lambda p: masks.sliding_window(p["window"]),
        lambda p, b, h, q, kv: (kv <= q) & (q - kv < p["window"]),
    ),
    "causal documents": (
        lambda p: masks.causal() & documents(p),
        lambda p, b, h, q, kv: (kv <= q) & (p["ids"][b, q] == p["ids"][b, kv]),
    ),
    "not documents, or array": (
        lambda p: ~documents(p) | p["dense"],
        lambda p, b, h, q, kv: (p["ids"][b, q] != p["ids"][b, kv]) | p["dense"],
    ),
    "function": (stripes, lambda p, b, h, q, kv: stripes(p)(b, h, q, kv)),
    "window without function": (
        lambda p: masks.sliding_window(p["window"], causal=False) & ~masks.as_mask(stripes(p)),
        lambda p, b, h, q, kv: (abs(q - kv) < p["window"]) & ~stripes(p)(b, h, q, kv),
    ),
    "window and documents at positions": (
        lambda p: at_positions(p, masks.sliding_window(p["window"], causal=False)) & documents(p),
        lambda p, b, h, q, kv: (
            (p["kv_at"][kv] >= 0)
            & (abs(p["q_at"][q] - p["kv_at"][kv]) < p["window"])
            & (p["ids"][b, q] == p["ids"][b, kv])
        ),
    ),
}


# The kernel on which `make test` tries a mask.
ONE_KERNEL = {
    "array, padding, positions": "tiles of 4",
    "window or prefix": "tiles of 16",
    "window": "flash",
    "causal documents": "tiles of 4",
    "not documents, or array": "tiles of 16",
    "function": "standard",
    "window without function": "tiles of 3, bfloat16",
    "window and documents at positions": "tiles of 3, bfloat16",
}
SIGNATURES = [
    pytest.param(kernel, formula, marks=() if kernel == ONE_KERNEL[formula] else pytest.mark.thorough)
    for formula in FORMULAS
    for kernel in KERNELS
]
EXAMPLES = max(200 // len(ONE_KERNEL), settings().max_examples)


def at_positions(p, mask):
    return masks.at_positions(mask, p["q_at"], p["kv_at"])


def documents(p):
    return masks.documents(p["ids"][:, : len(p["q_at"])], p["ids"][:, : len(p["kv_at"])])


def mod(p, scores, b, h, q, kv):
    return scores - p["slope"] * (h + 1) * abs(q - kv)


def rms(x):
    return np.sqrt((x**2).mean())


@functools.cache
def compiled(kernel, formula):
    attend, _, _ = KERNELS[kernel]

    def run(p, query, key, value, cotangent):
        options = {"mask": FORMULAS[formula][0](p), "score_mod": functools.partial(mod, p), "return_lse": True}
        (out, lse), pull = jax.vjp(functools.partial(attend, **options), query, key, value)
        return out, lse, *pull((cotangent, jnp.zeros_like(lse)))

    return jax.jit(run)


@st.composite
def parameters(draw, shape):
    batch, heads, _, seq_q, seq_kv = shape
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    length = max(seq_q, seq_kv)
    in_order = draw(st.booleans())
    ids = rng.integers(0, draw(st.integers(1, 5)), (batch, length))
    positions = [rng.integers(-1, length, n) for n in (seq_q, seq_kv)]
    return {
        "dense": rng.random((batch, heads, seq_q, seq_kv)) < draw(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0])),
        "lengths": rng.integers(0, seq_kv + 1, batch),
        "ids": np.sort(ids) if in_order else ids,
        "q_at": np.sort(positions[0]) if in_order else positions[0],
        "kv_at": np.sort(positions[1]) if in_order else positions[1],
        "window": np.asarray(draw(st.integers(1, length))),
        "step": np.asarray(draw(st.integers(0, 4))),
        "slope": np.float32(draw(st.sampled_from([0.0, 0.25]))),
    }, rng


@pytest.mark.parametrize(("kernel", "formula"), SIGNATURES)
@settings(max_examples=EXAMPLES)
@given(st.data())
def test_any_mask_matches_float64(kernel, formula, data):
    _, shape, dtype = KERNELS[kernel]
    batch, heads, kv_heads, seq_q, seq_kv = shape
    p, rng = data.draw(parameters(shape))
    arrays = [
        rng.standard_normal(size).astype(dtype)
        for size in (
            (batch, heads, seq_q, 3),
            (batch, kv_heads, seq_kv, 3),
            (batch, kv_heads, seq_kv, 5),
            (batch, heads, seq_q, 5),
        )
    ]
    out, lse, *grads = map(np.asarray, compiled(kernel, formula)(p, *arrays))

    keep = FORMULAS[formula][1](p, *np.indices((batch, heads, seq_q, seq_kv)))
    numpy_mod = lambda *arguments: np.asarray(mod(p, *arguments), np.float64)
    expected, expected_lse = oracle.attention(*arrays[:3], keep=keep, score_mod=numpy_mod)
    np.testing.assert_array_equal(np.isneginf(lse), np.isneginf(expected_lse))
    np.testing.assert_allclose(lse, expected_lse, atol=3e-6, rtol=1e-6)
    exact = (expected, *oracle.gradients(*arrays, keep=keep, score_mod=numpy_mod))
    no_key = ~keep.any(3)
    no_query = ~keep.reshape(batch, kv_heads, -1, seq_kv).any(2)
    nothing = (no_key, no_key, no_query, no_query)
    for index, (have, want, none) in enumerate(zip((out, *grads), exact, nothing, strict=True)):
        assert (have[none] == 0).all()
        # The gradient of a row that attends one key is the difference of two equal numbers of order 1. If most rows are
        # such, the error is relative to these numbers, and not to their small differences.
        size = max(rms(want), 0.25 * np.sqrt((~none).mean()))
        allowed = 2e-6 if index else 1e-6
        if dtype != jnp.float32:
            rounded = want.astype(np.float32).astype(dtype).astype(np.float64)
            allowed += 1.5 * rms(rounded - want) / (size or 1.0)
        assert rms(have.astype(np.float64) - want) <= allowed * size
