"""The `attnax` command."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import tyro

from attnax.cli.options import Generate, Train
from attnax.typing import InputError

_HUGE_PAGES = "glibc.malloc.hugetlb=1"


def entry() -> None:
    """The console script."""
    _use_huge_pages()
    sys.exit(main(sys.argv[1:]))


def main(arguments: Sequence[str]) -> int:
    """Runs `attnax ARGUMENTS`; returns the exit code. What a person got wrong is one line on standard error, and 2."""
    try:
        options = tyro.cli(
            Annotated[Train, tyro.conf.subcommand("train")] | Annotated[Generate, tyro.conf.subcommand("generate")],
            prog="attnax",
            description="Train a transformer language model on text, and write with it.",
            args=list(arguments),
            config=(tyro.conf.OmitArgPrefixes,),
        )
    except ValueError as error:  # the options' own checks
        return _refuse(error)
    try:
        if isinstance(options, Train):
            from attnax.cli.train import train

            return train(options)
        from attnax.cli.generate import generate

        return generate(options)
    except InputError as error:
        return _refuse(error)
    except KeyboardInterrupt:
        return 130


def _refuse(error: ValueError) -> int:
    print(f"attnax: {error}", file=sys.stderr)
    return 2


def _use_huge_pages() -> None:
    """Starts the program again with huge pages for malloc, where glibc has that option.

    XLA's CPU backend maps its working memory anew in every step; with pages of 4 KiB the page faults take about a
    quarter of a training step (`benchmarks/train.py --pages small` shows it). glibc reads the option at start only.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if sys.platform != "linux" or "glibc.malloc.hugetlb" in tunables:
        return
    os.environ["GLIBC_TUNABLES"] = f"{tunables}:{_HUGE_PAGES}".lstrip(":")
    os.execv(sys.executable, [sys.executable, "-m", "attnax", *sys.argv[1:]])
