"""The safetensors format; nothing in a file is trusted.

A file is 8 bytes (the length of the header, little-endian), the header, a JSON object
`{name: {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, ...}`, and the bytes of the tensors one after the
other. A header has at most 16 MiB, and is read and checked completely. Tensors are read into arrays of the caller, who
allocates them when the file is known to hold their bytes. Files are not mapped into memory: to read a mapped file that
another process cuts off ends the program.

References:
    https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import dataclasses
import json
import math
import mmap
import os
from collections.abc import Callable, Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from attnax.pretrained.errors import CheckpointError, quoted
from attnax.pretrained.json_object import MAX_JSON_BYTES, open_file, parse_object
from attnax.pretrained.layout import Places

__all__ = [
    "DTYPES",
    "MAX_TENSORS",
    "TensorInfo",
    "empty_aligned",
    "read_header",
    "read_header_and_metadata",
    "read_into",
    "same_data",
    "write_tensors",
]

MAX_TENSORS = 100_000
MAX_DIMS = 8
MAX_FILE_BYTES = 1 << 50
BLOCK_BYTES = 1 << 20  # stays in a cache while its elements are put to their places
HUGE_BYTES = 4 << 20  # from which size on NumPy takes huge pages
LINE_BYTES = 64  # of a cache, and what JAX's CPU backend aligns arrays to

_DTYPES: dict[str, np.dtype[Any]] = {  # the library writes wide dtypes first, so that all tensors are aligned
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
DTYPES = tuple(_CODES)
"""The dtypes that the format has."""


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Place, dtype and shape of a tensor.

    Attributes:
        path: of the file.
        dtype: a NumPy dtype; bfloat16 and the 8-bit floats are dtypes of ml_dtypes.
        shape: as in the header.
        start: offset of its first byte in the file.
    """

    path: Path
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    start: int

    @property
    def num_bytes(self) -> int:
        """Size of its data."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.dtype}{self.shape}"


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a file by name. Every byte after the header belongs to exactly one tensor.

    Raises:
        CheckpointError: the file is missing, cut off, too long or damaged; all problems of the header are named.
    """
    tensors, _ = read_header_and_metadata(path)
    return tensors


