"""Every option of `attnax train` at its limits: a run begins, or one line says why not, before anything is made."""

import dataclasses
import enum
import types
import typing

import pytest
from tiny_run import TINY

from attnax.cli import main
from attnax.cli.options import Train
from attnax.training import RunFolder

WHOLE = ["-1", "0", "1", "2", "3", str(10**9 + 7), str(10**20)]
REAL = ["-1", "0", "1e-30", "0.5", "1", "1e30", "inf", "nan"]


def options(cls=Train):
    """The types of the flags by their names; those of the model and the optimizer are in dataclasses of their own."""
    kinds = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(kinds[field.name]):
            yield from options(kinds[field.name])
        else:
            yield field.name, kinds[field.name]


def limits(kind):
    """Values to try, as a person types them; True is a flag without one."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return [value for part in typing.get_args(kind) for value in limits(part)]
    if typing.get_origin(kind) is typing.Literal:
        return [str(value) for value in typing.get_args(kind)]
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return list(kind.__members__)
    return {int: WHOLE, float: REAL, bool: [True], type(None): ["None"]}.get(kind, ["", "nowhere"])


NOT_OF_A_START = ("out", "resume", "step")
CASES = [(name, value) for name, kind in options() if name not in NOT_OF_A_START for value in limits(kind)]
CASES.remove(("data", "None"))  # all of the standard library, whose tokens take half a minute to learn


class BegunError(Exception):
    """The run folder would have been made."""


def begin(*arguments):
    raise BegunError


@pytest.fixture
def start(corpus, monkeypatch, capsys):
    """Whether a run begins with these flags; if not, the line that says why."""
    monkeypatch.setattr(RunFolder, "create", begin)

    def call(*flags):
        capsys.readouterr()
        try:
            assert main(["train", "--data", str(corpus), *TINY, *flags]) == 2
        except BegunError:
            return None
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith("attnax: ")
        return line

    return call


@pytest.mark.contract
@pytest.mark.parametrize("name", dict(CASES))
def test_a_run_begins_or_a_line_says_why_not(start, name):
    flag = "--" + name.replace("_", "-")
    for value in (value for other, value in CASES if other == name):
        start(flag, *([] if value is True else [value]))


def test_what_cannot_be_trained_or_not_write_is_said_before_the_training(start):
    assert "token types are an encoder's; got num_token_types=3" in start("--num-token-types", "3")
    assert "lite attention does not read a KVLayerCache" in start("--attention-type", "LITE")
    assert "needs at least" in start("--d-ff", str(10**9)) and "GB" in start("--num-layers", str(10**9))
    assert "--data must not be empty" in start("--data", "")
    assert "--out must not be empty" in start("--out", "")
    assert "--steps must be below 2 ** 31" in start("--steps", str(2**31))
    assert start("--layer-pattern", "x") is not None
    assert "--param-dtype float64 needs JAX_ENABLE_X64=1" in start("--param-dtype", "float64")
    assert start() is None
