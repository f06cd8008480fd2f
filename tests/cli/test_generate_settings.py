"""`attnax generate` obeys the generation_config.json, whatever its values."""

import copy
import json
import random
import re
import shutil

import jax
import numpy as np
import pytest
from published_models import CODES, GREEDY, refuse
from small_tokenizers import (
    AROUND,
    END,
    START,
    A,
    B,
    byte_level,
    copy_of,
    word_pieces,
)

from attnax import TransformerLM
from attnax.cli import main
from attnax.generation import Beams, Generation
from attnax.pretrained import load_pretrained
from attnax.pretrained.tokenizer_file import load_tokenizer


class TestGenerationConfig:
    """The folder's settings are obeyed unless a flag overrides them."""

    @pytest.fixture
    def settled(self, published, tmp_path, monkeypatch, capsys):
        """The method of the model that is called, its options, and the lines on standard error."""
        folder = shutil.copytree(published, tmp_path / "copy")
        empty, none, seen = *map(jax.device_put, (np.zeros((4, 1), np.int32), np.zeros(4, np.int32))), []

        def noted(name, result):
            return lambda self, ids, **options: seen.append((name, options)) or result

        monkeypatch.setattr(TransformerLM, "stream", noted("stream", ()))
        monkeypatch.setattr(TransformerLM, "generate", noted("generate", Generation(empty, none, empty, none)))
        monkeypatch.setattr(TransformerLM, "beam_search", noted("beam_search", Beams([empty], [none], [none])))

        def call(said, *flags):
            (folder / "generation_config.json").write_text(json.dumps(said))
            assert main(["generate", str(folder), "--prompt", "def", *map(str, flags)]) == 0
            ((name, options),) = seen
            seen.clear()
            return name, options, capsys.readouterr().err

        return call

    @pytest.mark.parametrize(
        ("said", "flags", "drawing"),
        [
            ({}, (), (0.8, None, 0.95)),
            ({"repetition_penalty": 1.1, "eos_token_id": 2}, (), (0.8, None, 0.95)),
            ({}, ("--temperature", 2), (2.0, None, 0.95)),
            ({}, ("--top-p", 0.5), (0.8, None, 0.5)),
            ({"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20}, (), (0.6, 20, 0.9)),
            ({"do_sample": True, "temperature": 0.6, "top_p": 0.9}, ("--top-p", 0.5, "--seed", 1), (0.6, 50, 0.5)),
            ({"do_sample": True, "temperature": 0.6}, GREEDY, (None, 50, None)),
            ({"do_sample": False, "temperature": 0.6, "top_k": 9}, (), (None, None, None)),
            ({"do_sample": False, "temperature": 0.6, "top_k": 9}, ("--seed", 1), (0.6, 9, None)),
            ({"do_sample": False}, ("--temperature", 0.3), (0.3, 50, None)),
            ({"num_beams": 3}, ("--temperature", 0.3), (0.3, 50, None)),
            ({"num_beams": 3}, ("--stream",), (None, None, None)),
        ],
    )
    def test_flags_win_over_the_file_and_the_file_over_defaults(self, settled, said, flags, drawing):
        name, options, error = settled(said, *flags)
        found = [getattr(options["sampler"], field) for field in ("temperature", "top_k", "top_p")]
        assert found == [None if value is None else np.float32(value) for value in drawing]
        assert (name, error) == ("stream", "")

    @pytest.mark.parametrize(
        ("said", "flags", "search"),
        [
            ({"num_beams": 3, "length_penalty": 0.5, "early_stopping": True}, (), (3, 0.5, "first")),
            ({"num_beams": 3, "length_penalty": 0.5}, ("--beams", 2), (2, 0.5, "heuristic")),
            ({"num_beams": 3}, ("--beams", 4, "--length-penalty", 2), (4, 2.0, "heuristic")),
            ({"do_sample": True, "temperature": 0.6}, ("--beams", 2), (2, 1.0, "heuristic")),
        ],
    )
    def test_beams_of_the_file_are_searched_unless_a_flag_draws(self, settled, said, flags, search):
        name, options, error = settled(said, *flags)
        assert (options["num_beams"], options["length_penalty"], options["early_stopping"]) == search
        assert (name, error, options["sampler"].temperature) == ("beam_search", "", None)

    @pytest.mark.parametrize(
        ("said", "flags", "samples"),
        [
            ({"do_sample": True, "num_return_sequences": 3}, (), 3),
            ({"do_sample": True, "num_return_sequences": 3}, ("--num-samples", 2), 2),
            ({"do_sample": False}, ("--num-samples", 2), 2),
            ({"num_beams": 4}, ("--num-samples", 2), 2),
        ],
    )
    def test_several_texts_are_samples(self, settled, said, flags, samples):
        name, options, _ = settled(said, *flags)
        assert (name, options["num_samples"]) == ("generate", samples) and options["sampler"].temperature == 1.0

    def test_penalties_lengths_stops_and_rules_are_those_of_the_file(self, published, settled):
        said = {"repetition_penalty": 1.5, "no_repeat_ngram_size": 3, "max_new_tokens": 7, "stop_strings": "zz"}
        said |= {"suppress_tokens": [5, 6], "sequence_bias": [[[9], 2.0]], "do_sample": False}
        _, options, _ = settled(said)
        sampler = options["sampler"]
        assert (float(sampler.repetition_penalty), sampler.no_repeat_ngram) == (1.5, 3)
        assert sampler.logits_fn.suppress_tokens.tolist() == [5, 6] and float(sampler.logit_bias[9]) == 2.0
        assert options["max_new_tokens"] == 7 and len(options["stop_sequences"]) == 1
        flags = ("--repetition-penalty", 1, "--no-repeat-ngram", 4, "--max-new-tokens", 9, "--stop", "a", "--stop", "b")
        _, options, _ = settled(said, *flags)
        assert (float(options["sampler"].repetition_penalty), options["sampler"].no_repeat_ngram) == (1.0, 4)
        assert options["max_new_tokens"] == 9 and len(options["stop_sequences"]) == 2
        _, options, _ = settled({"max_length": 11, "do_sample": False})
        prompt = load_tokenizer(published / "tokenizer.json").encode("def", add_special_tokens=False).ids
        assert options["max_new_tokens"] == 11 - 1 - len(prompt)  # the start token counts

    def test_what_has_no_place_is_a_line_on_standard_error(self, settled):
        _, _, error = settled({"guidance_scale": 1.5, CODES: 1})
        (line,) = error.splitlines()
        assert line.startswith("attnax: ") and line.isprintable()
        assert "not supported, and left out: guidance_scale=1.5, " in line

    def test_messages_name_the_file_where_no_flag_was_given(self, settled, capsys):
        with pytest.raises(AssertionError):
            settled({"num_beams": 3000})
        assert "num_beams of generation_config.json must be at most 310" in capsys.readouterr().err
        _, options, _ = settled({"no_repeat_ngram_size": 300})
        assert options["sampler"].no_repeat_ngram is None  # no text is so long
        name, _, error = settled({"num_beams": 3, "do_sample": True}, "--stream")
        assert (name, error) == ("stream", "")
        name, options, _ = settled({"num_beams": 3}, "--length-penalty", "2")
        assert (name, float(options["length_penalty"])) == ("beam_search", 2.0)

    def test_values_out_of_range_are_refused(self, published, tmp_path, capsys):
        folder = shutil.copytree(published, tmp_path / "copy")
        (folder / "generation_config.json").write_text(json.dumps({"temperature": "hot", "num_beams": 0}))
        lines = refuse(capsys, "generate", folder).splitlines()
        assert lines[0] == f"attnax: {folder / 'generation_config.json'}: 2 problems."
        assert lines[1] == "  temperature must be at least 0 and finite; got temperature='hot'."


def mutate(text, draw):
    """The bytes of a JSON file with a few bytes, or a few of its values, changed."""
    if draw.random() < 0.4:
        data = bytearray(text.encode())
        for _ in range(draw.randint(1, 4)):
            start = draw.randrange(len(data))
            data[start : start + draw.choice([0, 1, 1, 7])] = draw.choice(
                [b"", bytes([draw.randrange(256)]), b'"', b"{"]
            )
        return bytes(data[: draw.choice([len(data), len(data), draw.randrange(len(data))])])
    value = [json.loads(text)]
    for _ in range(draw.randint(1, 3)):
        holder, key = value, 0
        # Down to a few levels, so that a top-level value is changed as often as one of many words.
        for _ in range(draw.randint(0, 5)):
            if isinstance(holder[key], (dict, list)) and holder[key]:
                holder = holder[key]
                key = draw.choice(list(holder)) if isinstance(holder, dict) else draw.randrange(len(holder))
        if draw.random() < 0.2 and holder is not value:
            del holder[key]
        else:
            holder[key] = copy.deepcopy(draw.choice(STRANGE))
    return json.dumps(value[0]).encode()


STRANGE = [None, True, -1, 0, 1, 309, 2**31, 2**70, 0.5, "", "[X]", CODES, [], {}, [[0]], {"type": "Sequence"}, B, A]


@pytest.fixture(scope="module")
def written_by(published):
    """Runs `main(["generate", ...])` on a folder; the model of `published` writes fixed tokens."""
    model, _ = load_pretrained(published)

    def call(folder):
        with pytest.MonkeyPatch.context() as patch:
            load = "attnax.text.published.load_inspected"
            patch.setattr(load, lambda seen: (model, load_tokenizer(seen.folder / "tokenizer.json")))
            tokens = [[token] for token in (*range(3, 300, 40), START, END, 309)]
            patch.setattr(TransformerLM, "stream", lambda self, ids, **options: iter(tokens))
            return main(["generate", str(folder), "--prompt", "def é</s> x", "--stop", "zz"])

    return call


KINDS_BY_NAME = {"byte_level": byte_level, "word_pieces": word_pieces}


@pytest.mark.parametrize("mutations", [12, pytest.param(60, marks=pytest.mark.contract)])
@pytest.mark.parametrize("kind", ["generation", *KINDS_BY_NAME])
def test_files_of_any_content_are_read_or_refused(published, written_by, tmp_path, capfd, kind, mutations):
    folder = tmp_path / "copy"
    shutil.copytree(published, folder)
    if kind == "generation":
        path = folder / "generation_config.json"
        said = {"bos_token_id": 1, "eos_token_id": [2, 7], "pad_token_id": None, "top_p": 0.9, "do_sample": True}
        said |= {"sequence_bias": [[[3], 0.5]], "bad_words_ids": [[4, 5]], "suppress_tokens": [6], "min_length": 3}
        path.write_text(json.dumps(said | {"temperature": 0.7, "forced_eos_token_id": 2, "stop_strings": ["x"]}))
    else:
        path = folder / "tokenizer.json"
        path.write_text(copy_of(KINDS_BY_NAME[kind], AROUND).to_str(), "utf-8")
    text, draw = path.read_text("utf-8"), random.Random(kind)
    codes = {written_by(folder)}
    assert codes == {0}
    for _ in range(mutations):
        path.write_bytes(mutate(text, draw))
        capfd.readouterr()
        codes.add(code := written_by(folder))
        error = capfd.readouterr().err
        assert code in (0, 2) and "Traceback" not in error, path.read_bytes()
        assert code == 2 or error == "" or re.fullmatch(r"attnax: .* not supported, and left out: .*\.\n", error), error
        if code == 2:
            last = error.removesuffix("\n").split("\n")[-1]
            assert last.startswith(("attnax: ", "  ")) and last.isprintable()
    assert codes == {0, 2}
