"""Limits and defaults of the flags are the library's own; at each limit a command begins or is refused in words."""

import dataclasses
import enum
import inspect
import types
import typing

import jax
import numpy as np
import pytest
from tiny_run import TINY

from attnax import TransformerLM
from attnax.cache import SPARE_SLOTS
from attnax.cli import main
from attnax.cli.options import DRAW, Generate, Train
from attnax.cli.session import SAMPLER
from attnax.errors import InputError
from attnax.generation import Sampler, make_request
from attnax.pretrained import GenerationSettings
from attnax.training import RunFolder, RunOptions, read_corpus

WHOLE = ["-1", "0", "1", "2", "3", str(10**9 + 7), str(10**20)]
REAL = ["-1", "0", "1e-30", "0.5", "1", "1e30", "inf", "nan"]


def options(cls=Train):
    """The types of the flags by name, also of the flags of the model and the optimizer."""
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


NOT_OF_A_START = ("out", "resume", "step", "dry_run")
CASES = [(name, value) for name, kind in options() if name not in NOT_OF_A_START for value in limits(kind)]
CASES.remove(("data", "None"))  # all of the standard library, whose tokens take half a minute to learn


class BegunError(Exception):
    """The run folder would have been made."""


def begin(*arguments):
    raise BegunError


@pytest.fixture
def start(corpus, monkeypatch, capsys):
    """Whether a run begins with these flags; if not, the line with the reason."""
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


def default_of(function, name):
    return inspect.signature(function).parameters[name].default


def is_refused(make):
    try:
        make()
    except ValueError:  # InputError is one too
        return True
    return False


SAMPLED = sorted({field.name for field in dataclasses.fields(Sampler)} & {f.name for f in dataclasses.fields(Generate)})


@pytest.mark.parametrize("name", SAMPLED)
def test_flags_of_a_sampler_have_its_limits(name):
    assert len(SAMPLED) == 8
    whole = name in ("top_k", "no_repeat_ngram")
    for text in WHOLE if whole else REAL:
        value = (int if whole else float)(text)
        fields = {name: value}
        refused = is_refused(lambda fields=fields: Sampler(**fields))
        assert refused == is_refused(lambda fields=fields: Generate(folder="a", **fields).check())
        if refused:
            flag = "--" + name.replace("_", "-")
            with pytest.raises(InputError, match=f"^{flag} must be .*; got {value}\\.$".replace("+", r"\+")):
                Generate(folder="a", **fields).check()


def test_flags_of_generate_have_the_limits_and_defaults_of_the_library():
    for name in ("max_new_tokens", "num_samples"):
        for count in (-1, 0, 1, 2):
            fields = {"max_new_tokens": 1, "vocab_size": 5, name: count}
            request = jax.tree_util.Partial(make_request, np.zeros((1, 1), np.int32), **fields)
            assert is_refused(request) == is_refused(Generate(folder="a", **{name: count}).check)
    for count in (0, 1, SPARE_SLOTS, SPARE_SLOTS + 1):
        refused = is_refused(Generate(folder="a", draft="b", draft_tokens=count).check)
        assert refused == (not 1 <= count <= SPARE_SLOTS)
    assert Generate.draft_tokens == default_of(TransformerLM.generate, "num_draft_tokens")
    assert GenerationSettings.length_penalty == default_of(TransformerLM.beam_search, "length_penalty")
    settled = Generate(folder="a").settle(GenerationSettings())
    assert {name: getattr(settled, name) for name in DRAW} == DRAW
    assert (SAMPLER.temperature, SAMPLER.top_p) == (settled.temperature, settled.top_p)


def test_flags_of_train_have_the_defaults_of_a_run():
    for field in dataclasses.fields(RunOptions):
        assert getattr(Train(), field.name) is field.default
    assert RunOptions.held_out == default_of(read_corpus, "held_out")
