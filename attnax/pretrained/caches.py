"""Caches in a file, so that a text that was read once can be continued later.

The file is a safetensors file. Its tensors are the arrays of the caches, and their names are the paths to them, such as
`layers.0.keys`. The text "attnax.caches" of its `__metadata__` is a JSON object with the version of the format and the
structure of the caches. A node of the structure is one of

    null                                               None
    "float32(2, 3)"                                    an array of this dtype and shape
    {"tuple": [node, ...]}                             a tuple; "list" in its place is a list
    {"dict": {key: node, ...}}                         a dict
    {"class": "RingKVCache", "fields": {"keys": node, ..., "window": 4}}
                                                       a dataclass; its static fields are numbers, text or null

Nothing in a file is trusted. The classes are those of a table; none is imported by a name from a file.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from attnax.cache import (
    EmptyCache,
    KVLayerCache,
    LinearLayerCache,
    LinearState,
    RingKVCache,
    ScalarCache,
    StackedCaches,
    StoredTokens,
)
from attnax.checks import is_concrete
from attnax.generation.prompt import TextCaches
from attnax.generation.text import Text
from attnax.int8_rows import Int8Rows
from attnax.paged_cache import PagedKVCache
from attnax.pretrained.errors import CheckpointError, quoted
from attnax.pretrained.json_object import parse_object
from attnax.pretrained.layout import Places
from attnax.pretrained.safetensors import (
    DTYPES,
    TensorInfo,
    empty_aligned,
    read_header_and_metadata,
    read_into,
    write_tensors,
)

__all__ = ["load_caches", "save_caches"]

VERSION = 1
MAX_DEPTH = 64  # of containers in containers; Python's own limit would be met without words

_KEY = "attnax.caches"
_OWN = (
    EmptyCache,
    Int8Rows,
    KVLayerCache,
    LinearLayerCache,
    LinearState,
    PagedKVCache,
    RingKVCache,
    ScalarCache,
    StackedCaches,
    StoredTokens,
    Text,
    TextCaches,
)
_OWN_BY_NAME: dict[str, type] = {kind.__name__: kind for kind in _OWN}
_BARE_KEY = re.compile(r"[\w-]+")


def save_caches(path: str | Path, caches: Any) -> None:
    """Writes caches into one safetensors file, from which `load_caches` makes equal ones, bit for bit.

    The file appears complete or not at all. Arrays are written one at a time.

    Args:
        path: of the file; an existing file is replaced, and a missing folder is made.
        caches: any pytree of caches of this library, of your own dataclasses (`attnax.pytrees.pytree_dataclass`, static
            fields with numbers, text or None), of tuples, lists, dicts with text as keys, None, and arrays. An array
            may lie on several devices of this process.

    Raises:
        CheckpointError: an object of another kind, or an array that is traced, was donated, lies on devices of another
            process, or has a dtype that safetensors files do not have; all are named.

    Example:
        >>> import pathlib, tempfile
        >>> import jax.numpy as jnp
        >>> from attnax.cache import init_decoder_kv_caches, select_rows
        >>> from attnax.pretrained import load_caches, save_caches
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "prefix.safetensors"
        >>> save_caches(path, init_decoder_kv_caches(num_layers=2, batch_size=1, num_kv_heads=2, head_dim=3, max_len=5))
        >>> for_seven_rows = select_rows(load_caches(path), jnp.zeros(7, jnp.int32))
        >>> for_seven_rows[0].keys.shape
        (7, 2, 5, 3)
    """
    arrays: dict[str, Any] = {}
    problems: list[str] = []
    structure = _describe(caches, (), arrays, problems)
    if problems:
        raise CheckpointError("save_caches", problems)
    path = Path(path)
    if path.is_dir():
        raise CheckpointError(path, "it is a folder; caches are one file. Give the path of a file.")
    path.parent.mkdir(parents=True, exist_ok=True)
    types = {name: (np.dtype(array.dtype), array.shape) for name, array in arrays.items()}
    text = json.dumps({"version": VERSION, "caches": structure}, separators=(",", ":"))
    write_tensors(path, types, lambda name: np.asarray(arrays[name]), {_KEY: text})


def load_caches(path: str | Path, *, kinds: Iterable[type] = ()) -> Any:
    """The caches in a file that `save_caches` wrote.

    The whole structure is checked before an array is read.

    Args:
        path: of the file.
        kinds: your own dataclasses that the caches may hold. Classes of the library are known.

    Returns:
        The pytree, with JAX arrays on the default device. `attnax.cache.select_rows` repeats the rows of caches.

    Raises:
        CheckpointError: the file is missing, damaged, of another kind or of another version, or it holds a class that
            is not known; all problems are named.
        ValueError: an element of `kinds` is no dataclass, or has the name of another class.
    """
    path, known = Path(path), _by_name(kinds)
    tensors, metadata = read_header_and_metadata(path)
    if _KEY not in metadata:
        raise CheckpointError(
            path, "it holds no caches. Give a file that save_caches wrote; load_pretrained reads the folder of a model."
        )
    # A half of a surrogate pair has no place in UTF-8; the parser refuses it in words.
    content = parse_object(f"{path}, {_KEY!r}", metadata[_KEY].encode("utf-8", "surrogatepass"))
    version = content.get("version")
    if type(version) is not int or version != VERSION:
        raise CheckpointError(
            path, f"its caches must be of version {VERSION}; got {_shown(version)}. Update Attnax, or save them again."
        )
    if content.keys() != {"version", "caches"}:
        raise CheckpointError(path, f"{_KEY!r} must hold version and caches, and nothing else. Save the caches again.")
    structure = _Structure(path, tensors, known)
    make = structure.check(content["caches"], ())
    left_over = [f"{name!r} is {info}; no such tensor was expected." for name, info in structure.tensors.items()]
    if structure.problems or left_over:
        raise CheckpointError(path, structure.problems + left_over)
    return make()


def _by_name(kinds: Iterable[type]) -> dict[str, type]:
    known = dict(_OWN_BY_NAME)
    for kind in kinds:
        if not isinstance(kind, type) or not dataclasses.is_dataclass(kind):
            raise ValueError(f"load_caches: kinds must be dataclasses; got kinds=({kind!r}, ...).")
        if known.setdefault(kind.__name__, kind) is not kind:
            raise ValueError(
                f"load_caches: kinds must have names of their own; got {kind!r} beside {known[kind.__name__]!r}. "
                "Rename it before you save."
            )
    return known


def _name(path: tuple[str, ...]) -> str:
    """The name of what lies at a path. As in TOML a part with other signs is quoted, so that no two names are equal."""
    parts = (part if _BARE_KEY.fullmatch(part) and part != "__metadata__" else json.dumps(part) for part in path)
    return ".".join(parts) or "caches"


def _fields(kind: type) -> dict[str, bool]:
    """The fields of a dataclass by name, True for static ones."""
    return {field.name: bool(field.metadata.get("static")) for field in dataclasses.fields(kind)}


def _is_scalar(value: Any) -> bool:
    """Whether a static field can be stored: JSON has neither NaN nor infinity."""
    return type(value) in (str, int, bool, type(None)) or (type(value) is float and math.isfinite(value))


def _shown(value: Any) -> str:
    """A value of JSON for a message; a list or dict may be too deep to be printed."""
    return quoted(value) if _is_scalar(value) else f"a {type(value).__name__}"


def _describe(node: Any, path: tuple[str, ...], arrays: dict[str, Any], problems: list[str]) -> Any:
    """The node of the structure for a part of the caches; puts its arrays into `arrays` by name."""
    name, kind = _name(path), type(node)

    def inside(parts: Iterable[tuple[str, Any]]) -> dict[str, Any]:
        return {key: _describe(part, (*path, key), arrays, problems) for key, part in parts}

    if len(path) > MAX_DEPTH:
        problems.append(f"caches must lie at most {MAX_DEPTH} containers deep; got {name}.")
    elif isinstance(node, jax.Array | np.ndarray):
        problem = _why_not_written(node)
        if problem is None:
            arrays[name] = node
            return f"{node.dtype}{node.shape}"
        problems.append(f"{name!r} {problem}")
    elif kind is tuple or kind is list:
        return {kind.__name__: list(inside((str(index), part) for index, part in enumerate(node)).values())}
    elif kind is dict and all(type(key) is str for key in node):
        return {"dict": inside(node.items())}
    elif dataclasses.is_dataclass(kind):
        if _OWN_BY_NAME.get(kind.__name__, kind) is not kind:
            problems.append(f"{name!r} is a {kind!r}, and Attnax has a class of this name. Rename yours.")
        fields = {field: (getattr(node, field), static) for field, static in _fields(kind).items()}
        fixed = {field: value for field, (value, static) in fields.items() if static}
        problems += [
            f"{name!r}: static fields must be numbers, text or None to be stored; got {field}={quoted(value)}."
            for field, value in fixed.items()
            if not _is_scalar(value)
        ]
        described = inside((field, value) for field, (value, static) in fields.items() if not static)
        return {"class": kind.__name__, "fields": described | fixed}
    elif node is not None:
        problems.append(
            f"{name!r} must be an array, a dataclass, a tuple, a list, a dict with text as keys or None; got "
            f"{kind.__name__}. Make a number an array."
        )
    return None


def _why_not_written(array: jax.Array | np.ndarray) -> str | None:
    """The reason why an array cannot be written, or None."""
    if not is_concrete(array):
        return "is traced, and has no values. Call save_caches outside of jit and of other transformations."
    if array.dtype not in DTYPES:
        return f"must have a dtype among {', '.join(map(str, DTYPES))}; got dtype={array.dtype}."
    if isinstance(array, jax.Array) and array.is_deleted():
        return "was donated to a program, and is gone. Save caches before they are donated."
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return "lies on devices of other processes. Gather it first, by jax.experimental.multihost_utils."
    return None


@dataclasses.dataclass
class _Structure:
    """The structure of the caches in a file, which is checked as a whole before an array is read.

    Attributes:
        path: of the file.
        tensors: that were not yet met in the structure.
        known: the classes by name.
        problems: so far, one sentence each.
    """

    path: Path
    tensors: dict[str, TensorInfo]
    known: dict[str, type]
    problems: list[str] = dataclasses.field(default_factory=list)

    def check(self, node: Any, path: tuple[str, ...]) -> Callable[[], Any]:
        """Checks a node; returns a function that makes the part of the caches, unless there were problems."""
        if len(path) > MAX_DEPTH:
            return self._refuse(path, f"caches must lie at most {MAX_DEPTH} containers deep.")
        match node:
            case None:
                return lambda: None
            case str():
                return self._array(node, path)
            case {"tuple": list(parts)} if len(node) == 1:
                makers = [self.check(part, (*path, str(index))) for index, part in enumerate(parts)]
                return lambda: tuple(make() for make in makers)
            case {"list": list(parts)} if len(node) == 1:
                makers = [self.check(part, (*path, str(index))) for index, part in enumerate(parts)]
                return lambda: [make() for make in makers]
            case {"dict": dict(parts)} if len(node) == 1:
                by_key = {key: self.check(part, (*path, key)) for key, part in parts.items()}
                return lambda: {key: make() for key, make in by_key.items()}
            case {"class": str(name), "fields": dict(fields)} if len(node) == 2:
                return self._dataclass(name, fields, path)
        return self._refuse(path, f"no part of caches is described so; got {_shown(node)}. Save the caches again.")

    def _refuse(self, path: tuple[str, ...], problem: str) -> Callable[[], Any]:
        self.problems.append(f"{_name(path)!r}: {problem}")
        return lambda: None

    def _array(self, wanted: str, path: tuple[str, ...]) -> Callable[[], Any]:
        info = self.tensors.pop(_name(path), None)
        if info is None:
            return self._refuse(path, f"the tensor is missing; {quoted(wanted)[1:-1]} was expected.")
        if str(info) != wanted:
            return self._refuse(path, f"the tensor is {info}; {quoted(wanted)[1:-1]} was expected.")
        if info.dtype.itemsize == 8 and not jax.config.values["jax_enable_x64"]:
            return self._refuse(path, f"JAX has no {info.dtype} unless jax_enable_x64 is set. Set it.")
        return lambda: self._read(info, path)

    def _read(self, info: TensorInfo, path: tuple[str, ...]) -> jax.Array:
        array = empty_aligned(info.shape, info.dtype)
        read_into(Places((array,)), info)
        if info.dtype == np.bool_ and (array.view(np.uint8) > 1).any():
            raise CheckpointError(self.path, f"{_name(path)!r}: a bool must be 0 or 1. Save the caches again.")
        return jax.device_put(array)

    def _dataclass(self, name: str, fields: dict[str, Any], path: tuple[str, ...]) -> Callable[[], Any]:
        kind = self.known.get(name)
        if kind is None:
            return self._refuse(
                path,
                f"the class {quoted(name)} is not known here. Give your own class in kinds=(...,); if it is one of "
                "Attnax, update Attnax.",
            )
        static = _fields(kind)
        if fields.keys() != static.keys():
            return self._refuse(
                path, f"a {name} must have the fields {', '.join(static)}; got {quoted(list(fields))}. Save it again."
            )
        fixed = {field: value for field, value in fields.items() if static[field]}
        for field, value in fixed.items():
            if not _is_scalar(value):
                problem = f"static fields must be numbers, text or null; got {field}={_shown(value)}."
                return self._refuse(path, problem)
        makers = {field: self.check(node, (*path, field)) for field, node in fields.items() if not static[field]}

        def make() -> Any:
            made = {field: make() for field, make in makers.items()}
            try:
                return kind(**made, **fixed)
            except (TypeError, ValueError) as error:
                raise CheckpointError(self.path, f"{_name(path)!r}: {name} refuses its fields ({error}).") from error

        return make
