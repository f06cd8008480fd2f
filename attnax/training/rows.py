"""Rows of a fixed length, one for each text or pair of a store."""

from __future__ import annotations

import numpy as np

from attnax.errors import InputError
from attnax.training.corpus import Part
from attnax.training.store import COLUMNS, Store

__all__ = ["TextRows"]


class TextRows:
    r"""The documents of a store, each in a row of its own; shorter ones are filled with the padding token.

    A row is a dict, by the kind of the store:

    - text: `tokens`, int32 (length,);
    - labels: `tokens`, and `labels`, an int32 scalar, the place of the label in `store.classes`;
    - pairs: `source`, int32 (length,), `target`, int32 (target_length + 1,), with the start and the end token, and
      `weights`, float32 (target_length,): 1 for each token of the target after the first, and 0 for padding.

    Args:
        store: of tokens.
        length: tokens of a row.
        target_length: tokens of a target that a decoder reads; by default `length`.
        part: "train" or "held_out".
        truncate: cut longer documents at their end; otherwise they are refused.

    Attributes:
        padding: the token that fills rows.

    Raises:
        InputError: a document that is longer than a row; the message names the longest.

    Example:
        >>> import pathlib, tempfile
        >>> from attnax.text import byte_tokenizer
        >>> from attnax.training import TextRows, make_store, read_corpus
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> _ = (folder / "a.jsonl").write_text('{"text": "yes", "label": 1}\n{"text": "no", "label": 0}\n')
        >>> store = make_store(read_corpus(str(folder / "a.jsonl")), byte_tokenizer(), folder / "store")
        >>> row = TextRows(store, length=5)[0]
        >>> row["tokens"].tolist(), store.classes[row["labels"]]
        ([111, 112, 0, 0, 0], 0)
    """

    def __init__(
        self,
        store: Store,
        *,
        length: int,
        target_length: int | None = None,
        part: Part = "train",
        truncate: bool = False,
    ):
        self.padding: int = store.tokenizer.special.padding
        self._kind, self._truncate = store.kind, truncate
        lengths = {"target": 1 + (length if target_length is None else target_length)}
        self._columns = {name: (store.texts(name, part), lengths.get(name, length)) for name in COLUMNS[store.kind]}
        self._labels = store.labels(part) if store.kind == "labels" else None
        self._count = store.num_documents(part)
        for name, (texts, limit) in self._columns.items():
            found = texts.lengths()
            if not truncate and found.size and found.max() > limit:
                longest = int(np.argmax(found))
                raise InputError(
                    f"TextRows: a document must fit into a row of {limit} tokens; got {found.max()} in the {name} of "
                    f"{store.name(longest, part)} ({(found > limit).sum()} of {len(texts)} do not fit). Make rows "
                    "longer, or truncate."
                )

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        row = {}
        for name, (texts, limit) in self._columns.items():
            tokens = texts[index][:limit]
            row[name] = np.full(limit, self.padding, np.int32)
            row[name][: len(tokens)] = tokens
            if name == "target":
                row["weights"] = (np.arange(1, limit) < len(tokens)).astype(np.float32)
        if self._labels is not None:
            row["labels"] = self._labels[index]
        return row
