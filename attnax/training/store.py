"""A store: the tokens of a corpus in files with checksums, read through memory maps.

store.json        what the store holds, and the SHA-256 of every other file; written last
tokenizer.json    in the format of the `tokenizers` library
train-00000.tokens, train-00000.tokens.starts, ...
                  a shard: the tokens of some documents in a row, uint16 or uint32, and the places where the documents
                  start and the last one ends, uint64; a store of pairs has the columns source and target
train-00000.label of labelled texts: the number of each label in `classes`, int32
train-00000.names the names of the documents, a line of JSON each
progress.jsonl    of a store that is being written: the line of what it will hold, and a line for each finished shard
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import numpy as np

from attnax.errors import InputError
from attnax.text.published_tokenizer import TextTokenizer, open_tokenizer
from attnax.text.tokenizer import SpecialTokens
from attnax.training.corpus import Part
from attnax.training.store_format import FORMAT, STORE, is_store
from attnax.training.text_files import Kind

__all__ = ["COLUMNS", "Store", "StoredTexts", "StoredTokens", "digest_of", "open_store", "require_files", "sha256_of"]

COLUMNS: dict[Kind, tuple[str, ...]] = {"text": ("tokens",), "labels": ("tokens",), "pairs": ("source", "target")}
"""The columns of tokens, by what the documents are for."""


@dataclasses.dataclass(frozen=True)
class Store:
    """A complete store. `tokens` serves a `TokenStream`, `texts` and `labels` serve rows.

    Attributes:
        path: of the folder.
        facts: the content of store.json.
    """

    path: Path
    facts: dict[str, Any]

    @property
    def kind(self) -> Kind:
        """What the documents are for: "text", "labels" or "pairs"."""
        return cast("Kind", self.facts["kind"])

    @property
    def classes(self) -> tuple[str | int, ...]:
        """The labels; `labels` has their numbers."""
        return tuple(self.facts["classes"])

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the source, the tokenizer and all tokens."""
        return str(self.facts["sha256"])

    @functools.cached_property
    def tokenizer(self) -> TextTokenizer:
        """The tokenizer that made the tokens."""
        return open_tokenizer(self.path / "tokenizer.json", SpecialTokens(**self.facts["tokenizer"]["special"]))

    def num_documents(self, part: Part = "train") -> int:
        """Number of documents of a part."""
        return sum(shard["documents"] for shard in self._shards(part))

    def num_bytes(self, part: Part = "train") -> int:
        """Bytes of the texts of a part."""
        return sum(shard["bytes"] for shard in self._shards(part))

    def num_tokens(self, part: Part = "train") -> int:
        """Number of tokens of a part, in all columns."""
        return sum(shard["tokens"] for shard in self._shards(part))

    def tokens(self, part: Part = "train") -> StoredTokens:
        """All tokens of a part in a row.

        Raises:
            InputError: the documents are pairs or labelled texts, which are read as rows.
        """
        self.require_kind("text")
        return StoredTokens([self._map(shard, "tokens", self.facts["dtype"]) for shard in self._shards(part)])

    def texts(self, column: str = "tokens", part: Part = "train") -> StoredTexts:
        """The tokens of each document of a part; `column` is "tokens", or the "source" or "target" of pairs."""
        shards = self._shards(part)
        return StoredTexts(
            [self._map(shard, column, self.facts["dtype"]) for shard in shards],
            [self._map(shard, f"{column}.starts", "uint64") for shard in shards],
        )

    def labels(self, part: Part = "train") -> np.ndarray:
        """The numbers of the labels of a part, int32 (documents,)."""
        self.require_kind("labels")
        found = [self._map(shard, "label", "int32") for shard in self._shards(part)]
        return np.concatenate(found) if found else np.zeros(0, np.int32)

    def name(self, document: int, part: Part = "train") -> str:
        """The name of a document of a part."""
        for shard in self._shards(part):
            if document < shard["documents"]:
                lines = (self.path / f"{shard['name']}.names").read_bytes().splitlines()
                return str(json.loads(lines[document]))
            document -= shard["documents"]
        raise IndexError(f"Store: the {part} part must have the document; got {self.num_documents(part)} of them.")

    def require_kind(self, kind: Kind) -> None:
        """Raises InputError for documents of another kind."""
        if self.kind != kind:
            raise InputError(f"{self.path} must be a store of {kind}; got one of {self.kind}.")

    def require_tokenizer(self, tokenizer: TextTokenizer, whose: str = "the run") -> None:
        """Raises InputError unless the tokens were made by this tokenizer, which is `whose`."""
        found = hashlib.sha256(tokenizer.to_json().encode()).hexdigest()
        wanted = self.facts["tokenizer"]["sha256"]
        if found != wanted:
            raise InputError(
                f"{self.path} must have the tokenizer of {whose}; got tokens of another one (SHA-256 {wanted[:12]} and "
                f"not {found[:12]}). Make a store with --tokenizer and the tokenizer.json of {whose}."
            )

    def _shards(self, part: Part) -> list[dict[str, Any]]:
        return [shard for shard in self.facts["shards"] if shard["part"] == part]

    def _map(self, shard: dict[str, Any], column: str, dtype: str) -> np.ndarray:
        path = self.path / f"{shard['name']}.{column}"
        little = np.dtype(dtype).newbyteorder("<")
        return np.memmap(path, little, "r") if path.stat().st_size else np.zeros(0, little)


