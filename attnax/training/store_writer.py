"""Writing a store: a shard at a time, so that a run that is killed goes on after its last finished shard."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from attnax.errors import InputError
from attnax.text.published_tokenizer import TextTokenizer
from attnax.training.corpus import PARTS, Corpus, Part
from attnax.training.durable import sync, write_durable
from attnax.training.store import COLUMNS, Store, digest_of, open_store, require_files
from attnax.training.store_format import FORMAT, PROGRESS, STORE
from attnax.training.text_files import LONGEST, Document
from attnax.version import __version__

__all__ = ["SHARD_TOKENS", "make_store"]

SHARD_TOKENS = 1 << 26
_LOCK = ".lock"
_SHARD_FILE = re.compile(rf"({'|'.join(PARTS)})-\d{{5,}}\..*")


def make_store(
    corpus: Corpus,
    tokenizer: TextTokenizer,
    out: str | Path,
    *,
    shard_tokens: int = SHARD_TOKENS,
    on_progress: Callable[[int], None] | None = None,
) -> Store:
    """Writes the tokens of a corpus into a folder, with a checksum for each file.

    If the process is killed, the same call goes on after the last finished shard and makes the same files; a shard that
    was made of another text, which a file held for a while, is made again. A store that is complete already is checked
    and returned. Of the texts and tokens, a few documents are in memory at a time.

    Args:
        corpus: the documents.
        tokenizer: of the tokens.
        out: the folder, which is made.
        shard_tokens: a shard ends with the document that brings it to this number of tokens.
        on_progress: called with the number of bytes of the texts that are done since its last call; 0 while the texts
            of finished shards are compared.

    Raises:
        InputError: the folder holds something else, or a store of another source, tokenizer or size of shards, or a
            shard that was changed; a text that the tokenizer cannot read; a source that changes meanwhile;
            or another process writes the store.
        OSError: the disk is full or refuses; finished shards are kept.
    """
    out = Path(out)
    content = tokenizer.to_json()
    plan = {
        "format": FORMAT,
        "kind": corpus.kind,
        "classes": list(corpus.classes),
        "dtype": "uint16" if tokenizer.vocab_size <= 2**16 else "uint32",
        "tokenizer": {
            "sha256": hashlib.sha256(content.encode()).hexdigest(),
            "vocab_size": tokenizer.vocab_size,
            "special": dataclasses.asdict(tokenizer.special),
        },
        "source": {"sha256": corpus.fingerprint},
        "shard_tokens": shard_tokens,
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise InputError(f"{out} exists already and is no folder; nothing was overwritten.") from error
    with _locked(out), _named(out):
        if (out / STORE).exists():
            store = open_store(out)
            _require_plan(out, plan, {key: store.facts.get(key) for key in plan})
        else:
            say = on_progress or (lambda _: None)
            shards = _begin(out, corpus, plan, content, say)
            say(sum(shard["bytes"] for shard in shards))
            for part in PARTS:
                _write_part(out, corpus, part, tokenizer, plan, shards, say)
            facts = {**plan, "shards": shards, "attnax": __version__}
            write_durable(out / STORE, json.dumps({**facts, "sha256": digest_of(facts)}, indent=1) + "\n")
            store = open_store(out, verify=False)
        (out / PROGRESS).unlink(missing_ok=True)
    return store


def _begin(
    out: Path, corpus: Corpus, plan: dict[str, Any], tokenizer: str, say: Callable[[int], None]
) -> list[dict[str, Any]]:
    """Writes what comes before the shards; returns the shards of this corpus that an earlier process finished.

    Raises:
        InputError: the folder holds something else.
    """
    path = out / PROGRESS
    if not path.exists():
        if not {found.name for found in out.iterdir()} <= {_LOCK, f"{PROGRESS}.tmp"}:
            raise InputError(f"{out} exists already; nothing was overwritten. Name another --out.")
        shards: list[dict[str, Any]] = []
    else:
        whole = [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
        try:
            lines = [json.loads(line) for line in whole]  # the last one may be cut, and was left out
            begun = lines[0]
        except (ValueError, IndexError) as error:
            raise InputError(f"{path} is damaged. Delete {out} and make the store again.") from error
        _require_plan(out, plan, begun)
        require_files(out, lines[1:], verify=True)
        shards = _made_of(corpus, lines[1:], say)
    write_durable(path, "".join(json.dumps(line) + "\n" for line in [plan, *shards]))
    kept = {name for shard in shards for name in shard["files"]}
    for file in out.iterdir():
        if file.name not in kept and _SHARD_FILE.fullmatch(file.name):
            file.unlink()
    write_durable(out / "tokenizer.json", tokenizer)
    return shards


def _made_of(corpus: Corpus, shards: list[dict[str, Any]], say: Callable[[int], None]) -> list[dict[str, Any]]:
    """The shards up to the first that was made of another text.

    That a file has changed is known at its end alone, when shards of its beginning are finished.
    """
    documents = {part: iter(corpus.part(part)) for part in PARTS}
    for index, shard in enumerate(shards):
        digest = hashlib.sha256()
        for document in islice(documents[shard["part"]], shard["documents"]):
            digest.update(document.content())
            say(0)
        if digest.hexdigest() != shard["content"]:
            return shards[:index]
    return shards


def _require_plan(out: Path, plan: dict[str, Any], found: dict[str, Any]) -> None:
    """Raises InputError that names what a store was begun with, if that differs."""
    words = {
        "source": "the source differs: it has changed, or other files or another held-out part were asked for",
        "tokenizer": "the tokenizer is another one",
        "kind": f"it holds {found.get('kind')}, not {plan['kind']}",
        "shard_tokens": f"its shards have {found.get('shard_tokens')} tokens, not {plan['shard_tokens']}",
    }
    differing = [key for key in plan if plan[key] != found.get(key)]
    if differing:
        why = next((words[key] for key in words if key in differing), f"its {differing[0]} differs")
        raise InputError(f"{out} holds another store: {why}. Delete it, or name another --out.")


def _write_part(
    out: Path,
    corpus: Corpus,
    part: Part,
    tokenizer: TextTokenizer,
    plan: dict[str, Any],
    shards: list[dict[str, Any]],
    say: Callable[[int], None],
) -> None:
    """Writes the shards of a part that are missing, and adds them to `shards` and to the file of progress."""
    mine = [shard for shard in shards if shard["part"] == part]
    documents = corpus.part(part).since(sum(shard["documents"] for shard in mine))
    number, shard = len(mine), None

    def finish(shard: _Shard) -> None:
        shards.append(shard.finish())
        sync(out)
        with (out / PROGRESS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(shards[-1]) + "\n")
            file.flush()
            os.fsync(file.fileno())

    with contextlib.ExitStack() as stack:
        for document, columns in _encoded(documents, corpus, tokenizer):
            if shard is None:
                shard = stack.enter_context(_Shard(out, part, number, plan))
            shard.add(document, columns)
            say(len(document))
            if shard.num_tokens >= plan["shard_tokens"]:
                finish(shard)
                stack.close()  # which lets go of the shard
                number, shard = number + 1, None
        if shard is not None:
            finish(shard)


def _encoded(
    documents: Iterator[Document], corpus: Corpus, tokenizer: TextTokenizer
) -> Iterator[tuple[Document, dict[str, np.ndarray]]]:
    """Each document with its columns; up to 64 documents, or a long one, are encoded at a time."""
    encode = tokenizer.encode_each if corpus.kind == "text" else tokenizer.encode_rows
    classes, is_pair = {label: number for number, label in enumerate(corpus.classes)}, corpus.kind == "pairs"
    for batch in _batched(documents):
        try:
            texts = encode([document.text for document in batch])
            targets = tokenizer.encode_targets([document.target or b"" for document in batch]) if is_pair else texts
        except UnicodeDecodeError as error:
            name = next(each.name for each in batch if error.object in (each.text, each.target))
            raise InputError(f"{name} must be text in UTF-8 for a published tokenizer: {error}.") from error
        for document, text, target in zip(batch, texts, targets, strict=True):
            if corpus.kind == "text":
                yield document, {"tokens": text}
            elif corpus.kind == "labels":
                if document.label not in classes:
                    raise InputError(
                        f"the file of {document.name} was changed while it was read: the label {document.label!r} is "
                        "new. Start again."
                    )
                yield document, {"tokens": text, "label": np.array([classes[document.label]], np.int32)}
            else:
                yield document, {"source": text, "target": target}


def _batched(documents: Iterator[Document]) -> Iterator[Sequence[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document)
        if len(batch) == 64 or size >= LONGEST // 4:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class _Shard:
    """The files of a shard while they are written, under other names until they are whole."""

    def __init__(self, out: Path, part: Part, number: int, plan: dict[str, Any]):
        self._out, self._part, self._name = out, part, f"{part}-{number:05d}"
        self._dtype = np.dtype(plan["dtype"]).newbyteorder("<")
        self._starts: dict[str, list[int]] = {column: [0] for column in COLUMNS[plan["kind"]]}
        names = [*self._starts, *(f"{column}.starts" for column in self._starts), "names"]
        names += ["label"] if plan["kind"] == "labels" else []
        self._files = {name: _HashedFile(out / f"{self._name}.{name}") for name in names}
        self._documents = self._bytes = 0
        self._content = hashlib.sha256()

    def __enter__(self) -> _Shard:
        return self

    def __exit__(self, *error: object) -> None:
        for file in self._files.values():
            file.close()

    @property
    def num_tokens(self) -> int:
        """Tokens of all columns."""
        return sum(starts[-1] for starts in self._starts.values())

    def add(self, document: Document, columns: dict[str, np.ndarray]) -> None:
        """Adds a document."""
        self._files["names"].write(json.dumps(document.name).encode() + b"\n")
        for name, values in columns.items():
            if name in self._starts:
                self._starts[name].append(self._starts[name][-1] + len(values))
            little = self._dtype if name in self._starts else values.dtype.newbyteorder("<")
            self._files[name].write(values.astype(little).tobytes())
        self._documents, self._bytes = self._documents + 1, self._bytes + len(document)
        self._content.update(document.content())

    def finish(self) -> dict[str, Any]:
        """Gives the files their names; returns what store.json says about the shard."""
        for name, starts in self._starts.items():
            self._files[f"{name}.starts"].write(np.array(starts, "<u8").tobytes())
        return {
            "part": self._part,
            "name": self._name,
            "documents": self._documents,
            "bytes": self._bytes,
            "tokens": self.num_tokens,
            "content": self._content.hexdigest(),
            "files": {f"{self._name}.{name}": file.finish() for name, file in self._files.items()},
        }


class _HashedFile:
    """A file that is complete or absent under its name, with its SHA-256."""

    def __init__(self, path: Path):
        self._path, self._temporary = path, path.with_name(path.name + ".tmp")
        self._file: BinaryIO = self._temporary.open("wb")
        self._digest, self._size = hashlib.sha256(), 0

    def write(self, content: bytes) -> None:
        self._file.write(content)
        self._digest.update(content)
        self._size += len(content)

    def finish(self) -> dict[str, Any]:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._temporary.replace(self._path)
        return {"bytes": self._size, "sha256": self._digest.hexdigest()}

    def close(self) -> None:
        self._file.close()
        self._temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    import filelock  # an optional dependency, which reading a store does not need

    try:
        with filelock.FileLock(out / _LOCK, timeout=0):
            yield
    except filelock.Timeout as error:
        raise InputError(f"{out} is being written by another process. Wait for it, or stop it.") from error


@contextlib.contextmanager
def _named(out: Path) -> Iterator[None]:
    """Gives errors of the disk that name no file, such as a full one, the name of the store."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(out)) from error
