"""`attnax generate` with a run."""

import io
import math
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnax import Sampler, TransformerLM
from attnax.cli import main
from attnax.generation import Beams, Generation
from attnax.text import TextStream
from attnax.training import open_run


def load_model(run):
    """The model of a run, and its tokenizer."""
    text = open_run(run)
    return text.model, text.codec.tokenizer


@pytest.fixture
def write(run, capsys):
    """The output of `attnax generate` after a prompt."""

    def call(*options):
        capsys.readouterr()
        assert main(["generate", str(run), "--prompt", "def nu", "--max-new-tokens", "9", *map(str, options)]) == 0
        return capsys.readouterr().out

    return call


GREEDY = ("--temperature", "0")
SAMPLED = ("--temperature", "1.5", "--seed", "4")


@pytest.fixture
def written(run, monkeypatch):
    """A model that writes three texts, of three, one and two tokens; and the options that it got."""
    _, tokenizer = load_model(run)
    texts = ["?!%", "&", "$:"]
    tokens, lengths, seen = np.zeros((3, 9), np.int32), np.array([3, 1, 2], np.int32), []
    for row, text, length in zip(tokens, texts, lengths, strict=True):
        row[:length] = tokenizer.encode(text.encode())

    def generate(self, ids, **options):
        seen.append(options)
        rows = slice(options["num_samples"])
        return Generation(*map(jnp.asarray, (tokens[rows], lengths[rows], np.zeros((3, 9), "f")[rows], lengths[rows])))

    def beam_search(self, ids, **options):
        seen.append(options)
        rows = slice(options["num_beams"])
        return Beams(*map(jnp.asarray, (tokens[None, rows], lengths[None, rows], np.zeros((1, 3), "f")[:, rows])))

    monkeypatch.setattr(TransformerLM, "generate", generate)
    monkeypatch.setattr(TransformerLM, "beam_search", beam_search)
    monkeypatch.setattr(TransformerLM, "stream", lambda self, ids, **options: iter(tokens[0, :3, None]))
    return texts, tokens, seen


def test_generate_streams_a_text(run, capsys):
    """There is no prompt, as at the end of the training, so its compiled programs are used again."""

    def text(*options):
        capsys.readouterr()
        assert main(["generate", str(run), *options]) == 0
        return capsys.readouterr().out

    assert text() == (run / "sample.txt").read_text() + "\n" != "\n"
    assert text(*GREEDY) == text(*GREEDY, "--seed", "5") != text()
    seeds = [text("--seed", str(seed), "--temperature", "2") for seed in (1, 1, 2, 3)]
    assert seeds[0] == seeds[1] and len(set(seeds)) > 1


@pytest.mark.contract
def test_generate_goes_on_with_the_prompt(write):
    greedy = write(*GREEDY)
    assert greedy.startswith("def nu") and len(greedy) > 8 and greedy == write(*GREEDY, "--seed", "5")


@pytest.mark.contract
def test_cuts_to_one_token_are_greedy(write):
    assert write("--top-k", "1", "--seed", "3") == write(*GREEDY) == write("--top-p", "0.000001", "--seed", "4")


def test_flags_become_the_sampler_and_the_cache(write, monkeypatch):
    seen = []
    monkeypatch.setattr(TransformerLM, "stream", lambda self, ids, **options: seen.append(options) or iter(()))
    flags = (
        "--min-p 0.125 --repetition-penalty 1.25 --presence-penalty 0.5 --frequency-penalty -0.25 --no-repeat-ngram 3"
    )
    write(*flags.split(), "--cache", "paged", "--cache-dtype", "int8", "--stop", "\n\n", "--stop", "x")
    (options,) = seen
    sampler = options["sampler"]
    numbers = (sampler.min_p, sampler.repetition_penalty, sampler.presence_penalty, sampler.frequency_penalty)
    assert [float(number) for number in numbers] == [0.125, 1.25, 0.5, -0.25] and sampler.no_repeat_ngram == 3
    assert (float(sampler.temperature), float(sampler.top_p), sampler.top_k) == (
        pytest.approx(0.8),
        pytest.approx(0.95),
        None,
    )
    assert (options["cache"], options["cache_dtype"], options["max_new_tokens"]) == ("paged", "int8", 9)
    assert len(options["stop_sequences"]) == 2 and options["end_token"] == [0]