class StoredTokens:
    """The tokens of several files in a row; a slice is read from the files that hold it."""

    def __init__(self, files: Sequence[np.ndarray]):
        self._files = files
        self._ends = list(itertools.accumulate(map(len, files)))

    def __len__(self) -> int:
        """Number of tokens."""
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, where: slice) -> np.ndarray:
        start, stop, step = where.indices(len(self))
        pieces, index = [], bisect.bisect_right(self._ends, start)
        while start < stop and index < len(self._files):
            begin = self._ends[index] - len(self._files[index])
            pieces.append(self._files[index][start - begin : stop - begin])
            start, index = self._ends[index], index + 1
        whole = pieces[0] if len(pieces) == 1 else np.concatenate(pieces) if pieces else np.zeros(0, np.uint16)
        return np.asarray(whole[::step])


class StoredTexts:
    """The tokens of each document, by its number."""

    def __init__(self, tokens: Sequence[np.ndarray], starts: Sequence[np.ndarray]):
        self._tokens, self._starts = tokens, starts
        self._ends = list(itertools.accumulate(len(each) - 1 for each in starts))

    def __len__(self) -> int:
        """Number of documents."""
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> np.ndarray:
        shard = bisect.bisect_right(self._ends, index)
        if index < 0 or shard == len(self._ends):
            raise IndexError(f"StoredTexts: index must be at least 0 and below {len(self)}; got index={index}.")
        starts = self._starts[shard]
        place = index - (self._ends[shard] - (len(starts) - 1))
        return np.asarray(self._tokens[shard][int(starts[place]) : int(starts[place + 1])])

    def lengths(self) -> np.ndarray:
        """Number of tokens of each document, int64 (documents,)."""
        return np.concatenate([np.diff(each.astype(np.int64)) for each in self._starts] or [np.zeros(0, np.int64)])


def open_store(path: str | Path, *, verify: bool = True) -> Store:
    """A store that `attnax tokenize` wrote.

    Args:
        path: of its folder.
        verify: compare the SHA-256 of every shard, which reads all of them once; otherwise their sizes alone.

    Raises:
        InputError: there is no store, or it is incomplete or of another version, or a file is missing or was changed.
    """
    path = Path(path)
    if not (path / STORE).is_file():
        if is_store(path):
            raise InputError(
                f"{path} is an incomplete store: it has no {STORE}, since its process was stopped or a copy of it was. "
                "Repeat its attnax tokenize, which keeps finished shards, or copy it again."
            )
        raise InputError(f"{path} is not a store: it has no {STORE}. attnax tokenize makes one.")
    try:
        facts = json.loads((path / STORE).read_bytes())
    except ValueError as error:
        raise InputError(f"{path / STORE} is damaged: {error}.") from error
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        found = facts.get("format") if isinstance(facts, dict) else None
        raise InputError(f"{path / STORE} must have the format {FORMAT!r}; got {found!r}. Make the store again.")
    if facts.get("sha256") != digest_of(facts):
        raise InputError(f"{path / STORE} was changed after it was written. Make the store again.")
    require_files(path, facts["shards"], verify=verify)
    if sha256_of(path / "tokenizer.json") != facts["tokenizer"]["sha256"]:
        raise InputError(f"{path / 'tokenizer.json'} is not the tokenizer of the store. Make the store again.")
    return Store(path, facts)


def require_files(path: Path, shards: Iterable[dict[str, Any]], *, verify: bool) -> None:
    """Raises InputError for a file of a shard that is missing or was changed."""
    files = [(path / name, known) for shard in shards for name, known in shard["files"].items()]

    def problem(file: Path, known: dict[str, Any]) -> str | None:
        if not file.is_file():
            return "is missing"
        size = file.stat().st_size
        if size != known["bytes"]:
            return f"was changed: it has {size:,} bytes instead of {known['bytes']:,}"
        return "was changed: its SHA-256 differs" if verify and sha256_of(file) != known["sha256"] else None

    with ThreadPoolExecutor(8) as threads:  # hashing releases the interpreter
        for (file, _), found in zip(files, threads.map(lambda each: problem(*each), files), strict=True):
            if found is not None:
                raise InputError(f"{file} {found}. Delete the store and make it again.")


def digest_of(facts: dict[str, Any]) -> str:
    """SHA-256 of the content of a store.json, without itself and the version that wrote it."""
    known = {key: value for key, value in facts.items() if key not in ("attnax", "sha256")}
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


def sha256_of(path: Path) -> str | None:
    """SHA-256 of a file, or None if it is missing."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
