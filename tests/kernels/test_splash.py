"""Splash attention without a TPU: its kernels interpreted, and lowered for one."""

import re
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.experimental.pallas.ops.tpu import splash_attention
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, PartitionSpec

from attnax import flash_attention, masks, memory_efficient_attention, standard_attention
from attnax.kernels._core.platform import by_platform
from attnax.kernels._core.shards import on_shards
from attnax.kernels._tpu import splash as engine
from attnax.kernels.score_mods import alibi_mod, soft_cap_mod

CASES = {
    "all": (None, None, 256, 384),
    "causal": (masks.causal(), None, 640, 640),
    "causal, fewer queries": (masks.causal(), soft_cap_mod(2), 256, 640),
    "causal, fewer keys": (masks.causal(), None, 640, 256),
    "window": (masks.sliding_window(150), soft_cap_mod(1.5), 640, 640),
    "window, fewer queries": (masks.sliding_window(100), None, 128, 640),
    "window, fewer keys": (masks.sliding_window(300), None, 640, 384),
    "only oneself": (masks.sliding_window(1), None, 256, 256),
}
QUICK = "causal, fewer queries"


def mark_of(name):
    if name == QUICK:
        return []
    return [pytest.mark.contract if name in ("all", "window", "window, fewer keys") else pytest.mark.thorough]


@pytest.fixture
def interpreted(monkeypatch):
    make = partial(splash_attention.make_splash_mha_single_device, interpret=True)
    monkeypatch.setattr(splash_attention, "make_splash_mha_single_device", make)


def shaped(seq_q, seq_kv, dtype=jnp.float32, heads=(4, 2), sizes=(20, 24)):
    """The shapes of query, key, value and cotangent."""
    (num_heads, kv_heads), (head_dim, value_dim) = heads, sizes
    shapes = (
        (2, num_heads, seq_q, head_dim),
        (2, kv_heads, seq_kv, head_dim),
        (2, kv_heads, seq_kv, value_dim),
        (2, num_heads, seq_q, value_dim),
    )
    return tuple(jax.ShapeDtypeStruct(shape, dtype) for shape in shapes)


def arrays(*lengths, **options):
    """query, key, value and cotangent."""
    rng = np.random.default_rng(0)
    return tuple(rng.standard_normal(x.shape, np.float32).astype(x.dtype) for x in shaped(*lengths, **options))


def why_not(query, key, value, mask=None, score_mod=None, dropout_rate=0.0, return_lse=False):
    return engine.why_not_splash(
        query, key, value, mask=mask, score_mod=score_mod, dropout_rate=dropout_rate, return_lse=return_lse
    )


def splash(mask, score_mod, query, key, value, cotangent, scale):
    """(out, lse) and the gradients of (scale * query, key, value)."""
    assert why_not(query, key, value, mask, score_mod) is None
    options = {"mask": mask, "score_mod": score_mod}
    results = engine.splash_forward(query, key, value, scale, **options)
    return results, engine.splash_backward(query, key, value, scale, *results, cotangent, **options)


def definition(attend, mask, score_mod, query, key, value, cotangent, scale):
    """The same results as `splash`, by the definition."""

    def run(query, key, value):
        return attend(query, key, value, mask=mask, score_mod=score_mod, scale=1.0, return_lse=True)

    results, pullback = jax.vjp(run, query * scale, key, value)
    return results, pullback((cotangent, jnp.zeros_like(results[1])))