@pytest.mark.contract
def test_no_token_stands_twice_where_no_ngram_of_one_may(run, write):
    _, tokenizer = load_model(run)
    ids = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TextStream, "feed", lambda self, token: ids.append(token) or "")
        write(*GREEDY, "--no-repeat-ngram", 1)
    ids += tokenizer.encode(b"def nu").tolist()
    assert len(set(ids)) == len(ids) > 9


def test_text_arrives_piece_by_piece(run, monkeypatch):
    """Each token's characters are written and flushed before the next token is drawn."""
    _, tokenizer = load_model(run)
    ids = [token for part in ("a", "\u00e9", "st", "op!", "sto", "p", "z") for token in tokenizer.encode(part.encode())]
    shown, arrived = io.StringIO(), []

    class Output(io.StringIO):
        def flush(self):
            shown.seek(0), shown.write(self.getvalue())

    def stream(self, prompt_ids, **options):
        for token in ids:
            arrived.append(shown.getvalue())
            yield np.array([token])

    monkeypatch.setattr(TransformerLM, "stream", stream)
    monkeypatch.setattr(sys, "stdout", Output())
    assert main(["generate", str(run), "--prompt", "x", "--stop", "stop?", "--stop", "stopz"]) == 0
    assert sys.stdout.getvalue() == "xa\u00e9stop!\n"
    assert arrived[1:4] == ["xa", "xa", "xa\u00e9"]  # a character of two bytes comes when it is complete
    assert "xa\u00e9stop!" in arrived  # it cannot become a stop, so it was shown
    assert not any("!s" in text or "z" in text for text in arrived)  # characters that may become a stop are held back


@pytest.mark.contract
def test_whole_and_streamed_texts_are_the_same(write):
    for options in (GREEDY, SAMPLED):
        assert write(*options) == write(*options, "--stream") == write(*options, "--no-stream")


@pytest.mark.parametrize("mode", ["--stream", "--no-stream"])
def test_a_stop_string_cuts_the_text(write, written, mode):
    assert write(mode) == "def nu?!%\n"
    assert write(mode, "--stop", "!%", "--stop", "not there") == "def nu?\n"


