"""Generation: the tokens of the slow way, one compilation, rows on their own, samplers that keep their promise.

Tests share a few signatures (rows, lengths, options), each of which is a program or two.
"""

import dataclasses
import functools
import gc
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import slowly
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import build

import attnax
from attnax import Sampler, Transformer, TransformerConfig, TransformerLM, generation
from attnax.generation import Text
from attnax.generation.candidates import CUTS

CONFIG = TransformerConfig(
    vocab_size=23,
    d_model=12,
    num_heads=3,
    num_kv_heads=1,
    num_layers=1,
    d_ff=20,
    max_len=31,
    dropout_rate=0.0,
    pos_emb_type="rope",
    norm_type="rms",
)
PROMPTS = [np.random.default_rng(size).integers(0, 23, size).tolist() for size in (5, 3, 6, 8)]
IDS, REAL = slowly.lay_out(PROMPTS, 8)
OPTIONS = {"max_new_tokens": 9, "padding_mask": REAL}  # of most tests: these rows are one program
EVERYTHING = Sampler(
    0.7,
    top_k=9,
    top_p=0.9,
    min_p=0.01,
    repetition_penalty=1.7,
    presence_penalty=0.1,
    frequency_penalty=0.3,
    no_repeat_ngram=2,
    logit_bias={5: 0.4},
)


@pytest.fixture(scope="module")
def model():
    return build(lambda rngs: TransformerLM(rngs, CONFIG), seed=3)


def prompt(batch=2, length=5, seed=0):
    return np.random.default_rng(seed).integers(0, CONFIG.vocab_size, (batch, length)).astype(np.int32)


def own_keys(seed, count=4):
    return slowly.keys_of(seed, np.arange(count))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_tokens_are_those_of_the_full_forward(model, temperature):
    """Rows of their own lengths and keys, with padding left, right and between."""
    sampler, keys = Sampler(temperature), own_keys(1)
    written = model.generate(IDS, sampler=sampler, key=keys, **OPTIONS)
    tokens, log_probs = slowly.write(model, PROMPTS, 9, sampler, keys)
    np.testing.assert_array_equal(written.tokens, tokens)
    np.testing.assert_allclose(written.log_probs, log_probs, atol=1e-5)
    assert written.lengths.tolist() == [9] * 4 and written.steps.tolist() == [9] * 4


# counts programs
MODES = {
    "plain": {"sampler": EVERYTHING, "stop_sequences": [[1, 2], [3], [4]]},
    "draft": {"draft": True, "sampler": Sampler(1.0)},
    "beams": {"num_beams": 3, "length_penalty": 0.5},
    "ring": {"cache": "ring"},
    "paged": {"cache": "paged"},
    "int8": {"cache_dtype": "int8"},
    "samples": {"num_samples": 3, "sampler": Sampler(1.0), "stop_sequences": [[1, 2]]},
}


@pytest.mark.parametrize("mode", [pytest.param(m, marks=() if m == "plain" else pytest.mark.thorough) for m in MODES])
def test_a_generation_is_two_compilations_and_the_next_is_none(model, mode, count_compilations):
    def make(seed):
        return build(lambda rngs: TransformerLM(rngs, dataclasses.replace(CONFIG, d_ff=22)), seed)

    def run(model, seed, sampler=None):
        ids, options = (IDS + seed) % CONFIG.vocab_size, dict(MODES[mode])
        if "num_beams" in options:
            model.beam_search(ids, **OPTIONS, **options)
            return
        options["sampler"] = sampler or options.get("sampler")
        if options.pop("draft", None):
            options["draft"] = model
        model.generate(ids, key=jax.random.key(seed), **OPTIONS, **options)

    others = make(3), make(4)
    run(model, 3)  # compiles the small eager operations around the program
    del count_compilations[:]
    run(others[0], 3)
    assert len(count_compilations) <= 2  # the prompt, and the loop
    del count_compilations[:]
    other = Sampler(1, top_k=3, top_p=0.5, min_p=0, repetition_penalty=2, presence_penalty=0, frequency_penalty=0)
    other = dataclasses.replace(other, logit_bias={3: 1}, no_repeat_ngram=2)
    run(others[1], 4, other if mode == "plain" else None)
    assert not count_compilations


def test_the_cache_is_donated(model):
    writer = model._writer("generate")
    request = generation.make_request(
        jnp.asarray(IDS), vocab_size=23, max_new_tokens=9, padding_mask=REAL, sampler=Sampler(0.0)
    )
    caches = attnax.init_decoder_kv_caches_from_config(CONFIG, batch_size=4, max_len=17)
    _, after = generation.generate(writer.step, writer.state, request, caches, max_new_tokens=9)
    assert all(x.is_deleted() for x in jax.tree.leaves(caches))
    assert int(after.layers[0].length) == 16 and after.layers[0].positions[3].tolist() == [*range(16), -1]


