"""Generation: the tokens of the slow way, one compilation, rows on their own, samplers that keep their promise."""

import dataclasses
import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import attnax
from attnax import Sampler, Transformer, TransformerConfig, TransformerLM, generation
from attnax.generation import Text, samplers

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


@pytest.fixture(scope="module")
def model():
    return TransformerLM(nnx.Rngs(3), CONFIG)


def prompt(batch=2, length=5, seed=0):
    return jax.random.randint(jax.random.key(seed), (batch, length), 0, CONFIG.vocab_size)


def test_greedy_tokens_are_those_of_the_full_forward():
    model, ids = TransformerLM(nnx.Rngs(3), dataclasses.replace(CONFIG, num_layers=2)), prompt()
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


MODES = {
    "plain": {"sampler": Sampler(0.7, top_k=5, top_p=0.9, repetition_penalty=1.1)},
    "draft": {"draft": True, "sampler": Sampler(1.0)},
    "beams": {"num_beams": 3, "length_penalty": 0.5},
    "ring": {"cache": "ring"},
    "paged": {"cache": "paged"},
    "int8": {"cache_dtype": "int8"},
    "samples": {"num_samples": 3, "sampler": Sampler(1.0), "stop_sequences": [[1, 2]]},
}


@pytest.mark.parametrize("mode", [pytest.param(m, marks=() if m == "plain" else pytest.mark.thorough) for m in MODES])
def test_a_generation_is_one_compilation_and_the_next_is_none(mode, count_compilations):
    def make(d_ff, seed, layers=2):
        return TransformerLM(nnx.Rngs(seed), dataclasses.replace(CONFIG, d_ff=d_ff, num_layers=layers))

    def run(model, draft, seed, sampler=None):
        options = dict(MODES[mode])
        if "num_beams" in options:
            model.beam_search(prompt(seed=seed), max_new_tokens=6, **options)
            return
        options["sampler"] = sampler or options.get("sampler")
        if options.pop("draft", None):
            options["draft"] = draft
        model.generate(prompt(seed=seed), max_new_tokens=6, key=jax.random.key(seed), **options)

    models = [(make(d_ff, seed), make(d_ff, seed, 1)) for d_ff, seed in ((22, 3), (23, 3), (23, 4))]
    run(*models[0], 3)  # compiles the small eager operations around the program
    del count_compilations[:]
    run(*models[1], 3)
    assert len(count_compilations) == 1
    del count_compilations[:]
    other = Sampler(1, top_k=3, top_p=0.5, repetition_penalty=2) if mode == "plain" else None
    run(*models[2], 4, other)
    assert not count_compilations


def test_the_cache_is_donated(model):
    writer = model._writer()
    request = generation.make_request(prompt(), vocab_size=23, max_new_tokens=3)
    caches = attnax.init_decoder_kv_caches_from_config(CONFIG, batch_size=2, max_len=8)
    _, after = generation.generate(writer.step, writer.state, request, caches, max_new_tokens=3)
    assert all(x.is_deleted() for x in jax.tree.leaves(caches))
    assert int(after[0].length) == 7 and after[0].positions[0].tolist() == [0, 1, 2, 3, 4, 5, 6, -1]


@pytest.mark.thorough
def test_memory_is_flat_over_a_thousand_generations(model):
    def resident():
        gc.collect()
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    options = {"max_new_tokens": 3, "sampler": Sampler(1.0)}
    for seed in range(100):
        model.generate(prompt(), key=jax.random.key(seed), **options)
    before, arrays = resident(), len(jax.live_arrays())  # in this order: what other tests left is collected first
    for seed in range(1000):
        model.generate(prompt(), key=jax.random.key(seed), **options)
    grown = resident() - before
    assert len(jax.live_arrays()) <= arrays
    assert grown < 2**23  # eight kilobytes a generation: what the allocator of a large process may keep


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


def test_neighbours_do_not_change_a_row(model):
    ids, keys = prompt(3, 5), jax.random.split(jax.random.key(1), 3)
    options = {"max_new_tokens": 8, "sampler": Sampler(1.0), "key": keys}
    one = model.generate(ids, padding_mask=np.ones((3, 5), bool), **options)
    other = np.arange(5)[None] >= np.array([[0], [3], [4]])
    two = model.generate(ids.at[1:].add(1) % CONFIG.vocab_size, padding_mask=other, **options)
    np.testing.assert_array_equal(one.tokens[0], two.tokens[0])
    np.testing.assert_array_equal(one.log_probs[0], two.log_probs[0])


