"""Pytrees of arrays in the files of Orbax: one folder, with a folder for each item."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from attnax.distributed import ProcessError
from attnax.training.rounds import Rounds

__all__ = ["OrbaxSave", "named_arrays", "read_items"]

_FILE_BYTES = 64 * 2**20  # of a file of data, so that the files of a large state can be hashed side by side


def named_arrays(tree: Any) -> dict[str, Any]:
    """The leaves of a pytree by their paths, such as "decoder.norm.scale".

    Raises:
        ValueError: two leaves have one name.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
    if len(named) != len(leaves):
        names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(
            f"named_arrays: the paths of two arrays must differ; got {twice} twice. Rename a key with a dot."
        )
    return named


class OrbaxSave:
    """A save in flight. Once this is made the arrays may be donated or changed; after `wait` they are in files.

    All processes make it together. Process 0 makes the folders, and each writes its shards.

    Args:
        target: the folder to make. Until it is complete it has a longer name, which begins as `target` and a dot.
        items: arrays by name, as of `named_arrays`, for each folder in `target`; at least one in each. Process 0 writes
            those that lie in one process: they are taken to be the same in all.
        rounds: of this save, whose name no other one has; a thread of Orbax takes part in them.

    Raises:
        OSError: the disk is full or fails, here or in `wait`.
        ProcessError: another process did not come to make the folders within 300 s.
    """

    def __init__(self, target: Path, items: Mapping[str, Mapping[str, Any]], rounds: Rounds):
        import orbax.checkpoint as ocp  # takes half a second, which only saving and restoring need

        self._folder = target.parent
        args = {
            name: ocp.args.PyTreeSave(_held(arrays), ocdbt_target_data_file_size=_FILE_BYTES)
            for name, arrays in items.items()
        }
        # With its processes listed, Orbax waits at barriers that have a limit, and not in a collective.
        together = ocp.options.MultiprocessingOptions(
            active_processes=set(range(jax.process_count())), barrier_sync_key_prefix=f"attnax {rounds.name}"
        )

        def wait_for_others(*, key: str, timeout_ms: int) -> None:
            rounds.agree()

        # In the background, a folder that cannot be made would be waited for 20 minutes.
        options = ocp.options.AsyncOptions(create_directories_asynchronously=False, barrier_sync_fn=wait_for_others)
        with _errors_of_the_disk(self._folder), _errors_of_barriers(target):
            # Compression makes floating-point numbers a tenth smaller, and a save three times as long.
            handlers = {
                name: ocp.PyTreeCheckpointHandler(use_compression=False, multiprocessing_options=together)
                for name in items
            }
            composite = ocp.CompositeCheckpointHandler(
                composite_options=ocp.CompositeOptions(multiprocessing_options=together, async_options=options),
                **handlers,
            )
            self._checkpointer = ocp.AsyncCheckpointer(
                composite, async_options=options, multiprocessing_options=together
            )
            self._checkpointer.save(target.absolute(), args=ocp.args.Composite(**args))

    def wait(self) -> None:
        """Returns when the folder is there under its name."""
        with _errors_of_the_disk(self._folder):
            self._checkpointer.close()


def read_items(target: Path, likes: Mapping[str, Any]) -> dict[str, Any]:
    """The pytrees of these items, whose names, shapes and dtypes were compared before.

    Arrays are put on the devices as those of `likes` lie, on the default device where that says nothing: each device
    reads its own parts, wherever the arrays lay when they were saved. A process waits for no other one.
    """
    import orbax.checkpoint as ocp

    here, me = jax.device_put(0).sharding, jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"attnax process {me}"
    )
    args = {}
    for item, like in likes.items():
        abstract = {
            name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None) or here)
            for name, x in named_arrays(like).items()
        }
        restore_args = ocp.checkpoint_utils.construct_restore_args(abstract)
        args[item] = ocp.args.PyTreeRestore(abstract, restore_args=restore_args)
    with _errors_of_the_disk(target.parent):
        handlers = {name: ocp.PyTreeCheckpointHandler(multiprocessing_options=alone) for name in likes}
        composite = ocp.CompositeCheckpointHandler(
            composite_options=ocp.CompositeOptions(multiprocessing_options=alone), **handlers
        )
        with ocp.Checkpointer(composite, multiprocessing_options=alone) as checkpointer:
            arrays = checkpointer.restore(target.absolute(), args=ocp.args.Composite(**args))
    return {
        item: jax.tree.unflatten(jax.tree.structure(like), [arrays[item][name] for name in named_arrays(like)])
        for item, like in likes.items()
    }


def _held(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Orbax holds the buffers of JAX arrays, on the host, until they are written. NumPy arrays are copied here.

    In several processes it refuses JAX arrays that lie in one of them, and lets process 0 write NumPy arrays.
    """

    def is_held(x: Any) -> bool:
        return isinstance(x, jax.Array) and not (jax.process_count() > 1 and x.is_fully_addressable)

    return {name: x if is_held(x) else np.array(x) for name, x in arrays.items()}


@contextlib.contextmanager
def _errors_of_barriers(target: Path) -> Iterator[None]:
    """Turns an error of Orbax's barriers into words."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not str(error).startswith("DEADLINE_EXCEEDED"):
            raise
        raise ProcessError(
            f"{target}: all {jax.process_count()} processes must come to the beginning of a save within 300 s; one or "
            "more did not. Look at their logs."
        ) from error


@contextlib.contextmanager
def _errors_of_the_disk(folder: Path) -> Iterator[None]:
    """Turns a ValueError of TensorStore about the disk into an OSError; one that names no file names the folder."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(folder)) from error
    except ValueError as error:
        code = re.search(r"\[os_error_code='([0-9]+)'\]", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(folder)) from error
