"""The fixture `main`: the function `main` of the example that a test names."""

import importlib

import pytest


@pytest.fixture
def main(request):
    return importlib.import_module(request.param).main
