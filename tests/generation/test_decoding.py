"""Decoding is exact: any cache, positions, mask and split of the text give the logits of the full forward."""

import dataclasses
import functools
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from oracle import attention
from tiny import build

import attnax
from attnax import TransformerConfig, TransformerLM, int8_rows, masks

BASE = TransformerConfig(
    vocab_size=23,
    d_model=16,
    num_heads=4,
    num_kv_heads=2,
    value_head_dim=6,
    num_layers=1,
    d_ff=20,
    max_len=29,
    dropout_rate=0.0,
    norm_type="rms",
)
SCALING = {"factor": 4.0, "original_max_len": 11}
POSITIONS = {
    "rope": {"pos_emb_type": "rope"},
    "rope in two layers": {"pos_emb_type": "rope", "num_layers": 2},
    "learned": {"pos_emb_type": "learned"},
    "alibi": {"pos_emb_type": "alibi"},
    "sinusoidal": {"pos_emb_type": "sinusoidal"},
    "relative": {"pos_emb_type": "relative"},
    "none": {"pos_emb_type": "none"},
    "rope in part": {"pos_emb_type": "rope", "rope_fraction": 0.5},
    **{f"rope, {kind}": {"pos_emb_type": "rope", "rope_scaling": {"kind": kind, **SCALING}}
       for kind in ("linear", "ntk", "yarn", "llama3")},
}  # fmt: skip
KINDS = typing.get_args(attnax.cache.CacheKind)
ROWS, LENGTH, SLOTS, PREFILL, CHUNK = 2, 23, 72, 18, 5  # 18 queries go through tiles, 5 through chunks of slots


def some(values, quick):
    """Parameters of which `make test` takes the first few."""
    return [pytest.param(value, marks=() if i < quick else pytest.mark.thorough) for i, value in enumerate(values)]


def make_caches(kind, config, **options):
    sizes = {"batch_size": ROWS, "max_len": SLOTS, **options}
    if kind == "paged":
        return attnax.init_paged_kv_caches_from_config(config, block_size=4, **sizes)
    return attnax.init_decoder_kv_caches_from_config(config, ring=kind == "ring", **sizes)


@functools.cache
def make_model(position, **fields):
    config = dataclasses.replace(BASE, **POSITIONS[position], **fields)
    return build(lambda rngs: TransformerLM(rngs, config), seed=5)


@functools.partial(jax.jit, static_argnames="graphdef")
def full_forward(graphdef, state, ids, real):
    return nnx.merge(graphdef, state)(ids, padding_mask=real)


@functools.partial(jax.jit, static_argnames="graphdef")
def read_chunk(graphdef, state, ids, position_ids, caches):
    return nnx.merge(graphdef, state)(ids, position_ids=position_ids, layer_kv_caches=caches)


def draw_mask(rng, kind, lengths):
    """Any mask in one form, so that all of them are one program, and how much of each row must be read at once."""
    whole = np.zeros(ROWS, np.int32)
    if kind == "prefix":
        whole = rng.integers(1, np.minimum(lengths, PREFILL) + 1).astype(np.int32)
    ids = np.zeros((ROWS, SLOTS), np.int32)
    if kind == "documents":
        ids = np.cumsum(rng.random((ROWS, SLOTS)) < 0.2, axis=1).astype(np.int32)
    window = jax.device_put(np.int32(rng.integers(1, 7) if kind == "window" else LENGTH))

    def mask(length):  # arrays in it know every position there may be
        near = masks.documents(ids[:, :length]) & masks.sliding_window(window, causal=False)
        return (masks.causal() | masks.prefix(whole)) & near

    return mask, whole


def draw_chunks(rng, lengths, whole):
    """Splits of the text: (padded width, tokens of each row), the first as long as `whole` says."""
    done = np.zeros(ROWS, int)
    first = np.array(
        [rng.integers(max(1, least), min(n, PREFILL) + 1) for least, n in zip(whole, lengths, strict=True)]
    )
    yield PREFILL, first
    done += first
    left = (SLOTS - PREFILL) // CHUNK  # chunks that a cache has slots for, padding included
    while (done < lengths).any():
        left -= 1
        counts = np.minimum(rng.integers(0, CHUNK + 1, ROWS), lengths - done)
        counts = np.maximum(counts, lengths - done - CHUNK * left)
        done += counts
        yield CHUNK, counts


def through_cache(graphdef, state, caches, ids, lengths, chunks, rng):
    """Logits (ROWS, LENGTH, V) of the text read in these chunks, a row's tokens anyhow in its chunk."""
    logits, done = np.zeros((ROWS, LENGTH, BASE.vocab_size), np.float32), np.zeros(ROWS, int)
    for width, counts in chunks:
        chunk, position_ids = np.zeros((ROWS, width), np.int32), np.full((ROWS, width), -1, np.int32)
        places = [np.sort(rng.permutation(width)[:count]) for count in counts]
        for row, (place, count) in enumerate(zip(places, counts, strict=True)):
            position_ids[row, place] = done[row] + np.arange(count)
            chunk[row, place] = ids[row, done[row] : done[row] + count]
        out, caches = read_chunk(graphdef, state, chunk, position_ids, caches)
        for row, (place, count) in enumerate(zip(places, counts, strict=True)):
            logits[row, done[row] : done[row] + count] = np.asarray(out)[row, place]
        done += counts
    assert (np.asarray(caches[0].next_positions()) == lengths).all()
    return logits


