"""Programs of a generation: few for all lengths, small ones, and none for other platforms."""

import dataclasses
import typing

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from tiny import build

import attnax
from attnax import TransformerConfig, TransformerLM
from attnax.cache import CacheKind, EmptyCache, init_decoder_kv_caches_from_config
from attnax.generation.request import padded_length
from attnax.kernels import _engines
from attnax.kernels._core import split
from attnax.kernels._core.decode import DecodeInputs
from attnax.kernels._gpu import decode as gpu_decode
from attnax.kernels._tpu import decode as tpu_decode

CONFIG = TransformerConfig(
    vocab_size=31, d_model=12, num_heads=3, num_kv_heads=1, num_layers=1, d_ff=20, max_len=1024, pos_emb_type="rope"
)
RNG = np.random.default_rng(0)


def prompt(length):
    return RNG.integers(1, CONFIG.vocab_size, (2, length)).astype(np.int32)


def lm(**fields):
    return build(lambda rngs: TransformerLM(rngs, dataclasses.replace(CONFIG, **fields)))


@pytest.mark.parametrize(("length", "padded"), [(1, 1), (2, 32), (33, 64), (512, 512), (513, 640), (1025, 1280)])
def test_a_length_is_padded_to_one_of_a_few(length, padded):
    assert padded_length(length) == padded


def test_lengths_are_padded_little_from_512_on():
    assert all(n <= padded_length(n) <= 1.25 * n for n in range(512, 5000))
    assert len({padded_length(n) for n in range(1, 513)}) == 6


def test_prompts_of_other_lengths_compile_nothing_new(count_compilations):
    model = lm()
    del count_compilations[:]  # the keys of its dropout
    for length, max_new_tokens in ((5, 3), (2, 1), (31, 64), (32, 17)):
        assert model.generate(prompt(length), max_new_tokens=max_new_tokens).tokens.shape == (2, max_new_tokens)
    assert len(count_compilations) == 2  # the program of the prompt, and the loop
    next(model.stream(prompt(7), max_new_tokens=9))
    assert len(count_compilations) == 2
    model.generate(prompt(61), max_new_tokens=4)
    assert len(count_compilations) == 3  # as long a cache: the same loop


@pytest.mark.contract
@pytest.mark.parametrize("cache", typing.get_args(CacheKind))
def test_twelve_programs_serve_all_lengths_up_to_512(cache, count_compilations):
    lengths = np.linspace(1, 512, 20).astype(int)
    model = lm()
    del count_compilations[:]
    for length, max_new_tokens in zip(lengths, [1, 5, 17, 64] * 5, strict=True):
        model.generate(prompt(length), max_new_tokens=max_new_tokens, cache=cache)
    assert len(count_compilations) <= 12


@pytest.mark.contract
def test_twelve_programs_serve_sources_of_all_lengths(count_compilations):
    model = build(lambda rngs: attnax.Transformer(rngs, encoder=CONFIG, decoder=CONFIG))
    del count_compilations[:]
    for length, max_length in zip(np.linspace(1, 512, 20).astype(int), [1, 5, 17, 64] * 5, strict=True):
        model.generate(prompt(length), max_length, start_token=1)
    assert len(count_compilations) <= 12


@pytest.mark.parametrize("pos_emb_type", ["rope", "alibi"])
def test_a_prompt_in_empty_caches_is_read_as_at_positions(pos_emb_type):
    """Padding left, right and between; the windowed layer has a ring."""
    model = lm(num_layers=2, pos_emb_type=pos_emb_type, layer_pattern=({"attention_window": 4}, {}))
    real = np.array([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 1, 1, 1, 0, 0]], bool)
    ids = prompt(9)

    @jax.jit
    def read(model, ids, real):
        caches = init_decoder_kv_caches_from_config(model.config, batch_size=2, max_len=32)
        known = model(ids, padding_mask=real, layer_kv_caches=caches)
        alone = model(ids, padding_mask=real, layer_kv_caches=tuple(map(EmptyCache, caches)))
        return known, alone, model(ids, padding_mask=real)

    (logits, caches), (alone, alone_caches), forward = jax.tree.map(np.asarray, read(model, ids, real))
    np.testing.assert_allclose(alone[real], logits[real], atol=1e-5)
    np.testing.assert_allclose(alone[real], forward[real], atol=1e-6)
    for have, want in zip(alone_caches, caches, strict=True):
        np.testing.assert_array_equal(have.positions, want.positions)
        there = want.positions >= 0
        np.testing.assert_allclose(have.keys.swapaxes(1, 2)[there], want.keys.swapaxes(1, 2)[there], atol=1e-5)


