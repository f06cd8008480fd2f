"""The `main` of an example, by its name."""

import importlib

import pytest


@pytest.fixture
def main(request):
    return importlib.import_module(request.param).main
