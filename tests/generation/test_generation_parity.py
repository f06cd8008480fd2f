"""Generation gives what Hugging Face transformers gives; tests/parity/generation.py wrote down what that is."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnax import Sampler, TransformerLM
from attnax.generation import Text, beam_search, make_request

with np.load(Path(__file__).parents[1] / "goldens" / "generation.npz") as file:
    GOLDENS = dict(file)


def cases(group):
    return [{"index": index, **case} for index, case in enumerate(json.loads(str(GOLDENS[f"{group}/cases"])))]


def parameters(group, thorough):
    """A group's cases for pytest; those of which `thorough` is true compile programs that teach little more."""
    return [
        pytest.param(case, id=words(case), marks=pytest.mark.thorough if thorough(case) else [])
        for case in cases(group)
    ]


def sampler(case, **neutral):
    fields = neutral | case["sampler"]
    if "logit_bias" in fields:
        fields["logit_bias"] = dict(fields["logit_bias"])
    return Sampler(**fields)


NEUTRAL = {"repetition_penalty": 1.0, "logit_bias": [[0, 0.0]]}  # so that more cases share a program


def words(case):
    return " ".join(f"{name}={value}" for name, value in case.items() if name != "index" and value not in ({}, [], 0))


@pytest.fixture(scope="module", params=["no padding", "padding"])
def text(request):
    ids = GOLDENS["cut/ids"]
    half = ids.shape[1] // 2
    prompt, position_ids = ids[:, :half], np.broadcast_to(np.arange(half), (len(ids), half))
    if request.param == "padding":
        prompt, position_ids = (np.pad(x, ((0, 0), (2, 0)), constant_values=-1) for x in (prompt, position_ids))
    text = Text.of_prompt(jnp.asarray(prompt), jnp.asarray(position_ids), ids.shape[1] + 3)
    for token in ids[:, half:].T:
        text = text.append(jnp.asarray(token))
    return text


@pytest.mark.parametrize("case", parameters("cut", lambda case: False))
def test_penalties_and_cuts_leave_the_same_logits(case, text):
    draw = sampler(case, temperature=1.0)
    logits = draw.cut(draw.penalise(jnp.asarray(GOLDENS["cut/logits"][case["rounded"]]), text))
    expected = GOLDENS["cut/expected"][case["index"]]
    np.testing.assert_array_equal(np.isneginf(logits), np.isneginf(expected))
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)


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
    groups, quick = {}, {(1, "heuristic", 1), (2, "never", 2), (3, "heuristic", 1), (4, "first", 2)}
    for case in cases("table"):
        shape = case["num_beams"], case["early_stopping"], len(case["end_token"])
        ngram = case["sampler"].get("no_repeat_ngram")
        groups.setdefault((*shape, case["max_new_tokens"], ngram), []).append(case)
    found = []
    for (*shape, room, ngram), group in groups.items():
        few = tuple(shape) in quick and room == 9 and ngram != 1
        name = f"{'-'.join(map(str, shape))} ends, {room} tokens, n-gram {ngram}"
        found.append(pytest.param(group, id=name, marks=[] if few else pytest.mark.thorough))
    return found


@pytest.mark.parametrize("group", searches())
def test_beam_search_finds_the_same_texts(group):
    ids = jnp.asarray(GOLDENS["table/ids"])
    for case in group:
        options = {name: case[name] for name in ("max_new_tokens", "end_token")}
        beams = beam_search(
            table_step,
            jnp.asarray(GOLDENS["table/tables"]),
            make_request(ids, vocab_size=17, sampler=sampler(case, **NEUTRAL), **options),
            jnp.zeros((len(ids), 1), jnp.int32),
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


@pytest.mark.parametrize("case", parameters("greedy", lambda case: case["sampler"].get("no_repeat_ngram") == 3))
def test_greedy_texts_and_log_probabilities_are_the_same(case, gpt2):
    tokens, lengths, log_probs = (
        GOLDENS[f"greedy/{name}"][case["index"]] for name in ("tokens", "lengths", "log_probs")
    )
    ends = len(case["end_token"] + case["stop_sequences"])
    generation = gpt2.generate(
        jnp.asarray(GOLDENS["greedy/ids"]),
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


@pytest.mark.parametrize("case", parameters("beam", lambda case: case["num_beams"] != 3))
def test_beam_search_of_a_transformer_finds_the_same_texts(case, gpt2):
    beams = gpt2.beam_search(
        jnp.asarray(GOLDENS["beam/ids"]),
        padding_mask=GOLDENS["beam/real"] if case["padded"] else None,
        sampler=sampler(case, **NEUTRAL),
        length_penalty=float(case["length_penalty"]),
        **{name: case[name] for name in ("num_beams", "max_new_tokens", "early_stopping", "end_token")},
    )
    check_beams(beams, "beam", case)
