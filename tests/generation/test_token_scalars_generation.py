"""A model whose scores read numbers of its tokens writes the same with every cache as without one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import build

from attnax import MultiHeadAttention, Transformer, TransformerConfig, TransformerLM
from attnax.cache import EmptyCache, ScalarCache, init_kv_layer_cache
from attnax.models.planned_caches import scalar_heads
from attnax.nn import with_scan_layers
from attnax.pretrained import load_caches, save_caches

SIZES = {"vocab_size": 11, "d_model": 8, "num_heads": 2, "num_layers": 2, "d_ff": 6, "max_len": 64}
OPTIONS = {"pos_emb_type": "none", "dropout_rate": 0.0}
PROMPT = np.array([[0, 3, 5, 8, 1], [7, 2, 9, 4, 6]])
REAL = np.array([[False, True, True, True, True], [True] * 5])
NEW = 6


class ForgetGate(nnx.Module):
    cumulative = True

    def __init__(self, rngs):
        self.gate = nnx.Linear(8, 2, rngs=rngs)

    def __call__(self, x):
        return jax.nn.log_sigmoid(3 * self.gate(x)).swapaxes(1, 2)

    def mod(self, scores, b, h, q, kv, of_query, of_key):
        return scores + of_query - of_key


def forgetting(model, blocks):
    for block in blocks:
        block.attention = build(
            lambda rngs, config=block.attention.config: MultiHeadAttention(rngs, config, token_scalars=ForgetGate(rngs))
        )
    return model


@functools.cache
def make_model(num_layers=2, window=None):
    pattern = () if window is None else ({"attention_window": window}, {})
    fields = SIZES | OPTIONS | {"num_layers": num_layers, "layer_pattern": pattern}
    model = build(lambda rngs: TransformerLM(rngs, **fields), seed=3)
    return forgetting(model, model.decoder.stack.blocks)


@functools.partial(jax.jit, static_argnames="graphdef")
def likeliest(graphdef, state, ids, real):
    return nnx.merge(graphdef, state)(ids, padding_mask=real).argmax(-1)


def check_greedy(model, tokens, prompt=PROMPT, real=REAL):
    """The tokens are those that the model without a cache finds likeliest, one after the other."""
    ids = np.concatenate([prompt, tokens], axis=1)
    real = np.pad(real, ((0, 0), (0, tokens.shape[1])), constant_values=True)
    want = likeliest(*nnx.split(model), ids, real)[:, prompt.shape[1] - 1 : -1]
    np.testing.assert_array_equal(tokens, want)


QUICK = [("contiguous", None), ("ring", 2), ("paged", None)]
THOROUGH = [("contiguous", 2), ("ring", None), ("paged", 2)]


@pytest.mark.parametrize(
    ("kind", "chunk"), [*QUICK, *(pytest.param(*case, marks=pytest.mark.thorough) for case in THOROUGH)]
)
def test_generation_gives_the_tokens_of_the_model_without_a_cache(kind, chunk):
    model = make_model()
    options = {"padding_mask": REAL, "cache": kind, "prefill_chunk": chunk}
    check_greedy(model, np.asarray(model.generate(PROMPT, max_new_tokens=NEW, **options).tokens))


def test_forgetting_changes_the_text():
    plain = build(lambda rngs: TransformerLM(rngs, **SIZES, **OPTIONS), seed=3)
    model = make_model()
    state = nnx.state(model)
    bare = {
        name: state["decoder"]["stack"]["blocks"][0]["attention"][name] for name in ("query", "key", "value", "out")
    }
    for block in plain.decoder.stack.blocks:
        nnx.update(block.attention, nnx.State(bare))
    ids, real = PROMPT, np.ones_like(REAL)
    assert (likeliest(*nnx.split(model), ids, real) != likeliest(*nnx.split(plain), ids, real)).any()


def test_layers_in_one_loop_and_windows_generate_the_same():
    model = make_model(num_layers=4, window=3)
    scanned = with_scan_layers(model, True)
    written = scanned.generate(PROMPT, max_new_tokens=40, padding_mask=REAL, prefill_chunk=2, return_caches=True)
    check_greedy(model, np.asarray(written.tokens))
    first, second = written.caches.layers[:2]
    assert isinstance(first, ScalarCache) and first.window == 3 and second.window is None


def test_drafts_beams_and_samples_choose_and_take_back_numbers():
    model = make_model()
    drafted = model.generate(PROMPT, max_new_tokens=NEW, padding_mask=REAL, draft=make_model(num_layers=1))
    check_greedy(model, np.asarray(drafted.tokens))
    with pytest.raises(ValueError, match="with a draft a cache must use the slots of rejected tokens again"):
        caches = model.prefill(PROMPT)
        model.generate(None, max_new_tokens=1, caches=caches, draft=model)
    samples = model.generate(PROMPT, max_new_tokens=NEW, padding_mask=REAL, num_samples=2)
    check_greedy(model, np.asarray(samples.tokens), PROMPT.repeat(2, 0), REAL.repeat(2, 0))
    beams = model.beam_search(PROMPT, num_beams=3, max_new_tokens=NEW, padding_mask=REAL)
    ids = np.concatenate([PROMPT.repeat(3, 0), beams.tokens.reshape(6, NEW)], axis=1)
    real = np.pad(REAL.repeat(3, 0), ((0, 0), (0, NEW)), constant_values=True)
    log_probs = model.log_probs(ids, padding_mask=real)[:, 4:-1]
    scores = np.take_along_axis(np.asarray(log_probs), ids[:, 5:, None], axis=2)[..., 0].mean(1)
    np.testing.assert_allclose(beams.scores.reshape(6), scores, atol=1e-5)


def test_a_text_goes_on_from_saved_caches(tmp_path):
    model = make_model()
    first = model.generate(PROMPT, max_new_tokens=NEW, padding_mask=REAL, return_caches=True)
    save_caches(tmp_path / "caches.safetensors", first.caches)
    caches = load_caches(tmp_path / "caches.safetensors")
    rest = model.generate(None, max_new_tokens=70, caches=caches)  # more than the first caches have room for
    check_greedy(model, np.concatenate([first.tokens, rest.tokens], axis=1)[:, :50])


def test_a_decoder_with_an_encoder_generates_the_same():
    config = TransformerConfig(**SIZES, **OPTIONS)
    model = build(lambda rngs: Transformer(rngs, config, config))
    forgetting(model, model.decoder.stack.blocks)
    written = np.asarray(model.generate(PROMPT, NEW, 1).tokens)
    target = np.concatenate([np.ones((2, 1), int), written], axis=1)
    want = nnx.jit(lambda model: model(PROMPT, target))(model).argmax(-1)[:, :-1]
    np.testing.assert_array_equal(written, want)


def test_a_plan_knows_the_heads_of_every_layer():
    model = make_model()
    mixed = build(lambda rngs: TransformerLM(rngs, **(SIZES | OPTIONS | {"num_layers": 3})))
    forgetting(mixed, mixed.decoder.stack.blocks[1:2])
    assert scalar_heads(mixed.decoder.stack) == (0, 2, 0)
    assert scalar_heads(with_scan_layers(model, True).decoder.stack) == (2, 2)
    caches = tuple(EmptyCache(init_kv_layer_cache(2, 2, 4, 8)) for _ in range(2))
    with pytest.raises(ValueError, match=r"kv_cache must be a ScalarCache with as many; got KVLayerCache"):
        jax.eval_shape(lambda: model(jnp.asarray(PROMPT), layer_kv_caches=caches))


def test_a_contiguous_cache_with_numbers_is_refused_with_a_draft():
    model = make_model()
    with pytest.raises(ValueError, match="must use the slots of rejected tokens again; got cache='contiguous'"):
        model.generate(PROMPT, max_new_tokens=3, draft=model, cache="contiguous")
