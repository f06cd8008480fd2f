"""The tokenizer.json of a published checkpoint, and the errors of the library that reads it, in our words."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from attnax.errors import InputError, install_command
from attnax.pretrained.errors import CheckpointError

if TYPE_CHECKING:
    import tokenizers

__all__ = ["load_tokenizer", "refusals_as"]


def load_tokenizer(path: Path) -> tokenizers.Tokenizer | None:
    """The tokenizer in a file, or None if the file does not exist.

    Raises:
        CheckpointError: the file is no tokenizer, or the tokenizers library is not installed.
    """
    if not path.exists():
        return None
    if not path.is_file():
        raise CheckpointError(path, "it is no file.")
    try:
        import tokenizers  # an optional dependency
    except ModuleNotFoundError as error:
        raise CheckpointError(
            path, f"reading it needs the package tokenizers. Install it with: {install_command('pretrained')}"
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
    """Raises `make(reason)` in place of an error of the tokenizers library; other errors pass.

    The library raises `Exception` itself. A file that its code does not expect makes Rust panic: Rust reports that on
    standard error and raises a PanicException, which is no `Exception` and cannot be imported.
    """
    try:
        yield
    except BaseException as error:
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        raise make(str(error)) from error
