"""The error about a checkpoint or a file of caches, with all problems at once."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from attnax.errors import InputError

__all__ = ["CheckpointError", "quoted"]

_SHOWN = 20


class CheckpointError(InputError):
    """A checkpoint or a file of caches cannot be read or written.

    Attributes:
        where: the file or folder with the problems.
        problems: one sentence each; the message shows the first twenty.
    """

    def __init__(self, where: object, problems: str | Iterable[str]):
        self.where = str(where)
        self.problems = (problems,) if isinstance(problems, str) else tuple(problems)
        if len(self.problems) == 1:
            super().__init__(f"{where}: {self.problems[0]}")
            return
        lines = [f"{where}: {len(self.problems)} problems.", *self.problems[:_SHOWN]]
        if len(self.problems) > _SHOWN:
            lines.append(f"and {len(self.problems) - _SHOWN} more, in `problems` of this error.")
        super().__init__("\n  ".join(lines))


def quoted(value: Any) -> str:
    """A value from a foreign file, for a message: at most 60 characters of it."""
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "..."
