"""A call's `self_mask` takes the place of the model's own, at positions; other models take the masks that they can."""

import jax
import numpy as np
import pytest
from flax import nnx
from tiny import build

from attnax import TransformerConfig, TransformerEncoder, TransformerLM, VisionTransformer
from attnax.cache import EmptyCache, init_decoder_kv_caches_from_config
from attnax.kernels.score_mods import mask_mod_to_score_mod
from attnax.masks import as_mask, causal, documents, sliding_window
from attnax.models import MaskedLM

CONFIG = TransformerConfig(vocab_size=11, d_model=8, num_heads=2, num_layers=2, d_ff=12, max_len=32)
RNG = np.random.default_rng(0)
IDS = RNG.integers(0, 11, (2, 7))
REAL = np.array([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]], bool)
KEEP = (RNG.random((2, 1, 12, 12)) < 0.5) | np.eye(12, dtype=bool)
POSITIONS = np.where(REAL, np.cumsum(REAL, axis=1) - 1, 0)
# KEEP at the positions of the tokens.
THERE = KEEP[np.arange(2)[:, None, None], 0, POSITIONS[:, :, None], POSITIONS[:, None]][:, None]


@jax.jit
def call(model, options):
    return model(IDS, padding_mask=REAL, **options)


@pytest.mark.parametrize("kind", [TransformerLM, TransformerEncoder, MaskedLM])
def test_a_self_mask_replaces_and_a_mask_narrows(kind):
    model = build(lambda rngs: kind(rngs, CONFIG))
    everything = as_mask(lambda b, h, q, kv: kv >= 0)
    replaced = np.asarray(call(model, {"self_mask": KEEP[..., :7, :7], "mask": sliding_window(5)}))
    index = np.arange(7)
    narrow = THERE & (index[:, None] - index < 5) & (index[:, None] >= index)
    want = np.asarray(call(model, {"self_mask": everything, "mask": narrow}))
    np.testing.assert_allclose(replaced[REAL], want[REAL], atol=1e-5)
    assert not np.allclose(replaced[REAL], np.asarray(call(model, {"mask": narrow | True}))[REAL], atol=1e-2)


def test_a_self_mask_is_read_at_positions_through_a_cache():
    """The arrays have more positions than the cache has room for, and as many as a chunk has tokens."""
    model = build(lambda rngs: TransformerLM(rngs, CONFIG))
    keep, ids = KEEP & np.tri(12, dtype=bool), RNG.integers(0, 11, (2, 12))
    want = np.asarray(jax.jit(lambda: model(ids, self_mask=keep))())

    @jax.jit
    def read():
        caches, logits = init_decoder_kv_caches_from_config(CONFIG, batch_size=2, max_len=12), []
        caches = tuple(map(EmptyCache, caches))
        for chunk in (ids[:, :5], ids[:, 5:]):
            out, caches = model(chunk, self_mask=keep, layer_kv_caches=caches)
            logits.append(out)
        # Padding first: a chunk of as many tokens as the arrays have positions is no list of positions.
        padded = np.pad(ids[:, :7], ((0, 0), (5, 0)))
        whole = model(
            padded,
            position_ids=np.pad(np.arange(7), (5, 0), constant_values=-1),
            self_mask=keep,
            layer_kv_caches=init_decoder_kv_caches_from_config(CONFIG, batch_size=2, max_len=9, ring=True),
        )
        return jax.numpy.concatenate(logits, axis=1), whole[0][:, 5:]

    chunks, padded = read()
    np.testing.assert_allclose(chunks, want, atol=1e-5)
    np.testing.assert_allclose(padded, want[:, :7], atol=1e-5)


def test_arrays_shorter_than_the_caches_are_refused_in_words():
    model = build(lambda rngs: TransformerLM(rngs, CONFIG))
    caches = init_decoder_kv_caches_from_config(CONFIG, batch_size=2, max_len=16)
    with pytest.raises(ValueError, match="TransformerDecoder: arrays of self_mask must cover .* got 12 pos"):
        model(IDS, self_mask=KEEP, layer_kv_caches=caches)
    with pytest.raises(
        ValueError, match=r"documents need one id a token, \(length,\) or \(2, length\) for document_ids"
    ):
        model(IDS, self_mask=documents(np.zeros((3, 16), int)), layer_kv_caches=caches)


@pytest.mark.usefixtures("unchecked_shapes")
def test_positions_may_be_lists_of_one_length():
    model = build(lambda rngs: TransformerLM(rngs, CONFIG))
    places = np.arange(7)
    want, have = jax.jit(lambda: (model(IDS, position_ids=places), model(IDS, position_ids=places.tolist())))()
    np.testing.assert_array_equal(have, want)
    for wrong, words in (
        ([[0, 1], [0]], "position_ids must have rows of one length; got lists of several"),
        ([0, 1], r"position_ids must be integers of shape \(7,\) or \(2, 7\); got shape=\(2,\), dtype=int"),
        ([0.5] * 7, r"got shape=\(7,\), dtype=float"),
    ):
        with pytest.raises(ValueError, match=words):
            model(IDS, position_ids=wrong)


def test_a_vision_transformer_attends_what_a_mask_allows():
    config = {"image_size": 4, "patch_size": 2, "d_model": 8, "num_heads": 2, "num_layers": 2, "d_ff": 12}
    model = build(lambda rngs: VisionTransformer(rngs, **config, num_classes=3))
    images = RNG.normal(size=(1, 4, 4, 3)).astype(np.float32)

    @jax.jit
    def look():
        mask = causal()
        results = model(images, mask=mask), model(images, score_mod=mask_mod_to_score_mod(mask)), model(images)
        return *results, model.attention_weights(images, mask=mask)

    have, want, free, weights = look()
    np.testing.assert_allclose(have, want, atol=1e-5)
    assert not np.allclose(have, free, atol=1e-3)
    assert (np.asarray(weights)[..., ~np.tri(5, dtype=bool)] == 0).all()


def test_a_self_mask_reaches_the_log_probs():
    model = build(lambda rngs: TransformerLM(rngs, CONFIG))
    own = nnx.clone(model)
    own.decoder.self_mask = nnx.data(sliding_window(2))
    want, have = jax.jit(lambda: (own.log_probs(IDS), model.log_probs(IDS, self_mask=sliding_window(2))))()
    np.testing.assert_allclose(have, want, atol=1e-6)
