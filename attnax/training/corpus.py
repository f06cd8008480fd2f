"""The text of a training: its files, and the part that is held out. Texts are read when needed, never all at once."""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from itertools import islice, takewhile
from pathlib import Path
from typing import Literal

from attnax.errors import InputError
from attnax.training.run_format import is_run_folder
from attnax.training.store_format import is_store
from attnax.training.text_files import LONGEST, Document, Kind, fields_of, has_rows, kind_of, read_documents

__all__ = ["HELD_OUT", "PARTS", "Corpus", "Documents", "Part", "look_at", "read_corpus"]

HELD_OUT = 0.02  # fraction of the documents
Part = Literal["train", "held_out"]
PARTS: tuple[Part, ...] = ("train", "held_out")


@dataclasses.dataclass(frozen=True)
class _Split:
    """Which documents are held out: those whose hash is below a fraction, or a single one.

    Attributes:
        fraction: of the documents.
        only: the name of the only document that is held out, where the fraction would leave one part empty.
    """

    fraction: float
    only: str | None = None

    def holds_out(self, name: str) -> bool:
        return _hash_fraction(name) < self.fraction if self.only is None else name == self.only


@dataclasses.dataclass(frozen=True)
class _File:
    """A file of documents, as it was when the corpus was read.

    Attributes:
        path: of the file.
        name: path from the folder of all.
        longest: bytes of a document, if the file holds text.
        documents: number of documents, and how many of them are held out.
        sha256: of names and texts.
    """

    path: Path
    name: str
    longest: int
    documents: int
    held_out: int
    sha256: str

    def count(self, part: Part) -> int:
        return self.held_out if part == "held_out" else self.documents - self.held_out


