"""The files that make a folder a store of tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["FORMAT", "PROGRESS", "STORE", "is_store"]

FORMAT = "attnax store 1"
STORE = "store.json"  # written last: a folder without it is no complete store
PROGRESS = "progress.jsonl"  # of a store that is being written


def is_store(path: Path) -> bool:
    """Whether the folder is a store of `attnax tokenize`, complete or not: shards are enough."""
    return any(_has_format(path / name) for name in (STORE, PROGRESS)) or any(path.glob("*-[0-9]*[0-9].names"))


def _has_format(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            text = file.readline() if path.name == PROGRESS else file.read()
        found: Any = json.loads(text)
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and str(found.get("format")).startswith("attnax store ")