def read_header_and_metadata(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """`read_header`, and the text in the `__metadata__` of the file by name."""
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise CheckpointError(
                path, f"it is cut off, or no safetensors file: its header should have {length} bytes, of {size}."
            )
        if length > MAX_JSON_BYTES:
            raise CheckpointError(path, f"a header must have at most {MAX_JSON_BYTES} bytes; got {length}.")
        data = file.read(length)
    # Checked before parsing: an object of two bytes in a file takes hundreds of bytes in memory.
    if _holds_too_much(data):
        raise CheckpointError(path, f"it must hold at most {MAX_TENSORS} tensors.")
    header = parse_object(path, data)
    metadata, problems = header.pop("__metadata__", {}), []
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        problems.append("'__metadata__' must hold text by name.")
    tensors: dict[str, TensorInfo] = {}
    for name, entry in header.items():
        try:
            tensors[name] = _tensor_info(path, 8 + length, entry)
        except ValueError as error:
            problems.append(f"{name!r}: {error}")
    if not problems:
        problems = _check_layout(tensors, 8 + length, size)
    if problems:
        raise CheckpointError(path, problems)
    return tensors, metadata


def read_into(places: Places, info: TensorInfo) -> None:
    """Puts the elements of a tensor to their places, converted to the dtype of the arrays there.

    Args:
        places: as many as the tensor has elements. Their axes are the tensor's, with merged axes apart.
        info: of the tensor.

    Raises:
        CheckpointError: the file is shorter than it was when its header was read.
    """
    with open_file(info.path) as file:
        file.seek(info.start)
        _put_next(file, info, places)


def _put_next(file: BufferedReader, info: TensorInfo, places: Places) -> None:
    """Puts the next elements of the file, as many as there are places."""
    view, *more = places.views
    if not more and view.dtype == info.dtype and view.flags.c_contiguous:
        if view.nbytes:
            _fill(view.reshape(-1).view(np.uint8).data, file, info)
        return
    shape, itemsize = places.shape, info.dtype.itemsize
    width = math.prod(shape[1:])
    if width * itemsize > BLOCK_BYTES and len(shape) > 2:
        for index in range(shape[0]):
            _put_next(file, info, places.at(index))
        return
    # Transposed, a block is a column of the result; in steps of whole cache lines no line is written twice.
    line = LINE_BYTES // min(itemsize, view.dtype.itemsize)
    rows = min(shape[0], max(BLOCK_BYTES // max(width * itemsize, 1) // line, 1) * line)
    # No even number of cache lines from row to row: after a power of two, a column would fill few sets of the cache.
    in_line = LINE_BYTES // view.dtype.itemsize
    pitch = width + (in_line if width % (2 * in_line) == 0 else 0)
    block, spaced = np.empty((rows, width), info.dtype), np.empty((rows, pitch), view.dtype)
    for first in range(0, shape[0], rows):
        count = min(rows, shape[0] - first)
        _fill(block[:count].reshape(-1).view(np.uint8).data, file, info)
        spaced[:count, :width] = block[:count]
        places.put(first, spaced[:count, :width].reshape(count, *shape[1:]))


def same_data(one: TensorInfo, other: TensorInfo) -> bool:
    """Whether two tensors of the same size hold the same bytes; only a part of them is in memory at a time."""
    parts = np.empty((2, BLOCK_BYTES), np.uint8)
    with open_file(one.path) as file, open_file(other.path) as other_file:
        file.seek(one.start)
        other_file.seek(other.start)
        for start in range(0, one.num_bytes, BLOCK_BYTES):
            count = min(BLOCK_BYTES, one.num_bytes - start)
            _fill(parts[0, :count].data, file, one)
            _fill(parts[1, :count].data, other_file, other)
            if not np.array_equal(parts[0, :count], parts[1, :count]):
                return False
    return True


def _fill(rest: memoryview, file: BufferedReader, info: TensorInfo) -> None:
    """Fills `rest` with the next bytes of a tensor's file."""
    while rest:
        count = file.readinto(rest)
        if not count:
            raise CheckpointError(info.path, "it was cut off after its header was read.")
        rest = rest[count:]


def empty_aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Like `np.empty`, aligned for JAX's CPU backend, so that `jax.device_put` copies nothing.

    NumPy takes huge pages for large arrays. These take small pages, all at once: where a virtual machine's host must
    find memory for each huge page first, a load is half as fast with huge pages (`benchmarks/load.py`).
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if size >= HUGE_BYTES and hasattr(mmap, "MAP_ANONYMOUS"):
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_POPULATE", 0)
        return np.frombuffer(mmap.mmap(-1, size, flags), np.uint8).view(dtype).reshape(shape)
    room = np.empty(size + LINE_BYTES, np.uint8)
    start = -room.ctypes.data % LINE_BYTES
    return room[start : start + size].view(dtype).reshape(shape)


def write_tensors(
    path: Path,
    types: Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]],
    make: Callable[[str], np.ndarray],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a file as the safetensors library does, with one tensor in memory at a time.

    The file appears complete or not at all.

    Args:
        path: of the file; an existing file is replaced.
        types: dtype and shape of each tensor.
        make: returns the array of a name.
        metadata: text by name, by default the format that transformers requires.

    Raises:
        ValueError: a dtype that the format does not have, more than `read_header` reads, or an array that does not fit
            `types`.
    """
    unknown = sorted({str(dtype) for dtype, _ in types.values() if dtype not in _CODES})
    if unknown:
        raise ValueError(
            f"write_tensors: dtypes must be among {', '.join(map(str, DTYPES))}; got {', '.join(unknown)}."
        )
    names = sorted(types, key=lambda name: (DTYPES.index(types[name][0]), name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"} if metadata is None else dict(metadata)}
    offset = 0
    for name in names:
        dtype, shape = types[name]
        size = math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    deep = sorted(name for name, (_, shape) in types.items() if len(shape) > MAX_DIMS)
    if deep:
        raise ValueError(f"write_tensors: a tensor must have at most {MAX_DIMS} axes; got more in {', '.join(deep)}.")
    if len(types) > MAX_TENSORS or _holds_too_much(text) or len(text) > MAX_JSON_BYTES:
        raise ValueError(
            f"write_tensors: a file must hold at most {MAX_TENSORS} tensors, and a header of {MAX_JSON_BYTES} bytes; "
            f"got {len(types)} tensors and a header of {len(text)} bytes. Write several files."
        )
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in names:
                dtype, shape = types[name]
                array = np.asarray(make(name))
                if (array.dtype, array.shape) != (dtype, shape):
                    raise ValueError(f"write_tensors: {name} must be {dtype}{shape}; got {array.dtype}{array.shape}.")
                file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _holds_too_much(header: bytes) -> bool:
    """Whether the text of a header has more objects or lists than MAX_TENSORS tensors need."""
    return header.count(b"{") > MAX_TENSORS + 2 or header.count(b"[") > 2 * (MAX_TENSORS + 2)


def _tensor_info(path: Path, data_start: int, entry: Any) -> TensorInfo:
    """The tensor of an entry of the header; raises ValueError for an entry that no file can have."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError("its entry must hold dtype, shape and data_offsets, and nothing else.")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in _DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}; got {quoted(code)}.")
    if not _are_sizes(shape) or len(shape) > MAX_DIMS:
        raise ValueError(f"shape must be a list of at most {MAX_DIMS} sizes; got {quoted(shape)}.")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"data_offsets must be a pair of sizes; got {quoted(offsets)}.")
    info = TensorInfo(path, _DTYPES[code], tuple(shape), data_start + offsets[0])
    if info.num_bytes != offsets[1] - offsets[0]:
        raise ValueError(f"{info} has {info.num_bytes} bytes; got data_offsets={offsets}.")
    return info


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size <= MAX_FILE_BYTES for size in value)


def _check_layout(tensors: Mapping[str, TensorInfo], start: int, size: int) -> list[str]:
    """Problems with the order of the tensors, which must fill the file after its header without gaps."""
    if len(tensors) > MAX_TENSORS:
        return [f"it must hold at most {MAX_TENSORS} tensors; got {len(tensors)}."]
    problems = []
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].num_bytes)):
        if info.start != start:
            problems.append(
                f"{name!r}: its data must begin at byte {start}, the end of the data before it; got {info.start}."
            )
        start = info.start + info.num_bytes
    if start != size:
        problems.append(f"its tensors must end where it ends, at byte {size}; got {start}.")
    return problems
