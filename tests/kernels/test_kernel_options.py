"""The keywords of the kernels are those of the TypedDicts that stand for them."""

import inspect

import pytest

from attnax import (
    cached_attention,
    flash_attention,
    memory_efficient_attention,
    pallas_flash_attention,
    ring_attention,
    standard_attention,
)
from attnax.kernels import linear, paged
from attnax.typing import AttentionOptions

CALLS = [  # a kernel, the TypedDict of its keywords, and its keywords beside those
    (standard_attention, AttentionOptions, {"return_lse"}),
    (memory_efficient_attention, AttentionOptions, {"return_lse", "block_size"}),
    (flash_attention, AttentionOptions, {"return_lse", "block_size"}),
    (
        pallas_flash_attention,
        AttentionOptions,
        {"return_lse", "block_q", "block_kv", "interpret", "force_fallback"},
    ),
    (ring_attention, AttentionOptions, {"return_lse", "axis_name", "zigzag", "block_size"}),
    (cached_attention, AttentionOptions, {"return_lse"}),
    (paged.paged_attention, paged.PagedOptions, {"return_lse", "cache", "sequence_idx"}),
    (linear.linear_attention, linear.LinearOptions, {"return_state"}),
]


@pytest.mark.parametrize(("kernel", "options", "others"), CALLS, ids=lambda x: getattr(x, "__name__", ""))
def test_keywords_are_those_of_the_options(kernel, options, others):
    parameters = inspect.signature(kernel).parameters.values()
    keywords = {x.name for x in parameters if x.kind is inspect.Parameter.KEYWORD_ONLY}
    assert keywords == set(options.__annotations__) | others
