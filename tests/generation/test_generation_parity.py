"""Generation gives the tokens of Hugging Face transformers, which tests/parity/generation.py wrote down."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnax import Sampler, TransformerLM
from attnax.generation import Text, TokenRules, beam_search, make_request
from attnax.pretrained import load_generation_config

with np.load(Path(__file__).parents[1] / "goldens" / "generation.npz") as file:
    GOLDENS = dict(file)


def cases(group):
    return [{"index": index, **case} for index, case in enumerate(json.loads(str(GOLDENS[f"{group}/cases"])))]


def parameters(group, tier):
    """A group's cases for pytest; `tier` gives the marks of cases whose programs teach little more."""
    return [pytest.param(case, id=words(case), marks=tier(case) or []) for case in cases(group)]


def sampler(case, **neutral):
    fields = neutral | case["sampler"]
    if "logit_bias" in fields:
        fields["logit_bias"] = dict(fields["logit_bias"])
    return Sampler(**fields)


NEUTRAL = {"repetition_penalty": 1.0, "logit_bias": [[0, 0.0]]}  # so that more cases share a program


def words(case):
    return " ".join(f"{name}={value}" for name, value in case.items() if name != "index" and value not in ({}, [], 0))


@functools.partial(jax.jit, static_argnames="size")
def write_text(prompt, position_ids, written, size):
    text = Text.of_prompt(prompt, position_ids, size)
    for token in written.T:
        text = text.append(token)
    return text


@jax.jit
def penalise_and_cut(sampler, logits, text):
    return sampler.cut(sampler.penalise(logits, text))


@pytest.mark.parametrize("padding", [0, 2])
def test_penalties_and_cuts_leave_the_same_logits(padding):
    ids = GOLDENS["cut/ids"].astype(np.int32)
    half = ids.shape[1] // 2
    prompt, position_ids = ids[:, :half], np.broadcast_to(np.arange(half, dtype=np.int32), (len(ids), half))
    prompt, position_ids = (np.pad(x, ((0, 0), (padding, 0)), constant_values=-1) for x in (prompt, position_ids))
    # One size, padding or not, and numbers that change nothing: more cases share a program.
    text = write_text(prompt, position_ids, ids[:, half:], ids.shape[1] + 3)
    neutral = NEUTRAL | {"temperature": 1.0, "top_k": 99, "min_p": 0.0}
    for case in cases("cut"):
        draw = sampler(case, **neutral).as_arrays(GOLDENS["cut/logits"].shape[-1])
        found = np.asarray(penalise_and_cut(draw, GOLDENS["cut/logits"][case["rounded"]], text))
        expected = GOLDENS["cut/expected"][case["index"]]
        np.testing.assert_array_equal(np.isneginf(found), np.isneginf(expected), err_msg=words(case))
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5, err_msg=words(case))


def check_beams(beams, group, case):
    beams = jax.device_get(beams)
    tokens, lengths, scores = (GOLDENS[f"{group}/{name}"][case["index"]] for name in ("tokens", "lengths", "scores"))
    count, room = beams.tokens.shape[1:]
    np.testing.assert_array_equal(beams.lengths, lengths[:, :count])
    written = np.arange(room) < beams.lengths[..., None]
    np.testing.assert_array_equal(np.where(written, beams.tokens, -1), tokens[:, :count, :room])
    np.testing.assert_allclose(beams.scores, scores[:, :count], rtol=1e-5, atol=1e-5)


def table_step(tables, tokens, cache):
    """The tables' model; its cache is the last token."""
    ids = jnp.concatenate([cache, tokens.ids], axis=1)
    before, last = (jnp.take_along_axis(ids, tokens.wanted + offset, axis=1) for offset in (0, 1))
    return tables[0][last] + tables[1][before], last


