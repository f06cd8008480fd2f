"""Launchers of tests look often and wait for little."""

import pytest

from attnax.launcher import attempts, crew


@pytest.fixture(autouse=True)
def hasty(monkeypatch):
    monkeypatch.setattr(attempts, "_LOOK", 0.01)
    monkeypatch.setattr(attempts, "_AFTER_FAILURE", 0.3)
    monkeypatch.setattr(attempts, "_LONGEST_PAUSE", 0.0)
    monkeypatch.setattr(attempts, "_CALL", 0.02)
    monkeypatch.setattr(crew, "_FOR_STACKS", 0.3)
