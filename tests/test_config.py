"""Configs: every field of a Literal type is checked, errors name the fields in their rule, values take one form."""

import re
from typing import Literal, get_origin, get_type_hints

import pytest

from attnax.config import AttentionType, BlockConfig, RopeScaling, TransformerConfig, VisionTransformerConfig

LITERALS = [
    (kind, name)
    for kind in (TransformerConfig, VisionTransformerConfig, RopeScaling)
    for name, hint in get_type_hints(kind).items()
    if get_origin(hint) is Literal
]
REQUIRED = {TransformerConfig: {"vocab_size": 7}, RopeScaling: {"kind": "linear", "factor": 2.0}}


@pytest.mark.usefixtures("unchecked_shapes")
def test_a_value_outside_of_a_literal_is_refused():
    assert len(LITERALS) > 20
    for kind, name in LITERALS:
        with pytest.raises(ValueError, match=f"^{kind.__name__}: {name} must be one of .*; got {name}='nothing'"):
            kind(**{**REQUIRED.get(kind, {}), name: "nothing"})


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_heads": 6, "num_kv_heads": 4}, "num_heads must be a multiple of num_kv_heads; got num_heads=6, num_kv_"),
        ({"rope_fraction": 1.5}, "rope_fraction must be above 0 and at most 1; got rope_fraction=1.5."),
        (
            {"attention_type": "lite", "pos_emb_type": "alibi"},
            "no scores to bias by pos_emb_type; got pos_emb_type='al",
        ),
        (
            {"rope_scaling": {"kind": "yarn", "factor": 2.0}},
            "RopeScaling: yarn needs original_max_len; got original_max_",
        ),
    ],
)
def test_an_error_names_the_fields_in_its_rule(fields, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        BlockConfig(**fields)


def test_values_of_json_take_the_form_that_the_config_holds():
    pattern = {"attention_type": "linear", "use_bias": ["query"]}
    config = TransformerConfig(vocab_size=7, layer_pattern=pattern, rope_scaling={"kind": "linear", "factor": 2.0})
    assert config.layer_pattern == ({"attention_type": AttentionType.LINEAR, "use_bias": ("query",)},)
    assert config.rope_scaling == RopeScaling(kind="linear", factor=2.0)
    assert VisionTransformerConfig(image_size=32, patch_size=[8, 4]).patch_size == (8, 4)
    assert hash(config) == hash(TransformerConfig(**vars(config)))
