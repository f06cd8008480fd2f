"""JSON from foreign files: one object or list, no duplicate key, no harmful depth or size."""

from __future__ import annotations

import json
from collections import Counter
from io import BufferedReader
from pathlib import Path
from typing import Any, NoReturn

from attnax.pretrained.errors import CheckpointError

__all__ = ["MAX_JSON_BYTES", "open_file", "parse_object", "read_list", "read_object"]

MAX_JSON_BYTES = 16 << 20


def open_file(path: Path) -> BufferedReader:
    """The file, open for reading.

    Raises:
        CheckpointError: the file is missing, or may not be read.
    """
    if not path.is_file():
        raise CheckpointError(path, "there is no such file.")
    try:
        return path.open("rb")
    except OSError as error:
        raise CheckpointError(path, f"it cannot be read ({error.strerror}).") from error


def read_object(path: Path) -> dict[str, Any]:
    """The object in a file of at most 16 MiB.

    Raises:
        CheckpointError: the file is missing or larger, or `parse_object` refuses its content.
    """
    return parse_object(path, _read(path))


def read_list(path: Path) -> list[Any]:
    """The list in a file, under the conditions of `read_object`."""
    value = _parse(path, _read(path))
    if not isinstance(value, list):
        raise CheckpointError(path, f"it must hold a JSON list; got a {type(value).__name__}.")
    return value


def _read(path: Path) -> bytes:
    with open_file(path) as file:
        data = file.read(MAX_JSON_BYTES + 1)
    if len(data) > MAX_JSON_BYTES:
        raise CheckpointError(path, f"a JSON file must have at most {MAX_JSON_BYTES} bytes.")
    return data


def parse_object(where: object, data: bytes) -> dict[str, Any]:
    """The object in `data`.

    Raises:
        CheckpointError: `data` is not JSON (NaN and Infinity are not), not an object, or an object has a key twice.
    """
    value = _parse(where, data)
    if not isinstance(value, dict):
        raise CheckpointError(where, f"it must hold a JSON object; got a {type(value).__name__}.")
    return value


def _parse(where: object, data: bytes) -> Any:
    twice: list[str] = []

    def make_dict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            twice.extend(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        return made

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is no number of JSON")

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=make_dict, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(where, f"it is not JSON ({error}).") from None
    if twice:
        raise CheckpointError(where, [f"the key {key!r} comes twice." for key in twice])
    return value