@pytest.mark.thorough
def test_memory_is_flat_over_a_thousand_generations(model):
    def resident():
        gc.collect()
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    options = {"max_new_tokens": 3, "sampler": Sampler(1.0)}
    for seed in range(100):
        model.generate(prompt(), key=jax.random.key(seed), **options)
    before, arrays = resident(), len(jax.live_arrays())  # in this order: garbage of other tests is collected first
    for seed in range(1000):
        model.generate(prompt(), key=jax.random.key(seed), **options)
    grown = resident() - before
    assert len(jax.live_arrays()) <= arrays
    assert grown < 2**23  # eight kilobytes a generation, which the allocator of a large process may keep


def test_a_stream_gives_the_same_tokens_and_stops_when_every_row_has_ended(model):
    sampler, keys = Sampler(1.0), own_keys(2)
    free, _ = slowly.write(model, PROMPTS, 9, sampler, keys)
    ends = [int(free[row, column]) for row, column in enumerate((4, 2, 6, 3))]
    wanted, lengths = slowly.end(free, [[end] for end in ends], fill=ends[0])
    streamed = list(model.stream(IDS, end_token=ends, sampler=sampler, key=keys, **OPTIONS))
    assert len(streamed) == max(lengths) < 9 and len(set(lengths)) > 1
    np.testing.assert_array_equal(np.stack(streamed, axis=1), wanted[:, : len(streamed)])


@pytest.mark.parametrize("kind", ["end tokens", "sequences"])
def test_penalties_and_ends_of_rows_act_as_in_the_slow_way(model, kind):
    sampler, keys = dataclasses.replace(EVERYTHING, temperature=0.0 if kind == "end tokens" else 0.7), own_keys(3)
    free, log_probs = slowly.write(model, PROMPTS, 9, sampler, keys)
    assert (free != slowly.write(model, PROMPTS, 9, Sampler(sampler.temperature), keys)[0]).any(1).all()
    two = free[2, 5:7].tolist()
    if kind == "end tokens":  # of several, the first fills up
        ends = [int(free[0, 3]), int(free[1, 5])]
        stops, options, fill = [[ends[0]], [ends[1]], two], {"end_token": ends, "stop_sequences": [two]}, ends[0]
    else:  # the last of them begins in the prompt, which does not count
        stops, fill = [two, free[0, 2:4].tolist(), [PROMPTS[1][-1], int(free[1, 0])]], CONFIG.pad_token_id
        options = {"stop_sequences": stops}
    wanted, lengths = slowly.end(free, stops, fill)
    written = model.generate(IDS, sampler=sampler, key=keys, **OPTIONS, **options)
    np.testing.assert_array_equal(written.tokens, wanted)
    assert written.lengths.tolist() == lengths == written.steps.tolist()
    assert lengths[0] <= 4 and lengths[2] <= 7 and lengths[1] > 1 and len(set(lengths)) > 2
    real = np.arange(9) < np.array(lengths)[:, None]
    np.testing.assert_allclose(written.log_probs, np.where(real, log_probs, 0), atol=1e-5)


def test_a_row_keeps_its_tokens_whatever_its_place(model):
    keys, order = own_keys(1), np.array([2, 0, 3, 1])
    straight = model.generate(IDS, key=keys, sampler=Sampler(1.0), **OPTIONS)
    options = OPTIONS | {"padding_mask": REAL[order]}
    shuffled = model.generate(IDS[order], key=keys[order], sampler=Sampler(1.0), **options)
    np.testing.assert_array_equal(shuffled.tokens, np.asarray(straight.tokens)[order])


def test_neighbours_do_not_change_a_row(model):
    one = model.generate(IDS, key=own_keys(1), sampler=Sampler(1.0), **OPTIONS)
    ids, real = slowly.lay_out([PROMPTS[0], [1, 2, 3, 4, 5, 6, 7, 8], [9], [3, 3]], 8)
    ids[0] = IDS[0]
    two = model.generate(ids, key=own_keys(1), sampler=Sampler(1.0), **OPTIONS | {"padding_mask": real})
    np.testing.assert_array_equal(one.tokens[0], two.tokens[0])
    np.testing.assert_array_equal(one.log_probs[0], two.log_probs[0])


def test_greedy_and_sampled_rows_go_through_one_call(model, count_compilations):
    """With the tokens of calls that are all greedy or all sampled; other numbers are no other program."""
    sampled = [np.asarray(model.generate(IDS, key=own_keys(1), sampler=Sampler(t), **OPTIONS).tokens) for t in (0, 1)]
    is_drawn = np.array([False, True, True, False])
    mixed = model.generate(IDS, key=own_keys(1), sampler=Sampler(is_drawn.astype(np.float32)), **OPTIONS)
    np.testing.assert_array_equal(mixed.tokens, np.where(is_drawn[:, None], *sampled[::-1]))
    keys = own_keys(1)
    del count_compilations[:]
    others = model.generate(IDS, key=keys, sampler=Sampler(np.array([1, 1, 0, 0])), **OPTIONS)
    assert not count_compilations
    np.testing.assert_array_equal(np.asarray(others.tokens)[1], np.asarray(mixed.tokens)[1])


