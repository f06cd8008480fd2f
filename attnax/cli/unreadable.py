"""What to do when the disk fails to read a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from attnax.training import checkpoint_steps, latest_checkpoint

__all__ = ["unreadable"]


def unreadable(error: OSError, folder: Path, step: int | None, command: Callable[[int], str]) -> OSError:
    """The error with the command that goes on from an older checkpoint, if there is one.

    Args:
        error: of the disk; it names a file of the checkpoint, or the folder.
        folder: of the checkpoints.
        step: that was asked for; None is the newest.
        command: that goes on from the checkpoint of a step.
    """
    failed = _step_of(error, folder) or step or latest_checkpoint(folder) or 0
    older = [each for each in checkpoint_steps(folder) if each < failed]
    go_on = f"; an older checkpoint goes on with: {command(older[-1])}" if older else ""
    return OSError(error.errno, f"{error.strerror}{go_on}", error.filename or str(folder))


def _step_of(error: OSError, folder: Path) -> int | None:
    """The step whose file the error names."""
    path = Path(str(error.filename)).absolute()
    if not path.is_relative_to(folder.absolute()) or path == folder.absolute():
        return None
    step = path.relative_to(folder.absolute()).parts[0].partition(".")[0]
    return int(step) if step.isdecimal() else None
