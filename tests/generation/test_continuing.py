"""Going on from the caches of an earlier call: the tokens of one long prompt, without reading it again."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx
from tiny import build

from attnax import Sampler, TransformerConfig, TransformerLM
from attnax.cache import (
    EmptyCache,
    grow,
    init_decoder_kv_caches_from_config,
    init_kv_layer_cache,
    init_linear_layer_cache,
    init_ring_kv_cache,
    update_kv_layer_cache,
)
from attnax.generation import TextCaches
from attnax.masks import causal, sliding_window
from attnax.models import writing
from attnax.nn import with_scan_layers
from attnax.paged_cache import init_paged_kv_cache

CONFIG = TransformerConfig(
    vocab_size=31, d_model=12, num_heads=3, num_kv_heads=1, num_layers=1, d_ff=20, max_len=256, pos_emb_type="rope"
)
RNG = np.random.default_rng(0)
FIRST, SECOND = (RNG.integers(1, CONFIG.vocab_size, (2, length)).astype(np.int32) for length in (7, 5))
BOTH = np.concatenate([FIRST, SECOND], axis=1)
# All tokens of a text count, so a text that is not whole gives other tokens.
DRAWN = {"sampler": Sampler(1.0, repetition_penalty=1.5, no_repeat_ngram=2), "key": jax.random.key(3)}


def lm(**fields):
    return build(lambda rngs: TransformerLM(rngs, dataclasses.replace(CONFIG, **fields)))


def assert_same(have, want):
    np.testing.assert_array_equal(have.tokens, want.tokens)
    np.testing.assert_allclose(have.log_probs, want.log_probs, atol=1e-4)


RAGGED = np.array([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 1, 0]], bool)


def kinds(name):
    """A model, and the options that choose the kind of its caches."""
    model = {
        "contiguous": {"pos_emb_type": "learned"},
        "ring": {"num_layers": 2, "layer_pattern": ({"attention_window": 4}, {})},
        "paged": {"pos_emb_type": "alibi"},
        "linear": {"attention_type": "linear"},
        "int8": {"attention_block_size": 8},
        "standard": {"attention_type": "standard", "pos_emb_type": "relative"},
        "experts": {"num_experts": 3, "top_k": 2},
        "scanned": {"num_layers": 3, "scan_layers": True, "layer_pattern": ({"attention_window": 4}, {})},
    }[name]
    options = {"cache": name} if name in ("ring", "paged") else {}
    return lm(**model), {"cache_dtype": "int8"} if name == "int8" else options


QUICK = "contiguous", "ring", "paged", "linear"
THOROUGH = [pytest.param(name, marks=pytest.mark.thorough) for name in ("int8", "standard", "experts", "scanned")]


@pytest.mark.parametrize("name", [*QUICK, *THOROUGH])
def test_a_prompt_behind_a_text_is_read_as_one_long_prompt(name):
    """Rows of several lengths; padding left, right and between."""
    model, cache = kinds(name)
    whole = model.generate(BOTH, padding_mask=np.pad(RAGGED, ((0, 0), (0, 5)), constant_values=True), max_new_tokens=1)
    caches = model.prefill(FIRST, padding_mask=RAGGED, **cache)
    written = model.generate(SECOND, caches=caches, max_new_tokens=1)
    np.testing.assert_array_equal(written.tokens, whole.tokens)
    np.testing.assert_allclose(written.log_probs, whole.log_probs, atol=0.03 if name == "int8" else 1e-4)


@pytest.mark.parametrize("name", [*QUICK, *THOROUGH])
def test_a_prompt_in_chunks_is_read_as_one_prompt(name):
    model, cache = kinds(name)
    options = {"padding_mask": np.pad(RAGGED, ((0, 0), (0, 5)), constant_values=True), "max_new_tokens": 1, **cache}
    whole, chunks = (model.generate(BOTH, prefill_chunk=size, **options) for size in (512, 5))
    np.testing.assert_array_equal(chunks.tokens, whole.tokens)
    np.testing.assert_allclose(chunks.log_probs, whole.log_probs, atol=0.03 if name == "int8" else 1e-4)


@pytest.fixture(scope="module")
def model():
    return lm()


@pytest.fixture(scope="module")
def first(model):
    return model.generate(FIRST, max_new_tokens=6, end_token=9, return_caches=True, **DRAWN)


def test_a_chat_goes_on_as_if_it_had_read_everything(model, first):
    whole = np.concatenate([FIRST, first.tokens, SECOND], axis=1)
    real = np.ones(whole.shape, bool)
    real[:, 7:13] = np.arange(6) < np.asarray(first.lengths)[:, None]
    want = model.generate(whole, padding_mask=real, max_new_tokens=6, **DRAWN)
    for _ in range(2):  # the caches stay as they are
        assert_same(model.generate(SECOND, max_new_tokens=6, caches=first.caches, **DRAWN), want)


def test_without_a_prompt_a_text_goes_on(model):
    long = model.generate(FIRST, max_new_tokens=11, **DRAWN)
    begun = model.generate(FIRST, max_new_tokens=6, return_caches=True, **DRAWN)
    rest = model.generate(None, max_new_tokens=5, caches=begun.caches, **DRAWN)
    np.testing.assert_array_equal(np.concatenate([begun.tokens, rest.tokens], axis=1), long.tokens)


@pytest.mark.parametrize("cache", ["contiguous", pytest.param("paged", marks=pytest.mark.thorough)])
def test_one_prefix_serves_many_rows_and_samples(model, cache):
    prefix = model.prefill(FIRST[:1], cache=cache)
    written = model.generate(SECOND, caches=prefix, max_new_tokens=3, num_samples=2, **DRAWN)
    whole = np.concatenate([FIRST[[0, 0]], SECOND], axis=1)
    assert_same(written, model.generate(whole, max_new_tokens=3, num_samples=2, **DRAWN))


def test_a_turn_of_another_length_compiles_nothing(model, count_compilations):
    caches = model.prefill(FIRST)
    options = {"caches": caches, "max_new_tokens": 3}
    model.generate(SECOND, **options)
    del count_compilations[:]
    assert model.generate(FIRST, **options).tokens.shape == (2, 3)
    assert not count_compilations


def test_a_long_chat_grows_its_caches(model):
    """Longer than any room that the first call made."""
    caches, whole = None, np.zeros((2, 0), np.int32)
    for turn in range(4):
        asked = RNG.integers(1, CONFIG.vocab_size, (2, 29)).astype(np.int32)
        said = model.generate(asked, caches=caches, max_new_tokens=1, return_caches=True)
        whole, caches = np.concatenate([whole, asked, said.tokens], axis=1), said.caches
        assert caches.text.lengths.tolist() == [30 * (turn + 1)] * 2
        np.testing.assert_array_equal(caches.text.ids[:, : whole.shape[1]], whole)
    assert model.generate(whole[:, :-1], max_new_tokens=1).tokens.tolist() == said.tokens.tolist()
    assert caches.layers[0].max_len >= 119


def test_a_draft_reads_the_text_of_the_caches(model):
    small = lm(d_model=8, num_heads=2)
    options = {"draft": small, "num_draft_tokens": 3, "max_new_tokens": 6}
    begun = model.generate(FIRST, cache="ring", return_caches=True, **options)
    whole = np.concatenate([FIRST, begun.tokens, SECOND], axis=1)
    written = model.generate(SECOND, caches=begun.caches, **options)
    np.testing.assert_array_equal(written.tokens, model.generate(whole, max_new_tokens=6).tokens)
    assert (written.steps <= 6).all()


def test_beams_go_on_from_caches(model):
    options = {"num_beams": 3, "max_new_tokens": 4}
    beams = model.beam_search(SECOND, caches=model.prefill(FIRST), **options)
    want = model.beam_search(BOTH, **options)
    np.testing.assert_array_equal(beams.tokens, want.tokens)
    np.testing.assert_allclose(beams.scores, want.scores, atol=1e-4)


def test_a_stopped_stream_goes_on(model):
    stream = model.stream(FIRST, max_new_tokens=9, **DRAWN)
    with pytest.raises(ValueError, match=r"Stream.stop: there are no caches before the first token"):
        stream.stop()
    begun = [next(stream) for _ in range(4)]
    caches = stream.stop()
    assert next(stream, None) is None
    rest = model.stream(None, max_new_tokens=5, caches=caches, **DRAWN)
    want = model.generate(FIRST, max_new_tokens=9, **DRAWN).tokens
    np.testing.assert_array_equal(np.stack([*begun, *rest], axis=1), want)


def test_the_last_tokens_can_be_taken_back_and_rows_chosen(model, first):
    short = first.caches.forget(jax.device_put(np.array([7, 3]))).select_rows(jax.device_put(np.array([1, 0, 1])))
    assert short.text.lengths.tolist() == [3, 7, 3]
    asked = SECOND[[0, 1, 1]]
    real = np.ones((3, 12), bool)
    real[[0, 2], 3:7] = False
    whole = np.concatenate([FIRST[[1, 0, 1]], asked], axis=1)
    want = model.generate(whole, padding_mask=real, max_new_tokens=3)
    assert_same(model.generate(asked, caches=short, max_new_tokens=3), want)


def test_caches_go_on_under_jit(model):
    @jax.jit
    def answer(caches):
        return model.generate(SECOND, caches=caches, max_new_tokens=3)

    assert_same(answer(model.prefill(FIRST)), model.generate(BOTH, max_new_tokens=3))


def test_the_memory_of_a_prompt_does_not_grow_with_its_length():
    """Temporary memory of the compiled program; the caches themselves are arguments and results."""
    graphdef, state = nnx.split(lm(max_len=8192, d_ff=512))

    def temporary(length):
        read = jax.jit(lambda state, ids: nnx.merge(graphdef, state).prefill(ids, prefill_chunk=64))
        program = read.lower(state, np.ones((1, length), np.int32)).compile()
        return program.memory_analysis().temp_size_in_bytes

    short, long = temporary(256), temporary(4096)
    held = 2 * 12 // 3 * 4 * (4096 - 256)  # keys and values of the longer text
    assert long <= short + 3 * held


WRONG = [
    ({"caches": ()}, r"caches must be TextCaches, which prefill and generate\(return_caches=True\) return; got tuple"),
    ({"cache": "ring"}, "caches have a kind and a dtype already; got caches with cache='ring', cache_dtype=None"),
    ({"prefill_chunk": 0}, "prefill_chunk must be at least 1; got prefill_chunk=0"),
    ({"draft": True}, "with a draft a cache must use the slots of rejected tokens again; got a KVLayerCache in caches"),
]


@pytest.mark.parametrize(("options", "message"), WRONG)
@pytest.mark.usefixtures("unchecked_shapes")
def test_wrong_caches_are_refused_in_words(model, first, options, message):
    options = {"caches": first.caches, **options}
    if "draft" in options:
        options["draft"] = model
    with pytest.raises(ValueError, match=message):
        model.generate(SECOND, max_new_tokens=3, **options)


@pytest.mark.usefixtures("unchecked_shapes")
def test_caches_of_another_model_or_of_other_rows_are_refused(model, first):
    for fields, message in (
        ({"num_layers": 2}, "caches must have a layer for each of the model, here 2; got 1"),
        ({"num_kv_heads": 3}, r"layer 0 has keys and values of \(3, 4\) and \(3, 4\).*got caches with \(1, 4\)"),
        ({"vocab_size": 5}, "the text of the caches must have tokens below vocab_size=5"),
    ):
        with pytest.raises(ValueError, match=message):
            lm(**fields).generate(np.ones((2, 1), np.int32), max_new_tokens=3, caches=first.caches)
    with pytest.raises(ValueError, match=r"a row for each prompt; got 2 rows for 3 prompts. Choose rows"):
        model.generate(np.ones((3, 1), np.int32), max_new_tokens=3, caches=first.caches)
    with pytest.raises(ValueError, match=r"prompt_ids must be \(batch, length\).*got \(3,\)"):
        model.generate(np.ones(3, np.int32), max_new_tokens=3, caches=first.caches)
    with pytest.raises(ValueError, match=r"TextCaches.forget: first must be integers of shape \(2,\)"):
        first.caches.forget(jax.device_put(np.ones(3, np.int32)))
    with pytest.raises(ValueError, match=r"prompt_ids must be \(batch, length\)"):
        model.generate(np.ones((2, 0), np.int32), max_new_tokens=3)
    with pytest.raises(ValueError, match=r"prefill: prompt_ids must hold tokens"):
        model.prefill(np.ones((2, 0), np.int32), caches=first.caches)
    table = lm(pos_emb_type="learned", max_len=12)
    with pytest.raises(ValueError, match=r"must fit into the 12 positions of the model; got 12 \+ 2"):
        table.generate(SECOND, max_new_tokens=2, caches=table.prefill(FIRST))


def test_a_cache_grows_and_keeps_its_tokens():
    new = {"keys": RNG.normal(size=(2, 1, 3, 4)).astype(np.float32), "values": np.ones((2, 1, 3, 5), np.float32)}
    new, positions = jax.tree.map(jax.device_put, (new, np.array([[0, 1, 2], [0, -1, -1]], np.int32)))
    caches = (
        init_kv_layer_cache(2, 1, 4, 3, value_head_dim=5, dtype="int8"),
        init_ring_kv_cache(2, 1, 4, 3, value_head_dim=5),
        init_paged_kv_cache(
            num_blocks=3, block_size=2, num_kv_heads=1, head_dim=4, batch_size=2, max_blocks_per_seq=2, value_dim=5
        ),
    )
    for cache in caches:
        cache, _ = cache.append(new, positions)
        grown = grow((EmptyCache(cache),), 7, 5)[0].cache
        assert grown.max_len in (7, 8) and int(grown.slots_in_use()) == 3
        before, after = cache.tokens("float32"), grown.tokens("float32")
        for row in range(2):
            there, here = before.positions[row] >= 0, after.positions[row] >= 0
            np.testing.assert_array_equal(after.keys[row][:, here], before.keys[row][:, there])
            np.testing.assert_array_equal(after.values[row][:, here], before.values[row][:, there])
    assert grown.key_pool.shape[0] == 5 * 4 and grow(grown, 3, 1).block_table.shape == (2, 4)
    window, sums = init_ring_kv_cache(2, 1, 4, 3, window=2), init_linear_layer_cache(2, 1, 4)
    assert grow(window, 7, 5) is window and grow(sums, 7, 5) is sums


def test_padding_behind_the_last_token_takes_no_slot_and_needs_none():
    """In the middle of a contiguous cache, and where the slots of the padding do not exist."""
    cache = init_kv_layer_cache(2, 1, 3, 7)
    x = RNG.normal(size=(2, 1, 11, 3)).astype(np.float32)

    @jax.jit
    def write(cache, x, positions):
        return cache.append({"keys": x, "values": x}, positions)[0]

    positions = np.full((2, 4), -1, np.int32)
    positions[:, 0], positions[1, 1] = 0, 1
    cache = write(cache, x[:, :, :4], positions)
    assert int(cache.length) == 2
    positions = np.array([[1, 2, 3, 4, 5, -1, -1, -1, -1]] * 2, np.int32)
    cache = write(cache, x[:, :, :9], positions)  # nine tokens never fit
    assert int(cache.length) == 7 and not cache.overflowed
    np.testing.assert_array_equal(cache.keys[:, :, 2:], x[:, :, :5])
    assert cache.positions.tolist() == [[0, -1, 1, 2, 3, 4, 5], [0, 1, 1, 2, 3, 4, 5]]
    cache = write(cache, x[:, :, :1], np.full((2, 1), -1, np.int32))
    assert not cache.overflowed and int(cache.length) == 7
    assert write(cache, x[:, :, :1], np.full((2, 1), 6, np.int32)).overflowed
    two = jax.device_put(x[:, :, :2])
    update_kv_layer_cache(cache, two, two, positions=np.full((2, 2), -1, np.int32))
    with pytest.raises(ValueError, match="2 tokens from slot 7 do not fit into a cache of max_len=7"):
        update_kv_layer_cache(cache, two, two)


def test_text_caches_are_a_pytree_of_rows(first):
    leaves = jax.tree.leaves(first.caches)
    assert isinstance(jax.tree.map(np.asarray, first.caches), TextCaches) and len(leaves) == 8
    assert init_decoder_kv_caches_from_config(CONFIG, batch_size=2, max_len=3)[0].next_positions().tolist() == [0, 0]


@pytest.mark.usefixtures("unchecked_shapes")
def test_prompts_without_tokens_are_refused_by_prefill_in_words(model, first):
    for prompt_ids in (None, [[], []]):
        with pytest.raises(ValueError, match="prefill: prompt_ids must hold tokens; got prompt_ids="):
            model.prefill(prompt_ids, caches=first.caches)


def test_stacked_and_separate_layers_go_on_from_each_other_in_chunks():
    """A loop over chunks carries the caches in the form in which the model returns them."""
    scanned = lm(num_layers=2, scan_layers=True)
    separate = with_scan_layers(scanned, False)
    want = scanned.generate(BOTH, max_new_tokens=1)
    for reads, writes in ((scanned, separate), (separate, scanned)):
        assert_same(writes.generate(SECOND, caches=reads.prefill(FIRST), prefill_chunk=3, max_new_tokens=1), want)


def test_a_call_that_returns_a_list_of_caches_reads_in_chunks(model):
    class Listing(TransformerLM):
        def __call__(self, input_ids, **options):
            logits, caches = super().__call__(input_ids, **options)
            return logits, list(caches)

    listing = build(lambda rngs: Listing(rngs, CONFIG))
    want = model.generate(FIRST, max_new_tokens=1)
    assert_same(listing.generate(FIRST, max_new_tokens=1, prefill_chunk=5), want)


def test_a_mask_that_may_look_ahead_reads_a_prompt_at_once_by_default(monkeypatch):
    monkeypatch.setattr(writing, "PREFILL_CHUNK", 5)

    def chunk(self_mask, **options):
        model = nnx.eval_shape(lambda: TransformerLM(nnx.Rngs(0), CONFIG, self_mask=self_mask))
        return writing._prepare(model._writer("generate"), FIRST, 1, **options).request.prefill_chunk

    def of_a_prefix(b, h, q, kv):
        return (kv <= q) | (kv < 7)

    assert chunk(None) == chunk(causal() & of_a_prefix) == chunk(sliding_window(3) & causal()) == 5
    assert chunk(of_a_prefix) is None and chunk(sliding_window(3)) is None
    assert chunk(of_a_prefix, prefill_chunk=3) == 3


def test_slots_of_tokens_that_were_taken_back_are_used_again(model, first):
    cache = first.caches.forget(jax.device_put(np.array([5, 3]))).layers[0]
    assert int(cache.slots_in_use()) == 4 and cache.length.dtype == np.int32
    caches = first.caches
    for _ in range(2):
        caches = caches.forget(jax.device_put(np.array([7, 7])))
        caches = model.generate(SECOND, caches=caches, max_new_tokens=6, return_caches=True).caches
        assert int(caches.layers[0].slots_in_use()) == 7 + 5 + 6 - 1


def test_known_caches_and_prompts_go_on_inside_a_program(model):
    caches, want = model.prefill(FIRST), model.generate(BOTH, max_new_tokens=1)
    prompts = jax.device_put(SECOND)
    assert_same(jax.jit(lambda: model.generate(prompts, caches=caches, max_new_tokens=1))(), want)


def test_traced_texts_may_be_shorter_than_their_room():
    """Positions past a table are NaN under jit, and are not refused where the lengths are unknown."""
    table = lm(pos_emb_type="learned", max_len=13)
    answer = jax.jit(lambda caches: table.generate(SECOND, caches=caches, max_new_tokens=3))
    written = answer(table.prefill(FIRST))
    assert np.isnan(written.log_probs).tolist() == [[False, False, True]] * 2


def test_a_text_goes_on_under_jit_in_64_bits(model):
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        caches = model.prefill(FIRST)
        answer = jax.jit(lambda caches: model.generate(SECOND, caches=caches, max_new_tokens=1))
        assert_same(answer(caches), model.generate(BOTH, max_new_tokens=1))


def test_beams_are_the_same_in_64_bits(model):
    want = model.beam_search(FIRST, num_beams=2, max_new_tokens=2).tokens
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        np.testing.assert_array_equal(model.beam_search(FIRST, num_beams=2, max_new_tokens=2).tokens, want)


def test_a_draft_behind_caches_is_one_program(model, count_compilations):
    small, caches = lm(d_model=8, num_heads=2), model.prefill(FIRST, cache="ring")
    model.generate(SECOND, caches=caches, max_new_tokens=3)  # compiles what eager checks need
    del count_compilations[:]
    model.generate(SECOND, caches=caches, max_new_tokens=3, draft=small)
    assert len(count_compilations) == 1


def test_rows_of_numpy_caches_are_chosen(model):
    caches = jax.tree.map(np.asarray, model.prefill(FIRST, cache="paged"))
    assert caches.select_rows(jax.device_put(np.array([1, 1]))).layers[0].seq_lengths.tolist() == [6, 6]
