"""The collectives of a compiled program: what a device receives or reduces, how often, and among how many devices.

XLA writes a program as computations that call each other. A collective inside of a loop counts once for each turn,
where XLA knows the number of turns; of the branches of a conditional the one that moves the most counts. Needs nothing
but Python.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

__all__ = ["Collective", "bytes_by_kind", "collectives_of"]

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all")
_BITS = re.compile(r"(?:pred|[a-z]+?(\d+))")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_OPERATION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (.*?) ([a-z\-]+)\((.*)$")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\]")
_CALLED = re.compile(r"(body|condition|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TURNS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


class Collective(NamedTuple):
    """An operation that moves arrays between devices.

    Attributes:
        kind: one of `KINDS`.
        shapes: of its results on a device.
        num_bytes: that a device moves in all `runs`: of a gather and an exchange those that it receives, of a
            reduction those of its operands, of a permutation those that it sends.
        group: the number of devices that take part together.
        runs: how often the program runs it.
        op_name: the place in the Python program, as JAX notes it.
    """

    kind: str
    shapes: tuple[tuple[int, ...], ...]
    num_bytes: float
    group: int
    runs: int
    op_name: str


def collectives_of(text: str) -> list[Collective]:
    """The collectives of a program, `jax.stages.Compiled.as_text()`, among more than one device; scalars are left out.

    Args:
        text: in XLA's form.
    """
    computations, entry = _read(text)
    return _run(computations, entry, 1)


def bytes_by_kind(collectives: Iterable[Collective]) -> dict[str, float]:
    """The bytes that a device moves by each kind of collective."""
    sums: defaultdict[str, float] = defaultdict(float)
    for each in collectives:
        sums[each.kind] += each.num_bytes
    return dict(sums)


def _read(text: str) -> tuple[dict[str, list[re.Match[str]]], str]:
    """The operations of each computation, and the name of the first computation that runs."""
    computations: dict[str, list[re.Match[str]]] = {}
    entry = name = ""
    for line in text.splitlines():
        header = _COMPUTATION.match(line)
        if header is not None:
            name = header[2]
            computations[name] = []
            entry = name if header[1] else entry
            continue
        operation = _OPERATION.match(line)
        if operation is not None and name:
            computations[name].append(operation)
    return computations, entry


def _run(computations: dict[str, list[re.Match[str]]], name: str, count: int) -> list[Collective]:
    """The collectives of a computation that runs `count` times, and of those that it calls."""
    found: list[Collective] = []
    for operation in computations.get(name, ()):
        result, code, rest = operation.groups()
        kind = code.removesuffix("-start")
        if kind in KINDS:
            found += _collective(kind, result, rest, count, started=code != kind)
            continue
        turns = int(known[1]) if code == "while" and (known := _TURNS.search(rest)) is not None else 1
        called = dict.fromkeys(match[2] for match in _CALLED.finditer(rest))
        branches = _BRANCHES.search(rest)
        if code == "conditional":
            names = re.findall(r"[\w.\-]+", branches[1]) if branches else list(called)
            runs = [_run(computations, branch, count) for branch in names]
            found += max(runs, key=lambda run: sum(each.num_bytes for each in run), default=[])
        elif code in ("while", "call", "fusion", "async-start"):
            for other in called:
                found += _run(computations, other, count * turns)
    return found


def _collective(kind: str, result: str, rest: str, count: int, *, started: bool) -> list[Collective]:
    group = _group(rest)
    arrays = [(dtype, tuple(map(int, sizes.split(","))) if sizes else ()) for dtype, sizes in _ARRAY.findall(result)]
    if started and kind in (
        "all-gather",
        "collective-permute",
    ):  # (operands, results, and two numbers of a permutation)
        arrays = [array for array in arrays if array[1]]
        arrays = arrays[len(arrays) // 2 :]
    arrays = [array for array in arrays if array[1]]
    if group < 2 or not arrays:
        return []
    size = sum(math.prod(shape) * _itemsize(dtype) for dtype, shape in arrays)
    share = {"all-gather": (group - 1) / group, "all-to-all": (group - 1) / group, "reduce-scatter": group}
    place = re.search(r'op_name="((?:[^"\\]|\\.)*)"', rest)
    shapes = tuple(shape for _, shape in arrays)
    return [Collective(kind, shapes, count * size * share.get(kind, 1), group, count, place[1] if place else "")]


def _itemsize(dtype: str) -> float:
    match = re.match(r"[a-z]+?(\d+)", dtype)
    return 1 if match is None else int(match[1]) / 8


def _group(rest: str) -> int:
    """The number of devices in a group. XLA writes groups as axes of a mesh, as a reshaped range, or one by one."""
    pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", rest)
    if pairs is not None:
        moved = re.findall(r"\{(\d+),(\d+)", pairs[1] + "}")
        return 2 if any(here != there for here, there in moved) else 1
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", rest)
    if mesh is not None:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        return math.prod(int(sizes[name]) for name in re.findall(r"'(\w+)'", mesh[2]))
    reshaped = re.search(r"replica_groups=\[(\d+),(\d+)\]<=", rest)
    if reshaped is not None:
        return int(reshaped[2])
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", rest)
    return len(listed[1].split(",")) if listed is not None else 2  # all devices