def test_one_key_gives_every_row_its_own(model):
    """That of a row is the fold of its number, so that more rows change no other."""
    same, real = slowly.lay_out([PROMPTS[0]] * 4, 8)
    options = OPTIONS | {"padding_mask": real}
    tokens = np.asarray(model.generate(same, sampler=Sampler(1.0), key=jax.random.key(7), **options).tokens)
    assert len({tuple(row) for row in tokens.tolist()}) == 4
    wanted, _ = slowly.write(model, [PROMPTS[0]] * 4, 9, Sampler(1.0), own_keys(7))
    np.testing.assert_array_equal(tokens, wanted)


def test_samples_of_a_prompt_are_those_of_its_rows(model):
    """The prompt is read once. A sample equals a row of its own, with a fold of the prompt's key if it has one."""
    ids, real = slowly.lay_out(PROMPTS[:2], 5)
    options = {"max_new_tokens": 7, "sampler": Sampler(1.0), "padding_mask": real, "num_samples": 3}
    own = np.concatenate([jax.random.key_data(slowly.fold(key, np.arange(3))) for key in own_keys(3, 2)])
    rows = [prompt for prompt in PROMPTS[:2] for _ in range(3)]
    for key, keys in ((own_keys(3, 2), own), (jax.random.key(5), own_keys(5, 6))):
        several = np.asarray(model.generate(ids, key=key, **options).tokens)
        wanted, _ = slowly.write(model, rows, 7, Sampler(1.0), keys)
        np.testing.assert_array_equal(several, wanted)
        assert len({tuple(row) for row in several.tolist()}) == 6


@pytest.mark.contract
def test_a_stream_of_samples_gives_the_same_tokens(model):
    options = {"max_new_tokens": 7, "sampler": Sampler(1.0), "num_samples": 3, "key": own_keys(3, 2)}
    several = model.generate(prompt(), **options)
    streamed = np.stack(list(model.stream(prompt(), **options)), axis=1)
    np.testing.assert_array_equal(streamed, several.tokens)


@pytest.mark.parametrize(
    "options",
    [
        {"cache": "ring"},
        pytest.param({"cache": "paged"}, marks=pytest.mark.contract),
        pytest.param({"cache": "paged", "cache_dtype": "float32"}, marks=pytest.mark.contract),
    ],
    ids=str,
)
def test_the_kind_of_cache_changes_nothing(model, options):
    wanted = model.generate(IDS, **OPTIONS)
    given = model.generate(IDS, **OPTIONS, **options)
    np.testing.assert_array_equal(given.tokens, wanted.tokens)
    np.testing.assert_allclose(given.log_probs, wanted.log_probs, atol=1e-5)


@pytest.mark.parametrize("cache", [pytest.param("contiguous", marks=pytest.mark.contract), "paged"])
def test_eight_bits_cost_little(model, cache):
    exact = model.generate(IDS, **OPTIONS)
    rounded = model.generate(IDS, **OPTIONS, cache=cache, cache_dtype="int8")
    error = np.abs(np.asarray(rounded.log_probs)[:, 1] - np.asarray(exact.log_probs)[:, 1])
    assert (error > 0).any() and (error < 0.02).all()


def test_generation_leaves_the_model_alone(model):
    model.train()
    before = jax.tree.map(np.array, nnx.state(model))
    model.generate(IDS, **OPTIONS)
    jax.tree.map(np.testing.assert_array_equal, before, nnx.state(model))
    model.eval()


LOGITS = np.log(np.array([0.4, 0.3, 0.2, 0.06, 0.04], np.float32))


PLAIN = [0.4, 0.3, 0.2, 0.06, 0.04]
EXPECTED = [
    (Sampler(1.0), PLAIN),
    (Sampler(0.0), [1, 0, 0, 0, 0]),
    (Sampler(0.5), np.array([16, 9, 4, 0.36, 0.16]) / 29.52),
    (Sampler(1.0, top_k=2), [4 / 7, 3 / 7, 0, 0, 0]),
    (Sampler(1.0, top_k=99), PLAIN),
    (Sampler(1.0, top_p=0.65), [4 / 7, 3 / 7, 0, 0, 0]),
    (Sampler(1.0, top_p=0.75), [4 / 9, 3 / 9, 2 / 9, 0, 0]),
    (Sampler(1.0, top_p=1e-6), [1, 0, 0, 0, 0]),
    (Sampler(1.0, top_k=3, top_p=0.7), [4 / 7, 3 / 7, 0, 0, 0]),
    (Sampler(1.0, min_p=0.4), [4 / 9, 3 / 9, 2 / 9, 0, 0]),
    (Sampler(1.0, top_k=4, min_p=0.6), [4 / 7, 3 / 7, 0, 0, 0]),
    (Sampler(1.0, logit_bias={4: float(np.log(10.0))}), np.array([4, 3, 2, 0.6, 4]) / 13.6),
]


