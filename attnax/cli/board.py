"""Files for TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

__all__ = ["Board"]

_NOT_A_CURVE = {"step", "layout"}


class Board:
    """Writes rows of metrics as scalars of their steps.

    Args:
        folder: of the files.
        step: the update that the run goes on from; TensorBoard leaves out later ones of earlier processes.
    """

    def __init__(self, folder: Path, step: int):
        self._writer = SummaryWriter(str(folder), purge_step=step + 1)

    def add(self, row: Mapping[str, Any]) -> None:
        """Adds each number of a row."""
        for name, value in row.items():
            if name not in _NOT_A_CURVE and value is not None:
                self._writer.add_scalar(name, value, row["step"])

    def close(self) -> None:
        """Writes what is left."""
        self._writer.close()
