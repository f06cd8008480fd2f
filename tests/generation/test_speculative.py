"""Drafts: the same tokens at temperature 0, the same distribution at any other, in fewer steps.

Most tests are one program: a draft of the model's own shape is told apart by its weights only.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import slowly
from flax import nnx
from tiny import build

from attnax import Sampler, TransformerConfig, TransformerLM, generation
from attnax.generation import speculative
from attnax.pytrees import pytree_dataclass

CONFIG = TransformerConfig(
    vocab_size=23, d_model=12, num_heads=3, num_kv_heads=1, num_layers=1, d_ff=20, max_len=40, dropout_rate=0.0,
    pos_emb_type="rope",
)  # fmt: skip
PROMPTS = [[3, 1, 4, 1, 5], [9, 2]]
IDS, REAL = slowly.lay_out(PROMPTS[::-1], 5)  # the short one with padding on its left
IDS, REAL = IDS[::-1], REAL[::-1]
FREE = Sampler(0.0, repetition_penalty=1.0, logit_bias={0: 0.0})
NEVER = [[22, 22], [21, 21]]


@pytest.fixture(scope="module")
def model():
    return build(lambda rngs: TransformerLM(rngs, CONFIG), seed=3)


def near(model):
    """A model that agrees with the other now and then: its weights, slightly off."""
    rng = np.random.default_rng(4)
    graphdef, state = nnx.split(model)
    return nnx.merge(
        graphdef,
        jax.tree.map(lambda x: jax.device_put(np.asarray(x) * rng.normal(1, 0.3, x.shape).astype(np.float32)), state),
    )


@pytest.fixture(scope="module")
def draft(model):
    return near(model)


def write(model, draft, ids=IDS, sampler=FREE, stops=NEVER, **options):
    options = {"max_new_tokens": 13, "num_draft_tokens": 2, "padding_mask": REAL} | options
    return jax.device_get(model.generate(ids, sampler=sampler, stop_sequences=stops, draft=draft, **options))


def test_tokens_are_those_without_a_draft(model, draft):
    drafted = write(model, draft)
    tokens, log_probs = slowly.write(model, PROMPTS, 13, FREE)
    np.testing.assert_array_equal(drafted.tokens, tokens)
    np.testing.assert_allclose(drafted.log_probs, log_probs, atol=1e-5)
    assert drafted.lengths.tolist() == [13, 13] and all(5 < steps < 13 for steps in drafted.steps)


def test_a_draft_that_is_the_model_is_accepted_whole(model):
    drafted = write(model, model)
    assert drafted.steps.tolist() == [5, 5] and drafted.lengths.tolist() == [13, 13]  # 1, and 3 in each step after


def penalised_and_stopped(model):
    """A sampler, the stops that end the rows then, and the tokens that are written."""
    sampler = dataclasses.replace(FREE, repetition_penalty=1.3)
    free, _ = slowly.write(model, PROMPTS, 13, sampler)
    stops = [free[0, 4:6].tolist(), free[1, 6:8].tolist()]
    return sampler, stops, *slowly.end(free, stops, fill=0)


def test_penalties_and_stops_go_through_a_draft(model, draft):
    sampler, stops, tokens, lengths = penalised_and_stopped(model)
    drafted = write(model, draft, sampler=sampler, stops=stops)
    np.testing.assert_array_equal(drafted.tokens, tokens)
    assert drafted.lengths.tolist() == lengths and max(lengths) < 13
    assert (drafted.tokens != slowly.write(model, PROMPTS, 13, FREE)[0]).any()


@pytest.mark.contract
def test_samples_go_through_a_draft(model, draft):
    sampler, stops, tokens, _ = penalised_and_stopped(model)
    drafted = write(model, draft, sampler=sampler, stops=stops, num_samples=3)
    np.testing.assert_array_equal(drafted.tokens, np.repeat(tokens, 3, axis=0))


def test_a_row_keeps_its_tokens_whatever_its_place_and_neighbours(model, draft):
    keys = slowly.keys_of(1, np.arange(2))
    sampler = dataclasses.replace(FREE, temperature=1.0)
    straight = write(model, draft, sampler=sampler, key=keys)
    turned = write(model, draft, IDS[::-1], sampler=sampler, key=keys[np.array([1, 0])], padding_mask=REAL[::-1])
    np.testing.assert_array_equal(turned.tokens[::-1], straight.tokens)
    changed = IDS.copy()
    changed[1] = (changed[1] + 1) % 23
    other = write(model, draft, changed, sampler=sampler, key=keys)
    np.testing.assert_array_equal(other.tokens[0], straight.tokens[0])
    assert (other.tokens[1] != straight.tokens[1]).any()


def test_greedy_and_sampled_rows_go_through_one_draft(model, draft):
    """With the tokens of drafts that are all greedy or all sampled."""
    keys = slowly.keys_of(1, np.arange(2))
    greedy = write(model, draft)
    sampled = write(model, draft, sampler=dataclasses.replace(FREE, temperature=1.0), key=keys)
    mixed = write(model, draft, sampler=dataclasses.replace(FREE, temperature=np.array([0.0, 1.0])), key=keys)
    np.testing.assert_array_equal(mixed.tokens, [greedy.tokens[0], sampled.tokens[1]])
    np.testing.assert_array_equal(mixed.steps, [greedy.steps[0], sampled.steps[1]])
    assert (sampled.tokens != greedy.tokens).any(1).all()


@pytest.mark.parametrize("count", [pytest.param(1, marks=pytest.mark.thorough), 4])
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, marks=pytest.mark.contract),
        *(pytest.param(x, marks=pytest.mark.thorough) for x in ({"cache": "paged"}, {"window": 3})),
    ],
    ids=str,
)
def test_a_draft_of_fewer_layers_changes_no_token(count, options):
    options = dict(options)
    config = dataclasses.replace(CONFIG, num_layers=2, attention_window=options.pop("window", None))
    model = build(lambda rngs: TransformerLM(rngs, config))
    small = build(lambda rngs: TransformerLM(rngs, dataclasses.replace(config, num_layers=1)))
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    blocks = params["decoder"]["stack"]["blocks"]
    params["decoder"]["stack"]["blocks"] = {0: blocks[0]}
    nnx.update(small, params)
    tokens, log_probs = slowly.write(model, PROMPTS, 17)
    drafted = write(model, small, sampler=None, stops=(), max_new_tokens=17, num_draft_tokens=count, **options)
    np.testing.assert_array_equal(drafted.tokens, tokens)
    np.testing.assert_allclose(drafted.log_probs, log_probs, atol=1e-5)
    assert drafted.lengths.tolist() == [17, 17] and (drafted.steps <= 17).all()


@pytree_dataclass
class Forgetful:
    """The cache of a model that remembers nothing."""

    rows: jax.Array

    def tokens(self, dtype):
        raise NotImplementedError

    def next_positions(self):
        return self.rows

    def select_rows(self, rows):
        return Forgetful(self.rows[rows])

    def forget(self, first):
        return self


def read_table(table, tokens, cache):
    """A model whose next token depends on the last one alone."""
    return table[jnp.take_along_axis(tokens.ids, tokens.wanted, axis=1)], cache


VOCABULARY, ROWS, LENGTH = 3, 20_000, 4
TABLE, DRAFT_TABLE = (
    1.5 * np.random.default_rng(seed).standard_normal((VOCABULARY, VOCABULARY)).astype(np.float32) for seed in (0, 1)
)
SAMPLERS = {  # the options that it does not give are neutral: one program
    "plain": Sampler(1.0, top_k=99, top_p=1.0),
    "warm": Sampler(0.7, top_k=2, top_p=1.0),
    "cut": Sampler(1.3, top_k=99, top_p=0.8),
}


def write_rows(sampler, seed, step=read_table, rows=ROWS):
    """Numbers that stand for the texts of so many rows after a prompt of 0, drafted two tokens at a time."""
    request = generation.make_request(
        jax.device_put(np.zeros((rows, 1), np.int32)),
        vocab_size=VOCABULARY,
        max_new_tokens=LENGTH,
        sampler=sampler,
        key=jax.random.key(seed),
    )
    caches = [Forgetful(jax.device_put(np.zeros(rows, np.int32))) for _ in range(2)]
    drafting = generation.Draft(read_table, jnp.asarray(DRAFT_TABLE))
    written, _, _ = speculative.generate_with_draft(
        step, jnp.asarray(TABLE), request, *(caches[0], drafting, caches[1]), max_new_tokens=LENGTH, num_draft_tokens=2
    )
    return np.asarray(written.tokens) @ VOCABULARY ** np.arange(LENGTH)[::-1]


def distance(texts, sampler):
    """Pearson's chi-squared over its degrees of freedom: near 1 where texts come from the model's distribution."""
    chain = np.asarray(jax.jit(sampler.probabilities)(TABLE), np.float64)
    expected = chain[0]
    for _ in range(LENGTH - 1):
        expected = expected[..., None] * chain
    expected = len(texts) * expected.reshape(-1)
    counts = np.bincount(texts, minlength=VOCABULARY**LENGTH)
    possible = expected > 0
    assert counts[~possible].sum() == 0
    freedom = possible.sum() - 1
    return ((counts - expected)[possible] ** 2 / expected[possible]).sum() / freedom, freedom


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.contract)])
@pytest.mark.parametrize("name", SAMPLERS)
def test_samples_have_the_distribution_of_the_model(name, seed):
    value, freedom = distance(write_rows(SAMPLERS[name], seed), SAMPLERS[name])
    assert value < 1 + 4 * np.sqrt(2 / freedom), value  # four standard deviations


def look_up(x, token):
    return jnp.take_along_axis(x, token[:, None], axis=1)[:, 0]


RULES = {
    "right": lambda p, q, token, uniform: uniform * look_up(q, token) < look_up(p, token),
    "always": lambda p, q, token, uniform: jnp.ones_like(uniform, bool),
    "a tenth too often": lambda p, q, token, uniform: uniform * 0.9 * look_up(q, token) < look_up(p, token),
    "too rarely, with the wrong replacement": lambda p, q, token, uniform: uniform < look_up(p, token),
}


@pytest.mark.contract
def test_a_biased_rule_would_be_noticed(monkeypatch):
    """Rows take turns to go by each of the rules, in one program."""

    def accept(*arguments):
        turn = np.arange(arguments[2].shape[0]) % len(RULES)
        return jnp.stack([rule(*arguments) for rule in RULES.values()], axis=1)[np.arange(len(turn)), turn]

    monkeypatch.setattr(speculative, "accept_drafted", accept)
    step = functools.partial(read_table)  # a program of its own
    texts = write_rows(SAMPLERS["plain"], 0, step, ROWS * len(RULES))
    for turn, name in enumerate(RULES):
        value, freedom = distance(texts[turn :: len(RULES)], SAMPLERS["plain"])
        noticed = value > 1 + 8 * np.sqrt(2 / freedom)
        assert noticed == (name != "right"), (name, value)


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
            "a cache must use the slots of rejected tokens again; got cache=.contiguous",
        ),
        ({"attention_type": "linear"}, {}, NotImplementedError, "linear attention cannot take drafted tokens back"),
    ],
)
def test_a_model_that_cannot_be_a_draft_is_refused_in_words(model, fields, options, error, words):
    other = build(lambda rngs: TransformerLM(rngs, dataclasses.replace(CONFIG, **fields)))
    with pytest.raises(error, match=words):
        model.generate(IDS, max_new_tokens=3, draft=other, **options)
