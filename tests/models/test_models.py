"""Models: tokens that a token may depend on, caches and padding that change nothing, both NNX modes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import build

import attnax
from attnax import TransformerConfig, TransformerDecoder, TransformerLM
from attnax.models import MaskedLM, VisionTransformer

CONFIG = TransformerConfig(
    vocab_size=23,
    d_model=12,
    num_heads=3,
    num_kv_heads=1,
    num_layers=2,
    d_ff=20,
    max_len=19,
    dropout_rate=0.0,
    norm_type="rms",
    ff_activation="swiglu",
    use_bias=False,
    pos_emb_type="rope",
    tie_embeddings=True,
)
SHALLOW = dataclasses.replace(CONFIG, num_layers=1)
VARIANTS = {
    "llama-like": CONFIG,
    "gpt-like": dataclasses.replace(
        CONFIG,
        num_kv_heads=None,
        norm_type="layer",
        ff_activation="gelu",
        use_bias=True,
        pos_emb_type="learned",
        tie_embeddings=False,
    ),
    "post-norm sinusoidal": dataclasses.replace(CONFIG, norm_placement="post", pos_emb_type="sinusoidal"),
    "sandwich, no positions": dataclasses.replace(CONFIG, norm_placement="sandwich", pos_emb_type="none"),
}
variants = pytest.mark.parametrize(
    "variant",
    [pytest.param(name, marks=() if index < 2 else pytest.mark.thorough) for index, name in enumerate(VARIANTS)],
)

# All tests call a model with few shapes, so that it is compiled a few times only: whole texts, and chunks of them.
BATCH, LENGTH, CHUNK = 8, 16, 7


@functools.cache
def make(config):
    return build(lambda rngs: TransformerLM(rngs, config))


@functools.cache
def compiled(variant):
    graphdef, state = nnx.split(make(VARIANTS[variant]))
    run = jax.jit(lambda state, ids, **options: nnx.merge(graphdef, state)(ids, **options))
    return functools.partial(run, state)


call = nnx.jit(lambda model, ids, **options: model(ids, **options))


def tokens(batch=BATCH, length=LENGTH, seed=0):
    return np.random.default_rng(seed).integers(0, CONFIG.vocab_size, (batch, length))


def caches_of(config, **options):
    return attnax.init_decoder_kv_caches_from_config(config, **({"batch_size": BATCH} | options))


def distance(actual, expected):
    return np.abs(np.asarray(actual) - np.asarray(expected)).max()


def alone(run, texts, **options):
    """The logits of each text alone: no token sees later tokens, so the texts may stand in one batch."""
    ids = tokens(seed=99)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = text
    logits = np.asarray(run(ids, **options))
    return [logits[row, : len(text)] for row, text in enumerate(texts)]


def padded_rows(length=CHUNK):
    """True for real tokens: rows of 7, 4, 2 and 1 tokens, the first half padded on the left."""
    rows = [(side, count) for side in ("left", "right") for count in (length, 4, 2, 1)]
    real = np.zeros((BATCH, length), bool)
    for row, (side, count) in enumerate(rows):
        real[row, slice(length - count, None) if side == "left" else slice(count)] = True
    return real


@variants
def test_a_token_depends_on_itself_and_earlier_tokens(variant):
    run, ids = compiled(variant), tokens()
    logits = np.asarray(run(ids))
    for changed in range(LENGTH):
        other = ids.copy()
        other[:, changed] = (other[:, changed] + 1) % CONFIG.vocab_size
        moved = np.abs(np.asarray(run(other)) - logits).max(-1) > 0
        np.testing.assert_array_equal(moved, [np.arange(LENGTH) >= changed] * BATCH)


@variants
def test_any_chunks_through_the_cache_equal_the_whole(variant):
    run, ids, real = compiled(variant), tokens(), np.ones((BATCH, CHUNK), bool)
    whole = run(ids)
    for sizes in ((1,) * LENGTH, (7, 7, 1, 1), (1, 7, 1, 7)):
        parts, start, caches = [], 0, caches_of(VARIANTS[variant])
        for size in sizes:
            options = {"padding_mask": real} if size == CHUNK else {}
            logits, caches = run(ids[:, start : start + size], layer_kv_caches=caches, **options)
            parts.append(logits)
            start += size
        assert distance(np.concatenate(parts, axis=1), whole) <= 1e-5, sizes
        assert int(caches[0].length) == LENGTH and not caches[0].overflowed


@pytest.mark.parametrize(
    "variant",
    [
        pytest.param(name, marks={"llama-like": (), "gpt-like": pytest.mark.contract}.get(name, pytest.mark.thorough))
        for name in VARIANTS
    ],
)
def test_padded_rows_give_the_results_of_each_alone(variant):
    run, ids, real = compiled(variant), tokens(length=CHUNK), padded_rows()
    logits = np.asarray(run(ids, padding_mask=real))
    for row, expected in enumerate(alone(run, [ids[row, real[row]] for row in range(BATCH)])):
        assert distance(logits[row, real[row]], expected) <= 1e-5, row


@variants
def test_a_padded_prompt_gives_the_result_of_its_text_and_goes_on_at_its_end(variant):
    run, real = compiled(variant), padded_rows()
    ids, new = tokens(length=CHUNK), tokens(length=1, seed=9)
    prompt, caches = run(ids, padding_mask=real, layer_kv_caches=caches_of(VARIANTS[variant]))
    after, _ = run(new, layer_kv_caches=caches)
    texts = [np.concatenate([ids[row, real[row]], new[row]]) for row in range(BATCH)]
    for row, expected in enumerate(alone(run, texts)):
        logits = np.concatenate([np.asarray(prompt)[row, real[row]], np.asarray(after)[row]])
        assert distance(logits, expected) <= 1e-5, row


def test_masks_and_mods_see_positions():
    """A mask and a bias of the absolute position, with left padding, against the text alone, in a cache and without."""

    def window(b, h, q, kv):
        return (q - kv < 3) & (q % 5 != 4)

    def penalty(scores, b, h, q, kv):
        return scores - 0.5 * (q - kv) + jnp.sin(q) + jnp.cos(3.0 * kv)

    self_mask = lambda b, h, q, kv: (kv <= q) & window(b, h, q, kv)
    model = build(lambda rngs: TransformerLM(rngs, SHALLOW, self_mask=self_mask))
    run = nnx.jit(lambda model, ids, **options: model(ids, score_mod=penalty, **options))
    # The first row is the text alone, for no token sees later tokens.
    ids, real = tokens(2, 10), np.arange(10) < np.array([[6], [10]])
    ids[1, 4:], real[1, :4] = ids[0, :6], False
    parts, caches = [], caches_of(SHALLOW, batch_size=2)
    for chunk in (slice(5), slice(5, 10)):
        logits, caches = run(model, ids[:, chunk], padding_mask=real[:, chunk], layer_kv_caches=caches)
        parts.append(logits)
    whole = np.asarray(run(model, ids, padding_mask=real))
    assert distance(whole[1, 4:], whole[0, :6]) <= 1e-5
    assert distance(np.concatenate(parts, axis=1)[real], whole[real]) <= 1e-5


@pytest.mark.parametrize(
    "fields", [{"attention_window": 3, "pos_emb_type": "alibi"}, {"pos_emb_type": "relative"}], ids=str
)
def test_every_option_goes_by_positions_with_holes_and_in_a_cache(fields):
    """Padding between the tokens: the same as the text alone, in one call and through a cache."""
    config = dataclasses.replace(SHALLOW, **fields)
    model, ids = make(config), tokens(2, 8)
    real = np.array([[1, 1, 1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 1, 1, 1]], bool)
    ids[1, real[1]] = ids[0, real[0]]  # no token sees later tokens, so the first row is the text alone
    whole = np.asarray(call(model, ids, padding_mask=real))
    assert distance(whole[1, real[1]], whole[0, real[0]]) <= 1e-5
    caches, parts = caches_of(config, batch_size=2), []
    for chunk in (slice(4), slice(4, 8)):
        logits, caches = call(model, ids[:, chunk], padding_mask=real[:, chunk], layer_kv_caches=caches)
        parts.append(logits)
    assert distance(np.concatenate(parts, axis=1)[real], whole[real]) <= 1e-5


@pytest.mark.contract
def test_given_positions_and_a_padding_mask_agree():
    model = make(SHALLOW)
    ids, real = tokens(2, 11), np.ones((2, 11), bool)
    real[0, :4] = False
    expected = np.asarray(call(model, ids, padding_mask=real))
    positions = np.where(real, np.cumsum(real, axis=1) - 1, -1)
    np.testing.assert_array_equal(call(model, ids, position_ids=positions), expected)
    shifted = np.cumsum(real, axis=1) - 1  # padding is found by the mask alone
    both = np.asarray(call(model, ids, position_ids=shifted, padding_mask=real))
    np.testing.assert_array_equal(both[0, 4:], expected[0, 4:])
    caches = caches_of(SHALLOW, batch_size=2)
    cached, _ = call(model, ids, position_ids=shifted, padding_mask=real, layer_kv_caches=caches)
    assert distance(cached[0, 4:], expected[0, 4:]) <= 1e-5


def test_nan_in_padding_does_not_reach_real_tokens():
    model = build(lambda rngs: TransformerLM(rngs, dataclasses.replace(CONFIG, tie_embeddings=False)))
    table = model.decoder.embed.tokens.embedding
    table[...] = jax.device_put(np.where(np.arange(23)[:, None] == 22, np.nan, table[...]))
    ids = np.array([[22, 22, 1, 2, 3]])
    real = np.array([[False, False, True, True, True]])
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    @jax.jit
    def run(params):
        def loss(params):
            logits = nnx.merge(graphdef, params, rest)(ids, padding_mask=real)
            return jnp.where(real[..., None], logits, 0.0).sum(), logits

        return jax.value_and_grad(loss, has_aux=True)(params)

    (_, logits), grads = run(params)
    assert np.isfinite(logits)[0, 2:].all()
    # Weights see 0 * NaN where a layer multiplies padding; only attention could carry it to real tokens.
    grad = np.asarray(nnx.to_pure_dict(grads)["decoder"]["embed"]["tokens"]["embedding"])
    assert np.isfinite(grad[1:4]).all() and (grad[1:4] != 0).any()


class TestOverflow:
    update = staticmethod(jax.jit(attnax.update_kv_layer_cache))

    def cache(self, max_len=5):
        return attnax.init_kv_layer_cache(1, 1, 2, max_len)

    def test_concrete_overflow_raises(self):
        new = np.ones((1, 1, 3, 2), np.float32)
        cache = self.update(self.cache(), new, new)
        with pytest.raises(ValueError, match="3 tokens from slot 3 do not fit into a cache of max_len=5"):
            attnax.update_kv_layer_cache(cache, jnp.asarray(new), jnp.asarray(new))

    def test_traced_overflow_drops_the_write_and_stays_marked(self):
        new = np.ones((1, 1, 3, 2), np.float32)
        full = self.update(self.cache(), new, new)
        over = self.update(full, 2 * new, 2 * new)
        np.testing.assert_array_equal(over.keys, full.keys)
        np.testing.assert_array_equal(over.positions, full.positions)
        assert int(over.length) == 3 and over.overflowed
        assert self.update(over, new[:, :, :1], new[:, :, :1]).overflowed
        too_long = np.ones((1, 1, 6, 2), np.float32)
        assert self.update(self.cache(), too_long, too_long).overflowed

    def test_outputs_turn_nan(self):
        run, ids, real = compiled("llama-like"), tokens(length=CHUNK), np.ones((BATCH, CHUNK), bool)
        caches = caches_of(CONFIG)  # for 19 tokens
        for fits in (True, True, False):
            logits, caches = run(ids, padding_mask=real, layer_kv_caches=caches)
            assert (np.isfinite(logits) == fits).all() and bool(caches[1].overflowed) == (not fits)

    def test_learned_positions_end_with_their_table_though_the_cache_goes_on(self):
        model = make(VARIANTS["gpt-like"])
        positions = np.where(np.arange(40) < 19, np.arange(40), -1)[None].astype(np.int32)
        caches = tuple(
            dataclasses.replace(cache, length=jax.device_put(np.int32(19)), positions=jnp.asarray(positions))
            for cache in caches_of(model.decoder.config, batch_size=1, max_len=40)
        )
        with pytest.raises(ValueError, match="positions must be at least 0 and below 19; got 19"):
            model(tokens(1, 1), layer_kv_caches=caches)

    @pytest.mark.usefixtures("unchecked_shapes")
    def test_wrong_shapes_are_refused_in_words(self):
        new = jax.device_put(np.ones((1, 1, 3, 4), np.float32))
        with pytest.raises(
            ValueError, match=r"keys_new must have shape .*\(1, 1, 3, 2\); got keys_new.shape=\(1, 1, 3, 4\)"
        ):
            attnax.update_kv_layer_cache(self.cache(), new, new)
        with pytest.raises(ValueError, match="max_len must be at least 1; got max_len=0"):
            self.cache(max_len=0)

    def test_start_and_positions_can_be_given(self):
        @jax.jit
        def write(cache, new):
            cache = attnax.update_kv_layer_cache(cache, new, new, 3, positions=np.array([[-1, 0]]))
            return cache, cache.next_positions()

        cache, following = write(self.cache(), np.ones((1, 1, 2, 2), np.float32))
        assert cache.positions.tolist() == [[-1, -1, -1, -1, 0]] and int(cache.length) == 5
        assert following.tolist() == [1]


@pytest.mark.parametrize("graph", [True, False])
@variants
@pytest.mark.thorough
def test_both_nnx_modes_give_the_same(variant, graph):
    ids = tokens()
    expected = compiled(variant)(ids)
    with nnx.set_graph_mode(graph):
        model = build(lambda rngs: TransformerLM(rngs, VARIANTS[variant]))
        np.testing.assert_allclose(model(ids), expected, atol=1e-5)
        graphdef, params, rest = nnx.split(model, nnx.Param, ...)

        @jax.jit
        def run(params):
            def loss(params):
                logits = nnx.merge(graphdef, params, rest)(ids)
                return jax.nn.log_softmax(logits)[..., 3].sum(), logits

            return jax.value_and_grad(loss, has_aux=True)(params)

        (_, logits), grads = run(params)
        np.testing.assert_allclose(logits, expected, atol=1e-5)
        assert all(np.isfinite(g).all() and np.any(np.asarray(g) != 0) for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("graph", [True, pytest.param(False, marks=pytest.mark.contract)], ids=["graph", "tree"])
def test_dropout_in_training_uses_explicit_rngs(graph):
    config = dataclasses.replace(SHALLOW, dropout_rate=0.3)
    with nnx.set_graph_mode(graph):
        graphdef, params, rest = nnx.split(build(lambda rngs: TransformerLM(rngs, config)), nnx.Param, ...)

        @jax.jit
        def run(params, key):
            model = nnx.merge(graphdef, params, rest)
            return model(tokens(), deterministic=False, rngs=nnx.Rngs(dropout=key))

        one, two, other = (np.asarray(run(params, jax.random.key(seed))) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, two)
    assert not np.allclose(one, other)


def test_bfloat16_computes_in_bfloat16_with_float32_logits():
    config = dataclasses.replace(SHALLOW, dtype="bfloat16")
    model, untied = make(config), make(dataclasses.replace(config, tie_embeddings=False))
    assert {p.dtype for p in jax.tree.leaves(nnx.state(model, nnx.Param))} == {jnp.dtype("float32")}
    caches = caches_of(config, batch_size=2)
    assert caches[0].keys.dtype == jnp.bfloat16

    @nnx.jit
    def run(model, untied, ids, caches):
        return {
            "hidden": model.decoder(ids),
            "logits": model(ids),
            "cached": model(ids, layer_kv_caches=caches)[0],
            "untied": untied(ids),
        }

    out = run(model, untied, tokens(2, 13), caches)
    assert out["hidden"].dtype == jnp.bfloat16 and out["logits"].dtype == jnp.float32
    logits = np.asarray(out["untied"])
    assert logits.dtype == np.float32 and (logits != logits.astype(jnp.bfloat16).astype(np.float32)).any()
    assert distance(out["cached"], out["logits"]) < 2e-2


@pytest.mark.parametrize("variant", ["llama-like", pytest.param("gpt-like", marks=pytest.mark.contract)])
def test_a_mask_of_the_call_is_read_at_indices(variant):
    """Packed documents whose positions begin anew, against each alone."""
    run, ids = compiled(variant), tokens(1, 7)
    documents, positions = np.array([[4, 4, 4, 9, 9, 9, 9]]), np.array([[0, 1, 2, 0, 1, 2, 3]])
    packed = run(ids, mask=attnax.masks.documents(documents), position_ids=positions)
    one, other = alone(run, [ids[0, :3], ids[0, 3:]])
    assert distance(packed[0], np.concatenate([one, other])) <= 1e-5


def test_a_mask_of_the_call_is_refused_with_caches():
    with pytest.raises(ValueError, match="with caches, mask must be a boolean array over .* so far; got Causal"):
        caches = caches_of(SHALLOW, batch_size=1)
        make(SHALLOW)(tokens(1, 7), mask=attnax.masks.causal(), layer_kv_caches=caches)


def test_log_probs_are_normalised():
    log_probs = nnx.jit(TransformerLM.log_probs)(make(SHALLOW), tokens())
    np.testing.assert_allclose(np.exp(log_probs).sum(-1), 1.0, atol=1e-5)


def test_positions_may_be_given():
    run, ids = compiled("gpt-like"), tokens()
    expected = run(ids)
    np.testing.assert_array_equal(run(ids, position_ids=np.arange(LENGTH)), expected)
    assert distance(run(ids, position_ids=np.arange(LENGTH) + 3), expected) > 1e-3


def test_per_row_results_do_not_depend_on_the_neighbours():
    run, ids = compiled("llama-like"), tokens()
    np.testing.assert_array_equal(run(ids[::-1])[::-1], run(ids))


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda model: model(np.zeros(3, int)), r"input_ids must be \(batch, length\); got shape \(3,\)"),
        (lambda model: model(np.zeros((1, 20), int)), "must not be longer than max_len=19; got 20 tokens"),
        (lambda model: model(np.full((1, 3), 23)), "token ids must be at least 0 and below 23; got 23"),
        (lambda model: model(np.zeros((1, 3))), "token ids must be integers; got dtype=float32"),
        (lambda model: model(np.zeros((1, 3), int), padding_mask=np.ones((1, 3))), "padding_mask must be boolean"),
        (lambda model: model(np.zeros((1, 3), int), padding_mask=np.ones((1, 4), bool)), "got shape=.1, 4."),
        (lambda model: model(np.zeros((1, 3), int), layer_kv_caches=()), "one cache a layer; got 0 for num_layers=2"),
        (lambda model: model(np.zeros((1, 3), int), position_ids=np.arange(4)), r"position_ids must be integers of"),
        (lambda model: model(np.zeros((1, 3), int), position_ids=np.ones((1, 3))), "dtype=float32"),
        (lambda model: TransformerDecoder(nnx.Rngs(0), vocab_size=3, max_length=5), "Did you mean max_len?"),
    ],
)
def test_wrong_input_is_refused_in_words(call, words):
    with pytest.raises(ValueError, match=words.replace("?", r"\?")):
        call(make(CONFIG))


IMAGES = {"image_size": 4, "patch_size": 2, "d_model": 12, "num_heads": 3, "num_layers": 1, "d_ff": 5}


@pytest.mark.parametrize(
    ("make", "inputs", "logits"),
    [
        (lambda rngs: TransformerLM(rngs, SHALLOW), [(2, 5)], (2, 5, 23)),
        (lambda rngs: MaskedLM(rngs, SHALLOW), [(2, 5)], (2, 5, 23)),
        (lambda rngs: attnax.Transformer(rngs, SHALLOW, SHALLOW), [(2, 7), (2, 5)], (2, 5, 23)),
        (lambda rngs: VisionTransformer(rngs, num_classes=7, **IMAGES), [(2, 4, 4, 3)], (2, 7)),
        (lambda rngs: VisionTransformer(rngs, num_classes=None, **IMAGES), [(2, 4, 4, 3)], None),
    ],
    ids=["language", "masked", "encoder-decoder", "vision with classes", "vision"],
)
def test_run_gives_hidden_states_and_logits_apart(make, inputs, logits):
    arrays = [jax.ShapeDtypeStruct(shape, "float32" if len(shape) == 4 else "int32") for shape in inputs]
    out, called = jax.eval_shape(lambda *arrays: ((model := make(nnx.Rngs(0))).run(*arrays), model(*arrays)), *arrays)
    assert out.hidden.shape == (2, 5, 12)
    assert (None if out.logits is None else out.logits.shape) == logits
    assert called.shape == (out.hidden.shape if logits is None else logits)
