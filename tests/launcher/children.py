"""Small programs that a launcher starts. They import no JAX, and most not even Attnax, so that they start at once."""

import sys
import time
from pathlib import Path

from attnax.launcher import Job

ROOT = Path(__file__).parent.parent.parent
_BEGIN = f"""
import os, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
me, attempt = int(os.environ["JAX_PROCESS_ID"]), int(os.environ["ATTNAX_ATTEMPT"])
def checkpoint(number):
    open(os.environ["ATTNAX_PULSE"], "w").write(str(number))
def wait():
    time.sleep(600)
"""


def program(code):
    """The command line of a program; it knows its number `me`, its `attempt`, `checkpoint(n)` and `wait()`."""
    return [sys.executable, "-S", "-c", _BEGIN + code]


def job(code, processes=1, **options):
    """A job of that program."""
    return Job(words=lambda newest: program(code), processes=processes, **options)


def ends(number):
    """Whether a process ends within two minutes, or was killed and waits for its parent to collect it."""
    for _ in range(10_000):
        try:
            if Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.01)
    return False
