"""What interrupted saves and deletions leave, and how that is told from the files of others.

The mark of a step is a file, `STEP.attnax.json.tmp`. It is on the disk before Orbax makes the first file of the step.
When all files are there, the manifest is written into the mark, and that is renamed to `STEP.attnax.json`: with this
rename the checkpoint exists. A deletion renames the manifest back to the mark, deletes the files, and the mark last. So
at every instant the files of a step lie beside its manifest or its mark, and only what has the mark is deleted.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from pathlib import Path

from attnax.errors import InputError
from attnax.training.durable import sync, temporary_path
from attnax.training.manifest import MANIFEST, manifest_path, steps_with
from attnax.training.same_disk import require_seen

__all__ = ["delete", "delete_remains", "mark", "require_mark", "require_no_others"]

_UNFINISHED = ".orbax-checkpoint-tmp"  # is in the name that Orbax gives to a folder until it is complete


def mark(folder: Path, step: int) -> None:
    """Makes the mark of a step whose save begins; when this returns, it is on the disk.

    Raises:
        OSError: the disk is full or fails; the error names a file or the folder.
    """
    made = _mark_path(folder, step)
    made.touch()
    sync(made)
    sync(folder)


def require_mark(folder: Path, step: int) -> None:
    """Raises InputError unless this process sees the mark that process 0 has made."""
    require_seen(_mark_path(folder, step), (0, hashlib.sha256().hexdigest()))


def delete(folder: Path, step: int) -> None:
    """Deletes a checkpoint, manifest first, and all remains. What was deleted by hand already is no error.

    Raises:
        OSError: the disk fails; the error names a file.
    """
    with contextlib.suppress(FileNotFoundError):
        os.replace(manifest_path(folder, step), _mark_path(folder, step))
    sync(folder)  # after a power failure too, the files are gone only if the manifest is
    delete_remains(folder)


def delete_remains(folder: Path) -> None:
    """Deletes the files of all steps that have a mark and no manifest, and then the marks.

    Raises:
        OSError: the disk fails; the error names a file.
    """
    whole = steps_with(folder, MANIFEST)
    for step in _marked_steps(folder):
        if step not in whole:  # a copy of the folder, made during a save, may have both
            for path in folder.iterdir():
                if _name_of_step(path) == str(step):
                    _remove(path)
            sync(folder)
        _mark_path(folder, step).unlink()


def require_no_others(folder: Path) -> None:
    """Raises InputError if a file or folder has the name of a step, and neither a manifest nor a mark."""
    if not folder.is_dir():
        return
    known = {*steps_with(folder, MANIFEST), *_marked_steps(folder)}
    for path in sorted(folder.iterdir()):
        name = _name_of_step(path)
        if name.isdecimal() and int(name) not in known:
            raise InputError(
                f"{path} has the name of a checkpoint, and was not saved as one. Nothing was deleted. Move it away, or "
                "give another folder for the checkpoints."
            )


def _mark_path(folder: Path, step: int) -> Path:
    """The file that `Manifest.write` fills and renames, which makes the mark a manifest."""
    return temporary_path(manifest_path(folder, step))


def _marked_steps(folder: Path) -> list[int]:
    return steps_with(folder, temporary_path(Path(MANIFEST)).name)


def _name_of_step(path: Path) -> str:
    """The name that Orbax gives to the folder in the end."""
    return path.name.partition(_UNFINISHED)[0]


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