def test_samplers_have_the_distribution_that_they_say():
    samplers = [sampler.as_arrays(5) for sampler, _ in EXPECTED]
    found = jax.jit(lambda logits: [sampler.probabilities(logits)[0] for sampler in samplers])(LOGITS[None])
    for (sampler, expected), probabilities in zip(EXPECTED, found, strict=True):
        np.testing.assert_allclose(probabilities, expected, atol=1e-6, err_msg=str(sampler))


def test_samplers_draw_from_their_distribution():
    """Every option at once, neutral where a case does not give it: one program."""
    count = 20_000
    neutral = {"top_k": 99, "top_p": 1.0, "min_p": 0.0, "logit_bias": {0: 0.0}}

    @jax.jit
    def draw(sampler):
        keys = jax.random.split(jax.random.key(0), count)
        return sampler(jnp.broadcast_to(LOGITS, (count, 5)), keys)

    for sampler, expected in EXPECTED:
        given = {name: getattr(sampler, name) for name in neutral if getattr(sampler, name) is not None}
        tokens = draw(Sampler(sampler.temperature, **neutral | given).as_arrays(5))
        frequencies = np.bincount(tokens, minlength=5) / count
        np.testing.assert_allclose(frequencies, expected, atol=0.015, err_msg=str(sampler))


@jax.jit
def cuts(logits, k, p):
    return Sampler(1.0, top_k=k).cut(logits), Sampler(1.0, top_p=p).cut(logits)


@settings(deadline=None, max_examples=50, derandomize=True)
@given(st.lists(st.floats(-5, 5, width=32), min_size=5, max_size=5), st.integers(1, 5), st.floats(0.01, 1.0))
def test_cuts_keep_the_likeliest(logits, k, p):
    logits = np.array([logits], np.float32)
    likeliest, nucleus = (np.asarray(cut)[0] > -np.inf for cut in cuts(logits, np.int32(k), np.float32(p)))
    kept = likeliest
    assert kept.sum() >= k and (logits[0][kept].min() > logits[0][~kept].max(initial=-np.inf) or kept.all())
    kept = nucleus
    mass = np.exp(logits[0].astype(np.float64))
    mass /= mass.sum()
    assert kept.any() and mass[kept].sum() >= p - 1e-5 and mass[kept].sum() - mass[kept].min() < p + 1e-5
    assert kept.all() or mass[kept].min() >= mass[~kept].max()


def text(*rows, prompt_lengths):
    size = max(map(len, rows))
    ids = np.array([list(row) + [9] * (size - len(row)) for row in rows], np.int32)  # later tokens mean nothing
    return Text(*map(jnp.asarray, (ids, np.array(prompt_lengths), np.array([len(row) for row in rows]))))


def penalised(sampler, logits, *arguments):
    """In words only: wrong arguments are found before anything is computed."""
    return jax.eval_shape(lambda logits: sampler.penalise(logits, *arguments), np.asarray(logits))


def double(logits, text):
    return logits * 2 + text.lengths[:, None]


