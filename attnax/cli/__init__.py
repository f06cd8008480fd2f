"""The `attnax` command. Its imports happen while it runs, so that Ctrl-C ends it quietly at any time."""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Sequence

__all__ = ["entry", "main"]


def entry() -> None:
    """The console script."""
    try:
        _use_huge_pages()
        code = main(sys.argv[1:])
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    distributed = sys.modules.get("attnax.distributed")
    if distributed is not None and code:
        distributed.leave(code)  # the other processes would be waited for
    sys.exit(code)


def main(arguments: Sequence[str]) -> int:
    """Runs `attnax ARGUMENTS`; returns the exit code. A user's mistake is a line on standard error and code 2."""
    _open_streams()
    from attnax.cli.command import run

    return run(arguments)


def _open_streams() -> None:
    """Makes every write succeed, even of characters that the terminal's encoding lacks or to a closed stream."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  # open until the process ends
        elif isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


def _use_huge_pages() -> None:
    """Starts the program again with huge pages for malloc, where glibc has that option.

    XLA's CPU backend maps its working memory anew in every step, and each page of 4 KiB costs a page fault: alone on
    two cores, four steps of the benchmark's model took 4.2 s instead of 4.8 (`yes | head -3 | python
    benchmarks/train.py --side attnax`, with and without the variable). glibc reads the option only at start.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if sys.platform != "linux" or "glibc.malloc.hugetlb" in tunables:
        return
    os.environ["GLIBC_TUNABLES"] = f"{tunables}:glibc.malloc.hugetlb=1".lstrip(":")
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
