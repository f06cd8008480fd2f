"""`attnax generate` and `attnax inspect` on published checkpoints."""

import copy
import json
import os
import random
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from small_tokenizers import (
    AROUND,
    END,
    PANICS,
    START,
    TOKENIZERS,
    UNKNOWN,
    A,
    B,
    byte_level,
    copy_of,
    panicking,
    unigram,
    word_pieces,
)
from tiny import build

from attnax import Transformer, TransformerConfig, TransformerLM
from attnax.cli import generate as generate_module
from attnax.cli import main
from attnax.cli.inspect import collapse
from attnax.errors import InputError
from attnax.generation import Beams, Generation
from attnax.pretrained import CheckpointError, load_pretrained, save_pretrained
from attnax.pretrained.inspect import inspect_folder
from attnax.pretrained.json_object import MAX_JSON_BYTES
from attnax.pretrained.tokenizer_file import load_tokenizer, refusals_as
from attnax.text import PublishedCodec, Translator, open_published
from attnax.training import open_run

FOLDER = Path(__file__).parents[1] / "goldens" / "pretrained"
NAMES = sorted(path.name for path in FOLDER.iterdir())
CODES = "\x1b[31m\nattnax: all is well\ud800"  # a colour, a line like one of ours, half a letter


def lm(seed=0, **fields):
    """A model that has more tokens than the tokenizers, as published ones do, and is sure of what it writes."""
    sizes = {"vocab_size": 310, "d_model": 24, "num_heads": 4, "num_kv_heads": 2, "num_layers": 1, "d_ff": 40}
    kind = {"norm_type": "rms", "pos_emb_type": "rope", "ff_activation": "swiglu", "use_bias": False, "max_len": 64}
    return sure(build(lambda rngs: TransformerLM(rngs, **sizes | kind | fields), seed))


def sure(model):
    """The model with larger logits, so that no two tokens are as likely."""
    kernel = model.head.projection.kernel
    kernel[...] = jnp.asarray(8 * np.asarray(kernel[...]))
    return model


