"""Several processes that train together, on JAX's own distributed runtime.

`connect` finds the other processes by its arguments or by the variables of a launcher. The other functions work in one
process too, where they have nothing to wait for, so that a loop is the same program for any number of processes.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import os
import re
import signal
import socket
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any

import jax
from jax._src import distributed as _runtime  # barriers with a limit and the key-value store have no public names
from jax.experimental import multihost_utils

from attnax.launcher.pulse import PULSE, beat
from attnax.world import World, find_world

__all__ = [
    "ProcessError",
    "StopRequests",
    "World",
    "barrier",
    "beat",
    "connect",
    "disconnect",
    "find_world",
    "gather",
    "is_main",
    "leave",
]

_HEARTBEAT = 30  # seconds without a sign of life after which JAX's service takes a process for dead
_BEAT = 1.0  # seconds from a sign of life to the next, while this process waits for others
_SHUTDOWN = 5  # seconds in which all processes leave, after a barrier that has a longer limit
_PATIENCE = 2.0  # seconds for Python to end the process after a second signal
_rounds: defaultdict[str, Iterator[int]] = defaultdict(itertools.count)  # of `gather`, by name


class ProcessError(RuntimeError):
    """Another process is missing, late or gone; the message says which, where JAX's service tells."""


def connect(
    *, coordinator: str | None = None, processes: int | None = None, process: int | None = None, seconds: float = 300.0
) -> World:
    """Joins this process with the others of its training; to be called before JAX makes its first array.

    The first of these that is there says who the others are: the arguments; `JAX_COORDINATOR_ADDRESS`,
    `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`; `MASTER_ADDR`, `MASTER_PORT`, `WORLD_SIZE` and `RANK` of torchrun; the
    variables of SLURM, Open MPI, Kubernetes and TPUs, as JAX reads them. Without any, this is the only process, and
    nothing is started. `find_world` has the rules.

    From then on an uncaught exception ends the process at once (`leave`), since the others would wait for it at its
    exit; and SIGTERM is JAX's notice of a preemption, which `StopRequests` reads. JAX takes a process for dead that
    has been silent for 30 s, and ends the others.

    Args:
        coordinator: HOST:PORT at which process 0 listens.
        processes: number of processes.
        process: number of this one, from 0.
        seconds: limit until all processes have joined. JAX ends the process after it.

    Returns:
        The processes, and which of them this one is.

    Raises:
        InputError: the arguments or the variables are incomplete, out of range, or contradict each other.
        ProcessError: process 0 does not listen within the limit.

    Example:
        >>> connect().count  # no launcher has set a variable
        1
    """
    world = find_world(os.environ, coordinator=coordinator, processes=processes, process=process)
    beat()
    if world.count == 1:
        return world
    until = time.monotonic() + seconds
    if world.address is not None and world.index != 0:
        _wait_for(world.address, until)
    patience = max(1.0, until - time.monotonic())
    # After the limit JAX aborts without a word about processes, so these words come just before.
    late = threading.Timer(0.95 * patience, _say_who_is_awaited, (world, seconds))
    late.daemon = True
    late.start()
    try:
        jax.distributed.initialize(
            **world.arguments(),
            initialization_timeout=int(patience),
            heartbeat_timeout_seconds=_HEARTBEAT,
            shutdown_timeout_seconds=_SHUTDOWN,
        )
    finally:
        late.cancel()
    atexit.register(disconnect)
    _end_at_exceptions()
    jax.devices()  # all processes find their devices together: one alone would wait for the others
    beat()
    state = _runtime.global_state
    return World(world.source, state.num_processes, state.process_id, state.coordinator_address, world.devices)


def disconnect(seconds: float = 600.0) -> None:
    """Leaves the others in order, once all have called this. The end of a connected program calls it too.

    Args:
        seconds: limit until all processes are here.

    Raises:
        ProcessError: a process is not here within the limit.
    """
    if _runtime.global_state.client is not None:
        atexit.unregister(disconnect)
        barrier("disconnect", seconds)
        jax.distributed.shutdown()


