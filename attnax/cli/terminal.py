"""Lines for a terminal, and the folder of compiled programs; the commands share them."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

__all__ = [
    "command_name",
    "compile_cache",
    "compiling",
    "keep_programs",
    "printable",
    "say_wait",
    "silence_orbax",
    "warn",
    "warnings_as_lines",
]

_MOST_BYTES = 1 << 30  # of kept programs; the least recently used are deleted first


def printable(text: str) -> str:
    """The text on one line, with characters that are not printable spelled as in Python.

    Names and values of a checkpoint come from foreign files: an escape code in a name could overwrite earlier lines, a
    line end could imitate a line of the command, and half a surrogate pair cannot be printed at all.
    """
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def say_wait(line: str) -> None:
    """Prints a line on standard error if that is a terminal, where a person waits."""
    if sys.stderr.isatty():
        print(printable(line), file=sys.stderr, flush=True)


def warn(line: str) -> None:
    """Prints a line on standard error about something unexpected."""
    print("attnax: " + printable(line), file=sys.stderr, flush=True)


def silence_orbax() -> None:
    """Drops what Orbax logs: a page for each failure, which a command says in one line."""
    logging.getLogger("absl").addFilter(_is_not_of_orbax)


def _is_not_of_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in Path(record.pathname).parts


@contextlib.contextmanager
def warnings_as_lines() -> Iterator[None]:
    """Prints the warnings of a library for its user, after the block, as `warn` does."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        try:
            yield
        finally:
            for warning in caught:
                warn(str(warning.message))


def command_name() -> str:
    """The command to type for `attnax`: its path if it is not on PATH."""
    if shutil.which("attnax"):
        return "attnax"
    script = Path(sys.executable).parent / "attnax"
    if not script.exists():
        return f"{sys.executable} -m attnax"
    here = Path.cwd()
    return str(script.relative_to(here)) if script.is_relative_to(here) else str(script)


def keep_programs(wanted: bool) -> None:
    """Makes JAX keep compiled programs in the user's cache folder, unless the user has set a folder for them.

    Args:
        wanted: if false, nothing is changed.
    """
    import jax

    if not wanted or compile_cache() is not None:
        return
    said = Path(os.environ.get("XDG_CACHE_HOME", ""))
    folder = (said if said.is_absolute() else Path.home() / ".cache") / "attnax" / "programs"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        warn(f"{folder} cannot be made ({error.strerror}), so compiled programs are not kept.")
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    jax.config.update("jax_compilation_cache_max_size", _MOST_BYTES)


def compile_cache() -> str | None:
    """The folder in which JAX keeps compiled programs, or None."""
    import jax

    folder: str | None = jax.config.values["jax_compilation_cache_dir"]
    return folder if folder and jax.config.values["jax_enable_compilation_cache"] else None


def compiling() -> str:
    """The line to print before programs are compiled; it names the folder in which they are kept."""
    kept = compile_cache()
    return "compiling" if kept is None else f"compiling  (programs are kept in {kept})"