def test_empty_caches_and_others_do_not_mix():
    model = lm(num_layers=2)
    first, second = init_decoder_kv_caches_from_config(CONFIG, batch_size=2, max_len=32) * 2
    with pytest.raises(ValueError, match=r"either every cache is an EmptyCache or none is.*Read a prompt into all"):
        model(prompt(3), layer_kv_caches=(EmptyCache(first), second))


def test_drawing_without_keys_is_refused_in_words():
    with pytest.raises(ValueError, match="Sampler: drawing needs keys; got keys=None"):
        attnax.Sampler(0.5)(jax.device_put(np.zeros((1, 3), np.float32)), None)


def test_a_cache_that_is_known_to_hold_tokens_is_not_empty():
    (cache,) = init_decoder_kv_caches_from_config(CONFIG, batch_size=2, max_len=8)
    held = dataclasses.replace(cache, positions=jax.device_put(np.arange(16, dtype=np.int32).reshape(2, 8) % 8))
    EmptyCache(cache).check("caller")
    for wrong, message in (
        (held, "caller: an EmptyCache must hold no token; got one with 8 in a row. Give the cache itself."),
        (EmptyCache(cache), "must hold a cache of one layer; got EmptyCache. Wrap each of them"),
        (None, "must hold a cache of one layer; got NoneType"),
    ):
        with pytest.raises(ValueError, match=message):
            EmptyCache(wrong).check("caller")
    with pytest.raises(ValueError, match="must hold no token"):
        lm()(prompt(3), layer_kv_caches=(EmptyCache(held),))


def test_a_prompt_too_long_for_its_cache_gives_nan():
    model = lm()

    @jax.jit
    def read(model, ids):
        caches = init_decoder_kv_caches_from_config(model.config, batch_size=2, max_len=8)
        return model(ids, layer_kv_caches=tuple(map(EmptyCache, caches)))

    logits, (cache,) = read(model, prompt(9))
    assert np.isnan(logits).all() and bool(cache.overflowed)


def test_nothing_is_traced_for_a_gpu_or_tpu_on_a_cpu(monkeypatch):
    def refuse(*_args, **_options):
        raise AssertionError("traced for a GPU or TPU")

    for module, name in (
        (split, "_split"),
        (_engines.Kernels, "setup"),
        (gpu_decode, "attend"),
        (tpu_decode, "attend"),
        (DecodeInputs, "setup"),
    ):
        monkeypatch.setattr(module, name, refuse)
    kinds = {"pos_emb_type": "relative", "attention_soft_cap": 5.0, "attention_window": 8}
    model = lm(d_model=48, num_kv_heads=3, **kinds)  # heads that the kernel of decoding would serve
    model.generate(prompt(3), max_new_tokens=2)

    def loss(model, ids):
        return model.log_probs(ids, padding_mask=ids > 1).mean()

    jax.jit(jax.grad(loss, allow_int=True)).lower(model, prompt(19))


def equations(jaxpr):
    """The number of equations; inner functions count each time they are called."""
    count = 0
    for equation in jaxpr.eqns:
        count += 1
        for parameter in equation.params.values():
            for value in parameter if isinstance(parameter, tuple | list) else (parameter,):
                inner = getattr(value, "jaxpr", value)
                count += equations(inner) if hasattr(inner, "eqns") else 0
    return count


