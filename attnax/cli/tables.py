"""Tables of parameters, with one line for layers that are equal."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from attnax.cli.terminal import printable

__all__ = ["collapse", "fold", "in_bytes", "in_shape", "print_fields", "print_rows"]

Item = TypeVar("Item")

# In the form of `str`, so that a range determines the names, and short enough for `int`.
NUMBER = re.compile(r"(?<=\.)(?:0|[1-9][0-9]{0,8})(?=\.|\Z)")


def collapse(names: Iterable[str]) -> str:
    """One name for names that differ only in numbers, such as "blocks.{0..1}.kernel"."""
    found = list(names)
    numbers = zip(*(map(int, NUMBER.findall(name)) for name in found), strict=True)
    ranges = iter([_range(sorted(set(column))) for column in numbers])
    return NUMBER.sub(lambda _: next(ranges), found[0])


def _range(numbers: Sequence[int]) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    if len(numbers) == numbers[-1] - numbers[0] + 1:
        return f"{{{numbers[0]}..{numbers[-1]}}}"
    return "{" + ",".join(map(str, numbers)) + "}"


def fold(items: Iterable[Item], key: Callable[[Item], tuple[tuple[str, ...], Any]]) -> list[list[Item]]:
    """The items in groups, in order: those of equal keys, but for the numbers in the names.

    Args:
        items: of a table.
        key: the names of an item, and what else must be equal.
    """
    groups: dict[Any, list[Item]] = {}
    for item in items:
        names, rest = key(item)
        # Names are split at their numbers: equal parts mean names that differ in numbers only.
        groups.setdefault((*(tuple(NUMBER.split(name)) for name in names), rest), []).append(item)
    return list(groups.values())


def print_fields(title: str, lines: Iterable[str]) -> None:
    """Lines of text with a title before the first."""
    for index, line in enumerate(lines):
        print(f"{'' if index else title:<14}{printable(line)}")


def print_rows(rows: Sequence[tuple[str, ...]], right: Sequence[str]) -> None:
    """A table after an empty line, without columns that are empty.

    Args:
        rows: the first one has the titles.
        right: titles of columns of numbers.
    """
    columns = [index for index in range(len(rows[0])) if any(row[index] for row in rows[1:])]
    widths = {index: max(len(row[index]) for row in rows) for index in columns}
    print()
    for row in rows:
        cells = [f"{row[i]:>{widths[i]}}" if rows[0][i] in right else f"{row[i]:<{widths[i]}}" for i in columns]
        print("  ".join(cells).rstrip())


def in_shape(shape: Sequence[int]) -> str:
    """A shape in words, such as 16x24."""
    return "x".join(map(str, shape)) or "1"


def in_bytes(num_bytes: int | float) -> str:
    """A number of bytes with a unit."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= size:
            return f"{num_bytes / size:,.1f} {unit}"
    return f"{num_bytes:.0f} bytes"
