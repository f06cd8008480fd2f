"""The documents of a training: found, split and read without holding them, or refused in words."""

import gc
import json
import shutil
import time

import pyarrow
import pyarrow.parquet
import pytest

from attnax.errors import InputError
from attnax.training import corpus as corpus_module
from attnax.training import read_corpus
from attnax.training.text_files import LONGEST, Document, read_documents


def seconds(call):
    """Processor time of this thread for a call: the least of three tries."""

    def once():
        start = time.thread_time()
        call()
        return time.thread_time() - start

    gc.disable()  # what other tests left behind would be searched
    try:
        return min(once() for _ in range(3))
    finally:
        gc.enable()


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

    def test_configs_of_others_are_text(self, tmp_path):
        (self.fill(tmp_path) / "config.json").write_text('{"format": 3}\n')
        corpus = read_corpus(str(tmp_path))
        assert len(corpus.train) + len(corpus.held_out) == 61

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


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def texts_of(corpus):
    documents = sorted((*corpus.train, *corpus.held_out), key=lambda document: int(document.name.split("#")[1]))
    return [
        (document.text.decode(), document.label, document.target and document.target.decode()) for document in documents
    ]


KINDS = {
    "text": ([{"text": f"größer {index}", "id": index} for index in range(40)], ("größer 7", None, None)),
    "labels": ([{"text": f"t{index}", "label": "ab"[index % 2]} for index in range(40)], ("t7", "b", None)),
    "pairs": ([{"source": f"s{index}", "target": f"t{index}"} for index in range(40)], ("s7", None, "t7")),
}


