"""A folder of safetensors files as one table of tensors."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from attnax.pretrained.errors import CheckpointError
from attnax.pretrained.foreign import no_tensors
from attnax.pretrained.json_object import read_object
from attnax.pretrained.safetensors import MAX_TENSORS, TensorInfo, read_header

__all__ = ["SINGLE_FILE", "WANTED", "Checkpoint", "open_checkpoint"]

SINGLE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
WANTED = f"{SINGLE_FILE}, or {INDEX} and the files that it names"
_BARE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}\.safetensors")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """The tensors of a folder, none of which is in memory.

    Attributes:
        folder: with the files.
        tensors: place, dtype and shape of each tensor, by name.
    """

    folder: Path
    tensors: Mapping[str, TensorInfo]

    def dtype(self, except_for: Iterable[str] = ()) -> np.dtype[Any]:
        """The narrowest dtype that holds all floating tensors but `except_for`."""
        counted = self.tensors.keys() - set(except_for)
        dtypes = {self.tensors[name].dtype for name in counted if _is_floating(self.tensors[name])}
        if np.dtype(np.float64) in dtypes:  # without jax_enable_x64, JAX would promote it to float32
            return np.dtype(np.float64)
        return jnp.result_type(*(dtypes or {np.dtype(np.float32)}))

    def rename(self, new_name: Callable[[str], str]) -> Checkpoint:
        """The same tensors with new names.

        Raises:
            CheckpointError: two tensors have one new name.
        """
        renamed = {new_name(name): info for name, info in self.tensors.items()}
        if len(renamed) < len(self.tensors):
            old = [name for name in self.tensors if new_name(name) != name and new_name(name) in self.tensors]
            problems = [f"{new_name(name)!r} is there twice, once by its old name {name!r}." for name in old]
            raise CheckpointError(self.folder, problems)
        return Checkpoint(self.folder, renamed)

    def check(
        self, expected: Mapping[str, tuple[int, ...]], harmless: Iterable[str] = (), heads: Collection[str] = ()
    ) -> list[str]:
        """The differences from floating tensors of the expected shapes, one sentence each.

        Args:
            expected: shapes by name.
            harmless: names that may be present too.
            heads: names of the tensors of a head, which a model with a tied head does not have.
        """
        problems = []
        for name, shape in expected.items():
            info = self.tensors.get(name)
            if info is None:
                hint = " If the embeddings are the head, set tie_word_embeddings to true in config.json."
                problem = f"{name!r} is missing; a floating tensor of shape {shape} was expected."
                problems.append(problem + hint if name in heads else problem)
            elif info.shape != shape or not _is_floating(info):
                problems.append(f"{name!r} is {info}; a floating tensor of shape {shape} was expected.")
        unexpected = self.tensors.keys() - expected.keys() - set(harmless)
        return problems + [
            f"{name!r} is {self.tensors[name]}; no such tensor was expected." for name in sorted(unexpected)
        ]


def _is_floating(info: TensorInfo) -> bool:
    """Whether the tensor holds plain numbers; 8-bit floats need scales."""
    return bool(jnp.issubdtype(info.dtype, jnp.floating)) and info.dtype.itemsize > 1


def open_checkpoint(folder: Path, config_json: Mapping[str, Any]) -> Checkpoint:
    """Reads the headers of `model.safetensors`, or of the files that `model.safetensors.index.json` names.

    Tensors that are in these files and not in the index are read too.

    Args:
        folder: with the files.
        config_json: the content of its config.json, for advice about files of other formats.

    Raises:
        CheckpointError: both files are missing, a file is damaged, a tensor is not in the file that the index gives or
            is in two files, or the index names a file outside of the folder.
    """
    if (folder / SINGLE_FILE).is_file():
        return Checkpoint(folder, read_header(folder / SINGLE_FILE))
    if (folder / INDEX).is_file():
        return Checkpoint(folder, _read_shards(folder))
    raise no_tensors(folder, (path.name for path in folder.glob("*")), config_json, WANTED)


def _read_shards(folder: Path) -> dict[str, TensorInfo]:
    index = folder / INDEX
    places = read_object(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise CheckpointError(index, "weight_map must be an object: the file of each tensor by its name.")
    if len(places) > MAX_TENSORS:
        raise CheckpointError(index, f"it must name at most {MAX_TENSORS} tensors; got {len(places)}.")
    files = sorted(set(places.values()))
    problems = [
        f"weight_map may name .safetensors files in its own folder only; got {file!r}."
        for file in files
        if not _BARE_NAME.fullmatch(file)
    ]
    if problems:
        raise CheckpointError(index, problems)
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        try:
            held = read_header(folder / file)
        except CheckpointError as error:
            problems += [f"{file}: {problem}" for problem in error.problems]
            continue
        named = {name for name, place in places.items() if place == file}
        problems += [f"{name!r} is not in {file}, where weight_map has it." for name in sorted(named - held.keys())]
        problems += [f"{name!r} is in {file}, and in another file too." for name in sorted(held.keys() & tensors)]
        tensors |= held  # also the tensors that weight_map does not name
        if len(tensors) > MAX_TENSORS:
            raise CheckpointError(index, f"its files must hold at most {MAX_TENSORS} tensors.")
    if problems:
        raise CheckpointError(index, problems)
    return tensors