def test_samples_of_a_prompt_are_those_of_its_rows(model):
    """The prompt is read once; each sample is what a row of its own with that key is."""
    ids = prompt(2, 5)
    real = np.array([[True] * 5, [False, False, True, True, True]])
    options = {"max_new_tokens": 7, "sampler": Sampler(1.0), "padding_mask": real}
    keys = jax.random.split(jax.random.key(3), 2)
    several = model.generate(ids, num_samples=3, key=keys, **options)
    assert several.tokens.shape == (6, 7) and len({tuple(row) for row in several.tokens.tolist()}) == 6
    for sample in range(3):
        own = jax.vmap(lambda key, n=sample: jax.random.fold_in(key, n))(keys)
        alone = model.generate(ids, key=own, **options)
        np.testing.assert_array_equal(several.tokens[sample::3], alone.tokens)
    rows = model.generate(
        jnp.repeat(ids, 3, axis=0), key=jax.random.key(5), **options | {"padding_mask": np.repeat(real, 3, axis=0)}
    )
    np.testing.assert_array_equal(
        model.generate(ids, num_samples=3, key=jax.random.key(5), **options).tokens, rows.tokens
    )
    streamed = np.stack(list(model.stream(ids, num_samples=3, key=keys, **options)), axis=1)
    np.testing.assert_array_equal(streamed, several.tokens)


@pytest.mark.parametrize(
    "options", [{"cache": "ring"}, {"cache": "paged"}, {"cache": "paged", "cache_dtype": "float32"}], ids=str
)
def test_the_kind_of_cache_changes_nothing(model, options):
    real = np.array([[True] * 5, [True, True, False, False, False]])
    wanted = model.generate(prompt(), max_new_tokens=9, padding_mask=real)
    given = model.generate(prompt(), max_new_tokens=9, padding_mask=real, **options)
    np.testing.assert_array_equal(given.tokens, wanted.tokens)
    np.testing.assert_allclose(given.log_probs, wanted.log_probs, atol=1e-5)


def test_eight_bits_cost_little(model):
    exact = model.generate(prompt(), max_new_tokens=9)
    rounded = model.generate(prompt(), max_new_tokens=9, cache_dtype="int8")
    error = np.abs(rounded.log_probs[:, 1] - exact.log_probs[:, 1])
    assert (error > 0).any() and (error < 0.02).all()


def test_stop_sequences_end_a_row_where_they_were_written_as_a_whole(model):
    free = model.generate(prompt(), max_new_tokens=9).tokens
    stops = [free[0, 2:5].tolist(), free[1, 6:8].tolist(), [*prompt()[1, -1:].tolist(), int(free[1, 0])]]
    stopped = model.generate(prompt(), max_new_tokens=9, stop_sequences=stops)
    for row in range(2):  # the last of them begins in the prompt, which does not count
        written = free[row].tolist()
        ends = [n for n in range(1, 10) if any(written[:n][-len(s) :] == s for s in stops if len(s) <= n)]
        length = min(ends, default=9)
        assert stopped.lengths[row] == length and stopped.tokens[row, :length].tolist() == written[:length]
        assert (stopped.tokens[row, length:] == CONFIG.pad_token_id).all()
    assert stopped.lengths[0] <= 5 and stopped.lengths[1] <= 8


def test_several_end_tokens(model):
    free = model.generate(prompt(), max_new_tokens=9).tokens
    ends = [int(free[0, 3]), int(free[1, 5])]
    stopped = model.generate(prompt(), max_new_tokens=9, end_token=ends)
    for row in range(2):
        first = min(i for i in range(9) if int(free[row, i]) in ends)
        assert stopped.lengths[row] == first + 1 and (stopped.tokens[row, first + 1 :] == ends[0]).all()


def test_generation_leaves_the_model_alone(model):
    model.train()
    before = jax.tree.map(jnp.copy, nnx.state(model))
    model.generate(prompt(), max_new_tokens=3)
    jax.tree.map(np.testing.assert_array_equal, before, nnx.state(model))
    model.eval()


def draw(sampler, logits, count=20_000):
    keys = jax.random.split(jax.random.key(0), count)
    tokens = jax.jit(sampler.__call__)(jnp.broadcast_to(jnp.asarray(logits), (count, len(logits))), keys)
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
        (Sampler(1.0, min_p=0.4), [4 / 9, 3 / 9, 2 / 9, 0, 0]),
        (Sampler(1.0, top_k=4, min_p=0.6), [4 / 7, 3 / 7, 0, 0, 0]),
        (Sampler(1.0, logit_bias={4: float(np.log(10.0))}), np.array([4, 3, 2, 0.6, 4]) / 13.6),
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


