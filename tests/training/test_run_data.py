"""The tokens of a run: made once in its folder, or those of a store that stays the same."""

import dataclasses
import json
import shutil

import pytest
from small_tokenizers import AROUND, END, START, byte_level, copy_of

from attnax.errors import InputError
from attnax.text import byte_tokenizer, find_tokenizer
from attnax.training import RunFolder, RunOptions, make_store, read_corpus
from attnax.training.run_data import choose_data, reopen_data

MODEL = dataclasses.replace(RunOptions.model, d_model=8, num_heads=2, num_layers=1, d_ff=8, max_len=16)
WITH_A_SIZE = dataclasses.replace(MODEL, vocab_size=300)


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for index in range(20):
        (folder / f"file{index:02d}.txt").write_text(f"text number {index}\n" * 3)
    return folder


def begin(data, path, **fields):
    options = RunOptions(**{"data": str(data), "tokenizer": "bytes", "model": MODEL} | fields)
    chosen = choose_data(options)
    return RunFolder.create(path, options, chosen, chosen.tokenizer, {}), chosen


def test_text_becomes_a_store_in_the_folder_of_the_run(texts, tmp_path):
    run, data = begin(texts, tmp_path / "run")
    store = data.open(run)
    assert store.path == run.data and run.load()[2] == data.fingerprint == store.facts["source"]["sha256"]
    shutil.rmtree(texts)  # it is not needed again
    again = reopen_data(run, run.load())
    assert again.open(run).fingerprint == store.fingerprint and again.tokenizer.to_json() == byte_tokenizer().to_json()


def test_a_run_that_was_killed_before_its_tokens_were_made_goes_on_with_the_same_text(texts, tmp_path):
    run, data = begin(texts, tmp_path / "run")
    store = data.open(run)
    (run.data / "store.json").unlink()
    (texts / "file00.txt").write_text("another")
    with pytest.raises(InputError, match=r"the text of .*run has changed since it was started; start a new run"):
        reopen_data(run, run.load())
    (texts / "file00.txt").write_text("text number 0\n" * 3)
    shutil.rmtree(run.data)
    assert reopen_data(run, run.load()).open(run).fingerprint == store.fingerprint


def test_the_store_of_another_run_is_refused(texts, tmp_path):
    run, _ = begin(texts, tmp_path / "run")
    make_store(read_corpus(str(texts), held_out=0.5), byte_tokenizer(), run.data)
    with pytest.raises(InputError, match="run/data is the store of another run. Delete it, and it is made again"):
        reopen_data(run, run.load())
    shutil.rmtree(run.data)
    folder = tmp_path / "other"
    folder.mkdir()
    copy_of(byte_level, AROUND).save(str(folder / "tokenizer.json"))
    make_store(read_corpus(str(texts)), find_tokenizer(folder), run.data)
    with pytest.raises(InputError, match="must have the tokenizer of the run; got tokens of another one"):
        reopen_data(run, run.load())


class TestStores:
    @pytest.fixture
    def store(self, texts, tmp_path):
        return make_store(read_corpus(str(texts)), byte_tokenizer(), tmp_path / "store")

    def test_a_run_takes_a_store_and_its_tokenizer(self, store, tmp_path):
        run, data = begin(store.path, tmp_path / "run", tokenizer="bpe")
        assert data.corpus is None and run.load()[1].to_json() == byte_tokenizer().to_json()
        assert (
            data.open(run).path == reopen_data(run, run.load()).open(run).path == store.path and not run.data.exists()
        )
        assert run.load()[2] == store.fingerprint

    def test_another_store_in_its_place_is_refused(self, store, texts, tmp_path):
        run, _ = begin(store.path, tmp_path / "run", tokenizer="bpe")
        shutil.rmtree(store.path)
        with pytest.raises(InputError, match="no such file or folder"):
            reopen_data(run, run.load())
        make_store(read_corpus(str(texts), held_out=0.5), byte_tokenizer(), store.path)
        with pytest.raises(InputError, match=r"the store .*store is not the one of .*run; start a new run"):
            reopen_data(run, run.load())

    def test_what_a_store_has_itself_is_no_option(self, store):
        options = RunOptions(data=str(store.path), tokenizer="bytes", model=MODEL)
        with pytest.raises(InputError, match=r"--tokenizer is for text; .* is a store, which has its own"):
            choose_data(options)
        with pytest.raises(InputError, match="--held-out is for text"):
            choose_data(dataclasses.replace(options, tokenizer="bpe", held_out=0.5))
        with pytest.raises(
            InputError, match="--vocab-size is for text; .* is a store, which has its own. Leave it out"
        ):
            choose_data(dataclasses.replace(options, tokenizer="bpe", model=WITH_A_SIZE))

    def test_incomplete_ones_and_those_of_rows_are_refused(self, store, tmp_path):
        options = RunOptions(data=str(store.path), model=MODEL)
        (store.path / "store.json").rename(store.path / "progress.jsonl")
        facts = json.loads((store.path / "progress.jsonl").read_text())
        (store.path / "progress.jsonl").write_text(json.dumps(facts) + "\n")
        with pytest.raises(InputError, match="is an incomplete store"):
            choose_data(options)
        (tmp_path / "a.jsonl").write_text('{"text": "a", "label": 0}\n{"text": "b", "label": 1}\n')
        make_store(read_corpus(str(tmp_path / "a.jsonl")), byte_tokenizer(), tmp_path / "labels")
        with pytest.raises(InputError, match="For a classifier train in Python with .*classification"):
            choose_data(dataclasses.replace(options, data=str(tmp_path / "labels")))


def test_a_tokenizer_that_is_there_has_its_own_number_of_tokens(texts):
    options = RunOptions(data=str(texts), tokenizer="bytes", model=WITH_A_SIZE)
    with pytest.raises(InputError, match="--vocab-size is for --tokenizer bpe; got --tokenizer bytes. Leave it out"):
        choose_data(options)
    assert choose_data(dataclasses.replace(options, tokenizer="bpe")).tokenizer.vocab_size <= 300


@pytest.mark.parametrize("as_store", [False, True])
def test_too_little_text_is_refused_before_there_is_a_run(texts, tmp_path, as_store):
    path = texts
    if as_store:
        path = make_store(read_corpus(str(texts)), byte_tokenizer(), tmp_path / "store").path
    data = choose_data(RunOptions(data=str(path), tokenizer="bpe" if as_store else "bytes", model=MODEL))
    count = sum(1 + len(document) for document in read_corpus(str(texts)).train)
    data.require_a_window(count - 1)
    with pytest.raises(InputError, match=rf"too short: its {count:,} tokens do not fill one window of {count}"):
        data.require_a_window(count)


def test_a_run_keeps_the_tokens_around_a_document_of_a_published_tokenizer(texts, tmp_path):
    folder = tmp_path / "llama"
    folder.mkdir()
    copy_of(byte_level, AROUND).save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"eos_token_id": END}))
    run, data = begin(texts, tmp_path / "run", tokenizer=str(folder))
    opened = run.load()[1]
    assert (opened.special.document, opened.special.end) == (START, END) and opened.special == data.tokenizer.special
    assert data.open(run).tokens()[:1] == [START]