class TestPenalties:
    TEXT = text([1, 2, 1, 3, 1, 2], [4, 4, 4, 0], prompt_lengths=[3, 1])
    LOGITS = np.array([[2.0, -1.0, 0.5, 1.0, 3.0, 0.0, 0, 0, 0, 1]] * 2, np.float32)
    SAMPLERS = {
        "counts": Sampler(presence_penalty=0.5, frequency_penalty=0.25),
        "repetition": Sampler(repetition_penalty=2.0),
        "function": Sampler(logit_bias={3: 5.0}, presence_penalty=1.0, logits_fn=double),
        **{str(size): Sampler(no_repeat_ngram=size) for size in (1, 2, 3, 4, 99)},
    }

    @classmethod
    @functools.cache
    def given(cls):
        @jax.jit
        def penalise(logits, text):
            return {name: sampler.penalise(logits, text) for name, sampler in cls.SAMPLERS.items()}

        return jax.device_get(penalise(cls.LOGITS, cls.TEXT))

    def test_presence_and_frequency_count_written_tokens(self):
        counts = np.zeros((2, 10))
        counts[0, [3, 1, 2]], counts[1, 4], counts[1, 0] = 1, 2, 1
        np.testing.assert_allclose(self.given()["counts"], self.LOGITS - 0.5 * (counts > 0) - 0.25 * counts, atol=1e-6)

    def test_repetition_counts_the_prompt_too(self):
        wanted = self.LOGITS.copy()
        wanted[0, [2, 3]] /= 2
        wanted[0, 1] *= 2
        wanted[1, [4, 0]] /= 2
        np.testing.assert_allclose(self.given()["repetition"], wanted, atol=1e-6)

    @pytest.mark.parametrize(
        ("size", "banned"),
        [(1, [{1, 2, 3}, {4, 0}]), (2, [{1}, set()]), (3, [{1}, set()]), (4, [set(), set()]), (99, [set(), set()])],
    )
    def test_no_ngram_stands_twice(self, size, banned):
        assert [set(np.flatnonzero(row == -np.inf)) for row in self.given()[str(size)]] == banned

    def test_bias_and_function_in_order(self):
        wanted = self.LOGITS.copy()
        wanted[:, 3] += 5
        wanted[0, [1, 2, 3]] -= 1
        wanted[1, [4, 0]] -= 1
        np.testing.assert_allclose(self.given()["function"], wanted * 2 + np.array([[6], [4]]), atol=1e-6)

    def test_wrong_biases_and_functions_are_refused_in_words(self):
        with pytest.raises(ValueError, match=r"logit_bias must name tokens from 0 to 9; got \[10\]"):
            penalised(Sampler(logit_bias={10: 1.0}), self.LOGITS)
        with pytest.raises(ValueError, match=r"logit_bias must have shape \(10,\) or \(rows, 10\); got \(3,\)"):
            penalised(Sampler(logit_bias=np.zeros(3, np.float32)), self.LOGITS)
        with pytest.raises(ValueError, match="penalties, n-grams and logits_fn need the text so far"):
            penalised(Sampler(repetition_penalty=1.5), self.LOGITS)
        with pytest.raises(ValueError, match="logits_fn must return logits of the shape that it gets"):
            penalised(Sampler(logits_fn=lambda logits, text: logits[:, :1]), self.LOGITS, self.TEXT)


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize("shape", [(3,), (1, 2, 3)])
@pytest.mark.parametrize(
    "call",
    [
        lambda logits: Sampler().penalise(logits),
        lambda logits: Sampler().cut(logits),
        lambda logits: Sampler().probabilities(logits),
        lambda logits: Sampler(None)(logits, None),
        lambda logits: Sampler(0.5)(logits, None),
    ],
    ids=["penalise", "cut", "probabilities", "greedy", "drawn"],
)
def test_a_sampler_refuses_logits_of_other_shapes_in_words(call, shape):
    with pytest.raises(ValueError, match=r"Sampler: logits must be of shape \(rows, vocab_size\); got logits.shape="):
        call(np.zeros(shape, np.float32))


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda text: text.of_prompt(zeros(3), zeros(3), 5), r"ids must be integers of shape \(rows, length\)"),
        (lambda text: text.of_prompt(zeros(1, 2, 3), zeros(1, 2, 3), 5), "ids must be integers"),
        (
            lambda text: text.of_prompt(zeros(2, 3), zeros(1, 2, 3), 5),
            r"position_ids must be integers of shape \(2, 3\)",
        ),
        (
            lambda text: text.select_rows(zeros(1, 2)),
            r"rows must be integers of shape \(rows,\); got rows.shape=\(1, 2\)",
        ),
        (lambda text: text.append(zeros(2, 1)), r"token must be integers of shape \(2,\); got token.shape=\(2, 1\)"),
        (
            lambda text: text.append(zeros(2), zeros(2, 1) == 0),
            r"where must be of shape \(2,\); got where.shape=\(2, 1\)",
        ),
        (
            lambda text: text.change(np.zeros((3, 5), np.float32), lambda x: x, prompt=True),
            r"logits must be of shape \(2, vocab_size\); got logits.shape=\(3, 5\)",
        ),
        (lambda text: text.written(1, zeros(1)), r"fill must be integers of shape \(\); got fill.shape=\(1,\)"),
        (lambda text: text.ends_with(zeros(3)), r"sequences must be integers of shape \(sequences, length\); got"),
        (lambda text: text.ends_with(zeros(1, 2, 3)), "sequences must be integers"),
    ],
)
def test_a_text_refuses_other_shapes_in_words(call, words):
    with pytest.raises(ValueError, match=f"Text: {words}"):
        call(Text(zeros(2, 7), zeros(2), zeros(2)))


def zeros(*shape):
    return np.zeros(shape, np.int32)


def test_drawing_takes_one_key_a_row(unchecked_shapes):
    with pytest.raises(ValueError, match=r"Sampler: keys must be of shape \(2,\); got keys.shape=\(\)"):
        Sampler(0.5)(jax.device_put(np.zeros((2, 3), np.float32)), jax.random.key(0))


@pytest.fixture(scope="module")
def translator():
    return build(lambda rngs: Transformer(rngs, encoder=CONFIG, decoder=CONFIG))


def test_sources_longer_than_max_len_are_read_where_positions_are_relative():
    config = dataclasses.replace(CONFIG, pos_emb_type="relative", num_layers=1, max_len=5)
    model, source = build(lambda rngs: Transformer(rngs, encoder=config, decoder=config)), np.arange(9)[None]
    written = model.generate(source, 1, start_token=1)
    assert written.tokens[0, 0] == nnx.jit(Transformer.__call__)(model, source, np.array([[1]]))[0, 0].argmax()


