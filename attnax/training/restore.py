"""Reads checkpoints: which there are, what they hold, and the newest whole one. Nothing is written or deleted."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import jax

from attnax.errors import InputError
from attnax.training.manifest import (
    MANIFEST,
    ArrayType,
    DamagedCheckpointError,
    HashFiles,
    Manifest,
    array_types,
    hash_files,
    steps_with,
)
from attnax.training.orbax_files import named_arrays, read_items
from attnax.training.rounds import Rounds
from attnax.training.same_disk import answer_with_digests, hash_by_asking

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

    Where arrays of `likes` lie on the devices of several processes, all of these call this with the same arguments:
    process 0 takes the checkpoint, and each reads its parts. Otherwise a process reads for itself and waits for none.

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
        ProcessError: another process does not come.

    Example:
        >>> step, items = restore_items(Path("run/checkpoints"), {"params": params})  # doctest: +SKIP
    """
    shardings = (getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(dict(likes)))
    is_of_one = all(sharding is None or sharding.is_fully_addressable for sharding in shardings)
    rounds = Rounds(None if is_of_one else f"restore_items of {folder}")
    manifest, items = restore_with_manifest(folder, likes, step=step, owner=owner, rounds=rounds)
    return manifest.update, items


def restore_with_manifest(
    folder: Path, likes: Mapping[str, Any], *, step: int | None, owner: str, rounds: Rounds
) -> tuple[Manifest, dict[str, Any]]:
    """`restore_items` in the processes of these rounds, with all that is known of the checkpoint."""
    damaged: dict[int, DamagedCheckpointError] = {}

    def choose(hashing: HashFiles) -> Manifest:
        check = partial(_check, folder, likes, owner, hashing)
        return _newest_whole(folder, check, damaged) if step is None else _whole(folder, step, check)

    def choose_for_all(ask: Callable[[Any], list[Any]]) -> int:
        return choose(hash_by_asking(ask)).update

    chosen = choose(hash_files) if rounds.is_alone else None
    update = chosen.update if chosen else rounds.lead_and_ask(choose_for_all, partial(answer_with_digests, folder))
    for problem in damaged.values():
        warnings.warn(f"{problem} That of step {update} is taken.", stacklevel=3)
    with rounds.part():
        manifest = chosen or Manifest.read(folder, update)
        with_arrays = {item: like for item, like in likes.items() if manifest.types.get(item)}
        arrays = read_items(folder / str(update), with_arrays)
    return manifest, {**likes, **arrays}


Check: TypeAlias = Callable[[int], Manifest]


def _newest_whole(folder: Path, check: Check, damaged: dict[int, DamagedCheckpointError]) -> Manifest:
    """The manifest of the newest checkpoint that is whole; those that are not are added to `damaged`.

    Raises:
        InputError: there is no checkpoint.
        DamagedCheckpointError: none is whole.
    """
    # The steps are listed again each time: the process that trains may have deleted a checkpoint while it was read.
    while steps := [step for step in checkpoint_steps(folder) if step not in damaged]:
        try:
            return check(steps[-1])
        except DamagedCheckpointError as error:
            if steps[-1] in checkpoint_steps(folder):
                damaged[steps[-1]] = error
    if not damaged:
        raise InputError(f"{folder} holds no checkpoint.")
    raise DamagedCheckpointError(f"{damaged[max(damaged)]} None is whole.") from damaged[max(damaged)]


def _whole(folder: Path, step: int, check: Check) -> Manifest:
    """The manifest of this step.

    Raises:
        InputError: there is no such checkpoint.
        DamagedCheckpointError: it is damaged; the message names the newest one that is whole.
    """
    steps = checkpoint_steps(folder)
    if not steps:
        raise InputError(f"{folder} holds no checkpoint.")
    if step not in steps:
        raise InputError(f"{folder}: step must be one of {', '.join(map(str, steps))}; got step={step}.")
    try:
        return check(step)
    except DamagedCheckpointError as error:
        others = (other for other in reversed(checkpoint_steps(folder)) if other != step)
        whole = next((other for other in others if _is_whole(check, other)), None)
        words = "None is whole." if whole is None else f"That of step {whole} is whole."
        raise DamagedCheckpointError(f"{error} {words}", whole) from error


def _is_whole(check: Check, step: int) -> bool:
    """Whether it can be named as one to go on from."""
    try:
        check(step)
    except (InputError, OSError):
        return False
    return True


def _check(folder: Path, likes: Mapping[str, Any], owner: str, hashing: HashFiles, step: int) -> Manifest:
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
    manifest.check_files(folder, likes.keys(), hashing)
    return manifest


def require_owner(folder: Path, manifest: Manifest, owner: str) -> None:
    """Raises InputError if the checkpoint belongs to another run."""
    if manifest.owner != owner:
        raise InputError(f"the checkpoint {folder / str(manifest.update)} belongs to another run.")


def _words(kind: ArrayType | None) -> str:
    return "absent" if kind is None else f"{kind[1]}{kind[0]}"
