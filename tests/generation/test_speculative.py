"""Drafts: the same tokens at temperature 0, the same distribution at any other, in fewer steps."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnax import Sampler, TransformerConfig, TransformerLM, generation
from attnax.generation import speculative
from attnax.typing import pytree_dataclass

CONFIG = TransformerConfig(
    vocab_size=23, d_model=12, num_heads=3, num_kv_heads=1, num_layers=2, d_ff=20, max_len=40, dropout_rate=0.0,
    pos_emb_type="rope",
)  # fmt: skip
REAL = np.array([[True] * 5, [False, False, False, True, True]])


@pytest.fixture(scope="module")
def model():
    return TransformerLM(nnx.Rngs(3), CONFIG)


@pytest.fixture(scope="module")
def draft(model):
    """A model that agrees with the other now and then: its first layer, slightly off."""
    small = TransformerLM(nnx.Rngs(4), dataclasses.replace(CONFIG, num_layers=1))
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    blocks = params["decoder"]["stack"]["blocks"]
    params["decoder"]["stack"]["blocks"] = {0: blocks[0]}
    nnx.update(small, params)
    return small


def prompt(seed=0):
    return jax.random.randint(jax.random.key(seed), (2, 5), 0, CONFIG.vocab_size)


@pytest.mark.parametrize("count", [pytest.param(1, marks=pytest.mark.thorough), 4])
@pytest.mark.parametrize(
    "options",
    [{}, *(pytest.param(x, marks=pytest.mark.thorough) for x in ({"cache": "paged"}, {"window": 3}))],
    ids=str,
)
def test_greedy_tokens_are_those_without_a_draft(model, draft, count, options):
    options = dict(options)
    if window := options.pop("window", None):
        windowed = []
        for one in (model, draft):
            windowed.append(TransformerLM(nnx.Rngs(0), dataclasses.replace(one.config, attention_window=window)))
            nnx.update(windowed[-1], nnx.state(one))
        model, draft = windowed
    plain = model.generate(prompt(), max_new_tokens=17, padding_mask=REAL)
    drafted = model.generate(
        prompt(), max_new_tokens=17, padding_mask=REAL, draft=draft, num_draft_tokens=count, **options
    )
    np.testing.assert_array_equal(drafted.tokens, plain.tokens)
    np.testing.assert_array_equal(drafted.lengths, plain.lengths)
    np.testing.assert_allclose(drafted.log_probs, plain.log_probs, atol=1e-5)
    assert (drafted.steps <= plain.steps).all()


def test_a_draft_that_is_the_model_is_accepted_whole(model):
    drafted = model.generate(prompt(), max_new_tokens=16, draft=model, num_draft_tokens=4)
    assert drafted.steps.tolist() == [4, 4]  # 1, and 5 in each step after


def test_penalties_stops_and_samples_go_through_a_draft(model, draft):
    sampler = Sampler(0.0, repetition_penalty=1.3, no_repeat_ngram=2)
    free = model.generate(prompt(), max_new_tokens=12, sampler=sampler)
    options = {"max_new_tokens": 12, "sampler": sampler, "end_token": int(free.tokens[0, 4])}
    options["stop_sequences"] = [free.tokens[1, 6:8].tolist()]
    plain, drafted = model.generate(prompt(), **options), model.generate(prompt(), draft=draft, **options)
    np.testing.assert_array_equal(drafted.tokens, plain.tokens)
    assert drafted.lengths.tolist() == plain.lengths.tolist() and max(plain.lengths) < 12
    several = model.generate(prompt(), num_samples=3, draft=draft, **options)
    np.testing.assert_array_equal(several.tokens, jnp.repeat(plain.tokens, 3, axis=0))


@pytest.mark.thorough
def test_a_row_keeps_its_tokens_whatever_its_place_and_neighbours(model, draft):
    keys = jax.random.split(jax.random.key(1), 2)
    options = {"max_new_tokens": 9, "sampler": Sampler(1.0), "draft": draft}
    straight = model.generate(prompt(), key=keys, **options)
    turned = model.generate(prompt()[::-1], key=keys[::-1], **options)
    np.testing.assert_array_equal(turned.tokens[::-1], straight.tokens)
    other = model.generate(prompt().at[1].add(1) % 23, key=keys, **options)
    np.testing.assert_array_equal(other.tokens[0], straight.tokens[0])


@pytree_dataclass
class Forgetful:
    """The cache of a model that remembers nothing."""

    rows: jax.Array

    def next_positions(self):
        return self.rows

    def select_rows(self, rows):
        return Forgetful(self.rows[rows])

    def forget(self, first):
        return self


def read_table(table, tokens, cache):
    """A model whose next token depends on the last one alone."""
    return table[jnp.take_along_axis(tokens.ids, tokens.wanted, axis=1)], cache


VOCABULARY, ROWS = 4, 40_000
TABLE, DRAFT_TABLE = (1.5 * jax.random.normal(jax.random.key(seed), (VOCABULARY, VOCABULARY)) for seed in (0, 1))


def pairs(sampler, seed, step):
    """How often each (first, second, third) token follows a prompt of 0, drafted three at a time."""
    request = generation.make_request(
        np.zeros((ROWS, 1), int), vocab_size=VOCABULARY, max_new_tokens=3, sampler=sampler, key=jax.random.key(seed)
    )
    caches = [Forgetful(jnp.zeros(ROWS, jnp.int32)) for _ in range(2)]
    drafting = generation.Draft(read_table, DRAFT_TABLE)
    written, _, _ = speculative.generate_with_draft(
        step, TABLE, request, caches[0], drafting, caches[1], max_new_tokens=3, num_draft_tokens=3
    )
    index = (written.tokens * np.array([[VOCABULARY**2, VOCABULARY, 1]])).sum(1)
    return np.bincount(index, minlength=VOCABULARY**3)


def distance(sampler, seed=0, step=read_table):
    """Pearson's chi-squared over its degrees of freedom: near 1 where the counts come from the model's distribution."""
    chain = np.asarray(jax.jit(sampler.probabilities)(TABLE), np.float64)
    expected = ROWS * (chain[0][:, None, None] * chain[:, :, None] * chain[None]).reshape(-1)
    counts = pairs(sampler, seed, step)
    possible = expected > 0
    assert counts[~possible].sum() == 0
    freedom = possible.sum() - 1
    return ((counts - expected)[possible] ** 2 / expected[possible]).sum() / freedom, freedom


SAMPLERS = {"plain": Sampler(1.0), "warm": Sampler(0.7, top_k=3), "cut": Sampler(1.3, top_p=0.8)}


@pytest.mark.parametrize("name", SAMPLERS)
def test_samples_have_the_distribution_of_the_model(name):
    for seed in range(2):
        value, freedom = distance(SAMPLERS[name], seed)
        assert value < 1 + 4 * np.sqrt(2 / freedom), value  # four standard deviations


@pytest.mark.parametrize(
    "biased",
    [
        lambda p, q, token, uniform: jnp.ones_like(uniform, bool),
        lambda p, q, token, uniform: uniform * 0.9 * look_up(q, token) < look_up(p, token),
        lambda p, q, token, uniform: uniform < look_up(p, token),
    ],
    ids=["always", "a tenth too often", "too rarely, with the wrong replacement"],
)
def test_a_biased_rule_would_be_noticed(biased, monkeypatch):
    monkeypatch.setattr(speculative, "accept_drafted", biased)
    value, freedom = distance(Sampler(1.0), step=functools.partial(read_table))  # a program of its own
    assert value > 1 + 8 * np.sqrt(2 / freedom), value


def look_up(x, token):
    return jnp.take_along_axis(x, token[:, None], axis=1)[:, 0]


@pytest.mark.parametrize(
    ("fields", "options", "error", "words"),
    [
        (
            {"vocab_size": 24},
            {},
            ValueError,
            "a draft must have the vocabulary of the model; got vocab_size=24, not 23",
        ),
        ({}, {"num_draft_tokens": 0}, ValueError, "num_draft_tokens must be at least 1 and at most 16"),
        (
            {},
            {"cache": "contiguous"},
            ValueError,
            "tokens are taken back, whose slots a contiguous cache would not use",
        ),
        ({"attention_type": "linear"}, {}, NotImplementedError, "linear attention cannot take drafted tokens back"),
    ],
)
def test_what_cannot_be_a_draft_is_refused_in_words(model, fields, options, error, words):
    other = TransformerLM(nnx.Rngs(0), dataclasses.replace(CONFIG, **fields))
    with pytest.raises(error, match=words):
        model.generate(prompt(), max_new_tokens=3, draft=other, **options)
