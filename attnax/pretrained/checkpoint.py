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
from attnax.pretrained.safetensors import MAX_TENSORS, TensorInfo, read_header, read_tensor

__all__ = ["SINGLE_FILE", "WANTED", "Checkpoint", "open_checkpoint"]

SINGLE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
WANTED = f"{SINGLE_FILE}, or {INDEX} and the files that it names"
_BARE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}\.safetensors")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """The tensors of a folder; none is in memory.

    Attributes:
        folder: where they are.
        tensors: what each is, by name.
    """

    folder: Path
    tensors: Mapping[str, TensorInfo]

    def dtype(self, beside: Iterable[str] = ()) -> np.dtype[Any]:
        """The narrowest dtype that holds all floating tensors but those that are there beside."""
        counted = self.tensors.keys() - set(beside)
        dtypes = {self.tensors[name].dtype for name in counted if _is_floating(self.tensors[name])}
        if np.dtype(np.float64) in dtypes:  # which JAX may not have, and would then promote to float32
            return np.dtype(np.float64)
        return jnp.result_type(*(dtypes or {np.dtype(np.float32)}))

    def rename(self, new_name: Callable[[str], str]) -> Checkpoint:
        """The same tensors, with other names.

        Raises:
            CheckpointError: two of them have one new name.
        """
        renamed = {new_name(name): info for name, info in self.tensors.items()}
        if len(renamed) < len(self.tensors):
            old = [name for name in self.tensors if new_name(name) != name and new_name(name) in self.tensors]
            problems = [f"{new_name(name)!r} is there twice, once by its old name {name!r}." for name in old]
            raise CheckpointError(self.folder, problems)
        return Checkpoint(self.folder, renamed)

    def read(self, name: str, dtype: Any) -> np.ndarray:
        """The tensor in floating `dtype`; `check` has seen to it that it is floating itself."""
        return read_tensor(self.tensors[name]).astype(dtype, copy=False)

    def check(
        self, expected: Mapping[str, tuple[int, ...]], harmless: Iterable[str] = (), heads: Collection[str] = ()
    ) -> list[str]:
        """What keeps the tensors from being floating ones of the shapes in `expected`, one sentence each.

        Args:
            expected: shapes by name.
            harmless: names that may be there beside.
            heads: names that would not be expected where the head is the embeddings.
        """
        problems = []
        for name, shape in expected.items():
            info = self.tensors.get(name)
            if info is None:
                hint = " Where the head is the embeddings, set tie_word_embeddings to true in config.json."
                problem = f"{name!r} is missing; a floating tensor of shape {shape} was expected."
                problems.append(problem + hint if name in heads else problem)
            elif info.shape != shape or not _is_floating(info):
                problems.append(f"{name!r} is {info}; a floating tensor of shape {shape} was expected.")
        unexpected = self.tensors.keys() - expected.keys() - set(harmless)
        return problems + [
            f"{name!r} is {self.tensors[name]}; no such tensor was expected." for name in sorted(unexpected)
        ]


def _is_floating(info: TensorInfo) -> bool:
    """Whether it holds numbers as they are: 8-bit floats come with scales."""
    return bool(jnp.issubdtype(info.dtype, jnp.floating)) and info.dtype.itemsize > 1


def open_checkpoint(folder: Path, theirs: Mapping[str, Any]) -> Checkpoint:
    """Reads the headers of `model.safetensors`, or of the files that `model.safetensors.index.json` names.

    Tensors in these files that the index does not name are read like those that it names.

    Args:
        folder: with the files.
        theirs: its config.json, for what to do where it holds files of other formats.

    Raises:
        CheckpointError: there is neither, a file is damaged, a tensor is not in the file that the index names or is in
            two files, or the index names a file that is not in the folder itself.
    """
    if (folder / SINGLE_FILE).is_file():
        return Checkpoint(folder, read_header(folder / SINGLE_FILE))
    if (folder / INDEX).is_file():
        return Checkpoint(folder, _read_shards(folder))
    raise no_tensors(folder, (path.name for path in folder.glob("*")), theirs, WANTED)


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
        tensors |= held  # those too that weight_map does not name
        if len(tensors) > MAX_TENSORS:
            raise CheckpointError(index, f"its files must hold at most {MAX_TENSORS} tensors.")
    if problems:
        raise CheckpointError(index, problems)
    return tensors