class TestRows:
    @pytest.mark.parametrize("kind", KINDS)
    def test_rows_of_jsonl_and_parquet_are_documents(self, tmp_path, kind):
        rows, seventh = KINDS[kind]
        jsonl = read_corpus(write_rows(tmp_path / "a.jsonl", rows), held_out=0.3)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
        parquet = read_corpus(str(tmp_path / "a.parquet"), held_out=0.3)
        assert jsonl.kind == parquet.kind == kind and 0 < len(jsonl.held_out) < 20
        assert texts_of(jsonl) == texts_of(parquet) and texts_of(jsonl)[7] == seventh
        assert jsonl.classes == (("a", "b") if kind == "labels" else ())

    def test_labelled_rows_are_text_if_asked_for(self, tmp_path):
        corpus = read_corpus(write_rows(tmp_path / "a.jsonl", KINDS["labels"][0]), kind="text")
        assert corpus.kind == "text" and corpus.classes == () and texts_of(corpus)[7] == ("t7", None, None)

    @pytest.mark.parametrize(
        ("rows", "words"),
        [
            ([{"text": "a"}, {"text": 3}], "row 2 must have a string text; got a int"),
            ([{"text": "a"}, {"id": 3}], "row 2 must have a string text; got none"),
            ([{"id": "a"}], "must have rows with the field text, or .*; got the fields id"),
            ([{"text": "a", "label": 0}, {"text": "b", "label": 0.5}], "row 2 must have a label, .*; got '0.5'"),
            ([{"text": "a", "label": 0}, {"text": "b", "label": "0"}], "labels must all be strings or all be whole"),
            ([{"text": "a", "label": 0}, {"text": "", "label": 1}], "row 2 must have no empty text"),
            ([{"text": "only one"}], "too small"),
        ],
    )
    def test_rows_without_their_fields_are_named(self, tmp_path, rows, words):
        with pytest.raises(InputError, match=words):
            read_corpus(write_rows(tmp_path / "a.jsonl", rows))

    def test_files_that_hold_no_rows_are_named(self, tmp_path):
        (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": \n')
        with pytest.raises(InputError, match=r"a.jsonl: line 2 must be an object of JSON"):
            read_corpus(str(tmp_path / "a.jsonl"))
        (tmp_path / "a.jsonl").write_text("[1]\n")
        with pytest.raises(InputError, match=r"a.jsonl: line 1 must be an object of JSON; got a list"):
            read_corpus(str(tmp_path / "a.jsonl"))
        (tmp_path / "a.parquet").write_text("no parquet at all")
        with pytest.raises(InputError, match="is no parquet file that can be read"):
            read_corpus(str(tmp_path / "a.parquet"))

    def test_files_of_two_kinds_are_refused(self, tmp_path):
        write_rows(tmp_path / "a.jsonl", KINDS["labels"][0])
        write_rows(tmp_path / "b.jsonl", KINDS["pairs"][0])
        with pytest.raises(InputError, match=r"got labels in .*a.jsonl and pairs in .*b.jsonl"):
            read_corpus(str(tmp_path))


class TestReading:
    def test_a_long_file_among_others_is_cut_at_its_lines(self, tmp_path, monkeypatch):
        monkeypatch.setattr(corpus_module, "LONGEST", 100)
        text = "".join(f"line {index}\n" for index in range(60)).encode()
        (tmp_path / "long.txt").write_bytes(text)
        (tmp_path / "short.txt").write_text("short")
        corpus = read_corpus(str(tmp_path))
        pieces = sorted((*corpus.train, *corpus.held_out), key=lambda document: document.name)
        assert [piece.name for piece in pieces] == [*(f"long.txt#{index:02d}" for index in range(5)), "short.txt"]
        assert b"".join(piece.text for piece in pieces[:-1]) == text
        assert all(piece.text.endswith(b"\n") and len(piece) >= 100 for piece in pieces[:4])

    def test_a_long_file_takes_time_in_proportion_to_its_size(self, tmp_path):
        """The same time in pieces of 128 KiB; forty times as long where each line copies what came before it."""
        path = tmp_path / "long.txt"
        path.write_bytes(b"1234567\n" * (LONGEST // 8 + 1))

        def sizes(longest):
            return [len(document) for document in read_documents(path, "long", "text", longest)]

        assert sizes(LONGEST) == [LONGEST, 8]
        assert seconds(lambda: sizes(LONGEST)) < 8 * seconds(lambda: sizes(LONGEST // 16))

    def test_many_labels_take_time_in_proportion_to_their_rows(self, tmp_path, monkeypatch):
        """About the same time as two labels; many times as long where each row visits all labels."""
        count = 10_000
        rows = {
            write_rows(tmp_path / name, [{"text": "a", "label": 0}]): [
                Document(f"{name}#{index}", b"a", index % labels) for index in range(count)
            ]
            for name, labels in (("many.jsonl", count), ("few.jsonl", 2))
        }
        monkeypatch.setattr(corpus_module, "read_documents", lambda path, *_: rows[str(path)])
        many, few = rows
        assert read_corpus(many).classes == tuple(range(count))
        assert seconds(lambda: read_corpus(many)) < 2.5 * seconds(lambda: read_corpus(few))

    def test_no_character_is_cut(self, tmp_path):
        text = "aé日😀" * 50
        (tmp_path / "line.txt").write_text(text, "utf-8")
        for longest in range(4, 12):
            pieces = [
                document.text.decode() for document in read_documents(tmp_path / "line.txt", "x", "text", longest)
            ]
            assert "".join(pieces) == text and len(pieces) > 40

    def test_reading_begins_at_any_document(self, tmp_path):
        TestCorpus().fill(tmp_path)
        (tmp_path / "zz.txt").write_text("last")
        train = read_corpus(str(tmp_path)).train
        for first in (0, 1, 19, len(train) - 1, len(train)):
            assert list(train.since(first)) == list(train)[first:]

    def test_a_sample_is_even(self, tmp_path):
        train = read_corpus(str(TestCorpus().fill(tmp_path))).train
        whole = [document.text for document in train]
        assert list(train.sample()) == whole
        assert list(train.sample(train.num_bytes // 5)) == whole[::5]

    def test_a_file_that_changes_is_noticed(self, tmp_path):
        corpus = read_corpus(str(TestCorpus().fill(tmp_path)))
        (tmp_path / "part0" / "file0.txt").write_text("another")
        with pytest.raises(InputError, match=r"file0.txt was changed while it was read"):
            [*corpus.train, *corpus.held_out]
