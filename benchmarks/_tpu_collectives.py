"""What a program that libtpu compiled does in one step, read from its text: collectives, products and kernels.

A loop of the text stands there once, so everything in its body counts as often as it turns.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

__all__ = ["Collective", "Program"]

_WIDTHS = {"pred": 1, "c64": 8, "c128": 16}  # bytes of the types whose name does not end with the number of bits
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


class Instruction(NamedTuple):
    """A line of a computation."""

    name: str
    opcode: str
    arrays: list[tuple[str, tuple[int, ...]]]  # the dtype and the shape of each result
    operands: list[str]
    text: str  # behind the operands
    is_root: bool

    def attribute(self, name: str) -> str:
        """A computation that an attribute names; empty if there is none."""
        found = re.search(rf"\b{name}=%?([\w.-]+)", self.text)
        return found[1] if found else ""


class Collective(NamedTuple):
    """Collectives of the same arrays at the same place of the model."""

    kind: str
    arrays: tuple[tuple[str, tuple[int, ...]], ...]  # the results on a device
    devices: int  # that take part in one
    times: int  # in a step
    place: str  # the path of the operation in the model

    @property
    def received(self) -> float:
        """The bytes that a device receives in a step, by rings."""
        share = (self.devices - 1) / self.devices
        factors = {"all-reduce": 2 * share, "reduce-scatter": self.devices - 1, "collective-permute": 1}
        return factors.get(self.kind, share) * self.times * sum(map(_bytes, self.arrays))


class Program:
    """The text of a compiled program.

    Raises:
        ValueError: a loop whose number of turns the text does not say.
    """

    def __init__(self, text: str):
        self._computations: dict[str, dict[str, Instruction]] = {}
        entry = ""
        for name, is_entry, lines in _computations(text):
            self._computations[name] = {line.name: line for line in map(_instruction, lines)}
            entry = name if is_entry else entry
        self._turns = self._count(entry)

    def collectives(self) -> list[Collective]:
        """All collectives of a step.

        An asynchronous one of the compiler is a fusion that starts it, some that go on, and one that ends it; the first
        counts. A fusion `all-reduce-scatter` is a reduce-scatter.
        """
        found: Counter[Collective] = Counter()
        for computation, turns in self._turns.items():
            if computation.startswith("async_collective_fusion"):
                continue
            for line in self._computations[computation].values():
                kind = line.opcode.removesuffix("-start")
                if kind not in _COLLECTIVES:
                    continue
                arrays, caller = _results(line), self._callers.get(computation)
                if caller is not None and caller.name.startswith("async-collective-done"):
                    continue
                if caller is not None and kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
                    kind, arrays = "reduce-scatter", tuple(caller.arrays)
                found[Collective(kind, arrays, self._devices(line), 0, _place(line, caller))] += turns
        return [one._replace(times=times) for one, times in found.items()]

    def product_flops(self) -> float:
        """The operations of the matrix products of a step, a multiplication and an addition each; not of kernels."""
        return sum(
            turns * _product(line, lines)
            for computation, turns in self._turns.items()
            for lines in (self._computations[computation],)
            for line in lines.values()
            if line.opcode == "convolution"
        )

    def kernels(self) -> Counter[str]:
        """The calls of each kernel in a step."""
        found: Counter[str] = Counter()
        for computation, turns in self._turns.items():
            for line in self._computations[computation].values():
                if 'custom_call_target="tpu_custom_call"' in line.text:
                    found[re.sub(r"(\.\d+)+$", "", line.name)] += turns
        return found

    def _count(self, entry: str) -> dict[str, int]:
        """How often each computation runs in a step; of the branches of a condition all count."""
        turns: Counter[str] = Counter()
        self._callers: dict[str, Instruction] = {}

        def visit(computation: str, times: int) -> None:
            turns[computation] += times
            lines = self._computations[computation]
            for line in lines.values():
                if line.opcode == "while":
                    body, condition = line.attribute("body"), line.attribute("condition")
                    visit(body, times * self._trips(line, lines, condition))
                elif line.opcode in ("fusion", "call", "async-start"):
                    called = line.attribute("calls") or line.attribute("to_apply")
                    self._callers[called] = line
                    visit(called, times)
                elif line.opcode == "conditional":
                    branches = re.search(r"branch_computations=\{([^}]*)\}", line.text)
                    names = branches[1] if branches else ",".join(map(line.attribute, _BRANCHES))
                    for name in re.findall(r"[\w.-]+", names):
                        visit(name, times)

        visit(entry, 1)
        return dict(turns)

    def _trips(self, loop: Instruction, around: dict[str, Instruction], condition: str) -> int:
        """The turns of a loop that counts up to a constant."""
        lines = self._computations[condition]
        (root,) = (line for line in lines.values() if line.is_root)
        end = next((value for name in root.operands if (value := _constant(lines[name])) is not None), None)
        index = next((line for name in root.operands if (line := lines[name]).opcode == "get-tuple-element"), None)
        if root.opcode != "compare" or "direction=LT" not in root.text or end is None or index is None:
            raise ValueError(f"The loop {loop.name} ends in a way that is not known: {root}")
        place = int(index.text.partition("index=")[2].partition(",")[0])
        body = self._computations[loop.attribute("body")]
        (last,) = (line for line in body.values() if line.is_root)
        start = around[loop.operands[0]]
        begin = _constant(_source(around, start.operands[place])) if start.opcode == "tuple" else None
        count = _source(body, last.operands[place])
        steps = [value for name in count.operands if (value := _constant(_source(body, name))) is not None]
        if begin is None or count.opcode != "add" or len(steps) != 1:
            raise ValueError(f"The loop {loop.name} counts in a way that is not known: {start} {count}")
        return -(-(end - begin) // steps[0])

    def _devices(self, line: Instruction) -> int:
        if axes := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line.text):
            sizes = dict(re.findall(r"'(\w+)'=(\d+)", axes[1]))
            return math.prod(int(sizes[name]) for name in re.findall(r"'(\w+)'", axes[2]))
        if grid := re.search(r"replica_groups=\[\d+,(\d+)\]", line.text):
            return int(grid[1])
        if groups := re.search(r"replica_groups=\{\{([\d,]*)\}", line.text):
            return len(groups[1].split(","))
        return 2  # a permutation: from one device to another


_BRANCHES = "true_computation", "false_computation"


def _computations(text: str) -> Iterator[tuple[str, bool, list[str]]]:
    """(name, whether it is the entry, its lines) of each computation."""
    lines = iter(text.splitlines())
    for line in lines:
        head = re.match(r"(ENTRY )?%([\w.-]+) \(.*\{$", line)
        if head:
            body = itertools.takewhile(lambda line: line != "}", lines)
            yield head[2], bool(head[1]), [line for line in body if re.match(r" +(ROOT )?%\S+ = ", line)]


def _instruction(line: str) -> Instruction:
    name, _, rest = line.strip().partition(" = ")
    end = _end(rest, 0) if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    begin = rest.index("(")
    end = _end(rest, begin)
    is_root = name.startswith("ROOT ")
    arrays = [(kind, tuple(map(int, filter(None, sizes.split(","))))) for kind, sizes in _ARRAY.findall(shape)]
    operands = re.findall(r"%([\w.-]+)", rest[begin:end])
    opcode, text = rest[:begin], rest[end:]
    if opcode == "constant":
        text = rest[begin:]
    return Instruction(name.removeprefix("ROOT ").removeprefix("%"), opcode, arrays, operands, text, is_root)


def _end(text: str, begin: int) -> int:
    """The place behind the bracket that closes the one at `begin`."""
    depth = 0
    for place in range(begin, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if depth == 0:
            return place + 1
    raise ValueError(f"A bracket is not closed: {text[:200]}")


def _source(lines: dict[str, Instruction], name: str) -> Instruction:
    """The line that makes a number, which others copy."""
    line = lines[name]
    return _source(lines, line.operands[0]) if line.opcode in ("copy", "bitcast") else line


def _constant(line: Instruction) -> int | None:
    found = re.match(r"\((-?\d+)\)", line.text) if line.opcode == "constant" else None
    return int(found[1]) if found else None


def _bytes(array: tuple[str, tuple[int, ...]]) -> int:
    kind, shape = array
    width = _WIDTHS.get(kind) or int(re.sub(r"\D", "", kind)) / 8
    return int(math.prod(shape) * width)


def _results(line: Instruction) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """The arrays that a collective gives; a started one also lists its operands and its signals."""
    arrays = [array for array in line.arrays if array != ("u32", ())] if line.opcode.endswith("-start") else line.arrays
    if line.opcode in ("all-gather-start", "collective-permute-start"):
        arrays = arrays[len(arrays) // 2 :]
    return tuple(arrays)


def _place(line: Instruction, caller: Instruction | None) -> str:
    for text in (line.text, "" if caller is None else caller.text):
        if found := re.search(r'op_name="([^"]*)"', text):
            return found[1]
    return ""


def _product(line: Instruction, around: dict[str, Instruction]) -> float:
    """The operations of a convolution, which is how a TPU writes a product; those with padding do not count."""
    left, right = (around[name].arrays[0][1] for name in line.operands)
    (_, out), labels = line.arrays[0], re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", line.text)
    if labels is None:
        raise ValueError(f"A convolution without labels: {line}")
    of_left, of_right, of_out = labels.groups()
    window = re.search(r"window=\{([^}]*)\}", line.text)
    given = dict(re.findall(r"(\w+)=(\S+)", window[1])) if window else {}
    total = 2.0 * out[of_out.index("b")] * out[of_out.index("f")] * right[of_right.index("i")]
    for axis in range(len(of_out) - 2):
        size, kernel, result = (
            shape[names.index(str(axis))] for names, shape in ((of_left, left), (of_right, right), (of_out, out))
        )

        def of(name: str, default: str, axis: int = axis) -> str:
            return given[name].split("x")[axis] if name in given else default

        stride, spread, gap = (int(of(name, "1")) for name in ("stride", "lhs_dilate", "rhs_dilate"))
        low = int(of("pad", "0_0").split("_")[0])
        reads = (o * stride + k * gap - low for o in range(result) for k in range(kernel))
        total *= sum(0 <= at < (size - 1) * spread + 1 and at % spread == 0 for at in reads)
    return total
