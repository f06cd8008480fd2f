"""Launchers of several nodes, in threads of this process; they meet at the loopback."""

import re
import socket
import threading
import time

import pytest
from children import job

from attnax.errors import InputError
from attnax.launcher import attempts, nodes
from attnax.launcher.attempts import _follow, _lead, _Signals
from attnax.launcher.nodes import Link, LostError, free_port


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(attempts, "_MEET", 20.0)


def start(count, code, **options):
    """Runs a launcher for each node; returns what each gave."""
    coordinator, results = f"127.0.0.1:{free_port('127.0.0.1')}", {}

    def work(node):
        try:
            this = job(code, nodes=count, node=node, coordinator=coordinator, **options)
            results[node] = (_follow if node else _lead)(this, _Signals())
        except InputError as error:
            results[node] = str(error)

    threads = [threading.Thread(target=work, args=(node,)) for node in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads)
    return results


def test_processes_count_through_all_nodes_and_name_one_coordinator(capsys):
    code = "print(me, os.environ['JAX_NUM_PROCESSES'], os.environ['JAX_COORDINATOR_ADDRESS'])"
    assert start(3, code, processes=2) == {0: 0, 1: 0, 2: 0}
    found = re.findall(r"\[(\d)\] (\d) 6 (\S+)\n", capsys.readouterr().out)
    assert sorted(name for name, _, _ in found) == list("012345")
    assert all(name == number for name, number, _ in found) and len({address for _, _, address in found}) == 1


def test_a_failure_on_any_node_ends_and_restarts_all(capsys):
    code = """
print("attempt", attempt)
if attempt < 3 and me == attempt - 1:
    sys.exit(5)
if attempt < 3:
    wait()
"""
    assert start(2, code, processes=1, restarts=2) == {0: 0, 1: 0}
    out, err = capsys.readouterr()
    for line in ("[0] attempt 3", "[1] attempt 3"):
        assert out.count(line) == 1
    assert "process 0 ended with exit code 5." in err and "node 1: process 1 ended with exit code 5." in err


def test_the_exit_code_of_the_job_is_that_of_every_launcher():
    code = "sys.exit(6) if me == 1 else wait()"
    assert start(2, code, processes=1) == {0: 6, 1: 6}


def test_a_node_of_another_job_is_refused():
    coordinator, codes = f"127.0.0.1:{free_port('127.0.0.1')}", []
    right = {"nodes": 2, "coordinator": coordinator, "processes": 1}
    leader = threading.Thread(target=lambda: codes.append(_lead(job("", **right), _Signals())))
    leader.start()
    with pytest.raises(InputError, match="--processes must be the same on all nodes; got 3, and 1 on node 0."):
        _follow(job("", node=1, **(right | {"processes": 3})), _Signals())
    assert _follow(job("", node=1, **right), _Signals()) == 0
    leader.join(timeout=60)
    assert codes == [0]


def test_a_node_that_never_comes_is_named(capsys, monkeypatch):
    monkeypatch.setattr(attempts, "_MEET", 0.2)
    coordinator = f"127.0.0.1:{free_port('127.0.0.1')}"
    assert _lead(job("", processes=1, nodes=2, coordinator=coordinator), _Signals()) == 1
    assert "missing: node 1." in capsys.readouterr().err
    assert _follow(job("", processes=1, nodes=2, node=1, coordinator=coordinator), _Signals()) == 1
    assert f"the launcher of node 0 must be at {coordinator}" in capsys.readouterr().err


def test_processes_end_when_the_launcher_of_node_0_is_gone(capsys):
    coordinator = f"127.0.0.1:{free_port('127.0.0.1')}"
    server, signals, codes = socket.create_server(("127.0.0.1", int(coordinator.rpartition(":")[2]))), _Signals(), []
    node = job("print('started'); wait()", processes=1, nodes=2, node=1, coordinator=coordinator)
    follower = threading.Thread(target=lambda: codes.append(_follow(node, signals)))
    follower.start()
    with server:
        link = Link(server.accept()[0])
        assert link.receive(5.0) == {"node": 1, "nodes": 2, "processes": 1}
        link.send(start=1, address="127.0.0.1:1")
        while "started" not in capsys.readouterr().out:
            time.sleep(0.01)
    link.close()
    while "the launcher of node 0 is gone" not in capsys.readouterr().err:
        time.sleep(0.01)
    signals.received.append(15)
    follower.join(timeout=60)
    assert codes == [143]


@pytest.fixture
def link():
    """A connection, and a function that sends bytes to it and ends."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as theirs:

        def send(data):
            theirs.sendall(data)
            theirs.shutdown(socket.SHUT_WR)

        ours = Link(server.accept()[0])
        yield ours, send
        ours.close()


@pytest.mark.parametrize("sent", [b"no message\n", b"[1]\n", b"", b"x" * 10_000])
def test_what_is_no_message_ends_a_connection(link, monkeypatch, sent):
    monkeypatch.setattr(nodes, "_LONGEST", 1000)
    ours, send = link
    send(sent)
    with pytest.raises(LostError):
        ours.receive(5.0)


def test_messages_are_lines_wherever_the_stream_is_cut(link):
    ours, send = link
    assert ours.receive(0.0) is None
    send(b'{"start": 1, "address": "a:1"}\n{"exit": 0}\n')
    assert [ours.receive(5.0), ours.receive(0.0)] == [{"start": 1, "address": "a:1"}, {"exit": 0}]
