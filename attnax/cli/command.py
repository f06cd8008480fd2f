"""Parses the arguments of `attnax`, runs the command, and turns errors into lines."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import re
import signal
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from attnax.cli.terminal import printable
from attnax.errors import InputError, install_command
from attnax.pretrained.errors import CheckpointError

if TYPE_CHECKING:
    from attnax.cli.launch import Launch
    from attnax.cli.options import Bench, Generate, Inspect, Tokenize, Train

_EXTRAS = {  # the extra that installs a package
    **dict.fromkeys(("tyro", "tokenizers", "huggingface_hub"), "pretrained"),
    **dict.fromkeys(("filelock", "grain", "matplotlib", "optax", "orbax", "tqdm"), "train"),
    "PIL": "images",
    "pyarrow": "parquet",
    "tensorboardX": "tensorboard",
}
_COMMANDS = ("train", "tokenize", "launch", "generate", "inspect", "bench")
_CHOICES = re.compile(r"no type matching (\S+) could be instantiated from \['([^']*)'\].*")  # in tyro's words


def run(arguments: Sequence[str]) -> int:
    """Runs `attnax ARGUMENTS`; returns the exit code. A user's mistake is a line on standard error and code 2.

    Each problem of a published checkpoint gets a line.
    """
    try:
        options = _parse(arguments)
        options.check()
        name = type(options).__name__.lower()
        command = getattr(importlib.import_module(f"attnax.cli.{name}"), name)  # now: --help does not wait for Flax
        code: int = command(options)
        return code
    except CheckpointError as error:
        problems = error.problems if len(error.problems) == 1 else (f"{len(error.problems)} problems.", *error.problems)
        return _refuse(f"{error.where}: {problems[0]}", *problems[1:])
    except InputError as error:
        return _refuse(str(error))
    except ModuleNotFoundError as error:
        name = str(error.name).partition(".")[0]
        if name not in _EXTRAS:
            raise
        return _refuse(f"this needs the package {name}. Install it with: {install_command(_EXTRAS[name])}")
    except BrokenPipeError:  # the reader of the output has ended, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 128 + signal.SIGPIPE
    except OSError as error:
        return _refuse(f"{error.filename or 'standard output'}: {error.strerror or error}.")
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _refuse(*lines: str) -> int:
    """Prints the lines as an error; returns the exit code."""
    print("attnax: " + "\n  ".join(map(printable, lines)), file=sys.stderr)
    return 2


def _parse(arguments: Sequence[str]) -> Train | Tokenize | Launch | Generate | Inspect | Bench:
    """The options; an error that tyro prints as a box of several lines becomes an InputError of one line."""
    import tyro

    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            if arguments[:1] == ["launch"]:
                from attnax.cli.launch import read_launch  # without JAX, which the other options import

                return read_launch(arguments[1:])
            from attnax.cli.launch import Launch
            from attnax.cli.options import Bench, Generate, Inspect, Tokenize, Train

            return tyro.cli(
                Train | Tokenize | Launch | Generate | Inspect | Bench,
                prog="attnax",
                description="Train a language model on text, write with it or a published one, and time attention.",
                args=list(arguments),
                config=(tyro.conf.OmitArgPrefixes, tyro.conf.AvoidSubcommands),
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise InputError(_one_line(box.getvalue(), arguments)) from None
    except ValueError as error:  # from a config
        raise InputError(str(error)) from error


def _one_line(box: str, arguments: Sequence[str]) -> str:
    """The message in a box of tyro, and the command for help."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", box)  # without the colours of a terminal
    lines = [line.strip("│ ") for line in plain.splitlines()]
    # A title, a rule, the message, a rule, advice. In UTF-8 the title is part of the first rule.
    is_rule = [line.startswith("╭") or (line != "" and not line.strip("─-╰╯")) for line in lines]
    rules = [index for index, rule in enumerate(is_rule) if rule]
    message = " ".join(lines[rules[0] + 1 : rules[1]])
    # These names are tyro's, not flags.
    message = re.sub(r"^Error parsing \S*(Train|Tokenize|Launch|Generate|Inspect|Bench|inner__\S*): ", "", message)
    message = _CHOICES.sub(r"cannot read '\2' as \1", message)
    command = next((f" {name}" for name in arguments[:1] if name in _COMMANDS), "")
    if arguments and not command and not arguments[0].startswith("-"):
        message = f"there is no command {arguments[0]!r}; the commands are {', '.join(_COMMANDS)}"
    return f"{message.rstrip('.')}. See attnax{command} --help."
