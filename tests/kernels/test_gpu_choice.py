"""Which calls the GPU kernels serve, on which machines, and what is said of the rest."""

import re
import sys
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from _lowered import gpu_mesh, kernels_of
from jax import export, lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from test_gpu_kernels import LEARNED, NO_KERNEL, TABLE, arrays, gradient, interpreted, kernels_in, lowered, normal

from attnax import (
    cached_attention,
    flash_attention,
    init_kv_layer_cache,
    masks,
    memory_efficient_attention,
    pallas_flash_attention,
    why_not_cudnn,
    why_not_pallas,
)


@pytest.mark.parametrize("name", ["in a loop", "complex"])
def test_a_mod_that_no_kernel_can_hold_is_refused_by_the_name_of_what_it_does(name):
    array, mod, *_ = LEARNED[name]
    query, key, value, _ = arrays(seq_q=13, seq_kv=13)
    reason = why_not_pallas(query, key, value, score_mod=mod(array), platform="cuda")
    assert re.fullmatch(rf"no kernel can hold this score mod: .*({NO_KERNEL[name]}).*", reason)
    with pytest.raises(NotImplementedError, match=NO_KERNEL[name]):
        interpreted(query, key, value, score_mod=mod(array))
    explicit = jax.jit(partial(pallas_flash_attention, score_mod=mod(array))).trace(query, key, value)
    with pytest.raises(NotImplementedError, match="pallas_flash_attention: no kernel can hold this score mod"):
        explicit.lower(lowering_platforms=("cuda",))
    assert lowered(partial(flash_attention, score_mod=mod(array)), query, key, value) == set()
    explicit.lower(lowering_platforms=("cpu",))


@pytest.mark.usefixtures("unchecked_shapes")
def test_questions_take_shapes_and_are_checked():
    shape = jax.ShapeDtypeStruct((1, 4, 64, 64), jnp.bfloat16)
    ask = partial(why_not_pallas, shape, shape, shape)
    assert ask(platform="cuda") is None and "this process computes on cpu" in ask()
    assert why_not_cudnn(shape, shape, shape) == "this machine has no NVIDIA GPU"
    for question in (why_not_pallas, why_not_cudnn):
        with pytest.raises(ValueError, match=f'{question.__name__}: platform must be "cuda" or None.*; got platform='):
            question(shape, shape, shape, platform="gpu")
        with pytest.raises(TypeError, match=rf"{question.__name__}\(\) got an unexpected keyword argument 'causal'"):
            question(shape, shape, shape, causal=True)
    for name, size in (("block_q", 0), ("block_kv", 1.5), ("block_q", "64")):
        with pytest.raises(ValueError, match=f"{name} must be a whole number, at least 1; got {name}="):
            ask(**{name: size})


def test_a_card_that_jax_does_not_know_gets_tiles_and_a_warning():
    if jax.__version_info__ < (0, 11, 1):
        pytest.skip("this JAX lowers kernels for any GPU")
    x, mesh = jnp.ones((1, 2, 64, 64), jnp.bfloat16), gpu_mesh(name="My GPU")
    words = "only under a mesh with an AbstractDevice whose name it knows; got 'My GPU'; docs/understand/"
    with jax.sharding.use_abstract_mesh(mesh):
        assert words in why_not_pallas(x, x, x, platform="cuda")
    with pytest.warns(UserWarning, match=f"flash_attention: .*{words}.* It runs in tiles"):
        assert lowered(flash_attention, x, x, x, mesh=mesh) == set()
    with pytest.raises(NotImplementedError, match=f"pallas_flash_attention: .*{words}"):
        lowered(pallas_flash_attention, x, x, x, mesh=mesh)
    with pytest.raises(NotImplementedError, match="whose name it knows; docs/understand/accelerators.md has"):
        jax.jit(pallas_flash_attention).trace(x, x, x).lower(lowering_platforms=("cuda",))


@pytest.mark.parametrize(
    ("mod", "words"),
    [
        (lambda s, b, h, q, kv: jnp.sort(s), "sort"),
        (lambda s, b, h, q, kv: lax.erf(s), "erf"),
        (lambda s, b, h, q, kv: s + jnp.asarray(TABLE)[h].sum(-1), "gather of slices; index all 2 axes"),
        (lambda s, b, h, q, kv: jax.nn.gelu(jax.nn.relu(s), approximate=False), "erf"),
        (lambda s, b, h, q, kv: (s[..., None] * np.ones((1, 1, 1, 1, 3), "f")).sum(-1), "mul with an axis of size 3"),
    ],
)
def test_reasons_name_the_operation(mod, words):
    query, key, value, _ = arrays()
    assert re.search(words, why_not_pallas(query, key, value, score_mod=mod, platform="cuda"))


