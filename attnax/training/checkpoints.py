"""Orbax checkpoints, with a checksum of every file and the exact type of every array, which Orbax does not store.

`folder/STEP/ITEM/` holds a pytree of arrays. `folder/STEP.json` is written last and deleted first. A checkpoint without
this file was interrupted: it is ignored, and deleted at the next save.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax

from attnax.errors import InputError

__all__ = [
    "DamagedCheckpointError",
    "checkpoint_arrays",
    "checkpoint_steps",
    "delete_checkpoints_after",
    "latest_checkpoint",
    "restore_checkpoint",
    "restore_items",
    "save_checkpoint",
]

Tree = TypeVar("Tree")


def save_checkpoint(folder: Path, step: int, items: Mapping[str, Any], *, owner: str = "", keep: int = 2) -> None:
    """Writes the pytrees of `items` as step number `step`, then deletes all but the newest `keep` checkpoints.

    Checkpoints of later steps are deleted too: the training went back to an earlier step.

    Args:
        folder: of the checkpoints; made if it is missing.
        step: counts up from 0.
        items: pytrees of arrays by name; each can be restored alone.
        owner: name of the run that the checkpoint belongs to; `restore_checkpoint` needs the same.
        keep: number of checkpoints to keep.

    Raises:
        OSError: the disk is full or fails; earlier checkpoints are kept.
    """
    import orbax.checkpoint as ocp  # takes half a second, which only saving and restoring need

    target = folder.absolute() / str(step)
    _delete(folder, step)
    folder.mkdir(parents=True, exist_ok=True)
    _require_room(folder, items)
    manifest: dict[str, Any] = {"owner": owner, "types": {}, "sha256": {}}
    try:
        with _errors_of_the_disk(folder), ocp.StandardCheckpointer() as checkpointer:
            for item, tree in items.items():
                arrays = _named_arrays(tree)
                checkpointer.save(target / item, arrays)
                checkpointer.wait_until_finished()
                manifest["types"][item] = {name: _type(array) for name, array in arrays.items()}
                manifest["sha256"][item] = _digests(target / item)
            temporary = folder / f"{step}.json.tmp"
            temporary.write_text(json.dumps(manifest, indent=1))
            temporary.replace(folder / f"{step}.json")
    except OSError:
        _delete(folder, step)
        raise
    _delete_others(folder, [saved for saved in checkpoint_steps(folder) if saved <= step][-keep:])


def checkpoint_steps(folder: Path) -> list[int]:
    """The steps of the checkpoints, in order, without interrupted ones."""
    return sorted(int(path.stem) for path in folder.glob("*.json") if path.stem.isdecimal())


def delete_checkpoints_after(folder: Path, step: int) -> None:
    """Deletes checkpoints of later steps, and the remains of interrupted saves and deletions."""
    if folder.is_dir():
        _delete_others(folder, [saved for saved in checkpoint_steps(folder) if saved <= step])


def latest_checkpoint(folder: Path) -> int | None:
    """The step of the newest checkpoint, or None."""
    return max(checkpoint_steps(folder), default=None)


def checkpoint_arrays(folder: Path, step: int, item: str) -> dict[str, tuple[tuple[int, ...], str]]:
    """The shape and the dtype of each array in a checkpoint, by name; no array is read.

    Raises:
        InputError: the list of its contents cannot be read.
    """
    types = _read_manifest(folder, step, item)[1]
    return {name: (tuple(shape), dtype) for name, (shape, dtype) in types.items()}


class DamagedCheckpointError(InputError):
    """A checkpoint cannot be read.

    Attributes:
        whole: the step of the newest complete checkpoint before it, or None.
    """

    def __init__(self, message: str, whole: int | None):
        self.whole = whole
        super().__init__(f"{message} " + (f"That of step {whole} is whole." if whole is not None else "None is whole."))


def restore_items(
    folder: Path, likes: Mapping[str, Any], *, step: int | None = None, owner: str = ""
) -> tuple[int, dict[str, Any]]:
    """The step of a checkpoint, and its items.

    Args:
        folder: of the checkpoints; it holds at least one.
        likes: pytrees as in `restore_checkpoint`, by the names of the items.
        step: of the checkpoint, by default the newest.
        owner: as saved.

    Raises:
        InputError: there is no checkpoint of this step.
        DamagedCheckpointError: it is damaged; the message names the newest complete one before it.
    """
    steps = checkpoint_steps(folder)
    if step is not None and step not in steps:
        raise InputError(f"{folder}: step must be one of {', '.join(map(str, steps))}; got step={step}.")
    chosen = max(steps) if step is None else step
    try:
        return chosen, {
            item: restore_checkpoint(folder, chosen, item, like, owner=owner) for item, like in likes.items()
        }
    except InputError as error:
        older = (other for other in reversed(steps) if other < chosen and _is_whole(folder, other, likes, owner))
        raise DamagedCheckpointError(str(error), next(older, None)) from error


def _is_whole(folder: Path, step: int, items: Iterable[str], owner: str) -> bool:
    try:
        for item in items:
            _check_files(folder, step, item, owner)
    except InputError:
        return False
    return True


def restore_checkpoint(folder: Path, step: int, item: str, like: Tree, *, owner: str = "") -> Tree:
    """The pytree `item` of step number `step`, saved in `folder` for `owner`.

    `like` is a pytree of arrays or `jax.ShapeDtypeStruct` of the same structure, shapes and dtypes. The result lies on
    the devices as `like` does, on the default device where that says nothing: each device reads its own parts, wherever
    the arrays lay when they were saved.

    Raises:
        InputError: a file is missing, changed or of another model. This is checked before any array is read.
    """
    import orbax.checkpoint as ocp

    target = folder.absolute() / str(step)
    saved = _check_files(folder, step, item, owner)
    named = _named_arrays(like)
    wanted = {name: _type(array) for name, array in named.items()}
    if saved != wanted:
        names = sorted(name for name in saved.keys() | wanted.keys() if saved.get(name) != wanted.get(name))
        raise InputError(
            f"the checkpoint {target} is of another model: {names[0]} is {_words(saved.get(names[0]))} in the "
            f"checkpoint and {_words(wanted.get(names[0]))} in the model."
        )
    here = jax.device_put(0).sharding
    abstract = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None) or here)
        for name, x in named.items()
    }
    with ocp.StandardCheckpointer() as checkpointer:
        arrays = checkpointer.restore(target / item, abstract)
    return jax.tree.unflatten(jax.tree.structure(like), [arrays[name] for name in wanted])


def _named_arrays(tree: Any) -> dict[str, Any]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _type(array: Any) -> list[Any]:
    return [list(array.shape), str(array.dtype)]


def _words(kind: list[Any] | None) -> str:
    return "absent" if kind is None else f"{kind[1]}{tuple(kind[0])}"


def _digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _check_files(folder: Path, step: int, item: str, owner: str) -> dict[str, Any]:
    """The types of an item's arrays.

    Raises:
        InputError: the manifest cannot be read or is of another run, or a file is missing or changed.
    """
    target = folder.absolute() / str(step)
    saved_owner, types, digests = _read_manifest(folder, step, item)
    if saved_owner != owner:
        raise InputError(f"the checkpoint {target} belongs to another run.")
    found = _digests(target / item)
    if found != digests:
        names = sorted(name for name in found.keys() | digests.keys() if found.get(name) != digests.get(name))
        raise InputError(
            f"the checkpoint {target} is damaged: {names[0]} has changed since it was saved"
            + (f", and so have {len(names) - 1} other files." if len(names) > 1 else ".")
        )
    return types


def _read_manifest(folder: Path, step: int, item: str) -> tuple[str, dict[str, Any], dict[str, str]]:
    """The owner of a checkpoint, and the types of an item's arrays and the digests of its files."""
    target = folder.absolute() / str(step)
    try:
        manifest = json.loads((folder / f"{step}.json").read_text())
        return manifest["owner"], dict(manifest["types"][item]), dict(manifest["sha256"][item])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"the checkpoint {target} has no readable list of its contents ({target}.json).") from error


