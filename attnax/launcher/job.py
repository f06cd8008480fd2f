"""What to launch: the words of a command, and how many processes run it on which nodes."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from attnax.errors import InputError
from attnax.launcher.pulse import LAUNCHER, PULSE

__all__ = ["LAUNCH", "Job"]

LAUNCH = "ATTNAX_LAUNCH"  # the flags of the launcher, in the environment of its processes

# Another launcher's variables: they name another world than this one's, so that the processes must not see them.
_FOREIGN = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@dataclass(frozen=True, kw_only=True)
class Job:
    """Processes of one command on one or more nodes.

    Attributes:
        words: the words of the command for an attempt; called with None for the first attempt, and for later ones with
            the newest checkpoint that a process has told, or -1.
        processes: number of processes on each node.
        devices: number of devices of a process; by default all that JAX finds.
        nodes: number of nodes. A launcher runs on each, and that of node 0 leads.
        node: which of them this one is, from 0.
        coordinator: HOST:PORT at which node 0's launcher listens for the others; needed with more than one node.
        restarts: number of attempts in a row without a new checkpoint, beyond the first, before giving up.
        stall: seconds without a beat after which a process counts as stuck; 0 turns the clock off.

    Raises:
        InputError: a value is out of range, or more than one node has no coordinator.
    """

    words: Callable[[int | None], Sequence[str]]
    processes: int
    devices: int | None = None
    nodes: int = 1
    node: int = 0
    coordinator: str | None = None
    restarts: int = 0
    stall: float = 600.0

    def __post_init__(self) -> None:
        for name, value, least in (
            ("processes", self.processes, 1),
            ("devices", 1 if self.devices is None else self.devices, 1),
            ("nodes", self.nodes, 1),
            ("restarts", self.restarts, 0),
            ("stall", self.stall, 0),
        ):
            if not value >= least:
                raise InputError(f"--{name} must be at least {least}; got {value}.")
        if not 0 <= self.node < self.nodes:
            raise InputError(
                f"--node must be at least 0 and below --nodes {self.nodes}; got {self.node}. Nodes count from 0."
            )
        if self.nodes > 1 and self.coordinator is None:
            raise InputError("--nodes above 1 needs --coordinator HOST:PORT, an address of node 0.")
        if self.coordinator is not None:
            host, _, port = self.coordinator.rpartition(":")
            if not host or not port.isdecimal() or not 0 < int(port) < 65536:
                raise InputError(f"--coordinator must be HOST:PORT; got {self.coordinator!r}.")

    @property
    def host(self) -> str:
        """The host of node 0."""
        return "127.0.0.1" if self.coordinator is None else self.coordinator.rpartition(":")[0]

    @property
    def port(self) -> int:
        """The port at which node 0's launcher listens."""
        assert self.coordinator is not None
        return int(self.coordinator.rpartition(":")[2])

    @property
    def interface(self) -> str:
        """The address to listen at: the loopback for processes of one machine, else every address of the machine."""
        return "127.0.0.1" if self.host in ("localhost", "127.0.0.1") else ""

    def environment(self, index: int, address: str, attempt: int, pulse: Path) -> dict[str, str]:
        """The environment of process number `index` of this node.

        Args:
            index: from 0 to `processes` - 1.
            address: of JAX's coordinator in this attempt.
            attempt: counted from 1.
            pulse: the file that the process touches.
        """
        variables = {name: value for name, value in os.environ.items() if name not in _FOREIGN}
        variables |= {
            "JAX_COORDINATOR_ADDRESS": address,
            "JAX_NUM_PROCESSES": str(self.processes * self.nodes),
            "JAX_PROCESS_ID": str(self.processes * self.node + index),
            "ATTNAX_ATTEMPT": str(attempt),
            PULSE: str(pulse),
            LAUNCHER: str(os.getpid()),
            LAUNCH: self.flags,
        }
        variables.setdefault("PYTHONUNBUFFERED", "1")  # lines come when they are printed
        if self.interface:
            variables["JAX_COORDINATOR_BIND_ADDRESS"] = f"{self.interface}:{address.rpartition(':')[2]}"
        if self.devices is not None:
            first = index * self.devices
            variables["JAX_NUM_CPU_DEVICES"] = str(self.devices)
            variables["JAX_LOCAL_DEVICE_IDS"] = ",".join(str(first + i) for i in range(self.devices))
        return variables

    @property
    def flags(self) -> str:
        """The flags of the launcher, without those that have their default value."""
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "words"}
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        numbers = {name: f"{value:g}" if name == "stall" else value for name, value in given.items()}
        return " ".join(f"--{name} {numbers[name]}" for name, value in given.items() if value != defaults[name])

    def line(self, newest: int | None) -> list[str]:
        """The command line of an attempt; `train` is the command of this package, anything else a program."""
        words = list(self.words(newest))
        return [sys.executable, "-m", "attnax", *words] if words[0] == "train" else words
