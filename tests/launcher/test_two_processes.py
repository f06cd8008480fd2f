"""Two real processes with JAX, at the loopback."""

import re
import sys
from pathlib import Path

import pytest
from children import ROOT
from two_processes import ATTEMPTS

from attnax.launcher import Job, run


@pytest.mark.contract
def test_two_processes_compute_fail_miss_and_stop_together(capsys, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    line = [sys.executable, str(Path(__file__).with_name("two_processes.py"))]
    assert run(Job(words=lambda newest: line, processes=2, devices=1, restarts=len(ATTEMPTS) - 1, stall=60.0)) == 143
    out, err = capsys.readouterr()
    for process in "01":
        mine = re.findall(rf"\[{process}\] (.*)\n", out)
        expected = f"sum 15.0 of ('process 0', 'process 1') main {process == '0'}"
        assert mine.count(expected) == mine.count("again ('0', '1')") == len(ATTEMPTS)
    assert "[1] RuntimeError: a bug" in err and "attnax launch: process 1 ended with exit code 1." in err
    late = "barrier: all 2 processes must arrive at 'after the update' within 1 s; process 1 did not."
    assert f"[0] error {late}" in out
    assert out.count("error StopRequests: SIGTERM must have no Python handler in connected processes") == 2
    stopped = re.findall(r"\[\d\] stopped after (\d+)\n", out)
    assert len(stopped) == 2 and len(set(stopped)) == 1 and int(stopped[0]) > 3
    assert "never" not in out + err  # a process that fails does not wait for the others
