"""Checkpoints through Orbax, with what Orbax leaves out: a checksum of every file and the exact type of every array.

`folder/STEP/ITEM/` holds a pytree of arrays. `folder/STEP.json` is written last: a checkpoint without it was
interrupted and does not count.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax

from attnax.typing import InputError

__all__ = ["latest_checkpoint", "restore_checkpoint", "save_checkpoint"]

Tree = TypeVar("Tree")


def save_checkpoint(folder: Path, step: int, items: Mapping[str, Any], *, owner: str = "", keep: int = 2) -> None:
    """Writes the pytrees of `items` as step number `step`, then deletes all but the newest `keep` checkpoints.

    Args:
        folder: of the checkpoints; made if it is missing.
        step: counts up from 0.
        items: pytrees of arrays by name; each can be restored without the others.
        owner: what the checkpoint belongs to; `restore_checkpoint` asks for the same.
        keep: checkpoints to leave.
    """
    import orbax.checkpoint as ocp  # half a second that only saving and restoring should pay

    target = folder.absolute() / str(step)
    _delete(folder, step)
    manifest: dict[str, Any] = {"owner": owner, "types": {}, "sha256": {}}
    with ocp.StandardCheckpointer() as checkpointer:
        for item, tree in items.items():
            arrays = _named_arrays(tree)
            checkpointer.save(target / item, arrays)
            checkpointer.wait_until_finished()
            manifest["types"][item] = {name: _type(array) for name, array in arrays.items()}
            manifest["sha256"][item] = _digests(target / item)
    temporary = folder / f"{step}.json.tmp"
    temporary.write_text(json.dumps(manifest, indent=1))
    temporary.replace(folder / f"{step}.json")
    for old in _steps(folder)[:-keep]:
        _delete(folder, old)


def latest_checkpoint(folder: Path) -> int | None:
    """The step of the newest complete checkpoint, or None."""
    steps = _steps(folder)
    return steps[-1] if steps else None


def restore_checkpoint(folder: Path, step: int, item: str, like: Tree, *, owner: str = "") -> Tree:
    """The pytree `item` of step number `step`.

    Args:
        folder: of the checkpoints.
        step: as saved.
        item: as saved.
        like: a pytree of arrays or `jax.ShapeDtypeStruct` of the same structure, shapes and dtypes.
        owner: as saved.

    Raises:
        InputError: a file is missing, changed or not of this model. Nothing is read into arrays before that is known.
    """
    import orbax.checkpoint as ocp

    target = folder.absolute() / str(step)
    try:
        manifest = json.loads((folder / f"{step}.json").read_text())
        saved, digests = dict(manifest["types"][item]), dict(manifest["sha256"][item])
        saved_owner = manifest["owner"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"the checkpoint {target} has no readable list of its contents ({target}.json).") from error
    if saved_owner != owner:
        raise InputError(f"the checkpoint {target} belongs to another run.")
    found = _digests(target / item)
    if found != digests:
        names = sorted(name for name in found.keys() | digests.keys() if found.get(name) != digests.get(name))
        raise InputError(
            f"the checkpoint {target} is damaged: {names[0]} is not what was saved"
            + (f", nor are {len(names) - 1} other files." if len(names) > 1 else ".")
        )
    wanted = {name: _type(array) for name, array in _named_arrays(like).items()}
    if saved != wanted:
        names = sorted(name for name in saved.keys() | wanted.keys() if saved.get(name) != wanted.get(name))
        raise InputError(
            f"the checkpoint {target} is of another model: {names[0]} is {_words(saved.get(names[0]))} in the "
            f"checkpoint and {_words(wanted.get(names[0]))} in the model."
        )
    abstract = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in _named_arrays(like).items()}
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


def _steps(folder: Path) -> list[int]:
    return sorted(int(path.stem) for path in folder.glob("*.json") if path.stem.isdecimal())


def _delete(folder: Path, step: int) -> None:
    """The manifest goes first: what is left of an interrupted deletion does not count as a checkpoint."""
    (folder / f"{step}.json").unlink(missing_ok=True)
    if (folder / str(step)).exists():
        shutil.rmtree(folder / str(step))
