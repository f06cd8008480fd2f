"""Checkpoints for several files of tests."""

import shutil

import pytest
from saved_state import save

from attnax.training import restore


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Checkpoints of the steps 3 and 5, which no test changes."""
    made = tmp_path_factory.mktemp("saved") / "checkpoints"
    save(made, 3, 5)
    return made


@pytest.fixture
def folder(saved, tmp_path):
    """Checkpoints of the steps 3 and 5."""
    return shutil.copytree(saved, tmp_path / "checkpoints")


@pytest.fixture
def without_arrays(monkeypatch):
    """Restoring checks everything and reads no array, which takes most of the time."""
    monkeypatch.setattr(restore, "read_items", lambda target, likes: likes)
