"""Signs of life of a process, in a file that its launcher watches. Both sides are here."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import sys
import time
from pathlib import Path

__all__ = ["LAUNCHER", "PULSE", "Pulse", "beat"]

PULSE, LAUNCHER = "ATTNAX_PULSE", "ATTNAX_LAUNCHER"
_SET_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux


def beat(checkpoint: int | None = None) -> None:
    """Tells the launcher that this process is not stuck, and which checkpoint is the newest. Takes microseconds.

    A loop of one's own calls it in every update, and before and after work that takes minutes. Without a launcher it
    does nothing. After the first call the launcher can have the stacks of all threads printed (SIGUSR1), and on Linux
    the process ends when the launcher is killed.

    Args:
        checkpoint: number of the newest complete checkpoint. An attempt with a new one counts as progress.

    Example:
        >>> beat()
        >>> beat(checkpoint=120)
    """
    path = os.environ.get(PULSE)
    if path is None:
        return
    if not os.path.exists(path):
        faulthandler.register(signal.SIGUSR1, file=2, all_threads=True)  # whatever sys.stderr is now
        _end_with_launcher()
        Path(path).touch()
    if checkpoint is None:
        os.utime(path)
    else:
        temporary = Path(f"{path}.tmp")
        temporary.write_text(str(checkpoint))
        temporary.replace(path)


def _end_with_launcher() -> None:
    """Has the kernel kill this process when its launcher ends, so that no process trains on without one."""
    launcher = int(os.environ.get(LAUNCHER, "0"))
    if sys.platform != "linux" or os.getppid() != launcher:  # with a shell between the two, that is the parent
        return
    ctypes.CDLL(None).prctl(_SET_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != launcher:  # it ended before the kernel knew
        os.kill(os.getpid(), signal.SIGKILL)


class Pulse:
    """The launcher's side: how long a process has been silent, and its newest checkpoint."""

    def __init__(self, path: Path):
        self.path, self._stamp, self._since = path, 0, time.monotonic()

    @property
    def has_beaten(self) -> bool:
        """Whether the process has called `beat`."""
        return self.path.exists()

    def silence(self) -> float:
        """Seconds since the last beat, or since the start, by a clock that nobody sets."""
        stamp, now = self.path.stat().st_mtime_ns if self.has_beaten else 0, time.monotonic()
        if stamp != self._stamp:
            self._stamp, self._since = stamp, now
        return now - self._since

    def checkpoint(self) -> int:
        """The number of the newest checkpoint, or -1."""
        text = self.path.read_text() if self.has_beaten else ""
        return int(text) if text else -1
