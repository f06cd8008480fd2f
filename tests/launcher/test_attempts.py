"""Processes that end well, fail, hang or are asked to stop, and what their launcher makes of it."""

import itertools
import re
import signal
import time

import pytest
from children import ends, job

from attnax.errors import InputError
from attnax.launcher import Job, attempts, run


def test_every_process_knows_the_others_and_its_lines_have_its_number(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "9")  # of another launcher around this one
    code = """
names = "JAX_NUM_PROCESSES", "JAX_NUM_CPU_DEVICES", "JAX_LOCAL_DEVICE_IDS", "JAX_COORDINATOR_ADDRESS", "WORLD_SIZE"
print(*(os.environ.get(name) for name in names))
print(os.environ["JAX_COORDINATOR_BIND_ADDRESS"], file=sys.stderr)
"""
    assert run(job(code, processes=2, devices=3)) == 0
    out, err = capsys.readouterr()
    found = re.fullmatch(r"\[\d\] 2 3 (.*) (127.0.0.1:\d+) None\n\[\d\] 2 3 (.*) (127.0.0.1:\d+) None\n", out)
    assert {found[1], found[3]} == {"0,1,2", "3,4,5"} and found[2] == found[4]
    assert f"[0] {found[2]}\n" in err and f"[1] {found[2]}\n" in err


def test_the_first_failure_ends_the_others(capsys):
    code = """
if me == 1:
    sys.exit(3)
signal.signal(signal.SIGTERM, lambda *_: (print("asked"), sys.exit(0)))
print("ready")
wait()
"""
    begun = time.monotonic()
    assert run(job(code, processes=2)) == 3
    assert time.monotonic() - begun < 300
    assert "attnax launch: process 1 ended with exit code 3." in capsys.readouterr().err


def test_processes_that_ignore_sigterm_are_killed_with_their_children(capsys):
    code = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = os.fork()
if child == 0:
    wait()
print(child, os.getpid())
if me == 1:
    time.sleep(0.2)  # until both have written
    os.kill(os.getpid(), signal.SIGKILL)
wait()
"""
    assert run(job(code, processes=2)) == 128 + signal.SIGKILL
    out, err = capsys.readouterr()
    assert "process 1 was ended by SIGKILL." in err
    numbers = [int(number) for number in re.findall(r"\d+", re.sub(r"\[\d\]", "", out))]
    assert len(numbers) == 4
    assert all(ends(number) for number in numbers)


def test_a_stopped_process_is_found_and_the_stacks_of_the_others_are_printed(capsys):
    code = """
from attnax.launcher import beat
def update():
    beat()
    time.sleep(0.01)
beat()
if me == 1:
    os.kill(os.getpid(), signal.SIGSTOP)
while True:
    update()
"""
    assert run(job(code, processes=2, stall=0.5)) == 1
    err = capsys.readouterr().err
    assert re.search(r"stuck: process 1 has not beaten for \d+ s\.", err)
    assert re.search(r"\[0\] Current thread .*\n\[0\]   File .* in update\n", err)


def test_process_0_may_end_last():
    assert run(job("time.sleep(0.2 * (1 - me))", processes=2)) == 0


@pytest.mark.parametrize(
    ("restarts", "checkpoints", "count"),
    [(0, {}, 1), (0, {1: 5}, 1), (1, {}, 2), (1, {1: 5, 2: 6}, 3), (1, {2: 6}, 3), (2, {2: 6, 3: 6}, 4)],
)
def test_only_restarts_without_a_new_checkpoint_count(capsys, restarts, checkpoints, count):
    code = f"""
print("attempt", attempt)
if attempt in {checkpoints}:
    checkpoint({checkpoints}[attempt])
