"""Layers that are one loop carry the caches of all layers as arrays of their own, and decode as separate layers do."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import build

import attnax
from attnax import TransformerConfig, TransformerLM
from attnax.cache import EmptyCache, StackedCaches, forget, select_rows, stack_caches
from attnax.nn import with_scan_layers

# Two whole periods and a layer left over; the layers with a window have rings of other sizes.
CONFIG = TransformerConfig(
    vocab_size=11,
    d_model=8,
    num_heads=2,
    num_kv_heads=1,
    num_layers=5,
    d_ff=6,
    max_len=29,
    dropout_rate=0.0,
    scan_layers=True,
    layer_pattern=({"attention_window": 3}, {}),
)
SHORT = dataclasses.replace(CONFIG, num_layers=3)
LINEAR = dataclasses.replace(CONFIG, pos_emb_type="none", layer_pattern=({"attention_type": "linear"}, {}))
IDS = np.random.default_rng(0).integers(0, 11, (2, 7)).astype(np.int32)
PROMPT = 4


@functools.cache
def make_model(config=CONFIG):
    return build(lambda rngs: TransformerLM(rngs, config))


def make_caches(config=CONFIG, kind="contiguous", **options):
    if kind == "paged":
        return attnax.init_paged_kv_caches_from_config(config, batch_size=2, block_size=4, **options)
    return attnax.init_decoder_kv_caches_from_config(config, batch_size=2, ring=kind == "ring", **options)


def read_prompt(model, caches):
    return model(IDS[:, :PROMPT], layer_kv_caches=tuple(map(EmptyCache, caches)))


def assert_same(have, want):
    jax.tree.map(np.testing.assert_array_equal, have, want)


@pytest.mark.parametrize(
    ("config", "kind", "dtype"),
    [
        (CONFIG, "contiguous", None),
        (CONFIG, "ring", "int8"),
        (CONFIG, "paged", None),
        (LINEAR, "contiguous", None),
    ],
    ids=["contiguous", "ring, int8", "paged", "linear"],
)
def test_a_loop_of_layers_decodes_as_the_full_forward(config, kind, dtype):
    model = make_model(config)
    graphdef, state = nnx.split(model)

    @jax.jit
    def run(state):
        model = nnx.merge(graphdef, state)

        def read(caches, ids):
            logits, caches = model(ids[:, None], layer_kv_caches=caches)
            return caches, logits[:, 0]

        logits, caches = read_prompt(model, make_caches(config, kind, dtype=dtype))
        _, after = jax.lax.scan(read, caches, IDS[:, PROMPT:].T)
        return jnp.concatenate([logits, after.swapaxes(0, 1)], axis=1), model(IDS)

    decoded, forward = run(state)
    np.testing.assert_allclose(decoded, forward, atol=2e-2 if dtype == "int8" else 1e-5)


def test_a_loop_of_layers_writes_the_likeliest_tokens_with_samples_and_a_draft():
    model = make_model(SHORT)
    written = model.generate(IDS, max_new_tokens=5, draft=model, num_samples=2).tokens
    texts = np.concatenate([np.repeat(IDS, 2, axis=0), written], axis=1)
    likeliest = nnx.jit(lambda model: model(texts))(model).argmax(-1)
    assert_same(written, likeliest[:, IDS.shape[1] - 1 : -1])


@pytest.mark.thorough
def test_a_loop_of_layers_finds_the_beams_of_separate_layers():
    scanned = make_model(SHORT)
    have, want = (
        model.beam_search(IDS, num_beams=2, max_new_tokens=5).tokens
        for model in (scanned, with_scan_layers(scanned, False))
    )
    assert_same(have, want)


def test_rows_are_selected_and_tokens_forgotten_in_every_layer():
    graphdef, state = nnx.split(make_model())
    rows, first = np.array([1, 1, 0], np.int32), np.array([2, 3, 1], np.int32)

    @jax.jit
    def run(state):
        _, caches = read_prompt(nnx.merge(graphdef, state), make_caches())
        of_caches = (forget(select_rows(form, rows), first) for form in (caches, tuple(caches)))
        return tuple(of_caches)

    stacked, layers = run(state)
    assert isinstance(stacked, StackedCaches)
    assert_same(tuple(stacked), layers)


def test_the_sums_of_a_loop_cannot_take_tokens_back():
    caches = stack_caches("caller", make_caches(LINEAR), 2, 2)
    with pytest.raises(NotImplementedError, match="LinearLayerCache: the sums of linear attention cannot take tokens"):
        forget(caches, jax.device_put(np.zeros(2, np.int32)))


def test_rows_that_find_too_few_pages_in_a_loop_overflow():
    (cache,) = make_caches(dataclasses.replace(CONFIG, num_layers=1), "paged", max_len=8, num_blocks=3)
    cache = dataclasses.replace(cache, block_table=jax.device_put(np.array([[0, 1], [2, -1]], np.int32)))
    caches, rows = stack_caches("caller", (cache, cache), 1, 2), np.array([0, 0], np.int32)
    (selected,) = jax.jit(lambda caches: select_rows(caches, rows))(caches).places
    assert_same(selected.overflowed, np.array([[False, True]] * 2))


def test_rows_outside_of_the_batch_are_refused_in_words():
    caches = stack_caches("caller", make_caches(), 2, 2)
    with pytest.raises(ValueError, match=r"rows must be at least 0 and below 2; got rows=\[0, 2\]"):
        select_rows(caches, np.array([0, 2], np.int32))


def equations(program):
    """All equations of a program, with those of the programs in it."""
    for equation in program.eqns:
        yield equation
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(inner, "eqns"):
                yield from equations(getattr(inner, "jaxpr", inner))


def joins(of_program, size):
    """The equations that make arrays of at least `size` elements from several arrays."""
    return [e for e in of_program if e.primitive.name in ("concatenate", "stack") and e.outvars[0].aval.size >= size]


def test_a_step_writes_the_caches_in_place():
    config = dataclasses.replace(CONFIG, num_layers=4)
    graphdef, state = nnx.split(make_model(config))
    layers = jax.eval_shape(lambda: make_caches(config))
    stack = functools.partial(stack_caches, "caller", num_places=2, num_periods=2)
    caches, size = jax.eval_shape(stack, layers), min(cache.keys.size for cache in layers)

    def step(state, caches):
        return nnx.merge(graphdef, state)(IDS[:, :1], layer_kv_caches=caches)[1]

    program, after = jax.make_jaxpr(step, return_shape=True)(state, caches)
    of_step = list(equations(program))
    assert not joins(of_step, size) and joins(equations(jax.make_jaxpr(stack)(layers)), size)
    assert jax.tree.structure(after) == jax.tree.structure(caches)  # as a loop carries them
    period = next(e for e in of_step if e.primitive.name == "scan").params["jaxpr"]
    assert {cache.keys.shape for cache in caches.places} <= {x.shape for x in period.out_avals}


def test_stacked_caches_are_a_sequence_of_the_caches_of_the_layers():
    layers = tuple({"state": jax.device_put(np.float32([layer, layer]))} for layer in range(7))
    caches = stack_caches("caller", layers, 2, 3)
    assert len(caches) == 7 and len(caches.places) == 2 and len(caches.rest) == 1
    assert_same(tuple(caches), layers)
    assert_same([caches[0], caches[3], caches[6], caches[-1], caches[-3]], [layers[i] for i in (0, 3, 6, -1, -3)])
    assert_same(caches[1:6:2], layers[1:6:2])
    assert_same(tuple(reversed(caches)), layers[::-1])
    for index in (7, -8):
        with pytest.raises(IndexError):
            caches[index]


def test_any_sequence_of_caches_serves_any_form_of_the_layers():
    scanned = make_model(SHORT)

    @nnx.jit
    def run(scanned):
        loop, ids = with_scan_layers(scanned, False), IDS[:, :1]
        _, caches = read_prompt(scanned, make_caches(SHORT))
        (want, stacked), (again, restacked) = (scanned(ids, layer_kv_caches=x) for x in (caches, list(caches)))
        separate, layers = loop(ids, layer_kv_caches=caches)
        return (want, again, separate), (stacked, restacked, layers)

    logits, (stacked, restacked, layers) = run(scanned)
    for have in logits:
        np.testing.assert_allclose(have, logits[0], atol=1e-6)
    assert isinstance(stacked, StackedCaches) and isinstance(layers, tuple)
    assert_same(restacked, stacked)


@pytest.mark.parametrize("change", ["size", "window", "kind"])
def test_unequal_caches_of_one_place_are_refused_in_words(change):
    caches = list(make_caches())
    caches[2] = {
        "size": make_caches(max_len=23)[3],
        "window": dataclasses.replace(caches[0], window=2),
        "kind": make_caches(kind="paged")[2],
    }[change]
    message = (
        "Stack: with scan_layers the caches of layers 0 and 2 are stacked, so they must be of one kind and size; got "
        rf"RingKVCache\(.*window=3, num_sinks=0\) and {type(caches[2]).__name__}\(.*\)\. "
        "Make them alike, or make the model with scan_layers=False"
    )
    with pytest.raises(ValueError, match=message):
        make_model()(IDS[:, :1], layer_kv_caches=caches)


def test_a_mixture_of_empty_and_other_stacked_caches_is_refused():
    caches = stack_caches("caller", make_caches(), 2, 2)
    mixed = StackedCaches((EmptyCache(caches.places[0]), caches.places[1]), caches.rest, 2)
    with pytest.raises(ValueError, match="either every cache is an EmptyCache or none is"):
        make_model()(IDS[:, :1], layer_kv_caches=mixed)


def test_caches_that_do_not_vary_enter_a_loop_whose_tokens_vary_over_a_mesh():
    graphdef, state = nnx.split(make_model(SHORT))
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    data = jax.sharding.PartitionSpec("data")

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(jax.sharding.PartitionSpec(), data), out_specs=data)
    def read(state, ids):
        model = nnx.merge(graphdef, state)
        caches = attnax.init_decoder_kv_caches_from_config(SHORT, batch_size=1)
        _, caches = model(ids, layer_kv_caches=caches)
        return model(ids, layer_kv_caches=caches)[0]

    assert jax.eval_shape(read, state, IDS[:, :1]).shape == (2, 1, 11)