def publish(folder, model, tokenizer=None, *, config=(), generation=None):
    """A checkpoint as it is published."""
    save_pretrained(model, folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(config)))
    if tokenizer is not None:
        tokenizer.save(str(folder / "tokenizer.json"))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def modify(name, folder, fields=(), tensors=None):
    """A golden with other fields in its config.json, and other tensors."""
    shutil.copytree(FOLDER / name, folder, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | dict(fields)))
    if tensors is not None:
        held = safetensors.numpy.load_file(folder / "model.safetensors")
        safetensors.numpy.save_file(tensors(held), folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A llama with a byte-level tokenizer that puts a start before a text and an end after it."""
    return publish(tmp_path_factory.mktemp("published"), lm(), copy_of(byte_level, AROUND))


@pytest.fixture(scope="module")
def translator(tmp_path_factory):
    """A tiny T5 that reads and writes 13 tokens at most."""
    kind = {"num_heads": 2, "num_layers": 1, "d_ff": 16, "norm_type": "rms", "pos_emb_type": "relative"}
    kind |= {"use_bias": False, "ff_activation": "relu", "attention_scale": 1.0}
    half = TransformerConfig(vocab_size=67, d_model=16, max_len=13, **kind)
    model = sure(build(lambda rngs: Transformer(rngs, encoder=half, decoder=half, share_embeddings=True), 7))
    tokens = {"decoder_start_token_id": UNKNOWN, "eos_token_id": END}
    return publish(tmp_path_factory.mktemp("t5"), model, copy_of(unigram, AROUND), config=tokens)


@pytest.fixture
def streamed(monkeypatch):
    """The tokens that models stream, as they come."""
    tokens = []

    def noted(stream):
        def call(self, *arguments, **options):
            for token in stream(self, *arguments, **options):
                tokens.append(int(token[0]))
                yield token

        return call

    for kind in (TransformerLM, Transformer):
        monkeypatch.setattr(kind, "stream", noted(kind.stream))
    return tokens


@pytest.fixture
def write(capsys):
    """What `attnax generate` prints."""

    def call(folder, *options):
        capsys.readouterr()
        assert main(["generate", str(folder), *map(str, options)]) == 0
        return capsys.readouterr().out

    return call


@pytest.fixture
def show(capsys):
    """The exit code of `attnax inspect`, and what it prints without the spaces that align it."""

    def call(folder):
        capsys.readouterr()
        code = main(["inspect", str(folder)])
        return code, re.sub(" +", " ", capsys.readouterr().out)

    return call


def refuse(capsys, *arguments):
    """What a command says that was refused."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    out, error = capsys.readouterr()
    assert error.startswith("attnax: ") and not out
    return error.strip()


GREEDY = ("--temperature", "0")


class TestRefusals:
    @pytest.mark.parametrize("fields", PANICS)
    def test_it_is_the_last_line_of_the_command(self, tmp_path, capfd, monkeypatch, fields):
        monkeypatch.setattr(TransformerLM, "stream", lambda self, ids, **options: iter([[0]]))
        folder = publish(tmp_path, lm(), panicking(fields))
        assert main(["generate", str(folder), "--prompt", "a", "--max-new-tokens", "1"]) == 2
        out, error = capfd.readouterr()
        assert error.splitlines()[-1].startswith("attnax: the tokenizer has no ") and "Traceback" not in error
        assert out in ("", "a")

    @pytest.mark.parametrize("raised", [KeyboardInterrupt, SystemExit, MemoryError, TypeError])
    def test_what_the_library_does_not_refuse_passes(self, raised):
        with pytest.raises(raised) as caught, refusals_as(InputError):
            raise raised
        assert type(caught.value) is raised

    def test_a_folder_in_place_of_the_tokenizer_is_refused(self, tmp_path):
        assert load_tokenizer(tmp_path / "tokenizer.json") is None
        (tmp_path / "tokenizer.json").mkdir()
        with pytest.raises(CheckpointError, match=r"tokenizer\.json: it is no file"):
            load_tokenizer(tmp_path / "tokenizer.json")

    def test_a_tokenizer_that_is_not_utf8_is_refused(self, tmp_path):
        (tmp_path / "tokenizer.json").write_bytes(b"\xff")
        with pytest.raises(CheckpointError, match=r"it is no tokenizer of the tokenizers library \(.*utf-8"):
            load_tokenizer(tmp_path / "tokenizer.json")

    def test_a_folder_may_have_any_name(self, tmp_path):
        folder = tmp_path / os.fsdecode(b"\xff")
        folder.mkdir()
        (folder / "tokenizer.json").write_text(TOKENIZERS[unigram].to_str(), "utf-8")
        assert load_tokenizer(folder / "tokenizer.json").get_vocab() == TOKENIZERS[unigram].get_vocab()


class TestGenerate:
    def test_it_prints_the_likeliest_tokens(self, published, write, streamed):
        model, tokenizer = load_pretrained(published)
        prompt = [START, *tokenizer.encode("def é", add_special_tokens=False).ids]
        text = write(published, *GREEDY, "--prompt", "def é", "--max-new-tokens", 20)
        assert text == tokenizer.decode([*prompt, *streamed]) + "\n"
        assert len(streamed) == 20 and len(set(streamed)) > 5
        likeliest = np.asarray(nnx.jit(TransformerLM.log_probs)(model, np.array([[*prompt, *streamed]]))).argmax(-1)[0]
        assert likeliest[len(prompt) - 1 : -1].tolist() == streamed

    @pytest.mark.thorough
    def test_it_prints_what_the_model_writes(self, published, write):
        model, tokenizer = load_pretrained(published)
        prompt = [START, *tokenizer.encode("def é", add_special_tokens=False).ids]
        tokens = model.generate(jnp.array([prompt]), max_new_tokens=20).tokens[0].tolist()
        text = write(published, *GREEDY, "--prompt", "def é", "--max-new-tokens", 20)
        assert text == tokenizer.decode([*prompt, *tokens]) + "\n" and len(set(tokens)) > 5

    @pytest.mark.thorough
    def test_whole_and_streamed_texts_are_the_same(self, published, write):
        options = ("--prompt", "def é", "--max-new-tokens", 20)
        greedy = write(published, *GREEDY, *options)
        assert write(published, *GREEDY, *options, "--no-stream") == greedy
        assert write(published, *GREEDY, *options, "--cache", "paged", "--cache-dtype", "float32") == greedy
        sampled = write(published, "--seed", 3, *options)
        first, _ = write(published, "--seed", 3, *options, "--num-samples", 2).split("--- 2 ---")
        assert first == "--- 1 ---\n" + sampled != greedy

    @pytest.mark.thorough
    def test_beams_and_log_probs(self, published, write, capsys):
        model, tokenizer = load_pretrained(published)
        prompt = jnp.array([[START, *tokenizer.encode("def", add_special_tokens=False).ids]])
        found = model.beam_search(prompt, num_beams=3, max_new_tokens=7)
        tokens = found.tokens[0, 0].tolist()
        options = ("--prompt", "def", "--max-new-tokens", "7", "--beams", "3", "--log-probs")
        assert main(["generate", str(published), *options]) == 0
        out, error = capsys.readouterr()
        assert out == tokenizer.decode([*prompt[0].tolist(), *tokens]) + "\n"
        written = model.log_probs(jnp.concatenate([prompt, found.tokens[0, :1]], 1))[0, prompt.shape[1] - 1 : -1]
        total = float(jnp.take_along_axis(written, found.tokens[0, 0][:, None], 1).sum())
        size = len(out.encode()) - len("def\n")
        assert error.startswith(f"log-probability {total:.2f}, 7 tokens, {size} bytes, ")

    @pytest.mark.thorough
    def test_a_stop_ends_the_text(self, published, write):
        options = ("--prompt", "def é", "--max-new-tokens", 20, *GREEDY)
        text = write(published, *options)
        stop = text[10:13]
        for mode in ("--stream", "--no-stream"):
            assert write(published, *options, mode, "--stop", stop) == text[: text.index(stop, 5)] + "\n"

    @pytest.mark.parametrize(
        ("config", "generation", "ends"),
        [
            ({"eos_token_id": 5}, None, [5]),
            ({"eos_token_id": [5, 7]}, None, [5, 7]),
            ({"eos_token_id": 5}, {"eos_token_id": [7, 9]}, [7, 9]),
            ({"eos_token_id": 5}, {"eos_token_id": None}, [5]),
            ({"eos_token_id": [5, 310]}, {}, [5]),  # the model has no token 310
            ({}, {}, []),
        ],
    )
    def test_the_end_is_that_of_the_generation_config(
        self, published, tmp_path, write, monkeypatch, config, generation, ends
    ):
        folder = tmp_path / "copy"
        shutil.copytree(published, folder)
        theirs = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(theirs | config))
        if generation is not None:
            (folder / "generation_config.json").write_text(json.dumps(generation))
        seen = []
        monkeypatch.setattr(TransformerLM, "stream", lambda self, ids, **options: seen.append(options) or iter(()))
        write(folder, "--stop", "zz")
        assert seen[0]["end_token"] == ends and len(seen[0]["stop_sequences"]) == 1

    @pytest.mark.parametrize(
        ("said", "words"),
        [
            ({"eos_token_id": "</s>"}, "eos_token_id must be a token or a list of them; got eos_token_id='</s>'"),
            ({"eos_token_id": [1, True]}, "eos_token_id must be a token or a list"),
            ({"eos_token_id": "\x1b[31m\n\ud800"}, r"got eos_token_id='\\x1b\[31m\\n\\ud800'\.$"),
            ({"bos_token_id": [1, 2]}, r"bos_token_id must be one token; got bos_token_id=\[1, 2\]"),
        ],
    )
    def test_ends_and_starts_that_are_no_tokens(self, tmp_path, capsys, said, words):
        folder = publish(tmp_path, lm(), copy_of(byte_level), generation=said)
        assert re.search(words, refuse(capsys, "generate", folder))

    def test_an_empty_prompt_starts_with_the_configs_token(self, tmp_path, write, capsys, monkeypatch):
        folder = publish(tmp_path, lm(), copy_of(byte_level))
        assert "the prompt must not be empty" in refuse(capsys, "generate", folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"bos_token_id": 9}))
        seen = []
        monkeypatch.setattr(TransformerLM, "stream", lambda self, ids, **_: seen.append(ids.tolist()) or iter(()))
        assert write(folder) == "\n" and seen == [[[9]]]

    def test_tokens_that_the_model_lacks(self, tmp_path, capsys):
        folder = publish(tmp_path, lm(vocab_size=200), copy_of(byte_level))
        assert "gives the token 2" in refuse(capsys, "generate", folder, "--prompt", "return x tree")
        assert "embeddings of 200 only" in refuse(capsys, "generate", folder, "--prompt", "return x tree")

    def test_the_text_is_not_longer_than_memory_may_hold_unless_asked(self, published, write, monkeypatch):
        rooms = []
        monkeypatch.setattr(
            TransformerLM, "stream", lambda self, ids, **options: rooms.append(options["max_new_tokens"]) or iter(())
        )
        monkeypatch.setattr(generate_module, "MOST_NEW_TOKENS", 11)
        write(published)
        write(published, "--max-new-tokens", 13)
        assert rooms == [11, 13]

    @pytest.mark.parametrize(
        ("kind", "dtype"),
        [
            *(("published", dtype) for dtype in ("float32", "bfloat16", "float16")),
            *(pytest.param("run", dtype, marks=pytest.mark.contract) for dtype in ("float32", "bfloat16", "float16")),
        ],
    )
    def test_dtype_is_that_of_parameters_and_computation(self, request, kind, dtype):
        folder, opened = request.getfixturevalue(kind), {"published": open_published, "run": open_run}[kind]
        text = opened(folder, dtype)
        assert text.config.dtype == text.config.param_dtype == dtype
        assert {str(array.dtype) for array in jax.tree.leaves(nnx.state(text.model, nnx.Param))} == {dtype}
        assert opened(folder).config.dtype == "float32"

    @pytest.mark.thorough
    def test_the_commands_dtype_reaches_model_and_draft(self, published, write, monkeypatch):
        seen = []
        original = generate_module.open_text_model

        def note(*arguments, **options):
            seen.append(original(*arguments, **options))
            return seen[-1]

        monkeypatch.setattr(generate_module, "open_text_model", note)
        write(published, "--draft", published, "--dtype", "bfloat16", "--max-new-tokens", 3)
        assert [text.config.dtype for text in seen] == ["bfloat16", "bfloat16"]

    @pytest.mark.thorough
    def test_a_draft_may_be_of_either_kind(self, run, tmp_path, write):
        text = open_run(run)
        folder = publish(tmp_path, text.model, text.codec.tokenizer._model)
        options = (*GREEDY, "--prompt", "text", "--max-new-tokens", 9)
        assert write(run, *options, "--draft", folder) == write(run, *options)
        assert write(folder, *options, "--draft", run) == write(folder, *options)

    def test_drafts_that_do_not_fit(self, published, run, tmp_path, capsys):
        other = publish(tmp_path / "other", lm(), copy_of(unigram))
        for draft in (other, run):
            line = refuse(capsys, "generate", published, "--draft", draft)
            assert f"--draft {draft} has another tokenizer than {published}" in line
        padded = publish(tmp_path / "padded", lm(vocab_size=320), copy_of(byte_level))
        line = refuse(capsys, "generate", published, "--draft", padded)
        assert f"--draft {padded} must have a vocabulary of 310 tokens" in line and "got 320" in line

    @pytest.mark.parametrize(
        ("name", "kind"),
        [("bert", "TransformerEncoder"), ("bert_masked", "MaskedLM"), ("vit", "VisionTransformer")],
    )
    def test_models_that_write_no_text(self, capsys, name, kind):
        line = refuse(capsys, "generate", FOLDER / name)
        assert f"{name} holds a {kind}, which writes no text" in line

    def test_a_sentence_encoder_writes_no_text(self, capsys, tmp_path):
        folder = modify("bert", tmp_path)
        (folder / "modules.json").write_text("[]")
        assert "holds a SentenceEncoder, which writes no text" in refuse(capsys, "generate", folder)

    def test_without_a_tokenizer_it_says_how_to_make_one(self, capsys):
        line = refuse(capsys, "generate", FOLDER / "gpt2")
        assert "has no tokenizer.json" in line and "AutoTokenizer.from_pretrained" in line and "\n" not in line

    def test_a_folder_that_is_neither(self, capsys, tmp_path):
        assert "is neither a run folder nor a published checkpoint" in refuse(capsys, "generate", tmp_path)

    @pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json"])
    def test_a_folder_in_place_of_a_file_is_refused(self, published, tmp_path, capsys, name):
        folder = tmp_path / "copy"
        shutil.copytree(published, folder)
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir()
        line = refuse(capsys, "generate", folder, "--prompt", "a", "--max-new-tokens", 1)
        assert re.search(rf"/{name}: (there is no such file|it is no file)\.$", line)

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("[" + "0," * (MAX_JSON_BYTES // 2), "must have at most 16777216 bytes"),
            ("{", "is not JSON"),
            ("[]", "must hold a JSON object"),
        ],
    )
    def test_a_config_is_read_as_far_as_json_objects_are(self, tmp_path, capsys, text, words):
        """Without tensors it is what tells a checkpoint from a run."""
        (tmp_path / "config.json").write_text(text)
        for command in ("generate", "inspect"):
            line = refuse(capsys, command, tmp_path)
            assert line.startswith(f"attnax: {tmp_path / 'config.json'}: ") and words in line

    def test_all_that_is_wrong_is_said(self, capsys, tmp_path):
        folder = modify("llama2", tmp_path, {f"new_{index}": index for index in range(30)})
        copy_of(byte_level).save(str(folder / "tokenizer.json"))
        head, *lines = refuse(capsys, "generate", folder).splitlines()
        assert head == f"attnax: {folder / 'config.json'}: 30 problems."
        assert len(lines) == 30 and all(re.fullmatch(r"  new_\d+=\d+ is no field of llama .*", line) for line in lines)
        folder = modify("llama2", folder, {"hidden_act": "mish"})
        (folder / "model.safetensors").unlink()
        assert "must hold model.safetensors" in refuse(capsys, "generate", folder)


