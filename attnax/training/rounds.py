"""What several processes decide together about the files that they share.

Each says how it went, and all go on or all raise: no process waits at a barrier for one that has failed, and none takes
another checkpoint than the others because its disk shows names later.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NoReturn, TypeVar

import jax

from attnax.distributed import ProcessError, gather, is_main
from attnax.errors import InputError
from attnax.training.manifest import DamagedCheckpointError

__all__ = ["Rounds", "described", "rebuilt"]

_PATIENCE = 3600.0  # seconds in which all have done their share of a round; JAX finds a process that has died in 30 s

_KINDS = (OSError, DamagedCheckpointError, InputError, ValueError)  # that travel; the special before the general

T = TypeVar("T")


class Rounds:
    """Rounds in which all processes say how it went. An error of one ends the rounds in all.

    It is raised in all as the same kind of error with the same words: an OSError, an InputError, a
    DamagedCheckpointError or a ValueError. Another kind is a ProcessError in the other processes.

    Args:
        name: of what is decided, the same in all processes, for the words of an error; None if this process decides
            alone. In one process nothing is sent, and an error is raised as it is. After a `ProcessError` the processes
            may have done different numbers of rounds, so that the name cannot be used again.

    Attributes:
        name: as above.
        is_alone: whether there are no others to wait for.
        is_over: whether a round has failed, so that all know of it.
    """

    def __init__(self, name: str | None):
        self.is_alone = name is None or jax.process_count() == 1
        self.is_over = False
        self.name = name or ""

    def agree(self, value: Any = None) -> list[Any]:
        """One round: the values of all processes, which JSON can hold.

        Raises:
            ProcessError: a process is missing, or failed in a way that is not among those above.
        """
        return [value] if self.is_alone else self._exchange(value=value)

    def fail(self, error: BaseException) -> NoReturn:
        """Raises the error of this process, and tells the others in their next round, unless a round brought it."""
        if not self.is_alone and not self.is_over:
            with contextlib.suppress(ProcessError):  # that nobody came to hear of it is the lesser news
                self._exchange(error=described(error))
        raise error

    @contextlib.contextmanager
    def part(self) -> Iterator[None]:
        """What is in the block is done by all processes; at its end all go on, or all raise."""
        try:
            yield
        except BaseException as error:
            self.fail(error)
        self.agree()

    def each(self, work: Callable[[], Any]) -> list[Any]:
        """What the work of each process returned, which JSON can hold."""
        try:
            value = work()
        except BaseException as error:
            self.fail(error)
        return self.agree(value)

    def lead(self, work: Callable[[], T]) -> T:
        """What the work of process 0 returned, which JSON can hold; the others do not work."""
        return self.each(work if self.is_alone or is_main() else lambda: None)[0]

    def lead_and_ask(self, work: Callable[[Callable[[Any], list[Any]]], T], answer: Callable[[Any], Any]) -> T:
        """`lead`, where the work may ask all processes: its argument gives what `answer(question)` is in each.

        Not for a process alone, which has nobody to ask.
        """
        if not is_main():
            while "question" in (said := self.agree()[0]):
                self.each(partial(answer, said["question"]))
            return said["value"]

        def ask(question: Any) -> list[Any]:
            self.agree({"question": question})
            return self.each(partial(answer, question))

        try:
            value = work(ask)
        except BaseException as error:
            self.fail(error)
        return self.agree({"value": value})[0]["value"]

    def _exchange(self, **mine: Any) -> list[Any]:
        text = json.dumps(mine)
        try:
            texts = gather(self.name, text, _PATIENCE)
        except BaseException:
            self.is_over = True
            raise
        said = [json.loads(text) for text in texts]
        for process, one in enumerate(said):
            if "error" in one:
                self.is_over = True
                if texts[process] == text:  # it is that of this process, which raises it itself
                    return []
                raise rebuilt(process, **one["error"])
        return [one["value"] for one in said]


def described(error: BaseException) -> dict[str, Any]:
    """An error as JSON, for `rebuilt`."""
    words: list[Any] = [str(error)]
    if isinstance(error, OSError) and error.errno is not None:
        words = [error.errno, error.strerror, error.filename and str(error.filename)]
    elif isinstance(error, DamagedCheckpointError):
        words.append(error.whole)
    kind = next((kind for kind in _KINDS if isinstance(error, kind)), None)
    if kind is None:
        return {"kind": None, "words": [f"{type(error).__name__}: {error}"]}
    return {"kind": kind.__name__, "words": words}


def rebuilt(process: int, kind: str | None, words: list[Any]) -> Exception:
    """The error of another process."""
    if kind is None:
        return ProcessError(f"process {process} failed: {words[0]}")
    return next(found for found in _KINDS if found.__name__ == kind)(*words)
