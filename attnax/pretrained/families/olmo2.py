"""OLMo 2: Llama with norms of the sublayers' results, and of all queries and all keys of a token together."""

from attnax.pretrained.families.llama import (
    ATTENTION,
    ATTENTION_BIAS,
    FIELDS,
    GATED_FEED_FORWARD,
    GATED_SILU,
    HEAD,
    QK_NORMS,
    UNTIED,
    decoder,
    in_layers,
)
from attnax.pretrained.rope_fields import rope
from attnax.pretrained.rules import norm

__all__ = ["OLMO2"]

OLMO2 = decoder(
    "olmo2",
    "Olmo2",
    *(*FIELDS, GATED_SILU, UNTIED, ATTENTION_BIAS, rope()),
    constants={"norm_placement": "branch", "qk_norm": "projection"},
    rules=(
        *in_layers(
            ATTENTION,
            GATED_FEED_FORWARD,
            norm("post_attention_layernorm", "around_attention.norm_branch"),
            norm("post_feedforward_layernorm", "around_feed_forward.norm_branch"),
        ),
        *QK_NORMS,
        *HEAD,
    ),
)
