"""The format that the config.json of a run folder names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["FORMAT", "is_format", "is_run_folder"]

_FAMILY = "attnax run "
FORMAT = f"{_FAMILY}3"


def is_format(value: Any) -> bool:
    """Whether `attnax train`, of any version, wrote a config.json with this format."""
    return isinstance(value, str) and value.startswith(_FAMILY)


def is_run_folder(path: Path) -> bool:
    """Whether the folder has a config.json of `attnax train`, of any version."""
    try:
        config = json.loads((path / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(config, dict) and is_format(config.get("format"))