def text(*rows, prompt_lengths):
    size = max(map(len, rows))
    ids = np.array([list(row) + [9] * (size - len(row)) for row in rows], np.int32)  # what follows means nothing
    return Text(jnp.asarray(ids), jnp.asarray(prompt_lengths), jnp.asarray([len(row) for row in rows]))


def penalised(sampler, logits, *arguments):
    return np.asarray(sampler.penalise(jnp.asarray(logits, jnp.float32), *arguments))


class TestPenalties:
    TEXT = text([1, 2, 1, 3, 1, 2], [4, 4, 4, 0], prompt_lengths=[3, 1])
    LOGITS = np.array([[2.0, -1.0, 0.5, 1.0, 3.0, 0.0, 0, 0, 0, 1]] * 2, np.float32)

    def test_presence_and_frequency_count_what_was_written(self):
        counts = np.zeros((2, 10))
        counts[0, [3, 1, 2]], counts[1, 4], counts[1, 0] = 1, 2, 1
        given = penalised(Sampler(presence_penalty=0.5, frequency_penalty=0.25), self.LOGITS, self.TEXT)
        np.testing.assert_allclose(given, self.LOGITS - 0.5 * (counts > 0) - 0.25 * counts, atol=1e-6)

    def test_repetition_counts_the_prompt_too(self):
        given = penalised(Sampler(repetition_penalty=2.0), self.LOGITS, self.TEXT)
        wanted = self.LOGITS.copy()
        wanted[0, [2, 3]] /= 2
        wanted[0, 1] *= 2
        wanted[1, [4, 0]] /= 2
        np.testing.assert_allclose(given, wanted, atol=1e-6)

    @pytest.mark.parametrize(
        ("size", "banned"),
        [(1, [{1, 2, 3}, {4, 0}]), (2, [{1}, set()]), (3, [{1}, set()]), (4, [set(), set()]), (99, [set(), set()])],
    )
    def test_no_ngram_stands_twice(self, size, banned):
        given = penalised(Sampler(no_repeat_ngram=size), self.LOGITS, self.TEXT)
        assert [set(np.flatnonzero(row == -np.inf)) for row in given] == banned

    def test_bias_and_function_in_order(self):
        def double(logits, text):
            return logits * 2 + text.lengths[:, None]

        given = penalised(Sampler(logit_bias={3: 5.0}, presence_penalty=1.0, logits_fn=double), self.LOGITS, self.TEXT)
        wanted = self.LOGITS.copy()
        wanted[:, 3] += 5
        wanted[0, [1, 2, 3]] -= 1
        wanted[1, [4, 0]] -= 1
        np.testing.assert_allclose(given, wanted * 2 + np.array([[6], [4]]), atol=1e-6)

    def test_wrong_biases_and_functions_are_refused_in_words(self):
        with pytest.raises(ValueError, match=r"logit_bias must name tokens from 0 to 9; got \[10\]"):
            penalised(Sampler(logit_bias={10: 1.0}), self.LOGITS)
        with pytest.raises(ValueError, match=r"logit_bias must have shape \(10,\); got \(3,\)"):
            penalised(Sampler(logit_bias=jnp.zeros(3)), self.LOGITS)
        with pytest.raises(ValueError, match="penalties, n-grams and logits_fn need the text so far"):
            penalised(Sampler(repetition_penalty=1.5), self.LOGITS)
        with pytest.raises(ValueError, match="logits_fn must return logits of the shape that it gets"):
            penalised(Sampler(logits_fn=lambda logits, text: logits[:, :1]), self.LOGITS, self.TEXT)


def test_penalties_act_within_a_generation(model):
    """Against a loop in Python that draws with the same sampler on the full forward."""
    sampler = Sampler(0.0, repetition_penalty=1.7, frequency_penalty=0.3, no_repeat_ngram=2, logit_bias={5: 0.4})
    generation = model.generate(prompt(), max_new_tokens=7, sampler=sampler)
    ids = prompt()
    call = nnx.jit(lambda model, ids: model(ids))
    for index in range(7):
        logits = call(model, jnp.pad(ids, ((0, 0), (0, 12 - ids.shape[1]))))[:, ids.shape[1] - 1]
        so_far = Text(ids, jnp.array([5, 5]), jnp.array([ids.shape[1]] * 2))
        token = jnp.asarray(penalised(sampler, logits, so_far)).argmax(-1)
        np.testing.assert_array_equal(generation.tokens[:, index], token)
        ids = jnp.concatenate([ids, token[:, None]], axis=1)
    assert (generation.tokens != model.generate(prompt(), max_new_tokens=7).tokens).any()


