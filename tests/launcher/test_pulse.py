import os
import signal
import subprocess
import sys

import pytest
from children import ROOT, ends, program

from attnax.launcher import beat, pulse
from attnax.launcher.pulse import Pulse


def test_beat_does_nothing_without_a_launcher(monkeypatch, tmp_path):
    monkeypatch.delenv("ATTNAX_PULSE", raising=False)
    monkeypatch.chdir(tmp_path)
    beat()
    beat(checkpoint=3)
    assert list(tmp_path.iterdir()) == []


def test_silence_ends_with_a_beat_and_the_newest_checkpoint_is_told(monkeypatch, tmp_path):
    now, path = [100.0], tmp_path / "0"
    monkeypatch.setattr(pulse.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(pulse.faulthandler, "register", lambda *_, **__: None)  # of this process
    monkeypatch.setenv("ATTNAX_PULSE", str(path))
    watched = Pulse(path)
    now[0] += 3
    assert watched.silence() == 3 and not watched.has_beaten and watched.checkpoint() == -1
    for said in (None, 12, None):
        if said is None:
            beat()
        else:
            beat(checkpoint=said)
        assert watched.silence() == 0 and watched.has_beaten
        now[0] += 2
        assert watched.silence() == 2
    assert watched.checkpoint() == 12
    os.utime(path, (0, 0))  # someone sets the clock back: that is a change, and not an age
    assert watched.silence() == 0


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux to end a process with its parent")
def test_a_process_ends_when_its_launcher_is_killed(tmp_path):
    child = "from attnax.launcher import beat; beat(); print(os.getpid(), flush=True); wait()"
    code = f"""
import os, subprocess, sys, time
sys.path.insert(0, {str(ROOT)!r})
os.environ |= {{"ATTNAX_PULSE": {str(tmp_path / "0")!r}, "ATTNAX_LAUNCHER": str(os.getpid())}}
os.environ |= {{"JAX_PROCESS_ID": "0", "ATTNAX_ATTEMPT": "1"}}
subprocess.run({program(child)!r})
"""
    with subprocess.Popen([sys.executable, "-S", "-c", code], stdout=subprocess.PIPE, text=True) as launcher:
        number = int(launcher.stdout.readline())
        launcher.send_signal(signal.SIGKILL)
        assert launcher.stdout.read() == ""  # the child held the pipe too, and has ended
    assert ends(number)
