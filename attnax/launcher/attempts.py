"""Attempts: processes are started, watched, ended together, and started again from the newest checkpoint."""

from __future__ import annotations

import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from attnax.errors import InputError
from attnax.launcher.crew import Crew, End
from attnax.launcher.job import Job
from attnax.launcher.nodes import Alone, Followers, Link, LostError, call_leader, free_port

__all__ = ["run"]

_IN_VAIN = (2, 3)  # the exit codes of a command that was called wrongly, and of a training that diverged
_AFTER_FAILURE, _AFTER_REQUEST = 5.0, 20.0  # seconds from SIGTERM to SIGKILL; a process that was asked may be saving
_LOOK = 0.1  # seconds from a look at the processes to the next
_MEET = 600.0  # seconds in which the launchers of all nodes must have met
_CALL = 1.0  # seconds from a call of node 0's launcher to the next
_LONGEST_PAUSE = 30.0  # seconds before a restart
_SECOND = "a second signal came."


def run(job: Job) -> int:
    """Runs the job to its end; returns its exit code.

    That is 0 if all processes ended well, 128 + N if signal N asked the launcher or a process to stop, and otherwise
    the code of the process that failed first in the last attempt, or 1 if it was stuck.

    Raises:
        InputError: this node does not fit to node 0.
        OSError: the command cannot be started, or the port of --coordinator cannot be had.
    """
    with _Signals() as signals:
        return _lead(job, signals) if job.node == 0 else _follow(job, signals)


def _lead(job: Job, signals: _Signals) -> int:
    others = Followers(job) if job.nodes > 1 else Alone()
    code = 1
    try:
        code = _attempts(job, others, signals)
        return code
    finally:
        others.tell(exit=code)
        others.close()


def _attempts(job: Job, others: Followers | Alone, signals: _Signals) -> int:
    """Makes attempts until one ends well or is asked to stop, or too many in a row bring no new checkpoint."""
    attempt, in_vain, newest = 0, 0, -1
    while True:
        attempt += 1
        if not _meet(others, signals):
            return signals.code or 1
        address = f"{job.host}:{free_port(job.interface)}"
        _say(_start_of(job, attempt, address))
        others.tell(start=attempt, address=address)
        with (
            tempfile.TemporaryDirectory(prefix="attnax-") as folder,
            _crew(job, attempt, address, folder, newest) as crew,
        ):
            end = _watch(crew, others, signals)
            _say(end.reason)
            others.tell(stop=_grace(end, signals), stacks=end.is_stall)
            crew.stop(_grace(end, signals), stacks=end.is_stall)
            checkpoint = crew.checkpoint()
        if end.code and signals.code and end.was_asked:
            return signals.code
        if end.code in (0, *_IN_VAIN) or end.was_asked or signals.code:
            return end.code
        in_vain = in_vain + 1 if attempt > 1 and checkpoint <= newest else 0
        newest = max(newest, checkpoint)
        if in_vain >= job.restarts:
            if job.restarts:
                _say(f"{in_vain} restarts in a row brought no new checkpoint; that is the limit (--restarts).")
            return end.code
        # At once after the first failure; a disk or a network that is away for a minute outlasts a few attempts.
        if not signals.sleep(min(2.0**in_vain, _LONGEST_PAUSE) if in_vain else 0.0):
            return signals.code


def _follow(job: Job, signals: _Signals) -> int:
    """Does what the launcher of node 0 says."""
    until = time.monotonic() + _MEET
    while not signals.code:
        link = call_leader(job)
        if link is None:
            if time.monotonic() > until:
                _say(f"the launcher of node 0 must be at {job.coordinator} within {_MEET:.0f} s; it was not.")
                return 1
            signals.sleep(_CALL)
            continue
        try:
            return _obey(job, link, signals)
        except LostError:
            _say("the launcher of node 0 is gone; waiting for it.")
            until = time.monotonic() + _MEET
        finally:
            link.close()
    return signals.code