@pytest.fixture(scope="module")
def translator():
    return Transformer(nnx.Rngs(0), encoder=CONFIG, decoder=CONFIG)


def test_an_encoder_decoder_generates_in_every_way(translator):
    source, real = prompt(2, 6), np.array([[True] * 6, [True, True, True, False, False, False]])
    greedy = translator.generate(source, 5, 1, source_padding_mask=real)
    streamed = np.stack(list(translator.stream(source, 5, 1, source_padding_mask=real)), axis=1)
    np.testing.assert_array_equal(streamed, greedy.tokens)
    beams = translator.beam_search(source, 5, 1, num_beams=1, source_padding_mask=real)
    np.testing.assert_array_equal(beams.tokens[:, 0], greedy.tokens)
    np.testing.assert_allclose(beams.scores[:, 0], greedy.log_probs.sum(1) / 5, atol=1e-5)
    several = translator.generate(
        source, 5, 1, num_samples=2, temperature=0.7, key=jax.random.key(0), source_padding_mask=real
    )
    alone = translator.generate(source[1:, :3], 5, 1, num_samples=2, temperature=0.7, key=jax.random.key(9))
    assert several.tokens.shape == (4, 5) and alone.tokens.shape == (2, 5)
    draft = Transformer(nnx.Rngs(1), encoder=CONFIG, decoder=CONFIG)
    drafted = translator.generate(source, 5, 1, draft=draft, source_padding_mask=real)
    np.testing.assert_array_equal(drafted.tokens, greedy.tokens)


def test_generate_says_that_it_compiles_itself(model):
    with pytest.raises(ValueError, match="prompt_ids must be known; got a traced array"):
        jax.jit(lambda ids: model.generate(ids, max_new_tokens=2))(prompt())


