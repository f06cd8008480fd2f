"""OLMo 2: Llama with norms after the sublayers, and over all queries and all keys of a token together."""

from attnax.pretrained.families import llama
from attnax.pretrained.rope_fields import rope
from attnax.pretrained.rules import norm

__all__ = ["OLMO2"]

OLMO2 = llama.decoder(
    "olmo2",
    "Olmo2",
    *(*llama.FIELDS, llama.GATED_SILU, llama.UNTIED, llama.ATTENTION_BIAS, rope()),
    constants={"norm_placement": "branch", "qk_norm": "projection"},
    rules=(
        *llama.in_layers(
            llama.ATTENTION,
            llama.GATED_FEED_FORWARD,
            norm("post_attention_layernorm", "around_attention.norm_branch"),
            norm("post_feedforward_layernorm", "around_feed_forward.norm_branch"),
        ),
        *llama.QK_NORMS,
        *llama.HEAD,
    ),
)