def check_splits(model, kind, mask_kind, rng, times, tolerance, **options):
    for _ in range(times):
        lengths = rng.integers(1, LENGTH + 1, ROWS)
        ids = rng.integers(0, BASE.vocab_size, (ROWS, LENGTH)).astype(np.int32)
        mask, whole = draw_mask(rng, mask_kind, lengths)
        model.decoder.self_mask = nnx.data(mask(LENGTH))
        graphdef, state = nnx.split(model)
        real = np.arange(LENGTH)[None] < lengths[:, None]
        expected = np.asarray(full_forward(graphdef, state, ids, real))[real]
        chunks = list(draw_chunks(rng, lengths, whole))
        caches = make_caches(kind, model.config, **options)
        model.decoder.self_mask = nnx.data(mask(SLOTS))
        graphdef, state = nnx.split(model)
        actual = through_cache(graphdef, state, caches, ids, lengths, chunks, rng)[real]
        scale = np.abs(expected).max()
        np.testing.assert_allclose(actual, expected, atol=tolerance * max(1.0, scale), rtol=0)
        if tolerance <= 1e-5:
            np.testing.assert_array_equal(actual.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("position", some(POSITIONS, 1))
def test_any_split_through_any_cache_equals_the_full_forward(position, kind):
    """Every mask, rows of their own lengths, padding anywhere: 288 splits in all."""
    rng = np.random.default_rng(len(position) + len(kind))
    for mask_kind in ("causal", "window", "prefix", "documents"):
        check_splits(make_model(position), kind, mask_kind, rng, 2, 1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("position", some(("rope", "alibi"), 0))
def test_low_precision_caches_are_as_exact_as_their_dtype(position, kind):
    """Of bfloat16 a model's logits agree to a few of its steps, whatever the split; 8 bits cost a hundredth."""
    rng = np.random.default_rng(7)
    check_splits(make_model(position, dtype="bfloat16"), kind, "causal", rng, 2, 0.03)
    check_splits(make_model(position), kind, "window", rng, 2, 0.02, dtype="int8")


@pytest.mark.parametrize("kind", some(("ring", "contiguous", "paged"), 1))
@pytest.mark.parametrize("attention_type", some(("standard", "memory_efficient", "pallas_flash"), 1))
def test_an_attention_function_that_was_asked_for_reads_the_cache(attention_type, kind):
    rng = np.random.default_rng(9)
    for mask_kind in ("causal", "window"):
        check_splits(make_model("alibi", attention_type=attention_type), kind, mask_kind, rng, 1, 1e-5)


@pytest.mark.parametrize("kind", ["contiguous", pytest.param("paged", marks=pytest.mark.contract)])
@pytest.mark.parametrize("position", some(("rope", "alibi", "learned"), 1))
def test_a_window_needs_the_memory_of_the_window(position, kind):
    """A layer with a window has a ring, and gives the same as without a cache, over many turns of it."""
    model = make_model(position, attention_window=3, max_len=97)
    caches = make_caches(kind, model.config, max_len=97)
    if kind == "contiguous":
        assert isinstance(caches[0], attnax.RingKVCache) and caches[0].max_len == 3 + 16
    ids = np.random.default_rng(0).integers(0, BASE.vocab_size, (ROWS, 97)).astype(np.int32)
    graphdef, state = nnx.split(model)
    expected, done, logits = full_forward(graphdef, state, ids, np.ones(ids.shape, bool)), 0, []
    for width in (CHUNK, CHUNK, 37, *(CHUNK,) * 10):  # 37 tokens at once are more than the ring holds
        position_ids = np.broadcast_to(done + np.arange(width, dtype=np.int32), (ROWS, width))
        out, caches = read_chunk(graphdef, state, ids[:, done : done + width], position_ids, caches)
        logits.append(np.asarray(out))
        done += width
    np.testing.assert_allclose(np.concatenate(logits, axis=1), expected, atol=1e-5)


WINDOW, SINKS = 4, 3


def ring_with_sinks(model, slots):
    sizes = ROWS, model.config.num_kv_heads, model.config.layer(0).head_size, slots
    ring = attnax.init_ring_kv_cache(*sizes, window=WINDOW, num_sinks=SINKS, value_head_dim=model.config.value_head_dim)
    return (ring,) * model.config.num_layers


def logits_of_window_and_sinks(model, ids, lengths):
    """Of the full forward of the model with a mask that attends what a ring with sinks keeps, (ROWS, LENGTH, V)."""
    model.decoder.self_mask = nnx.data(masks.causal() & (masks.sliding_window(WINDOW) | masks.first(SINKS)))
    return np.asarray(full_forward(*nnx.split(model), ids, np.arange(LENGTH)[None] < lengths[:, None]))


@pytest.mark.parametrize("slots", [SINKS + WINDOW, pytest.param(SINKS + WINDOW + 5, marks=pytest.mark.contract)])
def test_a_model_whose_mask_keeps_the_first_tokens_decodes_with_a_ring_of_window_and_sinks(slots):
    rng, lengths, model = np.random.default_rng(11), np.array([LENGTH, 19]), make_model("rope in two layers")
    ids = rng.integers(0, BASE.vocab_size, (ROWS, LENGTH)).astype(np.int32)
    expected = logits_of_window_and_sinks(model, ids, lengths)
    splits = (PREFILL, [9, 18]), (CHUNK, [1, 0]), (CHUNK, [4, 1]), (CHUNK, [3, 0]), (CHUNK, [5, 0]), (CHUNK, [1, 0])
    splits = [(width, np.array(counts)) for width, counts in splits]
    logits = through_cache(*nnx.split(model), ring_with_sinks(model, slots), ids, lengths, splits, rng)
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(logits[row, :length], expected[row, :length], atol=1e-5)


@pytest.mark.parametrize("attention_type", ["flash", "standard"])
def test_a_model_without_a_window_attends_what_a_ring_with_sinks_keeps(attention_type):
    """The prompt, longer than the ring, enters an EmptyCache."""
    model, lengths = make_model("rope", attention_type=attention_type), np.array([LENGTH, LENGTH])
    ids = np.random.default_rng(12).integers(0, BASE.vocab_size, (ROWS, LENGTH)).astype(np.int32)
    expected = logits_of_window_and_sinks(model, ids, lengths)
    model.decoder.self_mask = nnx.data(masks.causal())
    graphdef, state = nnx.split(model)
    caches, logits = tuple(map(attnax.cache.EmptyCache, ring_with_sinks(model, SINKS + WINDOW))), []
    for chunk in (slice(0, PREFILL), slice(PREFILL, LENGTH)):
        position_ids = np.broadcast_to(np.arange(LENGTH, dtype=np.int32)[chunk], (ROWS, chunk.stop - chunk.start))
        out, caches = read_chunk(graphdef, state, ids[:, chunk], position_ids, caches)
        logits.append(np.asarray(out))
    np.testing.assert_allclose(np.concatenate(logits, axis=1), expected, atol=1e-5)


def ones(*shape):
    return jax.device_put(np.ones(shape, np.float32))


def keys_values(seed, length, batch=1):
    return np.random.default_rng(seed).standard_normal((3, batch, 2, length, 4)).astype(np.float32)


def indices(length):
    """Of queries and keys, as they stand in a mask."""
    return np.arange(length)[:, None], np.arange(length)[None]


@pytest.mark.parametrize(("slots", "num_sinks"), [(3, 0), (200, 0), (7, 4)])
def test_a_ring_without_spare_slots_attends_the_tokens_that_it_overwrites(slots, num_sinks):
    length, window = slots + 20 + -slots % 5, slots - num_sinks
    key, value, query = keys_values(0, length)

    @jax.jit
    def read(ring, key, value, query, positions):
        ring, seen = ring.append({"keys": key, "values": value}, positions)
        # The ring's own window is enforced, whatever the mask.
        return ring, attnax.cached_attention(query, seen, positions, mask=masks.causal())

    ring, outputs = attnax.init_ring_kv_cache(1, 2, 4, slots, window=window, num_sinks=num_sinks), []
    for start in range(0, length, 5):
        chunk = slice(start, start + 5)
        positions = np.arange(start, start + 5)
        ring, out = read(ring, *(x[:, :, chunk] for x in (key, value, query)), positions)
        outputs.append(np.asarray(out))
    q, kv = indices(length)
    wanted, _ = attention(query, key, value, keep=(kv <= q) & ((kv > q - window) | (kv < num_sinks)))
    np.testing.assert_allclose(np.concatenate(outputs, axis=2), wanted, atol=1e-5)


MODS = (lambda s, b, h, q, kv: jnp.where(s > 0, s, 0.0), lambda s, b, h, q, kv: jnp.where(s >= 0, s, -jnp.inf))


@functools.partial(jax.jit, static_argnames="kind")
def attend_through_mods(kind, key, value, query):
    config = dataclasses.replace(BASE, num_heads=2, num_kv_heads=2, head_dim=4, value_head_dim=4)
    positions = np.arange(key.shape[2])
    cache, _ = make_caches(kind, config, batch_size=1)[0].append({"keys": key, "values": value}, positions)
    return [attnax.cached_attention(query, cache, positions, mask=masks.causal(), score_mod=mod) for mod in MODS]


@pytest.mark.parametrize("kind", ["contiguous", "paged"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_non_finite_key_contaminates_through_any_score_mod(kind, bad):
    """Whoever may attend it gets NaN, nobody else anything, though the mod swallows NaN."""
    key, value, query = keys_values(1, 9)
    key[0, 1, 5, 2] = bad
    for out in attend_through_mods(kind, key, value, query):
        contaminated = np.isnan(out).all(-1)
        assert contaminated[0, 1].tolist() == [False] * 5 + [True] * 4 and not np.isnan(out[0, 0]).any()


@pytest.mark.parametrize("max_len", [8, 300])
def test_reverse_mode_through_a_cache_raises(max_len):
    def loss(query, key, value):
        cache = attnax.update_kv_layer_cache(attnax.init_kv_layer_cache(1, 2, 4, max_len), key, value)
        return attnax.cached_attention(query, cache, np.arange(4), mask=masks.causal()).sum()

    with pytest.raises(NotImplementedError, match="no reverse-mode derivative.*memory_efficient_attention"):
        jax.eval_shape(jax.grad(loss), *keys_values(2, 4))


def test_dropped_weights_go_by_positions_however_many_queries():
    @jax.jit
    def attend(key, value, query):
        cache = attnax.update_kv_layer_cache(attnax.init_kv_layer_cache(1, 2, 4, 40), key, value)
        rate = {"dropout_rng": jax.random.key(0), "dropout_rate": 0.5, "deterministic": False}
        options = {"mask": masks.causal()} | rate
        whole = attnax.cached_attention(query, cache, np.arange(40), **options)
        few = attnax.cached_attention(query[:, :, 37:], cache, np.arange(37, 40), **options)
        return whole, few, attnax.standard_attention(query, key, value, **options)

    whole, few, wanted = map(np.asarray, attend(*keys_values(3, 40)))
    np.testing.assert_allclose(whole, wanted, atol=1e-5)
    np.testing.assert_allclose(few, whole[:, :, 37:], atol=1e-5)


@pytest.mark.usefixtures("unchecked_shapes")
def test_wrong_input_of_attention_to_a_cache_is_refused_in_words():
    cache, query = attnax.init_kv_layer_cache(2, 2, 4, 9), ones(2, 2, 1, 4)
    whole = lambda b, h, q, kv: ones(9, 9) > 0
    for call, words in (
        (
            lambda: attnax.cached_attention(ones(2, 1, 4), cache, np.zeros(1, int)),
            "query must be .2, num_heads, T, head_dim.",
        ),
        (
            lambda: attnax.cached_attention(query, attnax.init_linear_layer_cache(2, 2, 4), np.zeros(1, int)),
            "cache must store tokens .* got LinearLayerCache",
        ),
        (
            lambda: attnax.cached_attention(query, cache, np.zeros(1, int), mask=whole),
            "a mask function must return booleans of the shape",
        ),
        (
            lambda: attnax.cached_attention(ones(2, 2, 1, 3), cache, np.zeros(1, int)),
            "query and key must have the same head_dim",
        ),
        (
            lambda: cache.append({"keys": query, "values": query}, np.zeros(1)),
            "positions must be integers of shape .1,. or .2, 1.",
        ),
        (
            lambda: cache.append({"keys": ones(2, 1, 4), "values": ones(2, 1, 4)}, np.zeros(1, int)),
            "KVLayerCache.append: keys must have shape .*; got keys.shape=",
        ),
        (
            lambda: cache.append({"keys": query}, np.zeros(1, int)),
            "new must hold the arrays keys, values by name; got keys",
        ),
        (lambda: cache.append(query, np.zeros(1, int)), "keys, values by name; got ArrayImpl"),
        (
            lambda: cache.append({}, np.zeros(1, int)),
            "keys, values by name; got none",
        ),
        (lambda: attnax.cache.select_rows(cache, np.array([2])), "rows must be at least 0 and below 2; got rows=.2."),
        (
            lambda: make_caches("paged", BASE)[0].append(
                {"keys": ones(2, 2, 3, 4), "values": ones(2, 2, 5, 6)}, np.arange(3)
            ),
            "PagedKVCache.append: values must have shape .*; got values.shape=",
        ),
        (
            lambda: attnax.init_paged_kv_caches_from_config(BASE, batch_size=1, block_size=0),
            "block_size must be at least 1; got block_size=0",
        ),
        *(
            (
                lambda size=size: attnax.init_paged_kv_caches_from_config(BASE, batch_size=1, block_size=size),
                "block_size must be a whole number, at least 1; got block_size=",
            )
            for size in ("64", 2.5, None, True)
        ),
    ):
        with pytest.raises(ValueError, match=words):
            call()


def test_linear_attention_refuses_the_same_with_a_cache_as_without():
    def make(**options):
        return build(
            lambda rngs: attnax.MultiHeadAttention(rngs, num_heads=2, in_features=8, attention_type="linear", **options)
        )

    layer = make()
    cache, mod = attnax.init_linear_layer_cache(1, 2, 4), lambda scores, b, h, q, kv: scores
    with pytest.raises(NotImplementedError, match="there are no scores to modify"):
        layer(ones(1, 3, 8), mask=masks.causal(), kv_cache=cache, score_mod=mod)
    with pytest.raises(NotImplementedError, match=r"with a cache mask must be masks.causal\(\)"):
        layer(ones(1, 3, 8), kv_cache=cache)
    own = make(attention_fn=attnax.standard_attention)
    with pytest.raises(NotImplementedError, match="softmax attention does not read a LinearLayerCache"):
        own(ones(1, 3, 8), mask=masks.causal(), kv_cache=cache)


def test_linear_attention_goes_on_from_its_state():
    model = make_model("sinusoidal", attention_type="linear", linear_attention_chunk_size=4)
    assert isinstance(make_caches("contiguous", model.config)[0], attnax.LinearLayerCache)
    rng = np.random.default_rng(3)
    ids = rng.integers(0, BASE.vocab_size, (ROWS, LENGTH)).astype(np.int32)
    graphdef, state = nnx.split(model)
    for _ in range(3):
        lengths = rng.integers(1, LENGTH + 1, ROWS)
        real = np.arange(LENGTH)[None] < lengths[:, None]
        expected = np.asarray(full_forward(graphdef, state, ids, real))[real]
        chunks = list(draw_chunks(rng, lengths, np.zeros(ROWS, int)))
        caches = make_caches("contiguous", model.config)
        actual = through_cache(graphdef, state, caches, ids, lengths, chunks, rng)[real]
        np.testing.assert_allclose(actual, expected, atol=1e-5)


def causal_model():
    """In the form that makes it one program with the test of all splits."""
    model = make_model("rope")
    mask, _ = draw_mask(np.random.default_rng(0), "causal", None)
    model.decoder.self_mask = nnx.data(mask(SLOTS))
    return model, *nnx.split(model)


@pytest.mark.parametrize("kind", KINDS)
def test_neighbours_and_place_change_no_bit_of_a_row(kind):
    """One compiled shape, the row of interest at both places, beside a short row, a long one, and one with NaN."""
    rng = np.random.default_rng(11)
    model, graphdef, state = causal_model()
    ids = rng.integers(0, BASE.vocab_size, 13).astype(np.int32)
    results = []
    for place, neighbour in ((0, 13), (1, 4), (0, 17), (1, 1)):
        caches, rows = make_caches(kind, model.config), []
        prompt, position_ids = np.zeros((ROWS, PREFILL), np.int32), np.full((ROWS, PREFILL), -1, np.int32)
        prompt[place, :13], position_ids[place, :13] = ids, np.arange(13)
        prompt[1 - place, :neighbour] = rng.integers(0, BASE.vocab_size, neighbour)
        position_ids[1 - place, :neighbour] = np.arange(neighbour)
        out, caches = read_chunk(graphdef, state, prompt, position_ids, caches)
        rows.append(np.asarray(out)[place, 12])
        for step in range(4):
            chunk, position_ids = np.full((ROWS, CHUNK), step, np.int32), np.full((ROWS, CHUNK), -1, np.int32)
            position_ids[place, 0] = 13 + step
            position_ids[1 - place, : step + 1] = neighbour + step * (step + 1) // 2 + np.arange(step + 1)
            out, caches = read_chunk(graphdef, state, chunk, position_ids, caches)
            rows.append(np.asarray(out)[place, 0])
        results.append(np.stack(rows))
    *same, longer, last = results
    for result in (*same, last):
        np.testing.assert_array_equal(result, results[0])
    # Beside a longer prompt the tokens that follow lie in later slots of a contiguous cache, so that sums may round.
    np.testing.assert_allclose(longer, results[0], rtol=0, atol=2e-6 if kind == "contiguous" else 0)


@jax.jit
def append(cache, keys, values, positions):
    return cache.append({"keys": keys, "values": values}, positions)


@jax.jit
def forget(cache, first):
    return cache.forget(first)


class TestRing:
    def ring(self, slots=5, window=None, num_sinks=0):
        return attnax.init_ring_kv_cache(2, 1, 3, slots, window=window, num_sinks=num_sinks)

    def tokens(self, *positions):
        positions = np.array(positions, np.int32)
        values = (positions[:, None, :, None] + np.zeros((1, 1, 1, 3))).astype(np.float32)
        return jnp.asarray(values), jnp.asarray(2 * values), positions

    def test_a_token_lies_at_its_position(self):
        cache, seen = append(self.ring(), *self.tokens([0, 1, 2], [-1, 0, -1]))
        jax.tree.map(np.testing.assert_array_equal, seen, cache)
        assert cache.positions.tolist() == [[0, 1, 2, -1, -1], [0, -1, -1, -1, -1]]
        assert cache.next_positions().tolist() == [3, 1] and int(cache.slots_in_use()) == 3
        cache = forget(cache, np.array([1, 0]))
        assert cache.positions.tolist() == [[0, -1, -1, -1, -1], [-1] * 5]

    def test_with_a_window_the_oldest_go_and_the_new_ones_see_them_first(self):
        ring = self.ring(4, window=3)
        ring, _ = append(ring, *self.tokens([0, 1, 2, 3], [0, 1, 2, 3]))
        later, seen = append(ring, *self.tokens([4, 5, 6], [4, -1, -1]))
        assert later.positions.tolist() == [[4, 5, 6, 3], [4, 1, 2, 3]]
        assert seen.positions.tolist() == [[0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, -1, -1]]
        assert np.asarray(later.keys)[0, 0, :, 0].tolist() == [4, 5, 6, 3]
        many, _ = append(ring, *self.tokens([4, 5, 6, 7, 8, 9], [4, 5, 6, 7, 8, 9]))
        assert many.positions.tolist() == [[8, 9, 6, 7]] * 2 and np.asarray(many.values)[1, 0, :, 0].tolist() == [
            16,
            18,
            12,
            14,
        ]

    def test_without_one_positions_end_with_the_slots(self):
        with pytest.raises(
            ValueError, match="positions must be below the number of slots, 5, .* got positions up to 5"
        ):
            append.__wrapped__(self.ring(), *self.tokens([4, 5], [0, 1]))
        cache, _ = append(self.ring(), *self.tokens([4, 5], [0, 1]))
        assert cache.overflowed.tolist() == [True, False] and np.asarray(cache.positions)[0].tolist() == [
            -1,
            -1,
            -1,
            -1,
            4,
        ]

    def test_tokens_too_far_apart_are_refused(self):
        ring, _ = append(self.ring(8, window=4), *self.tokens([0, 1, 2, 3], [0, 1, 2, 3]))
        with pytest.raises(ValueError, match="must span at most 5 positions .* got positions up to 11 in 2 tokens"):
            append.__wrapped__(ring, *self.tokens([4, 11], [4, 5]))
        late, _ = append(ring, *self.tokens([4, 11], [4, 5]))
        assert late.overflowed.tolist() == [True, False]

    def test_taking_back_more_than_is_spared_shows(self):
        ring = self.ring(6, window=4)
        for start in range(0, 9, 3):
            ring, _ = append(ring, *self.tokens([start, start + 1, start + 2], [start, start + 1, start + 2]))
        assert forget(ring, np.array([7, 5])).overflowed.tolist() == [False, True]
        assert forget(ring, np.array([9, 9])).overflowed.tolist() == [False, False]
        short, _ = append(self.ring(6, window=4), *self.tokens([0, 1, 2], [0, 1, 2]))
        assert forget(short, np.array([0, 1])).overflowed.tolist() == [False, False]

    def test_the_first_tokens_stay_in_slots_of_their_own(self):
        ring, positions = self.ring(6, window=3, num_sinks=2), np.arange(15).reshape(5, 3)
        for chunk in positions:
            ring, seen = append(ring, *self.tokens(chunk, np.where(chunk < 9, chunk, -1)))
        assert ring.positions.tolist() == [[0, 1, 14, 11, 12, 13], [0, 1, 6, 7, 8, 5]]
        assert np.asarray(ring.keys)[:, 0, :, 0].tolist() == ring.positions.tolist()
        assert seen.num_sinks == 2 and seen.positions.shape == (2, 9)  # three tokens overwrite attended ones
        assert ring.next_positions().tolist() == [15, 9]
        rows = attnax.cache.select_rows([ring], np.array([1, 0]))[0]
        assert (rows.num_sinks, rows.positions[1].tolist()) == (2, ring.positions[0].tolist())

    def test_sinks_are_taken_back_as_other_tokens_are(self):
        ring = self.ring(6, window=3, num_sinks=2)
        for chunk in np.arange(12).reshape(6, 2):
            ring, _ = append(ring, *self.tokens(chunk, chunk))
        assert forget(ring, np.array([10, 9])).overflowed.tolist() == [False, True]
        short, _ = append(self.ring(6, window=3, num_sinks=2), *self.tokens([0, 1, 2], [0, 1, -1]))
        short = forget(short, np.array([1, 0]))
        assert short.overflowed.tolist() == [False, False] and short.next_positions().tolist() == [1, 0]
        late, _ = append(ring, *self.tokens([12, 14], [12, 13]))
        assert late.overflowed.tolist() == [True, False]

    def test_a_layer_with_a_longer_window_refuses_a_ring_with_sinks(self):
        layer = build(lambda rngs: attnax.MultiHeadAttention(rngs, num_heads=2, in_features=6, attention_window=5))
        with pytest.raises(ValueError, match="at most the window of its cache; got window=3, attention_window=5"):
            layer(ones(2, 1, 6), kv_cache=attnax.init_ring_kv_cache(2, 2, 3, 8, window=3, num_sinks=2))

    def test_a_layer_must_have_the_window(self):
        layer = build(lambda rngs: attnax.MultiHeadAttention(rngs, num_heads=2, in_features=6))
        with pytest.raises(
            ValueError, match="must be set and at most the window of its cache; got window=3, attention_window=None"
        ):
            layer(ones(2, 1, 6), kv_cache=attnax.init_ring_kv_cache(2, 2, 3, 8, window=3))
        with pytest.raises(ValueError, match="at most the window of its cache; got window=3"):
            layer(ones(2, 1, 6), kv_cache=attnax.cache.EmptyCache(attnax.init_ring_kv_cache(2, 2, 3, 8, window=3)))
        with pytest.raises(NotImplementedError, match="softmax attention does not read a LinearLayerCache"):
            layer(ones(2, 1, 6), kv_cache=attnax.cache.EmptyCache(attnax.init_linear_layer_cache(2, 2, 3)))

    def test_wrong_sizes_are_refused_in_words(self):
        with pytest.raises(ValueError, match=r"max_len must be at least window \+ num_sinks; got max_len=2, window=3"):
            self.ring(2, window=3)
        with pytest.raises(ValueError, match="window must be at least 1; got window=0"):
            self.ring(2, window=0)
        with pytest.raises(ValueError, match=r"at least window \+ num_sinks; got max_len=4, window=3, num_sinks=2"):
            self.ring(4, window=3, num_sinks=2)
        with pytest.raises(ValueError, match="with sinks must have a window; got num_sinks=2, window=None"):
            self.ring(4, num_sinks=2)
        with pytest.raises(ValueError, match="num_sinks must be at least 1; got num_sinks=-1"):
            self.ring(4, window=3, num_sinks=-1)


def test_a_prompt_enters_a_cache_whose_tokens_were_taken_back():
    cache, _ = append(attnax.init_kv_layer_cache(1, 1, 2, 8), ones(1, 1, 5, 2), ones(1, 1, 5, 2), np.arange(5))
    prompt = {"keys": 2 * ones(1, 1, 3, 2), "values": 2 * ones(1, 1, 3, 2)}
    stored = cache.forget(np.array([0])).store(prompt, np.arange(3))
    assert int(stored.length) == 3 and stored.positions.tolist() == [[0, 1, 2, -1, -1, -1, -1, -1]]
    np.testing.assert_array_equal(stored.keys[0, 0, :3], 2 * ones(3, 2))


def test_pages_forget_all_from_a_position_below_0():
    cache = make_caches("paged", BASE)[0]
    assert cache.forget(np.array([-3, 0])).seq_lengths.tolist() == [0, 0]


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("first", [np.zeros((ROWS, 1), int), np.zeros(1, int), 0, np.zeros(ROWS)])
def test_forgetting_takes_one_position_a_row_or_is_refused_in_words(kind, first):
    [cache] = make_caches(kind, BASE)
    with pytest.raises(ValueError, match=r"forget: first must be integers of shape \(2,\); got first.shape="):
        attnax.cache.forget(cache, first)


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize("start", [np.zeros(1, int), np.zeros((2, 1), int), 0.0])
def test_a_cache_is_written_from_one_slot_on_or_it_is_refused_in_words(start):
    cache = attnax.init_kv_layer_cache(1, 1, 2, 3)
    with pytest.raises(
        ValueError, match=r"update_kv_layer_cache: start must be integers of shape \(\); got start.shape"
    ):
        attnax.update_kv_layer_cache(cache, ones(1, 1, 1, 2), ones(1, 1, 1, 2), start)


@pytest.mark.parametrize("kind", KINDS)
def test_an_overflow_gives_nan_and_only_to_the_rows_that_lost_tokens(kind):
    model, graphdef, state = causal_model()
    caches = make_caches(kind, model.config)
    for start in range(0, SLOTS, PREFILL):
        ids, position_ids = np.zeros((ROWS, PREFILL), np.int32), np.full((ROWS, PREFILL), -1, np.int32)
        position_ids[0] = start + np.arange(PREFILL)
        if start == 0:
            position_ids[1, :3] = np.arange(3)
        out, caches = read_chunk(graphdef, state, ids, position_ids, caches)
        assert np.isfinite(out[0]).all() and not np.asarray(caches[0].overflowed).any()
    for step in range(2):
        chunk_ids, chunk = np.zeros((ROWS, CHUNK), np.int32), np.full((ROWS, CHUNK), -1, np.int32)
        chunk[0], chunk[1, 0] = SLOTS + CHUNK * step + np.arange(CHUNK), 3 + step
        out, caches = read_chunk(graphdef, state, chunk_ids, chunk, caches)
        out = np.asarray(out)
        assert np.isnan(out[0]).all() and np.asarray(caches[0].overflowed).any()
        assert np.isnan(out[1, 0]).all() == (kind == "contiguous")  # whose slots all rows share


def test_positions_that_do_not_count_on_are_refused_by_pages():
    cache, new = make_caches("paged", BASE)[0], (ones(ROWS, 2, 2, 4), ones(ROWS, 2, 2, 6))
    cache, _ = append(cache, *new, np.array([[0, 1], [-1, 0]], np.int32))
    assert cache.seq_lengths.tolist() == [2, 1]
    with pytest.raises(ValueError, match=r"positions must count on from seq_lengths=\[2, 1\]"):
        append.__wrapped__(cache, *new, np.array([[2, 3], [2, 3]], np.int32))
    late, _ = append(cache, *new, np.array([[2, 3], [2, 3]], np.int32))
    assert late.overflowed.tolist() == [False, True]


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_gives_its_tokens_whatever_it_is(kind):
    cache = make_caches(kind, BASE, max_len=24)[0]
    for each in (cache, attnax.cache.EmptyCache(cache)):
        assert isinstance(each, attnax.cache.LayerCache)
        stored = jax.eval_shape(lambda each: each.tokens(jnp.bfloat16), each)
        assert stored.keys.shape == (ROWS, 2, 24, 4) and stored.values.dtype == jnp.bfloat16
    sums = make_caches("contiguous", dataclasses.replace(BASE, attention_type="linear"))[0]
    with pytest.raises(NotImplementedError, match="the sums of linear attention store no tokens"):
        sums.tokens(jnp.float32)


@functools.partial(jax.jit, static_argnames=("kind", "dtype"))
def append_and_select(kind, dtype, keys, values, positions, rows):
    """All tokens of a cache before and after rows of it were selected."""
    cache, _ = make_caches(kind, BASE, max_len=24, dtype=dtype)[0].append({"keys": keys, "values": values}, positions)
    return [x.tokens(jnp.float32) for x in (attnax.cache.select_rows([cache], rows)[0], cache)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_rows_are_selected_with_all_that_they_hold(kind, dtype):
    rng = np.random.default_rng(1)
    keys, values = (rng.standard_normal((ROWS, 2, 6, size)).astype(np.float32) for size in (4, 6))
    positions = np.array([[0, 1, 2, 3, 4, 5], [0, 1, -1, 2, -1, -1]], np.int32)
    rows = np.array([1, 0, 1, 1][: 3 if kind == "paged" else 4])
    picked, cache = jax.device_get(append_and_select(kind, dtype, keys, values, positions, rows))
    for row, source in enumerate(rows):
        have, want = (jax.tree.map(lambda x, i=i: x[i], c) for c, i in ((picked, row), (cache, source)))
        order = np.argsort(want.positions)[want.positions.tolist().count(-1) :]
        place = np.argsort(have.positions)[have.positions.tolist().count(-1) :]
        np.testing.assert_array_equal(have.keys[:, place], want.keys[:, order])
        np.testing.assert_array_equal(have.values[:, place], want.values[:, order])
        assert have.positions[place].tolist() == sorted(p for p in positions[source].tolist() if p >= 0)
        tolerance = 0.02 if dtype == "int8" else 0
        np.testing.assert_allclose(have.keys[:, place], keys[source][:, positions[source] >= 0], atol=tolerance)


@jax.jit
def round_to_eight_bits(x):
    rows = int8_rows.encode_rows(x, int8_rows.zero_rows(x.shape, jnp.int8))
    return int8_rows.decode_rows(rows, jnp.float32)


@pytest.mark.parametrize("size", [1, 4, 64])
def test_eight_bits_keep_a_vector_to_half_a_step(size):
    """|error| <= max|x| / 254 for each element, and no more in rms than a uniform error within the step has."""
    x = np.random.default_rng(size).standard_normal((7, 11, 13, size)).astype(np.float32) * 10.0
    x[0, 0, 0] = 0.0
    read = np.asarray(round_to_eight_bits(x))
    step = np.abs(x).max(-1, keepdims=True) / 127
    assert (np.abs(read - x) <= step * 0.5001).all() and (read[0, 0, 0] == 0).all()
    if size == 64:
        error = np.sqrt(np.square(read - x).mean() / np.square(x).mean())
        assert 0.004 < error < 0.008, error
    for bad in (np.nan, np.inf, -np.inf):
        x[1, 2, 3, 0] = bad
        read = np.asarray(round_to_eight_bits(x))
        assert (
            np.isnan(read[1, 2, 3]).all()
            and np.isfinite(np.delete(read.reshape(-1, size), 1 * 143 + 2 * 13 + 3, 0)).all()
        )


def test_an_encoder_is_read_once():
    """Keys and values of a source are computed before the loop, not in it."""
    config = dataclasses.replace(BASE, pos_emb_type="rope", num_layers=2)
    model = build(lambda rngs: attnax.Transformer(rngs, encoder=config, decoder=config))
    source = np.ones((ROWS, 7), int)
    writer = model._writer("generate", source, None)
    contexts, real, _ = jax.jit(writer.context.make)(writer.state)
    assert np.asarray(real).sum(1).tolist() == [7] * ROWS
    assert len(contexts) == 2 and contexts[0].keys.shape[2] >= 7  # padded
    wanted = jax.jit(lambda source: model.decoder.keys_values(model.encoder(source)))(source)
    np.testing.assert_allclose(contexts[1].values[:, :, :7], wanted[1].values, atol=1e-5)