SOURCE, SOURCE_REAL = prompt(2, 6), np.array([[True] * 6, [True, True, True, False, False, False]])


def check_against_the_source(translator, tokens, log_probs):
    """Checks the log-probabilities of two rows a source against the whole model."""

    @jax.jit
    def whole(target):
        source, real = (np.repeat(x, 2, axis=0) for x in (SOURCE, SOURCE_REAL))
        return translator.log_probs(source, target, source_padding_mask=real)

    target = np.concatenate([np.ones((4, 1), np.int32), tokens], axis=1)
    found = np.take_along_axis(np.asarray(whole(target[:, :-1])), target[:, 1:, None], axis=2)[..., 0]
    np.testing.assert_allclose(log_probs, found if np.ndim(log_probs) == 2 else found.sum(1), atol=1e-5)


def test_samples_of_a_source_attend_to_it(translator):
    sampler = {"temperature": 1.0, "key": jax.random.key(0)}
    written = translator.generate(SOURCE, 5, 1, num_samples=2, source_padding_mask=SOURCE_REAL, **sampler)
    check_against_the_source(translator, written.tokens, written.log_probs)
    assert len({tuple(row) for row in written.tokens.tolist()}) == 4


@pytest.mark.contract
def test_beams_of_a_source_attend_to_it(translator):
    options = {"num_beams": 2, "length_penalty": 0.0, "source_padding_mask": SOURCE_REAL}
    beams = translator.beam_search(SOURCE, 5, 1, **options)
    check_against_the_source(translator, np.reshape(beams.tokens, (4, 5)), np.reshape(beams.scores, -1))


@pytest.mark.contract
def test_an_encoder_decoder_generates_in_every_way(translator):
    options = {"source_padding_mask": SOURCE_REAL}
    greedy = translator.generate(SOURCE, 5, 1, **options)
    streamed = np.stack(list(translator.stream(SOURCE, 5, 1, **options)), axis=1)
    np.testing.assert_array_equal(streamed, greedy.tokens)
    beams = translator.beam_search(SOURCE, 5, 1, num_beams=1, **options)
    np.testing.assert_array_equal(beams.tokens[:, 0], greedy.tokens)
    np.testing.assert_allclose(beams.scores[:, 0], np.asarray(greedy.log_probs).sum(1) / 5, atol=1e-5)
    draft = build(lambda rngs: Transformer(rngs, encoder=CONFIG, decoder=CONFIG), seed=1)
    drafted = translator.generate(SOURCE, 5, 1, draft=draft, num_draft_tokens=2, **options)
    np.testing.assert_array_equal(drafted.tokens, greedy.tokens)


def test_generate_may_be_a_part_of_a_program(model):
    real = np.ones(np.shape(prompt()), bool)
    real[:, 0] = False
    options = {"max_new_tokens": 2, "end_token": 3}

    @jax.jit
    def run(ids, real):
        return model.generate(ids, padding_mask=real, **options)

    have, want = run(prompt(), real), model.generate(prompt(), padding_mask=real, **options)
    np.testing.assert_array_equal(have.tokens, want.tokens)
    np.testing.assert_allclose(have.log_probs, want.log_probs, atol=1e-5)


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize("name", ["max_new_tokens", "num_samples", "end_token", "stop_sequences"])
def test_a_traced_number_on_which_sizes_depend_is_refused_in_words(model, name):
    def run(x):
        value = [[x]] if name == "stop_sequences" else x
        return model.generate(prompt(), **({"max_new_tokens": 2} | {name: value}))

    with pytest.raises(ValueError, match=f"generate: {name} must be known, since sizes depend on it; got a traced"):
        jax.eval_shape(run, 2)


def test_a_stream_of_traced_tokens_is_refused_in_words(model):
    with pytest.raises(ValueError, match="stream: tokens must be known to be yielded; got traced ones"):
        jax.eval_shape(lambda ids: next(model.stream(ids, max_new_tokens=2)), prompt())


