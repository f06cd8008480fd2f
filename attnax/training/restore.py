"""Reads checkpoints: which there are, what they hold, and the newest whole one. Nothing is written or deleted."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from attnax.errors import InputError
from attnax.training.manifest import MANIFEST, ArrayType, DamagedCheckpointError, Manifest, array_types, steps_with
from attnax.training.orbax_files import named_arrays, read_items

__all__ = [
    "best_checkpoint",
    "checkpoint_arrays",
    "checkpoint_steps",
    "latest_checkpoint",
    "require_owner",
    "restore_items",
    "restore_with_manifest",
]


def checkpoint_steps(folder: Path) -> list[int]:
    """The steps of the checkpoints, in order, without interrupted ones."""
    return steps_with(folder, MANIFEST)


def latest_checkpoint(folder: Path) -> int | None:
    """The step of the newest checkpoint, or None."""
    return max(checkpoint_steps(folder), default=None)


def best_checkpoint(folder: Path) -> int | None:
    """The step of the checkpoint with the lowest metric, the later one of equals; None if none has a metric.

    Raises:
        DamagedCheckpointError: a manifest was changed.
    """
    manifests = [Manifest.read(folder, step) for step in checkpoint_steps(folder)]
    measured = [(manifest.metric, -manifest.update) for manifest in manifests if manifest.metric is not None]
    return -min(measured)[1] if measured else None


def checkpoint_arrays(folder: Path, step: int, item: str) -> dict[str, ArrayType]:
    """The shape and the dtype of each array in a checkpoint, by name; no array is read.

    Raises:
        InputError: the checkpoint has no such item.
        DamagedCheckpointError: its manifest was changed.
    """
    manifest = Manifest.read(folder, step)
    if item not in manifest.types:
        raise InputError(f"the checkpoint {folder / str(step)} has no {item}; it has {', '.join(manifest.types)}.")
    return manifest.types[item]


def restore_items(
    folder: Path, likes: Mapping[str, Any], *, step: int | None = None, owner: str = ""
) -> tuple[int, dict[str, Any]]:
    """The step of the newest checkpoint, and its items.

    If it is damaged, a warning says so, and the one before is taken. This also reads a run that is being trained.

    Args:
        folder: of the checkpoints.
        likes: a pytree of arrays or `jax.ShapeDtypeStruct` by the name of each item, with the structure, shapes and
            dtypes that were saved. The arrays are put on the devices as those of `likes` lie, on the default device
            where that says nothing; the layout that saved them may be another. No file is read of items without a name.
        step: of the checkpoint to read; then damage is an error.
        owner: as saved.

    Raises:
        InputError: there is no checkpoint, or none of this step; or it belongs to another run or another model.
        DamagedCheckpointError: the checkpoint of `step` is damaged, or all are; the message names the newest whole one.
        OSError: the disk fails to read a file; the error names it. That is not damage: no other checkpoint is taken.

    Example:
        >>> step, items = restore_items(Path("run/checkpoints"), {"params": params})  # doctest: +SKIP
    """
    manifest, items = restore_with_manifest(folder, likes, step=step, owner=owner)
    return manifest.update, items


def restore_with_manifest(
    folder: Path, likes: Mapping[str, Any], *, step: int | None, owner: str
) -> tuple[Manifest, dict[str, Any]]:
    """`restore_items`, with all that is known of the checkpoint."""
    steps = checkpoint_steps(folder)
    if not steps:
        raise InputError(f"{folder} holds no checkpoint.")
    if step is None:
        manifest = _newest_whole(folder, likes, owner)
    elif step in steps:
        manifest = _whole(folder, step, likes, owner)
    else:
        raise InputError(f"{folder}: step must be one of {', '.join(map(str, steps))}; got step={step}.")
    with_arrays = {item: like for item, like in likes.items() if manifest.types.get(item)}
    return manifest, {**likes, **read_items(folder / str(manifest.update), with_arrays)}


def _newest_whole(folder: Path, likes: Mapping[str, Any], owner: str) -> Manifest:
    """The manifest of the newest checkpoint that is whole; a warning for each one that is not.

    Raises:
        DamagedCheckpointError: none is whole.
    """
    damaged: dict[int, DamagedCheckpointError] = {}
    # The steps are listed again each time: the process that trains may have deleted a checkpoint while it was read.
    while steps := [step for step in checkpoint_steps(folder) if step not in damaged]:
        try:
            manifest = _check(folder, steps[-1], likes, owner)
        except DamagedCheckpointError as error:
            if steps[-1] in checkpoint_steps(folder):
                damaged[steps[-1]] = error
            continue
        for problem in damaged.values():
            warnings.warn(f"{problem} That of step {manifest.update} is taken.", stacklevel=4)
        return manifest
    raise DamagedCheckpointError(f"{damaged[max(damaged)]} None is whole.") from damaged[max(damaged)]


def _whole(folder: Path, step: int, likes: Mapping[str, Any], owner: str) -> Manifest:
    """The manifest of this step.

    Raises:
        DamagedCheckpointError: it is damaged; the message names the newest one that is whole.
    """
    try:
        return _check(folder, step, likes, owner)
    except DamagedCheckpointError as error:
        others = (other for other in reversed(checkpoint_steps(folder)) if other != step)
        whole = next((other for other in others if _is_whole(folder, other, likes)), None)
        words = "None is whole." if whole is None else f"That of step {whole} is whole."
        raise DamagedCheckpointError(f"{error} {words}", whole) from error


def _is_whole(folder: Path, step: int, items: Iterable[str]) -> bool:
    """Whether it can be named as one to go on from."""
    try:
        Manifest.read(folder, step).check_files(folder, set(items))
    except (InputError, OSError):
        return False
    return True


def _check(folder: Path, step: int, likes: Mapping[str, Any], owner: str) -> Manifest:
    """The manifest of a step whose owner, arrays and files are as they should be.

    Raises:
        InputError: it belongs to another run or another model.
        DamagedCheckpointError: the manifest or a file was changed.
    """
    target = folder / str(step)
    manifest = Manifest.read(folder, step)
    require_owner(folder, manifest, owner)
    for item, like in likes.items():
        saved, wanted = manifest.types.get(item, {}), array_types(named_arrays(like))
        if wanted and item not in manifest.types:
            raise InputError(f"the checkpoint {target} has no {item}; it has {', '.join(manifest.types)}.")
        if saved != wanted:
            name = min(name for name in saved.keys() | wanted.keys() if saved.get(name) != wanted.get(name))
            raise InputError(
                f"the checkpoint {target} is of another model: {name} is {_words(saved.get(name))} in the checkpoint "
                f"and {_words(wanted.get(name))} in the model."
            )
    manifest.check_files(folder, likes.keys())
    return manifest


def require_owner(folder: Path, manifest: Manifest, owner: str) -> None:
    """Raises InputError if the checkpoint belongs to another run."""
    if manifest.owner != owner:
        raise InputError(f"the checkpoint {folder / str(manifest.update)} belongs to another run.")


def _words(kind: ArrayType | None) -> str:
    return "absent" if kind is None else f"{kind[1]}{kind[0]}"