class TestGenerationConfig:
    """What the folder says of writing is obeyed where no flag says otherwise."""

    @pytest.fixture
    def settled(self, published, tmp_path, monkeypatch, capsys):
        """How the model is asked to write: the method, its options, and what is said on standard error."""
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
        assert options["max_new_tokens"] == 11 - 1 - len(prompt)  # the start counts

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
        assert options["sampler"].no_repeat_ngram is None  # no text is as long
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
    """The bytes of a JSON file with a few of them, or a few of its values, made into something else."""
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
        # Down to a few levels, so that what governs the whole is met as often as one of many words.
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
    """`main(["generate", ...])` on a folder whose model is that of `published`, and writes what it is told to."""
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


class TestTranslator:
    """An encoder-decoder reads the prompt and writes a text of its own."""

    @pytest.fixture
    def written(self, translator, capsys):
        def call(*options):
            capsys.readouterr()
            assert main(["generate", str(translator), "--prompt", "a time", *map(str, options)]) == 0
            return capsys.readouterr()

        return call

    def test_it_writes_the_likeliest_tokens_after_the_source(self, translator, written, streamed):
        model, tokenizer = load_pretrained(translator)
        source = np.array([tokenizer.encode("a time").ids])
        assert source[0, 0] == START and source[0, -1] == END
        out = written(*GREEDY, "--max-new-tokens", 9).out
        assert out == tokenizer.decode(streamed) + "\n" != "\n" and len(streamed) == 9  # without the prompt
        begun = np.array([[UNKNOWN, *streamed[:-1]]])
        log_probs = np.asarray(nnx.jit(Transformer.log_probs)(model, source, begun))
        assert log_probs[0].argmax(-1).tolist() == streamed

    @pytest.mark.contract
    def test_it_writes_what_the_model_makes_of_the_source(self, translator, written):
        model, tokenizer = load_pretrained(translator)
        source = jnp.array([tokenizer.encode("a time").ids])
        assert source[0, 0] == START and source[0, -1] == END
        made = model.generate(source, 9, UNKNOWN, END)
        want = tokenizer.decode(made.tokens[0, : made.lengths[0]].tolist())
        options = (*GREEDY, "--max-new-tokens", 9)
        out, error = written(*options, "--log-probs")
        assert out == want + "\n" and want, made.tokens  # without the prompt
        total = float(made.log_probs[0, : made.lengths[0]].sum())
        assert float(re.match(r"log-probability (\S+),", error)[1]) == pytest.approx(total, abs=0.02)
        assert written(*options, "--no-stream").out == out

    @pytest.mark.thorough
    def test_a_draft_and_one_beam_write_the_same(self, translator, written):
        options = (*GREEDY, "--max-new-tokens", 9)
        out = written(*options).out
        assert written(*options, "--draft", translator).out == written("--beams", 1, "--max-new-tokens", 9).out == out

    def test_relative_positions_have_no_longest_text(self, translator, written, monkeypatch):
        """Beyond the n_positions of 13, which is how much is written where nothing says it."""
        rooms = []
        monkeypatch.setattr(
            Transformer,
            "stream",
            lambda self, ids, **options: rooms.append((ids.shape[1] > 20, options["max_length"])) or iter(()),
        )
        written()
        written("--prompt", "a tree " * 9, "--max-new-tokens", 40, "--no-repeat-ngram", 30)
        assert rooms == [(False, 13), (True, 40)]

    def test_each_half_has_a_context_where_positions_have_a_longest(self):
        half = TransformerConfig(vocab_size=67, d_model=8, num_heads=2, num_layers=1, d_ff=8, max_len=13)
        model = build(lambda rngs: Transformer(rngs, encoder=half, decoder=half))
        text = Translator(Path("a"), model, PublishedCodec(copy_of(unigram), whole=True), 1)
        assert text.context == 13
        with pytest.raises(InputError, match="the encoder of a reads at most 13"):
            text.check([3] * 14)
        with pytest.raises(InputError, match="--max-new-tokens 13 is too many: .* has room for 12"):
            generate_module._read_prompt(text, None, "a", 13)

    def test_a_language_model_is_no_draft_of_it(self, translator, published, capsys):
        line = refuse(capsys, "generate", translator, "--prompt", "a", "--draft", published)
        assert "holds a TransformerLM; that of a Transformer must be one too" in line

    @pytest.mark.parametrize(
        ("config", "generation", "start"),
        [
            ({"decoder_start_token_id": 0}, None, 0),
            ({"decoder_start_token_id": 0}, {"decoder_start_token_id": 4}, 4),
            ({"bos_token_id": 3}, None, 3),
            ({}, None, None),
        ],
    )
    def test_the_start_is_what_the_config_says(self, translator, tmp_path, config, generation, start):
        shutil.copytree(translator, tmp_path, dirs_exist_ok=True)
        said = json.loads((translator / "config.json").read_text())
        del said["decoder_start_token_id"]
        (tmp_path / "config.json").write_text(json.dumps(said | config))
        if generation is not None:
            (tmp_path / "generation_config.json").write_text(json.dumps(generation))
        if start is None:
            with pytest.raises(InputError, match="must have a decoder_start_token_id"):
                open_published(tmp_path)
            return
        opened = open_published(tmp_path)
        assert isinstance(opened, Translator) and opened.start == start and opened.codec.whole


