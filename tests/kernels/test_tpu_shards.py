"""TPU kernels under a mesh with Auto axes compute, on the shards of each device, what one device does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import contract_unless
from jax import P
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding

from attnax import alibi_mod, flash_attention, masks, pallas_flash_attention, soft_cap_mod
from attnax.sharding import AXES

T, D = 131, 8


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def options(kind, batch, heads, table):
    match kind:
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
            distance, pairs = table[:, :64], jnp.einsum("NT,S->NTS", table, table[0])
            return {
                "score_mod": lambda s, b, h, q, kv: s + distance[h, jnp.minimum(jnp.abs(q - kv), 63)] + pairs[0, q, kv]
            }
        case "pairs":
            pairs = jnp.einsum("NT,S->NTS", table, table[0])
            return {"score_mod": lambda s, b, h, q, kv: s + pairs[h, q, kv] + pairs[0, kv, q] * (1 + b)}


def loss(kind, query, key, value, table):
    given = options(kind, *query.shape[:2], table)
    out, lse = pallas_flash_attention(
        query, key, value, **given, return_lse=True, interpret="tpu", block_q=128, block_kv=128
    )
    return (out**2).sum() + jnp.where(jnp.isfinite(lse), lse, 0).sum(), (out, lse)


@pytest.mark.parametrize(
    ("kind", "batch", "heads"),
    [
        contract_unless(False, "slopes", 1, (8, 4)),  # heads are cut
        contract_unless(False, "slopes", 3, (4, 1)),  # nothing is
        contract_unless(False, "padding", 2, (4, 2)),  # both are
        contract_unless(False, "index", 2, (4, 2)),
        contract_unless(False, "tables", 2, (4, 2)),
        contract_unless(False, "pairs", 4, (4, 2)),  # the batch is
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


FOUR = AbstractMesh((2, 2), ("x", "y"), (AxisType.Auto,) * 2, abstract_device=AbstractDevice("TPU v5e", 4, "tpu"))


def kernels(run, *shapes, mesh=FOUR):
    """The lines of the program for four TPUs that call kernels."""
    arrays = [jax.ShapeDtypeStruct(x, jnp.bfloat16, sharding=NamedSharding(mesh, P())) for x in shapes]
    with jax.sharding.use_abstract_mesh(mesh):
        text = jax.jit(run).trace(*arrays).lower(lowering_platforms=("tpu",)).as_text()
    return [line for line in text.splitlines() if "tpu_custom_call" in line]


def steeper(slopes):
    return lambda s, b, h, q, kv: s - slopes[h] * (q - kv)


@pytest.mark.parametrize(
    ("batch", "local"),
    [
        contract_unless(False, 8, "2x4x256x64"),
        contract_unless(True, 2, "1x2x256x64"),
        contract_unless(False, 1, "1x1x256x64"),
    ],
)
def test_a_program_that_jit_cuts_over_several_tpus_holds_kernels_for_shards(batch, local):
    def loss(x, slopes):
        def layer(x, _):
            return flash_attention(x, x, x, mask=masks.causal(), score_mod=steeper(slopes)), None

        return jax.lax.scan(layer, x, None, length=2)[0].astype("float32").sum()

    lines = kernels(jax.grad(loss, (0, 1)), (batch, 4, 256, 64), (4,))
    assert len(lines) == 3 and all(f"tensor<{local}xbf16>" in line for line in lines)


def of_layout(**sizes):
    """The mesh of a layout of four TPUs."""
    sizes = tuple(sizes.get(name, 1) for name in AXES)
    return AbstractMesh(sizes, AXES, (AxisType.Auto,) * 5, abstract_device=FOUR.abstract_device)


@pytest.mark.parametrize(
    ("mod", "name"),
    [
        contract_unless(False, soft_cap_mod(30.0), "splash_mha"),
        contract_unless(True, None, "splash_mha"),
        contract_unless(True, alibi_mod(8), "attnax"),
    ],
    ids=["soft cap", "none", "alibi"],
)
def test_a_layout_leaves_each_shard_the_engine_of_the_whole_call(mod, name):
    loss = lambda x: flash_attention(x, x, x, mask=masks.causal(), score_mod=mod).astype("float32").sum()
    lines = kernels(jax.grad(loss), (8, 8, 128, 64), mesh=of_layout(fsdp=2, tensor=2))
    assert len(lines) >= 3 and all(f'kernel_name = "{name}' in line and "4x4x128x64" in line for line in lines)


def test_a_ring_of_a_layout_holds_kernels_in_its_loops():
    loss = lambda x: flash_attention(x, x, x, mask=masks.causal()).astype("float32").sum()
    lines = kernels(jax.grad(loss), (2, 2, 1024, 64), mesh=of_layout(fsdp=2, context=2))
    assert len(lines) == 6 and all("1x2x512x64" in line for line in lines)  # own keys, and those that come


@pytest.mark.contract
def test_a_call_that_no_kernel_serves_runs_in_tiles_on_a_mesh():
    mod = lambda s, b, h, q, kv: s + jax.lax.lgamma(s)
    loss = lambda x: flash_attention(x, x, x, score_mod=mod).astype("float32").sum()
    assert kernels(jax.grad(loss), (8, 4, 256, 64)) == []


@pytest.mark.contract
def test_a_shard_map_that_checks_varying_axes_holds_kernels():
    cut = P("x", "y")
    attend = lambda x, slopes: flash_attention(x, x, x, mask=masks.causal(), score_mod=steeper(slopes))
    run = jax.shard_map(attend, in_specs=(cut, P("y")), out_specs=cut)
    loss = lambda *x: run(*x).astype("float32").sum()
    lines = kernels(jax.grad(loss, (0, 1)), (8, 4, 256, 64), (4,))
    assert len(lines) == 3 and all("tensor<4x2x256x64xbf16>" in line for line in lines)


@pytest.mark.contract
def test_lists_of_tiles_are_as_long_as_a_shard_needs():
    mask = masks.padding(np.arange(2**9)) & (lambda b, h, q, kv: q + kv > h)
    attend = lambda x: flash_attention(x, x, x, mask=mask)
    assert len(kernels(attend, (2**9, 2**8, 256, 64))) == 1
    assert kernels(attend, (2**9, 2**10, 256, 64)) == []


@pytest.mark.contract
@pytest.mark.parametrize("interpret", ["tpu", "cuda"])
def test_a_table_may_be_read_in_a_shard_map_under_a_mesh(interpret):
    def run(x, pairs):
        mod = lambda s, b, h, q, kv: s + pairs[h, q, kv]
        return (pallas_flash_attention(x, x, x, score_mod=mod, interpret=interpret) ** 2).sum(keepdims=True)

    with jax.set_mesh(jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,))):
        call = jax.shard_map(run, in_specs=(P("x"), P()), out_specs=P("x"), check_vma=False)
        gradient = jax.jit(jax.grad(lambda *x: call(*x).sum(), (0, 1)))
        assert jax.eval_shape(gradient, normal(0, 2, 2, 16, 8), normal(1, 2, 16, 16))[1].shape == (2, 16, 16)