def searches():
    """The searches of the tables, grouped by the program that they run; a few of the groups meet every option."""
    groups, quick = {}, {(2, "never", 2), (3, "heuristic", 1), (4, "first", 2)}
    for case in cases("table"):
        shape = case["num_beams"], case["early_stopping"], len(case["end_token"])
        ngram = case["sampler"].get("no_repeat_ngram")
        groups.setdefault((*shape, case["max_new_tokens"], ngram), []).append(case)
    found = []
    for (*shape, room, ngram), group in groups.items():
        tier = pytest.mark.thorough
        if room == 9 and (ngram == 2 or tuple(shape) == (1, "heuristic", 1)):
            tier = pytest.mark.contract
        if room == 9 and tuple(shape) in quick and ngram is None:
            tier = []
        name = f"{'-'.join(map(str, shape))} ends, {room} tokens, n-gram {ngram}"
        found.append(pytest.param(group, id=name, marks=tier))
    return found


@pytest.mark.parametrize("group", searches())
def test_beam_search_finds_the_same_texts(group):
    ids = jax.device_put(GOLDENS["table/ids"])
    for case in group:
        options = {name: case[name] for name in ("max_new_tokens", "end_token")}
        beams = beam_search(
            table_step,
            jax.device_put(GOLDENS["table/tables"]),
            make_request(ids, vocab_size=17, sampler=sampler(case, **NEUTRAL), **options),
            jax.device_put(np.zeros((len(ids), 1), np.int32)),
            num_beams=case["num_beams"],
            max_new_tokens=case["max_new_tokens"],
            length_penalty=jnp.float32(case["length_penalty"]),
            early_stopping=case["early_stopping"],
        )
        check_beams(beams, "table", case)


@pytest.fixture(scope="module")
def gpt2():
    """The tiny GPT-2 of the goldens as a TransformerLM."""
    sizes = {"vocab_size": 29, "d_model": 12, "num_heads": 3, "num_layers": 2, "d_ff": 20, "max_len": 23}
    kind = {"pos_emb_type": "learned", "ff_activation": "gelu_tanh", "norm_type": "layer", "norm_placement": "pre"}
    fields = sizes | kind | {"norm_eps": 1e-5, "tie_embeddings": True, "dropout_rate": 0.0}
    graphdef, state = nnx.split(nnx.eval_shape(lambda: TransformerLM(nnx.Rngs(0), **fields)))
    weights = {name.removeprefix("gpt2/transformer."): value for name, value in GOLDENS.items() if "gpt2/" in name}
    for index in range(2):
        for kind in ("weight", "bias"):
            projections = np.split(weights.pop(f"h.{index}.attn.c_attn.{kind}"), 3, axis=-1)
            for name, value in zip(("query", "key", "value"), projections, strict=True):
                weights[f"h.{index}.attn.{name}.{kind}"] = value
    names = {
        "decoder.embed.positions": "wpe",
        "decoder.embed.tokens": "wte",
        "decoder.norm": "ln_f",
        "decoder.stack.blocks": "h",
        "around_attention.norm_in": "ln_1",
        "around_feed_forward.norm_in": "ln_2",
        "feed_forward.up": "mlp.c_fc",
        "feed_forward.down": "mlp.c_proj",
        "attention.out": "attn.c_proj",
        "attention": "attn",
    }
    flat = {}
    for path, parameter in nnx.to_flat_state(state):
        *module, leaf = path
        name = ".".join(map(str, module))
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        value = weights.pop(f"{name}.{'bias' if leaf == 'bias' else 'weight'}")
        assert value.shape == parameter.shape
        flat[path] = parameter.replace(jnp.asarray(value))
    assert not weights
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


def tier_of_ngrams(case):
    return {2: pytest.mark.contract, 3: pytest.mark.thorough}.get(case["sampler"].get("no_repeat_ngram"))