class TestInspect:
    def test_it_shows_the_model_the_parameters_and_the_memory(self, show):
        code, text = show(FOLDER / "gpt2")
        assert code == 0 and "problems" not in text
        for line in (
            "transformers model_type='gpt2', architectures=['GPT2LMHeadModel']",
            "attnax TransformerLM",
            "config d_model=28",
            " tie_embeddings=True",
            "decoder.embed.tokens.embedding 61x28 float32 1,708 transformer.wte.weight",
            "decoder.stack.blocks.{0..1}.attention.key.bias 28 float32 56 transformer.h.{0..1}.attn.c_attn.bias",
            "decoder.stack.blocks.{0..1}.feed_forward.up.bias 37 float32 74 transformer.h.{0..1}.mlp.c_fc.bias",
            "parameters 14,634: 58.5 kB as float32, 29.3 kB as bfloat16 or float16",
            "files 28 tensors, 58.5 kB of float32",
        ):
            assert line in text.splitlines()
        assert "max_norm" not in text and "attention_soft_cap" not in text  # what is so by default

    def test_layers_that_differ_have_lines_of_their_own(self, show):
        _, text = show(FOLDER / "qwen3_moe")
        assert "decoder.stack.blocks.{0,2,3}.feed_forward.up.kernel" in text
        experts = "model.layers.1.mlp.experts.{0..4}.up_proj.weight"
        assert f"decoder.stack.blocks.1.feed_forward.up 5x36x11 float32 1,980 {experts}" in text
        _, text = show(FOLDER / "llama3")
        assert "bfloat16 4,320" in text and "of bfloat16" in text

    @pytest.mark.thorough
    @pytest.mark.parametrize("name", NAMES)
    def test_every_golden_can_be_loaded_and_counts_as_many_parameters(self, name, show):
        code, text = show(FOLDER / name)
        model, _ = load_pretrained(FOLDER / name)
        count = sum(array.size for array in jax.tree.leaves(nnx.state(model, nnx.Param)))
        assert code == 0 and f"parameters {count:,}:" in text and f"attnax {type(model).__name__}" in text
        table = re.findall(r"^\S+ [\dx]+ \w+ ([\d,]+) \S+$", text, re.MULTILINE)
        assert sum(int(number.replace(",", "")) for number in table) == count

    def test_halves_have_lines_of_their_own(self, show):
        code, text = show(FOLDER / "t5")
        assert code == 0 and "encoder.num_layers=2\n" in text and "decoder.num_layers=1\n" in text
        assert "share_embeddings=True" in text and "encoder.stack.blocks.{0..1}.attention.query.kernel 30x35" in text

    def test_no_tensor_is_read(self, show, monkeypatch):
        def refuse(rest, info, start):
            raise AssertionError(info)

        monkeypatch.setattr("attnax.pretrained.safetensors._read_into", refuse)
        with pytest.raises(AssertionError):
            load_pretrained(FOLDER / "gpt2")
        assert show(FOLDER / "gpt2")[0] == 0

    def test_what_nothing_reads_does_not_hide_the_rest(self, show, tmp_path):
        """Unknown fields and wrong tensors are told together, and the table is there."""

        def change(tensors):
            del tensors["model.norm.weight"]
            tensors["model.layers.0.mlp.up_proj.weight"] = np.ones((2, 3), "f")
            return tensors | {"model.layers.0.extra": np.ones(3, "f"), "rotary_emb.inv_freq": np.ones(5, "f")}

        folder = modify("llama2", tmp_path, {"logit_scale": 0.5}, change)
        code, text = show(folder)
        table, problems = text.split("problems (4), so that it cannot be loaded")
        assert code == 1
        assert "logit_scale=0.5 is no field of llama" in problems and "'model.norm.weight' is missing" in problems
        assert "'model.layers.0.mlp.up_proj.weight' is float32(2, 3); a floating tensor of shape" in problems
        assert "'model.layers.0.extra' is float32(3,); no such tensor was expected" in problems
        assert "decoder.norm.scale 36 missing 36 model.norm.weight" in table
        unknown, extra = table.split("in the files, and not known to be a parameter")[1].split(
            "in the files without parameters"
        )
        assert "3 float32 3 model.layers.0.extra" in unknown and "inv_freq" not in unknown
        assert "5 float32 5 rotary_emb.inv_freq" in extra
        with pytest.raises(CheckpointError) as caught:
            load_pretrained(folder)
        assert len(caught.value.problems) == 4

    def test_a_tokenizer_that_cannot_be_read_is_a_problem(self, show, tmp_path):
        folder = modify("llama2", tmp_path)
        path = folder / "tokenizer.json"
        copy_of(byte_level).save(str(path))
        assert show(folder)[0] == 0
        path.write_bytes(path.read_bytes()[:-9])
        code, text = show(folder)
        (problem,) = text.split("problems (1), so that it cannot be loaded\n ")[1].splitlines()
        assert code == 1 and problem.startswith(f"{path}: it is no tokenizer of the tokenizers library (")
        with pytest.raises(CheckpointError) as caught:
            load_pretrained(folder)
        assert str(caught.value) == problem
        path.unlink()
        path.mkdir()
        code, text = show(folder)
        assert code == 1 and "tokenizer.json: it is no file" in text

    def test_a_head_that_differs_from_the_embeddings_is_noticed_on_loading_only(self, show, tmp_path):
        def change(tensors):
            return tensors | {"lm_head.weight": tensors["transformer.wte.weight"] + 1}

        folder = modify("gpt2", tmp_path, (), change)
        assert show(folder)[0] == 0
        with pytest.raises(CheckpointError, match="must repeat the embeddings"):
            load_pretrained(folder)

    def test_a_head_that_repeats_the_embeddings_is_beside(self, show, tmp_path):
        def change(tensors):
            return tensors | {"lm_head.weight": tensors["transformer.wte.weight"]}

        code, text = show(modify("gpt2", tmp_path, (), change))
        assert code == 0 and "61x28 float32 1,708 lm_head.weight" in text.split("in the files without parameters")[1]
        assert "parameters 14,634:" in text

    @pytest.mark.parametrize(
        ("fields", "problem"),
        [
            ({"model_type": "mamba"}, "config.json: model_type must be one of llama, mistral"),
            ({"hidden_act": "mish"}, "config.json: hidden_act must be one of silu"),
        ],
    )
    def test_a_model_that_is_not_understood_has_tensors(self, show, tmp_path, fields, problem):
        code, text = show(modify("llama2", tmp_path, fields))
        assert code == 1 and problem in text and "problems (1)" in text
        shapes = safetensors.numpy.load_file(FOLDER / "llama2" / "model.safetensors")
        rows, columns = shapes["model.layers.0.self_attn.q_proj.weight"].shape
        line = f"{rows}x{columns} float32 {2 * rows * columns:,} model.layers.{{0..1}}.self_attn.q_proj.weight"
        assert line in text.splitlines() and "files 21 tensors" in text

    def test_another_head_is_read_as_that_of_its_family(self, show, tmp_path):
        def change(tensors):
            return tensors | {"score.weight": np.ones((2, 36), "f")}

        fields = {"architectures": ["LlamaForSequenceClassification"]}
        code, text = show(modify("llama2", tmp_path, fields, change))
        assert code == 1 and "decoder.stack.blocks.{0..1}.attention.query.kernel" in text
        assert "architectures must be one of LlamaForCausalLM" in text and "'score.weight' is" in text

    def test_folders_without_the_files(self, show, tmp_path):
        folder = modify("llama2", tmp_path)
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
        code, text = show(folder)
        assert code == 1 and "d_model=36" in text and "only .safetensors files are read" in text
        (folder / "pytorch_model.bin").rename(folder / "model.safetensors")
        (folder / "config.json").unlink()
        code, text = show(folder)
        assert code == 1 and "config.json: there is no such file" in text and "files 21 tensors" in text
        (folder / "model.safetensors").unlink()

    def test_pooling_is_shown(self, show, tmp_path):
        folder = modify("bert", tmp_path)
        kinds = ("Transformer", "Pooling")
        modules = [
            {"type": f"sentence_transformers.models.{kind}", "path": path}
            for kind, path in zip(kinds, ("", "1_Pooling"), strict=True)
        ]
        (folder / "modules.json").write_text(json.dumps(modules))
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
        code, text = show(folder)
        assert code == 0 and "attnax SentenceEncoder of a TransformerEncoder" in text
        (folder / "1_Pooling" / "config.json").unlink()
        code, text = show(folder)
        assert code == 1 and "1_Pooling/config.json: there is no such file" in text and "encoder" in text.lower()

    def test_tensors_cannot_speak_to_the_terminal(self, show, tmp_path):
        code, text = show(modify("llama2", tmp_path, (), lambda tensors: tensors | {"\x1b[31m": np.ones(3, "f")}))
        assert code == 1 and r"\x1b[31m" in text and "\x1b" not in text

    @pytest.mark.parametrize(
        "fields",
        [
            {CODES: 1},
            {"architectures": CODES},
            {"model_type": CODES},
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 9.0, "factor": 2.0, CODES: 1}},
            {"rope_parameters": {"rope_type": CODES}},
            {"hidden_act": CODES},
        ],
    )
    def test_configs_cannot_speak_to_the_terminal(self, tmp_path, capfd, fields):
        folder = modify("llama2", tmp_path, fields)
        copy_of(byte_level).save(str(folder / "tokenizer.json"))
        assert (main(["inspect", str(folder)]), main(["generate", str(folder)])) == (1, 2)
        for text in capfd.readouterr():
            assert r"\x1b[31m\nattnax: all is well\ud800" in text
            assert all(line.isprintable() and not line.startswith("attnax: all is well") for line in text.split("\n"))

    def test_names_that_no_model_has_are_shown_as_they_are(self, show, tmp_path):
        """Longer than Python reads as a number, a hole in place of one, digits of other scripts."""
        long, names = "9" * 5000, ["a.{}", "a.0", "a.1", "a.01", "a.\u0663"]
        extra = {name: np.ones(3, "f") for name in [*names, f"a.{long}"]}
        code, text = show(modify("gpt2", tmp_path, (), lambda tensors: tensors | extra))
        assert code == 1
        for name, count in (("{}", 3), ("{0..1}", 6), ("01", 3), ("\u0663", 3), (long, 3)):
            assert f"3 float32 {count} a.{name}" in text.splitlines()

    def test_a_run_is_shown_too(self, run, show):
        code, text = show(run)
        count = sum(array.size for array in jax.tree.leaves(nnx.state(open_run(run).model, nnx.Param)))
        assert code == 0 and "attnax TransformerLM, a run after 12 updates" in text and f"parameters {count:,}:" in text
        assert "config d_model=16" in text and "decoder.stack.blocks.0.attention.query.kernel 16x16 float32 256" in text

    def test_the_dtype_given_is_that_of_the_model(self):
        assert inspect_folder(FOLDER / "llama3", "float32").config.dtype == "float32"
        (refusal,) = inspect_folder(FOLDER / "llama3", "float64").refusals
        assert "JAX has no float64" in str(refusal)

    @pytest.mark.parametrize(
        ("names", "name"),
        [
            (["a.0.b", "a.1.b", "a.2.b"], "a.{0..2}.b"),
            (["a.3.b", "a.7.b"], "a.{3,7}.b"),
            (["a.4"], "a.4"),
            (["a.0.b.5", "a.0.b.6", "a.1.b.5", "a.1.b.6"], "a.{0..1}.b.{5..6}"),
            (["a2.x", "a2.x"], "a2.x"),
            (["a.1234567890"], "a.1234567890"),
            (["a.{}"], "a.{}"),
        ],
    )
    def test_names_that_differ_in_numbers_are_one(self, names, name):
        assert collapse(names) == name
