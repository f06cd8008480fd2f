"""Starts the processes of one training, watches them, and starts them again; `attnax launch` is its command.

Nothing here imports JAX: a launcher starts at once, needs little memory and holds no device.
"""

from attnax.launcher.attempts import run
from attnax.launcher.job import Job
from attnax.launcher.pulse import beat

__all__ = ["Job", "beat", "run"]