@pytest.mark.parametrize("name", [pytest.param(name, marks=mark_of(name)) for name in CASES])
def test_results_and_gradients_are_those_of_the_definition(interpreted, name):
    mask, score_mod, seq_q, seq_kv = CASES[name]
    given = *arrays(seq_q, seq_kv), np.float32(0.3)
    have = jax.jit(partial(splash, mask, score_mod))(*given)
    want = jax.jit(partial(definition, standard_attention, mask, score_mod))(*given)
    for x, y in zip(jax.tree.leaves(have), jax.tree.leaves(want), strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        # Where a query attends one key, the gradient of its score is 0, and both sides hold rounding errors alone.
        is_zero = max(np.abs(x).max(), np.abs(y).max()) <= 1e-5
        assert is_zero or oracle.rms_error(x, y) <= 2e-6


def test_the_backward_pass_reads_the_results_that_it_is_given(interpreted):
    *given, cotangent = map(jax.device_put, arrays(128, 256, heads=(2, 1)))

    def gradients(add, factor):
        options = {"mask": masks.causal(), "score_mod": None}
        out, lse = engine.splash_forward(*given, jnp.float32(0.3), **options)
        return engine.splash_backward(*given, jnp.float32(0.3), factor * out, lse + add, cotangent, **options)

    gradients = jax.jit(gradients)
    (d_query, _, d_value), (_, _, halved), (other, _, same) = (
        gradients(*change) for change in ((0.0, 1.0), (np.log(2, dtype=np.float32), 1.0), (0.0, 2.0))
    )
    np.testing.assert_allclose(halved, d_value / 2, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(same, d_value)
    assert oracle.rms_error(other, d_query) > 0.1


@pytest.mark.contract
@pytest.mark.parametrize("heads", [(3, 3), (5, 1)])
def test_bfloat16_is_as_exact_as_the_dense_computation(interpreted, heads):
    *given, cotangent = arrays(256, 256, dtype=jnp.bfloat16, heads=heads, sizes=(64, 64))
    (out, lse), gradients = jax.jit(partial(splash, masks.causal(), None))(*given, cotangent, 0.125)
    in_float32 = *(x.astype(np.float32) for x in (*given, cotangent)), 0.125
    exact = jax.jit(partial(definition, standard_attention, masks.causal(), None))
    (want, want_lse), want_gradients = exact(*in_float32)
    assert out.dtype == jnp.bfloat16 and lse.dtype == jnp.float32
    assert all(x.dtype == jnp.float32 for x in gradients)
    assert oracle.rms_error(lse, want_lse) <= 1e-6
    for x, y in zip((out, *gradients), (want, *want_gradients), strict=True):
        assert oracle.rms_error(x, y) <= 2 * oracle.rms_error(np.asarray(y).astype(jnp.bfloat16), y)


@pytest.mark.parametrize(
    "mask",
    [masks.sliding_window(40), masks.causal(), None],
)
@pytest.mark.contract
def test_a_non_finite_row_contaminates_only_the_rows_that_attend_it(interpreted, mask):
    query, key, value, cotangent = arrays(256, 256)
    query[0, 1, 70, 3] = np.inf
    key[1, 0, 150, 2] = np.nan
    value[1, 1, 200, 1] = -np.inf
    given = query, key, value, cotangent, 0.3
    have = jax.tree.leaves(jax.jit(partial(splash, mask, None))(*given))
    want = jax.tree.leaves(jax.jit(partial(definition, memory_efficient_attention, mask, None))(*given))
    for x, y in zip(have, want, strict=True):
        finite = np.isfinite(y)
        assert 0.2 < finite.mean() < 1.0 or mask is not masks.sliding_window(40)
        np.testing.assert_array_equal(np.isnan(x), ~finite)
        assert oracle.rms_error(np.where(finite, x, 0), np.where(finite, y, 0)) <= 2e-6


@pytest.mark.contract
def test_a_non_finite_cotangent_contaminates_only_the_keys_of_its_query(interpreted):
    *given, cotangent = arrays(256, 256)
    run = jax.jit(partial(splash, masks.sliding_window(40), None))
    bad, none = cotangent.copy(), cotangent.copy()
    bad[0, 3, 100, 0], none[0, 3, 100] = np.nan, 0.0
    _, gradients = run(*given, bad, 0.3)
    _, want = run(*given, none, 0.3)
    for x, y, first, head in zip(gradients, want, (100, 61, 61), (3, 1, 1), strict=True):
        contaminated = np.zeros(x.shape, bool)
        contaminated[0, head, first:101] = True
        np.testing.assert_array_equal(np.isnan(x), contaminated)
        np.testing.assert_array_equal(np.where(contaminated, 0, x), np.where(contaminated, 0, y))


@pytest.mark.parametrize("window", [None, 1, 127, 128, 129, 300, 1000])
@pytest.mark.parametrize(("seq_q", "seq_kv"), [(640, 640), (896, 640), (640, 896)])
def test_blocks_of_one_answer_are_those_of_the_whole_mask(window, seq_q, seq_kv):
    sides = (None if window is None else window - 1, 0)
    whole = splash_attention.LocalMask((seq_q, seq_kv), sides, 0)
    quick = engine._causal_mask()((seq_q, seq_kv), sides, 0)
    for q in range(0, seq_q, 128):
        for kv in range(0, seq_kv, 128):
            block = slice(q, q + 128), slice(kv, kv + 128)
            np.testing.assert_array_equal(np.broadcast_to(quick[block], (128, 128)), whole[block])


def test_equal_calls_make_equal_masks():
    first, second = (engine._causal_mask()((256, 256), (6, 0), 0) for _ in range(2))
    assert first == second and hash(first) == hash(second)


REFUSED = {
    "a score mod": ({"score_mod": alibi_mod(4)}, {}, "no score mod but a soft cap of known size"),
    "a learned cap": (
        {"score_mod": soft_cap_mod(jax.device_put(np.float32(3.0)))},
        {},
        "no score mod but a soft cap of known size",
    ),
    "dropout": ({"dropout_rate": 0.1}, {}, "no dropout"),
    "log-sum-exp": ({"return_lse": True}, {}, "log-sum-exp has no gradient"),
    "float16": ({}, {"dtype": jnp.float16}, "float32 and bfloat16 only"),
    "large heads": ({}, {"sizes": (257, 8)}, "at most 256"),
    "large values": ({}, {"sizes": (8, 257)}, "at most 256"),
    "padding": ({"mask": masks.padding(np.array([3, 5]))}, {}, "no masks but causal ones"),
    "a window both ways": ({"mask": masks.sliding_window(5, causal=False)}, {}, "no masks but causal ones"),
    "a traced window": ({"mask": masks.sliding_window(jax.device_put(np.int32(5)))}, {}, "no masks but causal ones"),
    "causal and more": ({"mask": masks.causal() & (lambda b, h, q, kv: q != kv)}, {}, "no masks but causal ones"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_the_reason_why_splash_does_not_serve_a_call(name):
    options, shapes, reason = REFUSED[name]
    assert reason in why_not(*shaped(128, 256, **shapes)[:3], **options)


@pytest.mark.parametrize(("seq_q", "seq_kv"), [(127, 128), (128, 100), (64, 128), (0, 128), (128, 0)])
def test_lengths_are_multiples_of_128(seq_q, seq_kv):
    assert "multiples of 128" in why_not(*shaped(seq_q, seq_kv)[:3])


def test_rows_that_attend_nothing_are_refused():
    query, key, value, _ = shaped(384, 256)
    assert "attend nothing" in why_not(query, key, value, masks.sliding_window(128))
    assert why_not(query, key, value, masks.sliding_window(129)) is None
    assert "attend nothing" in why_not(query, query, query, masks.SlidingWindow(0, 1))


def test_lengths_of_too_many_blocks_are_refused():
    length = 128 * 257  # a prime, so that blocks are small
    assert "here are 66049" in why_not(*shaped(length, length)[:3], masks.causal())
    assert why_not(*shaped(2**17, 2**17)[:3], masks.causal()) is None


def test_64_bits_are_refused():
    with jax.enable_x64(True):
        assert "counts in 32 bits" in why_not(*shaped(128, 128)[:3])


def test_meshes_are_refused_except_in_a_shard_map_that_does_not_check():
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    seen = []

    def see(x):
        seen.append(why_not(x, x, x))
        return x

    def run(**options):
        specs = PartitionSpec("x")
        jax.eval_shape(jax.shard_map(see, mesh=mesh, in_specs=specs, out_specs=specs, **options), shaped(128, 128)[0])
        return seen.pop()

    assert "does not say over which axes" in run()
    assert run(check_vma=False) is None
    assert "over all axes" in run(axis_names={"x"})
    for axis_type, refused in ((AxisType.Auto, False), (AxisType.Explicit, True)):
        with jax.set_mesh(jax.make_mesh((2, 2), ("x", "y"), axis_types=(axis_type,) * 2)):
            jax.eval_shape(see, shaped(128, 128)[0])
        assert (seen.pop() is not None) == refused


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(name, dtype, marks=() if (name, dtype) == (QUICK, jnp.bfloat16) else pytest.mark.contract)
        for name in CASES
        for dtype in (jnp.float32, jnp.bfloat16)
    ],
)
def test_both_passes_lower_for_a_tpu_without_one(name, dtype):
    mask, score_mod, seq_q, seq_kv = CASES[name]
    given = *shaped(seq_q, seq_kv, dtype), jax.ShapeDtypeStruct((), jnp.float32)
    tpu = AbstractMesh((1,), ("x",), abstract_device=AbstractDevice("TPU v5e", 1, "tpu"))
    with jax.sharding.use_abstract_mesh(tpu):
        traced = jax.jit(partial(splash, mask, score_mod)).trace(*given)
        text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert "tpu_custom_call" in text
    kernels = {"splash_mha_fwd_residuals", "splash_mha_dq_no_residuals", "splash_mha_dkv_no_residuals"}
    assert all(kernel in text for kernel in kernels)


@pytest.mark.parametrize("before", [None, 1, 5, 16, 40])
def test_the_mask_of_a_block_is_its_formula_and_one_entry_where_all_pairs_agree(before):
    mask = engine._causal_mask()((64, 64), (None if before is None else before - 1, 0), 0)
    q, kv = np.indices((64, 64))
    want = (kv <= q) & (q - kv < (before or 64))
    for size in (8, 16):
        for i in range(0, 64, size):
            for j in range(0, 64, size):
                block = np.s_[i : i + size, j : j + size]
                have, formula = mask[block], want[block]
                np.testing.assert_array_equal(np.broadcast_to(have, formula.shape), formula)
                assert (have.shape == (1, 1)) == (formula.all() or not formula.any())


def test_blocks_are_the_largest_that_divide_the_length():
    lengths = {128: 128, 256: 256, 384: 384, 512: 512, 640: 128, 768: 384, 1280: 256, 1536: 512}
    assert {length: engine._block_size(length) for length in lengths} == lengths


@pytest.mark.parametrize("backwards", [False, True])
def test_a_marked_row_reaches_only_the_rows_that_attend_it(backwards):
    bad = np.random.default_rng(0).random((2, 3, 20)) < 0.1
    every = {None: 17, masks.SlidingWindow(5, 1): 17, masks.SlidingWindow(1, 1): 17, masks.causal(): 23}
    for mask, length in every.items():
        q, kv = np.indices((20, length) if backwards else (length, 20))
        attends = np.ones(q.shape, bool) if mask is None else np.asarray(mask(0, 0, q, kv))
        reached = engine._reach(jnp.asarray(bad), mask, length, backwards=backwards)
        want = (attends if backwards else attends.T) & bad[..., None]
        np.testing.assert_array_equal(reached, want.any(2))


FOUR = AbstractMesh((2, 2), ("x", "y"), (AxisType.Auto,) * 2, abstract_device=AbstractDevice("TPU v5e", 4, "tpu"))


@pytest.mark.parametrize(("batch", "local"), [(8, "2x4x256x64"), (6, "3x2x256x64"), (1, "1x256x64")])
def test_a_program_that_jit_cuts_over_several_tpus_holds_kernels_for_shards(batch, local):
    sharding = jax.sharding.NamedSharding(FOUR, PartitionSpec())
    x = jax.ShapeDtypeStruct((batch, 4, 256, 64), jnp.bfloat16, sharding=sharding)
    run = jax.jit(jax.grad(lambda *x: flash_attention(*x).astype("float32").sum()))
    text = run.trace(x, x, x).lower(lowering_platforms=("tpu",)).as_text()
    kernels = [line for line in text.splitlines() if "tpu_custom_call" in line]
    assert kernels and all(f"tensor<{local}xbf16>" in line for line in kernels)


def test_a_program_whose_arrays_name_no_mesh_runs_in_tiles():
    x = jax.ShapeDtypeStruct((8, 4, 256, 64), jnp.bfloat16)
    run = jax.jit(flash_attention, in_shardings=(jax.sharding.NamedSharding(FOUR, PartitionSpec("x")),) * 3)
    assert "tpu_custom_call" not in run.trace(x, x, x).lower(lowering_platforms=("tpu",)).as_text()


@pytest.mark.parametrize("batch", [8, 3])
def test_shards_of_auto_axes_compute_what_one_device_does(interpreted, batch):
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    rng = np.random.default_rng(0)
    query, key = (rng.standard_normal((batch, heads, 128, 8), np.float32) for heads in (8, 4))
    options = {"mask": masks.causal(), "score_mod": None}

    def run(query, key):
        out, lse = on_shards(partial(engine.splash_forward, **options), query, key, key, jnp.float32(0.3))
        return out, on_shards(
            partial(engine.splash_backward, **options), query, key, key, 0.3 + 0 * lse[0, 0, 0], out, lse, out
        )

    want = jax.jit(run)(query, key)
    with jax.set_mesh(mesh):
        have = jax.jit(run)(query, key)
    for x, y in zip(jax.tree.leaves(have), jax.tree.leaves(want), strict=True):
        assert not x.sharding.is_fully_replicated
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


def lowered_in_shard_maps(function, maps, *arguments, **options):
    """The program for four TPUs of a function inside of a `shard_map` over each set of axes."""
    specs = PartitionSpec()
    for axes in maps:
        function = jax.shard_map(function, in_specs=specs, out_specs=specs, axis_names=set(axes), **options)
    with jax.sharding.use_abstract_mesh(FOUR):
        return jax.jit(function).trace(*arguments).lower(lowering_platforms=("tpu",)).as_text()


@pytest.mark.parametrize("check_vma", [False, True])
@pytest.mark.parametrize(("maps", "chosen"), [(("xy",), "cosine"), (("y", "x"), "cosine"), (("x",), "sine")])
def test_the_function_for_a_tpu_runs_only_where_a_shard_map_cuts_all_axes(maps, chosen, check_vma):
    text = lowered_in_shard_maps(lambda x: by_platform(jnp.sin, x, tpu=jnp.cos), maps, jnp.ones(4), check_vma=check_vma)
    assert {name for name in ("sine", "cosine") if f"stablehlo.{name}" in text} == {chosen}


def test_a_shard_map_over_all_axes_holds_a_kernel():
    x = jax.ShapeDtypeStruct((2, 4, 256, 64), jnp.bfloat16)
    for maps, kernels in ((("xy",), 1), (("x",), 0)):
        text = lowered_in_shard_maps(lambda x: flash_attention(x, x, x), maps, x, check_vma=False)
        assert text.count("tpu_custom_call") == kernels


@pytest.mark.parametrize(("dtype", "precision"), [(jnp.float32, "HIGHEST"), (jnp.bfloat16, "DEFAULT")])
def test_products_are_as_exact_as_the_dtype(dtype, precision):
    given = *shaped(128, 128, dtype), 0.3
    traced = str(jax.make_jaxpr(partial(splash, masks.causal(), None))(*given))
    found = re.findall(r"precision=(.*)", traced)
    assert len(found) == traced.count("dot_general[") >= 9
    assert set(found) == {f"(Precision.{precision}, Precision.{precision})"}


@pytest.mark.contract
def test_importing_loads_no_pallas():
    code = "import sys, attnax.kernels._tpu.splash; print('jax.experimental.pallas.tpu' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
