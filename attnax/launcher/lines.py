"""The output of several processes on one terminal, line by line."""

from __future__ import annotations

import re
import time
from collections.abc import Callable

__all__ = ["Lines"]

_END = re.compile(rb"[\r\n]")
_WAIT = 0.5  # seconds, after which the begin of a line is shown: a bar of progress ends none


class Lines:
    """Writes the lines of a stream with a prefix; a carriage return ends a line too."""

    def __init__(self, prefix: str, write: Callable[[bytes], object]):
        self._prefix, self._put, self._rest, self._since = prefix.encode(), write, b"", 0.0

    def feed(self, data: bytes) -> None:
        """Takes the next bytes of the stream."""
        *lines, self._rest = _END.split(self._rest + data)
        self._since = time.monotonic()
        self._write(*lines)

    def flush(self, wait: float = 0.0) -> None:
        """Writes the begin of a line, if nothing has followed it for `wait` seconds."""
        if self._rest and time.monotonic() - self._since >= wait:
            line, self._rest = self._rest, b""
            self._write(line)

    def tick(self) -> None:
        """To be called a few times a second."""
        self.flush(_WAIT)

    def _write(self, *lines: bytes) -> None:
        text = b"".join(self._prefix + line + b"\n" for line in lines if line)
        if text:
            self._put(text)