def _obey(job: Job, link: Link, signals: _Signals) -> int:
    """Serves one connection to node 0; returns the exit code of the job.

    Raises:
        LostError: node 0 is gone; the processes are ended.
        InputError: this node does not fit to node 0.
    """
    while True:
        message = link.receive(_LOOK) or {}
        if "refused" in message:
            raise InputError(str(message["refused"]))
        if "exit" in message:
            return int(message["exit"])
        if "start" not in message:
            if signals.code:
                return signals.code
            continue
        attempt, address = int(message["start"]), str(message["address"])
        _say(_start_of(job, attempt, address))
        with tempfile.TemporaryDirectory(prefix="attnax-") as folder, _crew(job, attempt, address, folder) as crew:
            order = _report(crew, link, signals)
            if "exit" in order:
                return int(order["exit"])
            crew.stop(float(order["stop"]), stacks=bool(order["stacks"]))
        link.send(idle=True)


def _report(crew: Crew, link: Link, signals: _Signals) -> dict[str, Any]:
    """Watches the processes until node 0 says what comes next, and tells it how they end."""
    told = False
    while True:
        end = crew.step(_LOOK)
        if signals.pass_on(crew):
            link.send(ended=signals.code, reason=_SECOND, stall=False)
            return {"stop": 0.0, "stacks": False}
        if end is not None and not told:
            _say(end.reason)
            link.send(ended=end.code, reason=end.reason, stall=end.is_stall)
            told = True
        message = link.receive(0.0) or {}
        if "stop" in message or "exit" in message:
            return message


def _watch(crew: Crew, others: Followers | Alone, signals: _Signals) -> End:
    """Watches an attempt until it ends."""
    while True:
        end = crew.step(_LOOK)
        if signals.pass_on(crew):
            return End(signals.code, _SECOND)
        elsewhere = others.look()
        if elsewhere is not None:
            return elsewhere
        if end is not None and (end.code or others.are_done):
            return end


def _meet(others: Followers | Alone, signals: _Signals) -> bool:
    """Waits until the launchers of all nodes are ready; returns whether they are."""
    until = time.monotonic() + _MEET
    while missing := others.missing:
        if not signals.sleep(_LOOK):
            return False
        if time.monotonic() > until:
            nodes = ", ".join(map(str, missing))
            _say(f"the launchers of all nodes must be ready within {_MEET:.0f} s; missing: node {nodes}.")
            return False
    return not signals.code


def _crew(job: Job, attempt: int, address: str, folder: str, newest: int = -1) -> Crew:
    first = job.node * job.processes
    environments = [
        job.environment(index, address, attempt, Path(folder) / str(first + index)) for index in range(job.processes)
    ]
    return Crew(job.line(None if attempt == 1 else newest), environments, first, Path(folder), job.stall)


def _start_of(job: Job, attempt: int, address: str) -> str:
    count = job.processes * job.nodes
    return f"attempt {attempt}: {job.processes} of {count} processes start here, coordinator {address}."


def _grace(end: End, signals: _Signals) -> float:
    if len(signals.received) > 1:
        return 0.0
    return _AFTER_REQUEST if end.was_asked else _AFTER_FAILURE


def _say(line: str) -> None:
    print(f"attnax launch: {line}", file=sys.stderr, flush=True)


class _Signals:
    """SIGINT, SIGTERM and SIGHUP of the launcher: the first is SIGTERM for the processes, a second one kills them."""

    def __init__(self) -> None:
        self.received: list[int] = []
        self._passed = 0

    def __enter__(self) -> _Signals:
        self._before = {}
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def code(self) -> int:
        """The exit code after the first signal, or 0."""
        return 128 + self.received[0] if self.received else 0

    def pass_on(self, crew: Crew) -> bool:
        """Passes a new signal on to the processes; returns whether it is a second one, which ends them instead."""
        new: Sequence[int] = self.received[self._passed :]
        self._passed += len(new)
        if new and len(self.received) == 1:
            crew.signal(signal.SIGTERM)
            name = signal.Signals(new[0]).name
            _say(f"{name}: asked the processes to stop after an update. A second signal ends them at once.")
        return len(self.received) > 1

    def sleep(self, seconds: float) -> bool:
        """Waits; returns whether no signal has come."""
        until = time.monotonic() + seconds
        while not self.received and time.monotonic() < until:
            time.sleep(min(_LOOK, seconds))
        return not self.received

    def _note(self, number: int, _: FrameType | None) -> None:
        self.received.append(number)