sys.exit(7)
"""
    assert run(job(code, restarts=restarts)) == 7
    out, err = capsys.readouterr()
    assert out.count("attempt") == count
    assert ("restarts in a row brought no new checkpoint" in err) == (restarts > 0)


def test_every_attempt_has_a_port_of_its_own_and_the_words_of_a_later_one(capsys, monkeypatch):
    ports = itertools.count(40000)
    monkeypatch.setattr(attempts, "free_port", lambda interface: next(ports))
    words = {None: ["sh", "-c", "echo $JAX_COORDINATOR_ADDRESS; exit 1"]}
    words[-1] = ["sh", "-c", "echo again $JAX_COORDINATOR_ADDRESS"]
    assert run(Job(words=words.get, processes=1, restarts=1)) == 0
    assert capsys.readouterr().out == "[0] 127.0.0.1:40000\n[0] again 127.0.0.1:40001\n"


@pytest.mark.parametrize("code", [2, 3])
def test_wrong_use_and_a_divergence_are_not_tried_again(capsys, code):
    assert run(job(f"print('once'); sys.exit({code})", restarts=5)) == code
    assert capsys.readouterr().out.count("once") == 1


SAVES = """
def save(*_):
    print("saved")
    sys.exit(143)
signal.signal(signal.SIGTERM, save)
open(os.environ["ATTNAX_PULSE"], "w").close()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_is_passed_on_as_sigterm_and_waited_for(capsys, number):
    code = f"""
{SAVES}
other = os.environ["ATTNAX_PULSE"][:-1] + str(1 - me)
while not os.path.exists(other):
    time.sleep(0.01)
if me == 1:
    os.kill(os.getppid(), {int(number)})
wait()
"""
    before = signal.getsignal(number)
    assert run(job(code, processes=2, restarts=5)) == 128 + number
    assert signal.getsignal(number) is before
    out = capsys.readouterr().out
    assert out.count("[0] saved") == out.count("[1] saved") == 1


def test_a_process_that_was_asked_to_stop_stops_all_and_nothing_is_started_again(capsys):
    code = f"""
if me == 0:
    {SAVES.strip().replace(chr(10), chr(10) + "    ")}
    wait()
while not os.path.exists(os.environ["ATTNAX_PULSE"][:-1] + "0"):
    time.sleep(0.01)
os.kill(os.getpid(), signal.SIGTERM)
"""
    assert run(job(code, processes=2, restarts=5)) == 143
    out, err = capsys.readouterr()
    assert out == "[0] saved\n" and "process 1 was ended by SIGTERM." in err


def test_a_second_signal_kills(capsys):
    code = """
signal.signal(signal.SIGTERM, lambda *_: os.kill(os.getppid(), signal.SIGTERM))
os.kill(os.getppid(), signal.SIGTERM)
while True:
    wait()
"""
    begun = time.monotonic()
    assert run(job(code)) == 143
    assert time.monotonic() - begun < 300
    assert "a second signal came." in capsys.readouterr().err


def test_a_signal_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        assert run(job("os.kill(os.getppid(), signal.SIGHUP)")) == 0
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_command_that_cannot_be_started_is_an_error_of_its_name():
    with pytest.raises(FileNotFoundError, match="no-such-program"):
        run(Job(words=lambda newest: ["no-such-program"], processes=2))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"processes": 0}, "--processes must be at least 1; got 0."),
        ({"devices": 0}, "--devices must be at least 1; got 0."),
        ({"restarts": -1}, "--restarts must be at least 0; got -1."),
        ({"stall": float("nan")}, "--stall must be at least 0; got nan."),
        ({"node": 1}, "--node must be at least 0 and below --nodes 1; got 1."),
        ({"nodes": 2}, "--nodes above 1 needs --coordinator HOST:PORT"),
        ({"nodes": 2, "coordinator": "host"}, "--coordinator must be HOST:PORT; got 'host'."),
        ({"nodes": 2, "coordinator": "host:0"}, "--coordinator must be HOST:PORT; got 'host:0'."),
    ],
)
def test_wrong_options_are_refused(wrong, words):
    with pytest.raises(InputError, match=re.escape(words)):
        job("", **({"processes": 1} | wrong))
