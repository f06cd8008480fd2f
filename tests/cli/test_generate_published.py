"""`attnax generate` with published language models."""

import json
import os
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from published_models import FOLDER, GREEDY, lm, modify, publish, refuse
from small_tokenizers import (
    PANICS,
    START,
    TOKENIZERS,
    byte_level,
    copy_of,
    panicking,
    unigram,
)

from attnax import TransformerLM
from attnax.cli import generate as generate_module
from attnax.cli import main
from attnax.errors import InputError
from attnax.pretrained import CheckpointError, load_pretrained
from attnax.pretrained.json_object import MAX_JSON_BYTES
from attnax.pretrained.tokenizer_file import load_tokenizer, refusals_as
from attnax.text import open_published
from attnax.training import open_run


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
        assert "has only 200 embeddings" in refuse(capsys, "generate", folder, "--prompt", "return x tree")

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
        """Without tensors, config.json tells a checkpoint from a run."""
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