@pytest.mark.contract
def test_a_gradient_that_no_kernel_sums_is_left_to_the_tiles():
    """A table read by the score has no place of its own for each pair, nor one known to all."""
    array, mod, *_ = LEARNED["where the score says"]
    query, key, value, cotangent = arrays(seq_q=13, seq_kv=13)
    run = lambda attend, q, k, v, x, **options: attend(q, k, v, score_mod=mod(x), **options)
    assert lowered(gradient(partial(run, flash_attention), array), query, key, value, cotangent, array) == {"forward"}
    with pytest.raises(NotImplementedError, match=r"gradient of a captured array of shape \(3,\)"):
        gradient(partial(run, interpreted), array)(query, key, value, cotangent, array)
    out = run(interpreted, query, key, value, array)
    want, _ = oracle.attention(
        query, key, value, score_mod=lambda s, b, h, q, kv: s + np.asarray(array)[np.where(s > 0, 1, 2)]
    )
    np.testing.assert_allclose(out, want, atol=2e-6)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dtype": jnp.float64}, "kernels take float32, bfloat16 and float16"),
        ({"head_dim": 257}, "heads of at most 256"),
    ],
)
def test_arrays_that_no_kernel_takes_are_refused_in_words(change, words):
    with jax.enable_x64(change.get("dtype") == jnp.float64):
        reason = why_not_pallas(*arrays(seq_q=3, seq_kv=3, **change)[:3], platform="cuda")
    assert words in reason


def test_a_mesh_around_a_call_takes_no_kernel_from_it():
    # There JAX puts a resharding into a mod that chooses between an array and a number.
    with jax.sharding.use_abstract_mesh(gpu_mesh()):
        mod = lambda s, b, h, q, kv: jnp.where(s > 0, s, 0)
        assert why_not_pallas(*arrays()[:3], score_mod=mod, platform="cuda") is None


class TestWithoutTriton:
    """A JAX whose Pallas has no Triton backend any more."""

    @pytest.fixture(autouse=True)
    def hide(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "jax.experimental.pallas.triton", None)

    def test_the_reason_says_so(self):
        words = f"need Pallas' Triton backend, which JAX {jax.__version__} does not have"
        query, key, value, _ = arrays(seq_q=3, seq_kv=3)
        assert words in why_not_pallas(query, key, value, platform="cuda")
        with pytest.raises(NotImplementedError, match=words):
            lowered(pallas_flash_attention, query, key, value)

    def test_programs_for_a_gpu_run_in_tiles(self):
        query, key, value, cotangent = arrays(seq_q=13, seq_kv=13)
        run = gradient(partial(flash_attention, mask=masks.causal()))
        assert lowered(run, query, key, value, cotangent) == set()
        cache = jax.eval_shape(lambda: init_kv_layer_cache(2, 2, 16, max_len=101))
        assert lowered(cached_attention, normal(2, 6, 1, 16), cache, np.arange(1)) == set()

    def test_interpreted_kernels_do_without(self):
        query, key, value, _ = arrays(seq_q=3, seq_kv=3)
        jax.eval_shape(partial(interpreted, mask=masks.causal()), query, key, value)


def test_tiles_that_a_card_cannot_hold_are_refused_in_words():
    x = jnp.ones((1, 2, 512, 128), jnp.bfloat16)
    why_not = partial(why_not_pallas, x, x, x, platform="cuda")
    large, larger = {"block_q": 128, "block_kv": 64}, {"block_q": 256, "block_kv": 256}
    words = r"tiles of {} x {} need \d+ KiB of shared memory in the (forward|backward) kernel, and {} {}"
    assert why_not() is None
    assert re.fullmatch(words.format(128, 64, "some cards have", 99), why_not(**large))
    with jax.sharding.use_abstract_mesh(gpu_mesh(name="NVIDIA A10")):
        assert re.fullmatch(words.format(128, 64, "some cards have", 99), why_not(**large))
    with jax.sharding.use_abstract_mesh(gpu_mesh(name="NVIDIA H100")):
        assert why_not(**large) is None
        assert re.fullmatch(words.format(256, 256, "this card has", 227), why_not(**larger))
    assert lowered(partial(pallas_flash_attention, **large), x, x, x) == {"forward"}
    with pytest.raises(NotImplementedError, match="pallas_flash_attention: tiles of 256 x 256 need"):
        lowered(partial(pallas_flash_attention, **larger), x, x, x)


def test_a_card_that_is_too_old_gets_tiles_and_the_reason():
    x = jnp.ones((1, 2, 64, 64), jnp.bfloat16)
    old, cache = gpu_mesh(name="Tesla T4"), init_kv_layer_cache(1, 2, 64, max_len=64, dtype=jnp.bfloat16)
    with jax.sharding.use_abstract_mesh(old):
        assert "compute capability 8.0 and later; this one has 7.5" in why_not_pallas(x, x, x, platform="cuda")
    assert lowered(flash_attention, x, x, x, mesh=old) == set()
    assert lowered(cached_attention, x[:, :, :1], cache, np.arange(1), mesh=old) == set()


