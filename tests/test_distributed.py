"""Several processes from the view of one: what is said about the others, and loops that run alone."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import jax
import pytest

from attnax import distributed
from attnax.distributed import ProcessError, StopRequests, barrier, connect, disconnect, gather, is_main, leave
from attnax.launcher.nodes import free_port

BARRIER = (
    "Barrier timed out. Id: attnax/save::0. This usually happens because a task triggered the barrier too early.\n"
)


class Client:
    """Like JAX's client of the distributed service, with one error."""

    def __init__(self, message):
        self.message, self.waited = message, []

    def wait_at_barrier(self, name, milliseconds):
        self.waited.append((name, milliseconds))
        raise jax.errors.JaxRuntimeError(self.message)


@pytest.fixture
def connected(monkeypatch):
    """Makes this process one of several, with such a client."""

    def make(client, count=4):
        monkeypatch.setattr(distributed._runtime.global_state, "client", client)
        monkeypatch.setattr(distributed._runtime.global_state, "num_processes", count)
        return client

    return make


@pytest.mark.parametrize(
    ("listed", "who"),
    [
        ("1\n", "process 1"),
        ("0\n2\n3\n", "process 0, process 2 and process 3"),
        ("/job:jax_worker/replica:0/task:1\n/job:jax_worker/replica:0/task:3\n", "process 1 and process 3"),
        ("", "one or more"),
    ],
)
def test_a_barrier_names_the_processes_that_did_not_come(connected, listed, who):
    reached = (
        "# of tasks that reached the barrier: 1/4.\nThe first task at the barrier: 2. Some timed out task names:\n"
    )
    client = connected(Client(f"DEADLINE_EXCEEDED: {BARRIER}{reached}{listed}\n\nRPC: /xla.Service/Barrier"))
    with pytest.raises(ProcessError) as error:
        barrier("save", 2.5)
    assert str(error.value).startswith(f"barrier: all 4 processes must arrive at 'save' within 2.5 s; {who} did not. ")
    assert client.waited == [("attnax/save", 2500)]


def test_a_barrier_says_what_else_is_wrong(connected):
    connected(Client("UNAVAILABLE: failed to connect\nmore"))
    with pytest.raises(ProcessError, match="JAX's service says: UNAVAILABLE: failed to connect$"):
        barrier("save", 1.0)


def test_one_process_waits_for_nobody():
    barrier("save", 0.0)
    assert gather("digests", "x", 0.0) == ("x",)
    assert is_main()
    disconnect()
    leave(3)  # it ends connected processes only


def test_a_coordinator_that_does_not_listen_is_named():
    address = f"127.0.0.1:{free_port('127.0.0.1')}"
    with pytest.raises(ProcessError, match=f"connect: process 0 must listen .* got coordinator={address}: .*refused"):
        connect(coordinator=address, processes=2, process=1, seconds=0.0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_asks_one_process_to_stop_and_a_second_one_is_as_usual(number):
    received = []
    before = signal.signal(number, lambda number, _: received.append(number))
    try:
        with StopRequests() as requests:
            assert not requests.agree_to_stop(1) and requests.code == 0
            os.kill(os.getpid(), number)
            assert requests.agree_to_stop(2) and requests.code == 128 + number
            assert received == []
            os.kill(os.getpid(), number)
            assert received == [number]
        with StopRequests() as requests:
            pass
        os.kill(os.getpid(), number)
        assert received == [number, number] and requests.code == 0
    finally:
        signal.signal(number, before)


def test_a_notice_is_printed_at_the_first_signal_and_nothing_is_left_of_it(capsys):
    threads = threading.active_count()
    with StopRequests("interrupted") as requests:
        os.kill(os.getpid(), signal.SIGTERM)
        assert requests.agree_to_stop(1) and requests.code == 143
    assert capsys.readouterr().err == "interrupted\n"
    assert threading.active_count() == threads and signal.set_wakeup_fd(-1) == -1


BUSY = """
import hashlib
from attnax.distributed import StopRequests
with StopRequests("interrupted"):
    print("busy", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # as a compilation: minutes in which no handler runs
"""


def test_signals_are_seen_while_no_handler_runs():
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    with subprocess.Popen([sys.executable, "-c", BUSY], stdout=-1, stderr=-1, text=True, env=environment) as process:
        try:
            assert process.stdout.readline() == "busy\n"
            process.send_signal(signal.SIGINT)
            assert process.stderr.readline() == "interrupted\n"
            assert process.poll() is None
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 130
        finally:
            process.kill()


def test_connected_processes_stop_when_jax_says_so_and_sigint_is_sigterm(connected, monkeypatch):
    received = []
    before = signal.signal(signal.SIGTERM, lambda number, _: received.append(number))  # JAX has one of its own here
    monkeypatch.setattr(distributed.multihost_utils, "reached_preemption_sync_point", lambda update: update == 3)
    connected(Client(""))
    try:
        with StopRequests() as requests:
            os.kill(os.getpid(), signal.SIGINT)
            assert [requests.agree_to_stop(update) for update in (1, 2, 3)] == [False, False, True]
        assert received == [signal.SIGTERM] and requests.code == 143
    finally:
        signal.signal(signal.SIGTERM, before)


def test_an_exception_ends_a_connected_process_at_once(connected, monkeypatch):
    ended, shown = [], []
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.setattr(sys, "excepthook", lambda *error: shown.append(error[0]))
    connected(Client(""))
    distributed._end_at_exceptions()
    for kind in (ValueError, KeyboardInterrupt):
        sys.excepthook(kind, kind(), None)
    assert ended == [1, 130] and shown == [ValueError, KeyboardInterrupt]
