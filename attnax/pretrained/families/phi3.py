"""Phi-3 with a short context: Llama whose projections share a matrix."""

import dataclasses

from attnax.pretrained.families.llama import FIELDS, HEAD, LLAMA, NORMS
from attnax.pretrained.family import linear, within
from attnax.pretrained.fields import GATED, biases, choice, flag, only, rope, whole

__all__ = ["PHI3"]

PHI3 = dataclasses.replace(
    LLAMA,
    model_type="phi3",
    architecture="Phi3ForCausalLM",
    aliases=("Phi3Model",),
    fields=(
        *FIELDS,
        whole("sliding_window", "attention_window", None),
        choice("hidden_act", "ff_activation", GATED, "silu"),
        flag("tie_word_embeddings", "tie_embeddings", False),
        rope(fraction=("partial_rotary_factor", 1.0), kinds=("default",)),
        biases(),
        only("attention_bias", False),
    ),
    harmless=("resid_pdrop", "embd_pdrop"),
    rules=(
        *within(
            "{base}layers.{layer}",
            "decoder.stack.blocks.{layer}",
            linear("self_attn.qkv_proj", "attention.query", "attention.key", "attention.value"),
            linear("self_attn.o_proj", "attention.out"),
            linear("mlp.gate_up_proj", "feed_forward.gate", "feed_forward.up"),
            linear("mlp.down_proj", "feed_forward.down"),
            NORMS,
        ),
        *HEAD,
    ),
)
