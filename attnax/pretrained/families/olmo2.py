"""OLMo 2: Llama with norms of what sublayers add, and of all queries and keys together."""

import dataclasses

from attnax.pretrained.families.llama import ATTENTION, FIELDS, GATED_FEED_FORWARD, HEAD, LLAMA, QK_NORMS
from attnax.pretrained.family import norm, within
from attnax.pretrained.fields import GATED, biases, choice, flag, rope

__all__ = ["OLMO2"]

OLMO2 = dataclasses.replace(
    LLAMA,
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    aliases=("Olmo2Model",),
    constants={**LLAMA.constants, "norm_placement": "branch", "qk_norm": "projection"},
    fields=(
        *FIELDS,
        choice("hidden_act", "ff_activation", GATED, "silu"),
        flag("tie_word_embeddings", "tie_embeddings", False),
        biases(attention_bias=(False, ("query", "key", "value", "out"))),
        rope(),
    ),
    harmless=(),
    rules=(
        *within(
            "{base}layers.{layer}",
            "decoder.stack.blocks.{layer}",
            ATTENTION,
            GATED_FEED_FORWARD,
            norm("post_attention_layernorm", "around_attention.norm_branch"),
            norm("post_feedforward_layernorm", "around_feed_forward.norm_branch"),
        ),
        *QK_NORMS,
        *HEAD,
    ),
)