@pytest.mark.thorough
@pytest.mark.parametrize("mode", ["--stream", "--no-stream"])
def test_stop_strings_end_the_text(write, mode):
    prompt = "    return"
    text = write(*GREEDY, "--prompt", prompt).removeprefix(prompt)
    stop = text[len(text) // 2 :][:4]
    assert stop.isascii()  # the model has learned this
    out = write(*GREEDY, "--prompt", prompt, mode, "--stop", stop, "--stop", "not there")
    assert out == prompt + text[: text.index(stop)] + "\n"


def test_samples_stand_under_their_numbers(write, written):
    texts, _, seen = written
    out = write(*SAMPLED, "--num-samples", 3)
    assert out == "".join(f"--- {number} ---\ndef nu{text}\n" for number, text in enumerate(texts, 1))
    assert seen[0]["num_samples"] == 3 and float(seen[0]["sampler"].temperature) == 1.5
    assert (jax.random.key_data(seen[0]["key"]) == np.array([0, 4])).all()


@pytest.mark.contract
def test_samples_differ_and_the_first_is_that_of_its_seed(write):
    parts = re.split(r"--- (\d) ---\n", write(*SAMPLED, "--num-samples", 3))
    assert parts[0] == "" and parts[1::2] == ["1", "2", "3"]
    texts = parts[2::2]
    assert len(set(texts)) == 3 and all(text.startswith("def nu") for text in texts)
    assert texts[0] == write(*SAMPLED)


def test_beams_print_the_best(write, written):
    texts, _, seen = written
    options = ("--beams", 3, "--length-penalty", 0.5)
    assert write(*options) == f"def nu{texts[0]}\n"
    assert write(*options, *GREEDY, "--num-samples", 2) == "".join(
        f"--- {number} ---\ndef nu{text}\n" for number, text in enumerate(texts[:2], 1)
    )
    for asked in seen:
        assert (asked["num_beams"], asked["length_penalty"], asked["max_new_tokens"]) == (3, 0.5, 9)
        assert asked["sampler"].temperature in (None, 0) and asked["end_token"] == [0]


@pytest.mark.contract
def test_beams_are_those_of_the_search(run, write):
    model, tokenizer = load_model(run)
    ids = jnp.asarray([[0, *tokenizer.encode(b"def nu").tolist()]])
    found = model.beam_search(ids, num_beams=3, max_new_tokens=9, length_penalty=0.5, end_token=0)
    best, second = (
        tokenizer.decode(row[:length]).decode("utf-8", "replace")
        for row, length in zip(found.tokens[0, :2].tolist(), found.lengths[0, :2].tolist(), strict=True)
    )
    options = ("--beams", 3, "--length-penalty", 0.5)
    assert write(*options) == f"def nu{best}\n"
    assert write(*options, *GREEDY, "--num-samples", 2) == f"--- 1 ---\ndef nu{best}\n--- 2 ---\ndef nu{second}\n"
    assert write("--beams", 1) == write(*GREEDY)


def test_a_draft_is_handed_to_the_model(other_run, write, written):
    texts, _, seen = written
    assert write(*GREEDY, "--draft", other_run, "--draft-tokens", 2, "--cache", "paged") == f"def nu{texts[0]}\n"
    (options,) = seen
    assert (options["num_draft_tokens"], options["cache"]) == (2, "paged")
    own, _ = load_model(other_run)
    for ours, theirs in zip(*(jax.tree.leaves(nnx.state(model)) for model in (own, options["draft"])), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.thorough
def test_a_draft_changes_nothing_at_temperature_0(other_run, write):
    assert write(*GREEDY, "--draft", other_run, "--draft-tokens", 2, "--cache", "paged") == write(*GREEDY)


@pytest.mark.thorough
@pytest.mark.parametrize("options", [("--cache", "ring"), ("--cache", "paged", "--cache-dtype", "int8")])
def test_every_cache_writes_the_same(write, options):
    assert write(*GREEDY, *options, "--log-probs") == write(*GREEDY)


LOG_PROBS = r"(?:\d: )?log-probability (-\d+\.\d\d), (\d) tokens, (\d+) bytes, (\d+\.\d\d) bits per byte"


def test_log_probs_are_those_of_the_model(run, written, capsys):
    model, tokenizer = load_model(run)
    prompt = [0, *tokenizer.encode(b"def nu").tolist()]
    texts, tokens, _ = written
    ids = np.zeros((3, len(prompt) + 9), np.int32)
    ids[:, : len(prompt)], ids[:, len(prompt) :] = prompt, tokens
    given = np.asarray(nnx.jit(TransformerLM.log_probs)(model, ids))
    command = ["generate", str(run), "--prompt", "def nu", "--max-new-tokens", "9", "--log-probs", "--num-samples", "3"]
    assert main(command) == 0
    lines = capsys.readouterr().err.splitlines()
    for row, (line, text, length) in enumerate(zip(lines, texts, (3, 1, 2), strict=True)):
        places = np.arange(len(prompt), len(prompt) + length)
        total = given[row, places - 1, ids[row, places]].sum()
        found = re.fullmatch(LOG_PROBS, line)
        assert line.startswith(f"{row + 1}: ") and (int(found[2]), int(found[3])) == (length, len(text))
        assert float(found[1]) == pytest.approx(total, abs=0.006)
        assert float(found[4]) == pytest.approx(-total / math.log(2) / len(text), abs=0.006)


@pytest.mark.contract
def test_log_probs_are_those_of_the_generation(run, capsys):
    model, tokenizer = load_model(run)
    ids = jnp.asarray([[0, *tokenizer.encode(b"def nu").tolist()]])
    sampler = Sampler(1.5, top_p=0.95)
    options = {"max_new_tokens": 9, "sampler": sampler, "key": jax.random.key(4), "end_token": 0, "num_samples": 3}
    made = model.generate(ids, **options)
    command = ["generate", str(run), "--prompt", "def nu", "--max-new-tokens", "9", *SAMPLED, "--log-probs"]
    for samples in (1, 3):
        capsys.readouterr()
        assert main([*command, "--num-samples", str(samples)]) == 0
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == samples
        for row, line in enumerate(lines):
            tokens = made.tokens[row, : made.lengths[row]].tolist()
            size, total = len(tokenizer.decode(tokens)), float(made.log_probs[row].sum())
            found = re.fullmatch(LOG_PROBS, line)
            assert (line[:3] == f"{row + 1}: ") == (samples > 1)
            assert float(found[1]) == pytest.approx(total, abs=0.006) and int(found[2]) == len(tokens)
            assert int(found[3]) == size and float(found[4]) == pytest.approx(-total / math.log(2) / size, abs=0.006)
