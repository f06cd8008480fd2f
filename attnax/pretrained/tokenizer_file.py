"""The tokenizer.json of a published checkpoint, and what the library that reads it raises, in our words."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from attnax.errors import InputError
from attnax.pretrained.errors import CheckpointError

if TYPE_CHECKING:
    import tokenizers

__all__ = ["load_tokenizer", "refusals_as"]


def load_tokenizer(path: Path) -> tokenizers.Tokenizer | None:
    """The tokenizer in a file, or None where there is nothing of this name.

    Raises:
        CheckpointError: what is there is no tokenizer, or the tokenizers library is not installed.
    """
    if not path.exists():
        return None
    if not path.is_file():
        raise CheckpointError(path, "it is no file.")
    try:
        import tokenizers  # of the extra
    except ModuleNotFoundError as error:
        raise CheckpointError(
            path, "reading it needs the package tokenizers. Install it with: pip install 'attnax[pretrained]'"
        ) from error

    def refuse(reason: str) -> CheckpointError:
        return CheckpointError(path, f"it is no tokenizer of the tokenizers library ({reason}).")

    try:
        text = path.read_text("utf-8")  # the library opens no path that is not UTF-8
    except UnicodeDecodeError as error:
        raise refuse(str(error)) from error
    with refusals_as(refuse):
        return tokenizers.Tokenizer.from_str(text)


@contextlib.contextmanager
def refusals_as(make: Callable[[str], InputError]) -> Iterator[None]:
    """What the tokenizers library refuses inside is raised as `make(reason)`; everything else passes.

    It raises `Exception` itself. Where a file asks for what its code never expected, Rust panics: that is a
    PanicException, which is no `Exception` and cannot be imported, after a report of Rust's own on standard error.
    """
    try:
        yield
    except BaseException as error:
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        raise make(str(error)) from error