class TestBeams:
    """All but the last three are one program."""

    PROMPTS = [PROMPTS[0], PROMPTS[1]]
    IDS, REAL = slowly.lay_out(PROMPTS, 5)

    def search(self, model, bias=None, end_token=22, **options):
        sampler = Sampler(logit_bias=bias or {0: 0.0})
        options = {"num_beams": 8, "max_new_tokens": 4, "padding_mask": self.REAL} | options
        return jax.device_get(model.beam_search(self.IDS, sampler=sampler, end_token=end_token, **options))

    def test_beams_that_do_not_exist_are_no_texts(self, model):
        beams = self.search(model, {token: -float("inf") for token in range(23) if token != 1})
        assert beams.tokens[:, 0].tolist() == [[1] * 4] * 2 and beams.lengths.tolist() == [[4, *[0] * 7]] * 2
        assert (beams.scores[:, 0] > -100).all() and (beams.scores[:, 1:] == -1e9).all()

    def test_scores_are_those_of_the_texts(self, model):
        free = slowly.write(model, self.PROMPTS, 4)[0]
        end = int(free[0, 1])
        beams = self.search(model, end_token=end, length_penalty=0.7)
        for row, prompt in enumerate(self.PROMPTS):
            written = np.arange(4) < beams.lengths[row][:, None]
            log_probs = slowly.log_probs(model, [prompt] * 8, beams.tokens[row])
            wanted = (log_probs * written).sum(1) / beams.lengths[row] ** 0.7
            np.testing.assert_allclose(beams.scores[row], wanted, atol=1e-4)
            assert (np.diff(beams.scores[row]) <= 0).all()
            assert (beams.tokens[row][~written] == end).all()
        assert (beams.lengths < 4).any() and (beams.lengths == 4).any()

    def test_the_best_text_is_no_worse_than_the_greedy_one(self, model):
        log_probs = slowly.write(model, self.PROMPTS, 4)[1]
        beams = self.search(model, length_penalty=0.0)
        assert (beams.scores[:, 0] >= log_probs.sum(1) - 1e-5).all()

    def test_all_beams_find_the_best_texts(self, model):
        """As many beams as there are beginnings, since only two tokens are allowed: an exhaustive search."""
        beams = self.search(model, {token: -float("inf") for token in range(23) if token not in (4, 9)})
        texts = np.array(list(itertools.product((4, 9), repeat=4)))
        for row, prompt in enumerate(self.PROMPTS):
            scores = slowly.log_probs(model, [prompt] * 16, texts).sum(1) / 4
            best = np.argsort(-scores)[:8]
            np.testing.assert_array_equal(beams.tokens[row], texts[best])
            np.testing.assert_allclose(beams.scores[row], scores[best], atol=1e-5)

    def test_a_prompt_may_have_numbers_of_its_own(self, model):
        """As alone, though the beams of a prompt are rows too."""
        biases = np.random.default_rng(5).normal(0, 3, (2, 23)).astype(np.float32)
        options = {"num_beams": 8, "max_new_tokens": 4, "padding_mask": self.REAL, "end_token": 22}
        both = model.beam_search(self.IDS, sampler=Sampler(logit_bias=biases), **options)
        for row, bias in enumerate(biases):
            alone = self.search(model, dict(enumerate(bias.tolist())))
            np.testing.assert_array_equal(both.tokens[row], alone.tokens[row])
        assert (both.tokens[0, 0] != alone.tokens[0, 0]).any()

    @pytest.mark.contract
    def test_one_beam_is_greedy(self, model):
        one = self.search(model, num_beams=1)
        np.testing.assert_array_equal(one.tokens[:, 0], slowly.write(model, self.PROMPTS, 4)[0])

    @pytest.mark.contract
    @pytest.mark.parametrize("kind", ["ring", "paged"])
    def test_the_kind_of_cache_changes_nothing(self, model, kind):
        wanted, given = (self.search(model, cache=cache) for cache in (None, kind))
        np.testing.assert_array_equal(given.tokens, wanted.tokens)

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"num_beams": 0}, "num_beams must be at least 1 and at most vocab_size=23; got num_beams=0"),
            (
                {"early_stopping": "soon"},
                "early_stopping must be one of heuristic, first, never; got early_stopping='soon'",
            ),
            (
                {"sampler": Sampler(1.0, top_k=3)},
                "temperature must be 0 and each of top_k, top_p, min_p None; got temperature=1.0, top_k=3",
            ),
            ({"length_penalty": float("nan")}, "length_penalty must be finite; got length_penalty=nan"),
            ({"sampler": Sampler(np.array([0, 0.5]))}, r"got temperature=\[0.  0.5\]"),
            *(({"sampler": Sampler(**{name: 1})}, f"got temperature=0.0, {name}=1") for name in CUTS),
        ],
    )
    @pytest.mark.usefixtures("unchecked_shapes")
    def test_wrong_input_is_refused_in_words(self, model, options, words):
        with pytest.raises(ValueError, match=words):
            model.beam_search(prompt(), **{"num_beams": 2, "max_new_tokens": 3} | options)


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1; got max_new_tokens=0"),
        ({"prompt_ids": np.zeros((1, 0), int)}, "at least one token; got .1, 0."),
        ({"prompt_ids": np.array([[23]])}, "token ids must be at least 0 and below 23; got 23"),
        ({"sampler": Sampler(1.0)}, "sampling needs a key; got temperature=1.0"),
        ({"key": own_keys(0, 3)}, r"one typed key .* or one a row, here 2; got shape=\(3,\)"),
        ({"key": jax.device_put(np.zeros(2, np.uint32))}, "got shape=.2,., dtype=uint32"),
        ({"padding_mask": np.zeros((2, 5), bool)}, "with a real token in every row"),
        ({"padding_mask": np.ones((2, 4), bool)}, "got shape=.2, 4."),
        ({"prompt_ids": np.zeros((0, 3), int)}, "at least one row and at least one token; got .0, 3."),
        ({"end_token": [3.5]}, "stop sequences and end tokens must be whole numbers, at least one; got .3.5."),
        ({"end_token": True}, "stop sequences and end tokens must be whole numbers"),
        ({"draft": "small"}, "a draft must be a TransformerLM too; got str"),
        ({"num_samples": 0}, "num_samples must be at least 1; got num_samples=0"),
        ({"end_token": 23}, "stop sequences and end tokens must be at least 0 and below 23; got 23"),
        ({"stop_sequences": [[1], []]}, "stop sequences and end tokens must be whole numbers, at least one; got .."),
        ({"stop_sequences": [3, 4]}, r"stop_sequences must be sequences of tokens; got \[3, 4\]. Use end_token"),
        ({"cache_dtype": "int4"}, "dtype must be a floating one or int8; got dtype=int4"),
        ({"cache": "infinite"}, "cache must be one of contiguous, ring, paged, or a function .*; got cache='infinite'"),
    ],
)
def test_wrong_input_is_refused_in_words(model, options, words):
    options = {"prompt_ids": prompt(), "max_new_tokens": 3, **options}
    with pytest.raises(ValueError, match=words):
        model.generate(options.pop("prompt_ids"), **options)


