"""Generation: the tokens of the slow way, one compilation, rows on their own, samplers that keep their promise."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from attnax import Sampler, TransformerConfig, TransformerLM
from attnax.generation import samplers

CONFIG = TransformerConfig(
    vocab_size=23,
    d_model=12,
    num_heads=3,
    num_kv_heads=1,
    num_layers=2,
    d_ff=20,
    max_len=31,
    dropout_rate=0.0,
    pos_emb_type="rope",
    norm_type="rms",
)


@pytest.fixture(scope="module")
def model():
    return TransformerLM(nnx.Rngs(3), CONFIG)


def prompt(batch=2, length=5, seed=0):
    return jax.random.randint(jax.random.key(seed), (batch, length), 0, CONFIG.vocab_size)


def test_greedy_tokens_are_those_of_the_full_forward(model):
    ids = prompt()
    generation = model.generate(ids, max_new_tokens=7)
    call = nnx.jit(lambda model, ids: model(ids))
    for index in range(7):
        padded = jnp.pad(ids, ((0, 0), (0, 12 - ids.shape[1])))  # one shape: what comes after is not seen
        logits = call(model, padded)[:, ids.shape[1] - 1]
        token = logits.argmax(-1)
        np.testing.assert_array_equal(generation.tokens[:, index], token)
        log_probs = jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=-1)[:, 0]
        np.testing.assert_allclose(generation.log_probs[:, index], log_probs, atol=1e-5)
        ids = jnp.concatenate([ids, token[:, None]], axis=1)
    assert generation.lengths.tolist() == [7, 7]


def test_a_generation_is_one_compilation_and_the_next_is_none(model, count_compilations):
    first = dataclasses.replace(CONFIG, d_ff=21)
    model = TransformerLM(nnx.Rngs(3), first)
    options = {"max_new_tokens": 6, "sampler": Sampler(0.7, top_k=5, top_p=0.9), "key": jax.random.key(0)}
    warm_up = TransformerLM(nnx.Rngs(3), dataclasses.replace(CONFIG, d_ff=22))
    warm_up.generate(prompt(), **options)  # compiles the small eager operations around the program
    del count_compilations[:]
    model.generate(prompt(), **options)
    assert len(count_compilations) == 1
    del count_compilations[:]
    options["sampler"], options["key"] = Sampler(1, top_k=3, top_p=0.5), jax.random.key(1)
    model.generate(prompt(seed=1), **options)
    TransformerLM(nnx.Rngs(4), first).generate(prompt(seed=2), **options)
    assert not count_compilations


def test_streaming_gives_the_same_tokens(model):
    options = {"max_new_tokens": 6, "sampler": Sampler(1.0), "key": jax.random.key(5)}
    streamed = np.stack(list(model.stream(prompt(), **options)), axis=1)
    np.testing.assert_array_equal(streamed, model.generate(prompt(), **options).tokens)


def test_the_end_token_ends_a_row_and_then_all(model):
    free = model.generate(prompt(), max_new_tokens=9)
    end = int(free.tokens[0, 2])
    generation = model.generate(prompt(), max_new_tokens=9, end_token=end)
    for row in range(2):
        found = np.flatnonzero(free.tokens[row] == end)
        length = found[0] + 1 if found.size else 9
        assert generation.lengths[row] == length
        np.testing.assert_array_equal(generation.tokens[row, :length], free.tokens[row, :length])
        assert (generation.tokens[row, length:] == end).all() and (generation.log_probs[row, length:] == 0).all()
    alone = list(model.stream(prompt()[:1], max_new_tokens=9, end_token=end))
    assert len(alone) == generation.lengths[0] <= 3 and alone[-1][0] == end


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_prompts_give_what_they_give_alone(model, side):
    ids, lengths = prompt(3, 6), (6, 2, 4)
    real = np.stack([np.arange(6) >= 6 - n if side == "left" else np.arange(6) < n for n in lengths])
    keys = jax.random.split(jax.random.key(1), 3)
    options = {"max_new_tokens": 8, "sampler": Sampler(1.0, top_p=0.9)}
    together = model.generate(ids, padding_mask=real, key=keys, **options)
    for row in range(3):
        alone = model.generate(ids[row, real[row]][None], key=keys[row : row + 1], **options)
        np.testing.assert_array_equal(together.tokens[row], alone.tokens[0])
        np.testing.assert_allclose(together.log_probs[row], alone.log_probs[0], atol=1e-5)


def test_a_row_keeps_its_tokens_whatever_its_place(model):
    ids, keys = prompt(4, 5), jax.random.split(jax.random.key(1), 4)
    order = jnp.array([2, 0, 3, 1])
    options = {"max_new_tokens": 8, "sampler": Sampler(1.0)}
    straight = model.generate(ids, key=keys, **options)
    shuffled = model.generate(ids[order], key=keys[order], **options)
    np.testing.assert_array_equal(shuffled.tokens, straight.tokens[order])


def test_one_key_gives_every_row_its_own(model):
    same = jnp.broadcast_to(prompt(1, 5), (5, 5))
    tokens = model.generate(same, max_new_tokens=8, sampler=Sampler(1.0), key=jax.random.key(0)).tokens
    assert len({tuple(row) for row in tokens.tolist()}) == 5
    fewer = model.generate(same[:2], max_new_tokens=8, sampler=Sampler(1.0), key=jax.random.key(0)).tokens
    np.testing.assert_array_equal(fewer, tokens[:2])


def test_generation_leaves_the_model_alone(model):
    model.train()
    before = jax.tree.map(jnp.copy, nnx.state(model))
    model.generate(prompt(), max_new_tokens=3)
    jax.tree.map(np.testing.assert_array_equal, before, nnx.state(model))
    model.eval()


def draw(sampler, logits, count=20_000):
    keys = jax.random.split(jax.random.key(0), count)
    tokens = jax.jit(sampler)(jnp.broadcast_to(jnp.asarray(logits), (count, len(logits))), keys)
    return np.bincount(tokens, minlength=len(logits)) / count


LOGITS = np.log(np.array([0.4, 0.3, 0.2, 0.06, 0.04], np.float32))


@pytest.mark.parametrize(
    ("sampler", "expected"),
    [
        (Sampler(1.0), [0.4, 0.3, 0.2, 0.06, 0.04]),
        (Sampler(0.0), [1, 0, 0, 0, 0]),
        (Sampler(0.5), np.array([16, 9, 4, 0.36, 0.16]) / 29.52),
        (Sampler(1.0, top_k=2), [4 / 7, 3 / 7, 0, 0, 0]),
        (Sampler(1.0, top_k=99), [0.4, 0.3, 0.2, 0.06, 0.04]),
        (Sampler(1.0, top_p=0.65), [4 / 7, 3 / 7, 0, 0, 0]),
        (Sampler(1.0, top_p=0.75), [4 / 9, 3 / 9, 2 / 9, 0, 0]),
        (Sampler(1.0, top_p=1e-6), [1, 0, 0, 0, 0]),
        (Sampler(1.0, top_k=3, top_p=0.7), [4 / 7, 3 / 7, 0, 0, 0]),
    ],
)
def test_samplers_draw_from_their_distribution(sampler, expected):
    np.testing.assert_allclose(draw(sampler, LOGITS), expected, atol=0.015)


@settings(deadline=None, max_examples=50, derandomize=True)
@given(st.lists(st.floats(-5, 5, width=32), min_size=5, max_size=5), st.integers(1, 5), st.floats(0.01, 1.0))
def test_cuts_keep_the_likeliest(logits, k, p):
    logits = np.array([logits], np.float32)
    kept = np.asarray(samplers.keep_top_k(jnp.asarray(logits), k))[0] > -np.inf
    assert kept.sum() >= k and (logits[0][kept].min() > logits[0][~kept].max(initial=-np.inf) or kept.all())
    kept = np.asarray(samplers.keep_top_p(jnp.asarray(logits), p))[0] > -np.inf
    mass = np.exp(logits[0].astype(np.float64))
    mass /= mass.sum()
    assert kept.any() and mass[kept].sum() >= p - 1e-5 and mass[kept].sum() - mass[kept].min() < p + 1e-5
    assert kept.all() or mass[kept].min() >= mass[~kept].max()


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1; got max_new_tokens=0"),
        ({"prompt_ids": jnp.zeros((1, 0), int)}, "with at least one token"),
        ({"prompt_ids": jnp.array([[23]])}, "token ids must be at least 0 and below 23; got 23"),
        ({"sampler": Sampler(1.0)}, "sampling needs a key; got temperature=1.0"),
        ({"key": jax.random.split(jax.random.key(0), 3)}, r"one typed key .* or one a row, here 2; got shape=\(3,\)"),
        ({"key": jax.random.PRNGKey(0)}, "got shape=.2,., dtype=uint32"),
        ({"padding_mask": np.zeros((2, 5), bool)}, "with a real token in every row"),
        ({"padding_mask": np.ones((2, 4), bool)}, "got shape=.2, 4."),
    ],
)
def test_wrong_input_is_refused_in_words(model, options, words):
    options = {"prompt_ids": prompt(), "max_new_tokens": 3, **options}
    with pytest.raises(ValueError, match=words):
        model.generate(options.pop("prompt_ids"), **options)


def test_a_position_table_cannot_be_left():
    model = TransformerLM(nnx.Rngs(3), dataclasses.replace(CONFIG, pos_emb_type="learned", max_len=7))
    assert jnp.isfinite(model.generate(prompt(), max_new_tokens=3).log_probs).all()  # positions 0 to 6
    with pytest.raises(ValueError, match="must fit into the 7 positions of the model; got 5 . 4"):
        model.generate(prompt(), max_new_tokens=4)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"temperature": -1.0}, "temperature must be at least 0 and finite; got temperature=-1.0"),
        ({"top_k": 0}, "top_k must be at least 1 and below .*; got top_k=0"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1"),
        ({"top_p": 1.5}, "top_p must be above 0 and at most 1; got top_p=1.5"),
    ],
)
def test_samplers_refuse_values_out_of_range(fields, words):
    with pytest.raises(ValueError, match=words):
        Sampler(**fields)
