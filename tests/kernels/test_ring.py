"""Ring attention: many devices compute what one does, each holding its share only."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from _lowered import gpu_mesh, kernels_of, parse
from cases import CASES
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tiny import build

from attnax import MultiHeadAttention, masks, ring_attention, ring_attention_reference, standard_attention, zigzag_order
from attnax.kernels import ring
from attnax.kernels._core import platform

SEQ = PartitionSpec(None, None, "seq")


def ring_mesh(num_devices, axis_type=AxisType.Auto):
    return jax.make_mesh((num_devices,), ("seq",), axis_types=(axis_type,))


def on_devices(run, mesh, *arrays, out_specs=SEQ, specs=None):
    """`run` inside shard_map with its default checks, on arrays cut along the sequence (or as `specs` say)."""
    specs = (SEQ,) * len(arrays) if specs is None else specs
    placed = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(arrays, specs, strict=True)]
    return jax.jit(jax.shard_map(run, mesh=mesh, in_specs=tuple(specs), out_specs=out_specs))(*placed)


def filled_up(x, even):
    return np.pad(x, ((0, 0), (0, 0), (0, even - x.shape[2]), (0, 0)))


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


IN_THE_CONTRACT = {
    "full",
    "multi-query",
    "cross",
    "causal & left padding",
    "function",
    "array of a head axis",
    "at positions",
}


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            name,
            marks=[]
            if name == "score mod & causal"
            else [pytest.mark.contract if name in IN_THE_CONTRACT else pytest.mark.thorough],
        )
        for name in CASES
        if name not in ("no query", "no key")
    ],
)
def test_two_devices_match_float64(case):
    """Lengths of the cases are odd: they are filled up, and the mask forbids what was filled in."""
    case = CASES[case]
    query, key, value, cotangent = case.arrays()
    even_q, even_kv = case.seq_q + case.seq_q % 2, case.seq_kv + case.seq_kv % 2
    mask = None if case.mask() is None else masks.as_mask(case.mask())

    def inside(b, h, q, kv):
        real = kv < case.seq_kv
        if mask is not None:
            real = real & mask(b, h, jnp.minimum(q, case.seq_q - 1), jnp.minimum(kv, case.seq_kv - 1))
        return real

    def run(query, key, value, cotangent):
        attend = partial(
            ring_attention, axis_name="seq", mask=inside, score_mod=case.score_mod, return_lse=True, block_size=4
        )
        (out, lse), pull = jax.vjp(attend, query, key, value)
        return out, lse[..., None], *pull((cotangent, jnp.zeros_like(lse)))

    arrays = [
        filled_up(query, even_q),
        filled_up(key, even_kv),
        filled_up(value, even_kv),
        filled_up(cotangent, even_q),
    ]
    out, lse, *grads = map(np.asarray, on_devices(run, ring_mesh(2), *arrays, out_specs=(SEQ,) * 5))
    mod = None
    if case.score_mod is not None:
        mod = lambda scores, b, h, q, kv: np.asarray(case.score_mod(scores, b, h, q, kv))
    expected, expected_lse = oracle.attention(query, key, value, keep=case.dense(), score_mod=mod)
    assert oracle.rms_error(out[:, :, : case.seq_q], expected) <= 1e-6
    np.testing.assert_allclose(lse[:, :, : case.seq_q, 0], expected_lse, atol=3e-6, rtol=1e-6)
    expected = oracle.gradients(query, key, value, cotangent, keep=case.dense(), score_mod=mod)
    for have, want in zip(grads, expected, strict=True):
        assert oracle.rms_error(have[:, :, : want.shape[2]], want) <= 2e-6
        assert (have[:, :, want.shape[2] :] == 0).all()


@pytest.mark.parametrize(
    ("num_devices", "axis_type", "zigzag"),
    [
        pytest.param(2, AxisType.Auto, False, marks=pytest.mark.thorough),
        pytest.param(2, AxisType.Explicit, True, marks=pytest.mark.contract),
        pytest.param(4, AxisType.Explicit, False, marks=pytest.mark.contract),
        pytest.param(4, AxisType.Auto, True, marks=pytest.mark.thorough),
        pytest.param(8, AxisType.Auto, False, marks=pytest.mark.thorough),
        pytest.param(8, AxisType.Explicit, True, marks=pytest.mark.thorough),
    ],
)
def test_any_number_of_devices_gives_values_and_gradients_of_one(num_devices, axis_type, zigzag):
    """With a window, a score mod over a learned array, dropout, grouped heads and a cotangent of the log-sum-exp."""
    batch, heads, kv_heads, seq_q, seq_kv = 2, 6, 2, 48, 80
    shapes = (
        (batch, heads, seq_q, 5),
        (batch, kv_heads, seq_kv, 5),
        (batch, kv_heads, seq_kv, 7),
        (batch, heads, seq_q, 7),
        (batch, heads, seq_q, 1),
    )
    arrays = [normal(i, *shape) for i, shape in enumerate(shapes)]
    bias = normal(5, heads, seq_kv)

    def run(attention_fn, bias, query, key, value, d_out, d_lse):
        def attend(query, key, value, bias):
            return attention_fn(
                query,
                key,
                value,
                mask=masks.sliding_window(29),
                score_mod=lambda scores, b, h, q, kv: scores + jnp.exp(bias[h, kv]),
                dropout_rng=jax.random.key(1),
                dropout_rate=0.2,
                deterministic=False,
                return_lse=True,
            )

        (out, lse), pull = jax.vjp(attend, query, key, value, bias)
        return out, lse[..., None], *pull((d_out, d_lse[..., 0]))

    expected = jax.jit(partial(run, standard_attention))(bias, *arrays)
    orders = [zigzag_order(n, num_devices) if zigzag else np.arange(n) for n in (seq_q, seq_kv)]
    which = (0, 1, 1, 0, 0)
    results = on_devices(
        partial(run, partial(ring_attention, axis_name="seq", zigzag=zigzag)),
        ring_mesh(num_devices, axis_type),
        bias,
        *(x[:, :, orders[i]] for x, i in zip(arrays, which, strict=True)),
        specs=(PartitionSpec(), *(SEQ,) * 5),
        out_specs=(*(SEQ,) * 5, PartitionSpec()),
    )
    for have, want, i in zip(results, expected, (0, 0, 0, 1, 1, None), strict=True):
        have = np.asarray(have) if i is None else np.asarray(have)[:, :, np.argsort(orders[i])]
        assert oracle.rms_error(have, want) <= 3e-6


class TestOnGpus:
    """Each hop runs the GPU kernels: with a window, dropout, a learned scale, and mods of a key and of a distance."""

    LENGTHS = 48, 80  # of queries and keys

    def shapes(self):
        queries, keys = self.LENGTHS
        return (2, 6, queries, 16), (2, 2, keys, 16), (2, 2, keys, 16)

    def run(self, attend, query, key, value, bias):
        """out, lse, and the gradients of query, key, value, bias, a table by distance and the scale."""

        def attention(query, key, value, bias, table, scale):
            return attend(
                query,
                key,
                value,
                mask=masks.sliding_window(29),
                score_mod=lambda s, b, h, q, kv: s + jnp.exp(bias[h, kv]) + table[q - kv + 100],
                dropout_rng=jax.random.key(1),
                dropout_rate=0.2,
                deterministic=False,
                scale=scale,
            )

        (out, lse), pull = jax.vjp(attention, query, key, value, bias, jnp.linspace(0, 2, 200), jnp.float32(0.3))
        *d_arrays, d_scale = pull((jnp.ones_like(out), jnp.full_like(lse, 0.1)))
        return out, lse[..., None], *d_arrays, d_scale.reshape(1)

    def test_its_kernels_are_lowered_and_valid(self):
        platform._lowers_kernels.cache_clear()  # so that it is asked inside of the shard_map
        cut, whole = PartitionSpec(None, None, "gpus"), PartitionSpec()
        mesh, attend = gpu_mesh(2), partial(ring_attention, axis_name="gpus", return_lse=True)
        specs = (cut,) * 3, (cut,) * 5
        run = jax.shard_map(
            partial(self.run, attend), mesh=mesh, in_specs=(*specs[0], whole), out_specs=(*specs[1], *(whole,) * 3)
        )
        arrays = (
            jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, cut)) for shape in self.shapes()
        )
        bias = jax.ShapeDtypeStruct((6, self.LENGTHS[1]), jnp.float32, sharding=NamedSharding(mesh, whole))
        kernels = kernels_of(run, *arrays, bias, mesh=mesh)
        # For the keys of the device itself, and for those that come.
        assert [kernel.name.removeprefix("attnax_") for kernel in kernels] == [
            *["forward"] * 2,
            *["d_query", "d_key_value", "d_table"] * 2,
        ]
        for kernel in kernels:
            parse(kernel)

    @pytest.mark.contract
    @pytest.mark.parametrize("zigzag", [False, True])
    def test_its_kernels_give_values_and_gradients_of_one_device(self, zigzag):
        mesh, total = ring_mesh(4), PartitionSpec("seq")
        arrays, bias = [normal(n, *shape) for n, shape in enumerate(self.shapes())], normal(5, 6, self.LENGTHS[1])
        orders = [zigzag_order(n, 4) if zigzag else np.arange(n) for n in self.LENGTHS]

        def attend(query, key, value, **options):
            return ring._attend(query, key, value, "seq", zigzag, None, "interpret", **options)

        # Interpreted kernels do not say over which axes their results vary, so sums over devices are taken here.
        run = jax.shard_map(
            partial(self.run, attend),
            mesh=mesh,
            in_specs=(*(SEQ,) * 3, PartitionSpec()),
            out_specs=(*(SEQ,) * 5, *(total,) * 3),
            check_vma=False,
        )
        cut = [x[:, :, orders[min(n, 1)]] for n, x in enumerate(arrays)]
        have = jax.jit(run)(*(jax.device_put(x, NamedSharding(mesh, SEQ)) for x in cut), bias)
        want = jax.jit(partial(self.run, partial(standard_attention, return_lse=True)))(*arrays, bias)
        for x, y, which in zip(have, want, (0, 0, 0, 1, 1, None, None, None), strict=True):
            x = np.asarray(x)
            x = x.reshape(4, *y.shape).sum(0) if which is None else x[:, :, np.argsort(orders[which])]
            assert oracle.rms_error(x, y) <= 3e-6


def test_dropout_has_the_bits_of_one_device_and_only_where_it_is_asked_for():
    query, key, value = (normal(i, 1, 2, 16, 3) for i in range(3))
    options = {"dropout_rng": jax.random.key(1), "dropout_rate": 0.4}

    def run(attend, *arrays):
        return attend(*arrays, **options, deterministic=False), attend(*arrays, **options)

    want = jax.jit(partial(run, standard_attention))(query, key, value)
    ring = partial(run, partial(ring_attention, axis_name="seq"))
    have = on_devices(ring, ring_mesh(2), query, key, value, out_specs=(SEQ, SEQ))
    np.testing.assert_allclose(have, want, atol=2e-6)
    assert np.abs(want[0] - want[1]).max() > 0.1


def test_documents_and_arrays_are_global():
    query, key, value = (normal(i, 2, 2, 16, 3) for i in range(3))
    rng = np.random.default_rng(3)
    ids, dense = np.sort(rng.integers(0, 4, (2, 16)), axis=1), rng.random((1, 2, 16, 16)) < 0.5
    mask = masks.causal() & masks.documents(ids) & dense
    have = on_devices(partial(ring_attention, axis_name="seq", mask=mask), ring_mesh(4), query, key, value)
    keep = np.tri(16, dtype=bool) & (ids[:, None, :, None] == ids[:, None, None, :]) & dense
    expected, _ = oracle.attention(query, key, value, keep=keep)
    np.testing.assert_allclose(have, expected, atol=2e-6)
    reference = jax.jit(partial(ring_attention_reference, mask=mask))
    np.testing.assert_allclose(reference(query, key, value), expected, atol=2e-6)


def test_poison_stays_where_it_may_be_attended():
    query, key, value = (normal(i, 1, 2, 16, 3) for i in range(3))
    key[:, :, 9] = np.nan

    def run(query, key, value):
        out, pull = jax.vjp(partial(ring_attention, axis_name="seq", mask=masks.causal()), query, key, value)
        return out, *pull(out)

    out, *grads = map(np.asarray, on_devices(run, ring_mesh(4), query, key, value, out_specs=(SEQ,) * 4))
    assert np.isfinite(out[:, :, :9]).all() and np.isnan(out[:, :, 9:]).all()
    assert np.isfinite(grads[0][:, :, :9]).all()


@pytest.mark.parametrize("what", ["gradients", pytest.param("output", marks=pytest.mark.contract)])
def test_memory_is_that_of_the_share(what):
    mesh, arrays = ring_mesh(8), [jax.ShapeDtypeStruct((1, 1, 8192, 16), jnp.float32)] * 3

    def loss(query, key, value):
        out = ring_attention(query, key, value, axis_name="seq", mask=masks.causal(), block_size=128)
        return jax.lax.psum(out.sum(), "seq")

    sharded = jax.shard_map(loss, mesh=mesh, in_specs=(SEQ,) * 3, out_specs=PartitionSpec())
    run = sharded if what == "output" else jax.grad(sharded, (0, 1, 2))
    lowered = jax.jit(run, in_shardings=(NamedSharding(mesh, SEQ),) * 3).lower(*arrays)
    share = 1024 * 16 * 4  # bytes of a device's part of an array
    assert lowered.compile().memory_analysis().temp_size_in_bytes < 40 * share < 8192 * 1024 * 4


@pytest.mark.parametrize("zigzag", [True, pytest.param(False, marks=pytest.mark.contract)])
def test_zigzag_gives_every_device_the_same_work(zigzag):
    visits = {}

    def count(rank, q):
        visits[int(rank)] = visits.get(int(rank), 0) + 1

    def run(query, key, value):
        def mod(scores, b, h, q, kv):
            jax.debug.callback(count, jax.lax.axis_index("seq"), q[0, 0, 0, 0])
            return scores

        return ring_attention(
            query, key, value, axis_name="seq", mask=masks.causal(), score_mod=mod, zigzag=zigzag, block_size=4
        )

    jax.block_until_ready(on_devices(run, ring_mesh(4), *[np.ones((1, 1, 64, 3), np.float32)] * 3))
    jax.effects_barrier()
    assert len(visits) == 4 and sum(visits.values()) == 16 * 17 // 2
    if zigzag:
        assert max(visits.values()) == min(visits.values())
    else:
        assert max(visits.values()) > 5 * min(visits.values())


def test_a_layer_runs_on_a_ring():
    options = {"num_heads": 4, "in_features": 8, "num_kv_heads": 2, "use_rope": True}
    on_a_ring = partial(ring_attention, axis_name="seq")
    layer = build(lambda rngs: MultiHeadAttention(rngs, **options, attention_fn=on_a_ring))
    alone = build(lambda rngs: MultiHeadAttention(rngs, **options))
    graphdef, state = nnx.split(layer)
    x = normal(1, 2, 16, 8)
    mask = masks.causal() & masks.documents(np.arange(16) // 5)

    def run(state, x):
        positions = jax.lax.axis_index("seq") * 4 + jnp.arange(4)
        return nnx.merge(graphdef, state)(x, mask=mask, position_ids_q=positions)

    spec = PartitionSpec(None, "seq")
    have = jax.jit(jax.shard_map(run, mesh=ring_mesh(4), in_specs=(PartitionSpec(), spec), out_specs=spec))(state, x)
    np.testing.assert_allclose(have, nnx.jit(lambda layer, x: layer(x, mask=mask))(alone, x), atol=2e-6)


def test_a_sequence_that_is_not_cut_is_on_one_device():
    query, key, value = normal(0, 2, 4, 13, 8), normal(1, 2, 2, 13, 8), normal(2, 2, 2, 13, 8)
    options = {"mask": masks.causal(), "score_mod": lambda s, b, h, q, kv: s - 0.1 * (h + 1) * (q - kv)}

    def loss(attention_fn, *arrays):
        out, lse = attention_fn(*arrays, **options, return_lse=True)
        return (out**2).sum() + lse.sum()

    have, want = (
        jax.jit(jax.value_and_grad(partial(loss, fn), (0, 1, 2)))(query, key, value)
        for fn in (ring_attention, standard_attention)
    )
    for one, other in zip(jax.tree.leaves(have), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5)
    make = lambda rngs, fn=None: MultiHeadAttention(rngs, num_heads=2, in_features=8, attention_fn=fn)
    layer, ring = build(make), build(partial(make, fn=ring_attention))
    x = jax.device_put(normal(3, 1, 5, 8))
    np.testing.assert_allclose(ring(x, mask=masks.causal()), layer(x, mask=masks.causal()), atol=1e-6)


@pytest.mark.parametrize("axis_name", ["rows", ("seq",)])
def test_an_unknown_axis_is_an_error(axis_name):
    x = np.ones((1, 1, 8, 2), np.float32)
    if axis_name == ("seq",):  # outside of any shard_map no name is known
        with pytest.raises(ValueError, match="must name a mesh axis"):
            ring_attention(x, x, x, axis_name="seq")
        return
    with pytest.raises(ValueError, match=f"must name a mesh axis .*got axis_name={axis_name!r}"):
        on_devices(partial(ring_attention, axis_name=axis_name), ring_mesh(2), x, x, x)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mask": np.ones((4, 4), bool)}, r"must broadcast to .*\(1, 1, 8, 8\); got mask\.shape=\(1, 1, 4, 4\)"),
        ({"mask": masks.documents(np.zeros(4, np.int32))}, r"documents need one id a token, \(8,\)"),
        ({"mask": np.ones((8, 8))}, "must be boolean"),
        ({"dropout_rate": 0.1, "deterministic": False}, "ring_attention: dropout needs a key"),
        ({"block_size": 0}, "block_size must be a whole number"),
    ],
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_local_shapes_and_wrong_options_are_refused(options, words):
    x = np.ones((1, 1, 8, 2), np.float32)
    with pytest.raises(ValueError, match=words):
        on_devices(partial(ring_attention, axis_name="seq", **options), ring_mesh(2), x, x, x)


def test_zigzag_needs_lengths_that_it_can_cut():
    with pytest.raises(ValueError, match="multiple of 2 . num_devices; got seq_len=12, num_devices=4"):
        zigzag_order(12, 4)
    x = np.ones((1, 1, 6, 2), np.float32)
    with pytest.raises(ValueError, match="length must be even; got 3 queries"):
        on_devices(partial(ring_attention, axis_name="seq", zigzag=True), ring_mesh(2), x, x, x)


def test_zigzag_order_is_a_permutation():
    assert sorted(zigzag_order(24, 3)) == list(range(24))
