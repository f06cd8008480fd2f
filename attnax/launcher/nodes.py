"""The launchers of several nodes: that of node 0 says when an attempt starts and stops, and the others follow it.

They exchange lines of JSON over TCP. No line holds a command: each launcher runs the one that it was started with.
"""

from __future__ import annotations

import contextlib
import json
import select
import socket
import time
from collections.abc import Iterator
from typing import Any

from attnax.launcher.crew import End
from attnax.launcher.job import Job

__all__ = ["Alone", "Followers", "Link", "LostError", "call_leader", "free_port"]

_LONGEST = 1 << 16  # bytes of a line


class LostError(Exception):
    """The launcher at the other end is gone."""


class Link:
    """A connection to another launcher."""

    def __init__(self, connection: socket.socket):
        self._connection, self._rest = connection, b""
        connection.settimeout(10.0)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # notices a machine that is gone
        for option, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4)):
            if hasattr(socket, option):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)

    def send(self, **message: Any) -> None:
        """Sends a message.

        Raises:
            LostError: the other end is gone.
        """
        try:
            self._connection.sendall(json.dumps(message).encode() + b"\n")
        except OSError as error:
            raise LostError from error

    def receive(self, seconds: float) -> dict[str, Any] | None:
        """The next message, or None if none comes within that time.

        Raises:
            LostError: the other end is gone, or sends something else than messages.
        """
        until = time.monotonic() + seconds
        while b"\n" not in self._rest:
            ready, _, _ = select.select([self._connection], [], [], max(0.0, until - time.monotonic()))
            if not ready:
                return None
            try:
                data = self._connection.recv(4096)
            except OSError as error:
                raise LostError from error
            if not data or len(self._rest) > _LONGEST:
                raise LostError
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        try:
            message = json.loads(line)
        except ValueError as error:
            raise LostError from error
        if not isinstance(message, dict):
            raise LostError
        return message

    def close(self) -> None:
        """Ends the connection."""
        self._connection.close()


class Alone:
    """The leader's view of the other nodes where there are none."""

    missing: tuple[int, ...] = ()
    are_done = True

    def look(self) -> End | None:
        """The end of the attempt on another node."""
        return None

    def tell(self, **message: Any) -> None:
        """Sends a message to every other node."""

    def close(self) -> None:
        """Ends the connections."""


class Followers:
    """The leader's view of the other nodes."""

    def __init__(self, job: Job):
        self._job = job
        self._server = socket.create_server((job.interface, job.port), backlog=job.nodes)
        self._links: dict[int, Link] = {}
        self._idle: set[int] = set()
        self._done: set[int] = set()

    @property
    def missing(self) -> tuple[int, ...]:
        """The nodes that are not ready to start an attempt."""
        self._welcome()
        for node, message in self._messages():
            if "idle" in message:
                self._idle.add(node)
        return tuple(node for node in range(1, self._job.nodes) if node not in self._idle)

    @property
    def are_done(self) -> bool:
        """Whether all processes of the other nodes have ended well."""
        return len(self._done) == self._job.nodes - 1

    def look(self) -> End | None:
        """The end of the attempt on another node, or of the node itself."""
        for node, message in self._messages():
            if message.get("ended") == 0:
                self._done.add(node)
            elif "ended" in message:
                return End(int(message["ended"]), f"node {node}: {message['reason']}", is_stall=bool(message["stall"]))
        lost = next((node for node in range(1, self._job.nodes) if node not in self._links), None)
        return None if lost is None else End(1, f"the launcher of node {lost} is gone.")

    def tell(self, **message: Any) -> None:
        """Sends a message to every other node; a start makes them busy."""
        if "start" in message:
            self._idle.clear()
            self._done.clear()
        for node, link in list(self._links.items()):
            try:
                link.send(**message)
            except LostError:
                self._forget(node)

    def close(self) -> None:
        """Ends the connections."""
        for link in self._links.values():
            link.close()
        self._server.close()

    def _messages(self) -> Iterator[tuple[int, dict[str, Any]]]:
        for node, link in list(self._links.items()):
            try:
                while (message := link.receive(0.0)) is not None:
                    yield node, message
            except LostError:
                self._forget(node)

    def _forget(self, node: int) -> None:
        self._links.pop(node).close()
        self._idle.discard(node)

    def _welcome(self) -> None:
        """Takes new connections, and says what is wrong with one that does not fit."""
        while select.select([self._server], [], [], 0.0)[0]:
            link = Link(self._server.accept()[0])
            try:
                hello = link.receive(5.0) or {}
                problem = self._problem(hello)
                if problem is not None:
                    link.send(refused=problem)
                    link.close()
                    continue
            except LostError:
                link.close()
                continue
            node = hello["node"]
            if node in self._links:  # it has come back before its loss was noticed
                self._forget(node)
            self._links[node] = link
            self._idle.add(node)

    def _problem(self, hello: dict[str, Any]) -> str | None:
        for name, mine in (("nodes", self._job.nodes), ("processes", self._job.processes)):
            if hello.get(name) != mine:
                return f"--{name} must be the same on all nodes; got {hello.get(name)}, and {mine} on node 0."
        node = hello.get("node")
        if type(node) is not int or not 0 < node < self._job.nodes:
            return f"--node must be above 0 and below {self._job.nodes}; got {node}."
        return None


def call_leader(job: Job) -> Link | None:
    """A connection to the launcher of node 0, or None if it cannot be had now."""
    with contextlib.suppress(OSError):
        link = Link(socket.create_connection((job.host, job.port), timeout=5.0))
        with contextlib.suppress(LostError):
            link.send(node=job.node, nodes=job.nodes, processes=job.processes)
            return link
    return None


def free_port(interface: str) -> int:
    """A port that is free now."""
    with socket.create_server((interface, 0)) as server:
        port: int = server.getsockname()[1]
        return port
