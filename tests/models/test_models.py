"""Models: what a token may depend on, caches that change nothing, padding that is not there, both NNX modes."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import attnax
from attnax import TransformerConfig, TransformerDecoder, TransformerLM

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


@pytest.fixture(scope="module")
def models():
    """The variants, and their calls compiled; a call with caches takes traced ids and positions."""
    built = {name: TransformerLM(nnx.Rngs(1), config) for name, config in VARIANTS.items()}
    return built, {name: nnx.jit(type(model).__call__) for name, model in built.items()}


def tokens(batch=2, length=13, seed=0):
    return jax.random.randint(jax.random.key(seed), (batch, length), 0, CONFIG.vocab_size)


def distance(actual, expected):
    return float(jnp.abs(actual - expected).max())


@variants
def test_a_token_depends_on_itself_and_what_came_before(models, variant):
    model, call = models[0][variant], models[1][variant]
    ids = tokens(1, 7)
    logits = call(model, ids)
    for changed in range(7):
        moved = jnp.abs(call(model, ids.at[0, changed].add(1) % CONFIG.vocab_size) - logits).max(-1)[0] > 0
        assert moved.tolist() == [token >= changed for token in range(7)]


@variants
@pytest.mark.parametrize("sizes", [(13,), (5, 8), (1,) * 13, (5, 1, 1, 6)], ids=str)
def test_any_chunks_through_the_cache_equal_the_whole(models, variant, sizes):
    model, call = models[0][variant], models[1][variant]
    ids, parts, start = tokens(), [], 0
    caches = attnax.init_decoder_kv_caches_from_config(model.config, batch_size=2)
    for size in sizes:
        logits, caches = call(model, ids[:, start : start + size], layer_kv_caches=caches)
        parts.append(logits)
        start += size
    assert distance(jnp.concatenate(parts, axis=1), call(model, ids)) <= 1e-5
    assert int(caches[0].length) == 13 and not caches[0].overflowed


@variants
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("cached", [False, True])
def test_padded_rows_give_what_they_give_alone(models, variant, side, cached):
    model, call = models[0][variant], models[1][variant]
    ids, lengths = tokens(3, 11), (11, 7, 2)
    real = np.zeros((3, 11), bool)
    for row, length in enumerate(lengths):
        real[row, slice(11 - length, None) if side == "left" else slice(length)] = True
    options = {}
    if cached:
        options["layer_kv_caches"] = attnax.init_decoder_kv_caches_from_config(model.config, batch_size=3)
    out = call(model, ids, padding_mask=jnp.asarray(real), **options)
    logits = out[0] if cached else out
    for row in range(3):
        alone = call(model, ids[row, real[row]][None])
        assert distance(logits[row, real[row]], alone[0]) <= 1e-5


def test_a_padded_prompt_goes_on_where_its_text_ended(models):
    """Prefill with left and right padding, then one token: the same logits as the unpadded text."""
    for variant in VARIANTS:
        model, call = models[0][variant], models[1][variant]
        ids, new = tokens(2, 5), tokens(2, 1, seed=9)
        for real in ([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]], [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]):
            real = np.array(real, bool)
            caches = attnax.init_decoder_kv_caches_from_config(model.config, batch_size=2)
            _, caches = call(model, ids, padding_mask=jnp.asarray(real), layer_kv_caches=caches)
            logits, _ = call(model, new, layer_kv_caches=caches)
            for row in range(2):
                alone = jnp.concatenate([ids[row, real[row]], new[row]])[None]
                assert distance(logits[row, 0], call(model, alone)[0, -1]) <= 1e-5


@pytest.mark.parametrize("cached", [False, True])
def test_masks_and_mods_see_positions(cached):
    """A mask and a bias of the absolute position, with left padding, against the text alone."""

    def window(b, h, q, kv):
        return (q - kv < 3) & (q % 5 != 4)

    def penalty(scores, b, h, q, kv):
        return scores - 0.5 * (q - kv) + jnp.sin(q) + jnp.cos(3.0 * kv)

    model = TransformerLM(nnx.Rngs(1), CONFIG, self_mask=lambda b, h, q, kv: (kv <= q) & window(b, h, q, kv))
    ids = tokens(2, 9)
    real = np.ones((2, 9), bool)
    real[0, :4] = False
    caches = attnax.init_decoder_kv_caches_from_config(CONFIG, batch_size=2)
    if cached:
        parts = []
        for chunk in (slice(5), slice(5, 9)):
            logits, caches = model(
                ids[:, chunk], padding_mask=jnp.asarray(real[:, chunk]), score_mod=penalty, layer_kv_caches=caches
            )
            parts.append(logits)
        logits = jnp.concatenate(parts, axis=1)
    else:
        logits = model(ids, padding_mask=jnp.asarray(real), score_mod=penalty)
    for row in range(2):
        alone = model(ids[row, real[row]][None], score_mod=penalty)
        assert distance(logits[row, real[row]], alone[0]) <= 1e-5


@pytest.mark.parametrize(
    "fields", [{"attention_window": 3}, {"pos_emb_type": "alibi"}, {"pos_emb_type": "relative"}], ids=str
)
def test_every_option_goes_by_positions_with_holes_and_in_a_cache(fields):
    """Padding between the tokens: the same as the text alone, in one call and through a cache."""
    config = dataclasses.replace(CONFIG, **fields)
    model, ids, real = TransformerLM(nnx.Rngs(1), config), tokens(1, 8), np.array([[1, 1, 0, 0, 0, 1, 1, 1]], bool)
    alone = model(ids[real][None])
    assert distance(model(ids, padding_mask=real)[real], alone[0]) <= 1e-5
    caches, parts = attnax.init_decoder_kv_caches_from_config(config, batch_size=1), []
    for chunk in (slice(4), slice(4, 8)):
        logits, caches = model(ids[:, chunk], padding_mask=real[:, chunk], layer_kv_caches=caches)
        parts.append(logits)
    assert distance(jnp.concatenate(parts, axis=1)[real], alone[0]) <= 1e-5


def test_given_positions_and_a_padding_mask_agree(models):
    model, call = models[0]["llama-like"], models[1]["llama-like"]
    ids, real = tokens(2, 11), np.ones((2, 11), bool)
    real[0, :4] = False
    expected = call(model, ids, padding_mask=jnp.asarray(real))
    positions = np.where(real, np.cumsum(real, axis=1) - 1, -1)
    np.testing.assert_array_equal(call(model, ids, position_ids=jnp.asarray(positions)), expected)
    shifted = np.cumsum(real, axis=1) - 1  # padding is found by the mask alone
    both = call(model, ids, position_ids=jnp.asarray(shifted), padding_mask=jnp.asarray(real))
    np.testing.assert_array_equal(both[0, 4:], expected[0, 4:])
    caches = attnax.init_decoder_kv_caches_from_config(model.config, batch_size=2)
    cached, _ = call(
        model, ids, position_ids=jnp.asarray(shifted), padding_mask=jnp.asarray(real), layer_kv_caches=caches
    )
    assert distance(cached[0, 4:], expected[0, 4:]) <= 1e-5


def test_nan_in_padding_does_not_reach_real_tokens():
    model = TransformerLM(nnx.Rngs(1), dataclasses.replace(CONFIG, tie_embeddings=False))
    embedding = model.decoder.embed.tokens.embedding
    embedding[...] = embedding[...].at[22].set(jnp.nan)
    ids = jnp.array([[22, 22, 1, 2, 3]])
    real = jnp.array([[False, False, True, True, True]])

    def loss(params, rest, graphdef):
        logits = nnx.merge(graphdef, params, rest)(ids, padding_mask=real)
        return jnp.where(real[..., None], logits, 0.0).sum(), logits

    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    (_, logits), grads = jax.value_and_grad(loss, has_aux=True)(params, rest, graphdef)
    assert jnp.isfinite(logits[0, 2:]).all()
    # Weights see 0 * NaN where a layer multiplies padding; what reaches the real tokens' vectors came by attention.
    grad = nnx.to_pure_dict(grads)["decoder"]["embed"]["tokens"]["embedding"]
    assert jnp.isfinite(grad[1:4]).all() and (grad[1:4] != 0).any()


class TestOverflow:
    def cache(self, max_len=5):
        return attnax.init_kv_layer_cache(1, 1, 2, max_len)

    def test_concrete_overflow_raises(self):
        new = jnp.ones((1, 1, 3, 2))
        cache = attnax.update_kv_layer_cache(self.cache(), new, new)
        with pytest.raises(ValueError, match="3 tokens from slot 3 do not fit into a cache of max_len=5"):
            attnax.update_kv_layer_cache(cache, new, new)

    def test_traced_overflow_drops_the_write_and_stays_marked(self):
        update = jax.jit(attnax.update_kv_layer_cache)
        new = jnp.ones((1, 1, 3, 2))
        full = update(self.cache(), new, new)
        over = update(full, 2 * new, 2 * new)
        np.testing.assert_array_equal(over.keys, full.keys)
        np.testing.assert_array_equal(over.positions, full.positions)
        assert over.length == 3 and over.overflowed
        assert update(over, new[:, :, :1], new[:, :, :1]).overflowed
        too_long = jnp.ones((1, 1, 6, 2))
        assert update(self.cache(), too_long, too_long).overflowed

    def test_outputs_turn_nan(self, models):
        model, call = models[0]["llama-like"], models[1]["llama-like"]
        caches = attnax.init_decoder_kv_caches_from_config(CONFIG, batch_size=2, max_len=7)
        logits, caches = call(model, tokens(2, 5), layer_kv_caches=caches)
        assert jnp.isfinite(logits).all()
        logits, caches = call(model, tokens(2, 5), layer_kv_caches=caches)
        assert jnp.isnan(logits).all() and caches[1].overflowed

    def test_learned_positions_end_with_their_table_though_the_cache_goes_on(self):
        model = TransformerLM(nnx.Rngs(1), VARIANTS["gpt-like"])
        caches = attnax.init_decoder_kv_caches_from_config(model.config, batch_size=1, max_len=40)
        _, caches = model(tokens(1, 19), layer_kv_caches=caches)
        with pytest.raises(ValueError, match="positions must be at least 0 and below 19; got 19"):
            model(tokens(1, 1), layer_kv_caches=caches)

    @pytest.mark.usefixtures("unchecked_shapes")
    def test_wrong_shapes_are_refused_in_words(self):
        new = jnp.ones((1, 1, 3, 4))
        with pytest.raises(ValueError, match=r"keys_new must have shape .*\(1, 1, 3, 2\); got \(1, 1, 3, 4\)"):
            attnax.update_kv_layer_cache(self.cache(), new, new)
        with pytest.raises(ValueError, match="max_len must be at least 1; got max_len=0"):
            self.cache(max_len=0)

    def test_start_and_positions_can_be_given(self):
        new = jnp.ones((1, 1, 2, 2))
        cache = attnax.update_kv_layer_cache(self.cache(), new, new, 3, positions=jnp.array([[-1, 0]]))
        assert cache.positions.tolist() == [[-1, -1, -1, -1, 0]] and cache.length == 5
        assert cache.next_positions().tolist() == [1]


@pytest.mark.parametrize("graph", [True, False])
@variants
@pytest.mark.thorough
def test_both_nnx_modes_give_the_same(models, variant, graph):
    ids = tokens()
    expected = models[1][variant](models[0][variant], ids)
    with nnx.set_graph_mode(graph):
        model = TransformerLM(nnx.Rngs(1), VARIANTS[variant])
        np.testing.assert_allclose(model(ids), expected, atol=1e-5)
        graphdef, params, rest = nnx.split(model, nnx.Param, ...)
        run = jax.jit(lambda params: nnx.merge(graphdef, params, rest)(ids))
        np.testing.assert_allclose(run(params), expected, atol=1e-5)
        grads = jax.grad(lambda params: jax.nn.log_softmax(run(params))[..., 3].sum())(params)
        assert all(jnp.isfinite(g).all() and (g != 0).any() for g in jax.tree.leaves(grads))


def test_dropout_in_training_uses_explicit_rngs_in_both_modes():
    config = dataclasses.replace(CONFIG, dropout_rate=0.3)
    for graph in (True, False):
        with nnx.set_graph_mode(graph):
            graphdef, params, rest = nnx.split(TransformerLM(nnx.Rngs(1), config), nnx.Param, ...)

            @jax.jit
            def run(params, key, graphdef=graphdef, rest=rest):
                model = nnx.merge(graphdef, params, rest)
                return model(tokens(), deterministic=False, rngs=nnx.Rngs(dropout=key))

            one, two, other = (run(params, jax.random.key(seed)) for seed in (1, 1, 2))
            np.testing.assert_array_equal(one, two)
            assert not jnp.allclose(one, other)


def test_bfloat16_computes_in_bfloat16_with_float32_logits():
    config = dataclasses.replace(CONFIG, dtype="bfloat16")
    model = TransformerLM(nnx.Rngs(1), config)
    hidden = model.decoder(tokens())
    assert hidden.dtype == jnp.bfloat16 and model(tokens()).dtype == jnp.float32
    untied = TransformerLM(nnx.Rngs(1), dataclasses.replace(config, tie_embeddings=False))(tokens())
    assert untied.dtype == jnp.float32 and (untied != untied.astype(jnp.bfloat16).astype(jnp.float32)).any()
    assert {p.dtype for p in jax.tree.leaves(nnx.state(model, nnx.Param))} == {jnp.dtype("float32")}
    caches = attnax.init_decoder_kv_caches_from_config(config, batch_size=2)
    assert caches[0].keys.dtype == jnp.bfloat16
    cached, _ = model(tokens(), layer_kv_caches=caches)
    assert distance(cached, model(tokens())) < 2e-2


def test_a_mask_of_the_call_is_read_at_indices(models):
    """Two packed documents whose positions begin anew, against each alone."""
    for variant in ("llama-like", "gpt-like"):
        model, call = models[0][variant], models[1][variant]
        ids, documents = tokens(1, 7), jnp.array([[4, 4, 4, 9, 9, 9, 9]])
        packed = call(
            model, ids, mask=attnax.masks.documents(documents), position_ids=jnp.array([[0, 1, 2, 0, 1, 2, 3]])
        )
        for part in (slice(3), slice(3, 7)):
            assert distance(packed[:, part], call(model, ids[:, part])) <= 1e-5
    with pytest.raises(ValueError, match="mask says who attends whom among these tokens, and caches hold others"):
        caches = attnax.init_decoder_kv_caches_from_config(model.config, batch_size=1)
        model(ids, mask=attnax.masks.causal(), layer_kv_caches=caches)


def test_log_probs_are_normalised(models):
    log_probs = models[0]["llama-like"].log_probs(tokens())
    np.testing.assert_allclose(jnp.exp(log_probs).sum(-1), 1.0, atol=1e-5)


def test_positions_may_be_given(models):
    model = models[0]["gpt-like"]
    ids = tokens(1, 5)
    np.testing.assert_array_equal(model(ids, position_ids=jnp.arange(5)), model(ids))
    assert distance(model(ids, position_ids=jnp.arange(5) + 3), model(ids)) > 1e-3


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda model: model(jnp.zeros(3, int)), r"input_ids must be \(batch, length\); got shape \(3,\)"),
        (lambda model: model(jnp.zeros((1, 20), int)), "must not be longer than max_len=19; got 20 tokens"),
        (lambda model: model(jnp.full((1, 3), 23)), "token ids must be at least 0 and below 23; got 23"),
        (lambda model: model(jnp.zeros((1, 3))), "token ids must be integers; got dtype=float32"),
        (lambda model: model(jnp.zeros((1, 3), int), padding_mask=jnp.ones((1, 3))), "padding_mask must be boolean"),
        (lambda model: model(jnp.zeros((1, 3), int), padding_mask=jnp.ones((1, 4), bool)), "got shape=.1, 4."),
        (
            lambda model: model(jnp.zeros((1, 3), int), layer_kv_caches=()),
            "one cache a layer; got 0 for num_layers=2",
        ),
        (lambda model: model(jnp.zeros((1, 3), int), position_ids=jnp.arange(4)), r"position_ids must be integers of"),
        (lambda model: model(jnp.zeros((1, 3), int), position_ids=jnp.ones((1, 3))), "dtype=float32"),
        (lambda model: TransformerDecoder(nnx.Rngs(0), vocab_size=3, max_length=5), "Did you mean max_len?"),
    ],
)
def test_wrong_input_is_refused_in_words(models, call, words):
    with pytest.raises(ValueError, match=words.replace("?", r"\?")):
        call(models[0]["llama-like"])


def test_per_row_results_do_not_depend_on_the_neighbours(models):
    call = partial(models[1]["llama-like"], models[0]["llama-like"])
    ids = tokens(2, 7)
    swapped = call(ids[::-1])[::-1]
    np.testing.assert_array_equal(call(ids), swapped)