@dataclasses.dataclass(frozen=True)
class Documents:
    """The documents of one part of a corpus, in the order of their names; each pass reads their files again.

    Attributes:
        num_bytes: of all texts.
    """

    num_bytes: int
    _files: tuple[_File, ...]
    _part: Part
    _kind: Kind
    _split: _Split

    def __len__(self) -> int:
        return sum(file.count(self._part) for file in self._files)

    def __iter__(self) -> Iterator[Document]:
        return self.since(0)

    def since(self, first: int) -> Iterator[Document]:
        """The documents from number `first` on; files before it are not read.

        Raises:
            InputError: a file has changed since the corpus was read.
        """
        for file in self._files:
            count = file.count(self._part)
            if first < count:
                yield from islice(self._read(file), first, None)
            first = max(0, first - count)

    def sample(self, max_bytes: int = 12_000_000) -> Iterator[bytes]:
        """Texts of about `max_bytes` in all, evenly thinned: enough for a tokenizer to learn from.

        A pair gives its source and its target.
        """
        step = max(1, self.num_bytes // max_bytes)
        for document in self._every(step):
            yield document.text
            if document.target is not None:
                yield document.target

    def _every(self, step: int) -> Iterator[Document]:
        before = 0
        for file in self._files:
            count, first = file.count(self._part), -before % step
            if first < count:
                yield from islice(self._read(file), first, None, step)
            before += count

    def _read(self, file: _File) -> Iterator[Document]:
        digest = hashlib.sha256()
        for document in read_documents(file.path, file.name, self._kind, file.longest):
            digest.update(document.content())
            if self._split.holds_out(document.name) == (self._part == "held_out"):
                yield document
        if digest.hexdigest() != file.sha256:
            raise InputError(f"{file.path} was changed while it was read. Start again.")


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Documents in the order of their names, split by a hash of the name.

    Attributes:
        train: documents for the model and the tokenizer to learn from.
        held_out: documents that neither the model nor the tokenizer sees.
        skipped: number of binary files, which are left out.
        kind: what the documents are for: "text", "labels" (a text with a label) or "pairs" (a source and a target).
        classes: the labels of all documents, sorted.
        fingerprint: SHA-256 of all names and texts and of the split.
    """

    train: Documents
    held_out: Documents
    skipped: int
    kind: Kind
    classes: tuple[str | int, ...]
    fingerprint: str

    @property
    def num_bytes(self) -> int:
        """Bytes of all texts."""
        return self.train.num_bytes + self.held_out.num_bytes

    def part(self, name: Part) -> Documents:
        """The documents of a part."""
        return self.held_out if name == "held_out" else self.train


def read_corpus(
    data: str | None = None,
    *,
    held_out: float = HELD_OUT,
    kind: Kind | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> Corpus:
    """Finds the documents that `data` names and splits them; the files are read once, and their texts are not kept.

    A document is held out if the SHA-256 of its name, read as a fraction, is below `held_out`, so that the split does
    not depend on the order, the machine or the other documents. If one side would be empty, the document with the
    lowest hash is held out. A single file of text is cut into about fifty pieces of whole lines, which are split the
    same way; of several files, each is a document, and one of more than 2 MiB is several of whole lines.

    Args:
        data: a file, a folder (all its files except for hidden ones) or a glob; files in run folders and in stores do
            not count. None is the source of the running interpreter's standard library. Each row of a file .jsonl or
            .parquet is a document.
        held_out: the fraction of documents to hold out.
        kind: what rows are for; by default the fields of the first row say so.
        on_progress: called with the number of bytes of the texts that were read since its last call.

    Raises:
        InputError: no file, or a file that cannot be read, a run folder, a row without its fields, or too little text
            to split.
    """
    root, paths = _find(data)
    kind = kind or _common_kind(paths)
    scan = _Scan(kind, held_out, on_progress or (lambda _: None))
    for path in paths:
        scan.add(path, path.relative_to(root).as_posix(), LONGEST)
    if not scan.files:
        raise _without_text(data, paths)
    if len(scan.files) == 1 and scan.documents == 1 and not has_rows(scan.files[0].path):
        path, name, skipped = scan.files[0].path, scan.files[0].name, scan.skipped
        scan = _Scan(kind, held_out, scan.say, skipped)
        scan.add(path, name, min(LONGEST, max(1, -(-path.stat().st_size // 50))))
    if scan.documents < 2:
        raise InputError(
            f"{data} is too small: {scan.num_bytes} bytes cannot be split into training and held-out text."
        )
    return scan.corpus()


def look_at(data: str | None) -> tuple[Path, int]:
    """The first file with text that `read_corpus` would read, and the bytes of all of its files.

    Of each file at most the beginning is read, and of those behind the first with text nothing.

    Raises:
        InputError: as `read_corpus` does: there is no file, or none with text, or it is a run folder or a store.
    """
    _, paths = _find(data)
    first = next((path for path in paths if _begins_with_text(path)), None)
    if first is None:
        raise _without_text(data, paths)
    return first, sum(path.stat().st_size for path in paths)


def _begins_with_text(path: Path) -> bool:
    if has_rows(path):
        return fields_of(path) is not None
    document = next(read_documents(path, path.name, "text"), None)
    return document is not None and not _is_binary(path, document)


def _is_binary(path: Path, document: Document) -> bool:
    return b"\0" in document.text and not has_rows(path)  # the mark of a binary file for text editors and git


def _without_text(data: str | None, paths: list[Path]) -> InputError:
    return InputError(f"{data} holds no text: {len(paths)} files, all of them empty or binary.")


class _Scan:
    """The first reading of all files: counts, digests and labels."""

    def __init__(self, kind: Kind, held_out: float, say: Callable[[int], None], skipped: int = 0):
        self.kind, self.fraction, self.say, self.skipped = kind, held_out, say, skipped
        self.files: list[_File] = []
        self.num_bytes = self.held_bytes = 0
        self.classes: set[str | int] = set()
        self.lowest: tuple[float, str, int, int] | None = None  # hash, name, number of the file, bytes

    @property
    def documents(self) -> int:
        return sum(file.documents for file in self.files)

    def add(self, path: Path, name: str, longest: int) -> None:
        digest, count, held, sizes, lowest = hashlib.sha256(), 0, 0, [0, 0], self.lowest
        for document in read_documents(path, name, self.kind, longest):
            if _is_binary(path, document):
                self.skipped += 1
                return
            self.say(len(document))
            digest.update(document.content())
            fraction = _hash_fraction(document.name)
            is_held = fraction < self.fraction
            count, held = count + 1, held + is_held
            sizes[is_held] += len(document)
            here = fraction, document.name, len(self.files), len(document)
            lowest = here if lowest is None else min(lowest, here)
            if document.label is not None:
                if type(document.label) is not type(next(iter(self.classes), document.label)):
                    raise InputError(
                        f"{path}: labels must all be strings or all be whole numbers; got {document.label!r} of "
                        f"{document.name} beside others."
                    )
                self.classes.add(document.label)
        if count:
            self.files.append(_File(path, name, longest, count, held, digest.hexdigest()))
            self.num_bytes, self.held_bytes, self.lowest = (
                sum(sizes) + self.num_bytes,
                self.held_bytes + sizes[1],
                lowest,
            )

    def corpus(self) -> Corpus:
        files, split, held_bytes = self.files, _Split(self.fraction), self.held_bytes
        if sum(file.held_out for file in files) in (0, self.documents):
            assert self.lowest is not None
            _, only, number, held_bytes = self.lowest
            split = _Split(self.fraction, only)
            files = [dataclasses.replace(file, held_out=int(index == number)) for index, file in enumerate(files)]
        digest = hashlib.sha256(repr(split).encode("utf-8", "surrogateescape"))
        for file in files:
            digest.update(file.sha256.encode())
        train, held = (
            Documents(size, tuple(files), part, self.kind, split)
            for part, size in zip(PARTS, (self.num_bytes - held_bytes, held_bytes), strict=True)
        )
        classes = tuple(sorted(self.classes, key=lambda label: (str(type(label)), label)))
        return Corpus(train, held, self.skipped, self.kind, classes, digest.hexdigest())


def _common_kind(paths: list[Path]) -> Kind:
    """The kind of all files.

    Raises:
        InputError: two files have different kinds.
    """
    first: tuple[Path, Kind] | None = None
    for path in paths:
        kind = kind_of(path)
        if first is not None and kind != first[1]:
            raise InputError(
                f"all files must be of one kind; got {first[1]} in {first[0]} and {kind} in {path}. Name files of one "
                "kind, or the kind to read."
            )
        first = first or (path, kind)
    return "text" if first is None else first[1]


def _find(data: str | None) -> tuple[Path, list[Path]]:
    """The folder that names are relative to, and the files in the order of their names."""
    if data is None:
        root = Path(sysconfig.get_paths()["stdlib"])
        packages = ("site-packages", "dist-packages")
        found: Iterable[Path] = (
            path for path in root.rglob("*.py") if not any(part in packages for part in path.relative_to(root).parts)
        )
    elif not data:
        raise InputError("read_corpus: data must not be empty; None is the source of Python's standard library.")
    elif (path := Path(data)).is_file():
        root, found = path.parent, [path]
    elif path.is_dir():
        root = path
        if is_run_folder(path):
            raise InputError(f"{data} is a run folder; name the text that it was trained on.")
        if is_store(path):
            raise InputError(f"{data} is a store of tokens; name the text that it was made of.")
        found = (p for p in path.rglob("*") if not any(part.startswith(".") for part in p.relative_to(path).parts))
    elif any(character in data for character in "*?["):
        # Names are relative to the folder before the pattern, so that they do not depend on the machine.
        fixed = takewhile(lambda part: not any(character in part for character in "*?["), path.parts)
        root, found = Path(*fixed), map(Path, glob.glob(data, recursive=True))
    else:
        raise InputError(f"no such file or folder: {data}.")
    paths = sorted(path for path in found if path.is_file())
    ours = {folder for folder in {path.parent for path in paths} if _is_within_ours(folder, root)}
    paths = [path for path in paths if path.parent not in ours]
    if not paths:
        raise InputError(f"no files in {root if data is None else data}.")
    return root, paths


def _is_within_ours(folder: Path, root: Path) -> bool:
    """Whether a folder under `root` is, or is inside of, a run folder or a store."""
    between = [folder, *folder.parents] if root in folder.parents else []
    return any(is_run_folder(each) or is_store(each) for each in (between[: between.index(root)] if between else ()))


def _hash_fraction(name: str) -> float:
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8], "big") / 2**64