def test_whatever_is_loaded_for_each_pair_makes_tiles_smaller():
    x = jax.ShapeDtypeStruct((1, 2, 512, 128), jnp.bfloat16)

    def tiles(attend, *arrays):
        (kernel,) = kernels_of(attend, x, *arrays)
        return kernel.grid[0]

    assert tiles(lambda q: flash_attention(q, q, q, mask=masks.sliding_window(100) & masks.causal())) == 4
    assert tiles(lambda q, dense: flash_attention(q, q, q, mask=dense), np.tri(512, dtype=bool)[None, None]) == 8
    bias = jax.ShapeDtypeStruct((512, 512), jnp.float32)
    assert tiles(lambda q, x: flash_attention(q, q, q, score_mod=lambda s, b, h, i, j: s + x[i, j]), bias) == 8
    dropout = {"dropout_rng": jax.random.key(0), "dropout_rate": 0.1, "deterministic": False}
    assert tiles(lambda q: flash_attention(q, q, q, **dropout)) == 8


def test_tiles_that_no_kernel_takes_are_refused_in_words():
    with pytest.raises(NotImplementedError, match="tiles of kernels are powers of 2, at least 16; got 24"):
        interpreted(*arrays()[:3], block_q=24)


def test_without_a_gpu_the_platform_is_the_reason_and_the_tiles_run():
    query, key, value, _ = arrays()
    assert why_not_pallas(query, key, value) == "the Pallas kernel is for NVIDIA GPUs; this process computes on cpu"
    assert why_not_pallas(query, key, value, platform="cuda") is None
    np.testing.assert_array_equal(
        pallas_flash_attention(query, key, value), memory_efficient_attention(query, key, value)
    )


def test_the_fallback_may_be_asked_for():
    query, key, value, _ = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays())
    assert lowered(partial(pallas_flash_attention, force_fallback=True), query, key, value) == set()
    with pytest.raises(ValueError, match="got interpret=True, force_fallback=True. Leave one of the two out"):
        jax.eval_shape(partial(interpreted, force_fallback=True), query, key, value)


def test_the_choice_follows_the_platform_that_is_lowered_for():
    query, key, value, cotangent = arrays()
    run = gradient(partial(flash_attention, mask=masks.causal()))
    on_cpu = run.trace(query, key, value, cotangent).lower(lowering_platforms=("cpu",)).as_text()
    assert kernels_in(on_cpu) == set()
    custom_call = export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")
    with jax.sharding.use_abstract_mesh(gpu_mesh()):
        both = export.export(run, platforms=("cpu", "cuda"), disabled_checks=[custom_call])(
            query, key, value, cotangent
        )
    assert kernels_in(both.mlir_module()) == {"forward", "d_query", "d_key_value"}
    for x, y in zip(both.call(query, key, value, cotangent), run(query, key, value, cotangent), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-6)


def test_a_block_size_asks_for_tiles_on_every_platform():
    query, key, value, _ = arrays()
    assert lowered(partial(flash_attention, block_size=8), query, key, value) == set()
    assert lowered(memory_efficient_attention, query, key, value) == set()
    assert lowered(pallas_flash_attention, query, key, value) == {"forward"}


@pytest.mark.parametrize("how", ["vmap", "scan", "remat", "shard_map", "explicit shard_map"])
@pytest.mark.contract
def test_kernels_lower_inside_every_transformation(how):
    query, key, value, cotangent = arrays(seq_q=13, seq_kv=13)
    bias, mesh = normal(6, 13), gpu_mesh()

    def run(query, key, value, cotangent, bias):
        mod = lambda s, b, h, q, kv: s + bias[h, kv]
        return gradient(partial(flash_attention, mask=masks.causal(), score_mod=mod))(query, key, value, cotangent)

    if how == "vmap":
        run = jax.vmap(run, (None, None, None, None, 0))
        bias = np.stack([bias, bias])
    elif how == "scan":
        once = run
        run = lambda *x: lax.scan(lambda c, bias: (c, once(*x[:4], bias)), 0, jnp.stack([x[4], x[4]]))[1]
    elif how == "remat":
        run = lambda *x: jax.grad(jax.checkpoint(lambda q: flash_attention(q, *x[1:3]).sum()))(x[0])
    elif how != "remat":
        axis_type = AxisType.Explicit if how.startswith("explicit") else AxisType.Auto
        mesh, rows = gpu_mesh(2, axis_type), PartitionSpec("gpus")
        run = jax.shard_map(run, mesh=mesh, in_specs=(*(rows,) * 4, PartitionSpec()), out_specs=rows)
        query, key, value, cotangent, bias = (
            jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))
            for x, spec in zip((query, key, value, cotangent, bias), (*(rows,) * 4, PartitionSpec()), strict=True)
        )
    assert lowered(run, query, key, value, cotangent, bias, mesh=mesh) == {"forward", "d_query", "d_key_value"}


class InSegment(NamedTuple):
    """A user's mask that is a tuple, with a value that may be traced."""

    ids: jax.Array

    def __call__(self, b, h, q, kv):
        return self.ids[q] == self.ids[kv]


@pytest.mark.contract
def test_a_users_mask_of_any_type_is_read_before_its_values_are_gone():
    x = normal(1, 2, 33, 16)

    def attend(x, ids):
        return flash_attention(x, x, x, mask=masks.causal() & InSegment(ids * 2))

    assert lowered(attend, x, np.arange(33, dtype=np.int32) // 8) == {"forward"}