def leave(code: int) -> None:
    """Ends a connected process now, with an exit code that says that something failed; otherwise does nothing.

    The usual end of a process waits for the other processes, which may never come.
    """
    if _runtime.global_state.client is not None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def is_main() -> bool:
    """Whether this is process 0, which prints and writes for all. No device is initialised."""
    return _runtime.global_state.process_id == 0


def barrier(name: str, seconds: float) -> None:
    """Waits until all processes are at the barrier of this name. To wait counts as a sign of life for the launcher.

    Args:
        name: the same in all processes; it can be used again.
        seconds: limit.

    Raises:
        ProcessError: a process is not here within the limit, or has ended.

    Example:
        >>> barrier("the checkpoint is complete", seconds=300.0)  # one process has nobody to wait for
    """
    client = _runtime.global_state.client
    if client is None:
        return
    try:
        with _beating():
            client.wait_at_barrier(f"attnax/{name}", int(1000 * seconds))
    except jax.errors.JaxRuntimeError as error:
        raise ProcessError(_words(name, seconds, str(error))) from error


def gather(name: str, text: str, seconds: float) -> tuple[str, ...]:
    """The texts of all processes, in the order of their numbers. For a few kilobytes, such as digests or a path.

    Args:
        name: the same in all processes; it can be used again.
        text: of this process.
        seconds: limit until all processes have called this.

    Raises:
        ProcessError: as for `barrier`.

    Example:
        >>> gather("digests", "e3b0c442", seconds=60.0)
        ('e3b0c442',)
    """
    client = _runtime.global_state.client
    if client is None:
        return (text,)
    folder = f"attnax/{name}/{next(_rounds[name])}/"
    try:
        client.key_value_set(f"{folder}{_runtime.global_state.process_id:09}", text)
        barrier(f"{name}: written", seconds)
        found = tuple(value for _, value in sorted(client.key_value_dir_get(folder)))
        barrier(f"{name}: read", seconds)
        if is_main():
            client.key_value_delete(folder)
    except jax.errors.JaxRuntimeError as error:
        raise ProcessError(_words(name, seconds, str(error))) from error
    return found


class StopRequests:
    """SIGTERM and SIGINT ask for a stop between two updates, at which all processes stop together.

    In one process the first signal asks, and a second one ends the process as usual. In several processes a signal to
    any of them is enough: JAX's preemption service finds the update, some updates later, at which all stop. There
    SIGINT is sent again as SIGTERM, and no Python handler of SIGTERM may be installed: the service would not see it.

    While XLA compiles, Python sees no signal: a request waits for the end of the compilation, and so does a second
    signal. With a `notice` a thread sees them: it prints the notice at the first one, and at a second one it ends the
    process after 2 seconds if Python has not.

    Args:
        notice: a line for standard error, such as "interrupted; stops after this update".

    Attributes:
        code: the exit code to end with after a stop: 128 + the number of the signal.

    Example:
        >>> with StopRequests() as requests:
        ...     for update in range(1, 4):
        ...         # make the update
        ...         if requests.agree_to_stop(update):
        ...             break  # save a checkpoint
        >>> update
        3
    """

    def __init__(self, notice: str | None = None) -> None:
        self.code = 0
        self._notice = notice
        self._before: dict[int, Any] = {}
        self._watcher: _Watcher | None = None

    def __enter__(self) -> StopRequests:
        self._is_connected = _runtime.global_state.client is not None
        self._unseen = signal.getsignal(signal.SIGTERM)
        for number in (signal.SIGINT,) if self._is_connected else (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._note)
        self._watcher = None if self._notice is None else _Watcher(self._notice)
        return self

    def __exit__(self, *_: object) -> None:
        if self._watcher is not None:
            self._watcher.close()
        self._restore()

    def agree_to_stop(self, update: int) -> bool:
        """Whether all processes stop after this update; each calls this after every update, and beats with it.

        Args:
            update: its number, the same in all processes.

        Raises:
            ProcessError: a Python handler of SIGTERM was installed in the meantime.
        """
        beat()
        if not self._is_connected:
            return self.code != 0
        if signal.getsignal(signal.SIGTERM) != self._unseen:
            raise ProcessError(
                "StopRequests: SIGTERM must have no Python handler in connected processes, where it hides the signal "
                f"from JAX; got {signal.getsignal(signal.SIGTERM)!r}. Do not install it."
            )
        if multihost_utils.reached_preemption_sync_point(update):
            self.code = 128 + signal.SIGTERM
        return self.code != 0

    def _note(self, number: int, _: FrameType | None) -> None:
        self._restore()
        if self._is_connected:
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            self.code = 128 + number

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


