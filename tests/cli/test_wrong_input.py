"""Every wrong input is refused in one line."""

import dataclasses
import shutil
from pathlib import Path

import pytest
from tiny import build
from tiny_run import TINY, refuse

from attnax import TransformerConfig, TransformerLM
from attnax.cli.generate import _check_model as check_model
from attnax.cli.generate import _read_prompt as read_prompt
from attnax.cli.generate import open_text_model
from attnax.cli.options import Generate
from attnax.errors import InputError
from attnax.text import ByteCodec, TextModel, byte_tokenizer
from attnax.training import open_run


class TestWrongInput:
    def test_paths_that_are_not_there(self, capsys, tmp_path):
        assert "no such file or folder" in refuse(capsys, "train", "--data", tmp_path / "nope")
        assert "no such folder" in refuse(capsys, "generate", tmp_path / "nope")
        assert "no such folder" in refuse(capsys, "inspect", tmp_path / "nope")
        assert "no such run folder" in refuse(capsys, "train", "--resume", tmp_path / "nope")

    def test_an_empty_corpus_makes_no_run(self, capsys, tmp_path):
        (tmp_path / "empty.txt").touch()
        assert "holds no text" in refuse(capsys, "train", "--data", tmp_path / "empty.txt", "--out", tmp_path / "run")
        assert not (tmp_path / "run").exists()

    def test_too_little_text_for_a_window_makes_no_run(self, capsys, tmp_path):
        (tmp_path / "a.txt").write_text("one\ntwo\nthree\n")
        out = tmp_path / "run"
        assert "do not fill one window of 128" in refuse(capsys, "train", "--data", tmp_path / "a.txt", "--out", out)
        assert not out.exists()

    def test_a_run_folder_that_exists_is_left_alone(self, capsys, run, corpus):
        before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
        line = refuse(capsys, "train", "--data", corpus, "--out", run, *TINY)
        assert "exists already and is a finished run; nothing was overwritten. Name another --out." in line
        assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before

    def test_resuming_what_cannot_be_resumed(self, capsys, run, corpus, tmp_path):
        assert "leave the other flags out" in refuse(capsys, "train", "--resume", run, "--steps", 3)
        assert "is not a run folder" in refuse(capsys, "train", "--resume", corpus)

    def test_a_changed_corpus_cannot_be_resumed(self, capsys, run, corpus, tmp_path):
        copy, changed = tmp_path / "copy", corpus / "file0.py"
        shutil.copytree(run, copy)
        (copy / "result.json").unlink()
        (copy / "data" / "store.json").unlink()  # the process was killed before its tokens were made
        text = changed.read_text()
        try:
            changed.write_text("other text")
            assert "has changed since it was started" in refuse(capsys, "train", "--resume", copy)
        finally:
            changed.write_text(text)

    def test_prompts_and_lengths_beyond_the_context(self, capsys, run):
        assert "model's context of 32" in refuse(capsys, "generate", run, "--prompt", "x = y\n" * 99)
        line = refuse(capsys, "generate", run, "--prompt", "x", "--max-new-tokens", 99)
        assert "--max-new-tokens 99 is too many" in line and "has room for 30" in line

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ("generate {run} --temperature -1", "--temperature must be at least 0 and finite; got -1.0"),
            ("generate {run} --temperature nan", "--temperature must be at least 0 and finite; got nan"),
            ("generate {run} --top-k 0", "--top-k must be a whole number, at least 1 and below 2 ** 31; got 0"),
            ("generate {run} --top-k 2147483648", "below 2 ** 31; got 2147483648"),
            ("generate {long}", "File name too long"),
            ("train --data {long}", "File name too long"),
            ("train --max-len 1", "--max-len must be at least 2"),
            ("train --warmup 1", "warmup must be at least 0 and below 1; got warmup=1.0"),
            ("train --seed 4294967296", "--seed must be at least 0 and below 2 ** 32"),
            ("train --rope-max-positions 8", "rope_max_positions must be at least max_len"),
            ("generate {run} --top-p 1.5", "--top-p must be above 0 and at most 1; got 1.5"),
            ("generate {run} --max-new-tokens 0", "--max-new-tokens must be at least 1; got 0"),
            ("generate {run} --seed -1", "--seed must be at least 0 and below 2 ** 32; got -1"),
            ("generate {run} --temperature 1e39", "--temperature must be at least 0 and finite; got 1e+39"),
            ("generate {run} --top-p 1e-60", "--top-p must be above 0 and at most 1; got 1e-60"),
            ("generate {run} --min-p 1.5", "--min-p must be at least 0 and at most 1; got 1.5"),
            ("generate {run} --repetition-penalty 0", "--repetition-penalty must be above 0 and finite; got 0.0"),
            ("generate {run} --presence-penalty inf", "--presence-penalty must be finite; got inf"),
            ("generate {run} --frequency-penalty nan", "--frequency-penalty must be finite; got nan"),
            ("generate {run} --no-repeat-ngram 0", "--no-repeat-ngram must be at least 1 and a whole number; got 0"),
            (
                "generate {run} --no-repeat-ngram 33",
                "--no-repeat-ngram must be at most 32, the model's context; got 33",
            ),
            ("generate {run} --stop=", "--stop must not be empty"),
            ("generate {run} --stop \udcff", r"--stop must be text in UTF-8; got '\udcff'"),
            ("generate {run} --num-samples 0", "--num-samples must be at least 1; got 0"),
            ("generate {run} --beams 0", "--beams must be at least 1; got 0"),
            ("generate {run} --beams 301", "--beams must be at most 300, the tokens of the vocabulary; got 301"),
            ("generate {run} --beams 2 --num-samples 3", "--num-samples must be at most --beams 2; got 3"),
            ("generate {run} --beams 2 --length-penalty nan", "--length-penalty must be finite; got nan"),
            (
                "generate {run} --draft {run} --draft-tokens 17",
                "--draft-tokens must be at least 1 and at most 16; got 17",
            ),
            ("generate {run} --draft ./nowhere", "./nowhere: there is no such folder"),
            ("generate {run} --cache circular", "invalid choice 'circular' for argument '--cache'"),
            ("generate {run} --cache-dtype int4", "invalid choice 'int4' for argument '--cache-dtype'"),
            ("train --steps 0", "steps must be at least 1; got steps=0"),
            ("train --steps many", "invalid literal for int() with base 10: 'many'"),
            ("train --d-model 101", "d_model must be a multiple of num_heads"),
            ("train --held-out 1", "--held-out must be above 0 and below 1; got 1.0"),
            ("train --checkpoint-every 0", "--checkpoint-every must be at least 1; got 0"),
            ("train --dropout-rate 1", "dropout_rate must be at least 0 and below 1"),
            ("train --vocab-size 100", "got --vocab-size 100"),
            ("train --frobnicate 3", "--frobnicate"),
            ("train --tokenizer words", "words"),
            (
                "frobnicate",
                "there is no command 'frobnicate'; the commands are train, tokenize, launch, generate, inspect, bench",
            ),
            ("generate {run} --max-new-tokens ten", "cannot read 'ten' as {None}|INT. See attnax generate --help."),
            ("generate", "FOLDER"),
            ("", "train, tokenize, launch, generate"),
        ],
    )
    def test_flags_out_of_range(self, capsys, run, corpus, tmp_path, monkeypatch, arguments, words):
        monkeypatch.chdir(tmp_path)
        arguments = arguments.format(run=run, long="x" * 300).split()
        if arguments[:1] == ["train"] and "--data" not in arguments:
            arguments += ["--data", str(corpus)]
        line = refuse(capsys, *arguments)
        assert words in line and "tyro" not in line
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ("--beams 2 --temperature 0.5", "--beams and --temperature exclude each other: nothing is drawn"),
            ("--beams 2 --top-k 3", "--beams and --top-k exclude each other"),
            ("--beams 2 --top-p 0.5", "--beams and --top-p exclude each other"),
            ("--beams 2 --min-p 0.1", "--beams and --min-p exclude each other"),
            ("--beams 2 --seed 1", "--beams and --seed exclude each other"),
            ("--beams 2 --draft {run}", "--beams and --draft exclude each other: a beam search has no draft"),
            ("--stream --beams 2", "--stream and --beams exclude each other: its text is printed when it is whole"),
            ("--stream --draft {run}", "--stream and --draft exclude each other"),
            ("--stream --num-samples 2", "--stream and --num-samples exclude each other"),
            ("--stream --no-stream", "--stream and --no-stream exclude each other: give one of them"),
            ("--draft {run} --cache contiguous", "--draft and --cache contiguous exclude each other"),
            ("--length-penalty 0.5", "--length-penalty needs --beams"),
            ("--draft-tokens 3", "--draft-tokens needs --draft"),
        ],
    )
    def test_options_that_exclude_each_other(self, capsys, run, arguments, words):
        assert words in refuse(capsys, "generate", run, *arguments.format(run=run).split())

    def test_a_draft_of_another_tokenizer(self, capsys, run, draw_run, tmp_path):
        other = draw_run(tmp_path / "bytes", seed=0, tokenizer=byte_tokenizer())
        line = refuse(capsys, "generate", run, "--draft", other)
        assert f"--draft {other} has another tokenizer than {run}" in line

    def test_sums_of_linear_attention_are_no_tokens(self):
        config = TransformerConfig(vocab_size=11, d_model=8, num_heads=2, num_layers=1, d_ff=8, max_len=16)

        def text(folder, model):
            return TextModel(Path(folder), model, ByteCodec(byte_tokenizer()))

        softmax, linear = (
            build(lambda rngs, kind=kind: TransformerLM(rngs, dataclasses.replace(config, attention_type=kind)))
            for kind in ("standard", "linear")
        )
        options = Generate(folder="a", draft="b")
        for model, draft, run in ((linear, softmax, "a"), (softmax, linear, "b")):
            with pytest.raises(InputError, match=f"--draft takes tokens back, .* attention in {run} has only sums"):
                check_model(options, options, text("a", model), text("b", draft))
        with pytest.raises(InputError, match="--cache paged stores tokens, and the linear attention in a has only"):
            check_model(*[Generate(folder="a", cache="paged")] * 2, text("a", linear), None)
        check_model(options, options, text("a", softmax), text("b", softmax))
        check_model(*[Generate(folder="a", cache="ring")] * 2, text("a", linear), None)

    def test_a_draft_with_a_smaller_context(self, run):
        text = open_run(run)
        small = build(lambda rngs: TransformerLM(rngs, dataclasses.replace(text.config, max_len=8)))
        draft = dataclasses.replace(text, model=small)
        assert read_prompt(text, draft, "", None)[1] == 7
        with pytest.raises(InputError, match="the draft's context of 8 has room for 7"):
            read_prompt(text, draft, "", 8)
        with pytest.raises(InputError, match="has 9 tokens, and the draft's context of 8 must"):
            read_prompt(text, draft, "????????", None)

    @pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "checkpoints"])
    @pytest.mark.parametrize("damage", ["missing", "cut", "flipped", "foreign"])
    def test_damaged_and_foreign_runs(self, capsys, run, tmp_path, name, damage):
        copy = tmp_path / "copy"
        shutil.copytree(run, copy)
        path = copy / name
        if name == "checkpoints":
            path = max(
                (path for path in (copy / name / "12" / "params").rglob("*") if path.is_file()),
                key=lambda p: p.stat().st_size,
            )
        content = path.read_bytes()
        if damage == "missing":
            path.unlink()
        elif damage == "cut":
            path.write_bytes(content[: len(content) // 2])
        elif damage == "flipped":
            path.write_bytes(content[:100] + bytes([content[100] ^ 0x80]) + content[101:])
        else:
            path.write_text('{"format": "something else"}')
        line = refuse(capsys, "generate", copy, *(("--step", 12) if name == "checkpoints" else ()))
        assert name.split(".")[0] in line or "not a run folder" in line

    def test_a_changed_option_is_noticed(self, capsys, run, tmp_path):
        copy = tmp_path / "copy"
        shutil.copytree(run, copy)
        config = (copy / "config.json").read_text()
        assert '"rope_base": 10000.0' in config
        (copy / "config.json").write_text(config.replace('"rope_base": 10000.0', '"rope_base": 10001.0'))
        assert "was changed after it was written" in refuse(capsys, "generate", copy)

    def test_a_checkpoint_of_another_run(self, capsys, run, other_run, tmp_path):
        copy = tmp_path / "copy"
        shutil.copytree(other_run, copy)
        shutil.rmtree(copy / "checkpoints")
        shutil.copytree(run / "checkpoints", copy / "checkpoints")
        assert "belongs to another run" in refuse(capsys, "generate", copy)

    def test_a_damaged_checkpoint_is_said_and_the_one_before_writes(self, capsys, run, tmp_path):
        copy = tmp_path / "copy"
        shutil.copytree(run, copy)
        (copy / "checkpoints" / "12" / "params" / "_METADATA").unlink()
        assert "That of step 10 is whole. Give --step 10." in refuse(capsys, "generate", copy, "--step", 12)
        open_text_model(str(copy))
        line = capsys.readouterr().err
        assert line.startswith("attnax: the checkpoint") and line.endswith("That of step 10 is taken.\n")
        (copy / "checkpoints" / "10" / "params" / "_METADATA").unlink()
        assert refuse(capsys, "generate", copy).endswith("None is whole.")
        assert "step must be one of 10, 12; got step=7." in refuse(capsys, "generate", copy, "--step", 7)

    def test_a_run_without_a_checkpoint(self, capsys, run, tmp_path):
        copy = tmp_path / "copy"
        shutil.copytree(run, copy)
        shutil.rmtree(copy / "checkpoints")
        assert "has no checkpoint yet" in refuse(capsys, "generate", copy)
