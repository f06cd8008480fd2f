"""Documents in files: text, rows of JSON (JSONL) and rows of parquet, read one after the other."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from attnax.errors import InputError

__all__ = ["FIELDS", "LONGEST", "Document", "Kind", "fields_of", "has_rows", "kind_of", "read_documents"]

Kind = Literal["text", "labels", "pairs"]
FIELDS: dict[Kind, tuple[str, ...]] = {"text": ("text",), "labels": ("text", "label"), "pairs": ("source", "target")}
"""The fields of a row, by what the row is for."""

LONGEST = 2 << 20  # bytes of a document; a longer file of text is several documents, so that memory stays bounded


@dataclasses.dataclass(frozen=True)
class Document:
    """A text with its name: a file, a piece of a long file, or a row of a file of rows.

    Attributes:
        name: path of the file from the folder of all, and behind a "#" the piece or the row.
        text: in the file's encoding; in UTF-8 for a row. The source of a pair.
        label: of a labelled text: a string or a whole number.
        target: of a pair, in UTF-8.
    """

    name: str
    text: bytes
    label: str | int | None = None
    target: bytes | None = None

    def __len__(self) -> int:
        """Number of bytes."""
        return len(self.text) + len(self.target or b"")

    def content(self) -> bytes:
        """Name and content in a row, for a digest; no two documents have the same."""
        label = b"" if self.label is None else repr(self.label).encode("utf-8", "surrogatepass")
        fields = self.name.encode("utf-8", "surrogateescape"), self.text, label, self.target or b""
        return b"".join(len(field).to_bytes(8, "big") + field for field in fields)


def has_rows(path: Path) -> bool:
    """Whether the documents of a file are its rows: of JSONL or parquet."""
    return path.suffix in _ROWS


def kind_of(path: Path) -> Kind:
    """What the rows of a file are for, by the fields of the first one; text for a file without rows.

    Raises:
        InputError: the fields are those of no kind.
    """
    fields = fields_of(path)
    if fields is None:
        return "text"
    for kind in ("pairs", "labels", "text"):
        if fields >= set(FIELDS[kind]):
            return kind
    raise InputError(
        f"{path} must have rows with the field text, or text and label, or source and target; got the fields "
        f"{', '.join(sorted(fields)) or 'of an empty row'}. Leave the file out, or rename its fields."
    )


def fields_of(path: Path) -> set[str] | None:
    """The names of the fields of the first row; None for a file without rows.

    Raises:
        InputError: the file cannot be read.
    """
    first = next(_rows_of(path), None) if has_rows(path) else None
    return None if first is None else set(map(str, first[1]))


def read_documents(path: Path, name: str, kind: Kind, longest: int = LONGEST) -> Iterator[Document]:
    """The documents of a file, in their order.

    Args:
        path: of the file. The suffixes .jsonl and .parquet mean rows.
        name: of the file.
        kind: what rows are for; fields of other kinds are left out.
        longest: bytes; a longer file of text is cut into documents of whole lines. A longer line is cut.

    Raises:
        InputError: the file cannot be read, or a row lacks a field.
    """
    if has_rows(path):
        for number, row in _rows_of(path):
            document = _of_row(path, f"{name}#{number}", number, row, kind)
            if document is not None:
                yield document
    else:
        with _refused(path):
            yield from _read_text(path, name, longest)


@contextlib.contextmanager
def _refused(path: Path) -> Iterator[None]:
    """Gives an error of the disk the name of the file."""
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}.") from error


def _rows_of(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    with _refused(path):
        yield from _ROWS[path.suffix](path)


def _read_text(path: Path, name: str, longest: int) -> Iterator[Document]:
    with path.open("rb") as file:
        text = file.read(longest + 1)
        if len(text) <= longest:
            if text:
                yield Document(name, text)
            return
        file.seek(0)
        count, lines, size = 0, list[bytes](), 0
        while line := file.readline(longest):
            cut = 0 if line.endswith(b"\n") else _begun_character(line)
            if 0 < cut < len(line):  # the character goes to the next piece
                file.seek(-cut, 1)
                line = line[:-cut]
            lines.append(line)
            size += len(line)
            if size >= longest or not line.endswith(b"\n"):
                yield Document(f"{name}#{count:02d}", b"".join(lines))
                count, lines, size = count + 1, [], 0
        if lines:
            yield Document(f"{name}#{count:02d}", b"".join(lines))


def _begun_character(text: bytes) -> int:
    """The bytes at the end of a text that begin a character of UTF-8 and do not end it."""
    for back in range(1, min(4, len(text)) + 1):
        byte = text[-back]
        if byte >= 0xC0:
            size = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return back if back < size else 0
        if byte < 0x80:
            return 0
    return 0


def _read_jsonl(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8"))
            except (ValueError, RecursionError) as error:
                raise InputError(f"{path}: line {number} must be an object of JSON; {error}.") from error
            if not isinstance(row, dict):
                raise InputError(f"{path}: line {number} must be an object of JSON; got a {type(row).__name__}.")
            yield number, row


def _read_parquet(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    import pyarrow  # an optional dependency
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            wanted = {field for fields in FIELDS.values() for field in fields}
            columns = [column for column in file.schema_arrow.names if column in wanted]
            for batch in file.iter_batches(batch_size=256, columns=columns or None):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except pyarrow.ArrowInvalid as error:
        raise InputError(f"{path} is no parquet file that can be read: {error}.") from error


_ROWS: dict[str, Callable[[Path], Iterator[tuple[int, Mapping[str, Any]]]]] = {
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}


def _of_row(path: Path, name: str, number: int, row: Mapping[str, Any], kind: Kind) -> Document | None:
    """The document of a row; None for a row of text alone that is empty."""
    texts = [_text_of(path, number, row, field) for field in FIELDS[kind] if field != "label"]
    if kind == "text":
        return Document(name, texts[0]) if texts[0] else None
    if not all(texts):
        raise InputError(f"{path}: row {number} must have no empty text; got one. Leave the row out.")
    if kind == "pairs":
        return Document(name, texts[0], target=texts[1])
    label = row.get("label")
    if type(label) not in (str, int):
        raise InputError(
            f"{path}: row {number} must have a label, a string or a whole number; got {str(label)[:80]!r}."
        )
    return Document(name, texts[0], label=label)


def _text_of(path: Path, number: int, row: Mapping[str, Any], field: str) -> bytes:
    text = row.get(field)
    if not isinstance(text, str):
        got = "none" if field not in row else f"a {type(text).__name__}"
        raise InputError(f"{path}: row {number} must have a string {field}; got {got}.")
    return text.encode("utf-8", "surrogatepass")