@contextlib.contextmanager
def _beating() -> Iterator[None]:
    """Beats in a thread: this process waits for others, and a launcher must not take it for the one that is stuck."""
    if PULSE not in os.environ:
        yield
        return
    is_over = threading.Event()

    def loop() -> None:
        while not is_over.wait(_BEAT):
            beat()

    beat()
    thread = threading.Thread(target=loop, daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


class _Watcher:
    """A thread that sees SIGINT and SIGTERM while a call into a library keeps Python's handlers waiting.

    Python writes the number of each signal into a pipe as it comes (`signal.set_wakeup_fd`).
    """

    def __init__(self, notice: str):
        self._notice, self._is_closed = notice, threading.Event()
        self._end, self._begin = os.pipe()
        os.set_blocking(self._begin, False)
        self._before = signal.set_wakeup_fd(self._begin, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._is_closed.set()
        signal.set_wakeup_fd(self._before)
        os.close(self._begin)
        self._thread.join()
        os.close(self._end)

    def _watch(self) -> None:
        is_second = False
        while number := os.read(self._end, 1):
            if number[0] not in (signal.SIGINT, signal.SIGTERM):
                continue
            if is_second and not self._is_closed.wait(_PATIENCE):
                os._exit(128 + number[0])
            if not is_second:
                line_end = "\n" if sys.stderr.isatty() else ""  # behind a line that shows progress
                print(f"{line_end}{self._notice}", file=sys.stderr, flush=True)
            is_second = True


def _wait_for(address: str, until: float) -> None:
    """Waits until process 0 listens."""
    host, _, port = address.rpartition(":")
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5.0).close()
            return
        except OSError as error:
            if time.monotonic() > until:
                raise ProcessError(
                    f"connect: process 0 must listen at the coordinator's address within the limit; got "
                    f"coordinator={address}: {error}. Is it running, and may this machine reach that port?"
                ) from error
            time.sleep(0.2)


def _say_who_is_awaited(world: World, seconds: float) -> None:
    count = "all processes" if world.count is None else f"all {world.count} processes"
    place = "" if world.address is None else f" at {world.address}"
    print(
        f"attnax: connect: {count} must join{place} within {seconds:.0f} s; one or more have not. Look at their logs. "
        "JAX now ends this process.",
        file=sys.stderr,
        flush=True,
    )


def _end_at_exceptions() -> None:
    before = sys.excepthook

    def end(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        before(kind, error, trace)
        leave(128 + signal.SIGINT if issubclass(kind, KeyboardInterrupt) else 1)

    sys.excepthook = end


def _words(name: str, seconds: float, message: str) -> str:
    """What the service says about a barrier, in words."""
    count = _runtime.global_state.num_processes
    if not message.startswith("DEADLINE_EXCEEDED"):
        first = message.partition("\n")[0]
        return f"barrier: all {count} processes must arrive at {name!r}; JAX's service says: {first}"
    _, _, listed = message.partition("timed out task names:")
    late = [f"process {task}" for task in re.findall(r"^(?:/job:\S*task:)?(\d+)$", listed, re.MULTILINE)]
    who = " and ".join([", ".join(late[:-1]), late[-1]] if len(late) > 1 else late) or "one or more"
    return (
        f"barrier: all {count} processes must arrive at {name!r} within {seconds:g} s; {who} did not. "
        "Look at the log there, or allow more time."
    )
