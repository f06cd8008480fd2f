"""The text of a training run: its files, the held-out part, and batches of tokens."""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import sysconfig
from collections.abc import Iterable, Iterator
from itertools import takewhile
from pathlib import Path

import numpy as np

from attnax.errors import InputError
from attnax.training.run_format import is_run_folder

__all__ = ["HELD_OUT", "Corpus", "Document", "TokenStream", "read_corpus"]

HELD_OUT = 0.02  # fraction of the documents


@dataclasses.dataclass(frozen=True)
class Document:
    """A file, or a piece of the only file."""

    name: str
    text: bytes


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Documents in the order of their names, split by a hash of the name.

    Attributes:
        train: documents for the model and the tokenizer to learn from.
        held_out: documents that neither the model nor the tokenizer sees.
        skipped: number of binary files, which are left out.
    """

    train: tuple[Document, ...]
    held_out: tuple[Document, ...]
    skipped: int

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all names and texts and of the split."""
        digest = hashlib.sha256()
        for part in (self.train, self.held_out):
            for document in part:
                for field in (document.name.encode("utf-8", "surrogateescape"), document.text):
                    digest.update(len(field).to_bytes(8, "big") + field)
            digest.update(b"end of part")
        return digest.hexdigest()


def read_corpus(data: str | None = None, *, held_out: float = HELD_OUT) -> Corpus:
    """Reads the files that `data` names and splits them.

    A file is held out if the SHA-256 of its name, read as a fraction, is below `held_out`, so that the split does not
    depend on the order, the machine or the other files. If one side would be empty, the document with the lowest hash
    is held out. A single file is cut into about fifty pieces of whole lines, which are split the same way.

    Args:
        data: a file, a folder (all its files except for hidden ones) or a glob; files in run folders do not count. None
            is the source of the running interpreter's standard library.
        held_out: the fraction of documents to hold out.

    Raises:
        InputError: no file, or a file that cannot be read, a run folder, or too little text to split.
    """
    root, paths = _find(data)
    documents, skipped = [], 0
    for path in paths:
        try:
            text = path.read_bytes()
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror}.") from error
        if not text:
            continue
        if b"\0" in text:  # the mark of a binary file for text editors and git
            skipped += 1
            continue
        documents.append(Document(path.relative_to(root).as_posix(), text))
    if not documents:
        raise InputError(f"{data} holds no text: {len(paths)} files, all of them empty or binary.")
    if len(documents) == 1:
        documents = list(_cut(documents[0]))
    if len(documents) < 2:
        raise InputError(
            f"{data} is too small: {len(documents[0].text)} bytes cannot be split into training and held-out text."
        )
    fraction = {document.name: _hash_fraction(document.name) for document in documents}
    held_names = {name for name, value in fraction.items() if value < held_out}
    if not held_names or len(held_names) == len(documents):
        held_names = {min(fraction, key=lambda name: fraction[name])}
    return Corpus(
        train=tuple(document for document in documents if document.name not in held_names),
        held_out=tuple(document for document in documents if document.name in held_names),
        skipped=skipped,
    )


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
        found = (p for p in path.rglob("*") if not any(part.startswith(".") for part in p.relative_to(path).parts))
    elif any(character in data for character in "*?["):
        # Names are relative to the folder before the pattern, so that they do not depend on the machine.
        fixed = takewhile(lambda part: not any(character in part for character in "*?["), path.parts)
        root, found = Path(*fixed), map(Path, glob.glob(data, recursive=True))
    else:
        raise InputError(f"no such file or folder: {data}.")
    paths = sorted(path for path in found if path.is_file())
    runs = {folder for folder in {path.parent for path in paths} if _is_within_run(folder, root)}
    paths = [path for path in paths if path.parent not in runs]
    if not paths:
        raise InputError(f"no files in {root if data is None else data}.")
    return root, paths


def _is_within_run(folder: Path, root: Path) -> bool:
    """Whether a folder under `root` is a run folder or inside a run folder."""
    between = [folder, *folder.parents] if root in folder.parents else []
    return any(map(is_run_folder, between[: between.index(root)] if between else []))


def _hash_fraction(name: str) -> float:
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8], "big") / 2**64


def _cut(document: Document, pieces: int = 50) -> Iterator[Document]:
    """About fifty pieces of whole lines, or of bytes where the lines are too few."""
    size, text = -(-len(document.text) // pieces), document.text
    parts = text.splitlines(keepends=True)
    if len(parts) < pieces:
        parts = [text[start : start + size] for start in range(0, len(text), size)]
    piece, count = b"", 0
    for number, part in enumerate(parts, start=1):
        piece += part
        if len(piece) >= size or number == len(parts):
            yield Document(f"{document.name}#{count:02d}", piece)
            piece, count = b"", count + 1


@dataclasses.dataclass(frozen=True)
class TokenStream:
    """The tokens of all documents in a row, with the document token before each document.

    Attributes:
        tokens: (length,) of an unsigned integer type.
        window: number of tokens that a model reads at a time.
    """

    tokens: np.ndarray
    window: int

    @property
    def num_windows(self) -> int:
        """Number of windows in one pass."""
        return (len(self.tokens) - 1) // self.window

    def require_a_window(self) -> None:
        """Raises InputError if the tokens do not fill one window."""
        if self.num_windows < 1:
            raise InputError(
                f"the text is too short: its {len(self.tokens):,} tokens do not fill one window of {self.window}. "
                "Give more text or a smaller max_len."
            )

    def batch(self, index: int, batch_size: int, seed: int) -> np.ndarray:
        """Batch number `index` of an endless shuffle, int32 (batch_size, window + 1): the input and the token after it.

        Every pass visits all windows once, in an order of its own. The batch is a pure function of the arguments, so
        that a resumed run continues with the same data.

        Raises:
            InputError: the tokens do not fill one window.
        """
        self.require_a_window()
        epochs, places = np.divmod(np.arange(index * batch_size, (index + 1) * batch_size), self.num_windows)
        order = {epoch: np.random.default_rng([seed, epoch]).permutation(self.num_windows) for epoch in set(epochs)}
        windows = np.array([order[epoch][place] for epoch, place in zip(epochs, places, strict=True)])
        return self.tokens[windows[:, None] * self.window + np.arange(self.window + 1)].astype(np.int32)

    def scoring_windows(self, stride: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Windows that score every token except the first once, with at least window - stride tokens of context.

        Yields:
            tokens, int32 (window + 1,), and the predictions that count, bool (window,). Only the first window scores
            tokens with less context.
        """
        scored = 1
        while scored < len(self.tokens):
            end = min(len(self.tokens), scored + (self.window if scored == 1 else stride))
            start = max(0, end - self.window - 1)
            tokens = np.zeros(self.window + 1, np.int32)
            tokens[: end - start] = self.tokens[start:end]
            counts = np.zeros(self.window, bool)
            counts[scored - start - 1 : end - start - 1] = True
            yield tokens, counts
            scored = end
