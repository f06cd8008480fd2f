"""A draw among a few candidates has the tokens of sorting the vocabulary, and a row may have numbers of its own."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from attnax import Sampler, generation
from attnax.generation import Text, candidates

ROWS = 16


def by_sorting(sampler, logits, keys):
    """The definition: each cut sorts all logits, and the draw is that of JAX. Returns the tokens and the cut logits."""
    size = logits.shape[-1]
    logits = logits / sampler.temperature[:, None]
    if sampler.top_k is not None:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        threshold = jnp.take_along_axis(ordered, jnp.clip(sampler.top_k, 1, size)[:, None] - 1, axis=-1)
        logits = jnp.where(logits >= threshold, logits, -jnp.inf)
    if sampler.top_p is not None:
        order = jnp.argsort(logits, axis=-1, descending=True)
        probabilities = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1)
        rest = lax.cumsum(probabilities, axis=1, reverse=True)
        keep = (rest > 1 - sampler.top_p[:, None]).at[..., 0].set(True)
        keep = jnp.take_along_axis(keep, jnp.argsort(order, axis=-1), axis=-1)
        logits = jnp.where(keep, logits, -jnp.inf)
    if sampler.min_p is not None:
        peak = jnp.where(jnp.isnan(logits).any(-1), jnp.nan, logits.max(-1))  # an optimised maximum may lose a NaN
        floor = peak[:, None] + jnp.log(sampler.min_p)[:, None]
        logits = jnp.where(logits >= floor, logits, -jnp.inf)
    return jax.vmap(jax.random.categorical)(keys, logits), logits


@pytest.fixture(autouse=True)
def _small_vocabularies(monkeypatch):
    """Few candidates are tried in small vocabularies too."""
    monkeypatch.setattr(candidates, "_LARGE", 512)


@jax.jit
def both_ways(sampler, logits, keys):
    """Tokens and probabilities of the sampler and of the definition, and the rows that the fewest candidates serve."""
    keys = jax.random.wrap_key_data(keys)
    cuts = candidates.Cuts(sampler.top_k, sampler.top_p, sampler.min_p)
    few = min(candidates._CANDIDATES, logits.shape[-1])
    served = candidates._kept(few, logits / sampler.temperature[:, None], cuts).certain
    tokens, cut = by_sorting(sampler, logits, keys)
    softmax = jax.nn.softmax
    return (sampler(logits, keys), softmax(sampler.cut(logits))), (tokens, softmax(cut)), served


def draw_logits(rng, size):
    """Rows of many kinds: peaked and flat, with ties, zeros of both signs, -inf, infinity and NaN."""
    ranks = np.stack([rng.permutation(size) for _ in range(ROWS)]) + 1
    logits = -np.log(ranks) * rng.uniform(0.2, 4, (ROWS, 1)) + rng.normal(0, 0.1, (ROWS, size))
    logits[2:5] = np.round(logits[2:5] * [[0.5], [1], [4]])  # ties
    logits[5] = 0.0
    logits[6] = np.where(ranks[6] < size // 2, logits[6], -np.inf)
    logits[7] = np.where(ranks[7] < 5, logits[7], -np.inf)
    logits[8] = np.where(rng.random(size) < 0.5, 0.0, -0.0) - 10 * (ranks[8] > 300)
    logits[9, rng.integers(size, size=3)] = np.nan
    logits[10, rng.integers(size, size=2)] = np.inf
    logits[11] = -np.inf
    return logits.astype(np.float32)


def draw_numbers(rng, size):
    """A number of each cut for each row, neutral in some rows."""
    cuts = {
        "top_k": rng.choice([1, 2, 50, 255, 256, 257, size - 1, size, size + 1, 2**30], ROWS).astype(np.int32),
        "top_p": rng.choice([1e-6, 0.1, 0.5, 0.9, 0.95, 0.999, 1 - 2**-23, 1.0, 1.0], ROWS).astype(np.float32),
        "min_p": rng.choice([0.0, 0.0, 1e-4, 0.05, 0.5, 1.0], ROWS).astype(np.float32),
    }
    return {"temperature": rng.choice([0.3, 1.0, 1.5], ROWS).astype(np.float32), **cuts}


@pytest.mark.parametrize(
    ("size", "names"),
    [
        pytest.param(97, candidates.CUTS, id="all, of a small vocabulary"),
        pytest.param(4200, candidates.CUTS, id="all"),
        *(pytest.param(600, (name,), id=name, marks=pytest.mark.contract) for name in candidates.CUTS),
    ],
)
def test_tokens_are_those_of_sorting_the_vocabulary(size, names):
    rng, served_rows = np.random.default_rng(size), []
    for _ in range(12):
        numbers = draw_numbers(rng, size)
        sampler = Sampler(numbers["temperature"], **{name: numbers[name] for name in names})
        logits, keys = draw_logits(rng, size), rng.integers(2**32, size=(ROWS, 2), dtype=np.uint32)
        found, wanted, served = jax.device_get(both_ways(sampler, logits, keys))
        np.testing.assert_array_equal(found[0], wanted[0])
        np.testing.assert_array_equal(found[1], wanted[1])
        served_rows.append(served)
    if size > 512:
        assert 0.4 < np.mean(served_rows) < 0.95


def test_a_sum_that_rounding_may_decide_is_left_to_the_whole_vocabulary():
    """Of 512 equal tokens a quarter is 128, but for rounding."""
    cuts = candidates.Cuts(top_p=jax.device_put(np.array([0.25, 0.2495], np.float32)))
    kept = candidates._kept(256, jax.device_put(np.zeros((2, 512), np.float32)), cuts)
    assert kept.certain.tolist() == [False, True] and kept.number[1] == 128


@pytest.mark.parametrize("options", [{}, {"impl": "rbg"}, {"partitionable": False}], ids=str)
def test_noise_is_that_of_the_whole_vocabulary(options):
    """Whatever the keys are, a draw is that of `jax.random.categorical`."""
    tokens = np.array([[0, 599, 17, 17], [3, 1, 2, 0], [598, 300, 299, 4]], np.int32)
    with jax.threefry_partitionable(options.get("partitionable", True)):
        keys = jax.random.split(jax.random.key(3, impl=options.get("impl")), 3)
        noise = jax.jit(jax.vmap(lambda key: jax.random.gumbel(key, (600,))))(keys)
        found = jax.jit(functools.partial(candidates._noise_at, vocab_size=600))(keys, tokens)
    np.testing.assert_array_equal(found, np.take_along_axis(np.asarray(noise), tokens, axis=1))


def test_only_cpus_look_at_few_candidates():
    """Elsewhere XLA sorts for as many as these, and a loop over rows is slow."""
    keys, logits = np.zeros((2, 2), np.uint32), np.zeros((2, 600), np.float32)

    def draw(logits, keys):
        return Sampler(1.0, top_k=3)(logits, jax.random.wrap_key_data(keys))

    traced = jax.jit(draw).trace(logits, keys)
    texts = {name: traced.lower(lowering_platforms=(name,)).as_text() for name in ("cpu", "cuda")}
    assert "top_k" in texts["cpu"] and "top_k" not in texts["cuda"]


SIZE = 600
MIXED = Sampler(
    np.array([0.0, 1.0, 0.0, 0.7, 1.3, 1.0], np.float32),
    top_k=np.array([5, SIZE, SIZE, 40, 3, 300], np.int32),
    top_p=np.array([0.9, 1, 1, 0.8, 1, 0.99], np.float32),
    min_p=np.array([0.1, 0, 0, 0, 0.01, 0], np.float32),
    repetition_penalty=np.array([1, 1, 1.5, 2, 1, 3], np.float32),
    presence_penalty=np.array([0, 0, 1, 0, 2, 0.5], np.float32),
    frequency_penalty=np.array([0, 0, 1, 0.5, 0, -1], np.float32),
    logit_bias=np.random.default_rng(1).normal(size=(6, SIZE)).astype(np.float32),
)


@jax.jit
def draw_with(sampler, logits, keys, text):
    keys = jax.random.wrap_key_data(keys)
    return sampler(logits, keys, text), sampler.probabilities(logits, text)


def test_rows_with_numbers_of_their_own_are_rows_alone(count_compilations):
    rng = np.random.default_rng(2)
    text = Text(rng.integers(SIZE, size=(6, 40)).astype(np.int32), np.full(6, 9, np.int32), np.full(6, 33, np.int32))
    alone = [jax.tree.map(lambda x, row=row: x[row : row + 1] if x.ndim == 2 else x[row], MIXED) for row in range(6)]
    drawn = set()
    for turn in range(12):
        logits = rng.normal(0, 3, (6, SIZE)).astype(np.float32)
        keys = rng.integers(2**32, size=(6, 2), dtype=np.uint32)
        tokens, probabilities = draw_with(MIXED, logits, keys, text)
        for row, sampler in enumerate(alone):
            part = slice(row, row + 1)
            own = draw_with(sampler, logits[part], keys[part], jax.tree.map(lambda x, part=part: x[part], text))
            assert tokens[row] == own[0][0]
            np.testing.assert_allclose(probabilities[row], own[1][0], rtol=1e-5)
            assert probabilities[row, tokens[row]] > 0
        drawn.add(tuple(tokens.tolist()))
        if turn == 0:
            del count_compilations[:]
    assert not count_compilations and len(drawn) == 12


def request(rows, num_samples=1, **fields):
    return generation.make_request(
        np.ones((rows, 3), np.int32),
        vocab_size=5,
        max_new_tokens=2,
        num_samples=num_samples,
        sampler=Sampler(**{"temperature": 1.0} | fields),
        key=jax.random.key(0),
    ).sampler


def test_samples_of_a_prompt_have_its_numbers():
    bias = np.arange(10, dtype=np.float32).reshape(2, 5)
    sampler = request(2, 3, top_k=np.array([2, 3]), top_p=np.linspace(0.1, 0.6, 6), min_p=0.5, logit_bias=bias)
    assert sampler.top_k.tolist() == [2, 2, 2, 3, 3, 3] and sampler.top_k.dtype == np.int32
    np.testing.assert_allclose(sampler.top_p, np.linspace(0.1, 0.6, 6))
    np.testing.assert_array_equal(sampler.logit_bias, np.repeat(bias, 3, axis=0))
    assert sampler.min_p.shape == () and sampler.temperature.shape == ()
    assert request(2, temperature=np.zeros(2)).temperature is None  # greedy, as 0
    assert request(2, temperature=np.array([0, 0.5])).temperature.tolist() == [0, 0.5]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"top_k": np.array([1, 2, 3])}, r"top_k must be one for all rows, or one a row, here 2; got shape=\(3,\)"),
        ({"temperature": np.ones(1)}, r"temperature must be one for all rows, or one a row, here 2; got shape=\(1,\)"),
        ({"logit_bias": np.zeros((3, 5))}, r"logit_bias must be one for all .*, here 2; got shape=\(3, 5\)"),
    ],
)
def test_numbers_of_other_rows_are_refused_in_words(fields, words):
    with pytest.raises(ValueError, match=f"Sampler: {words}"):
        request(2, **fields)
    with pytest.raises(ValueError, match="here 2 or 8; got shape"):
        request(2, 4, **fields)


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize("name", [*candidates.CUTS, "temperature", "repetition_penalty", "presence_penalty"])
def test_a_sampler_refuses_numbers_of_other_rows_in_words(name):
    sampler = dataclasses.replace(Sampler(1.0), **{name: np.ones(3, np.float32)})
    text = Text(np.zeros((2, 3), np.int32), np.zeros(2, np.int32), np.zeros(2, np.int32))
    with pytest.raises(
        ValueError, match=rf"Sampler: {name} must be one number, or one a row, here 2; got shape=\(3,\)"
    ):
        jax.eval_shape(lambda x: sampler(x, jax.random.split(jax.random.key(0), 2), text), np.zeros((2, 5), np.float32))
    with pytest.raises(
        ValueError, match=r"Sampler: logit_bias must be of shape \(2, 5\); got logit_bias.shape=\(3, 5\)"
    ):
        jax.eval_shape(Sampler(logit_bias=np.zeros((3, 5), np.float32)).penalise, np.zeros((2, 5), np.float32))
