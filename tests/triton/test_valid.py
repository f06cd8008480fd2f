"""Every GPU kernel is a valid Triton module: MLIR's verifier reads it, as a GPU would at the first call."""

import itertools

import calls
import pytest
from _lowered import parse

QUICK = {  # the cheapest module of each kernel
    ("no mask", "table", "grouped", "head 32", "odd", "float32", "", ""): [
        "forward",
        "d_query",
        "d_key_value",
        "d_table",
    ],
    ("no mask", "bias", "grouped", "head 32", "odd", "float32", "", ""): [
        "forward",
        "d_query",
        "d_key_value",
        "d_pairs",
    ],
}


@pytest.mark.parametrize("levels", QUICK, ids=" ".join)
def test_the_cheapest_module_of_each_kernel_is_valid(levels):
    kernels = calls.kernels(levels)
    assert [kernel.name.removeprefix("attnax_") for kernel in kernels] == QUICK[levels]
    for kernel in kernels:
        parse(kernel)


def test_modules_that_read_caches_are_valid():
    for kernel in itertools.islice(calls.decoding(), 2):
        assert kernel.name == "attnax_decode"
        parse(kernel)


@pytest.mark.contract
@pytest.mark.parametrize("levels", tuple(calls.pairwise()), ids=" ".join)
def test_every_two_choices_together_make_valid_modules(levels):
    for kernel in calls.kernels(levels):
        parse(kernel)


@pytest.mark.contract
def test_every_way_to_read_a_cache_makes_a_valid_module():
    for kernel in calls.decoding():
        parse(kernel)


def test_an_invalid_module_is_refused_in_the_words_of_the_verifier():
    kernel = next(calls.decoding())
    with pytest.raises(ValueError, match="attnax_decode: invalid module"):
        parse(kernel._replace(bytecode=kernel.bytecode[:-9]))
