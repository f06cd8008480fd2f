"""Files that several processes share: whether all see the same ones, and digests, of which each computes a part."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from attnax.distributed import is_main
from attnax.errors import InputError
from attnax.training.manifest import FileDigest, HashFiles, hash_files, manifest_path
from attnax.training.rounds import described, rebuilt

__all__ = ["answer_with_digests", "hash_by_asking", "my_share", "require_seen"]

_LATE = 90.0  # seconds; NFS keeps for up to 60 s that a name was not there


def my_share(target: Path, names: list[str]) -> list[str]:
    """Of P processes, process p takes the files p, p + P, ...; it waits until it sees them, within limits."""
    mine = names[jax.process_index() :: jax.process_count()]
    _comes_true(target.parent, lambda: all((target / name).exists() for name in mine))
    return mine


def require_seen(path: Path, digest: FileDigest) -> None:
    """Raises InputError unless this process sees a file that process 0 sees, with the same content."""
    if not _comes_true(path.parent, lambda: _digests(path.parent, [path.name]) == {path.name: digest}):
        raise InputError(
            f"{path.parent} must be on a disk that all processes share; process {jax.process_index()} does not see "
            f"{path.name} as process 0 does. Give a folder of such a disk."
        )


def hash_by_asking(ask: Callable[[Any], list[Any]]) -> HashFiles:
    """`hash_files` for process 0, which asks all processes for the digests of the files of a checkpoint.

    Args:
        ask: gives what `answer_with_digests` is in each process.
    """

    def hash_together(target: Path, names: list[str]) -> dict[str, FileDigest]:
        """Raises OSError as `hash_files`, and InputError if a process sees another manifest than this one."""
        manifest = manifest_path(target.parent, int(target.name))
        digest = hash_files(manifest.parent, [manifest.name])[manifest.name]
        found: dict[str, FileDigest] = {}
        for process, answer in enumerate(ask({"step": int(target.name), "manifest": digest, "names": names})):
            if "error" in answer:
                hash_files(manifest.parent, [manifest.name])  # an error if the run that trains has deleted it
                raise rebuilt(process, **answer["error"])
            found |= {name: (size, sha) for name, (size, sha) in answer["digests"].items()}
        return found | hash_files(target, [name for name in names if name not in found])

    return hash_together


def answer_with_digests(folder: Path, question: dict[str, Any]) -> dict[str, Any]:
    """The digests of this process's share of the files. Those that it does not find are left to process 0."""
    size, sha = question["manifest"]
    try:
        require_seen(manifest_path(folder, question["step"]), (size, sha))
        target = folder / str(question["step"])
        return {"digests": _digests(target, my_share(target, question["names"]))}
    except (InputError, OSError) as error:
        return {"error": described(error)}


def _comes_true(folder: Path, condition: Callable[[], bool]) -> bool:
    """Whether a condition about files in a folder becomes true within limits; process 0 has nothing to wait for."""
    until = time.monotonic() + (0.0 if is_main() else _LATE)
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
        with contextlib.suppress(OSError):
            os.listdir(folder)  # a network file system then asks the server again
    return True


def _digests(target: Path, names: list[str]) -> dict[str, FileDigest]:
    """The digests of those files that are there."""
    return hash_files(target, [name for name in names if (target / name).exists()])