class TestBeams:
    def test_beams_that_do_not_exist_are_no_texts(self, model):
        only = Sampler(logit_bias={token: -float("inf") for token in range(23) if token != 1})
        beams = model.beam_search(prompt(), num_beams=3, max_new_tokens=4, sampler=only)
        assert beams.tokens[:, 0].tolist() == [[1] * 4] * 2 and beams.lengths.tolist() == [[4, 0, 0]] * 2
        assert (beams.scores[:, 0] > -100).all() and (beams.scores[:, 1:] == -1e9).all()

    def test_one_beam_is_greedy_and_more_are_never_worse(self, model):
        greedy = model.generate(prompt(), max_new_tokens=6)
        one = model.beam_search(prompt(), num_beams=1, max_new_tokens=6)
        np.testing.assert_array_equal(one.tokens[:, 0], greedy.tokens)
        four = model.beam_search(prompt(), num_beams=4, max_new_tokens=6, length_penalty=0.0)
        assert (np.diff(four.scores, axis=1) <= 0).all()
        assert (four.scores[:, 0] >= greedy.log_probs.sum(1) - 1e-5).all()

    def test_scores_are_those_of_the_texts(self, model):
        beams = model.beam_search(
            prompt(),
            num_beams=3,
            max_new_tokens=6,
            length_penalty=0.7,
            end_token=int(model.generate(prompt(), max_new_tokens=3).tokens[0, 1]),
        )
        call = nnx.jit(lambda model, ids: model(ids))
        for row in range(2):
            for beam in range(3):
                length = int(beams.lengths[row, beam])
                ids = jnp.concatenate([prompt()[row], beams.tokens[row, beam]])[None]
                log_probs = jax.nn.log_softmax(call(model, ids))[0, 4:-1]
                total = sum(float(log_probs[i, beams.tokens[row, beam, i]]) for i in range(length))
                assert float(beams.scores[row, beam]) == pytest.approx(total / length**0.7, abs=1e-4)
        assert (beams.lengths < 6).any()

    def test_all_beams_find_the_best_text(self, model):
        """As many beams as there are beginnings: an exhaustive search."""
        ids = prompt(1)
        beams = model.beam_search(ids, num_beams=23, max_new_tokens=2)
        call = nnx.jit(lambda model, ids: jax.nn.log_softmax(model(ids)))
        first = call(model, ids)[0, -1]
        continued = jnp.concatenate([jnp.repeat(ids, 23, axis=0), jnp.arange(23)[:, None]], axis=1)
        both = first[:, None] + call(model, continued)[:, -1]
        best = jnp.argsort(-both.reshape(-1))[:23]
        found = beams.tokens[0, :, 0] * 23 + beams.tokens[0, :, 1]
        np.testing.assert_array_equal(found, best)

    @pytest.mark.parametrize("kind", ["ring", "paged"])
    def test_the_kind_of_cache_changes_nothing(self, model, kind):
        options = {
            "num_beams": 3,
            "max_new_tokens": 6,
            "padding_mask": np.array([[True] * 5, [False, False, True, True, True]]),
        }
        wanted, given = (model.beam_search(prompt(), **options, cache=cache) for cache in (None, kind))
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
                "temperature must be 0 and nothing be cut; got temperature=1.0, top_k=3",
            ),
            ({"length_penalty": float("nan")}, "length_penalty must be finite; got length_penalty=nan"),
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
        ({"prompt_ids": jnp.zeros((1, 0), int)}, "at least one token; got .1, 0."),
        ({"prompt_ids": jnp.array([[23]])}, "token ids must be at least 0 and below 23; got 23"),
        ({"sampler": Sampler(1.0)}, "sampling needs a key; got temperature=1.0"),
        ({"key": jax.random.split(jax.random.key(0), 3)}, r"one typed key .* or one a row, here 2; got shape=\(3,\)"),
        ({"key": jax.random.PRNGKey(0)}, "got shape=.2,., dtype=uint32"),
        ({"padding_mask": np.zeros((2, 5), bool)}, "with a real token in every row"),
        ({"padding_mask": np.ones((2, 4), bool)}, "got shape=.2, 4."),
        ({"prompt_ids": jnp.zeros((0, 3), int)}, "at least one row and at least one token; got .0, 3."),
        ({"end_token": [3.5]}, "stop sequences and end tokens must be whole numbers, at least one; got .3.5."),
        ({"end_token": True}, "stop sequences and end tokens must be whole numbers"),
        ({"draft": "small"}, "a draft must be a TransformerLM too; got str"),
        ({"num_samples": 0}, "num_samples must be at least 1; got num_samples=0"),
        ({"end_token": 23}, "stop sequences and end tokens must be at least 0 and below 23; got 23"),
        ({"stop_sequences": [[1], []]}, "stop sequences and end tokens must be whole numbers, at least one; got .."),
        ({"stop_sequences": [3, 4]}, r"stop_sequences must be sequences of tokens; got \[3, 4\]. Use end_token"),
        ({"cache_dtype": "int4"}, "dtype must be a floating one or int8; got dtype=int4"),
        ({"cache": "infinite"}, "cache must be one of contiguous, ring, paged; got cache='infinite'"),
    ],
)
def test_wrong_input_is_refused_in_words(model, options, words):
    options = {"prompt_ids": prompt(), "max_new_tokens": 3, **options}
    with pytest.raises(ValueError, match=words):
        model.generate(options.pop("prompt_ids"), **options)


def test_what_streaming_lacks_is_refused_in_words(model):
    with pytest.raises(ValueError, match="takes the options of generate, but no draft; got draft, num_draft_tokens"):
        model.stream(prompt(), max_new_tokens=3, draft=model, num_draft_tokens=2)


def test_a_position_table_cannot_be_left():
    model = TransformerLM(nnx.Rngs(3), dataclasses.replace(CONFIG, pos_emb_type="learned", max_len=7))
    assert jnp.isfinite(model.generate(prompt(), max_new_tokens=3).log_probs).all()  # positions 0 to 6
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
        ({"temperature": jnp.ones(2)}, "temperature must be one number for all rows; got shape=.2,."),
        ({"no_repeat_ngram": 0}, "no_repeat_ngram must be at least 1 and a whole number; got no_repeat_ngram=0"),
        ({"presence_penalty": 1e39}, "presence_penalty must be finite"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1"),
        ({"top_p": 1.5}, "top_p must be above 0 and at most 1; got top_p=1.5"),
    ],
)
def test_samplers_refuse_values_out_of_range(fields, words):
    with pytest.raises(ValueError, match=words):
        Sampler(**fields)