@pytest.mark.parametrize(("length", "ratio"), [(64, 1.3), (1024, 2.0)])
def test_flash_attention_makes_programs_of_training_little_larger(length, ratio):
    def size(attention_type, num_layers):
        model = lm(attention_type=attention_type, num_layers=num_layers, num_kv_heads=3)
        step = jax.grad(lambda model, ids: model.log_probs(ids).mean(), allow_int=True)
        ids = jax.ShapeDtypeStruct((max(1, 512 // length), length), np.int32)
        return equations(jax.jit(step).trace(model, ids).jaxpr.jaxpr)

    layer = {kind: size(kind, 2) - size(kind, 1) for kind in ("standard", "flash")}
    rest = size("standard", 1) - layer["standard"]
    assert rest + 12 * layer["flash"] <= ratio * (rest + 12 * layer["standard"])


@pytest.mark.parametrize("kind", ["array", "documents"])
def test_a_mask_that_knows_so_many_positions_serves_as_many_tokens(kind):
    """Its lengths are not padded: prompt and new tokens together have the length of the mask."""
    array, ids = np.tri(8, dtype=bool)[None, None], np.zeros((2, 8), np.int32)
    mask = jax.device_put(array) if kind == "array" else attnax.masks.causal() & attnax.masks.documents(ids)
    model = build(lambda rngs: TransformerLM(rngs, CONFIG))
    tokens = prompt(5)
    want = model.generate(tokens, max_new_tokens=3).tokens
    model.decoder.self_mask = nnx.data(attnax.masks.as_mask(mask))
    cache = "paged" if kind == "array" else "contiguous"
    np.testing.assert_array_equal(model.generate(tokens, max_new_tokens=3, cache=cache).tokens, want)


def test_prompts_stay_where_they_were_put():
    model, devices = lm(), jax.devices()[:2]
    rows = NamedSharding(jax.sharding.Mesh(devices, ("rows",)), PartitionSpec("rows"))
    tokens = prompt(5)
    want = model.generate(tokens, max_new_tokens=3)
    have = model.generate(jax.device_put(tokens, rows), max_new_tokens=3)
    for name in ("tokens", "lengths"):
        assert getattr(have, name).sharding.is_equivalent_to(rows, getattr(have, name).ndim), name
    np.testing.assert_array_equal(have.tokens, want.tokens)
    there = jax.device_put(model, devices[1])
    assert {x.device for x in jax.tree.leaves(there.generate(tokens, max_new_tokens=3))} == {devices[1]}


def test_explicit_axes_of_a_prompt_need_no_mesh_around_the_call_and_those_of_parameters_do():
    mesh = jax.make_mesh((2,), ("rows",), axis_types=(jax.sharding.AxisType.Explicit,))
    model, tokens, rows = lm(), prompt(5), NamedSharding(mesh, PartitionSpec("rows"))
    keep = jax.device_put(np.ones((2, 1, 8, 8), bool), rows)
    want = model.generate(tokens, max_new_tokens=3).tokens
    have = model.generate(jax.device_put(tokens, rows), mask=keep, max_new_tokens=3).tokens
    np.testing.assert_array_equal(have, want)
    there = jax.device_put(model, NamedSharding(mesh, PartitionSpec()))
    with pytest.raises(
        ValueError, match="generate: parameters on a mesh with Explicit axes need a call under that mesh"
    ):
        there.generate(tokens, max_new_tokens=3)
    with jax.set_mesh(mesh):
        np.testing.assert_array_equal(there.generate(jax.device_put(tokens, rows), max_new_tokens=3).tokens, want)
    both = nnx.eval_shape(lambda: attnax.Transformer(nnx.Rngs(0), encoder=CONFIG, decoder=CONFIG))
    nnx.update(both, jax.tree.map(lambda x: jax.device_put(np.zeros(x.shape), rows.update(spec=())), nnx.state(both)))
    with pytest.raises(ValueError, match="beam_search: parameters on a mesh with Explicit axes"):
        both.beam_search(tokens, 2, start_token=1, num_beams=2)


@pytest.mark.contract
def test_a_generation_runs_inside_other_transformations():
    graphdef, state = nnx.split(lm())
    tokens = prompt(5)

    def write(state):
        return nnx.merge(graphdef, state).generate(tokens, max_new_tokens=3).tokens

    want = np.asarray(write(state))
    np.testing.assert_array_equal(jax.jit(write)(state), want)
    twice = jax.tree.map(lambda x: jax.numpy.stack([x, x]), state)
    np.testing.assert_array_equal(jax.vmap(write)(twice), [want, want])
    with jax.disable_jit():
        np.testing.assert_array_equal(write(state), want)


def test_sources_and_prompts_of_a_wrong_shape_are_refused_in_words(unchecked_shapes):
    model = nnx.eval_shape(lambda: attnax.Transformer(nnx.Rngs(0), encoder=CONFIG, decoder=CONFIG))
    with pytest.raises(ValueError, match=r"source_ids must be of shape \(batch, length\); got source_ids.shape=\(3,\)"):
        model.generate(np.ones(3, int), 2, start_token=1)
    for wrong in (np.int32(1), np.zeros((1, 0), int), np.zeros(3, int)):
        with pytest.raises(ValueError, match="prompt_ids must be"):
            lm().generate(wrong, max_new_tokens=2)
    with pytest.raises(ValueError, match="prompt_ids must be of one length; got lists of several. Pad them"):
        lm().generate([[1, 2, 3], [4, 5]], max_new_tokens=2)


@pytest.mark.parametrize("attention_type", ["flash", "linear"])
def test_padding_told_by_positions_alone_stays_out_of_an_empty_cache(attention_type):
    layer = build(lambda rngs: attnax.MultiHeadAttention(rngs, num_heads=2, d_model=8, attention_type=attention_type))
    x = RNG.normal(size=(2, 5, 8)).astype(np.float32)
    positions = np.array([[-1, -1, 0, 1, 2], [0, 1, 2, -1, -1]])
    config = dataclasses.replace(CONFIG, num_heads=2, num_kv_heads=2, d_model=8, attention_type=attention_type)

    @jax.jit
    def read(layer, x):
        (cache,) = init_decoder_kv_caches_from_config(config, batch_size=2, max_len=16)
        options = {"mask": attnax.masks.causal(), "position_ids_q": positions}
        results = []
        for kind in (cache, EmptyCache(cache)):
            out, after = layer(x, kv_cache=kind, **options)
            results.append((out, layer(x[:, :1], mask=attnax.masks.causal(), kv_cache=after)[0]))
        return results

    (want, want_next), (have, have_next) = jax.tree.map(np.asarray, read(layer, x))
    np.testing.assert_allclose(have[positions >= 0], want[positions >= 0], atol=1e-5)
    np.testing.assert_allclose(have_next, want_next, atol=1e-5)


def test_padding_behind_a_prompt_takes_no_slot_of_a_contiguous_cache():
    positions = np.array([[-1, 0, 1, -1, -1], [0, 1, -1, 2, -1]], np.int32)
    new = RNG.normal(size=(2, 1, 5, 4)).astype(np.float32)

    @jax.jit
    def store(new):
        (cache,) = init_decoder_kv_caches_from_config(CONFIG, batch_size=2, max_len=5)
        cache = cache.store({"keys": new, "values": new}, positions)
        return cache.append({"keys": new[:, :, :1], "values": new[:, :, :1]}, np.array([[2], [3]]))[0]

    cache = store(new)
    assert int(cache.length) == 5 and not bool(cache.overflowed)
    np.testing.assert_array_equal(cache.positions, [[-1, 0, 1, -1, 2], [0, 1, -1, 2, 3]])
