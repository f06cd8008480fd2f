"""Training data and checkpoints: every token counts once, checkpoints are whole or refused."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnax.errors import InputError
from attnax.training import (
    TokenStream,
    latest_checkpoint,
    read_corpus,
    restore_checkpoint,
    save_checkpoint,
)


class TestCorpus:
    def fill(self, folder, count=60):
        for index in range(count):
            path = folder / f"part{index % 3}" / f"file{index}.txt"
            path.parent.mkdir(exist_ok=True)
            path.write_text(f"text number {index}\n" * 5)
        return folder

    def test_the_split_is_stable(self, tmp_path):
        corpus = read_corpus(str(self.fill(tmp_path)), held_out=0.2)
        assert 0 < len(corpus.held_out) < 30 and len(corpus.train) + len(corpus.held_out) == 60
        (tmp_path / "another.txt").write_text("one more")
        larger = read_corpus(str(tmp_path), held_out=0.2)
        held = {document.name for document in corpus.held_out}
        assert held <= {document.name for document in larger.held_out} <= held | {"another.txt"}
        assert corpus.fingerprint != larger.fingerprint
        (tmp_path / "another.txt").unlink()
        assert read_corpus(str(tmp_path), held_out=0.2).fingerprint == corpus.fingerprint

    def test_moving_the_folder_changes_nothing(self, tmp_path):
        (tmp_path / "a").mkdir()
        fingerprint = read_corpus(str(self.fill(tmp_path / "a"))).fingerprint
        shutil.move(tmp_path / "a", tmp_path / "b")
        assert read_corpus(str(tmp_path / "b")).fingerprint == fingerprint

    def test_a_glob_a_file_and_the_standard_library(self, tmp_path):
        self.fill(tmp_path)
        assert len(read_corpus(f"{tmp_path}/part0/*.txt").train) == 19
        assert len(read_corpus(f"{tmp_path}/**/file1*.txt").train) == 10
        (tmp_path / "one.txt").write_text("".join(f"line {index}\n" for index in range(1000)))
        single = read_corpus(str(tmp_path / "one.txt"))
        pieces = sorted((*single.train, *single.held_out), key=lambda document: document.name)
        assert b"".join(piece.text for piece in pieces) == (tmp_path / "one.txt").read_bytes()
        assert len(pieces) > 40 and single.held_out
        names = {document.name for document in read_corpus().train}
        assert {"argparse.py", "json/decoder.py"} <= names and not any("site-packages" in name for name in names)

    def test_binary_empty_and_hidden_files_are_left_out(self, tmp_path):
        self.fill(tmp_path)
        (tmp_path / "picture.png").write_bytes(b"\x89PNG\0\0")
        (tmp_path / "empty.txt").touch()
        (tmp_path / ".hidden").mkdir()
        (tmp_path / ".hidden" / "x.txt").write_text("hidden")
        corpus = read_corpus(str(tmp_path))
        assert len(corpus.train) + len(corpus.held_out) == 60 and corpus.skipped == 1

    def test_run_folders_are_not_text_to_learn_from(self, tmp_path):
        before = read_corpus(str(self.fill(tmp_path))).fingerprint
        run = tmp_path / "runs" / "000"
        (run / "checkpoints").mkdir(parents=True)
        for name, text in (("config.json", '{"format": "attnax run 9"}'), ("checkpoints/5.json", "{}")):
            (run / name).write_text(text)
        assert read_corpus(str(tmp_path)).fingerprint == before
        with pytest.raises(InputError, match="000 is a run folder; name the text that it was trained on"):
            read_corpus(str(run))
        (run / "sample.txt").write_text("what it wrote")
        assert read_corpus(str(tmp_path / "**" / "*.txt")).fingerprint == before

    def test_metrics_and_configs_of_others_are_text(self, tmp_path):
        for name in ("metrics.jsonl", "config.json"):
            (self.fill(tmp_path) / name).write_text('{"format": 3}\n')
        corpus = read_corpus(str(tmp_path))
        assert len(corpus.train) + len(corpus.held_out) == 62

    def test_a_file_of_one_line_is_cut_too(self, tmp_path):
        (tmp_path / "line.txt").write_text("word " * 1000)
        corpus = read_corpus(str(tmp_path / "line.txt"))
        assert len(corpus.train) + len(corpus.held_out) == 50
        assert sum(len(document.text) for document in (*corpus.train, *corpus.held_out)) == 5000

    def test_a_few_files_still_hold_one_out(self, tmp_path):
        for name in ("a", "b"):
            (tmp_path / name).write_text(name)
        for fraction in (0.001, 0.999):
            corpus = read_corpus(str(tmp_path), held_out=fraction)
            assert len(corpus.train) == len(corpus.held_out) == 1

    @pytest.mark.parametrize(
        ("name", "words"),
        [
            ("", "data must not be empty; None is the source of Python's standard library"),
            ("missing", "no such file or folder"),
            ("missing/*.txt", "no files in"),
            ("empty", "no files in"),
            ("blank", "holds no text"),
            ("blank/short.txt", "too small"),
        ],
    )
    def test_wrong_input_is_refused_in_words(self, tmp_path, name, words):
        (tmp_path / "empty").mkdir()
        (tmp_path / "blank").mkdir()
        (tmp_path / "blank" / "nothing.txt").touch()
        if "short" in name:
            (tmp_path / "blank" / "short.txt").write_text("x")
        with pytest.raises(InputError, match=words):
            read_corpus(str(tmp_path / name) if name else "")


class TestTokenStream:
    def test_a_pass_visits_every_window_once_and_passes_differ(self):
        stream = TokenStream(np.arange(10 * 7 + 3, dtype=np.uint16), 7)
        starts = [stream.batch(index, 5, seed=1)[:, 0] // 7 for index in range(4)]
        first, second = np.concatenate(starts[:2]), np.concatenate(starts[2:])
        assert sorted(first) == sorted(second) == list(range(10)) and (first != second).any()
        batch = stream.batch(3, 5, seed=1)
        np.testing.assert_array_equal(batch, stream.batch(3, 5, seed=1))
        assert batch.shape == (5, 8) and (np.diff(batch) == 1).all() and batch.dtype == np.int32
        assert (stream.batch(0, 5, seed=2) != stream.batch(0, 5, seed=1)).any()

    @settings(deadline=None, derandomize=True)
    @given(st.integers(2, 40), st.integers(1, 9), st.data())
    def test_every_token_is_scored_once_with_its_context(self, length, window, data):
        stride = data.draw(st.integers(1, window))
        stream = TokenStream(np.arange(length, dtype=np.uint16) + 100, window)
        scored = []
        for number, (tokens, counts) in enumerate(stream.scoring_windows(stride)):
            assert tokens.shape == (window + 1,) and counts.shape == (window,)
            scored += list(tokens[1:][counts])
            if number:
                assert np.flatnonzero(counts)[0] >= min(window - stride, tokens[1:][counts][0] - 101)
        assert scored == list(range(101, 100 + length))

    def test_too_little_text_is_refused(self):
        with pytest.raises(InputError, match="its 7 tokens do not fill one window of 7"):
            TokenStream(np.zeros(7, np.uint16), 7).batch(0, 1, 0)


class TestCheckpoints:
    tree = {"a": jnp.arange(6.0).reshape(2, 3), "b": (jnp.int32(7), {"c": jnp.ones(5, jnp.bfloat16)})}

    @pytest.fixture
    def folder(self, tmp_path):
        save_checkpoint(tmp_path, 3, {"model": self.tree, "other": {"x": jnp.zeros(2)}})
        return tmp_path

    def test_it_comes_back_exactly(self, folder):
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), self.tree)
        restored = restore_checkpoint(folder, latest_checkpoint(folder), "model", like)
        assert jax.tree.structure(restored) == jax.tree.structure(self.tree)
        for have, want in zip(jax.tree.leaves(restored), jax.tree.leaves(self.tree), strict=True):
            assert have.dtype == want.dtype
            np.testing.assert_array_equal(have, want)

    def test_the_newest_are_kept_and_an_interrupted_one_does_not_count(self, folder):
        for step in (4, 5):
            save_checkpoint(folder, step, {"model": self.tree})
        assert sorted(path.name for path in folder.glob("*.json")) == ["4.json", "5.json"]
        assert not (folder / "3").exists() and latest_checkpoint(folder) == 5
        (folder / "5.json").unlink()
        assert latest_checkpoint(folder) == 4
        save_checkpoint(folder, 5, {"model": self.tree})  # over the remains of the interruption
        assert latest_checkpoint(folder) == 5
        assert latest_checkpoint(folder / "nowhere") is None

    def test_any_changed_byte_is_found(self, folder):
        files = [path for path in (folder / "3" / "model").rglob("*") if path.is_file() and path.stat().st_size]
        assert files
        for path in files:
            content = path.read_bytes()
            for place in {0, len(content) // 2, len(content) - 1}:
                path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
                with pytest.raises(InputError, match="is damaged"):
                    restore_checkpoint(folder, 3, "model", self.tree)
            path.write_bytes(content[:-1])
            with pytest.raises(InputError, match="is damaged"):
                restore_checkpoint(folder, 3, "model", self.tree)
            path.write_bytes(content)
        restore_checkpoint(folder, 3, "model", self.tree)

    def test_missing_and_added_files_are_found(self, folder):
        (folder / "3" / "model" / "extra").write_text("x")
        with pytest.raises(InputError, match="is damaged: extra has changed since it was saved"):
            restore_checkpoint(folder, 3, "model", self.tree)
        restore_checkpoint(folder, 3, "other", {"x": jnp.zeros(2)})  # no file was changed
        shutil.rmtree(folder / "3")
        with pytest.raises(InputError, match="is damaged"):
            restore_checkpoint(folder, 3, "model", self.tree)

    def test_a_damaged_manifest_is_found(self, folder):
        damaged = ["", "[]", "{}", "null", '{"types": {"model": 3}}', "{" * 9]
        for content in (*damaged, '{"types": {"model": {}}, "sha256": {"model": 3}}'):
            (folder / "3.json").write_text(content)
            with pytest.raises(InputError, match="no readable list of its contents"):
                restore_checkpoint(folder, 3, "model", self.tree)

    def test_another_model_is_refused_by_name_shape_and_dtype(self, folder):
        for change, words in (
            ({"a": jnp.zeros((2, 4))}, r"a is float32\(2, 3\) in the checkpoint and float32\(2, 4\) in the model"),
            ({"a": jnp.zeros((2, 3), jnp.int32)}, r"float32\(2, 3\) in the checkpoint and int32\(2, 3\)"),
            ({"d": jnp.zeros(1)}, r"d is absent in the checkpoint"),
        ):
            with pytest.raises(InputError, match=words):
                restore_checkpoint(folder, 3, "model", {**self.tree, **change})
        with pytest.raises(InputError, match="no readable list"):
            restore_checkpoint(folder, 3, "nothing", self.tree)

    def test_it_belongs_to_its_owner(self, tmp_path):
        save_checkpoint(tmp_path, 0, {"model": self.tree}, owner="this run")
        restore_checkpoint(tmp_path, 0, "model", self.tree, owner="this run")
        with pytest.raises(InputError, match="belongs to another run"):
            restore_checkpoint(tmp_path, 0, "model", self.tree, owner="that run")

    def test_the_manifest_is_plain(self, folder):
        manifest = json.loads((folder / "3.json").read_text())
        assert manifest["types"]["model"]["b.1.c"] == [[5], "bfloat16"]
