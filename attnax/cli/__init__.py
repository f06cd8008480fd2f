"""The `attnax` command."""

from __future__ import annotations

import contextlib
import io
import os
import re
import signal
import sys
from collections.abc import Sequence
from typing import Annotated

from attnax.cli.terminal import printable
from attnax.pretrained.errors import CheckpointError
from attnax.typing import InputError

try:
    import tyro

    from attnax.cli.options import Bench, Generate, Inspect, Train
except ModuleNotFoundError as error:
    sys.exit(f"attnax: the command needs {error.name}. Install it with: pip install 'attnax[train]'")


def entry() -> None:
    """The console script."""
    _use_huge_pages()
    sys.exit(main(sys.argv[1:]))


def main(arguments: Sequence[str]) -> int:
    """Runs `attnax ARGUMENTS`; returns the exit code. What a person got wrong is a line on standard error, and 2.

    Of a published checkpoint everything that is wrong gets a line.
    """
    try:
        options = _parse(arguments)
        options.check()
        if isinstance(options, Train):
            from attnax.cli.train import train  # after parsing, so that --help does not wait for JAX

            return train(options)
        if isinstance(options, Bench):
            from attnax.cli.bench import bench

            return bench(options)
        if isinstance(options, Inspect):
            from attnax.cli.inspect import inspect

            return inspect(options)
        from attnax.cli.generate import generate

        return generate(options)
    except CheckpointError as error:
        problems = error.problems if len(error.problems) == 1 else (f"{len(error.problems)} problems.", *error.problems)
        return _refuse(f"{error.where}: {problems[0]}", *problems[1:])
    except InputError as error:
        return _refuse(str(error))
    except BrokenPipeError:  # the reader went away, as `head` does: nothing more can be said
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 128 + signal.SIGPIPE
    except OSError as error:
        return _refuse(f"{error.filename or 'a file'}: {error.strerror or error}.")
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _refuse(*lines: str) -> int:
    """Says what is wrong, in a line each; returns the exit code."""
    print("attnax: " + "\n  ".join(map(printable, lines)), file=sys.stderr)
    return 2


def _parse(arguments: Sequence[str]) -> Train | Generate | Inspect | Bench:
    """The options; what tyro has to say against them in a box of several lines is said in one."""
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(
                Annotated[Train, tyro.conf.subcommand("train")]
                | Annotated[Generate, tyro.conf.subcommand("generate")]
                | Annotated[Inspect, tyro.conf.subcommand("inspect")]
                | Annotated[Bench, tyro.conf.subcommand("bench")],
                prog="attnax",
                description="Train a language model on text, write with it or a published one, and time attention.",
                args=list(arguments),
                config=(tyro.conf.OmitArgPrefixes, tyro.conf.AvoidSubcommands),
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        plain = re.sub(r"\x1b\[[0-9;]*m", "", box.getvalue())  # without the colours of a terminal
        lines = [line.strip("│ ") for line in plain.splitlines()]
        # A title, a rule, what is wrong, a rule, advice; the title is part of the first rule in UTF-8.
        is_rule = [line.startswith("╭") or (line != "" and not line.strip("─-╰╯")) for line in lines]
        rules = [index for index, rule in enumerate(is_rule) if rule]
        message = " ".join(lines[rules[0] + 1 : rules[1]])
        message = re.sub(
            r"^Error parsing \S*(Train|Generate|Inspect|Bench|inner__\S*): ", "", message
        )  # tyro's name, not a flag
        raise InputError(f"{message.rstrip('.')}. See attnax --help.") from None
    except ValueError as error:  # a configuration that refuses its values
        raise InputError(str(error)) from error


def _use_huge_pages() -> None:
    """Starts the program again with huge pages for malloc, where glibc has that option.

    XLA's CPU backend maps its working memory anew in every step, and pages of 4 KiB cost it a fault each: alone on two
    cores, four steps of the benchmark's model took 4.2 s instead of 4.8 (`yes | head -3 | python benchmarks/train.py
    --side attnax`, with and without the variable). glibc reads the option at start only.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if sys.platform != "linux" or "glibc.malloc.hugetlb" in tunables:
        return
    os.environ["GLIBC_TUNABLES"] = f"{tunables}:glibc.malloc.hugetlb=1".lstrip(":")
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
