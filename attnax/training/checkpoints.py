"""Checkpoints that are whole whenever a process is killed, and that training does not wait for.

`folder/STEP/` holds what Orbax wrote, a folder for each item. `folder/STEP.attnax.json` is the manifest
(`manifest.py`). It gets this name when all of that is on the disk, and loses it before any of it is deleted. Before and
after, the mark of `remains.py` lies in its place: `restore.py` does not see such a step, and `Checkpoints` deletes it.
What has neither a manifest nor a mark was not saved here, and is never deleted.

Several processes share the folder. Process 0 alone decides, makes the mark and the manifest, and deletes. Each process
writes its parts of the arrays and computes the digests of its share of the files. `rounds.py` keeps them together.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import errno
import itertools
import math
import operator
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, SupportsIndex

import jax

from attnax.distributed import ProcessError, beat, is_main
from attnax.training.durable import sync_folders
from attnax.training.manifest import (
    DamagedCheckpointError,
    Manifest,
    array_types,
    hash_durably,
    list_files,
)
from attnax.training.orbax_files import OrbaxSave, named_arrays
from attnax.training.remains import delete, delete_remains, mark, require_mark, require_no_others
from attnax.training.restore import checkpoint_steps, latest_checkpoint, require_owner, restore_with_manifest
from attnax.training.rounds import Rounds
from attnax.training.same_disk import my_share

__all__ = ["Checkpoints"]

_saves = itertools.count(1)  # of this process


class Checkpoints:
    """The checkpoints of a run that is trained here. A save takes the time of a copy to the memory of the host.

    A thread then writes the files, waits until they are on the disk, writes the manifest, and deletes the checkpoints
    that are not kept. Whenever a process is killed, every checkpoint that had a manifest is whole. One run trains in a
    folder at a time; any number of processes may read it with `restore_items`. Only what saves made is deleted: a
    folder with other files or folders named by numbers is refused.

    Processes that `attnax.distributed.connect` has joined share the folder. All of them make this object and call the
    same methods in the same order with the same arguments; arrays that lie in one process are taken to be the same in
    all, and those of process 0 are saved. What process 0 finds is raised in all, and so is an error of the disk in one
    of them: the save has then failed in all. If one does not come within an hour, or dies, the others raise a
    `ProcessError`.
    A launcher learns of each new checkpoint (`beat`).

    Use it in a `with` block, or call `close`: without, a save that is in flight when Python ends is lost.

    Args:
        folder: of the checkpoints; the first save makes it.
        owner: name of the run; checkpoints of another one are refused.
        layout: of the devices, in words, for the manifest.
        keep_last: number of the newest checkpoints to keep, at least 1.
        keep_best: number of those with the lowest metric that are kept too.
        keep_every: those of the multiples of this step are kept too.

    Raises:
        ValueError: a number is out of range, or there are several processes that `connect` has not joined.

    Example:
        >>> with Checkpoints(Path("checkpoints"), keep_best=1) as checkpoints:  # doctest: +SKIP
        ...     done, items = checkpoints.restore({"params": params}) or (0, {"params": params})
        ...     params = items["params"]
        ...     for update in range(done + 1, 1001):
        ...         params = step(params)  # may donate its argument: a save has copied it
        ...         checkpoints.check()
        ...         if update % 100 == 0:
        ...             checkpoints.save(update, {"params": params}, metric=held_out_loss(params))
    """

    def __init__(
        self,
        folder: Path,
        *,
        owner: str = "",
        layout: str = "",
        keep_last: int = 2,
        keep_best: int = 0,
        keep_every: int | None = None,
    ):
        numbers = {"keep_last": (keep_last, 1), "keep_best": (keep_best, 0), "keep_every": (keep_every, 1)}
        for name, (value, least) in numbers.items():
            if value is not None and value < least:
                raise ValueError(f"Checkpoints: {name} must be at least {least}; got {name}={value}.")
        if jax.process_count() > 1 and not jax.distributed.is_initialized():
            raise ValueError(
                f"Checkpoints: several processes must be joined; got {jax.process_count()} that are not. Call "
                "attnax.distributed.connect before JAX makes its first array."
            )
        self.folder = folder
        self._owner, self._layout = owner, layout
        self._keep_last, self._keep_best, self._keep_every = keep_last, keep_best, keep_every
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoints")
        self._saving: Future[None] | None = None
        self._newest: int | None = None  # the last step that was restored or saved here

    def save(self, update: SupportsIndex, items: Mapping[str, Any], *, metric: float | None = None) -> None:
        """Copies the arrays to the host and returns; the thread then saves them as step number `update`.

        The arrays may be donated or changed when this returns. It waits for a last save that is still being written.

        Args:
            update: number of updates that made the state, above that of every checkpoint in the folder.
            items: pytrees of arrays by name. Each can be restored alone, and may be empty.
            metric: a figure on held-out data; lower is better.

        Raises:
            OSError: the disk is full or fails, or did so in the last save; the error names a file or the folder.
                Earlier checkpoints are kept, and the next call may succeed.
            ValueError: `update` is not above the newest checkpoint, `metric` is not finite, or an item is no mapping of
                pytrees of arrays.
            InputError: the folder holds checkpoints of another run, or a file or folder with the name of a step that no
                save made.
        """
        self.wait()
        update = operator.index(update)
        rounds = Rounds(f"save {next(_saves)}, of update {update}, in {self.folder.name}")

        def begin() -> None:
            _check_items("Checkpoints.save", items)
            if is_main():
                self._begin(update, items, metric)

        rounds.each(begin)
        rounds.each(lambda: None if is_main() else require_mark(self.folder, update))
        named = {item: named_arrays(tree) for item, tree in items.items()}
        manifest = Manifest(
            owner=self._owner,
            update=update,
            layout=self._layout,
            **_machine(items),
            metric=None if metric is None else float(metric),
            types={item: array_types(arrays) for item, arrays in named.items()},
            files={},
        )
        with_arrays = {item: arrays for item, arrays in named.items() if arrays}
        try:
            written = OrbaxSave(self.folder / str(update), with_arrays, rounds).wait
        except BaseException as error:
            if rounds.is_alone:
                raise
            written = partial(rounds.fail, error)  # the others hear of it in their threads, and then all raise it
        self._saving, self._newest = self._thread.submit(self._finish, manifest, written, rounds), update

    def _begin(self, update: int, items: Mapping[str, Any], metric: float | None) -> None:
        """Looks at the folder and makes the mark of the step."""
        require_no_others(self.folder)
        newest = latest_checkpoint(self.folder)
        if newest is not None and update <= newest:
            raise ValueError(
                f"Checkpoints.save: update must be above the newest checkpoint, {newest}; got update={update}. "
                "If training went back, call discard_after first."
            )
        if newest not in (None, self._newest):
            require_owner(self.folder, Manifest.read(self.folder, newest), self._owner)
        if metric is not None and not math.isfinite(metric):
            raise ValueError(f"Checkpoints.save: metric must be finite; got metric={metric}.")
        self.folder.mkdir(parents=True, exist_ok=True)
        delete_remains(self.folder)
        _require_room(self.folder, items)
        mark(self.folder, update)

    def check(self) -> None:
        """Raises the error of the last save, if it has failed, and does not wait. Call it at every update.

        While a save is being written, several processes ask each other, so that all raise at the same update.
        """
        if self._saving is not None and all(Rounds(f"a save in {self.folder.name}").each(self._saving.done)):
            self.wait()

    def wait(self) -> None:
        """Waits until the last save is on the disk.

        Raises:
            OSError: the save failed; it is raised once.
        """
        if self._saving is not None:
            concurrent.futures.wait([self._saving])  # may be interrupted by a signal, and then called again
            saving, self._saving = self._saving, None
            saving.result()

    def close(self) -> None:
        """Waits for the last save, as `wait`, and ends the thread."""
        self._thread.shutdown()
        self.wait()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    def restore(self, likes: Mapping[str, Any], *, step: int | None = None) -> tuple[int, dict[str, Any]] | None:
        """`restore_items`, for the process that goes on with the run; None if there is no checkpoint yet.

        The remains of interrupted saves are deleted, and damaged checkpoints that are newer than the one taken. A file
        that the disk fails to read is not damage: the error is raised, and nothing is deleted.
        Checkpoints after `step` stay until `discard_after`. A warning says when the kind of the devices or the number
        of cores is not that of the process that saved: the next updates may then differ in their last bits.

        Raises:
            ValueError: `likes` is no mapping of pytrees of arrays or shapes.
            InputError: as `restore_items`, or as `save`; nothing was deleted.
            DamagedCheckpointError: as `restore_items`; nothing was deleted.
            OSError: the disk fails; the error names a file. `step` reads another checkpoint.
        """
        self.wait()
        rounds = Rounds(f"restore from {self.folder.name}")

        def begin() -> bool:
            _check_items("Checkpoints.restore", likes)
            return is_main() and self._has_checkpoint(step)

        if not rounds.each(begin)[0]:
            return None
        manifest, items = restore_with_manifest(self.folder, likes, step=step, owner=self._owner, rounds=rounds)
        self._newest = manifest.update
        if step is None:
            self.discard_after(manifest.update)
        else:
            rounds.lead(lambda: delete_remains(self.folder))
        if is_main():  # whose machine the manifest tells of
            _warn_of_other_bits(manifest, likes)
        return manifest.update, items

    def _has_checkpoint(self, step: int | None) -> bool:
        """Whether there is one to restore, or one was asked for; otherwise the remains are deleted."""
        require_no_others(self.folder)
        if step is None and latest_checkpoint(self.folder) is None:
            delete_remains(self.folder)
            return False
        return True

    def discard_after(self, update: int) -> None:
        """Deletes the checkpoints of later steps, because training goes on from `update`, and all remains."""
        self.wait()

        def discard() -> None:
            for step in reversed(checkpoint_steps(self.folder)):  # the newest first, as if they had not been made
                if step > update:
                    delete(self.folder, step)
            delete_remains(self.folder)

        Rounds(f"discard_after {update} in {self.folder.name}").lead(discard)

    def _finish(self, manifest: Manifest, written: Callable[[], None], rounds: Rounds) -> None:
        """Makes the files and then the manifest durable; with that the checkpoint exists, and others are deleted."""
        target = self.folder / str(manifest.update)

        def written_names() -> list[str] | None:
            written()
            return list_files(target) if is_main() else None

        def publish() -> None:
            sync_folders(target)
            files = {name: (size, sha) for share in shares for name, (size, sha) in share.items()}
            dataclasses.replace(manifest, files=dict(sorted(files.items()))).write(self.folder)

        try:
            names = rounds.each(written_names)[0]
            shares = rounds.each(lambda: hash_durably(target, my_share(target, names)))
            rounds.lead(publish)
        except BaseException as error:
            if is_main() and not isinstance(error, ProcessError):  # then another process may still write
                with contextlib.suppress(OSError):
                    delete(self.folder, manifest.update)
                    # A thread of Orbax may still make files: the next save or start deletes them with this mark.
                    mark(self.folder, manifest.update)
            raise

        def go_on() -> None:
            beat(checkpoint=manifest.update)
            if is_main():
                self._collect()

        rounds.each(go_on)

    def _collect(self) -> None:
        """Deletes the checkpoints that are not kept, the oldest first."""
        steps = checkpoint_steps(self.folder)
        kept = {*steps[-self._keep_last :], *self._best(steps)}
        for step in steps:
            if step not in kept and not (self._keep_every and step % self._keep_every == 0):
                delete(self.folder, step)

    def _best(self, steps: list[int]) -> list[int]:
        if not self._keep_best:
            return []
        measured = []
        for step in steps:
            try:
                metric = Manifest.read(self.folder, step).metric
            except DamagedCheckpointError:
                continue
            if metric is not None:
                measured.append((metric, -step))
        return [-step for _, step in sorted(measured)[: self._keep_best]]


def _check_items(caller: str, items: Any) -> None:
    if not isinstance(items, Mapping):
        raise ValueError(
            f"{caller}: items must be pytrees by name; got {type(items).__name__}. Give {{'state': ...}} with it."
        )
    for path, leaf in jax.tree_util.tree_leaves_with_path(dict(items)):
        if not hasattr(leaf, "dtype") or not hasattr(leaf, "shape"):
            raise ValueError(
                f"{caller}: the leaves of an item must be arrays; got {jax.tree_util.keystr(path)}={leaf!r}. Take "
                "np.asarray of it, or leave it out: the number of the update is kept."
            )


def _require_room(folder: Path, items: Mapping[str, Any]) -> None:
    """Raises OSError if the disk has less room than the arrays take."""
    needed = sum(array.nbytes for tree in items.values() for array in jax.tree.leaves(tree))
    free = shutil.disk_usage(folder).free
    if free < needed:
        sizes = f"a checkpoint takes {needed / 1e6:,.1f} MB, and {free / 1e6:,.1f} MB are free"
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {sizes}", str(folder))


def _machine(items: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a manifest about the devices of these arrays."""
    shardings = (getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(dict(items)))
    devices = {device for sharding in shardings if sharding is not None for device in sharding.device_set}
    devices = devices or {jax.devices()[0]}
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "device_kind": min(devices, key=lambda x: x.id).device_kind,
        "num_devices": len(devices),
        "num_cores": num_cores,
    }


def _warn_of_other_bits(manifest: Manifest, likes: Mapping[str, Any]) -> None:
    here = _machine(likes)
    saved, now = f"{manifest.device_kind}", f"{here['device_kind']}"
    if saved == now == "cpu" and manifest.num_cores != here["num_cores"]:
        saved, now = f"{manifest.num_cores} CPU cores", f"{here['num_cores']}"
    if saved != now:
        warnings.warn(
            f"the checkpoint of step {manifest.update} was saved on {saved}, and this process runs on {now}: the next "
            "updates may differ from those of an undisturbed run in their last bits.",
            stacklevel=3,
        )
