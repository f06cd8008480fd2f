"""Masks and score mods of a call that writes: those of a forward pass without caches, for every row of the result."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx
from tiny import build

import attnax
from attnax import Sampler, TransformerConfig, TransformerLM, additive_bias_mod, init_kv_layer_cache, init_ring_kv_cache
from attnax import masks as attnax_masks
from attnax.generation.step import Tokens
from attnax.kernels.score_mods import compose_score_mods, mask_mod_to_score_mod
from attnax.masks import causal, documents, first, over_text, sliding_window
from attnax.models.call_masks import State, masks_of_call

CONFIG = TransformerConfig(
    vocab_size=11, d_model=8, num_heads=2, num_kv_heads=1, num_layers=2, d_ff=12, max_len=64, pos_emb_type="rope"
)
RNG = np.random.default_rng(0)
LENGTH, NEW = 13, 5  # of the arrays; of each result
PROMPTS = [[3, 4, 5], [1, 2, 3, 4, 9]]
IDS = np.array([[7, 3, 0, 4, 5, 0], [0, 1, 2, 3, 4, 9]])  # padding left, right and between
REAL = np.array([[0, 1, 0, 1, 1, 0], [0, 1, 1, 1, 1, 1]], bool)
Q, KV = np.arange(LENGTH)[:, None], np.arange(LENGTH)[None]
CAUSAL, NEAR = KV <= Q, (KV <= Q) & ((Q - KV < 3) | (KV < 1))
# A column more than the text, so that the first key always stays.
KEEP = (RNG.random((2, 2, LENGTH, LENGTH)) < 0.6) | (KV == 0) | (KV == Q)
BIAS = RNG.normal(size=(2, 2, LENGTH, LENGTH)).astype(np.float32) * 2
PACKED = np.array([[0, 1] * 6 + [0], [0, 0, 0, 1, 1, 0, 1, 0, 1, 0, 1, 0, 1]])
SAME = (PACKED[:, None, :, None] == PACKED[:, None, None, :]) & CAUSAL


def near(b, h, q, kv):
    return (kv <= q) & ((q - kv < 3) | (kv < 1))


def bias_mod(bias=BIAS):
    return additive_bias_mod(jax.device_put(bias))


# The options of a call, and the pairs and the bias (2, 2, LENGTH, LENGTH) that they stand for.
CALLS = {
    "all": ({"self_mask": near, "mask": KEEP, "score_mod": bias_mod()}, NEAR & KEEP, BIAS),
    "narrow": ({"mask": documents(PACKED) & sliding_window(4)}, SAME & (Q - KV < 4), 0 * BIAS),
    "replace": ({"self_mask": causal() & (sliding_window(3) | first(1)), "score_mod": bias_mod()}, NEAR & True, BIAS),
    "look ahead": ({"self_mask": lambda b, h, q, kv: (kv <= q) | (kv < 3)}, CAUSAL | (KV < 3), 0 * BIAS),
}


@pytest.fixture(scope="module")
def model():
    return build(lambda rngs: TransformerLM(rngs, CONFIG))


@jax.jit
def _forward(model, ids, keep, bias):
    """Log-probabilities of whole texts: the mask of the model gives way to arrays."""
    everything = attnax_masks.as_mask(lambda b, h, q, kv: kv >= 0)
    return model.log_probs(ids, self_mask=everything, mask=keep, score_mod=additive_bias_mod(bias))


def forward(model, texts, rows, keep, bias):
    """(texts, LENGTH, V) of texts that begin with the prompts `rows`, four or fewer."""
    ids = np.zeros((4, LENGTH), int)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = text
    rows = np.resize(rows, 4)
    keep, bias = (np.broadcast_to(x, BIAS.shape)[rows] for x in (keep, bias))
    return np.asarray(_forward(model, ids, keep, bias))[: len(texts)]


def assert_written(model, tokens, rows, keep, bias, log_probs=None, *, greedy=True):
    """Each token is the likeliest of a forward pass over the text before it, and has its log-probability."""
    tokens = np.asarray(tokens)
    texts = [[*PROMPTS[row], *written] for row, written in zip(rows, tokens.tolist(), strict=True)]
    whole = forward(model, texts, rows, keep, bias)
    for index, row in enumerate(rows):
        after = whole[index, len(PROMPTS[row]) - 1 :][: tokens.shape[1]]
        if greedy:
            assert after.argmax(-1).tolist() == tokens[index].tolist()
        if log_probs is not None:
            np.testing.assert_allclose(log_probs[index], after[np.arange(len(after)), tokens[index]], atol=1e-4)


OPTIONS = {"padding_mask": REAL, "max_new_tokens": NEW}
KINDS = [("all", "contiguous"), ("narrow", "ring"), ("replace", "paged"), ("look ahead", "contiguous")]
REST = [(name, kind) for name in CALLS for kind in ("contiguous", "ring", "paged") if (name, kind) not in KINDS]


@pytest.mark.parametrize(("name", "kind"), [*KINDS, *(pytest.param(*x, marks=pytest.mark.thorough) for x in REST)])
def test_generate_writes_under_the_masks_of_the_call(model, name, kind):
    masks, keep, bias = CALLS[name]
    written = model.generate(IDS, **OPTIONS, **masks, cache=kind)
    assert_written(model, written.tokens, [0, 1], keep, bias, written.log_probs)


def test_other_arrays_and_windows_compile_nothing_and_count(model, count_compilations):
    model.generate(IDS, **OPTIONS, **CALLS["all"][0])
    model.generate(IDS, **OPTIONS, **CALLS["narrow"][0], cache="ring")
    longer, real = (np.pad(x, ((0, 0), (2, 0))) for x in (IDS, REAL))
    other = {"self_mask": near, "mask": KEEP[::-1], "score_mod": bias_mod(-BIAS)}
    narrow = documents(PACKED[::-1]) & sliding_window(2)
    del count_compilations[:]
    written = model.generate(longer, padding_mask=real, max_new_tokens=NEW, **other)
    packed = model.generate(IDS, **OPTIONS, mask=narrow, cache="ring")
    assert not count_compilations
    assert_written(model, written.tokens, [0, 1], NEAR & KEEP[::-1], -BIAS, written.log_probs)
    assert_written(model, packed.tokens, [0, 1], SAME[::-1] & (Q - KV < 2), 0 * BIAS, packed.log_probs)


def test_samples_read_the_arrays_of_their_prompt(model):
    """Also those that a plain function captures."""

    def keep(b, h, q, kv):
        return jax.numpy.asarray(KEEP)[b, h, q, kv]

    options = {"self_mask": near, "mask": keep, "score_mod": bias_mod(), "num_samples": 2}
    drawn = model.generate(IDS, **OPTIONS, **options, sampler=Sampler(1.0), key=jax.random.key(0))
    assert_written(model, drawn.tokens, [0, 0, 1, 1], NEAR & KEEP, BIAS, drawn.log_probs, greedy=False)


def test_beams_read_the_arrays_of_their_prompt(model):
    masks, keep, bias = CALLS["all"]
    beams = model.beam_search(IDS, **OPTIONS, **masks, num_beams=2)
    tokens, rows = np.asarray(beams.tokens).reshape(4, NEW), [0, 0, 1, 1]
    texts = [[*PROMPTS[row], *written] for row, written in zip(rows, tokens.tolist(), strict=True)]
    whole = forward(model, texts, rows, keep, bias)
    for index, (row, score) in enumerate(zip(rows, np.ravel(beams.scores), strict=True)):
        after = whole[index, len(PROMPTS[row]) - 1 :][:NEW]
        np.testing.assert_allclose(score, after[np.arange(NEW), tokens[index]].mean(), atol=1e-4)


def test_a_stream_writes_under_the_masks_of_the_call(model):
    masks, keep, bias = CALLS["all"]
    tokens = np.stack(list(model.stream(IDS, **OPTIONS, **masks)), axis=1)
    assert_written(model, tokens, [0, 1], keep, bias)


def test_a_prompt_in_turns_and_chunks_is_read_under_the_masks(model):
    """Turns of several lengths fill more slots of a contiguous cache than the arrays have positions."""
    masks, keep, bias = CALLS["all"]
    turns = [(IDS[:, :4], REAL[:, :4]), (np.pad(IDS[:, 4:], ((0, 0), (6, 0))), np.pad(REAL[:, 4:], ((0, 0), (6, 0))))]
    caches = model.prefill(turns[0][0], padding_mask=turns[0][1], **masks)
    ids, real = turns[1]
    written = model.generate(ids, padding_mask=real, max_new_tokens=NEW, caches=caches, prefill_chunk=3, **masks)
    assert_written(model, written.tokens, [0, 1], keep, bias, written.log_probs)


def test_the_models_own_arrays_are_read_in_turns_and_samples_too(model):
    own = build(lambda rngs: TransformerLM(rngs, CONFIG))
    own.decoder.self_mask = nnx.data(causal() & documents(PACKED))
    caches = own.prefill(IDS[:, :4], padding_mask=REAL[:, :4])
    options = {"padding_mask": REAL[:, 4:], "max_new_tokens": NEW, "caches": caches, "num_samples": 2}
    written = own.generate(IDS[:, 4:], **options)
    assert_written(model, written.tokens, [0, 0, 1, 1], SAME, 0 * BIAS, written.log_probs)


def test_a_function_of_the_model_sees_the_rows_of_the_prompts():
    own = causal() & (lambda b, h, q, kv: jax.numpy.asarray(KEEP)[b, h, q, kv])
    _, call = masks_of_call("generate", own, {})
    rows = jax.device_put(np.array([0, 0, 1, 1], np.int32))
    tokens = Tokens(ids=np.zeros((4, 1), int), position_ids=np.zeros((4, 1), int), wanted=np.zeros((4, 1), int))
    mask = State(None, call).mask_options(tokens, rows)["self_mask"]
    for b, row in enumerate([0, 0, 1, 1]):
        np.testing.assert_array_equal(mask(b, 1, 9, np.arange(LENGTH)), (CAUSAL & KEEP)[row, 1, 9])


def test_every_device_has_the_arrays_that_a_mesh_cuts():
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    keep = jax.device_put(KEEP, jax.NamedSharding(mesh, jax.P("x")))
    _, call = masks_of_call("generate", causal(), {"mask": keep})
    [array] = jax.tree.leaves(call)
    assert array.sharding.is_fully_replicated and (np.asarray(array) == KEEP).all()


def ring(*, max_len, **sizes):
    return init_ring_kv_cache(max_len=4, window=3, num_sinks=1, **sizes)


@pytest.mark.parametrize("chunk", [None, 2])
def test_a_window_beside_the_first_tokens_is_written_in_a_ring_of_fixed_size(model, chunk):
    masks = {"self_mask": near, "score_mod": bias_mod()}
    written = model.generate(IDS, **OPTIONS, **masks, cache=ring, prefill_chunk=chunk, return_caches=True)
    assert_written(model, written.tokens, [0, 1], NEAR & True, BIAS, written.log_probs)
    assert {cache.max_len for cache in written.caches.layers} == {4}


def spare_ring(*, max_len, **sizes):
    return init_ring_kv_cache(max_len=9, window=3, num_sinks=1, **sizes)


def test_a_draft_reads_the_masks_too_in_caches_of_the_same_function(model, count_compilations):
    """The model itself as a draft: every token is accepted."""
    masks, keep, bias = CALLS["all"]
    options = {**OPTIONS, "draft": model, "cache": spare_ring}
    written = model.generate(IDS, **options, **masks)
    assert_written(model, written.tokens, [0, 1], keep, bias, written.log_probs)
    assert written.steps.tolist() == [2, 2]
    del count_compilations[:]
    model.generate(IDS, **options, **masks)
    assert not count_compilations


def test_a_draft_lets_no_token_attend_a_later_drafted_one(model):
    """As without a draft, where a later token is not there yet; tokens of a prompt attend each other."""
    written = model.generate(IDS, **OPTIONS, draft=model, self_mask=lambda b, h, q, kv: (kv <= q) | (kv < 9))
    lengths = np.array([[[[3]]], [[[5]]]])
    keep = CAUSAL | ((lengths > Q) & (lengths > KV))
    assert_written(model, written.tokens, [0, 1], keep, 0 * BIAS, written.log_probs)


@pytest.mark.thorough
def test_stacked_layers_take_the_masks_and_a_function_of_caches(model):
    masks, keep, bias = CALLS["all"]
    scanned = attnax.nn.with_scan_layers(model, True)
    beams = scanned.beam_search(IDS, **OPTIONS, **masks, num_beams=1, cache=spare_ring)
    assert_written(model, beams.tokens[:, 0], [0, 1], keep, bias)


def fixed(**sizes):
    return init_kv_layer_cache(2, 1, 4, 64)


@pytest.mark.parametrize(
    ("function", "options", "words"),
    [
        (
            lambda **sizes: None,
            {},
            "generate: a function given as cache must return the cache of a layer; got NoneType",
        ),
        (fixed, {"num_samples": 1, "prompt_ids": IDS[:1]}, "must make a row for each prompt, here 1; got 2 rows"),
        (
            lambda *, batch_size, **sizes: init_kv_layer_cache(batch_size, 2, 4, 64),
            {},
            r"generate: layer 0 has keys and values of \(1, 4\) and \(1, 4\) \(heads, size\); got caches with \(2, 4\)",
        ),
        (
            fixed,
            {"draft": True},
            "with a draft a cache must use the slots of rejected tokens again; got cache=<function",
        ),
        (
            lambda *, max_len, **sizes: init_ring_kv_cache(max_len=7, window=3, num_sinks=1, **sizes),
            {"draft": True},
            "a ring must have num_draft_tokens=4 slots beside its window and its sinks; got 3 from cache=<function",
        ),
        (
            lambda *, max_len, **sizes: init_kv_layer_cache(max_len=7, **sizes),
            {},
            "must make room for the whole text, here 8 tokens; got room for 7 from <function .*Hand on its max_len",
        ),
        (
            lambda *, max_len, **sizes: init_ring_kv_cache(max_len=11, **sizes),
            {"draft": True},
            "must make room for the whole text, here 12 tokens; got room for 11 from <function",
        ),
        (
            lambda batch_size, heads: None,
            {},
            "must take batch_size, num_kv_heads, head_dim, value_head_dim, max_len, dtype by name; got <function .*: "
            "missing a required argument: 'heads'. Take those that it does not need as",
        ),
    ],
)
def test_caches_that_do_not_fit_are_refused_in_words(model, function, options, words):
    options = {"prompt_ids": IDS, **options} | ({"draft": model} if "draft" in options else {})
    with pytest.raises(ValueError, match=words):
        model.generate(**options, max_new_tokens=3, cache=function)


WRONG = [
    (
        {"mask": KEEP[..., :7, :7]},
        "arrays of mask, self_mask and score_mod must cover all positions of prompt and new ",
    ),
    ({"score_mod": bias_mod(BIAS[..., :7, :7])}, r"got 7 positions for 5 \+ 5 tokens. Give arrays of 10 positions"),
    ({"self_mask": documents(PACKED[:, :7])}, r"got 7 positions for 5 \+ 5 tokens"),
    ({"mask": KEEP[[0, 1, 1]]}, r"mask must broadcast to \(batch, num_heads, seq_q, seq_kv\)=\(2, 2, any, any\)"),
    ({"mask": documents(PACKED[[0, 1, 1]])}, r"documents need one id a token, \(length,\) or \(2, length\)"),
    ({"mask": KEEP.astype(int)}, "mask must be a Mask, a function .* or a boolean array of at most 4 axes; got shape="),
    ({"self_mask": "causal"}, "self_mask must be a Mask, a function .* got 'causal'"),
    ({"score_mod": BIAS}, "score_mod must be a function .*; got ndarray. Give an array as additive_bias_mod"),
    ({"max_new_tokens": 70, "mask": KEEP}, r"got 13 positions for 5 \+ 70 tokens"),
]


@pytest.mark.parametrize(("options", "words"), WRONG)
@pytest.mark.usefixtures("unchecked_shapes")
def test_masks_that_do_not_fit_are_refused_in_words(model, options, words):
    for write in (model.generate, model.stream):
        with pytest.raises(ValueError, match=f"{write.__name__}: .*{words}"):
            write(IDS, **OPTIONS | options)


@pytest.mark.usefixtures("unchecked_shapes")
def test_errors_name_the_method_that_was_called(model):
    counts = {"stream": {"max_new_tokens": 2}, "beam_search": {"max_new_tokens": 2, "num_beams": 2}, "prefill": {}}
    for name, options in counts.items():
        for wrong, words in (
            ({"padding_mask": ~REAL & REAL}, "padding_mask must be boolean"),
            ({"cache": "infinite"}, "cache must be one of"),
            ({"prefill_chunk": 0}, "prefill_chunk must be at least 1"),
            ({"mask": KEEP[..., :3, :3]}, "arrays of mask"),
        ):
            with pytest.raises(ValueError, match=f"^{name}: {words}"):
                getattr(model, name)(IDS, **options | wrong)
    learned = build(lambda rngs: TransformerLM(rngs, dataclasses.replace(CONFIG, pos_emb_type="learned", max_len=8)))
    with pytest.raises(ValueError, match="^beam_search: prompt and new tokens must fit into the 8 positions"):
        learned.beam_search(IDS, max_new_tokens=8, num_beams=2)


class CallOfOldOptions(TransformerLM):
    def __call__(self, input_ids, *, padding_mask=None, position_ids=None, layer_kv_caches=None, deterministic=None):
        raise AssertionError("not called")


class RunOfOldOptions(TransformerLM):
    def run(self, input_ids, *, padding_mask=None, position_ids=None, caches=None, deterministic=None):
        raise AssertionError("not called")


@pytest.mark.parametrize("kind", [CallOfOldOptions, RunOfOldOptions])
def test_a_subclass_that_would_lose_a_mask_is_refused_in_words(kind):
    lm = build(lambda rngs: kind(rngs, CONFIG))
    with pytest.raises(
        NotImplementedError, match="must take input_ids, .*score_mod, self_mask.*got an unexpected keyw"
    ):
        lm.generate(IDS, max_new_tokens=2, mask=near, score_mod=bias_mod())


class OwnCall(TransformerLM):
    def __call__(self, input_ids, **options):
        return super().__call__(input_ids, **options)


def test_a_subclass_gets_the_masks(model):
    masks, keep, bias = CALLS["all"]
    own = build(lambda rngs: OwnCall(rngs, CONFIG))
    assert_written(model, own.generate(IDS, **OPTIONS, **masks).tokens, [0, 1], keep, bias)


@pytest.fixture(scope="module")
def pair():
    config = dataclasses.replace(CONFIG, num_layers=1)
    return build(lambda rngs: attnax.Transformer(rngs, encoder=config, decoder=config))


def test_a_target_is_written_under_the_masks_of_the_call(pair):
    masks, keep, bias = CALLS["all"]

    @jax.jit
    def read(pair, target):
        everything = attnax_masks.as_mask(lambda b, h, q, kv: kv >= 0)
        masks = {"self_mask": everything, "mask": keep, "score_mod": additive_bias_mod(jax.numpy.asarray(bias))}
        return pair.log_probs(IDS, target, source_padding_mask=REAL, **masks)

    options = {"max_length": NEW, "start_token": 1, "source_padding_mask": REAL}
    written = pair.generate(IDS, **options, **masks, num_samples=2)
    tokens = np.asarray(written.tokens)
    assert (tokens[::2] == tokens[1::2]).all()
    after = read(pair, np.pad(tokens[::2], ((0, 0), (1, LENGTH - 1 - NEW)), constant_values=1))[:, :NEW]
    np.testing.assert_array_equal(after.argmax(-1), tokens[::2])


def test_a_mask_over_a_text_has_the_rows_and_the_tiles_of_its_prompts():
    rows = jax.device_put(np.array([1, 0, 1], np.int32))
    packed = documents(np.repeat([[0, 1, 1], [0, 0, 1]], 16, axis=1))  # bounds are exact for blocks of 16
    mask = over_text(packed, rows)
    for b, row in enumerate([1, 0, 1]):
        np.testing.assert_array_equal(mask(b, 0, 3, np.arange(48)), packed(row, 0, 3, np.arange(48)))
    tiles = [tuple(map(bool, mask.tile(b, 0, (0, 15), (16, 31)))) for b in range(3)]
    assert tiles == [(True, True), (False, False), (True, True)]
    assert not mask.is_opaque and mask.keys_per_query(48) == packed.keys_per_query(48)
    assert over_text(mask, rows) is mask and over_text(causal(), rows) == causal()
    both = over_text(compose_score_mods(bias_mod(), mask_mod_to_score_mod(causal() & packed)), rows)
    score = jax.device_put(np.float32(1))
    assert both(score, 0, 1, 4, 2) == 1 + BIAS[1, 1, 4, 2] and both(score, 0, 1, 2, 4) == -np.inf