@pytest.mark.parametrize("case", parameters("greedy", tier_of_ngrams))
def test_greedy_texts_and_log_probabilities_are_the_same(case, gpt2):
    tokens, lengths, log_probs = (
        GOLDENS[f"greedy/{name}"][case["index"]] for name in ("tokens", "lengths", "log_probs")
    )
    ends = len(case["end_token"] + case["stop_sequences"])
    generation = gpt2.generate(
        jax.device_put(GOLDENS["greedy/ids"]),
        padding_mask=GOLDENS["greedy/real"] if case["padded"] else None,
        max_new_tokens=tokens.shape[1],
        sampler=sampler(case, **NEUTRAL),
        end_token=case["end_token"],
        # One shape whatever ends a text: the sequence that fills it up is never written.
        stop_sequences=case["stop_sequences"] + [[28] * 4] * (3 - ends),
    )
    generation = jax.device_get(generation)
    np.testing.assert_array_equal(generation.lengths, lengths)
    written = np.arange(tokens.shape[1]) < generation.lengths[:, None]
    np.testing.assert_array_equal(np.where(written, generation.tokens, -1), tokens)
    np.testing.assert_allclose(generation.log_probs, log_probs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", parameters("beam", lambda case: case["num_beams"] != 3 and pytest.mark.thorough))
def test_beam_search_of_a_transformer_finds_the_same_texts(case, gpt2):
    beams = gpt2.beam_search(
        jax.device_put(GOLDENS["beam/ids"]),
        padding_mask=GOLDENS["beam/real"] if case["padded"] else None,
        sampler=sampler(case, **NEUTRAL),
        length_penalty=float(case["length_penalty"]),
        **{name: case[name] for name in ("num_beams", "max_new_tokens", "early_stopping", "end_token")},
    )
    check_beams(beams, "beam", case)


def filled(rules):
    """The rules with all but `forced_first`, which no value makes neutral, in arrays of one shape."""

    def pad(tokens, size):
        return np.resize(np.asarray([29] if tokens is None else tokens, np.int32), size)  # the model has no token 29

    rules = rules or TokenRules(forced_first=None)
    words = np.full((1, 2), 29) if rules.bad_words is None else rules.bad_words
    return dataclasses.replace(
        rules,
        bad_words=np.resize(words, (160, 2)).astype(np.int32),
        **{
            name: pad(getattr(rules, name), 29)
            for name in ("end_tokens", "forced_last", "suppress_tokens", "begin_suppress_tokens")
        },
        **{name: np.int32(getattr(rules, name)) for name in ("min_new_tokens", "max_new_tokens", "begin_index")},
    )


def tier_of_settings(case):
    """All that are left share one program."""
    if "early_stopping" in case["file"]:
        return pytest.mark.thorough
    alone = "no_repeat_ngram_size" in case["file"] or len(case["ids"]) == 1
    return pytest.mark.contract if alone or "num_beams" in case["file"] else None


@pytest.mark.parametrize("case", parameters("settings", tier_of_settings))
def test_a_generation_config_writes_the_same_texts(case, gpt2, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "generation_config.json").write_text(json.dumps(case["file"]))
    settings, ids = load_generation_config(tmp_path), np.asarray([case["ids"]], np.int32)
    options = settings.arguments(gpt2, ids)
    fields = {"repetition_penalty": options["sampler"].repetition_penalty or 1.0}
    fields |= {
        "logit_bias": options["sampler"].logit_bias or {0: 0.0},
        "logits_fn": filled(options["sampler"].logits_fn),
    }
    options["sampler"] = dataclasses.replace(options["sampler"], **fields)
    options["end_token"] = np.resize(options["end_token"], 29).tolist()
    written = (gpt2.beam_search if settings.num_beams > 1 else gpt2.generate)(ids, **options)
    tokens, lengths = (np.asarray(x).reshape(-1, *x.shape[2 if settings.num_beams > 1 else 1 :]) for x in written[:2])
    expected = GOLDENS["settings/tokens"][case["index"]]
    assert (expected[settings.num_return_sequences :] == -1).all()
    for row, length, want in zip(tokens[: settings.num_return_sequences], lengths, expected, strict=False):
        assert row[:length].tolist() == want[:length].tolist()
        assert set(want[length:].tolist()) <= {-1, 0, settings.eos_token_id[0]}  # the padding of texts there
