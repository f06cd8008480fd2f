"""`attnax launch`: the processes of a training on this machine, or on this node of several. Imports no JAX."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path

import tyro

from attnax.errors import InputError
from attnax.launcher import Job, run

__all__ = ["Launch", "launch", "read_launch"]

# Flags of `train` that are no part of a run, so that they stand beside --resume too; those of `_VALUED` take a value.
_VALUED = ("--layout", "--max-skipped", "--peak-flops", "--profile")
_BARE = ("--compile-cache", "--no-compile-cache", "--tensorboard", "--no-tensorboard")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Launch:
    """Start the processes of a training, watch them, and start them again from the newest checkpoint.

    The command follows two dashes: attnax launch --processes 2 -- train --out runs/a. It is train, with --out or
    --resume, or any program that calls attnax.distributed.connect().

    Attributes:
        processes: number of processes on each node.
        devices: number of devices of a process. By default all that JAX finds, and one on a CPU.
        nodes: number of nodes; the command runs on each of them.
        node: which node this one is, from 0.
        coordinator: HOST:PORT of node 0, at which the launchers of all nodes meet.
        restarts: start again after a failure, at most this many times in a row without a new checkpoint.
        stall: seconds without an update after which a process counts as stuck; 0 turns the clock off.
    """

    processes: int
    devices: int | None = None
    nodes: int = 1
    node: int = 0
    coordinator: str | None = None
    restarts: int = 0
    stall: float = 600.0
    command: tyro.conf.Suppress[tuple[str, ...]] = ()

    def check(self) -> None:
        """Raises InputError for a value out of range, or a command that cannot be launched."""
        self.job()

    def job(self) -> Job:
        """What to launch.

        Raises:
            InputError: a value is out of range, or the command cannot be launched.
        """
        if not self.command:
            raise InputError("launch needs a command after two dashes, such as: -- train --out runs/a.")
        words = self.command[1:] if self.command[:2] == ("attnax", "train") else self.command
        if words[0] == "train" and _folder(words) is None:
            raise InputError(
                "launch needs --out or --resume in the flags of train: all processes, and those of a restart, must "
                "name the same run folder."
            )
        fields = {field.name for field in dataclasses.fields(Job)} & vars(self).keys()
        given = {name: getattr(self, name) for name in fields}
        return Job(words=lambda newest: words if newest is None else go_on(words, newest), **given)


def launch(options: Launch) -> int:
    """Runs the command; returns the exit code of the training."""
    return run(options.job())


def read_launch(arguments: Sequence[str]) -> Launch:
    """The options from the words after `launch`; tyro prints what is wrong with them, and exits."""
    words = list(arguments)
    split = words.index("--") if "--" in words else len(words)
    options = tyro.cli(Launch, prog="attnax launch", args=words[:split], config=(tyro.conf.OmitArgPrefixes,))
    return dataclasses.replace(options, command=tuple(words[split + 1 :]))


def go_on(words: Sequence[str], newest: int = -1) -> list[str]:
    """The words of a later attempt: `train` goes on with its run if that has begun; other commands are as they were.

    Args:
        words: of the first attempt.
        newest: the newest checkpoint that an attempt has made, or -1. Without one `--step` stays: what it goes back
            from may still be there. With one the run has begun, even if a disk that is away does not show it.
    """
    folder = _folder(words) if words[0] == "train" else None
    if folder is None or (newest < 0 and not (folder / "config.json").exists()):
        return list(words)
    valued = (*_VALUED, "--step") if newest < 0 else _VALUED
    kept, rest = [], iter(words[1:])
    for word in rest:
        flag, has_value, _ = word.partition("=")
        flag = flag.replace("_", "-")
        if flag in (*valued, *_BARE):
            kept.append(word)
        if flag in valued and not has_value:
            kept += itertools.islice(rest, 1)
    return ["train", "--resume", str(folder), *kept]


def _folder(words: Sequence[str]) -> Path | None:
    """The run folder that the flags of `train` name, or None."""
    folder = None
    for word, following in zip(words, [*words[1:], ""], strict=True):
        flag, _, value = word.partition("=")
        if flag in ("--out", "--resume"):
            folder = value or following
    return Path(folder) if folder else None
