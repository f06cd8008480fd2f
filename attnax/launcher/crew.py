"""The processes of one attempt on one node."""

from __future__ import annotations

import contextlib
import functools
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from attnax.launcher.lines import Lines
from attnax.launcher.pulse import Pulse

__all__ = ["Crew", "End"]

_FOR_STACKS = 1.0  # seconds in which processes print them
STOPPED = (128 + signal.SIGTERM, 128 + signal.SIGINT)
"""Exit codes of a process that was asked to stop."""


@dataclass(frozen=True)
class End:
    """How an attempt ended.

    Attributes:
        code: exit code of the process that ended it: 128 + N if signal N did, 0 if all processes ended well.
        reason: a sentence.
        is_stall: whether a process was stuck, so that its stacks tell more.
    """

    code: int
    reason: str
    is_stall: bool = False

    @property
    def was_asked(self) -> bool:
        """Whether someone asked a process to stop."""
        return self.code in STOPPED


class Crew:
    """The processes of one attempt on one node; they are gone when the `with` block is left.

    Args:
        line: command line of every process.
        environments: of each process.
        first: number of the first process among those of all nodes.
        folder: for the files that the processes touch, named by their numbers.
        stall: seconds without a beat that are too many; 0 for any.
    """

    def __init__(
        self, line: Sequence[str], environments: Sequence[Mapping[str, str]], first: int, folder: Path, stall: float
    ):
        self._line, self._environments, self._stall = line, environments, stall
        self._names = range(first, first + len(environments))
        self._pulses = [Pulse(folder / str(name)) for name in self._names]
        self._processes: list[subprocess.Popen[bytes]] = []
        self._selector = selectors.DefaultSelector()
        self._lines: list[Lines] = []
        self._ended: set[int] = set()

    def __enter__(self) -> Crew:
        with contextlib.ExitStack() as stack:  # of two processes the second may not start
            stack.callback(self._close)
            for name, environment in zip(self._names, self._environments, strict=True):
                # A session of its own: Ctrl-C in a terminal reaches the launcher alone, and grandchildren can be ended.
                process = subprocess.Popen(
                    self._line,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    start_new_session=True,
                )
                self._processes.append(process)
                for pipe, stream in ((process.stdout, "stdout"), (process.stderr, "stderr")):
                    assert pipe is not None
                    os.set_blocking(pipe.fileno(), False)
                    self._lines.append(Lines(f"[{name}] ", functools.partial(_write, stream)))
                    self._selector.register(pipe, selectors.EVENT_READ, self._lines[-1])
            stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    @property
    def _is_done(self) -> bool:
        return len(self._ended) == len(self._processes)

    def checkpoint(self) -> int:
        """The number of the newest checkpoint that a process has told, or -1."""
        return max(pulse.checkpoint() for pulse in self._pulses)

    def step(self, seconds: float) -> End | None:
        """Passes on the lines of at most that many seconds; returns the end of the attempt once there is one.

        A process that ends well ends no attempt: process 0 may still have work to do. When all have, the code is 0.
        """
        self._pass_on(seconds)
        for index, process in enumerate(self._processes):
            name = self._names[index]
            if index in self._ended:
                continue
            if process.poll() is None:
                continue
            self._ended.add(index)
            _kill_group(process)  # readers and writers that it left behind
            if process.returncode:
                return _end_of(name, process.returncode)
        return End(0, "all processes have ended.") if self._is_done else self._stalled()

    def _stalled(self) -> End | None:
        """The end of an attempt in which a process is stuck. It names those too that wait for that process by now."""
        running = [index for index in range(len(self._processes)) if index not in self._ended]
        silences = {self._names[index]: self._pulses[index].silence() for index in running}
        if not self._stall or max(silences.values()) <= self._stall:
            return None
        names = ", ".join(str(name) for name, silence in silences.items() if silence > self._stall / 2)
        return End(1, f"stuck: process {names} has not beaten for {max(silences.values()):.0f} s.", is_stall=True)

    def signal(self, number: int) -> None:
        """Sends a signal to the processes that run, not to their children."""
        for index, process in enumerate(self._processes):
            if index not in self._ended:
                process.send_signal(number)  # does nothing if the process has just ended

    def stop(self, grace: float, *, stacks: bool = False) -> None:
        """Ends all processes: SIGTERM, and SIGKILL after `grace` seconds.

        Args:
            grace: seconds.
            stacks: have the stacks of all threads printed before, by the processes that have beaten.
        """
        if stacks:
            for index, process in enumerate(self._processes):
                if index not in self._ended and self._pulses[index].has_beaten:  # others would be killed by it
                    process.send_signal(signal.SIGUSR1)
            self._wait(_FOR_STACKS)
        self.signal(signal.SIGTERM)
        self._wait(grace)
        self._kill()

    def _wait(self, seconds: float) -> None:
        """Passes on lines until all processes have ended, at most that long."""
        until = time.monotonic() + seconds
        while any(process.poll() is None for process in self._processes) and time.monotonic() < until:
            self._pass_on(0.05)

    def _kill(self) -> None:
        """Kills the processes that run, and what those left behind that have ended since the last `step`."""
        for index, process in enumerate(self._processes):
            if index not in self._ended:
                _kill_group(process)
                process.wait()
                self._ended.add(index)

    def _pass_on(self, seconds: float) -> None:
        if self._selector.get_map():
            for key, _ in self._selector.select(seconds):
                data = os.read(key.fd, 1 << 16)
                if data:
                    key.data.feed(data)
                else:
                    self._selector.unregister(key.fileobj)
        else:
            time.sleep(seconds)
        for lines in self._lines:
            lines.tick()

    def _close(self) -> None:
        self._kill()
        with contextlib.ExitStack() as stack:  # the terminal may be gone
            stack.callback(self._selector.close)
            for process in self._processes:
                for pipe in (process.stdout, process.stderr):
                    assert pipe is not None
                    stack.enter_context(pipe)
            for key in list(self._selector.get_map().values()):
                with contextlib.suppress(BlockingIOError):  # a grandchild in a session of its own still holds the pipe
                    while data := os.read(key.fd, 1 << 16):
                        key.data.feed(data)
            for lines in self._lines:
                lines.flush()


def _write(stream: str, data: bytes) -> None:
    """Writes bytes to a standard stream as they are: whether they are text is the affair of the process."""
    out = getattr(sys, stream)
    out.buffer.write(data)
    out.flush()


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _end_of(name: int, code: int) -> End:
    if code > 0:
        return End(code, f"process {name} ended with exit code {code}.")
    return End(128 - code, f"process {name} was ended by {signal.Signals(-code).name}.")
