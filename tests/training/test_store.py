"""Stores: the same files however often their process was killed, and none that is incomplete, changed or of another."""

import contextlib
import errno
import hashlib
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from small_tokenizers import AROUND, END, START, TOKENIZERS, byte_level, copy_of

from attnax.errors import InputError
from attnax.text import byte_tokenizer, find_tokenizer, train_bpe
from attnax.training import make_store, open_store, read_corpus
from attnax.training import store_writer as module
from attnax.training.stream import TokenStream

SHARD = 300  # tokens, in 8 shards


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for index in range(40):
        (folder / f"file{index:02d}.txt").write_text(f"text number {index}\n" * (index % 7 + 1))
    return folder


@pytest.fixture(scope="module")
def corpus(folder):
    return read_corpus(str(folder), held_out=0.2)


@pytest.fixture(scope="module")
def store(corpus, tmp_path_factory):
    """A store that was made without a stop."""
    return make_store(corpus, byte_tokenizer(), tmp_path_factory.mktemp("store") / "whole", shard_tokens=SHARD)


def files_of(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


def test_a_store_holds_the_tokens_of_its_corpus(corpus, store):
    for part in ("train", "held_out"):
        texts = [document.text for document in corpus.part(part)]
        expected = byte_tokenizer().encode_documents(texts)
        found = store.tokens(part)
        assert found[:].dtype == np.uint16 and len(found) == len(expected) == store.num_tokens(part)
        np.testing.assert_array_equal(found[:], expected)
        for start, stop in ((0, 1), (5, 905), (len(expected) - 3, len(expected) + 9), (7, 7)):
            np.testing.assert_array_equal(found[start:stop], expected[start:stop])
        for index, text in enumerate(texts):
            assert store.tokenizer.decode(store.texts("tokens", part)[index]) == text
            assert store.name(index, part) == list(corpus.part(part))[index].name
        assert store.num_bytes(part) == sum(map(len, texts)) and store.num_documents(part) == len(texts)
    assert len(store.facts["shards"]) == 8
    with pytest.raises(IndexError, match=r"below 3\d; got index=40"):
        store.texts()[40]


def test_windows_do_not_depend_on_the_shards(corpus, store, tmp_path):
    one = make_store(corpus, byte_tokenizer(), tmp_path / "one")
    assert [shard["name"] for shard in one.facts["shards"]] == ["train-00000", "held_out-00000"]
    streams = [TokenStream(each.tokens(), 17) for each in (one, store)]
    assert len(streams[0]) == len(streams[1]) > 100
    for index in range(len(streams[0])):
        np.testing.assert_array_equal(*(stream[index]["tokens"] for stream in streams))
    scored = [list(TokenStream(each.tokens("held_out"), 17).scoring_windows(5)) for each in (one, store)]
    for (tokens, counts), (other_tokens, other_counts) in zip(*scored, strict=True):
        np.testing.assert_array_equal(tokens, other_tokens)
        np.testing.assert_array_equal(counts, other_counts)


def test_few_texts_are_encoded_at_a_time(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "LONGEST", 2000)
    tokenizer, sizes = byte_tokenizer(), []

    def encode(texts):
        sizes.append((len(texts), sum(map(len, texts[:-1]))))
        return type(tokenizer).encode_each(tokenizer, texts)

    monkeypatch.setattr(tokenizer, "encode_each", encode)
    make_store(corpus, tokenizer, tmp_path / "store")
    assert len(sizes) > 4 and all(count <= 64 and before_the_last < 500 for count, before_the_last in sizes)


class Killed(BaseException):
    """The process ends at once."""


PLACES = [("_Shard.finish", 5), ("_HashedFile.finish", 14), ("write_durable", 1), ("write_durable", 2)]


@pytest.mark.parametrize(("name", "count"), [*PLACES, ("write_durable", 3), ("_encoded", 2)])
def test_a_store_whose_process_was_killed_is_finished_to_the_same_files(
    corpus, store, tmp_path, monkeypatch, name, count
):
    place, _, method = name.rpartition(".")
    place, calls = getattr(module, place) if place else module, []
    original = getattr(place, method)

    def killed(*arguments):
        calls.append(name)
        if len(calls) == count:
            raise Killed
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(place, method, killed)
        patch.setattr(module._HashedFile, "close", lambda self: self._file.close())  # nothing is cleaned up
        with pytest.raises(Killed):
            make_store(corpus, byte_tokenizer(), tmp_path / "store", shard_tokens=SHARD)
    assert not (tmp_path / "store" / "store.json").exists()
    with pytest.raises(InputError, match="it has no store.json"):
        open_store(tmp_path / "store")
    kept = {
        file: file.stat().st_mtime_ns for file in (tmp_path / "store").glob("*-*") if not file.name.endswith(".tmp")
    }
    shards = [json.loads(line) for line in progress(tmp_path / "store")][1:]
    finished, said = {shard["name"] for shard in shards}, []
    again = make_store(corpus, byte_tokenizer(), tmp_path / "store", shard_tokens=SHARD, on_progress=said.append)
    compared = sum(shard["documents"] for shard in shards)  # it calls for each, though nothing new is done
    assert said[:compared] == [0] * compared and sum(said) == corpus.num_bytes
    assert again.fingerprint == store.fingerprint and files_of(again.path) == files_of(store.path)
    for file, time in kept.items():
        if file.name.split(".")[0] in finished:
            assert file.stat().st_mtime_ns == time, file  # shards that were finished are not written again


class TestAnotherTextForAWhile:
    """A file changes while it is read, and is put back: shards that were made meanwhile are made again."""

    TEXT = "".join(f"line number {index}\n" for index in range(100))

    @pytest.fixture(autouse=True)
    def one_text_at_a_time(self, monkeypatch):
        monkeypatch.setattr(module, "LONGEST", 4)

    def test_the_end_of_the_file_tells(self, tmp_path):
        other = self.TEXT.replace("line", "LINE") + "more\n" * 100  # of more shards
        self.check(tmp_path, other, lambda: pytest.raises(InputError, match=r"long.txt was changed while it was read"))

    def test_a_process_that_was_killed_did_not_see_the_end(self, tmp_path, monkeypatch):
        finish, killing = module._Shard.finish, pytest.MonkeyPatch()

        def killed(self):
            if self._name == "train-00005":
                killing.undo()
                raise Killed
            return finish(self)

        def stop():
            killing.setattr(module._Shard, "finish", killed)
            return pytest.raises(Killed)

        self.check(tmp_path, self.TEXT.replace("line", "LINE"), stop)

    def check(self, folder, other, stopping):
        path, out = folder / "long.txt", folder / "store"
        path.write_text(self.TEXT)
        corpus = read_corpus(str(path), held_out=0.2)
        whole = make_store(corpus, byte_tokenizer(), folder / "whole", shard_tokens=140)
        same = len(self.TEXT) // 4
        path.write_text(self.TEXT[:same] + other[same:])
        with stopping():
            make_store(corpus, byte_tokenizer(), out, shard_tokens=140)
        assert len(progress(out)) > 4
        path.write_text(self.TEXT)
        first = out / "train-00000.tokens"
        before = first.stat().st_mtime_ns
        assert files_of(make_store(corpus, byte_tokenizer(), out, shard_tokens=140).path) == files_of(whole.path)
        assert first.stat().st_mtime_ns == before  # a shard of the corpus's text is kept

    def test_a_new_label(self, tmp_path):
        path = tmp_path / "a.jsonl"
        path.write_text("".join(json.dumps({"text": "a", "label": index % 2}) + "\n" for index in range(9)))
        corpus = read_corpus(str(path))
        path.write_text(path.read_text().replace('"label": 1', '"label": 7'))
        with pytest.raises(
            InputError, match=r"the file of a.jsonl#\d was changed while it was read: the label 7 is new"
        ):
            make_store(corpus, byte_tokenizer(), tmp_path / "store")


def progress(path):
    with contextlib.suppress(FileNotFoundError):
        return (path / "progress.jsonl").read_text().splitlines()
    return []


def kill_after(folder, out, size):
    """Makes the store in a process that kills itself once this number of bytes is done; returns its exit status."""
    code = f"""
import os, signal
from attnax.text import byte_tokenizer
from attnax.training import make_store, read_corpus
sizes = []
def count(size):
    sizes.append(size)
    if sum(sizes) > {size}:
        os.kill(os.getpid(), signal.SIGKILL)
make_store(read_corpus({str(folder)!r}, held_out=0.2), byte_tokenizer(), {str(out)!r}, shard_tokens={SHARD},
           on_progress=count)
"""
    return subprocess.run([sys.executable, "-c", code], check=False).returncode


def test_kill_minus_9_while_tokenizing(folder, store, tmp_path):
    """The line of progress that it was writing may be cut too."""
    out = tmp_path / "store"
    assert kill_after(folder, out, 2000) == -signal.SIGKILL
    assert len(progress(out)) > 3
    with (out / "progress.jsonl").open("r+b") as file:
        file.truncate(os.path.getsize(out / "progress.jsonl") - 20)
    again = make_store(read_corpus(str(folder), held_out=0.2), byte_tokenizer(), out, shard_tokens=SHARD)
    assert again.fingerprint == store.fingerprint and files_of(out) == files_of(store.path)


@pytest.mark.thorough
def test_thirty_kills_while_tokenizing(folder, store, tmp_path):
    """Each process goes on where the one before was killed, or a little before that."""
    out, total = tmp_path / "store", sum(map(store.num_bytes, ("train", "held_out")))
    for size in sorted(np.random.default_rng(0).integers(1, total, 30).tolist()):
        assert kill_after(folder, out, size) == -signal.SIGKILL
    assert kill_after(folder, out, 10**9) == 0 and files_of(out) == files_of(store.path)


class TestRefusals:
    @pytest.fixture
    def copy(self, store, tmp_path):
        path = tmp_path / "copy"
        path.mkdir()
        for name, content in files_of(store.path).items():
            (path / name).write_bytes(content)
        return path

    def test_a_copy_that_was_interrupted(self, copy):
        (copy / "store.json").unlink()
        with pytest.raises(InputError, match="is an incomplete store: it has no store.json"):
            open_store(copy)
        with pytest.raises(InputError, match="store"):
            read_corpus(str(copy))

    @pytest.mark.parametrize("name", ["train-00003.tokens", "train-00003.tokens.starts", "held_out-00000.names"])
    def test_a_shard_that_was_changed(self, copy, name):
        content = bytearray((copy / name).read_bytes())
        content[7] ^= 4
        (copy / name).write_bytes(content)
        with pytest.raises(InputError, match=rf"{name} was changed: its SHA-256 differs"):
            open_store(copy)
        open_store(copy, verify=False)
        (copy / name).write_bytes(content[:-1])
        with pytest.raises(InputError, match=rf"{name} was changed: it has {len(content) - 1} bytes instead of"):
            open_store(copy, verify=False)
        (copy / name).unlink()
        with pytest.raises(InputError, match=rf"{name} is missing"):
            open_store(copy, verify=False)

    def test_a_tokenizer_or_a_list_that_was_changed(self, copy):
        facts = (copy / "store.json").read_text()
        (copy / "store.json").write_text(facts.replace('"documents": ', '"documents": 1', 1))
        with pytest.raises(InputError, match=r"store.json was changed after it was written"):
            open_store(copy)
        (copy / "store.json").write_text(facts.replace("attnax store 1", "attnax store 9"))
        with pytest.raises(InputError, match="must have the format 'attnax store 1'; got 'attnax store 9'"):
            open_store(copy)
        (copy / "store.json").write_text(facts[:99])
        with pytest.raises(InputError, match=r"store.json is damaged"):
            open_store(copy)
        (copy / "store.json").write_text(facts)
        (copy / "tokenizer.json").write_text(train_bpe([b"abab" * 9], 258).to_json())
        with pytest.raises(InputError, match=r"is not the tokenizer of the store"):
            open_store(copy)

    def test_no_store(self, tmp_path):
        with pytest.raises(InputError, match=r"is not a store: it has no store.json. attnax tokenize makes one"):
            open_store(tmp_path)

    def test_another_tokenizer(self, store):
        other = train_bpe([b"abab" * 9], 258)
        with pytest.raises(InputError, match="must have the tokenizer of the other store; got tokens of another one"):
            store.require_tokenizer(other, "the other store")
        store.require_tokenizer(byte_tokenizer())

    def test_another_kind(self, store):
        with pytest.raises(InputError, match="must be a store of labels; got one of text"):
            store.labels()

    @pytest.mark.parametrize("complete", [True, False])
    def test_going_on_with_something_else(self, folder, corpus, copy, complete):
        if not complete:
            facts = json.loads((copy / "store.json").read_text())
            shards = facts.pop("shards")
            del facts["attnax"], facts["sha256"]
            (copy / "progress.jsonl").write_text("".join(json.dumps(line) + "\n" for line in (facts, *shards[:2])))
            (copy / "store.json").unlink()
        with pytest.raises(InputError, match="holds another store: its shards have 300 tokens, not 301"):
            make_store(corpus, byte_tokenizer(), copy, shard_tokens=301)
        with pytest.raises(InputError, match="holds another store: the tokenizer is another one"):
            make_store(corpus, train_bpe([b"abab" * 9], 258), copy, shard_tokens=SHARD)
        with pytest.raises(InputError, match="holds another store: the source differs"):
            make_store(read_corpus(str(folder), held_out=0.5), byte_tokenizer(), copy, shard_tokens=SHARD)
        again = make_store(corpus, byte_tokenizer(), copy, shard_tokens=SHARD)
        assert again.num_documents() == len(corpus.train)

    def test_going_on_after_a_finished_shard_that_was_changed(self, corpus, tmp_path, monkeypatch):
        with monkeypatch.context() as patch:
            patch.setattr(module, "sync", lambda folder: None)
            original = module._Shard.finish
            patch.setattr(
                module._Shard, "finish", lambda self: original(self) if self._name < "train-00002" else kill()
            )
            with pytest.raises(Killed):
                make_store(corpus, byte_tokenizer(), tmp_path, shard_tokens=SHARD)
        shard = tmp_path / "train-00001.tokens"
        shard.write_bytes(bytes(len(shard.read_bytes())))
        with pytest.raises(InputError, match=r"train-00001.tokens was changed: its SHA-256 differs. Delete the store"):
            make_store(corpus, byte_tokenizer(), tmp_path, shard_tokens=SHARD)

    @pytest.mark.parametrize("text", ["", "cut", "no JSON\n"])
    def test_progress_that_was_changed(self, corpus, tmp_path, text):
        (tmp_path / "progress.jsonl").write_text(text)
        with pytest.raises(InputError, match=r"progress.jsonl is damaged. Delete"):
            make_store(corpus, byte_tokenizer(), tmp_path)

    def test_a_folder_of_someone_else(self, corpus, tmp_path):
        (tmp_path / "mine.txt").write_text("mine")
        with pytest.raises(InputError, match="exists already; nothing was overwritten"):
            make_store(corpus, byte_tokenizer(), tmp_path)
        with pytest.raises(InputError, match="exists already and is no folder"):
            make_store(corpus, byte_tokenizer(), tmp_path / "mine.txt")
        assert [path.name for path in tmp_path.iterdir() if path.name != ".lock"] == ["mine.txt"]

    def test_two_processes(self, corpus, tmp_path):
        with module._locked(tmp_path), pytest.raises(InputError, match="is being written by another process"):
            make_store(corpus, byte_tokenizer(), tmp_path)


def kill():
    raise Killed


class TestPublishedTokenizers:
    def save(self, folder, tokenizer, **config):
        folder.mkdir(exist_ok=True)
        tokenizer.save(str(folder / "tokenizer.json"))
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    def test_documents_stand_between_its_tokens(self, corpus, tmp_path):
        folder = self.save(tmp_path / "llama", copy_of(byte_level, AROUND), eos_token_id=END, pad_token_id=7)
        tokenizer = find_tokenizer(folder)
        assert (tokenizer.special.document, tokenizer.special.end, tokenizer.special.padding) == (START, END, 7)
        store = make_store(corpus, tokenizer, tmp_path / "store")
        text = next(iter(corpus.train)).text
        plain = TOKENIZERS[byte_level].encode(text.decode(), add_special_tokens=False).ids
        assert store.texts()[0].tolist() == [START, *plain, END]
        opened = open_store(tmp_path / "store").tokenizer
        assert opened.special == tokenizer.special and opened.decode(store.texts()[0]) == text
        assert opened.codec.encode(text) == [START, *plain] and opened.codec.ends == (END,)
        assert find_tokenizer(tmp_path / "store").to_json() == opened.to_json()

    @pytest.mark.parametrize(
        ("config", "special"),
        [
            ({"bos_token_id": 4, "eos_token_id": 5, "decoder_start_token_id": 6}, (4, 5, 4, 6)),
            ({"bos_token_id": 4, "eos_token_id": 4}, (4, None, 4, 4)),
            ({"eos_token_id": [8, 9]}, (8, None, 8, 8)),
        ],
    )
    def test_the_tokens_around_a_document_are_the_checkpoints(self, tmp_path, config, special):
        tokenizer = find_tokenizer(self.save(tmp_path, TOKENIZERS[byte_level], **config))
        found = tokenizer.special
        assert (found.document, found.end, found.padding, found.start) == special

    def test_targets_begin_and_end_once(self, tmp_path):
        plain = TOKENIZERS[byte_level].encode("def", add_special_tokens=False).ids
        around = find_tokenizer(
            self.save(tmp_path / "a", copy_of(byte_level, AROUND), decoder_start_token_id=9, eos_token_id=END)
        )
        (target,) = around.encode_targets([b"def"])
        assert target.tolist() == [9, START, *plain, END]
        bare = find_tokenizer(self.save(tmp_path / "b", TOKENIZERS[byte_level], bos_token_id=START, eos_token_id=END))
        assert bare.encode_targets([b"def"])[0].tolist() == [START, *plain, END]
        assert bare.encode_rows([b"def"])[0].tolist() == plain

    def test_special_tokens_in_a_text_are_text(self, tmp_path):
        tokenizer = find_tokenizer(self.save(tmp_path, copy_of(byte_level, AROUND), eos_token_id=END))
        ids = tokenizer.encode_each([b"a</s><s>b"])[0]
        assert list(ids).count(END) == list(ids).count(START) == 1

    def test_what_it_cannot_read_is_named(self, tmp_path):
        for name in "ab":
            (tmp_path / f"{name}.txt").write_bytes(b"caf\xe9 " + name.encode())
        corpus = read_corpus(str(tmp_path / "*.txt"))
        tokenizer = find_tokenizer(self.save(tmp_path / "t", copy_of(byte_level, AROUND)))
        with pytest.raises(InputError, match=r"[ab].txt must be text in UTF-8 for a published tokenizer"):
            make_store(corpus, tokenizer, tmp_path / "store")
        with pytest.raises(InputError, match="must have a token that begins a document: it puts none before a text"):
            find_tokenizer(self.save(tmp_path / "u", TOKENIZERS[byte_level]))
        with pytest.raises(InputError, match="no tokenizer at .*nowhere"):
            find_tokenizer(tmp_path / "nowhere")


def test_a_process_that_was_killed_after_the_last_line_has_made_a_store(corpus, store, tmp_path):
    again = make_store(corpus, byte_tokenizer(), tmp_path / "store", shard_tokens=SHARD)
    (again.path / "progress.jsonl").write_text("a line\n")
    make_store(corpus, byte_tokenizer(), again.path, shard_tokens=SHARD)
    assert files_of(again.path) == files_of(store.path)


def test_a_full_disk_is_an_error_of_the_store_and_finished_shards_are_kept(corpus, store, tmp_path, monkeypatch):
    writes, write = [], module._HashedFile.write

    def full(self, content):
        writes.append(content)
        if len(writes) == 60:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, content)

    with monkeypatch.context() as patch:
        patch.setattr(module._HashedFile, "write", full)
        with pytest.raises(OSError, match="No space left on device: '.*/store'"):
            make_store(corpus, byte_tokenizer(), tmp_path / "store", shard_tokens=SHARD)
    assert 1 < len(progress(tmp_path / "store")) < 9 and not list((tmp_path / "store").glob("*.tmp"))
    again = make_store(corpus, byte_tokenizer(), tmp_path / "store", shard_tokens=SHARD)
    assert files_of(again.path) == files_of(store.path)


def test_the_digests_are_of_the_files(store):
    for shard in store.facts["shards"]:
        for name, known in shard["files"].items():
            assert hashlib.sha256((store.path / name).read_bytes()).hexdigest() == known["sha256"]