def _delete(folder: Path, step: int) -> None:
    """Deletes a checkpoint, manifest first: the remains of an interrupted deletion are no checkpoint."""
    for name in (f"{step}.json", f"{step}.json.tmp"):
        (folder / name).unlink(missing_ok=True)
    if (folder / str(step)).exists():
        shutil.rmtree(folder / str(step))


def _delete_others(folder: Path, kept: Sequence[int]) -> None:
    numbers = {path.name.partition(".")[0] for path in folder.iterdir()}
    for step in {int(number) for number in numbers if number.isdecimal()}.difference(kept):
        _delete(folder, step)


def _require_room(folder: Path, items: Mapping[str, Any]) -> None:
    """Raises OSError if the disk has less room than the arrays take."""
    needed = sum(array.nbytes for tree in items.values() for array in jax.tree.leaves(tree))
    free = shutil.disk_usage(folder).free
    if free < needed:
        sizes = f"a checkpoint takes {needed / 1e6:,.1f} MB, and {free / 1e6:,.1f} MB are free"
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {sizes}", str(folder))


@contextlib.contextmanager
def _errors_of_the_disk(folder: Path) -> Iterator[None]:
    """Turns a ValueError of TensorStore about the disk into an OSError, and silences the long logs of Orbax."""
    log = logging.getLogger("absl")
    was_disabled, log.disabled = log.disabled, True
    try:
        yield
    except ValueError as error:
        code = re.search(r"\[os_error_code='([0-9]+)'\]", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(folder)) from error
    finally:
        log.disabled = was_disabled