@pytest.mark.parametrize("option", ["draft", "caches", "prefill_chunk"])
def test_options_that_streaming_a_translation_lacks_are_refused_in_words(translator, option):
    with pytest.raises(TypeError, match=f"Transformer.stream: options must be among .*; got {option}"):
        translator.stream(SOURCE, 5, 1, **{option: None})


def test_options_that_streaming_lacks_are_refused_in_words(model):
    with pytest.raises(ValueError, match="a draft and return_caches, in place.*got draft, num_draft_tokens"):
        model.stream(prompt(), max_new_tokens=3, draft=model, num_draft_tokens=2)


def test_a_position_table_cannot_be_left():
    config = dataclasses.replace(CONFIG, pos_emb_type="learned", max_len=7)
    model = build(lambda rngs: TransformerLM(rngs, config))
    assert np.isfinite(model.generate(prompt(), max_new_tokens=3).log_probs).all()  # positions 0 to 6
    with pytest.raises(ValueError, match="must fit into the 7 positions of the model; got 5 . 4"):
        model.generate(prompt(), max_new_tokens=4)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"temperature": -1.0}, "temperature must be at least 0 and finite; got temperature=-1.0"),
        ({"top_k": 0}, "top_k must be a whole number, at least 1 and below .*; got top_k=0"),
        ({"min_p": 1.5}, "min_p must be at least 0 and at most 1; got min_p=1.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be above 0 and finite"),
        ({"frequency_penalty": float("inf")}, "frequency_penalty must be finite; got frequency_penalty=inf"),
        ({"top_k": 2.7}, "top_k must be a whole number, at least 1"),
        ({"no_repeat_ngram": 2.0}, "no_repeat_ngram must be at least 1 and a whole number; got no_repeat_ngram=2.0"),
        (
            {"temperature": np.ones((2, 1))},
            "temperature must be one number for all rows, or an array .rows,.; got shape=.2, 1.",
        ),
        ({"temperature": jax.device_put(np.ones((2, 1)))}, "temperature must be one number for all rows, or an array"),
        ({"top_p": [0.5, 0.9]}, r"top_p must be a number or an array \(rows,\); got \[0.5, 0.9\]. Use numpy.array."),
        ({"top_p": np.float32(5)}, "top_p must be above 0 and at most 1; got top_p=5.0"),
        ({"top_p": np.array([0.5, 1.0, 1.5])}, r"top_p must be above 0 and at most 1; got top_p\[2\]=1.5"),
        ({"top_k": jax.device_put(np.array([3, 0]))}, r"top_k must be a whole number, at least 1 .*; got top_k\[1\]=0"),
        ({"top_k": np.array([3.5])}, r"top_k must be a whole number, at least 1 .*; got top_k\[0\]=3.5"),
        ({"temperature": np.array([0.0, np.nan])}, r"temperature must be at least 0 .*; got temperature\[1\]=nan"),
        ({"no_repeat_ngram": 0}, "no_repeat_ngram must be at least 1 and a whole number; got no_repeat_ngram=0"),
        ({"presence_penalty": 1e39}, "presence_penalty must be finite"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1"),
        ({"top_p": 1.5}, "top_p must be above 0 and at most 1; got top_p=1.5"),
    ],
)
def test_samplers_refuse_values_out_of_range(fields, words):
    with pytest.raises(ValueError, match=words):
        Sampler(**fields)
