"""Files that are whole and on the disk, whenever the process is killed or the power fails."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

__all__ = ["naming", "sync", "sync_folders", "temporary_path", "write_durable"]


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Errors of the disk inside name the path; those of a full disk name none."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def sync(path: Path) -> None:
    """Waits until a file, or the list of names of a folder, is on the disk.

    Raises:
        OSError: the disk fails; the error names the path.
    """
    with naming(path):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sync_folders(target: Path) -> None:
    """Waits until the names of all files in a folder, and its own, are on the disk.

    Raises:
        OSError: the disk fails; the error names the folder.
    """
    for folder, _, _ in os.walk(target, topdown=False):
        sync(Path(folder))
    sync(target.parent)


def temporary_path(path: Path) -> Path:
    """The file that `write_durable` fills before it gets its name."""
    return path.with_name(path.name + ".tmp")


def write_durable(path: Path, text: str) -> None:
    """Writes a file that is complete or as before; when this returns, it is on the disk.

    Raises:
        OSError: the disk is full or fails; the error names the path.
    """
    temporary = temporary_path(path)
    with naming(path):
        temporary.write_text(text, "utf-8")
        sync(temporary)
        os.replace(temporary, path)
    sync(path.parent)
