"""TPU kernels under a mesh with Auto axes compute, on the shards of each device, what one device does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from attnax import alibi_mod, masks, pallas_flash_attention

T, D = 131, 8


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def options(kind, batch, heads, table):
    match kind:
        case "none":
            return {}
        case "slopes":
            return {"mask": masks.causal(), "score_mod": lambda s, b, h, q, kv: s - table[h, 0] * (q - kv)}
        case "padding":
            dropout = {"dropout_rng": jax.random.key(3), "dropout_rate": 0.3, "deterministic": False}
            lengths = np.arange(T, T - 17 * batch, -17)
            return {"mask": masks.padding(lengths), "score_mod": alibi_mod(heads), **dropout}
        case "index":  # b and h inside of the kernels
            near = lambda b, h, q, kv: (q - kv) % (2 + b + h) == 0
            return {"mask": near, "score_mod": lambda s, b, h, q, kv: s * (1 + b) + h * jnp.sin(s) + table[h, q]}
        case "tables":
            distance, pairs = table[:, :64], table[:, :, None] * table[0]
            return {
                "score_mod": lambda s, b, h, q, kv: s + distance[h, jnp.minimum(jnp.abs(q - kv), 63)] + pairs[0, q, kv]
            }
        case "pairs":
            pairs = table[:, :, None] * table[0]
            return {"score_mod": lambda s, b, h, q, kv: s + pairs[h, q, kv] + pairs[0, kv, q] * (1 + b)}


def loss(kind, query, key, value, table):
    given = options(kind, *query.shape[:2], table)
    out, lse = pallas_flash_attention(query, key, value, **given, return_lse=True, interpret="tpu", block_q=128, block_kv=128)
    return (out**2).sum() + jnp.where(jnp.isfinite(lse), lse, 0).sum(), (out, lse)


@pytest.mark.parametrize(
    ("kind", "batch", "heads"),
    [
        ("slopes", 4, (4, 2)),  # batch
        ("slopes", 1, (8, 4)),  # heads
        ("slopes", 3, (4, 1)),  # nothing
        ("padding", 2, (4, 2)),  # both
        ("index", 2, (4, 2)),
        ("tables", 2, (4, 2)),
        ("pairs", 2, (4, 2)),
        ("none", 2, (2, 2)),
    ],
    ids=str,
)
def test_shards_of_auto_axes_compute_what_one_device_does(kind, batch, heads):
    query, key, value = (normal(n, batch, count, T, D) for n, count in enumerate((heads[0], heads[1], heads[1])))
    query[0, 0, 5, 0], key[-1, 0, 7, 0] = np.nan, np.inf
    table = normal(3, heads[0], T)
    run = jax.jit(jax.value_and_grad(lambda *x: loss(kind, *x), (0, 1, 2, 3), has_aux=True))
    want = run(query, key, value, table)
    with jax.set_mesh(jax.make_mesh((2, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)):
        have = run(query, key, value, table)
    assert have[0][1][0].sharding.is_fully_replicated == (batch == 3)
    for one, other in zip(jax.tree.leaves(have), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5)
